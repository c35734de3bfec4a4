"""The parity report's edges: past the sliding window, at the last position of the context."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("executorch")

from export.options import ExportOptions
from export.parity import LONGEST_EDGE, _edge_positions
from export.run import run_export

TEXT = "Once upon a time there was a fox who lived by the river and liked to read. "


def test_edges_are_where_they_should_be() -> None:
    assert _edge_positions(64, 16) == {"window": 17, "context": 64}
    assert _edge_positions(64, None) == {"context": 64}
    assert _edge_positions(16, 16) == {"context": 16}, "a window as long as the context never slides"
    assert _edge_positions(LONGEST_EDGE + 1, 512) == {"window": 513}


def test_a_ring_is_right_at_both_edges(
    tiny_model: Callable[..., Path], int4_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """gemma: window 16, context 64, chunks of 8; transformers itself is the reference."""
    (tmp_path / "text.txt").write_text(TEXT * 4)
    int4 = int4_folder(tiny_model("gemma3_text"), embedding=True)
    options = ExportOptions(context=64, chunk=8)
    manifest = run_export(int4, "executorch", tmp_path / "bundle", options, data=[tmp_path / "text.txt"])
    edges = manifest.results["parity"]["edges"]
    assert {name: edge["position"] for name, edge in edges["simulated"].items()} == {"window": 16, "context": 63}
    for edge in edges["simulated"].values():
        assert edge["logit_error"] < 0.02
    for edge in edges["float"].values():
        assert 1e-4 < edge["logit_error"] < 0.05
