"""Splitting without leakage, packing without attention across documents, an order that can be taken up anywhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from distill.data import NO_TARGET, PAD, batches, make_batch, pack, row_order, split_documents, training_rows
from distill.models import hidden_states
from nano.corpus import Windows, cut_windows, read_documents
from nano.errors import RequestError
from nano.shapes import ModelShape, read_config
from nano.tokens import load_tokenizer
from nano.torch_lm import load_float


def windows(*lengths: int) -> Windows:
    counter = iter(range(3, 10**6))
    return Windows(tuple(np.array([next(counter) for _ in range(n)], dtype=np.int64) for n in lengths))


def test_held_out_documents_are_never_trained_on(tinystories: Path) -> None:
    documents = read_documents([tinystories])
    documents += documents[:50]  # duplicates must fall on one side
    training, held = split_documents(documents, 0.1, seed=3)
    assert not set(training) & set(held)
    assert sorted(training + held) == sorted(documents)
    assert 0.07 < len(held) / len(documents) < 0.13
    assert split_documents(documents[::-1], 0.1, seed=3)[1] == held[::-1]  # the order given does not matter
    assert set(split_documents(documents, 0.1, seed=4)[1]) != set(held)
    assert set(split_documents(documents[:400], 0.1, seed=3)[1]) == set(documents[:400]) & set(
        held
    )  # more text moves none


def test_one_long_document_is_cut_before_it_is_split() -> None:
    book = "\n\n".join(f"Paragraph {i} is about the number {i * i}." for i in range(500))
    training, held = split_documents([book], 0.1, seed=0)
    assert training
    assert held
    assert sorted(" ".join(training + held).split()) == sorted(book.split())
    assert 0.03 < len("".join(held)) / len(book) < 0.2


def test_packing_keeps_every_token_once_and_wastes_little() -> None:
    given = windows(*[64] * 5, *np.random.default_rng(0).integers(8, 64, 200))
    rows = pack(given, 64)
    ids = np.sort(rows.ids_RT[rows.segment_RT != PAD])
    assert (ids == np.sort(np.concatenate(given.ids))).all()
    assert rows.tokens == sum(map(len, given.ids))
    assert rows.tokens / rows.ids_RT.size > 0.9
    for row in range(len(rows)):  # segments are runs 0, 1, 2, ... then padding
        numbers = rows.segment_RT[row]
        real = numbers[numbers != PAD]
        assert (np.diff(real) >= 0).all()
        assert (np.diff(real) <= 1).all()
        assert (numbers[len(real) :] == PAD).all()


def test_targets_stay_within_their_segment() -> None:
    batch = make_batch(pack(windows(10, 9, 8), 32), slice(None))
    segments = batch.segment_BT.flatten()[batch.real_N].tolist()
    ids = batch.ids_BT.flatten()[batch.real_N].tolist()
    targets = batch.target_N.tolist()
    assert batch.targets == 27 - 3
    for i, target in enumerate(targets):
        last = i + 1 == len(ids) or segments[i + 1] != segments[i]
        assert target == (NO_TARGET if last else ids[i + 1])


def test_every_epoch_sees_every_row_once_in_another_order() -> None:
    steps = [row_order(10, 4, step, seed=1) for step in range(5)]
    seen = np.concatenate(steps)
    assert sorted(seen[:10]) == list(range(10))
    assert sorted(seen[10:]) == list(range(10))
    assert list(seen[:10]) != list(seen[10:])
    assert (row_order(10, 4, 3, seed=1) == steps[3]).all()
    assert (row_order(3, 8, 0, seed=1)[:3] != row_order(3, 8, 1, seed=2)[:3]).any()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_a_packed_segment_is_computed_as_if_alone(family: str, tiny_model: Callable[..., Path]) -> None:
    """Also over the sliding window (16) and with padding at the row's end."""
    folder = tiny_model(family)
    shape, model = ModelShape.from_hf(read_config(folder)), load_float(folder)
    tokenizer = load_tokenizer(folder)
    given = cut_windows(["The cat sat on the mat.", "A dog!!!!", "Once upon a time there was a mouse"], tokenizer, 64)
    packed = pack(given, 64)
    assert len(packed) < len(given.ids)
    with torch.inference_mode():
        together = torch.cat([hidden_states(model, shape, b) for b in batches(packed, 4)])
        order = sorted(range(len(given.ids)), key=lambda i: -len(given.ids[i]))
        found: dict[int, torch.Tensor] = {}
        flat = packed.ids_RT[packed.segment_RT != PAD]
        for i in order:
            ids = torch.from_numpy(given.ids[i])[None]
            found[i] = model.model(input_ids=ids, use_cache=False).last_hidden_state[0]
        for i in order:
            size = len(given.ids[i])
            at = next(s for s in range(len(flat)) if (flat[s : s + size] == given.ids[i]).all())
            torch.testing.assert_close(together[at : at + size], found[i], rtol=1e-4, atol=2e-5)


def test_too_little_text_says_how_much_is_missing(tiny_model: Callable[..., Path]) -> None:
    tokenizer = load_tokenizer(tiny_model("llama"))
    with pytest.raises(RequestError, match="shorter than one batch") as error:
        training_rows(["just a few words here, no more"], tokenizer, length=16, batch=8)
    assert "--batch" in str(error.value)
    assert "2 sequences of 16" in str(error.value)
