"""Recover: distil from the float model through the int4 grid, end to end (QAD, 2601.20088).

Every weight on the grid becomes a real number u counted in codes; the forward pass uses round(u) x scale, the
backward pass treats rounding as the identity (straight-through). Counting in codes makes one learning rate fit
every layer of every model: it says how many codes a weight may move a step. Scales and norms train beside them; a
scale goes through bfloat16 in every forward pass, so what is trained is what the phone computes.

The loss is the KL divergence from the float model's next-token distribution. Start from a solved grid (GPTQ):
each u begins within its code, on the side where the float weight lies (`LEAN`), so that the weights whose rounding
was a near thing are the first to be decided anew. A held-back part of the text decides whether the result is kept.

Legend: B windows, T positions, V vocabulary, N output channels, K input channels, G groups, g group size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from nano.families import weight_shapes
from nano.progress import track, warn
from quantize.grid import QuantizedTensor, bf16_exact, code_range
from quantize.options import QuantizeOptions
from quantize.student import Student

LOGITS_AT_ONCE = 1 << 26
"""Numbers of logits in one forward pass; larger batches are accumulated in parts."""

LEAN = 0.8
"""How far from the middle of its code towards the float weight a u begins. In the middle (0) no weight can change
its code for the first tens of steps and then all do at once: KL 0.0305 against 0.0289 after 160 steps on stories260K.
"""

MOST_HELD_BACK = 32
"""Windows are enough to tell a better model from a worse one: on stories260K the two differ by a third or more."""

WARMUP_STEPS = 20
BETAS = (0.9, 0.99)
"""Adam's: the second moment forgets faster than usual, since runs are of hundreds of steps, not of thousands."""


class _OnGrid(torch.autograd.Function):
    """(u, scale) to the weight round(u) x bf16(scale), with straight-through gradients."""

    @staticmethod
    def forward(ctx: Any, u_NGg: torch.Tensor, scale_NG: torch.Tensor, bits: int) -> torch.Tensor:
        low, high = code_range(bits)
        exact_NG1 = bf16_exact(scale_NG)[..., None]
        codes_NGg = u_NGg.round().clamp_(low, high)
        ctx.save_for_backward(u_NGg, codes_NGg, exact_NG1)
        ctx.limits = (low - 0.5, high + 0.5)
        return codes_NGg * exact_NG1

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        u_NGg, codes_NGg, exact_NG1 = ctx.saved_tensors
        low, high = ctx.limits
        (grad_NGg,) = grads
        inside_NGg = (u_NGg >= low) & (u_NGg <= high)
        return grad_NGg * exact_NG1 * inside_NGg, (grad_NGg * codes_NGg).sum(-1), None


class GridLinear(torch.nn.Module):
    """A linear whose weight lives on the grid and can be trained.

    Attributes:
        u_NGg: the weight counted in codes.
        log_scale_NG: natural logarithm of each scale.
    """

    def __init__(self, start: QuantizedTensor, weight_NK: torch.Tensor) -> None:
        super().__init__()
        self.bits, self.group_size = start.bits, start.group_size
        n, k = start.codes_NK.shape
        codes_NGg = start.codes_NK.float().view(n, k // start.group_size, start.group_size)
        float_NGg = weight_NK.float().view_as(codes_NGg) / start.scale_NG[..., None]
        lean_NGg = LEAN * (float_NGg - codes_NGg).clamp(-0.5, 0.5)
        self.u_NGg = torch.nn.Parameter(codes_NGg + lean_NGg)
        self.log_scale_NG = torch.nn.Parameter(start.scale_NG.log())

    def forward(self, x_K: torch.Tensor) -> torch.Tensor:
        weight_NGg: torch.Tensor = _OnGrid.apply(self.u_NGg, self.log_scale_NG.exp(), self.bits)  # type: ignore[no-untyped-call]
        return F.linear(x_K, weight_NGg.flatten(1))

    @torch.no_grad()
    def solved(self) -> QuantizedTensor:
        """The weight as it is on the grid now."""
        low, high = code_range(self.bits)
        codes_NK = self.u_NGg.round().clamp(low, high).to(torch.int8).flatten(1).cpu()
        return QuantizedTensor(codes_NK, bf16_exact(self.log_scale_NG.exp()).cpu(), self.group_size, self.bits)


@dataclass(frozen=True)
class Recovered:
    """What training left.

    Attributes:
        weights: modules on the grid, by full name.
        norms: trained norm weights, by full tensor name, float32.
        kl_before, kl_after: mean KL to the float model in nats a token, on text held back from training.
    """

    weights: dict[str, QuantizedTensor]
    norms: dict[str, torch.Tensor]
    kl_before: float
    kl_after: float


def recover(
    student: Student,
    start: dict[str, QuantizedTensor],
    windows: Sequence[torch.Tensor],
    steps: int,
    options: QuantizeOptions,
) -> Recovered:
    """Train the grid weights, scales and norms of a solved model against its float original.

    Args:
        student: the float model.
        start: every module that is on the grid.
        windows: token ids; every tenth (or fewer, about `MOST_HELD_BACK`) is held back to judge the result.
        steps: optimiser steps of `options.batch` windows.
        options: learning rate, batch, seed.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    teacher, model = (_whole_model(student).to(device) for _ in range(2))
    for name, quantized in start.items():
        parent, _, leaf = name.rpartition(".")
        weight_NK = model.get_submodule(name).weight.cpu()
        setattr(model.get_submodule(parent), leaf, GridLinear(quantized, weight_NK).to(device))
    stride = max(10, len(windows) // MOST_HELD_BACK)
    judging = list(windows[::stride])
    training = [window for i, window in enumerate(windows) if i % stride] or list(windows)
    norms = {name: p for name, p in model.named_parameters() if name.endswith("norm.weight")}
    first_norms = {name: p.detach().cpu().clone() for name, p in norms.items()}
    before = mean_kl(teacher, model, judging)
    _train(teacher, model, training, steps, options)
    after = mean_kl(teacher, model, judging)
    if after >= before:
        warn(
            f"recovery did not bring the model nearer to its original (KL {before:.4f} before, {after:.4f} after); "
            f"the solved grid is kept: give more --data, or a lower --learning-rate"
        )
        return Recovered(start, first_norms, before, before)
    solved = {name: model.get_submodule(name).solved() for name in start}
    return Recovered(solved, {name: p.detach().cpu() for name, p in norms.items()}, before, after)


def _whole_model(student: Student) -> Any:
    """The float model by transformers, padded as the student is."""
    from transformers import AutoConfig, AutoModelForCausalLM

    plain = {key: value for key, value in student.config.items() if key not in ("model_type", "dtype", "torch_dtype")}
    config = AutoConfig.for_model(student.shape.family, **plain)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    state = {name: student.tensor(name).float() for name in weight_shapes(student.shape)}
    model.load_state_dict(state, strict=False)
    return model.eval().requires_grad_(False)


def _train(teacher: Any, model: Any, windows: list[torch.Tensor], steps: int, options: QuantizeOptions) -> None:
    """Adam with a short warm-up and a cosine to zero, which lets codes settle."""
    rates = {"u_NGg": options.learning_rate, "log_scale_NG": options.learning_rate / 40, "norm.weight": options.learning_rate / 20}  # noqa: E501  # fmt: skip
    groups = []
    for ending, rate in rates.items():
        chosen = [p.requires_grad_() for name, p in model.named_parameters() if name.endswith(ending)]
        groups.append({"params": chosen, "lr": rate})
    optimizer = torch.optim.Adam(groups, betas=BETAS)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    random, smooth = torch.Generator().manual_seed(options.seed), 0.0
    queue: list[int] = []
    with track("recover", steps, "steps") as bar:
        for step in range(steps):
            while len(queue) < options.batch:
                queue += torch.randperm(len(windows), generator=random).tolist()
            batch = [windows[i] for i in queue[: options.batch]]
            del queue[: options.batch]
            optimizer.zero_grad()
            loss = _accumulate(teacher, model, batch)
            optimizer.step()
            schedule.step()
            smooth = loss if step == 0 else 0.9 * smooth + 0.1 * loss
            bar.advance(note=f"KL {smooth:.4f}")


def _accumulate(teacher: Any, model: Any, batch: list[torch.Tensor]) -> float:
    """Gradient of the batch's mean KL, in parts that fit; gives the KL."""
    positions = sum(len(window) for window in batch)
    total = 0.0
    for part in _parts(batch, model.config.vocab_size):
        loss = kl_sum(teacher, model, part) / positions
        torch.autograd.backward(loss)
        total += float(loss.detach())
    return total


def _parts(windows: list[torch.Tensor], vocab_size: int) -> list[list[torch.Tensor]]:
    longest = max(len(window) for window in windows)
    count = max(1, LOGITS_AT_ONCE // (longest * vocab_size))
    return [windows[i : i + count] for i in range(0, len(windows), count)]


def kl_sum(teacher: Any, model: Any, windows: list[torch.Tensor]) -> torch.Tensor:
    """KL from the teacher's to the model's next-token distribution, summed over the windows' positions."""
    device = next(teacher.parameters()).device
    ids_BT = torch.nn.utils.rnn.pad_sequence(windows, batch_first=True).to(device)
    lengths_B1 = torch.tensor([len(window) for window in windows], device=device)[:, None]
    real_BT = torch.arange(ids_BT.shape[1], device=device)[None] < lengths_B1
    with torch.no_grad():
        wanted_BTV = teacher(input_ids=ids_BT, use_cache=False).logits.log_softmax(-1)
    given_BTV = model(input_ids=ids_BT, use_cache=False).logits.log_softmax(-1)
    kl_BT = F.kl_div(given_BTV, wanted_BTV, reduction="none", log_target=True).sum(-1)
    return (kl_BT * real_BT).sum()


@torch.no_grad()
def mean_kl(teacher: Any, model: Any, windows: list[torch.Tensor]) -> float:
    """Mean KL in nats a position over some windows."""
    parts = _parts(windows, model.config.vocab_size)
    return sum(float(kl_sum(teacher, model, part)) for part in parts) / sum(len(window) for window in windows)
