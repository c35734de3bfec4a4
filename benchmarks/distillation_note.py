"""What `benchmarks/distillation.py` found, as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

CASES = ("windows", "passes", "stories", "defaults", "vocabulary", "quality")
LABELS = {"plain": "plain torch loop", "trl": "TRL GKD", "modelopt": "ModelOpt", "nanokit": "nanokit"}
STARTS = {
    (True, "pruned"): "cut and trained", (True, "cut"): "from the cut weights", (True, "random"): "from random weights",
    (False, "pruned"): "from the cut weights", (False, "random"): "from random weights",
}  # fmt: skip
"""What a row of quality begins with, by whether it is nanokit's."""


def aligned(cells: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = ["| " + " | ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))) + " |" for line in cells]  # noqa: E501  # fmt: skip
    rule = "|" + "|".join([":" + "-" * (widths[0] + 1), *("-" * (w + 1) + ":" for w in widths[1:])]) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def throughput_table(found: dict[str, Any]) -> str:
    """Medians over turns; the ratio is the median of each turn's own."""
    runs = found["runs"]
    cells = [["tool", "tokens / CPU s", "nanokit is faster by", "peak RSS MB", "nanokit's share of it"]]
    for tool, each in runs.items():
        ours = runs.get("nanokit", each)
        pairs = list(zip(each, ours, strict=False))
        faster = statistics.median(b["rate"] / a["rate"] for a, b in pairs)
        share = statistics.median(b["peak_bytes"] / a["peak_bytes"] for a, b in pairs)
        rate, peak = (statistics.median(r[key] for r in each) for key in ("rate", "peak_bytes"))
        cells.append([LABELS[tool], f"{rate:,.0f}", f"{faster:.2f} x", f"{peak / 1e6:,.0f}", f"{share:.2f}"])
    return aligned(cells)


def quality_table(found: dict[str, Any]) -> str:
    """Lowest loss first."""
    cells = [["student", "cross-entropy", "KL to teacher", "same top token", "tokens seen", "CPU s"]]
    for row in sorted(found["rows"], key=lambda row: float(row["cross_entropy"])):
        what = "cross-entropy alone" if row["loss"] == "ce" else LABELS[row["tool"]]
        figures = [f"{row['cross_entropy']:.4f}", f"{row['kl']:.4f}", f"{row['top1']:.1%}"]
        cells.append(
            [
                f"{what}, {STARTS[row['tool'] == 'nanokit', row['start']]}",
                *figures,
                f"{row['tokens']:,}",
                f"{row['cpu_seconds']:.1f}",
            ]
        )
    for start, floor in found["floor"].items():
        figures = [f"{floor['cross_entropy']:.4f}", f"{floor['kl']:.4f}", f"{floor['top1']:.1%}"]
        cells.append([f"untrained, {start}", *figures, "0", ""])
    return aligned(cells)


def note(kept: dict[str, Any]) -> str:
    """benchmarks/distillation.md of all cases that were ever kept."""
    lines = ["# Distillation by nanokit and by its peers", ""]
    for case in CASES:
        if case not in kept:
            continue
        found = kept[case]
        where = found["machine"]
        table = quality_table(found) if case == "quality" else throughput_table(found)
        measured = found["rows"] if case == "quality" else [each[0] for each in found["runs"].values()]
        versions = sorted({row["version"] for row in measured})
        lines += [f"## {found['title']}", "", table, ""]
        if case == "quality" and found["rows"]:
            row = found["rows"][0]
            lines += [f"- {row['held_out_tokens']:,} held-out tokens; teacher's cross-entropy {row['teacher_cross_entropy']:.4f}; peak learning rate {found['rate']:g}"]  # noqa: E501  # fmt: skip
        lines += [
            f"- {found['date']}, {where['cpu']}, {where['cores']} cores, {where['memory_gb']} GB, load {where['load']} "
            f"at the start; one thread, {found['repeat']} run(s) of each, in turns",
            f"- versions: {', '.join(versions)}",
            f"- `{found['command']}`",
            *(f"- {remark}" for remark in found.get("remarks", [])),
            "",
        ]
    return "\n".join(lines)
