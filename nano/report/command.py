"""`nanokit report`: one page about a stage's output, from its manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from nano.errors import RequestError

Negative = Parameter(negative="")


def report(
    folder: Path,
    /,
    *,
    out: Path | None = None,
    profile: Annotated[list[str] | None, Negative] = None,
    data: Annotated[list[Path] | None, Negative] = None,
    reference: str | None = None,
    tokens: int = 8192,
    sequence_length: int = 256,
    record: bool = True,
    hashes: bool = True,
    title: str = "",
    force: Annotated[bool, Negative] = False,
    json: Annotated[bool, Negative] = False,
) -> int:
    """Write a page about a bundle: where it comes from, what it still knows, what it needs on a phone.

    One HTML file without network: provenance, scorecards, divergence and its worst flips, memory and speed against
    every phone, each layer's quantization error. It is drawn from what is recorded; what is not says which command
    measures it.

    Parameters
    ----------
    folder
        A bundle, or another stage's output: int4 folder, student.
    out
        The page; MODEL-KIND-report.html in the current folder where not given. A page that this command wrote is
        replaced.
    profile
        Phone to hold it against: a name from `nanokit profiles`, or the path of a profile file; may be repeated. All
        that come with nanokit where not given.
    data
        Text to measure the divergence on before the page is written; may be repeated.
    reference
        What the divergence is measured from; the teacher that the history names, where it still lies there.
    tokens
        How many tokens of the text to predict, at most.
    sequence_length
        Longest window of the text.
    record
        Keep a divergence that was measured in the folder's manifest.
    hashes
        Compute every file's sha256 and compare it with the recorded one; without, sizes alone.
    title
        Heading of the page.
    force
        Replace a file at --out that is not such a page.
    json
        Print one JSON object with all that the page shows.
    """
    from nano.progress import emit_json, say
    from nano.report.run import check_page, default_page, run_report

    if reference is not None and not data:
        raise RequestError("--reference is for --data.", found=reference, todo="add --data TEXT")
    for name, value in (("tokens", tokens), ("sequence-length", sequence_length)):
        if value < 1:
            raise RequestError(f"--{name} must be at least 1.", found=str(value))
    page = out or default_page(folder)
    check_page(page, folder, force=force)
    divergence = None
    if data:
        divergence = _measure(folder, data, reference, tokens, sequence_length, record)
    made = run_report(
        folder, page, profiles=profile or (), title=title, divergence=divergence, hashed=hashes, force=force
    )
    if json:
        emit_json({"out": str(page), **made.as_dict()})
        return 0
    for warning in made.warnings:
        say(f"on the page: {warning}")
    say(f"wrote {page}: {page.stat().st_size / 1000:,.0f} kB")
    return 0


def _measure(
    folder: Path, data: list[Path], reference: str | None, tokens: int, sequence_length: int, record: bool
) -> dict[str, Any]:
    """Run the model and its reference over the text, and keep what was found in the model's manifest."""
    from nano.evaluate import EvaluateOptions
    from nano.hub import resolve_model
    from nano.manifest import add_results
    from nano.report.measure import measure_divergence
    from nano.report.run import check_writable, find_teacher

    if record:
        check_writable(folder)
    against = find_teacher(folder) if reference is None else resolve_model(reference)
    found = measure_divergence(folder, against, data, EvaluateOptions(tokens, sequence_length))
    if record:
        add_results(folder, {"divergence": found})
    return found
