"""A recipe end to end on the real stories260K, and what a second run does again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Call = Callable[..., Any]

RECIPE = """
name = "stories"
teacher = "{stories}"
data = ["{text}"]
heldout = ["{text}"]
prompt = "Once upon a time"
[[student]]
name = "whole"
size = "teacher"
profile = "low-end"
[quantize]
method = "rtn"
[export]
formats = ["onnx"]
context = 64
[evaluate]
tokens = 400
sequence_length = 64
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, stories: Path, tinystories: Path) -> Path:
    folder = tmp_path_factory.mktemp("build")
    short = folder / "text.jsonl"
    short.write_text("\n".join(tinystories.read_text().splitlines()[:30]))
    (folder / "recipe.toml").write_text(RECIPE.format(stories=stories, text=short))
    return folder


@pytest.fixture(scope="module")
def first(place: Path, nanokit: Call) -> dict[str, Any]:
    ran = nanokit("build", place / "recipe.toml", "--out", place / "out", "--json")
    assert ran.status == 0, ran.stderr
    found: dict[str, Any] = ran.json()
    return found


def test_every_artifact_has_its_row_and_is_where_it_says(first: dict[str, Any]) -> None:
    assert [row["stage"] for row in first["artifacts"]] == ["student", "int4", "onnx"]
    assert all(Path(row["path"]).is_dir() for row in first["artifacts"])
    float_row, int4, onnx = first["artifacts"]
    assert float_row["kl"] == 0.0
    assert 0.0 < int4["kl"] < 1.0
    assert onnx["kl"] == pytest.approx(int4["kl"], rel=0.1)
    assert onnx["fits"] is True
    assert onnx["parity"]["simulated"]["top1"] > 0.95
    assert first["sample"]["whole/onnx"].startswith("Once upon a time")
    assert first["skipped"] == 0


def test_a_second_run_makes_nothing_again(first: dict[str, Any], place: Path, nanokit: Call) -> None:
    again = nanokit("build", place / "recipe.toml", "--out", place / "out", "--json").json()
    assert (again["ran"], again["skipped"]) == (0, first["ran"])
    assert again["artifacts"] == first["artifacts"]


def test_only_what_depends_on_a_change_is_made_again(first: dict[str, Any], place: Path, nanokit: Call) -> None:
    changed = place / "changed.toml"
    changed.write_text((place / "recipe.toml").read_text().replace("context = 64", "context = 96"))
    ran = nanokit("build", changed, "--out", place / "out", "--json")
    assert ran.json()["ran"] == 2, "the bundle and its scores"
    assert "── whole/int4: unchanged" in ran.stderr
    nanokit("build", place / "recipe.toml", "--out", place / "out")


def test_a_lost_file_is_made_again(first: dict[str, Any], place: Path, nanokit: Call) -> None:
    (place / "out" / "whole" / "onnx" / "model.onnx").unlink()
    again = nanokit("build", place / "recipe.toml", "--out", place / "out", "--json").json()
    assert again["ran"] == 1
    assert (place / "out" / "whole" / "onnx" / "model.onnx").is_file()


def test_history_reaches_back_to_the_teacher(first: dict[str, Any], place: Path, stories: Path) -> None:
    from nano.manifest import fingerprint

    bundle = json.loads((place / "out" / "whole" / "onnx" / "manifest.json").read_text())
    int4 = bundle["inputs"]["int4"]
    assert int4["fingerprint"] == fingerprint(place / "out" / "whole" / "int4")
    assert int4["manifest"]["inputs"]["student"]["fingerprint"] == fingerprint(stories)


def test_somebody_elses_folder_is_refused(place: Path, tmp_path: Path, nanokit: Call) -> None:
    (tmp_path / "photos").write_text("mine")
    ran = nanokit("build", place / "recipe.toml", "--out", tmp_path)
    assert ran.status == 2
    assert "not an earlier build" in ran.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["photos"]
