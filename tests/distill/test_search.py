"""Shapes of one size, tried before training: the same cut as without the search, and really the least damage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from checks import same_bits, some_stories

from distill.cutting import COUNTED
from distill.options import DistillOptions
from distill.run import run_distill, run_distill_many
from nano.manifest import Manifest, read_manifest
from nano.shapes import ModelShape, read_config
from nano.solve import parse_size, solve_shapes, solve_student

OPTIONS = DistillOptions(steps=0, length=64, eval_tokens=2048, calibration_tokens=2048, curves=False)
SIZE, COUNT = "128k", 6


@pytest.fixture(scope="module")
def text(tinystories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return some_stories(tmp_path_factory.mktemp("text"), tinystories, 100)


@pytest.fixture(scope="module")
def searched(stories: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("search") / "student"
    run_distill(stories, SIZE, [text], out, replace(OPTIONS, shapes=COUNT))
    return out


def lost(manifest: Manifest) -> float:
    return float(manifest.results["held_out"]["start"]["kl"])


def test_shapes_of_a_size_differ_and_all_have_it(stories: Path) -> None:
    teacher = ModelShape.from_hf(read_config(stories))
    shapes = solve_shapes(teacher, SIZE, COUNT)
    assert shapes[0] == solve_student(teacher, SIZE)
    assert len({(s.num_layers, s.hidden_size, s.num_kv_heads) for s in shapes}) == len(shapes) == COUNT
    target = parse_size(SIZE)
    for shape in shapes[1:]:
        assert shape.num_parameters == pytest.approx(target.parameters, rel=target.tolerance)


def test_the_least_damaged_is_taken_and_cut_as_alone(searched: Path, stories: Path, text: Path, tmp_path: Path) -> None:
    """Each shape cut by itself, measured on held-out text: the order found on calibration text holds at its ends."""
    tried = read_manifest(searched).results["shapes"]
    damage = [entry["kl"] for entry in tried]
    assert damage == sorted(damage)
    assert damage[-1] > 1.1 * damage[0]
    shapes = solve_shapes(ModelShape.from_hf(read_config(stories)), SIZE, COUNT)
    alone = {}
    for number in (0, -1):
        out = tmp_path / str(number)
        (shape,) = (s for s in shapes if all(getattr(s, name) == tried[number][name] for name in COUNTED))
        alone[number] = run_distill(stories, shape, [text], out, OPTIONS)
    assert same_bits(searched, tmp_path / "0")
    assert lost(read_manifest(searched)) == pytest.approx(lost(alone[0]), rel=1e-6)
    assert lost(alone[0]) < lost(alone[-1])
    assert lost(alone[0]) == pytest.approx(damage[0], rel=0.25), "calibration and held-out text are of one kind"


def test_two_students_are_searched_in_one_run(stories: Path, text: Path, tmp_path: Path, searched: Path) -> None:
    asked: list[tuple[str | ModelShape, Path]] = [(SIZE, tmp_path / "a"), ("104k", tmp_path / "b")]
    made = run_distill_many(stories, asked, [text], replace(OPTIONS, shapes=COUNT))
    assert made[0].results["shapes"] == read_manifest(searched).results["shapes"]
    assert len(made[1].results["shapes"]) > 1


def test_a_given_shape_is_not_searched(stories: Path, text: Path, tmp_path: Path) -> None:
    shape = solve_student(ModelShape.from_hf(read_config(stories)), SIZE)
    made = run_distill(stories, shape, [text], tmp_path / "given", replace(OPTIONS, shapes=COUNT))
    assert "shapes" not in made.results


def test_the_command_line_takes_it(nanokit: Callable[..., Any], stories: Path, text: Path, tmp_path: Path) -> None:
    ran = nanokit("distill", "--teacher", stories, "--student", SIZE, "--data", text, "--out", tmp_path / "x", "--shapes", "0")  # noqa: E501  # fmt: skip
    assert ran.status == 2
    assert "--shapes is out of range" in ran.stderr


def test_the_report_shows_what_was_tried(searched: Path) -> None:
    page = (searched / "report.html").read_text()
    assert "Which shape" in page
    for trial in read_manifest(searched).results["shapes"]:
        assert f"{trial['kl']:.4f}" in page
