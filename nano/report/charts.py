"""The report's bars, as SVG that stretches with its place; words stand beside them as text, so none gets too small."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

WIDE, HIGH = 1000, 10
"""Of a bar's own coordinates: it is stretched to its place without keeping its sides' ratio."""


def score_bar(score: float, error: float | None) -> str:
    """A share of 1 as a bar, with a line that reaches one standard error to either side."""
    x = _at(score)
    line = ""
    if error:
        line = f'<line class="error" x1="{_at(score - error)}" x2="{_at(score + error)}" y1="5" y2="5"/>'
    return _strip(f'<rect class="back" width="{WIDE}" height="{HIGH}"/><rect class="bar" width="{x}" height="{HIGH}"/>{line}')  # noqa: E501  # fmt: skip


def stacked_bar(
    parts: Mapping[str, float],
    full: float,
    label: str,
    marks: Sequence[tuple[str, float]] = (),
    dot: float | None = None,
) -> str:
    """Parts side by side against what a full bar stands for, marks at limits, a dot at what was measured.

    Args:
        parts: size by CSS class, in the order in which they are drawn.
        full: the size of the whole width; positive.
        label: what a screen reader says.
        marks: (CSS class, size) of vertical lines.
        dot: a size.
    """
    drawn, begin = [f'<rect class="back" width="{WIDE}" height="{HIGH}"/>'], 0.0
    for name, size in parts.items():
        if size > 0:
            x, end = _at(begin / full), _at((begin + size) / full)
            drawn.append(f'<rect class="bar {escape(name)}" x="{x}" width="{round(end - x, 1)}" height="{HIGH}"/>')
            if end < WIDE and end - x > 4:
                drawn.append(f'<line class="edge" x1="{end}" x2="{end}" y1="0" y2="{HIGH}"/>')
            begin += size
    for name, size in marks:
        x = _at(size / full)
        drawn.append(f'<line class="{escape(name)}" x1="{x}" x2="{x}" y1="0" y2="{HIGH}"/>')
    if dot is not None:
        x = _at(dot / full)
        drawn += [f'<path class="{name}" d="M{x} 5h0"/>' for name in ("peak", "inner")]
    return _strip("".join(drawn), label, tall=True)


def range_bar(low: float, likely: float, high: float, full: float) -> str:
    """A range with a line at its likely value."""
    x, end, middle = (_at(value / full) for value in (low, high, likely))
    return _strip(
        f'<rect class="back" width="{WIDE}" height="{HIGH}"/>'
        f'<rect class="bar" x="{x}" width="{round(max(end - x, 4), 1)}" height="{HIGH}"/>'
        f'<line class="error" x1="{middle}" x2="{middle}" y1="0" y2="{HIGH}"/>'
    )


def _at(share: float) -> float:
    return round(WIDE * min(max(share, 0.0), 1.0), 1)


def _strip(drawn: str, label: str = "", *, tall: bool = False) -> str:
    said = f'role="img" aria-label="{escape(label)}"' if label else 'aria-hidden="true"'
    size = f'viewBox="0 0 {WIDE} {HIGH}" preserveAspectRatio="none"'
    return f'<svg class="strip{" tall" if tall else ""}" {size} {said}>{drawn}</svg>'
