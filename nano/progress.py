"""Progress and messages for people, always on stderr: stdout belongs to results and `--json`.

On a terminal a live bar shows rate and time left; in a log (CI, a pipe) a plain line is printed at most
every few seconds, so that nothing floods and nothing is silent.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.progress import Progress, TaskID

LOG_EVERY_SECONDS = 10.0


def speaks() -> bool:
    """Whether this process has anything to say: of several that torchrun started, the first alone."""
    return "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("RANK", "0") == "0"


def console() -> Console:
    """The console that people read: stderr, as wide as the terminal, 80 columns in a log."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else 100)


def say(message: str) -> None:
    """One line for people."""
    if speaks():
        console().print(message, markup=False, soft_wrap=True)


def warn(message: str) -> None:
    """One line of warning for people; it names the knob to turn."""
    if speaks():
        console().print(f"warning: {message}", style="yellow", markup=False, soft_wrap=True)


def show(renderable: RenderableType, *, json_mode: bool = False) -> None:
    """A table for people: on stdout, or on stderr where stdout carries JSON."""
    if not speaks():
        return
    from rich.console import Console

    out = sys.stderr if json_mode else sys.stdout
    _never_failing(out)
    Console(file=out, highlight=False, width=None if out.isatty() else 100).print(renderable)


def put(text: str) -> None:
    """A result that is text, on stdout, as it is."""
    _never_failing(sys.stdout)
    print(text)


def _never_failing(stream: TextIO) -> None:
    """Where a stream's encoding lacks a character "?" stands for it, rather than an error after the work is done."""
    if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
        stream.reconfigure(errors="replace")


def emit_json(data: Mapping[str, Any]) -> None:
    """The one JSON object of `--json`, on stdout."""
    if speaks():
        print(json.dumps(data, indent=2, default=str), flush=True)


class Track:
    """A task under way; call `advance` as units finish. `note` shows the latest figure beside the bar."""

    def __init__(self, title: str, total: int, unit: str, bar: Progress | None, task: TaskID | None) -> None:
        self.title, self.total, self.unit = title, total, unit
        self.done = 0
        self._bar, self._task = bar, task
        self._start = self._last = time.monotonic()

    def advance(self, units: int = 1, note: str = "") -> None:
        """`units` more are done."""
        self.done += units
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, advance=units, note=note, rate=self._rate())
            return
        now = time.monotonic()
        if now - self._last >= LOG_EVERY_SECONDS or self.done == self.total:
            self._last = now
            pace = ""
            if self.done:
                left = (self.total - self.done) / self.done * (now - self._start)
                pace = f", {self._rate()}, {left:.0f} s left"
            say(f"{self.title}: {self.done}/{self.total} {self.unit}{pace}  {note}".rstrip())

    def _rate(self) -> str:
        if not self.done:
            return ""
        per_second = self.done / max(time.monotonic() - self._start, 1e-9)
        return f"{per_second:.3g} {self.unit}/s" if per_second >= 1 else f"{1 / max(per_second, 1e-9):.3g} s each"


@contextlib.contextmanager
def track(title: str, total: int, unit: str) -> Iterator[Track]:
    """Show a task's progress while the block runs.

    Args:
        title: what is being done, for instance "quantize".
        total: how many units there are.
        unit: what a unit is, for instance "layers".
    """
    if not sys.stderr.isatty() or not speaks():
        yield Track(title, total, unit, None, None)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console()) as bar:
        yield Track(title, total, unit, bar, bar.add_task(title, total=total, note="", rate=""))
