"""The distil stage's request, checked on shapes and text before anything heavy is imported or read."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from distill.cache import Cache, check_cache
from distill.data import Rows
from distill.options import DistillOptions
from distill.rounds import Round, plan_rounds
from distill.state import StateFolder, checkpoint_folder
from distill.text import Other, load_text
from distill.vocabulary import vocabulary_hash
from distill.wanted import Wanted, common_ids, find_student, students_tokenizer
from nano.errors import OutputExistsError, RequestError, UnsupportedError
from nano.exportable import warn_of_export
from nano.families import family_of
from nano.folder import check_output
from nano.manifest import fingerprint
from nano.progress import say, warn
from nano.shapes import ModelShape, read_config
from nano.solve import solve_shapes
from nano.sources import Source, open_sources
from nano.tokens import TextTokenizer, load_tokenizer

if TYPE_CHECKING:
    from distill.search import Trial

MANY_EPOCHS = 20
NO_MATTER = ("save_every", "curves", "tensorboard")
"""Options on which the weights do not depend."""


@dataclass(frozen=True)
class Job:
    """A checked request, before torch is imported.

    Attributes:
        teacher: the teacher's folder.
        config: the config.json that the student's is made of.
        teacher_shape, shape: of the teacher; asked of the student.
        rows, held_out: training and held-out text, packed.
        sources: where the text came from.
        options: how to train.
        identity: everything the result depends on; a state of another identity is not resumed.
        endings: ids that end a text.
        cache: the teacher's answers on disk, where the student is trained from them.
        given: the student's folder, where one was named.
        scratch: only the folder's architecture counts, not its weights.
        vocab: ids that are compared, where the embeddings of teacher and student differ in size.
        rounds: the cuts and what each is trained for; one where the student is not cut.
        tokenizers: the student's and the teacher's, where they differ.
        trials: shapes that were tried before this one was taken, which is the first of them.
    """

    teacher: Path
    config: Mapping[str, Any]
    teacher_shape: ModelShape
    shape: ModelShape
    rows: Rows
    held_out: Rows
    sources: tuple[Source, ...]
    options: DistillOptions
    identity: Mapping[str, Any]
    endings: tuple[int, ...] = ()
    cache: Cache | None = None
    given: Path | None = None
    vocab: int | None = None
    rounds: tuple[Round, ...] = ()
    scratch: bool = False
    tokenizers: tuple[TextTokenizer, TextTokenizer] | None = None
    trials: tuple[Trial, ...] = ()

    @property
    def largest(self) -> int:
        """Parameters of the largest model that is trained on the way."""
        return max([self.shape.num_parameters, *(each.shape.num_parameters for each in self.rounds)])


def check_outputs_spare_inputs(
    teacher: Path, data: Sequence[str | Path], outs: Sequence[Path], teacher_cache: Path | None
) -> None:
    """No output replaces what it is made from, not even by force.

    Raises:
        RequestError: an output folder holds the teacher, its cache or the text.
    """
    named = [str(source) for source in data]
    paths = [*named, *(name.rpartition("=")[0] for name in named)]  # with its weight, and without
    sources = [teacher, *(Path(path) for path in paths if path), *([teacher_cache] if teacher_cache else [])]
    for out in outs:
        check_output(out, force=True, made_from=sources)


def check_request(data: Sequence[str | Path], outs: Sequence[Path], *, force: bool, resume: bool | None) -> None:
    """What can be refused without reading anything.

    Raises:
        RequestError: no text, an output or an unfinished run in the way, or nothing to resume.
    """
    if len({out.absolute() for out in outs}) < len(outs):
        raise RequestError("Two students would be written to one folder.", found=", ".join(map(str, outs)))
    for out in outs:
        check_output(out, force=force)
    if not data:
        raise RequestError("Training needs text.", expected="--data FILE, a text or JSONL file (may be repeated)")
    states = [StateFolder(checkpoint_folder(out)) for out in outs]
    if resume and not any(state.exists() for state in states):
        raise RequestError(
            "There is no interrupted run to resume.",
            found=f"no state in {states[0].folder}",
            todo="leave --resume out, or check --out",
        )
    for state in states:
        if resume is False and state.exists() and not force:
            raise OutputExistsError(
                "An interrupted run of this output is kept.",
                found=str(state.folder),
                todo="--resume goes on with it (with the same options); --force starts over",
            )


def prepare(
    teacher: Path,
    students: Sequence[str | ModelShape],
    data: Sequence[str | Path],
    options: DistillOptions,
    teacher_cache: Path | None = None,
) -> list[Job]:
    """Check the teacher, the text and the shapes against each other; a job for each student.

    Raises:
        RequestError and its kinds.
    """
    config = read_config(teacher)
    shape = ModelShape.from_hf(config)
    if config.get("final_logit_softcapping"):
        raise UnsupportedError(
            "Capped logits are not supported.",
            found=f"final_logit_softcapping = {config['final_logit_softcapping']}",
            todo="use a teacher without it",
        )
    _check_length(options.length, shape, "teacher")
    targets = [find_student(student, shape, config, options.start) for student in students]
    for target in targets:
        _check_length(options.length, target.shape, "student")
        warn_of_export(target.config, family_of(target.shape.family))
    cache = open_cache(teacher_cache, options) if teacher_cache else None
    sources = open_sources(data)
    from nano.torch_lm import check_float_folder

    check_float_folder(teacher)
    tokenizer = load_tokenizer(teacher, shape.vocab_size)
    plans = _plans(targets, shape, options, tell=options.shapes == 1)
    own = tokenizer
    if options.cross_tokenizer == "none":
        common = [common_ids(target, shape, tokenizer) for target in targets]
        text = load_text(sources, tokenizer, options)
    else:
        own, common = students_tokenizer(targets, tokenizer)
        text = load_text(sources, own, options, other=Other(tokenizer, shape.max_positions))
    rows, held_out = text.rows, text.held_out
    trials = _try_shapes(teacher, shape, students, targets, config, rows, options)
    if options.shapes > 1:
        targets = [replace(t, shape=tried[0].shape) if tried else t for t, tried in zip(targets, trials, strict=True)]
        plans = _plans(targets, shape, options, tell=True)
    _say_text(rows, held_out, options)
    endings = tokenizer.eos_ids if tokenizer.bos_id is None else (*tokenizer.eos_ids, tokenizer.bos_id)
    shared = _identity(teacher, sources, options)
    if cache:
        which = rows_seen(rows, options)
        check_cache(cache, shared["teacher"], vocabulary_hash(tokenizer), options.temperature, rows, which)
        shared["teacher_cache"] = vars(cache.facts)
    return [
        Job(
            teacher, target.config, shape, target.shape, rows, held_out, sources, options,
            {**shared, **_own_identity(target)}, endings, cache, target.folder, ids, plan,
            target.scratch, None if own is tokenizer else (own, tokenizer), tried,
        )
        for target, ids, plan, tried in zip(targets, common, plans, trials, strict=True)
    ]  # fmt: skip


def _try_shapes(
    folder: Path,
    teacher: ModelShape,
    students: Sequence[str | ModelShape],
    targets: Sequence[Wanted],
    config: Mapping[str, Any],
    rows: Rows,
    options: DistillOptions,
) -> list[tuple[Trial, ...]]:
    """For each student the shapes that were tried, the best first; none where it is not one to cut to a size."""
    by_size = [isinstance(s, str) and t.folder is None for s, t in zip(students, targets, strict=True)]
    if options.shapes == 1 or options.start != "pruned" or not any(by_size):
        return [()] * len(targets)
    from distill.search import least_damaged

    sizes = [str(student) for student, wanted in zip(students, by_size, strict=True) if wanted]
    shapes = [solve_shapes(teacher, size, options.shapes) for size in sizes]
    found = iter(least_damaged(folder, teacher, shapes, config, rows, options))
    return [next(found) if wanted else () for wanted in by_size]


def _plans(
    targets: Sequence[Wanted], teacher: ModelShape, options: DistillOptions, tell: bool
) -> list[tuple[Round, ...]]:
    """The rounds of each student; says what it will be where that is certain."""
    plans = [_rounds(teacher, target, options) for target in targets]
    for target, plan in zip(targets, plans, strict=True):
        if tell:
            _say_student(target, teacher, plan, options)
    return plans


def _rounds(teacher: ModelShape, target: Wanted, options: DistillOptions) -> tuple[Round, ...]:
    if target.folder is not None or options.start != "pruned":
        return (Round(target.shape, 0, options.steps),)
    return plan_rounds(teacher, target.shape, options)


def _check_length(length: int, shape: ModelShape, whose: str) -> None:
    if length > shape.max_positions:
        raise RequestError(
            f"The sequences are longer than the {whose}'s positions.",
            found=f"--length {length}",
            expected=f"at most {shape.max_positions}",
        )


def _say_text(rows: Rows, held_out: Rows, options: DistillOptions) -> None:
    epochs = options.steps * options.batch / len(rows)
    if epochs > MANY_EPOCHS:
        warn(f"the text is repeated {epochs:.0f} times; give more text or fewer --steps")
    seen = f"{rows.tokens:,} tokens in {len(rows):,} sequences, seen {epochs:.1f} times"
    say(f"text: {seen}; {held_out.tokens:,} held out")


def _say_student(target: Wanted, teacher: ModelShape, plan: tuple[Round, ...], options: DistillOptions) -> None:
    say(f"student: {describe(target.shape)}")
    if target.scratch or (options.start == "random" and target.folder is None):
        say(_from_scratch(target, teacher))
    for number, each in enumerate(plan[:-1], 1):
        say(f"round {number} of {len(plan)}: {describe(each.shape)}, {each.steps} steps")


def _from_scratch(target: Wanted, teacher: ModelShape) -> str:
    """What a random start means, for people."""
    other = target.shape.family != teacher.family
    why = f": nothing can be cut from a teacher of another family ({teacher.family})" if other else ""
    return (
        f"it begins from scratch ({target.shape.family}, weights at random){why}; the teacher's answers are all that "
        "it learns from, so it needs far more text and steps than one that is cut"
    )


def open_cache(folder: Path, options: DistillOptions) -> Cache:
    """A cache, for a run that can be trained from one.

    Raises:
        BadFileError: it is none, or broken.
        RequestError: the options need a teacher that runs.
    """
    for name, needs in (
        (f"--divergence {options.divergence}", options.divergence != "forward"),
        (f"--on-policy {options.on_policy:g}", options.on_policy > 0),
        (f"--match {options.match:g}", options.match > 0),
        (f"--cross-tokenizer {options.cross_tokenizer}", options.cross_tokenizer != "none"),
    ):
        if needs:
            raise RequestError(
                "A cache cannot answer that.",
                found=f"{name} with --teacher-cache",
                expected="--divergence forward, the text as it is, and no hidden states: a sample gives no more",
                todo="leave --teacher-cache out, so that the teacher runs",
            )
    return Cache(folder)


def rows_seen(rows: Rows, options: DistillOptions) -> npt.NDArray[np.int64]:
    """The rows that a run will see, ascending."""
    if options.steps * options.batch >= len(rows) and not rows.mix:
        return np.arange(len(rows))
    seen = [rows.order(options.batch, step, options.seed) for step in range(options.steps)]
    return np.unique(np.concatenate([np.zeros(0, np.int64), *seen]))


def describe(shape: ModelShape) -> str:
    """A shape in one line."""
    return (
        f"{shape.num_parameters:,} parameters: width {shape.hidden_size}, feed-forward {shape.intermediate_size}, "
        f"{shape.num_layers} layers, {shape.num_heads} query and {shape.num_kv_heads} key/value heads"
    )


def _own_identity(target: Wanted) -> dict[str, Any]:
    plain = {"shape": dataclasses.asdict(target.shape), "given": target.folder and fingerprint(target.folder)}
    return dict(json.loads(json.dumps(plain)))


def _identity(teacher: Path, sources: Sequence[Source], options: DistillOptions) -> dict[str, Any]:
    settings = {k: v for k, v in dataclasses.asdict(options).items() if k not in NO_MATTER}
    files = [(source.fingerprint(), source.weight) for source in sources]
    plain = {"teacher": fingerprint(teacher), "data": files, **settings}
    return dict(json.loads(json.dumps(plain)))
