"""What surrounds a step: schedules, recomputation, compilation, best weights, curves, and what stops a run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checks import same_bits, some_stories

from distill.data import make_batch, pack
from distill.models import hidden_states
from distill.optimizer import check_means, learning_rate, make_optimizer, prepare_model
from distill.options import DistillOptions
from distill.run import run_distill
from distill.speed import training_flops
from nano.corpus import Windows
from nano.errors import RequestError, UnsupportedError
from nano.manifest import read_manifest
from nano.shapes import ModelShape, read_config
from nano.torch_lm import load_float

QUICK = DistillOptions(steps=6, batch=4, length=64, eval_tokens=512, calibration_tokens=512, layers="influence")


@pytest.fixture(scope="module")
def text(tinystories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return some_stories(tmp_path_factory.mktemp("text"), tinystories, 100)


def test_schedules() -> None:
    base = DistillOptions(steps=200, warmup=0.1, final_rate=0.1, learning_rate=1e-3)

    def rates(**changes: Any) -> list[float]:
        return [learning_rate(replace(base, **changes), 64, step) for step in range(200)]

    linear, cosine, wsd = rates(), rates(schedule="cosine"), rates(schedule="wsd", decay=0.25)
    for found in (linear, cosine, wsd):
        assert found[:20] == pytest.approx([1e-3 * (i + 1) / 20 for i in range(20)])
        assert found[-1] == pytest.approx(1e-4)
        assert found[19:] == sorted(found[19:], reverse=True)
    assert cosine[109] == pytest.approx((1e-3 + 1e-4) / 2)
    assert cosine[64] == pytest.approx(1e-4 + 9e-4 * (1 + np.cos(np.pi / 4)) / 2)
    assert set(wsd[19:150]) == {1e-3}
    assert wsd[150 + 24] == pytest.approx(1e-3 * (1 - 0.9 * np.sqrt(0.5)))
    with pytest.raises(RequestError, match="fall before it has risen"):
        DistillOptions(schedule="wsd", warmup=0.5, decay=0.6)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_recomputing_gives_the_same_gradients_from_less_memory(family: str, tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model(family, attention_dropout=0.3)
    shape = ModelShape.from_hf(read_config(folder))
    batch = make_batch(pack(Windows(tuple(np.arange(3, 3 + n) for n in (60, 40, 20))), 64), slice(None))

    def gradients(options: DistillOptions) -> tuple[dict[str, torch.Tensor], int]:
        model, kept = load_float(folder).eval(), 0
        prepare_model(model, options)

        def count(x: torch.Tensor) -> torch.Tensor:
            nonlocal kept
            kept += x.numel() * x.element_size()
            return x

        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            loss = hidden_states(model, shape, batch).square().mean()
        loss.backward()
        assert not any(m.training for layer in model.model.layers for m in layer.modules() if m is not layer)
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, kept

    plain, memory = gradients(QUICK)
    ours, less = gradients(replace(QUICK, recompute=True))
    assert plain.keys() == ours.keys()
    assert all(torch.equal(plain[n], ours[n]) for n in plain)
    assert less < memory / 3


@pytest.mark.slow
def test_compiled_layers_give_the_same_output(stories: Path) -> None:
    shape = ModelShape.from_hf(read_config(stories))
    batch = make_batch(pack(Windows((np.arange(3, 60),)), 64), slice(None))
    model = load_float(stories)
    with torch.inference_mode():
        expected = hidden_states(model, shape, batch)
    names = set(model.state_dict())
    prepare_model(model, replace(QUICK, compile=True))
    assert set(model.state_dict()) == names
    assert all(layer._compiled_call_impl is not None for layer in model.model.layers)
    with torch.inference_mode():
        torch.testing.assert_close(hidden_states(model, shape, batch), expected, rtol=1e-4, atol=1e-4)


def test_what_this_machine_cannot_do_is_refused_first(stories: Path, text: Path, tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        with pytest.raises(UnsupportedError, match="NVIDIA GPU"):
            run_distill(stories, "150k", [text], tmp_path / "s", replace(QUICK, optimizer="paged-adamw8bit"))
        assert not list(tmp_path.iterdir())
    with pytest.raises(RequestError, match="not known"):
        replace(QUICK, keep="best")
    check_means(QUICK, "cpu")
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    assert isinstance(make_optimizer([parameter], QUICK), torch.optim.AdamW)


def test_the_best_weights_are_kept(stories: Path, text: Path, tmp_path: Path) -> None:
    """A learning rate that first helps and then harms: the best are those of the run that stopped there."""
    options = replace(QUICK, steps=12, eval_every=2, learning_rate=0.02, warmup=0.0, final_rate=1.0, keep="best")
    best = run_distill(stories, "150k", [text], tmp_path / "best", options)
    last = run_distill(stories, "150k", [text], tmp_path / "last", replace(options, keep="last"))
    lines = [json.loads(line) for line in (tmp_path / "best" / "metrics.jsonl").read_text().splitlines()]
    found = {
        r["step"]: 0.8 * r["held_out"]["kl"] + 0.2 * r["held_out"]["cross_entropy"] for r in lines if "held_out" in r
    }

    def objective(results: Any) -> float:
        held = results["held_out"]["trained"]
        return float(0.8 * held["kl"] + 0.2 * held["cross_entropy"])

    found[12] = objective(last.results)
    step = min(found, key=lambda s: found[s])
    assert best.results["kept_step"] == step
    assert objective(best.results) == pytest.approx(found[step], rel=1e-5)
    assert last.results["kept_step"] == 12
    assert same_bits(tmp_path / "best", tmp_path / "last") == (step == 12)
    assert not list(tmp_path.glob("*.checkpoint"))


def test_curves_and_events(stories: Path, text: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = replace(QUICK, eval_every=3, tensorboard=str(tmp_path / "events"))
    run_distill(stories, "150k", [text], tmp_path / "s", options)
    records = [json.loads(line) for line in (tmp_path / "s" / "metrics.jsonl").read_text().splitlines()]
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    assert [(e.step, pytest.approx(e.value, rel=1e-6)) for e in events.Scalars("loss")] == [
        (r["step"], r["loss"]) for r in records
    ]
    assert [e.step for e in events.Scalars("held_out/kl")] == [3]
    picture = (tmp_path / "s" / "curves.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert "curves.png" in read_manifest(tmp_path / "s").files
    from matplotlib.image import imread

    drawn = imread(tmp_path / "s" / "curves.png")
    assert drawn.shape[0] > 500
    assert drawn[..., :3].std() > 0.05  # something is on it


def test_flops_are_those_of_the_matrices(tiny_model: Callable[..., Path]) -> None:
    """Counted by torch over a forward and backward pass; it counts attention whole, where half of it is masked."""
    from torch.utils.flop_counter import FlopCounterMode

    folder = tiny_model("llama", tie_word_embeddings=False)
    shape, model = ModelShape.from_hf(read_config(folder)), load_float(folder)
    model.set_attn_implementation("eager")
    ids = torch.arange(3, 131)[None]
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids).logits.sum().backward()
    vectors = sum(p.numel() for p in model.parameters() if p.ndim < 2)
    causal = 6 * 128 * shape.num_layers * shape.num_heads * shape.head_dim
    ours = training_flops(shape, 128) - 6 * vectors + causal
    assert counter.get_total_flops() / 128 == pytest.approx(ours, rel=0.01)


def command(arguments: list[object], prefix: str = "") -> list[str]:
    program = f"{prefix}\nimport sys; from nano.cli import run; sys.exit(run(sys.argv[1:]))"
    return [sys.executable, "-c", program, *map(str, arguments)]


def test_a_disk_that_is_really_full_keeps_the_last_state(stories: Path, text: Path, tmp_path: Path) -> None:
    """The kernel refuses files that grow beyond a limit set while the run is under way."""
    common = ["distill", "--teacher", stories, "--student", "100k", "--data", text, "--steps", 10, "--batch", 2,
              "--length", 64, "--eval-tokens", 512, "--calibration-tokens", 512, "--layers", "influence",
              "--save-every", 2, "--no-curves"]  # fmt: skip
    limit = """
import resource, signal
import distill.state as state
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
save = state.StateFolder.save
def limited(self, step, *rest):
    if step == 6:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    save(self, step, *rest)
state.StateFolder.save = limited
"""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    full = subprocess.run(command([*common, "--out", tmp_path / "s"], limit), capture_output=True, text=True, env=env)
    assert full.returncode == 3, full.stderr
    assert "The disk is full: the state after step 6 could not be kept" in full.stderr
    assert "--resume" in full.stderr
    assert "Traceback" not in full.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["s.checkpoint"]
    assert sorted(p.name for p in (tmp_path / "s.checkpoint").iterdir()) == ["metrics.jsonl", "state.safetensors"]
    for out, more in ((tmp_path / "s", ["--resume"]), (tmp_path / "whole", [])):
        done = subprocess.run(command([*common, "--out", out, *more]), capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr
    assert same_bits(tmp_path / "s", tmp_path / "whole")


@pytest.mark.slow
def test_killed_at_ten_random_moments(stories: Path, text: Path, tmp_path: Path) -> None:
    """SIGKILL after random times, wherever that is (start, step, save, measuring, writing the student)."""
    chance = np.random.default_rng(time.time_ns())
    common = ["distill", "--teacher", stories, "--student", "100k", "--data", text, "--steps", 60, "--batch", 2,
              "--length", 64, "--eval-tokens", 512, "--calibration-tokens", 512, "--layers", "influence",
              "--save-every", 1, "--eval-every", 5, "--keep", "best", "--no-curves", "--schedule", "wsd"]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    began = time.monotonic()
    whole = subprocess.run(command([*common, "--out", tmp_path / "whole"]), capture_output=True, text=True, env=env)
    assert whole.returncode == 0, whole.stderr
    lasted, out, state = time.monotonic() - began, tmp_path / "out", tmp_path / "out.checkpoint" / "state.safetensors"
    moments: list[float] = []
    while len(moments) < 10:
        resume = ["--resume"] if state.exists() else ["--force"]
        process = subprocess.Popen(command([*common, "--out", out, *resume]), env=env, stderr=subprocess.DEVNULL)
        moments.append(float(chance.uniform(0.1, 1.0)) * lasted)
        try:
            process.wait(moments[-1])
            break  # it ended before it could be killed
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
    if not out.exists():
        resume = ["--resume"] if state.exists() else ["--force"]
        done = subprocess.run(command([*common, "--out", out, *resume]), capture_output=True, text=True, env=env)
        assert done.returncode == 0, (moments, done.stderr)
    assert same_bits(tmp_path / "whole", out), moments
    assert (tmp_path / "whole" / "metrics.jsonl").read_bytes() == (out / "metrics.jsonl").read_bytes()
