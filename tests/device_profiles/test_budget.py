"""Verdicts: against hand-made phones, on manifests as the exporters write them, and through the real command."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from device_profiles.budget import judge, require_fit
from device_profiles.check import check_bundle
from device_profiles.footprint import PlannedRecipe, planned_facts, predict
from device_profiles.profile import DeviceProfile, Fact, load_profile
from nano.errors import BadFileError, CheckFailedError, RequestError, UnsupportedError
from nano.manifest import Manifest, write_manifest
from nano.shapes import FULL, ModelShape
from nano.solve import canonical_shape

SHAPE = ModelShape("llama", 4096, 256, 768, 6, 4, 2, 64, True, 4096, (FULL,) * 6, None)


def _phone(**bytes_allowed: float) -> DeviceProfile:
    facts = {name: Fact(value, "B", "a test", "2026-01-01") for name, value in bytes_allowed.items()}
    return DeviceProfile("phone", "a test's phone", "any", **facts)


def _facts(context: int = 1024, **recipe: Any) -> Any:
    return planned_facts(SHAPE, PlannedRecipe("onnx", context=context, **recipe))


def test_both_limits_count() -> None:
    footprint = predict(_facts())
    assert footprint.mapped_weights > 0
    roomy = judge(_facts(), _phone(app_dirty_memory=footprint.dirty, app_memory=footprint.resident), 1024)
    assert roomy.fits
    assert not roomy.advice
    require_fit(roomy)
    for tight in ({"app_dirty_memory": footprint.dirty - 1}, {"app_memory": footprint.resident - 1}):
        verdict = judge(_facts(), _phone(**{"app_dirty_memory": 1e12, "app_memory": 1e12, **tight}), 1024)
        assert not verdict.fits
        with pytest.raises(CheckFailedError, match="does not fit phone at context 1,024") as raised:
            require_fit(verdict)
        assert next(iter(tight)) in str(raised.value)
        assert raised.value.todo


def test_an_unknown_limit_is_not_counted_on_and_none_at_all_is_refused() -> None:
    verdict = judge(_facts(), _phone(app_memory=1e12), 1024)
    assert verdict.fits
    assert any("app_dirty_memory is unknown" in note for note in verdict.notes)
    assert verdict.as_dict()["limits"]["app_dirty_memory"] == {"needed": verdict.footprint.dirty, "allowed": None, "fits": None}  # noqa: E501  # fmt: skip
    with pytest.raises(RequestError, match="Nobody publishes"):
        judge(_facts(), _phone(ram=4e9), 1024)


def test_the_longest_context_is_the_longest() -> None:
    phone = _phone(app_dirty_memory=predict(_facts(1500)).dirty)
    verdict = judge(_facts(2048), phone, 2048)
    assert not verdict.fits
    longest = verdict.longest_context
    assert longest is not None
    assert longest >= 1500
    assert predict(_facts(2048), longest).dirty <= phone.app_dirty_memory.number < predict(_facts(2048), longest + 1).dirty  # type: ignore[operator]  # noqa: E501  # fmt: skip
    assert f"--context {longest}" in verdict.advice[0]
    assert judge(_facts(2048), phone, longest).fits, "the advice works"


def test_where_no_context_fits_a_smaller_student_is_named() -> None:
    weights = predict(_facts(1)).packed_weights
    phone = _phone(app_dirty_memory=predict(_facts(1)).dirty - weights * 0.4)
    verdict = judge(_facts(1024), phone, 1)
    assert verdict.longest_context is None
    assert len(verdict.advice) == 1
    assert "a student of at most about 3" in verdict.advice[0], "0.6 of 5.7 M"


def test_a_float_head_is_pointed_at() -> None:
    facts = _facts(embedding="float")
    verdict = judge(facts, _phone(app_dirty_memory=predict(facts).dirty - 1), 1024)
    assert any("--embedding int4" in advice for advice in verdict.advice)


def test_the_entitlement_is_used_and_said() -> None:
    dirty = predict(_facts()).dirty
    verdict = judge(_facts(), _phone(app_dirty_memory=dirty - 1, app_dirty_memory_entitled=dirty), 1024)
    assert verdict.fits
    assert any("entitlement" in note for note in verdict.notes)
    plain = judge(_facts(), _phone(app_dirty_memory=dirty, app_dirty_memory_entitled=2 * dirty), 1024)
    assert not any("entitlement" in note for note in plain.notes)


def test_downloads_and_runtimes() -> None:
    size = _facts().file_bytes
    notes = judge(_facts(), _phone(app_memory=1e12, pack_limit=size / 2.5), 1024).notes
    assert any("3 asset packs" in note for note in notes)
    notes = judge(_facts(), _phone(app_memory=1e12, app_limit=size - 1), 1024).notes
    assert any("too large for the store" in note for note in notes)
    phone = dataclasses.replace(_phone(app_memory=1e12), runtimes=Fact(("executorch",), "names", "x", "2026-01-01"))
    with pytest.raises(UnsupportedError, match="does not run this kind"):
        judge(_facts(), phone, 1024)


@pytest.mark.parametrize("runtime", ["executorch", "onnx"])
def test_the_canonical_students_on_the_canonical_phones(runtime: Any) -> None:
    """Nano-1 is for low-end at 4k, Nano-2 for high-end at 8k, and Nano-2 does not fit low-end."""
    small = planned_facts(canonical_shape("nano-1"), PlannedRecipe(runtime, context=4096))
    large = planned_facts(canonical_shape("nano-2"), PlannedRecipe(runtime, context=8192))
    assert judge(small, load_profile("low-end"), 4096).fits
    assert judge(large, load_profile("high-end"), 8192).fits
    failed = judge(large, load_profile("low-end"), 8192)
    assert not failed.fits
    assert "such as nano-1" in failed.advice[-1]


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A folder as nanokit export leaves it: a manifest of the exporter's facts beside files of the recorded size."""
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(b"x" * 1000)
    (folder / "tokenizer.json").write_bytes(b"{}" * 50)
    facts = _facts()
    footprint = {
        "linear_bytes": 3_000_000, "packed_copy_bytes": 3_600_000, "embedding_bytes": 600_000, "file_bytes": 4_000_000,
        "float_weight_bytes": 13_000, "kv_cache_bytes": facts.kv_cache_bytes, "logits_bytes": facts.logits_bytes,
        "context": 1024, "chunk": 128,
    }  # fmt: skip
    write_manifest(folder, Manifest(kind="onnx", footprint=footprint, shape=dataclasses.asdict(SHAPE)))
    return folder


def test_a_bundle_is_judged_by_its_manifest(bundle: Path) -> None:
    verdict = check_bundle(bundle, "low-end")
    assert verdict.fits
    assert verdict.context == 1024
    assert verdict.facts.tokenizer_bytes == 100
    assert verdict.peak_bytes == verdict.footprint.resident > 3_600_000
    assert check_bundle(bundle, "low-end", 256).footprint.kv_cache == verdict.footprint.kv_cache // 4


def test_a_pte_keeps_its_whole_cache_whatever_is_used(bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(json.dumps({**manifest, "kind": "executorch"}))
    verdict = check_bundle(bundle, "low-end", 256)
    assert verdict.footprint == check_bundle(bundle, "low-end").footprint
    assert any("1024 positions" in note for note in verdict.notes)


def _delete(bundle: Path) -> None:
    (bundle / "model.onnx").unlink()


def _truncate(bundle: Path) -> None:
    (bundle / "model.onnx").write_bytes(b"x" * 999)


def _other_kind(bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(json.dumps({**manifest, "kind": "int4"}))


def _no_manifest(bundle: Path) -> None:
    (bundle / "manifest.json").unlink()


def _broken_manifest(bundle: Path) -> None:
    (bundle / "manifest.json").write_text("{")


def _whole_folder(bundle: Path) -> None:
    shutil.rmtree(bundle)


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (_delete, "is missing"),
        (_truncate, "has changed"),
        (_other_kind, "not a bundle"),
        (_no_manifest, "no manifest.json"),
        (_broken_manifest, "not valid JSON"),
        (_whole_folder, "no such folder"),
    ],
)
def test_a_broken_bundle_is_status_2(harm: Callable[[Path], None], says: str, bundle: Path) -> None:
    harm(bundle)
    with pytest.raises(BadFileError, match=says) as raised:
        check_bundle(bundle, "low-end")
    assert raised.value.exit_status == 2


@pytest.mark.parametrize("context", [0, -1, 1025])
def test_a_context_that_the_bundle_cannot_hold(context: int, bundle: Path) -> None:
    with pytest.raises(RequestError, match="cannot hold this context"):
        check_bundle(bundle, "low-end", context)


def test_the_check_command(nanokit: Callable[..., Any], bundle: Path, tmp_path: Path) -> None:
    fits = nanokit("check", bundle, "--profile", "low-end")
    assert fits.status == 0
    assert "It fits low-end" in fits.stdout
    assert max(map(len, fits.stdout.splitlines())) <= 80
    found = nanokit("check", bundle, "--profile", "low-end", "--json").json()
    assert found["fits"] is True
    assert found["peak_bytes"] == sum(found["bytes"].values())
    tight = tmp_path / "tight.toml"
    tight.write_text('[app_memory]\nvalue = 8\nunit = "MB"\nsource = "a test"\ndate = 2026-01-01\n')
    failed = nanokit("check", bundle, "--profile", tight, "--json")
    assert failed.status == 1
    assert failed.json()["fits"] is False
    assert "too much" in failed.stderr
    assert nanokit("check", tmp_path, "--profile", "low-end").status == 2
    assert "did you mean" in nanokit("check", bundle, "--profile", "hihg-end").stderr
