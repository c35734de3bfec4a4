"""Calibration text of the wrong kind is told from the right kind, by what the float model makes of it."""

from __future__ import annotations

import json
import random
import string
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from nano.chat import ChatTemplate
from nano.corpus import Windows, cut_windows, read_documents, sample_windows
from nano.tokens import load_tokenizer
from nano.torch_lm import load_float
from quantize import suitability
from quantize.calibrate import draw_windows
from quantize.options import QuantizeOptions
from quantize.student import Student
from quantize.suitability import Suitability, examine


def found_in(model: Path, text: Path) -> Suitability:
    tokenizer = load_tokenizer(model)
    with Student(model, 32) as student:
        return examine(student, tokenizer, sample_windows(read_documents([text]), tokenizer, 256, 16, 0))


@pytest.fixture(scope="module")
def story_lines(tinystories: Path) -> list[str]:
    return tinystories.read_text(encoding="utf-8").splitlines()[:300]


def test_stories_suit_their_model_whatever_the_seed(stories: Path, story_lines: list[str], tmp_path: Path) -> None:
    for part in range(2):
        file = tmp_path / f"{part}.jsonl"
        file.write_text("\n".join(story_lines[part * 100 : part * 100 + 100]))
        found = found_in(stories, file)
        assert found.warnings() == []
        assert found.surprise < 0.5
        assert found.bits_per_byte < 2


@pytest.mark.parametrize(
    ("kind", "cause"),
    [("wiki", "another language"), ("french", "another language"), ("chinese", "lacks its characters"),
     ("noise", "bits a byte"), ("raw json", "JSON keys"), ("html", "JSON keys or tags")],
)  # fmt: skip
def test_other_text_is_said_with_its_measure(
    kind: str, cause: str, stories: Path, tinystories: Path, story_lines: list[str], tmp_path: Path
) -> None:
    texts = {
        "wiki": lambda: (tinystories.parent / "wikitext2.valid.txt").read_text()[:200_000],
        "french": lambda: (tinystories.parent / "udhr" / "fra.txt").read_text(),
        "chinese": lambda: (tinystories.parent / "udhr" / "cmn_hans.txt").read_text(),
        "noise": lambda: "".join(random.Random(0).choices(string.ascii_letters + string.digits, k=30_000)),
        "raw json": lambda: "stories\n" + "\n".join(story_lines),
        "html": lambda: "\n".join(f"<div><p>{json.loads(line)['text']}</p></div>" for line in story_lines),
    }
    file = tmp_path / "text.txt"
    file.write_text(texts[kind]())
    found = found_in(stories, file)
    (words,) = found.warnings()
    assert cause in words
    assert f"{found.loss:.2f} nats" in words
    assert found.surprise > 0.8


def test_loss_and_entropy_are_those_of_the_whole_model(tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model("gemma3_text")
    tokenizer = load_tokenizer(folder)
    windows = cut_windows(["A fox. " * 60], tokenizer, 64)
    with Student(folder, 32) as student:
        found = examine(student, tokenizer, windows)
    model, loss, entropy, count = load_float(folder), 0.0, 0.0, 0
    for window in windows.ids:
        ids = torch.from_numpy(window)
        with torch.no_grad():
            log_p = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
        loss -= float(log_p.gather(1, ids[1:, None]).sum())
        entropy -= float((log_p.exp() * log_p).sum())
        count += len(ids) - 1
    assert found.loss == pytest.approx(loss / count, rel=1e-5)
    assert found.entropy == pytest.approx(entropy / count, rel=1e-5)
    assert found.tokens == count
    assert found.bits_per_byte > 5  # a random model; one token is one byte here
    assert found.bytes_per_token == pytest.approx(1.0, abs=0.05)


def test_a_chat_model_that_never_sees_a_turn_is_said(tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model("llama")
    plain = load_tokenizer(folder)
    chat = type(plain)(plain.backend, plain.bos_id, plain.eos_ids, ChatTemplate("{{ messages }}</s>", {}))
    windows = cut_windows(["A fox. " * 60], plain, 64)
    with Student(folder, 32) as student:
        assert not any("chat template" in words for words in examine(student, plain, windows).warnings())
        assert any("chat template" in words for words in examine(student, chat, windows).warnings())
        turns = Windows(tuple(np.append(ids, plain.eos_ids[0]) for ids in windows.ids))
        found = examine(student, chat, turns)
    assert found.template_tokens == 1.0
    assert not any("chat template" in words for words in found.warnings())


def test_the_record_is_enough_to_draw_the_same_windows(stories: Path, tinystories: Path) -> None:
    tokenizer = load_tokenizer(stories)
    first = draw_windows([tinystories], tokenizer, QuantizeOptions(samples=12, length=100, seed=5), 512)
    record = json.loads(json.dumps(first.record))
    options = QuantizeOptions(samples=record["asked"]["samples"], length=record["asked"]["length"], seed=record["seed"])
    again = draw_windows([Path(f["path"]) for f in record["files"]], tokenizer, options, 512)
    assert len(first.windows.ids) == record["windows"] == 12
    assert all(np.array_equal(a, b) for a, b in zip(first.windows.ids, again.windows.ids, strict=True))
    assert again.record == first.record
    other = draw_windows([tinystories], tokenizer, QuantizeOptions(samples=12, length=100, seed=6), 512)
    assert not all(np.array_equal(a, b) for a, b in zip(first.windows.ids, other.windows.ids, strict=True))


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_loss_and_entropy_in_slabs_are_those_of_the_whole_model(
    family: str, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suitability, "SLAB", 97)  # does not divide the vocabulary
    folder = tiny_model(family, initializer_range=0.2)
    windows = [torch.randint(3, 300, (length,)) for length in (24, 17)]
    whole, loss, entropy = load_float(folder), 0.0, 0.0
    for window in windows:
        with torch.no_grad():
            log_p_PV = whole(window[None]).logits[0, :-1].double().log_softmax(-1)
        loss -= float(log_p_PV.gather(1, window[1:, None]).sum())
        entropy -= float((log_p_PV.exp() * log_p_PV).sum())
    with Student(folder, 32) as student:
        found = suitability._loss(student, windows)
    assert found == (pytest.approx(loss, rel=1e-4), pytest.approx(entropy, rel=1e-4), 39)
