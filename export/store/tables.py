"""Artifacts as rows for people and as plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from export.store.select import Tagged
from nano.folder import human_bytes

if TYPE_CHECKING:
    from rich.table import Table


def human_count(count: int) -> str:
    """A number of parameters for people: '3.25 B'."""
    for scale, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= scale:
            return f"{count / scale:.3g} {letter}"
    return str(count) if count else "?"


def artifact_row(one: Tagged) -> dict[str, Any]:
    """An artifact as plain data."""
    return {
        "reference": str(one.reference),
        "name": one.reference.name,
        "tag": one.reference.tag,
        "digest": one.artifact.digest,
        "bytes": one.artifact.size,
        **asdict(one.artifact.facts),
    }


def artifact_lines(found: Sequence[Tagged]) -> list[str]:
    """Artifacts as aligned lines, a heading first. Plain text: laying out 1,000 rows with rich takes half a second."""
    rows = [("ARTIFACT", "MODEL", "FORMAT", "CONTEXT", "SIZE", "PASSED ON")]
    for one in found:
        facts = one.artifact.facts
        passed = ", ".join(sorted(name for name, verdict in facts.verdicts.items() if verdict.passed))
        rows.append(
            (
                str(one.reference),
                f"{facts.student}, {human_count(facts.parameters)}",
                facts.format,
                f"{facts.context:,}",
                human_bytes(one.artifact.size),
                passed or ("none" if facts.verdicts else "not measured"),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def inspection_tables(found: dict[str, Any]) -> list[Table]:
    """What `inspect_artifact` gave."""
    from rich.table import Table

    facts = found["facts"]
    about = Table(show_header=False, title=found["reference"].partition("@")[0], title_justify="left")
    about.add_column(no_wrap=True)
    about.add_column(overflow="fold")
    rows = [
        ("digest", found["digest"]),
        ("model", f"{facts.student}, {facts.family}, {human_count(facts.parameters)} parameters"),
        ("format", facts.runtime),
        ("context", f"{facts.context:,}"),
        ("quantized by", facts.method),
        ("size", human_bytes(found["bytes"])),
        ("created", facts.created),
        ("signatures", str(found["signatures"])),
    ]
    for name, verdict in sorted(facts.verdicts.items()):
        speed = (
            f", {verdict.tokens_per_second:.3g} tokens/s where it was measured"
            if verdict.passed and verdict.tokens_per_second
            else ""
        )
        wrote = f", {human_bytes(verdict.peak_bytes)} written at most" if verdict.peak_bytes else ""
        said = "passed" if verdict.passed else verdict.reason or "failed"
        rows.append((f"on {name}", f"{said} at context {verdict.context:,}{wrote}{speed}"))
    if facts.scorecard:
        rows.append(("scorecard", ", ".join(f"{name} {score:.1%}" for name, score in facts.scorecard.items())))
    for row in rows:
        about.add_row(*row)
    files = Table(box=None, pad_edge=False)
    files.add_column("file", overflow="fold")
    files.add_column("size", justify="right")
    files.add_column("digest")
    for file in found["files"]:
        files.add_row(file["path"], human_bytes(file["bytes"]), file["digest"][:19])
    return [about, files]
