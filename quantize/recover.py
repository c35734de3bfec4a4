"""Recover: distil from the float model through the int4 grid, end to end (QAD, 2601.20088).

Weights (counted in codes, see `quantize.trainable`), their scales and the norms train together.

The loss is the KL divergence from the float model's next-token distribution. Start from a solved grid (GPTQ):
each u begins within its code, on the side where the float weight lies (`LEAN`), so that the weights whose rounding
was a near thing are the first to be decided anew. A held-back part of the text decides whether the result is kept.

Legend: B windows, T positions, V vocabulary, N output channels, K input channels, G groups, g group size.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from nano.progress import track, warn
from quantize.grid import QuantizedTensor
from quantize.journal import Journal
from quantize.options import QuantizeOptions
from quantize.student import Student
from quantize.trainable import BETAS, TrainableLinear, harden, trainable_groups
from quantize.whole import padded, parts_of, whole_model

MOST_HELD_BACK = 32
"""Windows are enough to tell a better model from a worse one: on stories260K the two differ by a third or more."""

KEEP_SECONDS = 30
"""Between two savings of the training's state: a kill loses no more."""

WARMUP_STEPS = 20


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
    journal: Journal,
    ends: Student | None = None,
) -> Recovered:
    """Train the grid weights, scales and norms of a solved model against its float original.

    Args:
        student: the float model.
        start: every module that is on the grid.
        windows: token ids; every tenth (or fewer, about `MOST_HELD_BACK`) is held back to judge the result.
        steps: optimiser steps of `options.batch` windows.
        options: learning rate, batch, seed.
        journal: where the training's state is kept, and where an interrupted one is found.
        ends: the model that is trained, embedding and head on their grids; the student where those stay float.
    """
    teacher, model = whole_model(student), whole_model(ends or student)
    for name, quantized in start.items():
        parent, _, leaf = name.rpartition(".")
        weight_NK = model.get_submodule(name).weight
        trainable = TrainableLinear(quantized, weight_NK.cpu()).to(weight_NK.device)
        setattr(model.get_submodule(parent), leaf, trainable)
    stride = max(10, len(windows) // MOST_HELD_BACK)
    judging = list(windows[::stride])
    training = [window for i, window in enumerate(windows) if i % stride] or list(windows)
    norms = {name: p for name, p in model.named_parameters() if name.endswith("norm.weight")}
    first_norms = {name: p.detach().cpu().clone() for name, p in norms.items()}
    before = mean_kl(teacher, model, judging)
    _train(teacher, model, training, steps, options, journal)
    harden(model, 1.0)
    after = mean_kl(teacher, model, judging)
    if after >= before:
        warn(
            f"recovery did not bring the model nearer to its original (KL {before:.4f} before, {after:.4f} after); "
            f"the solved grid is kept: give more --data, or a lower --learning-rate"
        )
        return Recovered(start, first_norms, before, before)
    solved = {name: model.get_submodule(name).solved() for name in start}
    return Recovered(solved, {name: p.detach().cpu() for name, p in norms.items()}, before, after)


def _train(
    teacher: Any, model: Any, windows: list[torch.Tensor], steps: int, options: QuantizeOptions, journal: Journal
) -> None:
    """Adam with a short warm-up and a cosine to zero, which lets codes settle.

    Goes on from the journal's state where there is one, to the same bits as without the interruption.
    """
    optimizer = torch.optim.Adam(trainable_groups(model, options.rate, norms=True), betas=BETAS, fused=True)
    peaks = [group["lr"] for group in optimizer.param_groups]
    first, smooth = _restore(model, optimizer, journal)
    batches, kept = _batches(windows, options), time.monotonic()
    with track("recover", steps, "steps") as bar:
        for step in range(steps):
            batch = next(batches)
            if step < first:
                bar.advance()
                continue
            shape = min(1.0, (step + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * step / steps))
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * shape
            harden(model, step / steps)
            optimizer.zero_grad()
            loss = _accumulate(teacher, model, batch)
            optimizer.step()
            smooth = loss if step == 0 else 0.9 * smooth + 0.1 * loss
            bar.advance(note=f"KL {smooth:.4f}")
            if time.monotonic() - kept > KEEP_SECONDS:
                _keep(model, optimizer, journal, step + 1, smooth)
                kept = time.monotonic()


def _batches(windows: list[torch.Tensor], options: QuantizeOptions) -> Iterator[list[torch.Tensor]]:
    """Batches without end, each window once before any comes again, in an order that the seed decides."""
    random, queue = torch.Generator().manual_seed(options.seed), list[int]()
    while True:
        while len(queue) < options.batch:
            queue += torch.randperm(len(windows), generator=random).tolist()
        yield [windows[i] for i in queue[: options.batch]]
        del queue[: options.batch]


def _keep(model: Any, optimizer: torch.optim.Optimizer, journal: Journal, step: int, smooth: float) -> None:
    """Put the training's state into the journal."""
    tensors = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            tensors[name] = p.detach()
            tensors[name + ".mean"] = optimizer.state[p]["exp_avg"]
            tensors[name + ".square"] = optimizer.state[p]["exp_avg_sq"]
    journal.save_training(tensors, {"step": step, "smooth": smooth})


@torch.no_grad()
def _restore(model: Any, optimizer: torch.optim.Optimizer, journal: Journal) -> tuple[int, float]:
    """The step to go on from and the running KL; a new training begins at 0."""
    found = journal.training()
    if found is None:
        return 0, 0.0
    tensors, numbers = found
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.copy_(tensors[name])
            optimizer.state[p] = {
                "step": torch.tensor(float(numbers["step"])),
                "exp_avg": tensors[name + ".mean"].to(p.device),
                "exp_avg_sq": tensors[name + ".square"].to(p.device),
            }
    return numbers["step"], numbers["smooth"]


def _accumulate(teacher: Any, model: Any, batch: list[torch.Tensor]) -> float:
    """Gradient of the batch's mean KL, in parts that fit; gives the KL."""
    positions = sum(len(window) for window in batch)
    total = 0.0
    for part in parts_of(batch, model.config.vocab_size):
        loss = kl_sum(teacher, model, part) / positions
        torch.autograd.backward(loss)
        total += float(loss.detach())
    return total


def kl_sum(teacher: Any, model: Any, windows: list[torch.Tensor]) -> torch.Tensor:
    """KL from the teacher's to the model's next-token distribution, summed over the windows' positions."""
    device = next(teacher.parameters()).device
    ids_BT, real_BT = padded(windows, device)
    with torch.no_grad():
        wanted_BTV = teacher(input_ids=ids_BT, use_cache=False).logits.log_softmax(-1)
    given_BTV = model(input_ids=ids_BT, use_cache=False).logits.log_softmax(-1)
    kl_BT = F.kl_div(given_BTV, wanted_BTV, reduction="none", log_target=True).sum(-1)
    return (kl_BT * real_BT).sum()


@torch.no_grad()
def mean_kl(teacher: Any, model: Any, windows: list[torch.Tensor]) -> float:
    """Mean KL in nats a position over some windows."""
    parts = parts_of(windows, model.config.vocab_size)
    return sum(float(kl_sum(teacher, model, part)) for part in parts) / sum(len(window) for window in windows)
