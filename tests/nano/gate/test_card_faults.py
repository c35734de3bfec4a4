"""Faults in a real model that its scorecard shows: an int4 stories260K asked how real stories go on."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import pytest

from nano.errors import CheckFailedError
from nano.gate.compare import require_passed, run_compare
from nano.scorecard_file import Asked, card_of, write_card

STORIES, BEGIN, NEXT = 80, 40, 8
"""How many; words of a story that are read; words that may follow."""


@pytest.fixture(scope="module")
def home(stories: Path, tinystories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an int4 model, a task file and the model's scorecard."""
    from quantize.options import QuantizeOptions
    from quantize.run import run_quantize

    home = tmp_path_factory.mktemp("faults")
    with tinystories.open(encoding="utf-8") as lines:
        words = [json.loads(line)["text"].split() for line in itertools.islice(lines, STORIES)]
    ends = [" ".join(story[BEGIN : BEGIN + NEXT]) for story in words]
    rows = [
        {"begin": " ".join(story[:BEGIN]), "ends": [ends[(i + step) % STORIES] for step in (0, 1, 7, 20)]}
        for i, story in enumerate(words)
    ]
    (home / "next.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (home / "next.toml").write_text(
        'capability = "stories"\nmetric = "choice"\ndata = "next.jsonl"\nprompt = "{begin}"\nchoices = "{ends}"\n'
        'gold = "0"\nlength = "tokens"\n'
    )
    run_quantize(stories, [], home / "int4", QuantizeOptions(method="rtn"))
    asked = Asked((str(home / "next.toml"),))
    write_card(home / "card.json", card_of(home / "int4", asked, asked.load()))
    return home


def test_an_identical_artifact_passes(home: Path) -> None:
    shutil.copytree(home / "int4", home / "copy")
    compared = run_compare(home / "card.json", home / "copy")
    require_passed(compared)
    assert compared.changes == ()
    assert {verdict.value for verdict in compared.verdicts} == {0.0}
    assert compared.baseline.scores["capabilities"]["stories"]["score"] > 0.7


def test_two_layers_swapped_fail_with_the_questions_that_were_lost(home: Path) -> None:
    from safetensors.numpy import load_file, save_file

    shutil.copytree(home / "int4", home / "swapped")
    tensors = load_file(home / "swapped/model.safetensors")
    other = {"layers.1.": "layers.2.", "layers.2.": "layers.1."}
    tensors = {next((k.replace(a, b) for a, b in other.items() if a in k), k): v for k, v in tensors.items()}
    save_file(tensors, home / "swapped/model.safetensors", metadata={"format": "pt"})
    compared = run_compare(home / "card.json", home / "swapped")
    assert {verdict.name: verdict.outcome for verdict in compared.verdicts} == {"stories": "failed", "flips": "failed"}
    with pytest.raises(CheckFailedError, match="stories lost"):
        require_passed(compared)
    first = compared.changes[0]
    assert (first.score_before, first.score_after) == (1, 0)
    assert first.expected == first.before != first.after


def test_a_tokenizer_off_by_one_fails(home: Path) -> None:
    shutil.copytree(home / "int4", home / "shifted")
    path = home / "shifted/tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    size = len(vocabulary) - 3
    tokenizer["model"]["vocab"] = {k: i if i < 3 else 3 + (i - 2) % size for k, i in vocabulary.items()}
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    compared = run_compare(home / "card.json", home / "shifted")
    assert {verdict.name for verdict in compared.refused} == {"stories", "flips"}


def test_the_float_model_is_told_apart_from_the_int4_one_only_where_asked(home: Path, stories: Path) -> None:
    compared = run_compare(home / "card.json", stories)
    assert [verdict.name for verdict in compared.verdicts] == ["stories"]
    require_passed(compared)
    (home / "gate.toml").write_text("max_flips = 0.3\n")
    compared = run_compare(home / "card.json", stories, gate=home / "gate.toml")
    assert {verdict.name: verdict.outcome for verdict in compared.verdicts}["flips"] == "passed"
