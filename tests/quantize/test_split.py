"""Padding filled with halves of neurons: the same function, the weightiest neurons, nothing without padding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nano.families import family_of
from quantize.split import neuron_weights, split_neurons
from quantize.student import Student
from quantize.whole import whole_model


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_the_function_stays_and_the_weightiest_neurons_are_split(family: str, tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model(family, intermediate_size=88, initializer_range=0.2)
    ids_BT = torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(0))
    with Student(folder, 32) as student, torch.no_grad():
        split, count = split_neurons(student)
        assert count == 16
        wanted, given = (whole_model(one)(ids_BT).logits for one in (student, split))
        assert torch.allclose(wanted, given, atol=1e-4)
        for layer in range(2):
            mlp = f"model.layers.{layer}.mlp."
            gate, down = (mlp + leaf + "_proj.weight" for leaf in ("gate", "down"))
            weight_F = neuron_weights(student, layer)
            top = set(weight_F[:88].topk(8).indices.tolist())
            before_DF, after_DF = student.tensor(down), split.tensor(down)
            halved = {i for i in range(88) if not torch.equal(before_DF[:, i], after_DF[:, i])}
            assert halved == top
            assert not weight_F[88:].any()
            rows = {next(i for i in top if torch.equal(split.tensor(gate)[88 + k], student.tensor(gate)[i]))
                    for k in range(8)}  # fmt: skip
            assert rows == top


def test_a_neurons_weight_is_the_product_of_its_norms(tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model("gemma3_text", intermediate_size=88, initializer_range=0.2)
    with Student(folder, 32) as student:
        gain_D = 1 + student.tensor("model.layers.1.pre_feedforward_layernorm.weight").double()
        assert family_of("gemma3_text").norm_offset == 1
        gate, up, down = (student.tensor(f"model.layers.1.mlp.{leaf}_proj.weight").double() for leaf in
                          ("gate", "up", "down"))  # fmt: skip
        slow = (gate[5] * gain_D).norm() * (up[5] * gain_D).norm() * down[:, 5].norm()
        assert float(neuron_weights(student, 1)[5]) == pytest.approx(float(slow), rel=1e-5)


def test_without_dead_neurons_there_is_nothing_to_split(tiny_model: Callable[..., Path]) -> None:
    with Student(tiny_model("llama", intermediate_size=96), 32) as student:
        assert split_neurons(student) == (student, 0)


def test_a_trained_models_own_dead_neurons_are_used(tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model("llama", intermediate_size=96, initializer_range=0.2)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(folder / "model.safetensors")
    tensors[name][[4, 40]] = 0  # up alone: gate and down are as they were
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    ids_BT = torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(0))
    with Student(folder, 32) as student, torch.no_grad():
        split, count = split_neurons(student)
        assert count == 2
        assert split.tensor(name)[[4, 40]].any(dim=1).all()
        other = name.replace(".1.", ".0.")
        assert torch.equal(split.tensor(other), student.tensor(other))
        assert torch.allclose(whole_model(student)(ids_BT).logits, whole_model(split)(ids_BT).logits, atol=1e-4)
