"""What an export refuses before any work."""

from __future__ import annotations

from pathlib import Path

import pytest

from export.options import ExportOptions
from export.run import run_export
from nano.errors import RequestError


def test_a_bundle_never_replaces_what_it_is_made_from(tmp_path: Path) -> None:
    int4, text = tmp_path / "made" / "int4", tmp_path / "texts" / "held-out.txt"
    for path in (int4 / "config.json", text):
        path.parent.mkdir(parents=True)
        path.write_text("kept")
    for out in (int4, tmp_path / "made", text.parent):
        with pytest.raises(RequestError, match="replace what it is made from"):
            run_export(int4, "onnx", out, ExportOptions(context=64), data=[text], force=True)
    assert (int4 / "config.json").read_text() == text.read_text() == "kept"
