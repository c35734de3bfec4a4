"""A live teacher that reads each row once: what is computed, what is kept, and what a kill leaves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checks import same_bits, some_stories

from distill.data import Rows, make_batch, pack
from distill.options import DistillOptions
from distill.remembered import ANSWERS, LOG, RememberingTeacher, remembering
from distill.run import run_distill
from distill.teacher import LiveTeacher, open_teacher
from nano.corpus import Windows
from nano.errors import NoSpaceError
from nano.manifest import read_manifest
from nano.shapes import ModelShape, read_config

PASSES = DistillOptions(
    steps=15, batch=4, length=64, eval_tokens=512, calibration_tokens=512, layers="influence", curves=False
)


@pytest.fixture(scope="module")
def teacher(stories: Path) -> LiveTeacher:
    return open_teacher(stories, ModelShape.from_hf(read_config(stories)), "float32", "cpu")


@pytest.fixture(scope="module")
def rows() -> Rows:
    """Six rows of 64, some whole, some of several segments and padding."""
    chance = np.random.default_rng(0)
    return pack(Windows(tuple(chance.integers(3, 500, n) for n in (64, 64, 64, 40, 20, 50, 30, 25))), 64)


def batch_of(rows: Rows, *numbers: int) -> Any:
    which = np.array(numbers)
    return replace(make_batch(rows, which), rows=which)


def test_each_row_is_read_once_and_answered_the_same(teacher: LiveTeacher, rows: Rows, tmp_path: Path) -> None:
    read: list[int] = []

    class Counting(LiveTeacher):
        def answers(self, batch: Any) -> Any:
            read.append(len(batch.ids_BT))
            return super().answers(batch)

    counting = Counting(teacher.model, teacher.shape)
    told = RememberingTeacher(counting, rows, tmp_path, "cpu")
    for numbers in ((0, 3, 4), (3, 4), (1, 3, 4), (4, 3), (2, 2, 5), (0, 1, 2, 3, 4, 5)):
        batch = batch_of(rows, *numbers)
        found, expected = told.answers(batch), teacher.answers(batch)
        torch.testing.assert_close(found.hidden_NE, expected.hidden_NE, rtol=1e-5, atol=1e-5)
        assert found.head_VE is expected.head_VE
    assert read == [3, 1, 2]
    told.answers(make_batch(rows, np.array([1])))  # not of the run's text
    assert read == [3, 1, 2, 1]


def test_what_a_kill_or_a_broken_disk_leaves(teacher: LiveTeacher, rows: Rows, tmp_path: Path) -> None:
    first = RememberingTeacher(teacher, rows, tmp_path, "cpu")
    kept = first.answers(batch_of(rows, 0, 1)).hidden_NE
    first.answers(batch_of(rows, 2))
    with (tmp_path / LOG).open("ab") as log:
        log.write(b"3:17 4:1")  # cut short
    with (tmp_path / ANSWERS).open("rb+") as file:  # row 2 no longer has its checksum
        file.seek(2 * first.slot)
        file.write(b"\xff" * 64)
    again = RememberingTeacher(teacher, rows, tmp_path, "cpu")
    assert set(again.known) == {0, 1, 2}
    assert torch.equal(again.answers(batch_of(rows, 0, 1)).hidden_NE, kept)
    expected = teacher.answers(batch_of(rows, 2, 3)).hidden_NE
    torch.testing.assert_close(again.answers(batch_of(rows, 2, 3)).hidden_NE, expected, rtol=1e-5, atol=1e-5)
    assert set(RememberingTeacher(teacher, rows, tmp_path, "cpu").known) == {0, 1, 2, 3}


def test_when_it_remembers(teacher: LiveTeacher, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def kind(**changes: Any) -> type:
        options = replace(DistillOptions(steps=2, batch=4, length=64), **changes)
        return type(remembering(replace(teacher, watched=changes.pop("watched", ())), rows, options, tmp_path, "cpu"))

    size = len(rows) * 64 * 64 * 4
    assert kind() is RememberingTeacher
    assert kind(steps=1) is LiveTeacher  # nothing comes again
    assert kind(on_policy=0.5) is LiveTeacher
    assert kind(remember=0) is LiveTeacher
    assert kind(remember=0.99 * size / 1e9) is LiveTeacher
    assert kind(remember=1.01 * size / 1e9) is RememberingTeacher
    monkeypatch.setattr("distill.remembered.FREE_SHARE", 1e-12)
    assert kind() is LiveTeacher
    assert type(remembering(replace(teacher, watched=(1,)), rows, PASSES, tmp_path, "cpu")) is LiveTeacher


def test_a_run_of_several_passes(
    stories: Path, tinystories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same student as from a teacher that is asked every time; broken off and resumed the same bits."""
    text = some_stories(tmp_path, tinystories, 6)
    plain = run_distill(stories, "150k", [text], tmp_path / "plain", replace(PASSES, remember=0))
    asked: list[int] = []
    real = LiveTeacher.answers

    def counted(self: LiveTeacher, batch: Any) -> Any:
        asked.append(len(batch.ids_BT))
        return real(self, batch)

    monkeypatch.setattr(LiveTeacher, "answers", counted)
    whole = run_distill(stories, "150k", [text], tmp_path / "whole", PASSES)
    assert sum(asked) == 41 < PASSES.steps * PASSES.batch  # so many rows has the text
    figures = [m.results["held_out"]["trained"]["cross_entropy"] for m in (plain, whole)]
    assert figures[0] == pytest.approx(figures[1], rel=1e-4)
    assert not (tmp_path / "whole.checkpoint").exists()

    def stop(_state: Any, record: dict[str, Any]) -> None:
        if record["step"] == 11:
            raise KeyboardInterrupt

    broken = replace(PASSES, save_every=5)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("distill.state.StateFolder.note", stop)
        run_distill(stories, "150k", [text], tmp_path / "s", broken)
    before = len(asked)
    run_distill(stories, "150k", [text], tmp_path / "s", broken, resume=True)
    assert len(asked) == before  # what the step that was lost had computed is there
    assert same_bits(tmp_path / "whole", tmp_path / "s")
    assert read_manifest(tmp_path / "s").recipe["remember"] == PASSES.remember


def test_a_full_disk_is_told(teacher: LiveTeacher, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    told = RememberingTeacher(teacher, rows, tmp_path, "cpu")
    monkeypatch.setattr("distill.remembered.os.open", full)
    with pytest.raises(NoSpaceError, match="--remember 0"):
        told.answers(batch_of(rows, 0))
    assert not told.known
