"""The report as one HTML page: for a release meeting, a phone's screen and paper; no scripts, nothing loaded.

Everything that comes from a manifest is escaped. What is not known is said in a sentence, with the command that
measures it.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import PurePath
from typing import Any

from nano.folder import human_bytes
from nano.history import Step
from nano.page import html_page
from nano.report.accuracy import capabilities, divergence, flips, layers
from nano.report.facts import Report, label, text_files
from nano.report.parts import command_line, key_figures, missing, percent, plural, section, short, stage_class
from nano.report.phones import memory, speed
from nano.report.style import STYLE
from nano.untrusted import items, mapping, number, text, whole
from nano.version import __version__

GENERATOR = "nanokit report"
"""In the page's footer: by it an older page is known again."""


def report_page(report: Report, made: str) -> str:
    """The whole page.

    Args:
        report: what it shows.
        made: when, as text.
    """
    parts = [
        capabilities(report), divergence(report), flips(report), memory(report), speed(report), layers(report),
        _exactness(report), _provenance(report), _files(report),
    ]  # fmt: skip
    head = [f"<style>{STYLE}</style>", _lead(report), _warnings(report), _chain(report), _figures(report)]
    foot = f"<footer>{GENERATOR} {escape(__version__)}, {escape(made)}</footer>"
    return html_page(report.title, [*head, *(part for part in parts if part), foot])


def _lead(report: Report) -> str:
    own = report.own
    runtime = {"executorch": "executorch", "onnx": "onnxruntime"}.get(report.kind, "")
    version = text(own.versions.get(runtime))
    said = [
        f"{label(own)}{f' ({runtime} {version})' if version else ''}",
        own.created[:16].replace("T", " "),
        report.folder,
    ]
    about = " · ".join(escape(one) for one in said if one)
    links = [("capabilities", "Capabilities"), ("divergence", "Divergence"), ("flips", "Flips"), ("memory", "Memory"),
             ("speed", "Speed"), ("layers", "Layers"), ("exact", "Exactness"), ("provenance", "Provenance"),
             ("files", "Files")]  # fmt: skip
    missing_ones = {"flips"} if not report.divergences else set()
    missing_ones |= {"exact"} if report.kind not in ("executorch", "onnx") else set()
    nav = " ".join(f'<a href="#{name}">{words}</a>' for name, words in links if name not in missing_ones)
    return f'<p class="lead">{about}<br><code>{escape(report.fingerprint)}</code></p><nav aria-label="Sections">{nav}</nav>'


def _warnings(report: Report) -> str:
    if not report.warnings:
        return ""
    listed = "".join(f"<li>{escape(words)}</li>" for words in report.warnings)
    return f'<section class="warnings" aria-labelledby="warnings-h"><h2 id="warnings-h">{plural(len(report.warnings), "warning")}</h2><ul>{listed}</ul></section>'  # noqa: E501  # fmt: skip


def _chain(report: Report) -> str:
    """Teacher to artifact at a glance."""
    links = "".join(
        f'<li><div class="{_colour(step)}"><b>{escape(label(step))}</b><small>{escape(_brief(step, report))}</small></div></li>'
        for step in report.steps
        if step.ancestor.role != "teacher_cache"
    )
    return f'<ol class="chain" aria-label="From the teacher to the artifact">{links}</ol>'


def _colour(step: Step) -> str:
    return stage_class(step.ancestor.kind if step.ancestor.kind else ("" if step.ancestor.role == "teacher" else step.ancestor.role))  # noqa: E501  # fmt: skip


def _brief(step: Step, report: Report) -> str:
    if step is report.own:
        return human_bytes(report.bytes)
    if step.ancestor.role == "teacher" and report.teacher_parameters:
        return f"{report.teacher_parameters:,} parameters"
    if step.ancestor.kind == "student" and whole(step.results.get("parameters")):
        return f"{whole(step.results.get('parameters')):,} parameters"
    if step.ancestor.kind == "int4":
        bits, method = number(step.results.get("bits_per_weight")), text(step.recipe.get("ran") or step.recipe.get("method"))  # noqa: E501  # fmt: skip
        return ", ".join(part for part in (method, f"{bits:.2f} bits a weight" if bits else "") if part)
    return PurePath(step.ancestor.path).name


def _figures(report: Report) -> str:
    """The few numbers that people look for first."""
    shown = [("size", human_bytes(report.bytes), plural(len(report.files), "file"))]
    if report.parameters:
        share = f"{percent(report.parameters / report.teacher_parameters, 0)} of the teacher’s" if report.teacher_parameters else ""  # noqa: E501  # fmt: skip
        shown.append(("parameters", _count(report.parameters), share))
    if report.cards and report.cards[-1].stage == label(report.own):
        scores = report.cards[-1].capabilities.values()
        shares = [one.of_teacher for one in scores if one.of_teacher is not None]
        mean = sum(shares) / len(shares) if shares else sum(one.score for one in scores) / len(scores)
        shown.append(("capabilities", percent(mean, 0), f"{'of the teacher, ' if shares else ''}mean of {len(scores)}"))
    if report.divergences and report.divergences[-1].stage == label(report.own):
        one = report.divergences[-1]
        worst = one.figures.get("99.0% KLD")
        shown.append(("mean KL", short(one.figures["Mean KLD"].value), f"to {one.reference}" + (f"; 99 %: {short(worst.value)}" if worst else "")))  # noqa: E501  # fmt: skip
        if same := one.figures.get("Same top p"):
            shown.append(("same top token", percent(same.value), f"on {one.tokens:,} tokens"))
    if report.phones and report.phones.phones:
        fit = sum(phone.fits for phone in report.phones.phones)
        shown.append(("fits", f"{fit} of {len(report.phones.phones)}", f"phones, at context {report.phones.context:,}"))
    decoding = number(mapping(report.bench.get("decoding")).get("median"))
    if decoding is not None:
        shown.append(("decode, tokens/s", short(decoding), "on the measuring machine"))
    return key_figures(shown)


def _count(parameters: int) -> str:
    """'1.80 B', '517 k'."""
    unit, scale = next(((u, s) for u, s in (("B", 1e9), ("M", 1e6), ("k", 1e3)) if parameters >= s), ("", 1))
    return f"{parameters / scale:.3g} {unit}".strip()


def _exactness(report: Report) -> str:
    """A bundle against its checkpoint and against torch."""
    if report.kind not in ("executorch", "onnx"):
        return ""
    heading = "The artifact against its checkpoint"
    codes, modules = whole(report.exact.get("codes")), whole(report.exact.get("modules"))
    said = missing("Whether it holds its checkpoint’s codes was not recorded.", "nanokit", "verify", report.folder, "--against", "INT4")  # noqa: E501  # fmt: skip
    if codes and modules and not items(report.exact.get("differing")):
        said = f"<p>Read back from the file when it was exported: {codes:,} codes and their scales in {modules:,} tensors equal the int4 checkpoint’s, bit for bit.</p>"  # noqa: E501  # fmt: skip
    rows = [row for name, words in _PARITY if (row := _parity_row(words, mapping(report.parity.get(name))))]
    if not rows:
        int4 = next((step for step in report.steps if step.ancestor.kind == "int4"), None)
        where = int4.ancestor.path if int4 else "INT4"
        todo = missing("Its runtime was not held against torch.", "nanokit", "export", where, "--format", report.kind, "--data", "TEXT", "--out", "BUNDLE")  # noqa: E501  # fmt: skip
        return section("exact", heading, said, todo)
    tokens = whole(report.parity.get("tokens"))
    on = f", on {tokens:,} tokens" if tokens else ""
    head = "".join(f'<th scope="col">{words}</th>' for words in ("same top", "logit error", "KL"))
    table = f'<div class="wide"><table class="numbers"><caption>Its runtime against the int4 model in torch{on}</caption><thead><tr><th></th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'  # noqa: E501  # fmt: skip
    return section("exact", heading, said, table)


_PARITY = (
    ("simulated", "int8 activations simulated"), ("float", "float activations"),
    ("floor", "the simulation against itself, moved by 10⁻⁷"),
)  # fmt: skip


def _parity_row(words: str, found: Mapping[str, Any]) -> str:
    top, error, kl = (number(found.get(name)) for name in ("top1", "logit_error", "kl"))
    if top is None or error is None or kl is None:
        return ""
    return f'<tr><th scope="row">{words}</th><td>{percent(top, 2)}</td><td>{percent(error, 2)}</td><td>{short(kl, 2)}</td></tr>'  # noqa: E501  # fmt: skip


def _provenance(report: Report) -> str:
    """Every stage: what made it, when, with which versions, from which text."""
    about = "From the teacher to this folder, as its manifest records it. Fingerprints are sha256 over the names and hashes of a folder’s files."  # noqa: E501  # fmt: skip
    steps = "".join(
        f'<li class="{_colour(step)}"><h3>{escape(label(step))}</h3><dl>{_facts(step)}</dl></li>'
        for step in report.steps
    )
    return section("provenance", "Provenance", f'<p>{about}</p><ol class="provenance">{steps}</ol>')


def _facts(step: Step) -> str:
    rows = [("fingerprint", f"<code>{escape(step.ancestor.fingerprint or 'not recorded')}</code>"),
            ("folder", escape(step.ancestor.path or "not recorded"))]  # fmt: skip
    if not step.ancestor.kind and not step.created:
        rows.append(("made by", "not nanokit: the folder had no manifest.json"))
    if step.created:
        rows.append(("made", escape(step.created)))
    if step.command:
        rows.append(("command", f'<span class="command"><code>{escape(command_line(step.command))}</code></span>'))
    elif step.ancestor.kind:
        rows.append(("command", "not recorded, and the folder is no longer where it was"))
    files = [f"{escape(PurePath(path).name)} <code>{escape(sha256)}</code>" for path, sha256 in text_files(step.data)]
    if files:
        tokens = whole(step.data.get("tokens"))
        rows.append(("text", "<br>".join([f"{tokens:,} tokens" if tokens else "", *files]).removeprefix("<br>")))
    versions = ", ".join(f"{text(name)} {text(version)}" for name, version in step.versions.items())
    if versions:
        rows.append(("versions", escape(versions)))
    return "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in rows)


def _files(report: Report) -> str:
    """What is in the folder, byte by byte accounted for."""
    wrong = {fault.file: fault for fault in report.faults}
    checked = f"All {len(report.files)} files had the recorded sha256 when this page was made." if not wrong else ""
    rows = []
    for name, (size, sha256) in report.files.items():
        fault = f' <span class="fail">{escape(wrong[name].problem)}</span>' if name in wrong else ""
        rows.append(f'<tr><th scope="row">{escape(name)}{fault}</th><td>{human_bytes(size)}</td><td><code>{sha256}</code></td></tr>')  # noqa: E501  # fmt: skip
    head = "".join(f'<th scope="col">{words}</th>' for words in ("file", "size", "sha256"))
    table = f'<table class="files"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    return section("files", "Files", f"<p>{checked}</p>" if checked else "", table)
