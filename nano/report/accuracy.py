"""The report's sections on accuracy: capabilities, divergence with its tail and worst flips, each linear's error."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from shlex import quote
from typing import Any

from nano.charts import line_chart, log_ticks, number
from nano.divergence import Figure
from nano.report.charts import score_bar
from nano.report.facts import label
from nano.report.parts import missing, paragraph, percent, plural, section, short, stage_class, table
from nano.report.types import AnswerFlip, Card, Divergence, Flip, Report, Score
from nano.untrusted import mapping

TAIL = {"Median KLD": (0.5, "50"), "90.0% KLD": (0.9, "90"), "95.0% KLD": (0.95, ""), "99.0% KLD": (0.99, "99"),
        "99.9% KLD": (0.999, "99.9")}  # fmt: skip
"""Percentiles of the curve: the share of tokens below, and its mark on the axis."""
ROWS: Mapping[str, Mapping[str, str]] = {
    "KL(reference ‖ model), nats a token": {
        "Mean KLD": "mean", "Median KLD": "median", "90.0% KLD": "90th percentile", "95.0% KLD": "95th",
        "99.0% KLD": "99th", "99.9% KLD": "99.9th", "Maximum KLD": "largest",
    },
    "Change of the right token’s probability": {
        "Mean Δp": "mean", "RMS Δp": "root mean square", "0.1% Δp": "0.1th percentile", "1.0% Δp": "1st",
        "5.0% Δp": "5th", "Median Δp": "median", "95.0% Δp": "95th", "99.0% Δp": "99th",
    },
    "Agreement": {
        "Same top p": "same most likely token", "Flips": "right in one, wrong in the other",
        "Mean PPL(Q)": "perplexity", "Mean PPL(base)": "perplexity of the reference",
        "Mean PPL(Q)/PPL(base)": "ratio of perplexities",
    },
}  # fmt: skip
WORST_LINEARS = 5
LEAST = 1e-9
"""Nats below which a KL is float32's own noise: the curve's floor."""
CONTEXT = 100
"""Characters before a flip."""


def capabilities(report: Report) -> str:
    """The ladder: for each capability a bar for each stage."""
    name, heading, cards = "capabilities", "Capabilities", report.cards
    ask = "nanokit evaluate {} --tasks TASKS --reference TEACHER --record"
    if not cards:
        what = "What it still knows, capability by capability, was not measured."
        return section(name, heading, missing(what, ask.format(quote(report.folder))))
    about = "Share of questions answered rightly; the thin line spans one standard error to either side."
    if any(one.of_teacher for card in cards for one in card.capabilities.values()):
        about += " Last column: share of the teacher’s score."
    if any(card.derived for card in cards):
        about += " The teacher’s own scores are reckoned from those shares."
    if report.others:
        about += f" Asked other questions, and not shown: {', '.join(report.others)}."
    names = dict.fromkeys(name for card in reversed(cards) for name in card.capabilities)
    tables = "".join(_ladder(name, cards) for name in names)
    measured = {card.kind for card in cards}
    todo = "".join(
        missing(f"The {label(step)} was not measured.", ask.format(quote(str(step.folder))))
        for step in report.steps
        if step.folder and step.ancestor.kind not in measured and label(step) not in report.others
    )
    return section(name, heading, paragraph(about), f'<div class="ladders">{tables}</div>', todo)


def _ladder(name: str, cards: Sequence[Card]) -> str:
    found = [(card, card.capabilities[name]) for card in cards if name in card.capabilities]
    questions = max((one.questions for _card, one in found), default=0)
    rows = "".join(_rung(card, one) for card, one in found)
    count = f" <small>{plural(questions, 'question')}</small>" if questions else ""
    return f'<table class="ladder"><caption>{escape(name)}{count}</caption><tbody>{rows}</tbody></table>'


def _rung(card: Card, one: Score) -> str:
    share = "" if one.of_teacher is None or card.kind == "" else f"{percent(one.of_teacher, 0)} of it"
    return (
        f'<tr class="{stage_class(card.kind)}"><th scope="row">{escape(card.stage)}</th>'
        f"<td>{score_bar(one.score, one.error)}</td><td>{percent(one.score, 0)}</td><td>{share}</td></tr>"
    )


def divergence(report: Report) -> str:
    """How far its next-token distributions lie from a reference's: the tail, not the mean alone."""
    name, heading, found = "divergence", "Divergence from the reference", report.divergences
    todo = ""
    if not found or found[-1].kind != report.kind:
        what = "How far its next-token distributions lie from the teacher’s was not measured."
        todo = missing(what, f"nanokit report {quote(report.folder)} --data TEXT --reference TEACHER")
    if not found:
        return section(name, heading, todo)
    last = found[-1]
    text = ", ".join(path.rsplit("/", 1)[-1] for path, _sha256 in last.files) or "a text"
    about = (
        f"On {last.tokens:,} tokens of {text}, against {last.reference}. Half of all tokens are below the median; the "
        "tail is where answers change."
    )
    several = len({(one.reference_fingerprint, one.tokens, one.files) for one in found}) > 1
    if several:
        about += " Not all columns were measured on the same text against the same model: see their heads."
    drawn = f'<div class="curve">{_tail(found)}<div class="wide">{_table(found, several)}</div></div>'
    return section(name, heading, todo, paragraph(about), drawn)


def _tail(found: Sequence[Divergence]) -> str:
    """KL by percentile; horizontal: -log10 of the share of tokens that are worse."""
    lines = {}
    for one in found:
        points = [(-math.log10(1 - share), one.figures[name].value) for name, (share, _) in TAIL.items() if name in one.figures]  # noqa: E501  # fmt: skip
        if "Maximum KLD" in one.figures and one.tokens > 1:
            points.append((math.log10(one.tokens), one.figures["Maximum KLD"].value))
        lines[stage_class(one.kind)] = sorted((x, min(max(y, LEAST), 1 / LEAST)) for x, y in points)
    values = [y for points in lines.values() for _x, y in points]
    if len(values) < 2:
        return ""
    y_ticks = [(tick, number(tick)) for tick in log_ticks(min(values), max(values))]
    last = max(x for points in lines.values() for x, _y in points)
    marks = [(-math.log10(1 - share), mark) for share, mark in TAIL.values() if mark]
    x_ticks = [*((x, mark) for x, mark in marks if x < last - 0.3), (last, "max")]
    chart = line_chart(lines, x_ticks, y_ticks, "KL by percentile of tokens")
    keys = "".join(f'<span class="key {stage_class(one.kind)}">{escape(one.stage)}</span>' for one in found)
    axes = "Vertical: KL, nats a token. Horizontal: percentile of tokens."
    return f'<figure>{chart}<p class="legend">{keys}<br>{axes}</p></figure>'


def _table(found: Sequence[Divergence], several: bool) -> str:
    head = "".join(f'<th scope="col">{_head(one, several)}</th>' for one in found)
    body = ""
    for group, rows in ROWS.items():
        shown = {name: words for name, words in rows.items() if any(name in one.figures for one in found)}
        if shown:
            body += f'<tr class="group"><th scope="rowgroup" colspan="{len(found) + 1}">{group}</th></tr>'
        for name, words in shown.items():
            cells = "".join(f"<td>{_figure(name, one.figures.get(name))}</td>" for one in found)
            body += f'<tr><th scope="row">{words}</th>{cells}</tr>'
    return f'<table class="divergence"><thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table>'


def _head(one: Divergence, several: bool) -> str:
    what = f"<small>to {escape(one.reference)},<br>{one.tokens:,} tokens</small>" if several else ""
    return escape(one.stage) + what


def _figure(name: str, figure: Figure | None) -> str:
    if figure is None:
        return "–"
    share = name.endswith("p") or name == "Flips"
    value = percent(figure.value, 2) if share else short(figure.value, 4 if "PPL" in name else 3)
    if not figure.error:
        return value
    error = percent(figure.error, 2) if share else short(figure.error, 2)
    return f"{value}<small>± {error}</small>"


def flips(report: Report) -> str:
    """Answers and tokens that the teacher has right and the model wrong, with their text."""
    parts = []
    if report.answers:
        counts = (
            f"{plural(report.answers.lost, 'right answer')} of the teacher’s lost, {report.answers.gained:,} gained."
        )
        if report.answers.worst:
            counts += " Green what was expected, struck out what is said now."
        parts += ["<h3>Answers</h3>", paragraph(counts), _listed(map(_answer, report.answers.worst))]
    if report.divergences:
        one = report.divergences[-1]
        counts = f"Of {one.tokens:,} tokens {one.lost:,} are right in {one.reference} and wrong in {one.stage}, "
        counts += f"{one.gained:,} the other way round."
        if one.flips:
            counts += " These lost most: green the right token, struck out what is said instead."
        elif one.lost:
            counts += " Their texts were not recorded."
        parts += ["<h3>Tokens</h3>", paragraph(counts), _listed(map(_flip, one.flips))]
    return section("flips", "Worst flips", *parts) if parts else ""


def _listed(entries: Iterable[str]) -> str:
    listed = "".join(f"<li>{entry}</li>" for entry in entries)
    return f'<ol class="flips">{listed}</ol>' if listed else ""


def _answer(one: AnswerFlip) -> str:
    label = escape(_line(one.label))
    return f'<span class="before">…{label}</span> {_changed(one.expected, one.said)}<small>{escape(one.task)}</small>'


def _flip(flip: Flip) -> str:
    return (
        f'<span class="before">…{escape(_line(flip.before))}</span>{_changed(flip.right, flip.said)}'
        f"<small>right: {percent(flip.reference_p)} in the reference, {percent(flip.right_p)} here; "
        f"said instead: {percent(flip.said_p)}</small>"
    )


def _changed(right: str, said: str) -> str:
    """What was right and what is said, told apart by more than colour."""
    return (
        f'<ins title="right">{escape(_visible(right))}</ins> <del title="said instead">{escape(_visible(said))}</del>'
    )


def _line(text: str) -> str:
    """The end of a text on one line."""
    lines = (" ".join(line.split()) for line in text.split("\n") if line.strip())
    return " ⏎ ".join(lines)[-CONTEXT:]


def _visible(text: str) -> str:
    """A text with signs for what would not be seen."""
    return text.replace("\n", "⏎").replace("\t", "⇥") if text.strip(" ") else text.replace(" ", "␣") or "∅"


def layers(report: Report) -> str:
    """Each linear's quantization error, as the int4 folder's own report draws it."""
    name, heading = "layers", "Quantization error, layer by layer"
    if report.layers is None:
        return section(name, heading, _no_layers(report))
    drawn = importlib.import_module("quantize.report")
    panels = drawn.error_panels(drawn.facts_of(report.layers, (0, 0)))
    return section(name, heading, panels or paragraph("No linear has an error above zero."), _worst(report))


def _no_layers(report: Report) -> str:
    if report.kind == "student":
        todo = f"nanokit quantize {quote(report.folder)} --data TEXT --out INT4"
        return missing("It is not quantized.", todo)
    step = next((step for step in report.steps if step.ancestor.kind == "int4" and step.folder is None), None)
    where = f" The int4 folder is no longer at {step.ancestor.path}; its own report.html has them." if step else ""
    return missing(f"The manifest holds no error of any linear.{where}")


def _worst(report: Report) -> str:
    results: Mapping[str, Any] = report.layers.results if report.layers else {}
    after, bits = mapping(results.get("relative_error")), mapping(results.get("bits"))
    worst = sorted(after.items(), key=lambda item: -item[1])[:WORST_LINEARS]
    rows = [
        (f"<code>{escape(name.removeprefix('model.'))}</code>", f"{bits.get(name, 4):.0f}", percent(value, 2))
        for name, value in worst
    ]
    mean = sum(after.values()) / len(after)
    caption = f"The {len(worst)} linears with the largest error; the mean over {len(after):,} is {percent(mean, 2)}"
    return f'<div class="wide">{table("numbers", ("linear", "bits", "error"), rows, caption)}</div>'
