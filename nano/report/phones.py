"""The report's sections on phones: memory against every profile, speed as forecast and as measured."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from html import escape
from shlex import quote
from typing import Any

from nano.report.charts import range_bar, stacked_bar
from nano.report.facts import BUNDLES
from nano.report.parts import key_figures, missing, paragraph, percent, plural, section, short, table
from nano.report.types import Lived, Phone, Phones, Report
from nano.untrusted import mapping, number, text, whole

CAUSES = {
    "packed_weights": "packed weights", "kv_cache": "KV cache", "arena": "prefill activations", "logits": "logits",
    "tokenizer": "tokenizer", "runtime": "runtime", "mapped_weights": "weights read in place",
}  # fmt: skip
MARKS = {"app_dirty_memory": "written", "app_memory": "resident"}
TOO_SMALL = 0.02
"""Share of the smallest limit below which a model's bar against limits would show nothing."""
LEAST_READ = 50e6
"""Bytes a token: models that read less wait for other things than the memory bus, so the forecast is not for them."""
FIRST = ("low-end", "high-end")
RUNTIMES = {"executorch": "ExecuTorch", "onnx": "ONNX Runtime"}
BENCH = (
    ("decoding", "decode, tokens/s", 1.0, ""), ("prefill", "prefill, tokens/s", 1.0, ""),
    ("first_token", "time to first token", 1.0, "s"), ("load", "load", 1.0, "s"),
    ("peak", "peak resident", 1e-6, "MB"), ("limit_fraction", "of the memory bus", 100.0, "%"),
)  # fmt: skip
"""Figures of `export.bench.Bench`: field, in words, factor, unit."""


def _bytes(count: float) -> str:
    """'1.34 GB', as phones are sold."""
    told: str = importlib.import_module("device_profiles.profile").decimal_bytes(count)
    return told.replace(" ", "\u00a0")


def memory(report: Report) -> str:
    """What it takes, by cause, and what each phone allows."""
    name, heading, found = "memory", "Memory on phones", report.phones
    if found is None:
        return section(name, heading, missing(f"It cannot be forecast. {report.no_phones}"))
    about = (
        f"Forecast for {RUNTIMES[found.runtime]} at context {found.context:,}, error up to {percent(found.error)}: "
        f"{_bytes(found.dirty)} written, which no phone can take back, and {_bytes(found.resident)} in all."
    )
    if found.planned:
        about += " There is no bundle yet: this is a plan with int4 linears in groups of 32."
    allowed = [one["allowed"] for phone in found.phones for one in phone.limits.values() if one["allowed"]]
    drawn = bool(allowed) and found.resident >= TOO_SMALL * min(allowed)
    measured = any(phone.measured for phone in found.phones)
    most = whole(report.own.shape.get("max_positions")) or 0
    listed = "".join(_phone(phone, found, drawn, most) for phone in sorted(found.phones, key=_rank))
    parts = [paragraph(about), _composition(found), _marks(drawn, measured), f'<ul class="phones">{listed}</ul>']
    if found.unjudged:
        parts.append(f"<p><small>Not judged: {escape(_unjudged(found.unjudged))}.</small></p>")
    if not measured and not found.planned:
        todo = f"nanokit check {quote(report.folder)} --profile low-end --measure"
        parts.append(missing("It was not run under any phone’s limits.", todo))
    return section(name, heading, *parts)


def _rank(phone: Phone) -> tuple[int, float]:
    """Composed profiles first, then by the tightest limit."""
    allowed = [float(one["allowed"]) for one in phone.limits.values() if one["allowed"]]
    return FIRST.index(phone.name) if phone.name in FIRST else len(FIRST), min(allowed, default=0.0)


def _unjudged(unjudged: Mapping[str, str]) -> str:
    whys: dict[str, list[str]] = {}
    for name, why in unjudged.items():
        whys.setdefault(why.rstrip("."), []).append(name)
    return "; ".join(f"{', '.join(names)} ({why})" for why, names in whys.items())


def _composition(found: Phones) -> str:
    """The footprint by cause: the same on every phone."""
    causes = {name: count for name, count in found.causes.items() if count}
    said = "memory by cause: " + ", ".join(f"{CAUSES[name]} {_bytes(count)}" for name, count in causes.items())
    items = "".join(
        f'<li class="{name}"><span>{CAUSES[name]}</span>{_bytes(count)}</li>' for name, count in causes.items()
    )
    return f'{stacked_bar(causes, found.resident, said)}<ul class="causes">{items}</ul>'


def _marks(drawn: bool, measured: bool) -> str:
    """The legend of the phones' bars."""
    if not drawn:
        return paragraph("Every limit is so far above it that a bar against them would show nothing.")
    shown = {
        "may be written": '<line class="written" x1="9" x2="9" y1="0" y2="12"/>',
        "may be resident": '<line class="resident" x1="9" x2="9" y1="0" y2="12"/>',
    }
    if measured:
        shown["measured: written at most"] = '<path class="peak" d="M9 6h0"/><path class="inner" d="M9 6h0"/>'
    keys = "".join(
        f'<span><svg viewBox="0 0 18 12" class="strip" aria-hidden="true">{sign}</svg> {words}</span> &ensp; '
        for words, sign in shown.items()
    )
    return f'<p class="legend marks">{keys}</p>'


def _phone(phone: Phone, found: Phones, drawn: bool, most: int) -> str:
    here = phone.measured if phone.measured and phone.measured.context == found.context else None
    verdict = ("fits" if phone.fits else "does not fit") + (", measured" if here else "")
    sign, css = ("✓", "pass") if phone.fits else ("✗", "fail")
    marks = [(MARKS[name], float(one["allowed"])) for name, one in phone.limits.items() if one["allowed"]]
    bar = ""
    if drawn and marks:
        allowed = " and ".join(f"{_bytes(size)} that may be {name}" for name, size in marks)
        said = f"{phone.name}: {_bytes(found.resident)}, against {allowed}"
        full = 1.02 * max([float(found.resident), *(size for _name, size in marks)])  # the last mark is not cut in half
        bar = stacked_bar(dict(found.causes), full, said, marks, here.peak_dirty if here else None)
    return (
        f'<li><p class="head"><b>{escape(phone.name)}</b><small>{escape(phone.title)}</small>'
        f'<span class="{css}"><span aria-hidden="true">{sign}</span> {verdict}</span></p>{bar}{_said(phone, most)}</li>'
    )


def _said(phone: Phone, most: int) -> str:
    """The limits in words, what was measured, and what to change."""
    parts = []
    for name, one in phone.limits.items():
        if one["allowed"]:
            share = one["needed"] / one["allowed"]
            parts.append(f"<b>{percent(share, 0 if share > 0.1 else 1)}</b> of the {_bytes(one['allowed'])} that may be {MARKS[name]}")  # noqa: E501  # fmt: skip
    if phone.longest_context and phone.longest_context < most:
        parts.append(f"fits up to {phone.longest_context:,} of {most:,} positions")
    lines = ["; ".join(parts)] if parts else []
    if phone.measured:
        lines.append(_measured(phone.measured))
    lines += [f'<span class="fail">To make it fit:</span> {escape(advice)}' for advice in phone.advice]
    return "".join(f'<p class="said">{line}</p>' for line in lines)


def _measured(one: Lived) -> str:
    how = "passed" if one.fits else "read its weights from storage again and again"
    how = f"killed in the phase ‘{escape(one.died)}’" if one.died else how
    said = f"<b>Measured</b> at context {one.context:,}: {how}"
    if one.peak_dirty is not None:
        said += f", {_bytes(one.peak_dirty)} written at most"
    if one.prediction_error is not None:
        said += f" (forecast {'+' if one.prediction_error >= 0 else ''}{percent(one.prediction_error)})"
    where = " on ".join(escape(part) for part in (one.when[:10], one.machine) if part)
    return said + (f"; {where}" if where else "")


def speed(report: Report) -> str:
    """Tokens a second: measured on a machine, and what the bandwidth of phones leads to expect."""
    return section("speed", "Speed", _bench(report), _forecasts(report))


def _bench(report: Report) -> str:
    bench, shown = report.bench, []
    for name, words, factor, unit in BENCH:
        spread = mapping(bench.get(name))
        median, least, most = (number(spread.get(key)) for key in ("median", "least", "most"))
        if median is not None:
            span = "" if least is None or most is None else f"{short(least * factor)} to {short(most * factor)}"
            shown.append((words, f"{short(median * factor)} {unit}".strip(), span))
    if not shown:
        todo = f"nanokit bench {quote(report.folder)} --record"
        return missing("Its speed was not measured.", todo) if report.kind in BUNDLES else ""
    units = {"threads": "threads", "prompt": "tokens of prompt", "decode": "decoded", "repeat": "processes"}
    counts = ", ".join(f"{count:,} {words}" for name, words in units.items() if (count := whole(bench.get(name))))
    facts = [fact for name in ("runtime", "machine", "date") if (fact := text(bench.get(name)))]
    about = f"Measured, not on a phone: {'; '.join([*facts, counts])}. Medians, least to most."
    return paragraph(about) + key_figures(shown)


def _forecasts(report: Report) -> str:
    found = report.phones
    if found is None:
        return ""
    speeds: dict[str, Mapping[str, Any]] = {phone.name: phone.speed for phone in found.phones if phone.speed}
    speeds |= found.speeds
    if not speeds:
        return missing("No phone of these publishes its memory bandwidth, so no speed can be forecast.")
    read = max(float(one["bytes_per_token"]) for one in speeds.values())
    if read < LEAST_READ:
        return paragraph(
            f"No forecast for phones: a token reads {_bytes(read)}, too little for the memory bus to decide. The "
            "published speeds that forecasts rest on are of models that read hundreds of megabytes."
        )
    about = (
        f"A token reads {_bytes(read)}, and a phone’s bus carries as much as published measurements of int4 models "
        "reached on phones of its kind. Heat is not in it."
    )
    full = max(float(one["high"]) for one in speeds.values())
    rows = [_speed(name, speeds[name], full) for name in sorted(speeds, key=lambda name: -speeds[name]["likely"])]
    head = ("phone", "tokens/s", "least to most", "error")
    return f"<h3>Forecast</h3>{paragraph(about)}{table('numbers speeds', head, rows)}"


def _speed(name: str, one: Mapping[str, Any], full: float) -> tuple[str, str, str, str]:
    low, likely, high = (float(one[key]) for key in ("low", "likely", "high"))
    error = "unknown" if one["error"] is None else f"to {percent(float(one['error']), 0)}"
    span = short(low, 2) if low == high else f"{short(low, 2)} to {short(high, 2)}"
    bar = f"{range_bar(low, likely, high, full)}<small>{span}</small>"
    rests = f"<small>{plural(int(one['measurements']), 'measurement')}</small>"
    return escape(name), short(likely, 2), bar, error + rests
