"""Noised windows: how many, how much of each, with what, and the same again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from nano.tokens import load_tokenizer
from quantize.calibrate import draw_windows, with_noise
from quantize.noise import REPLACED, noised
from quantize.options import QuantizeOptions


def changed_shares(windows: list[torch.Tensor], share: float, seed: int) -> list[float]:
    found = list(noised(windows, torch.arange(3, 500), share, seed))
    shares = [float((a != b).float().mean()) for a, (b, _) in zip(windows, found, strict=True)]
    assert [share > 0 for share in shares] == [noise for _, noise in found]
    return shares


def test_a_share_of_the_windows_evenly_spread_and_a_part_of_their_ids() -> None:
    windows = [torch.randint(3, 500, (200,), generator=torch.Generator().manual_seed(100 + i)) for i in range(40)]
    shares = changed_shares(windows, 0.25, 0)
    assert [i for i, share in enumerate(shares) if share] == list(range(3, 40, 4))
    touched = [share for share in shares if share]
    assert abs(sum(touched) / len(touched) - REPLACED) < 0.03
    assert shares == changed_shares(windows, 0.25, 0)
    assert shares != changed_shares(windows, 0.25, 1)
    assert not any(changed_shares(windows, 0.0, 0))
    assert all(changed_shares(windows, 1.0, 0))


def test_noise_falls_to_none_over_the_last_windows() -> None:
    found = [noise for _, noise in noised([torch.arange(3, 40)] * 1000, torch.arange(3, 500), 0.4, 0, falls_to=1000)]
    assert sum(found[:700]) == 280
    assert [sum(found[i : i + 100]) for i in (700, 800, 900)] == pytest.approx([33, 20, 7], abs=2)


def test_ids_are_those_given_and_the_beginning_stays() -> None:
    windows = [torch.tensor([1, *[7] * 90]) for _ in range(3)]
    found = torch.stack([window for window, _ in noised(windows, torch.tensor([9, 400]), 1.0, 0)])
    assert found[:, 0].tolist() == [1, 1, 1]
    assert sorted(set(found[:, 1:].flatten().tolist())) == [7, 9, 400]


def test_noise_of_calibration_is_any_text_and_nothing_special(stories: Path, tinystories: Path) -> None:
    tokenizer = load_tokenizer(stories)
    drawn = draw_windows([tinystories], tokenizer, QuantizeOptions("gptq", samples=64, length=64), 512)
    changed = with_noise(drawn, QuantizeOptions("gptq", noise=1.0))
    before, after = (set(np.concatenate([ids[1:] for ids in c.windows.ids]).tolist()) for c in (drawn, changed))
    assert len(before) < 400
    assert after <= set(tokenizer.text_ids())
    assert len(after) > 470
    assert tokenizer.text_ids() == list(range(3, 512))
    assert changed.record == drawn.record
