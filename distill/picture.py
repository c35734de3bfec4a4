"""report.png: held-out and training loss by step with every cut in it, and what each round cost and healed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.options import MEASURES, UNITS, measure_of
from nano.figure import AFTER, BEFORE, CHOSEN, INK, MUTED, blank_figure, quiet

if TYPE_CHECKING:
    from distill.report import Facts


def write_picture(path: Path, facts: Facts) -> None:
    """Draw the report's figures as a PNG of 1,650 pixels' width."""
    figure = blank_figure((11, 4.2), 150)
    trained = facts.results["held_out"]["trained"]
    key = measure_of(trained)
    apart = f"KL {trained[key]:.3f} nats a token" if key == "kl" else f"{MEASURES[key]} {trained[key]:.3f}"
    title = f"{facts.title}: cross-entropy {trained['cross_entropy']:.3f}, {apart}"
    figure.suptitle(title, x=0.012, ha="left", fontsize=12, color=INK)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    _draw_loss(left, facts)
    _draw_cost(right, facts)
    for panel in (left, right):
        quiet(panel)
        panel.tick_params(axis="x", labelcolor=MUTED)
    figure.savefig(path, metadata={"Software": None})


def _draw_loss(panel: Any, facts: Facts) -> None:
    if facts.training:
        panel.plot(*zip(*facts.training, strict=True), color=BEFORE, lw=1.2, label="training text")
    panel.plot(*zip(*facts.measured, strict=True), color=AFTER, lw=1.6, marker="o", ms=4, label="held-out text")
    teacher = facts.results["held_out"]["teacher"]["cross_entropy"]
    panel.axhline(teacher, color=CHOSEN, lw=1.2, ls="--", label="teacher, held-out text")
    panel.set_title("cross-entropy by step (nats a token)", fontsize=10, loc="left", color=INK)
    panel.legend(frameon=False, fontsize=8.5, labelcolor=INK)


def _draw_cost(panel: Any, facts: Facts) -> None:
    """KL to the teacher after each cut and once healed; without cuts, before and after training."""
    held = facts.results["held_out"]
    rounds = facts.results["rounds"]
    pairs = [(each["held_out"]["cut"]["kl"], each["held_out"]["healed"]["kl"]) for each in rounds]
    key = measure_of(held["trained"])
    pairs = pairs or [(held["start"][key], held["trained"][key])]
    at = range(len(pairs))
    panel.bar([x - 0.2 for x in at], [cut for cut, _ in pairs], 0.38, color=BEFORE, label="before training")
    panel.bar([x + 0.2 for x in at], [healed for _, healed in pairs], 0.38, color=AFTER, label="after it")
    names = [f"round {i}\n{each['parameters'][1]:,}" for i, each in enumerate(rounds, 1)]
    panel.set_xticks(list(at), names or [f"{facts.results['parameters']:,}"])
    panel.margins(y=0.25)  # room for the legend
    panel.set_title(f"{MEASURES[key]} ({UNITS[key]})", fontsize=10, loc="left", color=INK)
    panel.legend(frameon=False, fontsize=8.5, labelcolor=INK)
