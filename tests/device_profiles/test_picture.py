"""memory.png: drawn for one phone and for all."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from device_profiles.budget import judge_all
from device_profiles.footprint import PlannedRecipe, planned_facts
from device_profiles.picture import CAUSES, write_picture
from device_profiles.tables import CAUSES as IN_WORDS
from nano.solve import canonical_shape

pytest.importorskip("matplotlib")


def test_every_cause_has_a_colour() -> None:
    facts = planned_facts(canonical_shape("nano-1"), PlannedRecipe())
    causes = judge_all(facts)[0].footprint.by_cause()
    assert set(CAUSES) == set(IN_WORDS) == set(causes)


def test_all_phones_with_limits_are_drawn(tmp_path: Path) -> None:
    verdicts = judge_all(planned_facts(canonical_shape("nano-2"), PlannedRecipe(context=8192)))
    names = {verdict.profile.name for verdict in verdicts}
    assert {"low-end", "high-end", "iphone-17", "pixel-6a"} <= names
    assert "pixel-8" not in names, "nobody publishes its limits"
    write_picture(tmp_path / "memory", verdicts)
    data = (tmp_path / "memory").read_bytes()
    assert data.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", data[16:24])
    assert width == 1650
    assert height > 1000


def test_plan_draws(nanokit: Callable[..., Any], tmp_path: Path) -> None:
    one, every = tmp_path / "one.png", tmp_path / "all.png"
    assert nanokit("plan", "--student", "nano-1", "--profile", "low-end", "--picture", one).status == 0
    assert nanokit("plan", "--student", "nano-1", "--picture", every).status == 0
    assert one.stat().st_size < every.stat().st_size
    refused = nanokit("plan", "--student", "nano-1", "--picture", tmp_path / "no" / "x.png")
    assert refused.status == 2
    assert "cannot be written" in refused.stderr
