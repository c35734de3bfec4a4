"""A passage: something told, and questions about it with their one right answer; and which split it belongs to.

**Disjoint by construction.** A passage belongs to one split by a hash of its key, which names what has to be found
out: the two numbers of a sum, the meaning of a phrase to translate, the words of a question about a fact, or else the
whole text that the questions are about. Nothing of that key is ever on a page of another split, whatever the seed
or the number of pages: a sum that is held out was never trained on, in digits or in words.

Pure standard library.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from nano.demo.world import World

Split = Literal["train", "calibration", "heldout"]
Random = random.Random
T = TypeVar("T")

ASK, ANSWER = "Question:", "Answer:"
HELDOUT, CALIBRATION = 10, 5
"""Per cent of all keys in the two smaller splits."""


@dataclass(frozen=True)
class Passage:
    """One thing said by one writer.

    Attributes:
        told: what is told before any question; may be empty.
        asked: questions and their answers, a line each.
        key: what decides the split; empty: the whole of what is told.
    """

    told: str
    asked: tuple[tuple[str, str], ...] = ()
    key: str = ""

    @property
    def text(self) -> str:
        """What stands on a page."""
        return "\n".join([*([self.told] if self.told else []), *(_ask(q) + f" {a}" for q, a in self.asked)])

    @property
    def split(self) -> Split:
        """Where it belongs."""
        return split_of(self.key or self.told)

    def prompt(self, index: int) -> str:
        """The passage up to the answer of one question, without the other questions."""
        return "\n".join([*([self.told] if self.told else []), _ask(self.asked[index][0])])


Writer = Callable[[Random, World], Passage]


def _ask(question: str) -> str:
    return f"{ASK} {question}\n{ANSWER}"


def split_of(key: str) -> Split:
    """The split of a key: 10% held out, 5% calibration, the rest training."""
    bucket = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") % 100
    return "heldout" if bucket < HELDOUT else "calibration" if bucket < HELDOUT + CALIBRATION else "train"


def shuffled(rng: Random, items: Sequence[T]) -> list[T]:
    """The items in random order."""
    order = list(items)
    rng.shuffle(order)
    return order


def pick_some(rng: Random, items: Sequence[T], least: int) -> list[T]:
    """A random selection of at least `least` items, in random order."""
    return shuffled(rng, items)[: least + rng.randrange(len(items) - least + 1)]
