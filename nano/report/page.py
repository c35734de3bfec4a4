"""The report as one HTML page: for a release meeting, a phone's screen and paper; no scripts, nothing loaded.

Everything that comes from a manifest is escaped. What is not known is said in a sentence, with the command that
measures it.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import PurePath
from shlex import join, quote
from typing import Any

from nano.folder import human_bytes
from nano.history import Step
from nano.page import html_page
from nano.report.accuracy import capabilities, divergence, flips, layers
from nano.report.facts import BUNDLES, label, text_files
from nano.report.parts import key_figures, missing, paragraph, percent, plural, section, short, stage_class, table
from nano.report.phones import memory, speed
from nano.report.style import STYLE
from nano.report.types import Report
from nano.untrusted import items, mapping, number, text, whole
from nano.version import __version__

GENERATOR = "nanokit report"
"""In the page's footer: by it an older page is known again."""
LINKS = {
    "capabilities": "Capabilities", "divergence": "Divergence", "flips": "Flips", "memory": "Memory", "speed": "Speed",
    "layers": "Layers", "exact": "Exactness", "provenance": "Provenance", "files": "Files",
}  # fmt: skip
PARITY = {
    "simulated": "int8 activations simulated", "float": "float activations",
    "floor": "the simulation against itself, moved by 10⁻⁷",
}  # fmt: skip
PACKAGES = {"executorch": "executorch", "onnx": "onnxruntime"}


def report_page(report: Report, made: str) -> str:
    """The whole page.

    Args:
        report: what it shows.
        made: when, as text.
    """
    sections = [
        capabilities(report), divergence(report), flips(report), memory(report), speed(report), layers(report),
        _exactness(report), _provenance(report), _files(report),
    ]  # fmt: skip
    there = {name: words for (name, words), part in zip(LINKS.items(), sections, strict=True) if part}
    links = " ".join(f'<a href="#{name}">{words}</a>' for name, words in there.items())
    head = [_lead(report), f'<nav aria-label="Sections">{links}</nav>', _warnings(report), _chain(report)]
    foot = f"<footer>{GENERATOR} {escape(__version__)}, {escape(made)}</footer>"
    html = html_page(report.title, [f"<style>{STYLE}</style>", *head, _figures(report), *sections, foot])
    return html.encode("utf-8", "replace").decode()  # half a surrogate pair is no text


def _lead(report: Report) -> str:
    """What and where it is, and its fingerprint."""
    own, package = report.own, PACKAGES.get(report.kind, "")
    version = text(own.versions.get(package))
    runtime = f" ({package} {version})" if version else ""
    said = [label(own) + runtime, own.created[:16].replace("T", " "), report.folder]
    about = " · ".join(escape(one) for one in said if one)
    return f'<p class="lead">{about}<br><code>{escape(report.fingerprint)}</code></p>'


def _warnings(report: Report) -> str:
    if not report.warnings:
        return ""
    listed = "".join(f"<li>{escape(words)}</li>" for words in report.warnings)
    heading = f'<h2 id="warnings-h">{plural(len(report.warnings), "warning")}</h2>'
    return f'<section class="warnings" aria-labelledby="warnings-h">{heading}<ul>{listed}</ul></section>'


def _chain(report: Report) -> str:
    """Teacher to artifact at a glance."""
    links = ""
    for step in report.steps:
        if step.ancestor.role != "teacher_cache":
            said = f"<b>{escape(label(step))}</b><small>{escape(_brief(step, report))}</small>"
            links += f'<li><div class="{_colour(step)}">{said}</div></li>'
    return f'<ol class="chain" aria-label="From the teacher to the artifact">{links}</ol>'


def _colour(step: Step) -> str:
    return stage_class(step.ancestor.kind or step.ancestor.role)


def _brief(step: Step, report: Report) -> str:
    """What distinguishes a step, in a few words."""
    parameters = whole(step.results.get("parameters"))
    if step is report.own:
        return human_bytes(report.bytes)
    if step.ancestor.role == "teacher" and report.teacher_parameters:
        return f"{report.teacher_parameters:,} parameters"
    if step.ancestor.kind == "student" and parameters:
        return f"{parameters:,} parameters"
    if step.ancestor.kind == "int4":
        bits = number(step.results.get("bits_per_weight"))
        method = text(step.recipe.get("ran") or step.recipe.get("method"))
        return ", ".join(part for part in (method, f"{bits:.2f} bits a weight" if bits else "") if part)
    return PurePath(step.ancestor.path).name


def _figures(report: Report) -> str:
    """The few numbers that people look for first."""
    shown = [("size", human_bytes(report.bytes), plural(len(report.files), "file"))]
    if report.parameters:
        of = report.teacher_parameters
        shown.append(("parameters", _count(report.parameters), f"{percent(report.parameters / of, 0)} of the teacher’s" if of else ""))  # noqa: E501  # fmt: skip
    if report.cards and report.cards[-1].kind == report.kind:
        scores = report.cards[-1].capabilities.values()
        shares = [one.of_teacher for one in scores if one.of_teacher is not None]
        values = shares or [one.score for one in scores]
        about = f"{'of the teacher, ' if shares else ''}mean of {len(values)}"
        shown.append(("capabilities", percent(sum(values) / len(values), 0), about))
    if report.divergences and report.divergences[-1].kind == report.kind:
        one = report.divergences[-1]
        worst = f"; 99 %: {short(one.figures['99.0% KLD'].value)}" if "99.0% KLD" in one.figures else ""
        shown.append(("mean KL", short(one.figures["Mean KLD"].value), f"to {one.reference}{worst}"))
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
    if report.kind not in BUNDLES:
        return ""
    codes, modules = whole(report.exact.get("codes")), whole(report.exact.get("modules"))
    if codes and modules and not items(report.exact.get("differing")):
        said = paragraph(
            f"Read back from the file when it was exported: {codes:,} codes and their scales in {modules:,} tensors "
            "equal the int4 checkpoint’s, bit for bit."
        )
    else:
        todo = f"nanokit verify {quote(report.folder)} --against INT4"
        said = missing("Whether it holds its checkpoint’s codes was not recorded.", todo)
    rows = [row for name, words in PARITY.items() if (row := _parity(words, mapping(report.parity.get(name))))]
    if rows:
        tokens = whole(report.parity.get("tokens"))
        caption = "Its runtime against the int4 model in torch" + (f", on {tokens:,} tokens" if tokens else "")
        said += f'<div class="wide">{table("numbers", ("", "same top", "logit error", "KL"), rows, caption)}</div>'
    else:
        int4 = next((step.ancestor.path for step in report.steps if step.ancestor.kind == "int4"), "INT4")
        todo = f"nanokit export {quote(int4)} --format {report.kind} --data TEXT --out BUNDLE"
        said += missing("Its runtime was not held against torch.", todo)
    return section("exact", "The artifact against its checkpoint", said)


def _parity(words: str, found: Mapping[str, Any]) -> tuple[str, ...]:
    top, error, kl = (number(found.get(name)) for name in ("top1", "logit_error", "kl"))
    if top is None or error is None or kl is None:
        return ()
    return words, percent(top, 2), percent(error, 2), short(kl, 2)


def _provenance(report: Report) -> str:
    """Every stage: what made it, when, with which versions, from which text."""
    about = (
        "From the teacher to this folder, as its manifest records it. Fingerprints are sha256 over the names and "
        "hashes of a folder’s files."
    )
    steps = "".join(
        f'<li class="{_colour(step)}"><h3>{escape(label(step))}</h3><dl>{_facts(step)}</dl></li>'
        for step in report.steps
    )
    return section("provenance", "Provenance", paragraph(about), f'<ol class="provenance">{steps}</ol>')


def _facts(step: Step) -> str:
    rows = {
        "fingerprint": f"<code>{escape(step.ancestor.fingerprint or 'not recorded')}</code>",
        "folder": escape(step.ancestor.path or "not recorded"),
        "made": escape(step.created),
    }
    if not step.ancestor.kind and not step.created:
        rows["made"] = "not by nanokit: the folder had no manifest.json"
    if step.command:
        rows["command"] = f'<span class="command"><code>{escape(join(step.command))}</code></span>'
    elif step.ancestor.kind:
        rows["command"] = "not recorded, and the folder is no longer where it was"
    files = [f"{escape(PurePath(path).name)} <code>{escape(sha256)}</code>" for path, sha256 in text_files(step.data)]
    if files:
        tokens = whole(step.data.get("tokens"))
        rows["text"] = "<br>".join([*([f"{tokens:,} tokens"] if tokens else []), *files])
    rows["versions"] = escape(", ".join(f"{text(name)} {text(version)}" for name, version in step.versions.items()))
    return "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in rows.items() if value)


def _files(report: Report) -> str:
    """What is in the folder, byte by byte accounted for."""
    wrong = {fault.file: fault for fault in report.faults}
    checked = f"All {len(report.files)} files had the recorded sha256 when this page was made."
    if wrong:
        checked = f"{plural(len(wrong), 'file')} of {len(report.files)} had not the recorded sha256 when this page was made."  # noqa: E501  # fmt: skip
    if not report.hashed:
        checked = "The sizes are as recorded; the hashes were not computed for this page." if not wrong else ""
    rows = []
    for name, (size, sha256) in report.files.items():
        fault = f' <span class="fail">{escape(wrong[name].problem)}</span>' if name in wrong else ""
        rows.append((escape(name) + fault, human_bytes(size), f"<code>{sha256}</code>"))
    return section("files", "Files", paragraph(checked), table("files", ("file", "size", "sha256"), rows))
