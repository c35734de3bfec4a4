"""The fixture for pytest, in a pytest of its own, which finds it by the installed package's entry point."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from nano.baseline import Baseline, Unit, write_baseline

FILE = """
import sys

LOADED = {"torch", "transformers", "numpy"} & set(sys.modules)


def test_nothing_heavy_is_loaded_for_those_who_do_not_ask():
    assert not LOADED


def test_as_good_as_before(nanokit_gate):
    compared = nanokit_gate("before.json", "equal.json")
    assert {verdict.outcome for verdict in compared.verdicts} == {"passed"}


def test_worse(nanokit_gate):
    nanokit_gate("before.json", "worse.json", gate="gate.toml")


def test_cannot_be_compared(nanokit_gate):
    nanokit_gate("before.json", "nowhere")
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two saved baselines and one that is 5% worse, and tests of them."""
    random = np.random.default_rng(0)
    nll, right = random.normal(100, 9, size=60), random.integers(10, 30, size=60)
    units = tuple(
        Unit(f"text {n}", f"{n:012x}", 40, float(nll[n]), int(right[n])) for n in range(60)
    )  # fmt: skip
    before = Baseline(
        {"path": "m", "fingerprint": "f" * 64, "kind": "executorch"},
        {"files": [{"path": "t", "sha256": "0" * 64}], "tokens": 2400, "sequence_length": 64}, units,
    )  # fmt: skip
    write_baseline(tmp_path / "before.json", before)
    write_baseline(tmp_path / "equal.json", before)
    worse = tuple(replace(unit, nll=unit.nll * 1.05) for unit in units)
    write_baseline(tmp_path / "worse.json", replace(before, units=worse))
    (tmp_path / "gate.toml").write_text("max_perplexity_rise = 0.02\nmax_runtime_drift = false\n")
    (tmp_path / "test_model.py").write_text(FILE)
    return tmp_path


def test_the_fixture_fails_a_test_by_what_was_lost_and_tells_it_once(folder: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--junitxml=j.xml"],
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "2 failed, 2 passed" in ran.stdout, ran.stdout
    assert "perplexity rose" in ran.stdout
    assert "more than the 2.00% allowed" in ran.stdout
    assert "A model is measured on text" in ran.stdout
    assert "Traceback" not in ran.stdout
    cases = {case.get("name"): case for case in ElementTree.parse(folder / "j.xml").iter("testcase")}
    kept = {p.get("name"): p.get("value") or "" for p in cases["test_as_good_as_before"].iter("property")}
    assert kept["nanokit perplexity"].startswith("passed: ")
    failed = {p.get("name"): p.get("value") or "" for p in cases["test_worse"].iter("property")}
    assert failed["nanokit perplexity"].startswith("failed: perplexity rose")


def test_the_documented_snippet_is_the_fixtures() -> None:
    """docs/gate.md shows a call with options that the fixture takes."""
    text = (Path(__file__).parents[2] / "docs" / "gate.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"## pytest.*?```python\n(.*?)```", text, re.S)
    assert "def test_the_bundle_has_not_lost_accuracy(nanokit_gate)" in snippet
    compile(snippet, "gate.md", "exec")
