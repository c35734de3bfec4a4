"""One layer at a time gives the hidden states of the whole model, for every family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nano.torch_lm import load_float
from quantize.layers import advance, embed, linear_inputs, load_layer
from quantize.student import Student

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_streamed_layers_equal_the_whole_model(family: str, tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model(family, intermediate_size=88)  # padded to 96: the padding must not show
    windows = [torch.randint(3, 300, (length,)) for length in (40, 40, 23)]
    whole = load_float(folder)
    with Student(folder, 32) as student, torch.no_grad():
        assert student.shape.intermediate_size == 96
        hidden = embed(student, windows)
        for layer in range(student.shape.num_layers):
            model = load_layer(student, layer)
            for index, window in enumerate(windows):
                expected = whole(window[None], output_hidden_states=True).hidden_states[layer][0]
                assert torch.allclose(hidden.x_STD[index, : len(window)], expected, atol=2e-5)
            advance(model, hidden, CPU)
        for index, window in enumerate(windows):
            expected = whole(window[None]).logits[0]
            last = whole.lm_head(whole.model.norm(hidden.x_STD[index, : len(window)]))
            assert torch.allclose(last, expected, atol=2e-4)


def test_linear_inputs_are_what_the_linear_sees(tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model("llama")
    windows = [torch.randint(3, 300, (length,)) for length in (12, 9)]
    whole, seen, residuals = load_float(folder), [], []
    whole.model.layers[0].post_attention_layernorm.register_forward_pre_hook(lambda _m, args: residuals.append(args[0]))
    whole.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    with Student(folder, 32) as student, torch.no_grad():
        model = load_layer(student, 0)
        hidden = embed(student, windows)
        (found,) = linear_inputs(model, "mlp.down_proj", hidden, CPU)
        for index, window in enumerate(windows):
            whole(window[None])
            assert int(found.valid_bT[index].sum()) == len(window)
            assert torch.allclose(found.x_bTK[index, : len(window)], seen[-1][0], atol=1e-5)
            assert torch.allclose(found.residual_bTD[index, : len(window)], residuals[-1][0], atol=1e-5)
