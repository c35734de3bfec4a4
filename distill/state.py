"""A training run's state on disk, so that nothing done is lost: whole or not there, and exact to the bit.

`OUT.checkpoint/` lies beside the output: `state.safetensors` (weights, both AdamW moments, and in its header the
step and what the run is) is written under another name, flushed and renamed, so a kill at any moment leaves the
previous one; `metrics.jsonl` is cut back to the step that is resumed. What several processes wrote together
(`distill.sharded_state`) is read as well.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from distill.sharded_state import SHARDS, drop_shards, restore_shards, shards_header
from nano.errors import BadFileError, NoSpaceError
from nano.folder import empty_folder, hold_folder, is_no_space

if TYPE_CHECKING:
    import torch

    from distill.parallel import World

STATE, BEST, METRICS = "state.safetensors", "best.safetensors", "metrics.jsonl"


def state_folder(folder: Path, world: World) -> StateFolder:
    """The state of a run of one process or of several."""
    if world.size == 1:
        return StateFolder(folder)
    from distill.together import SharedState

    return SharedState(folder, world)


def kept_in_words(states: Sequence[StateFolder]) -> str:
    """What is left of a run that broke off, for people."""
    kept = [state for state in states if state.exists()]
    if not kept:
        return "nothing was kept yet: start again"
    step = min(state.header().step for state in kept)
    return f"the same command with --resume goes on after step {step}, kept in {kept[0].folder}"


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
        self._lock: int | None = None

    def hold(self) -> None:
        """Take the folder for this run until `release`.

        Raises:
            RequestError: another run works on it now.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = hold_folder(self.folder)

    def release(self) -> None:
        """Let the folder go; one that holds no state vanishes."""
        if self._lock is None:
            return
        if not self.exists():
            self.drop()
        os.close(self._lock)
        self._lock = None

    def exists(self) -> bool:
        """Whether there is a state to resume, of one process or of several."""
        return (self.folder / STATE).is_file() or (self.folder / SHARDS).is_file()

    def start(self) -> None:
        """Begin anew: drop what lies there, but not the folder, which may be held."""
        self.folder.mkdir(parents=True, exist_ok=True)
        empty_folder(self.folder)

    def drop(self) -> None:
        """The run is over; nothing is left of it."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def header(self) -> Saved:
        """Read the header only; of two states (a kill came between writing one and dropping the other) the later's.

        Raises:
            BadFileError: the state is broken.
        """
        shards = shards_header(self.folder)
        if not (self.folder / STATE).is_file() and shards:
            return Saved(shards["step"], shards["facts"])
        alone = self._header_alone()
        return Saved(shards["step"], shards["facts"]) if shards and shards["step"] > alone.step else alone

    def _header_alone(self) -> Saved:
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

        tensors = {}
        for name, parameter in parameters.items():
            tensors[f"weight.{name}"] = parameter.detach()
            for moment, value in optimizer.state.get(parameter, {}).items():
                if moment != "step" and value is not None:
                    tensors[f"{moment}.{name}"] = value
        header = {"nanokit": json.dumps({"step": step, "facts": facts}, default=str)}
        self._write(STATE, tensors, header, f"the state after step {step} could not be kept")
        drop_shards(self.folder)

    def save_best(self, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        """Keep a model's weights as the best so far."""
        tensors = {name: parameter.detach() for name, parameter in parameters.items()}
        self._write(BEST, tensors, {}, "the best weights so far could not be kept")

    def restore_best(self, model: Any) -> None:
        """Put the best weights into a model."""
        import torch
        from safetensors.torch import load_file

        from distill.sharded import put

        saved = load_file(self.folder / BEST)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                put(parameter, saved[name])

    def _write(self, name: str, tensors: dict[str, torch.Tensor], header: dict[str, str], failing: str) -> None:
        """A file in place of the one before: written beside, flushed, renamed."""
        from safetensors.torch import save_file

        beside = self.folder / (name + ".partial")
        try:
            save_file(tensors, beside, metadata=header)
            with beside.open("rb+") as file:
                os.fsync(file.fileno())
            beside.replace(self.folder / name)
        except Exception as error:
            beside.unlink(missing_ok=True)
            if not is_no_space(error):
                raise
            raise self._full(failing, error) from None

    def _full(self, what: str, error: Exception) -> NoSpaceError:
        kept = "free some space, then run the same command with --resume: it goes on from the last state kept"
        return NoSpaceError(
            f"The disk is full: {what}.",
            found=f"{self.folder}: {error}",
            todo=kept if self.exists() else "free some space, or choose another --out",
        )

    def restore(
        self, parameters: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer, began: int = 0
    ) -> None:
        """Put the saved weights and moments back, bit for bit.

        Args:
            parameters: everything that is trained, by name.
            optimizer: of them, new.
            began: steps that were done when the optimizer that was saved took its first.
        """
        import torch
        from safetensors.torch import load_file

        from distill.sharded import like, put

        step = self.header().step - began
        if not (self.folder / STATE).is_file() or self._header_alone().step < self.header().step:
            restore_shards(self.folder, parameters, optimizer, step)
            return
        saved = load_file(self.folder / STATE)
        moments = sorted({name.split(".", 1)[0] for name in saved} - {"weight"})
        torchs_own = isinstance(optimizer, torch.optim.AdamW)  # bitsandbytes counts its steps in an int
        with torch.no_grad():
            for name, parameter in parameters.items():
                put(parameter, saved[f"weight.{name}"])
                kept = {m: like(parameter, saved[f"{m}.{name}"]) for m in moments if f"{m}.{name}" in saved}
                if kept:
                    done = torch.tensor(float(step), device=parameter.device) if torchs_own else step
                    optimizer.state[parameter] = {"step": done, **kept}

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
def catch_interrupt(patient: bool = False) -> Iterator[Interruption]:
    """Ctrl-C (or SIGTERM) waits for the step under way; a second one does not wait.

    Args:
        patient: it waits too. torchrun passes on what the terminal has sent to each process already.
    """
    stop = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # signals only ever reach the main thread
        return

    def handler(_number: int, _frame: FrameType | None) -> None:
        if stop.requested and not patient:
            raise KeyboardInterrupt
        stop.requested = True

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, old in before.items():
            signal.signal(number, old)
