"""A run's curves: as TensorBoard events while it goes, as a picture when it is over."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill.options import measure_of
from nano.errors import NoSpaceError, require_module
from nano.figure import blank_figure
from nano.folder import is_no_space

CURVES = "curves.png"


class Events:
    """TensorBoard's own writer over a folder; without a folder it writes nothing.

    Args:
        folder: where the events go.
        start: step that the run goes on from; what an interrupted run wrote after it is no longer shown.
    """

    def __init__(self, folder: Path | None, start: int) -> None:
        self._writer: Any = None
        if folder is None:
            return
        module = require_module("tensorboard.summary.writer.event_file_writer", "tensorboard")
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        self._writer = module.EventFileWriter(str(folder))
        session = SessionLog(status=SessionLog.START)
        self._writer.add_event(Event(wall_time=time.time(), step=start + 1, session_log=session))

    def add(self, record: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl."""
        if self._writer is None:
            return
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in flat(record).items()]
        self._writer.add_event(Event(wall_time=time.time(), step=record["step"], summary=Summary(value=values)))

    def close(self) -> None:
        """Flush what waits.

        Raises:
            NoSpaceError: the disk is full.
        """
        if self._writer is None:
            return
        try:
            self._writer.close()
        except OSError as error:
            if not is_no_space(error):
                raise
            raise NoSpaceError(
                "The disk is full: TensorBoard's events could not be written.", found=str(error)
            ) from None


def flat(record: Mapping[str, Any]) -> dict[str, float]:
    """A record's figures by name; those on held-out text as held_out/NAME."""
    found: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            found.update({f"{key}/{name}": float(figure) for name, figure in value.items()})
        elif key != "step":
            found[key] = float(value)
    return found


def draw_curves(metrics: Path, out: Path) -> None:
    """Loss, divergence, cross-entropy, gradient norm and learning rate by step, as a PNG."""
    records = [(r["step"], flat(r)) for r in map(json.loads, metrics.read_text(encoding="utf-8").splitlines())]
    figure = blank_figure((11, 6), 110)
    measure = measure_of(records[0][1])
    names = ("loss", measure, "ce", "gradient_norm", "learning_rate")
    titles = ("loss", "divergence from the teacher", "cross-entropy", "gradient norm", "learning rate")
    for axis, name, title in zip(figure.subplots(2, 3).flat, names, titles, strict=False):
        axis.plot([step for step, _ in records], [r[name] for _, r in records], lw=1, label="training")
        held = {measure: f"held_out/{measure}", "ce": "held_out/cross_entropy"}.get(name, "")
        points = [(step, r[held]) for step, r in records if held in r]
        if points:
            axis.plot(*zip(*points, strict=True), "o-", ms=3, label="held out")
            axis.legend()
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
    figure.axes[-1].set_axis_off()
    figure.savefig(out, metadata={"Software": None})
