"""Scorecards of real models: against transformers asked one thing at a time, and through the command."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from nano.capabilities import Length, Question, Task
from nano.cli import run
from nano.lm import open_model
from nano.manifest import Manifest, read_manifest, write_manifest
from nano.scorecard import mean_error, run_tasks
from nano.scorecard_file import Asked, card_of, read_card

NAMES = ("Lily", "Tim", "Ben", "Mia")
LENGTHS: tuple[Length, ...] = ("none", "tokens", "characters")
BEGIN = "Once upon a time, there was a little {} named"


def story_tasks(length: Length = "none") -> tuple[Task, ...]:
    """Questions that stories260K has an opinion on."""
    choice = Task("who", "reasoning", "choice", tuple(
        Question(f"{BEGIN.format(kind)} {name}. {name} liked to", (" play",), (" play", " play in the park", " sat"))
        for kind in ("girl", "boy") for name in NAMES
    ), length=length)  # fmt: skip
    either = Task("either", "reasoning", "choice", tuple(
        Question("", (), (f" {name} was happy.",) * 2, (BEGIN.format("girl"), BEGIN.format("boy")), gold=0)
        for name in NAMES
    ))  # fmt: skip
    said = Task("said", "factuality", "exact", tuple(
        Question(BEGIN.format(kind), NAMES) for kind in ("girl", "boy", "dog")
    ), stop=(".", "\n"), max_new_tokens=12)  # fmt: skip
    return choice, either, said


def brute(folder: Path, tasks: tuple[Task, ...]) -> dict[str, list[tuple[str, float]]]:
    """What transformers says to each question, each text on its own, in float64."""
    peer = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float64)
    tokenizer = open_model(folder).tokenizer
    found: dict[str, list[tuple[str, float]]] = {}
    for task in tasks:
        for question in task.questions:
            if task.metric == "choice":
                values = []
                for i, choice in enumerate(question.choices):
                    context = question.contexts[i] if question.contexts else question.prompt
                    begin, whole = tokenizer.prompt(context), tokenizer.prompt(context + choice)
                    with torch.no_grad():
                        table = peer(torch.tensor([whole])).logits[0].log_softmax(-1)
                    total = sum(float(table[t - 1, whole[t]]) for t in range(len(begin), len(whole)))
                    size = {"none": 1, "tokens": len(whole) - len(begin), "characters": len(choice) - 1}[task.length]  # type: ignore[index]
                    values.append(total / size)
                best = max(range(len(values)), key=values.__getitem__)
                told = question.contexts[best] if question.contexts else question.choices[best].strip()
                found.setdefault(task.name, []).append((told, float(best == question.right)))
            else:
                ids = torch.tensor([tokenizer.prompt(question.prompt)])
                new = peer.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=task.max_new_tokens, do_sample=False
                )
                whole_text = tokenizer.continued(question.prompt, new[0, ids.shape[1] :].tolist())
                text = re.split(r"[.\n]", whole_text[len(question.prompt) :])[0].strip()
                found.setdefault(task.name, []).append((text, float(text in question.answers)))
    return found


def test_a_card_is_what_transformers_says(stories: Path) -> None:
    chosen = set()
    for length in LENGTHS:
        tasks = story_tasks(length)
        card = run_tasks(open_model(stories), tasks)
        expected = brute(stories, tasks)
        for name, pairs in expected.items():
            mine = [(answer.said, answer.score) for answer in card.answers if answer.task == name]
            assert mine == pairs
        assert card.tasks["said"].score > 0
        chosen.add(tuple(answer.said for answer in card.answers if answer.task == "who"))
        scores = [score for name in ("who", "either") for _said, score in expected[name]]
        capability = card.capabilities["reasoning"]
        assert (capability.score, capability.questions) == (pytest.approx(sum(scores) / 12), 12)
    assert len(chosen) > 1, "what a likelihood is divided by makes a difference"


def test_the_error_is_that_of_a_mean() -> None:
    mean, error = mean_error([1.0, 0.0, 1.0, 1.0])
    assert (mean, error) == (0.75, pytest.approx(0.25))
    assert mean_error([1.0]) == (1.0, None)
    assert mean_error([1.0] * 60) == (1.0, pytest.approx(0.0161, abs=1e-4))  # one wrong in 60: 0.0167
    assert mean_error([0.0] * 60) == (0.0, pytest.approx(0.0161, abs=1e-4))


def test_a_question_is_told_by_its_label_and_known_by_its_hash(stories: Path) -> None:
    long = Question("x " * 200 + "the end", ("a",), label="")
    named = Question("x", ("a",), label="Which  is\nit?")
    card = run_tasks(open_model(stories), [Task("t", "c", "exact", (long, named), max_new_tokens=4)])
    assert card.answers[0].label.endswith("the end")
    assert len(card.answers[0].label) <= 96
    assert card.answers[1].label == "Which is it?"
    assert card.answers[1].hash == Question("x", ("a",), label="other").hash != Question("x", ("b",)).hash


@pytest.fixture
def task_file(tmp_path: Path) -> Path:
    rows = [{"who": name, "kind": kind} for name in NAMES for kind in ("girl", "boy", "cat")]
    (tmp_path / "names.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "names.toml"
    path.write_text(
        'capability = "factuality"\nmetric = "exact"\ndata = "names.jsonl"\nstop = ["."]\n'
        'prompt = "Once upon a time, there was a little {kind} named"\nanswer = "{who}"\n'
    )
    return path


def test_the_command_saves_records_and_compares(
    stories: Path, task_file: Path, tmp_path: Path, nanokit: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    saved = tmp_path / "card.json"
    ran = nanokit("evaluate", stories, "--tasks", task_file, "--save", saved, "--json")
    assert ran.status == 0
    assert ran.stdout.count("\n{") == 0
    found = ran.json()
    assert found["capabilities"]["factuality"]["questions"] == 12
    assert 0 < found["capabilities"]["factuality"]["score"] < 1
    assert len(found["answers"]) == 12
    assert read_card(saved).card.capabilities["factuality"].score == found["capabilities"]["factuality"]["score"]

    same = nanokit("compare", saved, stories)
    assert (same.status, "0 of 12 answers changed" in same.stdout) == (0, True), same.stderr
    with task_file.open("a") as file:
        file.write("header = 'x'\n")
    assert run(["compare", str(saved), str(stories)]) == 2
    assert "not the questions" in capsys.readouterr().err
    for arguments, message in (
        (("--tasks", task_file, "--record"), "no manifest.json"),
        (("--tasks", task_file, "--reference", saved), "not the questions"),
        (("--tasks", "piqa"), "--task-data DIR"),
        (("--tasks", task_file, "--data", task_file), "on text or on tasks"),
        ((), "nothing to measure on"),
        (("--tasks", task_file, "--task-limit", "0"), "at least 1"),
    ):
        assert run(["evaluate", str(stories), *map(str, arguments)]) == 2
        said = capsys.readouterr()
        assert (said.out, message in said.err) == ("", True)


def test_a_recorded_card_is_where_the_catalogue_looks(
    tiny_model: Callable[..., Path], task_file: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "student"
    shutil.copytree(tiny_model("llama"), folder)
    write_manifest(folder, Manifest("student"))
    card = card_of(folder, Asked((str(task_file),)), Asked((str(task_file),)).load())
    assert card.card.capabilities["factuality"].score == 0, "random weights know no name"
    assert run(["evaluate", str(folder), "--tasks", str(task_file), "--record", "--reference", str(folder)]) == 0
    found = read_manifest(folder).results["scorecard"]
    assert found["capabilities"]["factuality"] == {
        "score": 0.0, "error": pytest.approx(0.0714, abs=1e-4), "questions": 12, "of_teacher": None,
    }  # fmt: skip
    assert found["data"] == {"tasks": [str(task_file)], "limit": None}
