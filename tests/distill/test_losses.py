"""The chunked loss against its definition: values, gradients, and what it never allocates."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from checks import LargestTensor

from distill import losses
from distill.data import NO_TARGET
from distill.losses import DenseAnswers, Mix, compare, distillation_loss
from distill.options import DistillOptions, Divergence
from nano.errors import RequestError

N, V, D, E = 50, 97, 16, 24


def arguments(seed: int = 0, scale: float = 1.0) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    target_N = torch.randint(0, V, (N,), generator=g)
    target_N[::7] = NO_TARGET
    hidden, head = torch.randn(N, D, generator=g), torch.randn(V, D, generator=g) * scale
    return hidden, head, torch.randn(N, E, generator=g), torch.randn(V, E, generator=g) * scale, target_N


def per_token(kind: Divergence, beta: float, p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Each divergence as its paper writes it, from probabilities."""
    m = beta * p + (1 - beta) * q
    kl = {
        "forward": [(1.0, p, q)], "reverse": [(1.0, q, p)], "skew": [(1.0, p, m)], "skew-reverse": [(1.0, q, m)],
        "jsd": [(beta, p, m), (1 - beta, q, m)],
    }[kind]  # fmt: skip
    return sum((w * (a * (a / b).log()).sum(-1) for w, a, b in kl), torch.zeros(()))


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
    p, q = F.softmax(zt / mix.temperature, -1), F.softmax(z / mix.temperature, -1)
    ce = F.cross_entropy(z, target, ignore_index=NO_TARGET, reduction="sum")
    return mix.kd_weight * mix.temperature**2 * per_token(mix.kind, mix.beta, p, q).sum() + mix.ce_weight * ce


MIXES = [
    Mix(0.02, 0.0), Mix(0.0, 0.03), Mix(0.015, 0.01), Mix(0.01, 0.02, 2.5), Mix(0.02, 0.0, 0.5),
    Mix(0.02, 0.01, kind="reverse"), Mix(0.02, 0.0, 3.0, kind="reverse"),
    Mix(0.02, 0.01, kind="jsd", beta=0.5), Mix(0.02, 0.0, 2.0, kind="jsd", beta=0.1),
    Mix(0.02, 0.01, kind="jsd", beta=0.9),
    Mix(0.02, 0.01, kind="skew", beta=0.1), Mix(0.02, 0.0, 1.5, kind="skew", beta=0.7),
    Mix(0.02, 0.01, kind="skew-reverse", beta=0.1), Mix(0.02, 0.0, 1.5, kind="skew-reverse", beta=0.6),
]  # fmt: skip


@pytest.mark.parametrize("chunk", [7, 16, 1000])
@pytest.mark.parametrize("mix", MIXES, ids=str)
def test_equals_the_plain_form(mix: Mix, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "chunk_length", lambda _v: chunk)
    hidden, head, *teacher, target = arguments(scale=0.3)
    theirs = [hidden.double().requires_grad_(), head.double().requires_grad_()]
    expected = plain(*theirs, *teacher, target, mix)
    (3 * expected).backward()
    for dtype, relative, absolute in ((torch.float64, 1e-9, 1e-12), (torch.float32, 1e-4, 1e-6)):
        ours = [hidden.to(dtype).requires_grad_(), head.to(dtype).requires_grad_()]
        answers = DenseAnswers(teacher[0].to(dtype), teacher[1].to(dtype))
        loss, sums = distillation_loss(*ours, answers, target, replace(mix, dtype=dtype))
        (3 * loss).backward()  # an upstream factor must reach the gradients
        assert loss.item() == pytest.approx(expected.item(), rel=relative)
        for a, b in zip(ours, theirs, strict=True):
            assert a.grad is not None
            assert b.grad is not None
            torch.testing.assert_close(a.grad.double(), b.grad, rtol=relative, atol=absolute)
        again = mix.kd_weight * mix.temperature**2 * float(sums.kl) + mix.ce_weight * float(sums.ce)
        assert again == pytest.approx(loss.item(), rel=1e-5)


def test_the_divergences_meet_at_their_limits() -> None:
    """GKD, section 2: divided by the small weight, jsd tends to forward and reverse KL; so do the skewed ones."""
    hidden, head, *teacher, target = (a.double() if a.is_floating_point() else a for a in arguments(scale=0.3))

    def total(kind: Divergence, beta: float) -> float:
        mix = Mix(1.0, 0.0, dtype=torch.float64, kind=kind, beta=beta)
        return float(distillation_loss(hidden, head, DenseAnswers(*teacher), target, mix)[1].kl)

    tiny = 1e-6
    assert total("jsd", tiny) / tiny == pytest.approx(total("forward", 0.5), rel=1e-3)
    assert total("jsd", 1 - tiny) / tiny == pytest.approx(total("reverse", 0.5), rel=1e-3)
    assert total("skew", tiny) == pytest.approx(total("forward", 0.5), rel=1e-3)
    assert total("skew-reverse", 1 - tiny) == pytest.approx(total("reverse", 0.5), rel=1e-3)


@pytest.mark.parametrize(
    ("kind", "beta", "good"),
    [("jsd", 0.0, True), ("jsd", 0.3, True), ("skew", 1.0, False), ("forward", 0.5, False), ("reverse", 0.0, True)],
)
def test_beta_goes_with_some_divergences(kind: Divergence, beta: float, good: bool) -> None:
    if good:
        assert DistillOptions(divergence=kind, beta=beta).mixture == (beta or 0.5)
        return
    with pytest.raises(RequestError, match="--beta"):
        DistillOptions(divergence=kind, beta=beta)


def test_gradients_are_those_of_finite_differences() -> None:
    hidden, head, *teacher, target = arguments(3)
    mix = Mix(0.02, 0.01, 1.5)
    moved = head.clone().requires_grad_()
    loss, _ = distillation_loss(hidden, moved, DenseAnswers(*teacher), target, mix)
    loss.backward()
    step = torch.zeros_like(head)
    step[5, 3] = 1e-4
    up, down = (plain(hidden, head + s * step, *teacher, target, mix) for s in (1, -1))
    assert moved.grad is not None
    assert moved.grad[5, 3].item() == pytest.approx((up - down).item() / 2e-4, rel=1e-3)


def test_a_student_equal_to_its_teacher_has_no_divergence_and_no_gradient() -> None:
    hidden, head, _, _, target = arguments()
    h = hidden.clone().requires_grad_()
    loss, sums = distillation_loss(h, head, DenseAnswers(hidden, head), target, Mix(1.0, 0.0))
    loss.backward()
    assert float(sums.kl) == 0.0
    assert h.grad is not None
    assert h.grad.abs().max() < 1e-6


def test_logits_of_large_size_stay_finite() -> None:
    hidden, head, *teacher, target = arguments(1, scale=60.0)
    h = hidden.clone().requires_grad_()
    loss, _ = distillation_loss(h, head, DenseAnswers(*teacher), target, Mix(0.02, 0.01))
    loss.backward()
    assert torch.isfinite(loss)
    assert h.grad is not None
    assert torch.isfinite(h.grad).all()


def test_bfloat16_products_stay_near() -> None:
    hidden, head, *teacher, target = arguments()
    exact, near = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    a, _ = distillation_loss(exact, head, DenseAnswers(*teacher), target, Mix(0.02, 0.0))
    b, _ = distillation_loss(near, head, DenseAnswers(*teacher), target, Mix(0.02, 0.0, dtype=torch.bfloat16))
    a.backward()
    b.backward()
    assert b.item() == pytest.approx(a.item(), rel=2e-2)
    assert exact.grad is not None
    assert near.grad is not None
    assert F.cosine_similarity(exact.grad.flatten(), near.grad.flatten(), dim=0) > 0.999


def test_full_logits_never_exist() -> None:
    n, v, d = 4096, 8192, 8
    hidden, head = torch.randn(n, d, requires_grad=True), torch.randn(v, d, requires_grad=True)
    teacher = torch.randn(n, d), torch.randn(v, d)
    with LargestTensor() as seen:
        loss, _ = distillation_loss(hidden, head, DenseAnswers(*teacher), torch.randint(0, v, (n,)), Mix(1 / n, 0.0))
        loss.backward()  # type: ignore[no-untyped-call]
    assert max(v * d, n * d) < seen.elements <= n * v // 8


MEASURE = """
import resource, sys
import torch, torch.nn.functional as F
from distill.losses import DenseAnswers, Mix, distillation_loss

form, n, kind = sys.argv[1], int(sys.argv[2]), sys.argv[3]
v, d = 262_144, 8
g = torch.Generator().manual_seed(0)
hidden, head = torch.randn(n, d, generator=g, requires_grad=True), torch.randn(v, d, generator=g).requires_grad_()
t_hidden, t_head, target = torch.randn(n, d), torch.randn(v, d), torch.randint(0, v, (n,))

def step(n):
    if form == "ours":
        mix = Mix(0.8 / n, 0.2 / n, kind=kind, beta=0.5)
        loss, _ = distillation_loss(hidden[:n], head, DenseAnswers(t_hidden[:n], t_head), target[:n], mix)
    else:
        z, zt = hidden[:n] @ head.T, t_hidden[:n] @ t_head.T
        loss = 0.8 * F.kl_div(F.log_softmax(z, -1), F.log_softmax(zt, -1), reduction="batchmean", log_target=True)
        loss = loss + 0.2 * F.cross_entropy(z, target[:n])
    loss.backward()

step(4)  # libraries' own buffers, and the head's gradient
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(n)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def extra_memory(*arguments: object) -> int:
    """Bytes by which a step's peak RSS exceeds that of a step of four tokens, in a process of its own."""
    command = [sys.executable, "-c", MEASURE, *map(str, arguments)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.slow
def test_an_eighth_of_the_plain_forms_memory() -> None:
    """V = 262,144, T = 2,048. The plain form's arrays are linear in T, so T = 256 of it is an eighth of T = 2,048."""
    eighth = extra_memory("plain", 256, "forward")
    assert eighth > 4 * 256 * 262_144 * 4  # the plain form is what we think it is: at least four arrays of logits
    assert extra_memory("ours", 2048, "forward") < eighth
    assert extra_memory("ours", 2048, "jsd") < eighth


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
