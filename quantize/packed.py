"""The int4 checkpoint on disk: compressed-tensors "pack-quantized", as transformers and vLLM load it.

A quantized module `M` is stored as `M.weight_packed` (int32, eight 4-bit codes + 8 a word, lowest nibble first),
`M.weight_scale` and `M.weight_shape`; the rest of the model as usual. Format:
https://github.com/vllm-project/compressed-tensors (compressors/pack_quantized). Nibbles exist only here and in
the export writers; everywhere else codes are int8.

Legend: N output channels, K input channels, G groups, W = K * bits / 32 words.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from nano.checkpoint import Checkpoint, CheckpointWriter
from nano.errors import BadFileError, UnsupportedError
from nano.families import weight_shapes
from nano.shapes import ModelShape, read_config
from quantize.grid import QuantizedTensor

PACKED, SCALE, SHAPE, ZERO = ".weight_packed", ".weight_scale", ".weight_shape", ".weight_zero_point"


def pack_codes(codes_NK: torch.Tensor, bits: int) -> torch.Tensor:
    """int8 (N, K) to int32 (N, W): code + 2^(bits-1) as unsigned fields, the first in the lowest bits."""
    per_byte, per_word = 8 // bits, 32 // bits
    unsigned_NK = codes_NK.contiguous().view(torch.uint8) + (1 << (bits - 1))
    unsigned_NK = torch.nn.functional.pad(unsigned_NK, (0, -codes_NK.shape[1] % per_word))
    bytes_NB = unsigned_NK[:, 0::per_byte].clone()
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
        self._modules = {n[: -len(PACKED)] for n in self.store.names() if n.endswith(PACKED)}
        self._check()

    def _check(self) -> None:
        for name, size in weight_shapes(self.shape).items():
            module = name.removesuffix(".weight")
            found = (
                tuple(self.store.tensor(module + SHAPE).tolist()) if module in self._modules else self.store.size(name)
            )
            if found != size:
                raise BadFileError(f"'{name}' does not fit config.json.", found=str(found), expected=str(size))

    @property
    def modules(self) -> list[str]:
        """Names of the modules on the grid, in the model's order."""
        order = [name.removesuffix(".weight") for name in weight_shapes(self.shape)]
        return [name for name in order if name in self._modules]

    def __contains__(self, module: str) -> bool:
        return module in self._modules

    def quantized(self, module: str) -> QuantizedTensor:
        """Codes and scales of one module."""
        words = self.store.tensor(module + PACKED)
        _n, k = (int(v) for v in self.store.tensor(module + SHAPE))
        scale_NG = self.store.tensor(module + SCALE).float()
        bits = words.shape[1] * 32 // k
        if k % scale_NG.shape[1] or bits not in (4, 8):
            found = f"{words.shape[1]} words, {scale_NG.shape[1]} scales for {k} columns"
            raise BadFileError(f"'{module}' is not on a grid of ours.", found=found)
        return QuantizedTensor(unpack_codes(words, k, bits), scale_NG, k // scale_NG.shape[1], bits)

    def dense(self, name: str) -> torch.Tensor:
        """A float tensor by its full name; a module on the grid comes dequantised."""
        module = name.removesuffix(".weight")
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
            found=f"quantization format {_format_of(quantization)!r} in {folder}",
            expected="compressed-tensors 'pack-quantized'",
            todo="run nanokit quantize first",
        )
    schemes = [group["weights"] for group in quantization.get("config_groups", {}).values()]
    for weights in schemes:
        if weights.get("type") != "int" or weights.get("num_bits") not in (4, 8) or not weights.get("symmetric", True):
            raise UnsupportedError(
                "This quantization grid is not supported.", found=str(weights), expected="symmetric int4 or int8"
            )
    return schemes


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
    config_groups = {}
    for i, (scheme, targets) in enumerate(groups.items()):
        bits, group, symmetric = (*scheme, True)[:3]
        weights: dict[str, Any] = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "channel"}
        if group:
            weights.update(strategy="group", group_size=group)
        config_groups[f"group_{i}"] = {"targets": targets, "weights": weights}
    return {
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
    with CheckpointWriter(folder) as writer:
        for name, tensor in tensors:
            if isinstance(tensor, torch.Tensor):
                writer.add(name, tensor)
                continue
            module = name.removesuffix(".weight")
            writer.add(module + PACKED, pack_codes(tensor.codes_NK, tensor.bits))
            writer.add(module + SCALE, tensor.scale_NG.to(scale_dtype))
            writer.add(module + SHAPE, torch.tensor(tensor.codes_NK.shape, dtype=torch.int64))
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
