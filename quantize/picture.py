"""report.png: relative error by layer for each kind of linear, and the budget's curve where there is one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from nano.charts import percent
from nano.families import LAYER_LINEARS
from nano.figure import AFTER, BEFORE, CHOSEN, INK, MUTED, blank_figure, quiet

if TYPE_CHECKING:
    from quantize.report import Facts


def write_picture(path: Path, facts: Facts) -> None:
    """Draw the report's curves as a PNG of 1,800 pixels' width."""
    figure = blank_figure((12, 6.2), 150)
    figure.suptitle(_title(facts), x=0.012, ha="left", fontsize=13, color=INK)
    axes = figure.subplots(2, 4)
    solved = dict(facts.before) != dict(facts.after)
    values = [value for value in (*facts.before.values(), *facts.after.values()) if value > 0] or [1.0]
    for panel, linear in zip(axes.flat, LAYER_LINEARS, strict=False):
        _draw_errors(panel, facts, linear, solved)
        panel.set_ylim(min(values) / 1.3, max(values) * 1.3)
    for panel in axes[:, 0]:
        panel.set_ylabel("relative squared error", color=MUTED, fontsize=9)
    _last_panel(axes.flat[-1], facts, solved)
    figure.savefig(path, metadata={"Software": None})


def _title(facts: Facts) -> str:
    parts = [f"{facts.title}: {facts.method}"]
    if "bits_per_weight" in facts.results:
        parts.append(f"{facts.results['bits_per_weight']:.2f} bits a weight")
    if "kl_after_training" in facts.results:
        parts.append(f"KL {facts.results['kl_after_training']:.4f} nats a token")
    return ", ".join(parts)


def _draw_errors(panel: Any, facts: Facts, linear: str, solved: bool) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

    from quantize.report import of_linear

    marker = "o" if facts.layers <= 12 else ""
    lines = [(facts.after, AFTER)] if not solved else [(facts.before, BEFORE), (facts.after, AFTER)]
    for values, colour in lines:
        points = [(x, y) for x, y in of_linear(facts, values, linear) if y > 0]
        panel.plot([x for x, _ in points], [y for _, y in points], color=colour, lw=1.6, marker=marker, ms=3.5)
    panel.set_title(linear.split(".")[1], fontsize=10, loc="left", color=INK)
    panel.set_yscale("log")
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _position: percent(value)))
    panel.yaxis.set_minor_formatter(NullFormatter())
    panel.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    quiet(panel)
    panel.set_xlabel("layer", color=MUTED, fontsize=9)


def _last_panel(panel: Any, facts: Facts, solved: bool) -> None:
    """The budget's curve, or else only the legend."""
    from matplotlib.lines import Line2D

    curve = facts.results.get("curve") or []
    keys = [("rounded to nearest", BEFORE)] if solved else []
    keys.append((facts.solver if solved else "rounded to nearest", AFTER))
    handles = [Line2D([], [], color=colour, lw=1.6, label=text) for text, colour in keys]
    if len(curve) < 2:
        panel.axis("off")
        panel.legend(handles=handles, loc="upper left", frameon=False, fontsize=9.5, labelcolor=INK)
        return
    bits = [point["bits"] for point in curve]
    panel.plot(bits, [point["predicted"] for point in curve], color=BEFORE, lw=1.6, ls="--", label="sum of each alone")
    measured = [(p["bits"], p["measured"]) for p in curve if p["measured"] is not None]
    if measured:
        panel.plot(*zip(*measured, strict=True), color=INK, lw=1.6, label="together, measured")
    for point in curve:
        if point["chosen"]:
            kl = point["measured"] or point["predicted"]
            panel.plot([point["bits"]], [kl], "o", color=CHOSEN, ms=6, label="chosen")
    panel.set_yscale("log")
    panel.set_title("KL by bits a weight (nats a token)", fontsize=10, loc="left", color=INK)
    panel.set_xlabel("bits a weight, decoder linears", color=MUTED, fontsize=9)
    quiet(panel)
    panel.legend(frameon=False, fontsize=8.5, labelcolor=INK, loc="lower left")
    panel.figure.legend(handles=handles, loc="upper right", ncols=2, frameon=False, fontsize=9.5, labelcolor=INK)
