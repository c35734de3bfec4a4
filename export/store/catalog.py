"""The catalogue: one static page of a store's artifacts, for those who choose one for a phone.

A card an artifact: which phones it passed on when measured, its capabilities, size and speed, and the line that pulls
it. Search and filters are a few lines of script in the page; their state is in the address (#q=onnx&phone=pixel-8), so
a view can be sent to somebody. Without script every artifact is shown. Nothing is loaded from anywhere.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path

from export.store.catalog_page import SCRIPT, STYLE
from export.store.facts import Facts, Verdict
from export.store.manage import list_artifacts, list_store
from export.store.reference import default_store, parse_reference
from export.store.select import Tagged
from export.store.tables import artifact_row, human_count
from nano.folder import check_output, human_bytes, staged_folder
from nano.page import html_page


def write_catalog(
    source: str | None, out: Path, *, title: str = "Model artifacts", plain_http: bool = False, force: bool = False
) -> int:
    """Write index.html and artifacts.json.

    Args:
        source: a layout folder, names in a registry with commas between, or None for the default store.
        out: the folder to make.
        title: the page's heading.
        plain_http: see `open_store`.
        force: replace `out`.

    Returns:
        How many artifacts there are.

    Raises:
        NotFoundError, RequestError, BadFileError: the source is none of these.
    """
    check_output(out, force=force, made_from=[Path(source)] if source and Path(source).exists() else ())
    found = gather(source, plain_http=plain_http)
    with staged_folder(out, force=force) as folder:
        (folder / "index.html").write_text(catalog_page(found, title), encoding="utf-8")
        rows = [artifact_row(one) for one in found]
        (folder / "artifacts.json").write_text(json.dumps({"artifacts": rows}, indent=1) + "\n", encoding="utf-8")
    return len(found)


def gather(source: str | None, *, plain_http: bool = False) -> list[Tagged]:
    """Artifacts of a layout folder, or of names in registries, newest first."""
    if source is None or Path(source).is_dir():
        found = list_store(Path(source) if source else default_store())
    else:
        names = [name.strip() for name in source.split(",")]
        found = [one for name in names for one in list_artifacts(parse_reference(name), plain_http=plain_http)]
    return sorted(found, key=lambda one: one.artifact.facts.created, reverse=True)


def catalog_page(found: Sequence[Tagged], title: str) -> str:
    """The page."""
    parts = [f"<style>{STYLE}</style>"]
    if not found:
        return html_page(title, [*parts, "<p>Nothing has been pushed here yet. <code>nanokit push BUNDLE NAME:TAG</code></p>"])  # noqa: E501  # fmt: skip
    phones = sorted({name for one in found for name in one.artifact.facts.verdicts})
    formats = sorted({one.artifact.facts.format for one in found if one.artifact.facts.format})
    parts.append(_controls(len(found), phones, formats))
    parts.append(f'<ul class="cards" id="cards">{"".join(_card(one) for one in found)}</ul>')
    parts.append('<p id="none" hidden>No artifact matches. <button type="button" id="clear">Show all</button></p>')
    parts.append("<p><small>Phones: verdicts that <code>nanokit check --measure</code> recorded, under that phone's memory limits. <a href=\"artifacts.json\">artifacts.json</a></small></p>")  # noqa: E501  # fmt: skip
    parts.append(f"<script>{SCRIPT}</script>")
    return html_page(title, parts)


def _controls(count: int, phones: Sequence[str], formats: Sequence[str]) -> str:
    def options(values: Sequence[str], every: str) -> str:
        rest = "".join(f'<option value="{escape(v)}">{escape(v)}</option>' for v in values)
        return f'<option value="">{every}</option>{rest}'

    return (
        '<form class="controls" id="controls" hidden role="search">'
        '<label>Search<input type="search" id="q" placeholder="name, model, tag" autocomplete="off"></label>'
        f'<label>Passed on<select id="phone">{options(phones, "any phone")}</select></label>'
        f'<label>Format<select id="format">{options(formats, "any format")}</select></label>'
        '<label>Order<select id="sort"><option value="">newest first</option>'
        '<option value="size">smallest first</option><option value="score">best scorecard first</option>'
        '<option value="name">by name</option></select></label>'
        f'<output id="count">{count} artifacts</output></form>'
    )


def _card(one: Tagged) -> str:
    facts, reference = one.artifact.facts, str(one.reference)
    passed = " ".join(name for name, verdict in facts.verdicts.items() if verdict.passed)
    words = " ".join((reference, facts.student, facts.family, facts.runtime, facts.method)).lower()
    data = {
        "words": words, "format": facts.format, "passed": passed, "size": one.artifact.size, "name": reference,
        "created": facts.created, "score": "" if facts.score is None else f"{facts.score:.4f}",
    }  # fmt: skip
    attributes = "".join(f' data-{key}="{escape(str(value))}"' for key, value in data.items())
    return (
        f'<li class="card"{attributes}><h2>{escape(reference)}</h2><p class="about">{_about(one)}</p>'
        f"{_phones(facts)}{_ladder(facts)}"
        f'<div class="pull"><code>{escape(pull_line(one))}</code><button type="button" class="copy">Copy</button></div>'
        f'<p class="digest"><small><code>{escape(one.artifact.digest)}</code></small></p></li>'
    )


def _about(one: Tagged) -> str:
    facts = one.artifact.facts
    parts = [
        f"{facts.student or 'unnamed'}, {human_count(facts.parameters)} parameters",
        facts.runtime,
        f"context {facts.context:,}" if facts.context else "",
        human_bytes(one.artifact.size),
        facts.created[:10],
    ]
    return " · ".join(escape(part) for part in parts if part)


def _phones(facts: Facts) -> str:
    if not facts.verdicts:
        return '<p class="unmeasured">Not measured on any phone profile.</p>'
    order = sorted(facts.verdicts.items(), key=lambda item: (not item[1].passed, item[0]))
    return f'<ul class="phones">{"".join(_phone(name, verdict) for name, verdict in order)}</ul>'


def _phone(name: str, verdict: Verdict) -> str:
    figures = [f"context {verdict.context:,}" if verdict.context else ""]
    if verdict.passed and verdict.tokens_per_second:
        figures.append(f"{verdict.tokens_per_second:.3g} tokens/s on the measuring machine")
    if verdict.peak_bytes:
        figures.append(f"{human_bytes(verdict.peak_bytes)} written")
    said = ", ".join(figure for figure in figures if figure)
    mark, how = ("✓", "passed") if verdict.passed else ("✗", verdict.reason or "failed")
    return (
        f'<li class="{"pass" if verdict.passed else "fail"}">'
        f'<b><span aria-hidden="true">{mark}</span> {escape(name)}</b>'
        f"<small>{escape(how)}{', ' + escape(said) if said else ''}</small></li>"
    )


def _ladder(facts: Facts) -> str:
    """Capability by capability, as bars."""
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        f'<td class="bar"><i style="width:{100 * min(max(score, 0.0), 1.0):.1f}%"></i></td><td>{score:.0%}</td></tr>'
        for name, score in facts.scorecard.items()
    )
    return f'<table class="ladder"><tbody>{rows}</tbody></table>' if rows else ""


def pull_line(one: Tagged) -> str:
    """The command that pulls an artifact."""
    folder = one.reference.folder
    store = "" if folder is None or folder == default_store() else f" --store {folder}"
    return f"nanokit pull {one.reference}{store}"
