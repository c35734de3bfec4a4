"""memory.png: a stacked bar for each phone, the forecast by cause, with marks at what the phone allows.

Written bytes come first and what is read in place last, so that one bar can be held against both limits: the mark of
what may be written, and the mark of what may be resident.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from device_profiles.budget import Limit, Verdict
from device_profiles.profile import decimal_bytes
from nano.figure import INK, MUTED, blank_figure, quiet

CAUSES = {
    "packed_weights": ("packed weights", "#2563c9"),
    "kv_cache": ("KV cache", "#8b4fbf"),
    "arena": ("prefill activations", "#2a9aa5"),
    "logits": ("logits", "#7cc4cb"),
    "tokenizer": ("tokenizer", "#d9a514"),
    "runtime": ("runtime", "#9aa3aa"),
    "mapped_weights": ("weights read in place", "#a9c8a0"),
}
MARKS = {"app_dirty_memory": ("may be written", "#c2570c", "-"), "app_memory": ("may be resident", "#1c2024", "--")}
GB = 1e9


def write_picture(path: Path, verdicts: Sequence[Verdict]) -> None:
    """Draw verdicts of one model, one bar a phone, as a PNG of 1,650 pixels' width."""
    figure = blank_figure((11, 1.9 + 0.62 * len(verdicts)), 150)
    first = verdicts[0]
    shape = first.facts.shape
    title = f"{shape.num_parameters / 1e9:.2f} B parameters" if shape.num_parameters >= 1e9 else f"{shape.num_parameters / 1e6:.0f} M parameters"  # noqa: E501  # fmt: skip
    figure.suptitle(
        f"Memory on the phone: {title}, {first.facts.runtime}, context {first.context:,}",
        x=0.012, ha="left", fontsize=13, color=INK,
    )  # fmt: skip
    axes = figure.subplots()
    for row, verdict in enumerate(verdicts):
        _draw_bar(axes, row, verdict)
    axes.set_yticks(range(len(verdicts)), [_label(verdict) for verdict in verdicts])
    axes.invert_yaxis()
    widest = max(_widest(verdict) for verdict in verdicts) / GB
    axes.set_xlim(0, 1.3 * widest)
    for row, verdict in enumerate(verdicts):
        colour = "#2f7d32" if verdict.fits else "#c0392b"
        told = f"{decimal_bytes(verdict.footprint.dirty)} written\n{decimal_bytes(verdict.footprint.resident)} in all"
        axes.text(1.06 * widest, row, told, va="center", fontsize=9, color=INK)
        axes.text(1.27 * widest, row, "✓" if verdict.fits else "✗", va="center", ha="center", fontsize=14, color=colour)
    axes.set_xlabel("GB", color=MUTED, fontsize=9)
    quiet(axes)
    axes.grid(visible=False, axis="y")
    axes.grid(axis="x", color="#e3e6e8", lw=0.8)
    axes.tick_params(axis="y", labelcolor=INK, labelsize=10)
    figure.legend(
        handles=_legend(verdicts), loc="outside lower center", ncols=5, frameon=False, fontsize=8.5, labelcolor=INK
    )
    figure.savefig(path, format="png", metadata={"Software": None})


def _draw_bar(axes: Any, row: int, verdict: Verdict) -> None:
    left = 0.0
    for cause, count in verdict.footprint.by_cause().items():
        axes.barh(row, count / GB, left=left, height=0.56, color=CAUSES[cause][1], edgecolor="white", lw=0.6)
        left += count / GB
    for limit in verdict.limits:
        if limit.allowed is not None:
            _, colour, style = MARKS[limit.name]
            axes.plot([limit.allowed / GB] * 2, [row - 0.38, row + 0.38], color=colour, ls=style, lw=1.8)


def _label(verdict: Verdict) -> str:
    longest = "no context fits" if verdict.longest_context is None else f"to {verdict.longest_context:,} positions"
    return f"{verdict.profile.name}\n{longest}"


def _widest(verdict: Verdict) -> float:
    return max(verdict.footprint.resident, *(limit.allowed or 0 for limit in verdict.limits))


def _legend(verdicts: Sequence[Verdict]) -> list[Any]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    seen = [cause for cause in CAUSES if any(verdict.footprint.by_cause()[cause] for verdict in verdicts)]
    handles: list[Any] = [Patch(color=CAUSES[cause][1], label=CAUSES[cause][0]) for cause in seen]
    limits: list[Limit] = [limit for verdict in verdicts for limit in verdict.limits if limit.allowed is not None]
    for name, (label, colour, style) in MARKS.items():
        if any(limit.name == name for limit in limits):
            handles.append(Line2D([], [], color=colour, ls=style, lw=1.8, label=label))
    return handles
