"""The distil stage: check everything on shapes and text, cut, train, write the student.

Nothing heavy is imported or read before the request has been checked. Each step is a function of its own; this
file only says in which order.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.data import Rows, pack, split_documents, training_rows
from distill.options import DistillOptions
from nano.corpus import cut_windows, describe_data, read_documents
from nano.errors import OutputExistsError, RequestError, UnsupportedError
from nano.folder import check_output, require_space
from nano.manifest import Manifest, fingerprint
from nano.progress import say, warn
from nano.shapes import ModelShape, read_config
from nano.solve import solve_student
from nano.tokens import load_tokenizer

if TYPE_CHECKING:
    from distill.state import StateFolder

MANY_EPOCHS = 20


@dataclass(frozen=True)
class Job:
    """A checked request, before torch is imported.

    Attributes:
        teacher: the teacher's folder.
        config: its config.json (the text part).
        teacher_shape, shape: of the teacher; asked of the student.
        rows, held_out: training and held-out text, packed.
        data: files of text.
        options: how to train.
        identity: everything the result depends on; a state of another identity is not resumed.
    """

    teacher: Path
    config: Mapping[str, Any]
    teacher_shape: ModelShape
    shape: ModelShape
    rows: Rows
    held_out: Rows
    data: tuple[Path, ...]
    options: DistillOptions
    identity: Mapping[str, Any]


def check_request(data: Sequence[Path], out: Path, *, force: bool, resume: bool | None) -> None:
    """What can be refused without reading anything.

    Raises:
        RequestError: no text, an output or an unfinished run in the way, or nothing to resume.
    """
    check_output(out, force=force)
    if not data:
        raise RequestError("Training needs text.", expected="--data FILE, a text or JSONL file (may be repeated)")
    state = _state_path(out)
    if resume and not state.is_file():
        raise RequestError(
            "There is no interrupted run to resume.", found=f"no {state}", todo="leave --resume out, or check --out"
        )
    if resume is False and state.is_file() and not force:
        raise OutputExistsError(
            "An interrupted run of this output is kept.",
            found=str(state.parent),
            todo="--resume goes on with it (with the same options); --force starts over",
        )


def _state_path(out: Path) -> Path:
    return out.absolute().with_name(out.absolute().name + ".checkpoint") / "state.safetensors"


def run_distill(
    teacher: Path,
    student: str | ModelShape,
    data: Sequence[Path],
    out: Path,
    options: DistillOptions,
    force: bool = False,
    *,
    resume: bool | None = False,
) -> Manifest:
    """Make a student folder.

    Args:
        teacher: a float HF folder.
        student: "nano-1", "nano-2", a size like "150k", or a shape.
        data: text files.
        out: the folder to make.
        options: how to cut and train.
        force: replace `out` once the new one is whole.
        resume: go on from the state beside `out`; None does so where that state is of this very run, and else
            starts over.

    Raises:
        RequestError and its kinds: something about the request is wrong; nothing was written.
        WorkError and its kinds: training failed; the last good state is kept beside `out`.
    """
    check_request(data, out, force=force, resume=resume)
    job = prepare(teacher, student, data, options)
    from distill.state import StateFolder, checkpoint_folder
    from distill.work import work

    state = StateFolder(checkpoint_folder(out))
    resuming = _may_resume(state, job, resume)
    parameters = job.shape.num_parameters
    require_space(out, 4 * parameters * (7 if options.steps else 1))  # two states of three floats, and the student
    try:
        return work(job, state, out, resuming, force)
    finally:
        if not state.exists():
            state.drop()


def prepare(teacher: Path, student: str | ModelShape, data: Sequence[Path], options: DistillOptions) -> Job:
    """Check the teacher, the text and the shape against each other.

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
    if options.length > shape.max_positions:
        raise RequestError(
            "The sequences are longer than the teacher's positions.",
            found=f"--length {options.length}",
            expected=f"at most {shape.max_positions}",
        )
    target = student if isinstance(student, ModelShape) else solve_student(shape, student)
    documents = read_documents(data)
    from nano.torch_lm import check_float_folder

    check_float_folder(teacher)
    tokenizer = load_tokenizer(teacher, shape.vocab_size)
    say(f"student: {describe(target)}")
    training, held = split_documents(documents, options.held_out, options.seed)
    if not training or not held:
        raise RequestError(
            "The text is too short.", found="nothing to hold out and train on beside", todo="give more text"
        )
    rows = training_rows(training, tokenizer, options.length, options.batch)
    held_out = pack(cut_windows(held, tokenizer, options.length, max_tokens=options.eval_tokens), options.length)
    epochs = options.steps * options.batch / len(rows)
    if epochs > MANY_EPOCHS:
        warn(f"the text is repeated {epochs:.0f} times; give more text or fewer --steps")
    seen = f"{rows.tokens:,} tokens in {len(rows):,} sequences, seen {epochs:.1f} times"
    say(f"text: {seen}; {held_out.tokens:,} held out")
    identity = _identity(teacher, target, data, options)
    return Job(teacher, config, shape, target, rows, held_out, tuple(data), options, identity)


def describe(shape: ModelShape) -> str:
    """A shape in one line."""
    return (
        f"{shape.num_parameters:,} parameters: width {shape.hidden_size}, feed-forward {shape.intermediate_size}, "
        f"{shape.num_layers} layers, {shape.num_heads} query and {shape.num_kv_heads} key/value heads"
    )


def _identity(teacher: Path, shape: ModelShape, data: Sequence[Path], options: DistillOptions) -> dict[str, Any]:
    settings = {k: v for k, v in dataclasses.asdict(options).items() if k != "save_every"}
    files = [entry["sha256"] for entry in describe_data(data, tokens=0)["files"]]
    plain = {"teacher": fingerprint(teacher), "shape": dataclasses.asdict(shape), "data": files, **settings}
    return dict(json.loads(json.dumps(plain)))


def _may_resume(state: StateFolder, job: Job, resume: bool | None) -> bool:
    """Whether to go on from the state; refuses one of another run where the user asked for it."""
    if resume is False or not state.exists():
        return False
    theirs = state.header().facts.get("identity", {})
    differing = sorted(key for key in {*theirs, *job.identity} if theirs.get(key) != job.identity.get(key))
    if differing and resume:
        key = differing[0]
        raise RequestError(
            "The interrupted run is another one.",
            found=f"{', '.join(differing)} changed; {key} was {theirs.get(key)!r}",
            expected=f"the same request: {key} {job.identity.get(key)!r}",
            todo="give the options it was started with, or --force (without --resume) to start over",
        )
    return not differing
