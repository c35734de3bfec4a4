"""GPTQ: round a linear's input channels one after another, letting those still free make up for each error.

The output error of rounding W to Q is tr((W - Q) H (W - Q)^T) with H = X^T X over the calibration inputs.
Rounding column j by e_j shifts the optimum of the columns after it by -e_j U[j, j+1:] / U[j, j], where
U^T U = H^-1 and U is upper triangular (Frantar et al., 2210.17323, section 3.3). Columns go in falling order of
their curvature (their "activation order"); groups and their scales are fixed before, from the original columns
("static groups"), so the order costs nothing on the phone.

Legend: N output channels, K input channels, G groups, M positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nano.errors import WorkError
from quantize.grid import QuantizedTensor, code_range
from quantize.recipe import Grid
from quantize.scales import search_scales

BLOCK = 128
"""Columns rounded before the rest is updated in one product (the paper's lazy batch)."""

MOST_DAMPING = 1e3
"""Times the asked-for damping that is tried before giving up on a singular H."""


@dataclass
class Curvature:
    """Sum of x x^T over calibration positions, for one linear input.

    Attributes:
        sum_KK: float32.
        positions: M so far.
    """

    sum_KK: torch.Tensor
    positions: int = 0

    @classmethod
    def zeros(cls, columns: int, device: torch.device | None = None) -> Curvature:
        return cls(torch.zeros(columns, columns, device=device))

    def add(self, x_MK: torch.Tensor) -> None:
        """Take the inputs of some positions."""
        self.sum_KK.addmm_(x_MK.T, x_MK)
        self.positions += x_MK.shape[0]

    def mean(self) -> torch.Tensor:
        """(K, K), per position."""
        return self.sum_KK / max(self.positions, 1)


def inverse_factor(hessian_KK: torch.Tensor, damping: float) -> torch.Tensor:
    """Upper triangular U with U^T U = (H + damping x mean diagonal x I)^-1.

    H reversed in both directions has the Cholesky factor L; L reversed is upper triangular, R, with H = R R^T,
    so U = R^-1: one factorisation and one triangular inverse, no explicit H^-1. Damping grows tenfold while the
    factorisation fails (H of rank-deficient inputs is singular).

    Raises:
        WorkError: H is not finite, or stays singular.
    """
    k = hessian_KK.shape[0]
    level = hessian_KK.diagonal().mean().clamp_min(1e-12)
    identity_KK = torch.eye(k, device=hessian_KK.device, dtype=hessian_KK.dtype)
    factor = max(damping, 1e-6)
    while factor <= max(damping, 1e-6) * MOST_DAMPING:
        reversed_KK = (hessian_KK + factor * level * identity_KK).flip(0, 1)
        lower_KK, failed = torch.linalg.cholesky_ex(reversed_KK)
        if int(failed) == 0 and bool(torch.isfinite(lower_KK).all()):
            inverse_KK: torch.Tensor = torch.linalg.solve_triangular(lower_KK.flip(0, 1), identity_KK, upper=True)
            return inverse_KK
        factor *= 10
    raise WorkError(
        "The calibration inputs of a layer cannot be solved for.",
        found="a matrix of inputs that is not finite, or singular under heavy damping",
        todo="give other or more calibration text, or use --method rtn",
    )


def gptq(weight_NK: torch.Tensor, hessian_KK: torch.Tensor, grid: Grid, damping: float = 0.01) -> QuantizedTensor:
    """Codes and scales of a weight (N, K) for inputs whose mean x x^T is `hessian_KK`.

    Channels that never carry a signal are rounded to nearest and take no part in the solve.

    Raises:
        WorkError: see `inverse_factor`.
    """
    weight_NK = weight_NK.float()
    importance_K = hessian_KK.diagonal()
    dead_K = importance_K <= 0
    hessian_KK = hessian_KK.clone()
    hessian_KK.diagonal()[dead_K] = importance_K[~dead_K].mean() if bool((~dead_K).any()) else 1.0
    scale_NG = search_scales(weight_NK, grid.group_size, grid.bits, importance_K.clamp_min(1e-12))
    codes_NK = solve_codes(weight_NK, hessian_KK, scale_NG, grid, damping)
    # A group of zeros has no scale of its own to carry other channels' errors: it stays zero.
    empty_NG = (weight_NK.view(len(weight_NK), -1, grid.group_size) == 0).all(-1)
    codes_NK.view(len(weight_NK), -1, grid.group_size)[empty_NG] = 0
    return QuantizedTensor(codes_NK, scale_NG, grid.group_size, grid.bits)


def solve_codes(
    weight_NK: torch.Tensor, hessian_KK: torch.Tensor, scale_NG: torch.Tensor, grid: Grid, damping: float
) -> torch.Tensor:
    """int8 codes (N, K) on given scales, by GPTQ's recursion in falling order of curvature."""
    low, high = code_range(grid.bits)
    order_K = torch.argsort(hessian_KK.diagonal(), descending=True, stable=True)
    factor_KK = inverse_factor(hessian_KK[order_K][:, order_K], damping)
    scale_NK = scale_NG.repeat_interleave(grid.group_size, 1)[:, order_K]
    rest_NK = weight_NK[:, order_K].clone()
    codes_NK = torch.empty_like(rest_NK)
    columns = rest_NK.shape[1]
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        block_KK = factor_KK[start:stop, start:stop]
        errors_NB = torch.empty_like(rest_NK[:, start:stop])
        for j in range(stop - start):
            column_N, step_N = rest_NK[:, start + j], scale_NK[:, start + j]
            code_N = (column_N / step_N).round().clamp(low, high)
            codes_NK[:, start + j] = code_N
            errors_NB[:, j] = (column_N - code_N * step_N) / block_KK[j, j]
            rest_NK[:, start + j : stop].addr_(errors_NB[:, j], block_KK[j, j:], alpha=-1.0)
        rest_NK[:, stop:].addmm_(errors_NB, factor_KK[start:stop, stop:], alpha=-1.0)
    return codes_NK[:, torch.argsort(order_K)].to(torch.int8)


def relative_error(weight_NK: torch.Tensor, solved_NK: torch.Tensor, hessian_KK: torch.Tensor) -> float:
    """Squared output error over squared output, on the calibration inputs; 0 where the output is all zero."""
    error_NK = (weight_NK - solved_NK).float()
    lost = (error_NK @ hessian_KK * error_NK).sum().double()
    whole = (weight_NK.float() @ hessian_KK * weight_NK.float()).sum().double()
    return float(lost / whole) if float(whole) > 0 else 0.0
