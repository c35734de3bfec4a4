"""What a step can also be: one teacher's pass for two students, the student's own words, matched layers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checks import metrics, same_bits, some_stories, weights

from distill.data import NO_TARGET, Rows, make_batch
from distill.match import Matcher, spread, states_and_layers
from distill.onpolicy import continued, prompt_length, sample, split_step
from distill.options import DistillOptions
from distill.run import run_distill, run_distill_many
from distill.teacher import LiveTeacher
from nano.cli import run as cli
from nano.corpus import cut_windows, read_documents
from nano.errors import RequestError
from nano.shapes import ModelShape, read_config
from nano.tokens import load_tokenizer
from nano.torch_lm import load_float

QUICK = DistillOptions(steps=6, batch=4, length=64, eval_tokens=512, calibration_tokens=512, save_every=2)


@pytest.fixture(scope="module")
def text(tinystories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return some_stories(tmp_path_factory.mktemp("text"), tinystories, 120)


def interrupted_at(step: int, monkeypatch: pytest.MonkeyPatch, go: Any) -> None:
    """Run `go` and stop it while the first student's step is noted."""
    from distill.state import StateFolder

    real = StateFolder.note

    def note(state: StateFolder, record: dict[str, Any]) -> None:
        real(state, record)
        if record["step"] == step:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(StateFolder, "note", note)
        go()


def test_two_students_in_one_pass_are_those_made_alone(
    stories: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    real = LiveTeacher.answers

    def answers(teacher: LiveTeacher, batch: Any) -> Any:
        asked.append(batch.target_N.numel())
        return real(teacher, batch)

    monkeypatch.setattr(LiveTeacher, "answers", answers)
    both = [("150k", tmp_path / "a"), ("100k", tmp_path / "b")]
    interrupted_at(5, monkeypatch, lambda: run_distill_many(stories, both, [text], QUICK))
    assert len(asked) == 5  # one answer a step serves both
    (tmp_path / "a.checkpoint" / "state.safetensors").unlink()  # as if killed between two saves: a begins anew
    made = run_distill_many(stories, both, [text], QUICK, resume=True)
    for (size, out), manifest in zip(both, made, strict=True):
        run_distill(stories, size, [text], tmp_path / f"alone-{size}", QUICK)
        assert same_bits(out, tmp_path / f"alone-{size}")
        assert metrics(out) == metrics(tmp_path / f"alone-{size}")
        assert manifest.results["train_tokens"] == metrics(out)[-1]["tokens"]
    assert made[0].shape != made[1].shape
    assert not list(tmp_path.glob("*.checkpoint"))


def test_every_student_needs_an_output(stories: Path, text: Path, tmp_path: Path, capsys: Any) -> None:
    given = ["distill", "--teacher", stories, "--data", text, "--student", "150k", "--student", "100k"]
    assert cli([str(w) for w in [*given, "--out", tmp_path / "a"]]) == 2
    assert "2 --student, 1 --out" in capsys.readouterr().err
    assert cli([str(w) for w in [*given, "--out", tmp_path / "a", "--out", tmp_path / "a"]]) == 2
    assert "one folder" in capsys.readouterr().err


def test_on_policy_runs_resume_bit_for_bit(
    stories: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(QUICK, on_policy=0.5, divergence="jsd", micro_batch=1)
    run_distill(stories, "150k", [text], tmp_path / "whole", options)
    again = lambda resume: run_distill(stories, "150k", [text], tmp_path / "cut", options, resume=resume)  # noqa: E731
    interrupted_at(4, monkeypatch, lambda: again(False))
    again(True)
    assert same_bits(tmp_path / "whole", tmp_path / "cut")
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "cut")
    own = [line["own_tokens"] for line in metrics(tmp_path / "whole")]
    assert all(0 < tokens <= 2 * 64 for tokens in own)
    run_distill(stories, "150k", [text], tmp_path / "text-only", replace(options, on_policy=0.0))
    assert not same_bits(tmp_path / "whole", tmp_path / "text-only")


def rows_of(stories: Path, text: Path, count: int) -> Rows:
    windows = cut_windows(read_documents([text]), load_tokenizer(stories), 48).ids
    full = [window for window in windows if len(window) == 48][:count]
    return Rows(np.stack(full).astype(np.int32), np.zeros((count, 48), np.int32))


def test_continuations_are_those_of_a_loop_without_a_cache(stories: Path, text: Path) -> None:
    """Every id drawn again from the whole sequence's logits, and nothing after an end."""
    model, rows = load_float(stories).eval(), rows_of(stories, text, 4)
    order = np.array([0, 2, 3])
    ends = [int(rows.ids_RT[0, 12]), 13]
    batch = continued(model, rows, order, 6, ends, step=3, seed=9, device="cpu")
    assert bool((batch.target_N == NO_TARGET).all())
    for r, row in enumerate(order):
        draws = np.random.default_rng([9, 2, 3, int(row)]).random(48)
        ids = [int(i) for i in rows.ids_RT[row, :6]]
        while len(ids) < 48 and (len(ids) == 6 or ids[-1] not in ends):
            logits_V = model(input_ids=torch.tensor([ids])).logits[0, -1].double()
            summed = np.cumsum(torch.softmax(logits_V, -1).detach().numpy())
            ids.append(int(np.searchsorted(summed, draws[len(ids)] * summed[-1], side="right")))
        real = batch.segment_BT[r] == 0
        assert batch.ids_BT[r][real].tolist() == ids
    assert batch.real_N.numel() == int((batch.segment_BT == 0).sum())


def test_samples_follow_the_distribution() -> None:
    logits_V = torch.tensor([2.0, -1.0, 0.5, -30.0, 1.0])
    drawn = sample(logits_V.expand(20000, 5), torch.rand(20000, generator=torch.Generator().manual_seed(1)))
    shares = torch.bincount(drawn, minlength=5) / 20000
    torch.testing.assert_close(shares, logits_V.softmax(0), atol=0.012, rtol=0.0)


def test_the_share_of_continuations_is_kept_on_average() -> None:
    order = np.arange(100, 108)
    counts = []
    for step in range(400):
        text_rows, own = split_step(order, 0.3, step, 5)
        assert sorted([*text_rows, *own]) == list(order)
        counts.append(len(own))
    assert set(counts) == {2, 3}
    assert np.mean(counts) == pytest.approx(2.4, abs=0.08)
    assert not len(split_step(order, 0.0, 0, 5)[1])
    assert not len(split_step(order, 1.0, 0, 5)[0])


def test_a_prompt_stays_within_the_first_segment() -> None:
    segments = np.array([[0] * 5 + [1] * 3, [0] * 8], np.int32)
    rows = Rows(np.ones((2, 8), np.int32), segments)
    assert [prompt_length(rows, np.array(o), w) for o, w in (([0, 1], 6), ([1], 6), ([0], 3))] == [5, 6, 3]


def test_matching_is_its_definition(stories: Path, text: Path) -> None:
    """Against transformers' own hidden states, row by row, for layers before the last (whose are normed there)."""
    model, shape = load_float(stories).eval(), ModelShape.from_hf(read_config(stories))
    rows = rows_of(stories, text, 3)
    whole = Rows(rows.ids_RT[:, :40], np.zeros((3, 40), np.int32))
    batch = make_batch(whole, slice(None))
    _, layers = states_and_layers(model, shape, batch, [0, 1, 3])
    expected = model.model(input_ids=batch.ids_BT, output_hidden_states=True).hidden_states
    for i in (0, 1, 3):
        torch.testing.assert_close(layers[i], expected[i + 1].flatten(0, 1))
    matcher = Matcher([1, 3], 32, 64, channels=range(0, 64, 2))
    ours = {i: torch.randn(120, 32) for i in (0, 1)}
    total = 0.0
    for i, j in ((0, 1), (1, 3)):
        for n in range(120):
            put = torch.zeros(64)
            put[::2] = ours[i][n]
            total += float((put - layers[j][n]).norm() ** 2 / layers[j][n].norm() ** 2) / 2
    assert float(matcher.loss(ours, layers).detach()) == pytest.approx(total, rel=1e-4)


def test_matched_layers_come_nearer_and_leave_nothing_behind(
    stories: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(QUICK, match=0.5, steps=12)
    run_distill(stories, "150k", [text], tmp_path / "whole", options)
    run_distill(stories, "150k", [text], tmp_path / "free", replace(options, match=1e-9))
    held, free = ([line["match"] for line in metrics(tmp_path / n)] for n in ("whole", "free"))
    assert (
        held[0] == free[0] < held[-1] < 0.8 * free[-1]
    )  # high rates of a short run tear layers away from the teacher's
    assert not [name for name in weights(tmp_path / "whole") if "match" in name]
    again = lambda resume: run_distill(stories, "150k", [text], tmp_path / "cut", options, resume=resume)  # noqa: E731
    interrupted_at(7, monkeypatch, lambda: again(False))
    again(True)  # projections and their moments come back too
    assert same_bits(tmp_path / "whole", tmp_path / "cut")


def test_layers_are_spread_evenly() -> None:
    assert spread(2, 5) == [1, 4]
    assert spread(5, 5) == [0, 1, 2, 3, 4]
    assert spread(8, 5)[-1] == 4


def test_a_prompt_without_room_is_refused() -> None:
    with pytest.raises(RequestError, match="no room"):
        DistillOptions(on_policy=0.5, length=32, prompt=30)
