"""Codes and scales as they stand in a written .pte, read from the file alone.

The way there is the runtime's own: the program's instructions in order, each XNNPACK delegate's graph, in it the
fully connected nodes with quantized filters, their named data. So what is read is what will be multiplied, and the
n-th such node is the n-th linear in the order in which data flows (`nano.families.LAYER_LINEARS`).

Formats: schema/program.fbs, backends/xnnpack/serialization/schema.fbs (XNNPACK's nibbles are code + 8, the even
column in the low one; bfloat16 scales). The embedding's table is in XNNPACK's order (`export.executorch_model`).

Legend: N output channels, K input channels, G groups, B bytes of a row.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from export.executorch_file import MODEL, check_whole
from export.silence import silenced
from nano.errors import BadFileError, require_module
from nano.families import EMBEDDING, HEAD, LAYER_LINEARS, layer_prefix
from quantize.grid import QuantizedTensor
from quantize.packed import unpack_codes

EMBEDDING_BITS = {"quantized_decomposed::embedding_4bit": 4, "quantized_decomposed::embedding_byte": 8}
LINEAR_BITS = {"xnn_datatype_qbint4": 4, "xnn_datatype_qcint4": 4, "xnn_datatype_qcint8": 8}
"""Filters on the grid: blockwise int4, int4 and int8 with one scale a row."""
BLOCKWISE = "xnn_datatype_qbint4"
"""The one whose scales are bfloat16; the others' are float32."""


@dataclass(frozen=True)
class Filter:
    """The weight of one fully connected node.

    Attributes:
        kind: XNNPACK's datatype, for instance "xnn_datatype_qbint4".
        rows, columns: N and K.
        group_size: input channels that share a scale; K for per-channel scales, 0 for a float weight.
        codes, scales: keys of the named data.
    """

    kind: str
    rows: int
    columns: int
    group_size: int
    codes: str
    scales: str

    @property
    def bits(self) -> int:
        """Bits of a code; 32 for a float weight."""
        return LINEAR_BITS.get(self.kind, 32)


@dataclass(frozen=True)
class Table:
    """The embedding on the grid.

    Attributes:
        bits: 4 or 8.
        codes, scales: indices into the program's constants.
        scale_size: (V, G).
        half_scales: whether the scales are float16, else float32.
        width: D.
    """

    bits: int
    codes: int
    scales: int
    scale_size: tuple[int, int]
    half_scales: bool
    width: int


class PteFile:
    """A program opened from outside: its structure parsed, its segments mapped.

    Raises:
        BadFileError: missing, truncated, or not a program that can be parsed.
        MissingExtraError: executorch is not installed (its own parser is used).
    """

    def __init__(self, folder: Path, mapped: mmap.mmap) -> None:
        layout = check_whole(folder)
        parser = require_module("executorch.exir._serialize._flatbuffer_program", "executorch")
        self.path, self._mapped, self.segments_at = folder / MODEL, mapped, layout.segments_at
        self.flatbuffer = mapped[: layout.program_bytes]
        self._read: dict[int, dict[str, Any]] = {}
        try:
            self.program: Any = parser._flatbuffer_to_program(self.flatbuffer)
            self.plan: Any = next(plan for plan in self.program.execution_plan if plan.name == "forward")
        except Exception as error:  # flatbuffers raise struct.error, IndexError, ...: all mean the same here
            raise self.broken(f"its program cannot be parsed: {error!r}") from None
        self._named: dict[str, int] = {entry.key: entry.segment_index for entry in self.program.named_data}

    def broken(self, why: str) -> BadFileError:
        """The error for a file whose parts do not fit together."""
        found = f"{self.path}: {why}"
        return BadFileError("The bundle's model is damaged.", found=found, todo="copy it again, or export it again")

    def view(self, start: int, size: int) -> bytes:
        """Bytes of the file, `start` counted from the first segment's beginning."""
        at = self.segments_at + start
        return self._mapped[at : at + size]

    def segment(self, index: int) -> bytes:
        """Bytes of one segment."""
        segment = self.program.segments[index]
        return self.view(segment.offset, segment.size)

    def named_segment(self, key: str) -> int:
        """Index of the segment under a key."""
        return self._named[key]

    def named_size(self, key: str) -> int:
        """Bytes of what lies under a key."""
        return int(self.program.segments[self._named[key]].size)

    def shares_table(self, key: str, table: Table) -> bool:
        """Whether what lies under a key is the embedding's table itself, not a copy."""
        offset: int = self.program.segments[self._named[key]].offset
        return offset == self.constant_start(table.codes)

    def named(self, key: str) -> bytes:
        """What lies under a key; XNNPACK's keys are the sha256 of the contents, which is checked.

        Raises:
            BadFileError: no such key, or the bytes are not those it was made of.
        """
        if key not in self._named:
            raise self.broken(f"no data named {key}")
        data = self.segment(self._named[key])
        if hashlib.sha256(data).hexdigest() != key.removeprefix("scale_"):
            raise self.broken(f"the data named {key} changed since it was written")
        return data

    def constant(self, index: int) -> bytes:
        """One of the program's constant tensors, and the padding that may follow it."""
        start, stop = self._constant_range(index)
        return self.segment(self.program.constant_segment.segment_index)[start:stop]

    def constant_start(self, index: int) -> int:
        """Where a constant begins, from the first segment's beginning."""
        segment = self.program.segments[self.program.constant_segment.segment_index]
        return int(segment.offset) + self._constant_range(index)[0]

    def constant_size(self, index: int) -> int:
        """Bytes of one constant and its padding."""
        start, stop = self._constant_range(index)
        return stop - start

    def _constant_range(self, index: int) -> tuple[int, int]:
        place = self.program.constant_segment
        offsets = [*place.offsets, self.program.segments[place.segment_index].size]
        return offsets[index], offsets[index + 1]

    @property
    def weight_bytes(self) -> int:
        """Bytes of everything that is data: constants, and the delegates' named data; each byte once."""
        constants = self.program.segments[self.program.constant_segment.segment_index]
        named = (self.program.segments[i] for i in {*self._named.values()})
        end = constants.offset + constants.size
        return int(constants.size + sum(one.size for one in named if not constants.offset <= one.offset < end))

    def _graphs(self) -> Iterator[dict[str, Any]]:
        """The delegates' graphs, in the order in which they run; each is read once."""
        for instruction in self.plan.chains[0].instructions:
            arguments = instruction.instr_args
            if type(arguments).__name__ == "DelegateCall":
                index = arguments.delegate_index
                if index not in self._read:
                    self._read[index] = _graph(self.segment(self.plan.delegates[index].processed.index))
                yield self._read[index]

    def filters(self) -> Iterator[Filter]:
        """Weights of all fully connected nodes, in the order in which they run."""
        try:
            for graph in self._graphs():
                yield from self._filters(graph)
        except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
            raise self.broken(f"a delegate's graph cannot be read: {error!r}") from None

    def unpacked(self) -> int:
        """How many constants the delegates own that XNNPACK does not pack: neither filter nor bias of a linear."""
        count = 0
        for graph in self._graphs():
            nodes = [one["xnode_union"] for one in graph["xnodes"] if one["xnode_union_type"] == "XNNFullyConnected"]
            packed = {node.get(role, 0) for node in nodes for role in ("filter_id", "bias_id")}
            tensors = [_tensor(value) for value in graph["xvalues"]]
            count += sum(bool(one.get("constant_buffer_idx")) and one["id_out"] not in packed for one in tensors)
        return count

    def _filters(self, graph: dict[str, Any]) -> Iterator[Filter]:
        values = {_tensor(value)["id_out"]: value["xvalue_union"] for value in graph["xvalues"]}
        for node in graph["xnodes"]:
            if node["xnode_union_type"] != "XNNFullyConnected":
                continue
            value = values[node["xnode_union"]["filter_id"]]
            tensor = value.get("tensor_value", value)
            rows, columns = tensor["dims"]
            quantized = value.get("quant_params", {})
            scales = quantized.get("scale_buffer_idx", 0)
            yield Filter(
                kind=tensor["datatype"],
                rows=rows,
                columns=columns,
                group_size=quantized.get("group_size", columns) if quantized else 0,
                codes=graph["constant_data"][tensor["constant_buffer_idx"]]["named_key"],
                scales=graph["constant_data"][scales]["named_key"] if quantized else "",
            )

    def table(self) -> Table | None:
        """The embedding's table where it is on the grid."""
        for instruction in self.plan.chains[0].instructions:
            arguments = instruction.instr_args
            if type(arguments).__name__ != "KernelCall":
                continue
            name = self.plan.operators[arguments.op_index].name
            if name in EMBEDDING_BITS:
                codes, scales = (self.plan.values[i].val for i in arguments.args[:2])
                bits = EMBEDDING_BITS[name]
                width = codes.sizes[1] * 8 // bits
                rows, groups = scales.sizes
                half = scales.scalar_type.name == "HALF"
                return Table(bits, codes.data_buffer_idx, scales.data_buffer_idx, (rows, groups), half, width)
        return None

    @property
    def delegates(self) -> int:
        """How many delegates the program calls."""
        return len(self.plan.delegates)

    @property
    def operators(self) -> dict[str, int]:
        """Operators that ExecuTorch itself runs, and how often they are called."""
        counts: dict[str, int] = {}
        for instruction in self.plan.chains[0].instructions:
            arguments = instruction.instr_args
            if type(arguments).__name__ == "KernelCall":
                name = self.plan.operators[arguments.op_index].name
                counts[name] = counts.get(name, 0) + 1
        return counts

    @property
    def planned_bytes(self) -> int:
        """Memory that the program asks for: caches and activations between delegates."""
        return int(sum(self.plan.non_const_buffer_sizes))


@contextmanager
def open_pte(folder: Path) -> Iterator[PteFile]:
    """A bundle's program, mapped while the block runs."""
    check_whole(folder)
    with (folder / MODEL).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        with silenced():
            opened = PteFile(folder, mapped)
        yield opened


def _tensor(value: dict[str, Any]) -> dict[str, Any]:
    union: dict[str, Any] = value["xvalue_union"]
    tensor: dict[str, Any] = union.get("tensor_value", union)
    return tensor


def _graph(blob: bytes) -> dict[str, Any]:
    """An XNNPACK delegate's graph, by the flatbuffer compiler that ExecuTorch ships."""
    serialization = "executorch.backends.xnnpack.serialization"
    header_class = require_module(f"{serialization}.xnnpack_graph_serialize", "executorch").XNNHeader
    flatbuffer = require_module("executorch.exir._serialize._flatbuffer", "executorch")
    header = header_class.from_bytes(blob[: header_class.EXPECTED_LENGTH])
    with tempfile.TemporaryDirectory() as scratch:
        schema, binary = Path(scratch, "schema.fbs"), Path(scratch, "graph.bin")
        schema.write_bytes(resources.files(serialization).joinpath("schema.fbs").read_bytes())
        binary.write_bytes(blob[header.flatbuffer_offset : header.flatbuffer_offset + header.flatbuffer_size])
        flatbuffer._flatc_decompile(scratch, str(schema), str(binary), ["--raw-binary"])
        graph: dict[str, Any] = json.loads(Path(scratch, "graph.json").read_bytes())
    return graph


def named_filters(pte: PteFile) -> list[tuple[str, Filter]]:
    """Quantized linears by module name, in order; a head on the grid is the last.

    Raises:
        BadFileError: their number does not fit whole layers.
    """
    filters = [one for one in pte.filters() if one.kind in LINEAR_BITS]
    layers, rest = divmod(len(filters), len(LAYER_LINEARS))
    if rest > 1:
        raise pte.broken(f"{len(filters)} quantized linears are no whole number of layers")
    names = [layer_prefix(i) + name for i in range(layers) for name in LAYER_LINEARS] + [HEAD] * rest
    return list(zip(names, filters, strict=True))


def read_codes(folder: Path) -> Iterator[tuple[str, QuantizedTensor]]:
    """Every quantized module of a bundle, once: (name, codes and scales).

    A head whose codes and scales are the embedding's is the tied one, and is not given apart.

    Raises:
        BadFileError: the bundle is missing, truncated, damaged or not an ExecuTorch program.
        MissingExtraError: executorch is not installed.
    """
    with open_pte(folder) as pte:
        table = pte.table()
        embedding = None if table is None else _read_table(pte, table)
        if embedding is not None:
            yield EMBEDDING, embedding
        for name, one in named_filters(pte):
            found = _read_filter(pte, one)
            if name == HEAD and embedding is not None and _equal(found, embedding):
                continue
            yield name, found


def _read_filter(pte: PteFile, one: Filter) -> QuantizedTensor:
    bits = LINEAR_BITS[one.kind]
    raw_NB = torch.frombuffer(bytearray(pte.named(one.codes)), dtype=torch.uint8).view(one.rows, -1)
    scale_dtype = torch.bfloat16 if one.kind == BLOCKWISE else torch.float32
    scales = torch.frombuffer(bytearray(pte.named(one.scales)), dtype=scale_dtype).view(one.rows, -1)
    codes_NK = raw_NB.view(torch.int8) if bits == 8 else _unpack(raw_NB)
    return QuantizedTensor(codes_NK[:, : one.columns], scales.float(), one.group_size, bits)


def _read_table(pte: PteFile, table: Table) -> QuantizedTensor:
    rows, groups = table.scale_size
    raw = torch.frombuffer(bytearray(pte.constant(table.codes)), dtype=torch.uint8)
    raw_NB = raw[: rows * table.width * table.bits // 8].view(rows, -1)
    dtype = torch.float16 if table.half_scales else torch.float32
    scales = torch.frombuffer(bytearray(pte.constant(table.scales)), dtype=dtype)[: rows * groups].float()
    codes_NK = raw_NB.view(torch.int8) if table.bits == 8 else _unpack(raw_NB)
    return QuantizedTensor(codes_NK, scales.view(rows, groups).clone(), table.width // groups, table.bits)


def _unpack(packed_NB: torch.Tensor) -> torch.Tensor:
    """Two codes + 8 a byte, the even column low, as the checkpoint has them too, to int8 (N, K)."""
    return unpack_codes(packed_NB.view(torch.int32), 2 * packed_NB.shape[1], 4)


def _equal(a: QuantizedTensor, b: QuantizedTensor) -> bool:
    return a.bits == b.bits and torch.equal(a.codes_NK, b.codes_NK) and torch.equal(a.scale_NG, b.scale_NG)
