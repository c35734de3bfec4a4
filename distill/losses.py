"""Distillation's loss from hidden states, in chunks of tokens: full-vocabulary logits never exist at once.

Over N positions, with z = h W^T the logits, p = softmax(z / temperature):

    loss = kd_weight * temperature^2 * sum_N KL(p_teacher || p_student)  +  ce_weight * sum_N' -log softmax(z)[target]

(Hinton et al., arXiv 1503.02531; the square keeps the gradient's size independent of the temperature). The
gradient in the student's logits is known in closed form,

    dloss/dz = kd_weight * temperature * (p_student - p_teacher) + ce_weight * (softmax(z) - onehot(target)),

so each chunk's share of the gradients in h and W is added up in the forward pass and its logits are dropped
before the next chunk: memory is (chunk x V), not (N x V). The idea is that of Liger-Kernel's fused linear losses.

Legend: N positions, C positions of a chunk, D and E hidden widths of student and teacher, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from distill.data import NO_TARGET

CHUNK_ELEMENTS = 1 << 22
"""Logits of a chunk: 16 MiB in float32 for each of the few arrays, near what a core's caches and TLBs like."""


@dataclass(frozen=True)
class Mix:
    """What the loss is made of.

    Attributes:
        kd_weight: multiplies the summed KL (the kd share over the positions of an optimizer step).
        ce_weight: multiplies the summed cross-entropy.
        temperature: divides both models' logits in the KL.
        dtype: of the products with the heads; everything else is float32.
    """

    kd_weight: float
    ce_weight: float
    temperature: float = 1.0
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Sums:
    """Sums over positions, in nats, as 0-d tensors: what is reported (the KL at the mix's temperature)."""

    kl: torch.Tensor
    ce: torch.Tensor


def chunk_length(vocab_size: int) -> int:
    """Positions of a chunk, C."""
    return max(16, CHUNK_ELEMENTS // vocab_size)


def distillation_loss(
    hidden_ND: torch.Tensor,
    head_VD: torch.Tensor,
    teacher_hidden_NE: torch.Tensor,
    teacher_head_VE: torch.Tensor,
    target_N: torch.Tensor,
    mix: Mix,
) -> tuple[torch.Tensor, Sums]:
    """The loss above and the sums it is made of; gradients flow to `hidden_ND` and `head_VD`.

    Args:
        hidden_ND: the student's hidden states before its head.
        head_VD: the student's head.
        teacher_hidden_NE: the teacher's hidden states.
        teacher_head_VE: the teacher's head, over the same vocabulary.
        target_N: next ids; `NO_TARGET` where there is none (the KL counts there all the same).
        mix: weights, temperature and precision.
    """
    arguments = (hidden_ND, head_VD, teacher_hidden_NE, teacher_head_VE, target_N, mix)
    loss, kl, ce = _ChunkedLoss.apply(*arguments)  # type: ignore[no-untyped-call]
    return loss, Sums(kl, ce)


class _ChunkedLoss(torch.autograd.Function):
    """Computes the gradients while it computes the loss; backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        head_VD: torch.Tensor,
        teacher_hidden_NE: torch.Tensor,
        teacher_head_VE: torch.Tensor,
        target_N: torch.Tensor,
        mix: Mix,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        head, teacher_head = head_VD.to(mix.dtype), teacher_head_VE.to(mix.dtype)
        grad_hidden_ND = torch.empty_like(hidden_ND)
        grad_head_VD = torch.zeros_like(head_VD)
        kl = hidden_ND.new_zeros((), dtype=torch.float64)
        ce = torch.zeros_like(kl)
        for start in range(0, len(target_N), chunk_length(len(head))):
            at = slice(start, start + chunk_length(len(head)))
            hidden_CD = hidden_ND[at].to(mix.dtype)
            logits_CV = F.linear(hidden_CD, head).float()
            teacher_logits_CV = F.linear(teacher_hidden_NE[at].to(mix.dtype), teacher_head).float()
            chunk_kl, chunk_ce, grad_CV = _chunk(logits_CV, teacher_logits_CV, target_N[at], mix)
            kl += chunk_kl
            ce += chunk_ce
            grad_CV = grad_CV.to(mix.dtype)
            grad_hidden_ND[at] = grad_CV @ head
            _accumulate(grad_head_VD, grad_CV, hidden_CD)
        ctx.gradients = (grad_hidden_ND, grad_head_VD)  # neither inputs nor outputs, so not for save_for_backward
        ctx.mark_non_differentiable(kl, ce)
        loss = mix.kd_weight * mix.temperature**2 * kl + mix.ce_weight * ce
        return loss.float(), kl, ce

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        grad_hidden_ND, grad_head_VD = ctx.gradients
        del ctx.gradients  # scaled in place: V x D more floats would be most of a small student's memory
        return grad_hidden_ND.mul_(grads[0]), grad_head_VD.mul_(grads[0]), None, None, None, None


def _accumulate(grad_head_VD: torch.Tensor, grad_CV: torch.Tensor, hidden_CD: torch.Tensor) -> None:
    """grad_head += grad^T hidden, summed in the head's own precision."""
    if grad_head_VD.dtype == grad_CV.dtype:
        grad_head_VD.addmm_(grad_CV.T, hidden_CD)
    else:
        grad_head_VD += grad_CV.T @ hidden_CD


def _chunk(
    logits_CV: torch.Tensor, teacher_logits_CV: torch.Tensor, target_C: torch.Tensor, mix: Mix
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Summed KL, summed cross-entropy and the loss's gradient in a chunk's logits, (C, V).

    At temperature 1 one softmax of the student serves both parts.
    """
    t = mix.temperature
    log_q_CV = F.log_softmax(logits_CV / t if t != 1.0 else logits_CV, -1)
    log_p_CV = F.log_softmax(teacher_logits_CV / t if t != 1.0 else teacher_logits_CV, -1)
    p_CV = log_p_CV.exp()
    log_p_CV -= log_q_CV
    kl = torch.dot(p_CV.view(-1), log_p_CV.view(-1))
    has_C = target_C != NO_TARGET
    safe_C1 = target_C.clamp(min=0).unsqueeze(1)
    log_q1_CV = log_q_CV if t == 1.0 else F.log_softmax(logits_CV, -1)
    ce = -(log_q1_CV.gather(1, safe_C1).squeeze(1) * has_C).sum()
    if t == 1.0:
        grad_CV = log_q_CV.exp_()
        grad_CV *= (mix.kd_weight + mix.ce_weight * has_C).unsqueeze(1)
    else:
        grad_CV = log_q_CV.exp_().mul_(mix.kd_weight * t)
        if mix.ce_weight:
            grad_CV += log_q1_CV.exp_().mul_((mix.ce_weight * has_C).unsqueeze(1))
    grad_CV.sub_(p_CV, alpha=mix.kd_weight * t)
    if mix.ce_weight:
        grad_CV.scatter_add_(1, safe_C1, (-mix.ce_weight * has_C).to(grad_CV.dtype).unsqueeze(1))
    return kl, ce, grad_CV


@dataclass(frozen=True)
class Comparison:
    """Sums over positions that have a next token.

    Attributes:
        ce, teacher_ce: cross-entropy of the text, in nats.
        kl: KL(teacher || student), in nats.
        same: positions whose most likely token is the same.
        tokens: how many positions.
    """

    ce: float
    teacher_ce: float
    kl: float
    same: int
    tokens: int


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
