"""Divergences between a teacher's and a student's next-token distributions, with their gradients in closed form.

With p the teacher's, q = softmax(z) the student's, and m a mixture of both, per position:

    forward       KL(p || q)                                             Hinton et al., arXiv 1503.02531
    reverse       KL(q || p)                                             MiniLLM, arXiv 2306.08543
    jsd           b KL(p || m) + (1-b) KL(q || m),  m = b p + (1-b) q    GKD, arXiv 2306.13649, section 2
    skew          KL(p || m),                       m = b p + (1-b) q    DistiLLM, arXiv 2402.03898, equation 4
    skew-reverse  KL(q || m),                       m = b p + (1-b) q    the same, with the roles exchanged

A divergence whose derivative in q is g has the gradient q (g - sum_v q g) in z; g is needed up to a constant only.

Legend: C positions of a chunk, V vocabulary.
"""

from __future__ import annotations

import math

import torch

from distill.options import Divergence


def divergence(
    kind: Divergence, beta: float, log_p_CV: torch.Tensor, log_q_CV: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A divergence summed over positions, and its gradient in the student's logits.

    Args:
        kind: see above.
        beta: b above, the teacher's share in the mixture, between 0 and 1; forward and reverse have none.
        log_p_CV: the teacher's log-probabilities.
        log_q_CV: the student's log-softmax.

    Returns:
        the sum, 0-d; its derivative in z, (C, V).
    """
    q_CV = log_q_CV.exp()
    if kind == "forward":
        p_CV = log_p_CV.exp()
        return _dot(p_CV, log_p_CV - log_q_CV), q_CV.sub_(p_CV)
    if kind == "reverse":
        ratio_CV = log_q_CV - log_p_CV
        return _dot(q_CV, ratio_CV), _through_softmax(q_CV, ratio_CV)
    log_m_CV = torch.logaddexp(log_p_CV + math.log(beta), log_q_CV + math.log1p(-beta))
    if kind == "skew-reverse":
        ratio_CV = log_q_CV - log_m_CV
        total = _dot(q_CV, ratio_CV)
        return total, _through_softmax(q_CV, ratio_CV.sub_((log_q_CV - log_m_CV).exp_(), alpha=1 - beta))
    p_CV = log_p_CV.exp()
    total = _dot(p_CV, log_p_CV - log_m_CV)
    if kind == "skew":
        return total, _through_softmax(q_CV, (log_p_CV - log_m_CV).exp_().mul_(beta - 1))
    ratio_CV = log_q_CV - log_m_CV
    total = beta * total + (1 - beta) * _dot(q_CV, ratio_CV)
    return total, _through_softmax(q_CV, ratio_CV).mul_(1 - beta)


def _dot(a_CV: torch.Tensor, b_CV: torch.Tensor) -> torch.Tensor:
    return torch.dot(a_CV.reshape(-1), b_CV.reshape(-1))


def _through_softmax(q_CV: torch.Tensor, g_CV: torch.Tensor) -> torch.Tensor:
    """q (g - sum_v q g), in place of g."""
    mean_C1 = torch.linalg.vecdot(q_CV, g_CV).unsqueeze(1)
    return g_CV.sub_(mean_C1).mul_(q_CV)
