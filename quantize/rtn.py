"""Round to nearest: each weight to its closest code, scales by the least squared error. No text needed."""

from __future__ import annotations

import torch

from quantize.grid import QuantizedTensor, round_to_codes
from quantize.recipe import Grid
from quantize.scales import search_scales


def round_to_nearest(weight_NK: torch.Tensor, grid: Grid) -> QuantizedTensor:
    """A weight (N, K) on a grid; a group of zeros gets codes of zero."""
    scale_NG = search_scales(weight_NK, grid.group_size, grid.bits)
    codes_NK = round_to_codes(weight_NK, scale_NG, grid.group_size, grid.bits)
    return QuantizedTensor(codes_NK, scale_NG, grid.group_size, grid.bits)
