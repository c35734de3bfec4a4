"""A training run's state on disk, so that nothing done is lost: whole or not there, and exact to the bit.

`OUT.checkpoint/` lies beside the output: `state.safetensors` (weights, both AdamW moments, and in its header the
step and what the run is) is written under another name, flushed and renamed, so a kill at any moment leaves the
previous one; `metrics.jsonl` is cut back to the step that is resumed.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from nano.errors import BadFileError, NoSpaceError
from nano.folder import is_no_space

if TYPE_CHECKING:
    import torch

STATE, METRICS = "state.safetensors", "metrics.jsonl"


def checkpoint_folder(out: Path) -> Path:
    """Where the state of the run that makes `out` lies."""
    return out.absolute().with_name(out.absolute().name + ".checkpoint")


@dataclass(frozen=True)
class Saved:
    """What a state's header says.

    Attributes:
        step: optimizer steps done.
        facts: plain data that the run wrote with it.
    """

    step: int
    facts: Mapping[str, Any]


class StateFolder:
    """The state of one run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def exists(self) -> bool:
        """Whether there is a state to resume."""
        return (self.folder / STATE).is_file()

    def start(self) -> None:
        """Begin anew: drop what lies there."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)

    def drop(self) -> None:
        """The run is over; nothing is left of it."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def header(self) -> Saved:
        """Read the header only.

        Raises:
            BadFileError: the state is broken.
        """
        from safetensors import SafetensorError, safe_open

        path = self.folder / STATE
        try:
            with safe_open(path, framework="pt") as file:
                written = json.loads((file.metadata() or {})["nanokit"])
            return Saved(int(written["step"]), written["facts"])
        except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
            raise BadFileError(
                "The checkpoint cannot be read.", found=f"{path}: {error}", todo="start over with --force"
            ) from None

    def save(
        self,
        step: int,
        parameters: Mapping[str, torch.nn.Parameter],
        optimizer: torch.optim.Optimizer,
        facts: Mapping[str, Any],
    ) -> None:
        """Write the state after `step` steps in place of the one before.

        Args:
            step: optimizer steps done.
            parameters: everything that is trained, by name.
            optimizer: holds their moments.
            facts: plain data to keep with it.

        Raises:
            NoSpaceError: the disk is full; the state before is still there.
        """
        from safetensors.torch import save_file

        tensors = {}
        for name, parameter in parameters.items():
            tensors[f"weight.{name}"] = parameter.detach()
            for moment in ("exp_avg", "exp_avg_sq"):
                if parameter in optimizer.state:
                    tensors[f"{moment}.{name}"] = optimizer.state[parameter][moment]
        beside = self.folder / (STATE + ".partial")
        try:
            save_file(tensors, beside, metadata={"nanokit": json.dumps({"step": step, "facts": facts}, default=str)})
            with beside.open("rb+") as file:
                os.fsync(file.fileno())
            beside.replace(self.folder / STATE)
        except Exception as error:
            beside.unlink(missing_ok=True)
            if not is_no_space(error):
                raise
            raise self._full(f"the state after step {step} could not be kept", error) from None

    def _full(self, what: str, error: Exception) -> NoSpaceError:
        kept = "free some space, then run the same command with --resume: it goes on from the last state kept"
        return NoSpaceError(
            f"The disk is full: {what}.",
            found=f"{self.folder}: {error}",
            todo=kept if self.exists() else "free some space, or choose another --out",
        )

    def restore(self, parameters: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.AdamW) -> None:
        """Put the saved weights and moments back, bit for bit."""
        import torch
        from safetensors.torch import load_file

        step = self.header().step
        saved = load_file(self.folder / STATE)
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(saved[f"weight.{name}"])
                if f"exp_avg.{name}" in saved:
                    optimizer.state[parameter] = {
                        "step": torch.tensor(float(step), device=parameter.device),
                        "exp_avg": saved[f"exp_avg.{name}"].to(parameter.device),
                        "exp_avg_sq": saved[f"exp_avg_sq.{name}"].to(parameter.device),
                    }

    def metrics_bytes(self) -> int:
        """How long metrics.jsonl is."""
        path = self.folder / METRICS
        return path.stat().st_size if path.exists() else 0

    def cut_metrics(self, size: int) -> None:
        """Drop what was noted after the state was saved."""
        if self.metrics_bytes() > size:
            os.truncate(self.folder / METRICS, size)

    def note(self, record: Mapping[str, Any]) -> None:
        """One more line of metrics.jsonl."""
        try:
            with (self.folder / METRICS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            if not is_no_space(error):
                raise
            raise self._full("what a step measured could not be noted", error) from None


class Interruption:
    """Whether the user asked to stop; looked at between steps, where the state is whole."""

    requested = False


@contextlib.contextmanager
def catch_interrupt() -> Iterator[Interruption]:
    """Ctrl-C (or SIGTERM) waits for the step under way; a second one does not wait."""
    stop = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # signals only ever reach the main thread
        return

    def handler(_number: int, _frame: FrameType | None) -> None:
        if stop.requested:
            raise KeyboardInterrupt
        stop.requested = True

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, old in before.items():
            signal.signal(number, old)
