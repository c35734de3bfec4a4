"""model.onnx.data: weights laid out first, then streamed from the checkpoint slab by slab.

The layout needs only the checkpoint's headers, so the graph is built and checked before a byte is copied, and no
tensor is ever whole in memory. A tensor of a page or more starts at a page's border, so that a runtime can map it:
https://github.com/onnx/onnx/blob/main/docs/ExternalData.md ("offset ... multiples of 4096 ... enable mmap support").

The packed words of compressed-tensors hold eight codes + 8, the first in the lowest bits; read as little-endian
bytes they are the nibbles of MatMulNBits and GatherBlockQuantized as they stand, so codes are copied, not repacked.

Legend: N output channels, K input channels, G = K / group size groups, B bytes of a group's codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from export.onnx_files import DATA
from nano.errors import require_module
from nano.progress import Track, track
from quantize.packed import Int4Checkpoint, pack_codes

PAGE = 4096
SMALL = 64
"""Alignment of tensors below a page: a cache line."""
SLAB = 8 << 20
"""Bytes copied at a time."""

Pieces = Callable[[], Iterator[npt.NDArray[Any]]]


@dataclass(frozen=True)
class Region:
    """One tensor's place in the data file.

    Attributes:
        name: of the initializer it was laid out for.
        offset, length: in bytes.
        pieces: gives its contents in order.
    """

    name: str
    offset: int
    length: int
    pieces: Pieces


class DataFile:
    """The layout of a data file that grows as initializers are asked for, and its writer."""

    def __init__(self) -> None:
        self._ir = require_module("onnx_ir", "onnx")
        self.regions: dict[str, Region] = {}
        self.size = 0

    def place(self, name: str, length: int, pieces: Pieces) -> None:
        """Give a tensor its place after what has been placed so far."""
        alignment = PAGE if length >= PAGE else SMALL
        offset = -(-self.size // alignment) * alignment
        self.regions[name] = Region(name, offset, length, pieces)
        self.size = offset + length

    def value(self, name: str, dtype: str, shape: tuple[int, ...], region: str | None = None) -> Any:
        """An `onnx_ir.Value` whose contents are a region of this file.

        Args:
            name: of the initializer.
            dtype: as `onnx_ir.DataType` names it.
            shape: dimensions.
            region: name of the region, where another initializer's is shared.
        """
        ir = self._ir
        place = self.regions[region or name]
        tensor = ir.ExternalTensor(
            DATA, place.offset, place.length, ir.DataType[dtype], shape=ir.Shape(shape), name=name
        )
        value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        assert place.length == tensor.size * tensor.dtype.itemsize, name
        return value

    def write(self, folder: Path) -> None:
        """Stream every region into `folder`/model.onnx.data; progress counts MiB."""
        total = sum(region.length for region in self.regions.values())
        with (
            track("write model.onnx.data", -(-total >> 20) or 1, "MiB") as progress,
            (folder / DATA).open("wb") as file,
        ):
            for region in self.regions.values():
                file.write(bytes(region.offset - file.tell()))
                _stream(file, region, progress)


def _stream(file: Any, region: Region, progress: Track) -> None:
    before = file.tell() >> 20
    for piece in region.pieces():
        file.write(np.ascontiguousarray(piece))
        after = file.tell() >> 20
        progress.advance(after - before)
        before = after
    assert file.tell() == region.offset + region.length, region.name


def packed_codes(checkpoint: Int4Checkpoint, module: str) -> Pieces:
    """Codes of a module as MatMulNBits wants them: uint8 (N, G, B), code + 2^(bits-1), low nibble first."""

    def pieces() -> Iterator[npt.NDArray[Any]]:
        grid = checkpoint.layout(module)
        step = max(1, SLAB // grid.columns)
        for start in range(0, grid.rows, step):
            yield checkpoint.words(module, start, min(start + step, grid.rows)).contiguous().view(torch.uint8).numpy()

    return pieces


def scales(checkpoint: Int4Checkpoint, module: str, groups: int) -> Pieces:
    """Scales of a module, float32 (N, G), each repeated where the operator's blocks are smaller than the groups."""

    def pieces() -> Iterator[npt.NDArray[Any]]:
        scale_NG = checkpoint.scales(module)
        yield scale_NG.repeat_interleave(groups // scale_NG.shape[1], 1).numpy()

    return pieces


def zero_points(checkpoint: Int4Checkpoint, module: str, groups: int) -> Pieces:
    """Zero points of a module as MatMulNBits wants them: uint8, code + 2^(bits-1), for 4 bits two a byte, low first."""

    def pieces() -> Iterator[npt.NDArray[Any]]:
        zero_NG, bits = checkpoint.zeros(module), checkpoint.layout(module).bits
        assert zero_NG is not None, module
        zero_NG = zero_NG.repeat_interleave(groups // zero_NG.shape[1], 1)
        yield pack_codes(zero_NG, bits).view(torch.uint8)[:, : zero_bytes(groups, bits)].numpy()

    return pieces


def zero_bytes(groups: int, bits: int) -> int:
    """Bytes of one row's zero points."""
    return -(-groups * bits // 8)


def floats(checkpoint: Int4Checkpoint, name: str, offset: float = 0.0) -> Pieces:
    """A float tensor of the checkpoint as float32, `offset` added."""
    return _slabs(checkpoint, name, lambda rows: rows.float() + offset if offset else rows.float())


def _slabs(checkpoint: Int4Checkpoint, name: str, convert: Callable[[torch.Tensor], torch.Tensor]) -> Pieces:
    def pieces() -> Iterator[npt.NDArray[Any]]:
        size = checkpoint.store.size(name)
        row_bytes = 4 * (size[1] if len(size) > 1 else 1)
        step = max(1, SLAB // row_bytes)
        for start in range(0, size[0], step):
            yield convert(checkpoint.store.rows(name, start, min(start + step, size[0]))).numpy()

    return pieces
