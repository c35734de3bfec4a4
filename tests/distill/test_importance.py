"""Importance against slow ablation: one part at a time is silenced in the real teacher and the damage measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distill.data import Batch, batches, pack
from distill.importance import Importance, measure
from distill.models import hidden_states
from nano.corpus import cut_windows, read_documents
from nano.shapes import ModelShape, read_config
from nano.tokens import load_tokenizer
from nano.torch_lm import load_float


class Ablation:
    """KL to the whole model once some weights are zero."""

    def __init__(self, model: Any, shape: ModelShape, batch: Batch) -> None:
        self.model, self.shape, self.batch = model, shape, batch
        self.whole = self._log_p()

    def _log_p(self) -> torch.Tensor:
        with torch.inference_mode():
            return torch.log_softmax(
                hidden_states(self.model, self.shape, self.batch) @ self.model.lm_head.weight.T, -1
            )

    def damage(self, *parts: tuple[torch.Tensor, Any]) -> float:
        saved = [(weight, weight.clone()) for weight, _ in parts]
        with torch.no_grad():
            for weight, index in parts:
                weight[index] = 0
            log_q = self._log_p()
            for weight, before in saved:
                weight.copy_(before)
        return float((self.whole.exp() * (self.whole - log_q)).sum(-1).mean())


def rank_correlation(a: Any, b: Any) -> float:
    """Spearman's: the correlation of ranks."""
    ranks = [np.argsort(np.argsort(np.asarray(x))) for x in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


@pytest.fixture(scope="module")
def measured(stories: Path, tinystories: Path) -> tuple[Any, ModelShape, Importance, Ablation]:
    model, shape = load_float(stories), ModelShape.from_hf(read_config(stories))
    rows = pack(cut_windows(read_documents([tinystories])[:80], load_tokenizer(stories), 128), 128)
    importance = measure(model, shape, list(batches(rows, 16))[:12])
    return model, shape, importance, Ablation(model, shape, next(batches(rows, 8)))


def test_neurons(measured: tuple[Any, ModelShape, Importance, Ablation]) -> None:
    model, shape, importance, ablation = measured
    down = model.model.layers[3].mlp.down_proj.weight
    neurons = range(0, shape.intermediate_size, 2)
    damage = [ablation.damage((down, (slice(None), j))) for j in neurons]
    assert rank_correlation(importance.ffn_LF[3][list(neurons)], damage) > 0.5


def test_attention_groups(measured: tuple[Any, ModelShape, Importance, Ablation]) -> None:
    """Of each layer's four groups the most important one is never the one that ablation finds least important."""
    model, shape, importance, ablation = measured
    width = shape.num_heads // shape.num_kv_heads * shape.head_dim
    correlations = []
    for layer in range(shape.num_layers):
        weight = model.model.layers[layer].self_attn.o_proj.weight
        damage = [ablation.damage((weight, (slice(None), slice(g * width, (g + 1) * width)))) for g in range(4)]
        score = (importance.heads_LH[layer] ** 2).view(4, -1).sum(1)
        correlations.append(rank_correlation(score, damage))
    assert np.mean(correlations) > 0.4


def test_hidden_channels(measured: tuple[Any, ModelShape, Importance, Ablation]) -> None:
    model, shape, importance, ablation = measured
    writers = [model.model.embed_tokens.weight.T]
    for layer in model.model.layers:
        writers += [layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight]
    damage = [ablation.damage(*((w, channel) for w in writers)) for channel in range(shape.hidden_size)]
    assert rank_correlation(importance.hidden_D, damage) > 0.7


def test_padding_does_not_count(stories: Path, tinystories: Path) -> None:
    model, shape = load_float(stories), ModelShape.from_hf(read_config(stories))
    given = cut_windows(read_documents([tinystories])[:2], load_tokenizer(stories), 100)
    tight, loose = (measure(model, shape, list(batches(pack(given, length), 64))) for length in (100, 140))
    torch.testing.assert_close(tight.hidden_D, loose.hidden_D, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tight.ffn_LF, loose.ffn_LF, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tight.layers_L, loose.layers_L, rtol=1e-4, atol=1e-5)


def test_scores_are_what_the_formulas_say(
    measured: tuple[Any, ModelShape, Importance, Ablation], stories: Path
) -> None:
    """Written out from transformers' own hidden states, without hooks."""
    model, shape, _, ablation = measured
    batch = ablation.batch
    importance = measure(model, shape, [batch])
    ids = batch.ids_BT
    whole = (batch.segment_BT == 0).all(1)
    if not whole.all():
        batch = Batch(ids[whole], batch.segment_BT[whole], torch.arange(ids[whole].numel()), batch.target_N, True)
        importance = measure(model, shape, [batch])
    with torch.inference_mode():
        states = model.model(input_ids=batch.ids_BT, use_cache=False, output_hidden_states=True).hidden_states
    for layer in range(shape.num_layers - 1):  # the last state is normalised
        cosine = torch.nn.functional.cosine_similarity(states[layer], states[layer + 1], dim=-1).mean()
        assert float(importance.layers_L[layer]) == pytest.approx(1 - float(cosine), abs=1e-5)
    x = states[0].flatten(0, 1).double()
    energy = (x**2 / (x**2).mean(-1, keepdim=True)).mean(0)
    torch.testing.assert_close(importance.energy["model.layers.0.input_layernorm"], energy, rtol=1e-4, atol=1e-6)
