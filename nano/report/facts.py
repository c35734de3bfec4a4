"""What a report says: gathered from a folder's manifest, its history and the phones' profiles, nothing measured anew.

Manifests travel, so everything in them may have been written by anyone: each value is taken only where it has the form
that nanokit writes, and what is missing stays empty. The page (`nano.report.page`) then says which command fills it.

Two rooms to the right know their own figures and are asked by name: `device_profiles.report` for phones, and
`quantize.report` (when the page is drawn) for the error of each linear.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any

from nano.divergence import Figure
from nano.errors import NanokitError, RequestError
from nano.history import Step, lineage
from nano.integrity import file_entries, find_faults, unlisted_files
from nano.manifest import Manifest, read_manifest
from nano.report.types import AnswerFlip, AnswerFlips, Card, Divergence, Flip, Phones, Report, Score
from nano.shapes import ModelShape
from nano.untrusted import items, mapping, number, numbers, text, whole

LABELS = {"executorch": "ExecuTorch", "onnx": "ONNX", "": "teacher"}
BUNDLES = ("executorch", "onnx")
GENERIC = {"student", "teacher", "int4", "executorch", "onnx", "bundle", "out", "model", "/", ".", ".."}
"""Names of folders that tell no model from another."""
MOST_LAYERS, LEAST_ERROR = 1_000, 1e-12


def gather(
    folder: Path,
    *,
    profiles: Sequence[str] = (),
    title: str = "",
    divergence: Mapping[str, Any] | None = None,
    hashed: bool = True,
) -> Report:
    """Read everything that a report shows.

    Args:
        folder: a bundle, an int4 folder, a bitsandbytes folder or a student.
        profiles: phones to hold it against; all that come with nanokit where there are none.
        title: of the page; made of the folders' names where empty.
        divergence: what was measured just now, in the place of what is recorded.
        hashed: compute every file's sha256; else compare sizes alone.

    Raises:
        BadFileError: no manifest.json, or one that cannot be used.
        RequestError: a profile that there is none of.
    """
    manifest = read_manifest(folder)
    if divergence is not None:
        manifest = replace(manifest, results={**manifest.results, "divergence": divergence})
    for name in profiles:
        _door("device_profiles.profile:load_profile")(name)
    entries = file_entries(manifest, folder)
    steps = tuple(sorted(lineage(folder, manifest), key=lambda step: -step.ancestor.depth))
    phones, no_phones = _phones(folder, manifest, profiles)
    results = mapping(manifest.results)
    counts = [_parameters(step.shape) for step in steps]
    trained = next((step for step in reversed(steps) if step.ancestor.kind == "student"), steps[-1])
    cards = [card for step in steps if (card := _card(step))]
    report = Report(
        title=title or _title(steps),
        folder=str(folder),
        kind=manifest.kind,
        fingerprint=steps[-1].ancestor.fingerprint,
        steps=steps,
        parameters=counts[-1],
        teacher_parameters=whole(trained.results.get("teacher_parameters")) or 0,
        cards=_with_teacher([card for card in cards if card.asked == cards[-1].asked]),
        others=tuple(card.stage for card in cards if card.asked != cards[-1].asked),
        answers=_answers(steps[-1]),
        divergences=tuple(one for step in steps if (one := _divergence(step))),
        layers=_layers(steps),
        phones=phones,
        no_phones=no_phones,
        bench=mapping(results.get("bench")),
        exact=mapping(results.get("exact")),
        parity=mapping(results.get("parity")),
        files=entries,
        hashed=hashed,
        faults=tuple(find_faults(folder, entries, hashes=hashed)),
        unlisted=unlisted_files(folder, manifest),
    )
    return replace(report, warnings=tuple(_warnings(report)))


def _door(target: str) -> Any:
    module, name = target.split(":")
    return getattr(importlib.import_module(module), name)


def label(step: Step) -> str:
    """What a step is called on the page."""
    kind = step.ancestor.kind
    return LABELS.get(kind, kind) if kind or step.ancestor.role == "teacher" else step.ancestor.role


def model_name(steps: Sequence[Step]) -> str:
    """The model's name: of the folder that the student was made in, or of the one above where that says nothing."""
    kinds = [step for kind in ("student", "int4") for step in steps if step.ancestor.kind == kind or step.ancestor.role == kind]  # noqa: E501  # fmt: skip
    for step in [*kinds[:1], *reversed(steps)]:
        for part in reversed(PurePath(step.ancestor.path).parts):
            if part.lower() not in GENERIC:
                return part
    return "model"


def _title(steps: Sequence[Step]) -> str:
    name, kind = model_name(steps), steps[-1].ancestor.kind
    return f"{name} for {label(steps[-1])}" if kind in ("executorch", "onnx") else f"{name}, {kind}"


def _parameters(shape: Mapping[str, Any]) -> int:
    sizes = {name: value for name, value in shape.items() if name not in ("family", "layer_types", "tied", "sliding_window")}  # noqa: E501  # fmt: skip
    if not sizes or any(whole(value) is None for value in sizes.values()):
        return 0
    try:
        return int(ModelShape(**{**shape, "layer_types": tuple(shape["layer_types"])}).num_parameters)
    except (KeyError, TypeError, ValueError, ArithmeticError, NanokitError):
        return 0


def _phones(folder: Path, manifest: Manifest, profiles: Sequence[str]) -> tuple[Phones | None, str]:
    """Every phone, or why there is none."""
    if manifest.kind == "bitsandbytes":
        return None, "A bitsandbytes folder runs on no phone."
    if not _parameters(mapping(manifest.shape)):
        return None, "The manifest does not describe the model's shape."
    try:
        phones: Phones = _door("device_profiles.report:against_phones")(folder, manifest, profiles)
    except RequestError as error:
        return None, error.problem + (f" {error.found}" if error.found else "")
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:  # a manifest of nobody's making
        return None, f"The manifest’s footprint cannot be used: {type(error).__name__}."
    if whole(phones.resident) is None:
        return None, "The manifest’s footprint cannot be used: it is larger than any memory."
    return phones, ""


def _card(step: Step) -> Card | None:
    """A step's scorecard; None where none was recorded."""
    card = mapping(step.results.get("scorecard"))
    data, tasks = mapping(card.get("data")), mapping(card.get("tasks"))
    asked = [
        data.get("tasks"),
        data.get("limit"),
        {name: mapping(task).get("questions") for name, task in tasks.items()},
    ]
    scores = _scores(step)
    said = json.dumps(asked, sort_keys=True, default=str)
    return Card(step.ancestor.kind, label(step), scores, said) if scores else None


def _with_teacher(found: Sequence[Card]) -> tuple[Card, ...]:
    """Scorecards, before them the teacher's, where shares of it were recorded and it has none of its own."""
    if not found or found[0].kind == "":
        return tuple(found)
    teacher: dict[str, Score] = {}
    for card in found:
        for name, one in card.capabilities.items():
            if one.of_teacher:
                teacher.setdefault(name, Score(one.score / one.of_teacher, None, one.questions, 1.0))
    return (Card("", LABELS[""], teacher, derived=True), *found) if teacher else tuple(found)


def _scores(step: Step) -> dict[str, Score]:
    found = {}
    for name, raw in mapping(mapping(step.results.get("scorecard")).get("capabilities")).items():
        entry = mapping(raw)
        score = number(entry.get("score"))
        if score is not None and 0 <= score <= 1:
            questions, share = whole(entry.get("questions")) or 0, number(entry.get("of_teacher"))
            found[str(name)] = Score(score, number(entry.get("error")), questions, share)
    return found


def _answers(step: Step) -> AnswerFlips | None:
    said = mapping(mapping(step.results.get("scorecard")).get("flips"))
    lost, gained = whole(said.get("lost")), whole(said.get("gained"))
    if lost is None or gained is None:
        return None
    names = ("task", "label", "expected", "said")
    worst = (AnswerFlip(*(text(mapping(raw).get(name), 400) for name in names)) for raw in items(said.get("worst")))
    return AnswerFlips(lost, gained, tuple(worst))


def _divergence(step: Step) -> Divergence | None:
    said = mapping(step.results.get("divergence"))
    figures = {}
    for name, raw in mapping(said.get("figures")).items():
        value = number(mapping(raw).get("value"))
        if value is not None:
            figures[str(name)] = Figure(value, number(mapping(raw).get("error")))
    if "Mean KLD" not in figures:
        return None
    reference, data = mapping(said.get("reference")), mapping(said.get("data"))
    flips = [flip for raw in items(said.get("flips")) if (flip := _flip(mapping(raw)))]
    return Divergence(
        kind=step.ancestor.kind,
        stage=label(step),
        reference=PurePath(text(reference.get("path"))).name or "reference",
        reference_fingerprint=text(reference.get("fingerprint")),
        tokens=whole(said.get("tokens")) or 0,
        files=text_files(data),
        measured=text(said.get("measured")),
        figures=figures,
        lost=whole(said.get("lost")) or 0,
        gained=whole(said.get("gained")) or 0,
        flips=tuple(flips),
    )


def _flip(raw: Mapping[str, Any]) -> Flip | None:
    before, right, said = (text(raw.get(name), 400) for name in ("before", "right", "said"))
    first, second, third = (number(raw.get(name)) for name in ("reference_p", "right_p", "said_p"))
    if first is None or second is None or third is None:
        return None
    return Flip(before, right, said, first, second, third)


def text_files(data: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """(path, sha256) of the files that a manifest's `data` names."""
    entries = map(mapping, items(data.get("files")))
    return tuple((text(entry.get("path")), text(entry.get("sha256"))) for entry in entries)


def _layers(steps: Sequence[Step]) -> Manifest | None:
    """What `quantize.report` needs to draw the linears' errors; only numbers are let through."""
    for step in reversed(steps):
        layers = whole(step.shape.get("num_layers"))
        after, before = (_errors(step.results.get(name)) for name in ("relative_error", "rounding_error"))
        if step.ancestor.kind == "int4" and after and before and layers and layers <= MOST_LAYERS:
            results = {"relative_error": after, "rounding_error": before, "bits": numbers(step.results.get("bits"))}
            inputs = {"student": {"path": "student"}}
            recipe = {"method": text(step.recipe.get("method")), "ran": text(step.recipe.get("ran"))}
            return Manifest("int4", inputs=inputs, results=results, recipe=recipe, shape={"num_layers": layers})
    return None


def _errors(values: Any) -> dict[str, float]:
    """Those that can be errors: a chart of others has no axis."""
    return {
        name: value for name, value in numbers(values).items() if value == 0 or LEAST_ERROR < value < 1 / LEAST_ERROR
    }


def _warnings(report: Report) -> list[str]:
    """What a release should not overlook."""
    found = [f"{fault.file} is not what the manifest says: {fault.found}, expected {fault.expected}." for fault in report.faults]  # noqa: E501  # fmt: skip
    if report.unlisted:
        names = ", ".join(report.unlisted[:3]) + (" ..." if len(report.unlisted) > 3 else "")
        found.append(f"Not named in the manifest, so nothing vouches for it: {names}.")
    if differing := items(report.exact.get("differing")):
        found.append(f"{len(differing)} tensors of the bundle differ from its int4 checkpoint.")
    used: dict[str, str] = {}
    for step in report.steps:
        checked = mapping(step.data.get("checked"))
        found += [f"{label(step)}: {text(words)}" for words in items(checked.get("warnings"))]
        if step.ancestor.kind == "int4" and not items(step.data.get("files")) and step.created:
            found.append("No calibration text was read: the weights were rounded to nearest.")
        if step.ancestor.kind in ("student", "int4"):
            used |= {sha256: label(step) for _path, sha256 in text_files(step.data) if sha256}
    for one in report.divergences:
        seen = [PurePath(path).name for path, sha256 in one.files if sha256 in used]
        found += [f"The divergence of the {one.stage} was measured on {name}, which training or calibration read." for name in seen]  # noqa: E501  # fmt: skip
    if report.phones:
        lived = [phone.measured for phone in report.phones.phones if phone.measured and not phone.measured.fits]
        for run in lived:
            how = f"was killed in the phase '{run.died}'" if run.died else "reads its weights from storage again"
            found.append(f"Measured under the limits of {run.profile} at context {run.context:,}, it {how}.")
        if report.phones.phones and not any(phone.fits for phone in report.phones.phones):
            found.append("It fits none of the phones.")
    return found
