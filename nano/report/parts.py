"""Small pieces of the report's HTML: sections, sentences for what is missing, numbers for people."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from html import escape

NO_BREAK = "\u00a0"
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def section(name: str, heading: str, *parts: str) -> str:
    """A section with a heading that its address and screen readers name."""
    return f'<section id="{name}" aria-labelledby="{name}-h"><h2 id="{name}-h">{escape(heading)}</h2>{"".join(parts)}</section>'  # noqa: E501  # fmt: skip


def missing(sentence: str, *command: object) -> str:
    """What is not known, and the command that fills it."""
    line = f" Fill it with: <code>{escape(command_line([str(word) for word in command]))}</code>" if command else ""
    return f'<p class="missing">{escape(sentence)}{line}</p>'


def command_line(words: Sequence[str]) -> str:
    """A command as it would be typed; words in capitals stand for what the reader has to name."""
    return shlex.join(words)


def short(value: float, digits: int = 3) -> str:
    """A number with so many significant digits and no e: 0.0925, 12.4, 2.1×10⁻⁶, 1,204."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1000:
        return _minus(f"{value:,.0f}")
    if size >= 1e-4:
        text = f"{value:.{digits}g}"
        return _minus(text if "e" not in text else f"{value:.0f}")
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    return _minus(f"{mantissa}×10{str(int(exponent)).translate(_SUPERSCRIPT)}")


def percent(value: float, digits: int = 1) -> str:
    """A fraction in per cent: '93.4 %'."""
    return _minus(f"{100 * value:.{digits}f}") + NO_BREAK + "%"


def _minus(text: str) -> str:
    return text.replace("-", "−")


def plural(count: int, one: str, many: str = "") -> str:
    """'1 phone', '12 phones'."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def key_figures(shown: Sequence[tuple[str, str, str]]) -> str:
    """The few numbers that people look for first: (what, number, in which light)."""
    cells = (f"<div><dt>{escape(a)}</dt><dd>{escape(b)}<small>{escape(c)}</small></dd></div>" for a, b, c in shown)
    return f'<dl class="figures">{"".join(cells)}</dl>'


def stage_class(kind: str) -> str:
    """The CSS class that gives a stage its colour."""
    known = {"": "teacher", "student": "student", "int4": "int4", "bitsandbytes": "int4"}
    return "stage-" + known.get(kind, "bundle")
