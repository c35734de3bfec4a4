"""What plan, check and profiles print for people: tables that fit 80 columns, and a bar against the limit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from device_profiles.budget import Verdict
from device_profiles.footprint import runtime_constants
from device_profiles.gate import Checked
from device_profiles.measure import Measurement
from device_profiles.plan import Plan, multiplied
from device_profiles.profile import DeviceProfile, decimal_bytes
from device_profiles.speed import SpeedForecast

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

BAR_WIDTH = 26
WIDTH = 80
CAUSES = {
    "packed_weights": ("packed copy of the weights", "blue"),
    "kv_cache": ("KV cache", "magenta"),
    "arena": ("activations of a prefill chunk", "cyan"),
    "logits": ("logits", "cyan"),
    "tokenizer": ("tokenizer", "yellow"),
    "runtime": ("runtime", "yellow"),
    "mapped_weights": ("weights read in place (clean)", "green"),
}
"""Each cause in words, and its colour in the bar."""


def plan_tables(plan: Plan) -> list[RenderableType]:
    """The student's shape and size, its bytes, what training costs."""
    return [_shape_table(plan), _bytes_table(plan), _cost_table(plan)]


def verdict_tables(verdict: Verdict) -> list[RenderableType]:
    """Bytes by cause with a bar, the limits, and what to know and to do."""
    from rich.text import Text

    lines: list[RenderableType] = [_causes_table(verdict), _limits_table(verdict)]
    for note in verdict.notes:
        lines.append(Text(f"note: {note}", style="yellow"))
    if verdict.longest_context is not None:
        lines.append(Text(f"longest context that fits: {verdict.longest_context:,} positions"))
    if verdict.speed is not None:
        lines += _speed(verdict.speed)
    for advice in verdict.advice:
        lines.append(Text(f"to make it fit: {advice}"))
    return lines


def _speed(speed: SpeedForecast) -> list[RenderableType]:
    """Tokens a second, and what is known of the error."""
    from rich.text import Text

    span = "" if speed.low == speed.high else f", {speed.low:.3g} to {speed.high:.3g}"
    read = decimal_bytes(speed.bytes_per_token)
    share = f"{speed.efficiency[1]:.0%} of the memory's bandwidth"
    known = "error unknown" if speed.error is None else f"error up to {speed.error:.0%}"
    ran = "1 published speed" if speed.measurements == 1 else f"{speed.measurements} published speeds"
    return [
        Text(f"decoding: about {speed.likely:.3g} tokens/s{span}; each token reads {read}"),
        Text(f"  at {share}, from {ran}, {known}", style="dim"),
    ]


def checked_tables(checked: Checked) -> list[RenderableType]:
    """The forecast, what was measured, and the verdict of both."""
    lines = verdict_tables(checked.verdict)
    if checked.measured is not None:
        lines += measured_lines(checked.measured, checked.verdict.footprint.dirty)
    return [*lines, outcome(checked.verdict, checked.fits)]


def outcome(verdict: Verdict, fits: bool) -> RenderableType:
    """The last line: whether it fits."""
    from rich.text import Text

    name = verdict.profile.name
    return Text(f"It fits {name}.", style="bold green") if fits else Text(f"It does not fit {name}.", style="bold red")


def measured_lines(measured: Measurement, predicted: int) -> list[RenderableType]:
    """What happened under the cap: phase by phase, the peak beside the forecast, what paging costs.

    Args:
        measured: what was measured.
        predicted: bytes written that were forecast.
    """
    from rich.text import Text

    table = _table(f"Measured under {measured.cap}{_limits_of(measured)}")
    table.add_column("phase", no_wrap=True, min_width=22)
    for heading in ("time", "tokens/s", "written", "storage"):
        table.add_column(heading, justify="right", no_wrap=True)
    for phase in measured.phases:
        took = "[bold red]killed[/]" if phase.seconds is None else f"{phase.seconds:,.2f} s"
        rate = f"{phase.per_second:,.3g}" if phase.units > 1 or phase.name.startswith("decode") else ""
        written = decimal_bytes(max(phase.peak_anonymous - measured.base, 0))
        table.add_row(phase.name, took, rate, written, decimal_bytes(phase.bytes_read) if phase.bytes_read else "")
    sums = {key: decimal_bytes(value) for key, value in measured.samples.items()}
    lines: list[RenderableType] = [table]
    lines.append(Text("storage: bytes read from it; dropped: after the page cache was emptied", style="dim"))
    shown = {"RSS": "rss", "PSS": "pss", "clean": "clean", "dirty": "dirty"}
    most = ", ".join(f"{name} {sums[key]}" for name, key in shown.items())
    lines.append(Text(f"at most: {most}"))
    base = decimal_bytes(measured.base)
    lines.append(Text(f"of which Python and libraries took {base} before the bundle was opened"))
    if measured.phase("prefill") is not None:
        lines.append(Text(f"{measured.prefilled:,} of {measured.context:,} positions prefilled; all of the cache's memory taken"))  # noqa: E501  # fmt: skip
    if measured.died is None:
        error = predicted / measured.peak_dirty - 1
        peak = f"peak written {decimal_bytes(measured.peak_dirty)}, forecast {decimal_bytes(predicted)}"
        lines.append(Text(f"{peak} ({error:+.1%})", style="bold"))
    else:
        lines.append(Text(f"killed by {measured.killer}", style="bold red"))
    return lines


def _limits_of(measured: Measurement) -> str:
    parts = []
    if measured.limit is not None:
        parts.append(f"{decimal_bytes(measured.limit)} resident")
    if measured.dirty_limit is not None:
        parts.append(f"{decimal_bytes(measured.dirty_limit)} written")
    return f": {', '.join(parts)}" if parts else ""


def profiles_table(profiles: list[DeviceProfile]) -> Table:
    """One row a profile; "-" where nobody publishes it."""
    table = _table("Device profiles, and what one app may hold there, in GB")
    table.add_column("name", no_wrap=True)
    table.add_column("system", no_wrap=True)
    for heading in ("RAM", "written", "entitled", "resident", "GB/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for phone in profiles:
        facts = (phone.ram, phone.app_dirty_memory, phone.app_dirty_memory_entitled, phone.app_memory, phone.memory_bandwidth)  # noqa: E501  # fmt: skip
        table.add_row(
            phone.name, phone.os, *("-" if fact.number is None else f"{fact.number / 1e9:.3g}" for fact in facts)
        )
    table.caption = "written: heap, packed weights, KV cache; entitled: with iOS's increased-memory-limit; resident: in all; -: unknown"  # noqa: E501  # fmt: skip
    table.caption_justify = "left"
    return table


def profile_lines(profile: DeviceProfile) -> list[RenderableType]:
    """Every fact of one profile with its source, date and note."""
    from rich.padding import Padding
    from rich.text import Text

    lines: list[RenderableType] = [Text(f"{profile.name}: {profile.title}", style="bold")]
    if profile.composed_of:
        lines.append(Text(f"composed of: {'; '.join(profile.composed_of)}"))
    if profile.how:
        lines.append(Text(profile.how))
    for name, fact in profile.facts().items():
        style = "bold" if fact.known else "dim"
        lines += [Text(), Text.assemble((f"{name}: ", style), (str(fact), f"{style} green" if fact.known else style))]
        when = f" ({fact.date})" if fact.date else ""
        told = [fact.note, f"{fact.source}{when}" if fact.source else ""]
        lines += [Padding(Text(part, overflow="fold"), (0, 0, 0, 4)) for part in told if part]
    return lines


def _table(title: str) -> Table:
    from rich import box
    from rich.table import Table

    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, title_style="bold", width=WIDTH)


def _shape_table(plan: Plan) -> Table:
    shape, teacher = plan.shape, plan.teacher
    table = _table(f"{plan.target.name}: a {shape.family} of {shape.num_parameters:,} parameters")
    table.add_column("")
    table.add_column("student", justify="right")
    table.add_column("teacher" if teacher else "", justify="right")
    rows = {
        "layers": "num_layers", "hidden width": "hidden_size", "feed-forward width": "intermediate_size",
        "query heads": "num_heads", "key/value heads": "num_kv_heads", "head width": "head_dim",
        "vocabulary": "vocab_size", "positions": "max_positions",
    }  # fmt: skip
    for label, field in rows.items():
        theirs = f"{getattr(teacher, field):,}" if teacher else ""
        table.add_row(label, f"{getattr(shape, field):,}", theirs)
    if shape.sliding_window:
        sliding = sum(kind.startswith("sliding") for kind in shape.layer_types)
        table.add_row("sliding / full layers", f"{sliding} / {shape.num_layers - sliding} (window {shape.sliding_window})")  # noqa: E501  # fmt: skip
    table.add_section()
    for label, count in plan.counts.items():
        note = "tied to the embedding" if label == "head" and shape.tied else ""
        table.add_row(f"parameters: {label}", f"{count:,}", note)
    total = f"{teacher.num_parameters:,}" if teacher else ""
    table.add_row("parameters: all", f"{shape.num_parameters:,}", total, style="bold")
    table.add_row("off the size asked for", f"{plan.deviation:+.2%}")
    return table


def _bytes_table(plan: Plan) -> Table:
    files = plan.file_bytes()
    table = _table("Bytes at int4 (groups of 32, scales included)")
    table.add_column("")
    table.add_column("ExecuTorch", justify="right")
    table.add_column("ONNX Runtime", justify="right")
    labels = {
        "linears": "linears, int4", "norms": "norms, float32", "embedding_float": "embedding and head, float32",
        "embedding_8": "embedding and head, int8", "embedding_4": "embedding and head, int4",
    }  # fmt: skip
    for key, label in labels.items():
        table.add_row(label, *(decimal_bytes(files[runtime][key]) for runtime in ("executorch", "onnx")))
    totals = [sum(files[r][k] for k in ("linears", "norms", "embedding_4")) for r in ("executorch", "onnx")]
    table.add_row("file with the embedding at int4", *map(decimal_bytes, totals), style="bold")
    table.add_section()
    caches = plan.kv_bytes()
    for context in caches["onnx"]:
        both = (decimal_bytes(caches[runtime][context]) for runtime in ("executorch", "onnx"))
        table.add_row(f"KV cache at {context:,} positions, float32", *both)
    return table


def _cost_table(plan: Plan) -> Table:
    table = _table("Training cost: 6 N student" + (" + 2 N teacher" if plan.teacher else "") + " a token (Kaplan 2020)")
    table.add_column("")
    table.add_column("", justify="right")
    table.add_row("N student (linears and head)", f"{multiplied(plan.shape):,}")
    if plan.teacher:
        table.add_row("N teacher", f"{multiplied(plan.teacher):,}")
    table.add_row("FLOPs a token", f"{plan.flops_per_token:.3g}")
    table.add_row(f"FLOPs for {plan.tokens:,} tokens", f"{plan.flops_per_token * plan.tokens:.3g}")
    return table


def _causes_table(verdict: Verdict) -> Table:
    facts, footprint = verdict.facts, verdict.footprint
    error = runtime_constants(facts.runtime).error
    table = _table(f"Predicted memory, {facts.runtime}, context {verdict.context:,} (error up to {error:.1%})")
    table.add_column("cause", no_wrap=True)
    table.add_column("bytes", justify="right", no_wrap=True)
    table.add_column(f"of {decimal_bytes(_scale(verdict))}", width=BAR_WIDTH, no_wrap=True)
    for cause, count in footprint.by_cause().items():
        label, colour = CAUSES[cause]
        cells = count / _scale(verdict) * BAR_WIDTH
        bar = "█" * round(cells) or ("▏" if count else "")
        table.add_row(label, decimal_bytes(count), f"[{colour}]{bar}[/]")
    return table


def _scale(verdict: Verdict) -> int:
    """What a full bar stands for: the largest limit, or the footprint where that is more."""
    return max(verdict.footprint.resident, *(limit.allowed or 0 for limit in verdict.limits))


def _limits_table(verdict: Verdict) -> Table:
    table = _table(f"Against {verdict.profile.name}")
    table.add_column("memory")
    for heading in ("needed", "allowed", "left"):
        table.add_column(heading, justify="right", no_wrap=True)
    for limit in verdict.limits:
        if limit.allowed is None:
            table.add_row(limit.about, decimal_bytes(limit.needed), "unknown", "not checked")
            continue
        left = f"[{'green' if limit.fits else 'bold red'}]{decimal_bytes(limit.allowed - limit.needed)}[/]"
        table.add_row(limit.about, decimal_bytes(limit.needed), decimal_bytes(limit.allowed), left)
    return table
