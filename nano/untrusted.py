"""Values of a manifest that anyone may have written: each is what it should be, or empty."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

LONGEST = 2_000
"""Characters of a text that are kept."""


def mapping(value: Any) -> Mapping[str, Any]:
    """The value itself where it is a mapping, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def items(value: Any) -> Sequence[Any]:
    """The value itself where it is a list, else an empty one."""
    return value if isinstance(value, (list, tuple)) else ()


def text(value: Any, longest: int = LONGEST) -> str:
    """A text, not too long; "" for anything else but a number."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    return value[:longest] if isinstance(value, str) else ""


def number(value: Any) -> float | None:
    """A finite number, else None."""
    sound = isinstance(value, (int, float)) and not isinstance(value, bool)
    try:
        return float(value) if sound and math.isfinite(value) else None
    except OverflowError:
        return None


def whole(value: Any) -> int | None:
    """A whole number that is not negative, else None."""
    sound = isinstance(value, int) and not isinstance(value, bool)
    return value if sound and 0 <= value < 1 << 63 else None


def numbers(value: Any) -> dict[str, float]:
    """Those entries of a mapping that are finite numbers."""
    found = ((str(name), number(entry)) for name, entry in mapping(value).items())
    return {name: entry for name, entry in found if entry is not None}
