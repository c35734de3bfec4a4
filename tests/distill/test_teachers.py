"""Teachers that differ from their students: in padding, in tokens (refused), in precision."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checks import some_stories, weights

from distill.caching import run_cache_teacher
from distill.options import CacheOptions, DistillOptions
from distill.run import run_distill
from distill.teacher import open_teacher
from nano.errors import UnsupportedError
from nano.manifest import read_manifest
from nano.shapes import ModelShape, read_config

QUICK = DistillOptions(steps=4, batch=4, length=64, eval_tokens=512, calibration_tokens=512, curves=False)


@pytest.fixture(scope="module")
def text(tinystories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return some_stories(tmp_path_factory.mktemp("text"), tinystories, 60)


def padded(folder: Path, model: Path, rows: int) -> Path:
    """The same model with more rows of embedding than its tokenizer gives ids, loud ones."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    table = tensors["model.embed_tokens.weight"]
    extra = 9 * torch.randn(rows - len(table), table.shape[1], generator=torch.Generator().manual_seed(1))
    tensors["model.embed_tokens.weight"] = torch.cat([table, extra])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": rows}))
    return folder


def test_padding_of_either_side_changes_nothing(stories: Path, text: Path, tmp_path: Path) -> None:
    """A student that is its teacher with another padding has no divergence, and learns what the plain one does."""
    wide = padded(tmp_path / "wide", stories, 544)
    for teacher, student in ((stories, wide), (wide, stories)):
        out = tmp_path / f"same-{student.name}"
        manifest = run_distill(teacher, str(student), [text], out, replace(QUICK, steps=0))
        held = manifest.results["held_out"]["start"]
        assert held["kl"] == pytest.approx(0, abs=1e-6)
        assert held["top1"] == 1.0
        assert manifest.results["start"] == "given"
    small = tmp_path / "small"
    run_distill(stories, "150k", [text], small, replace(QUICK, steps=0))
    run_distill(stories, str(small), [text], tmp_path / "plain", QUICK)
    run_distill(stories, str(padded(tmp_path / "small-wide", small, 530)), [text], tmp_path / "padded", QUICK)
    run_distill(wide, str(small), [text], tmp_path / "of-wide", QUICK)
    plain, ours, other = (weights(tmp_path / name) for name in ("plain", "padded", "of-wide"))
    before = weights(tmp_path / "small-wide")["model.embed_tokens.weight"]
    for name, tensor in plain.items():
        torch.testing.assert_close(ours[name][: len(tensor)], tensor, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(other[name], tensor, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(ours["model.embed_tokens.weight"][512:], before[512:], rtol=1e-2, atol=0)  # decay only
    assert read_manifest(tmp_path / "padded").inputs["student"]["path"].endswith("small-wide")
    assert read_config(tmp_path / "padded")["vocab_size"] == 530


def test_a_cache_serves_a_padded_student(stories: Path, text: Path, tmp_path: Path) -> None:
    wide = padded(tmp_path / "wide", stories, 544)
    run_cache_teacher(wide, [text], tmp_path / "c", CacheOptions(length=64, batch=8))
    cached = run_distill(wide, str(stories), [text], tmp_path / "s", QUICK, teacher_cache=tmp_path / "c")
    live = run_distill(wide, str(stories), [text], tmp_path / "live", QUICK)
    found, wanted = (made.results["held_out"]["trained"]["kl"] for made in (cached, live))
    assert found == pytest.approx(wanted, rel=0.05)  # loud padding in the samples would tear it away


def test_another_vocabulary_is_refused_with_what_differs(stories: Path, text: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(stories, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    by_id = {i: token for token, i in vocabulary.items()}
    vocabulary[by_id[300]], vocabulary[by_id[301]] = 301, 300
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UnsupportedError, match=r"2 of 512 ids differ; the first is 300: ") as error:
        run_distill(stories, str(other), [text], tmp_path / "s", QUICK)
    assert repr(by_id[300]) in str(error.value)
    assert repr(by_id[301]) in str(error.value)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_a_teacher_of_few_bits_is_near_the_float_one_or_says_why_not(
    precision: str, stories: Path, text: Path, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    options = replace(QUICK, teacher_dtype=precision)
    try:
        open_teacher(stories, ModelShape.from_hf(read_config(stories)), precision, "cpu")
    except UnsupportedError as error:
        assert "--teacher-dtype bfloat16" in str(error)  # noqa: PT017
        return
    held = run_distill(stories, "150k", [text], tmp_path / "few", options).results["held_out"]
    exact = run_distill(stories, "150k", [text], tmp_path / "exact", QUICK).results["held_out"]
    found, wanted = held["teacher"]["cross_entropy"], exact["teacher"]["cross_entropy"]
    assert found == pytest.approx(wanted, rel={"int8": 0.05, "nf4": 0.15}[precision])  # rows of 64 suffer in 4 bits
    assert found != wanted
    assert held["trained"]["cross_entropy"] == pytest.approx(exact["trained"]["cross_entropy"], rel=0.1)
