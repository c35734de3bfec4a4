"""On-policy distillation: some sequences of a step are the student's own continuations, scored by the teacher.

After GKD (arXiv 2306.13649, algorithm 1): a prompt of real text, a continuation sampled from the student as it is
now (temperature 1, no gradient through the sampling), the divergence on what came out. There the cross-entropy has
no part: the student's own words are no text to learn from.

Every draw is a function of (seed, step, row), so a resumed run samples what the uninterrupted one did.

Legend: R rows, T ids of a row, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from distill.data import NO_TARGET, Batch, Rows, make_batch
from distill.packing import PAD

CHOOSE, SAMPLE = 1, 2
"""Streams of random numbers, apart from the one that shuffles rows."""

RowNumbers = npt.NDArray[np.int64]


def split_step(order: RowNumbers, share: float, step: int, seed: int) -> tuple[RowNumbers, RowNumbers]:
    """A step's rows: (trained on as they are, continued by the student); over steps the latter are `share` of all."""
    if not share:
        return order, order[:0]
    random = np.random.default_rng([seed, CHOOSE, step])
    count = int(share * len(order) + random.random())
    own = np.isin(np.arange(len(order)), random.permutation(len(order))[:count])
    return order[~own], order[own]


def prompt_length(rows: Rows, order: RowNumbers, wanted: int) -> int:
    """The prompt's ids: as wanted, or as many as the shortest row's first segment has."""
    return min(wanted, int((rows.segment_RT[order] == 0).sum(1).min()))


@torch.no_grad()
def continued(
    model: Any,
    rows: Rows,
    order: RowNumbers,
    prompt: int,
    endings: Sequence[int],
    *,
    step: int,
    seed: int,
    device: str,
    vocab: int | None = None,
) -> Batch:
    """The student's continuations of some rows' beginnings, as a batch without targets.

    Args:
        model: the student.
        rows: the text.
        order: which rows; each gets random numbers of its own.
        prompt: ids taken from each row.
        endings: ids that end a text; what would follow is padding.
        step, seed: of the run.
        device: where the model lies.
        vocab: ids that may be drawn; None means all.
    """
    length = rows.ids_RT.shape[1]
    draws_RT = np.stack([np.random.default_rng([seed, SAMPLE, step, int(row)]).random(length) for row in order])
    draws = torch.from_numpy(draws_RT).to(device)
    ids_RT = torch.from_numpy(rows.ids_RT[order].astype(np.int64)).to(device)
    open_R = torch.ones(len(order), dtype=torch.bool, device=device)
    segment_RT = torch.full(ids_RT.shape, PAD, dtype=torch.int32, device=device)
    segment_RT[:, :prompt] = 0
    ends = torch.tensor(list(endings), dtype=torch.long, device=device)
    cache, fresh = None, ids_RT[:, :prompt]
    for at in range(prompt, length):
        out = model(input_ids=fresh, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
        chosen_R = sample(out.logits[:, -1, :vocab], draws[:, at])
        ids_RT[:, at] = torch.where(open_R, chosen_R, 0)
        segment_RT[open_R, at] = 0
        open_R &= ~torch.isin(chosen_R, ends)
        if not bool(open_R.any()):
            break
        fresh = ids_RT[:, at : at + 1]
    width = int((segment_RT == 0).sum(1).max())
    written = Rows(ids_RT[:, :width].to(torch.int32).cpu().numpy(), segment_RT[:, :width].cpu().numpy())
    batch = make_batch(written, slice(None), device)
    return dataclasses.replace(batch, target_N=torch.full_like(batch.target_N, NO_TARGET))


def sample(logits_RV: torch.Tensor, draw_R: torch.Tensor) -> torch.Tensor:
    """One id a row from softmax(logits), by where a number in [0, 1) falls in the summed probabilities."""
    sum_RV = logits_RV.double().softmax(-1).cumsum(-1)
    at_R1 = draw_R.unsqueeze(1) * sum_RV[:, -1:]
    return torch.searchsorted(sum_RV, at_R1, right=True).squeeze(1).clamp(max=logits_RV.shape[1] - 1)
