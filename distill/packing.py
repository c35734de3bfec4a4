"""Windows of documents cut, held out and packed into rows: numbers only, no text is read.

What is kept of a window is where it lies (21 bytes), so a corpus far larger than memory packs in memory; its ids are
read from the memory-mapped shards when a step asks for a row.

Legend: R rows, B rows of a batch, T ids of a row, W windows, D documents.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from distill.tokenized import Shard
from nano.corpus import MIN_WINDOW

PAD = -1
Array = npt.NDArray[Any]
Which = npt.NDArray[np.int64] | slice | int


def held_out(digests: Sequence[npt.NDArray[np.uint64]], share: float, seed: int) -> list[npt.NDArray[np.bool_]]:
    """Which documents are kept from training: decided by a hash of each and the seed, so equal ones stay together.

    Args:
        digests: 64-bit hashes of documents, shard by shard.
        share: of all documents.
        seed: another one holds out others.

    Returns:
        for each shard a bool for each document; at least one document in all.
    """
    drawn = [_mixed(digest, seed) for digest in digests]
    border = np.uint64(min(int(share * 2**64), 2**64 - 1))
    if not any((draw < border).any() for draw in drawn):
        border = min(draw.min() for draw in drawn if len(draw)) + np.uint64(1)
    return [draw < border for draw in drawn]


def _mixed(values: npt.NDArray[np.uint64], seed: int) -> npt.NDArray[np.uint64]:
    """splitmix64's finaliser (Steele, Lea and Flood 2014) over a hash and the seed."""
    x = values.astype(np.uint64) + np.uint64((seed * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) % 2**64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclass(frozen=True)
class Spans:
    """Windows as places in shards.

    Attributes:
        shard_W, start_W, size_W: where a window's ids lie.
        head_W: bool, the beginning id goes in front.
        chat_W: bool, a loss is taken only where the assistant's tokens are predicted.
        truncated: conversations of which a part is left out.
    """

    shard_W: Array
    start_W: Array
    size_W: Array
    head_W: Array
    chat_W: Array
    truncated: int = 0

    @property
    def places_W(self) -> Array:
        """What a window takes of its row."""
        return self.size_W + self.head_W

    def take(self, which: Any) -> Spans:
        """Some of the windows, in the order given."""
        return Spans(self.shard_W[which], self.start_W[which], self.size_W[which], self.head_W[which], self.chat_W[which], self.truncated)  # noqa: E501  # fmt: skip

    def first_tokens(self, limit: int) -> Spans:
        """As many windows as have `limit` ids to predict, the last one cut."""
        predicted_W = self.places_W - 1
        before_W = np.concatenate([[0], np.cumsum(predicted_W)[:-1]])
        size_W = np.minimum(predicted_W, np.maximum(limit - before_W, -1)) + 1 - self.head_W
        cut = Spans(self.shard_W, self.start_W, size_W, self.head_W, self.chat_W, self.truncated)
        return cut.take(np.flatnonzero(cut.places_W >= MIN_WINDOW))


def cut_spans(
    shards: Sequence[Shard], keep: Sequence[npt.NDArray[np.bool_]], length: int, has_head: bool, first: int = 0
) -> Spans:
    """Windows of the kept documents, as `nano.corpus.cut_windows` cuts them.

    Args:
        shards: tokenised text.
        keep: for each shard which documents.
        length: T.
        has_head: a text's windows begin with the beginning id.
        first: number of the first shard among all.
    """
    found, truncated = [], 0
    for number, (shard, kept) in enumerate(zip(shards, keep, strict=True), first):
        sizes_D = shard.documents["length"].astype(np.int64)
        starts_D = np.cumsum(sizes_D) - sizes_D
        chat_D = shard.documents["chat"]
        text_D = np.flatnonzero(kept & ~chat_D)
        step = length - has_head
        pieces_D = -(-sizes_D[text_D] // step)
        document_W = np.repeat(text_D, pieces_D)
        piece_W = np.arange(len(document_W)) - np.repeat(np.cumsum(pieces_D) - pieces_D, pieces_D)
        size_W = np.minimum(step, sizes_D[document_W] - piece_W * step)
        start_W = starts_D[document_W] + piece_W * step
        talk_D = np.flatnonzero(kept & chat_D)
        talk_size = np.minimum(length, sizes_D[talk_D])
        truncated += int((sizes_D[talk_D] > length).sum())
        said = _answers_within(shard, starts_D[talk_D], talk_size)
        order_W = np.argsort(np.concatenate([document_W, talk_D[said]]), kind="stable")
        chat_W = np.concatenate([np.zeros(len(document_W), bool), np.ones(int(said.sum()), bool)])[order_W]
        spans = Spans(
            np.full(len(order_W), number, np.int32), np.concatenate([start_W, starts_D[talk_D][said]])[order_W],
            np.concatenate([size_W, talk_size[said]]).astype(np.int32)[order_W], has_head & ~chat_W, chat_W,
        )  # fmt: skip
        found.append(spans.take(np.flatnonzero(spans.places_W >= MIN_WINDOW)))
    return join_spans(found, truncated)


def _answers_within(shard: Shard, start: Array, size: Array) -> Array:
    """bool for each window: whether it predicts a token of the assistant's."""
    if shard.answer is None or not len(start):
        return np.zeros(len(start), bool)
    before = np.concatenate([[0], np.cumsum(shard.answer, dtype=np.int32)])
    return np.asarray(before[start + size] > before[start + 1])


def join_spans(parts: Sequence[Spans], truncated: int = 0) -> Spans:
    """Windows of several sets, one behind another."""

    def join(name: str, dtype: Any) -> Array:
        return np.concatenate([np.zeros(0, dtype), *(getattr(part, name) for part in parts)])

    return Spans(join("shard_W", np.int32), join("start_W", np.int64), join("size_W", np.int32),
                 join("head_W", bool), join("chat_W", bool), truncated)  # fmt: skip


def best_fit(size_W: Array, length: int) -> tuple[Array, Array]:
    """(windows in the order of their rows, where each row begins in it): best fit, longest window first.

    A row's free places are looked up in a bit field of the free sizes that occur: constant time for a window.
    """
    order_W = np.argsort(-size_W, kind="stable")
    row_W = np.arange(len(order_W))
    rows = int((size_W == length).sum())
    open_rows: list[list[int]] = [[] for _ in range(length + 1)]
    sizes_there = 0
    for at, size in enumerate(size_W[order_W[rows:]].tolist(), rows):
        fitting = sizes_there >> size
        if fitting:
            free = size + (fitting & -fitting).bit_length() - 1
            row = heapq.heappop(open_rows[free])
            sizes_there &= ~(0 if open_rows[free] else 1 << free)
        else:
            free, row, rows = length, rows, rows + 1
        row_W[at] = row
        if free - size >= MIN_WINDOW:
            heapq.heappush(open_rows[free - size], row)
            sizes_there |= 1 << (free - size)
    by_row = np.argsort(row_W, kind="stable")
    return order_W[by_row], np.concatenate([[0], np.cumsum(np.bincount(row_W, minlength=rows))])


@dataclass(frozen=True)
class Layout:
    """Where the windows of each row lie.

    Attributes:
        shards: tokenised text.
        spans: windows, row by row.
        first_R1: the first window of each row, and how many there are.
        length: T.
        bos: the beginning id.
    """

    shards: tuple[Shard, ...]
    spans: Spans
    first_R1: Array
    length: int
    bos: int | None

    def read(self, which: Which, what: Literal["ids", "segment", "learn"]) -> Array:
        """Some rows' values, (B, T), or (T,) of one row."""
        if isinstance(which, int | np.integer):
            return np.asarray(self.read(np.array([which]), what)[0])
        chosen = which if isinstance(which, np.ndarray) else np.arange(len(self.first_R1) - 1)[which]
        fill, dtype = {"ids": (0, np.int32), "segment": (PAD, np.int32), "learn": (False, bool)}[what]
        out_BT = np.full((len(chosen), self.length), fill, dtype)
        for out_T, row in zip(out_BT, chosen, strict=True):
            at = 0
            for number, w in enumerate(range(self.first_R1[row], self.first_R1[row + 1])):
                size = int(self.spans.size_W[w]) + int(self.spans.head_W[w])
                self._write(out_T[at : at + size], w, number, what)
                at += size
        return out_BT

    def _write(self, out: Array, w: int, number: int, what: str) -> None:
        spans = self.spans
        shard, start, head = self.shards[spans.shard_W[w]], int(spans.start_W[w]), int(spans.head_W[w])
        if what == "ids":
            out[:head] = self.bos if head else 0
            out[head:] = shard.ids[start : start + len(out) - head]
        elif what == "segment":
            out[:] = number
        elif spans.chat_W[w] and shard.answer is not None:
            out[:-1] = shard.answer[start + 1 : start + len(out)]
        else:
            out[:] = True


@dataclass(frozen=True)
class View:
    """One table of a layout, read when rows of it are asked for."""

    layout: Layout
    what: Literal["ids", "segment", "learn"]

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self.layout.first_R1) - 1, self.layout.length

    def __getitem__(self, which: Any) -> Array:
        return self.layout.read(which, self.what)


def pack_spans(
    shards: Sequence[Shard], groups: Sequence[Spans], length: int, bos: int | None
) -> tuple[Layout, tuple[int, ...]]:
    """Windows packed into rows, each group's rows behind the one's before; and how many rows each group has."""
    spans, firsts, counts, windows = [], [np.zeros(1, np.int64)], [], 0
    for group in groups:
        order_W, first_R1 = best_fit(group.places_W, length)
        spans.append(group.take(order_W))
        firsts.append(first_R1[1:] + windows)
        counts.append(len(first_R1) - 1)
        windows += len(order_W)
    return Layout(tuple(shards), join_spans(spans), np.concatenate(firsts), length, bos), tuple(counts)
