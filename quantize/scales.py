"""Group scales: as small as the data allows, chosen to leave the least squared error, always exactly a bfloat16.

A scale that just covers the largest weight of a group spends codes on an outlier; a smaller one clips it and
resolves the rest more finely. Which is better is a one-dimensional question a group, answered by trying a ladder
of shrink factors (as GPTQ's and AWQ's `mse` options do), each candidate rounded to bfloat16 *before* its error is
measured, because the phone's kernel stores it so.

Legend: N output channels, K input channels, G groups, g group size.
"""

from __future__ import annotations

import torch

from quantize.grid import bf16_exact, code_range

LADDER = (1.10, 0.50, 61)
"""Largest shrink factor, smallest, and how many are tried: below 0.5 no group of real models had its optimum."""


def absmax_scales(weight_NK: torch.Tensor, group_size: int, bits: int = 4) -> torch.Tensor:
    """Scales (N, G) that cover each group's largest magnitude: the plain grid."""
    n, k = weight_NK.shape
    _, high = code_range(bits)
    return bf16_exact(weight_NK.float().view(n, k // group_size, group_size).abs().amax(-1) / high)


def search_scales(
    weight_NK: torch.Tensor, group_size: int, bits: int = 4, importance_K: torch.Tensor | None = None
) -> torch.Tensor:
    """Scales (N, G) with the least squared rounding error.

    Args:
        weight_NK: the weight.
        group_size: g, divides K.
        bits: 4 or 8.
        importance_K: how much an input channel's error counts (mean squared activation); all alike when None.
    """
    n, k = weight_NK.shape
    low, high = code_range(bits)
    weight_NGg = weight_NK.float().view(n, k // group_size, group_size)
    importance_Gg = None if importance_K is None else importance_K.float().view(1, -1, group_size)
    largest_NG = weight_NGg.abs().amax(-1) / high
    best_NG = bf16_exact(largest_NG)
    least_NG = torch.full_like(largest_NG, torch.inf)
    for factor in torch.linspace(*LADDER).tolist():
        scale_NG = bf16_exact(largest_NG * factor)
        rounded_NGg = (weight_NGg / scale_NG[..., None]).round_().clamp_(low, high).mul_(scale_NG[..., None])
        error_NGg = rounded_NGg.sub_(weight_NGg).square_()
        error_NG = (error_NGg if importance_Gg is None else error_NGg.mul_(importance_Gg)).sum(-1)
        better_NG = error_NG < least_NG
        best_NG = torch.where(better_NG, scale_NG, best_NG)
        least_NG = torch.where(better_NG, error_NG, least_NG)
    return best_NG
