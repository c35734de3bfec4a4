"""The int4 checkpoint on disk: compressed-tensors "pack-quantized", as transformers and vLLM load it.

A quantized module `M` is stored as `M.weight_packed` (int32, eight 4-bit codes + 8 a word, lowest nibble first),
`M.weight_scale` and `M.weight_shape`, on an asymmetric grid `M.weight_zero_point` too (packed like the codes, but
along N); the rest of the model as usual. Format: https://github.com/vllm-project/compressed-tensors
(compressors/pack_quantized). An embedding on the grid is stored dense, see `quantize.tables`. Nibbles exist only
here and in the export writers; everywhere else codes are int8.

Legend: N output channels, K input channels, G groups, W = K * bits / 32 words.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nano.checkpoint import Checkpoint, CheckpointWriter
from nano.errors import BadFileError, UnsupportedError
from nano.families import EMBEDDING, weight_shapes
from nano.shapes import ModelShape, read_config
from quantize.grid import QuantizedTensor
from quantize.tables import codes_of, dense_of, open_tables, write_tables

UNPACKED = "int-quantized"
"""compressed-tensors' name of codes that are stored as int8, one a byte. Its 0.20 does not pack zero points on the meta
device, so transformers 5.23 finds packed ones of another size than it expects. Told to dequantize while loading it
takes them, but by the first group's scheme for every module; where schemes are mixed, asymmetric ones are unpacked."""

TABLE_ROWS = 1 << 14
"""Rows of an embedding whose codes are found at once: float work on a whole one takes gigabytes."""
PACKED, SCALE, SHAPE, ZERO = ".weight_packed", ".weight_scale", ".weight_shape", ".weight_zero_point"


def pack_codes(codes_NK: torch.Tensor, bits: int) -> torch.Tensor:
    """int8 (N, K) to int32 (N, W): code + 2^(bits-1) as unsigned fields, the first in the lowest bits."""
    per_byte, per_word = 8 // bits, 32 // bits
    unsigned_NK = codes_NK.contiguous().view(torch.uint8) + (1 << (bits - 1))
    unsigned_NK = torch.nn.functional.pad(unsigned_NK, (0, -codes_NK.shape[1] % per_word))
    bytes_NB = unsigned_NK[:, 0::per_byte].clone(memory_format=torch.contiguous_format)
    for field in range(1, per_byte):
        bytes_NB |= unsigned_NK[:, field::per_byte] << (field * bits)
    return bytes_NB.view(torch.int32)


def unpack_codes(words_NW: torch.Tensor, columns: int, bits: int) -> torch.Tensor:
    """int32 (N, W) back to int8 (N, K), through bytes: nothing larger than the result is allocated."""
    bytes_NB = words_NW.contiguous().view(torch.uint8)  # little-endian, so the lowest fields come first
    if bits == 8:
        return (bytes_NB[:, :columns] ^ 128).view(torch.int8)
    fields_NB2 = torch.empty((*bytes_NB.shape, 2), dtype=torch.uint8)
    torch.bitwise_and(bytes_NB, 15, out=fields_NB2[..., 0])
    torch.bitwise_right_shift(bytes_NB, 4, out=fields_NB2[..., 1])
    codes_NK = fields_NB2.view(torch.int8).flatten(-2).sub_(8)
    return codes_NK if codes_NK.shape[1] == columns else codes_NK[:, :columns].contiguous()


@dataclass(frozen=True)
class Layout:
    """How a module lies on the grid, without reading its codes.

    Attributes:
        rows, columns: N and K.
        group_size: input channels that share a scale.
        bits: 4 or 8.
        symmetric: whether code 0 means 0.0.
    """

    rows: int
    columns: int
    group_size: int
    bits: int
    symmetric: bool = True

    @property
    def groups(self) -> int:
        """G."""
        return self.columns // self.group_size


class Int4Checkpoint:
    """An int4 folder opened lazily: modules on the grid by name, everything else as tensors.

    Attributes:
        folder: where it lies.
        config: config.json, its quantization_config included.
        shape: the model's dimensions.

    Raises:
        BadFileError: broken or missing files, or weights that do not fit config.json.
        UnsupportedError: another quantization than pack-quantized integer groups.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = read_config(folder)
        self.shape = ModelShape.from_hf(self.config)
        self._groups = _scheme(self.config, folder)
        self.store = Checkpoint(folder)
        self._tables = open_tables(folder)
        packed = {n[: -len(PACKED)] for n in self.store.names() if n.endswith(PACKED)}
        scaled = {n[: -len(SCALE)] for n in self.store.names() if n.endswith(SCALE)}
        self._unpacked = _unpacked_bits(self.config, scaled - packed)
        self._modules = scaled | set(self._tables)
        self._check()

    def _check(self) -> None:
        for name, size in weight_shapes(self.shape).items():
            module = name.removesuffix(".weight")
            packed = module in self._modules and module not in self._tables and module not in self._unpacked
            found = tuple(self.store.tensor(module + SHAPE).tolist()) if packed else self.store.size(name)
            if found != size:
                raise BadFileError(f"'{name}' does not fit config.json.", found=str(found), expected=str(size))

    @property
    def modules(self) -> list[str]:
        """Names of the modules on the grid, in the model's order."""
        order = [name.removesuffix(".weight") for name in weight_shapes(self.shape)]
        return [name for name in order if name in self._modules]

    def __contains__(self, module: str) -> bool:
        return module in self._modules

    def layout(self, module: str) -> Layout:
        """How a module lies on the grid, from headers (and a table's scales) alone.

        Raises:
            BadFileError: on no grid of ours.
        """
        if module in self._tables:
            bits, scale_VG = self._tables[module]
            (rows, columns), groups, words = self.store.size(module + ".weight"), scale_VG.shape[1], 0
        elif module in self._unpacked:
            (rows, columns), groups = self.store.size(module + ".weight"), self.store.size(module + SCALE)[1]
            bits, words = self._unpacked[module], 0
        else:
            rows, columns = (int(v) for v in self.store.tensor(module + SHAPE))
            words, groups = self.store.size(module + PACKED)[1], self.store.size(module + SCALE)[1]
            bits = 8 if words > math.ceil(columns / 8) else 4
        if bits not in (4, 8) or columns % groups or words not in (0, math.ceil(columns * bits / 32)):
            found = f"{words} words, {groups} scales for {columns} columns"
            raise BadFileError(f"'{module}' is not on a grid of ours.", found=found)
        return Layout(rows, columns, columns // groups, bits, module + ZERO not in self.store)

    def words(self, module: str, start: int, stop: int) -> torch.Tensor:
        """Packed codes of rows [start, stop) of a module, int32 (rows, W), without reading the others."""
        if module in self._unpacked:
            return pack_codes(self.store.rows(module + ".weight", start, stop), self._unpacked[module])
        if module not in self._tables:
            return self.store.rows(module + PACKED, start, stop)
        bits, scale_VG = self._tables[module]
        name = module + ".weight"
        pieces = []
        for first in range(start, max(stop, start + 1), TABLE_ROWS):
            last = min(first + TABLE_ROWS, stop)
            codes_RD = codes_of(self.store.rows(name, first, last), scale_VG[first:last], bits, name)
            pieces.append(pack_codes(codes_RD, bits))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def scales(self, module: str) -> torch.Tensor:
        """Scales of a module, float32 (N, G)."""
        return self._tables[module][1] if module in self._tables else self.store.tensor(module + SCALE).float()

    def zeros(self, module: str) -> torch.Tensor | None:
        """Codes that mean 0.0, int8 (N, G); None on a symmetric grid."""
        layout = self.layout(module)
        if layout.symmetric:
            return None
        words_WG = self.store.tensor(module + ZERO)
        if module in self._unpacked:
            return words_WG
        return unpack_codes(words_WG.T, layout.rows, layout.bits).T.contiguous()

    def quantized(self, module: str) -> QuantizedTensor:
        """Codes, scales and zero points of one module."""
        layout = self.layout(module)
        codes_NK = unpack_codes(self.words(module, 0, layout.rows), layout.columns, layout.bits)
        return QuantizedTensor(codes_NK, self.scales(module), layout.group_size, layout.bits, self.zeros(module))

    def dense(self, name: str) -> torch.Tensor:
        """A float tensor by its full name; a module on the grid comes dequantised, in float32."""
        module = name.removesuffix(".weight")
        if module in self._tables:
            return self.store.tensor(name).float()
        return self.quantized(module).dequantize() if module in self._modules else self.store.tensor(name)

    def dense_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor of the equivalent float model."""
        for name in weight_shapes(self.shape):
            yield name, self.dense(name)

    def close(self) -> None:
        """Unmap the files."""
        self.store.close()

    def __enter__(self) -> Int4Checkpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _scheme(config: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """The weight schemes of quantization_config, each of a kind we read."""
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict) or _format_of(quantization) != "pack-quantized":
        raise BadFileError(
            "This is not an int4 folder.",
            found=f"{_found(quantization)} in {folder}",
            expected="compressed-tensors 'pack-quantized'",
            todo="run nanokit quantize on the float model" + ("" if quantization is None else " that it was made from"),
        )
    schemes = [group["weights"] for group in quantization.get("config_groups", {}).values()]
    for weights in schemes:
        if weights.get("type") != "int" or weights.get("num_bits") not in (4, 8):
            raise UnsupportedError(
                "This quantization grid is not supported.", found=str(weights), expected="int4 or int8"
            )
    return schemes


def _unpacked_bits(config: dict[str, Any], modules: set[str]) -> dict[str, int]:
    """Bits of the modules whose codes are stored one a byte, by the config group that names each.

    Raises:
        BadFileError: no group does.
    """
    groups = [g for g in config["quantization_config"]["config_groups"].values() if g.get("format") == UNPACKED]
    bits = {}
    for module in modules:
        found = [g for g in groups if any(re.match(t.removeprefix("re:"), module) for t in g.get("targets", ()))]
        if not found:
            raise BadFileError(f"'{module}' has scales but no codes.", found="no weight_packed, and no config group")
        bits[module] = int(found[0]["weights"]["num_bits"])
    return bits


def _found(quantization: Any) -> str:
    """How a folder is quantized, in the words of its config.json."""
    if not isinstance(quantization, dict):
        return "a float model" if quantization is None else f"quantization_config {quantization!r}"
    return f"quant_method {quantization.get('quant_method')!r}, format {_format_of(quantization)!r}"


def _format_of(quantization: Any) -> Any:
    return quantization.get("format") if isinstance(quantization, dict) else None


def quantization_config(
    groups: Mapping[tuple[int, int], list[str]] | Mapping[tuple[int, int, bool], list[str]], ignore: list[str]
) -> dict[str, Any]:
    """compressed-tensors' description for config.json.

    Args:
        groups: (bits, group size, symmetric) to module targets ("Linear", or "re:..." patterns); a group size of 0
            means one scale a row; symmetric where it is not said.
        ignore: modules left in float although a target matches them.
    """
    config_groups: dict[str, dict[str, Any]] = {}
    for i, (scheme, targets) in enumerate(groups.items()):
        bits, group, symmetric = (*scheme, True)[:3]
        weights: dict[str, Any] = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "channel"}
        if group:
            weights.update(strategy="group", group_size=group)
        config_groups[f"group_{i}"] = {"targets": targets, "weights": weights}
    asymmetric = [group for group in config_groups.values() if not group["weights"]["symmetric"]]
    if len(config_groups) > 1:
        for unpacked in asymmetric:
            unpacked["format"] = UNPACKED
    return {
        **({"dequantize": True} if asymmetric and len(config_groups) == 1 else {}),
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ignore,
        "config_groups": config_groups,
    }


def write_int4(
    folder: Path,
    config: dict[str, Any],
    tensors: Iterable[tuple[str, torch.Tensor | QuantizedTensor]],
    scale_dtype: torch.dtype = torch.float32,
) -> None:
    """Write config.json and the weights of an int4 checkpoint.

    Args:
        folder: exists and is empty (a staged folder).
        config: config.json with its quantization_config.
        tensors: full names ("....weight") with a float tensor or a module on the grid.
        scale_dtype: how scales are stored; float32 makes transformers dequantise exactly, bfloat16 halves them.
    """
    tables: dict[str, QuantizedTensor] = {}
    with CheckpointWriter(folder) as writer:
        for name, tensor in tensors:
            module = name.removesuffix(".weight")
            if isinstance(tensor, torch.Tensor):
                writer.add(name, tensor)
            elif module == EMBEDDING:
                writer.add(name, dense_of(tensor))
                tables[module] = tensor
            elif tensor.zero_NG is not None and len(config["quantization_config"]["config_groups"]) > 1:
                for ending, part in ((".weight", tensor.codes_NK), (SCALE, tensor.scale_NG.to(scale_dtype)), (ZERO, tensor.zero_NG)):  # noqa: E501  # fmt: skip
                    writer.add(module + ending, part)
            else:
                writer.add(module + PACKED, pack_codes(tensor.codes_NK, tensor.bits))
                writer.add(module + SCALE, tensor.scale_NG.to(scale_dtype))
                writer.add(module + SHAPE, torch.tensor(tensor.codes_NK.shape, dtype=torch.int64))
                if tensor.zero_NG is not None:
                    writer.add(module + ZERO, pack_codes(tensor.zero_NG.T, tensor.bits).T)
    write_tables(folder, tables)
    if tables and not {"dtype", "torch_dtype"} & set(config):
        config = {**config, "dtype": "float32"}  # else loaders take the first tensor's, which may be float16
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
