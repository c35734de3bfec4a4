"""`nanokit plan`, `nanokit check` and `nanokit profiles`: nothing here loads torch, a model or a weight."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from nano.errors import RequestError

Negative = Parameter(negative="")


def plan(
    *,
    student: str,
    teacher: str | None = None,
    profile: str | None = None,
    context: int | None = None,
    runtime: Literal["executorch", "onnx"] = "executorch",
    embedding: Literal["float", "8", "4"] = "4",
    kv_cache: Literal["float", "int8"] = "float",
    tokens: str | None = None,
    picture: Path | None = None,
    json: Annotated[bool, Negative] = False,
) -> int:
    """Solve a student's shape; count parameters, bytes and training cost; hold it against a phone.

    Reads config.json only, never a weight. With --profile the exit status is 0 where it fits and 1 where not.

    Parameters
    ----------
    student
        nano-1 (1.80 B parameters), nano-2 (3.25 B), or a size like 1.2B, 40M, 150k.
    teacher
        Model folder or hub id whose family and vocabulary the student keeps; without one, the canonical shape
        that is trained from scratch.
    profile
        Phone to hold it against: a name from `nanokit profiles`, or the path of a profile file.
    context
        Positions in use on the phone; 4,096 or the model's own limit, whichever is less.
    runtime
        Which runtime the memory forecast is for.
    embedding
        What the memory forecast assumes the embedding (and a tied head) is kept in.
    kv_cache
        What the memory forecast assumes the KV cache holds: float32, or int8 (ExecuTorch).
    tokens
        Training tokens to count the cost for, like 94B; 20 for each parameter of the student where not given.
    picture
        Write the memory by cause as a PNG: against the phone of --profile, or else against every phone whose limits
        are known.
    json
        Print one JSON object.
    """
    from device_profiles.budget import judge, judge_all, require_fit
    from device_profiles.footprint import check_context, planned_facts, predict
    from device_profiles.plan import make_plan
    from device_profiles.profile import load_profile
    from nano.ci import check_report

    if context is not None and context < 1:
        raise RequestError("The context is not positive.", found=f"--context {context}", expected="1 or more")
    if picture is not None:
        check_report(picture)
    device = None if profile is None else load_profile(profile)
    made = make_plan(student, _teacher_folder(teacher), tokens)
    if context is not None:
        check_context(made.shape, context)
    facts = planned_facts(made.shape, made.recipe(runtime, embedding=embedding, context=context or 4096, kv=kv_cache))
    verdict = None if device is None else judge(facts, device, facts.context)
    if json:
        from nano.progress import emit_json

        footprint = {"runtime": runtime, "context": facts.context, "bytes": predict(facts).by_cause()}
        emit_json({**made.as_dict(), "footprint": footprint, "verdict": verdict and verdict.as_dict()})
    else:
        from device_profiles.tables import outcome, plan_tables, verdict_tables

        against = [*verdict_tables(verdict), outcome(verdict, verdict.fits)] if verdict else []
        _show([*plan_tables(made), *against])
    if picture is not None:
        from device_profiles.picture import write_picture

        write_picture(picture, [verdict] if verdict else judge_all(facts))
    if verdict:
        require_fit(verdict)
    return 0


def check(
    bundle: Path,
    /,
    *,
    profile: str,
    context: int | None = None,
    measure: Annotated[bool, Negative] = False,
    measure_tokens: int | None = None,
    measure_minutes: float = 60,
    picture: Path | None = None,
    junit: Path | None = None,
    record: bool = True,
    json: Annotated[bool, Negative] = False,
) -> int:
    """Check a bundle's memory against a phone's budget: from its manifest, or by running it under that budget.

    The exit status is 0 where it fits, 1 where it does not, 2 where the bundle or the request is broken. In a step of
    GitHub Actions the verdict is added to the step's summary.

    Parameters
    ----------
    bundle
        The folder that nanokit export wrote.
    profile
        Phone to hold it against: a name from `nanokit profiles`, or the path of a profile file.
    context
        Positions in use, at most what the bundle was exported with (a .pte always keeps that much).
    measure
        Load it in its real runtime in a process of its own, under a hard limit on memory, prefill to the context
        and decode. Linux only. The measurement decides then, not the forecast.
    measure_tokens
        Positions to prefill when measuring, instead of the whole context; the rest of the cache's memory is still
        taken.
    measure_minutes
        Time after which a measurement is given up: a model that pages may take days.
    picture
        Write the forecast by cause against the phone's limits as a PNG.
    junit
        Write the verdict as JUnit XML, for build servers.
    record
        Put the verdict and its evidence into the bundle's manifest.
    json
        Print one JSON object.
    """
    from device_profiles.check import check_bundle, require_predictable
    from device_profiles.gate import Checked, measure_check, report, require_passed
    from device_profiles.gate import record as put
    from nano.ci import check_report
    from nano.progress import emit_json, say

    if measure_tokens is not None and not measure:
        raise RequestError("--measure-tokens is for --measure.", todo="add --measure")
    for path in (picture, junit):
        if path is not None:
            check_report(path)
    started = time.monotonic()
    verdict = check_bundle(bundle, profile, context)
    if not measure:
        require_predictable(bundle)
    measured = measure_check(bundle, verdict, measure_tokens, measure_minutes * 60, say) if measure else None
    checked = Checked(bundle, verdict, measured, time.monotonic() - started)
    if json:
        emit_json(checked.as_dict())
    else:
        from device_profiles.tables import checked_tables

        _show(checked_tables(checked))
    if picture is not None:
        from device_profiles.picture import write_picture

        write_picture(picture, [verdict])
    if record:
        put(checked)
    report(checked, junit)
    require_passed(checked)
    return 0


def profiles(
    action: Literal["list", "show"] = "list",
    name: str | None = None,
    /,
    *,
    json: Annotated[bool, Negative] = False,
) -> int:
    """List the device profiles, or show one with the source and date of every fact.

    Parameters
    ----------
    action
        "list" all that come with nanokit, or "show" one.
    name
        Which one to show: a name, or the path of a profile file of your own.
    json
        Print one JSON object.
    """
    from device_profiles.profile import load_profile, profile_names
    from nano.progress import emit_json

    if action == "show" and name is None:
        raise RequestError("Which profile?", expected=f"one of {', '.join(profile_names())}", todo="nanokit profiles show NAME")  # noqa: E501  # fmt: skip
    if action == "list" and name is not None:
        raise RequestError("'list' takes no name.", found=name, todo=f"nanokit profiles show {name}")
    found = [load_profile(each) for each in ([name] if name else profile_names())]
    if json:
        emit_json({profile.name: profile.as_dict() for profile in found})
        return 0
    from device_profiles.tables import profile_lines, profiles_table

    _show(profile_lines(found[0]) if action == "show" else [profiles_table(found)])
    return 0


def _teacher_folder(teacher: str | None) -> Path | None:
    if teacher is None:
        return None
    from nano.hub import resolve_model

    return resolve_model(teacher, weights=False)


def _show(tables: list[Any]) -> None:
    from rich.console import Group

    from nano.progress import show

    show(Group(*tables))
