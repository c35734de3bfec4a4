"""A scorecard with where it comes from: measured on a model, kept as JSON that fits in git, read back.

The file holds, a line each so that git shows what changed, every question's hash, score, and the beginning of what was
said, of what was expected and of the question. A paired comparison needs no more, and can show its worst examples.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from nano.capabilities import Task, check_tasks
from nano.errors import BadFileError, RequestError
from nano.folder import write_text_atomically
from nano.lm import Activations, open_model, stage_of
from nano.manifest import add_results, fingerprint, has_manifest, library_versions
from nano.progress import warn
from nano.saved import read_saved
from nano.scorecard import Answer, Scorecard, TaskScore, flips_of, run_tasks
from nano.tasks.file import load_tasks
from nano.tasks.scoring import require_metric

FORMAT, SCHEMA_VERSION = "nanokit scorecard", 1
COLUMNS = ("hash", "score", "said", "expected", "label")
TODO = "make it with: nanokit evaluate MODEL --tasks TASKS --save FILE.json"


@dataclass(frozen=True)
class SavedCard:
    """A model's scorecard and what it was measured on.

    Attributes:
        card: the scores and answers.
        model: {"path", "fingerprint", "kind"}.
        data: {"tasks": as they were named, "limit"}.
        reference: the teacher that shares are of: {"path", "fingerprint", "kind"}, or None.
        activations: how an int4 folder's activations were simulated.
        command: the command line that made it.
        created: UTC time, ISO 8601.
        versions: of nanokit and the libraries.
    """

    card: Scorecard
    model: Mapping[str, Any]
    data: Mapping[str, Any]
    reference: Mapping[str, Any] | None = None
    activations: str = "float"
    command: tuple[str, ...] = ()
    created: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """How many questions."""
        return len(self.card.answers)

    @property
    def scores(self) -> dict[str, Any]:
        """Plain data: capability to its score."""
        return {"capabilities": self.card.as_dict()["capabilities"]}

    def as_dict(self) -> dict[str, Any]:
        """Plain data for a manifest and `--json`: the scores, without the answers."""
        plain = {**self.card.as_dict(), "data": dict(self.data)}
        return {**plain, "reference": dict(self.reference)} if self.reference else plain


@dataclass(frozen=True)
class Asked:
    """Which tasks.

    Attributes:
        names: as `nano.tasks.file.load_tasks` takes them.
        data: folder of their files.
        limit: questions of each task at most.
    """

    names: tuple[str, ...]
    data: Path | None = None
    limit: int | None = None

    def load(self) -> tuple[Task, ...]:
        """The tasks, checked, and the metrics' libraries with them."""
        tasks = load_tasks(self.names, self.data, self.limit)
        check_tasks(tasks)
        for metric in {task.metric for task in tasks}:
            require_metric(metric)
        return tasks


def card_of(folder: Path, asked: Asked, tasks: Sequence[Task], activations: Activations = "float") -> SavedCard:
    """A model's scorecard.

    Raises:
        BadFileError: the folder cannot be used.
        RequestError: a task does not fit the model's context.
    """
    entry = {"path": str(folder), "fingerprint": fingerprint(folder), "kind": stage_of(folder)}
    model = open_model(folder, activations=activations)
    try:
        card = run_tasks(model, tasks)
    finally:
        model.close()
    for name, score in card.tasks.items():
        if score.cut:
            warn(f"{name}: {score.cut} of {score.questions} prompts did not fit the context of {model.context} and were cut")  # noqa: E501  # fmt: skip
    return SavedCard(card, entry, {"tasks": list(asked.names), "limit": asked.limit}, activations=activations)


def with_teacher(mine: SavedCard, teacher: SavedCard) -> SavedCard:
    """The card with the share of the teacher's score for each capability; none where the teacher scored 0.

    Raises:
        RequestError: the two were asked other questions.
    """
    check_same_questions(teacher, mine)
    theirs = teacher.card.capabilities
    shares = {
        name: score.score / theirs[name].score for name, score in mine.card.capabilities.items() if theirs[name].score
    }
    flips = flips_of(teacher.card.answers, mine.card.answers)
    return replace(mine, card=replace(mine.card, of_teacher=shares, flips=flips), reference=teacher.model)


def check_same_questions(before: SavedCard, after: SavedCard) -> None:
    """Raise RequestError unless both were asked the same questions in the same order."""
    ours, theirs = ([(a.task, a.hash) for a in side.card.answers] for side in (before, after))
    if ours == theirs:
        return
    only = [sorted({task for task, _ in one} - {task for task, _ in other}) for one, other in ((ours, theirs), (theirs, ours))]  # noqa: E501  # fmt: skip
    differing = sorted({task for task, _hash in set(ours) ^ set(theirs)})
    raise RequestError(
        "The two were asked other questions.",
        found=f"tasks only in {before.model['path']}: {', '.join(only[0]) or 'none'}; only in {after.model['path']}: "
        f"{', '.join(only[1]) or 'none'}; questions differ in {', '.join(differing)}",
        todo="run both on the same --tasks, --task-data and --task-limit",
    )


def check_asked(saved: SavedCard, tasks: Sequence[Task]) -> None:
    """Raise RequestError, before a model is opened, unless a saved scorecard was asked these questions."""
    wanted = [(answer.task, answer.hash) for answer in saved.card.answers]
    if wanted != [(task.name, question.hash) for task in tasks for question in task.questions]:
        raise RequestError(
            "These are not the questions that the saved scorecard was asked.",
            found=f"{sum(len(task.questions) for task in tasks)} questions of {', '.join(task.name for task in tasks)}",
            expected=f"{len(wanted)} questions of {', '.join(saved.card.tasks)}, the same word for word",
            todo="give the same --tasks, --task-data and --task-limit, or save the scorecard again",
        )


def record_card(folder: Path, saved: SavedCard) -> None:
    """Put the scores into the folder's manifest.json, where a catalogue and a report find them.

    Raises:
        RequestError: it has no manifest, or cannot be written to.
    """
    check_recordable(folder)
    add_results(folder, {"scorecard": saved.as_dict()})


def check_recordable(folder: Path) -> None:
    """Refuse before the work what `record_card` would refuse after it."""
    if not has_manifest(folder):
        raise RequestError(
            "There is no manifest.json to record in.", found=str(folder), expected="a folder that nanokit made",
            todo="use --save FILE.json",
        )  # fmt: skip


def write_card(path: Path, saved: SavedCard) -> None:
    """Write it as JSON; an older file stays until it is whole."""
    head = {
        "format": FORMAT, "schema_version": SCHEMA_VERSION, "model": dict(saved.model), "data": dict(saved.data),
        "reference": saved.reference and dict(saved.reference), "activations": saved.activations,
        "command": list(saved.command or ("nanokit", *sys.argv[1:])),
        "created": saved.created or datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": dict(saved.versions or library_versions()),
        "capabilities": saved.as_dict()["capabilities"],
    }  # fmt: skip
    blocks = []
    for name, task in saved.card.tasks.items():
        rows = [
            json.dumps([a.hash, round(a.score, 4), a.said, a.expected, a.label], ensure_ascii=False)
            for a in saved.card.answers
            if a.task == name
        ]
        facts = {"capability": task.capability, "metric": task.metric, "cut": task.cut}
        inner = ",\n    ".join(rows)
        blocks.append(f'  {json.dumps(name)}: {{{json.dumps(facts)[1:-1]}, "answers": [\n    {inner}\n  ]}}')
    text = json.dumps(head, indent=1, ensure_ascii=False)[:-2]
    body = ",\n".join(blocks)
    write_text_atomically(path, f'{text},\n "columns": {json.dumps(COLUMNS)},\n "tasks": {{\n{body}\n }}\n}}\n')


def is_card(path: Path) -> bool:
    """Whether a file says that it is a scorecard; whether it is a sound one, `read_card` tells."""
    try:
        with path.open(encoding="utf-8") as file:
            return f'"{FORMAT}"' in file.read(200)
    except (OSError, UnicodeDecodeError):
        return False


def read_card(path: Path) -> SavedCard:
    """A file that `nanokit evaluate --tasks --save` wrote.

    Raises:
        BadFileError: not JSON, not a scorecard, of another schema, or damaged.
    """
    raw = read_saved(path, "scorecard", FORMAT, SCHEMA_VERSION, TODO)
    try:
        return _parsed(raw)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadFileError("The scorecard is damaged.", found=f"{path}: {type(error).__name__}: {error}", todo=TODO) from None  # noqa: E501  # fmt: skip


def _parsed(raw: Mapping[str, Any]) -> SavedCard:
    """Its parts; raises KeyError, TypeError or ValueError where one is missing or cannot be."""
    scores, answers = {}, []
    for name, task in raw["tasks"].items():
        mine = [_answer(name, index, dict(zip(raw["columns"], row, strict=True))) for index, row in enumerate(task["answers"])]  # noqa: E501  # fmt: skip
        scores[name] = TaskScore.of(task["capability"], task["metric"], [a.score for a in mine], int(task["cut"]))
        answers += mine
    if not answers:
        raise ValueError("no answers")
    shares = {
        name: float(entry["of_teacher"])
        for name, entry in raw["capabilities"].items()
        if entry["of_teacher"] is not None
    }
    model, data, reference = raw["model"], raw["data"], raw["reference"]
    for entry in (model, reference or model):
        for key in ("path", "fingerprint", "kind"):
            if not isinstance(entry[key], str):
                raise ValueError(f"model.{key} is no text")
    if not all(isinstance(name, str) for name in data["tasks"]) or not isinstance(data["limit"], int | None):
        raise ValueError("data names no tasks")
    return SavedCard(
        Scorecard(scores, tuple(answers), shares), model, data, reference, str(raw["activations"]),
        tuple(raw["command"]), str(raw["created"]), dict(raw["versions"]),
    )  # fmt: skip


def _answer(task: str, index: int, row: Mapping[str, Any]) -> Answer:
    score = float(row["score"])
    if not (math.isfinite(score) and 0 <= score <= 1):
        raise ValueError(f"a score of {score}")
    texts = {key: row[key] for key in ("hash", "label", "expected", "said")}
    if not all(isinstance(value, str) for value in texts.values()):
        raise ValueError(f"a text that is none, in {task}")
    return Answer(task, index, score=score, **texts)


def answers_as_dict(saved: SavedCard) -> list[dict[str, Any]]:
    """Every answer as plain data."""
    return [asdict(answer) for answer in saved.card.answers]
