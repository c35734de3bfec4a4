"""Codes and scales as they stand in a written ONNX bundle, read without running it.

The reading follows the operators' own description (MatMulNBits, GatherBlockQuantized in ONNX Runtime's
contrib_ops), not our writer: bits and block size come from the node, the nibbles from its second input.

Legend: N output channels, K input channels, G groups, B bytes of a group's codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from export import onnx_ort
from export.onnx_files import ORT_MODEL, check_files, load_graph, model_path
from nano.families import EMBEDDING, HEAD
from quantize.grid import QuantizedTensor

QUANTIZED = ("MatMulNBits", "GatherBlockQuantized")
MICROSOFT = "com.microsoft"
SLAB = 1 << 18
"""Bytes unpacked at a time: what a core's cache holds."""


@dataclass(frozen=True)
class Weight:
    """A quantized node's weight.

    Attributes:
        name: of the node, which is the module's.
        bits, block: of the grid.
        place: where the codes lie; equal for nodes that share them.
        parts: codes, scales and, where there are some, zero points; each read when it is called.
    """

    name: str
    bits: int
    block: int
    place: Any
    parts: list[Callable[[], npt.NDArray[Any]]]


def read_codes(folder: Path) -> Iterator[tuple[str, QuantizedTensor]]:
    """Every quantized module of a bundle, once: (name, codes and scales).

    A tied head is not given apart: in model.onnx its codes are the embedding's very bytes, in model.ort equal ones.

    Raises:
        BadFileError: the bundle is missing, truncated or not ONNX.
    """
    check_files(folder)
    in_ort_format = model_path(folder).name == ORT_MODEL
    seen: dict[Any, str] = {}
    embedding = None
    for weight in _ort_weights(folder) if in_ort_format else _onnx_weights(folder):
        if weight.place in seen:
            continue
        seen[weight.place] = weight.name
        tensor = _tensor(weight)
        if in_ort_format and weight.name == EMBEDDING:
            embedding = tensor
        if weight.name == HEAD and embedding is not None and _equal(tensor, embedding):
            continue
        yield weight.name, tensor


def _onnx_weights(folder: Path) -> Iterator[Weight]:
    for node in load_graph(folder):
        if node.op_type in QUANTIZED and node.domain == MICROSOFT:
            inputs = [node.inputs[i].const_value for i in _places(node.op_type, len(node.inputs))]
            bits, block = (node.attributes[name].as_int() for name in ("bits", "block_size"))
            place = (inputs[0].location, inputs[0].offset)
            yield Weight(node.name, bits, block, place, [tensor.numpy for tensor in inputs])


def _ort_weights(folder: Path) -> Iterator[Weight]:
    with onnx_ort.open_graph(folder) as graph:
        tensors = onnx_ort.initializers(graph)
        for node in onnx_ort.nodes(graph):
            op_type = node.OpType().decode()
            if op_type in QUANTIZED and node.Domain() == MICROSOFT.encode():
                names = [node.Inputs(i).decode() for i in _places(op_type, node.InputsLength())]
                found = onnx_ort.attributes(node)
                parts = [lambda name=name: onnx_ort.array(tensors[name]) for name in names if name]
                yield Weight(node.Name().decode(), found["bits"], found["block_size"], names[0], parts)  # type: ignore[arg-type]


def _places(op_type: str, inputs: int) -> list[int]:
    """Which inputs of a quantized node are its codes, scales and zero points."""
    return [1 if op_type == "MatMulNBits" else 0, *range(2, min(inputs, 4))]


def _tensor(weight: Weight) -> QuantizedTensor:
    packed, scales, *zeros = (part() for part in weight.parts)
    rows, groups = scales.shape
    codes_NK = _unpack(packed.reshape(rows, -1), weight.bits)
    zero_NG = _unpack(zeros[0].reshape(rows, -1), weight.bits)[:, :groups] if zeros else None
    return QuantizedTensor(codes_NK, torch.from_numpy(scales.copy()), weight.block, weight.bits, zero_NG)


def _unpack(packed_NB: npt.NDArray[np.uint8], bits: int) -> torch.Tensor:
    """Unsigned fields of bytes, the first in the lowest bits, to int8 codes: less 2^(bits-1)."""
    fields = 8 // bits
    unsigned_NK = np.empty((packed_NB.shape[0], packed_NB.shape[1] * fields), np.uint8)
    step = max(1, SLAB // packed_NB.shape[1])
    for start in range(0, len(packed_NB), step):
        packed, unsigned = packed_NB[start : start + step], unsigned_NK[start : start + step]
        for field in range(fields):
            unsigned[:, field::fields] = (packed >> (field * bits)) & ((1 << bits) - 1)
        unsigned -= np.uint8(1 << (bits - 1))  # wraps below zero, as int8 reads it
    return torch.from_numpy(unsigned_NK.view(np.int8))


def _equal(a: QuantizedTensor, b: QuantizedTensor) -> bool:
    return a.bits == b.bits and torch.equal(a.codes_NK, b.codes_NK) and torch.equal(a.scale_NG, b.scale_NG)
