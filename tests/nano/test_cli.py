"""The command line as a person meets it: messages, exit statuses, stdout and stderr kept apart."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Call = Callable[..., Any]


def test_version_and_help(nanokit: Call) -> None:
    from nano.version import __version__

    assert nanokit("--version").stdout.strip() == __version__
    shown = nanokit("--help")
    assert shown.status == 0
    for command in ("demo", "plan", "distill", "quantize", "export", "check", "evaluate", "generate", "build"):
        assert command in shown.stdout
    assert max(map(len, shown.stdout.splitlines())) <= 80


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["evaluat"], "evaluat"),
        (["evaluate"], "MODEL"),
        (["evaluate", "{stories}"], "--data"),
        (["evaluate", "/no/such", "--data", "{text}"], "no such model folder"),
        (["evaluate", "{stories}", "--data", "/no/such"], "no such text file"),
        (["evaluate", "{stories}", "--data", "{text}", "--tokens", "0"], "at least 1"),
        (["evaluate", "{stories}", "--data", "{text}", "--tokens", "many"], "many"),
        (["evaluate", "{stories}", "--data", "{stories}/model.safetensors"], "not text"),
        (["evaluate", "{stories}", "--data", "{text}", "--activations", "int8"], "int4"),
        (["evaluate", "{empty}", "--data", "{text}"], "no config.json"),
        (["evaluate", "{stories}/config.json", "--data", "{text}"], "name the folder that holds it"),
        (["generate", "{stories}"], "--prompt"),
        (["generate", "{stories}", "--prompt", "x", "--temperature", "-1"], "out of range"),
        (["generate", "{stories}", "--prompt", "x", "--temperature", "nan"], "out of range"),
        (["generate", "{stories}", "--prompt", "x", "--seed", "-1"], "negative"),
        (["generate", "{stories}", "--prompt", "\udcff"], "not valid Unicode"),
        (["build", "/no/such.toml"], "no such recipe"),
    ],
)
def test_a_wrong_request_is_one_clear_message(
    nanokit: Call, stories: Path, tinystories: Path, tmp_path: Path, arguments: list[str], says: str
) -> None:
    places = {"stories": stories, "text": tinystories, "empty": tmp_path}
    ran = nanokit(*(a.format(**places) for a in arguments))
    assert ran.status == 2
    assert says in ran.stderr
    assert "Traceback" not in ran.stderr
    assert ran.stdout == ""


def test_a_truncated_model_is_named(nanokit: Call, stories: Path, tinystories: Path, tmp_path: Path) -> None:
    broken = tmp_path / "model"
    shutil.copytree(stories, broken)
    raw = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").chmod(0o644)
    (broken / "model.safetensors").write_bytes(raw[: len(raw) // 2])
    ran = nanokit("evaluate", broken, "--data", tinystories)
    assert ran.status == 2
    assert "truncated" in ran.stderr
    assert "copy or download" in ran.stderr


def test_a_config_without_a_key_and_a_foreign_family(
    nanokit: Call, stories: Path, tinystories: Path, tmp_path: Path
) -> None:
    config = json.loads((stories / "config.json").read_text())
    for change, says in (({"hidden_size": None}, "hidden_size"), ({"model_type": "mamba"}, "'mamba'")):
        folder = tmp_path / says.strip("'")
        shutil.copytree(stories, folder)
        (folder / "config.json").chmod(0o644)
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        ran = nanokit("evaluate", folder, "--data", tinystories)
        assert ran.status == 2
        assert says in ran.stderr


def test_json_is_alone_on_stdout(nanokit: Call, stories: Path, tinystories: Path) -> None:
    ran = nanokit("evaluate", stories, "--data", tinystories, "--tokens", 2000, "--reference", stories, "--json")
    found = ran.json()
    assert found["tokens"] == 2000
    assert found["kl"] == 0.0
    assert found["top1"] == 1.0
    assert 4.5 < found["perplexity"] < 6.0
    assert "Failed to load" not in ran.stderr


def test_an_encoding_without_a_character_loses_that_character_only(stories: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "nano",
        "generate",
        str(stories),
        "--prompt",
        "Once \u2014",
        "--max-new-tokens",
        "1",
    ]
    ran = subprocess.run(command, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"}, check=False)
    assert ran.returncode == 0
    assert ran.stdout.startswith(b"Once ?")


def test_generate_prints_the_text(nanokit: Call, stories: Path) -> None:
    ran = nanokit("generate", stories, "--prompt", "Once upon a time", "--max-new-tokens", 12)
    assert ran.stdout.startswith("Once upon a time, there was a little girl")
    assert ran.stderr == ""


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shell_completion_knows_commands_and_options(nanokit: Call, shell: str) -> None:
    from nano.cli import app

    script = app.generate_completion(shell=shell)
    for word in ("quantize", "distill", "--group-size"):
        assert word.lstrip("-") in script
    assert "--install-completion" in nanokit("--help").stdout


@pytest.mark.parametrize("after", [0.0, 0.05, 0.1, 0.2, 0.4])
def test_ctrl_c_at_any_moment_is_quiet(after: float) -> None:
    """Counted from the first line of ours that runs: what Python does before that, and at its own end, is Python's.

    While it shuts down, Python has given SIGINT back to the system, which ends it without a word; shells say 130 then.
    """
    program = "import sys; from nano.entry import main; sys.argv = ['nanokit', 'profiles']; print(flush=True); main()"
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    time.sleep(0.02 + after)
    process.send_signal(signal.SIGINT)
    said = process.stderr.read().decode()
    assert process.wait(timeout=30) in (0, 130, -signal.SIGINT)
    assert "Traceback" not in said
