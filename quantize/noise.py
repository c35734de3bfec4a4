"""Noise in calibration text: windows of which a part of the ids is replaced by any others of the vocabulary.

A float model's answers to text that makes no sense are answers too. A grid that is solved and trained on some of them
stays nearer to the float model on text of other kinds, and hardly less near on text of its own kind. stories260K,
calibrated on stories, KL to the float model in nats a token:

    method           noise   stories  WikiText
    gptq             0       0.0480   0.169
    gptq             0.25    0.0471   0.140
    gptq             0.5     0.0517   0.138
    best, 360 steps  0       0.0278   0.133
    best, 360 steps  0.25    0.0305   0.098

Legend: T positions, U ids.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

REPLACED = 0.3
"""Of a noised window's ids. best as above, WikiText: 0.098 with this share, 0.101 with 0.1; 0.112 where all ids are
random, 0.119 where the window is shuffled."""

FALLS = 0.3
"""Of the windows of a long training, the share over whose last the noise falls to none: what a noised window teaches
that lasts are the codes, and those are nearly at rest by then. recover on stories260K, 4,000 steps: stories 0.0175,
WikiText 0.0675; 0.0182 and 0.0659 where it stays; 0.0176 and 0.083 where it falls earlier, between half and 80% of the
steps. The 360 steps of best are too few: 0.0246 and 0.088, 0.0248 and 0.085 where it stays."""


def noised(
    windows: Iterable[torch.Tensor], ids_U: torch.Tensor, share: float, seed: int, falls_to: int = 0
) -> Iterator[tuple[torch.Tensor, bool]]:
    """The windows, a share of them (evenly spread) with `REPLACED` of their ids replaced; with each, whether it was.

    Args:
        windows: ids (T,) each; a window's first, its beginning id, stays.
        ids_U: what is drawn from, each equally likely: every id that stands for text. Those of the calibration text
            alone leave out what other text is made of (best on WikiText: 0.113 against 0.092).
        share: of windows that are noised, from 0 to 1.
        seed: which ids are replaced, and by what.
        falls_to: how many windows there are, where the share is to fall to 0 over the last of them (`FALLS`).
    """
    random, due = torch.Generator().manual_seed(seed), 0.0
    for number, window in enumerate(windows):
        left = min(1.0, max(0.0, 1 - number / falls_to) / FALLS) if falls_to else 1.0
        before, due = due, due + share * left
        if int(due) == int(before):
            yield window, False
            continue
        others_T = ids_U[torch.randint(len(ids_U), window.shape, generator=random)]
        chosen_T = torch.rand(window.shape, generator=random) < REPLACED
        chosen_T[0] = False
        yield torch.where(chosen_T, others_T, window), True
