"""A live teacher that reads each row of text once: what it saw is kept on disk for the passes that follow.

A run of several passes over its text asks a frozen teacher the same again. Kept are the hidden states before its
head, E numbers a position in its own precision, so the answers are exactly those of the first pass; its head's
product, as wide as the vocabulary, is worked out anew. (Answers of a few bytes a token for many runs and students
are another thing: `distill.cache`.)

`answers.bin` has a slot for every row and `answers.log` says which are filled, with a checksum each; a line is
written after its rows, so whatever a kill leaves is whole. Rows are computed with those that were new in the same
step, which the order decides, so a resumed run finds the bits of the one that was not interrupted. Read and written
with calls, not mapped: nothing of it counts as this process's memory.

Legend: R rows, T positions of a row, N positions of a batch, E hidden width of the teacher.
"""

from __future__ import annotations

import os
import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from distill.data import Batch, Rows, make_batch
from distill.losses import DenseAnswers
from distill.models import head_weight
from distill.options import DistillOptions
from distill.teacher import LiveTeacher
from nano.errors import NoSpaceError
from nano.folder import is_no_space

ANSWERS, LOG = "answers.bin", "answers.log"
FREE_SHARE = 0.5
"""Of the free disk that may be taken; the rest is for states and the student."""


def remembering(
    teacher: LiveTeacher, rows: Rows, options: DistillOptions, folder: Path, device: str
) -> LiveTeacher | RememberingTeacher:
    """The teacher with a memory, or as it is where no row comes again, or the memory would be too large.

    Args:
        teacher: what runs.
        rows: the run's text.
        options: of the run.
        folder: of the run's state; the memory lies in it and goes with it.
        device: where batches lie.
    """
    size = len(rows) * rows.ids_RT.shape[1] * teacher.shape.hidden_size * teacher.model.dtype.itemsize
    again = options.steps * options.batch * (1 - options.on_policy) > len(rows)
    if teacher.watched or not again or size > options.remember * 1e9:
        return teacher
    if not (folder / LOG).exists() and size > FREE_SHARE * shutil.disk_usage(folder).free:
        return teacher
    return RememberingTeacher(teacher, rows, folder, device)


class RememberingTeacher:
    """See above; a `distill.teacher.Teacher`."""

    def __init__(self, teacher: LiveTeacher, rows: Rows, folder: Path, device: str) -> None:
        self.teacher, self.rows, self.device = teacher, rows, device
        self.folder = folder
        self.slot = rows.ids_RT.shape[1] * teacher.shape.hidden_size * teacher.model.dtype.itemsize
        self.known = _read_log(folder / LOG)

    def answers(self, batch: Batch) -> DenseAnswers:
        """See `Teacher.answers`; a student's own continuations are never seen again and not kept."""
        if batch.rows is None:
            return self.teacher.answers(batch)
        numbers, count_B = batch.rows.tolist(), self._positions(batch)
        found = {
            row: hidden_NE
            for row, count in zip(numbers, count_B, strict=True)
            if (hidden_NE := self._read(row, count)) is not None
        }
        fresh = np.array(sorted({*numbers} - {*found}), np.int64)
        if len(fresh):
            asked = batch if len(fresh) == len(numbers) else make_batch(self.rows, fresh, self.device)
            told = self.teacher.answers(asked)
            if len(fresh) == len(numbers):
                self._keep(numbers, told.hidden_NE.split_with_sizes(count_B))
                return told
            parts = told.hidden_NE.split_with_sizes(self._positions(asked))
            self._keep(fresh.tolist(), parts)
            found.update(zip(fresh.tolist(), parts, strict=True))
        return DenseAnswers(torch.cat([found[row] for row in numbers]), head_weight(self.teacher.model))

    def _positions(self, batch: Batch) -> list[int]:
        """How many positions of each row carry a loss."""
        rows, length = batch.ids_BT.shape
        return torch.bincount(batch.real_N // length, minlength=rows).tolist()

    def _read(self, row: int, count: int) -> torch.Tensor | None:
        """What is kept of a row, (count, E); None where nothing is, or it is broken."""
        if row not in self.known:
            return None
        width, dtype = self.teacher.shape.hidden_size, self.teacher.model.dtype
        raw = bytearray(count * width * dtype.itemsize)
        with (self.folder / ANSWERS).open("rb", buffering=0) as file:
            file.seek(row * self.slot)
            if file.readinto(raw) != len(raw) or zlib.crc32(raw) != self.known[row]:
                return None
        return torch.from_numpy(np.frombuffer(raw, np.uint8)).view(dtype).view(count, width).to(self.device)

    def _keep(self, numbers: Sequence[int], parts: Sequence[torch.Tensor]) -> None:
        """Write rows, then the line that says so."""
        if parts[0].dtype != self.teacher.model.dtype:
            return
        new: dict[int, int] = {}
        try:
            file = os.open(self.folder / ANSWERS, os.O_WRONLY | os.O_CREAT, 0o644)
            with open(file, "wb", buffering=0) as stream:
                for row, part in zip(numbers, parts, strict=True):
                    raw = part.contiguous().cpu().view(torch.uint8).numpy().tobytes()
                    stream.seek(row * self.slot)
                    if stream.write(raw) != len(raw):
                        raise OSError(28, "No space left on device")
                    new[row] = zlib.crc32(raw)
            with (self.folder / LOG).open("ab", buffering=0) as log:
                log.write(_line(new))
        except OSError as error:
            if not is_no_space(error):
                raise
            raise NoSpaceError(
                "The disk is full: what the teacher answered could not be kept.", found=f"{self.folder}: {error}",
                todo="free some space, then run the same command with --resume, or start over with --remember 0",
            ) from None  # fmt: skip
        self.known.update(new)


def _line(new: dict[int, int]) -> bytes:
    """Row:checksum pairs and a checksum of them all."""
    body = " ".join(f"{row}:{crc}" for row, crc in new.items())
    return f"{body} {zlib.crc32(body.encode())}\n".encode()


def _read_log(path: Path) -> dict[int, int]:
    """Checksums by row; what a kill left of a last line is cut off."""
    known: dict[int, int] = {}
    whole = 0
    for line in path.read_bytes().splitlines(keepends=True) if path.is_file() else []:
        body, _, crc = line.rpartition(b" ")
        if line[-1:] != b"\n" or crc.strip() != str(zlib.crc32(body)).encode():
            os.truncate(path, whole)
            break
        known.update((int(row), int(value)) for row, _, value in (pair.partition(b":") for pair in body.split()))
        whole += len(line)
    return known
