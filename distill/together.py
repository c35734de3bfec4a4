"""What the distil stage does otherwise where several processes share it: begin on the first, spread, write once.

The first process opens the teacher whole, cuts the student, and hands both out (`distill.sharded`). From there on all
of them run each pass; figures are sums over them, and the first alone writes files.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from distill.cross_teacher import CrossTeacher
from distill.data import Batch
from distill.losses import Comparison
from distill.parallel import World
from distill.sharded import SharedTeacher, compare_shared, shard, whole
from distill.sharded_state import save_shards
from distill.state import BEST, STATE, StateFolder
from distill.teacher import LiveTeacher, open_teacher
from nano.shapes import ModelShape

QUANTIZED = ("int8", "nf4")


class SharedState(StateFolder):
    """The state of a run of several processes, in a folder that all of them see."""

    def __init__(self, folder: Path, world: World) -> None:
        super().__init__(folder)
        self.world = world

    def hold(self) -> None:
        """See `StateFolder.hold`."""
        if self.world.first:
            super().hold()

    def start(self) -> None:
        """See `StateFolder.start`."""
        if self.world.first:
            super().start()

    def drop(self) -> None:
        """See `StateFolder.drop`."""
        if self.world.first:
            super().drop()

    def save(
        self,
        step: int,
        parameters: Mapping[str, torch.nn.Parameter],
        optimizer: torch.optim.Optimizer,
        facts: Mapping[str, Any],
    ) -> None:
        """See `StateFolder.save`; every process calls it."""
        save_shards(self.folder, step, parameters, optimizer, facts, self.world)
        if self.world.first:
            (self.folder / STATE).unlink(missing_ok=True)

    def save_best(self, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        """See `StateFolder.save_best`; every process calls it."""
        gathered = {}
        for name, parameter in parameters.items():
            tensor = whole(parameter.detach())
            if self.world.first:
                gathered[name] = tensor.cpu()
        if self.world.first:
            self._write(BEST, gathered, {}, "the best weights so far could not be kept")
        self.world.wait()

    def cut_metrics(self, size: int) -> None:
        """See `StateFolder.cut_metrics`."""
        if self.world.first:
            super().cut_metrics(size)

    def note(self, record: Mapping[str, Any]) -> None:
        """See `StateFolder.note`."""
        if self.world.first:
            super().note(record)


def spread_teacher(
    teacher: LiveTeacher | None, folder: Path, shape: ModelShape, precision: str, world: World, device: str
) -> LiveTeacher | SharedTeacher:
    """The first process's teacher for all: sharded, or, in 4 or 8 bits, whole on each.

    Args:
        teacher: on the first process.
        folder, shape, precision: what it was opened from.
        world: the processes.
        device: where it is to lie.
    """
    if precision in QUANTIZED:
        return teacher or open_teacher(folder, shape, precision, device)
    return SharedTeacher(shard(teacher.model if teacher else None, shape, world, device))


def compared(
    teacher: LiveTeacher | CrossTeacher | SharedTeacher, pupil: Any, batches: list[Batch], world: World
) -> Comparison:
    """How a student compares with its teacher on held-out text, on one process or on several."""
    if pupil.body is not None:
        assert not isinstance(teacher, CrossTeacher)  # refused before
        return compare_shared(teacher, pupil.body, batches, world, pupil.vocab)
    assert not isinstance(teacher, SharedTeacher)
    return teacher.compare(pupil.model, pupil.shape, batches, pupil.vocab)
