"""Losses between models of different tokenizers, over spans of text that both have whole (`distill.cross_text`).

A span's distribution is that of its last token, times the probability of its tokens before (the chain rule; TRL's
GOLDTrainer, "bayesian" merging): with q the student's,

    q~_v = c q_v,   c = product over the span's earlier tokens of q(token),       p~ the same of the teacher

A span of one token on both sides has c = 1. Then, by span:

    uld    sum_i | sort(q~)_i - sort(p~)_i |, the shorter one padded by zeros: the Wasserstein-1 distance of
           distributions over unrelated vocabularies at uniform cost              Boizard et al., arXiv 2402.12030
    gold   w D(p~ || q~) over tokens that both vocabularies have + (1 - w) uld over the others, w the share of the
           teacher's vocabulary that both have                                  Patino et al., Hugging Face, 2025

D is the divergence asked for, in the form for sums other than 1 (as q~ over part of a vocabulary has):
KL(a || b) = sum a log(a / b) - a + b, least where a = b. Jensen-Shannon's needs no such terms and is TRL's own.

Gradients are in closed form. With G = dL/dq~ and A = sum_v G_v q~_v the student's logits get q~ G - q A at the span's
last position and A (onehot - q) at the earlier ones. Sorted probabilities need whole rows, so memory is (chunk x V).

Legend: C positions of a chunk, S spans, V and U vocabularies of student and teacher, M tokens that both have.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from distill.cross_text import Beside
from distill.losses import DenseAnswers, Mix, add_cross_entropy
from distill.options import Divergence

CHUNK_ELEMENTS = 1 << 20
"""Logits of a chunk: a quarter of the plain loss's, for sorting takes several times its arrays."""


@dataclass(frozen=True)
class Shared:
    """`distill.cross_vocabulary.Matched` on the models' device: None where all is compared by sorting."""

    ours_M: torch.Tensor
    theirs_M: torch.Tensor
    our_rest: torch.Tensor
    their_rest: torch.Tensor

    @property
    def weight(self) -> float:
        """w above."""
        return len(self.theirs_M) / (len(self.theirs_M) + len(self.their_rest))


@dataclass(frozen=True)
class CrossAnswers:
    """What a teacher of another tokenizer says of a batch's spans; see `distill.losses.Answers`.

    Attributes:
        teacher: its answers to the same text in its own tokens.
        beside: the spans.
        log_c_S: log of c above, the teacher's.
        shared: for "gold" what both vocabularies have.
        vocab: the teacher's ids that its tokenizer gives.
    """

    teacher: DenseAnswers
    beside: Beside
    log_c_S: torch.Tensor
    shared: Shared | None
    vocab: int

    @property
    def layers(self) -> Mapping[int, torch.Tensor]:
        """None: positions of the two have no one-to-one counterpart."""
        return {}

    def over(self, _vocab: int | None) -> CrossAnswers:
        """The student's padding is left out by its head alone."""
        return self

    def slices(self, count: int, vocab: int) -> Iterator[slice]:
        """Chunks that cut no span, of about `CHUNK_ELEMENTS` logits of the wider vocabulary."""
        last_S, first_S = self.beside.last_S, self.beside.last_S - self.beside.count_S + 1
        length = max(8, CHUNK_ELEMENTS // max(vocab, self.vocab))
        start = 0
        while start < count:
            stop = min(start + length, count)
            cut = np.searchsorted(last_S, stop)  # the first span that ends behind the border
            if stop < count and cut < len(last_S) and first_S[cut] < stop:
                stop = int(first_S[cut]) if first_S[cut] > start else int(last_S[cut]) + 1
            yield slice(start, stop)
            start = stop

    def spans(self, at: slice) -> slice:
        """The spans within a chunk of positions."""
        first, last = np.searchsorted(self.beside.last_S, [at.start, at.stop])
        return slice(int(first), int(last))

    def log_p(self, spans: slice, dtype: torch.dtype, temperature: float = 1.0) -> torch.Tensor:
        """The teacher's merged log-probabilities of some spans, (S, U)."""
        at = torch.from_numpy(self.beside.their_last_S[spans]).to(self.log_c_S.device)
        head_UE = self.teacher.head_VE[: self.vocab].to(dtype)
        logits_SU = F.linear(self.teacher.hidden_NE[at].to(dtype), head_UE).to(self.log_c_S.dtype)
        return F.log_softmax(logits_SU / temperature, -1) + self.log_c_S[spans].unsqueeze(1)

    def chunk(
        self, at: slice, logits_CV: torch.Tensor, target_C: torch.Tensor, mix: Mix
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `distill.losses.Answers.chunk`."""
        t, which = mix.temperature, self.spans(at)
        log_q_CV = F.log_softmax(logits_CV / t if t != 1.0 else logits_CV, -1)
        last_S, earlier, owner = self._places(at, which, log_q_CV.device)
        log_c_S = log_q_CV.new_zeros(len(last_S))
        log_c_S.index_add_(0, owner, log_q_CV[earlier, target_C[earlier]])
        q_SV = log_q_CV[last_S].exp()
        total, merged_SV = span_loss(
            log_q_CV[last_S] + log_c_S.unsqueeze(1), self.log_p(which, mix.dtype, t), self.shared, mix.kind, mix.beta
        )
        sum_S = merged_SV.sum(1)
        grad_CV = torch.zeros_like(log_q_CV)
        grad_CV[last_S] = merged_SV.sub_(q_SV.mul_(sum_S.unsqueeze(1)))
        sum_E = sum_S[owner]
        grad_CV[earlier] = -log_q_CV[earlier].exp() * sum_E.unsqueeze(1)
        grad_CV[earlier, target_C[earlier]] += sum_E
        grad_CV *= mix.kd_weight * t
        log_q1_CV = log_q_CV if t == 1.0 else F.log_softmax(logits_CV, -1)
        return total, add_cross_entropy(grad_CV, log_q1_CV, target_C, mix.ce_weight), grad_CV

    def _places(self, at: slice, which: slice, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Within a chunk: each span's last position, all earlier ones, and the span that each of those is of."""
        last_S, more_S = self.beside.last_S[which] - at.start, self.beside.count_S[which] - 1
        earlier, owner = earlier_positions(last_S, more_S)
        return tuple(torch.from_numpy(each).to(device) for each in (last_S, earlier, owner))  # type: ignore[return-value]


def earlier_positions(
    last_S: np.ndarray[tuple[int], np.dtype[np.int64]], more_S: np.ndarray[tuple[int], np.dtype[np.int64]]
) -> tuple[np.ndarray[tuple[int], np.dtype[np.int64]], np.ndarray[tuple[int], np.dtype[np.int64]]]:
    """The `more` positions before each last one, and whose they are."""
    owner = np.repeat(np.arange(len(last_S)), more_S)
    within = np.arange(len(owner)) - np.repeat(np.cumsum(more_S) - more_S, more_S)
    return (last_S - more_S)[owner] + within, owner


def span_loss(
    log_q_SV: torch.Tensor, log_p_SU: torch.Tensor, shared: Shared | None, kind: Divergence, beta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss summed over spans, and G q~, (S, V): its derivative in each merged probability times that probability.

    Args:
        log_q_SV, log_p_SU: log of the merged probabilities of student and teacher.
        shared: None for "uld".
        kind, beta: the divergence over shared tokens.
    """
    q_SV, p_SU = log_q_SV.exp(), log_p_SU.exp()
    if shared is None:
        return sorted_distance(q_SV, p_SU)
    same, grad_SM = unnormalised_divergence(kind, beta, log_p_SU[:, shared.theirs_M], log_q_SV[:, shared.ours_M])
    rest, grad_SR = sorted_distance(q_SV[:, shared.our_rest], p_SU[:, shared.their_rest])
    w = shared.weight
    q_SV[:, shared.ours_M] = grad_SM.mul_(w)
    q_SV[:, shared.our_rest] = grad_SR.mul_(1 - w)
    return w * same + (1 - w) * rest, q_SV


def sorted_distance(q_SV: torch.Tensor, p_SU: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum over spans of the L1 distance of sorted probabilities; its derivative in q times q, (S, V)."""
    sorted_q_SV, order_SV = q_SV.sort(-1, descending=True)
    sorted_p_SU = p_SU.sort(-1, descending=True).values
    wider = sorted_q_SV.shape[1] - sorted_p_SU.shape[1]
    left_out = sorted_p_SU[:, sorted_q_SV.shape[1] :].sum()  # tokens that the student has none for
    apart_SV = sorted_q_SV - (F.pad(sorted_p_SU, (0, wider)) if wider > 0 else sorted_p_SU[:, : sorted_q_SV.shape[1]])
    grad_SV = torch.empty_like(q_SV).scatter_(1, order_SV, apart_SV.sign().mul_(sorted_q_SV))
    return apart_SV.abs().sum() + left_out, grad_SV


def unnormalised_divergence(
    kind: Divergence, beta: float, log_p_SM: torch.Tensor, log_q_SM: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`distill.divergences.divergence` of rows that need not sum to 1; its derivative in q times q, (S, M)."""
    p_SM, q_SM = log_p_SM.exp(), log_q_SM.exp()
    if kind == "forward":
        return (p_SM * (log_p_SM - log_q_SM) - p_SM + q_SM).sum(), q_SM - p_SM
    if kind == "reverse":
        ratio_SM = log_q_SM - log_p_SM
        return (q_SM * ratio_SM - q_SM + p_SM).sum(), q_SM * ratio_SM
    log_m_SM = torch.logaddexp(log_p_SM + math.log(beta), log_q_SM + math.log1p(-beta))
    m_SM = log_m_SM.exp()
    from_p, from_q_SM = (p_SM * (log_p_SM - log_m_SM) - p_SM + m_SM).sum(), log_q_SM - log_m_SM
    if kind == "skew":
        return from_p, (1 - beta) * q_SM * (1 - (log_p_SM - log_m_SM).exp())
    from_q = (q_SM * from_q_SM - q_SM + m_SM).sum()
    if kind == "skew-reverse":
        return from_q, q_SM * (from_q_SM + (1 - beta) * (1 - from_q_SM.exp()))
    return beta * from_p + (1 - beta) * from_q, (1 - beta) * q_SM * from_q_SM
