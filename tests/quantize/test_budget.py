"""What a bits budget or a phone buys: sensitivity measured and estimated, the knapsack, the rules, the forecast."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from device_profiles.budget import judge
from device_profiles.footprint import PlannedRecipe, planned_facts
from device_profiles.profile import load_profile
from nano.corpus import read_documents, sample_windows
from nano.errors import CheckFailedError, RequestError
from nano.shapes import ModelShape, read_config
from nano.solve import canonical_shape
from nano.tokens import load_tokenizer
from nano.torch_lm import load_float
from quantize import sensitivity
from quantize.budget import choose, eight_bit_grids, eight_bit_rules, extra_bytes, find_room, linear_bits, phone_facts
from quantize.fisher import estimate_kl
from quantize.options import QuantizeOptions
from quantize.recipe import Grid, QuantRecipe, default_recipe
from quantize.rtn import round_to_nearest
from quantize.run import run_quantize
from quantize.sensitivity import cut_short, measure_mixes, measure_sensitivity
from quantize.student import Student

RECIPE = default_recipe(QuantizeOptions())


def story_windows(stories: Path, tinystories: Path, tmp_path: Path, count: int) -> list[torch.Tensor]:
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(tinystories.read_text(encoding="utf-8").splitlines()[:80]))
    windows = sample_windows(read_documents([text]), load_tokenizer(stories), 64, count, 0)
    return [torch.from_numpy(window) for window in windows.ids]


def test_the_estimate_is_the_divergence_that_is_measured(stories: Path, tinystories: Path, tmp_path: Path) -> None:
    windows = story_windows(stories, tinystories, tmp_path, 64)
    names = [f"model.layers.{layer}.{linear}" for layer in (0, 4) for linear in ("mlp.up_proj", "self_attn.v_proj")]
    with Student(stories, 32) as student:
        pairs = {name: (Grid(4, 32), Grid(8, 192 if "down" in name else 64)) for name in names}
        estimated = estimate_kl(student, {n: sensitivity._changes(pair) for n, pair in pairs.items()}, windows)
        model = load_float(stories)
        ids = torch.stack([window for window in windows if len(window) == 64])
        assert len(ids) == len(windows)
        with torch.no_grad():
            wanted = model(input_ids=ids).logits.log_softmax(-1)
            for name in names:
                linear = model.get_submodule(name)
                kept = linear.weight.data
                rounded = round_to_nearest(student.tensor(name + ".weight").float(), Grid(4, 32)).dequantize()
                linear.weight.data = rounded[: kept.shape[0], : kept.shape[1]]
                given = model(input_ids=ids).logits.log_softmax(-1)
                linear.weight.data = kept
                measured = float((wanted.exp() * (wanted - given)).sum(-1).mean())
                assert estimated[name][0] == pytest.approx(measured, rel=0.5), name  # its standard error is 18%
                assert estimated[name][1] < 0.02 * estimated[name][0]


def test_the_sum_of_each_alone_foretells_the_mix(
    stories: Path, tinystories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sensitivity, "MEASURED_TOKENS", 1024)
    windows = story_windows(stories, tinystories, tmp_path, 32)
    with Student(stories, 32) as student:
        grids = RECIPE.grids(student.shape)
        eight, cost = eight_bit_grids(student.shape, grids), extra_bytes(student.shape, grids)
        found = measure_sensitivity(student, {name: (grids[name], eight[name]) for name in cost}, windows)
        assert found.kind == "measured"
        gain = {name: found.low[name] - found.high[name] for name in cost}
        room = sum(cost.values()) // 4
        best, worst = choose(gain, cost, room), choose({name: 1 / gain[name] for name in cost}, cost, room)
        mixes = [{**grids, **{name: eight[name] for name in chosen}} for chosen in (best, worst)]
        measured = measure_mixes(student, mixes, windows)
    assert measured is not None
    for kl, chosen in zip(measured, (best, worst), strict=True):
        predicted = sum(found.high[name] if name in chosen else found.low[name] for name in cost)
        assert kl == pytest.approx(predicted, rel=0.25)
    assert measured[0] < 0.8 * measured[1]


def test_the_choice_is_the_best_of_all_subsets() -> None:
    pick = random.Random(3)
    for _ in range(20):
        gain = {str(i): pick.random() for i in range(9)}
        cost = {str(i): pick.choice((6, 10, 40)) * 32 for i in range(9)}
        room = pick.randrange(0, sum(cost.values()) + 64)
        chosen = choose(gain, cost, room)
        subsets = (s for r in range(10) for s in itertools.combinations(gain, r) if sum(cost[n] for n in s) <= room)
        assert sum(cost[name] for name in chosen) <= room
        assert sum(gain[name] for name in chosen) == pytest.approx(max(sum(gain[n] for n in s) for s in subsets))


def test_a_large_model_s_room_is_never_overrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantize.budget.MOST_UNITS", 50)
    cost = {str(i): 1000 + 7 * i for i in range(40)}
    gain = {name: 1.0 + int(name) / 100 for name in cost}
    chosen = choose(gain, cost, 20_000)
    assert 15_000 < sum(cost[name] for name in chosen) <= 20_000


def test_rules_name_just_the_chosen_linears(stories: Path) -> None:
    shape = ModelShape.from_hf(read_config(stories)).resized(intermediate_size=192)
    chosen = ["model.layers.1.mlp.down_proj", "model.layers.4.mlp.down_proj", "model.layers.0.self_attn.q_proj"]
    grids = QuantRecipe((*eight_bit_rules(chosen), *RECIPE.rules)).grids(shape)
    assert {name for name, grid in grids.items() if grid.bits == 8} == set(chosen)
    assert grids["model.layers.1.mlp.down_proj"] == Grid(8, 192)
    assert grids["model.layers.10.mlp.down_proj" if shape.num_layers > 10 else "model.layers.0.mlp.up_proj"].bits == 4


def test_bits_are_counted_with_their_scales(stories: Path) -> None:
    shape = ModelShape.from_hf(read_config(stories)).resized(intermediate_size=192)
    grids = RECIPE.grids(shape)
    bits, weights = linear_bits(shape, grids)
    assert bits / weights == 4 + 16 / 32
    every = {**grids, **eight_bit_grids(shape, grids)}
    assert linear_bits(shape, every)[0] - bits == 8 * sum(extra_bytes(shape, grids).values())
    room = find_room(shape, grids, QuantizeOptions(bits_budget=5.25), 0)
    assert room is not None
    assert room.extra_bytes == round(0.75 * weights / 8)
    assert find_room(shape, grids, QuantizeOptions(), 0) is None


def test_the_phone_s_forecast_is_that_of_plan_and_check() -> None:
    shape = canonical_shape("nano-1")
    grids = RECIPE.grids(shape)
    ours = phone_facts(shape, grids, "executorch", 2048, 0)
    plan = planned_facts(shape, PlannedRecipe("executorch", embedding="float", context=2048))
    assert ours == replace(plan, packed_source_bytes=ours.packed_source_bytes)
    assert ours.packed_source_bytes == pytest.approx(plan.packed_source_bytes, rel=1e-6)
    eight = {**grids, **eight_bit_grids(shape, grids)}
    grown = phone_facts(shape, eight, "executorch", 2048, 0).packed_source_bytes / ours.packed_source_bytes
    assert grown == pytest.approx(8 / 4.5, rel=2e-3)  # one scale a row is next to nothing


def test_the_phone_s_room_is_what_just_fits() -> None:
    shape = canonical_shape("nano-1")
    grids = default_recipe(QuantizeOptions(embedding="int4")).grids(shape)
    cost, profile = extra_bytes(shape, grids), load_profile("low-end")
    room = find_room(shape, grids, QuantizeOptions(profile="low-end", context=1024), 0)
    assert room is not None
    assert 0 < room.extra_bytes < sum(cost.values())
    for share, fits in ((1.0, True), (1.02, False)):
        verdicts = []
        for runtime in ("executorch", "onnx"):
            facts = phone_facts(shape, grids, runtime, 1024, 0)  # type: ignore[arg-type]
            more = facts.packed_source_bytes + round(share * room.extra_bytes)
            verdicts.append(judge(replace(facts, packed_source_bytes=more), profile, 1024).fits)
        assert all(verdicts) == fits


def test_what_cannot_be_met_is_said_before_any_work(tmp_path: Path) -> None:
    shape = canonical_shape("nano-2")
    grids = RECIPE.grids(shape)
    with pytest.raises(RequestError, match=r"4\.2(.|\n)*4\.5 or more bits"):
        find_room(shape, grids, QuantizeOptions(bits_budget=4.2), 0)
    with pytest.raises(CheckFailedError, match=r"does not fit low-end(.|\n)*GB"):
        find_room(shape, grids, QuantizeOptions(profile="low-end"), 0)
    with pytest.raises(RequestError, match="no such device profile"):
        find_room(shape, grids, QuantizeOptions(profile="pixel-9000"), 0)
    with pytest.raises(RequestError, match="runtime"):
        find_room(shape, grids, QuantizeOptions(profile="high-end", runtime="torch"), 0)
    with pytest.raises(RequestError, match="cannot both"):
        QuantizeOptions(bits_budget=5, profile="low-end")


def test_short_pieces_come_from_all_windows_alike() -> None:
    windows = [torch.arange(i * 1000, i * 1000 + 300) for i in range(3)]
    pieces = cut_short(windows, 256, 64)
    assert [int(piece[0]) for piece in pieces] == [0, 1000, 2000, 64]
    assert all(len(piece) == 64 for piece in pieces)


def test_the_command_writes_rules_curve_and_report(
    tiny_model: Callable[..., Path], tmp_path: Path, nanokit: Callable[..., Any]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The fox jumps over the dog, and the dog sleeps for some hours after that. " * 60)
    out, model = tmp_path / "out", tiny_model("qwen3")
    common = ("--data", text, "--samples", 8, "--length", 48, "--out", out)
    done = nanokit("quantize", model, *common, "--method", "rtn", "--bits-budget", 6, "--json")
    assert done.status == 0, done.stderr
    result = json.loads(done.stdout)
    chosen = [point for point in result["curve"] if point["chosen"]]
    assert len(chosen) == 1
    assert 5.5 < chosen[0]["bits"] <= 6
    assert chosen[0]["bits"] == pytest.approx(result["bits_per_weight"])
    assert sum(bits == 8 for bits in result["bits"].values()) == chosen[0]["eight"] > 0
    assert "KL predicted" in done.stderr
    assert all(len(line) <= 80 for line in done.stderr.splitlines() if line[:1] in "┏┃┡│└")
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["recipe"]["rules"][0]["bits"] == 8
    assert {"report.html", "report.png"} <= set(manifest["files"])
    assert "Sensitivity to 4 bits" in (out / "report.html").read_text()
    with pytest.raises(RequestError, match=r"expected: 4\.5 or more"):
        run_quantize(model, [text], out, QuantizeOptions(bits_budget=3), force=True)
    with pytest.raises(RequestError, match=r"--bits-budget needs calibration text.*\n.*--data.*\n.*give --data$"):
        run_quantize(model, [], tmp_path / "other", QuantizeOptions("rtn", bits_budget=6))
