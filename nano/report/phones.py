"""The report's sections on phones: memory against every profile, speed as forecast and as measured."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from html import escape
from typing import TYPE_CHECKING, Any

from nano.report.charts import range_bar, stacked_bar
from nano.report.facts import Report
from nano.report.parts import key_figures, missing, percent, plural, section, short
from nano.untrusted import mapping, number, text, whole

if TYPE_CHECKING:
    from device_profiles.report import Lived, Phone, Phones

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


def _bytes(count: float) -> str:
    """'1.34 GB', as phones are sold."""
    told: str = importlib.import_module("device_profiles.profile").decimal_bytes(count)
    return told.replace(" ", "\u00a0")


def memory(report: Report) -> str:
    """What it takes, by cause, and what each phone allows."""
    heading = "Memory on phones"
    found = report.phones
    if found is None:
        return section("memory", heading, missing(f"It cannot be forecast. {report.no_phones}"))
    about = (
        f"Forecast for {RUNTIMES[found.runtime]} at context {found.context:,}, error up to {percent(found.error)}: "
        f"{_bytes(found.dirty)} written, which no phone can take back, and {_bytes(found.resident)} in all."
    )
    if found.planned:
        about += " There is no bundle yet: this is a plan with int4 linears in groups of 32."
    known = [one["allowed"] for phone in found.phones for one in phone.limits.values() if one["allowed"]]
    drawn = bool(known) and found.resident >= TOO_SMALL * min(known)
    order = sorted(found.phones, key=_rank)
    most = whole(report.own.shape.get("max_positions")) or 0
    listed = "".join(_phone(phone, found, drawn, most) for phone in order)
    rest = f"<p><small>Not judged: {escape(_listed(found.unjudged))}.</small></p>" if found.unjudged else ""
    measured = any(phone.measured for phone in found.phones)
    todo = "" if measured or found.planned else missing(
        "On no phone’s limits was it run.", "nanokit", "check", report.folder, "--profile", "low-end", "--measure",
    )  # fmt: skip
    body = (
        f"<p>{about}</p>{_composition(found)}{_marks(drawn, measured)}"
        + f'<ul class="phones">{listed}</ul>{rest}{todo}'
    )
    return section("memory", heading, body)


def _rank(phone: Phone) -> tuple[int, float]:
    """Composed profiles first, then by the tightest limit."""
    allowed = [float(one["allowed"]) for one in phone.limits.values() if one["allowed"]]
    return FIRST.index(phone.name) if phone.name in FIRST else len(FIRST), min(allowed, default=0.0)


def _listed(unjudged: Mapping[str, str]) -> str:
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
    if not drawn:
        return "<p>Every limit is so far above it that a bar against them would show nothing.</p>"
    shown = [("written", "may be written"), ("resident", "may be resident")]
    keys = "".join(
        f'<span><svg viewBox="0 0 18 12" class="strip" aria-hidden="true"><line class="{name}" x1="9" x2="9" y1="0" y2="12"/></svg>'
        f" {words}</span> &ensp; "
        for name, words in shown
    )  # fmt: skip
    if measured:
        keys += '<span><svg viewBox="0 0 18 12" class="strip" aria-hidden="true"><path class="peak" d="M9 6h0"/><path class="inner" d="M9 6h0"/></svg> measured: written at most</span>'  # noqa: E501  # fmt: skip
    return f'<p class="legend marks">{keys}</p>'


def _phone(phone: Phone, found: Phones, drawn: bool, most: int) -> str:
    verdict = "fits" if phone.fits else "does not fit"
    if phone.measured and phone.measured.context == found.context:
        verdict += ", measured"
    marks = [(MARKS[name], float(one["allowed"])) for name, one in phone.limits.items() if one["allowed"]]
    dot = phone.measured.peak_dirty if phone.measured and phone.measured.context == found.context else None
    said = f"{phone.name}: {_bytes(found.resident)} of " + " and ".join(
        f"{_bytes(size)} that may be {name}" for name, size in marks
    )
    full = 1.02 * max([float(found.resident), *(size for _name, size in marks)])  # the last mark is not cut in half
    bar = stacked_bar(dict(found.causes), full, said, marks, dot) if drawn and marks else ""
    return (
        f'<li><p class="head"><b>{escape(phone.name)}</b><small>{escape(phone.title)}</small><span class="{"pass" if phone.fits else "fail"}">'
        f'<span aria-hidden="true">{"✓" if phone.fits else "✗"}</span> {verdict}</span></p>{bar}{_said(phone, most)}</li>'
    )


def _said(phone: Phone, most: int) -> str:
    """The limits in words, what was measured, and what to change."""
    parts = []
    for name, one in phone.limits.items():
        if one["allowed"]:
            parts.append(f"<b>{percent(one['needed'] / one['allowed'], 1 if one['needed'] < 0.1 * one['allowed'] else 0)}</b> of the {_bytes(one['allowed'])} that may be {MARKS[name]}")  # noqa: E501  # fmt: skip
    if phone.longest_context and phone.longest_context < most:
        parts.append(f"fits up to {phone.longest_context:,} of {most:,} positions")
    lines = ["; ".join(parts)] if parts else []
    if phone.measured:
        lines.append(_measured(phone.measured))
    lines += [f'<span class="fail">To make it fit:</span> {escape(advice)}' for advice in phone.advice]
    return "".join(f'<p class="said">{line}</p>' for line in lines)


def _measured(one: Lived) -> str:
    how = f"killed in the phase ‘{escape(one.died)}’" if one.died else ("lived" if one.fits else "read its weights from storage again and again")  # noqa: E501  # fmt: skip
    parts = [f"<b>Measured</b> at context {one.context:,}: {how}"]
    if one.peak_dirty is not None:
        off = "" if one.prediction_error is None else f" (forecast {'+' if one.prediction_error >= 0 else ''}{percent(one.prediction_error)})"  # noqa: E501  # fmt: skip
        parts.append(f"{_bytes(one.peak_dirty)} written at most{off}")
    where = " on ".join(escape(part) for part in (one.when[:10], one.machine) if part)
    return ", ".join(parts) + (f"; {where}" if where else "")


def speed(report: Report) -> str:
    """Tokens a second: measured on a machine, and what the bandwidth of phones leads to expect."""
    return section("speed", "Speed", _bench(report), _forecasts(report))


def _bench(report: Report) -> str:
    bench = report.bench
    shown = []
    rows = (
        ("decoding", "decode, tokens/s", 1.0, ""), ("prefill", "prefill, tokens/s", 1.0, ""),
        ("first_token", "time to first token", 1.0, "s"), ("load", "load", 1.0, "s"),
        ("peak", "peak resident", 1e-6, "MB"), ("limit_fraction", "of the memory bus", 100.0, "%"),
    )  # fmt: skip
    for name, words, factor, unit in rows:
        spread = mapping(bench.get(name))
        median, least, most = (number(spread.get(key)) for key in ("median", "least", "most"))
        if median is not None:
            span = "" if least is None or most is None else f"{short(least * factor)} to {short(most * factor)}"
            shown.append((words, f"{short(median * factor)} {unit}".strip(), span))
    if not shown:
        if report.kind not in RUNTIMES:
            return ""
        return missing("Its speed was not measured.", "nanokit", "bench", report.folder, "--record")
    facts = [text(bench.get(name)) for name in ("runtime", "machine", "date")]
    counts = [f"{whole(bench.get(name)):,} {words}" for name, words in (("threads", "threads"), ("prompt", "tokens of prompt"), ("decode", "decoded"), ("repeat", "processes")) if whole(bench.get(name))]  # noqa: E501  # fmt: skip
    about = f"<p>Measured, not on a phone: {escape('; '.join([*(fact for fact in facts if fact), ', '.join(counts)]))}. Medians, least to most.</p>"  # noqa: E501  # fmt: skip
    return about + key_figures(shown)


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
        return f"<p>No forecast for phones: a token reads {_bytes(read)}, too little for the memory bus to decide, and the published speeds that forecasts rest on are of models that read hundreds of megabytes.</p>"  # noqa: E501  # fmt: skip
    full = max(float(one["high"]) for one in speeds.values())
    rows = "".join(_speed(name, one, full) for name, one in sorted(speeds.items(), key=lambda item: -item[1]["likely"]))
    about = f"Forecast on phones: a token reads {_bytes(read)}, and the bus carries what published measurements of int4 models reached. Heat is not in it."  # noqa: E501  # fmt: skip
    return f'<h3>Forecast</h3><p>{about}</p><table class="numbers speeds"><thead><tr><th scope="col">phone</th><th scope="col">tokens/s</th><th scope="col" class="range">least to most</th><th scope="col">error</th></tr></thead><tbody>{rows}</tbody></table>'  # noqa: E501  # fmt: skip


def _speed(name: str, one: Mapping[str, Any], full: float) -> str:
    low, likely, high = (float(one[key]) for key in ("low", "likely", "high"))
    error = "unknown" if one["error"] is None else f"to {percent(float(one['error']), 0)}"
    rests = plural(int(one["measurements"]), "measurement")
    return (
        f'<tr><th scope="row">{escape(name)}</th><td>{short(likely, 2)}</td>'
        f'<td class="range">{range_bar(low, likely, high, full)}<small>{short(low, 2)} to {short(high, 2)}</small></td>'
        f"<td>{error}<small>{rests}</small></td></tr>"
    )
