"""The loop: AdamW on the student's float32 weights, one teacher, a deterministic order, a state that survives.

What a step does depends on its number, the text, the options and the weights alone (no random numbers are drawn
while training), so a run that was killed and resumed ends with the same bits as one that was not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from distill.data import Batch, Rows, make_batch, row_order
from distill.losses import Mix
from distill.models import head_weight, hidden_states
from distill.options import DistillOptions
from distill.state import Interruption, StateFolder, catch_interrupt
from distill.teacher import Teacher
from nano.errors import WorkError
from nano.progress import say, track
from nano.shapes import ModelShape

SAVE_SECONDS = 120.0
BETAS = (0.9, 0.95)
"""Llama 2's (arXiv 2307.09288, section 2.2): a shorter memory than 0.999, right for runs of few steps."""

FUSED_OPTIMIZER = True


@dataclass(frozen=True)
class Training:
    """What a run works with.

    Attributes:
        model: the student, float32.
        shape: its dimensions.
        teacher: what it is trained against.
        rows: the training text.
        options: how.
        state: where its state is kept.
        facts: plain data kept with the state, so that a resumed run knows what came before.
        measure: figures on held-out text.
        device: where both models lie.
    """

    model: Any
    shape: ModelShape
    teacher: Teacher
    rows: Rows
    options: DistillOptions
    state: StateFolder
    facts: dict[str, Any]
    measure: Callable[[], Mapping[str, Any]]
    device: str


@dataclass(frozen=True)
class StepResult:
    """Means per position in nats, before the step's update."""

    loss: float
    kl: float
    ce: float
    gradient_norm: float
    tokens: int


def learning_rate(options: DistillOptions, hidden_size: int, step: int) -> float:
    """Of step `step` (from 0): a linear rise to the peak, then a linear fall to `final_rate` of it."""
    peak, rise = options.peak_rate(hidden_size), max(1, round(options.warmup * options.steps))
    if step < rise:
        return peak * (step + 1) / rise
    done = (step - rise + 1) / max(1, options.steps - rise)
    return peak * (1 - done * (1 - options.final_rate))


def make_optimizer(model: Any, options: DistillOptions) -> torch.optim.AdamW:
    """AdamW; norms are not decayed."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": options.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=BETAS, fused=FUSED_OPTIMIZER)


def train(run: Training, resume: bool) -> float:
    """Train to the last step; the state after it is kept.

    Args:
        run: what to work with; `run.model` is trained in place.
        resume: go on from the state in `run.state`.

    Returns:
        seconds spent in steps, earlier sittings included.

    Raises:
        WorkError: the loss or its gradient is not finite any more.
        NoSpaceError: the disk filled up.
        KeyboardInterrupt: the user stopped it; the state was kept.
    """
    optimizer = make_optimizer(run.model, run.options)
    start = 0
    if resume:
        saved = run.state.header()
        run.state.restore(run.model, optimizer)
        run.state.cut_metrics(int(saved.facts["metrics_bytes"]))
        start = saved.step
        say(f"resuming after step {start} of {run.options.steps}")
    with catch_interrupt() as stop, track("distill", run.options.steps - start, "steps") as progress:
        return _steps(run, optimizer, start, stop, progress.advance)


def _steps(
    run: Training,
    optimizer: torch.optim.AdamW,
    start: int,
    stop: Interruption,
    advance: Callable[[int, str], None],
) -> float:
    options = run.options
    spent, tokens = float(run.facts.get("seconds", 0.0)), int(run.facts.get("tokens", 0))
    last_saved, began = time.monotonic(), time.monotonic()
    sitting_tokens = 0
    for step in range(start, options.steps):
        clock = time.perf_counter()
        done = _one_step(run, optimizer, step)
        spent += time.perf_counter() - clock
        tokens += done.tokens
        sitting_tokens += done.tokens
        run.facts.update(seconds=spent, tokens=tokens)
        _note(run, step, done)
        advance(1, f"loss {done.loss:.3f}, {sitting_tokens / max(time.monotonic() - began, 1e-9):,.0f} tokens/s")
        last = step + 1 == options.steps
        due = (step + 1) % options.save_every == 0 if options.save_every else time.monotonic() - last_saved > SAVE_SECONDS  # noqa: E501  # fmt: skip
        if last or due or stop.requested:
            _save(run, optimizer, step + 1)
            last_saved = time.monotonic()
        if stop.requested and not last:
            say(f"stopped after step {step + 1}; its state is kept in {run.state.folder}: "
                f"the same command with --resume goes on")  # fmt: skip
            raise KeyboardInterrupt
    return spent


def _one_step(run: Training, optimizer: torch.optim.AdamW, step: int) -> StepResult:
    """Forward and backward over the step's rows, then one update if everything is finite."""
    options = run.options
    parts = list(_micro_batches(run, step))
    positions = sum(part.target_N.numel() for part in parts)
    targets = max(1, sum(part.targets for part in parts))
    dtype = torch.bfloat16 if options.dtype == "bfloat16" else torch.float32
    mix = Mix(options.kd / positions, (1 - options.kd) / targets, options.temperature, dtype)
    loss = kl = ce = 0.0
    for part in parts:
        with torch.autocast(run.device, dtype=torch.bfloat16, enabled=options.dtype == "bfloat16"):
            hidden_ND = hidden_states(run.model, run.shape, part)
        part_loss, sums = run.teacher.loss(hidden_ND, head_weight(run.model), part, mix)
        part_loss.backward()  # type: ignore[no-untyped-call]
        loss, kl, ce = loss + float(part_loss.detach()), kl + float(sums.kl), ce + float(sums.ce)
    norm = float(torch.nn.utils.clip_grad_norm_(run.model.parameters(), options.clip))
    if not (math.isfinite(loss) and math.isfinite(norm)):
        _not_finite(run, optimizer, step, loss, norm)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(options, run.shape.hidden_size, step)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return StepResult(loss, kl / positions, ce / targets, norm, positions)


def _micro_batches(run: Training, step: int) -> Iterator[Batch]:
    order = row_order(len(run.rows), run.options.batch, step, run.options.seed)
    size = run.options.micro_batch or run.options.batch
    for at in range(0, len(order), size):
        yield make_batch(run.rows, np.sort(order[at : at + size]), run.device)


def _note(run: Training, step: int, done: StepResult) -> None:
    """Figures of a step; none of a clock's, so that two runs that made the same weights wrote the same file."""
    record: dict[str, Any] = {
        "step": step + 1,
        "tokens": run.facts["tokens"],
        "loss": done.loss,
        "kl": done.kl,
        "ce": done.ce,
        "gradient_norm": done.gradient_norm,
        "learning_rate": learning_rate(run.options, run.shape.hidden_size, step),
    }
    every = run.options.eval_every
    if every and (step + 1) % every == 0 and step + 1 < run.options.steps:
        record["held_out"] = dict(run.measure())
    run.state.note(record)


def _save(run: Training, optimizer: torch.optim.AdamW, step: int) -> None:
    run.facts["metrics_bytes"] = run.state.metrics_bytes()
    run.state.save(step, run.model, optimizer, run.facts)


def _not_finite(run: Training, optimizer: torch.optim.AdamW, step: int, loss: float, norm: float) -> None:
    """Keep the state before this step (no update was made from it) and say so."""
    if step > 0:
        _save(run, optimizer, step)
    kept = f"; the state after step {step} is kept in {run.state.folder}" if step > 0 else ""
    raise WorkError(
        "Training broke down: the loss or its gradient is not a finite number.",
        found=f"loss {loss}, gradient norm {norm} at step {step + 1}{kept}",
        todo=f"start over (--force) with a lower --learning-rate than {run.options.peak_rate(run.shape.hidden_size):g}"
        + (", or with --dtype float32" if run.options.dtype != "float32" else ""),
    )
