"""Group scales: as small as the data allows, chosen to leave the least squared error, always exactly a bfloat16.

A scale that just covers the largest weight of a group spends codes on an outlier; a smaller one clips it and
resolves the rest more finely. Which is better is a one-dimensional question a group, answered by trying a ladder
of shrink factors (as GPTQ's and AWQ's `mse` options do), each candidate rounded to bfloat16 *before* its error is
measured, because the phone's kernel stores it so.

Legend: N output channels, K input channels, G groups, g group size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from quantize.grid import bf16_exact, code_range

LADDER = (1.10, 0.50, 61)
"""Largest shrink factor, smallest, and how many are tried: below 0.5 no group of real models had its optimum."""


ASYMMETRIC_LADDER = (1.05, 0.55, 41)
"""The same for asymmetric grids, whose ends are both drawn in at once."""


CACHED = 1 << 17
"""Weights searched at once on a CPU: 512 KiB that the ladder's sixty passes find in the core's cache each time."""


def absmax_scales(weight_NK: torch.Tensor, group_size: int, bits: int = 4) -> torch.Tensor:
    """Scales (N, G) that cover each group's largest magnitude: the plain grid."""
    n, k = weight_NK.shape
    _, high = code_range(bits)
    return bf16_exact(weight_NK.float().view(n, k // group_size, group_size).abs().amax(-1) / high)


def search_scales(
    weight_NK: torch.Tensor,
    group_size: int,
    bits: int = 4,
    importance_K: torch.Tensor | None = None,
    exact: Callable[[torch.Tensor], torch.Tensor] = bf16_exact,
) -> torch.Tensor:
    """Scales (N, G) with the least squared rounding error.

    Args:
        weight_NK: the weight.
        group_size: g, divides K.
        bits: 4 or 8.
        importance_K: how much an input channel's error counts (mean squared activation); all alike when None.
        exact: rounds a scale to one that can be stored.
    """
    rows = max(1, CACHED // weight_NK.shape[1]) if weight_NK.device.type == "cpu" else len(weight_NK)
    found = [_search(part_nK, group_size, bits, importance_K, exact) for part_nK in weight_NK.split(rows)]  # type: ignore[no-untyped-call]
    return torch.cat(found)


def _search(
    weight_NK: torch.Tensor,
    group_size: int,
    bits: int,
    importance_K: torch.Tensor | None,
    exact: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """`search_scales` for some rows."""
    n, k = weight_NK.shape
    low, high = code_range(bits)
    weight_NGg = weight_NK.float().view(n, k // group_size, group_size)
    importance_Gg = None if importance_K is None else importance_K.float().view(1, -1, group_size)
    largest_NG = weight_NGg.abs().amax(-1) / high
    best_NG = exact(largest_NG)
    least_NG = torch.full_like(largest_NG, torch.inf)
    for factor in torch.linspace(*LADDER).tolist():
        scale_NG = exact(largest_NG * factor)
        rounded_NGg = (weight_NGg / scale_NG[..., None]).round_().clamp_(low, high).mul_(scale_NG[..., None])
        error_NGg = rounded_NGg.sub_(weight_NGg).square_()
        error_NG = (error_NGg if importance_Gg is None else error_NGg.mul_(importance_Gg)).sum(-1)
        better_NG = error_NG < least_NG
        best_NG = torch.where(better_NG, scale_NG, best_NG)
        least_NG = torch.where(better_NG, error_NG, least_NG)
    return best_NG


def search_zero_points(
    weight_NK: torch.Tensor, group_size: int, bits: int = 4, importance_K: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales (N, G) and zero points (N, G), int8, with the least squared rounding error.

    The symmetric grid with its best scale is among the candidates, so the result is never worse than that. The
    others cover a group's range from its smallest to its largest weight (0 included), drawn in by a factor; a zero
    point is the code nearest to where 0.0 falls.
    """
    n, k = weight_NK.shape
    low, high = code_range(bits)
    weight_NGg = weight_NK.float().view(n, k // group_size, group_size)
    importance_Gg = None if importance_K is None else importance_K.float().view(1, -1, group_size)
    bottom_NG, top_NG = weight_NGg.amin(-1).clamp_max(0), weight_NGg.amax(-1).clamp_min(0)

    def error_of(scale_NG: torch.Tensor, zero_NG: torch.Tensor) -> torch.Tensor:
        levels_NGg = (weight_NGg / scale_NG[..., None]).round_()
        least, most = (low - zero_NG)[..., None], (high - zero_NG)[..., None]
        levels_NGg = torch.minimum(torch.maximum(levels_NGg, least), most)
        error_NGg = levels_NGg.mul_(scale_NG[..., None]).sub_(weight_NGg).square_()
        return (error_NGg if importance_Gg is None else error_NGg.mul_(importance_Gg)).sum(-1)

    best_NG = search_scales(weight_NK, group_size, bits, importance_K)
    best_zero_NG = torch.zeros_like(best_NG)
    least_NG = error_of(best_NG, best_zero_NG)
    for factor in torch.linspace(*ASYMMETRIC_LADDER).tolist():
        scale_NG = bf16_exact((top_NG - bottom_NG) * factor / (high - low))
        zero_NG = (low - bottom_NG * factor / scale_NG).round_().clamp_(low, high)
        error_NG = error_of(scale_NG, zero_NG)
        better_NG = error_NG < least_NG
        best_NG = torch.where(better_NG, scale_NG, best_NG)
        best_zero_NG = torch.where(better_NG, zero_NG, best_zero_NG)
        least_NG = torch.where(better_NG, error_NG, least_NG)
    return best_NG, best_zero_NG.to(torch.int8)
