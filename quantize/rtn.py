"""Round to nearest: each weight to its closest code, scales by the least squared error. No text needed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from nano.families import layer_prefix
from quantize.grid import QuantizedTensor, round_to_codes
from quantize.layers import Finished, LayerResult
from quantize.recipe import Grid
from quantize.scales import search_scales, search_zero_points
from quantize.student import Student
from quantize.tables import half_exact


def round_to_nearest(weight_NK: torch.Tensor, grid: Grid) -> QuantizedTensor:
    """A weight (N, K) on a grid; a group of zeros gets codes of zero."""
    zero_NG = None
    if grid.symmetric:
        scale_NG = search_scales(weight_NK, grid.group_size, grid.bits)
    else:
        scale_NG, zero_NG = search_zero_points(weight_NK, grid.group_size, grid.bits)
    codes_NK = round_to_codes(weight_NK, scale_NG, grid.group_size, grid.bits, zero_NG)
    return QuantizedTensor(codes_NK, scale_NG, grid.group_size, grid.bits, zero_NG)


def round_table(weight_VD: torch.Tensor, grid: Grid) -> QuantizedTensor:
    """An embedding (V, D) on a symmetric grid whose values an int4 folder can hold densely (`quantize.tables`)."""
    bits, group = grid.bits, grid.group_size
    scale_VG = search_scales(weight_VD, group, bits, exact=lambda scale: half_exact(scale, bits))
    return QuantizedTensor(round_to_codes(weight_VD, scale_VG, group, bits), scale_VG, group, bits)


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
        yield result
