"""Splitting without leakage, packing without attention across documents, an order that can be taken up anywhere."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest
import torch

from distill.data import NO_TARGET, Rows, batches, make_batch, pack
from distill.models import hidden_states
from distill.options import DistillOptions
from distill.order import MIX_BLOCK, mixed_order, row_order
from distill.packing import PAD, held_out
from distill.text import Text, load_text
from nano.corpus import MIN_WINDOW, Windows, cut_windows, read_documents
from nano.errors import RequestError
from nano.shapes import ModelShape, read_config
from nano.sources import open_sources
from nano.tokens import load_tokenizer
from nano.torch_lm import load_float


def windows(*lengths: int) -> Windows:
    counter = iter(range(3, 10**6))
    return Windows(tuple(np.array([next(counter) for _ in range(n)], dtype=np.int64) for n in lengths))


def write_texts(path: Path, texts: Sequence[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def segments(rows: Rows) -> list[tuple[int, ...]]:
    """Every segment's ids, sorted."""
    ids_RT, segment_RT = rows.ids_RT[:], rows.segment_RT[:]
    found = []
    for ids, numbers in zip(ids_RT, segment_RT, strict=True):
        found += [tuple(ids[numbers == number].tolist()) for number in range(numbers.max() + 1)]
    return sorted(found)


def test_documents_are_held_out_by_what_they_are() -> None:
    digests = np.random.default_rng(0).integers(0, 2**64, 20_000, dtype=np.uint64)
    kept = held_out([digests], 0.1, seed=3)[0]
    assert 0.09 < kept.mean() < 0.11
    assert (held_out([digests[::-1]], 0.1, seed=3)[0][::-1] == kept).all()  # the order given does not matter
    assert (np.concatenate(held_out([digests[:300], digests[300:]], 0.1, seed=3)) == kept).all()  # nor the shards
    assert (held_out([digests[:500]], 0.1, seed=3)[0] == kept[:500]).all()  # more text moves none
    assert 0.15 < (held_out([digests], 0.1, seed=4)[0] != kept).mean() < 0.21  # 2 x 0.1 x 0.9 where independent
    assert (held_out([digests], 0.2, seed=3)[0] >= kept).all()
    assert sum(held_out([digests[:5]], 1e-4, seed=0)[0]) == 1
    assert (kept[digests % np.uint64(2) == 0].mean()) == pytest.approx(0.1, abs=0.01)


def test_held_out_text_is_never_trained_on(stories: Path, tinystories: Path, tmp_path: Path) -> None:
    texts = [t for t in read_documents([tinystories])[:300] if isinstance(t, str)]
    tokenizer, options = load_tokenizer(stories), DistillOptions(length=64, batch=4, held_out=0.1, eval_tokens=10**6)
    source = write_texts(tmp_path / "a", texts + texts[:50])  # duplicates must fall on one side
    text = load_text(open_sources([source]), tokenizer, options)
    training, held = segments(text.rows), segments(text.held_out)
    assert not set(training) & set(held)
    assert sorted(training + held) == sorted(
        tuple(w.tolist()) for w in cut_windows(texts + texts[:50], tokenizer, 64).ids
    )
    assert 0.05 < len(held) / (len(held) + len(training)) < 0.16


def test_one_long_document_is_cut_before_it_is_split(stories: Path, tmp_path: Path) -> None:
    book = "\n\n".join(f"Paragraph {i} is about the number {i * i}." for i in range(500))
    (tmp_path / "book").write_text(book)
    options = DistillOptions(length=64, batch=4, held_out=0.1, eval_tokens=10**6)
    text = load_text(open_sources([tmp_path / "book"]), load_tokenizer(stories), options)
    total = text.rows.tokens + text.held_out.tokens
    assert 0.03 < text.held_out.tokens / total < 0.2
    assert total > 0.95 * len(load_tokenizer(stories).encode(book))


def test_rows_read_from_shards_are_the_packed_windows(
    stories: Path, tinystories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against `pack` over windows in memory, with several small shards."""
    monkeypatch.setattr("distill.tokenized.SHARD_TOKENS", 5000)
    texts = [t for t in read_documents([tinystories])[:120] if isinstance(t, str)]
    tokenizer, options = load_tokenizer(stories), DistillOptions(length=64, batch=4, held_out=0.01)
    text = load_text(open_sources([write_texts(tmp_path / "a", texts)]), tokenizer, options)
    digests = [int.from_bytes(blake2b(t.encode(), digest_size=8).digest(), "little") for t in texts]
    held = held_out([np.array(digests, np.uint64)], options.held_out, options.seed)[0]
    kept = [t for t, out in zip(texts, held, strict=True) if not out]
    expected = pack(cut_windows(kept, tokenizer, 64), 64)
    assert len(expected) == len(text.rows) > 100
    assert (text.rows.ids_RT[:] == expected.ids_RT[:]).all()
    assert (text.rows.segment_RT[:] == expected.segment_RT[:]).all()
    assert text.rows.tokens == expected.tokens
    chosen = np.array([5, 3, 90])
    assert (text.rows.ids_RT[chosen] == expected.ids_RT[chosen]).all()
    assert (text.rows.segment_RT[7] == expected.segment_RT[7]).all()


def test_held_out_tokens_are_exact(stories: Path, tinystories: Path) -> None:
    options = DistillOptions(length=128, batch=4, eval_tokens=1000)
    text = load_text(open_sources([tinystories]), load_tokenizer(stories), options)
    assert sum(batch.targets for batch in batches(text.held_out, 4)) == 1000


def test_packing_keeps_every_token_once_and_wastes_little() -> None:
    given = windows(*[64] * 5, *np.random.default_rng(0).integers(8, 64, 200))
    rows = pack(given, 64)
    ids_RT, segment_RT = rows.ids_RT[:], rows.segment_RT[:]
    assert (np.sort(ids_RT[segment_RT != PAD]) == np.sort(np.concatenate(given.ids))).all()
    assert rows.tokens == sum(map(len, given.ids))
    assert rows.tokens / ids_RT.size > 0.9
    for numbers in segment_RT:  # segments are runs 0, 1, 2, ... then padding
        real = numbers[numbers != PAD]
        assert (np.diff(real) >= 0).all()
        assert (np.diff(real) <= 1).all()
        assert (numbers[len(real) :] == PAD).all()


def test_packing_is_best_fit() -> None:
    """Against the plain algorithm: each window, longest first, into the fullest row that takes it."""
    sizes = np.random.default_rng(1).integers(8, 65, 500)
    rows: list[list[int]] = []
    for size in sorted(sizes.tolist(), reverse=True):
        fitting = [row for row in rows if 64 - sum(row) >= max(size, MIN_WINDOW)]
        row = max(fitting, key=sum, default=None)
        if row is None:
            rows.append([size])
        else:
            row.append(size)
    numbers = pack(windows(*sizes), 64).segment_RT[:]
    found = [[int((row == n).sum()) for n in range(row.max() + 1)] for row in numbers]
    assert found == rows


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
    assert row_order(10, 4, 0, seed=1).tolist() == [8, 4, 7, 0]  # the same on every machine


def test_sources_are_mixed_by_weight() -> None:
    mix = [(10, 0.7), (2000, 0.2), (7, 0.1)]
    seen = np.concatenate([mixed_order(mix, 8, step, seed=5) for step in range(2 * MIX_BLOCK // 8)])
    source = np.digitize(seen, [10, 2010])
    for block in (source[:MIX_BLOCK], source[MIX_BLOCK:]):
        assert np.bincount(block).tolist() == [700, 200, 100]
    for at in range(0, MIX_BLOCK, 50):  # evenly, not only in total
        assert abs((source[at : at + 50] == 0).sum() - 35) <= 2
    first = seen[source == 0]
    for epoch in range(0, 700, 10):
        assert sorted(first[epoch : epoch + 10]) == list(range(10))
    assert len(set(seen[source == 1])) == 400  # none twice before all were seen
    assert (mixed_order(mix, 8, 100, seed=5) == seen[800:808]).all()
    assert (mixed_order(mix, 8, 100, seed=6) != seen[800:808]).any()


def test_a_weighted_run_reads_the_sources_it_names(stories: Path, tinystories: Path, tmp_path: Path) -> None:
    texts = [t for t in read_documents([tinystories])[:200] if isinstance(t, str)]
    one, two = write_texts(tmp_path / "a", texts[:60]), write_texts(tmp_path / "b", texts[60:])
    tokenizer, options = load_tokenizer(stories), DistillOptions(length=64, batch=10, held_out=0.1, eval_tokens=1000)

    def load(*data: str) -> Text:
        return load_text(open_sources(data), tokenizer, options)

    alone, mixed = load(str(one)), load(f"{one}=3", f"{two}=1")
    own = set(segments(alone.rows))
    step = mixed.rows.order(40, 0, 0)
    from_one = [bool(own & set(segments(Rows(mixed.rows.ids_RT[[r]], mixed.rows.segment_RT[[r]])))) for r in step]
    assert sum(from_one) == pytest.approx(30, abs=1)
    measured = segments(mixed.held_out)
    share = sum(len(s) for s in measured if s in set(segments(alone.held_out))) / sum(map(len, measured))
    assert share == pytest.approx(0.75, abs=0.1)
    plain = load(str(one), str(two))
    assert plain.rows.mix == ()
    assert segments(plain.rows) == segments(mixed.rows)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_a_packed_segment_is_computed_as_if_alone(family: str, tiny_model: Callable[..., Path]) -> None:
    """Logits too; also over the sliding window (16) and with padding at the row's end."""
    folder = tiny_model(family)
    shape, model = ModelShape.from_hf(read_config(folder)), load_float(folder)
    tokenizer = load_tokenizer(folder)
    given = cut_windows(["The cat sat on the mat.", "A dog!!!!", "Once upon a time there was a mouse"], tokenizer, 64)
    packed = pack(given, 64)
    assert len(packed) < len(given.ids)
    with torch.inference_mode():
        together = torch.cat([hidden_states(model, shape, b) for b in batches(packed, 4)])
        flat = packed.ids_RT[:][packed.segment_RT[:] != PAD]
        for ids in given.ids:
            alone = model(input_ids=torch.from_numpy(ids)[None], use_cache=False).logits[0]
            at = next(s for s in range(len(flat)) if (flat[s : s + len(ids)] == ids).all())
            torch.testing.assert_close(model.lm_head(together[at : at + len(ids)]), alone, rtol=1e-4, atol=5e-5)


def test_too_little_text_says_how_much_is_missing(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    write_texts(tmp_path / "a", [f"just a few words here {i}" for i in range(30)])
    options = DistillOptions(length=16, batch=100)
    with pytest.raises(RequestError, match="shorter than one batch") as error:
        load_text(open_sources([tmp_path / "a"]), load_tokenizer(tiny_model("llama")), options)
    assert "--batch" in str(error.value)
    assert "sequences of 16" in str(error.value)
