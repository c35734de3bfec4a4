"""The bundle: a folder with a model file, the tokenizer and manifest.json, as a phone app takes it.

Also the proof that an export changed nothing: codes and scales are read back out of the written file and
compared with the int4 checkpoint's, bit for bit.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from nano.errors import WorkError
from nano.progress import track
from quantize.grid import QuantizedTensor
from quantize.packed import Int4Checkpoint, unpack_codes

Format = Literal["executorch", "onnx"]
SLAB = 1 << 22
"""Codes compared at a time."""
FORMATS: tuple[Format, ...] = ("executorch", "onnx")

_READERS = {"executorch": "export.executorch_readback:read_codes", "onnx": "export.onnx_readback:read_codes"}
_WRITERS = {"executorch": "export.executorch:write_pte", "onnx": "export.onnx:write_onnx"}


def _door(target: str) -> Any:
    module, function = target.split(":")
    return getattr(importlib.import_module(module), function)


def writer(format: Format) -> Callable[..., dict[str, Any]]:
    """The function that writes one format; imported when it is needed, so that one extra can be missing."""
    write: Callable[..., dict[str, Any]] = _door(_WRITERS[format])
    return write


def read_codes(folder: Path, format: Format) -> Iterator[tuple[str, QuantizedTensor]]:
    """Modules on the grid as they stand in a bundle's model file: (name, codes and scales)."""
    found: Iterable[tuple[str, QuantizedTensor]] = _door(_READERS[format])(folder)
    return iter(found)


@dataclass(frozen=True)
class Exactness:
    """What reading an artifact back showed.

    Attributes:
        modules: how many were compared.
        codes: how many codes were compared.
        differing: names of modules whose codes or scales differ from the checkpoint's, or that are missing or too
            many; in the model's order.
        first: how the first of them differs, in plain words.
    """

    modules: int
    codes: int
    differing: tuple[str, ...]
    first: str = ""


def compare_codes(folder: Path, format: Format, checkpoint: Int4Checkpoint) -> Exactness:
    """Compare every code and scale in a bundle with the int4 checkpoint it came from."""
    wanted = checkpoint.modules
    codes, differences, seen = 0, {}, set()
    with track("read back", len(wanted), "modules") as progress:
        for name, found in read_codes(folder, format):
            seen.add(name)
            codes += found.codes_NK.numel()
            difference = _difference(found, checkpoint, name) if name in checkpoint else "not a module of it"
            if difference:
                differences[name] = difference
            progress.advance()
    differences |= {name: "missing" for name in wanted if name not in seen}
    differing = sorted(differences, key=lambda name: wanted.index(name) if name in checkpoint else len(wanted))
    return Exactness(len(seen), codes, tuple(differing), differences[differing[0]] if differing else "")


def _difference(found: QuantizedTensor, checkpoint: Int4Checkpoint, name: str) -> str:
    """How a module differs, empty where it does not; an artifact may repeat a scale over smaller groups."""
    grid = checkpoint.layout(name)
    repeat, rest = divmod(grid.group_size, found.group_size)
    if rest or found.bits != grid.bits or (found.zero_NG is None) != grid.symmetric:
        return f"{found.bits} bits in groups of {found.group_size}, not {grid.bits} in {grid.group_size}"
    if found.codes_NK.shape != (grid.rows, grid.columns):
        return f"codes of shape {tuple(found.codes_NK.shape)}, not {(grid.rows, grid.columns)}"
    zero_NG, step, changed = checkpoint.zeros(name), max(1, SLAB // grid.columns), 0
    for start in range(0, grid.rows, step):
        stop = min(start + step, grid.rows)
        wanted = unpack_codes(checkpoint.words(name, start, stop), grid.columns, grid.bits)
        changed += 0 if torch.equal(found.codes_NK[start:stop], wanted) else int((found.codes_NK[start:stop] != wanted).sum())  # noqa: E501  # fmt: skip
    differences = [f"{changed:,} of {found.codes_NK.numel():,} codes"] if changed else []
    pairs = [("scales", found.scale_NG, checkpoint.scales(name))]
    if found.zero_NG is not None and zero_NG is not None:
        pairs.append(("zero points", found.zero_NG, zero_NG))
    for part, ours, theirs in pairs:
        unlike = int((ours != theirs.repeat_interleave(repeat, 1)).sum())
        differences += [f"{unlike:,} of {ours.numel():,} {part}"] if unlike else []
    return ", ".join(differences)


def require_exact(exactness: Exactness) -> None:
    """Raise WorkError when an export changed a code or a scale: an exporter's bug must never ship."""
    if exactness.differing:
        raise WorkError(
            "The written artifact does not hold the checkpoint's codes and scales.",
            found=f"{len(exactness.differing)} modules differ, the first is '{exactness.differing[0]}'",
            todo="report this; the artifact was not kept",
        )
