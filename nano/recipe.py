"""A build recipe: one TOML file that says what `nanokit build` makes of which teacher.

```toml
name = "stories"
teacher = "path/or/hub-id"          # or "builtin:demo-teacher"
data = ["train.jsonl"]              # text for distillation and calibration, or "builtin:demo-text"
heldout = ["heldout.jsonl"]         # text for evaluation, never trained on
tasks = ["demo"]                    # as --tasks takes them: what the ladder by capability asks (may be left out)
prompt = "Once upon a time"

[[student]]
name = "nano-2"
size = "nano-2"                     # or nano-1, 1.2B, 40M, 150k, or "teacher" to keep the teacher as it is
profile = "high-end"

[distill]                           # options as on the command line, with underscores
steps = 200
[quantize]
method = "gptq"
[export]
formats = ["executorch", "onnx"]
context = 512
[evaluate]
tokens = 4096
```

Paths are relative to the recipe. Options are checked against each stage's dataclass, so a misspelt key or a
wrong type is found before anything runs.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from nano.errors import RequestError
from nano.toml import read_toml

BUILTIN_TEACHER, BUILTIN_TEXT = "builtin:demo-teacher", "builtin:demo-text"
FORMATS = ("executorch", "onnx")
_STAGES = {
    "distill": "distill.options:DistillOptions",
    "quantize": "quantize.options:QuantizeOptions",
    "export": "export.options:ExportOptions",
}
_T = TypeVar("_T")


@dataclass(frozen=True)
class StudentWish:
    """One [[student]]: its folder's name, its size, and the phone it is for (or none)."""

    name: str
    size: str
    profile: str | None = None


@dataclass(frozen=True)
class EvaluateOptions:
    """The [evaluate] table.

    Attributes:
        tokens: how many held-out tokens each model predicts.
        sequence_length: longest window.
        questions: of each task, at most.
        task_data: folder of the tasks' data, relative to the recipe; empty where they bring their own.
    """

    tokens: int = 4096
    sequence_length: int = 256
    questions: int = 48
    task_data: str = ""


@dataclass(frozen=True)
class Recipe:
    """A recipe as read and checked; stage options are the stages' own dataclasses."""

    name: str
    teacher: str
    data: tuple[str, ...]
    heldout: tuple[str, ...]
    tasks: tuple[str, ...]
    students: tuple[StudentWish, ...]
    formats: tuple[str, ...]
    prompt: str
    distill: Any
    quantize: Any
    export: Any
    evaluate: EvaluateOptions
    out: str | None


def read_recipe(path: Path) -> Recipe:
    """Read and check a recipe.

    Raises:
        BadFileError: missing or not TOML.
        RequestError: an unknown key, a wrong type, or something needed is missing; names the table and the key.
    """
    raw = read_toml(path, "recipe")
    known = {"name", "teacher", "data", "heldout", "tasks", "student", "prompt", "out", "evaluate", *_STAGES}
    _check_keys("recipe", raw, known)
    if not isinstance(raw.get("student"), list) or not raw["student"]:
        raise RequestError("The recipe names no student.", expected="at least one [[student]] table with name and size")
    export = dict(_table(raw, "export"))
    formats = tuple(export.pop("formats", FORMATS))
    if not formats or set(formats) - set(FORMATS):
        raise RequestError("[export] formats is wrong.", found=str(list(formats)), expected=f"some of {list(FORMATS)}")
    students = tuple(_options(StudentWish, "student", table) for table in raw["student"])
    if len({s.name for s in students}) < len(students) or any(Path(s.name).name != s.name for s in students):
        raise RequestError(
            "Students' names become folders: each must be a plain name of its own.",
            found=", ".join(s.name for s in students),
        )
    stages = {
        name: _options(_door(target), name, export if name == "export" else _table(raw, name))
        for name, target in _STAGES.items()
    }
    evaluate = _options(EvaluateOptions, "evaluate", _table(raw, "evaluate"))
    return Recipe(
        name=_text(raw, "name", path.stem),
        teacher=_place(_text(raw, "teacher"), path.parent),
        data=_places(raw, "data", path.parent),
        heldout=() if raw.get("data") == BUILTIN_TEXT else _places(raw, "heldout", path.parent),
        tasks=_places(raw, "tasks", path.parent) if "tasks" in raw else (),
        students=students,
        formats=formats,
        prompt=_text(raw, "prompt", "The"),
        evaluate=dataclasses.replace(evaluate, task_data=_place(evaluate.task_data, path.parent)),
        out=raw.get("out"),
        **stages,
    )


def _door(target: str) -> Any:
    module, name = target.split(":")
    return getattr(importlib.import_module(module), name)


def _table(raw: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    table = raw.get(name, {})
    if not isinstance(table, dict):
        raise RequestError(f"'{name}' in the recipe is not a table.", found=repr(table), expected=f"[{name}]")
    return table


def _text(raw: Mapping[str, Any], key: str, default: str | None = None) -> str:
    value = raw.get(key, default)
    if not isinstance(value, str) or not value:
        raise RequestError(f"The recipe needs '{key}'.", found=repr(value), expected="a string")
    return value


def _places(raw: Mapping[str, Any], key: str, home: Path) -> tuple[str, ...]:
    value = raw.get(key)
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not values or not all(isinstance(v, str) for v in values):
        raise RequestError(f"The recipe needs '{key}'.", found=repr(value), expected="a file, or a list of files")
    return tuple(_place(v, home) for v in values)


def _place(value: str, home: Path) -> str:
    """A path relative to the recipe where there is one, its weight kept; a hub id or a builtin as it stands."""
    name, sign, weight = value.rpartition("=")
    for path, rest in ((value, ""), (name, sign + weight)):
        if path and (home / Path(path).expanduser()).exists():
            return str(home / Path(path).expanduser()) + rest
    return value


def _check_keys(table: str, raw: Mapping[str, Any], known: set[str]) -> None:
    for key in raw:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            raise RequestError(
                f"The recipe has an unknown key in [{table}].",
                found=key,
                expected="one of " + ", ".join(sorted(known)),
                todo=f"did you mean '{near[0]}'?" if near else None,
            )


def _options(kind: type[_T], table: str, raw: Mapping[str, Any]) -> _T:
    """A stage's dataclass from its table, types checked by pydantic."""
    from pydantic import TypeAdapter, ValidationError

    _check_keys(table, raw, {f.name for f in dataclasses.fields(kind)})  # type: ignore[arg-type]
    try:
        return TypeAdapter(kind).validate_python(dict(raw))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "?"
        raise RequestError(
            f"The recipe's [{table}] has an unusable value for '{key}'.",
            found=repr(first.get("input")),
            expected=first["msg"],
        ) from None
