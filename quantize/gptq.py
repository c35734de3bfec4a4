"""GPTQ: round a linear's input channels one after another, letting those still free make up for each error.

Three parts, each lowering the same objective, tr((Q - T) H (Q - T)^T) with H = X^T X over the calibration inputs:

1. *Target.* The inputs X that a linear sees are already off the float network's F, because the layers before it
   are rounded. The best real-valued weight for them is not W but the least-squares solution
   T = (W F^T X + residual^T X)(X^T X + damping)^-1 = W + (W (F - X)^T X + residual^T X) (H + damping)^-1
   (GPTAQ, 2504.02692, adds the same first term inside the recursion). Where the linear writes to the residual
   stream, that stream's own error is added to what it should make up for.
2. *Recursion.* Rounding column j by e_j shifts the optimum of the columns after it by -e_j U[j, j+1:] / U[j, j]
   with U^T U = H^-1, U upper triangular (GPTQ, 2210.17323, section 3.3). Columns go in falling order of their
   curvature; groups and scales are fixed before ("static groups"), so the order costs nothing on the phone.
3. *Refinement.* With the codes known, each group's scale has a least-squares optimum; the recursion is run once
   more on those, and then every code is moved to its own optimum given all others, a few sweeps (coordinate
   descent; QuantEase, 2309.01885).

Legend: N output channels, K input channels, G groups, g group size, B columns of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nano.errors import WorkError
from quantize.grid import QuantizedTensor, bf16_exact, code_range
from quantize.recipe import Grid
from quantize.scales import search_scales, search_zero_points

BLOCK = 128
"""Columns rounded before the rest is updated in one product (the paper's lazy batch)."""

SWEEPS = 3
"""Of coordinate descent; on stories260K a fourth changed fewer than 0.1% of the codes."""

MOST_DAMPING = 1e3
"""Times the asked-for damping that is tried before giving up on a singular H."""


@dataclass(frozen=True)
class Curvature:
    """What a solve needs to know of a linear's inputs; shared by the linears that share them.

    Attributes:
        hessian_KK: mean x x^T, damped; dead channels have the mean curvature and no coupling.
        importance_K: mean x^2, undamped, at least a tiny positive number.
        order_K: channels in falling order of importance.
        factor_KK: upper triangular U with U^T U = H^-1, H with rows and columns in that order.
    """

    hessian_KK: torch.Tensor
    importance_K: torch.Tensor
    order_K: torch.Tensor
    factor_KK: torch.Tensor


def curvature(mean_KK: torch.Tensor, damping: float) -> Curvature:
    """Prepare a solve from the mean x x^T (K, K) of a linear's inputs.

    At K = 10,752 each such matrix is 441 MiB, so as few as possible exist at once.

    Args:
        mean_KK: mean outer product over calibration positions; becomes the damped Hessian.
        damping: share of the mean diagonal added to the diagonal; grown tenfold while H stays singular.

    Raises:
        WorkError: H is not finite, or stays singular.
    """
    importance_K = mean_KK.diagonal().clone()
    live_K = importance_K > 0
    level = importance_K[live_K].mean() if bool(live_K.any()) else torch.ones_like(importance_K[:1]).mean()
    hessian_KK = mean_KK
    diagonal_K = hessian_KK.diagonal()
    diagonal_K[~live_K] = level
    order_K = torch.argsort(diagonal_K, descending=True, stable=True)
    share, added = max(damping, 1e-6), 0.0
    while share <= max(damping, 1e-6) * MOST_DAMPING:
        diagonal_K += (share - added) * level
        added = share
        factor_KK = _inverse_factor(hessian_KK, order_K)
        if factor_KK is not None:
            return Curvature(hessian_KK, importance_K.clamp_min(1e-12), order_K, factor_KK)
        share *= 10
    raise WorkError(
        "The calibration inputs of a layer cannot be solved for.",
        found="a matrix of inputs that is not finite, or singular under heavy damping",
        todo="give other or more calibration text, or use --method rtn",
    )


def _inverse_factor(hessian_KK: torch.Tensor, order_K: torch.Tensor) -> torch.Tensor | None:
    """Upper triangular U with U^T U = H^-1, H's rows and columns taken in `order_K`; None if H is not definite.

    H reversed in both directions has the Cholesky factor L; L reversed is upper triangular, R, with H = R R^T,
    so U = R^-1: one factorisation and one triangular inverse, no explicit H^-1.
    """
    reversed_K = order_K.flip(0)
    lower_KK, failed = torch.linalg.cholesky_ex(hessian_KK[reversed_K][:, reversed_K])
    if int(failed) or not bool(torch.isfinite(lower_KK.diagonal()).all()):
        return None
    upper_KK = lower_KK.flip(0, 1)
    del lower_KK
    identity_KK = torch.eye(len(hessian_KK), dtype=hessian_KK.dtype, device=hessian_KK.device)
    inverse_KK: torch.Tensor = torch.linalg.solve_triangular(upper_KK, identity_KK, upper=True)
    return inverse_KK


def correct(weight_NK: torch.Tensor, missing_NK: torch.Tensor, solve: Curvature) -> torch.Tensor:
    """The target T: the weight whose output makes up for what is missing.

    Args:
        weight_NK: the float weight.
        missing_NK: mean of (wanted output - weight's output on the real inputs) x^T.
        solve: of the real inputs.
    """
    missing_ordered_NK = missing_NK[:, solve.order_K]
    shift_NK = torch.empty_like(missing_NK)
    shift_NK[:, solve.order_K] = missing_ordered_NK @ solve.factor_KK.T @ solve.factor_KK
    return weight_NK + shift_NK


def gptq(target_NK: torch.Tensor, solve: Curvature, grid: Grid, refine: bool = True) -> QuantizedTensor:
    """Codes, scales and zero points nearest in output to a weight (N, K), for inputs of a given curvature.

    Zero points are fixed before: (code - zero) x scale - target = code x scale - (target + zero x scale), so an
    asymmetric grid is the symmetric problem for a shifted target, and only a new scale must be fitted to levels,
    code - zero. A group of zeros has no scale of its own to carry other channels' errors: it stays zero.
    """
    target_NK = target_NK.float()
    zero_NG = None
    if grid.symmetric:
        scale_NG = search_scales(target_NK, grid.group_size, grid.bits, solve.importance_K)
    else:
        scale_NG, zero_NG = search_zero_points(target_NK, grid.group_size, grid.bits, solve.importance_K)
    codes_NK = recursion(_shifted(target_NK, scale_NG, zero_NG, grid), scale_NG, solve, grid)
    if not refine:
        return QuantizedTensor(
            _with_empty_groups(target_NK, codes_NK, zero_NG, grid), scale_NG, grid.group_size, grid.bits, zero_NG
        )
    levels_NK = (
        codes_NK if zero_NG is None else codes_NK.float() - zero_NG.float().repeat_interleave(grid.group_size, 1)
    )
    scale_NG = refit_scales(target_NK, levels_NK, scale_NG, solve, grid)
    shifted_NK = _shifted(target_NK, scale_NG, zero_NG, grid)
    codes_NK = recursion(shifted_NK, scale_NG, solve, grid)
    codes_NK = descend(shifted_NK, codes_NK, scale_NG, solve, grid)
    return QuantizedTensor(
        _with_empty_groups(target_NK, codes_NK, zero_NG, grid), scale_NG, grid.group_size, grid.bits, zero_NG
    )


def _with_empty_groups(
    target_NK: torch.Tensor, codes_NK: torch.Tensor, zero_NG: torch.Tensor | None, grid: Grid
) -> torch.Tensor:
    """The codes with 0.0 where a whole group is zero."""
    empty_NG = (target_NK.view(len(target_NK), -1, grid.group_size) == 0).all(-1)
    nothing = 0 if zero_NG is None else zero_NG[empty_NG][:, None]
    codes_NK.view(len(target_NK), -1, grid.group_size)[empty_NG] = nothing
    return codes_NK


def _shifted(target_NK: torch.Tensor, scale_NG: torch.Tensor, zero_NG: torch.Tensor | None, grid: Grid) -> torch.Tensor:
    """target + zero x scale."""
    if zero_NG is None:
        return target_NK
    return target_NK + (zero_NG * scale_NG).repeat_interleave(grid.group_size, 1)


def recursion(target_NK: torch.Tensor, scale_NG: torch.Tensor, solve: Curvature, grid: Grid) -> torch.Tensor:
    """int8 codes (N, K) on given scales, by GPTQ's recursion."""
    low, high = code_range(grid.bits)
    scale_NK = scale_NG.repeat_interleave(grid.group_size, 1)[:, solve.order_K]
    rest_NK = target_NK[:, solve.order_K].clone()
    codes_NK = torch.empty_like(rest_NK)
    for start in range(0, rest_NK.shape[1], BLOCK):
        stop = min(start + BLOCK, rest_NK.shape[1])
        block_BB = solve.factor_KK[start:stop, start:stop]
        errors_NB = torch.empty_like(rest_NK[:, start:stop])
        for j in range(stop - start):
            column_N, step_N = rest_NK[:, start + j], scale_NK[:, start + j]
            code_N = (column_N / step_N).round().clamp(low, high)
            codes_NK[:, start + j] = code_N
            errors_NB[:, j] = (column_N - code_N * step_N) / block_BB[j, j]
            rest_NK[:, start + j : stop].addr_(errors_NB[:, j], block_BB[j, j:], alpha=-1.0)
        rest_NK[:, stop:].addmm_(errors_NB, solve.factor_KK[start:stop, stop:], alpha=-1.0)
    return codes_NK[:, torch.argsort(solve.order_K)].to(torch.int8)


def refit_scales(
    target_NK: torch.Tensor, codes_NK: torch.Tensor, scale_NG: torch.Tensor, solve: Curvature, grid: Grid
) -> torch.Tensor:
    """Scales (N, G), each in turn at its least-squares optimum for given codes, and a bfloat16 again.

    On an asymmetric grid `codes_NK` are levels: codes less their zero point.
    """
    scale_NG, codes_NK = scale_NG.clone(), codes_NK.float()
    solved_NK = codes_NK * scale_NG.repeat_interleave(grid.group_size, 1)
    slope_NK = (solved_NK - target_NK) @ solve.hessian_KK
    for group in range(scale_NG.shape[1]):
        part = slice(group * grid.group_size, (group + 1) * grid.group_size)
        codes_Ng = codes_NK[:, part]
        bend_N = (codes_Ng @ solve.hessian_KK[part, part] * codes_Ng).sum(1)
        wanted_N = scale_NG[:, group] - (slope_NK[:, part] * codes_Ng).sum(1) / bend_N.clamp_min(1e-30)
        usable_N = (bend_N > 0) & (wanted_N > 0)
        new_N = torch.where(usable_N, bf16_exact(wanted_N.clamp_min(0)), scale_NG[:, group])
        moved_Ng = codes_Ng * (new_N - scale_NG[:, group])[:, None]
        slope_NK.addmm_(moved_Ng, solve.hessian_KK[part])
        scale_NG[:, group] = new_N
    return scale_NG


def descend(
    target_NK: torch.Tensor,
    codes_NK: torch.Tensor,
    scale_NG: torch.Tensor,
    solve: Curvature,
    grid: Grid,
    sweeps: int = SWEEPS,
) -> torch.Tensor:
    """Codes, each moved to its optimum given all others, column by column, `sweeps` times or until none moves."""
    low, high = code_range(grid.bits)
    order_K = solve.order_K
    hessian_KK = solve.hessian_KK[order_K][:, order_K]
    step_NK = scale_NG.repeat_interleave(grid.group_size, 1)[:, order_K]
    codes = codes_NK[:, order_K].float()
    slope_NK = (codes * step_NK - target_NK[:, order_K]) @ hessian_KK
    for _ in range(sweeps):
        before = codes.clone()
        for start in range(0, codes.shape[1], BLOCK):
            part = slice(start, min(start + BLOCK, codes.shape[1]))
            slope_NB, block_BB, old_NB = slope_NK[:, part].clone(), hessian_KK[part, part], codes[:, part].clone()
            for j in range(block_BB.shape[0]):
                column = start + j
                ideal_N = codes[:, column] - slope_NB[:, j] / (block_BB[j, j] * step_NK[:, column])
                moved_N = ideal_N.round().clamp(low, high) - codes[:, column]
                codes[:, column] += moved_N
                slope_NB.addr_(moved_N * step_NK[:, column], block_BB[j])
            slope_NK.addmm_((codes[:, part] - old_NB) * step_NK[:, part], hessian_KK[part])
        if torch.equal(before, codes):
            break
    return codes[:, torch.argsort(order_K)].to(torch.int8)


def relative_error(
    weight_NK: torch.Tensor, target_NK: torch.Tensor, solved_NK: torch.Tensor, solve: Curvature
) -> float:
    """Squared output error against the target over the squared output; 0 where the output is all zero."""
    error_NK = (target_NK - solved_NK).float()
    lost = (error_NK @ solve.hessian_KK * error_NK).sum().double()
    whole = (weight_NK.float() @ solve.hessian_KK * weight_NK.float()).sum().double()
    return float(lost / whole) if float(whole) > 0 else 0.0
