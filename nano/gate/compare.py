"""`nanokit compare`: a baseline and a candidate, each a saved file or a model, measured on the same text and judged."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nano.baseline import Baseline, read_baseline
from nano.ci import Case, markdown_table, step_summary, write_junit
from nano.errors import CheckFailedError, RequestError
from nano.evaluate import EvaluateOptions, OtherVocabularyError, evaluate_by_document
from nano.gate.cards import Change, as_dicts
from nano.gate.compare_cards import compare_cards, concerns_cards
from nano.gate.limits import CARD_LIMITS, REFERENCE_LIMITS, Limits, read_limits
from nano.gate.verdicts import Verdict, as_dict, judge
from nano.lm import stage_of
from nano.progress import warn
from nano.scorecard_file import Asked, SavedCard

if TYPE_CHECKING:
    from rich.table import Table

SUITE = "nanokit compare"


@dataclass(frozen=True)
class Compared:
    """Two models that were judged.

    Attributes:
        baseline: the one that is good enough.
        candidate: the one that may have lost something.
        limits: what may be lost.
        verdicts: one for each figure that could be judged.
        notes: what was not judged, and why.
        seconds: how long it took.
        changes: of scorecards, the questions that were answered differently.
    """

    baseline: Baseline | SavedCard
    candidate: Baseline | SavedCard
    limits: Limits
    verdicts: tuple[Verdict, ...]
    notes: tuple[str, ...]
    seconds: float
    changes: tuple[Change, ...] = ()

    @property
    def refused(self) -> tuple[Verdict, ...]:
        """The verdicts that fail the gate."""
        stopping = ("failed", "undecided") if self.limits.undecided == "fail" else ("failed",)
        return tuple(verdict for verdict in self.verdicts if verdict.outcome in stopping)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        sides = {
            name: {"model": dict(side.model), "reference": side.reference and dict(side.reference), **side.scores}
            for name, side in (("baseline", self.baseline), ("candidate", self.candidate))
        }
        cards = isinstance(self.candidate, SavedCard)
        return {
            "passed": not self.refused,
            **sides,
            "data": dict(self.candidate.data),
            "units": self.candidate.size,
            **({"changes": as_dicts(self.changes)} if cards else {}),
            "limits": dataclasses.asdict(self.limits),
            "verdicts": [as_dict(verdict) for verdict in self.verdicts],
            "notes": list(self.notes),
        }


def run_compare(
    baseline: Path,
    candidate: Path,
    *,
    data: Sequence[Path] = (),
    reference: Path | None = None,
    gate: Path | None = None,
    tokens: int | None = None,
    sequence_length: int | None = None,
    tasks: Sequence[str] = (),
    task_data: Path | None = None,
    task_limit: int | None = None,
) -> Compared:
    """Measure what is a model, read what is a file, and judge.

    Args:
        baseline: a file of `nanokit evaluate --save`, or a model folder.
        candidate: the same.
        data: text; needed where either is a model.
        reference: model that KL and agreement are measured from; where both are models and it is not given, the
            baseline itself.
        gate: a TOML file of limits.
        tokens: predicted tokens at most; a saved side's own where there is one, else 8,192.
        sequence_length: longest window; likewise, else 256.
        tasks: instead of text, the tasks that a model is asked, as `nano.tasks.file.load_tasks` takes them; a saved
            scorecard's own where that is the other side.
        task_data: folder of the tasks' files.
        task_limit: questions of each task at most.

    Raises:
        RequestError: the two cannot be compared; says what differs.
        BadFileError: a file or folder cannot be used.
    """
    started = time.monotonic()
    limits, named = read_limits(gate)
    if concerns_cards((baseline, candidate), tasks):
        if data or reference or tokens or sequence_length:
            raise RequestError(
                "Scorecards are compared by their questions, not by text.",
                found="--data, --reference, --tokens or --sequence-length", todo="leave them out",
            )  # fmt: skip
        found = compare_cards(baseline, candidate, Asked(tuple(tasks), task_data, task_limit), limits, named)
        if not found.verdicts:
            raise RequestError("The gate file leaves nothing to judge.", found=str(gate), todo="set at least one limit")
        return Compared(found.baseline, found.candidate, limits, found.verdicts, found.notes, found.seconds, found.changes)  # noqa: E501  # fmt: skip
    text = _Text(tuple(data), reference, tokens, sequence_length)
    before, after = _sides(baseline, candidate, text)
    verdicts = judge(before, after, limits)
    missing = _unjudged(verdicts, limits, named, before, after)
    if all(verdict.name == "tokens" and verdict.outcome == "passed" for verdict in verdicts):
        raise RequestError("The gate file leaves nothing to judge.", found=str(gate), todo="set at least one limit")
    return Compared(before, after, limits, tuple(verdicts), missing, time.monotonic() - started)


@dataclass(frozen=True)
class _Text:
    """What a model is measured on; see `run_compare`."""

    data: tuple[Path, ...]
    reference: Path | None
    tokens: int | None
    sequence_length: int | None


def _sides(baseline: Path, candidate: Path, text: _Text) -> tuple[Baseline, Baseline]:
    """Both sides' scores, read or measured, once it is sure that they can be compared."""
    saved = [read_baseline(path) if path.is_file() else None for path in (baseline, candidate)]
    known = saved[0] or saved[1]
    data, reference = text.data, text.reference
    _check_request(saved, data, reference)
    if reference is None and saved == [None, None]:
        reference = baseline
    options = _options(known, text.tokens, text.sequence_length)
    if known is not None and data:
        _check_text(known, data)
    sides = []
    for path, side in zip((baseline, candidate), saved, strict=True):
        if side is None:
            stage_of(path)  # a folder that is no model is refused before the other one is run
    for path, side in zip((baseline, candidate), saved, strict=True):
        against = None if reference == path else reference  # nothing diverges from itself
        sides.append(side or _measure(path, data, against, options))
    before, after = sides
    check_comparable(before, after)
    return before, after


def _check_request(saved: Sequence[Baseline | None], data: Sequence[Path], reference: Path | None) -> None:
    models = saved.count(None)
    if models and not data:
        raise RequestError("A model is measured on text.", expected="--data TEXT, the same as the baseline's")
    if not models and (data or reference):
        raise RequestError(
            "Both sides are saved figures: nothing is measured.", found="--data or --reference", todo="leave them out"
        )


def _options(known: Baseline | None, tokens: int | None, sequence_length: int | None) -> EvaluateOptions:
    """As the saved side was measured; what is asked for must be the same."""
    if known is None:
        return EvaluateOptions(tokens or 8192, sequence_length or 256)
    for name, asked in (("tokens", tokens), ("sequence_length", sequence_length)):
        if asked is not None and asked != known.data[name]:
            raise RequestError(
                f"The baseline was measured with another --{name.replace('_', '-')}.", found=str(asked),
                expected=str(known.data[name]), todo="leave it out, or save the baseline again",
            )  # fmt: skip
    return EvaluateOptions(known.data["tokens"], known.data["sequence_length"], known.activations)


def _check_text(known: Baseline, data: Sequence[Path]) -> None:
    """Refuse other text before a model is opened."""
    from nano.corpus import describe_data

    files = describe_data(data, tokens=0)["files"]
    if tuple(entry["sha256"] for entry in files) != known.hashes:
        raise _other_text(known.data["files"], files)


def _other_text(wanted: Sequence[Any], files: Sequence[Any]) -> RequestError:
    def named(entries: Sequence[Any]) -> str:
        return ", ".join(f"{entry['path']} (sha256 {entry['sha256'][:12]})" for entry in entries)

    return RequestError(
        "The text is not the one that the baseline was measured on.", found=named(files), expected=named(wanted),
        todo="give the same text, or save the baseline again on this one",
    )  # fmt: skip


def _measure(folder: Path, data: Sequence[Path], reference: Path | None, options: EvaluateOptions) -> Baseline:
    """A model's scores; without the reference where that reads the text as other ids, which the gate then names."""
    if stage_of(folder) != "int4":
        options = dataclasses.replace(options, activations="float")
    try:
        return evaluate_by_document(folder, data, reference, options)[1]
    except OtherVocabularyError as error:
        warn(f"{folder}: no figures against the reference. {error.problem} {error.found}")
        return evaluate_by_document(folder, data, None, options)[1]


def check_comparable(before: Baseline, after: Baseline) -> None:
    """Raise RequestError unless both were measured on the same text, in the same way, against the same reference."""
    if before.hashes != after.hashes:
        raise _other_text(before.data["files"], after.data["files"])
    for name in ("tokens", "sequence_length"):
        if before.data[name] != after.data[name]:
            raise RequestError(
                f"The two were measured with another --{name.replace('_', '-')}.",
                found=f"{before.data[name]} and {after.data[name]}", todo="measure both alike",
            )  # fmt: skip
    if before.reference and after.reference:
        ours, theirs = before.reference, after.reference
        if ours["fingerprint"] != theirs["fingerprint"]:
            raise RequestError(
                "The two were measured against different references.",
                found=f"{theirs['path']} ({theirs['fingerprint'][:12]})",
                expected=f"{ours['path']} ({ours['fingerprint'][:12]})",
                todo="give the baseline's reference, or save the baseline again",
            )


def _unjudged(
    verdicts: Sequence[Verdict], limits: Limits, named: frozenset[str], before: Baseline, after: Baseline
) -> tuple[str, ...]:
    """Notes on limits that could not be judged; a limit that the gate file itself names has to be.

    Raises:
        RequestError: such a limit was not judged.
    """
    judged = {verdict.limit_name for verdict in verdicts}
    missing = [name for name in REFERENCE_LIMITS if getattr(limits, name) is not None and name not in judged]
    other_tokens = any(verdict.name == "tokens" and verdict.outcome == "failed" for verdict in verdicts)
    asked = [name for name in missing if name in named]
    if asked and not other_tokens:
        raise RequestError(
            f"The gate file sets {' and '.join(asked)}, which cannot be judged.",
            found=f"the baseline's reference: {_reference(before)}; the candidate's: {_reference(after)}",
            expected="figures against a reference that is another model than the baseline"
            if "max_kl_rise" in asked
            else "figures against a reference",
            todo="give --reference REF here, and to nanokit evaluate --save",
        )
    return tuple(f"{name} was not judged: it needs a reference on both sides, other than the baseline" for name in missing)  # noqa: E501  # fmt: skip


def _reference(side: Baseline) -> str:
    return str(side.reference["path"]) if side.reference else "none"


def report(compared: Compared, junit: Path | None) -> None:
    """Write what was asked for: a JUnit file, and GitHub's step summary where this runs in one of its steps."""
    if junit is not None:
        seconds = compared.seconds / len(compared.verdicts)
        write_junit(junit, SUITE, [_case(verdict, compared, seconds) for verdict in compared.verdicts])
    step_summary(markdown(compared))


def _case(verdict: Verdict, compared: Compared, seconds: float) -> Case:
    figures = {name: getattr(verdict, name) for name in ("value", "low", "high", "limit", "confidence", "outcome")}
    stopped = verdict in compared.refused
    text = "\n".join((verdict.sentence, *_worst_lines(verdict)))
    return Case(verdict.name, text if stopped else "", seconds, figures, "" if stopped else verdict.sentence)


def _worst_lines(verdict: Verdict) -> list[str]:
    return [f"  {loss}: {words!r}" for loss, words in verdict.worst]


def require_passed(compared: Compared) -> None:
    """Raise CheckFailedError, with every failed figure and its worst documents, unless the candidate passed."""
    if not compared.refused:
        return
    lines = []
    for verdict in compared.refused:
        lines += [verdict.sentence, *_worst_lines(verdict)]
    names = ", ".join(verdict.name for verdict in compared.refused)
    raise CheckFailedError(
        f"The candidate does not pass the gate: {names}.", found="\n            ".join(lines),
        expected="; ".join(dict.fromkeys(f"{v.limit_name} = {_allowed(v, compared.limits)}" for v in compared.refused)),
        todo="find what changed; where another model is meant: save a new baseline"
        + (", or switch the drift limits off" if "drift" in names else ""),
    )  # fmt: skip


def _allowed(verdict: Verdict, limits: Limits) -> object:
    """A limit as gate.toml gives it; a capability may have its own."""
    return verdict.limit if verdict.limit_name in CARD_LIMITS else getattr(limits, verdict.limit_name)


def markdown(compared: Compared) -> str:
    """The verdicts for GitHub's step summary."""
    passed = "❌ failed" if compared.refused else "✅ passed"
    marks = {"passed": "✅", "failed": "❌", "undecided": "❔"}
    rows = [(marks[v.outcome], v.name, v.before, v.after, v.sentence) for v in compared.verdicts]
    lines = [f"### Accuracy of {Path(compared.candidate.model['path']).name}: {passed}", ""]
    lines.append(markdown_table(("", "figure", "baseline", "candidate", "verdict"), rows))
    for verdict in compared.refused:
        lines += ["", f"Worst by {verdict.name}:", "", "```", *_worst_lines(verdict), "```"]
    return "\n".join([*lines, *(f"\n{note}" for note in compared.notes)])


def table_of(compared: Compared) -> Table:
    """The verdicts for the terminal."""
    from rich.table import Table

    table = Table("figure", "baseline", "candidate", "verdict")
    for v in compared.verdicts:
        outcome = v.outcome if v.outcome != "undecided" or v not in compared.refused else "undecided: failed"
        table.add_row(v.name, v.before, v.after, f"{outcome}: {v.sentence}")
    of = "questions" if isinstance(compared.candidate, SavedCard) else "documents or windows"
    table.caption = "\n".join((f"{compared.candidate.size} {of}", *compared.notes))
    return table
