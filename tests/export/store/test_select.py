"""`pull --for PHONE`: the best of those that passed there, or why none did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from export.store.backend import open_store
from export.store.pull import PullOptions, pull_artifact
from export.store.push import push_bundle
from export.store.reference import Reference, parse_reference
from export.store.select import choose
from nano.errors import CheckFailedError, RequestError

from .conftest import SHAPE, make_bundle, measured

BIG = {**SHAPE, "num_layers": 4, "layer_types": ["full_attention"] * 4}


@pytest.fixture
def family(tmp_path: Path) -> Reference:
    """A name with five tags: sizes, formats, verdicts and scores."""
    reference = parse_reference(f"oci:{tmp_path / 'store'}:team/nano")
    made: list[tuple[str, dict[str, Any]]] = [
        ("small", {"results": {"checks": {**measured("pixel-8", True), **measured("low-end", True)}}}),
        ("big", {"shape": BIG, "results": {"checks": {**measured("pixel-8", True), **measured("low-end", False)}}}),
        ("big-onnx", {"shape": BIG, "kind": "onnx", "results": {"checks": measured("pixel-8", True)}}),
        ("newest", {"created": "2027-01-01T00:00:00+00:00", "shape": BIG}),
        ("paging", {"results": {"checks": measured("galaxy-s24", False, died=None)}}),
    ]
    for tag, fields in made:
        push_bundle(make_bundle(tmp_path / tag, size=1_000, **fields), reference.at(tag))
    return reference


def chosen(reference: Reference, profile: str = "", format: str = "") -> str:
    return choose(open_store(reference), reference, profile, format).reference.tag


def test_the_largest_that_passed(family: Reference) -> None:
    assert chosen(family, "low-end") == "small"
    assert chosen(family, "pixel-8", "executorch") == "big"
    assert chosen(family, "pixel-8", "onnx") == "big-onnx"


def test_a_scorecard_outweighs_size(family: Reference, tmp_path: Path) -> None:
    for tag, score in (("scored", 0.4), ("better", 0.6)):
        results = {"checks": measured("pixel-8", True), "scorecard": {"capabilities": {"facts": score}}}
        push_bundle(make_bundle(tmp_path / tag, size=1_000, results=results), family.at(tag))
    assert chosen(family, "pixel-8") == "better"


def test_a_tag_is_held_against_the_phone(family: Reference, tmp_path: Path) -> None:
    assert chosen(family.at("big"), "pixel-8") == "big"
    with pytest.raises(CheckFailedError, match=r"killed in the phase 'prefill', having written 700\.0 MiB"):
        pull_artifact(family.at("big"), tmp_path / "out", PullOptions(profile="low-end"))
    assert not (tmp_path / "out").exists()


def test_why_none_passes_is_said_of_each(family: Reference) -> None:
    with pytest.raises(CheckFailedError) as caught:
        chosen(family, "galaxy-s24")
    said = str(caught.value)
    assert "No artifact of team/nano has passed on galaxy-s24." in said
    assert "paging: at context 2,048 pages: weights are read from storage for every token" in said
    assert "newest: never measured on galaxy-s24" in said
    assert "small: never measured on galaxy-s24 (only on low-end, pixel-8)" in said


def test_an_unknown_phone_is_another_mistake(family: Reference) -> None:
    with pytest.raises(RequestError, match="no such device profile") as caught:
        chosen(family, "pixel-88")
    assert "pixel-8" in str(caught.value)


def test_formats(family: Reference) -> None:
    with pytest.raises(RequestError, match="no onnx artifact"):
        chosen(family.at("big"), format="onnx")
    assert chosen(family, format="onnx") == "big-onnx"
    assert chosen(family, format="executorch") == "newest"  # as large as another, and newer


def test_without_tag_profile_or_format_it_is_latest(family: Reference, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no tag 'latest'"):
        chosen(family)
    push_bundle(tmp_path / "small", family)
    assert chosen(family) == ""
    assert pull_artifact(family, tmp_path / "out", PullOptions()).reference.digest
