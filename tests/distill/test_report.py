"""The report: every figure of the manifest is on the page, nothing is loaded, and nothing differs from run to run."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
from checks import Balanced

from distill.picture import write_picture
from distill.report import POINTS, facts_of, page, thinned
from nano.manifest import Manifest


def figures(loss: float) -> dict[str, float]:
    return {"cross_entropy": loss, "perplexity": 2.0, "kl": loss - 1.5, "top1": 0.5}


def made_up(rounds: int, start: str = "pruned", steps: int = 40) -> tuple[Manifest, list[dict[str, Any]]]:
    """A manifest with so many rounds, and its metrics."""
    told, at = [], 1.5731
    for i in range(rounds):
        cut, healed = 4.0617 + i, 2.1009 + i / 8
        told.append({
            "parameters": [260_032 >> i, 130_016 >> i], "num_layers": [5 - i, 4 - i], "hidden_size": [64, 64],
            "num_heads": [8, 8], "num_kv_heads": [4, 4], "intermediate_size": [172 - 32 * i, 140 - 32 * i],
            "dropped_layers": [{"layer": 3 - i, "kl_without": None if i else 0.3141}], "steps": steps // rounds,
            "held_out": {"before": figures(at), "cut": figures(cut), "healed": figures(healed)},
        })  # fmt: skip
        at = healed
    first = told[0]["held_out"]["cut"] if told else figures(6.2)  # type: ignore[index]
    results = {
        "start": start, "parameters": 65_008, "teacher_parameters": 260_032, "steps": steps, "learning_rate": 6e-3,
        "held_out": {"tokens": 8190, "teacher": figures(1.5731), "start": first, "trained": figures(2.2345)},
        "rounds": told, "cut": {"lists": "cut.json"} if told else None, "train_seconds": 12.0,
    }  # fmt: skip
    manifest = Manifest(
        kind="student", inputs={"teacher": {"path": "/models/a<b>-teacher"}}, recipe={"kd": 0.8, "divergence": "jsd"},
        data={"files": [{"path": "/d/text.jsonl", "sha256": "ab" * 32}], "seed": 7, "tokens": 32768}, results=results,
    )  # fmt: skip
    return manifest, [{"step": i + 1, "ce": 3.0 - i / steps} for i in range(steps)]


@pytest.mark.parametrize(("rounds", "start"), [(1, "pruned"), (3, "pruned"), (0, "random"), (0, "given")])
def test_the_page_is_whole_and_says_every_figure(rounds: int, start: str) -> None:
    manifest, records = made_up(rounds, start)
    html = page(facts_of(manifest, records))
    parser = Balanced()
    parser.feed(html)
    assert parser.open == []
    assert parser.loads == []
    for fact in (
        "65,008",
        "25% of the teacher",
        "2.2345",
        "0.7345",
        "1.5731",
        "ab" * 32,
        "a&lt;b&gt;-teacher",
        "8,190",
    ):
        assert fact in html
    for each in manifest.results["rounds"]:
        for found in each["held_out"].values():
            assert f"{found['cross_entropy']:.4f}" in html
        assert f"{each['parameters'][0]:,} → <b>{each['parameters'][1]:,}</b>" in html
    assert ("0.3141" in html) == (rounds > 0)
    assert ("not measured" in html) == (rounds > 1)
    assert ("From scratch" in html) == (start == "random")
    assert ("weights of its own" in html) == (start == "given")


def test_every_cut_is_a_step_up_in_the_curve() -> None:
    manifest, records = made_up(3, steps=42)
    records[20]["held_out"] = {"cross_entropy": 2.5, "kl": 1.0}
    facts = facts_of(manifest, records)
    assert facts.measured == [
        (0, 4.0617), (14, 2.1009), (14, 5.0617), (21, 2.5), (28, 2.2259), (28, 6.0617), (42, 2.2345),
    ]  # fmt: skip
    assert facts.training[0] == (1, 3.0)


def test_long_curves_are_thinned_by_means() -> None:
    points = [(float(i), float(i % 2)) for i in range(4 * POINTS)]
    found = thinned(points)
    assert len(found) == POINTS
    assert found[0] == (1.5, 0.5)
    assert thinned([]) == []


def test_an_untrained_student_has_no_curve() -> None:
    manifest, _ = made_up(1, steps=0)
    assert "<svg" not in page(facts_of(manifest, []))


@pytest.mark.parametrize("rounds", [0, 2])
def test_the_picture_is_the_same_for_the_same_facts(rounds: int, tmp_path: Path) -> None:
    manifest, records = made_up(rounds, "pruned" if rounds else "random")
    slow = Manifest(**{**vars(manifest), "results": {**manifest.results, "train_seconds": 1e4}})
    for name, told in (("a.png", manifest), ("b.png", slow)):
        write_picture(tmp_path / name, facts_of(told, records))
    data = (tmp_path / "a.png").read_bytes()
    assert struct.unpack(">II", data[16:24]) == (1650, 630)
    assert data == (tmp_path / "b.png").read_bytes()
    assert page(facts_of(manifest, records)) == page(facts_of(slow, records))
