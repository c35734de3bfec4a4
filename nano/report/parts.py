"""Small pieces of the report's HTML: sections, tables, sentences for what is missing, numbers for people."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

NO_BREAK = "\u00a0"
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_STAGES = {"": "teacher", "teacher": "teacher", "student": "student", "int4": "int4", "bitsandbytes": "int4"}


def section(name: str, heading: str, *parts: str) -> str:
    """A section with a heading that its address and screen readers name; the parts are HTML."""
    begin = f'<section id="{name}" aria-labelledby="{name}-h"><h2 id="{name}-h">{escape(heading)}</h2>'
    return f"{begin}{''.join(parts)}</section>\n"


def paragraph(text: str) -> str:
    """A paragraph of text."""
    return f"<p>{escape(text)}</p>"


def missing(sentence: str, command: str = "") -> str:
    """What is not known, and the command that fills it: words in capitals are for the reader to name."""
    line = f" Fill it with: <code>{escape(command)}</code>" if command else ""
    return f'<p class="missing">{escape(sentence)}{line}</p>'


def table(css: str, head: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> str:
    """A table whose rows begin with their heading.

    Args:
        css: its class.
        head: text of the columns' headings.
        rows: HTML of the cells, the row's heading first.
        caption: text.
    """
    said = f"<caption>{escape(caption)}</caption>" if caption else ""
    top = "".join(f'<th scope="col">{escape(words)}</th>' if words else "<td></td>" for words in head)
    body = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
        for first, *cells in rows
    )
    return f'<table class="{css}">{said}<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>'


def key_figures(shown: Sequence[tuple[str, str, str]]) -> str:
    """The few numbers that people look for first: (what, number, in which light)."""
    cells = (f"<div><dt>{escape(a)}</dt><dd>{escape(b)}<small>{escape(c)}</small></dd></div>" for a, b, c in shown)
    return f'<dl class="figures">{"".join(cells)}</dl>'


def stage_class(kind: str) -> str:
    """The CSS class that gives a stage its colour, by its manifest's kind ("" and "teacher": the teacher)."""
    return "stage-" + _STAGES.get(kind, "bundle")


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
