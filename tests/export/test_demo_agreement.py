"""The demo's teacher in int4: torch, ExecuTorch and ONNX Runtime give every capability the same score."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from export.options import ExportOptions
from export.run import run_export
from nano.demo.assets import teacher_folder
from nano.demo.tasks import demo_tasks
from nano.ladder import Ladder, Rung, disagreements
from nano.lm import open_model
from nano.scorecard import Scorecard, run_tasks
from quantize.options import QuantizeOptions
from quantize.run import run_quantize

QUESTIONS = 30


def asked(folder: Path) -> Scorecard:
    model: Any = open_model(folder)
    try:
        return run_tasks(model, demo_tasks(QUESTIONS))
    finally:
        model.close()


@pytest.fixture(scope="module")
def cards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Scorecard]:
    """Scorecards of the float teacher ("student"), its int4 form in torch, and both bundles of that."""
    home = tmp_path_factory.mktemp("agreement")
    run_quantize(teacher_folder(), [], home / "int4", QuantizeOptions(method="rtn"))
    found = {"student": asked(teacher_folder()), "int4": asked(home / "int4")}
    for form in ("executorch", "onnx"):
        run_export(home / "int4", form, home / form, ExportOptions(context=256))  # type: ignore[arg-type]
        found[form] = asked(home / form)
    return found


def test_every_capability_agrees_within_its_error(cards: dict[str, Scorecard]) -> None:
    rungs = tuple(Rung("teacher", stage, card.capabilities) for stage, card in cards.items())
    assert disagreements(Ladder(cards["student"].capabilities, rungs)) == ()


def test_nearly_every_answer_is_the_same_word_by_word(cards: dict[str, Scorecard]) -> None:
    """int8 activations may tip an answer that was on edge; a wrong kernel, cache or tokenizer changes most of them."""
    for form in ("executorch", "onnx"):
        pairs = list(zip(cards["int4"].answers, cards[form].answers, strict=True))
        assert all(ours.hash == theirs.hash for ours, theirs in pairs)
        assert sum(ours.said == theirs.said for ours, theirs in pairs) / len(pairs) > 0.95
