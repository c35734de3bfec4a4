"""The quantization report: what each linear lost, in a page and a picture that lie in the int4 folder.

`report.html` is one file without scripts or network, for light and dark, narrow and wide. `report.png` is the same
curves for a README or a chat. Both are drawn from the manifest's facts alone, and from none that differ from run to
run (times): equal runs give equal folders.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from nano.charts import cell, heat, line_chart, log_ticks, number, percent
from nano.families import LAYER_LINEARS, layer_prefix
from nano.folder import human_bytes
from nano.manifest import Manifest
from nano.page import html_page
from quantize.options import STEPS

PAGE, PICTURE = "report.html", "report.png"


@dataclass(frozen=True)
class Facts:
    """What is drawn.

    Attributes:
        title: the student's name.
        layers: how many.
        method: what ran.
        before, after: relative squared output error by module, rounded to nearest and as solved.
        sensitivity: KL by module alone at 4 bits; empty where it was not measured.
        bits: by module on the grid.
        sizes: bytes of the float weights and of this folder's.
        results, recipe, data: as in the manifest.
    """

    title: str
    layers: int
    method: str
    before: Mapping[str, float]
    after: Mapping[str, float]
    sensitivity: Mapping[str, float]
    bits: Mapping[str, int]
    sizes: tuple[int, int]
    results: Mapping[str, Any]
    recipe: Mapping[str, Any]
    data: Mapping[str, Any]

    @property
    def solver(self) -> str:
        """What the errors of single linears are of: methods that train measure them before they do."""
        return "gptq, before training" if self.method in STEPS else self.method


def facts_of(manifest: Manifest, sizes: tuple[int, int]) -> Facts:
    """The facts of a manifest of kind int4.

    Args:
        manifest: complete but for its files.
        sizes: bytes of the float weights, and of the weights as written.
    """
    results, recipe = manifest.results, manifest.recipe
    return Facts(
        title=Path(str(manifest.inputs["student"]["path"])).name,
        layers=int(manifest.shape["num_layers"]),
        method=str(recipe.get("ran") or recipe.get("method")),
        before=results["rounding_error"],
        after=results["relative_error"],
        sensitivity=results.get("sensitivity", {}).get("low", {}),
        bits=results.get("bits", {}),
        sizes=sizes,
        results=results,
        recipe=recipe,
        data=manifest.data,
    )


def write_report(folder: Path, manifest: Manifest, source: Path) -> None:
    """Draw report.html and report.png into the output folder.

    Args:
        folder: where the weights were written.
        manifest: complete but for its files.
        source: the float student's folder.
    """
    from quantize.picture import write_picture

    facts = facts_of(manifest, (weight_bytes(source), weight_bytes(folder)))
    (folder / PAGE).write_text(page(facts), encoding="utf-8")
    write_picture(folder / PICTURE, facts)


def weight_bytes(folder: Path) -> int:
    """Bytes of a model folder's safetensors files."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def of_linear(facts: Facts, values: Mapping[str, float], linear: str) -> list[tuple[float, float]]:
    """(layer, value) of one kind of linear, where there is one."""
    names = ((layer, layer_prefix(layer) + linear) for layer in range(facts.layers))
    return [(layer, values[name]) for layer, name in names if name in values]


def page(facts: Facts) -> str:
    """The whole HTML page."""
    parts = [_figures(facts), _errors(facts)]
    if facts.sensitivity:
        parts += [_sensitivity(facts)]
    parts += [_grids(facts), _calibration(facts)]
    return html_page(f"{facts.title} in int4", parts)


def _figures(facts: Facts) -> str:
    """The few numbers that people look for first."""
    before, after = (sum(v.values()) / max(len(v), 1) for v in (facts.before, facts.after))
    was, now = facts.sizes
    shown = [("method", facts.method, ""), ("weights on disk", human_bytes(now), f"from {human_bytes(was)}")]
    mean = facts.results.get("bits_per_weight")
    if mean:
        shown.append(("bits a weight", f"{mean:.2f}", "decoder linears, scales included"))
    if facts.before and before != after:
        shown.append(("mean relative error", percent(after), f"rounded to nearest {percent(before)}"))
    else:
        shown.append(("mean relative error", percent(after), "of the weights"))
    if "kl_after_training" in facts.results:
        was_kl, kl = facts.results["kl_before_training"], facts.results["kl_after_training"]
        shown.append(("KL to the float model", f"{kl:.4f}", f"nats a token; {was_kl:.4f} before training"))
    cells = (f"<div><dt>{escape(a)}</dt><dd>{escape(b)}<small>{escape(c)}</small></dd></div>" for a, b, c in shown)
    return f'<dl class="figures">{"".join(cells)}</dl>'


def _errors(facts: Facts) -> str:
    panels = error_panels(facts)
    table = _table(facts, facts.after, 100, "percent")
    return panels and f"<section><h2>Relative error, layer by layer</h2>{panels}{table}</section>"


def error_panels(facts: Facts) -> str:
    """A curve over the layers for each kind of linear, with what it shows in words; "" where no error is above zero."""
    solved = dict(facts.before) != dict(facts.after)
    values = [v for v in (*facts.before.values(), *facts.after.values()) if v > 0]
    if not values:
        return ""
    y_ticks = [(tick, percent(tick)) for tick in log_ticks(min(values), max(values))]
    y_ticks = y_ticks if len(y_ticks) > 1 else [(y_ticks[0][0] / 10, percent(y_ticks[0][0] / 10)), *y_ticks]
    last = facts.layers - 1
    x_ticks = [(x, str(x)) for x in sorted({0, last // 2, last})]
    panels = []
    for linear in LAYER_LINEARS:
        lines = {"after": of_linear(facts, facts.after, linear)}
        if solved:
            lines = {"before": of_linear(facts, facts.before, linear), **lines}
        chart = line_chart(lines, x_ticks, y_ticks, f"relative error of {linear} by layer")
        panels.append(f"<figure><figcaption>{linear.split('.')[1]}</figcaption>{chart}</figure>")
    legend = [("after", facts.solver if solved else "rounded to nearest")]
    legend = [("before", "rounded to nearest"), *legend] if solved else legend
    keys = "".join(f'<span class="key {name}">{escape(text)}</span>' for name, text in legend)
    about = (
        "Squared error of a linear's output on the calibration text, as a share of its squared output."
        if solved
        else "Squared error of a linear's weights, as a share of their squared size."
    )
    return (
        f"<p>{about} Horizontal: layer. Vertical: logarithmic, the same in every panel.</p>"
        f'<p class="legend">{keys}</p><div class="panels">{"".join(panels)}</div>'
    )


def _table(facts: Facts, values: Mapping[str, float], factor: float, unit: str) -> str:
    """A row a layer, a column a linear, `factor` times the value in `unit`, shaded; 8-bit linears are marked."""
    positive = [v for v in values.values() if v > 0] or [1.0]
    low, high = min(positive), max(positive)
    head = "".join(f"<th>{linear.split('.')[1].removesuffix('_proj')}</th>" for linear in LAYER_LINEARS)
    rows = []
    for layer in range(facts.layers):
        cells = []
        for linear in LAYER_LINEARS:
            name = layer_prefix(layer) + linear
            if name not in values:
                cells.append('<td class="none">float</td>' if name not in facts.bits else "<td></td>")
                continue
            mark = "<b>8</b>" if facts.bits.get(name) == 8 else ""
            shown = escape(cell(factor * values[name]))
            cells.append(f'<td style="--heat:{heat(values[name], low, high)}%">{shown}{mark}</td>')
        rows.append(f"<tr><th>{layer}</th>{''.join(cells)}</tr>")
    eight = "; <b>8</b> marks linears at 8 bits" if 8 in facts.bits.values() else ""
    return (
        f'<div class="wide"><table class="heat"><caption>Each linear, {unit}{eight}</caption>'
        f"<thead><tr><th>layer</th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _sensitivity(facts: Facts) -> str:
    """What each linear costs alone at 4 bits, and what a budget buys."""
    found = facts.results["sensitivity"]
    how = "measured on the whole model" if found["kind"] == "measured" else "estimated to second order, layer by layer"
    error = f", standard error {found['error']:.0%}" if found["error"] else ""
    about = (
        f"KL divergence from the float model that a linear causes when it alone is rounded to 4 bits, {how}, on "
        f"{found['tokens']:,} calibration tokens{error}."
    )
    table = _table(facts, facts.sensitivity, 1000, "millinats a token")
    return f"<section><h2>Sensitivity to 4 bits</h2><p>{about}</p>{_curve(facts)}{table}</section>"


def _curve(facts: Facts) -> str:
    points = facts.results.get("curve") or []
    if len(points) < 2:
        return ""
    values = [v for p in points for v in (p["predicted"], p["measured"]) if v]
    y_ticks = [(tick, number(tick)) for tick in log_ticks(min(values), max(values))]
    low, high = points[0]["bits"], points[-1]["bits"]
    x_ticks = [(low, f"{low:.1f}"), ((low + high) / 2, f"{(low + high) / 2:.1f}"), (high, f"{high:.1f} bits")]
    measured = [(p["bits"], p["measured"]) for p in points if p["measured"] is not None]
    lines = {"after": measured} if measured else {}
    lines["before"] = [(p["bits"], p["predicted"]) for p in points]
    chosen = [(p["bits"], p["measured"] or p["predicted"]) for p in points if p["chosen"]]
    chart = line_chart(lines, x_ticks, y_ticks, "KL by bits a weight", {"chosen": chosen})
    keys = '<span class="key before">sum of each alone</span>'
    keys += '<span class="key after">all together, measured</span>' if measured else ""
    keys += f'<span class="key chosen">chosen: {escape(str(facts.results["budget"]["why"]))}</span>'
    rows = "".join(
        f"<tr{' class=chosen' if p['chosen'] else ''}><td>{p['bits']:.2f}</td><td>{human_bytes(p['bytes'])}</td>"
        f"<td>{p['eight']}</td><td>{p['predicted']:.5f}</td>"
        f"<td>{'–' if p['measured'] is None else format(p['measured'], '.5f')}</td></tr>"
        for p in points
    )
    head = "".join(f"<th>{t}</th>" for t in ("bits a weight", "linears", "at 8 bits", "predicted", "measured"))
    return (
        f"<p>KL, rounded to nearest, by the mean bits a weight of the decoder linears when those that gain most get "
        f'8 bits.</p><p class="legend">{keys}</p><div class="curve"><figure>{chart}</figure><div class="wide">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div></div>"
    )


def _grids(facts: Facts) -> str:
    """The recipe, what stayed float and why, padding."""
    rows = "".join(
        f"<tr><td><code>{escape(str(rule['pattern']))}</code></td><td>{escape(str(rule['bits'] or 'float'))}</td>"
        f"<td>{escape(str(rule['group_size'] or 'channel'))}</td>"
        f"<td>{'symmetric' if rule.get('symmetric', True) else 'asymmetric'}</td></tr>"
        for rule in facts.recipe.get("rules", ())
    )
    head = "".join(f"<th>{t}</th>" for t in ("modules", "bits", "group", "grid"))
    notes = []
    for name in facts.results.get("float_modules", ()):
        why = _why_float(name, facts.recipe)
        notes.append(f"<li><code>{escape(name)}</code> stays float: {escape(why)}.</li>")
    padding = facts.results.get("padding")
    if padding:
        before, after = padding["intermediate_size_from"], padding["intermediate_size_to"]
        notes.append(
            f"<li>The feed-forward width is padded from {before:,} to {after:,} with zero neurons (exact).</li>"
        )
    if split := facts.results.get("neurons_split"):
        notes.append(f"<li>{split:,} neurons that add nothing hold halves of the weightiest instead (exact).</li>")
    if facts.results.get("channels_sorted"):
        notes.append(
            "<li>Channels are sorted so that like weights share a scale (exact): rows and columns are in another order "
            "than the float model's, whose adapters do not fit.</li>"
        )
    return (
        f'<section><h2>Grids</h2><p>The first rule that matches a module decides.</p><div class="wide"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div><ul>{''.join(notes)}</ul></section>"
    )


def _why_float(name: str, recipe: Mapping[str, Any]) -> str:
    import re

    for rule in recipe.get("rules", ()):
        if re.fullmatch(rule["pattern"], name):
            return "its rule says so"
    if name == "model.embed_tokens":
        return "no rule speaks of it (--embedding int4 or int8 puts it on a grid)"
    return "no rule speaks of it" + (" (--head int4 or int8 puts it on a grid)" if name == "lm_head" else "")


def _calibration(facts: Facts) -> str:
    data = facts.data
    if not data.get("files"):
        return "<section><h2>Calibration text</h2><p>None was read: weights were rounded to nearest.</p></section>"
    rows = [("seed", data.get("seed")), ("windows", data.get("windows")), ("tokens", f"{data.get('tokens', 0):,}")]
    training = data.get("training")
    if training:
        rows.append(("training", f"{training['steps']:,} steps on {training['windows']:,} windows"))
    checked = data.get("checked") or {}
    for key, label in (("bits_per_byte", "bits a byte, float model"), ("surprise", "surprise beyond its expectation, nats a token")):  # noqa: E501  # fmt: skip
        if key in checked:
            rows.append((label, f"{checked[key]:.2f}"))
    lines = "".join(f"<tr><th>{escape(label)}</th><td>{escape(str(value))}</td></tr>" for label, value in rows)
    files = "".join(
        f"<li>{escape(Path(str(entry['path'])).name)}<br><code>sha256 {escape(str(entry['sha256']))}</code></li>"
        for entry in data["files"]
    )
    warned = "".join(f"<li>{escape(words)}</li>" for words in checked.get("warnings", ()))
    return (
        f'<section><h2>Calibration text</h2><table class="facts"><tbody>{lines}</tbody></table><ul>{files}</ul>'
        + (f'<ul class="warned">{warned}</ul>' if warned else "")
        + "</section>"
    )
