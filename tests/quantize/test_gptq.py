"""GPTQ against a slow independent reference, and on inputs that break naive solvers."""

from __future__ import annotations

import pytest
import torch

from nano.errors import WorkError
from quantize.gptq import Curvature, gptq, inverse_factor, relative_error, solve_codes
from quantize.recipe import Grid
from quantize.rtn import round_to_nearest
from quantize.scales import search_scales

GRID = Grid(4, 32)


def inputs(positions: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Correlated inputs, as a layer's are: white noise would make GPTQ equal to rounding."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64) / columns**0.5
    return torch.randn(positions, columns, generator=generator, dtype=torch.float64) @ (mix + 0.3)


def slow_codes(weight_NK: torch.Tensor, hessian_KK: torch.Tensor, scale_NG: torch.Tensor) -> torch.Tensor:
    """Optimal brain quantization column by column: the least-squares optimum of the free columns is solved for anew.

    After each rounding the remaining columns minimise tr((W - Q) H (W - Q)^T) exactly, which is what GPTQ's
    recursion does without solving again.
    """
    original, q_NK = weight_NK.double(), torch.zeros_like(weight_NK, dtype=torch.float64)
    order = torch.argsort(hessian_KK.diagonal(), descending=True, stable=True).tolist()
    current, codes = original.clone(), torch.zeros_like(original)
    for position, j in enumerate(order):
        step = scale_NG[:, j // 32].double()
        codes[:, j] = (current[:, j] / step).round().clamp(-8, 7)
        q_NK[:, j] = codes[:, j] * step
        done, free = order[: position + 1], order[position + 1 :]
        if free:
            pull = (original[:, done] - q_NK[:, done]) @ hessian_KK[done][:, free]
            current[:, free] = original[:, free] + pull @ torch.linalg.inv(hessian_KK[free][:, free])
    return codes.to(torch.int8)


def test_codes_equal_the_slow_reference_across_a_block_border() -> None:
    x_MK = inputs(600, 160)
    weight_NK = torch.randn(8, 160, generator=torch.Generator().manual_seed(5))
    damping = 0.01
    mean_KK = x_MK.T @ x_MK / len(x_MK)
    damped_KK = mean_KK + damping * mean_KK.diagonal().mean() * torch.eye(160, dtype=torch.float64)
    scale_NG = search_scales(weight_NK, 32)
    ours = solve_codes(weight_NK.double(), mean_KK, scale_NG, GRID, damping)
    slow = slow_codes(weight_NK, damped_KK, scale_NG)
    assert (ours == slow).float().mean() > 0.999  # a tie may fall either way


def test_error_is_far_below_rounding() -> None:
    x_MK = inputs(2000, 128).float()
    weight_NK = torch.randn(64, 128, generator=torch.Generator().manual_seed(6))
    hessian_KK = x_MK.T @ x_MK / len(x_MK)
    solved = relative_error(weight_NK, gptq(weight_NK, hessian_KK, GRID).dequantize(), hessian_KK)
    rounded = relative_error(weight_NK, round_to_nearest(weight_NK, GRID).dequantize(), hessian_KK)
    assert solved < 0.5 * rounded


def test_inverse_factor_is_the_factor_of_the_inverse() -> None:
    x_MK = inputs(200, 48)
    hessian_KK = x_MK.T @ x_MK
    factor_KK = inverse_factor(hessian_KK, 0.1)
    damped_KK = hessian_KK + 0.1 * hessian_KK.diagonal().mean() * torch.eye(48, dtype=torch.float64)
    assert torch.allclose(factor_KK.T @ factor_KK @ damped_KK, torch.eye(48, dtype=torch.float64), atol=1e-8)
    assert torch.equal(factor_KK, factor_KK.triu())


def test_dead_channels_and_singular_curvature() -> None:
    x_MK = inputs(20, 64).float()  # fewer positions than channels: H has rank 20
    x_MK[:, 7] = 0
    weight_NK = torch.randn(16, 64, generator=torch.Generator().manual_seed(8))
    weight_NK[:, 32:] = 0
    hessian_KK = x_MK.T @ x_MK / len(x_MK)
    solved = gptq(weight_NK, hessian_KK, GRID)
    assert bool(torch.isfinite(solved.dequantize()).all())
    assert not solved.codes_NK[:, 32:].any()
    channel_7 = solved.dequantize()[:, 7] - weight_NK[:, 7]
    assert bool((channel_7.abs() <= solved.scale_NG[:, 0] / 2 + 1e-6)[weight_NK[:, 7].abs() < 7 * solved.scale_NG[:, 0]].all())  # noqa: E501  # fmt: skip


def test_all_channels_dead() -> None:
    weight_NK = torch.randn(4, 32, generator=torch.Generator().manual_seed(9))
    solved = gptq(weight_NK, torch.zeros(32, 32), GRID)
    assert torch.equal(solved.codes_NK, round_to_nearest(weight_NK, GRID).codes_NK)


def test_infinite_curvature_is_said() -> None:
    with pytest.raises(WorkError, match="calibration inputs"):
        gptq(torch.randn(4, 32), torch.full((32, 32), torch.inf), GRID)


def test_curvature_is_the_mean_outer_product() -> None:
    x_MK = inputs(50, 8).float()
    total = Curvature.zeros(8)
    total.add(x_MK[:20])
    total.add(x_MK[20:])
    slow = sum(torch.outer(x, x) for x in x_MK) / 50
    assert torch.allclose(total.mean(), slow, rtol=1e-4)
