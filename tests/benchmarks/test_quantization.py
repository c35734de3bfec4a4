"""The benchmark beside the peers: its scorer against a slow reference, its readers, its table."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def load(relative: str) -> Any:
    """A benchmark's file as a module."""
    path = BENCHMARKS / relative
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


quantization, scorer, common = load("quantization.py"), load("scorer.py"), load("peers/common.py")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "held.txt"
    path.write_text("".join(f"Line {i}: {i * i} foxes slept, {i % 7} woke. " for i in range(60)))
    return path


@pytest.fixture(scope="module")
def moved(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with every decoder linear and one norm changed."""
    out = tmp_path_factory.mktemp("moved") / "model"
    generator = torch.Generator().manual_seed(0)
    tensors = load_file(tiny_model("llama") / "model.safetensors")
    changed = {
        name: tensor + 0.02 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in tensors.items()
        if name.endswith("_proj.weight") or name == "model.norm.weight"
    }
    common.save_dense(tiny_model("llama"), changed, out)
    return out


def test_scores_equal_a_slow_reference(tiny_model: Callable[..., Path], moved: Path, text: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = tiny_model("llama")
    found = scorer.score_folders(source, [moved], {"text": text}, tokens=700, length=48)[str(moved)]
    tokenizer = AutoTokenizer.from_pretrained(str(source))
    ids = tokenizer(text.read_text(), add_special_tokens=False)["input_ids"][:700]
    ours, theirs = (AutoModelForCausalLM.from_pretrained(str(f), dtype=torch.float64) for f in (moved, source))
    nll = reference_nll = kl = same = count = 0.0
    for start in range(0, 700 - 47, 48):
        window = torch.tensor([[tokenizer.bos_token_id, *ids[start : start + 48]]])
        with torch.no_grad():
            q, p = (m(input_ids=window[:, :-1]).logits[0].softmax(-1).numpy() for m in (ours, theirs))
        for row, target in enumerate(window[0, 1:].tolist()):
            nll -= math.log(q[row, target])
            reference_nll -= math.log(p[row, target])
            kl += sum(a * math.log(a / b) for a, b in zip(p[row], q[row], strict=True))
            same += int(np.argmax(p[row]) == np.argmax(q[row]))
            count += 1
    score = found["scores"]["text"]
    assert score["tokens"] == count == 14 * 48
    assert score["kl"] == pytest.approx(kl / count, rel=1e-4)
    assert score["perplexity"] == pytest.approx(math.exp(nll / count), rel=1e-5)
    assert score["reference_perplexity"] == pytest.approx(math.exp(reference_nll / count), rel=1e-5)
    assert score["top1"] == pytest.approx(same / count)
    assert 0 < score["top1"] < 1


def test_scope_is_seen(tiny_model: Callable[..., Path], moved: Path, text: Path) -> None:
    source = tiny_model("llama")
    found = scorer.score_folders(source, [moved, source], {"text": text}, tokens=96, length=48)
    assert found[str(moved)]["linears_changed"] == found[str(moved)]["linears"] == 14
    assert found[str(moved)]["also_changed"] == ["norms"]
    assert found[str(moved)]["levels"] == 32
    assert found[str(source)]["linears_changed"] == 0
    assert found[str(source)]["scores"]["text"]["kl"] == 0.0


def test_levels_of_a_group() -> None:
    weight_NK = torch.zeros(2, 64)
    weight_NK[1, 32:] = torch.arange(32) % 16
    assert scorer.levels(weight_NK, 32) == 16
    weight_NK[1, 40] = 0.5
    assert scorer.levels(weight_NK, 32) == 17
    assert scorer.levels(torch.zeros(2, 40), 32) == 40


def test_a_gptq_folder_is_read(tmp_path: Path) -> None:
    """Codes packed by hand: eight input channels in a word, lowest first, zero points stored minus one."""
    generator = torch.Generator().manual_seed(1)
    codes_KN = torch.randint(0, 16, (64, 8), generator=generator)
    scale_GN = torch.rand(2, 8, generator=generator)
    words = torch.zeros(8, 8, dtype=torch.int64)
    for k in range(64):
        words[k // 8] |= codes_KN[k] << (4 * (k % 8))
    zeros = torch.full((2, 1), int("7" * 8, 16), dtype=torch.int64)
    wrapped = torch.where(words >= 1 << 31, words - (1 << 32), words).int()
    stored = {"a_proj.qweight": wrapped, "a_proj.qzeros": zeros.int(), "a_proj.scales": scale_GN.half()}
    save_file(stored, tmp_path / "model.safetensors")
    found = common.dequantise_gptq(tmp_path)["a_proj.weight"]
    expected = ((codes_KN - 8).float() * scale_GN.half().float().repeat_interleave(32, 0)).T
    assert torch.equal(found, expected)


def test_a_dense_folder_takes_only_what_fits(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    source, name = tiny_model("llama"), "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(ValueError, match="has no place"):
        common.save_dense(source, {name: torch.zeros(3, 3)}, tmp_path / "out")
    with pytest.raises(ValueError, match="nothing"):
        common.save_dense(source, {}, tmp_path / "out")
    table_VD = load_file(source / "model.safetensors")["model.embed_tokens.weight"]
    common.save_dense(source, {name: torch.ones(96, 64), "lm_head.weight": table_VD}, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored[name].unique().tolist() == [1.0]
    assert "lm_head.weight" not in stored


def test_a_head_taken_apart_from_its_embedding_is_scored_as_such(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    common.save_dense(tiny_model("llama"), {"lm_head.weight": torch.ones(320, 64)}, tmp_path)
    loaded = common.load_float(tmp_path)
    assert loaded.get_output_embeddings().weight.unique().tolist() == [1.0]
    assert loaded.get_input_embeddings().weight.std() > 0


def test_the_float_model_is_widened_and_windows_are_the_same_again(
    tiny_model: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    source = tiny_model("llama", intermediate_size=88)
    quantization.write_float(source, tmp_path / "float")
    assert load_file(tmp_path / "float" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"].shape == (96, 64)
    windows = quantization.draw_windows(tmp_path / "float", text, 6, 32)
    assert windows.shape == (6, 32)
    assert (windows[:, 0] == 1).all()
    assert (windows == quantization.draw_windows(source, text, 6, 32)).all()
    assert len({tuple(window) for window in windows.tolist()}) == 6


def row(label: str, kl: float, **changes: Any) -> Any:
    report = {"tool": "t 1", "torch": "2", "call_cpu": 1.26, "call_wall": 2.0, "process_cpu": 3.0,
              "peak_bytes": 5e8, "tokens": 32768}  # fmt: skip
    scores = {"text": {"kl": kl, "perplexity": 5.5, "top1": 0.9, "reference_perplexity": 5.3, "tokens": 100}}
    quality = {"scores": scores, "linears": 14, "linears_changed": 14, "levels": 16, "also_changed": []}
    made = quantization.Row(quantization.Entry(label, label, "x.py"), reports=[report], digests=["a"], quality=quality)
    return replace(made, **changes)


def test_the_table() -> None:
    missing = quantization.Row(quantization.Entry("gone", "gone", "x.py", (), "torchao"), status="not installed")
    other = row("b", 0.04, digests=["a", "b", "a"])
    other.reports = [{**other.reports[0], "call_cpu": value} for value in (1.0, 9.0, 2.0)]
    lines = quantization.table([row("a", 0.123456), other, missing], ["text"]).splitlines()
    assert len({len(line) for line in lines}) == 1, "aligned"
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0][:4] == ["method", "text KL", "text perplexity", "text top-1"]
    assert cells[2] == ["a", "0.1235", "5.500", "90.00%", "1.3", "3.0", "2.0", "500", "32,768", "nothing"]
    assert cells[3][4] == "2.0", "the median"
    assert cells[4] == ["gone", "not installed", *[""] * 8]
    said = "\n".join(quantization.notes([row("a", 0.1), other, missing], ["text"]))
    assert "float perplexity 5.300" in said
    assert "b: 2 different results in 3 runs" in said
    assert "gone: not installed" in said


def test_a_smaller_scope_and_inexact_scales_are_said() -> None:
    narrow = row("narrow", 0.1)
    narrow.quality["linears_changed"] = 13
    inexact = row("inexact", 0.1)
    inexact.reports[0]["bf16_scales"] = False
    said = quantization.notes([narrow, inexact], ["text"])
    assert any("NOT THE SAME SCOPE" in line and "13 of 14" in line for line in said)
    assert any("inexact: SCALES ARE NOT EXACT" in line for line in said)


def test_our_rows() -> None:
    plain = quantization.our_method("rtn", Path("c.txt"))
    assert (plain.label, plain.arguments) == ("nanokit rtn", ("--method", "rtn"))
    changed = quantization.our_method("best:steps=5,seed=1", Path("c.txt"))
    assert changed.label == "nanokit best (steps=5, seed=1)"
    assert changed.arguments == ("--method", "best", "--data", "c.txt", "--set", "steps=5", "seed=1")


def test_the_whole_way_with_what_is_always_there(tiny_model: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    command = [
        sys.executable, str(BENCHMARKS / "quantization.py"), str(tiny_model("llama", intermediate_size=88)),
        "--calibration", str(text), "--held-out", f"t={text}", "--ours", "rtn", "--peers", "absmax", "torchao-qat",
        "--envs", str(tmp_path / "none"), "--tokens", "600", "--work", str(work),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = {line.split("|")[1].strip(): line.split("|") for line in done.stdout.splitlines() if line.startswith("|")}
    assert "not installed" in rows["torchao QAT, 100 steps"][2]
    assert 0 < float(rows["nanokit rtn"][2]) < float(rows["round-to-nearest, absmax"][2])
    assert json.loads((work / "rtn.json").read_text())["bf16_scales"] is True
    assert "every scale is exactly a bfloat16: nanokit rtn" in done.stdout
