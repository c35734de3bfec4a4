"""Reports for build servers: XML that a parser reads back, and Markdown that is appended."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from nano.ci import Case, check_report, markdown_table, step_summary, write_junit
from nano.errors import RequestError


def test_junit_is_read_back(tmp_path: Path) -> None:
    cases = [
        Case("passes", seconds=1.25, figures={"peak": 17}),
        Case("fails <&> \x00", failure="too much\n  found: 3 GB", seconds=2, output="a note"),
    ]
    path = tmp_path / "report.xml"
    write_junit(path, "a gate", cases)
    root = ElementTree.parse(path).getroot()
    assert (root.get("tests"), root.get("failures"), root.get("time")) == ("2", "1", "3.250")
    (suite,) = root
    good, bad = suite
    assert [case.get("classname") for case in suite] == ["a gate", "a gate"]
    assert good.find("failure") is None
    prop = good.find("properties/property")
    assert prop is not None
    assert (prop.get("name"), prop.get("value")) == ("peak", "17")
    assert bad.get("name") == "fails <&> �", "what XML cannot hold is replaced"
    failure = bad.find("failure")
    assert failure is not None
    assert failure.get("message") == "too much"
    assert "3 GB" in (failure.text or "")
    assert bad.findtext("system-out") == "a note"


def test_the_summary_goes_where_github_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    assert step_summary("nobody reads this") is None
    target = tmp_path / "summary.md"
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(target))
    assert step_summary("# one\n\n\n") == target
    step_summary("two")
    assert target.read_text() == "# one\n\ntwo\n\n", "steps before this one are kept"
    assert step_summary("x", tmp_path / "own.md") == tmp_path / "own.md"


def test_cells_cannot_break_a_table() -> None:
    table = markdown_table(("a", "b"), [("x|y", "two\nlines")])
    assert table.splitlines() == ["| a | b |", "| --- | --- |", "| x\\|y | two<br>lines |"]


def test_a_place_that_cannot_be_written_is_refused_first(tmp_path: Path) -> None:
    check_report(tmp_path / "new.xml")
    for path in (tmp_path, tmp_path / "no" / "such.xml"):
        with pytest.raises(RequestError, match="cannot be written"):
            check_report(path)
