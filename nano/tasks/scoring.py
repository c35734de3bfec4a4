"""Scores of single answers, each 0 to 1.

| metric | score |
|---|---|
| choice | 1 where the most likely choice is the right one |
| exact | 1 where the answer equals one of the right ones, blanks aside, or as SQuAD's script compares |
| number | 1 where the last number of the answer is the last number of a right one |
| f1 | best F1 of words over the right answers, SQuAD's script (Rajpurkar et al. 2016, arXiv:1606.05250) |
| code | 1 where the code passes its tests, see `nano.tasks.sandbox` |
| bleu, chrf | best sentence BLEU (effective order) or chrF of sacrebleu (Post 2018, arXiv:1804.08771) over 100 |
| rouge | best ROUGE-L F1 of rouge-score, Google's own, with stemming |

SQuAD's normalisation takes away punctuation and articles, so "(A)" and "[ ]" become nothing; an answer that would
become nothing is compared as it is.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping
from decimal import Decimal, InvalidOperation
from functools import cache
from typing import Any

from nano.capabilities import Normalise, Question, Task
from nano.errors import require_module

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def score_answer(task: Task, question: Question, said: str) -> float:
    """The score of a generated answer.

    Raises:
        MissingExtraError: the metric's library is not installed.
    """
    if task.metric == "code":
        from nano.tasks.sandbox import passes

        return float(passes(said, question.tests))
    if task.metric == "exact":
        return exact(said, question.answers, task.normalise)
    scorer = _SCORERS[task.metric]
    return max(scorer(said, answer) for answer in question.answers)


def exact(said: str, answers: tuple[str, ...], normalise: Normalise) -> float:
    """1 where what was said is one of the answers."""
    change = squad if normalise == "squad" else blanks
    return float(any(change(said) == change(answer) for answer in answers))


def blanks(text: str) -> str:
    """Without blanks at its ends, runs of them as one."""
    return " ".join(text.split())


def squad(text: str) -> str:
    """As SQuAD's script compares: lower case, no punctuation, no articles; as it is where that leaves nothing."""
    bare = blanks(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)))
    return bare or blanks(text)


def f1(said: str, answer: str) -> float:
    """Harmonic mean of precision and recall over words, as SQuAD's script counts them."""
    ours, theirs = squad(said).split(), squad(answer).split()
    same = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * same / (len(ours) + len(theirs)) if same else 0.0


def last_number(text: str) -> Decimal | None:
    """The last number of a text: digits with perhaps a sign, commas and decimals; None where there is none."""
    found = _NUMBER.findall(text)
    try:
        return Decimal(found[-1].replace(",", "")) if found else None
    except InvalidOperation:
        return None


def _same_number(said: str, answer: str) -> float:
    ours, theirs = last_number(said), last_number(answer)
    return float(ours is not None and ours == theirs)


def _bleu(said: str, answer: str) -> float:
    return float(_sacrebleu("BLEU", effective_order=True).sentence_score(said, [answer]).score) / 100


def _chrf(said: str, answer: str) -> float:
    return float(_sacrebleu("CHRF").sentence_score(said, [answer]).score) / 100


@cache
def _sacrebleu(name: str, **options: bool) -> Any:
    return getattr(require_module("sacrebleu.metrics", "tasks"), name)(**options)


def _rouge(said: str, answer: str) -> float:
    return float(_rouge_scorer().score(answer, said)["rougeL"].fmeasure)


@cache
def _rouge_scorer() -> Any:
    return require_module("rouge_score.rouge_scorer", "tasks").RougeScorer(["rougeL"], use_stemmer=True)


_SCORERS: Mapping[str, Callable[[str, str], float]] = {
    "number": _same_number, "f1": f1, "bleu": _bleu, "chrf": _chrf, "rouge": _rouge,
}  # fmt: skip


def require_metric(metric: str) -> None:
    """Raise MissingExtraError now where a metric's library is missing, not after an hour of generation."""
    if metric in ("bleu", "chrf"):
        require_module("sacrebleu.metrics", "tasks")
    elif metric == "rouge":
        require_module("rouge_score.rouge_scorer", "tasks")
