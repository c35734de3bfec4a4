"""Texts of the invented world, for training, calibration and evaluation, from one seed and nothing else.

A document is a page of passages; a passage is one thing said by one writer: a fact, a story, a sum. `WRITERS` says
which writers there are, which capability each belongs to and how often it is used: a new one is one more function and
one more row. The capabilities are the groups by which Gemini's report judges its Nano models (arXiv:2312.11805,
figure 3): each is asked for by questions of the held-out split, none of which was trained on (`nano/demo/passage.py`).

Pure standard library; the same seed gives the same bytes on every machine and every supported Python.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from nano.demo import telling, thinking
from nano.demo.passage import Passage, Random, Split, Writer
from nano.demo.world import World, make_world

SEED = 7
"""The seed of the shipped teacher's world and texts."""

FILES: Mapping[Split, str] = {
    "train": "train.jsonl",
    "calibration": "calibration.jsonl",
    "heldout": "heldout.jsonl",
}
DRAWS = 30
"""Passages drawn, at most, for each question wanted."""
LONGEST_PAGE = 8
"""Passages on the longest page; pages of 1 to this many are equally frequent."""

CAPABILITIES = (
    "factuality", "long-context", "math-science", "summarization", "reasoning", "coding", "multilingual",
)  # fmt: skip

WRITERS: tuple[tuple[str, Writer, int, int], ...] = (
    ("", telling.creature_page, 2, 1),
    ("", telling.person_page, 1, 1),
    ("factuality", telling.fact_question, 7, 4),
    ("", telling.note, 4, 14),
    ("long-context", telling.needle, 2, 3),
    ("math-science", thinking.sum_question, 5, 12),
    ("math-science", thinking.word_problem, 3, 4),
    ("math-science", thinking.conversion, 3, 4),
    ("summarization", telling.story, 4, 3),
    ("reasoning", thinking.ordering, 4, 3),
    ("reasoning", thinking.syllogism, 3, 2),
    ("coding", thinking.program, 6, 14),
    ("multilingual", telling.translation, 8, 4),
    ("", telling.dictionary_page, 1, 1),
)
"""The capability that its held-out questions ask for (none: it only teaches), who writes, and how often: on ordinary
pages, and on those of the end of the teacher's training, which have more of what is learned last."""


@dataclass(frozen=True)
class Question:
    """A prompt with its one right continuation.

    Attributes:
        group: the capability it asks for.
        prompt: ends where the answer begins, without the space before it.
        answer: what should follow, up to the end of the line.
    """

    group: str
    prompt: str
    answer: str


def documents(seed: int, count: int, split: Split = "train") -> list[str]:
    """`count` pages of a split.

    Args:
        seed: of the world and of the texts.
        count: how many pages; a longer list begins with the shorter one.
        split: "train", "calibration" or "heldout"; no passage's key occurs in two of them.
    """
    return list(islice(_pages(f"{split} {seed}", seed, split, late=False), count))


def late_pages(seed: int, count: int) -> list[str]:
    """`count` pages of the training split for the end of the teacher's training."""
    return list(islice(_pages(f"late {seed}", seed, "train", late=True), count))


def _pages(source: str, seed: int, split: Split, *, late: bool) -> Iterator[str]:
    world, rng = make_world(seed), random.Random(source)
    writers = [row[1] for row in WRITERS for _ in range(row[3] if late else row[2])]
    while True:
        count = 1 + rng.randrange(LONGEST_PAGE)
        yield "\n\n".join(draw(rng, rng.choice(writers), world, split).text for _ in range(count)) + "\n"


def draw(rng: Random, writer: Writer, world: World, split: Split) -> Passage:
    """A writer's next passage of one split."""
    while True:
        passage = writer(rng, world)
        if passage.split == split:
            return passage


def questions(seed: int, each: int, split: Split = "heldout") -> list[Question]:
    """`each` different questions of every capability, in its writers' proportions, from passages of one split.

    Of facts a small split has no more than some dozens: there are fewer where `each` is more than that.
    """
    world = make_world(seed)
    found: list[Question] = []
    for group in CAPABILITIES:
        rng = random.Random(f"questions {split} {seed} {group}")
        writers = [writer for name, writer, weight, _ in WRITERS if name == group for _ in range(weight)]
        prompts: dict[str, str] = {}
        for _ in range(DRAWS * each):
            if len(prompts) == each:
                break
            passage = draw(rng, rng.choice(writers), world, split)
            index = rng.randrange(len(passage.asked))
            prompts.setdefault(passage.prompt(index), passage.asked[index][1])
        found += [Question(group, prompt, answer) for prompt, answer in prompts.items()]
    return found


def write_demo_text(
    folder: Path, seed: int = SEED, train: int = 4000, calibration: int = 200, heldout: int = 200
) -> dict[Split, Path]:
    """Write train.jsonl, calibration.jsonl and heldout.jsonl, one page a line under "text"; gives each split's file.

    Args:
        folder: exists, or is made.
        seed: of the world and of the texts.
        train, calibration, heldout: how many pages each file gets.
    """
    folder.mkdir(parents=True, exist_ok=True)
    counts: dict[Split, int] = {"train": train, "calibration": calibration, "heldout": heldout}
    for split, count in counts.items():
        lines = [json.dumps({"text": page}, ensure_ascii=False) for page in documents(seed, count, split)]
        (folder / FILES[split]).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {split: folder / name for split, name in FILES.items()}


def text_hash(seed: int, pages: int = 500) -> str:
    """Hex sha256 over the first pages of every split: the shipped teacher records the one it was trained on."""
    digest = hashlib.sha256()
    for split in FILES:
        for page in documents(seed, pages, split):
            digest.update(page.encode() + b"\0")
    return digest.hexdigest()
