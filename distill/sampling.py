"""A teacher's distribution reduced to a few ids, without bias, and the loss against what was kept.

A sample of k ids stands for p where every id's expected weight is its probability. Top-k does not: what it leaves
out is given to the ids it keeps, and the student learns a sharper distribution than the teacher's ("Sparse Logit
Sampling", arXiv 2503.16870, which draws ids with probability p and weighs them by importance, p / p). Here each id
is kept with the probability min(1, p n / rest) instead: the h most likely ids for certain, each with its own p; n
of the others at evenly spaced points of their summed probabilities (systematic sampling, Madow 1949), each with the
weight rest / n, which is p divided by the chance of being kept (Horvitz and Thompson 1952). It is as unbiased, never
draws an id twice, and its variance lies in the tail only.

Legend: C positions of a chunk, N positions, V vocabulary, K places of a record, H most ids with a probability.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

from distill.data import NO_TARGET
from distill.losses import Mix, add_cross_entropy, even_slices
from distill.records import UNITS, RecordLayout, pack_records
from nano.bits import Bytes


def make_records(layout: RecordLayout, logits_CV: torch.Tensor, draw_C2: torch.Tensor) -> Bytes:
    """Records of a chunk.

    Args:
        layout: of the cache; `vocab_size` ids of the logits are looked at.
        logits_CV: the teacher's, divided by the temperature.
        draw_C2: two random numbers in [0, 1) for each position.
    """
    log_p_CV = F.log_softmax(logits_CV[:, : layout.vocab_size].double(), -1)
    p_CV = log_p_CV.exp()
    entropy_C = -(p_CV * log_p_CV.clamp_min(-1e4)).sum(1)
    del log_p_CV
    most = layout.most_heads
    top_CH, top_id_CH = p_CV.topk(min(most + 1, p_CV.shape[1]), 1)
    top_CH, top_id_CH = (F.pad(x, (0, most + 1 - x.shape[1])) for x in (top_CH, top_id_CH))
    if layout.form == "top":
        heads_C = torch.full_like(top_id_CH[:, 0], most)
        unit_CH = (top_CH[:, :most] / top_CH[:, :most].sum(1, keepdim=True) * UNITS).round().long()
        id_CK = F.pad(top_id_CH[:, :most], (0, layout.most_ids - most))
    else:
        heads_C = _heads(layout, top_CH)
        id_CK = _sample(layout, p_CV, top_id_CH, heads_C, draw_C2[:, :1])
        # rounded together, at one random offset: each is right on average, and the sum never exceeds the whole
        ends_CH = (top_CH[:, :most].cumsum(1).clamp(max=1.0) * UNITS + draw_C2[:, 1:]).floor()
        unit_CH = ends_CH.diff(dim=1, prepend=torch.zeros_like(ends_CH[:, :1])).long()
    parts = (x.cpu().numpy() for x in (entropy_C.half(), heads_C, id_CK, unit_CH))
    return pack_records(layout, *parts)


def _heads(layout: RecordLayout, top_CH: torch.Tensor) -> torch.Tensor:
    """h: the fewest ids kept for certain, such that no other exceeds the weight that a sampled one gets."""
    count_H = torch.arange(top_CH.shape[1], device=top_CH.device)
    rest_CH = (1 - F.pad(top_CH[:, :-1].cumsum(1), (1, 0))).clamp_min(0)
    enough_CH = top_CH * (layout.places(count_H) - count_H) <= rest_CH
    enough_CH[:, -1] = True
    heads_C: torch.Tensor = enough_CH.int().argmax(1)
    return heads_C


def _sample(
    layout: RecordLayout, p_CV: torch.Tensor, top_id_CH: torch.Tensor, heads_C: torch.Tensor, draw_C1: torch.Tensor
) -> torch.Tensor:
    """(C, K): the certain ids, then n = k(h) - h of the others by systematic sampling; `p_CV` is overwritten."""
    most, heads_C1 = layout.most_heads, heads_C.unsqueeze(1)
    certain_CH = torch.arange(most, device=p_CV.device) < heads_C1
    p_CV.scatter_(1, top_id_CH[:, :most], p_CV.gather(1, top_id_CH[:, :most]) * ~certain_CH)
    sum_CV = p_CV.cumsum_(1)
    place_K = torch.arange(layout.most_ids, device=p_CV.device)
    count_C1 = (layout.places(heads_C1) - heads_C1).clamp_min(1)
    point_CK = ((place_K - heads_C1).clamp_min(0) + draw_C1) / count_C1 * sum_CV[:, -1:]
    id_CK: torch.Tensor = torch.searchsorted(sum_CV, point_CK, right=True).clamp(max=layout.vocab_size - 1)
    id_CK[:, :most] = torch.where(certain_CH, top_id_CH[:, :most], id_CK[:, :most])
    return id_CK


def draws_for(key: bytes, count: int, seed: int) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """(count, 2) random numbers that depend on a window's key and the seed alone, so that order never matters."""
    return np.random.default_rng([seed, int.from_bytes(key, "little")]).random((count, 2))


@dataclass(frozen=True)
class SparseAnswers:
    """A teacher's of which a few ids were kept.

    Attributes:
        id_NK: ids, each row's different (or of weight 0).
        weight_NK: their probabilities, each row summing to 1.
        entropy_N: of the whole distribution, so that the divergence, and not the cross-entropy, is reported.
    """

    id_NK: torch.Tensor
    weight_NK: torch.Tensor
    entropy_N: torch.Tensor
    layers: Mapping[int, torch.Tensor] = field(default_factory=dict)

    def over(self, vocab: int | None) -> SparseAnswers:
        """See `Answers.over`: what is kept are real ids already."""
        return self

    def slices(self, count: int, vocab: int) -> Iterator[slice]:
        """See `Answers.slices`."""
        return even_slices(count, vocab)

    def chunk(
        self, at: slice, logits_CV: torch.Tensor, target_C: torch.Tensor, mix: Mix
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `distill.losses.Answers.chunk`; the divergence is the forward one, the only one that a sample gives."""
        t, id_CK, weight_CK = mix.temperature, self.id_NK[at], self.weight_NK[at].to(mix.wide)
        log_q_CV = F.log_softmax(logits_CV / t if t != 1.0 else logits_CV, -1)
        kl = -(weight_CK * log_q_CV.gather(1, id_CK)).sum() - self.entropy_N[at].sum()
        if t == 1.0:  # one softmax serves both parts
            has_C = target_C != NO_TARGET
            safe_C1 = target_C.clamp(min=0).unsqueeze(1)
            ce = -(log_q_CV.gather(1, safe_C1).squeeze(1) * has_C).sum()
            ce_C1 = has_C.to(mix.wide).unsqueeze(1) * mix.ce_weight
            grad_CV = log_q_CV.exp_().mul_(weight_CK.sum(1, keepdim=True) * mix.kd_weight + ce_C1)
            grad_CV.scatter_add_(1, safe_C1, -ce_C1)
        else:
            grad_CV = log_q_CV.exp_().mul_(weight_CK.sum(1, keepdim=True) * (mix.kd_weight * t))
            ce = add_cross_entropy(grad_CV, F.log_softmax(logits_CV, -1), target_C, mix.ce_weight)
        return kl, ce, grad_CV.scatter_add_(1, id_CK, weight_CK * (-mix.kd_weight * t))
