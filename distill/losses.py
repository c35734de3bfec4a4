"""Distillation's loss from hidden states, in chunks of tokens: full-vocabulary logits never exist at once.

Over N positions, with z = h W^T the student's logits and t the temperature:

    loss = kd_weight * t^2 * sum_N divergence(softmax(teacher's z / t), softmax(z / t))
           + ce_weight * sum_N' -log softmax(z)[target]

(Hinton et al., arXiv 1503.02531; the square keeps the gradient's size independent of the temperature). The
gradients in z are known in closed form (`distill.divergences`), so each chunk's share of the gradients in h and W
is added up in the forward pass and its logits are dropped before the next chunk: memory is (chunk x V), not
(N x V). The idea is that of Liger-Kernel's fused linear losses.

What the teacher says of the positions comes as `Answers`; here are those of a teacher that runs (`DenseAnswers`).

Legend: N positions, C positions of a chunk, D and E hidden widths of student and teacher, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from distill.data import NO_TARGET
from distill.divergences import divergence
from distill.options import Divergence

CHUNK_ELEMENTS = 1 << 22
"""Logits of a chunk: 16 MiB in float32 for each of the few arrays, near what a core's caches and TLBs like."""


@dataclass(frozen=True)
class Mix:
    """What the loss is made of.

    Attributes:
        kd_weight: multiplies the summed divergence (the kd share over the positions of an optimizer step).
        ce_weight: multiplies the summed cross-entropy.
        temperature: divides both models' logits in the divergence.
        dtype: of the products with the heads; everything else is float32 (float64 where this is).
        kind: which divergence.
        beta: the teacher's share in the divergence's mixture, where it has one.
    """

    kd_weight: float
    ce_weight: float
    temperature: float = 1.0
    dtype: torch.dtype = torch.float32
    kind: Divergence = "forward"
    beta: float = 0.5

    @property
    def wide(self) -> torch.dtype:
        """Precision of softmax and sums within a chunk."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Sums:
    """Sums over positions, in nats, as 0-d tensors: what is reported (the divergence at the mix's temperature)."""

    kl: torch.Tensor
    ce: torch.Tensor


class Answers(Protocol):
    """What a teacher says of a batch's positions."""

    @property
    def layers(self) -> Mapping[int, torch.Tensor]:
        """Outputs of some of its layers, (N, E), for hidden-state matching; empty where there are none."""

    def over(self, vocab: int | None) -> Answers:
        """The same over the first `vocab` ids only, where both sides mean the same by them; None means all."""

    def slices(self, count: int, vocab: int) -> Iterator[slice]:
        """The chunks that so many positions are taken in, for a student of so many ids."""

    def chunk(
        self, at: slice, logits_CV: torch.Tensor, target_C: torch.Tensor, mix: Mix
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Summed divergence, summed cross-entropy, and the loss's gradient in a chunk's logits, (C, V).

        Args:
            at: which positions.
            logits_CV: the student's, in `mix.wide`; may be overwritten.
            target_C: next ids, `NO_TARGET` where there is none.
            mix: weights, temperature, divergence.
        """


@dataclass(frozen=True)
class DenseAnswers:
    """A running teacher's: hidden states and its head, over the student's vocabulary."""

    hidden_NE: torch.Tensor
    head_VE: torch.Tensor
    layers: Mapping[int, torch.Tensor] = field(default_factory=dict)

    def over(self, vocab: int | None) -> DenseAnswers:
        """See `Answers.over`."""
        return self if vocab is None else replace(self, head_VE=self.head_VE[:vocab])

    def slices(self, count: int, vocab: int) -> Iterator[slice]:
        """See `Answers.slices`."""
        return even_slices(count, vocab)

    def chunk(
        self, at: slice, logits_CV: torch.Tensor, target_C: torch.Tensor, mix: Mix
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `Answers.chunk`."""
        teacher_CV = F.linear(self.hidden_NE[at].to(mix.dtype), self.head_VE.to(mix.dtype)).to(mix.wide)
        t = mix.temperature
        log_q_CV = F.log_softmax(logits_CV / t if t != 1.0 else logits_CV, -1)
        log_p_CV = F.log_softmax(teacher_CV / t if t != 1.0 else teacher_CV, -1)
        total, grad_CV = divergence(mix.kind, mix.beta, log_p_CV, log_q_CV)
        del log_p_CV, teacher_CV
        grad_CV *= mix.kd_weight * t
        log_q1_CV = log_q_CV if t == 1.0 else F.log_softmax(logits_CV, -1)
        return total, add_cross_entropy(grad_CV, log_q1_CV, target_C, mix.ce_weight), grad_CV


def add_cross_entropy(
    grad_CV: torch.Tensor, log_q_CV: torch.Tensor, target_C: torch.Tensor, weight: float
) -> torch.Tensor:
    """The summed cross-entropy; weight times its gradient, softmax - onehot, is added to `grad_CV`.

    Args:
        grad_CV: changed in place.
        log_q_CV: the student's log-softmax at temperature 1; overwritten.
        target_C: `NO_TARGET` where there is none.
        weight: of the cross-entropy.
    """
    has_C = target_C != NO_TARGET
    safe_C1 = target_C.clamp(min=0).unsqueeze(1)
    ce = -(log_q_CV.gather(1, safe_C1).squeeze(1) * has_C).sum()
    if weight:
        weight_C1 = (has_C.to(grad_CV.dtype) * weight).unsqueeze(1)
        grad_CV.addcmul_(log_q_CV.exp_(), weight_C1)
        grad_CV.scatter_add_(1, safe_C1, -weight_C1)
    return ce


def chunk_length(vocab_size: int) -> int:
    """Positions of a chunk, C."""
    return max(16, CHUNK_ELEMENTS // vocab_size)


def even_slices(count: int, vocab: int) -> Iterator[slice]:
    """Chunks of `chunk_length` positions."""
    length = chunk_length(vocab)
    return (slice(start, start + length) for start in range(0, count, length))


def distillation_loss(
    hidden_ND: torch.Tensor, head_VD: torch.Tensor, answers: Answers, target_N: torch.Tensor, mix: Mix
) -> tuple[torch.Tensor, Sums]:
    """The loss above and the sums it is made of; gradients flow to `hidden_ND` and `head_VD`.

    Args:
        hidden_ND: the student's hidden states before its head.
        head_VD: the student's head.
        answers: the teacher's, of the same positions.
        target_N: next ids; `NO_TARGET` where there is none (the divergence counts there all the same).
        mix: weights, temperature, divergence and precision.
    """
    loss, kl, ce = _ChunkedLoss.apply(hidden_ND, head_VD, answers, target_N, mix)  # type: ignore[no-untyped-call]
    return loss, Sums(kl, ce)


class _ChunkedLoss(torch.autograd.Function):
    """Computes the gradients while it computes the loss; backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: torch.Tensor, head_VD: torch.Tensor, answers: Answers, target_N: torch.Tensor, mix: Mix
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        head = head_VD.to(mix.dtype)
        grad_hidden_ND = torch.empty_like(hidden_ND)
        grad_head_VD = torch.zeros_like(head_VD)
        kl = hidden_ND.new_zeros((), dtype=torch.float64)
        ce = torch.zeros_like(kl)
        for at in answers.slices(len(target_N), len(head)):
            hidden_CD = hidden_ND[at].to(mix.dtype)
            logits_CV = F.linear(hidden_CD, head).to(mix.wide)
            chunk_kl, chunk_ce, grad_CV = answers.chunk(at, logits_CV, target_N[at], mix)
            kl += chunk_kl
            ce += chunk_ce
            grad_CV = grad_CV.to(mix.dtype)
            grad_hidden_ND[at] = grad_CV @ head
            _accumulate(grad_head_VD, grad_CV, hidden_CD)
        ctx.gradients = (grad_hidden_ND, grad_head_VD)  # neither inputs nor outputs, so not for save_for_backward
        ctx.mark_non_differentiable(kl, ce)
        loss = mix.kd_weight * mix.temperature**2 * kl + mix.ce_weight * ce
        return loss.to(mix.wide), kl, ce

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        grad_hidden_ND, grad_head_VD = ctx.gradients
        del ctx.gradients  # scaled in place: V x D more floats would be most of a small student's memory
        return grad_hidden_ND.mul_(grads[0]), grad_head_VD.mul_(grads[0]), None, None, None


def _accumulate(grad_head_VD: torch.Tensor, grad_CV: torch.Tensor, hidden_CD: torch.Tensor) -> None:
    """grad_head += grad^T hidden, summed in the head's own precision."""
    if grad_head_VD.dtype == grad_CV.dtype:
        grad_head_VD.addmm_(grad_CV.T, hidden_CD)
    else:
        grad_head_VD += grad_CV.T @ hidden_CD


@dataclass(frozen=True)
class Comparison:
    """Sums over positions that have a next token.

    Attributes:
        ce, teacher_ce: cross-entropy of the text, in nats.
        kl: KL(teacher || student), in nats; across tokenizers the loss over spans.
        same: positions (or spans) whose most likely token is the same.
        tokens: how many positions.
        spans: how many spans, where the tokenizers differ.
    """

    ce: float
    teacher_ce: float
    kl: float
    same: int
    tokens: int
    spans: int | None = None


@torch.inference_mode()
def compare(
    hidden_ND: torch.Tensor,
    head_VD: torch.Tensor,
    teacher_hidden_NE: torch.Tensor,
    teacher_head_VE: torch.Tensor,
    target_N: torch.Tensor,
) -> Comparison:
    """How a student's next-token distributions compare with the teacher's, chunk by chunk, in float32."""
    ce = teacher_ce = kl = 0.0
    same = tokens = 0
    keep = target_N != NO_TARGET
    hidden_ND, teacher_hidden_NE, target_N = hidden_ND[keep].float(), teacher_hidden_NE[keep].float(), target_N[keep]
    head_VD, teacher_head_VE = head_VD.float(), teacher_head_VE.float()
    for start in range(0, len(target_N), chunk_length(len(head_VD))):
        at = slice(start, start + chunk_length(len(head_VD)))
        log_q_CV = F.log_softmax(F.linear(hidden_ND[at], head_VD), -1)
        log_p_CV = F.log_softmax(F.linear(teacher_hidden_NE[at], teacher_head_VE), -1)
        ce += float(F.nll_loss(log_q_CV, target_N[at], reduction="sum"))
        teacher_ce += float(F.nll_loss(log_p_CV, target_N[at], reduction="sum"))
        kl += float((log_p_CV.exp() * (log_p_CV - log_q_CV)).sum(dtype=torch.float64))
        same += int((log_p_CV.argmax(-1) == log_q_CV.argmax(-1)).sum())
        tokens += len(target_N[at])
    return Comparison(ce, teacher_ce, kl, same, tokens)
