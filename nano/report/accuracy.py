"""The report's sections on accuracy: capabilities, divergence with its tail and worst flips, each linear's error."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from nano.charts import line_chart, log_ticks, number
from nano.divergence import Figure
from nano.report.charts import score_bar
from nano.report.facts import Card, Divergence, Flip, Report, Score
from nano.report.parts import missing, percent, plural, section, short, stage_class
from nano.untrusted import mapping
from nano.untrusted import number as sound

TAIL = (("Median KLD", 0.5, "50"), ("90.0% KLD", 0.9, "90"), ("95.0% KLD", 0.95, ""), ("99.0% KLD", 0.99, "99"),
        ("99.9% KLD", 0.999, "99.9"))  # fmt: skip
ROWS: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    ("KL(reference ‖ model), nats a token", (
        ("Mean KLD", "mean"), ("Median KLD", "median"), ("90.0% KLD", "90th percentile"),
        ("95.0% KLD", "95th"), ("99.0% KLD", "99th"), ("99.9% KLD", "99.9th"), ("Maximum KLD", "largest"))),
    ("Change of the right token’s probability", (
        ("Mean Δp", "mean"), ("RMS Δp", "root mean square"), ("0.1% Δp", "0.1th percentile"),
        ("1.0% Δp", "1st"), ("5.0% Δp", "5th"), ("Median Δp", "median"), ("95.0% Δp", "95th"), ("99.0% Δp", "99th"))),
    ("Agreement", (
        ("Same top p", "same most likely token"), ("Flips", "right in one, wrong in the other"),
        ("Mean PPL(Q)", "perplexity"), ("Mean PPL(base)", "perplexity of the reference"),
        ("Mean PPL(Q)/PPL(base)", "ratio of perplexities"))),
)  # fmt: skip
WORST_LINEARS = 5
CONTEXT = 100
"""Characters before a flip."""
KIND_OF = {"teacher": "", "student": "student", "int4": "int4", "bitsandbytes": "int4"}


def capabilities(report: Report) -> str:
    """The ladder: for each capability a bar for each stage."""
    heading = "Capabilities"
    cards = report.cards
    if not cards:
        what = missing(
            "What it still knows, capability by capability, was not measured.",
            "nanokit", "evaluate", report.folder, "--tasks", "TASKS.toml", "--record",
        )  # fmt: skip
        return section("capabilities", heading, what)
    names = list(dict.fromkeys(name for card in cards for name in card.capabilities))
    about = "Share of questions answered rightly; the thin line spans one standard error to either side."
    if any(one.of_teacher for card in cards for one in card.capabilities.values()):
        about += " Last column: share of the teacher’s score."
    if any(card.derived for card in cards):
        about += " The teacher’s own scores are reckoned from those shares."
    silent = [step for step in report.steps if step.ancestor.kind in ("student", "int4") and step.folder and not step.results.get("scorecard")]  # noqa: E501  # fmt: skip
    todo = "".join(
        missing(
            f"The {step.ancestor.kind} was not measured.",
            "nanokit",
            "evaluate",
            step.folder,
            "--tasks",
            "TASKS.toml",
            "--record",
        )  # fmt: skip
        for step in silent
    )
    tables = "".join(_ladder(name, cards) for name in names)
    return section("capabilities", heading, f'<p>{about}</p><div class="ladders">{tables}</div>{todo}')


def _ladder(name: str, cards: Sequence[Card]) -> str:
    found = [(card.stage, card.capabilities[name]) for card in cards if name in card.capabilities]
    questions = max((one.questions for _stage, one in found), default=0)
    rows = "".join(_rung(stage, one) for stage, one in found)
    count = f" <small>{plural(questions, 'question')}</small>" if questions else ""
    return f'<table class="ladder"><caption>{escape(name)}{count}</caption><tbody>{rows}</tbody></table>'


def _rung(stage: str, one: Score) -> str:
    share = "" if one.of_teacher is None or stage == "teacher" else f"{percent(one.of_teacher, 0)} of it"
    return (
        f'<tr class="{stage_class(KIND_OF.get(stage, "bundle"))}"><th scope="row">{escape(stage)}</th>'
        f"<td>{score_bar(one.score, one.error)}</td><td>{percent(one.score, 0)}</td><td>{share}</td></tr>"
    )


def divergence(report: Report) -> str:
    """How far its next-token distributions lie from a reference's: the tail, not the mean alone."""
    heading = "Divergence from the reference"
    if not report.divergences or report.divergences[-1].stage != _own_stage(report):
        what = missing(
            "How far its next-token distributions lie from the teacher’s was not measured.",
            "nanokit", "report", report.folder, "--data", "TEXT", "--reference", "TEACHER",
        )  # fmt: skip
        if not report.divergences:
            return section("divergence", heading, what)
    else:
        what = ""
    own = report.divergences[-1]
    text = ", ".join(path.rsplit("/", 1)[-1] for path, _sha256 in own.files)
    about = f"On {own.tokens:,} tokens of {text or 'a text'}, against {own.reference}. Half of all tokens are below the median; the tail is where answers change."  # noqa: E501  # fmt: skip
    others = {one.reference for one in report.divergences} - {own.reference}
    if others:
        about += " The columns have different references, named at their heads."
    keys = "".join(
        f'<span class="key {_stage(one)}">{escape(one.stage)}</span>' for one in report.divergences
    )  # fmt: skip
    chart = _tail(report.divergences)
    drawn = f'<figure>{chart}<p class="legend">{keys}<br>Vertical: KL, nats a token. Horizontal: percentile of tokens.</p></figure>' if chart else ""  # noqa: E501  # fmt: skip
    table = _table(report.divergences, bool(others))
    return section("divergence", heading, what, f'<p>{escape(about)}</p><div class="curve">{drawn}<div class="wide">{table}</div></div>')  # noqa: E501  # fmt: skip


def _own_stage(report: Report) -> str:
    from nano.report.facts import label

    return label(report.own)


def _stage(one: Divergence) -> str:
    return stage_class(KIND_OF.get(one.stage, "bundle"))


def _tail(found: Sequence[Divergence]) -> str:
    """KL by percentile; horizontal: -log10 of the share of tokens that are worse."""
    lines = {}
    for one in found:
        points = [(-math.log10(1 - share), one.figures[name].value) for name, share, _ in TAIL if name in one.figures]
        if "Maximum KLD" in one.figures and one.tokens > 1:
            points.append((math.log10(one.tokens), one.figures["Maximum KLD"].value))
        lines[_stage(one)] = sorted(points)
    values = [y for points in lines.values() for _x, y in points if y > 0]
    if len(values) < 2:
        return ""
    y_ticks = [(tick, number(tick)) for tick in log_ticks(min(values), max(values))]
    last = max(x for points in lines.values() for x, _y in points)
    x_ticks = [(-math.log10(1 - share), text) for _name, share, text in TAIL if text and -math.log10(1 - share) < last - 0.3]  # noqa: E501  # fmt: skip
    return line_chart(lines, [*x_ticks, (last, "max")], y_ticks, "KL by percentile of tokens")


def _table(found: Sequence[Divergence], references: bool) -> str:
    head = "".join(
        f'<th scope="col">{escape(one.stage)}{f"<br>to {escape(one.reference)}" if references else ""}</th>' for one in found
    )  # fmt: skip
    body = ""
    for group, rows in ROWS:
        shown = [(name, words) for name, words in rows if any(name in one.figures for one in found)]
        if shown:
            body += f'<tr class="group"><th scope="rowgroup" colspan="{len(found) + 1}">{group}</th></tr>'
        for name, words in shown:
            cells = "".join(f"<td>{_figure(name, one.figures.get(name))}</td>" for one in found)
            body += f'<tr><th scope="row">{words}</th>{cells}</tr>'
    return f'<table class="divergence"><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table>'


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
    """Tokens that the reference had right and the model has wrong, with their text."""
    one = report.divergences[-1] if report.divergences else None
    if one is None:
        return ""
    if not one.flips:
        none = f"No token that {one.reference} has right is wrong in the {one.stage}." if not one.lost else "Their texts were not recorded."  # noqa: E501  # fmt: skip
        return section("flips", "Worst flips", f"<p>{escape(none)}</p>")
    about = (
        f"Of {one.tokens:,} tokens {one.lost:,} are right in {one.reference} and wrong here, {one.gained:,} the other way "
        "round. These lost most: green the right token, struck out what is said instead."
    )
    listed = "".join(f"<li>{_flip(flip)}</li>" for flip in one.flips)
    return section("flips", "Worst flips", f'<p>{escape(about)}</p><ol class="flips">{listed}</ol>')


def _flip(flip: Flip) -> str:
    right, said = (escape(_visible(text)) for text in (flip.right, flip.said))
    return (
        f'<span class="before">…{escape(_line(flip.before))}</span><ins title="right">{right}</ins> <del title="said">{said}</del>'
        f"<small>right: {percent(flip.reference_p)} in the reference, {percent(flip.right_p)} here; "
        f"said instead: {percent(flip.said_p)}</small>"
    )


def _line(text: str) -> str:
    """The end of a text on one line."""
    return " ⏎ ".join(" ".join(text.split()) for text in text.split("\n") if text.strip())[-CONTEXT:]


def _visible(text: str) -> str:
    """A token with signs for what would not be seen."""
    return text.replace("\n", "⏎").replace("\t", "⇥") if text.strip(" ") else text.replace(" ", "␣") or "∅"


def layers(report: Report) -> str:
    """Each linear's quantization error, as the int4 folder's own report draws it."""
    heading = "Quantization error, layer by layer"
    if report.layers is None:
        step = next((step for step in report.steps if step.ancestor.kind == "int4"), None)
        if report.kind == "student":
            return section("layers", heading, missing("It is not quantized.", "nanokit", "quantize", report.folder, "--out", "INT4"))  # noqa: E501  # fmt: skip
        where = f" Its int4 folder is not at {step.ancestor.path}." if step and step.folder is None else ""
        return section("layers", heading, missing(f"The manifest holds no errors of its linears.{where}"))
    drawn = importlib.import_module("quantize.report")
    facts = drawn.facts_of(report.layers, (0, 0))
    panels = drawn.error_panels(facts)
    return section(
        "layers", heading, panels or "<p>No linear has an error above zero.</p>", _worst(report.layers.results)
    )


def _worst(results: Mapping[str, Any]) -> str:
    after, bits = mapping(results["relative_error"]), mapping(results.get("bits"))
    worst = sorted(after.items(), key=lambda item: -item[1])[:WORST_LINEARS]
    rows = "".join(
        f'<tr><th scope="row"><code>{escape(name.removeprefix("model."))}</code></th>'
        f"<td>{int(sound(bits.get(name)) or 4)}</td><td>{percent(value, 2)}</td></tr>"
        for name, value in worst
    )
    mean = sum(after.values()) / len(after)
    return (
        f'<div class="wide"><table class="numbers"><caption>The {len(worst)} linears with the largest error; the mean over '
        f"{len(after):,} is {percent(mean, 2)}</caption><thead><tr><th scope=\"col\">linear</th><th scope=\"col\">bits</th>"
        f'<th scope="col">error</th></tr></thead><tbody>{rows}</tbody></table></div>'
    )  # fmt: skip
