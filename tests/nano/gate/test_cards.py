"""The gate for scorecards: its arithmetic on made-up answers, its false alarms, and the command."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from nano.cli import run
from nano.errors import BadFileError, CheckFailedError, RequestError
from nano.gate.cards import FLIPS, MEAN, changes_of, judge_cards
from nano.gate.compare import report, require_passed, run_compare
from nano.gate.compare_cards import meant_to_be_same
from nano.gate.limits import Limits
from nano.gate.verdicts import Verdict
from nano.scorecard import Answer, Scorecard, TaskScore
from nano.scorecard_file import SavedCard, check_same_questions, read_card, with_teacher, write_card

MODEL = {"path": "m", "fingerprint": "f" * 64, "kind": "int4"}


def card(scores: dict[str, np.ndarray], kind: str = "int4", said: str = "") -> SavedCard:
    """One task a capability; what is said follows the score unless it is given."""
    answers = [
        Answer(name, i, f"{name[:4]}{i:08d}", f"question {i} of {name}", "right", said or f"said {value}", float(value))
        for name, values in scores.items()
        for i, value in enumerate(values)
    ]
    tasks = {name: TaskScore.of(name, "exact", list(map(float, values)), 0) for name, values in scores.items()}
    return SavedCard(Scorecard(tasks, tuple(answers)), {**MODEL, "kind": kind}, {"tasks": list(scores), "limit": None})


def by_name(verdicts: list[Verdict]) -> dict[str, Verdict]:
    return {verdict.name: verdict for verdict in verdicts}


def right(n: int, wrong: int) -> np.ndarray:
    return np.array([0.0] * wrong + [1.0] * (n - wrong))


def test_a_capability_that_lost_is_named_with_its_size_and_its_worst_examples() -> None:
    before = card({"coding": right(100, 10), "reasoning": right(100, 50)})
    after = card({"coding": right(100, 40), "reasoning": right(100, 50)})
    found = by_name(judge_cards(before, after, Limits(), flips=True))
    lost = found["coding"]
    assert (lost.outcome, lost.value, lost.before, lost.after) == ("failed", pytest.approx(0.3), "90.0%", "60.0%")
    # 30 of 100 were lost: a binomial share, here at 98.33% because three figures hold together
    half = 2.394 * np.sqrt(0.3 * 0.7 / 99)
    assert lost.low == pytest.approx(0.3 - half, abs=0.015)
    assert lost.high == pytest.approx(0.3 + half, abs=0.015)
    assert lost.confidence == pytest.approx(1 - 0.05 / 3)
    assert lost.sentence.startswith("coding lost 30.0% (98.33% interval 1")
    assert lost.worst[0] == (
        "coding 1 → 0",
        "question 10 of coding | expected: right | before: said 1.0 | after: said 0.0",
    )
    assert found["reasoning"].outcome == "passed"
    assert (found[MEAN].value, found[MEAN].outcome) == (pytest.approx(0.15), "failed")
    assert (found[FLIPS].value, found[FLIPS].outcome) == (pytest.approx(0.15), "failed")


def test_flips_are_seen_where_no_score_changed() -> None:
    ours, theirs = right(200, 40), right(200, 40)[::-1].copy()
    before, after = card({"reasoning": ours}), card({"reasoning": theirs})
    found = by_name(judge_cards(before, after, Limits(), flips=True))
    assert set(found) == {"reasoning", FLIPS}
    assert (found["reasoning"].value, found["reasoning"].outcome) == (0, "undecided")
    flips = found[FLIPS]
    assert (flips.value, flips.outcome) == (pytest.approx(0.4), "failed")
    assert flips.sentence.startswith("80 of 200 answers flipped between right and wrong, 40.0% (95% interval")
    assert len(flips.worst) == 5
    assert set(by_name(judge_cards(before, after, Limits(), flips=False))) == {"reasoning"}


def test_flips_are_for_models_that_are_meant_to_be_the_same() -> None:
    def of(kind: str) -> SavedCard:
        return card({"a": right(10, 1)}, kind)

    assert meant_to_be_same(of("int4"), of("onnx"))
    assert meant_to_be_same(of("executorch"), of("onnx"))
    assert meant_to_be_same(of("student"), of("student"))
    assert not meant_to_be_same(of("student"), of("int4"))


def test_the_mean_sees_what_is_small_everywhere() -> None:
    """Each of eight capabilities lost 4 points, none of them for certain."""
    before = {f"c{i}": right(150, 30) for i in range(8)}
    after = {name: right(150, 36) for name in before}
    found = by_name(judge_cards(card(before), card(after), Limits(), flips=False))
    assert {found[name].outcome for name in before} == {"undecided"}
    assert found[MEAN].outcome == "failed"
    assert 0.01 < found[MEAN].low < found[MEAN].value == pytest.approx(0.04)


def test_limits_of_single_capabilities() -> None:
    before = card({"coding": right(100, 10), "reasoning": right(100, 10)})
    after = card({"coding": right(100, 40), "reasoning": right(100, 40)})
    limits = Limits(capabilities={"coding": 0.5, "reasoning": None}, max_score_loss=None, max_flips=None)
    (only,) = judge_cards(before, after, limits, flips=True)
    assert (only.name, only.limit, only.outcome) == ("coding", 0.5, "passed")
    with pytest.raises(RequestError, match="was not asked"):
        judge_cards(before, after, Limits(capabilities={"codling": 0.1}), flips=True)
    with pytest.raises(RequestError, match="too few questions"):
        judge_cards(card({"a": right(9, 1)}), card({"a": right(9, 1)}), Limits(), flips=True)


def test_graded_answers_are_resampled_as_they_are() -> None:
    random = np.random.default_rng(0)
    ours = random.uniform(0.2, 0.9, 80)
    theirs = np.clip(ours - random.normal(0.1, 0.05, 80), 0, 1)
    (verdict, _flips) = judge_cards(card({"s": ours}), card({"s": theirs}), Limits(), flips=True)
    change = ours - theirs
    half = 1.990 * change.std(ddof=1) / np.sqrt(80)
    assert verdict.low == pytest.approx(change.mean() - half, abs=0.003)
    assert verdict.high == pytest.approx(change.mean() + half, abs=0.003)
    changes = changes_of(card({"s": ours}), card({"s": theirs}))
    assert all(a.score_after - a.score_before <= b.score_after - b.score_before for a, b in pairwise(changes))


@pytest.mark.parametrize("questions", [25, 120])
def test_false_alarms_are_rare(questions: int) -> None:
    """200 comparisons of equal models: answers of two that differ in 20% of them, dealt to the sides by chance."""
    random = np.random.default_rng(0)
    share = np.linspace(0.2, 0.95, 7)
    defaults = strict = 0
    hardest = Limits(max_capability_loss=0.0, max_score_loss=0.0)
    for trial in range(200):
        one = {f"c{i}": (random.random(questions) < p).astype(float) for i, p in enumerate(share)}
        other = {
            name: np.where(random.random(questions) < 0.2, (random.random(questions) < p).astype(float), one[name])
            for p, name in zip(share, one, strict=True)
        }
        limits = Limits(resamples=2000, seed=trial)
        found = judge_cards(card(one), card(other), limits, flips=False)
        defaults += any(verdict.outcome == "failed" for verdict in found)
        found = judge_cards(card(one), card(other), replace(hardest, resamples=2000, seed=trial), flips=False)
        strict += any(verdict.outcome == "failed" for verdict in found)
    assert defaults <= 4
    assert strict <= 10, "with no loss allowed at all"


def test_a_card_is_read_back_and_damage_is_told(tmp_path: Path) -> None:
    graded = np.linspace(0, 1, 20).round(4)
    saved = card({"coding": right(30, 4), "reasoning": graded})
    saved = with_teacher(saved, card({"coding": right(30, 0), "reasoning": graded}))
    assert saved.card.of_teacher == {"coding": pytest.approx(26 / 30), "reasoning": 1.0}
    path = tmp_path / "card.json"
    write_card(path, saved)
    again = read_card(path)
    assert again.card.capabilities["coding"] == saved.card.capabilities["coding"]
    assert [a.said for a in again.card.answers] == [a.said for a in saved.card.answers]
    write_card(tmp_path / "again.json", again)
    assert (tmp_path / "again.json").read_text() == path.read_text()
    whole = path.read_text()
    assert whole.count("\n") > 50, "a line for each question"
    for number, bad in enumerate(
        (whole[:300], "{}", "[]", whole.replace('"columns"', '"column"'), whole.replace('"answers"', '"answer"'),
         whole.replace("1.0,", "7.0,"), whole.replace('"schema_version": 1', '"schema_version": 2'),
         whole.replace('"fingerprint"', '"print"'), whole.replace('"limit": null', '"limit": "x"'))
    ):  # fmt: skip
        (tmp_path / f"bad{number}.json").write_text(bad)
        with pytest.raises(BadFileError):
            read_card(tmp_path / f"bad{number}.json")


def test_other_questions_are_refused() -> None:
    one = card({"coding": right(20, 2), "reasoning": right(20, 2)})
    with pytest.raises(RequestError, match=r"only in m: coding; only in m: none"):
        check_same_questions(one, card({"reasoning": right(20, 2)}))


def test_a_failure_is_told_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_card(tmp_path / "before.json", card({"coding": right(60, 2), "reasoning": right(60, 9)}))
    write_card(tmp_path / "after.json", card({"coding": right(60, 30), "reasoning": right(60, 9)}))
    compared = run_compare(tmp_path / "before.json", tmp_path / "after.json")
    with pytest.raises(CheckFailedError) as refused:
        require_passed(compared)
    assert "coding lost 46.7%" in str(refused.value)
    assert "question 2 of coding | expected: right" in str(refused.value)
    assert "max_capability_loss = 0.02" in str(refused.value)
    assert compared.as_dict()["changes"][0]["flipped"] is True
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    report(compared, tmp_path / "junit.xml")
    failures = {c.get("name"): c.findtext("failure") for c in ElementTree.parse(tmp_path / "junit.xml").getroot()[0]}
    assert "question 2 of coding" in (failures["coding"] or "")
    assert failures["reasoning"] is None
    assert "❌ | coding | 96.7% | 50.0% |" in (tmp_path / "summary.md").read_text()
    same = run_compare(tmp_path / "before.json", tmp_path / "before.json")
    require_passed(same)
    assert {verdict.high for verdict in same.verdicts} == {0.0}


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_card(tmp_path / "before.json", card({"coding": right(60, 2)}))
    write_card(tmp_path / "after.json", card({"coding": right(60, 30)}))
    before, after = (str(tmp_path / name) for name in ("before.json", "after.json"))
    assert run(["compare", before, after, "--json"]) == 1
    said = capsys.readouterr()
    assert (json.loads(said.out)["passed"], json.loads(said.out)["units"]) == (False, 60)
    assert "does not pass the gate: coding, flips" in said.err
    assert run(["compare", before, before]) == 0
    assert "0 of 60 answers changed" in capsys.readouterr().out
    assert run(["compare", before, before, "--tasks", "piqa"]) == 2
    assert "nothing is asked" in capsys.readouterr().err
