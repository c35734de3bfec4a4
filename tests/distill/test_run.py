"""The stage end to end on a real teacher: what it writes, what it refuses, and that no work is ever lost."""

from __future__ import annotations

import errno
import json
import os
import shutil
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
from checks import same_bits, some_stories, weights

from distill.options import DistillOptions
from distill.run import run_distill
from distill.state import StateFolder, checkpoint_folder
from distill.train import learning_rate
from nano.cli import run as cli
from nano.corpus import read_documents
from nano.errors import BadFileError, NoSpaceError, OutputExistsError, RequestError, UnsupportedError, WorkError
from nano.lm import open_model
from nano.manifest import read_manifest
from nano.shapes import ModelShape, read_config

QUICK = DistillOptions(steps=8, batch=4, length=64, eval_tokens=1024, calibration_tokens=1024)


@pytest.fixture(scope="module")
def text(tinystories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return some_stories(tmp_path_factory.mktemp("text"), tinystories, 150)


@pytest.fixture(scope="module")
def made(stories: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "student"
    run_distill(stories, "150k", [text], out, QUICK)
    return out


def test_the_student_is_an_ordinary_model_folder(made: Path, stories: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(made, local_files_only=True)
    teacher = ModelShape.from_hf(read_config(stories))
    shape = ModelShape.from_hf(read_config(made))
    assert sum(p.numel() for p in model.parameters()) == shape.num_parameters
    for name in ("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads"):
        assert getattr(shape, name) <= getattr(teacher, name)
    assert shape.intermediate_size % 32 == 0  # the teacher's 172 is no multiple of it
    ids = AutoTokenizer.from_pretrained(made, local_files_only=True)("Once upon a time", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape[1] == ids.shape[1] + 4
    assert (made / "generation_config.json").is_file()
    opened = open_model(made)
    with torch.inference_mode():
        expected = model(input_ids=ids).logits[0].numpy()
    np.testing.assert_allclose(opened.logits([ids[0].numpy()])[0], expected, rtol=1e-5, atol=1e-5)


def test_the_manifest_says_what_was_done(made: Path, stories: Path, text: Path) -> None:
    manifest = read_manifest(made)
    results = manifest.results
    assert manifest.kind == "student"
    assert manifest.recipe["steps"] == 8
    assert set(manifest.files) >= {"config.json", "model.safetensors", "tokenizer.json", "metrics.jsonl"}
    assert manifest.data["seed"] == 0
    assert len(manifest.data["files"][0]["sha256"]) == 64
    held = results["held_out"]
    assert held["teacher"]["cross_entropy"] < held["trained"]["cross_entropy"] < held["start"]["cross_entropy"]
    assert 0 < held["trained"]["kl"] < held["start"]["kl"]
    assert held["tokens"] == 1024
    assert len(results["cut"]["layers"]) == manifest.shape["num_layers"]
    assert len(results["cut"]["dropped_layers"]) == 5 - manifest.shape["num_layers"]
    lines = [json.loads(line) for line in (made / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert lines[-1]["tokens"] == results["train_tokens"]
    assert not made.with_name("student.checkpoint").exists()


def test_figures_are_those_of_the_file(made: Path, stories: Path, text: Path) -> None:
    """Recomputed from the folder with numpy, over documents that were held out."""
    from hashlib import blake2b

    from distill.packing import held_out
    from nano.corpus import cut_windows
    from nano.metrics import Meter

    student, teacher = open_model(made), open_model(stories)
    documents = [d for d in read_documents([text]) if isinstance(d, str)]
    digests = [int.from_bytes(blake2b(d.encode(), digest_size=8).digest(), "little") for d in documents]
    kept = held_out([np.array(digests, np.uint64)], QUICK.held_out, QUICK.seed)[0]
    held = [d for d, keep in zip(documents, kept, strict=True) if keep]
    windows = cut_windows(held, student.tokenizer, 64, max_tokens=1024)
    meter = Meter()
    for ids, ours, theirs in zip(windows.ids, student.logits(windows.ids), teacher.logits(windows.ids), strict=True):
        meter.add(ids, ours, theirs)
    scores, found = meter.scores(), read_manifest(made).results["held_out"]
    assert found["trained"]["perplexity"] == pytest.approx(scores.perplexity, rel=1e-4)
    assert found["teacher"]["perplexity"] == pytest.approx(scores.reference_perplexity, rel=1e-4)
    assert found["trained"]["kl"] == pytest.approx(scores.kl, rel=1e-3)
    assert found["trained"]["top1"] == pytest.approx(scores.top1)


def test_pruned_start_beats_random_start(made: Path, stories: Path, text: Path, tmp_path: Path) -> None:
    manifest = run_distill(stories, "150k", [text], tmp_path / "r", replace(QUICK, start="random", learning_rate=3e-3))
    pruned = read_manifest(made).results["held_out"]["trained"]["cross_entropy"]
    assert pruned < manifest.results["held_out"]["trained"]["cross_entropy"] - 1.0
    assert manifest.results["cut"] is None


def test_the_same_request_gives_the_same_bytes(made: Path, stories: Path, text: Path, tmp_path: Path) -> None:
    run_distill(stories, "150k", [text], tmp_path / "again", QUICK)
    assert same_bits(made, tmp_path / "again")
    first, second = read_manifest(made), read_manifest(tmp_path / "again")
    assert first.files == second.files


def test_micro_batches_add_up_to_the_batch(made: Path, stories: Path, text: Path, tmp_path: Path) -> None:
    manifest = run_distill(stories, "150k", [text], tmp_path / "micro", replace(QUICK, micro_batch=1, eval_every=4))
    lines = [json.loads(line) for line in (tmp_path / "micro" / "metrics.jsonl").read_text().splitlines()]
    held = manifest.results["held_out"]
    measured = {line["step"]: line["held_out"]["kl"] for line in lines if "held_out" in line}
    assert measured.keys() == {4}
    assert held["trained"]["kl"] < measured[4] < held["start"]["kl"]
    whole, parts = weights(made), weights(tmp_path / "micro")
    for name in whole:
        torch.testing.assert_close(whole[name], parts[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_every_family(family: str, tiny_model: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    teacher = tiny_model(family, tie_word_embeddings=family != "qwen3")
    shape = ModelShape.from_hf(read_config(teacher))
    kept = shape.layer_types[:1]
    target = shape.resized(hidden_size=32, intermediate_size=64, num_layers=1, num_heads=2, num_kv_heads=1,
                           layer_types=kept)  # fmt: skip
    options = replace(QUICK, steps=30, kd=1.0, temperature=1.5, learning_rate=1e-3)
    manifest = run_distill(teacher, target, [text], tmp_path / "s", options)
    held = manifest.results["held_out"]
    assert held["trained"]["kl"] < held["start"]["kl"]
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "s", local_files_only=True, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert tuple(getattr(model.config, "layer_types", None) or kept) == kept


def test_a_bfloat16_teacher_gives_a_bfloat16_student(stories: Path, text: Path, tmp_path: Path) -> None:
    from nano.torch_lm import load_float

    teacher = tmp_path / "teacher"
    shutil.copytree(stories, teacher)
    load_float(stories).to(torch.bfloat16).save_pretrained(teacher)
    shape = ModelShape.from_hf(read_config(stories))
    run_distill(teacher, shape, [text], tmp_path / "same", replace(QUICK, steps=0))
    assert same_bits(teacher, tmp_path / "same")  # an empty cut, untrained, is the teacher
    manifest = run_distill(teacher, "150k", [text], tmp_path / "s", replace(QUICK, dtype="bfloat16"))
    assert read_config(tmp_path / "s")["dtype"] == "bfloat16"
    assert {t.dtype for t in weights(tmp_path / "s").values()} == {torch.bfloat16}
    held = manifest.results["held_out"]
    assert held["trained"]["cross_entropy"] < held["start"]["cross_entropy"]


def start(arguments: list[object]) -> subprocess.Popen[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "nano", "distill", *map(str, arguments)], env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip


def wait_for_step(process: subprocess.Popen[str], metrics: Path, step: int) -> None:
    end = time.monotonic() + 300
    while time.monotonic() < end and process.poll() is None:
        if metrics.exists() and metrics.read_text().count("\n") >= step:
            return
        time.sleep(0.01)
    raise AssertionError(process.communicate()[1])


def test_interrupted_and_killed_runs_end_with_the_same_bits(stories: Path, text: Path, tmp_path: Path) -> None:
    """SIGINT at a random step, --resume, SIGKILL at a later one, --resume: against a run left alone."""
    chance = np.random.default_rng(time.time_ns())
    first, second = int(chance.integers(1, 12)), int(chance.integers(15, 30))
    common = ["--teacher", stories, "--student", "100k", "--data", text, "--steps", 40, "--batch", 2, "--length", 64,
              "--eval-tokens", 512, "--calibration-tokens", 512, "--save-every", 3]  # fmt: skip
    out, checkpoint = tmp_path / "out", tmp_path / "out.checkpoint"
    whole = start([*common, "--out", tmp_path / "whole"])
    assert whole.wait(300) == 0, whole.communicate()[1]

    process = start([*common, "--out", out])
    wait_for_step(process, checkpoint / "metrics.jsonl", first)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 130, (first, said)
    assert "--resume" in said
    assert "Interrupted" in said
    assert "Traceback" not in said
    assert not out.exists()
    assert not out.with_name("out.partial").exists()

    process = start([*common, "--out", out, "--resume"])
    wait_for_step(process, checkpoint / "metrics.jsonl", second)
    process.kill()
    process.wait(300)
    assert not out.exists()

    process = start([*common, "--out", out, "--resume", "--json"])
    stdout, said = process.communicate(timeout=300)
    assert process.returncode == 0, (first, second, said)
    assert json.loads(stdout)["steps"] == 40
    assert same_bits(tmp_path / "whole", out), (first, second)
    assert (tmp_path / "whole" / "metrics.jsonl").read_bytes() == (out / "metrics.jsonl").read_bytes()
    assert not checkpoint.exists()


def test_a_state_of_another_request_is_refused(
    stories: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop_at_five(_state: Any, record: dict[str, Any]) -> None:
        if record["step"] == 5:
            raise KeyboardInterrupt

    out, options = tmp_path / "s", replace(QUICK, save_every=1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("distill.state.StateFolder.note", stop_at_five)
        run_distill(stories, "150k", [text], out, options)
    with pytest.raises(OutputExistsError, match="interrupted run"):
        run_distill(stories, "150k", [text], out, options)
    with pytest.raises(RequestError, match="batch") as error:
        run_distill(stories, "150k", [text], out, replace(options, batch=8), resume=True)
    assert error.value.exit_status == 2
    run_distill(stories, "150k", [text], out, replace(options, batch=2), resume=None)  # starts over
    assert read_manifest(out).recipe["batch"] == 2
    with pytest.raises(RequestError, match="no interrupted run"):
        run_distill(stories, "150k", [text], tmp_path / "other", options, resume=True)


def test_a_full_disk_keeps_the_last_state(
    stories: Path, text: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import safetensors.torch

    saves, real = [], safetensors.torch.save_file

    def save_file(*arguments: Any, **settings: Any) -> None:
        saves.append(arguments)
        if len(saves) == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(*arguments, **settings)

    with monkeypatch.context() as patch, pytest.raises(NoSpaceError, match="--resume") as error:
        patch.setattr(safetensors.torch, "save_file", save_file)
        run_distill(stories, "150k", [text], tmp_path / "s", replace(QUICK, save_every=1))
    assert "after step 4" in str(error.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.checkpoint"]
    run_distill(stories, "150k", [text], tmp_path / "s", replace(QUICK, save_every=1), resume=True)
    assert same_bits(made, tmp_path / "s")


def test_a_loss_that_is_not_finite_stops_with_the_last_good_state(
    stories: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that grow a million times with every step."""
    from safetensors import safe_open

    import distill.train as train

    real = train.make_optimizer

    def explosive(parameters: Any, options: DistillOptions) -> Any:
        optimizer = real(parameters, options)
        optimizer.register_step_post_hook(lambda *_: [p.data.mul_(1e6) for p in parameters] and None)
        return optimizer

    monkeypatch.setattr(train, "make_optimizer", explosive)
    with pytest.raises(WorkError, match="not a finite number") as error:
        run_distill(stories, "150k", [text], tmp_path / "s", QUICK)
    assert "--learning-rate" in str(error.value)
    assert not (tmp_path / "s").exists()
    with safe_open(tmp_path / "s.checkpoint" / "state.safetensors", framework="pt") as state:
        assert all(torch.isfinite(state.get_tensor(name)).all() for name in state.keys())  # noqa: SIM118


def test_learning_rate_rises_then_falls() -> None:
    options = DistillOptions(steps=100, warmup=0.1, final_rate=0.1, learning_rate=1e-3)
    rates = [learning_rate(options, 64, step) for step in range(100)]
    assert rates[0] == pytest.approx(1e-4)
    assert max(rates) == rates[9] == pytest.approx(1e-3)
    assert rates[-1] == pytest.approx(1e-4)
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert DistillOptions().peak_rate(64) == pytest.approx(6.25e-3)


def broken(folder: Path, stories: Path, name: str) -> Path:
    """A copy of the teacher with one thing wrong."""
    shutil.copytree(stories, folder)
    config = json.loads((folder / "config.json").read_text())
    if name == "truncated":
        weights_file = folder / "model.safetensors"
        weights_file.write_bytes(weights_file.read_bytes()[:-1000])
    elif name == "family":
        config["model_type"] = "mamba"
    elif name == "tokenizer":
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        tokenizer["added_tokens"].append({"id": 600, "content": "<far>", "single_word": False, "lstrip": False,
                                          "rstrip": False, "normalized": False, "special": True})  # fmt: skip
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    elif name == "key":
        del config["hidden_size"]
    elif name == "capped":
        config["final_logit_softcapping"] = 30.0
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("truncated", BadFileError, "truncated"),
        ("family", UnsupportedError, "mamba"),
        ("tokenizer", BadFileError, "tokenizer does not match"),
        ("key", BadFileError, "hidden_size"),
        ("capped", UnsupportedError, "softcapping"),
    ],
)
def test_a_broken_teacher_is_named(
    name: str, error: type[Exception], words: str, stories: Path, text: Path, tmp_path: Path
) -> None:
    teacher = broken(tmp_path / "teacher", stories, name)
    with pytest.raises(error, match=words):
        run_distill(teacher, "150k", [text], tmp_path / "s", QUICK)
    assert [p.name for p in tmp_path.iterdir()] == ["teacher"]


@pytest.mark.parametrize(
    ("content", "words"), [(b"", "empty"), (b"\x00\x01\xff\xfe" * 100, "not text"), (b"Once upon a time.", "too short")]
)
def test_bad_text_is_named(content: bytes, words: str, stories: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.write_bytes(content)
    with pytest.raises(RequestError, match=words):
        run_distill(stories, "150k", [data], tmp_path / "s", QUICK)
    assert [p.name for p in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--student", "2M"], "larger than its teacher"),
        (["--student", "tiny"], "not understood"),
        (["--student", "150k", "--length", "1024"], "longer than the teacher's positions"),
        (["--student", "150k", "--batch", "4000"], "shorter than one batch"),
        (["--student", "150k", "--kd", "1.5"], "--kd is out of range"),
        (["--student", "150k", "--data", "/nowhere.txt"], "no such text file"),
    ],
)
def test_wrong_requests_exit_with_2_and_no_traceback(
    arguments: list[str], words: str, stories: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["distill", "--teacher", str(stories), "--out", str(tmp_path / "s"), "--data", str(text), *arguments]
    assert cli(given) == 2
    said = capsys.readouterr().err
    assert words in " ".join(said.split())
    assert "Traceback" not in said
    assert not list(tmp_path.iterdir())


def test_an_existing_output_stays(stories: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "precious").write_text("x")
    with pytest.raises(OutputExistsError):
        run_distill(stories, "150k", [text], tmp_path / "s", QUICK)
    with pytest.raises(BadFileError):
        run_distill(stories, "150k", [tmp_path / "none"], tmp_path / "s", QUICK, force=True)
    assert (tmp_path / "s" / "precious").read_text() == "x"


def test_a_second_run_of_one_output_spares_the_first(stories: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = StateFolder(checkpoint_folder(out))
    first.hold()
    (first.folder / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(RequestError, match="Another run"):
        run_distill(stories, "150k", [text], out, replace(QUICK, steps=1), force=True)
    with pytest.raises(BadFileError):  # refused for another reason, while the first has no state yet
        run_distill(stories, "150k", [tmp_path / "nowhere.txt"], out, QUICK)
    assert (first.folder / "metrics.jsonl").is_file()
    first.release()
    assert list(tmp_path.iterdir()) == []


def test_an_output_never_replaces_its_teacher(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    teacher, text = tiny_model("llama"), tmp_path / "text.txt"
    text.write_text("a story\n" * 50)
    before = sorted(path.name for path in teacher.iterdir())
    for out, data in ((teacher, str(text)), (teacher.parent, str(text)), (tmp_path, f"{text}=0.5")):
        with pytest.raises(RequestError, match="made from"):
            run_distill(teacher, "50k", [data], out, DistillOptions(), force=True)
    assert sorted(path.name for path in teacher.iterdir()) == before
    assert text.exists()
