"""Round to nearest: each weight to its closest code, scales by the least squared error. No text needed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from nano.families import layer_prefix
from quantize.grid import QuantizedTensor, round_to_codes
from quantize.layers import LayerResult
from quantize.recipe import Grid
from quantize.scales import search_scales
from quantize.student import Student


def round_to_nearest(weight_NK: torch.Tensor, grid: Grid) -> QuantizedTensor:
    """A weight (N, K) on a grid; a group of zeros gets codes of zero."""
    scale_NG = search_scales(weight_NK, grid.group_size, grid.bits)
    codes_NK = round_to_codes(weight_NK, scale_NG, grid.group_size, grid.bits)
    return QuantizedTensor(codes_NK, scale_NG, grid.group_size, grid.bits)


def rounded_layers(student: Student, grids: Mapping[str, Grid]) -> Iterator[LayerResult]:
    """Layer after layer rounded to nearest; errors are of the weights, relative and squared."""
    for layer in range(student.shape.num_layers):
        result = LayerResult()
        for module, grid in grids.items():
            if module.startswith(layer_prefix(layer)):
                weight_NK = student.tensor(module + ".weight").float()
                solved = round_to_nearest(weight_NK, grid)
                lost = (solved.dequantize() - weight_NK).square().sum()
                result.weights[module] = solved
                result.error[module] = float(lost / weight_NK.square().sum().clamp_min(1e-30))
        result.rounding_error = dict(result.error)
        yield result
