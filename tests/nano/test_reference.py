"""Stored references: estimates against the exact divergence, and a file that refuses what is not its own."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nano.command import evaluate
from nano.divergence import TokenFigures, divergence, token_figures
from nano.errors import BadFileError, RequestError
from nano.evaluate import EvaluateOptions, measure_folders
from nano.reference import RecordForm, make_records, stored_figures
from nano.reference_file import StoredReference, is_stored

OPTIONS = EvaluateOptions(tokens=1500, sequence_length=128)


def random_window(v: int, noise: float, t: int = 40) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(v)
    reference = (rng.normal(size=(t + 1, v)) * 3).astype(np.float32)
    ours = (reference + noise * rng.normal(size=(t + 1, v))).astype(np.float32)
    return rng.integers(0, v, size=t + 1), ours, reference


def estimates(window: tuple[np.ndarray, np.ndarray, np.ndarray], seeds: int) -> list[TokenFigures]:
    ids, ours, reference = window
    form = RecordForm(reference.shape[1])
    made = (make_records(form, reference[:-1], ids[1:], np.random.default_rng(seed)) for seed in range(seeds))
    return [stored_figures(form, records, ids, ours) for records in made]


@pytest.mark.parametrize(("v", "noise"), [(100, 0.3), (512, 0.03), (512, 0.3), (512, 2.0), (20_000, 0.3)])
def test_the_estimate_is_right_on_average_and_by_the_error_it_prints(v: int, noise: float) -> None:
    window = random_window(v, noise)
    exact = token_figures(*window)
    assert exact.kl_T is not None
    found = estimates(window, seeds := 40)
    means = np.array([float(one.kl_T.mean()) for one in found])  # type: ignore[union-attr]
    said = np.array([divergence(one)["Mean KLD sampling error"].value for one in found])
    spread = means.std(ddof=1)
    assert spread < 0.2 * exact.kl_T.mean(), "40 tokens give a useful figure"
    assert abs(means.mean() - exact.kl_T.mean()) < 3 * spread / np.sqrt(seeds) + 1e-4 * exact.kl_T.mean()
    inside = np.abs(means - exact.kl_T.mean()) < 2 * said
    assert inside.mean() > 0.9
    assert 0.8 * spread < said.mean() < 2 * spread, "an error that is much too large is of no use either"


def test_all_but_kl_is_exact() -> None:
    window = random_window(3000, 0.5)
    exact, (found,) = token_figures(*window), estimates(window, 1)
    for name in ("nll_T", "correct_T", "confidence_T", "reference_correct_T", "same_T", "top_T", "reference_top_T"):
        assert np.array_equal(getattr(found, name), getattr(exact, name)), name
    assert found.reference_nll_T == pytest.approx(exact.reference_nll_T, rel=1e-6)
    figures, wanted = divergence(found), divergence(exact)
    assert {name for name in figures if figures[name].estimated} == {n for n in wanted if n.endswith("KLD")}
    assert figures["Mean Δp"].value == pytest.approx(wanted["Mean Δp"].value, rel=1e-4)


def test_a_small_vocabulary_is_kept_whole_and_an_equal_model_has_no_divergence() -> None:
    window = random_window(40, 0.3)
    (whole,) = estimates(window, 1)
    exact = token_figures(*window)
    assert whole.kl_variance_T is not None
    assert not whole.kl_variance_T.any()
    assert whole.kl_T == pytest.approx(exact.kl_T, rel=1e-3, abs=2e-4), "rounding alone"
    for v in (40, 512, 20_000):
        ids, _, reference = random_window(v, 0.3)
        (same,) = estimates((ids, reference, reference), 1)
        assert np.abs(same.kl_T).max() < 3e-7  # type: ignore[arg-type]


def test_a_likely_token_that_the_model_lost_is_not_missed() -> None:
    """All of the reference's mass on few ids, and the model's elsewhere: nothing is left to chance there."""
    ids, _, reference = random_window(512, 0.0)
    reference = reference * 4
    ours = np.roll(reference, 7, axis=1)
    exact, (found,) = token_figures(ids, ours, reference), estimates((ids, ours, reference), 1)
    assert found.kl_T == pytest.approx(exact.kl_T, rel=0.02)


@pytest.fixture(scope="module")
def text(tinystories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "held_out.jsonl"
    with tinystories.open(encoding="utf-8") as lines:
        path.write_text("".join(itertools.islice(lines, 12)))
    return path


@pytest.fixture(scope="module")
def student(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """stories260K with noise on its weights, 3% of their size."""
    from safetensors.numpy import load_file, save_file

    out = tmp_path_factory.mktemp("student") / "noised"
    shutil.copytree(stories, out)
    rng = np.random.default_rng(0)
    (weights,) = out.glob("*.safetensors")
    noised = {k: (v + 0.03 * v.std() * rng.normal(size=v.shape)).astype(v.dtype) for k, v in load_file(weights).items()}
    save_file(noised, weights, metadata={"format": "pt"})
    return out


@pytest.fixture(scope="module")
def kept(stories: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kept") / "stories.reference"
    measure_folders(stories, [text], None, OPTIONS, keep=path)
    return path


def test_a_real_model_against_a_file_and_against_the_reference_itself(
    stories: Path, student: Path, text: Path, kept: Path
) -> None:
    live = measure_folders(student, [text], stories, OPTIONS).scores
    scores = measure_folders(student, [text], kept, OPTIONS).scores
    assert live.kl is not None
    assert scores.kl is not None
    assert scores.kl_sampling_error is not None
    assert scores.kl_sampling_error < 0.03 * live.kl
    assert abs(scores.kl - live.kl) < 3 * scores.kl_sampling_error
    assert (scores.top1, scores.perplexity, scores.accuracy) == (live.top1, live.perplexity, live.accuracy)
    assert scores.reference_perplexity == pytest.approx(live.reference_perplexity, rel=1e-6)
    assert scores.logit_error is None
    assert kept.stat().st_size < 128 * scores.tokens
    itself = measure_folders(stories, [text], kept, OPTIONS).scores
    assert itself.kl == pytest.approx(0, abs=1e-7)


def test_what_is_not_its_own_is_refused(
    stories: Path, text: Path, kept: Path, tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    with pytest.raises(RequestError, match="different vocabularies"):
        measure_folders(tiny_model("llama"), [text], kept, OPTIONS)
    other = tmp_path / "other.jsonl"
    other.write_text(text.read_text() + '{"text": "One more."}\n')
    with pytest.raises(RequestError, match="text is not the one"):
        measure_folders(stories, [other], kept, OPTIONS)
    with pytest.raises(RequestError, match="another --sequence-length"):
        measure_folders(stories, [text], kept, EvaluateOptions(tokens=1500, sequence_length=64))
    stored = StoredReference(kept)
    with pytest.raises(RequestError, match="other token ids"):
        stored.figures(np.arange(20), np.zeros((20, 512), np.float32))
    stored.close()


def test_damage_is_refused_before_anything_is_read(kept: Path, tmp_path: Path) -> None:
    whole = kept.read_bytes()
    assert is_stored(kept)
    damaged = {"cut": whole[:-1], "half": whole[: len(whole) // 2], "head": whole[:40], "more": whole + b"\0"}
    for place in (60, len(whole) // 2, len(whole) - 5):
        damaged[f"flip{place}"] = whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :]
    for name, data in damaged.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(BadFileError, match="truncated or damaged"):
            StoredReference(tmp_path / name)
    (tmp_path / "no").write_text("{}")
    with pytest.raises(BadFileError, match="not a stored reference"):
        StoredReference(tmp_path / "no")


def test_nothing_half_written_is_left(stories: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: E501  # fmt: skip
    def broken(*_arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("nano.reference_file.make_records", broken)
    (tmp_path / "x.reference").write_text("before")
    with pytest.raises(KeyboardInterrupt):
        measure_folders(stories, [text], None, OPTIONS, keep=tmp_path / "x.reference")
    assert [path.name for path in tmp_path.iterdir()] == ["x.reference"]
    assert (tmp_path / "x.reference").read_text() == "before"


def test_the_command_keeps_and_uses_it(
    nanokit: Callable[..., Any], stories: Path, student: Path, text: Path, tmp_path: Path
) -> None:
    file = tmp_path / "teacher.reference"
    made = nanokit("evaluate", stories, "--data", text, "--tokens", 400, "--save-reference", file)
    assert made.status == 0
    assert "bytes a token" in made.stderr
    shown = nanokit("evaluate", student, "--data", text, "--tokens", 400, "--reference", file, "--json")
    figures = shown.json()["divergence"]
    assert figures["Mean KLD"]["estimated"]
    assert not figures["Same top p"]["estimated"]
    assert figures["Mean KLD sampling error"]["value"] == shown.json()["kl_sampling_error"]
    (tmp_path / "x.json").write_text(json.dumps({}))
    with pytest.raises(BadFileError, match="neither a model nor a stored reference"):
        evaluate(str(student), data=[text], reference=str(tmp_path / "x.json"))
