"""The heavy part of the distil stage: open the teacher, cut or begin at random, train, measure, write the student."""

from __future__ import annotations

import dataclasses
import json
import math
import resource
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from distill.caching import CachedTeacher
from distill.cross_teacher import CrossTeacher, cross_teacher
from distill.curves import CURVES, draw_curves
from distill.cutting import COUNTED, Made, Source, calibration_text, cut_model
from distill.data import Batch, batches
from distill.losses import Comparison
from distill.match import Matcher, spread
from distill.models import load_weights, new_model
from distill.optimizer import check_means
from distill.options import BEFORE, measure_of
from distill.parallel import ALONE, World
from distill.remembered import remembering
from distill.report import write_report
from distill.request import Job
from distill.sharded import SharedTeacher, shard, whole
from distill.state import METRICS, StateFolder
from distill.teacher import LiveTeacher, Teacher, open_teacher
from distill.together import compared, spread_teacher
from distill.train import Pupil, Training, objective, train
from distill.wanted import has_tokenizer
from nano.checkpoint import Checkpoint, write_checkpoint
from nano.corpus import describe_sources
from nano.families import EMBEDDING, weight_shapes
from nano.folder import staged_folder
from nano.manifest import Manifest, input_entry, write_manifest
from nano.progress import say
from nano.shapes import ModelShape
from nano.tokens import copy_tokenizer

EVAL_BATCH = 16
CUT = "cut.json"
"""What a student kept of its teacher, part by part."""


@dataclass(frozen=True)
class Assignment:
    """One student that is asked for.

    Attributes:
        job: the checked request.
        state: where its state is kept.
        out: the folder to make.
        resuming: go on from the state.
    """

    job: Job
    state: StateFolder
    out: Path
    resuming: bool


def work(assignments: Sequence[Assignment], force: bool, world: World = ALONE) -> list[Manifest]:
    """Do checked jobs of one teacher, text and options; see `distill.run.run_distill_many`."""
    job = assignments[0].job
    device = "cuda" if torch.cuda.is_available() else "cpu"
    check_means(job.options, device)
    held_out = list(batches(job.held_out, EVAL_BATCH, device))
    teacher, pupils = _open(assignments, held_out, device, world)
    if job.options.steps:
        watched = sorted({layer for pupil in pupils if pupil.matcher for layer in pupil.matcher.layers})
        source = _source(job, teacher, tuple(watched))
        if isinstance(source, LiveTeacher) and world.size == 1:
            source = remembering(source, job.rows, job.options, assignments[0].state.folder, device)
        train(Training(pupils, source, job.rows, job.options, device, job.endings, world))
    made = []
    for assignment, pupil in zip(assignments, pupils, strict=True):
        _choose(pupil, job)
        _round_to_stored(pupil.model, assignment.job)
        trained = compared(teacher, pupil, held_out, world)
        _say_figures("trained", _figures(trained, assignment.job))
        if world.first:
            with staged_folder(assignment.out, force=force) as folder:
                made.append(_write(folder, assignment, pupil, trained))
        else:
            for _ in _weights(pupil):
                pass
    for assignment in assignments:
        assignment.state.drop()
    return world.shared(made)


def _source(job: Job, teacher: LiveTeacher | CrossTeacher | SharedTeacher, watched: tuple[int, ...]) -> Teacher:
    """What the students are trained against."""
    if job.cache:
        return CachedTeacher(job.cache)
    return teacher if isinstance(teacher, CrossTeacher) else replace(teacher, watched=watched)


def _open(
    assignments: Sequence[Assignment], held_out: list[Batch], device: str, world: World
) -> tuple[LiveTeacher | CrossTeacher | SharedTeacher, tuple[Pupil, ...]]:
    """The teacher and the students; with several processes the first one's, spread over all."""
    job = assignments[0].job

    def begun() -> tuple[LiveTeacher | CrossTeacher, tuple[Pupil, ...]]:
        teacher: LiveTeacher | CrossTeacher = open_teacher(
            job.teacher, job.teacher_shape, job.options.teacher_precision, device
        )
        if job.tokenizers:
            assert isinstance(teacher, LiveTeacher)
            teacher = cross_teacher(teacher, job.tokenizers, job.options, device)
        return teacher, tuple(_pupil(assignment, teacher, held_out, device) for assignment in assignments)

    teacher, pupils = world.lead(begun) or (None, None)
    if world.mesh is None:
        assert teacher is not None and pupils is not None  # noqa: PT018
        return teacher, pupils
    assert not isinstance(teacher, CrossTeacher)  # refused before
    everyones = spread_teacher(teacher, job.teacher, job.teacher_shape, job.options.teacher_precision, world, device)
    del teacher
    return everyones, tuple(
        _spread(assignment, pupils[i] if pupils else None, everyones, held_out, device, world)
        for i, assignment in enumerate(assignments)
    )


def _spread(
    assignment: Assignment,
    pupil: Pupil | None,
    teacher: LiveTeacher | SharedTeacher,
    held_out: list[Batch],
    device: str,
    world: World,
) -> Pupil:
    """The first process's student, sharded."""
    job, facts = assignment.job, world.shared(pupil.facts if pupil else None)
    shape = ModelShape.from_hf(facts["config"])
    matcher = _matcher(job, shape, facts["kept"], device) if job.options.match else None
    body = shard(pupil.model if pupil else None, shape, world, device, matcher)
    everyones = Pupil(
        body.model, shape, assignment.state, facts,
        lambda pupil: _figures(compared(teacher, pupil, held_out, world), job),
        matcher, job.vocab, assignment.resuming, assignment.out.name, body=body,
    )  # fmt: skip
    _follow_rounds(everyones, job, device, world)
    return everyones


def _pupil(assignment: Assignment, teacher: LiveTeacher | CrossTeacher, held_out: list[Batch], device: str) -> Pupil:
    """A student as it begins, or as its state says (its weights are put back when training starts)."""
    job = assignment.job
    if assignment.resuming:
        facts = dict(assignment.state.header().facts)
        model = new_model(facts["config"]).to(device)
    else:
        assignment.state.start()
        model, facts = begin(job, teacher, held_out, device)
    pupil = Pupil(
        model, ModelShape.from_hf(facts["config"]), assignment.state, facts,
        lambda pupil: _figures(teacher.compare(pupil.model, pupil.shape, held_out, job.vocab), job),
        vocab=job.vocab, resume=assignment.resuming, name=assignment.out.name,
    )  # fmt: skip

    pupil.matcher = _matcher(job, pupil.shape, facts["kept"], device) if job.options.match else None
    _follow_rounds(pupil, job, device)
    return pupil


def _follow_rounds(pupil: Pupil, job: Job, device: str, world: World = ALONE) -> None:
    """Where in its rounds of cutting a student is, and how the next one begins."""
    if len(job.rounds) > 1:
        number = len(pupil.facts["rounds"])
        pupil.span = (job.rounds[number - 1].first, job.rounds[number - 1].last)
        more = number < len(job.rounds)
        pupil.next_round = (lambda pupil: _next_round(pupil, job, device, world)) if more else None


def _next_round(pupil: Pupil, job: Job, device: str, world: World) -> None:
    """Put what a healed student is cut to in its place; with several processes the first one cuts, all get shards."""
    healed = dict(pupil.measure(pupil))
    number = len(pupil.facts["rounds"])
    _say_figures(f"healed after round {number} of {len(job.rounds)}", healed)
    weights: dict[str, torch.Tensor] = {}
    for name, tensor in _weights(pupil):
        if world.first:
            weights[name] = tensor.cpu()
    made = world.lead(lambda: _cut_again(pupil, weights, job, device))
    weights.clear()
    pupil.facts = facts = world.shared(pupil.facts)
    pupil.shape = ModelShape.from_hf(facts["config"])
    pupil.matcher = _matcher(job, pupil.shape, facts["kept"], device) if job.options.match else None
    if world.mesh is None:
        assert made is not None
        pupil.model = made.to(device)
    else:
        pupil.body = shard(made, pupil.shape, world, device, pupil.matcher)
        pupil.model = pupil.body.model
    found = dict(pupil.measure(pupil))
    _say_figures(f"after the cut of round {number + 1}", found)
    facts["rounds"][-2]["held_out"]["healed"] = healed
    facts["rounds"][-1]["held_out"] = {"before": healed, "cut": found}
    _follow_rounds(pupil, job, device, world)


def _cut_again(pupil: Pupil, weights: Mapping[str, torch.Tensor], job: Job, device: str) -> Any:
    """The model of the round that follows; the student's facts are its."""
    facts, target = pupil.facts, job.rounds[len(pupil.facts["rounds"])]
    model = new_model(facts["config"])  # without hooks, compiled layers, recomputation and shards
    load_weights(model, weights)
    source = Source(model.to(device), pupil.shape, weights.__getitem__, facts["kept"])
    made = cut_model(source, target.shape, job.config, calibration_text(job.rows, job.options, device), job.options)
    facts.update(config=made.shape.to_hf(job.config), kept=made.kept)
    facts["rounds"].append({**made.record, "steps": target.steps})
    return made.model


def _choose(pupil: Pupil, job: Job) -> None:
    """Take the best weights where they are wanted and better than the last; `facts` says of which step they are."""
    if job.options.keep == "last" or "best" not in pupil.facts:
        return
    if pupil.facts["best"]["objective"] < objective(pupil.measure(pupil), job.options):
        pupil.state.restore_best(pupil.model)
        pupil.facts["kept_step"] = pupil.facts["best"]["step"]
        say(f"kept: the weights after step {pupil.facts['kept_step']}, the best on held-out text")


def _matcher(job: Job, shape: ModelShape, cut: Mapping[str, Any] | None, device: str) -> Matcher:
    """Each layer of the student with the teacher's that it was, or evenly spread over them."""
    width, teacher_width = shape.hidden_size, job.teacher_shape.hidden_size
    if cut is None:
        return Matcher(spread(shape.num_layers, job.teacher_shape.num_layers), width, teacher_width).to(device)
    return Matcher(cut["layers"], width, teacher_width, cut["hidden_channels"]).to(device)


def begin(
    job: Job, teacher: LiveTeacher | CrossTeacher, held_out: list[Batch], device: str
) -> tuple[Any, dict[str, Any]]:
    """The student before training, and what is known of it: config, figures, what was cut."""
    facts: dict[str, Any] = {"identity": job.identity, "seconds": 0.0, "tokens": 0, "kept": None, "rounds": []}
    if job.given is not None and not job.scratch:
        facts["config"], shape = dict(job.config), job.shape
        model = new_model(facts["config"])
        with Checkpoint(job.given) as checkpoint:
            load_weights(model, {name: checkpoint.tensor(name) for name in weight_shapes(shape)})
    elif _start(job) == "random":
        facts["config"], shape = job.shape.to_hf(job.config), job.shape
        model = new_model(facts["config"], job.options.seed)
    else:
        made = _first_cut(job, teacher, device)
        model, shape = made.model, made.shape
        facts.update(config=shape.to_hf(job.config), kept=made.kept, rounds=[made.record])
    model = model.to(device)
    before = teacher.compare(model, shape, held_out, job.vocab)
    facts["held_out"] = {"tokens": before.tokens, "teacher": _entropy(before.teacher_ce, before), "start": _figures(before, job)}  # noqa: E501  # fmt: skip
    for record in facts["rounds"]:
        record["steps"] = job.rounds[0].steps
        record["held_out"] = {"before": facts["held_out"]["teacher"], "cut": facts["held_out"]["start"]}
    say(f"teacher: cross-entropy {before.teacher_ce / before.tokens:.4f} on {before.tokens:,} held-out tokens")
    _say_figures(BEFORE[_start(job)], facts["held_out"]["start"])
    return model, facts


def _first_cut(job: Job, teacher: LiveTeacher | CrossTeacher, device: str) -> Made:
    with Checkpoint(job.teacher) as checkpoint:
        source = Source(teacher.model, teacher.shape, checkpoint.tensor)
        return cut_model(
            source, job.rounds[0].shape, job.config, calibration_text(job.rows, job.options, device), job.options
        )


def _entropy(total: float, over: Comparison) -> dict[str, float]:
    mean = total / over.tokens
    return {"cross_entropy": mean, "perplexity": math.exp(min(mean, 700.0))}


def _figures(found: Comparison, job: Job) -> dict[str, float]:
    places = found.tokens if found.spans is None else max(1, found.spans)
    return {**_entropy(found.ce, found), job.options.measure: found.kl / places, "top1": found.same / places}


def _say_figures(when: str, figures: Mapping[str, float]) -> None:
    key = measure_of(figures)
    say(f"student, {when}: cross-entropy {figures['cross_entropy']:.4f}, {key.upper()} {figures[key]:.4f}, "
        f"same top token {figures['top1']:.1%}")  # fmt: skip


def _start(job: Job) -> str:
    return "given" if job.given and not job.scratch else job.options.start


def _stored_dtype(job: Job) -> torch.dtype:
    """The precision of the file that the student began from (the teacher's, where it had none), and so of its own."""
    with Checkpoint(job.teacher if job.scratch or not job.given else job.given) as checkpoint:
        return checkpoint.rows(f"{EMBEDDING}.weight", 0, 1).dtype


@torch.no_grad()
def _round_to_stored(model: Any, job: Job) -> None:
    """Round the weights to what will be written, so that the figures are the file's."""
    dtype = _stored_dtype(job)
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype))


def _write(folder: Path, assignment: Assignment, pupil: Pupil, trained: Comparison) -> Manifest:
    """The student's files, its manifest last."""
    job, state, shape, facts = assignment.job, assignment.state, pupil.shape, pupil.facts
    dtype = _stored_dtype(job)
    write_checkpoint(folder, ((name, tensor.to(dtype)) for name, tensor in _weights(pupil)))
    config = {**facts["config"], "dtype": str(dtype).removeprefix("torch.")}
    config.pop("torch_dtype", None)
    _write_json(folder / "config.json", config)
    copy_tokenizer(job.given if job.given and has_tokenizer(job.given) else job.teacher, folder)
    if not (folder / "generation_config.json").is_file():
        ids = ("bos_token_id", "eos_token_id", "pad_token_id")
        _write_json(folder / "generation_config.json", {key: config[key] for key in ids if config.get(key) is not None})
    if facts["kept"]:
        (folder / CUT).write_text(json.dumps(facts["kept"], separators=(",", ":")) + "\n", encoding="utf-8")
    if state.metrics_bytes():
        (folder / METRICS).write_bytes((state.folder / METRICS).read_bytes())
        if job.options.curves:
            draw_curves(folder / METRICS, folder / CURVES)
    manifest = Manifest(
        kind="student",
        inputs={"teacher": input_entry(job.teacher), **_given_entry(job), **_cache_entry(job)},
        recipe=dataclasses.asdict(job.options),
        data={
            **describe_sources(job.sources, tokens=int(facts["tokens"]), seed=job.options.seed),
            "held_out_share": job.options.held_out,
            "held_out_tokens": trained.tokens,
        },
        results=_results(job, shape, facts, trained),
        shape=dataclasses.asdict(shape),
    )
    write_report(folder, manifest, picture=job.options.curves)
    return write_manifest(folder, manifest)


def _weights(pupil: Pupil) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight, whole; with several processes all have to go through them."""
    weights = pupil.model.state_dict()
    return ((name, whole(weights[name])) for name in weight_shapes(pupil.shape))


def _given_entry(job: Job) -> dict[str, Any]:
    return {"student": input_entry(job.given)} if job.given else {}


def _cache_entry(job: Job) -> dict[str, Any]:
    if job.cache is None:
        return {}
    return {"teacher_cache": {"path": str(job.cache.folder), "tokens": job.cache.tokens, **vars(job.cache.facts)}}


def _results(job: Job, shape: ModelShape, facts: Mapping[str, Any], trained: Comparison) -> dict[str, Any]:
    seconds, tokens = float(facts["seconds"]), int(facts["tokens"])
    held_out = {**facts["held_out"], "trained": _figures(trained, job)}
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "start": _start(job),
        "parameters": shape.num_parameters,
        "teacher_parameters": job.teacher_shape.num_parameters,
        "held_out": held_out,
        **_cuts(job, facts, held_out["trained"]),
        **({"shapes": [trial.as_dict() for trial in job.trials]} if job.trials else {}),
        "learning_rate": job.options.peak_rate(shape.hidden_size),
        "steps": job.options.steps,
        "kept_step": facts.get("kept_step", job.options.steps),
        "train_tokens": tokens,
        "train_seconds": seconds,
        "tokens_per_second": tokens / seconds if seconds else 0.0,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
    }


def _cuts(job: Job, facts: Mapping[str, Any], trained: Mapping[str, float]) -> dict[str, Any]:
    """What was cut, in counts; what each cut cost and how far it healed. The lists themselves are in cut.json."""
    if not facts["rounds"]:
        return {"cut": None, "rounds": []}
    last = facts["rounds"][-1]
    rounds = [*facts["rounds"][:-1], {**last, "held_out": {**last["held_out"], "healed": trained}}]
    gone = [dropped["layer"] for each in rounds for dropped in each["dropped_layers"]]
    counts = {name: [getattr(job.teacher_shape, name), last[name][1]] for name in COUNTED}
    cut = {"layers": facts["kept"]["layers"], "dropped_layers": sorted(gone), **counts, "lists": CUT}
    return {"cut": cut, "rounds": rounds}


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
