"""The distil stage: check the request, then cut, train and write the student, going on from a kept state if asked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from distill.options import DistillOptions
from distill.request import Job, check_request, prepare
from distill.state import StateFolder, checkpoint_folder
from nano.errors import RequestError
from nano.folder import require_space
from nano.manifest import Manifest
from nano.shapes import ModelShape


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
