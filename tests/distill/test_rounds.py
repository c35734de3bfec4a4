"""Deep cuts in rounds: shapes on the way, what stays told in the teacher's numbers, and no work lost in between."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import same_bits, some_stories

from distill.cutting import Source, cut_model
from distill.data import batches, pack
from distill.options import DistillOptions
from distill.request import check_request
from distill.rounds import plan_rounds
from distill.run import run_distill, run_distill_many
from nano.checkpoint import Checkpoint
from nano.corpus import cut_windows
from nano.errors import RequestError
from nano.manifest import read_manifest
from nano.shapes import FULL, SLIDING, ModelShape, read_config
from nano.solve import can_be_cut, canonical_shape, solve_between, solve_student
from nano.tokens import load_tokenizer
from nano.torch_lm import load_float

QUICK = DistillOptions(steps=10, batch=4, length=64, eval_tokens=512, calibration_tokens=512, heal=0.4, rounds=2,
                       learning_rate=2e-3, save_every=1, curves=False)  # fmt: skip
DIMENSIONS = ("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads")


@pytest.fixture(scope="module")
def text(tinystories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return some_stories(tmp_path_factory.mktemp("text"), tinystories, 100)


@pytest.fixture(scope="module")
def whole(stories: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quarter of the teacher in two rounds, never interrupted."""
    out = tmp_path_factory.mktemp("rounds") / "whole"
    run_distill(stories, "65k", [text], out, QUICK)
    return out


def gemma(layers: int) -> ModelShape:
    return canonical_shape("nano-2").resized(
        hidden_size=3840, intermediate_size=15360, num_heads=16, num_kv_heads=8, num_layers=layers,
        layer_types=tuple(FULL if i % 6 == 5 else SLIDING for i in range(layers)),
    )  # fmt: skip


@pytest.mark.parametrize("size", ["nano-1", "nano-2", "900M"])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_a_shape_on_the_way_lies_between_its_ends(size: str, share: float) -> None:
    teacher = gemma(48)
    student = solve_student(teacher, size)
    wanted = round(student.num_parameters**share * teacher.num_parameters ** (1 - share))
    found = solve_between(teacher, student, wanted)
    assert found is not None
    assert abs(found.num_parameters / wanted - 1) < 0.005
    for name in DIMENSIONS:
        assert getattr(student, name) <= getattr(found, name) <= getattr(teacher, name)
    assert found.layer_types == teacher.layer_types[: found.num_layers]  # whole periods
    assert can_be_cut(teacher, found)
    assert can_be_cut(found, student)
    assert not can_be_cut(student, found)


def test_a_shape_keeps_to_the_students_width_where_its_count_would_be_less(stories: Path) -> None:
    teacher = ModelShape.from_hf(read_config(stories))
    student = solve_student(teacher, "100k")  # half the hidden width, all but twelve of the neurons
    found = solve_between(teacher, student, 163_000)
    assert found is not None
    assert found.intermediate_size >= student.intermediate_size
    assert student.num_parameters < found.num_parameters < teacher.num_parameters
    assert solve_between(student, student, 90_000) is None


def test_rounds_each_leave_about_half(stories: Path) -> None:
    teacher, options = gemma(48), DistillOptions(steps=1000, heal=0.3)
    for size, count in (("6B", 1), ("nano-2", 2), ("nano-1", 3), ("1B", 4)):
        plan = plan_rounds(teacher, solve_student(teacher, size), options)
        assert len(plan) == count
        counts = [teacher.num_parameters, *(each.shape.num_parameters for each in plan)]
        ratios = [after / before for before, after in pairwise(counts)]
        assert max(ratios) - min(ratios) < 0.01
        assert [each.last for each in plan[:-1]] == [each.first for each in plan[1:]]
        assert plan[-1].last == 1000
        assert sum(each.steps for each in plan[:-1]) == (300 if count > 1 else 0)
    assert DistillOptions().heal == 0.1  # measured: 0.3 is worse at equal steps
    few = replace(options, steps=40)  # 12 steps of healing are one round's, not three's
    assert len(plan_rounds(teacher, solve_student(teacher, "1B"), few)) == 2
    for other in (replace(options, steps=0), replace(options, start="random")):
        assert len(plan_rounds(teacher, solve_student(teacher, "nano-1"), other)) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [({"rounds": 9, "steps": 400}, "no shapes for so many rounds"), ({"rounds": 4, "steps": 5}, "too few steps")],
)
def test_rounds_that_cannot_be_made_are_refused(
    change: dict[str, Any], words: str, stories: Path, text: Path, tmp_path: Path
) -> None:
    with pytest.raises(RequestError, match=words):
        run_distill(stories, "65k", [text], tmp_path / "s", replace(QUICK, **change))
    with pytest.raises(RequestError, match="--rounds is out of range"):
        replace(QUICK, rounds=0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_what_stayed_is_told_in_the_teachers_numbers(family: str, tiny_model: Callable[..., Path]) -> None:
    """Two cuts without refit or training: linears are then rows and columns of the teacher's own."""
    kinds = {"layer_types": [SLIDING, SLIDING, FULL, FULL]} if family == "gemma3_text" else {}
    folder = tiny_model(family, num_hidden_layers=4, hidden_size=96, **kinds)
    config, tokenizer = read_config(folder), load_tokenizer(folder)
    teacher, options = ModelShape.from_hf(config), DistillOptions(refit=False)
    texts = ["The quick brown fox jumps over the lazy dog. " * 9, "Pack my box with five dozen liquor jugs! " * 9]
    calibration = list(batches(pack(cut_windows(texts, tokenizer, 64), 64), 8))
    with Checkpoint(folder) as checkpoint:
        original = {name: checkpoint.tensor(name) for name in checkpoint.names()}
    types = (teacher.layer_types[0], *teacher.layer_types[2:])
    wide = teacher.resized(hidden_size=80, intermediate_size=64, num_layers=3, layer_types=types)
    narrow = wide.resized(hidden_size=64, intermediate_size=32, num_layers=2, layer_types=types[:2], num_heads=2, num_kv_heads=1)  # noqa: E501  # fmt: skip
    first = cut_model(Source(load_float(folder), teacher, original.__getitem__), wide, config, calibration, options)
    weights = first.model.state_dict()
    source = Source(first.model, first.shape, weights.__getitem__, first.kept)
    second = cut_model(source, narrow, config, calibration, options)
    kept, made = second.kept, second.model.state_dict()
    assert second.record["num_layers"] == [3, 2]
    gone = [*first.record["dropped_layers"], *second.record["dropped_layers"]]
    assert sorted([*(entry["layer"] for entry in gone), *kept["layers"]]) == [0, 1, 2, 3]
    hidden, A = torch.tensor(kept["hidden_channels"]), teacher.head_dim
    for i, layer in enumerate(kept["layers"]):
        old, new = f"model.layers.{layer}.", f"model.layers.{i}."
        neurons = torch.tensor(kept["ffn_neurons"][i])
        assert torch.equal(made[f"{new}mlp.gate_proj.weight"], original[f"{old}mlp.gate_proj.weight"][neurons][:, hidden])  # noqa: E501  # fmt: skip
        assert torch.equal(made[f"{new}mlp.down_proj.weight"], original[f"{old}mlp.down_proj.weight"][hidden][:, neurons])  # noqa: E501  # fmt: skip
        queries = original[f"{old}self_attn.q_proj.weight"].view(-1, A, 96)[kept["query_heads"][i]].flatten(0, 1)
        assert torch.equal(made[f"{new}self_attn.q_proj.weight"], queries[:, hidden])
        ((group,),) = kept["kv_heads"][i]
        assert torch.equal(made[f"{new}self_attn.k_proj.weight"], original[f"{old}self_attn.k_proj.weight"].view(-1, A, 96)[group][:, hidden])  # noqa: E501  # fmt: skip


def test_the_manifest_says_what_each_round_cut_and_cost(whole: Path, stories: Path) -> None:
    results, teacher = read_manifest(whole).results, ModelShape.from_hf(read_config(stories))
    first, last = results["rounds"]
    assert (first["steps"], last["steps"]) == (4, 6)
    assert first["parameters"] == [teacher.num_parameters, last["parameters"][0]]
    assert last["parameters"] == [first["parameters"][1], results["parameters"]]
    assert first["held_out"]["before"] == results["held_out"]["teacher"]
    assert first["held_out"]["cut"] == results["held_out"]["start"]
    assert last["held_out"]["before"] == first["held_out"]["healed"]
    assert last["held_out"]["healed"] == results["held_out"]["trained"]
    for each in (first, last):
        before, cut, healed = (each["held_out"][when]["cross_entropy"] for when in ("before", "cut", "healed"))
        assert before < healed < cut
        assert all(gone["kl_without"] > 0 for gone in each["dropped_layers"])
    shape = ModelShape.from_hf(read_config(whole))
    kept = json.loads((whole / "cut.json").read_text())
    assert kept["layers"] == results["cut"]["layers"]
    assert sorted([*kept["layers"], *results["cut"]["dropped_layers"]]) == list(range(teacher.num_layers))
    assert len(kept["hidden_channels"]) == len(set(kept["hidden_channels"])) == shape.hidden_size
    assert [len(row) for row in kept["ffn_neurons"]] == [shape.intermediate_size] * shape.num_layers
    assert "hidden_channels" not in json.dumps(results)
    assert results["cut"]["lists"] in read_manifest(whole).files


def test_each_round_has_a_schedule_of_its_own(whole: Path) -> None:
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    results = read_manifest(whole).results
    assert [line["step"] for line in lines] == list(range(1, 11))
    first, last = (each["parameters"][1] for each in results["rounds"])
    assert [line["parameters"] for line in lines] == [first] * 4 + [last] * 6
    rates = [line["learning_rate"] for line in lines]
    assert max(rates[:4]) == rates[0] == QUICK.learning_rate
    assert max(rates[4:]) == rates[4] == QUICK.learning_rate
    assert rates[3] == rates[9] == 0


@pytest.mark.parametrize("step", [2, 4, 5, 8])
def test_a_run_stopped_in_or_between_rounds_ends_with_the_same_bits(
    step: int, whole: Path, stories: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 4 ends the first round; its figures are noted before its state is saved."""

    def stop(_state: Any, record: dict[str, Any]) -> None:
        if record["step"] == step:
            raise KeyboardInterrupt

    out = tmp_path / "s"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("distill.state.StateFolder.note", stop)
        run_distill(stories, "65k", [text], out, QUICK)
    manifest = run_distill(stories, "65k", [text], out, QUICK, resume=True)
    assert same_bits(whole, out)
    expected = read_manifest(whole).results
    assert manifest.results["rounds"] == expected["rounds"]
    assert (out / "cut.json").read_bytes() == (whole / "cut.json").read_bytes()


def test_a_run_stopped_while_it_is_cut_again_ends_with_the_same_bits(
    whole: Path, stories: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuts = []

    def stop(*arguments: Any) -> Any:
        cuts.append(arguments)
        if len(cuts) == 2:
            raise KeyboardInterrupt
        return cut_model(*arguments)

    options = replace(QUICK, save_every=0)  # the state at a round's end is kept whatever is asked
    out = tmp_path / "s"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("distill.work.cut_model", stop)
        run_distill(stories, "65k", [text], out, options)
    assert json.loads((out.with_name("s.checkpoint") / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 4
    run_distill(stories, "65k", [text], out, options, resume=True)
    assert same_bits(whole, out)
    assert (out / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


def test_students_of_different_rounds_share_a_pass(whole: Path, stories: Path, text: Path, tmp_path: Path) -> None:
    options = replace(QUICK, rounds="auto", heal=0.8)  # one round for the large one, two for the small one
    wanted: list[tuple[str | ModelShape, Path]] = [("150k", tmp_path / "a"), ("65k", tmp_path / "b")]
    large, small = run_distill_many(stories, wanted, [text], options)
    assert (len(large.results["rounds"]), len(small.results["rounds"])) == (1, 2)
    run_distill(stories, "65k", [text], tmp_path / "alone", options)
    assert same_bits(tmp_path / "b", tmp_path / "alone")


def test_layers_are_matched_through_all_rounds(stories: Path, text: Path, tmp_path: Path) -> None:
    options = replace(QUICK, match=0.5)
    run_distill(stories, "65k", [text], tmp_path / "s", options)
    lines = [json.loads(line) for line in (tmp_path / "s" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < line["match"] < 100 for line in lines)


def test_the_best_weights_are_those_of_the_last_shape(stories: Path, text: Path, tmp_path: Path) -> None:
    """A rate that ruins the last shape late: what is kept is of its own round, not of the larger model before."""
    options = replace(QUICK, keep="best", eval_every=1)
    manifest = run_distill(stories, "65k", [text], tmp_path / "s", options)
    assert manifest.results["kept_step"] > 4
    lines = [json.loads(line) for line in (tmp_path / "s" / "metrics.jsonl").read_text().splitlines()]
    assert lines[3]["held_out"]["kl"] == manifest.results["rounds"][0]["held_out"]["healed"]["kl"]
    check_request([text], [tmp_path / "t"], force=False, resume=False)
