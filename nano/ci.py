"""What a gate tells a build server: JUnit XML, which every one of them reads, and GitHub's step summary.

JUnit XML has no standard; this writes what Jenkins, GitLab and GitHub's reporters agree on: a `testsuite` of
`testcase` elements, each with its time, a `failure` where the gate said no, and the figures as `properties`.
GitHub's summary is Markdown appended to the file that the environment variable GITHUB_STEP_SUMMARY names
(docs.github.com, "Workflow commands", adding a job summary).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

from nano.errors import RequestError
from nano.folder import write_text_atomically

STEP_SUMMARY = "GITHUB_STEP_SUMMARY"
_NO_XML = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that XML 1.0 does not allow, not even escaped."""


@dataclass(frozen=True)
class Case:
    """One thing that a gate judged.

    Attributes:
        name: what was judged, for instance "memory on low-end at context 4,096".
        failure: why it failed, every line of it; "" where it passed.
        seconds: how long the judging took.
        figures: numbers by name.
        output: what people may want to read besides.
    """

    name: str
    failure: str = ""
    seconds: float = 0.0
    figures: Mapping[str, object] = field(default_factory=dict)
    output: str = ""


def check_report(path: Path) -> None:
    """Refuse a file that could not be written, before any work is done.

    Raises:
        RequestError: it is a folder, or its folder is missing or closed.
    """
    parent = path.absolute().parent
    if path.is_dir() or not parent.is_dir() or not os.access(parent, os.W_OK):
        raise RequestError(
            "The report cannot be written there.",
            found=f"{path}: {'a folder' if path.is_dir() else f'no folder {parent} that can be written to'}",
            expected="a file in a folder that exists",
        )


def write_junit(path: Path, suite: str, cases: Sequence[Case]) -> None:
    """Write JUnit XML of one suite; what was there is replaced once the new file is whole.

    Args:
        path: the file.
        suite: what the cases have in common, for instance "nanokit check"; also their class.
        cases: in order.
    """
    failed = sum(bool(case.failure) for case in cases)
    counts = {"tests": str(len(cases)), "failures": str(failed), "errors": "0", "skipped": "0"}
    total = f"{sum(case.seconds for case in cases):.3f}"
    root = ElementTree.Element("testsuites", {**counts, "time": total})
    element = ElementTree.SubElement(root, "testsuite", {"name": _clean(suite), **counts, "time": total})
    for case in cases:
        _add_case(element, suite, case)
    ElementTree.indent(root)
    write_text_atomically(path, ElementTree.tostring(root, encoding="unicode", xml_declaration=False) + "\n")


def _add_case(suite: ElementTree.Element, classname: str, case: Case) -> None:
    names = {"classname": _clean(classname), "name": _clean(case.name), "time": f"{case.seconds:.3f}"}
    element = ElementTree.SubElement(suite, "testcase", names)
    if case.figures:
        properties = ElementTree.SubElement(element, "properties")
        for name, value in case.figures.items():
            ElementTree.SubElement(properties, "property", {"name": _clean(name), "value": _clean(str(value))})
    if case.failure:
        first = case.failure.splitlines()[0]
        failure = ElementTree.SubElement(element, "failure", {"message": _clean(first), "type": "gate"})
        failure.text = _clean(case.failure)
    if case.output:
        ElementTree.SubElement(element, "system-out").text = _clean(case.output)


def step_summary(markdown: str, path: Path | None = None) -> Path | None:
    """Append Markdown to a step summary.

    Args:
        markdown: the text.
        path: the file; None takes the one that $GITHUB_STEP_SUMMARY names.

    Returns:
        The file; None outside a GitHub step.
    """
    named = os.environ.get(STEP_SUMMARY)
    target = path or (Path(named) if named else None)
    if target is None:
        return None
    with target.open("a", encoding="utf-8") as stream:
        stream.write(markdown.rstrip() + "\n\n")
    return target


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; pipes and line breaks in cells are kept from breaking it."""
    lines = ["| " + " | ".join(headings) + " |", "|" + "|".join(" --- " for _ in headings) + "|"]
    for row in rows:
        cells = (str(cell).replace("|", "\\|").replace("\n", "<br>") for cell in row)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _clean(text: str) -> str:
    return _NO_XML.sub("�", text)
