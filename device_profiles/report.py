"""What a report says of phones: a model's memory and speed against every profile, forecast and measured, as plain data.

A bundle's footprint comes from its manifest; an int4 folder's or a student's is planned, as `nanokit plan` does it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
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
from nano.report.types import Lived, Phone, Phones
from nano.shapes import ModelShape
from nano.untrusted import items, mapping, number, text, whole

PLANNED_CONTEXT = 4096
BUNDLES = ("executorch", "onnx")


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
