"""Tasks from TOML files: where the rows are, and how a row becomes a question. docs/tasks.md says it for users.

One file is one task, or several alike where it has `parts`. The definitions that ship lie beside this module; their
data does not, a folder is named for it.
"""

from __future__ import annotations

import dataclasses
import importlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from nano.capabilities import Length, Metric, Normalise, Question, Task
from nano.errors import BadFileError, RequestError
from nano.tasks.rows import read_rows
from nano.tasks.template import check_template, text_of, value_of
from nano.toml import read_toml

PACKAGED = Path(__file__).parent
DEMO = "demo"


@dataclass(frozen=True)
class Computed:
    """A field made of others.

    Attributes:
        of: template whose text is looked up in `map`.
        map: text to text.
        each: template for each item of the list `of`, whose items are tables.
        join: what stands between those.
    """

    of: str
    map: Mapping[str, str] = field(default_factory=dict)
    each: str = ""
    join: str = "\n"


@dataclass(frozen=True)
class TaskFile:
    """A task file's keys; texts in braces are templates (`nano.tasks.template`).

    Attributes:
        capability: the group that its questions count for.
        metric: how an answer is scored.
        prompt: what the model reads of a row.
        data: file of rows (JSONL, JSON, parquet, tab-separated); {part} stands for the part's name.
        dataset: instead of a file, a dataset: a folder of save_to_disk or ORG/NAME@CONFIG:SPLIT.
        name: of the task; the file's name where it is not given.
        records: for a JSON object: the key of the list of rows.
        columns: for tab-separated rows without a heading: their names.
        each: fields that hold lists of tables; every one of those makes a row, as {each.KEY}.
        fields: computed fields.
        choices: what may follow: a field that holds a list, or a list of templates.
        contexts: a prompt for each choice; after `prompt`, which may be empty.
        gold: the right choice's number, counted from 0.
        answer: right answer, or a field that holds several.
        shot: what an example shows as the answer; the right one where it is not given.
        tests: lines of Python that code must pass.
        label: how people know a question again; its prompt without examples where not given.
        header: before everything.
        delimiter: between a prompt and its answer.
        between: between examples.
        shots: how many examples stand before the question: the same for all, drawn by `seed`, and not asked.
        rows: first and last row that may be asked, counted from 1.
        shot_rows: the same for examples.
        limit: questions at most, drawn by `seed`.
        seed: of the drawing.
        stop, max_new_tokens, length, normalise, cut: see `nano.capabilities.Task`.
        parts: name of a part to the keys that differ in it; or a list of names.
    """

    capability: str
    metric: Metric
    prompt: str = ""
    data: str = ""
    dataset: str = ""
    name: str = ""
    records: str = ""
    columns: tuple[str, ...] = ()
    each: tuple[str, ...] = ()
    fields: Mapping[str, Computed] = field(default_factory=dict)
    choices: str | tuple[str, ...] = ()
    contexts: str | tuple[str, ...] = ()
    gold: str = ""
    answer: str = ""
    shot: str = ""
    tests: str | tuple[str, ...] = ()
    label: str = ""
    header: str = ""
    delimiter: str = " "
    between: str = "\n\n"
    shots: int = 0
    rows: tuple[int, int] | None = None
    shot_rows: tuple[int, int] | None = None
    limit: int | None = None
    seed: int = 0
    stop: tuple[str, ...] = ("\n",)
    max_new_tokens: int = 32
    length: Length = "none"
    normalise: Normalise = "space"
    cut: Literal["beginning", "middle"] = "beginning"
    parts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def load_tasks(names: Sequence[str], data: Path | None = None, limit: int | None = None) -> tuple[Task, ...]:
    """Tasks by name.

    Args:
        names: each a packaged definition ("arc-easy"), one part of it ("xcopa/de"), "demo", a TOML file, or a folder of
            such files.
        data: folder that files of rows are relative to; for a TOML file of the user's its own folder where not given.
        limit: questions of each task at most, instead of the file's own.

    Raises:
        RequestError: there is no such task, or packaged ones without `data`.
        BadFileError: a task file or its data cannot be used.
    """
    found: list[Task] = []
    for name in names:
        if name == DEMO:
            found += _demo_tasks(limit)
            continue
        path, part = _find(name)
        folder = path.parent if data is None else data
        if data is None and path.parent == PACKAGED:
            raise RequestError(
                "The data of the packaged tasks does not ship with nanokit.", found=f"--tasks {name}",
                expected=f"--task-data DIR, a folder that holds {read_toml(path, 'task file').get('data', 'it')}",
            )  # fmt: skip
        found += [make_task(one, folder, f"{path}", limit) for one in read_task_file(path, part)]
    return tuple(found)


def packaged_names() -> list[str]:
    """Names of the definitions that ship."""
    return sorted(path.stem for path in PACKAGED.glob("*.toml"))


def _demo_tasks(limit: int | None) -> tuple[Task, ...]:
    """The demo's questions, as many of each task as it makes or as are asked for."""
    make = importlib.import_module("nano.demo.tasks").demo_tasks
    tasks: tuple[Task, ...] = make() if limit is None else make(limit)
    return tasks


def _find(name: str) -> tuple[Path, str]:
    """The file behind a name, and the part that is meant; "" for all."""
    path = Path(name).expanduser()
    if path.suffix == ".toml":
        return path, ""
    stem, _, part = name.partition("/")
    packaged = PACKAGED / f"{stem}.toml"
    if not stem or not packaged.is_file():
        raise RequestError(
            "There is no such task.", found=name,
            expected=f"{DEMO}, {', '.join(packaged_names())}, or the path of a .toml file",
        )  # fmt: skip
    return packaged, part


def read_task_file(path: Path, part: str = "") -> list[TaskFile]:
    """The tasks of a file: one, or one for each part.

    Raises:
        BadFileError: an unknown key, a value of the wrong kind, or a template that cannot be read.
        RequestError: there is no such part.
    """
    table = read_toml(path, "task file")
    parts = table.pop("parts", {})
    if isinstance(parts, list):
        parts = {name: {} for name in parts}
    name = str(table.get("name") or path.stem)
    if not parts:
        if part:
            raise RequestError("This task has no parts.", found=f"{name}/{part}", expected=name)
        return [_checked({**table, "name": name}, path)]
    if part and part not in parts:
        raise RequestError("The task has no such part.", found=f"{name}/{part}", expected=", ".join(parts))
    return [
        _checked(_in_part({**table, **own, "name": f"{name}/{key}"}, key), path)
        for key, own in parts.items()
        if part in ("", key)
    ]


def _in_part(table: dict[str, Any], part: str) -> dict[str, Any]:
    """{part} in the place of the rows is the part's name."""
    return {k: v.replace("{part}", part) if k in ("data", "dataset") and isinstance(v, str) else v for k, v in table.items()}  # noqa: E501  # fmt: skip


def _checked(table: dict[str, Any], path: Path) -> TaskFile:
    """The keys, their kinds, and what belongs together."""
    from pydantic import TypeAdapter, ValidationError

    known = [item.name for item in dataclasses.fields(TaskFile)]
    if unknown := sorted(set(table) - set(known)):
        raise BadFileError("The task file has a key that is not known.", found=f"{path}: {', '.join(unknown)}", expected=", ".join(known))  # noqa: E501  # fmt: skip
    try:
        spec = TypeAdapter(TaskFile).validate_python(table)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(step) for step in first["loc"])
        raise BadFileError(
            "The task file has a value that cannot be.", found=f"{path}: {place}: {first['msg']}"
        ) from None
    for key, template in _templates(spec):
        check_template(template, f"{path}: {key}")
    if wanted := _lacking(spec):
        raise BadFileError("The task file is not complete.", found=str(path), expected=wanted)
    return spec


def _templates(spec: TaskFile) -> list[tuple[str, str]]:
    found = [(key, getattr(spec, key)) for key in ("prompt", "gold", "answer", "shot", "label", "header")]
    for key in ("choices", "contexts", "tests"):
        value = getattr(spec, key)
        found += [(key, item) for item in ((value,) if isinstance(value, str) else value)]
    return found + [(f"fields.{key}.of", computed.of) for key, computed in spec.fields.items()]


def _lacking(spec: TaskFile) -> str:
    """What a file must have besides; "" where nothing lacks."""
    if bool(spec.data) == bool(spec.dataset):
        return "either data, a file, or dataset"
    if spec.metric == "choice":
        if not spec.choices or not (spec.gold or spec.answer):
            return "choices and gold (or answer), as the metric is 'choice'"
        return "" if spec.prompt or spec.contexts else "a prompt, or contexts"
    if spec.metric == "code" and not spec.tests:
        return "tests, as the metric is 'code'"
    if spec.metric != "code" and not spec.answer:
        return "an answer"
    if spec.max_new_tokens < 1 or (spec.limit is not None and spec.limit < 1) or spec.shots < 0:
        return "max_new_tokens and limit of 1 or more, shots of 0 or more"
    return "" if spec.prompt else "a prompt"


def make_task(spec: TaskFile, folder: Path, where: str, limit: int | None = None) -> Task:
    """Read the rows, draw examples and questions, fill in the templates.

    Args:
        spec: of one task.
        folder: that `data` is relative to.
        where: names the file in errors.
        limit: questions at most, instead of the file's own.

    Raises:
        BadFileError: no rows, too few for the examples, or a row that a template does not fit.
    """
    rows = [_computed(row, spec, at) for at, row in read_rows(spec, folder)]
    examples, asked = _draw(rows, spec, where, limit or spec.limit)
    head = "".join(_example(row, at, spec) + spec.between for at, row in examples)
    if spec.header:
        head = spec.header + spec.between + head
    questions = tuple(_question(row, at, spec, head) for at, row in asked)
    return Task(
        spec.name, spec.capability, spec.metric, questions, spec.stop, spec.max_new_tokens, spec.length, spec.normalise,
        spec.cut,
    )  # fmt: skip


_Row = tuple[str, Mapping[str, Any]]


def _computed(row: Mapping[str, Any], spec: TaskFile, where: str) -> _Row:
    full = dict(row)
    for name, computed in spec.fields.items():
        value = value_of(computed.of, full, where)
        if computed.each:
            items = value if isinstance(value, list) else [value]
            full[name] = computed.join.join(text_of(computed.each, item, where) for item in items)
        elif str(value) in computed.map:
            full[name] = computed.map[str(value)]
        else:
            raise BadFileError(
                f"fields.{name} does not know a row's value.", found=f"{where}: {str(value)[:60]!r}",
                expected=", ".join(computed.map),
            )  # fmt: skip
    return where, full


def _draw(rows: list[_Row], spec: TaskFile, where: str, limit: int | None) -> tuple[list[_Row], list[_Row]]:
    """Examples, and the rows that are asked: none of them an example, in the file's order."""

    def within(span: tuple[int, int] | None) -> list[int]:
        first, last = span or (1, len(rows))
        return list(range(max(first, 1) - 1, min(last, len(rows))))

    rng = random.Random(spec.seed)
    pool = within(spec.shot_rows or spec.rows)
    if len(pool) < spec.shots:
        raise BadFileError("There are fewer rows than examples.", found=f"{where}: {len(pool)} rows", expected=f"shots = {spec.shots} or more")  # noqa: E501  # fmt: skip
    shown = rng.sample(pool, spec.shots)
    asked = [i for i in within(spec.rows) if i not in shown]
    if not asked:
        raise BadFileError(
            "No row is left to ask.", found=f"{where}: {len(rows)} rows", todo="fewer shots, or other rows"
        )
    if limit is not None and limit < len(asked):
        asked = sorted(rng.sample(asked, limit))
    return [rows[i] for i in shown], [rows[i] for i in asked]


def _list(value: str | tuple[str, ...], row: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """Texts: of a field that holds a list, or of several templates."""
    if isinstance(value, tuple):
        return tuple(text_of(item, row, where) for item in value)
    found = value_of(value, row, where)
    return tuple(map(str, found)) if isinstance(found, list) else (str(found),)


def _gold(row: Mapping[str, Any], where: str, spec: TaskFile, choices: tuple[str, ...]) -> int:
    if not spec.gold:
        answer = text_of(spec.answer, row, where)
        if answer in choices:
            return choices.index(answer)
        raise BadFileError(
            "A row's answer is none of its choices.", found=f"{where}: {answer!r}", expected=", ".join(choices)
        )
    value = str(value_of(spec.gold, row, where))
    if not value.isdigit() or int(value) >= len(choices):
        raise BadFileError("A row's right choice is not one of its choices.", found=f"{where}: {value!r}", expected=f"0 to {len(choices) - 1}")  # noqa: E501  # fmt: skip
    return int(value)


def _example(row: Mapping[str, Any], where: str, spec: TaskFile) -> str:
    """A row with its answer."""
    if spec.metric == "choice":
        question = _question(row, where, spec, "")
        context = question.contexts[question.right] if question.contexts else question.prompt
        return context + question.choices[question.right]
    shown = text_of(spec.shot, row, where) if spec.shot else _list(spec.answer, row, where)[0]
    return text_of(spec.prompt, row, where) + spec.delimiter + shown


def _question(row: Mapping[str, Any], where: str, spec: TaskFile, head: str) -> Question:
    own = text_of(spec.prompt, row, where)
    label = text_of(spec.label, row, where) if spec.label else own
    if spec.metric != "choice":
        tests = _list(spec.tests, row, where) if spec.tests else ()
        answers = _list(spec.answer, row, where) if spec.answer else ()
        return Question(head + own, answers, tests=tests, label=label)
    choices = _list(spec.choices, row, where)
    gold = _gold(row, where, spec, choices)
    contexts = _list(spec.contexts, row, where) if spec.contexts else ()
    return Question(
        head + own, (spec.delimiter + choices[gold],), tuple(spec.delimiter + choice for choice in choices),
        tuple(head + own + context for context in contexts), gold, label=label or choices[gold],
    )  # fmt: skip
