"""What an artifact's annotations say: enough to choose one without fetching it.

All of it is copied from the bundle's manifest.json when it is pushed, which travels along as a file; nothing is
claimed here that is not there. Verdicts are measured ones: a forecast is not a reason to ship.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import PurePath
from typing import Any

from nano.errors import NanokitError
from nano.manifest import Manifest
from nano.shapes import ModelShape
from nano.untrusted import mapping

PREFIX = "io.github.nanokit."
CREATED = "org.opencontainers.image.created"


@dataclass(frozen=True)
class Verdict:
    """A measured verdict: did the bundle live within a phone's limits?

    Attributes:
        passed: whether it did.
        context: positions that it was measured with.
        peak_bytes: the most memory that it wrote to; 0 where not recorded.
        tokens_per_second: of decoding, on the machine that measured; 0 where not recorded.
        reason: why not, in a few words; empty where it passed.
    """

    passed: bool
    context: int = 0
    peak_bytes: int = 0
    tokens_per_second: float = 0.0
    reason: str = ""


@dataclass(frozen=True)
class Facts:
    """What is said of an artifact.

    Attributes:
        student: the model's name, from the folder it was trained in.
        family: "llama", ...
        format: "executorch" or "onnx", which is also the runtime.
        runtime: the format with the version that wrote it, for instance "executorch 1.4.1".
        parameters: how many the model has.
        context: positions that its cache holds.
        method: how it was quantized.
        created: UTC time, ISO 8601.
        verdicts: profile to measured verdict.
        scorecard: capability to score, 0 to 1.
    """

    student: str = ""
    family: str = ""
    format: str = ""
    runtime: str = ""
    parameters: int = 0
    context: int = 0
    method: str = ""
    created: str = ""
    verdicts: Mapping[str, Verdict] = field(default_factory=dict)
    scorecard: Mapping[str, float] = field(default_factory=dict)

    @property
    def score(self) -> float | None:
        """Mean of the capabilities' scores; None where none was measured."""
        return sum(self.scorecard.values()) / len(self.scorecard) if self.scorecard else None


def facts_of(manifest: Manifest) -> Facts:
    """The facts that a bundle's manifest holds."""
    int4 = mapping(mapping(manifest.inputs).get("int4"))
    theirs = mapping(int4.get("manifest"))
    student = mapping(mapping(theirs.get("inputs")).get("student"))
    version = manifest.versions.get("executorch" if manifest.kind == "executorch" else "onnxruntime", "")
    return Facts(
        student=PurePath(str(student.get("path") or int4.get("path") or manifest.shape.get("family", "model"))).name,
        family=str(manifest.shape.get("family", "")),
        format=manifest.kind,
        runtime=f"{manifest.kind} {version}".strip(),
        parameters=_parameters(manifest.shape),
        context=_whole(mapping(manifest.footprint).get("context")),
        method=str(mapping(theirs.get("recipe")).get("method", "")),
        created=manifest.created,
        verdicts=_measured(manifest.results),
        scorecard=_scores(manifest.results),
    )


def annotations_of(facts: Facts) -> dict[str, str]:
    """The facts as an OCI manifest's annotations: strings, JSON where there is more to say."""
    verdicts = {
        name: {key: value for key, value in asdict(verdict).items() if value or key == "passed"}
        for name, verdict in facts.verdicts.items()
    }
    said = {
        CREATED: facts.created,
        PREFIX + "student": facts.student,
        PREFIX + "family": facts.family,
        PREFIX + "format": facts.format,
        PREFIX + "runtime": facts.runtime,
        PREFIX + "parameters": str(facts.parameters),
        PREFIX + "context": str(facts.context),
        PREFIX + "method": facts.method,
        PREFIX + "verdicts": json.dumps(verdicts, sort_keys=True) if verdicts else "",
        PREFIX + "scorecard": json.dumps(dict(facts.scorecard), sort_keys=True) if facts.scorecard else "",
    }
    return {key: value for key, value in said.items() if value}


def read_facts(annotations: Mapping[str, Any]) -> Facts:
    """The facts that annotations tell; what is missing or malformed stays empty, as anyone may have written them."""

    def text(key: str) -> str:
        value = annotations.get(key)
        return value[:200] if isinstance(value, str) else ""

    verdicts = {}
    for name, raw in _loaded(annotations.get(PREFIX + "verdicts")).items():
        one = mapping(raw)
        speed = one.get("tokens_per_second")
        verdicts[str(name)] = Verdict(
            passed=one.get("passed") is True,
            context=_whole(one.get("context")),
            peak_bytes=_whole(one.get("peak_bytes")),
            tokens_per_second=float(speed) if isinstance(speed, (int, float)) else 0.0,
            reason=str(one.get("reason", ""))[:300],
        )
    scores = _loaded(annotations.get(PREFIX + "scorecard")).items()
    return Facts(
        student=text(PREFIX + "student"),
        family=text(PREFIX + "family"),
        format=text(PREFIX + "format"),
        runtime=text(PREFIX + "runtime"),
        parameters=_whole(text(PREFIX + "parameters")),
        context=_whole(text(PREFIX + "context")),
        method=text(PREFIX + "method"),
        created=text(CREATED),
        verdicts=verdicts,
        scorecard={str(k): float(v) for k, v in scores if isinstance(v, (int, float))},
    )


def _measured(results: Mapping[str, Any]) -> dict[str, Verdict]:
    """Verdicts that `nanokit check --measure` recorded (`device_profiles.gate.record`), one a phone.

    Measured at several contexts, the longest that passed stands; where none did, the shortest.
    """
    found: dict[str, Verdict] = {}
    for key, raw in mapping(results.get("checks")).items():
        measured = mapping(mapping(raw).get("measured"))
        profile, _, context = str(key).rpartition("@")
        if not profile or not isinstance(measured.get("fits"), bool):
            continue
        phases = [mapping(p) for p in measured.get("phases") or []]
        speed = next((p.get("units_per_second") for p in phases if p.get("name") == "decode"), 0.0)
        verdict = Verdict(
            passed=measured["fits"],
            context=_whole(context),
            peak_bytes=_whole(measured.get("peak_dirty")),
            tokens_per_second=round(float(speed), 3) if isinstance(speed, (int, float)) else 0.0,
            reason=_reason(measured),
        )
        found[profile] = max((verdict, found.get(profile, verdict)), key=_standing)
    return found


def _standing(verdict: Verdict) -> tuple[bool, int]:
    return verdict.passed, verdict.context if verdict.passed else -verdict.context


def _reason(measured: Mapping[str, Any]) -> str:
    if measured["fits"]:
        return ""
    if died := measured.get("died"):
        return f"killed in the phase '{died}'"
    return "pages: weights are read from storage for every token"


def _scores(results: Mapping[str, Any]) -> dict[str, float]:
    """Capability to score, where a scorecard was recorded."""
    groups = mapping(mapping(results.get("scorecard")).get("capabilities"))
    found = {}
    for name, entry in groups.items():
        score = entry if isinstance(entry, (int, float)) else mapping(entry).get("score")
        if isinstance(score, (int, float)) and not isinstance(score, bool):
            found[str(name)] = round(float(score), 4)
    return found


def _parameters(shape: Mapping[str, Any]) -> int:
    try:
        return ModelShape(**{**shape, "layer_types": tuple(shape["layer_types"])}).num_parameters
    except (KeyError, TypeError, NanokitError):
        return 0


def _loaded(text: Any) -> Mapping[str, Any]:
    try:
        return mapping(json.loads(text)) if isinstance(text, str) else {}
    except (ValueError, RecursionError):
        return {}


def _whole(value: Any) -> int:
    if isinstance(value, str):
        return int(value) if value.isascii() and value.isdecimal() and len(value) < 16 else 0
    return value if isinstance(value, int) and not isinstance(value, bool) else 0
