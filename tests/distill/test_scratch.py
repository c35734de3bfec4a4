"""Students that nothing is cut for: another family's architecture, trained from scratch or from weights of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import some_stories

from distill.options import DistillOptions
from distill.run import run_distill
from nano.checkpoint import Checkpoint
from nano.errors import BadFileError, RequestError, UnsupportedError
from nano.manifest import read_manifest
from nano.shapes import ModelShape, read_config
from nano.tokens import load_tokenizer

OPTIONS = DistillOptions(steps=30, batch=4, length=64, eval_tokens=512, learning_rate=3e-3, start="random", curves=False)  # noqa: E501  # fmt: skip


@pytest.fixture(scope="module")
def text(tinystories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return some_stories(tmp_path_factory.mktemp("text"), tinystories, 60)


def architecture(folder: Path, model: Path, **changes: Any) -> Path:
    """A folder with nothing but the config.json of a model."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**read_config(model), **changes}))
    return folder


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
def test_a_teacher_of_another_family_teaches_from_scratch(
    family: str, stories: Path, text: Path, tiny_model: Callable[..., Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from transformers import AutoModelForCausalLM

    ids = {"vocab_size": 512, "bos_token_id": 1, "eos_token_id": 2}
    student = architecture(tmp_path / "arch", tiny_model(family), **ids)
    manifest = run_distill(stories, str(student), [text], tmp_path / "s", OPTIONS)
    said = " ".join(capsys.readouterr().err.split())
    assert f"begins from scratch ({family}, weights at random)" in said
    assert "nothing can be cut from a teacher of another family (llama)" in said
    results = read_manifest(tmp_path / "s").results
    assert (results["start"], results["cut"], results["rounds"]) == ("random", None, [])
    assert results["held_out"]["trained"]["kl"] < results["held_out"]["start"]["kl"] - 0.5
    assert results["held_out"]["start"]["cross_entropy"] > 6  # ln 512 = 6.24: it knew nothing
    assert "From scratch" in (tmp_path / "s" / "report.html").read_text()
    assert not (tmp_path / "s" / "cut.json").exists()
    assert set(manifest.inputs) == {"teacher", "student"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "s", local_files_only=True)
    assert model.config.model_type == family
    ours, theirs = load_tokenizer(tmp_path / "s"), load_tokenizer(stories)
    assert ours.encode("Once upon a time") == theirs.encode("Once upon a time")


def test_weights_in_the_folder_count_only_where_they_are_asked_for(stories: Path, text: Path, tmp_path: Path) -> None:
    none = replace(OPTIONS, steps=0)
    run_distill(stories, str(stories), [text], tmp_path / "own", replace(none, start="pruned"))
    run_distill(stories, str(stories), [text], tmp_path / "new", none)
    run_distill(stories, ModelShape.from_hf(read_config(stories)), [text], tmp_path / "same", none)
    with Checkpoint(tmp_path / "own") as own, Checkpoint(tmp_path / "new") as new, Checkpoint(stories) as theirs, Checkpoint(tmp_path / "same") as same:  # noqa: E501  # fmt: skip
        for name in theirs.names():
            assert torch.equal(own.tensor(name), theirs.tensor(name))
            assert torch.equal(new.tensor(name), same.tensor(name))
            assert "norm" in name or not torch.equal(new.tensor(name), theirs.tensor(name))


@pytest.mark.parametrize(
    ("changes", "start", "error", "words"),
    [
        ({}, "pruned", RequestError, "--start random begins this architecture from scratch"),
        ({"vocab_size": 300}, "random", RequestError, "vocab_size 300"),
        ({"final_logit_softcapping": 30.0}, "random", UnsupportedError, "30.0 of the student"),
        ({"max_position_embeddings": 32}, "random", RequestError, "at most 32"),
        ({"hidden_size": None}, "random", BadFileError, "hidden_size"),
    ],
)
def test_architectures_that_cannot_be_trained_are_refused(
    changes: dict[str, Any], start: Any, error: type[Exception], words: str, stories: Path, text: Path, tmp_path: Path
) -> None:
    student = architecture(tmp_path / "arch", stories, **changes)
    with pytest.raises(error, match=words):
        run_distill(stories, str(student), [text], tmp_path / "s", replace(OPTIONS, start=start))
    assert [p.name for p in tmp_path.iterdir()] == ["arch"]
