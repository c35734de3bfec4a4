"""What a model is asked: questions, tasks made of them, and the capability that a task belongs to.

A capability ("reasoning") is a set of tasks, a task a list of questions asked and scored alike. Tasks come from
TOML files (`nano.tasks.file`) or from code, and `nano.scorecard` runs them on any stage's model.

A multiple choice is answered by likelihood: the choice whose text after the prompt is most likely is what the model
says. Everything else is generated greedily up to a stop text and held against the answers by `nano.tasks.scoring`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from nano.errors import RequestError

Metric = Literal["choice", "exact", "number", "f1", "code", "bleu", "chrf", "rouge"]
"""How an answer is scored; see `nano.tasks.scoring`."""
Length = Literal["none", "tokens", "characters", "bytes"]
"""What a choice's log-likelihood is divided by. "none" is lm-evaluation-harness's acc, "characters" its acc_norm."""
Normalise = Literal["space", "squad"]
"""What an exact answer is compared without: runs of blanks, or what SQuAD's script takes away (case, punctuation,
articles)."""
METRICS: tuple[str, ...] = get_args(Metric)
HASH_DIGITS = 12


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        prompt: what the model reads, examples before the question included.
        answers: right answers, any of which will do; for a multiple choice the right choice's text.
        choices: what may follow the prompt, each with the space that it begins with.
        contexts: a prompt of its own for each choice, in `prompt`'s place (Winogrande); empty where all have the same.
        gold: which choice is right; None: the one that equals answers[0].
        tests: lines of Python that the generated code must pass.
        label: how people know it again; empty: the end of the prompt.
    """

    prompt: str
    answers: tuple[str, ...]
    choices: tuple[str, ...] = ()
    contexts: tuple[str, ...] = ()
    gold: int | None = None
    tests: tuple[str, ...] = ()
    label: str = ""

    @property
    def right(self) -> int:
        """Which choice is right, counted from 0."""
        return self.choices.index(self.answers[0]) if self.gold is None else self.gold

    @property
    def hash(self) -> str:
        """12 hex digits of everything that decides what is asked and what is right."""
        parts = [self.prompt, self.answers, self.choices, self.contexts, self.gold, self.tests]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:HASH_DIGITS]


@dataclass(frozen=True)
class Task:
    """Questions that are asked and scored alike.

    Attributes:
        name: its own among the tasks that are run together.
        capability: the group that its questions count for.
        metric: how an answer is scored.
        questions: in order.
        stop: texts that end an answer, which they are no part of.
        max_new_tokens: longest answer.
        length: for "choice": what a log-likelihood is divided by.
        normalise: for "exact".
        cut: where a prompt that does not fit the model's context is cut.
    """

    name: str
    capability: str
    metric: Metric
    questions: tuple[Question, ...]
    stop: tuple[str, ...] = ("\n",)
    max_new_tokens: int = 32
    length: Length = "none"
    normalise: Normalise = "space"
    cut: Literal["beginning", "middle"] = "beginning"


def check_tasks(tasks: Sequence[Task]) -> None:
    """Refuse tasks that cannot be run, before a model is opened.

    Raises:
        RequestError: none, two of one name, or a question without what its metric needs; named with its number.
    """
    if not tasks:
        raise RequestError("There are no tasks to run.", expected="at least one")
    names = [task.name for task in tasks]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise RequestError("Two tasks have the same name.", found=", ".join(twice), todo="give each its own")
    for task in tasks:
        if not task.questions:
            raise RequestError("A task has no questions.", found=task.name)
        if task.metric not in METRICS:
            raise RequestError("A task's metric is not known.", found=f"{task.name}: {task.metric}", expected=", ".join(METRICS))  # noqa: E501  # fmt: skip
        for number, question in enumerate(task.questions, 1):
            if wanted := _lacks(task.metric, question):
                raise RequestError(
                    "A question cannot be asked.", found=f"{task.name}, question {number}: {question.prompt[-60:]!r}",
                    expected=wanted,
                )  # fmt: skip


def _lacks(metric: Metric, question: Question) -> str:
    """What a question should have for a metric; "" where it does."""
    if metric == "code":
        return "" if question.tests else "tests, as the metric is 'code'"
    if metric != "choice":
        return "" if any(answer.strip() for answer in question.answers) else "an answer that is not blank"
    count = len(question.choices)
    if count < 2 or not all(question.choices):
        return "two choices or more, none empty"
    if question.contexts and len(question.contexts) != count:
        return f"a context for each of the {count} choices, not {len(question.contexts)}"
    if question.gold is None:
        found = bool(question.answers) and question.answers[0] in question.choices
        return "" if found else "choices that hold the first answer, character by character"
    return "" if 0 <= question.gold < count else f"a right choice from 0 to {count - 1}, not {question.gold}"
