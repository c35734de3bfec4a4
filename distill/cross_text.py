"""The text of a batch in the tokens of a teacher whose tokenizer is another, and where both cut it alike.

Both tokenizers read the same documents. A token ends at a character; where tokens of both end at the same one, the
text before it is a span that both have whole: its tokens are predicted from the same text before, and their
probabilities multiply to the span's. Of a character that is written as several tokens only the last one ends it.

A window of the student's rows is a piece of a document. The teacher is given the tokens that begin and end within
it, in rows of their own, behind its own beginning id.

Legend: W windows, B rows, T ids of a row, N and M positions of the student's and of the teacher's rows, S spans.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from distill.data import Batch, Rows, make_batch
from distill.packing import PAD, Array, Layout, best_fit
from distill.tokenized import Shard

LONGEST_SPAN = 32
"""Tokens of a span on either side at most. The probability of so many in a row says nothing any more, and a span's
positions have to lie in one chunk of the loss."""


@dataclass(frozen=True)
class Beside:
    """A batch's text in the teacher's tokens.

    Attributes:
        batch: the teacher's rows.
        last_S, count_S: of each span the student's position (of N) that predicts its last token, and how many tokens
            it has; ascending.
        their_last_S, their_count_S: the same in the teacher's positions (of M).
    """

    batch: Batch
    last_S: Array
    count_S: Array
    their_last_S: Array
    their_count_S: Array

    def __len__(self) -> int:
        return len(self.last_S)


@dataclass(frozen=True)
class _Piece:
    """A window's text: the teacher's ids, and spans in tokens of the window, half-open on both sides."""

    ids: Array
    ours_S2: Array
    theirs_S2: Array


@dataclass(frozen=True)
class OtherTokens:
    """The documents of a layout in the teacher's tokens.

    Attributes:
        layout: the student's rows; its shards hold where tokens end.
        shards: the same documents, tokenised by the teacher's tokenizer.
        bos: the teacher's beginning id.
        limit: the teacher's positions.
    """

    layout: Layout
    shards: Sequence[Shard]
    bos: int | None
    limit: int

    def beside(self, which: npt.NDArray[np.int64] | slice, device: str) -> Beside:
        """The text of some of the layout's rows."""
        layout, first_R1 = self.layout, self.layout.first_R1
        rows = which if isinstance(which, np.ndarray) else np.arange(len(first_R1) - 1)[which]
        windows = [w for row in rows for w in range(first_R1[row], first_R1[row + 1])]
        head_W, their_head = layout.spans.head_W[windows].astype(np.int64), int(self.bos is not None)
        size_W = layout.spans.size_W[windows] + head_W
        pieces = [self._piece(w) for w in windows]
        batch, their_start_W = self._rows(pieces, device)
        # a token is predicted one position before its own, behind the beginning id
        ours_S2 = _joined([p.ours_S2 for p in pieces], np.cumsum(size_W) - size_W + head_W - 1)
        theirs_S2 = _joined([p.theirs_S2 for p in pieces], their_start_W + their_head - 1)
        return Beside(
            batch,
            ours_S2[:, 1] - 1, ours_S2[:, 1] - ours_S2[:, 0], theirs_S2[:, 1] - 1, theirs_S2[:, 1] - theirs_S2[:, 0],
        )  # fmt: skip

    def _rows(self, pieces: Sequence[_Piece], device: str) -> tuple[Batch, Array]:
        """The teacher's tokens packed, and the position (of M) that each piece begins at."""
        written = [p.ids if self.bos is None else np.concatenate([[self.bos], p.ids]) for p in pieces]
        size_W = np.array([len(ids) for ids in written])
        order_W, first_R1 = best_fit(size_W, max(int(size_W.max()), self.layout.length))
        sizes = np.add.reduceat(size_W[order_W], first_R1[:-1])
        ids_RT = np.zeros((len(first_R1) - 1, int(sizes.max())), np.int32)
        segment_RT = np.full(ids_RT.shape, PAD, np.int32)
        for row in range(len(ids_RT)):
            which_W = order_W[first_R1[row] : first_R1[row + 1]]
            ids_RT[row, : sizes[row]] = np.concatenate([written[w] for w in which_W])
            segment_RT[row, : sizes[row]] = np.repeat(np.arange(len(which_W)), size_W[which_W])
        start_W = np.zeros_like(size_W)
        start_W[order_W] = np.cumsum(size_W[order_W]) - size_W[order_W]
        return make_batch(Rows(ids_RT, segment_RT), slice(None), device), start_W

    def _piece(self, w: int) -> _Piece:
        spans = self.layout.spans
        number, start, size, head = (int(x[w]) for x in (spans.shard_W, spans.start_W, spans.size_W, spans.head_W))
        starts_D, first = self._ours[number]
        document = int(np.searchsorted(starts_D, start, "right")) - 1
        begin = int(starts_D[document])
        length = int(self.layout.shards[number].documents["length"][document])
        ends = _ends(self.layout.shards[number], begin, length)
        ids, their_ends = self._document(first + document)
        room = self.limit - int(self.bos is not None)
        return _align(ends, start - begin, size, bool(head), ids, their_ends, room, self.bos is not None)

    @cached_property
    def _ours(self) -> list[tuple[Array, int]]:
        """Of each of the student's shards where its documents begin, and the number of the first among all."""
        return _numbered(self.layout.shards)

    @cached_property
    def _theirs(self) -> list[tuple[Array, int]]:
        return _numbered(self.shards)

    def _document(self, number: int) -> tuple[Array, Array]:
        """The teacher's ids of a document, and the characters that they end at."""
        firsts = [first for _, first in self._theirs]
        shard = int(np.searchsorted(firsts, number, "right")) - 1
        begin = int(self._theirs[shard][0][number - firsts[shard]])
        length = int(self.shards[shard].documents["length"][number - firsts[shard]])
        return np.asarray(self.shards[shard].ids[begin : begin + length]), _ends(self.shards[shard], begin, length)


def _joined(spans: Sequence[Array], shift_W: Array) -> Array:
    """All windows' spans, each moved to where its window lies."""
    moved = [each_S2 + shift for each_S2, shift in zip(spans, shift_W, strict=True)]
    return np.concatenate([np.zeros((0, 2), np.int64), *moved])


def _numbered(shards: Sequence[Shard]) -> list[tuple[Array, int]]:
    found, first = [], 0
    for shard in shards:
        sizes_D = shard.documents["length"].astype(np.int64)
        found.append((np.cumsum(sizes_D) - sizes_D, first))
        first += len(sizes_D)
    return found


def _ends(shard: Shard, begin: int, length: int) -> Array:
    """The character behind each token of a document; never before the one of the token before."""
    assert shard.ends is not None
    return np.maximum.accumulate(shard.ends[begin : begin + length].astype(np.int64))


def _align(
    ends: Array, start: int, size: int, head: bool, ids: Array, their_ends: Array, room: int, their_head: bool
) -> _Piece:
    """The teacher's part of a window, and the spans that both have.

    Args:
        ends: of the document's tokens.
        start, size: the window within them.
        head: whether something is before the window's first token, so that it is predicted.
        ids, their_ends: the document in the teacher's tokens.
        room: tokens that the teacher takes at most.
        their_head: whether something is before its first token.
    """
    c0 = int(ends[start - 1]) if start else 0
    stop = start + size
    before = np.concatenate([[0], their_ends[:-1]])
    first = max(np.searchsorted(before, c0, "left"), np.searchsorted(their_ends, c0, "right")) if start else 0
    last = min(int(np.searchsorted(their_ends, ends[stop - 1], "right")), int(first) + room)
    ours, our_counts = _boundaries(ends, start, stop, c0)
    theirs, their_counts = _boundaries(their_ends, int(first), last, int(before[first]) if first < len(before) else c0)
    _, i, j = np.intersect1d(ours, theirs, assume_unique=True, return_indices=True)
    ours_S2 = np.stack([our_counts[i][:-1], our_counts[i][1:]], 1)
    theirs_S2 = np.stack([their_counts[j][:-1], their_counts[j][1:]], 1)
    keep = (ours_S2[:, 0] >= int(not head)) & (theirs_S2[:, 0] >= int(not their_head))
    for spans in (ours_S2, theirs_S2):
        keep &= spans[:, 1] - spans[:, 0] <= LONGEST_SPAN
    return _Piece(ids[first:last], ours_S2[keep], theirs_S2[keep])


def _boundaries(ends: Array, start: int, stop: int, c0: int) -> tuple[Array, Array]:
    """Characters that tokens start..stop end at, and the tokens up to each; c0, the character before, is one too.

    A character's last token alone ends it, so neither edge counts where it is within one.
    """
    found = ends[start:stop]
    is_last = np.ones(len(found), bool)
    is_last[:-1] = found[1:] > found[:-1]
    if stop < len(ends) and len(found):
        is_last[-1] = ends[stop] > found[-1]
    counts = np.flatnonzero(is_last) + 1
    at = found[is_last]
    within = bool(len(found)) and found[0] <= c0  # of the character before, more tokens follow
    return (at, counts) if within else (np.concatenate([[c0], at]), np.concatenate([[0], counts]))
