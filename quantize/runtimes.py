"""Which grids each runtime has a kernel for: asked when quantizing, before any work, and again when exporting.

What was found true (executorch 1.4.1, onnxruntime 1.32):

- ExecuTorch's XNNPACK: int4 linears symmetric, groups of a multiple of 32 with bfloat16 scales (`qb4w`), which a row
  as a whole may be too (its own kernel for that, `qc4w`, is given wrong scales: operators/quant_params.py says so);
  int8 linears with one float32 scale a row (`qc8w`). Zero points of weights are dropped
  *without an error*, 12% off in the output. Every decoder linear must be on a grid.
- ONNX Runtime's MatMulNBits: 4 and 8 bits, blocks of 16 to 256, each block with a zero point if wanted. One scale a
  row is written as equal scales for every block of it.
- An embedding is looked up by other operators, whose tables are kept symmetric here (see `quantize.packed`).
- torch dequantises, so takes all that the int4 folder can hold.

Legend: K input channels.
"""

from __future__ import annotations

from typing import Literal

from device_profiles.footprint import row_block
from nano.errors import RequestError
from nano.families import EMBEDDING, linear_names, weight_shapes
from nano.shapes import ModelShape

Runtime = Literal["any", "executorch", "onnx", "torch"]
PHONES = ("executorch", "onnx")
XNNPACK_MULTIPLE = 32
"""XNNPACK's blockwise kernel takes groups of a multiple of 32 (backends/xnnpack/operators/node_visitor.py)."""
ONNX_BLOCKS = (16, 32, 64, 128, 256)
"""Block sizes that MLAS has kernels for (onnxruntime/core/mlas/lib/qnbitgemm.cpp, GetQNBitGemmVariant)."""

TAKES = {
    "executorch": "4 bits symmetric in groups of a multiple of 32 (or by channel where 32 divides the width), "
    "8 bits symmetric by channel, every decoder linear on a grid",
    "onnx": "4 or 8 bits, symmetric or (linears only) asymmetric, groups of 16, 32, 64, 128 or 256 that divide the "
    "width, or by channel where 16 divides it",
    "torch": "4 or 8 bits, any group that divides the width; embeddings symmetric",
}
"""Each runtime's grids in words, for messages."""


def onnx_block(columns: int, group_size: int) -> int | None:
    """Block size of MatMulNBits for a grid on K columns, or None where there is none."""
    if group_size in ONNX_BLOCKS and columns % group_size == 0:
        return group_size
    if group_size == columns:
        return row_block(columns)
    return None


def takes(
    runtime: str, columns: int, bits: int, group_size: int, symmetric: bool, role: Literal["linear", "table", "both"]
) -> bool:
    """Whether a runtime has a kernel for a grid.

    Args:
        runtime: "executorch", "onnx" or "torch".
        columns: K of the module.
        bits, group_size, symmetric: its grid.
        role: a "linear", an embedding "table" that is only looked up, or "both": a tied embedding.
    """
    if (role != "linear" and not symmetric) or bits not in (4, 8) or columns % group_size:
        return False
    if runtime == "onnx":
        return onnx_block(columns, group_size) is not None
    if runtime == "executorch":
        by_row = bits == 8 and group_size == columns
        blockwise = bits == 4 and group_size % XNNPACK_MULTIPLE == 0
        return symmetric and (role == "table" or by_row or blockwise)
    return True


def role_of(module: str, shape: ModelShape) -> Literal["linear", "table", "both"]:
    """What a module's weight is used for."""
    if module != EMBEDDING:
        return "linear"
    return "both" if shape.tied else "table"


def check_runtime(shape: ModelShape, grids: dict[str, tuple[int, int, bool]], runtime: Runtime) -> None:
    """Refuse a recipe that the runtime asked for could not run.

    Args:
        shape: the model's dimensions.
        grids: (bits, group size, symmetric) of each module on the grid.
        runtime: "any" means all that `nanokit export` writes for.

    Raises:
        RequestError: names the first module, why, and what the runtime takes.
    """
    sizes = weight_shapes(shape)
    for name in PHONES if runtime == "any" else (runtime,):
        todo = None if runtime != "any" else _advice(name)
        for module, (bits, group_size, symmetric) in grids.items():
            columns = sizes[module + ".weight"][1]
            if not takes(name, columns, bits, group_size, symmetric, role_of(module, shape)):
                kind = "symmetric" if symmetric else "asymmetric"
                found = f"'{module}': {bits} bits, {kind}, groups of {group_size} on {columns} columns"
                raise RequestError(f"{_NAMES[name]} cannot run this recipe.", found=found, expected=TAKES[name], todo=todo)  # noqa: E501  # fmt: skip
        for module in linear_names(shape) if name == "executorch" else ():
            if module not in grids:
                raise RequestError(f"{_NAMES[name]} cannot run this recipe.", found=f"'{module}' stays float", expected=TAKES[name], todo=todo)  # noqa: E501  # fmt: skip


_NAMES = {"executorch": "ExecuTorch (XNNPACK)", "onnx": "ONNX Runtime", "torch": "torch"}


def _advice(refusing: str) -> str:
    other = "onnx" if refusing == "executorch" else "executorch"
    return f"change the recipe, or say --runtime {other} (or torch) where the model is not meant for this one"
