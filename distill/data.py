"""Text for training: documents split without leakage, tokenised once, packed into rows of one length.

Windows of at most T ids, each starting with the beginning id, are cut from every document. A window shorter than
T shares its row with others (best fit, longest first), each a segment that attends to itself only. Rotary
positions are relative, so a segment in the middle of a row gives the same logits as alone: packing wastes no
compute on padding and lets nothing leak between documents.

Legend: R rows, B rows of a batch, T ids of a row, N positions of a batch that carry a token (padding left out).
"""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from nano.corpus import MIN_WINDOW, Windows, cut_windows
from nano.errors import RequestError
from nano.tokens import TextTokenizer

if TYPE_CHECKING:
    import torch

PAD, NO_TARGET = -1, -1
FEW_DOCUMENTS = 20


@dataclass(frozen=True)
class Rows:
    """Packed text.

    Attributes:
        ids_RT: token ids; 0 where padded.
        segment_RT: number of the segment within its row that a position belongs to; PAD where padded.
        tokens: positions that carry a token.
    """

    ids_RT: npt.NDArray[np.int32]
    segment_RT: npt.NDArray[np.int32]

    @property
    def tokens(self) -> int:
        return int((self.segment_RT != PAD).sum())

    def __len__(self) -> int:
        return len(self.ids_RT)


@dataclass(frozen=True)
class Batch:
    """Some rows as tensors.

    Attributes:
        ids_BT: int64.
        segment_BT: see `Rows`.
        real_N: flat positions (into B x T) that carry a token.
        target_N: the id that follows each within its segment; NO_TARGET at a segment's end.
        whole: every row is one segment, so plain causal attention is right.
    """

    ids_BT: torch.Tensor
    segment_BT: torch.Tensor
    real_N: torch.Tensor
    target_N: torch.Tensor
    whole: bool

    @property
    def targets(self) -> int:
        """Positions that have a next token."""
        return int((self.target_N != NO_TARGET).sum())


def split_documents(documents: Sequence[str], share: float, seed: int) -> tuple[list[str], list[str]]:
    """(training, held out): decided by a hash of each document and the seed, so equal documents stay together.

    A few long documents (a book, a plain text file) are first cut at blank lines or line ends, and where even
    that gives too few pieces, at spaces.
    """
    pieces = list(documents)
    for separator in ("\n\n", "\n", " "):
        if len(pieces) >= FEW_DOCUMENTS:
            break
        pieces = [part for piece in pieces for part in _blocks(piece, separator)]
    key = seed.to_bytes(8, "little")
    draw = {piece: hashlib.blake2b(piece.encode(), key=key, digest_size=8).digest() for piece in set(pieces)}
    border = int(share * 2**64).to_bytes(9, "big")[1:]
    held = {piece for piece in draw if draw[piece] < border} or {min(draw, key=draw.__getitem__)}
    return [p for p in pieces if p not in held], [p for p in pieces if p in held]


def _blocks(text: str, separator: str) -> list[str]:
    """A text cut at separators into at most 200 blocks of about one length."""
    parts = text.split(separator)
    wanted = max(1, len(text) // 200)
    blocks, current = [], ""
    for part in parts:
        current = f"{current}{separator}{part}" if current else part
        if len(current) >= wanted:
            blocks.append(current)
            current = ""
    return [block for block in (*blocks, current) if block.strip()]


def pack(windows: Windows, length: int) -> Rows:
    """Windows of at most `length` ids in as few rows as best fit, longest first, finds."""
    order = sorted(range(len(windows.ids)), key=lambda i: -len(windows.ids[i]))
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free places, row), ascending
    for i in order:
        size = len(windows.ids[i])
        at = bisect.bisect_left(room, (size, -1))
        free, row = room.pop(at) if at < len(room) else (length, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(i)
        if free - size >= MIN_WINDOW:
            bisect.insort(room, (free - size, row))
    ids_RT = np.zeros((len(rows), length), np.int32)
    segment_RT = np.full((len(rows), length), PAD, np.int32)
    for row, members in enumerate(rows):
        start = 0
        for number, i in enumerate(members):
            stop = start + len(windows.ids[i])
            ids_RT[row, start:stop], segment_RT[row, start:stop] = windows.ids[i], number
            start = stop
    return Rows(ids_RT, segment_RT)


def training_rows(documents: Sequence[str], tokenizer: TextTokenizer, length: int, batch: int) -> Rows:
    """The training text, packed.

    Raises:
        RequestError: it does not fill one batch.
    """
    rows = pack(cut_windows(documents, tokenizer, length), length)
    if len(rows) < batch:
        raise RequestError(
            "The text is shorter than one batch.",
            found=f"{rows.tokens:,} training tokens: {len(rows)} sequences of {length}",
            expected=f"at least {batch} sequences (--batch)",
            todo="give more text, or a smaller --batch or --length",
        )
    return rows


def make_batch(rows: Rows, which: npt.NDArray[np.int64] | slice, device: str = "cpu") -> Batch:
    """Rows as tensors."""
    import torch

    ids_BT, segment_BT = rows.ids_RT[which].astype(np.int64), rows.segment_RT[which]
    follows_BT = np.zeros(segment_BT.shape, bool)
    follows_BT[:, :-1] = (segment_BT[:, 1:] == segment_BT[:, :-1]) & (segment_BT[:, :-1] != PAD)
    target_BT = np.where(follows_BT, np.roll(ids_BT, -1, axis=1), NO_TARGET)
    real_N = np.flatnonzero(segment_BT != PAD)
    return Batch(
        ids_BT=torch.from_numpy(ids_BT).to(device),
        segment_BT=torch.from_numpy(segment_BT).to(device),
        real_N=torch.from_numpy(real_N).to(device),
        target_N=torch.from_numpy(target_BT.reshape(-1)[real_N]).to(device),
        whole=bool((segment_BT == 0).all()),
    )


def row_order(count: int, batch: int, step: int, seed: int) -> npt.NDArray[np.int64]:
    """Which rows step `step` (from 0) sees: a fresh shuffle every epoch, a function of its arguments alone."""
    wanted = np.arange(step * batch, (step + 1) * batch)
    epochs = wanted // count
    chosen = [
        np.random.default_rng([seed, int(epoch)]).permutation(count)[wanted[epochs == epoch] % count]
        for epoch in np.unique(epochs)
    ]
    return np.concatenate(chosen).astype(np.int64)


def batches(rows: Rows, batch: int, device: str = "cpu") -> Iterator[Batch]:
    """All rows in their order, for measuring."""
    for start in range(0, len(rows), batch):
        yield make_batch(rows, slice(start, start + batch), device)
