"""A scorecard: what a model said to each question of some tasks, and how good it is at each capability.

A capability's score is the mean over all its questions; its error the standard error of that mean (`mean_error`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from nano.capabilities import Question, Task, check_tasks
from nano.lm import LanguageModel
from nano.progress import Track, track
from nano.tasks.answering import Likelihood, continuations, likelihoods
from nano.tasks.scoring import blanks, require_metric, score_answer

LABEL, SAID = 96, 64
"""Characters of a question and of an answer that are kept."""
FLIP = 0.5
"""How far a score moves, at least, where an answer flipped."""
TOLD = 12
"""Flips that are told with their text."""


@dataclass(frozen=True)
class Answer:
    """One question, answered.

    Attributes:
        task: the task's name.
        index: of the question in its task, counted from 0.
        hash: of the question.
        label: how people know the question again.
        expected: the first right answer.
        said: what the model said, of a choice its text.
        score: 0 to 1.
    """

    task: str
    index: int
    hash: str
    label: str
    expected: str
    said: str
    score: float


@dataclass(frozen=True)
class TaskScore:
    """One task, scored.

    Attributes:
        capability: the group that it counts for.
        metric: of the task.
        score: mean over its questions, 0 to 1.
        error: the standard error of that; None where there is one question only.
        questions: how many.
        cut: questions whose prompt did not fit the context as a whole.
    """

    capability: str
    metric: str
    score: float
    error: float | None
    questions: int
    cut: int = 0

    @classmethod
    def of(cls, capability: str, metric: str, scores: Sequence[float], cut: int) -> TaskScore:
        """From the scores of its questions."""
        return cls(capability, metric, *mean_error(scores), len(scores), cut)


@dataclass(frozen=True)
class CapabilityScore:
    """One capability, scored.

    Attributes:
        score: mean over all questions of its tasks, 0 to 1.
        error: the standard error of that; None where there is one question only.
        questions: how many.
        of_teacher: share of the teacher's score; None where that is not known or 0.
    """

    score: float
    error: float | None
    questions: int
    of_teacher: float | None = None


@dataclass(frozen=True)
class Scorecard:
    """Scores of one model.

    Attributes:
        tasks: task name to its score.
        answers: every question's, task by task.
        of_teacher: capability to the share of the teacher's score.
        flips: against the teacher, see `flips_of`; empty where it is not known.
    """

    tasks: Mapping[str, TaskScore]
    answers: tuple[Answer, ...]
    of_teacher: Mapping[str, float] = field(default_factory=dict)
    flips: Mapping[str, Any] = field(default_factory=dict)

    @property
    def capabilities(self) -> dict[str, CapabilityScore]:
        """Capability to its score, in the order of the tasks."""
        found: dict[str, list[float]] = {}
        for answer in self.answers:
            found.setdefault(self.tasks[answer.task].capability, []).append(answer.score)
        return {
            name: CapabilityScore(*mean_error(scores), len(scores), self.of_teacher.get(name))
            for name, scores in found.items()
        }

    def as_dict(self) -> dict[str, Any]:
        """Plain data for a manifest and for `--json`: the scores, and of the answers the flips."""
        scores = {
            "capabilities": {name: asdict(score) for name, score in self.capabilities.items()},
            "tasks": {name: asdict(score) for name, score in self.tasks.items()},
        }
        return {**scores, "flips": dict(self.flips)} if self.flips else scores


def flips_of(teacher: Sequence[Answer], answers: Sequence[Answer]) -> dict[str, Any]:
    """Questions that one has right and the other wrong, told for a report.

    Args:
        teacher, answers: to the same questions in the same order.

    Returns:
        "lost" and "gained": how many; "worst": of the lost ones those that lost most, each with its task, label,
        expected answer, and what is said now.
    """
    change = [theirs.score - ours.score for ours, theirs in zip(teacher, answers, strict=True)]
    order = sorted(range(len(change)), key=lambda i: change[i])
    worst = [
        {"task": one.task, "label": one.label, "expected": one.expected, "said": one.said}
        for one in (answers[i] for i in order[:TOLD] if change[i] <= -FLIP)
    ]
    return {"lost": sum(c <= -FLIP for c in change), "gained": sum(c >= FLIP for c in change), "worst": worst}


def mean_error(scores: Sequence[float]) -> tuple[float, float | None]:
    """Mean and its standard error; None for a single score.

    Scores that are all alike (all answers right) do not make a mean certain: their error is that of the scores with a
    wrong and a right one added (Laplace's rule of succession), about one answer's worth.
    """
    mean = sum(scores) / len(scores)
    if len(scores) < 2:
        return mean, None
    return mean, _standard_error(scores) or _standard_error([*scores, 0.0, 1.0])


def _standard_error(scores: Sequence[float]) -> float:
    n, mean = len(scores), sum(scores) / len(scores)
    return math.sqrt(sum((s - mean) ** 2 for s in scores) / (n - 1) / n)


def run_tasks(model: LanguageModel, tasks: Sequence[Task]) -> Scorecard:
    """Ask every question, with progress.

    Raises:
        RequestError: a task that cannot be run, or does not fit the model's context.
        MissingExtraError: a metric's library is not installed.
    """
    check_tasks(tasks)
    for task in tasks:
        require_metric(task.metric)
    scores, answers = {}, []
    total = sum(len(question.choices) or 1 for task in tasks for question in task.questions)
    with track("tasks", total, "answers") as progress:
        for task in tasks:
            ask = _choose if task.metric == "choice" else _generate
            said = ask(model, task, progress)
            mine = [_answer(task, i, text, score) for i, (text, score, _cut) in enumerate(said)]
            cut = sum(cut > 0 for _text, _score, cut in said)
            scores[task.name] = TaskScore.of(task.capability, task.metric, [answer.score for answer in mine], cut)
            answers += mine
    return Scorecard(scores, tuple(answers))


_Reply = tuple[str, float, int]
"""What was said, its score, and how many ids of the prompt were cut."""


def _choose(model: LanguageModel, task: Task, progress: Track) -> list[_Reply]:
    """The most likely choice of each question; of equal ones the first."""
    pairs = [
        (question.contexts[i] if question.contexts else question.prompt, choice)
        for question in task.questions
        for i, choice in enumerate(question.choices)
    ]
    found = iter(likelihoods(model, pairs, lambda count: progress.advance(count, note=task.name)))
    replies = []
    for question in task.questions:
        values = [_per_length(next(found), choice, task) for choice in question.choices]
        chosen = max(range(len(values)), key=lambda i: values[i][0])
        text = question.contexts[chosen] if question.contexts else question.choices[chosen]
        replies.append((text, float(chosen == question.right), max(cut for _value, cut in values)))
    return replies


def _per_length(found: Likelihood, choice: str, task: Task) -> tuple[float, int]:
    size = {
        "none": 1, "tokens": found.tokens, "characters": len(choice.strip()), "bytes": len(choice.strip().encode()),
    }  # fmt: skip
    return found.total / max(size[task.length], 1), found.cut


def _generate(model: LanguageModel, task: Task, progress: Track) -> list[_Reply]:
    """The greedy answer to each question."""
    prompts = [question.prompt for question in task.questions]
    said = continuations(
        model, prompts, task.stop, task.max_new_tokens, lambda count: progress.advance(count, note=task.name),
        cut_middle=task.cut == "middle",
    )  # fmt: skip
    return [(s.text, score_answer(task, q, s.text), s.cut) for s, q in zip(said, task.questions, strict=True)]


def _answer(task: Task, index: int, said: str, score: float) -> Answer:
    question = task.questions[index]
    return Answer(
        task.name,
        index,
        question.hash,
        _label(question),
        _short(_expected(question), SAID),
        _short(said, SAID),
        round(score, 4),
    )


def _label(question: Question) -> str:
    text = blanks(question.label or question.prompt or question.contexts[0])
    return _short(text, LABEL) if question.label else text[-LABEL:]


def _expected(question: Question) -> str:
    if question.contexts:
        return question.contexts[question.right]
    return question.answers[0] if question.answers else ""


def _short(text: str, limit: int) -> str:
    text = blanks(text)
    return text if len(text) <= limit else text[: limit - 1] + "…"
