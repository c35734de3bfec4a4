"""Scores of answers: against values worked out by hand and against the metrics' own libraries."""

from __future__ import annotations

import sys
from decimal import Decimal

import pytest

from nano.capabilities import Metric, Question, Task, check_tasks
from nano.errors import MissingExtraError, RequestError
from nano.tasks.scoring import exact, f1, last_number, require_metric, score_answer, squad


def score(metric: Metric, said: str, *answers: str) -> float:
    question = Question("?", answers)
    return score_answer(Task("t", "c", metric, (question,)), question, said)


def test_squad_normalisation_is_that_of_its_script() -> None:
    assert squad("The  Eiffel-Tower, an icon!") == "eiffeltower icon"
    assert squad("A theatre near Athens") == "theatre near athens"
    assert squad("(A)") == "(A)", "what would become nothing stays as it is"
    assert exact(" the Beatles.", ("Beatles",), "squad") == 1
    assert exact(" the Beatles.", ("Beatles",), "space") == 0
    assert exact(" ] ]\n", ("] ]",), "squad") == 1
    assert exact(" [ ]", ("] ]",), "squad") == 0
    assert exact("-5", ("5",), "space") == 0


def test_f1_is_the_harmonic_mean_over_words() -> None:
    assert f1("the cat sat on the mat", "a cat on a mat") == pytest.approx(2 * (3 / 4) * 1 / (3 / 4 + 1))
    assert f1("dog", "cat") == 0
    assert f1("x x y", "x y y") == pytest.approx(2 / 3)
    assert score("f1", "red", "blue", "red car") == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 3 + 4 = 7.", "7"),
        ("1,234.50 dollars", "1234.50"),
        ("it is -12", "-12"),
        ("#### 72", "72"),
        ("18\n", "18.0"),
    ],
)
def test_last_numbers(text: str, number: str) -> None:
    assert last_number(text) == Decimal(number)
    assert score("number", text, number) == 1
    assert score("number", text, f"{number}1" if "." in number else f"{number}.5") == 0


def test_no_number_is_no_answer() -> None:
    assert last_number("none") is None
    assert score("number", "none", "3") == 0


def test_bleu_chrf_and_rouge_are_their_libraries() -> None:
    pytest.importorskip("sacrebleu")
    pytest.importorskip("rouge_score")
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu import sentence_bleu, sentence_chrf

    said, answers = "the cat sat on a mat today", ("a dog ran", "the cat sat on the mat")
    assert score("bleu", said, *answers) == pytest.approx(sentence_bleu(said, [answers[1]]).score / 100)
    assert score("chrf", said, *answers) == pytest.approx(sentence_chrf(said, [answers[1]]).score / 100)
    expected = RougeScorer(["rougeL"], use_stemmer=True).score(answers[1], said)["rougeL"].fmeasure
    assert 0.5 < score("rouge", said, *answers) == expected < 1


def test_a_missing_library_is_told_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'nanokit\[tasks\]'"):
        require_metric("bleu")
    require_metric("choice")


def test_code_is_run() -> None:
    question = Question("?", (), tests=("assert add(1, 2) == 3",))
    task = Task("t", "coding", "code", (question,))
    assert score_answer(task, question, "def add(a, b):\n  return a + b\n") == 1
    assert score_answer(task, question, "def add(a, b):\n  return a - b\n") == 0


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (Task("t", "c", "exact", ()), "no questions"),
        (Task("t", "c", "exact", (Question("?", (" ",)),)), "not blank"),
        (Task("t", "c", "code", (Question("?", ("x",)),)), "tests"),
        (Task("t", "c", "choice", (Question("?", ("x",), ("x",)),)), "two choices"),
        (Task("t", "c", "choice", (Question("?", ("z",), ("x", "y")),)), "character by character"),
        (Task("t", "c", "choice", (Question("?", (), ("x", "y"), gold=2),)), "from 0 to 1"),
        (Task("t", "c", "choice", (Question("", (), ("x", "y"), ("a",), gold=0),)), "a context for each"),
        (Task("t", "c", "best", (Question("?", ("x",)),)), "metric is not known"),  # type: ignore[arg-type]
    ],
)
def test_tasks_that_cannot_be_asked_are_refused(task: Task, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        check_tasks([task])


def test_names_are_unique() -> None:
    task = Task("t", "c", "exact", (Question("?", ("x",)),))
    with pytest.raises(RequestError, match="same name"):
        check_tasks([task, task])
    with pytest.raises(RequestError, match="no tasks"):
        check_tasks([])
