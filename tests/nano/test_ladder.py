"""The ladder: shares of the teacher's score by capability, in a table, a picture, and as plain data."""

from __future__ import annotations

import io
from itertools import pairwise
from pathlib import Path

import pytest

from nano.ladder import Ladder, Rung, agreement, disagreements, draw_ladder, heading, ladder_table
from nano.scorecard import CapabilityScore

NAMES = ("factuality", "long-context", "math-science", "summarization", "reasoning", "coding", "multilingual")


def scores(value: float, teacher: float | None = None, error: float | None = 0.05) -> dict[str, CapabilityScore]:
    share = None if teacher is None else value / teacher
    return {name: CapabilityScore(value, error, 50, share) for name in NAMES}


@pytest.fixture
def ladder() -> Ladder:
    rungs = [
        Rung(student, stage, scores(value - 0.02 * step, 0.8))
        for student, value in (("nano-2-like", 0.76), ("nano-1-like", 0.4))
        for step, stage in enumerate(("student", "int4", "executorch", "onnx"))
    ]
    return Ladder(scores(0.8), tuple(rungs))


def printed(ladder: Ladder, width: int = 80) -> str:
    from rich.console import Console

    out = io.StringIO()
    Console(file=out, width=width).print(ladder_table(ladder))
    return out.getvalue()


def test_the_table_fits_eighty_columns_and_cuts_nothing(ladder: Ladder) -> None:
    text = printed(ladder)
    assert "…" not in text
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80
    rows = [line.split() for line in text.splitlines()]
    assert ["teacher", *["80%"] * 8] in rows
    assert ["float", *["95%"] * 8] in rows
    assert [".pte", *["45%"] * 8] in rows
    assert text.index("nano-2-like") < text.index("nano-1-like")
    assert "of 50 each; standard errors up to 5%" in " ".join(text.split())


def test_a_capability_that_the_teacher_lacks_has_no_share(ladder: Ladder) -> None:
    without = {**scores(0.4, 0.8), "coding": CapabilityScore(0.0, 0.0, 50, None)}
    text = printed(Ladder({**scores(0.8), "coding": CapabilityScore(0.0, 0.0, 50)}, (Rung("a", "student", without),)))
    assert ["float", *["50%"] * 5, "–", "50%", "50%"] in [line.split() for line in text.splitlines()]


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("coding", "coding"), ("long-context", "long\ncontext"), ("summarization", "summari-\nzation"),
        ("multilingual", "multil-\ningual"),
    ],
)  # fmt: skip
def test_headings_are_narrow(name: str, lines: str) -> None:
    assert heading(name) == lines


def test_runtimes_are_held_against_torch_within_the_reported_error(ladder: Ladder) -> None:
    assert disagreements(ladder) == ()
    assert "agree within the error" in agreement(ladder)
    odd = {**scores(0.7, 0.8), "coding": CapabilityScore(0.62, 0.05, 50, 0.775)}
    rungs = (*ladder.rungs[:2], Rung("nano-2-like", "onnx", odd))
    (apart,) = disagreements(Ladder(ladder.teacher, rungs))
    assert (apart.student, apart.stage, apart.capability) == ("nano-2-like", "onnx", "coding")
    assert (apart.torch, apart.runtime, apart.error) == pytest.approx((0.74, 0.62, 0.05))
    assert "nano-2-like/onnx coding 62% (torch 74%, ±5%)" in agreement(Ladder(ladder.teacher, rungs))


def test_one_answer_is_within_the_error_where_all_were_right() -> None:
    def pair(value: float) -> Ladder:
        right, other = scores(1.0, 1.0, 0.0), scores(value, 1.0, None)
        return Ladder(right, (Rung("a", "int4", right), Rung("a", "onnx", other)))

    assert disagreements(pair(0.98)) == ()
    assert len(disagreements(pair(0.96))) == len(NAMES)


def test_plain_data_holds_every_share(ladder: Ladder) -> None:
    found = ladder.as_dict()
    assert found["teacher"]["coding"] == 0.8
    assert [rung["stage"] for rung in found["rungs"]] == ["student", "int4", "executorch", "onnx"] * 2
    assert found["rungs"][0]["of_teacher"]["reasoning"] == pytest.approx(0.95)
    assert found["apart"] == []


def test_the_picture_has_a_bar_for_every_score(ladder: Ladder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nano.figure

    drawn = []
    blank = nano.figure.blank_figure
    monkeypatch.setattr(nano.figure, "blank_figure", lambda *args: drawn.append(blank(*args)) or drawn[0])
    draw_ladder(ladder, tmp_path / "ladder.png")
    assert (tmp_path / "ladder.png").read_bytes().startswith(b"\x89PNG")
    (panel,) = drawn[0].axes
    bars = sorted(panel.patches, key=lambda bar: bar.get_x())
    assert len(bars) == 8 * len(NAMES)
    assert [bar.get_height() for bar in bars[:8]] == pytest.approx([95, 92.5, 90, 87.5, 50, 47.5, 45, 42.5])
    assert [label.get_text().split("\n")[0] for label in panel.get_xticklabels()] == list(NAMES)
    assert all(a.get_x() + a.get_width() <= b.get_x() + 1e-9 for a, b in pairwise(bars))
