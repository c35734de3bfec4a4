"""The figures against their definitions, computed the slow way by torch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from nano.metrics import Meter, log_softmax


def random_window(seed: int, t: int = 40, v: int = 50) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    reference = (rng.normal(size=(t, v)) * 3).astype(np.float32)
    ours = (reference + rng.normal(size=(t, v)) * 0.3).astype(np.float32)
    return rng.integers(0, v, size=t), ours, reference


def test_figures_equal_torchs_own() -> None:
    meter = Meter()
    windows = [random_window(0), random_window(1, t=17)]
    for ids, ours, reference in windows:
        meter.add(ids, ours, reference)
    scores = meter.scores()

    nll, kl, same, difference, magnitude = [], [], [], 0.0, 0.0
    for ids, ours, reference in windows:
        p, q = torch.from_numpy(ours[:-1]).double(), torch.from_numpy(reference[:-1]).double()
        target = torch.from_numpy(ids[1:])
        nll.append(torch.nn.functional.cross_entropy(p, target, reduction="none"))
        pointwise = torch.nn.functional.kl_div(p.log_softmax(-1), q.log_softmax(-1), reduction="none", log_target=True)
        kl.append(pointwise.sum(-1))
        same.append((p.argmax(-1) == q.argmax(-1)).double())
        difference += float(((p - q) ** 2).sum())
        magnitude += float((q**2).sum())
    all_kl = torch.cat(kl)
    assert scores.tokens == 39 + 16
    assert scores.perplexity == pytest.approx(math.exp(torch.cat(nll).mean()), rel=1e-7)
    assert scores.kl == pytest.approx(float(all_kl.mean()), rel=1e-6)
    assert scores.kl_error == pytest.approx(float(all_kl.std(correction=1) / math.sqrt(len(all_kl))), rel=1e-6)
    assert scores.top1 == pytest.approx(float(torch.cat(same).mean()))
    assert scores.logit_error == pytest.approx(math.sqrt(difference / magnitude), rel=1e-6)


def test_a_model_against_itself_is_perfect() -> None:
    meter = Meter()
    ids, ours, _ = random_window(3)
    meter.add(ids, ours, ours)
    scores = meter.scores()
    assert (scores.kl, scores.top1, scores.logit_error) == (0.0, 1.0, 0.0)
    assert scores.perplexity == scores.reference_perplexity


def test_a_padded_vocabulary_is_compared_on_what_both_have() -> None:
    meter = Meter()
    ids, ours, _ = random_window(4)
    padded = np.concatenate([ours, np.full((len(ours), 14), -1e9, np.float32)], axis=-1)
    meter.add(ids, ours, padded)
    assert meter.scores().kl == pytest.approx(0.0, abs=1e-12)


def test_large_logits_do_not_overflow() -> None:
    huge = np.array([[1e4, 0.0, -1e4]], np.float32)
    assert np.isfinite(log_softmax(huge)).all()


def test_without_a_reference_only_perplexity_is_given() -> None:
    meter = Meter()
    ids, ours, _ = random_window(5)
    meter.add(ids, ours)
    assert set(meter.scores().as_dict()) == {"perplexity", "tokens", "accuracy", "calibration_error"}
