"""What a report says of phones: a model's memory and speed against every profile, forecast and measured, as plain data.

A bundle's footprint comes from its manifest; an int4 folder's or a student's is planned, as `nanokit plan` does it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from device_profiles.budget import Verdict, judge
from device_profiles.check import bundle_facts
from device_profiles.footprint import (
    BundleFacts,
    EmbeddingBits,
    Footprint,
    PlannedRecipe,
    planned_facts,
    predict,
    runtime_constants,
)
from device_profiles.profile import DeviceProfile, load_profile, profile_names
from device_profiles.speed import forecast
from nano.errors import NanokitError, RequestError
from nano.manifest import NAME, Manifest
from nano.shapes import ModelShape
from nano.untrusted import items, mapping, number, text, whole

PLANNED_CONTEXT = 4096
BUNDLES = ("executorch", "onnx")


@dataclass(frozen=True)
class Lived:
    """What `nanokit check --measure` recorded for a phone.

    Attributes:
        profile, context: what it was measured for.
        fits: whether it lived and decoded from memory.
        peak_dirty: bytes that it had written at most.
        prediction_error: of the forecast of that, a fraction; None where it was not lived to see.
        died: the phase in which it was killed; "" where it lived.
        tokens_per_second: of decoding, on the machine that measured; None where not recorded.
        machine, when: where and when.
    """

    profile: str
    context: int
    fits: bool
    peak_dirty: int | None
    prediction_error: float | None
    died: str
    tokens_per_second: float | None
    machine: str
    when: str


@dataclass(frozen=True)
class Phone:
    """A model against one phone.

    Attributes:
        name, title: of the profile.
        fits: by the measurement at this context where there is one, else by the forecast.
        limits: limit to {"needed", "allowed", "fits"}; empty where the phone is known by a measurement alone.
        longest_context: the longest that fits; None where not even one position does.
        advice, notes: in words.
        speed: tokens a second as forecast, see `device_profiles.speed.SpeedForecast`; None where it is not known.
        measured: what happened under the phone's limits; None where it was not run.
    """

    name: str
    title: str
    fits: bool
    limits: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    longest_context: int | None = None
    advice: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    speed: Mapping[str, Any] | None = None
    measured: Lived | None = None


@dataclass(frozen=True)
class Phones:
    """A model against all of them.

    Attributes:
        runtime, context: what the footprint is for.
        planned: whether there is no bundle yet.
        causes: bytes by cause.
        dirty, resident: their sums: written, and everything.
        error: of the forecast, the largest over the measured bundles; a fraction.
        phones: against each profile whose limits are known.
        unjudged: profiles that could not be judged, with why.
        speeds: phone to forecast where the bandwidth is known, though no limit is.
    """

    runtime: str
    context: int
    planned: bool
    causes: Mapping[str, int]
    dirty: int
    resident: int
    error: float
    phones: tuple[Phone, ...]
    unjudged: Mapping[str, str] = field(default_factory=dict)
    speeds: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def against_phones(folder: Path, manifest: Manifest, names: Sequence[str] = ()) -> Phones:
    """Hold a stage's output against phones.

    Args:
        folder: a bundle, an int4 folder or a student.
        manifest: its manifest.
        names: profiles by name or path; all that come with nanokit where there are none.

    Raises:
        BadFileError: the bundle is not whole, or its manifest lacks a fact.
        RequestError: a profile that there is none of.
    """
    bundle = manifest.kind in BUNDLES
    facts = bundle_facts(folder) if bundle else _planned(folder, manifest)
    lived = _lived(manifest)
    phones, unjudged, speeds = [], {}, {}
    for profile in [load_profile(name) for name in names or profile_names()]:
        try:
            phones.append(_phone(judge(facts, profile, facts.context), lived))
        except NanokitError as error:
            unjudged[profile.name] = _why(error, profile)
            if speed := forecast(facts, profile):
                speeds[profile.name] = asdict(speed)
    judged = {phone.name for phone in phones}
    others = {(one.profile, one.context): one for one in lived if one.profile not in judged}
    if not names:
        phones += [Phone(one.profile, "", one.fits, measured=one) for one in others.values()]
    footprint: Footprint = predict(facts)
    return Phones(
        facts.runtime, facts.context, not bundle, footprint.by_cause(), footprint.dirty, footprint.resident,
        runtime_constants(facts.runtime).error, tuple(phones),
        {name: why for name, why in unjudged.items() if name not in {one.profile for one in lived}}, speeds,
    )  # fmt: skip


def _planned(folder: Path, manifest: Manifest) -> BundleFacts:
    """What an ExecuTorch bundle of it would hold."""
    try:
        shape = ModelShape(**{**manifest.shape, "layer_types": tuple(manifest.shape["layer_types"])})
    except (KeyError, TypeError) as error:
        raise RequestError(
            "The manifest does not describe the model.", found=f"{folder / NAME}: shape: {error}", todo="make it again"
        ) from None
    bits: dict[Any, EmbeddingBits] = {4: "4", 8: "8"}
    grids = mapping(mapping(manifest.results).get("bits"))
    embedding = bits.get(grids.get("model.embed_tokens"), "float") if manifest.kind == "int4" else "4"
    tokenizer = folder / "tokenizer.json"
    size = tokenizer.stat().st_size if tokenizer.is_file() else 0
    context = min(PLANNED_CONTEXT, shape.max_positions)
    return planned_facts(shape, PlannedRecipe(embedding=embedding, context=context, tokenizer_bytes=size))


def _phone(verdict: Verdict, lived: Sequence[Lived]) -> Phone:
    said = verdict.as_dict()
    mine = [one for one in lived if one.profile == verdict.profile.name]
    here = next((one for one in mine if one.context == verdict.context), None)
    measured = here or max(mine, key=lambda one: one.context, default=None)
    return Phone(
        verdict.profile.name, verdict.profile.title, verdict.fits if here is None else here.fits, said["limits"],
        verdict.longest_context, verdict.advice, verdict.notes, said["tokens_per_second"], measured,
    )  # fmt: skip


def _why(error: NanokitError, profile: DeviceProfile) -> str:
    known = profile.app_memory.known or profile.app_dirty_memory.known or profile.app_dirty_memory_entitled.known
    return error.problem if known else "nobody publishes what one app may hold there"


def _lived(manifest: Manifest) -> list[Lived]:
    return list(_recorded(mapping(manifest.results).get("checks")))


def _recorded(checks: Any) -> Iterator[Lived]:
    """Measurements among the verdicts that `device_profiles.gate.record` wrote."""
    for key, raw in mapping(checks).items():
        check, measured = mapping(raw), mapping(mapping(raw).get("measured"))
        profile, _, context = str(key).rpartition("@")
        if not profile or not context.isascii() or not context.isdecimal() or not isinstance(measured.get("fits"), bool):  # noqa: E501  # fmt: skip
            continue
        decoding = (p for p in map(mapping, items(measured.get("phases"))) if p.get("name") == "decode")
        yield Lived(
            profile=profile,
            context=int(context[:12]),
            fits=measured["fits"],
            peak_dirty=whole(measured.get("peak_dirty")),
            prediction_error=number(measured.get("prediction_error")),
            died=text(measured.get("died")),
            tokens_per_second=number(next(decoding, {}).get("units_per_second")),
            machine=text(check.get("machine")),
            when=text(check.get("checked")),
        )
