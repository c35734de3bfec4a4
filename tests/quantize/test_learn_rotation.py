"""Learned rotations: the formula against its definition, and against the rounding error it stands for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from nano.corpus import Windows
from quantize.calibrate import Calibration
from quantize.hadamard import randomised_hadamard
from quantize.learn_rotation import (
    Linears,
    Reader,
    Writer,
    learn_heads,
    learn_residual,
    learned_rotation,
    minimise,
    rounding_noise,
    turn_columns,
    turn_energy,
    turn_rows,
)
from quantize.recipe import Grid
from quantize.rotate import rotated
from quantize.rtn import round_to_nearest
from quantize.student import Student
from quantize.whole import whole_model

GRID = Grid(4, 32)


def normal(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def is_orthogonal(turn_BB: torch.Tensor) -> bool:
    identity_BB = torch.eye(turn_BB.shape[-1], dtype=torch.float64).expand_as(turn_BB)
    return torch.allclose(turn_BB.double() @ turn_BB.double().mT, identity_BB, atol=1e-5)


def test_the_noise_is_a_sum_over_rows_and_groups() -> None:
    weight_NK, energy_K = normal(3, 64), normal(64, seed=1).square()
    expected = 0.0
    for row in weight_NK:
        for start in (0, 32):
            group = row[start : start + 32]
            expected += float((group.abs() ** 8).mean()) ** (2 / 8) * float(energy_K[start : start + 32].sum())
    assert float(rounding_noise(weight_NK, energy_K, 32)) == pytest.approx(expected, rel=1e-4)


def test_the_noise_of_tiny_weights_and_of_groups_of_zeros() -> None:
    weight_NK, energy_K = normal(3, 64), torch.ones(64)
    weight_NK[1, 32:] = 0
    tiny_NK = (1e-6 * weight_NK).requires_grad_()
    noise = rounding_noise(tiny_NK, energy_K, 32)
    assert float(noise.detach()) == pytest.approx(1e-12 * float(rounding_noise(weight_NK, energy_K, 32)), rel=1e-4)
    noise.backward()  # type: ignore[no-untyped-call]
    assert tiny_NK.grad is not None
    assert bool(torch.isfinite(tiny_NK.grad).all())
    assert float(tiny_NK.grad.norm()) > 0
    dead = Linears({"a": torch.zeros(4, 64)}, {"a": torch.eye(64)}, {})
    assert float(dead.whole("a")) == float("inf")


def test_turned_energy_is_the_energy_of_turned_inputs() -> None:
    heads_GAA = torch.stack([randomised_hadamard(8, torch.Generator().manual_seed(i)) for i in range(2)])
    x_MK = normal(50, 48) @ normal(48, 48, seed=1)  # 6 query heads, 3 of each key/value head
    turned_MK = torch.cat([x_MK[:, h * 8 : h * 8 + 8] @ heads_GAA[h // 3] for h in range(6)], 1)
    expected_K = turned_MK.square().mean(0)
    assert torch.allclose(turn_energy(x_MK.T @ x_MK / 50, heads_GAA), expected_K, rtol=1e-4)
    weight_NK = normal(5, 48, seed=2)
    assert torch.allclose(turned_MK @ turn_columns(weight_NK, heads_GAA).T, x_MK @ weight_NK.T, atol=1e-3)
    value_NK = normal(16, 5, seed=3)
    expected = torch.cat([heads_GAA[g].T @ value_NK[g * 8 : g * 8 + 8] for g in range(2)])
    assert torch.allclose(turn_rows(value_NK, heads_GAA), expected, atol=1e-5)


def output_error(weight_NK: torch.Tensor, moments_KK: torch.Tensor) -> float:
    """Of real rounding, relative."""
    lost_NK = round_to_nearest(weight_NK, GRID).dequantize() - weight_NK
    return float((lost_NK @ moments_KK * lost_NK).sum() / (weight_NK @ moments_KK * weight_NK).sum())


def test_a_learned_residual_rotation_loses_less_to_real_rounding_than_its_start() -> None:
    inputs_MB = normal(2000, 96) * (0.05 + normal(96, seed=1).square()) @ normal(96, 96, seed=2)
    moments_BB = inputs_MB.T @ inputs_MB / 2000
    weight_NB = normal(64, 96, seed=3) @ torch.linalg.cholesky(moments_BB).inverse() + 0.1 * normal(64, 96, seed=4)
    out_BK = normal(96, 64, seed=5) * (1 + 5 * (normal(96, 1, seed=6) > 1.5))
    whole = (weight_NB @ moments_BB * weight_NB).sum()
    readers = [Reader(weight_NB, moments_BB, 32, whole)]
    writers = [Writer(out_BK, torch.ones(64), 32, out_BK.square().sum())]
    start_BB = randomised_hadamard(96, torch.Generator().manual_seed(0))
    found_BB = learn_residual(start_BB, readers, writers)
    assert is_orthogonal(found_BB)

    def loss(turn_BB: torch.Tensor) -> float:
        read = output_error(weight_NB @ turn_BB, turn_BB.T @ moments_BB @ turn_BB)
        return read + output_error(turn_BB.T @ out_BK, torch.eye(64))

    assert loss(found_BB) < 0.85 * loss(start_BB)


def test_learned_heads_lose_less_to_real_rounding_than_their_start() -> None:
    inputs_MK = normal(2000, 128) * (0.05 + normal(128, seed=1).square())  # 4 query heads of width 32, 2 kv heads
    moments = {"self_attn.o_proj": inputs_MK.T @ inputs_MK / 2000, "self_attn.v_proj": torch.eye(64)}
    weights = {
        "self_attn.o_proj": normal(64, 128, seed=2) * inputs_MK.std(0).rsqrt(),
        "self_attn.v_proj": normal(64, 64),
    }
    linears = Linears(weights, moments, dict.fromkeys(weights, GRID))
    start_GAA = torch.stack([randomised_hadamard(32, torch.Generator().manual_seed(i)) for i in range(2)])
    found_GAA = learn_heads(linears, start_GAA)
    assert is_orthogonal(found_GAA)

    def loss(heads_GAA: torch.Tensor) -> float:
        blocks_KK = torch.block_diag(*[heads_GAA[h // 2] for h in range(4)])  # type: ignore[no-untyped-call]
        turned_KK = blocks_KK.T @ moments["self_attn.o_proj"] @ blocks_KK
        out = output_error(turn_columns(weights["self_attn.o_proj"], heads_GAA), turned_KK)
        return out + output_error(turn_rows(weights["self_attn.v_proj"], heads_GAA), torch.eye(64))

    assert loss(found_GAA) < 0.95 * loss(start_GAA)
    nothing = Linears(weights, moments, {})
    assert torch.equal(learn_heads(nothing, start_GAA), start_GAA)


def test_what_does_not_get_better_stays() -> None:
    start_BB = randomised_hadamard(8, torch.Generator().manual_seed(0))
    assert torch.equal(minimise(lambda turn_BB: (turn_BB - start_BB).square().sum(), start_BB), start_BB)


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
def test_the_whole_of_it_keeps_the_function(
    family: str, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantize.learn_rotation.STEPS", 20)
    ids = tuple(np.random.default_rng(i).integers(3, 300, 32) for i in range(4))
    names = ("self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
    with Student(tiny_model(family, intermediate_size=88), 32) as student, torch.no_grad():
        grids = {f"model.layers.{i}.{name}": GRID for i in range(2) for name in names}
        with torch.enable_grad():
            rotation = learned_rotation(student, grids, Calibration(Windows(ids), {}), seed=0)
        assert (rotation.residual_DD is None) == (family == "gemma3_text")
        assert is_orthogonal(rotation.heads_LGAA)
        ids_BT = torch.from_numpy(np.stack(ids))
        found, expected = (whole_model(s)(ids_BT).logits for s in (rotated(student, rotation), student))
        assert float((found - expected).norm() / expected.norm()) < 1e-5
