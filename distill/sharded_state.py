"""A training state that several processes write together: each its shards, in torch.distributed.checkpoint's form.

Beside the output, in `OUT.checkpoint/`: a folder of shards for each step kept, and `shards.json` that names the one
that is whole (written last, renamed into place) with the step and what the run is. What was written by some number
of processes is read by any number, one included: the form knows which piece of a tensor lies where. All
processes have to see the same folder.

Its index is a pickle of torch's; a state is read by the run that goes on with it and is never shipped.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nano.errors import BadFileError, NoSpaceError
from nano.folder import is_no_space, write_text_atomically

if TYPE_CHECKING:
    import torch

    from distill.parallel import World

SHARDS = "shards.json"


def save_shards(
    folder: Path,
    step: int,
    parameters: Mapping[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    facts: Mapping[str, Any],
    world: World,
) -> None:
    """Write the state after `step` steps, then drop the one before; every process calls it.

    Args:
        folder: of the state.
        step: optimizer steps done.
        parameters: everything that is trained, by name.
        optimizer: holds their moments.
        facts: plain data to keep with it; the first process's count.
        world: the processes.

    Raises:
        NoSpaceError: the disk is full for one of them; the state before is still there.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    into = folder / f"shards-{step}"
    tensors: dict[str, Any] = {}
    moments = set()
    for name, parameter in parameters.items():
        tensors[f"weight.{name}"] = parameter.detach()
        for moment, value in optimizer.state.get(parameter, {}).items():
            if moment != "step":
                tensors[f"{moment}.{name}"] = value
                moments.add(moment)
    if world.first:
        shutil.rmtree(into, ignore_errors=True)  # of a run that was killed while it wrote
    world.wait()
    try:
        save(tensors, storage_writer=FileSystemWriter(into, sync_files=True))
    except CheckpointException as error:
        if world.first:
            shutil.rmtree(into, ignore_errors=True)
        cause = next((e for e, _trace in error.failures.values() if is_no_space(e)), None)
        if cause is None:  # the exception is no Exception, so that it would pass every handler
            raise next(iter(error.failures.values()))[0] from None
        raise NoSpaceError(
            f"The disk is full: the state after step {step} could not be kept.",
            found=f"{folder}: {cause}",
            todo="free some space, then run the same command with --resume: it goes on from the last state kept",
        ) from None
    if world.first:
        header = {"step": step, "facts": facts, "folder": into.name, "moments": sorted(moments)}
        write_text_atomically(folder / SHARDS, json.dumps(header, default=str))
        drop_shards(folder, but=into.name)
    world.wait()


def drop_shards(folder: Path, but: str | None = None) -> None:
    """Remove all sharded states, or all but one."""
    if but is None:
        (folder / SHARDS).unlink(missing_ok=True)
    for old in folder.glob("shards-*"):
        if old.name != but:
            shutil.rmtree(old, ignore_errors=True)


def shards_header(folder: Path) -> dict[str, Any] | None:
    """What `shards.json` says; None where there is none.

    Raises:
        BadFileError: it is broken.
    """
    path = folder / SHARDS
    if not path.is_file():
        return None
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return {**found, "step": int(found["step"]), "folder": str(found["folder"]), "moments": list(found["moments"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadFileError(
            "The checkpoint cannot be read.", found=f"{path}: {error}", todo="start over with --force"
        ) from None


def restore_shards(
    folder: Path, parameters: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer, done: int
) -> None:
    """Put weights and moments back, whatever the number of processes that wrote them and that read them now.

    Args:
        folder: of the state.
        parameters: everything that is trained, by name.
        optimizer: of them, new.
        done: steps that it has taken.

    Raises:
        BadFileError: a file of it is missing or broken, or it is of another model.
    """
    import torch
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    header = shards_header(folder)
    assert header is not None
    into: dict[str, Any] = {f"weight.{name}": parameter.detach() for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        kept = {moment: torch.zeros_like(parameter.detach()) for moment in header["moments"]}
        into.update({f"{moment}.{name}": value for moment, value in kept.items()})
        optimizer.state[parameter] = {"step": torch.tensor(float(done), device=parameter.device), **kept}
    try:
        with warnings.catch_warnings():  # that there is but one process, where there is but one
            warnings.simplefilter("ignore", UserWarning)
            load(into, storage_reader=FileSystemReader(folder / header["folder"]))
    except (CheckpointException, OSError, RuntimeError, ValueError, EOFError) as error:
        raise BadFileError(
            "The checkpoint cannot be read.",
            found=f"{folder / header['folder']}: {str(error).strip().splitlines()[-1]}",
            todo="start over with --force",
        ) from None
