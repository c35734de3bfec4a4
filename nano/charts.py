"""Charts as SVG text whose colours are the page's CSS variables, so that they follow light and dark.

Each chart is drawn for a panel about 180 px wide and scales with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 180, 118
LEFT, RIGHT, TOP, BOTTOM = 40, 5, 8, 20

MOST_TICKS = 5

Series = Mapping[str, Sequence[tuple[float, float]]]
"""CSS class to points (x, y)."""


def log_ticks(low: float, high: float) -> list[float]:
    """At most `MOST_TICKS` round numbers around two positive ones: 1, 2, 5, 10 where few do, else powers of ten."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    fine = [step * 10.0**power for power in range(first, last + 1) for step in (1, 2, 5)]
    below, above = max(tick for tick in fine if tick <= low), min(tick for tick in fine if tick >= high)
    found = [tick for tick in fine if below <= tick <= above]
    if 2 <= len(found) <= MOST_TICKS:
        return found
    stride = max(1, -(-(last - first) // (MOST_TICKS - 1)))
    return [10.0**power for power in range(first, last + stride, stride)]


def percent(value: float) -> str:
    """'1.2 %' with two digits, however small; '0' for nothing."""
    return "0" if value == 0 else f"{_plain(100 * value)}\u00a0%"


def _plain(value: float) -> str:
    """Two significant digits without an exponent down to 1e-4."""
    if value >= 10:
        return f"{value:.0f}"
    text = f"{value:.2g}"
    return f"{value:.1e}" if "e" in text else text


def number(value: float) -> str:
    """Two significant digits."""
    return "0" if value == 0 else _plain(value)


def line_chart(
    series: Series,
    x_ticks: Sequence[tuple[float, str]],
    y_ticks: Sequence[tuple[float, str]],
    label: str,
    dots: Series | None = None,
) -> str:
    """Lines over a logarithmic y axis, as an <svg>.

    Args:
        series: lines by CSS class; values at or below the lowest tick lie on it.
        x_ticks: positions and texts; the first and the last are the ends of the axis.
        y_ticks: the same, positive, rising.
        label: what a screen reader says.
        dots: single points by CSS class.
    """
    x_low, x_high = x_ticks[0][0], x_ticks[-1][0]
    y_low, y_high = math.log10(y_ticks[0][0]), math.log10(y_ticks[-1][0])

    def x_of(x: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (x - x_low) / ((x_high - x_low) or 1)

    def y_of(y: float) -> float:
        at = math.log10(max(y, y_ticks[0][0]))
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (at - y_low) / ((y_high - y_low) or 1)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">']
    for y, text in y_ticks:
        parts.append(f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y_of(y):.1f}" y2="{y_of(y):.1f}"/>')
        parts.append(f'<text x="{LEFT - 4}" y="{y_of(y) + 3:.1f}" text-anchor="end">{escape(text)}</text>')
    for i, (x, text) in enumerate(x_ticks):
        anchor = "end" if i and i == len(x_ticks) - 1 else "middle"
        shift = RIGHT if anchor == "end" else 0
        parts.append(f'<text x="{x_of(x) + shift:.1f}" y="{HEIGHT - 7}" text-anchor="{anchor}">{escape(text)}</text>')
    for name, points in series.items():
        path = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in points)
        parts.append(f'<polyline class="{name}" points="{path}"/>')
        if len(points) <= 12:
            parts += [f'<circle class="{name}" cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" r="1.6"/>' for x, y in points]
    for name, points in (dots or {}).items():
        parts += [f'<circle class="{name}" cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" r="3"/>' for x, y in points]
    return "".join([*parts, "</svg>"])


def cell(value: float) -> str:
    """Two decimals below ten, none above: numbers that stand under each other."""
    if 0 < value < 0.01:
        return "<.01"
    return f"{value:.0f}" if value >= 10 else f"{value:.2f}"


def heat(value: float, low: float, high: float) -> int:
    """Shade in percent, 4 to 48, of a positive value between two others, by its logarithm."""
    if value <= 0 or high <= low:
        return 4
    share = (math.log(value) - math.log(low)) / (math.log(high) - math.log(low))
    return round(4 + 44 * min(1.0, max(0.0, share)))
