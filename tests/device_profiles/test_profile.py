"""Profiles are facts: every shipped number has a source and a date, and a user's file is checked word by word."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from device_profiles.profile import decimal_bytes, load_profile, profile_names, read_profile
from nano.errors import BadFileError, RequestError

GOOD = """
title = "a phone of mine"
os = "android"

[app_memory]
value = 1.5
unit = "GiB"
source = "adb shell dumpsys meminfo, my own phone"
date = 2026-10-01
"""


@pytest.mark.parametrize("name", profile_names())
def test_every_shipped_fact_has_source_and_date_or_is_unknown(name: str) -> None:
    profile = load_profile(name)
    assert profile.name == name
    for key, fact in profile.facts().items():
        if not fact.known:
            assert fact.note or not fact.source, f"{key}: an unknown that is written down says why"
            continue
        assert fact.source.startswith("https://"), key
        assert date(2020, 1, 1) <= date.fromisoformat(fact.date) <= date.today(), key
    limits = (profile.app_dirty_memory, profile.app_dirty_memory_entitled, profile.app_memory)
    assert any(fact.known for fact in limits) or all(fact.note for fact in limits), "else it says why not"


def test_there_are_enough_phones_of_all_sizes() -> None:
    phones = [load_profile(name) for name in profile_names()]
    real = [phone for phone in phones if not phone.composed_of]
    assert len(real) >= 14
    rams = [phone.ram.number for phone in real if phone.os == "android" and phone.ram.number]
    assert min(rams) == 4e9
    assert max(rams) == 16e9
    assert sum(phone.os == "ios" for phone in real) >= 5
    checkable = [p for p in real if p.app_memory.known or p.app_dirty_memory.known or p.app_dirty_memory_entitled.known]
    assert len(checkable) >= 12
    assert all(fact.known or fact.note for phone in phones for fact in phone.facts().values()), "unknown says why"


def test_known_to_have_none_is_not_unknown(tmp_path: Path) -> None:
    old = load_profile("redmi-note-12").cpu_features
    assert old.known
    assert str(old) == "none"
    path = tmp_path / "mine.toml"
    path.write_text(GOOD + '[runtimes]\nvalue = []\nunit = "names"\nsource = "x"\ndate = "2026-01-01"\n')
    with pytest.raises(BadFileError, match="a list of texts"):
        read_profile(path)


def test_the_two_canonical_profiles_are_composed_of_named_phones() -> None:
    low, high = load_profile("low-end"), load_profile("high-end")
    for profile in (low, high):
        assert len(profile.composed_of) >= 2
        assert profile.how
    for fact in ("ram", "app_dirty_memory", "app_dirty_memory_entitled", "app_memory"):
        assert (getattr(low, fact).number or 0) < (getattr(high, fact).number or 0)
    assert low.app_dirty_memory.number == 2.1e9
    assert high.app_memory.number == 7419e6


def test_a_users_own_file_by_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(GOOD)
    profile = load_profile(str(path))
    assert (profile.name, profile.title, profile.os) == ("mine", "a phone of mine", "android")
    assert profile.app_memory.number == 1.5 * 2**30
    assert profile.app_memory.date == "2026-10-01"
    assert not profile.ram.known
    assert str(profile.ram) == "unknown"


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("[app_memory]", "[app_memry]", "did you mean 'app_memory'"),
        ('source = "adb', 'sauce = "adb', "did you mean 'source'"),
        ('unit = "GiB"', 'unit = "Gb"', "unit one of MB, GB"),
        ('unit = "GiB"', "", "unit ''"),
        ("value = 1.5", 'value = "much"', "a positive number"),
        ("value = 1.5", "value = true", "value True"),
        ("value = 1.5", "value = -2", "value -2"),
        ("value = 1.5", "value = inf", "value inf"),
        ("value = 1.5", "", "value None"),
        ('source = "adb shell dumpsys meminfo, my own phone"', "", "without a source"),
        ('source = "adb shell dumpsys meminfo, my own phone"', 'source = "  "', "without a source"),
        ('source = "adb shell dumpsys meminfo, my own phone"', "source = 3", "source 3"),
        ("date = 2026-10-01", "", "date None"),
        ("date = 2026-10-01", 'date = "last week"', "date 'last week'"),
        ('os = "android"', 'os = "symbian"', "one of android, ios, any"),
        ('title = "a phone of mine"', "title = 7", "title: 7"),
        ("[app_memory]", "app_memory = 3\n[ram]", "app_memory: 3"),
        ('os = "android"', 'composed_of = "two"', "a list of texts"),
        ("[app_memory]", "[app_memory", "not valid TOML"),
    ],
)
def test_a_bad_fact_is_named(old: str, new: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    assert old in GOOD
    path.write_text(GOOD.replace(old, new))
    with pytest.raises(BadFileError) as raised:
        read_profile(path)
    assert says in str(raised.value)
    assert str(path) in str(raised.value)


def test_binary_or_unreadable_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadFileError, match="not valid TOML"):
        read_profile(path)
    with pytest.raises(BadFileError, match=r"(?s)profile cannot be read.*Is a directory"):
        read_profile(tmp_path)


def test_lists_and_unknown(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(GOOD + '[runtimes]\nvalue = ["onnx"]\nunit = "names"\nsource = "x"\ndate = "2026-01-01"\n[ram]\nvalue = "unknown"\n')  # noqa: E501  # fmt: skip
    profile = read_profile(path)
    assert profile.runtimes.value == ("onnx",)
    assert profile.runtimes.number is None
    assert profile.as_dict()["ram"]["value"] == "unknown"


def test_an_unknown_name_gets_the_known_ones() -> None:
    with pytest.raises(RequestError, match="did you mean 'low-end'") as raised:
        load_profile("lowend")
    assert "galaxy-s23" in str(raised.value)
    with pytest.raises(RequestError, match="no such profile file"):
        load_profile("/nowhere/mine.toml")


@pytest.mark.parametrize(("count", "text"), [(1_340_000_000, "1.34 GB"), (20_500_000, "20.5 MB"), (999, "999 B"), (-2e9, "-2.00 GB")])  # noqa: E501  # fmt: skip
def test_bytes_are_told_in_powers_of_1000(count: float, text: str) -> None:
    assert decimal_bytes(count) == text


def test_profiles_command(nanokit: Callable[..., Any], tmp_path: Path) -> None:
    listed = nanokit("profiles")
    assert listed.status == 0
    assert "low-end" in listed.stdout
    shown = nanokit("profiles", "show", "high-end")
    assert shown.status == 0
    assert "MODEL_CARD.md" in shown.stdout
    assert "lower bound" in shown.stdout
    facts = nanokit("profiles", "show", "low-end", "--json").json()
    assert facts["low-end"]["app_dirty_memory"]["value"] == 2.1
    for arguments, says in ((("show",), "high-end, iphone-12-mini"), (("show", "nokia"), "no such device profile"), (("list", "x"), "takes no name")):  # noqa: E501  # fmt: skip
        refused = nanokit("profiles", *arguments)
        assert refused.status == 2
        assert says in refused.stderr
