"""The stage as a whole: what it writes is what transformers loads; bad input leaves nothing behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import load_by_transformers, some_sentences
from safetensors.torch import load_file, save_file

from nano.errors import BadFileError, NanokitError, RequestError
from nano.manifest import read_manifest
from nano.torch_lm import load_float
from quantize.lm import load_dequantised, open_int4_model
from quantize.options import QuantizeOptions
from quantize.packed import Int4Checkpoint
from quantize.recipe import Grid, QuantRecipe
from quantize.rules import Rule
from quantize.run import run_quantize

SMALL = QuantizeOptions("gptq", samples=8, length=48)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return some_sentences(tmp_path_factory.mktemp("text"))


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_transformers_gives_the_logits_of_our_own_dequantisation(
    family: str, tied: bool, method: Any, tiny_model: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    folder = tiny_model(family, tie_word_embeddings=tied, intermediate_size=88)
    out = tmp_path / "int4"
    manifest = run_quantize(folder, [text], out, QuantizeOptions(method=method, samples=8, length=48))
    ids = torch.randint(3, 300, (2, 40))
    with Int4Checkpoint(out) as checkpoint, torch.no_grad():
        ours = load_dequantised(checkpoint)(ids).logits
        theirs = load_by_transformers(out)(ids).logits
        assert torch.equal(ours, theirs)
        assert not torch.equal(ours, load_float(folder)(ids).logits)
        assert len(checkpoint.modules) == 14
        for module in checkpoint.modules:
            scale_NG = checkpoint.quantized(module).scale_NG
            assert torch.equal(scale_NG.bfloat16().float(), scale_NG)
    assert manifest.kind == "int4"
    assert manifest.results["padding"] == {"intermediate_size_from": 88, "intermediate_size_to": 96}
    assert manifest == read_manifest(out) or manifest.files == read_manifest(out).files


def test_gptq_is_nearer_to_the_float_model_than_rounding(stories: Path, tinystories: Path, tmp_path: Path) -> None:
    lines = tinystories.read_text(encoding="utf-8").splitlines()
    calibration = tmp_path / "calibration.jsonl"
    calibration.write_text("\n".join(lines[:200]))
    divergence = {}
    for method in ("rtn", "gptq"):
        options = QuantizeOptions(method=method, samples=32, length=128)  # type: ignore[arg-type]
        run_quantize(stories, [calibration], tmp_path / method, options)
        quantized, reference = open_int4_model(tmp_path / method), load_float(stories)
        ids = [quantized.tokenizer.prompt(json.loads(line)["text"])[:128] for line in lines[-16:]]
        ids_BT = torch.tensor([row for row in ids if len(row) == 128])
        with torch.no_grad():
            log_p = reference(ids_BT).logits.log_softmax(-1)
            log_q = quantized.model(ids_BT).logits.log_softmax(-1)
        divergence[method] = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    assert divergence["gptq"] < 0.75 * divergence["rtn"]
    assert divergence["gptq"] < 0.1


def test_the_same_seed_gives_the_same_bytes(tiny_model: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    folder = tiny_model("llama")
    first = run_quantize(folder, [text], tmp_path / "a", SMALL)
    again = run_quantize(folder, [text], tmp_path / "b", SMALL)
    other = run_quantize(folder, [text], tmp_path / "c", replace(SMALL, seed=1))
    assert first.files == again.files
    assert first.files["model.safetensors"] != other.files["model.safetensors"]
    assert first.data["seed"] == 0
    assert first.data["windows"] == 8
    assert len(first.data["files"][0]["sha256"]) == 64


def test_a_recipe_mixes_grids_and_transformers_still_loads_it(
    tiny_model: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    recipe = QuantRecipe((Rule(r".*layers\.0\..*down_proj", 8, 0), Rule(r".*o_proj", None), Rule(r".*_proj", 4, 32)))
    out = tmp_path / "mixed"
    manifest = run_quantize(tiny_model("qwen3"), [text], out, replace(SMALL, runtime="onnx"), recipe=recipe)
    ids = torch.randint(3, 300, (1, 30))
    with Int4Checkpoint(out) as checkpoint, torch.no_grad():
        eight = checkpoint.quantized("model.layers.0.mlp.down_proj")
        assert (eight.bits, eight.group_size) == (8, 96)
        assert "model.layers.0.self_attn.o_proj" not in checkpoint
        assert torch.equal(load_dequantised(checkpoint)(ids).logits, load_by_transformers(out)(ids).logits)
    errors = manifest.results["relative_error"]
    assert errors["model.layers.0.mlp.down_proj"] < 0.05 * errors["model.layers.1.mlp.down_proj"]
    assert "model.layers.1.self_attn.o_proj" in manifest.results["float_modules"]


def test_first_rule_wins_and_unmatched_stays_float() -> None:
    recipe = QuantRecipe((Rule("a.*", 8, 0), Rule("ab", 4, 64)))
    assert recipe.grid("ab", 128) == Grid(8, 128)
    assert recipe.grid("b", 128) is None
    with pytest.raises(RequestError, match="grid"):
        Rule("x", 3)
    with pytest.raises(RequestError, match="regular expression"):
        Rule("(")


def test_a_width_that_no_group_divides_is_said(tiny_model: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    options = replace(SMALL, group_size=128)
    with pytest.raises(RequestError, match=r"64 input channels.*\n.*\n.*--group-size 64"):
        run_quantize(tiny_model("llama"), [text], tmp_path / "out", options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("poison", ["nan", "inf", "missing", "quantized", "truncated"])
def test_bad_students_leave_nothing(poison: str, tiny_model: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "student"
    shutil.copytree(tiny_model("llama"), folder)
    file, name = folder / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(file)
    if poison == "missing":
        del tensors[name]
    if poison in ("nan", "inf"):
        tensors[name][3, 5] = float(poison)
    save_file(tensors, file, metadata={"format": "pt"})
    if poison == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    if poison == "quantized":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(BadFileError) as caught:
        run_quantize(folder, [text], tmp_path / "out", SMALL)
    if poison in ("nan", "inf", "missing"):
        assert name in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["student"]


def test_what_exists_is_kept_when_the_run_fails(tiny_model: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_quantize(tiny_model("llama"), [text], out, SMALL)
    before = read_manifest(out)
    with pytest.raises(NanokitError, match="exists"):
        run_quantize(tiny_model("llama"), [text], out, SMALL)
    with pytest.raises(RequestError, match="--data"):
        run_quantize(tiny_model("llama"), [], out, SMALL, force=True)
    assert read_manifest(out) == before


def test_short_text_warns(tiny_model: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = tmp_path / "short.txt"
    short.write_text("A few words are all there is here, and nothing more than that.")
    manifest = run_quantize(tiny_model("llama"), [short], tmp_path / "out", SMALL)
    assert "calibration tokens" in capsys.readouterr().err
    assert manifest.data["tokens"] < 80


def test_the_command(tiny_model: Callable[..., Path], text: Path, tmp_path: Path, nanokit: Callable[..., Any]) -> None:
    out = tmp_path / "out"
    common = ("--data", text, "--method", "gptq", "--samples", 8, "--length", 48, "--out", out)
    done = nanokit("quantize", tiny_model("gemma3_text"), *common, "--json")
    assert done.status == 0, done.stderr
    assert done.json()["mean_relative_error"] < 0.02
    assert "layers" in done.stderr
    again = nanokit("quantize", tiny_model("gemma3_text"), *common)
    assert again.status == 2
    assert "--force" in again.stderr
    assert "Traceback" not in again.stderr


@pytest.mark.parametrize(
    "wrong",
    [
        {"samples": -1},
        {"length": 4},
        {"damping": -0.1},
        {"damping": float("nan")},
        {"seed": -1},
        {"steps": -1},
        {"batch": 0},
        {"learning_rate": -0.1},
        {"context": 512},
    ],
)
def test_numbers_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="--" + next(iter(wrong)).replace("_", "-")):
        QuantizeOptions(**wrong)


def test_training_that_memory_cannot_hold_is_refused_or_done_layer_by_layer(
    tiny_model: Callable[..., Path],
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("quantize.run.TRAINING_BYTES", 1 << 40)
    folder = tiny_model("llama", initializer_range=0.2)
    with pytest.raises(RequestError, match="--method tune"):
        run_quantize(folder, [text], tmp_path / "out", replace(SMALL, method="recover"))
    assert list(tmp_path.iterdir()) == []
    options = replace(SMALL, method="best", steps=30, learning_rate=0.05)
    manifest = run_quantize(folder, [text], tmp_path / "out", options)
    assert "layer by layer instead" in capsys.readouterr().err
    assert (manifest.recipe["method"], manifest.recipe["ran"]) == ("best", "tune")
    errors = manifest.results["layer_error"]
    assert len(errors) == 2
    assert any(after < before for before, after in errors.values())


def test_fast_is_a_light_gptq_and_rtn_without_text(
    tiny_model: Callable[..., Path], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_model("llama")
    fast = run_quantize(folder, [text], tmp_path / "fast", replace(SMALL, method="fast", samples=0))
    assert (fast.recipe["ran"], fast.data["asked"]["samples"]) == ("fast", 32)
    rtn = run_quantize(folder, [], tmp_path / "rtn", QuantizeOptions("fast"))
    assert rtn.recipe["ran"] == "rtn"
    assert "without --data is rtn" in capsys.readouterr().err
    assert fast.files["model.safetensors"] != rtn.files["model.safetensors"]
