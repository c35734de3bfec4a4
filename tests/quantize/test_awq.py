"""AWQ: the folded model is the same function; the search against its definition written out slowly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checks import relative
from checks import student_logits as logits
from safetensors.torch import load_file, save_file

from nano.corpus import Windows
from nano.torch_lm import load_float
from quantize.awq import POWERS, Scales, awq, scale_of, scaled, search, share_heads
from quantize.calibrate import Calibration
from quantize.recipe import Grid
from quantize.student import Student

GRID = Grid(4, 32)


def windows(count: int = 4, length: int = 32) -> Calibration:
    ids = [np.random.default_rng(i).integers(3, 300, length) for i in range(count)]
    return Calibration(Windows(tuple(ids)), {})


def every_linear(student: Student) -> dict[str, Grid]:
    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
             "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip
    return {f"model.layers.{i}.{name}": GRID for i in range(student.shape.num_layers) for name in names}


def random_scales(student: Student) -> list[Scales]:
    """Scales far from 1, the same for all query heads of a key/value head."""
    shape, generator = student.shape, torch.Generator().manual_seed(3)

    def draw(size: int) -> torch.Tensor:
        return torch.exp(torch.randn(size, generator=generator))

    return [
        Scales(
            {
                "attention": draw(shape.hidden_size),
                "output": share_heads(draw(shape.num_heads * shape.head_dim), shape.num_kv_heads, shape.head_dim),
                "mlp": draw(shape.hidden_size),
                "down": draw(shape.intermediate_size),
            },
            {},
            {},
        )
        for _ in range(shape.num_layers)
    ]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_the_folded_model_is_the_same_function(family: str, tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model(family, intermediate_size=88, num_attention_heads=8)  # 4 query heads share a key/value head
    ids_BT = torch.randint(3, 300, (2, 40))
    with Student(folder, 32) as student, torch.no_grad():
        view = scaled(student, random_scales(student))
        expected = load_float(folder)(ids_BT).logits
        assert relative(logits(view, ids_BT), expected) < 1e-5
        prefix = "model.layers.1."
        factor = random_scales(student)[1].factor_K
        for name, fold in (("self_attn.q_proj", "attention"), ("mlp.gate_proj", "mlp"), ("mlp.down_proj", "down")):
            weight_NK = student.tensor(f"{prefix}{name}.weight")
            assert torch.allclose(view.tensor(f"{prefix}{name}.weight"), weight_NK * factor[fold], rtol=1e-5)
        searched, found = awq(student, every_linear(student), windows())
        assert relative(logits(searched, ids_BT), expected) < 1e-5
        for layer in found:
            assert set(layer.power) == {"attention", "output", "mlp", "down"}
            assert all(after <= before for before, after in layer.error.values())
        assert any(power > 0 for layer in found for power in layer.power.values())


def test_a_half_precision_norm_is_rounded_and_its_readers_make_up_for_it(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    for family in ("llama", "gemma3_text"):
        source, folder = tiny_model(family), tmp_path / family
        folder.mkdir()
        (folder / "config.json").write_text((source / "config.json").read_text())
        state = {name: tensor.bfloat16() for name, tensor in load_file(source / "model.safetensors").items()}
        state["model.layers.0.input_layernorm.weight"][5] = 0.0 if family == "llama" else -1.0  # a gain of zero
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        ids_BT = torch.randint(3, 300, (1, 30))
        with Student(folder, 32) as student:
            view = scaled(student, random_scales(student))
            assert view.tensor("model.layers.0.input_layernorm.weight").dtype == torch.bfloat16
            assert relative(logits(view, ids_BT), logits(student, ids_BT)) < 1e-5


def outlier_inputs(positions: int = 300, columns: int = 64) -> torch.Tensor:
    x_MK = torch.randn(positions, columns, generator=torch.Generator().manual_seed(0))
    x_MK[:, [3, 40]] *= 30
    x_MK[:, 9] = 0
    return x_MK


def slow_search(weights: list[torch.Tensor], x_MK: torch.Tensor) -> tuple[float, list[float]]:
    """The exponent of the least error, by running the rounded layer on every input; group by group, in float64."""
    size_K, errors = x_MK.abs().mean(0), []
    for step in range(POWERS):
        alpha = step / POWERS
        raw = [max(float(v), 1e-4) ** alpha if v > 0 else None for v in size_K]
        live = [v for v in raw if v is not None]
        middle = (max(live) * min(live)) ** 0.5
        factor = [1.0 if v is None else v / middle for v in raw]
        error = 0.0
        for weight_NK in weights:
            rounded_NK = torch.empty_like(weight_NK, dtype=torch.float64)
            for n in range(len(weight_NK)):
                for start in range(0, weight_NK.shape[1], 32):
                    group = torch.stack([weight_NK[n, k] * factor[k] for k in range(start, start + 32)])
                    rounded = best_rounding(group)
                    for k in range(32):
                        rounded_NK[n, start + k] = rounded[k].double() / factor[start + k]
            wanted_MN = x_MK.double() @ weight_NK.double().T
            lost_MN = x_MK.double() @ rounded_NK.T - wanted_MN
            error += float(lost_MN.square().sum() / wanted_MN.square().sum()) / len(weights)
        errors.append(error)
    return min(range(POWERS), key=errors.__getitem__) / POWERS, errors


def best_rounding(group_g: torch.Tensor) -> torch.Tensor:
    """Of the ladder of bfloat16 scales, the one with the least squared error, tried one by one."""
    candidates = []
    for factor in torch.linspace(1.10, 0.50, 61).tolist():
        scale = (group_g.abs().max() / 7 * factor).bfloat16().float()
        rounded = (group_g / scale).round().clamp(-8, 7) * scale
        candidates.append(((rounded - group_g).square().sum(), rounded))
    found: torch.Tensor = min(candidates, key=lambda pair: float(pair[0]))[1]
    return found


def test_the_search_equals_the_slow_reference() -> None:
    x_MK = outlier_inputs()
    weights = [torch.randn(n, 64, generator=torch.Generator().manual_seed(n)) for n in (3, 2)]
    factor_K, power, (before, after) = search(weights, [GRID, GRID], x_MK.abs().mean(0), x_MK.T @ x_MK)
    slow_power, slow_errors = slow_search(weights, x_MK)
    assert power == slow_power
    assert before == pytest.approx(slow_errors[0], rel=1e-3)
    assert after == pytest.approx(min(slow_errors), rel=1e-3)
    assert after < 0.3 * before  # two channels of thirty times the size are what AWQ is for
    assert factor_K[9] == 1
    assert float(factor_K[3] / factor_K[4]) > 3


def test_channels_that_are_never_used() -> None:
    assert torch.equal(scale_of(torch.zeros(8), 0.5), torch.ones(8))
    factor_K, power, (before, after) = search([torch.randn(4, 32)], [GRID], torch.zeros(32), torch.zeros(32, 32))
    assert torch.equal(factor_K, torch.ones(32))
    assert (power, before, after) == (0.0, 0.0, 0.0)


def test_query_heads_of_one_key_value_head_share_its_size() -> None:
    size_K = torch.arange(24.0)  # 2 key/value heads, 3 query heads of each, head width 4
    shared_K = share_heads(size_K, 2, 4)
    for query_head in range(6):
        first = query_head // 3 * 12
        expected = torch.stack([size_K[first + i * 4 : first + i * 4 + 4] for i in range(3)]).mean(0)
        assert torch.allclose(shared_K[query_head * 4 : query_head * 4 + 4], expected)


def test_only_what_is_on_a_grid_is_scaled(tiny_model: Callable[..., Path]) -> None:
    with Student(tiny_model("llama"), 32) as student:
        grids: dict[str, Any] = {"model.layers.1.mlp.down_proj": GRID}
        view, found = awq(student, grids, windows())
        assert [set(layer.power) for layer in found] == [set(), {"down"}]
        name = "model.layers.1.self_attn.q_proj.weight"
        assert torch.equal(view.tensor(name), student.tensor(name))
