"""The report: every number of the manifest is on the page, for any depth, and nothing else is loaded."""

from __future__ import annotations

import math
import random
import re
import struct
from pathlib import Path
from typing import Any

import pytest
from checks import Balanced

from nano.charts import heat, line_chart, log_ticks, percent
from nano.families import LAYER_LINEARS
from nano.manifest import Manifest
from quantize.picture import write_picture
from quantize.report import facts_of, page


def made_up(layers: int, *, budget: bool = True, trained: bool = True, method: str = "best") -> Manifest:
    pick = random.Random(layers)
    names = [f"model.layers.{layer}.{linear}" for layer in range(layers) for linear in LAYER_LINEARS]
    before = {name: 0.008 * math.exp(pick.gauss(0, 0.4)) for name in names}
    after = dict(before) if method == "rtn" else {name: 0.3 * value for name, value in before.items()}
    results: dict[str, Any] = {
        "relative_error": after, "rounding_error": before, "bits_per_weight": 5.49, "seconds": 84.2,
        "bits": {name: 8 if name.endswith("v_proj") else 4 for name in names},
        "padding": {"intermediate_size_from": 172, "intermediate_size_to": 192},
        "float_modules": ["model.embed_tokens"],
    }  # fmt: skip
    if trained:
        results.update(kl_before_training=0.0481, kl_after_training=0.0266)
    if budget:
        curve = [(4.5, 0.0896, 0.1051, False), (5.49, 0.0474, 0.0489, True), (8.2, 0.0004, 0.00044, False)]
        results["curve"] = [
            {"bits": b, "bytes": 168_000, "eight": 15, "predicted": p, "measured": m, "chosen": c}
            for b, p, m, c in curve
        ]
        results["budget"] = {"extra_bytes": 30_000, "why": "5.5 bits a weight & <scales>"}
        low = {name: 0.001 * math.exp(pick.gauss(0, 0.4)) for name in names}
        results["sensitivity"] = {"kind": "estimated", "low": low, "high": low, "tokens": 8192, "error": 0.125}
    return Manifest(
        kind="int4",
        inputs={"student": {"path": "/models/a<b>-student"}},
        recipe={"ran": method, "rules": [{"pattern": "model.*_proj", "bits": 4, "group_size": 32, "symmetric": True}]},
        data={"files": [{"path": "/d/text.jsonl", "sha256": "ab" * 32}], "seed": 7, "windows": 128, "tokens": 32768,
              "checked": {"bits_per_byte": 1.33, "surprise": 0.4, "warnings": ["the text is <short>"]}},
        results=results,
        shape={"num_layers": layers},
    )  # fmt: skip


@pytest.mark.parametrize("layers", [1, 5, 32])
@pytest.mark.parametrize("budget", [True, False])
def test_the_page_is_whole_and_says_every_number(layers: int, budget: bool) -> None:
    manifest = made_up(layers, budget=budget)
    html = page(facts_of(manifest, (1_060_000, 412_000)))
    parser = Balanced()
    parser.feed(html)
    assert parser.open == []
    assert parser.loads == []
    assert "http" not in html
    assert html.count("<svg") == 7 + budget
    assert len(re.findall(r"<tr><th>\d+</th><td[ >]", html)) == layers * (1 + budget)
    for value in manifest.results["relative_error"].values():
        assert f"{100 * value:.2f}" in html
    for fact in ("0.0266", "0.0481", "5.49", "ab" * 32, "32,768", "from 172 to 192", "--embedding", "402.3 KiB"):
        assert fact in html
    assert "a&lt;b&gt;-student" in html
    assert "the text is &lt;short&gt;" in html
    assert ("0.10510" in html and "5.5 bits a weight &amp; &lt;scales&gt;" in html) == budget


def test_rounding_alone_is_one_line_and_says_of_what(tmp_path: Path) -> None:
    html = page(facts_of(made_up(2, budget=False, trained=False, method="rtn"), (100, 50)))
    assert html.count("<polyline") == 7
    assert "linear's weights" in html.replace("&#x27;", "'")


def test_how_long_it_took_changes_no_byte() -> None:
    slow, fast = made_up(2), made_up(2)
    slow.results["seconds"] = 1e4  # type: ignore[index]
    assert page(facts_of(slow, (9, 9))) == page(facts_of(fast, (9, 9)))


def test_errors_of_zero_leave_no_curve_and_no_trouble(tmp_path: Path) -> None:
    manifest = made_up(3, budget=False)
    for table in ("relative_error", "rounding_error"):
        for name in list(manifest.results[table]):
            manifest.results[table][name] = 0.0
    drawn = page(facts_of(manifest, (1, 1)))
    assert "<svg" not in drawn
    assert "Calibration text" in drawn
    write_picture(tmp_path / "p.png", facts_of(manifest, (1, 1)))
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_the_picture_is_the_same_for_the_same_facts(tmp_path: Path) -> None:
    facts = facts_of(made_up(32), (1_060_000, 412_000))
    for name in ("a.png", "b.png"):
        write_picture(tmp_path / name, facts)
    data = (tmp_path / "a.png").read_bytes()
    assert struct.unpack(">II", data[16:24]) == (1800, 930)
    assert data == (tmp_path / "b.png").read_bytes()


def test_points_lie_where_their_values_are() -> None:
    svg = line_chart({"after": [(0, 0.1), (4, 10.0)]}, [(0, "0"), (4, "4")], [(0.1, "a"), (10.0, "b")], "x")
    (path,) = re.findall(r'points="([^"]+)"', svg)
    rules = [float(y) for y in re.findall(r'class="rule"[^>]* y1="([^"]+)"', svg)]
    assert path == f"40.0,{rules[0]} 175.0,{rules[1]}"
    assert rules[0] > rules[1]


@pytest.mark.parametrize(("low", "high"), [(0.004, 0.02), (3e-6, 0.4), (0.5, 0.5), (1e-9, 1.0), (1.0, 1.0)])
def test_ticks_hold_all_values_and_are_few(low: float, high: float) -> None:
    ticks = log_ticks(low, high)
    assert ticks[0] <= low * 1.001
    assert ticks[-1] >= high * 0.999
    assert ticks == sorted(ticks)
    assert 1 <= len(ticks) <= 6


def test_shades_and_percentages() -> None:
    assert [heat(v, 1.0, 100.0) for v in (1.0, 10.0, 100.0, 0.0)] == [4, 26, 48, 4]
    assert [percent(v).replace("\u00a0", " ") for v in (0.0, 0.00123, 0.25, 1e-7)] == [
        "0",
        "0.12 %",
        "25 %",
        "1.0e-05 %",
    ]
