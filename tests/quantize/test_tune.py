"""Learned rounding layer by layer: its loss is what it says, and it helps on text that it did not see."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nano.tokens import load_tokenizer
from nano.torch_lm import load_float
from quantize.layers import Hidden, advance, embed, load_layer, run_layer
from quantize.options import QuantizeOptions
from quantize.recipe import Grid
from quantize.rtn import round_to_nearest
from quantize.student import Student
from quantize.tune import relative_error, tune_layer

CPU = torch.device("cpu")
PREFIX = "model.layers.0."


def test_the_error_is_of_the_layers_outputs_over_what_it_adds(tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model("qwen3", initializer_range=0.2)
    windows = [torch.randint(3, 300, (length,)) for length in (20, 11)]
    whole = load_float(folder)
    with Student(folder, 32) as student:
        hidden = embed(student, windows)
        layer = load_layer(student, 0)
        wanted_STD = torch.randn_like(hidden.x_STD)
        found = relative_error(layer, hidden, wanted_STD, CPU)
    lost = added = 0.0
    for index, window in enumerate(windows):
        with torch.no_grad():
            states = whole(window[None], output_hidden_states=True).hidden_states
        wanted_TD = wanted_STD[index, : len(window)].double()
        lost += float((states[1][0].double() - wanted_TD).square().sum())
        added += float((wanted_TD - states[0][0].double()).square().sum())
    assert found == pytest.approx(lost / added, rel=1e-4)


def test_tuning_helps_on_stories_it_did_not_see(stories: Path, tinystories: Path) -> None:
    tokenizer = load_tokenizer(stories)
    lines = tinystories.read_text(encoding="utf-8").splitlines()[:80]
    windows = [torch.tensor(tokenizer.prompt(json.loads(line)["text"])[:96]) for line in lines]
    with Student(stories, 32) as student:
        names = [PREFIX + leaf for leaf in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")]
        start = {name: round_to_nearest(student.tensor(name + ".weight").float(), Grid(4, 32)) for name in names}
        hidden, unseen = embed(student, windows[:60]), embed(student, windows[60:])
        wanted, wanted_unseen = copy.deepcopy(hidden), copy.deepcopy(unseen)
        for states in (wanted, wanted_unseen):
            advance(load_layer(student, 0), states, CPU)
        options = QuantizeOptions(method="tune", steps=60)
        given = (start, hidden, wanted.x_STD, options)
        found = tune_layer(load_layer(student, 0), PREFIX, *given)
        again = tune_layer(load_layer(student, 0), PREFIX, *given)
        errors = []
        for weights in (start, found.weights):
            layer = load_layer(student, 0)
            for name, weight in weights.items():
                layer.layers[0].get_submodule(name.removeprefix(PREFIX)).weight.data = weight.dequantize()
            errors.append(relative_error(layer, unseen, wanted_unseen.x_STD, CPU))
    assert found.error_after < 0.7 * found.error_before
    assert errors[1] < 0.75 * errors[0]
    for name in names:
        assert torch.equal(found.weights[name].codes_NK, again.weights[name].codes_NK)
        assert torch.equal(found.weights[name].scale_NG.bfloat16().float(), found.weights[name].scale_NG)


def test_a_layer_that_training_does_not_help_stays(tiny_model: Callable[..., Path]) -> None:
    with Student(tiny_model("llama"), 32) as student:
        hidden = embed(student, [torch.randint(3, 300, (24,))])
        name = PREFIX + "mlp.up_proj"
        start = {name: round_to_nearest(student.tensor(name + ".weight"), Grid(4, 32))}
        layer = load_layer(student, 0)
        wanted = Hidden(run_layer(layer, hidden.x_STD), hidden.length_S)
        options = QuantizeOptions(method="tune", steps=2, learning_rate=60.0)
        found = tune_layer(layer, PREFIX, start, hidden, wanted.x_STD, options)
    assert found.weights is start
    assert found.error_after == found.error_before
