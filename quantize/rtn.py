"""Round to nearest: each weight to its closest code, scales by the least squared error. No text needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch

from nano.families import EMBEDDING, HEAD, layer_prefix
from quantize.grid import QuantizedTensor, round_to_codes
from quantize.layers import Finished, LayerResult
from quantize.recipe import Grid
from quantize.scales import search_scales, search_zero_points
from quantize.student import Student
from quantize.tables import half_exact
from quantize.view import StudentView

SLAB = 1 << 24
"""Weights rounded at once: a search holds several float32 copies of them, and an embedding may have 700 M."""


def round_to_nearest(weight_NK: torch.Tensor, grid: Grid) -> QuantizedTensor:
    """A weight (N, K) on a grid; a group of zeros gets codes of zero."""
    bits, group = grid.bits, grid.group_size

    def rounded(rows_RK: torch.Tensor) -> QuantizedTensor:
        zero_RG = None
        if grid.symmetric:
            scale_RG = search_scales(rows_RK, group, bits)
        else:
            scale_RG, zero_RG = search_zero_points(rows_RK, group, bits)
        return QuantizedTensor(round_to_codes(rows_RK, scale_RG, group, bits, zero_RG), scale_RG, group, bits, zero_RG)

    return _by_rows(weight_NK, rounded)


def round_table(weight_VD: torch.Tensor, grid: Grid) -> QuantizedTensor:
    """An embedding (V, D) on a symmetric grid whose values an int4 folder can hold densely (`quantize.tables`)."""
    bits, group = grid.bits, grid.group_size

    def rounded(rows_RD: torch.Tensor) -> QuantizedTensor:
        scale_RG = search_scales(rows_RD, group, bits, exact=lambda scale: half_exact(scale, bits))
        return QuantizedTensor(round_to_codes(rows_RD, scale_RG, group, bits), scale_RG, group, bits)

    return _by_rows(weight_VD, rounded)


def _by_rows(weight_NK: torch.Tensor, rounded: Callable[[torch.Tensor], QuantizedTensor]) -> QuantizedTensor:
    """Round a weight slab by slab."""
    step = max(1, SLAB // weight_NK.shape[1])
    parts = [rounded(weight_NK[start : start + step]) for start in range(0, len(weight_NK), step)]
    if len(parts) == 1:
        return parts[0]
    zeros = [part.zero_NG for part in parts if part.zero_NG is not None]
    return QuantizedTensor(
        torch.cat([part.codes_NK for part in parts]),
        torch.cat([part.scale_NG for part in parts]),
        parts[0].group_size,
        parts[0].bits,
        torch.cat(zeros) if zeros else None,
    )


def rounded_ends(student: Student, grids: Mapping[str, Grid]) -> Student:
    """The student with embedding and head as they will be on their grids; itself where both stay float."""
    if EMBEDDING not in grids and HEAD not in grids:
        return student

    def change(name: str) -> torch.Tensor:
        module = name.removesuffix(".weight")
        weight = student.tensor(name)
        if module not in (EMBEDDING, HEAD) or module not in grids:
            return weight
        return (round_table if module == EMBEDDING else round_to_nearest)(weight, grids[module]).dequantize()

    return StudentView(student, change)


def rounded_layers(student: Student, grids: Mapping[str, Grid], finished: Finished) -> Iterator[LayerResult]:
    """Layer after layer rounded to nearest; errors are of the weights, relative and squared."""
    for layer in range(student.shape.num_layers):
        result = finished(layer) or LayerResult()
        for module, grid in grids.items():
            if module.startswith(layer_prefix(layer)) and module not in result.weights:
                weight_NK = student.tensor(module + ".weight").float()
                solved = round_to_nearest(weight_NK, grid)
                lost = (solved.dequantize() - weight_NK).square().sum()
                result.weights[module] = solved
                result.error[module] = float(lost / weight_NK.square().sum().clamp_min(1e-30))
        result.rounding_error = dict(result.error)
        student.store.release()
        yield result
