"""Several processes as one run (gloo): the same losses, states that any number reads, and what a death leaves."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import metrics, some_stories, weights

from distill.options import DistillOptions
from distill.parallel import ALONE, check_together
from distill.state import StateFolder, checkpoint_folder
from nano.cli import run as cli
from nano.errors import UnsupportedError
from nano.manifest import read_manifest

STEPS = 20
Arguments = list[str]


class Ranks:
    """A process that starts runs of several processes; see ranks.py."""

    def __init__(self, folder: Path) -> None:
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        script = Path(__file__).with_name("ranks.py")
        self.process = subprocess.Popen([sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        text=True, env=env)  # fmt: skip
        self.folder, self.count = folder, 0

    def start(self, count: int, arguments: Arguments) -> list[int]:
        """Ids of the processes."""
        self.count = count
        asked = {"count": count, "arguments": list(map(str, arguments)), "log": str(self.folder / "log")}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        return list(self._answer())

    def end(self) -> tuple[list[int], list[str]]:
        """Their statuses and what each printed."""
        return list(self._answer()), [(self.folder / f"log.{rank}").read_text() for rank in range(self.count)]

    def go(self, count: int, arguments: Arguments) -> list[str]:
        """Run to the end; what each printed."""
        self.start(count, arguments)
        statuses, printed = self.end()
        assert statuses == [0] * count, printed
        return printed

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    made = Ranks(tmp_path_factory.mktemp("ranks"))
    yield made
    assert made.process.stdin is not None
    made.process.stdin.close()
    made.process.wait(timeout=60)


@pytest.fixture(scope="module")
def request_of(stories: Path, tinystories: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Arguments]:
    """`request_of(out, *more)`: arguments of a run; 7 rows a step, so that two processes have 4 and 3."""
    text = some_stories(tmp_path_factory.mktemp("text"), tinystories, 60)

    def arguments(
        out: Path,
        *more: object,
        teacher: Path = stories,
        student: object = "150k",
        steps: int = STEPS,
        batch: int = 7,
        rounds: int = 1,
    ) -> Arguments:
        plain = ("distill", "--teacher", teacher, "--student", student, "--data", text, "--out", out,
                 "--steps", steps, "--batch", batch, "--length", 64, "--eval-tokens", 512, "--calibration-tokens", 512,
                 "--layers", "influence", "--rounds", rounds, "--no-curves", *more)  # fmt: skip
        return list(map(str, plain))

    return arguments


@pytest.fixture(scope="module")
def alone(request_of: Callable[..., Arguments], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "student"
    assert cli(request_of(out, "--eval-every", 8)) == 0
    return out


@pytest.fixture(scope="module")
def two(ranks: Ranks, request_of: Callable[..., Arguments], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("two") / "student"
    printed = ranks.go(2, request_of(out, "--eval-every", 8, "--json"))
    told = json.loads(printed[0][printed[0].index("\n{") :])
    assert told["steps"] == STEPS
    assert printed[1] == ""
    return out


def same_training(a: Path, b: Path, within: float = 1e-4) -> None:
    """The same steps, with losses that differ by rounding only."""
    ours, theirs = metrics(a), metrics(b)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs] == list(range(1, len(ours) + 1))
    for x, y in zip(ours, theirs, strict=True):
        assert x["tokens"] == y["tokens"]
        for name in ("loss", "kl", "ce", "gradient_norm", *(["match"] if "match" in x else [])):
            assert x[name] == pytest.approx(y[name], abs=within, rel=within), (name, x["step"])


def test_two_processes_train_as_one_does(alone: Path, two: Path) -> None:
    same_training(alone, two)
    ours, theirs = read_manifest(alone).results["held_out"], read_manifest(two).results["held_out"]
    assert ours["start"] == theirs["start"]
    for name, value in ours["trained"].items():
        assert theirs["trained"][name] == pytest.approx(value, abs=2e-3 if name == "top1" else 1e-4)
    middle = [[line["held_out"]["kl"] for line in metrics(made) if "held_out" in line] for made in (alone, two)]
    assert len(middle[0]) == 2
    assert middle[0] == pytest.approx(middle[1], abs=1e-4)


def test_their_student_is_the_same_ordinary_folder(alone: Path, two: Path) -> None:
    from transformers import AutoModelForCausalLM

    assert {p.name for p in alone.iterdir()} == {p.name for p in two.iterdir()}
    assert (alone / "config.json").read_bytes() == (two / "config.json").read_bytes()
    ours, theirs = weights(alone), weights(two)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(theirs[name], ours[name], rtol=1e-3, atol=1e-4)
    _, info = AutoModelForCausalLM.from_pretrained(two, local_files_only=True, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not checkpoint_folder(two).exists()


def test_more_processes_than_rows_and_matched_layers(
    ranks: Ranks, request_of: Callable[..., Arguments], tmp_path: Path
) -> None:
    """Three processes share two rows, one by one: the third goes along without counting."""
    more = ("--micro-batch", 1, "--match", 0.1, "--recompute", "--divergence", "jsd")
    assert cli(request_of(tmp_path / "one", *more, steps=6, batch=2)) == 0
    ranks.go(3, request_of(tmp_path / "three", *more, steps=6, batch=2))
    assert metrics(tmp_path / "one")[0]["match"] > 0
    same_training(tmp_path / "one", tmp_path / "three")


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
def test_untied_heads_and_scaled_embeddings(
    family: str, ranks: Ranks, request_of: Callable[..., Arguments], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    teacher = tiny_model(family, tie_word_embeddings=family != "qwen3")
    student = tiny_model(family, tie_word_embeddings=family != "qwen3", num_hidden_layers=1,
                         **({"layer_types": ["full_attention"]} if family == "gemma3_text" else {}))  # fmt: skip
    more = ("--teacher-dtype", "bfloat16", "--eval-every", 2, "--keep", "best")
    assert cli(request_of(tmp_path / "one", *more, teacher=teacher, student=student, steps=5)) == 0
    ranks.go(2, request_of(tmp_path / "two", *more, teacher=teacher, student=student, steps=5))
    same_training(tmp_path / "one", tmp_path / "two", within=1e-3)  # the teacher's bf16 sums over other rows at once
    ours, theirs = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in ours:
        torch.testing.assert_close(theirs[name], ours[name], rtol=1e-2, atol=1e-3)


def wait_for(done: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + 120
    while not done():
        assert time.monotonic() < end, what
        time.sleep(0.02)


def lines(out: Path) -> int:
    path = checkpoint_folder(out) / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def test_a_death_ends_the_run_and_any_number_goes_on(
    ranks: Ranks, request_of: Callable[..., Arguments], alone: Path, two: Path, tmp_path: Path
) -> None:
    out, more = tmp_path / "killed", ("--eval-every", 8, "--save-every", 5)
    ids = ranks.start(2, request_of(out, *more))
    wait_for(lambda: lines(out) >= 6, "six steps")
    os.kill(ids[1], signal.SIGKILL)
    statuses, printed = ranks.end()
    assert statuses == [3, -signal.SIGKILL]
    assert "Another process of the run was lost." in printed[0]
    kept = StateFolder(checkpoint_folder(out)).header().step
    assert f"goes on after step {kept}" in printed[0]
    assert "Traceback" not in printed[0]
    assert 5 <= kept < STEPS
    assert kept % 5 == 0
    assert not out.exists()
    for count in (1, 2, 3):
        again = tmp_path / f"on{count}"
        shutil.copytree(checkpoint_folder(out), checkpoint_folder(again))
        if count == 1:
            assert cli(request_of(again, *more, "--resume")) == 0
        else:
            assert f"resuming after step {kept} of {STEPS}" in ranks.go(count, request_of(again, *more, "--resume"))[0]
        same_training(alone, again)
        assert not checkpoint_folder(again).exists()
    on_two, never_killed = weights(tmp_path / "on2"), weights(two)
    assert all(
        torch.equal(on_two[name], never_killed[name]) for name in never_killed
    )  # as many as before: the same bits


def test_the_first_process_may_be_the_one_that_dies(
    ranks: Ranks, request_of: Callable[..., Arguments], tmp_path: Path
) -> None:
    out = tmp_path / "killed"
    ids = ranks.start(2, request_of(out, "--save-every", 2))
    wait_for(lambda: lines(out) >= 3, "three steps")
    os.kill(ids[0], signal.SIGKILL)
    statuses, printed = ranks.end()
    assert statuses == [-signal.SIGKILL, 3]
    assert "nanokit (rank 1): Another process of the run was lost." in printed[1]
    assert StateFolder(checkpoint_folder(out)).header().step >= 2


def test_a_request_to_stop_is_kept_by_all_and_what_one_wrote_several_read(
    ranks: Ranks, request_of: Callable[..., Arguments], alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "stopped"
    more = ("--eval-every", 8, "--save-every", 5)
    real = StateFolder.note

    def note(state: StateFolder, record: dict[str, Any]) -> None:
        real(state, record)
        if record["step"] == 7:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(StateFolder, "note", note)
        assert cli(request_of(out, *more)) == 130  # one process, after step 5
    ids = ranks.start(2, request_of(out, *more, "--resume"))
    wait_for(lambda: lines(out) >= 9 and (checkpoint_folder(out) / "metrics.jsonl").stat().st_size > 0, "nine steps")
    for process in ids:  # twice, as torchrun and the terminal do
        os.kill(process, signal.SIGINT)
        os.kill(process, signal.SIGINT)
    statuses, printed = ranks.end()
    assert statuses == [130, 130], printed
    assert "--resume goes on" in printed[0]
    assert printed[1] == ""
    kept = StateFolder(checkpoint_folder(out)).header().step
    assert kept == lines(out)
    assert sorted(p.name for p in checkpoint_folder(out).iterdir()) == [
        "metrics.jsonl",
        f"shards-{kept}",
        "shards.json",
    ]
    assert cli(request_of(out, *more, "--resume")) == 0
    same_training(alone, out)


@pytest.mark.slow
def test_rounds_of_cutting_are_shared_and_resumed(
    ranks: Ranks, request_of: Callable[..., Arguments], tmp_path: Path
) -> None:
    """The second round's student is cut on the first process and sharded; one goes on where two were killed."""

    def asked(out: Path, *more: object) -> Arguments:
        how = ("--heal", 0.4, "--learning-rate", 2e-3, "--save-every", 2)
        return request_of(out, *how, *more, student="65k", steps=10, rounds=2)

    alone, two = tmp_path / "alone", tmp_path / "two"
    assert cli(asked(alone)) == 0
    ids = ranks.start(2, asked(two))
    wait_for(lambda: lines(two) >= 7, "seven steps")
    os.kill(ids[1], signal.SIGKILL)
    ranks.end()
    kept = StateFolder(checkpoint_folder(two)).header()
    assert len(kept.facts["rounds"]) == 2
    shutil.copytree(checkpoint_folder(two), checkpoint_folder(tmp_path / "one"))
    assert cli(asked(tmp_path / "one", "--resume")) == 0
    ranks.go(2, asked(two, "--resume"))
    for made in (tmp_path / "one", two):
        same_training(alone, made)
        ours, theirs = (read_manifest(folder).results["rounds"] for folder in (alone, made))
        assert (made / "cut.json").read_bytes() == (alone / "cut.json").read_bytes()
        for x, y in zip(ours, theirs, strict=True):
            for when, found in x["held_out"].items():
                assert y["held_out"][when]["cross_entropy"] == pytest.approx(found["cross_entropy"], abs=1e-4)


def test_what_is_refused_is_said_once(ranks: Ranks, request_of: Callable[..., Arguments], tmp_path: Path) -> None:
    ranks.start(2, request_of(tmp_path / "s", "--on-policy", 0.5))
    statuses, printed = ranks.end()
    assert statuses == [2, 2]
    assert "one device only" in printed[0]
    assert printed[1] == ""
    assert not list(tmp_path.iterdir())
    check_together(DistillOptions())
    with pytest.raises(UnsupportedError, match="one device only"):
        check_together(DistillOptions(optimizer="adamw8bit"))
    with pytest.raises(UnsupportedError, match="one device only"):
        check_together(DistillOptions(cross_tokenizer="gold"))


def test_a_broken_state_is_no_traceback(
    ranks: Ranks, request_of: Callable[..., Arguments], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "s"
    ids = ranks.start(2, request_of(out, "--save-every", 1))
    wait_for(lambda: lines(out) >= 2, "two steps")
    for process in ids:
        os.kill(process, signal.SIGINT)
    assert ranks.end()[0] == [130, 130]
    state = checkpoint_folder(out)
    for piece in state.glob("shards-*/*.distcp"):
        piece.write_bytes(piece.read_bytes()[: piece.stat().st_size // 2])
    assert cli(request_of(out, "--save-every", 1, "--resume")) == 2
    assert "The checkpoint cannot be read." in capsys.readouterr().err
    (state / "shards.json").write_text("{")
    assert cli(request_of(out, "--save-every", 1, "--resume")) == 2
    assert "start over with --force" in capsys.readouterr().err


def test_one_process_costs_nothing() -> None:
    assert ALONE.sums([1.5, 2]) == [1.5, 2]
    assert ALONE.shared("x") == "x"
    assert ALONE.lead(lambda: 3) == ALONE.checked(lambda: 3) == 3


@pytest.mark.slow
def test_torchrun_itself(request_of: Callable[..., Arguments], alone: Path, tmp_path: Path) -> None:
    out = tmp_path / "s"
    call = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "distill.command"]
    done = subprocess.run([*call, *request_of(out, "--eval-every", 8)[1:]], capture_output=True, text=True, check=False,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("student, trained") == 1
    same_training(alone, out)
