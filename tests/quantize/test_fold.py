"""Foldings through the stage: what is written, what is recorded, what is refused, and what a killed run keeps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nano.errors import RequestError
from nano.manifest import read_manifest
from nano.torch_lm import load_float
from quantize.fold import with_rotation
from quantize.lm import load_dequantised
from quantize.options import QuantizeOptions
from quantize.packed import Int4Checkpoint
from quantize.recipe import QuantRecipe
from quantize.run import run_quantize

EVERYTHING = {"rotation": "learned", "awq": True, "samples": 6, "length": 40}


@pytest.fixture(autouse=True)
def short_searches(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is searched for is tested elsewhere; here a few steps do."""
    monkeypatch.setattr("quantize.awq.POWERS", 4)
    monkeypatch.setattr("quantize.learn_rotation.STEPS", 10)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(
        "\n".join(f"The {i} quick foxes jump over {i * 7} dogs, then sleep {i % 9} hours." for i in range(99))
    )
    return path


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_with_nothing_on_a_grid_the_folder_written_is_the_model_read(
    family: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_model(family, intermediate_size=88)
    options = QuantizeOptions("rtn", rotation="hadamard", runtime="torch")
    manifest = run_quantize(folder, [], tmp_path / "out", options, recipe=QuantRecipe(()))
    ids_BT = torch.randint(3, 300, (2, 30))
    with Int4Checkpoint(tmp_path / "out") as checkpoint, torch.no_grad():
        assert checkpoint.shape.tied == (family == "gemma3_text")
        assert checkpoint.modules == []
        found, expected = load_dequantised(checkpoint)(ids_BT).logits, load_float(folder)(ids_BT).logits
        assert float((found - expected).norm() / expected.norm()) < 1e-5
    assert manifest.results["rotation"] == {"kind": "hadamard", "residual": family != "gemma3_text"}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] == manifest.shape["tied"]


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_everything_at_once_is_near_the_float_model_and_recorded(
    family: str, method: Any, tiny_model: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    folder = tiny_model(family, intermediate_size=88)
    manifest = run_quantize(folder, [text], tmp_path / "out", QuantizeOptions(method, **EVERYTHING))  # type: ignore[arg-type]
    ids_BT = torch.randint(3, 300, (2, 30))
    with Int4Checkpoint(tmp_path / "out") as checkpoint, torch.no_grad():
        assert len(checkpoint.modules) == 14
        found, expected = load_dequantised(checkpoint)(ids_BT).logits, load_float(folder)(ids_BT).logits
        assert float((found - expected).norm() / expected.norm()) < (0.2 if family == "llama" else 0.5)
    recipe, results = manifest.recipe, read_manifest(tmp_path / "out").results
    assert (recipe["method"], recipe["rotation"], recipe["awq"]) == (method, "learned", True)
    assert len(results["awq"]) == 2
    assert all(fold["error_after"] <= fold["error_before"] for layer in results["awq"] for fold in layer.values())
    assert manifest.data["windows"] == 6


@pytest.mark.parametrize(
    ("family", "tied", "method", "decided"),
    [
        ("llama", True, "recover", "heads"),
        ("llama", False, "best", "learned"),
        ("gemma3_text", False, "best", "heads"),
        ("llama", False, "gptq", "none"),
    ],
)
def test_what_a_rotation_is_by_default(
    family: str, tied: bool, method: Any, decided: str, tiny_model: Callable[..., Path]
) -> None:
    folder = tiny_model(family, tie_word_embeddings=tied)
    assert with_rotation(folder, QuantizeOptions(method)).rotation == decided
    assert with_rotation(folder, QuantizeOptions(method, rotation="none")).rotation == "none"


@pytest.mark.parametrize("method", ["rtn", "recover"])
def test_values_alone_are_turned_and_a_tied_head_stays_tied(
    method: Any, tiny_model: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    """The recover of one step also sorts channels; both are folded into what it is compared with."""
    folder = tiny_model("llama", intermediate_size=88)
    options = QuantizeOptions(method, rotation="heads", samples=6, length=40, steps=1)
    manifest = run_quantize(folder, [text], tmp_path / "out", options)
    assert manifest.results["rotation"] == {"kind": "heads", "residual": False}
    assert manifest.results.get("channels_sorted", False) == (method == "recover")
    ids_BT = torch.randint(3, 300, (2, 30))
    with Int4Checkpoint(tmp_path / "out") as checkpoint, torch.no_grad():
        assert checkpoint.shape.tied
        found, expected = load_dequantised(checkpoint)(ids_BT).logits, load_float(folder)(ids_BT).logits
        assert float((found - expected).norm() / expected.norm()) < 0.2


def test_what_was_folded_is_kept_when_a_run_is_stopped(
    tiny_model: Callable[..., Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = QuantizeOptions("rtn", **EVERYTHING)  # type: ignore[arg-type]
    whole = run_quantize(tiny_model("llama"), [text], tmp_path / "whole", options)

    def stop(*_arguments: object) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("quantize.rtn.rounded_layers", stop)
        run_quantize(tiny_model("llama"), [text], tmp_path / "out", options)
    monkeypatch.setattr("quantize.learn_rotation.learned_rotation", stop)
    monkeypatch.setattr("quantize.awq.awq", stop)
    resumed = run_quantize(tiny_model("llama"), [text], tmp_path / "out", options)
    assert resumed.files["model.safetensors"] == whole.files["model.safetensors"]
    assert resumed.results["awq"] == whole.results["awq"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


@pytest.mark.parametrize("options", [{"method": "awq"}, {"awq": True}, {"rotation": "learned"}, {"rotation": "heads"}])
def test_text_that_is_missing_is_said(options: dict[str, Any], tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    named = "--method awq|--awq" if "rotation" not in options else f"--rotation {options['rotation']}"
    with pytest.raises(RequestError, match=named):
        run_quantize(tiny_model("llama"), [], tmp_path / "out", QuantizeOptions(**{"method": "rtn", **options}))
    assert list(tmp_path.iterdir()) == []


def test_a_head_that_comes_apart_can_have_its_own_grid(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    options = QuantizeOptions("rtn", rotation="hadamard", embedding="int8", head="int4", runtime="torch")
    run_quantize(tiny_model("llama"), [], tmp_path / "out", options)
    with Int4Checkpoint(tmp_path / "out") as checkpoint:
        assert checkpoint.quantized("lm_head").bits == 4
        assert checkpoint.quantized("model.embed_tokens").bits == 8
