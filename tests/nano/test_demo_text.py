"""The demo's text: the same everywhere, splits apart, and everything it says is true in its world."""

from __future__ import annotations

import itertools
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nano.corpus import read_documents
from nano.demo.text import (
    FILES,
    LEAST,
    MOST,
    SEED,
    Split,
    documents,
    questions,
    split_of,
    text_hash,
    write_demo_text,
)
from nano.demo.world import make_world

PAGES = 400
SPLITS: tuple[Split, ...] = ("train", "calibration", "heldout")


@pytest.fixture(scope="module")
def passages() -> list[str]:
    return [p for split in SPLITS for page in documents(SEED, PAGES, split) for p in page.split("\n\n")]


def fresh_python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, **environment}
    )
    return done.stdout.strip()


def test_other_processes_write_the_same_text() -> None:
    code = "from nano.demo.text import text_hash; print(text_hash(7, 50))"
    hashes = {fresh_python(code, PYTHONHASHSEED=seed) for seed in ("0", "1", "4711")}
    assert hashes == {text_hash(7, 50)}


def test_the_global_random_state_plays_no_part() -> None:
    random.seed(1)
    before = documents(3, 5)
    random.seed(2)
    assert documents(3, 5) == before
    assert documents(4, 5) != before


def test_a_longer_list_begins_with_the_shorter() -> None:
    assert documents(SEED, 30, "heldout")[:10] == documents(SEED, 10, "heldout")


def test_text_needs_no_torch() -> None:
    code = "import sys, nano.demo.text, nano.demo.assets; print(sorted({'torch', 'numpy', 'transformers'} & set(sys.modules)))"  # noqa: E501
    assert fresh_python(code) == "[]"


def test_no_passage_is_in_two_splits() -> None:
    held = {s: {p for page in documents(SEED, PAGES, s) for p in page.split("\n\n")} for s in SPLITS}
    for one, other in itertools.combinations(SPLITS, 2):
        assert not held[one] & held[other]
    for split, texts in held.items():
        assert {split_of(p) for p in texts} == {split}


def test_no_heldout_question_is_on_a_training_page() -> None:
    trained = "\n\n".join(documents(SEED, 3000))
    asked = [q for q in questions(SEED, 200) if q.group != "facts"]  # a fact must be trained on to be known
    assert len(asked) > 80
    for question in asked:
        assert f"{question.prompt} {question.answer}." not in trained


def test_splits_have_their_share() -> None:
    """Passages drawn without a split fall 92 : 4 : 4; 3,000 draws put a share of 4% within ±1.5% (4 sigma)."""
    drawn = [f"passage {i}" for i in range(3000)]
    shares = {s: sum(split_of(p) == s for p in drawn) / len(drawn) for s in SPLITS}
    assert shares["train"] == pytest.approx(0.92, abs=0.02)
    assert shares["heldout"] == pytest.approx(0.04, abs=0.015)


def test_every_sum_is_right(passages: list[str]) -> None:
    sums = re.findall(r"(\d+) ([+-]) (\d+) = (\d+)\.", "\n".join(passages))
    assert len(sums) > 1000
    for a, sign, b, result in sums:
        assert int(result) == (int(a) + int(b) if sign == "+" else int(a) - int(b)), (a, sign, b)


def test_every_word_problem_is_right(passages: list[str]) -> None:
    checked = 0
    for passage in passages:
        told = re.match(r"(\w+) has (\d+) (\w+)\. (\w+) gives (\w+) (\d+)", passage)
        if told:
            who, a, what, giver, _, b = told.groups()
            left = int(a) - int(b) if giver == who else int(a) + int(b)
            assert passage.endswith(f"How many {what} has {who} now?\nAnswer: {left}."), passage
            checked += 1
    assert checked > 100


def test_every_count_goes_in_even_steps(passages: list[str]) -> None:
    counts = [re.fullmatch(r"Count (up|down) by (\d+) from (\d+): ([\d, ]+)\.", p) for p in passages]
    found = [c for c in counts if c]
    assert len(found) > 100
    for count in found:
        numbers = [int(n) for n in count[4].split(", ")]
        assert numbers[0] == int(count[3])
        step = int(count[2]) * (1 if count[1] == "up" else -1)
        assert {b - a for a, b in itertools.pairwise(numbers)} == {step}


def test_every_ordering_is_right(passages: list[str]) -> None:
    checked = 0
    for passage in passages:
        pairs = re.findall(r"(\w+) is (\w+) than (\w+)\.", passage)
        for word, answer in re.findall(r"Who is the (\w+)\?\nAnswer: (\w+)\.", passage):
            above, below = {a for a, _, _ in pairs}, {b for _, _, b in pairs}
            expected = above - below if word in MOST.values() else below - above
            assert word in (*MOST.values(), *LEAST.values())
            assert {answer} == expected, passage
            checked += 1
    assert checked > 100


def test_facts_are_those_of_the_world(passages: list[str]) -> None:
    world = make_world(SEED)
    asked = dict.fromkeys(re.findall(r"Question: What colour is a (\w+)\?\nAnswer: (\w+)\.", "\n".join(passages)))
    assert len(asked) > 20
    assert all(world.creature(name).colour == colour for name, colour in asked)
    homes = re.findall(r"Question: Where does ([A-Z]\w+) come from\?\nAnswer: (\w+)\.", "\n".join(passages))
    assert homes
    assert all(world.person(name).town == town for name, town in homes)


def test_answers_of_needles_stand_in_the_text() -> None:
    needles = [q for q in questions(SEED, 400) if q.group == "needle"]
    assert len(needles) > 50
    for question in needles:
        assert question.answer.removeprefix("the ") in question.prompt.split("Question:")[0]


def test_grammar_of_articles(passages: list[str]) -> None:
    assert not re.findall(r"\b[Aa] [aeiou]\w*", "\n".join(passages))


def test_files_are_what_the_corpus_reader_reads(tmp_path: Path) -> None:
    files = write_demo_text(tmp_path / "text", train=20, calibration=5, heldout=5)
    assert {split: path.name for split, path in files.items()} == dict(FILES)
    assert read_documents([files["train"]]) == documents(SEED, 20)
    assert read_documents([files["heldout"]]) == documents(SEED, 5, "heldout")
