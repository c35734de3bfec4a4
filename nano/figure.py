"""What every picture shares: a white figure without a screen, and the pages' own greys. matplotlib comes when drawn."""

from __future__ import annotations

from typing import Any

BEFORE, AFTER, CHOSEN, INK, MUTED = "#9aa3aa", "#2563c9", "#c2570c", "#1c2024", "#667078"


def blank_figure(inches: tuple[float, float], dpi: int) -> Any:
    """A white figure that draws without a screen and without pyplot's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=inches, dpi=dpi, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def quiet(panel: Any) -> None:
    """Lines of a grid and of the x axis only, in the page's own greys."""
    panel.grid(axis="y", color="#e3e6e8", lw=0.8)
    panel.set_axisbelow(True)
    panel.spines[["top", "right", "left"]].set_visible(False)
    panel.spines["bottom"].set_color("#c9ced2")
    panel.tick_params(colors=MUTED, labelsize=8.5, length=0, which="both")
