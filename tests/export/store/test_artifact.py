"""A bundle as an OCI artifact: image-spec's and ModelPack's fields, one digest for one bundle, hostile documents."""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from device_profiles.measure import Measurement, Phase
from export.store.artifact import MAX_MANIFEST, describe_bundle, parse_artifact
from export.store.facts import PREFIX, Verdict, read_facts
from nano.errors import BadFileError
from nano.manifest import Manifest, write_manifest

from .conftest import make_bundle, measured


def document(bundle: Path) -> dict[str, Any]:
    raw: dict[str, Any] = json.loads(describe_bundle(bundle)[0].payload)
    return raw


def test_the_manifest_is_image_spec_and_modelpack(bundle: Path) -> None:
    artifact, config = describe_bundle(bundle)
    raw = json.loads(artifact.payload)
    assert raw["schemaVersion"] == 2
    assert raw["mediaType"] == "application/vnd.oci.image.manifest.v1+json"
    assert raw["artifactType"] == "application/vnd.cncf.model.manifest.v1+json"
    assert raw["config"] == {
        "mediaType": "application/vnd.cncf.model.config.v1+json",
        "digest": "sha256:" + hashlib.sha256(config).hexdigest(),
        "size": len(config),
    }
    assert {layer["annotations"]["org.opencontainers.image.title"] for layer in raw["layers"]} == {
        "model.pte", "manifest.json", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    for layer in raw["layers"]:
        data = (bundle / layer["annotations"]["org.cncf.model.filepath"]).read_bytes()
        assert (layer["digest"], layer["size"]) == ("sha256:" + hashlib.sha256(data).hexdigest(), len(data))
    assert raw["layers"][0]["mediaType"] == "application/vnd.cncf.model.weight.v1.raw"
    assert all(isinstance(value, str) for value in raw["annotations"].values())


def test_the_config_has_modelpacks_keys_and_no_others(bundle: Path) -> None:
    """schema/config-schema.json of modelpack/model-spec: additionalProperties is false all through."""
    artifact, config = describe_bundle(bundle)
    raw = json.loads(config)
    assert set(raw) == {"descriptor", "config", "modelfs"}
    assert raw["descriptor"] == {"createdAt": "2026-11-22T10:00:00+00:00", "family": "llama", "name": "nano-2"}
    assert set(raw["config"]) <= {"architecture", "format", "paramSize", "precision", "quantization", "capabilities"}
    assert raw["config"]["paramSize"] == "131.4K"  # 512·64 + 2·(2·64·64 + 2·64·32 + 3·64·192 + 2·64) + 64
    assert raw["config"]["quantization"] == "best"
    layers = [layer["digest"] for layer in json.loads(artifact.payload)["layers"]]
    assert raw["modelfs"] == {"type": "layers", "diffIds": layers}


def test_one_bundle_has_one_digest_and_another_another(bundle: Path, tmp_path: Path) -> None:
    first = describe_bundle(bundle)[0].digest
    assert describe_bundle(bundle)[0].digest == first
    copied = make_bundle(tmp_path / "elsewhere")
    assert describe_bundle(copied)[0].digest == first
    assert describe_bundle(make_bundle(tmp_path / "other", seed=1))[0].digest != first


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    results = {
        "checks": {**measured("pixel-8", True), **measured("low-end", False)},
        "scorecard": {"capabilities": {"facts": {"score": 0.9}, "reasoning": 0.5}},
    }
    bundle = make_bundle(tmp_path / "b", results=results)
    artifact, _ = describe_bundle(bundle)
    assert parse_artifact(artifact.payload, "here") == artifact
    facts = artifact.facts
    assert (facts.student, facts.format, facts.runtime) == ("nano-2", "executorch", "executorch 1.4.1")
    assert (facts.parameters, facts.context, facts.method) == (131_392, 2048, "best")
    assert facts.verdicts["pixel-8"].passed
    assert facts.verdicts["pixel-8"].tokens_per_second == 20.0
    assert not facts.verdicts["low-end"].passed
    assert facts.verdicts["low-end"].reason == "killed in the phase 'prefill'"
    assert facts.verdicts["low-end"].peak_bytes == 700 << 20
    assert facts.scorecard == {"facts": 0.9, "reasoning": 0.5}
    assert facts.score == pytest.approx(0.7)


def test_the_gates_own_record_is_read(tmp_path: Path) -> None:
    """Field by field what `device_profiles.gate.record` writes of a measurement."""
    decode = Phase("decode", 16, 0.5, {}, peak_anonymous=900 << 20)
    lived = Measurement(
        cap="rlimit", limit=None, dirty_limit=None, base=300 << 20, context=2048, prefilled=2032,
        phases=(Phase("load", 1, 0.1, {}, 0), decode), died=None, killer="", samples={}, mapped_bytes=1 << 30,
    )  # fmt: skip
    killed = replace(lived, phases=(Phase("prefill", 128, None, {}, 700 << 20),), died="prefill", killer="the watcher")
    checks = {
        f"{name}@2048": {"fits": one.fits, "measured": one.as_dict()} for name, one in (("a", lived), ("b", killed))
    }
    verdicts = describe_bundle(make_bundle(tmp_path / "b", results={"checks": checks}))[0].facts.verdicts
    assert verdicts["a"] == Verdict(True, 2048, 600 << 20, 32.0)
    assert verdicts["b"] == Verdict(False, 2048, 400 << 20, 0.0, "killed in the phase 'prefill'")


def test_a_forecast_is_no_verdict(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "b", results={"checks": {"pixel-8@2048": {"fits": True}}})
    assert describe_bundle(bundle)[0].facts.verdicts == {}


def test_of_several_contexts_the_longest_that_passed(tmp_path: Path) -> None:
    checks = {
        **measured("pixel-8", True, 512), **measured("pixel-8", True, 1024), **measured("pixel-8", False, 2048),
        **measured("low-end", False, 2048), **measured("low-end", False, 512),
    }  # fmt: skip
    facts = describe_bundle(make_bundle(tmp_path / "b", results={"checks": checks}))[0].facts
    assert (facts.verdicts["pixel-8"].passed, facts.verdicts["pixel-8"].context) == (True, 1024)
    assert (facts.verdicts["low-end"].passed, facts.verdicts["low-end"].context) == (False, 512)


def test_annotations_of_strangers_stay_empty() -> None:
    odd = {PREFIX + "parameters": "9" * 40, PREFIX + "context": "-1", PREFIX + "verdicts": "[" * 100_000,
           PREFIX + "scorecard": '{"a": "b", "c": null}', PREFIX + "student": 7,
           PREFIX + "format": "x" * 9_999}  # fmt: skip
    facts = read_facts(odd)
    assert (facts.parameters, facts.context, facts.verdicts, facts.scorecard, facts.student) == (0, 0, {}, {}, "")
    assert len(facts.format) == 200
    assert read_facts({PREFIX + "verdicts": '{"p": {"passed": "yes"}}'}).verdicts["p"].passed is False


def test_only_whole_bundles_are_described(bundle: Path, tmp_path: Path) -> None:
    (bundle / "notes.txt").write_text("mine")
    with pytest.raises(BadFileError, match="nothing vouches"):
        describe_bundle(bundle)
    (bundle / "notes.txt").unlink()
    (bundle / "model.pte").write_bytes(b"short")
    with pytest.raises(BadFileError, match="has changed"):
        describe_bundle(bundle)
    student = tmp_path / "student"
    student.mkdir()
    write_manifest(student, Manifest(kind="student"))
    with pytest.raises(BadFileError, match="not a bundle"):
        describe_bundle(student)


def spoiled(raw: dict[str, Any], change: str) -> bytes:
    raw = copy.deepcopy(raw)
    layer = raw["layers"][0]
    match change:
        case "not json":
            return b"{"
        case "deep":
            return b"[" * 200_000
        case "a list":
            return b"[]"
        case "too large":
            return json.dumps({**raw, "x": "y" * MAX_MANIFEST}).encode()
        case "another type":
            raw["artifactType"] = "application/vnd.example"
        case "no layers":
            raw["layers"] = []
        case "too many layers":
            raw["layers"] = [layer] * 1_001
        case "layers of text":
            raw["layers"] = ["x"]
        case "no name":
            layer["annotations"] = {}
        case "climbing name":
            layer["annotations"]["org.opencontainers.image.title"] = "../../etc/cron.d/x"
        case "name of a number":
            layer["annotations"]["org.opencontainers.image.title"] = 7
            del layer["annotations"]["org.cncf.model.filepath"]
        case "digest as a path":
            layer["digest"] = "sha256:../../../../etc/passwd"
        case "md5":
            layer["digest"] = "md5:" + "0" * 32
        case "negative size":
            layer["size"] = -1
        case "size of a boolean":
            layer["size"] = True
        case "endless size":
            layer["size"] = 1 << 60
        case "no config":
            del raw["config"]
    return json.dumps(raw).encode()


@pytest.mark.parametrize(
    "change",
    ["not json", "deep", "a list", "too large", "another type", "no layers", "too many layers", "layers of text",
     "no name", "climbing name", "name of a number", "digest as a path", "md5", "negative size", "size of a boolean",
     "endless size", "no config"],
)  # fmt: skip
def test_hostile_manifests_are_refused(bundle: Path, change: str) -> None:
    with pytest.raises(BadFileError):
        parse_artifact(spoiled(document(bundle), change), "here")
