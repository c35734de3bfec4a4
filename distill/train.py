"""The loop: AdamW on each student's float32 weights, one teacher for all, a deterministic order, states that survive.

What a step does depends on its number, the text, the options and the weights alone (every random number is a
function of seed, step and row), so a run that was killed and resumed ends with the same bits as one that was not.

Several students see the same batches, and the teacher runs once for all of them. Each keeps a state of its own;
where a kill left one further than another, the one ahead waits until the other has caught up.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distill.curves import Events
from distill.data import Batch, Rows, make_batch
from distill.losses import Answers, Mix, distillation_loss
from distill.match import Matcher
from distill.onpolicy import RowNumbers, continued, prompt_length, split_step
from distill.optimizer import learning_rate, make_optimizer, prepare_model
from distill.options import DistillOptions
from distill.parallel import ALONE, World
from distill.sharded import Body, whole
from distill.speed import Speed, peak_flops, training_flops
from distill.state import Interruption, StateFolder, catch_interrupt
from distill.teacher import Teacher
from nano.errors import WorkError
from nano.progress import say, track
from nano.shapes import ModelShape

SAVE_SECONDS = 120.0


@dataclass
class Pupil:
    """A student in training; its model is another one from each round of cutting to the next.

    Attributes:
        model: its transformers model, float32.
        shape: its dimensions.
        state: where its state is kept.
        facts: plain data kept with the state, so that a resumed run knows what came before.
        measure: figures on held-out text.
        matcher: for hidden-state matching, where it is wanted.
        vocab: ids that are compared with the teacher's; None means all.
        resume: go on from the state.
        name: of its output's folder.
        span: steps done when its round of cutting begins and ends; None where it is cut once.
        next_round: measures the model and cuts it for the round that follows.
        body: the model sharded over several processes; None where it lies whole on one.
    """

    model: Any
    shape: ModelShape
    state: StateFolder
    facts: dict[str, Any]
    measure: Callable[[Pupil], Mapping[str, Any]]
    matcher: Matcher | None = None
    vocab: int | None = None
    resume: bool = False
    name: str = "student"
    span: tuple[int, int] | None = None
    next_round: Callable[[Pupil], None] | None = None
    body: Body | None = None

    def rate(self, options: DistillOptions, step: int) -> float:
        """The learning rate of a step; each round rises and falls on its own."""
        first, last = self.span or (0, options.steps)
        return learning_rate(replace(options, steps=last - first), self.shape.hidden_size, step - first)

    def ends_round(self, step: int) -> bool:
        """Whether so many steps end a round that another one follows."""
        return self.span is not None and self.next_round is not None and step == self.span[1]

    @property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """All that is trained, by name."""
        own = dict(self.model.named_parameters())
        return {**own, **{f"match.{n}": p for n, p in self.matcher.named_parameters()}} if self.matcher else own


@dataclass(frozen=True)
class Training:
    """What a run works with.

    Attributes:
        pupils: the students.
        teacher: what they are trained against.
        rows: the training text.
        options: how.
        device: where all models lie.
        endings: ids that end a text, for continuations.
        world: the processes that share the work; each has rows of its own of every step's.
    """

    pupils: tuple[Pupil, ...]
    teacher: Teacher
    rows: Rows
    options: DistillOptions
    device: str
    endings: tuple[int, ...] = ()
    world: World = ALONE


@dataclass
class Seat:
    """A student's place in the loop: its optimizer, how far it is, and what the step under way has given so far."""

    pupil: Pupil
    optimizer: torch.optim.Optimizer
    events: Events
    step: int = 0
    own: list[Batch] = field(default_factory=list)
    mix: Mix = Mix(0.0, 0.0)  # noqa: RUF009
    positions: int = 0
    compared: int = 0
    targets: int = 0
    loss: float = 0.0
    kl: float = 0.0
    ce: float = 0.0
    match: float = 0.0
    norm: float = 0.0


def train(run: Training) -> None:
    """Train all students in place to the last step; their states after it are kept.

    Raises:
        WorkError: a loss or its gradient is not finite any more.
        NoSpaceError: the disk filled up.
        KeyboardInterrupt: the user stopped it; the states were kept.
    """
    seats = [_seat(pupil, run) for pupil in run.pupils]
    start = min(seat.step for seat in seats)
    if any(pupil.resume for pupil in run.pupils):
        say(f"resuming after step {start} of {run.options.steps}")
    with (
        catch_interrupt(patient=run.world.size > 1) as stop,
        track("distill", run.options.steps - start, "steps") as progress,
    ):
        try:
            _steps(run, seats, start, stop, progress.advance)
        finally:
            for seat in seats:
                seat.events.close()


def _seat(pupil: Pupil, run: Training) -> Seat:
    optimizer, step = make_optimizer(list(pupil.parameters.values()), run.options), 0
    if pupil.resume:
        saved = pupil.state.header()
        pupil.state.restore(pupil.parameters, optimizer, pupil.span[0] if pupil.span else 0)
        pupil.state.cut_metrics(int(saved.facts["metrics_bytes"]))
        step = saved.step
    prepare_model(pupil.model, run.options)
    folder = Path(run.options.tensorboard) if run.options.tensorboard and run.world.first else None
    several = len(run.pupils) > 1
    return Seat(pupil, optimizer, Events(folder / pupil.name if folder and several else folder, step), step)


def _steps(
    run: Training, seats: list[Seat], start: int, stop: Interruption, advance: Callable[[int, str], None]
) -> None:
    options = run.options
    last_saved = time.monotonic()
    speed = _speed(run)
    for step in range(start, options.steps):
        active = [seat for seat in seats if seat.step == step]
        ending = [seat for seat in active if seat.pupil.ends_round(step)]
        for seat in ending:
            _enter_round(run, seat)
        speed = _speed(run) if ending else speed
        clock = time.perf_counter()
        one_step(run, active, step)
        spent = time.perf_counter() - clock
        for seat in active:
            facts = seat.pupil.facts
            facts["seconds"] = float(facts.get("seconds", 0.0)) + spent
            facts["tokens"] = int(facts.get("tokens", 0)) + seat.positions
            _note(run, seat)
        advance(1, f"loss {', '.join(f'{seat.loss:.3f}' for seat in active)}, {speed.add(active[0].positions)}")
        last = step + 1 == options.steps
        due = (step + 1) % options.save_every == 0 if options.save_every else time.monotonic() - last_saved > SAVE_SECONDS  # noqa: E501  # fmt: skip
        stopping, due = map(bool, run.world.sums([stop.requested, due and run.world.first]))  # a clock differs
        if last or due or stopping or any(seat.pupil.ends_round(step + 1) for seat in active):
            _save(active)
            last_saved = time.monotonic()
        if stopping and not last:
            say(f"stopped after step {step + 1}; its state is kept in {seats[0].pupil.state.folder}: "
                f"the same command with --resume goes on")  # fmt: skip
            raise KeyboardInterrupt


def _speed(run: Training) -> Speed:
    flops = sum(training_flops(pupil.shape, run.options.length) for pupil in run.pupils)
    peak = peak_flops(run.device, run.options.dtype)
    return Speed(flops, peak * run.world.size if peak else None)


def _enter_round(run: Training, seat: Seat) -> None:
    """Cut the student again. Its state was kept before: a run that is killed in here cuts it once more, the same."""
    pupil = seat.pupil
    assert pupil.next_round is not None
    seat.optimizer.state.clear()  # its moments would lie beside both models
    pupil.next_round(pupil)
    seat.optimizer = make_optimizer(list(pupil.parameters.values()), run.options)
    prepare_model(pupil.model, run.options)


def one_step(run: Training, seats: list[Seat], step: int) -> None:
    """Forward and backward over the step's rows for all `seats`, then one update each if everything is finite.

    The teacher answers each batch of text once, whatever the number of students.
    """
    options = run.options
    order = run.rows.order(options.batch, step, options.seed)
    text_order, own_order = split_step(order, options.on_policy, step, options.seed)
    text = list(_micro_batches(run, text_order))
    for seat in seats:
        _begin(run, seat, text, own_order, step)
    for batch in text:
        answers = run.teacher.answers(batch)
        for seat in seats:
            _learn(run, seat, batch, answers)
    for seat in seats:
        for batch in seat.own:
            _learn(run, seat, batch, run.teacher.answers(batch))
    for seat in seats:
        seat.loss, seat.kl, seat.ce, seat.match = run.world.sums([seat.loss, seat.kl, seat.ce, seat.match])
        seat.norm = float(whole(torch.nn.utils.clip_grad_norm_(seat.pupil.parameters.values(), options.clip)))
    if not all(math.isfinite(seat.loss) and math.isfinite(seat.norm) for seat in seats):
        _not_finite(run, seats)
    for seat in seats:
        for group in seat.optimizer.param_groups:
            group["lr"] = seat.pupil.rate(options, step)
        seat.optimizer.step()
        seat.optimizer.zero_grad(set_to_none=True)
        seat.step += 1


def _begin(run: Training, seat: Seat, text: list[Batch], own_order: RowNumbers, step: int) -> None:
    """Let a student write its continuations, and count what the step's means are taken over."""
    options = run.options
    seat.own = []
    if len(own_order):
        prompt = prompt_length(run.rows, own_order, options.prompt)
        for part in _portions(own_order, options):
            with _autocast(run):
                seat.own.append(
                    continued(
                        seat.pupil.model, run.rows, part, prompt, run.endings,
                        step=step, seed=options.seed, device=run.device, vocab=seat.pupil.vocab,
                    )
                )  # fmt: skip
    counted = [batch for batch in text if not batch.idle]
    positions = sum(batch.target_N.numel() for batch in [*counted, *seat.own])
    compared = sum(batch.compared for batch in [*counted, *seat.own])
    targets = sum(batch.targets for batch in counted)
    positions, compared, targets = map(int, run.world.sums([positions, compared, targets]))
    seat.positions, seat.compared, seat.targets = positions, max(1, compared), max(1, targets)
    seat.mix = Mix(
        options.kd / seat.compared, (1 - options.kd) / seat.targets, options.temperature,
        torch.bfloat16 if options.dtype == "bfloat16" else torch.float32, options.divergence, options.mixture,
    )  # fmt: skip
    seat.loss = seat.kl = seat.ce = seat.match = 0.0


def _learn(run: Training, seat: Seat, batch: Batch, answers: Answers) -> None:
    """Add a batch's gradients and sums."""
    pupil = seat.pupil
    watched = range(pupil.shape.num_layers) if pupil.matcher else ()
    counts = 0.0 if batch.idle else 1.0
    mix = replace(seat.mix, kd_weight=counts * seat.mix.kd_weight, ce_weight=counts * seat.mix.ce_weight)

    def use(hidden_ND: torch.Tensor, layers: Mapping[int, torch.Tensor], head_VD: torch.Tensor) -> torch.Tensor:
        told = answers.over(pupil.vocab)
        loss, sums = distillation_loss(hidden_ND, head_VD[: pupil.vocab], told, batch.target_N, mix)
        if pupil.matcher:
            apart = pupil.matcher.loss(layers, told.layers)
            loss = loss + counts * run.options.match / seat.positions * apart
            seat.match += counts * float(apart.detach())
        seat.kl, seat.ce = seat.kl + counts * float(sums.kl), seat.ce + counts * float(sums.ce)
        return loss

    body = pupil.body or Body(pupil.model, pupil.shape, pupil.matcher)
    loss = body(batch, watched, use, torch.bfloat16 if run.options.dtype == "bfloat16" else None)
    loss.backward()
    seat.loss += float(loss.detach())


def _autocast(run: Training) -> torch.autocast:
    return torch.autocast(run.device, dtype=torch.bfloat16, enabled=run.options.dtype == "bfloat16")


def _portions(order: RowNumbers, options: DistillOptions) -> Iterator[RowNumbers]:
    size = options.micro_batch or options.batch
    for at in range(0, len(order), size):
        yield np.sort(order[at : at + size])


def _micro_batches(run: Training, order: RowNumbers) -> Iterator[Batch]:
    """This process's rows of a step's; as many batches on each, for a sharded pass needs all processes."""
    world = run.world
    parts = list(_portions(order[world.rank :: world.size], run.options))
    most = len(list(_portions(order[:: world.size], run.options)))
    for part in parts:
        yield replace(make_batch(run.rows, part, run.device), rows=part)
    for _ in range(most - len(parts)):
        yield replace(make_batch(run.rows, order[:1], run.device), idle=True)


def _note(run: Training, seat: Seat) -> None:
    """Figures of a step; none of a clock's, so that two runs that made the same weights wrote the same file."""
    pupil, options = seat.pupil, run.options
    record: dict[str, Any] = {
        "step": seat.step,
        "tokens": pupil.facts["tokens"],
        "loss": seat.loss,
        options.measure: seat.kl / seat.compared,
        "ce": seat.ce / seat.targets,
        "gradient_norm": seat.norm,
        "learning_rate": pupil.rate(options, seat.step - 1),
    }
    if pupil.span:
        record["parameters"] = pupil.shape.num_parameters
    if pupil.matcher:
        record["match"] = seat.match / seat.positions
    if seat.own:
        record["own_tokens"] = sum(batch.target_N.numel() for batch in seat.own)
    if options.eval_every and seat.step % options.eval_every == 0 and seat.step < options.steps:
        record["held_out"] = dict(pupil.measure(pupil))
        if options.keep == "best" and pupil.next_round is None:
            _keep_best(seat, objective(record["held_out"], options))
    pupil.state.note(record)
    seat.events.add(record)


def objective(held_out: Mapping[str, float], options: DistillOptions) -> float:
    """What training makes small, on held-out text: the mix of KL and cross-entropy."""
    return options.kd * held_out[options.measure] + (1 - options.kd) * held_out["cross_entropy"]


def _keep_best(seat: Seat, found: float) -> None:
    """Keep the weights if none before were as good. A resumed run comes by here again and does the same."""
    facts = seat.pupil.facts
    if found < facts.get("best", {"objective": math.inf})["objective"]:
        seat.pupil.state.save_best(dict(seat.pupil.model.named_parameters()))
        facts["best"] = {"step": seat.step, "objective": found}


def _save(seats: list[Seat]) -> None:
    for seat in seats:
        pupil = seat.pupil
        pupil.facts["metrics_bytes"] = pupil.state.metrics_bytes()
        pupil.state.save(seat.step, pupil.parameters, seat.optimizer, pupil.facts)


def _not_finite(run: Training, seats: list[Seat]) -> None:
    """Keep the states before this step (no update was made from it) and say so."""
    step, options = seats[0].step, run.options
    if step > 0:
        _save(seats)
    bad = next(seat for seat in seats if not (math.isfinite(seat.loss) and math.isfinite(seat.norm)))
    kept = f"; the state after step {step} is kept in {bad.pupil.state.folder}" if step > 0 else ""
    raise WorkError(
        "Training broke down: the loss or its gradient is not a finite number.",
        found=f"loss {bad.loss}, gradient norm {bad.norm} at step {step + 1}{kept}",
        todo="start over (--force) with a lower --learning-rate than "
        f"{options.peak_rate(bad.pupil.shape.hidden_size):g}"
        + (", or with --dtype float32" if options.dtype != "float32" else ""),
    )
