"""How a quantized module is written for a runtime, told from a checkpoint's headers without reading its codes.

Legend: N output channels, K input channels, G = K / group size groups.
"""

from __future__ import annotations

import dataclasses

from nano.errors import UnsupportedError
from quantize.packed import Int4Checkpoint, Layout
from quantize.runtimes import TAKES, onnx_block, role_of, takes


def check_grid(checkpoint: Int4Checkpoint, module: str, runtime: str) -> Layout:
    """The layout of a module, if the runtime has a kernel for it: by the table that quantize asked too.

    Raises:
        UnsupportedError: it has none.
    """
    grid = checkpoint.layout(module)
    role = role_of(module, checkpoint.shape)
    if not takes(runtime, grid.columns, grid.bits, grid.group_size, grid.symmetric, role):
        kind = "symmetric" if grid.symmetric else "asymmetric (with zero points)"
        raise UnsupportedError(
            f"The kernels of {runtime} cannot take this grid.",
            found=f"'{module}': {grid.bits} bits, {kind}, groups of {grid.group_size} on {grid.columns} columns",
            expected=TAKES[runtime],
            todo=f"quantize again with --runtime {runtime}, which refuses such grids at once",
        )
    return grid


def onnx_layout(checkpoint: Int4Checkpoint, module: str) -> Layout:
    """A module's layout as ONNX Runtime's operators take it: a row with one scale becomes blocks with equal ones."""
    grid = checkpoint.layout(module)
    block = onnx_block(grid.columns, grid.group_size)
    assert block is not None, module  # check_grid has refused it
    return dataclasses.replace(grid, group_size=block)
