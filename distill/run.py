"""The distil stage: check the request, then cut, train and write the student, going on from a kept state if asked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from distill.options import DistillOptions
from distill.parallel import World, check_together, is_lost, joined, lost_peer
from distill.request import Job, check_outputs_spare_inputs, check_request, prepare
from distill.state import StateFolder, checkpoint_folder, kept_in_words, state_folder
from nano.errors import RequestError
from nano.folder import require_space
from nano.manifest import Manifest
from nano.shapes import ModelShape


def run_distill(
    teacher: Path,
    student: str | ModelShape,
    data: Sequence[str | Path],
    out: Path,
    options: DistillOptions,
    force: bool = False,
    *,
    resume: bool | None = False,
    teacher_cache: Path | None = None,
) -> Manifest:
    """Make a student folder; see `run_distill_many`.

    Args:
        student: "nano-1", "nano-2", a size like "150k", or a shape.
        out: the folder to make.
    """
    wanted = [(student, out)]
    return run_distill_many(teacher, wanted, data, options, force, resume=resume, teacher_cache=teacher_cache)[0]


def run_distill_many(
    teacher: Path,
    students: Sequence[tuple[str | ModelShape, Path]],
    data: Sequence[str | Path],
    options: DistillOptions,
    force: bool = False,
    *,
    resume: bool | None = False,
    teacher_cache: Path | None = None,
) -> list[Manifest]:
    """Make several students of one teacher in one pass: it runs once for all of them.

    Each comes out as it would alone, bit for bit.

    Args:
        teacher: a float HF folder.
        students: what to make and the folder to make it in.
        data: text, see `nano.sources`.
        options: how to cut and train.
        force: replace the outputs once the new ones are whole.
        resume: go on from the states beside the outputs; None does so where a state is of this very run, and else
            starts over.
        teacher_cache: train from the answers that `nanokit cache-teacher` kept; the teacher then runs only to be cut
            and to be compared with.

    Raises:
        RequestError and its kinds: something about the request is wrong; nothing was written.
        WorkError and its kinds: training failed; the last good states are kept beside the outputs.
    """
    outs = [out for _student, out in students]

    def check(world: World, states: Sequence[StateFolder]) -> list[tuple[Job, bool]]:
        check_request(data, outs, force=force, resume=resume)
        check_outputs_spare_inputs(teacher, data, outs, teacher_cache)
        if world.size > 1:
            check_together(options)
        jobs = prepare(teacher, [student for student, _out in students], data, options, teacher_cache)
        for job, out in zip(jobs, outs, strict=True):
            floats = 4 * job.largest
            require_space(out, floats * (7 if options.steps else 1))  # two states of three floats, and the student
        for state in states:
            state.hold()
        return [(job, _may_resume(state, job, resume)) for job, state in zip(jobs, states, strict=True)]

    with joined() as world:
        states = [state_folder(checkpoint_folder(out), world) for out in outs]
        try:
            checked = world.checked(lambda: check(world, states))
            from distill.work import Assignment, work

            given = zip(checked, states, outs, strict=True)
            assignments = [Assignment(job, state, out, resuming) for (job, resuming), state, out in given]
            return work(assignments, force, world)
        except RuntimeError as error:
            if world.size == 1 or not is_lost(error):
                raise
            raise lost_peer(error, world, kept_in_words(states)) from None
        finally:
            for state in states:
                state.release()


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
