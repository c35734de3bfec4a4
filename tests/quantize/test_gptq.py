"""GPTQ against slow independent references, and on inputs that break naive solvers."""

from __future__ import annotations

import pytest
import torch

from nano.errors import WorkError
from quantize.gptq import correct, curvature, descend, gptq, recursion, refit_scales, relative_error
from quantize.grid import round_to_codes
from quantize.recipe import Grid
from quantize.rtn import round_to_nearest
from quantize.scales import search_scales

GRID = Grid(4, 32)


def inputs(positions: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Correlated inputs, as a layer's are: white noise would make GPTQ equal to rounding."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64) / columns**0.5
    return torch.randn(positions, columns, generator=generator, dtype=torch.float64) @ (mix + 0.3)


def weights(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def loss(weight_NK: torch.Tensor, codes_NK: torch.Tensor, scale_NG: torch.Tensor, hessian_KK: torch.Tensor) -> float:
    error_NK = codes_NK.double() * scale_NG.double().repeat_interleave(32, 1) - weight_NK.double()
    return float((error_NK @ hessian_KK.double() * error_NK).sum())


def slow_codes(weight_NK: torch.Tensor, hessian_KK: torch.Tensor, scale_NG: torch.Tensor) -> torch.Tensor:
    """Column by column, the least-squares optimum of the free columns solved for anew after each rounding.

    That is what GPTQ's recursion does without solving again.
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
    weight_NK = weights(8, 160, 5)
    solve = curvature(x_MK.T @ x_MK / len(x_MK), 0.01)
    scale_NG = search_scales(weight_NK, 32)
    ours = recursion(weight_NK.double(), scale_NG, solve, GRID)
    slow = slow_codes(weight_NK, solve.hessian_KK, scale_NG)
    assert (ours == slow).float().mean() > 0.999  # a tie may fall either way


def test_the_factor_is_of_the_inverse_of_the_damped_curvature() -> None:
    x_MK = inputs(200, 48)
    mean_KK = x_MK.T @ x_MK / 200
    solve = curvature(mean_KK.clone(), 0.1)
    expected_KK = mean_KK + 0.1 * mean_KK.diagonal().mean() * torch.eye(48, dtype=torch.float64)
    assert torch.allclose(solve.hessian_KK, expected_KK)
    ordered_KK = expected_KK[solve.order_K][:, solve.order_K]
    product_KK = solve.factor_KK.T @ solve.factor_KK @ ordered_KK
    assert torch.allclose(product_KK, torch.eye(48, dtype=torch.float64), atol=1e-8)
    assert torch.equal(solve.factor_KK, solve.factor_KK.triu())


def test_the_target_is_the_ridge_regression_onto_the_wanted_outputs() -> None:
    x_MK, weight_NK = inputs(400, 32), weights(6, 32, 1).double()
    wanted_MN = x_MK @ weight_NK.T + 0.1 * inputs(400, 6, seed=3)
    solve = curvature(x_MK.T @ x_MK / 400, 0.01)
    missing_NK = (wanted_MN - x_MK @ weight_NK.T).T @ x_MK / 400
    target_NK = correct(weight_NK, missing_NK, solve)
    ridge = (0.01 * (x_MK * x_MK).sum(0).mean()) ** 0.5 * torch.eye(32, dtype=torch.float64)
    rows_MK = torch.cat([x_MK, ridge])
    rows_MN = torch.cat([wanted_MN, ridge @ weight_NK.T])  # the ridge pulls towards the float weight
    slow_NK = torch.linalg.lstsq(rows_MK, rows_MN).solution.T
    assert torch.allclose(target_NK, slow_NK, atol=1e-8)


def test_refinement_lowers_the_loss_to_a_local_optimum() -> None:
    x_MK, weight_NK = inputs(600, 160).float(), weights(8, 160, 2)
    solve = curvature(x_MK.T @ x_MK / 600, 0.01)
    scale_NG = search_scales(weight_NK, 32, 4, solve.importance_K)
    codes_NK = round_to_codes(weight_NK, scale_NG, 32)
    first = loss(weight_NK, codes_NK, scale_NG, solve.hessian_KK)
    refit_NG = refit_scales(weight_NK, codes_NK, scale_NG, solve, GRID)
    assert loss(weight_NK, codes_NK, refit_NG, solve.hessian_KK) < 0.5 * first
    assert torch.equal(refit_NG.bfloat16().float(), refit_NG)
    final_NK = descend(weight_NK, codes_NK, scale_NG, solve, GRID, sweeps=50)
    least = loss(weight_NK, final_NK, scale_NG, solve.hessian_KK)
    assert least < 0.5 * first
    for n, k, move in [(0, 3, 1), (5, 40, -1), (7, 159, 1), (2, 100, -1), (4, 64, 1)]:
        other_NK = final_NK.clone()
        other_NK[n, k] = int((other_NK[n, k] + move).clamp(-8, 7))
        assert loss(weight_NK, other_NK, scale_NG, solve.hessian_KK) >= least * (1 - 1e-6)


def test_error_is_far_below_rounding() -> None:
    x_MK, weight_NK = inputs(2000, 128).float(), weights(64, 128, 6)
    solve = curvature(x_MK.T @ x_MK / 2000, 0.01)
    solved = relative_error(weight_NK, weight_NK, gptq(weight_NK, solve, GRID).dequantize(), solve)
    rounded = relative_error(weight_NK, weight_NK, round_to_nearest(weight_NK, GRID).dequantize(), solve)
    assert solved < 0.4 * rounded


def test_dead_channels_singular_curvature_and_groups_of_zeros() -> None:
    x_MK = inputs(20, 64).float()  # fewer positions than channels: rank 20
    x_MK[:, 7] = 0
    weight_NK = weights(16, 64, 8)
    weight_NK[:, 32:] = 0
    solved = gptq(weight_NK, curvature(x_MK.T @ x_MK / 20, 0.01), GRID)
    assert bool(torch.isfinite(solved.dequantize()).all())
    assert not solved.codes_NK[:, 32:].any()
    inside_N = weight_NK[:, 7].abs() < 7 * solved.scale_NG[:, 0]
    channel_7 = (solved.dequantize()[:, 7] - weight_NK[:, 7]).abs()
    assert bool((channel_7 <= solved.scale_NG[:, 0] * 0.501)[inside_N].all())  # a dead channel is just rounded


def test_all_channels_dead() -> None:
    weight_NK = weights(4, 32, 9)
    solved = gptq(weight_NK, curvature(torch.zeros(32, 32), 0.01), GRID)
    assert (solved.dequantize() - weight_NK).square().mean() < 0.02


def test_infinite_curvature_is_said() -> None:
    with pytest.raises(WorkError, match="calibration inputs"):
        curvature(torch.full((32, 32), torch.inf), 0.01)
