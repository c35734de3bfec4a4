"""The gate: a verdict, and where it was measured what happened, as an exit status, a report and a record.

A measurement outweighs a forecast: a bundle that lived under the phone's limits passes even where the forecast said
no, and one that was killed fails even where the forecast said yes. Both are told.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from device_profiles.budget import Verdict, require_fit
from device_profiles.footprint import BundleFacts, at_context
from device_profiles.measure import Measurement, Say, measure_bundle
from device_profiles.profile import decimal_bytes
from device_profiles.worker import DROPPED_ALWAYS, DROPPED_ONCE
from nano.ci import Case, markdown_table, step_summary, write_junit
from nano.errors import CheckFailedError, NanokitError
from nano.manifest import add_results, read_manifest

SUITE = "nanokit check"


@dataclass(frozen=True)
class Checked:
    """A bundle that was held against a phone.

    Attributes:
        bundle: its folder.
        verdict: the forecast.
        measured: what happened under the phone's limits; None where it was not run.
        seconds: how long all of it took.
    """

    bundle: Path
    verdict: Verdict
    measured: Measurement | None = None
    seconds: float = 0.0

    @property
    def fits(self) -> bool:
        """By the measurement, or by the forecast where there is none."""
        return self.verdict.fits if self.measured is None else self.measured.fits

    @property
    def name(self) -> str:
        """What was judged, in words."""
        return f"memory on {self.verdict.profile.name} at context {self.verdict.context:,}"

    @property
    def prediction_error(self) -> float | None:
        """How far the forecast of what is written lay from the measured peak; None where it was not lived to see."""
        if self.measured is None or self.measured.died is not None:
            return None
        return self.verdict.footprint.dirty / self.measured.peak_dirty - 1

    def as_dict(self) -> dict[str, Any]:
        """Plain data for `--json`, the manifest and reports."""
        found = {"bundle": str(self.bundle), **self.verdict.as_dict(), "fits": self.fits}
        if self.measured is not None:
            error = self.prediction_error
            found["measured"] = {**self.measured.as_dict(), "prediction_error": error}
        return found


def measure_check(bundle: Path, verdict: Verdict, tokens: int | None, timeout: float, say: Say) -> Measurement:
    """Run a bundle under the limits of a verdict's phone, at the verdict's context.

    Raises:
        RequestError: more tokens than the context holds.
        UnsupportedError: not Linux.
        WorkError: the process failed for another reason than memory.
    """
    allowed = {limit.name: limit.allowed for limit in verdict.limits}
    return measure_bundle(
        bundle,
        facts_of(verdict),
        resident=allowed["app_memory"],
        dirty=allowed["app_dirty_memory"],
        tokens=tokens,
        timeout=timeout,
        say=say,
    )


def facts_of(verdict: Verdict) -> BundleFacts:
    """The facts of a verdict's model at the verdict's context."""
    facts = verdict.facts
    return facts if facts.context == verdict.context else at_context(facts, verdict.context)


def require_passed(checked: Checked) -> None:
    """Raise CheckFailedError, with the reason and the numbers, unless the bundle passed."""
    measured, verdict = checked.measured, checked.verdict
    if measured is None:
        require_fit(verdict)
        return
    if measured.fits:
        return
    name, todo = verdict.profile.name, "; ".join(verdict.advice) or None
    if measured.died is not None:
        over = max(limit.needed - (limit.allowed or limit.needed) for limit in verdict.limits)
        raise CheckFailedError(
            f"It was killed on {name} at context {verdict.context:,}, in the phase '{measured.died}'"
            + (f": the forecast is {decimal_bytes(over)} too much." if over > 0 else "."),
            found=f"killed by {measured.killer}; {decimal_bytes(measured.peak_dirty)} written by then; forecast "
            f"{decimal_bytes(verdict.footprint.dirty)}, and {decimal_bytes(verdict.footprint.resident)} with what is "
            f"read in place",
            expected=allowance(verdict),
            todo=todo,
        )
    raise CheckFailedError(
        f"It pages on {name} at context {verdict.context:,}: weights are read from storage again for every token.",
        found=_paging(measured),
        expected=allowance(verdict),
        todo=todo,
    )


def allowance(verdict: Verdict) -> str:
    """What the phone allows, in words."""
    known = [limit for limit in verdict.limits if limit.allowed is not None]
    return "; ".join(f"at most {decimal_bytes(x.allowed or 0)} {x.about} ({x.name})" for x in known)


def report(checked: Checked, junit: Path | None) -> None:
    """Write what was asked for: a JUnit file, and GitHub's step summary where this runs in one of its steps."""
    if junit is not None:
        write_junit(junit, SUITE, [to_case(checked)])
    step_summary(markdown(checked))


def record(checked: Checked) -> None:
    """Put the verdict and its evidence into the bundle's manifest, in the place of an older one for the same phone.

    Raises:
        RequestError: the folder cannot be written to.
    """
    checks = dict(read_manifest(checked.bundle).results.get("checks", {}))
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    evidence = {"checked": now, "machine": f"{platform.system()} {platform.machine()}", **checked.as_dict()}
    del evidence["bundle"]
    checks[f"{checked.verdict.profile.name}@{checked.verdict.context}"] = evidence
    add_results(checked.bundle, {"checks": checks})


def to_case(checked: Checked) -> Case:
    """The check as one case of a JUnit suite."""
    verdict, measured = checked.verdict, checked.measured
    figures: dict[str, object] = {f"predicted.{cause}": count for cause, count in verdict.footprint.by_cause().items()}
    for limit in verdict.limits:
        figures[f"{limit.name}.needed"] = limit.needed
        figures[f"{limit.name}.allowed"] = "unknown" if limit.allowed is None else limit.allowed
    if measured is not None:
        figures |= {"measured.cap": measured.cap, "measured.peak_dirty": measured.peak_dirty}
        figures |= {f"measured.{key}": value for key, value in measured.samples.items()}
    return Case(checked.name, reason(checked), checked.seconds, figures, "\n".join(verdict.notes))


def reason(checked: Checked) -> str:
    """Why it failed; "" where it passed."""
    try:
        require_passed(checked)
    except NanokitError as error:
        return str(error)
    return ""


def markdown(checked: Checked) -> str:
    """The check for GitHub's step summary."""
    verdict, measured = checked.verdict, checked.measured
    mark = "✅ fits" if checked.fits else "❌ does not fit"
    lines = [f"### {checked.bundle.name}: {mark} {verdict.profile.name} at context {verdict.context:,}", ""]
    rows = []
    for limit in verdict.limits:
        allowed = "unknown" if limit.allowed is None else decimal_bytes(limit.allowed)
        rows.append((limit.about, decimal_bytes(limit.needed), allowed))
    lines.append(markdown_table(("memory", "forecast", "allowed"), rows))
    if measured is not None:
        phases = [
            (phase.name, f"{phase.seconds:.1f} s" if phase.seconds is not None else "killed",
             decimal_bytes(phase.peak_anonymous - measured.base), decimal_bytes(phase.bytes_read))
            for phase in measured.phases
        ]  # fmt: skip
        lines += ["", f"Measured under {measured.cap}:", ""]
        lines.append(markdown_table(("phase", "time", "written at most", "read from storage"), phases))
    if failure := reason(checked):
        lines += ["", "```", failure, "```"]
    return "\n".join(lines)


def _paging(measured: Measurement) -> str:
    """What was read from storage while decoding, or before where it came no further."""
    phase = next(p for p in reversed(measured.phases) if p.name not in (DROPPED_ONCE, DROPPED_ALWAYS))
    each = phase.bytes_read / max(phase.units, 1)
    return f"{decimal_bytes(each)} a token from storage in the phase '{phase.name}', {phase.per_second:.2g} tokens/s"
