"""From what was given as --data to rows: tokenise (or find it done), hold out, cut, pack, mix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from distill.cross_text import OtherTokens
from distill.data import Rows
from distill.options import DistillOptions
from distill.packing import Layout, Spans, View, cut_spans, held_out, join_spans, pack_spans
from distill.tokenized import Shard, cache_folder, tokenize_sources
from nano.errors import RequestError, UnsupportedError
from nano.progress import warn
from nano.sources import Source
from nano.tokens import TextTokenizer

Kept = list[npt.NDArray[np.bool_]]


@dataclass(frozen=True)
class Other:
    """A teacher that reads in tokens of its own.

    Attributes:
        tokenizer: its tokenizer.
        positions: how many tokens it can read at once.
    """

    tokenizer: TextTokenizer
    positions: int


@dataclass(frozen=True)
class Text:
    """A run's text.

    Attributes:
        rows: to train on.
        held_out: to measure on.
    """

    rows: Rows
    held_out: Rows


def load_text(
    sources: Sequence[Source],
    tokenizer: TextTokenizer,
    options: DistillOptions,
    cache: Path | None = None,
    other: Other | None = None,
) -> Text:
    """Training and held-out rows of some sources.

    Args:
        sources: text.
        tokenizer: of the tokens that rows are of.
        options: length, split, mix.
        cache: for tokens; None means `distill.tokenized.cache_folder`.
        other: a teacher of another tokenizer, which is to read the same text.

    Raises:
        RequestError and its kinds: the text cannot be read, or is too short.
        NoSpaceError: the disk of the cache is full.
    """
    by_source = tokenize_sources(sources, tokenizer, cache or cache_folder(), ends=other is not None)
    shards = [shard for group in by_source for shard in group]
    held = held_out([shard.documents["digest"] for shard in shards], options.held_out, options.seed)
    training: list[Spans] = []
    measured: list[Spans] = []
    first, has_head, length = 0, tokenizer.bos_id is not None, options.length
    for group in by_source:
        kept = held[first : first + len(group)]
        training.append(cut_spans(group, [~k for k in kept], length, has_head, first))
        measured.append(cut_spans(group, kept, length, has_head, first))
        first += len(group)
    _check_found(sources, training, measured)
    weights = [source.weight for source in sources]
    weighted = [weight for weight in weights if weight is not None]
    rows = _training_rows(shards, training, weighted, tokenizer, options)
    measured = _measured(training, measured, weighted, options.eval_tokens)
    layout, _ = pack_spans(shards, [join_spans(measured)], length, tokenizer.bos_id)
    truncated = sum(spans.truncated for spans in training)
    if truncated:
        warn(f"{truncated:,} conversations are longer than --length {length}: what exceeds it is left out")
    text = Text(rows, rows_of(layout))
    return text if other is None else _with_other(text, sources, shards, other, cache or cache_folder())


def _with_other(text: Text, sources: Sequence[Source], shards: Sequence[Shard], other: Other, cache: Path) -> Text:
    """The rows with what a teacher of another tokenizer reads."""
    if any(shard.documents["chat"].any() for shard in shards):
        raise UnsupportedError(
            "Conversations cannot be compared across tokenizers.",
            found="records with messages, and --cross-tokenizer",
            expected="text: each model has its own chat template, so the two would read different texts",
            todo='give the conversations as "text"',
        )
    theirs = [shard for group in tokenize_sources(sources, other.tokenizer, cache, ends=True) for shard in group]
    assert sum(len(s.documents) for s in theirs) == sum(len(s.documents) for s in shards)

    def both(rows: Rows) -> Rows:
        assert isinstance(rows.ids_RT, View)
        layout = rows.ids_RT.layout
        return replace(rows, other=OtherTokens(layout, theirs, other.tokenizer.bos_id, other.positions))

    return Text(both(text.rows), both(text.held_out))


def _check_found(sources: Sequence[Source], training: Sequence[Spans], measured: Sequence[Spans]) -> None:
    if not any(len(spans.size_W) for spans in training) or not any(len(spans.size_W) for spans in measured):
        raise RequestError(
            "The text is too short.", found="nothing to hold out and train on beside", todo="give more text"
        )
    for source, spans in zip(sources, training, strict=True):
        if source.weight is not None and not len(spans.size_W):
            raise RequestError("A source has a weight and no text to train on.", found=source.name,
                               todo="give more of it, or leave it out")  # fmt: skip


def _training_rows(
    shards: Sequence[Shard],
    training: Sequence[Spans],
    weights: Sequence[float],
    tokenizer: TextTokenizer,
    options: DistillOptions,
) -> Rows:
    """All rows as one pool, or, where sources have weights, each source's behind the other's."""
    groups = training if weights else [join_spans(training)]
    layout, counts = pack_spans(shards, groups, options.length, tokenizer.bos_id)
    rows = rows_of(layout, tuple(zip(counts, weights, strict=True)) if weights else ())
    if len(rows) < options.batch:
        raise RequestError(
            "The text is shorter than one batch.",
            found=f"{rows.tokens:,} training tokens: {len(rows)} sequences of {options.length}",
            expected=f"at least {options.batch} sequences (--batch)",
            todo="give more text, or a smaller --batch or --length",
        )
    return rows


def _measured(
    training: Sequence[Spans], measured: Sequence[Spans], weights: Sequence[float], tokens: int
) -> list[Spans]:
    """The held-out windows that are measured: each source's share is its weight, or its share of the text."""
    share = np.array(weights or [int(spans.places_W.sum()) for spans in training], float)
    return [spans.first_tokens(round(tokens * s)) for spans, s in zip(measured, share / share.sum(), strict=True)]


def rows_of(layout: Layout, mix: tuple[tuple[int, float], ...] = ()) -> Rows:
    """A layout as rows that are read when they are asked for."""
    learn = View(layout, "learn") if layout.spans.chat_W.any() else None
    size = int(layout.spans.places_W.sum())
    return Rows(View(layout, "ids"), View(layout, "segment"), learn, mix, size)
