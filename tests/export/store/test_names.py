"""Names from elsewhere that must never be created, and ordinary ones that must."""

from __future__ import annotations

import pytest

from export.store.names import require_safe_names
from nano.errors import BadFileError


@pytest.mark.parametrize(
    "name",
    [
        "", "/etc/passwd", "../up", "a/../../up", "a/./b", ".", "..", "a//b", "a/", "C:\\x", "C:x", "a\\..\\b", "~\x00",
        "a\nb", "a\x1b[2J", "nul", "aux.json", "COM1", "dir/con", "x.", "x ", " x", "a:stream", "a?b", "a*b", "a|b",
        "a\u202eb", "a/" * 9 + "b", "x" * 201, "\ud800",
    ],
)  # fmt: skip
def test_refused_alone(name: str) -> None:
    with pytest.raises(BadFileError, match="cannot be created safely"):
        require_safe_names([name], "here")


@pytest.mark.parametrize(
    "names",
    [
        ("Model.pte", "model.pte"),
        ("a", "a"),
        ("a", "a/b"),
        ("A", "a/b/c"),
        ("\u00e9.json", "e\u0301.json"),
        ("stra\u00dfe", "STRASSE"),
        ("\ufb01le", "file"),
    ],
)
def test_refused_together(names: tuple[str, ...]) -> None:
    for order in (names, names[::-1]):
        with pytest.raises(BadFileError, match="cannot be created safely"):
            require_safe_names(order, "here")


def test_ordinary_names_pass() -> None:
    require_safe_names(
        [
            "model.pte",
            "model.onnx",
            "model.onnx.data",
            "a/b/c.json",
            "a/b.json",
            ".hidden",
            "two words",
            "日本.txt",
            "..a",
        ],
        "here",
    )
