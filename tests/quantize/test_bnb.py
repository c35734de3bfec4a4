"""bitsandbytes folders: byte for byte what transformers and bitsandbytes make, and no way to phones."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nano.errors import BadFileError, MissingExtraError, RequestError, UnsupportedError
from nano.lm import open_model, stage_of
from nano.manifest import read_manifest
from nano.torch_lm import load_float
from quantize.bnb import dense_tensors
from quantize.options import QuantizeOptions
from quantize.run import run_quantize

METHODS = ("bnb-nf4", "bnb-int8")
IDS = torch.randint(3, 300, (2, 40), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def functional() -> Any:
    pytest.importorskip("accelerate")
    pytest.importorskip("bitsandbytes")
    from bitsandbytes import functional

    return functional


def peers_own(folder: Path, method: str) -> Any:
    """The float model quantized by transformers itself as it is loaded."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "float32"}
    config = BitsAndBytesConfig(**(four if method == "bnb-nf4" else {"load_in_8bit": True}))
    return AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=torch.float32, quantization_config=config, device_map="cpu"
    ).eval()


def loaded_by_transformers(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32, device_map="cpu").eval()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("qwen3", False), ("gemma3_text", True)])
def test_it_is_what_transformers_and_bitsandbytes_make(
    family: str, tied: bool, method: Any, functional: Any, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    source, out = tiny_model(family, tie_word_embeddings=tied, intermediate_size=88), tmp_path / "out"
    manifest = run_quantize(source, [], out, QuantizeOptions(method=method))
    ids = IDS[:1]
    with torch.inference_mode():
        peer = peers_own(source, method)
        assert torch.equal(loaded_by_transformers(out)(input_ids=ids).logits, peer(input_ids=ids).logits)
        ours = torch.from_numpy(open_model(out).logits([ids[0].numpy()])[0])
        theirs = peer(input_ids=ids).logits[0]
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()
        assert not torch.allclose(ours, load_float(source)(input_ids=ids).logits[0], atol=1e-3)
    stored, saved = load_file(out / "model.safetensors"), peer.state_dict()
    for name, tensor in stored.items():
        assert torch.equal(tensor, torch.as_tensor(saved[name]).reshape(tensor.shape)), name
    dense = dict(dense_tensors(out))
    assert next(iter(dense)) == "model.embed_tokens.weight"
    if method == "bnb-nf4":
        opened = open_model(out).model.state_dict()  # type: ignore[attr-defined]
        assert all(torch.equal(opened[name], tensor) for name, tensor in dense.items())
    else:
        name = "model.layers.1.mlp.down_proj"
        expected_NK = stored[name + ".weight"].float() * stored[name + ".SCB"][:, None] / 127
        assert torch.allclose(dense[name + ".weight"], expected_NK, rtol=1e-6)
    assert manifest.kind == stage_of(out) == "bitsandbytes"
    assert manifest.results["exportable"] is False
    assert len(manifest.results["relative_error"]) == 14
    assert manifest.data == {}


@pytest.mark.parametrize("block", [32, 128])
def test_the_group_size_is_the_block_size(
    block: Any, functional: Any, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    source, name = tiny_model("llama"), "model.layers.1.mlp.down_proj.weight"
    manifest = run_quantize(source, [], tmp_path / "out", QuantizeOptions(method="bnb-nf4", group_size=block))
    stored, weight_NK = load_file(tmp_path / "out" / "model.safetensors"), load_file(source / "model.safetensors")[name]
    assert stored[name + ".absmax"].numel() == weight_NK.numel() // block
    assert torch.equal(stored[name + ".absmax"], weight_NK.reshape(-1, block).abs().amax(-1))
    loaded = loaded_by_transformers(tmp_path / "out").get_submodule(name.removesuffix(".weight"))
    dense_NK = functional.dequantize_4bit(loaded.weight, loaded.weight.quant_state)
    # slow reference: the nearest entry of the codebook, times the block's largest absolute weight
    grouped = weight_NK.reshape(-1, block)
    scale, codebook = grouped.abs().amax(-1, keepdim=True), stored[name + ".quant_map"]
    nearest = codebook[(grouped[..., None] / scale[..., None] - codebook).abs().argmin(-1)] * scale
    assert torch.allclose(dense_NK, nearest.reshape(dense_NK.shape), atol=1e-6)
    error = float((dense_NK - weight_NK).norm() / weight_NK.norm())
    assert manifest.results["relative_error"][name.removesuffix(".weight")] == pytest.approx(error, rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_zero_rows_stay_zero(method: Any, functional: Any, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    source, name = tmp_path / "student", "model.layers.0.mlp.up_proj.weight"
    shutil.copytree(tiny_model("llama"), source)
    tensors = load_file(source / "model.safetensors")
    tensors[name][3:5] = 0
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    run_quantize(source, [], tmp_path / "out", QuantizeOptions(method=method))
    logits = open_model(tmp_path / "out").logits([IDS[0].numpy()])[0]
    assert torch.isfinite(torch.from_numpy(logits)).all()
    stored = load_file(tmp_path / "out" / "model.safetensors")
    if method == "bnb-int8":
        assert not stored[name][3:5].any()
        assert stored[name][5:].any()
    else:
        assert not stored[name + ".absmax"][3:5].any()


def test_weights_that_float16_cannot_hold_are_refused(
    functional: Any, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    source, name = tmp_path / "student", "model.layers.0.mlp.up_proj.weight"
    shutil.copytree(tiny_model("llama"), source)
    tensors = load_file(source / "model.safetensors")
    tensors[name][3, 5] = 1e5
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadFileError, match="float16"):
        run_quantize(source, [], tmp_path / "out", QuantizeOptions(method="bnb-int8"))
    assert [path.name for path in tmp_path.iterdir()] == ["student"]
    run_quantize(source, [], tmp_path / "out", QuantizeOptions(method="bnb-nf4"))


@pytest.mark.parametrize(
    ("method", "wrong"),
    [("bnb-nf4", {"embedding": "int4"}), ("bnb-nf4", {"bits_budget": 5.0}), ("bnb-int8", {"group_size": 32})],
)
def test_options_that_would_do_nothing_are_refused(
    method: Any, wrong: dict[str, Any], functional: Any, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedError, match="--" + next(iter(wrong)).replace("_", "-")):
        run_quantize(tiny_model("llama"), [], tmp_path / "out", QuantizeOptions(method=method, **wrong))
    assert list(tmp_path.iterdir()) == []


def test_without_bitsandbytes_the_pip_line_is_said(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingExtraError, match=r"nanokit\[bnb\]"):
        run_quantize(tiny_model("llama"), [], tmp_path / "out", QuantizeOptions(method="bnb-nf4"))
    assert list(tmp_path.iterdir()) == []


def test_the_commands(
    functional: Any, tiny_model: Callable[..., Path], tmp_path: Path, nanokit: Callable[..., Any]
) -> None:
    source, out, text = tiny_model("llama"), tmp_path / "out", tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog, again and again. " * 20)
    done = nanokit("quantize", source, "--method", "bnb-nf4", "--out", out)
    assert done.status == 0, done.stderr
    assert "cannot be exported to phones" in done.stderr
    assert "phones" in json.loads((out / "manifest.json").read_text())["results"]["note"]
    scored = nanokit("evaluate", out, "--reference", source, "--data", text, "--tokens", 200, "--json")
    assert scored.status == 0, scored.stderr
    assert 0 < scored.json()["kl"] < 0.1
    refused = nanokit("export", out, "--format", "onnx", "--out", tmp_path / "bundle")
    assert refused.status == 2
    assert "cannot be exported to phones" in refused.stderr
    assert "--method gptq" in refused.stderr
    assert not (tmp_path / "bundle").exists()
    with pytest.raises(RequestError):
        open_model(out, activations="int8-ort")


def test_a_broken_folder_is_named(functional: Any, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_quantize(tiny_model("llama"), [], out, QuantizeOptions(method="bnb-nf4"))
    tensors = load_file(out / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadFileError, match="up_proj"):
        open_model(out)
    assert read_manifest(out).kind == "bitsandbytes"
