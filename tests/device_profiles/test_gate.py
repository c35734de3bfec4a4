"""The gate without a process: what a verdict and a measurement together come to, and what is told of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from xml.etree import ElementTree

import pytest

from device_profiles.budget import judge
from device_profiles.footprint import PlannedRecipe, planned_facts
from device_profiles.gate import Checked, markdown, reason, report, require_passed
from device_profiles.measure import Measurement, Phase
from device_profiles.profile import load_profile
from nano.errors import CheckFailedError
from nano.solve import canonical_shape

MB = 1_000_000


def _checked(student: str, measurement: Measurement | None) -> Checked:
    facts = planned_facts(canonical_shape(student), PlannedRecipe(context=4096))
    return Checked(Path("bundle"), judge(facts, load_profile("low-end"), 4096), measurement, 2.5)


def _measurement(decode_read: int = 0, died: str | None = None) -> Measurement:
    decode = Phase("decode", 16, None if died else 2.0, {}, 1500 * MB, decode_read)
    samples = {"rss": 1, "pss": 1, "clean": 1, "dirty": 1}
    killer = "the kernel (cgroup v2)" if died else ""
    limits = ("cgroup v2", 2000 * MB, 2400 * MB, 300 * MB)
    return Measurement(*limits, 4096, 4000, (decode,), died, killer, samples, 250 * MB)


def test_a_measurement_outweighs_a_forecast() -> None:
    small, large = _checked("nano-1", None), _checked("nano-2", None)
    assert small.fits
    assert not large.fits
    require_passed(small)
    with pytest.raises(CheckFailedError, match="does not fit low-end"):
        require_passed(large)
    require_passed(_checked("nano-2", _measurement()))
    with pytest.raises(CheckFailedError, match="killed on low-end at context 4,096, in the phase 'decode'"):
        require_passed(_checked("nano-1", _measurement(died="decode")))


def test_the_reason_has_the_numbers() -> None:
    told = reason(_checked("nano-2", _measurement(died="load")))
    over = dataclasses.asdict(_checked("nano-2", None).verdict.limits[1])
    assert f"{(over['needed'] - 2_000_000_000) / 1e6:.1f} MB too much" in told
    assert "the kernel (cgroup v2)" in told
    assert "1.20 GB written by then" in told
    assert "such as nano-1" in told


def test_paging_fails_with_what_it_costs() -> None:
    checked = _checked("nano-1", _measurement(decode_read=16 * 250 * MB))
    assert not checked.fits
    told = reason(checked)
    assert "pages on low-end" in told
    assert "250.0 MB a token from storage in the phase 'decode', 8 tokens/s" in told


def test_the_error_of_the_forecast_is_known_only_of_what_lived() -> None:
    checked = _checked("nano-1", _measurement())
    assert checked.prediction_error == pytest.approx(checked.verdict.footprint.dirty / (1200 * MB) - 1)
    assert _checked("nano-1", None).prediction_error is None
    assert _checked("nano-1", _measurement(died="load")).prediction_error is None


def test_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    summary, junit = tmp_path / "summary.md", tmp_path / "junit.xml"
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    report(_checked("nano-2", _measurement(died="load")), junit)
    report(_checked("nano-1", None), None)
    text = summary.read_text()
    assert "❌ does not fit low-end at context 4,096" in text
    assert "✅ fits low-end" in text
    assert "| decode | killed |" in text
    case = ElementTree.parse(junit).getroot().find(".//testcase")
    assert case is not None
    assert case.get("name") == "memory on low-end at context 4,096"
    figures = {p.get("name"): p.get("value") for p in case.iter("property")}
    assert figures["app_memory.allowed"] == "2000000000"
    assert figures["measured.cap"] == "cgroup v2"
    assert markdown(_checked("nano-1", None)).count("|") > 6
