"""Rows of text: windows packed without attention across documents, read from shards as a step needs them.

Windows of at most T ids are cut from every document. A text's windows each start with the beginning id; a
conversation is one window (what exceeds T is left out) and begins as its template does. A window shorter than
T shares its row with others (best fit, longest first), each a segment that attends to itself only: the mask is causal
within a segment and closed between segments (`distill.models.attention_masks`). Rotary positions are relative, so a
segment in the middle of a row gives the same logits as alone: packing wastes no compute on padding and lets
nothing leak between documents.

A loss is taken at every position of a text, and in a conversation where the next token is the assistant's.

Rows of a corpus are not in memory: only where their windows lie is (`distill.packing`).

Legend: R rows, B rows of a batch, T ids of a row, N positions of a batch that carry a loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from distill.order import mixed_order, row_order
from distill.packing import PAD, Array, best_fit
from nano.corpus import Windows

if TYPE_CHECKING:
    import torch

    from distill.cross_text import Beside, OtherTokens

NO_TARGET = -1


class Table(Protocol):
    """(R, T) values that rows can be taken of; an array, or a view that reads when it is asked."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, which: Any, /) -> Array: ...


@dataclass(frozen=True)
class Rows:
    """Packed text.

    Attributes:
        ids_RT: token ids; 0 where padded.
        segment_RT: number of the segment within its row that a position belongs to; PAD where padded.
        learn_RT: bool, where a loss is taken; None where it is everywhere but on padding.
        mix: (rows, weight) of each source, whose rows lie one behind another; empty where all rows are one pool.
        size: positions that carry a token; counted where it is not given.
        other: the same text in the tokens of a teacher whose tokenizer is another.
    """

    ids_RT: Table
    segment_RT: Table
    learn_RT: Table | None = None
    mix: tuple[tuple[int, float], ...] = ()
    size: int | None = None
    other: OtherTokens | None = None

    @property
    def tokens(self) -> int:
        return int((self.segment_RT[:] != PAD).sum()) if self.size is None else self.size

    def __len__(self) -> int:
        return int(self.ids_RT.shape[0])

    def order(self, batch: int, step: int, seed: int) -> npt.NDArray[np.int64]:
        """Which rows step `step` (from 0) sees: a function of the arguments alone."""
        if not self.mix:
            return row_order(len(self), batch, step, seed)
        return mixed_order(self.mix, batch, step, seed)


@dataclass(frozen=True)
class Batch:
    """Some rows as tensors.

    Attributes:
        ids_BT: int64.
        segment_BT: see `Rows`.
        real_N: flat positions (into B x T) where a loss is taken.
        target_N: the id that follows each within its segment; NO_TARGET at a segment's end.
        whole: every row is one segment, so plain causal attention is right.
        idle: it counts for nothing: a process goes along with it where others have rows left and it has none.
        beside: the same text in the teacher's tokens, where its tokenizer is another.
        rows: the rows' numbers; None where they are no text of the run's.
    """

    ids_BT: torch.Tensor
    segment_BT: torch.Tensor
    real_N: torch.Tensor
    target_N: torch.Tensor
    whole: bool
    idle: bool = False
    beside: Beside | None = None
    rows: npt.NDArray[np.int64] | None = None

    @property
    def targets(self) -> int:
        """Positions that have a next token."""
        return int((self.target_N != NO_TARGET).sum())

    @property
    def compared(self) -> int:
        """Positions, or spans of text, where the student is compared with its teacher."""
        return self.target_N.numel() if self.beside is None else len(self.beside)


def pack(windows: Windows, length: int) -> Rows:
    """Windows of at most `length` ids in as few rows as best fit finds; in memory."""
    order_W, first_R1 = best_fit(np.array([len(ids) for ids in windows.ids]), length)
    ids_RT = np.zeros((len(first_R1) - 1, length), np.int32)
    segment_RT = np.full(ids_RT.shape, PAD, np.int32)
    for row in range(len(ids_RT)):
        start = 0
        for number, w in enumerate(order_W[first_R1[row] : first_R1[row + 1]]):
            stop = start + len(windows.ids[w])
            ids_RT[row, start:stop], segment_RT[row, start:stop] = windows.ids[w], number
            start = stop
    return Rows(ids_RT, segment_RT)


def make_batch(rows: Rows, which: npt.NDArray[np.int64] | slice, device: str = "cpu") -> Batch:
    """Rows as tensors."""
    import torch

    ids_BT, segment_BT = rows.ids_RT[which].astype(np.int64), rows.segment_RT[which]
    follows_BT = np.zeros(segment_BT.shape, bool)
    follows_BT[:, :-1] = (segment_BT[:, 1:] == segment_BT[:, :-1]) & (segment_BT[:, :-1] != PAD)
    target_BT = np.where(follows_BT, np.roll(ids_BT, -1, axis=1), NO_TARGET)
    real_N = np.flatnonzero(segment_BT != PAD if rows.learn_RT is None else rows.learn_RT[which])
    return Batch(
        ids_BT=torch.from_numpy(ids_BT).to(device),
        segment_BT=torch.from_numpy(segment_BT).to(device),
        real_N=torch.from_numpy(real_N).to(device),
        target_N=torch.from_numpy(target_BT.reshape(-1)[real_N]).to(device),
        whole=bool((segment_BT == 0).all()),
        beside=rows.other.beside(which, device) if rows.other else None,
    )


def batches(rows: Rows, batch: int, device: str = "cpu") -> Iterator[Batch]:
    """All rows in their order, for measuring."""
    for start in range(0, len(rows), batch):
        yield make_batch(rows, slice(start, start + batch), device)
