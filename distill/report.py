"""The distillation report: what was cut from the teacher, what each cut cost and how far training healed it.

`report.html` is one file without scripts or network, in the style of the quantization report; `report.png` is the
same for a README or a chat. Both are drawn from the manifest and metrics.jsonl, and from nothing that differs from
run to run (times, folders): equal runs give equal folders.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

from distill.options import MEASURES, UNITS, measure_of
from distill.state import METRICS
from nano.charts import Series, line_chart, log_ticks, number
from nano.manifest import Manifest
from nano.page import html_page

PAGE, PICTURE = "report.html", "report.png"

COUNTS = (
    ("parameters", "parameters"), ("num_layers", "layers"), ("hidden_size", "width"), ("num_heads", "query heads"),
    ("num_kv_heads", "key/value heads"), ("intermediate_size", "feed-forward"),
)  # fmt: skip

BEGUN = {
    "random": "From scratch, by the architecture's own random initialisation: nothing was taken from the teacher's "
    "weights, only its answers were learnt.",
    "given": "From weights of its own: nothing was cut from the teacher.",
}

POINTS = 160
"""Of the training curve at most: neighbours are averaged."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Facts:
    """What is drawn.

    Attributes:
        title: for people.
        results, recipe, data: as in the manifest.
        training: (step, cross-entropy on the step's own text).
        measured: (step, cross-entropy on held-out text): down by training, up by a cut.
    """

    title: str
    results: Mapping[str, Any]
    recipe: Mapping[str, Any]
    data: Mapping[str, Any]
    training: Sequence[Point]
    measured: Sequence[Point]


def facts_of(manifest: Manifest, records: Sequence[Mapping[str, Any]]) -> Facts:
    """The facts of a manifest of kind student.

    Args:
        manifest: complete but for its files.
        records: lines of metrics.jsonl.
    """
    results = manifest.results
    teacher = Path(str(manifest.inputs["teacher"]["path"])).name
    how = "cut from" if results["rounds"] else "taught by"
    training = [(float(r["step"]), float(r["ce"])) for r in records]
    measured = [(0.0, results["held_out"]["start"]["cross_entropy"])]
    measured += [(float(r["step"]), r["held_out"]["cross_entropy"]) for r in records if "held_out" in r]
    for step, found in _rounds_ends(results["rounds"]):
        measured += [(step, found[when]["cross_entropy"]) for when in ("healed", "cut")]
    measured.sort(key=lambda point: point[0])  # stable: at a cut's step healed comes first
    measured.append((float(results["steps"]), results["held_out"]["trained"]["cross_entropy"]))
    title = f"{results['parameters']:,} parameters, {how} {teacher}"
    return Facts(title, results, manifest.recipe, manifest.data, thinned(training), measured)


def _rounds_ends(rounds: Sequence[Mapping[str, Any]]) -> list[tuple[float, dict[str, Any]]]:
    """(step, figures before and after the cut that is made there) of every cut but the first."""
    found, step = [], 0
    for ended, begun in pairwise(rounds):
        step += ended["steps"]
        found.append((float(step), {"healed": ended["held_out"]["healed"], "cut": begun["held_out"]["cut"]}))
    return found


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most `POINTS`, each the mean of neighbours."""
    size = max(1, -(-len(points) // POINTS))
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]


def write_report(folder: Path, manifest: Manifest, *, picture: bool) -> None:
    """Draw report.html, and report.png beside it.

    Args:
        folder: the student's; holds metrics.jsonl where it was trained.
        manifest: complete but for its files.
        picture: draw report.png too.
    """
    metrics = folder / METRICS
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else []
    facts = facts_of(manifest, [json.loads(line) for line in lines])
    (folder / PAGE).write_text(page(facts), encoding="utf-8")
    if picture:
        from distill.picture import write_picture

        write_picture(folder / PICTURE, facts)


def page(facts: Facts) -> str:
    """The whole HTML page."""
    return html_page(facts.title, [_figures(facts), _loss(facts), _shapes(facts), _cuts(facts), _text(facts)])


def _figures(facts: Facts) -> str:
    """The few numbers that people look for first."""
    results, held = facts.results, facts.results["held_out"]
    was, now = results["teacher_parameters"], results["parameters"]
    trained, start = held["trained"], held["start"]
    key = measure_of(trained)
    losses = [f"{held['teacher']['cross_entropy']:.4f}", f"{start['cross_entropy']:.4f}"]
    shown = [
        ("parameters", f"{now:,}", f"{now / was:.0%} of the teacher's {was:,}"),
        ("cross-entropy", f"{trained['cross_entropy']:.4f}", f"teacher {losses[0]}, before training {losses[1]}"),
        (MEASURES[key], f"{trained[key]:.4f}", f"{UNITS[key]}; {start[key]:.4f} before training"),
        ("same top token", f"{trained['top1']:.1%}", f"on {held['tokens']:,} held-out tokens"),
        ("rounds", str(len(results["rounds"]) or 1), f"{results['steps']:,} steps in all"),
    ]  # fmt: skip
    cells = (f"<div><dt>{escape(a)}</dt><dd>{escape(b)}<small>{escape(c)}</small></dd></div>" for a, b, c in shown)
    return f'<dl class="figures">{"".join(cells)}</dl>'


def _loss(facts: Facts) -> str:
    """Held-out loss from the first cut to the last step, with every cut in it."""
    steps, teacher = facts.results["steps"], facts.results["held_out"]["teacher"]["cross_entropy"]
    if not steps:
        return ""
    values = [teacher, *(y for _, y in facts.measured), *(y for _, y in facts.training)]
    ticks = [(tick, number(tick)) for tick in log_ticks(min(values), max(values))]
    x_ticks = [(0.0, "0"), (steps / 2, f"{steps / 2:,.0f}"), (float(steps), f"{steps:,} steps")]
    lines: Series = {"before": facts.training, "after": facts.measured}
    dots: Series = {"chosen": [(float(steps), teacher)]}
    chart = line_chart(lines, x_ticks, ticks, "cross-entropy by step", dots)
    keys = '<span class="key before">training text</span><span class="key after">held-out text</span>'
    keys += '<span class="key chosen">the teacher, held-out text</span>'
    return (
        "<section><h2>Cross-entropy by step</h2><p>Nats a token. A cut lifts the loss at once, training brings it "
        f'down.</p><p class="legend">{keys}</p><div class="curve"><figure>{chart}</figure></div></section>'
    )


def _shapes(facts: Facts) -> str:
    """The shapes that were tried, where some were."""
    tried = facts.results.get("shapes")
    if not tried:
        return ""
    head = "".join(f"<th>{escape(label)}</th>" for _, label in COUNTS)
    rows, first = [], '<tr class="chosen">'
    for i, trial in enumerate(tried):
        cells = "".join(f"<td>{trial[key]:,}</td>" for key, _ in COUNTS)
        rows.append(f"{'<tr>' if i else first}{cells}<td>{trial['kl']:.4f}</td></tr>")
    return (
        "<section><h2>Which shape</h2><p>Shapes of the size that was asked for, each cut and measured on calibration "
        "text before any training. The first was taken.</p>"
        f'<div class="wide"><table><thead><tr>{head}<th>KL after the cut</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div></section>"
    )


def _cuts(facts: Facts) -> str:
    rounds = facts.results["rounds"]
    if not rounds:
        return f"<section><h2>How it began</h2><p>{BEGUN[facts.results['start']]}</p></section>"
    head = "".join(f"<th>{escape(label)}</th>" for _, label in COUNTS)
    rows = "".join(f"<tr><th>{i}</th>{_counts(each)}</tr>" for i, each in enumerate(rounds, 1))
    cost = "".join(f"<tr><th>{i}</th>{_cost(each)}</tr>" for i, each in enumerate(rounds, 1))
    costs = ("cross-entropy before", "after the cut", "healed", "KL after the cut", "healed", "steps")
    lists = facts.results["cut"]["lists"]
    return (
        "<section><h2>What was cut</h2><p>Layers by what their absence does, heads, neurons and channels by their "
        f"activations on calibration text. Which ones stayed is in <code>{escape(lists)}</code>.</p>"
        f'<div class="wide"><table><thead><tr><th>round</th>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
        f'{_layers(rounds)}</section><section><h2>What it cost</h2><p>On held-out text.</p><div class="wide"><table>'
        f"<thead><tr><th>round</th>{''.join(f'<th>{c}</th>' for c in costs)}</tr></thead><tbody>{cost}</tbody></table>"
        "</div></section>"
    )


def _counts(each: Mapping[str, Any]) -> str:
    cells = []
    for key, _ in COUNTS:
        was, now = each[key]
        cells.append(f"<td>{was:,} → <b>{now:,}</b></td>" if was != now else f"<td>{now:,}</td>")
    return "".join(cells)


def _cost(each: Mapping[str, Any]) -> str:
    before, cut, healed = (each["held_out"][when] for when in ("before", "cut", "healed"))
    losses = "".join(f"<td>{found['cross_entropy']:.4f}</td>" for found in (before, cut, healed))
    return f"{losses}<td>{cut['kl']:.4f}</td><td>{healed['kl']:.4f}</td><td>{each['steps']:,}</td>"


def _layers(rounds: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        f"<tr><td>{number_}</td><td>{gone['layer']}</td>"
        f"<td>{'not measured' if gone['kl_without'] is None else format(gone['kl_without'], '.4f')}</td></tr>"
        for number_, each in enumerate(rounds, 1)
        for gone in each["dropped_layers"]
    ]
    if not rows:
        return "<p>No layer left.</p>"
    head = "<th>round</th><th>layer of the teacher</th><th>KL without it and those above</th>"
    return (
        '<div class="wide"><table><caption>Layers that left, in the order of leaving; KL per token to the model that '
        f"was cut</caption><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _text(facts: Facts) -> str:
    data = facts.data
    rows = [
        ("tokens trained on", f"{data.get('tokens', 0):,}"), ("held-out tokens", f"{data.get('held_out_tokens', 0):,}"),
        ("seed", data.get("seed")), ("weight of the teacher's answers", facts.recipe.get("kd")),
        ("divergence", facts.recipe.get("divergence")), ("peak learning rate", f"{facts.results['learning_rate']:g}"),
    ]  # fmt: skip
    lines = "".join(f"<tr><th>{escape(label)}</th><td>{escape(str(value))}</td></tr>" for label, value in rows)
    files = "".join(
        f"<li>{escape(Path(str(entry['path'])).name)}<br><code>sha256 {escape(str(entry['sha256']))}</code></li>"
        for entry in data.get("files", ())
    )
    return f'<section><h2>Text</h2><table class="facts"><tbody>{lines}</tbody></table><ul>{files}</ul></section>'
