"""How a quantized module lies on its grid, told from a checkpoint's headers without reading its codes.

Legend: N output channels, K input channels, G = K / group size groups.
"""

from __future__ import annotations

from dataclasses import dataclass

from quantize.packed import PACKED, SCALE, SHAPE, Int4Checkpoint


@dataclass(frozen=True)
class Grid:
    """How a module lies on the grid, from the checkpoint's headers alone.

    Attributes:
        rows, columns: N and K.
        group_size: input channels that share a scale.
        bits: 4 or 8.
    """

    rows: int
    columns: int
    group_size: int
    bits: int

    @property
    def groups(self) -> int:
        """G."""
        return self.columns // self.group_size

    @property
    def code_bytes(self) -> int:
        """Bytes of all codes."""
        return self.rows * self.columns * self.bits // 8


def grid_of(checkpoint: Int4Checkpoint, module: str) -> Grid:
    """The grid of a quantized module, without reading its codes."""
    rows, columns = (int(v) for v in checkpoint.store.tensor(module + SHAPE))
    words = checkpoint.store.size(module + PACKED)[1]
    groups = checkpoint.store.size(module + SCALE)[1]
    return Grid(rows, columns, columns // groups, words * 32 // columns)
