"""The speed forecast: bytes a token counted by hand, efficiencies as published, and what a phone's facts decide."""

from __future__ import annotations

import dataclasses

import pytest

from device_profiles.footprint import PlannedRecipe, planned_facts
from device_profiles.profile import DeviceProfile, Fact, load_profile
from device_profiles.speed import PUBLISHED, bytes_per_token, forecast, published_error
from nano.shapes import FULL, SLIDING, ModelShape
from nano.solve import canonical_shape

SHAPE = ModelShape("llama", 1024, 64, 128, 2, 4, 2, 16, True, 512, (FULL, FULL), None)


def _phone(features: tuple[str, ...] | None, bandwidth: float = 10.0) -> DeviceProfile:
    cpu = Fact() if features is None else Fact(features, "names", "x", "2026-01-01")
    return DeviceProfile("phone", "", "any", memory_bandwidth=Fact(bandwidth, "GB/s", "x", "2026-01-01", "", 1e9), cpu_features=cpu)  # noqa: E501  # fmt: skip


def test_a_token_reads_the_weights_and_the_cache() -> None:
    """Linears: q 64x64, k and v 32x64, o 64x64, gate, up and down 128x64, twice; head 1024x64; 0.5625 bytes each."""
    facts = planned_facts(SHAPE, PlannedRecipe("executorch", context=256))
    weights = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64) + 1024 * 64
    cache = 2 * 256 * 2 * 2 * 16 * 4
    assert bytes_per_token(facts) == weights * 0.5625 + cache


def test_a_sliding_layer_reads_its_window() -> None:
    sliding = dataclasses.replace(SHAPE, family="gemma3_text", layer_types=(SLIDING, FULL), sliding_window=32)
    facts = planned_facts(sliding, PlannedRecipe("executorch", context=256, chunk=128))
    weights = facts.packed_source_bytes
    assert bytes_per_token(facts) - weights == (32 + 256) * 2 * 2 * 16 * 4


def test_efficiencies_are_what_was_published() -> None:
    """Llama 3.2 1B on a OnePlus 12: 973 M weights of 4.5 bits and a head of 263 M bytes, 50.2 times a second."""
    first = PUBLISHED[0]
    by_hand = (16 * (2 * 2048 * 2048 + 2 * 512 * 2048 + 3 * 8192 * 2048) * 0.5625 + 128256 * 2048) * 50.2 / 76.8e9
    assert first.efficiency == pytest.approx(by_hand)
    assert all(0.3 < row.efficiency < 0.6 for row in PUBLISHED)
    assert published_error([row for row in PUBLISHED if row.int8_products]) == pytest.approx(0.055, abs=0.001)
    assert published_error(PUBLISHED[:1]) is None


def test_the_phones_instructions_choose_the_measurements() -> None:
    facts = planned_facts(SHAPE, PlannedRecipe("executorch", context=256))
    fast, slow, unknown = (forecast(facts, _phone(f)) for f in (("dotprod", "i8mm"), (), None))
    assert fast is not None and slow is not None and unknown is not None  # noqa: PT018
    assert (fast.measurements, slow.measurements, unknown.measurements) == (6, 1, 7)
    assert slow.likely < fast.low <= fast.likely <= fast.high
    assert slow.error is None
    assert unknown.low == slow.low
    assert unknown.high == fast.high
    assert fast.likely == pytest.approx(fast.efficiency[1] * 10e9 / fast.bytes_per_token)
    double = forecast(facts, _phone(("dotprod",), bandwidth=20.0))
    assert double is not None
    assert double.likely == pytest.approx(2 * fast.likely)


def test_nano_2_on_the_high_end_is_as_fast_as_a_published_3b() -> None:
    """Meta's Llama 3.2 3B int4 on the same phone: 19.7 tokens/s."""
    facts = planned_facts(canonical_shape("nano-2"), PlannedRecipe("executorch", context=2048))
    speed = forecast(facts, load_profile("high-end"))
    assert speed is not None
    assert 19 < speed.likely < 23


def test_no_bandwidth_no_forecast() -> None:
    facts = planned_facts(SHAPE, PlannedRecipe("executorch", context=256))
    assert forecast(facts, load_profile("iphone-15-pro")) is None
