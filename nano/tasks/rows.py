"""The rows of a task: from a file whose form is told by its content, or from a dataset."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nano.documents import iter_records
from nano.errors import BadFileError
from nano.sources import dataset_rows

if TYPE_CHECKING:
    from nano.tasks.file import TaskFile


def read_rows(spec: TaskFile, folder: Path) -> list[tuple[str, Mapping[str, Any]]]:
    """(where it stands, row) of every row.

    Raises:
        BadFileError: no such file or dataset, not what the task file says, or empty.
    """
    if spec.dataset:
        local = folder / spec.dataset
        name = str(local) if local.is_dir() else spec.dataset
        plain: Iterator[tuple[str, Mapping[str, Any]]] = (
            (f"{name}, row {number}", row) for number, row in enumerate(dataset_rows(name), 1)
        )
    else:
        path = folder / spec.data
        if not path.is_file():
            raise BadFileError("There is no such file of questions.", found=str(path), todo="check --task-data and the task file's data")  # noqa: E501  # fmt: skip
        plain = _tab_separated(path, spec.columns) if spec.columns else iter_records(path, spec.records)
    rows = [found for where, row in plain for found in _flattened(where, row, spec.each)]
    if not rows:
        raise BadFileError("There are no questions.", found=spec.dataset or str(folder / spec.data))
    return rows


def _tab_separated(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for number, cells in enumerate(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE), 1):
                if len(cells) != len(columns):
                    raise BadFileError(
                        "A line has another number of columns.", found=f"{path}, line {number}: {len(cells)}",
                        expected=f"{len(columns)}: {', '.join(columns)}",
                    )  # fmt: skip
                yield f"{path}, line {number}", dict(zip(columns, cells, strict=True))
    except UnicodeDecodeError as error:
        raise BadFileError(
            "A data file is not text.", found=f"{path}: {error}", expected="UTF-8, tab-separated"
        ) from None


def _flattened(where: str, row: Mapping[str, Any], each: tuple[str, ...]) -> list[tuple[str, Mapping[str, Any]]]:
    """The row itself; or one for every table in the lists that `each` names."""
    if not each:
        return [(where, row)]
    found: list[tuple[str, Mapping[str, Any]]] = []
    for name in each:
        inner = row.get(name, [])
        if not isinstance(inner, list):
            raise BadFileError("`each` names a field that holds no list.", found=f"{where}: {name}")
        found += [(f"{where}, {name} {number}", {**row, "each": item}) for number, item in enumerate(inner, 1)]
    return found
