"""The chunked loss against its definition: values, gradients, and what it never allocates."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from distill import losses
from distill.data import NO_TARGET
from distill.losses import Mix, compare, distillation_loss

N, V, D, E = 50, 97, 16, 24


def arguments(seed: int = 0, scale: float = 1.0) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    target_N = torch.randint(0, V, (N,), generator=g)
    target_N[::7] = NO_TARGET
    hidden, head = torch.randn(N, D, generator=g), torch.randn(V, D, generator=g) * scale
    return hidden, head, torch.randn(N, E, generator=g), torch.randn(V, E, generator=g) * scale, target_N


def plain(
    hidden: torch.Tensor,
    head: torch.Tensor,
    t_hidden: torch.Tensor,
    t_head: torch.Tensor,
    target: torch.Tensor,
    mix: Mix,
) -> torch.Tensor:
    """The definition, with all logits at once and in float64, differentiated by autograd."""
    z, zt = hidden.double() @ head.double().T, t_hidden.double() @ t_head.double().T
    log_q, p = F.log_softmax(z / mix.temperature, -1), F.softmax(zt / mix.temperature, -1)
    kl = (p * (p.log() - log_q)).sum()
    ce = F.cross_entropy(z, target, ignore_index=NO_TARGET, reduction="sum")
    return mix.kd_weight * mix.temperature**2 * kl + mix.ce_weight * ce


@pytest.mark.parametrize("chunk", [7, 16, 1000])
@pytest.mark.parametrize(
    "mix", [Mix(0.02, 0.0), Mix(0.0, 0.03), Mix(0.015, 0.01), Mix(0.01, 0.02, 2.5), Mix(0.02, 0.0, 0.5)]
)
def test_equals_the_plain_form(mix: Mix, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "chunk_length", lambda _v: chunk)
    hidden, head, *teacher, target = arguments()
    ours = [hidden.clone().requires_grad_(), head.clone().requires_grad_()]
    theirs = [hidden.clone().requires_grad_(), head.clone().requires_grad_()]
    loss, sums = distillation_loss(*ours, *teacher, target, mix)
    (3 * loss).backward()  # an upstream factor must reach the gradients
    expected = plain(*theirs, *teacher, target, mix)
    (3 * expected).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)
    again = mix.kd_weight * mix.temperature**2 * float(sums.kl) + mix.ce_weight * float(sums.ce)
    assert again == pytest.approx(loss.item(), rel=1e-5)


def test_gradients_are_those_of_finite_differences() -> None:
    hidden, head, *teacher, target = arguments(3)
    mix = Mix(0.02, 0.01, 1.5)
    moved = head.clone().requires_grad_()
    loss, _ = distillation_loss(hidden, moved, *teacher, target, mix)
    loss.backward()
    step = torch.zeros_like(head)
    step[5, 3] = 1e-4
    up, down = (plain(hidden, head + s * step, *teacher, target, mix) for s in (1, -1))
    assert moved.grad is not None
    assert moved.grad[5, 3].item() == pytest.approx((up - down).item() / 2e-4, rel=1e-3)


def test_a_student_equal_to_its_teacher_has_no_divergence_and_no_gradient() -> None:
    hidden, head, _, _, target = arguments()
    h = hidden.clone().requires_grad_()
    loss, sums = distillation_loss(h, head, hidden, head, target, Mix(1.0, 0.0))
    loss.backward()
    assert float(sums.kl) == 0.0
    assert h.grad is not None
    assert h.grad.abs().max() < 1e-6


def test_logits_of_large_size_stay_finite() -> None:
    hidden, head, *teacher, target = arguments(1, scale=60.0)
    h = hidden.clone().requires_grad_()
    loss, _ = distillation_loss(h, head, *teacher, target, Mix(0.02, 0.01))
    loss.backward()
    assert torch.isfinite(loss)
    assert h.grad is not None
    assert torch.isfinite(h.grad).all()


def test_bfloat16_products_stay_near() -> None:
    hidden, head, *teacher, target = arguments()
    exact, near = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    a, _ = distillation_loss(exact, head, *teacher, target, Mix(0.02, 0.0))
    b, _ = distillation_loss(near, head, *teacher, target, Mix(0.02, 0.0, dtype=torch.bfloat16))
    a.backward()
    b.backward()
    assert b.item() == pytest.approx(a.item(), rel=2e-2)
    assert exact.grad is not None
    assert near.grad is not None
    assert F.cosine_similarity(exact.grad.flatten(), near.grad.flatten(), dim=0) > 0.999


class LargestTensor(TorchDispatchMode):
    """Watches every tensor that an operation gives while the block runs."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(one, torch.Tensor):
                self.elements = max(self.elements, one.numel())
        return out


def test_full_logits_never_exist() -> None:
    n, v, d = 4096, 8192, 8
    hidden, head = torch.randn(n, d, requires_grad=True), torch.randn(v, d, requires_grad=True)
    teacher = torch.randn(n, d), torch.randn(v, d)
    with LargestTensor() as seen:
        loss, _ = distillation_loss(hidden, head, *teacher, torch.randint(0, v, (n,)), Mix(1 / n, 0.0))
        loss.backward()  # type: ignore[no-untyped-call]
    assert max(v * d, n * d) < seen.elements <= n * v // 8


def test_compare_is_the_textbook_sum() -> None:
    hidden, head, t_hidden, t_head, target = arguments(5)
    found = compare(hidden, head, t_hidden, t_head, target)
    keep = target != NO_TARGET
    log_q = F.log_softmax((hidden @ head.T)[keep].double(), -1)
    log_p = F.log_softmax((t_hidden @ t_head.T)[keep].double(), -1)
    at = target[keep][:, None]
    assert found.tokens == int(keep.sum())
    assert found.ce == pytest.approx(-log_q.gather(1, at).sum().item(), rel=1e-5)
    assert found.teacher_ce == pytest.approx(-log_p.gather(1, at).sum().item(), rel=1e-5)
    assert found.kl == pytest.approx((log_p.exp() * (log_p - log_q)).sum().item(), rel=1e-5)
    assert found.same == int((log_q.argmax(-1) == log_p.argmax(-1)).sum())


def test_chunks_shrink_as_the_vocabulary_grows() -> None:
    assert losses.chunk_length(262_144) * 262_144 * 4 <= 16 << 20
    assert losses.chunk_length(512) >= 4096
    assert math.isfinite(losses.chunk_length(10**9))
