"""Sorted channels: the same function in every family, and groups of weights of one size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from quantize.sorting import READERS, neuron_order, sorted_channels, stream_order
from quantize.split import split_neurons
from quantize.student import Student
from quantize.whole import whole_model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_the_function_stays(family: str, tied: bool, tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model(family, intermediate_size=88, initializer_range=0.2, tie_word_embeddings=tied)
    ids_BT = torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(0))
    with Student(folder, 32) as student, torch.no_grad():
        view = sorted_channels(split_neurons(student)[0])
        wanted, given = (whole_model(one)(ids_BT).logits for one in (student, view))
        assert torch.allclose(wanted, given, atol=1e-4)
        name = "model.layers.0.self_attn.q_proj.weight"
        assert not torch.equal(view.tensor(name), student.tensor(name))


def test_groups_hold_weights_of_one_size(stories: Path) -> None:
    """What the grid loses of rounded-to-nearest weights, scales at each group's largest weight, gets less."""

    def lost(weight_NK: torch.Tensor) -> float:
        groups_NGg = weight_NK.unflatten(1, (-1, 32))
        scale_NG1 = groups_NGg.abs().amax(-1, keepdim=True).clamp_min(1e-9) / 7
        rounded_NGg = (groups_NGg / scale_NG1).round() * scale_NG1
        return float((rounded_NGg - groups_NGg).square().sum() / groups_NGg.square().sum())

    with Student(stories, 32) as student:
        view = sorted_channels(student)
        names = [f"model.layers.{i}.{leaf}.weight" for i in range(5) for leaf in READERS]
        before, after = (sum(lost(one.tensor(name)) for name in names) for one in (student, view))
        assert after < 0.995 * before


def test_orders_are_what_they_say(tiny_model: Callable[..., Path]) -> None:
    with Student(tiny_model("llama", initializer_range=0.2), 32) as student:
        down_DF = student.tensor("model.layers.1.mlp.down_proj.weight")
        largest = down_DF.abs().amax(0)[neuron_order(student, 1)]
        assert torch.equal(largest, largest.sort(descending=True).values)
        slow = [0.0] * student.shape.hidden_size
        for layer in range(student.shape.num_layers):
            for leaf in READERS:
                weight = student.tensor(f"model.layers.{layer}.{leaf}.weight").abs()
                for d in range(len(slow)):
                    slow[d] += float(weight[:, d].max() / weight.mean())
        order = stream_order(student).tolist()
        assert [slow[d] for d in order] == pytest.approx(sorted(slow, reverse=True))
