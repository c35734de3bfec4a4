"""Recover: distil from the float model through the int4 grid, end to end (QAD, 2601.20088).

Weights (counted in codes, see `quantize.trainable`), their scales, the norms, and the embedding and head where those
stay float, train together.

What is learned is the float model's next-token distribution, by KL divergence. Start from a solved grid (GPTQ):
each u begins within its code, on the side where the float weight lies (`LEAN`), so that the weights whose rounding
was a near thing are the first to be decided anew. A held-back part of the text decides whether the result is kept.

The loss is that divergence and a little cross-entropy with the text (`options.cross_entropy`), on windows of which some
are noised (`quantize.noise`).

Legend: B windows, T positions, V vocabulary, N output channels, K input channels, G groups, g group size.
"""

from __future__ import annotations

import itertools
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
from quantize.noise import noised
from quantize.options import QuantizeOptions
from quantize.student import Student
from quantize.trainable import BETAS, TrainableLinear, harden, trainable_groups
from quantize.whole import padded, parts_of, whole_model

MOST_HELD_BACK = 32
"""Windows are enough to tell a better model from a worse one: on stories260K the two differ by a third or more."""

KEEP_SECONDS = 30
"""Between two savings of the training's state: a kill loses no more."""

WARMUP_STEPS = 20

SETTLE = 0.15
"""Share of the training at its end in which only scales, norms and float tables move: codes have come to rest by then.
With noise, 360 steps on stories260K: KL 0.0262 against 0.0277 where all rates decay together."""


@dataclass(frozen=True)
class Recovered:
    """What training left.

    Attributes:
        weights: modules on the grid, by full name.
        floats: trained norms (float32), embedding and head (as the student stores them), by full tensor name.
        kl_before, kl_after: mean KL to the float model in nats a token, on text held back from training.
    """

    weights: dict[str, QuantizedTensor]
    floats: dict[str, torch.Tensor]
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
    tables: Sequence[str] = (),
    ids_U: torch.Tensor | None = None,
) -> Recovered:
    """Train the grid weights, scales, norms and float tables of a solved model against its float original.

    Args:
        student: the float model.
        start: every module that is on the grid.
        windows: token ids; every tenth (or fewer, about `MOST_HELD_BACK`) is held back to judge the result.
        steps: optimiser steps of `options.batch` windows.
        options: learning rate, batch, seed.
        journal: where the training's state is kept, and where an interrupted one is found.
        ends: the model that is trained, embedding and head on their grids; the student where those stay float.
        tables: full tensor names of embedding and head where they stay float.
        ids_U: ids that noise is made of; those of the windows where none are given.
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
    floats: dict[str, torch.Tensor] = {
        name: p for name, p in model.named_parameters() if name.endswith("norm.weight") or name in tables
    }
    first = _as_stored(floats, student, tables)
    before = mean_kl(teacher, model, judging)
    if ids_U is None:
        ids_U = torch.cat([window[1:] for window in windows]).unique()  # type: ignore[no-untyped-call]
    endless = _endless(training, options.seed)
    falls_to = steps * options.batch if options.method == "recover" else 0
    stream = noised(endless, ids_U, options.noise, options.seed, falls_to)
    _train(teacher, model, stream, steps, options, journal, tables)
    harden(model, 1.0)
    kept = _as_stored(floats, student, tables)
    for name, p in floats.items():
        p.data.copy_(kept[name])
    after = mean_kl(teacher, model, judging)
    if after >= before:
        warn(
            f"recovery did not bring the model nearer to its original (KL {before:.4f} before, {after:.4f} after); "
            f"the solved grid is kept: give more --data, or a lower --learning-rate"
        )
        return Recovered(start, first, before, before)
    solved = {name: model.get_submodule(name).solved() for name in start}
    return Recovered(solved, kept, before, after)


def _as_stored(floats: dict[str, torch.Tensor], student: Student, tables: Sequence[str]) -> dict[str, torch.Tensor]:
    """Copies of the float tensors that train, as they are written: tables in the student's type, norms in float32."""
    types = {name: student.tensor(name).dtype if name in tables else torch.float32 for name in floats}
    return {name: p.detach().to("cpu", types[name], copy=True) for name, p in floats.items()}


def _train(
    teacher: Any,
    model: Any,
    stream: Iterator[tuple[torch.Tensor, bool]],
    steps: int,
    options: QuantizeOptions,
    journal: Journal,
    tables: Sequence[str],
) -> None:
    """Adam with a short warm-up; a cosine to zero lets codes come to rest, then all else (see `SETTLE`).

    Goes on from the journal's state where there is one, to the same bits as without the interruption.
    """
    groups = trainable_groups(model, options.rate, norms=True, tables=tables)
    optimizer = torch.optim.Adam(groups, betas=BETAS, fused=True)
    peaks = [group["lr"] for group in optimizer.param_groups]
    first, smooth = _restore(model, optimizer, journal)
    kept = time.monotonic()
    with track("recover", steps, "steps") as bar:
        for step in range(steps):
            batch = list(itertools.islice(stream, options.batch))
            if step < first:
                bar.advance()
                continue
            warm = min(1.0, (step + 1) / WARMUP_STEPS)
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * warm * _decay(step / steps, codes=group is optimizer.param_groups[0])
            harden(model, step / steps)
            optimizer.zero_grad()
            kl = _accumulate(teacher, model, batch, options.cross_entropy)
            optimizer.step()
            smooth = kl if step == 0 else 0.9 * smooth + 0.1 * kl
            bar.advance(note=f"KL {smooth:.4f}")
            if time.monotonic() - kept > KEEP_SECONDS:
                _keep(model, optimizer, journal, step + 1, smooth)
                kept = time.monotonic()


def _decay(progress: float, codes: bool) -> float:
    """A rate's share of its peak at some progress (0 to 1) of the training."""
    share = progress / (1 - SETTLE) if codes else (progress - 1 + SETTLE) / SETTLE
    return 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, share))))


def _endless(windows: list[torch.Tensor], seed: int) -> Iterator[torch.Tensor]:
    """Windows without end, each once before any comes again, in an order that the seed decides."""
    random = torch.Generator().manual_seed(seed)
    while True:
        for i in torch.randperm(len(windows), generator=random).tolist():
            yield windows[i]


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


def _accumulate(teacher: Any, model: Any, batch: list[tuple[torch.Tensor, bool]], cross_entropy: float) -> float:
    """Gradient of the batch's mean loss, in parts that fit; gives its mean KL. No noise is learned as text."""
    positions = sum(len(window) for window, _ in batch)
    total = 0.0
    order = sorted(batch, key=lambda noised: noised[1])
    clean = len(batch) - sum(noise for _, noise in batch)
    for part in parts_of([window for window, _ in order], model.config.vocab_size):
        kl, text = loss_sums(teacher, model, part, clean)
        clean -= len(part)
        torch.autograd.backward(((1 - cross_entropy) * kl + cross_entropy * text) / positions)
        total += float(kl.detach()) / positions
    return total


def loss_sums(
    teacher: Any, model: Any, windows: list[torch.Tensor], clean: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """KL from the teacher's to the model's next-token distribution, and the text's cross-entropy, in nats.

    Both are summed over positions, the second over those of the first `clean` windows that have a next token.
    """
    device = next(teacher.parameters()).device
    ids_BT, real_BT = padded(windows, device)
    with torch.no_grad():
        wanted_BTV = teacher(input_ids=ids_BT, use_cache=False).logits.log_softmax(-1)
    given_BTV = model(input_ids=ids_BT, use_cache=False).logits.log_softmax(-1)
    kl_BT = F.kl_div(given_BTV, wanted_BTV, reduction="none", log_target=True).sum(-1)
    text_BT = -given_BTV[:, :-1].gather(-1, ids_BT[:, 1:, None])[..., 0]
    return (kl_BT * real_BT).sum(), (text_BT * real_BT[:, 1:])[: max(clean, 0)].sum()


@torch.no_grad()
def mean_kl(teacher: Any, model: Any, windows: list[torch.Tensor]) -> float:
    """Mean KL in nats a position over some windows."""
    parts = parts_of(windows, model.config.vocab_size)
    return sum(float(loss_sums(teacher, model, part)[0]) for part in parts) / sum(len(window) for window in windows)
