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

from export.onnx_files import check_files, load_graph
from quantize.grid import QuantizedTensor

QUANTIZED = ("MatMulNBits", "GatherBlockQuantized")


def read_codes(folder: Path) -> Iterator[tuple[str, QuantizedTensor]]:
    """Every quantized module of a bundle, once: (name, codes and scales).

    Raises:
        BadFileError: the bundle is missing, truncated or not ONNX.
    """
    check_files(folder)
    seen: set[tuple[str, int]] = set()
    for node in load_graph(folder):
        if node.op_type not in QUANTIZED or node.domain != "com.microsoft":
            continue
        codes, scales = node.inputs[1 if node.op_type == "MatMulNBits" else 0], node.inputs[2]
        place = (codes.const_value.location, codes.const_value.offset)
        if place in seen:
            continue  # a tied head: the embedding's very bytes
        seen.add(place)
        zeros = node.inputs[3].const_value.numpy() if len(node.inputs) > 3 else None
        yield node.name, _tensor(node, codes.const_value.numpy(), scales.const_value.numpy(), zeros)


def _tensor(
    node: Any, packed: npt.NDArray[np.uint8], scales: npt.NDArray[np.float32], zeros: npt.NDArray[np.uint8] | None
) -> QuantizedTensor:
    bits, block = node.attributes["bits"].as_int(), node.attributes["block_size"].as_int()
    rows, groups = scales.shape
    codes_NK = _unpack(packed.reshape(rows, -1), bits)
    zero_NG = None if zeros is None else _unpack(zeros.reshape(rows, -1), bits)[:, :groups]
    return QuantizedTensor(codes_NK, torch.from_numpy(scales.copy()), block, bits, zero_NG)


def _unpack(packed_NB: npt.NDArray[np.uint8], bits: int) -> torch.Tensor:
    """Unsigned fields of bytes, the first in the lowest bits, to int8 codes: less 2^(bits-1)."""
    fields = 8 // bits
    unsigned_NK = np.empty((packed_NB.shape[0], packed_NB.shape[1] * fields), np.uint8)
    for field in range(fields):
        unsigned_NK[:, field::fields] = (packed_NB >> (field * bits)) & ((1 << bits) - 1)
    unsigned_NK -= np.uint8(1 << (bits - 1))  # wraps below zero, as int8 reads it
    return torch.from_numpy(unsigned_NK.view(np.int8))
