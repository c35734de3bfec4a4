"""Codes and scales as they stand in a written ONNX bundle, read without any runtime.

The reading follows the operators' own description (MatMulNBits, GatherBlockQuantized in ONNX Runtime's
contrib_ops), not our writer: bits and block size come from the node, the nibbles from its second input.

Legend: N output channels, K input channels, G groups, B bytes of a group's codes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from export.genai_config import MODEL
from nano.errors import BadFileError, require_module
from quantize.grid import QuantizedTensor

QUANTIZED = ("MatMulNBits", "GatherBlockQuantized")


def load_graph(folder: Path) -> Any:
    """The `onnx_ir.Graph` of a bundle; weights stay in their file.

    Raises:
        BadFileError: missing, or not an ONNX model.
    """
    ir = require_module("onnx_ir", "onnx")
    path = folder / MODEL
    if not path.is_file():
        raise BadFileError("The bundle has no model.", found=f"no {path}", todo="copy the bundle again")
    try:
        return ir.load(path).graph
    except Exception as error:  # protobuf and onnx_ir raise many kinds; all mean the same here
        raise BadFileError("The bundle's model is truncated or not ONNX.", found=f"{path}: {error}") from None


def read_codes(folder: Path) -> Iterator[tuple[str, QuantizedTensor]]:
    """Every quantized module of a bundle, once: (name, codes and scales).

    Raises:
        BadFileError: the bundle is missing, truncated or not ONNX, or two readers of one weight see other values.
    """
    seen: set[tuple[str, int]] = set()
    for node in load_graph(folder):
        if node.op_type not in QUANTIZED or node.domain != "com.microsoft":
            continue
        codes, scales = node.inputs[1 if node.op_type == "MatMulNBits" else 0], node.inputs[2]
        place = (codes.const_value.location, codes.const_value.offset)
        if place in seen:
            continue  # a tied head: the embedding's very bytes
        seen.add(place)
        try:
            yield node.name, _tensor(node, codes.const_value.numpy(), scales.const_value.numpy())
        except (OSError, ValueError) as error:
            raise BadFileError("The bundle's weights are truncated.", found=f"'{node.name}': {error}") from None


def _tensor(node: Any, packed: npt.NDArray[np.uint8], scales: npt.NDArray[np.float32]) -> QuantizedTensor:
    bits, block = node.attributes["bits"].as_int(), node.attributes["block_size"].as_int()
    packed_NB = packed.reshape(packed.shape[0], -1)
    fields = [(packed_NB >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)]
    unsigned_NK = np.stack(fields, axis=-1).reshape(packed_NB.shape[0], -1)
    codes_NK = (unsigned_NK.astype(np.int16) - (1 << (bits - 1))).astype(np.int8)
    return QuantizedTensor(torch.from_numpy(codes_NK), torch.from_numpy(scales.copy()), block, bits)
