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
tasks = ["demo"]
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
questions = 2
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
    assert ran.json()["ran"] == 3, "the bundle, its scores and its answers"
    assert "── whole/int4: unchanged" in ran.stderr
    nanokit("build", place / "recipe.toml", "--out", place / "out")


def test_every_artifact_has_its_scorecard(first: dict[str, Any], place: Path) -> None:
    from nano.demo.text import CAPABILITIES
    from nano.scorecard_file import read_card

    assert tuple(first["ladder"]["teacher"]) == CAPABILITIES
    assert [rung["stage"] for rung in first["ladder"]["rungs"]] == ["student", "int4", "onnx"]
    assert (place / "out" / "ladder.png").read_bytes().startswith(b"\x89PNG")
    for row in first["artifacts"]:
        assert tuple(row["capabilities"]) == CAPABILITIES
        assert all(score["questions"] == 2 for score in row["capabilities"].values())
    for stage in ("int4", "onnx"):
        results = json.loads((place / "out" / "whole" / stage / "manifest.json").read_text())["results"]
        found = read_card(place / "out" / "whole" / f"scorecard-{stage}.json")
        assert results["scorecard"]["capabilities"] == found.scores["capabilities"]
        assert results["scorecard"]["data"] == {"tasks": ["demo"], "limit": 2}
        assert len(found.card.answers) == 2 * len(CAPABILITIES)


def test_a_lost_file_is_made_again(first: dict[str, Any], place: Path, nanokit: Call) -> None:
    (place / "out" / "whole" / "onnx" / "model.onnx").unlink()
    again = nanokit("build", place / "recipe.toml", "--out", place / "out", "--json").json()
    assert again["ran"] == 1
    assert (place / "out" / "whole" / "onnx" / "model.onnx").is_file()
    assert again["artifacts"] == first["artifacts"]
    manifest = json.loads((place / "out" / "whole" / "onnx" / "manifest.json").read_text())
    assert tuple(manifest["results"]["scorecard"]["capabilities"]) == tuple(first["ladder"]["teacher"])


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


STUDENTS = """
[[student]]
name = "large"
size = "{large}"
[[student]]
name = "small"
size = "{small}"
[distill]
steps = 2
batch = 2
length = 32
eval_tokens = 200
calibration_tokens = 500
curves = false
[quantize]
"""


def test_students_share_a_pass_of_the_teacher(
    place: Path, tmp_path: Path, stories: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from distill.run import run_distill
    from nano.manifest import fingerprint
    from nano.pipeline import _distill_all, _inputs, _open_build
    from nano.recipe import Recipe, read_recipe

    def build(large: str, small: str) -> tuple[Recipe, int, int, str]:
        text = (place / "recipe.toml").read_text().replace("[quantize]", STUDENTS.format(large=large, small=small))
        (tmp_path / "two.toml").write_text(text)
        recipe = read_recipe(tmp_path / "two.toml")
        run = _open_build(recipe, tmp_path / "out", rebuild=False)
        teacher, data, _ = _inputs(recipe, run.out)
        _distill_all(run, teacher, data)
        return recipe, run.ran, run.skipped, capsys.readouterr().err

    def made() -> list[str]:
        return [fingerprint(tmp_path / "out" / name / "student") for name in ("large", "small")]

    recipe, ran, skipped, said = build("150k", "100k")
    assert (ran, skipped) == (2, 0)
    assert "── large/student, small/student\n" in said
    assert said.count("resuming") == 0
    assert said.count("2/2 steps") == 1, "both in one run"
    both = made()
    weights = (tmp_path / "out" / "small" / "student" / "model.safetensors").read_bytes()
    run_distill(stories, "100k", [Path(p) for p in recipe.data], tmp_path / "alone", recipe.distill)
    assert (tmp_path / "alone" / "model.safetensors").read_bytes() == weights
    assert build("150k", "100k")[1:3] == (0, 2)
    _, ran, skipped, said = build("130k", "100k")
    assert (ran, skipped) == (1, 1)
    assert "── small/student: unchanged" in said
    again = made()
    assert again[1] == both[1] != again[0] != both[0]
