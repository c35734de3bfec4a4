"""The templates of task files: text with a row's fields in it.

`{question}` is a field, `{choices.text.0}` a field of a field or an item of a list, `{choice1|lower_first}` a field
through filters, `{{` and `}}` are braces. A template that is one field and nothing else gives that field as it is, so
that a list stays a list.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from nano.errors import BadFileError
from nano.tasks.scoring import last_number

_PIECE = re.compile(r"\{\{|\}\}|\{(?P<path>[^{}|]+)(?P<filters>(?:\|\w+)*)\}")


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]


def _no_stop(text: str) -> str:
    """Without the sentence's final mark, ideographic ones too."""
    return text.strip().rstrip(".!?。！？…").rstrip()


def _number(text: str) -> str:
    found = last_number(text)
    return "" if found is None else f"{found:f}"


FILTERS: Mapping[str, Callable[[str], str]] = {
    "strip": str.strip, "lower": str.lower, "upper": str.upper, "lower_first": _lower_first, "no_stop": _no_stop,
    "last_number": _number, "no_returns": lambda text: text.replace("\r", ""),
}  # fmt: skip
"""What a field's text may go through; besides these `lines` joins a list."""


def check_template(template: str, where: str) -> None:
    """Refuse a template that cannot be read, before any row is.

    Raises:
        BadFileError: a lone brace, or an unknown filter.
    """
    if set(_PIECE.sub("", template)) & set("{}"):
        raise BadFileError(
            "A template has a brace that stands alone.", found=f"{where} = {template!r}",
            expected="{field}, {field|filter}, or {{ and }} for braces",
        )  # fmt: skip
    for piece in _PIECE.finditer(template):
        for name in _names(piece):
            if name not in FILTERS and name != "lines":
                raise BadFileError(
                    "A template has a filter that is not known.", found=f"{where} = {template!r}: {name}",
                    expected=", ".join((*FILTERS, "lines")),
                )  # fmt: skip


def value_of(template: str, row: Mapping[str, Any], where: str) -> Any:
    """What a template gives for a row: the field itself where it is one field alone, else text.

    Raises:
        BadFileError: the row has no such field, or one that is no text stands within text.
    """
    whole = _PIECE.fullmatch(template)
    if whole and whole["path"]:
        return _filtered(whole, row, where)
    return text_of(template, row, where)


def text_of(template: str, row: Mapping[str, Any], where: str) -> str:
    """The text that a template gives for a row; raises as `value_of`."""

    def put(piece: re.Match[str]) -> str:
        if not piece["path"]:
            return piece[0][0]
        value = _filtered(piece, row, where)
        if isinstance(value, str | int | float):
            return str(value)
        raise BadFileError(
            "A template needs text where a row holds something else.",
            found=f"{where}: {piece[0]} is a {type(value).__name__}",
            todo="name a part of it, or use |lines for a list of texts",
        )  # fmt: skip

    return _PIECE.sub(put, template)


def _filtered(piece: re.Match[str], row: Mapping[str, Any], where: str) -> Any:
    value: Any = row
    for key in piece["path"].split("."):
        if isinstance(value, Mapping) and key in value:
            value = value[key]
        elif isinstance(value, list) and key.isdigit() and int(key) < len(value):
            value = value[int(key)]
        else:
            raise BadFileError(
                "A row has no such field.", found=f"{where}: {piece['path']}, at {key!r}",
                expected=", ".join(map(str, row)),
            )  # fmt: skip
    for name in _names(piece):
        if name == "lines" and isinstance(value, list):
            value = "\n".join(map(str, value))
        elif name in FILTERS and isinstance(value, list):
            value = [FILTERS[name](str(item)) for item in value]
        elif name in FILTERS:
            value = FILTERS[name](str(value))
    return value


def _names(piece: re.Match[str]) -> list[str]:
    return [name for name in (piece["filters"] or "").split("|") if name]
