"""A killed run goes on at the last finished layer, to the same bytes; another request's work is not taken."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from nano.errors import NoSpaceError, RequestError
from nano.folder import sha256_file
from quantize import recover as recovery
from quantize.grid import QuantizedTensor
from quantize.journal import Journal
from quantize.layers import LayerResult
from quantize.options import QuantizeOptions
from quantize.recipe import Grid
from quantize.recover import recover
from quantize.rtn import round_to_nearest
from quantize.student import Student


def one_layer(bits: int = 4, zero: bool = False) -> LayerResult:
    random = torch.Generator().manual_seed(bits)
    low, high = -(1 << (bits - 1)), 1 << (bits - 1)
    codes_NK = torch.randint(low, high, (6, 64), generator=random, dtype=torch.int8)
    zero_NG = torch.randint(low, high, (6, 2), generator=random, dtype=torch.int8) if zero else None
    weight = QuantizedTensor(codes_NK, torch.full((6, 2), 0.125), 32, bits, zero_NG)
    norm = {"model.layers.0.input_layernorm.weight": torch.arange(6.0)}
    return LayerResult({"m": weight}, {"m": 0.25}, {"m": 0.5}, norm, (0.3, 0.1))


@pytest.mark.parametrize(("bits", "zero"), [(4, False), (4, True), (8, False)])
def test_a_layer_comes_back_as_it_was(bits: int, zero: bool, tmp_path: Path) -> None:
    saved = one_layer(bits, zero)
    Journal(tmp_path / "out", {"a": 1}).save_layer(3, saved)
    journal = Journal(tmp_path / "out", {"a": 1})
    found = journal.layer(3)
    assert found is not None
    assert journal.layer(2) is None
    assert torch.equal(found.weights["m"].codes_NK, saved.weights["m"].codes_NK)
    assert torch.equal(found.weights["m"].scale_NG, saved.weights["m"].scale_NG)
    zeros = found.weights["m"].zero_NG, saved.weights["m"].zero_NG
    assert zeros[0] is zeros[1] is None or torch.equal(*[z for z in zeros if z is not None])
    assert (found.error, found.rounding_error) == (saved.error, saved.rounding_error)
    assert tuple(found.layer_error or ()) == saved.layer_error
    assert torch.equal(*(r.floats["model.layers.0.input_layernorm.weight"] for r in (found, saved)))


def test_work_of_another_request_is_dropped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Journal(tmp_path / "out", {"seed": 0}).save_layer(0, one_layer())
    assert Journal(tmp_path / "out", {"seed": 1}).layer(0) is None
    assert "another request" in capsys.readouterr().err


def test_one_process_at_a_time_works_on_an_output(tmp_path: Path) -> None:
    first = Journal(tmp_path / "out", {"seed": 0})
    first.save_layer(0, one_layer())
    for seed in (0, 1):
        with pytest.raises(RequestError, match="Another run"):
            Journal(tmp_path / "out", {"seed": seed})
    assert first.has_layer(0)
    with pytest.raises(KeyboardInterrupt), first.kept_if_interrupted():
        raise KeyboardInterrupt
    assert Journal(tmp_path / "out", {"seed": 0}).has_layer(0)


def test_a_folder_of_someone_else_is_left_alone(tmp_path: Path) -> None:
    work = tmp_path / "out.work"
    work.mkdir()
    (work / "thesis.txt").write_text("years")
    with pytest.raises(RequestError, match="holds other things"):
        Journal(tmp_path / "out", {})
    assert [path.name for path in work.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("error", "kept"), [(KeyboardInterrupt(), True), (NoSpaceError("full"), True), (RequestError("bad"), False)]
)
def test_work_is_kept_where_the_same_command_can_go_on(error: BaseException, kept: bool, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "out", {})
    with pytest.raises(type(error)), journal.kept_if_interrupted():
        journal.save_layer(0, one_layer())
        raise error
    assert journal.has_layer(0) == kept
    with Journal(tmp_path / "out", {}).kept_if_interrupted():
        pass
    assert not journal.folder.exists()


@pytest.mark.parametrize("method", ["gptq", "tune"])
def test_a_killed_run_goes_on_to_the_same_bytes(method: str, stories: Path, tinystories: Path, tmp_path: Path) -> None:
    def command(out: Path) -> list[str]:
        words = ["quantize", stories, "--data", tinystories, "--out", out, "--method", method, "--samples", "24"]
        return [sys.executable, "-m", "nano", *map(str, words), "--steps", "12", "--length", "128"]

    work = tmp_path / "killed.work"
    with subprocess.Popen(command(tmp_path / "killed"), stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 240
        while not (work / "layer-0001.safetensors").exists() and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    finished = sorted(work.glob("layer-*.safetensors"))
    assert 2 <= len(finished) < 5
    assert not (tmp_path / "killed").exists()
    done = subprocess.run(command(tmp_path / "killed"), capture_output=True, text=True, check=True)
    assert f"left {len(finished)} finished layers" in done.stderr.replace("\n", " ")
    subprocess.run(command(tmp_path / "whole"), capture_output=True, check=True)
    killed, whole = (sha256_file(tmp_path / name / "model.safetensors") for name in ("killed", "whole"))
    assert killed == whole
    assert not work.exists()


class StopsAfter(Journal):
    """Is interrupted right after the third saving."""

    saved = 0

    def save_training(self, tensors: Mapping[str, torch.Tensor], numbers: Mapping[str, Any]) -> None:
        super().save_training(tensors, numbers)
        self.saved += 1
        if self.saved == 3:
            raise KeyboardInterrupt


def test_an_interrupted_training_goes_on_to_the_same_bits(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "KEEP_SECONDS", 0.0)
    folder = tiny_model("qwen3", initializer_range=0.2)
    random = torch.Generator().manual_seed(3)
    windows = [torch.randint(3, 300, (24,), generator=random) for _ in range(6)] * 8
    options = QuantizeOptions(batch=8, learning_rate=0.05)
    with Student(folder, 32) as student:
        name = "model.layers.0.mlp.gate_proj"
        start = {name: round_to_nearest(student.tensor(name + ".weight"), Grid(4, 32))}
        with pytest.raises(KeyboardInterrupt):
            recover(student, start, windows, 9, options, StopsAfter(tmp_path / "stopped", {}))
        resumed = Journal(tmp_path / "stopped", {})
        state = resumed.training()
        assert state is not None
        assert state[1]["step"] == 3
        found = recover(student, start, windows, 9, options, resumed)
        whole = recover(student, start, windows, 9, options, Journal(tmp_path / "whole", {}))
    assert found.kl_after < found.kl_before
    assert (found.kl_before, found.kl_after) == (whole.kl_before, whole.kl_after)
    assert torch.equal(found.weights[name].codes_NK, whole.weights[name].codes_NK)
    assert torch.equal(found.weights[name].scale_NG, whole.weights[name].scale_NG)
    assert all(torch.equal(found.floats[key], whole.floats[key]) for key in whole.floats)
