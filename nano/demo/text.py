"""Texts of the invented world, for training, calibration and evaluation, from one seed and nothing else.

A document is a page of passages; a passage is one thing said by one writer: a fact page, a story, a sum. Each
writer is a function from (random source, world) to text, and `WRITERS` says which there are and how often each
is used: a new capability is one more function and one more row.

**Disjoint by construction.** Each passage belongs to one split by a hash of what it tells: a page of the
held-out split holds only passages that hash into that split, and such a passage is never put on a training page,
whatever the seed or the number of pages. A fact of the world has to be trained on to be known; there, only the
passages that ask for it differ.

Pure standard library; the same seed gives the same bytes on every machine and every supported Python.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Literal, TypeVar

from nano.demo.world import COLOURS, PEOPLE, Creature, Person, World, make_world

SEED = 7
"""The seed of the shipped teacher's world and texts."""

Split = Literal["train", "calibration", "heldout"]
Random = random.Random
T = TypeVar("T")
Writer = Callable[[Random, World], str]

FILES: Mapping[Split, str] = {
    "train": "train.jsonl",
    "calibration": "calibration.jsonl",
    "heldout": "heldout.jsonl",
}
ANSWER = "Answer:"
LONGEST_PAGE = 8
"""Passages on the longest page; pages of 1 to this many are equally frequent."""

SPECIES = ("fox", "bear", "mouse", "rabbit", "goose", "cat", "dog", "hen", "pony", "badger")
TRAITS = ("brave", "clever", "kind", "lazy", "shy", "merry", "proud", "gentle")
THINGS = ("key", "kite", "drum", "lamp", "bell", "coin", "ring", "map", "hat", "ball", "cup", "shell")
SPOTS = (
    "under the bridge", "behind the mill", "in the barn", "by the well", "on the hill", "under the old oak",
    "in the attic", "beside the pond", "inside the red box", "on the top shelf",
)  # fmt: skip
FRUITS = ("plums", "pears", "nuts", "shells", "coins", "stones", "beans", "cakes")
WEATHER = ("It rained all morning.", "The sun was warm.", "Snow fell on the roofs.", "A cold wind blew.",
           "The sky was clear.", "Fog lay on the fields.")  # fmt: skip
MOODS = ("glad", "tired", "hungry", "calm", "proud")
NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four"}
MEASURES = ("taller", "older", "faster", "stronger")
MOST = {"taller": "tallest", "older": "oldest", "faster": "fastest", "stronger": "strongest"}
LEAST = {"taller": "shortest", "older": "youngest", "faster": "slowest", "stronger": "weakest"}


def documents(seed: int, count: int, split: Split = "train") -> list[str]:
    """`count` pages of a split.

    Args:
        seed: of the world and of the texts.
        count: how many pages; a longer list begins with the shorter one.
        split: "train", "calibration" or "heldout"; no passage occurs in two of them.
    """
    return list(islice(_pages(seed, split), count))


def split_of(passage: str) -> Split:
    """The split of a passage, by a hash of what it tells: 4% held out, 4% calibration, the rest training.

    What is told before the first question decides alone, so that two questions about one text share a split.
    """
    told = passage if passage.startswith("Question:") else passage.split("\nQuestion:")[0]
    bucket = int.from_bytes(hashlib.sha256(told.encode()).digest()[:4], "big") % 100
    return "heldout" if bucket < 4 else "calibration" if bucket < 8 else "train"


def _pages(seed: int, split: Split) -> Iterator[str]:
    world = make_world(seed)
    rng = random.Random(f"{split} {seed}")
    passages = _passages(rng, world, split)
    while True:
        yield "\n\n".join(passage for _, passage in islice(passages, 1 + rng.randrange(LONGEST_PAGE)))


def _passages(rng: Random, world: World, split: Split) -> Iterator[tuple[str, str]]:
    """(capability, passage) without end, those of one split only."""
    writers = [(group, writer) for group, writer, weight in WRITERS for _ in range(weight)]
    while True:
        group, writer = rng.choice(writers)
        passage = writer(rng, world)
        if split_of(passage) == split:
            yield group, passage


@dataclass(frozen=True)
class Question:
    """A prompt with its one right continuation.

    Attributes:
        group: the capability it asks for.
        prompt: ends where the answer begins, without the space before it.
        answer: what should follow, up to the full stop.
    """

    group: str
    prompt: str
    answer: str


def questions(seed: int, count: int, split: Split = "heldout") -> list[Question]:
    """`count` questions, each the last one of a passage of a split that no other split contains."""
    asked = (
        Question(group, *_cut_answer(passage))
        for group, passage in _passages(random.Random(f"questions {split} {seed}"), make_world(seed), split)
        if ANSWER in passage
    )
    return list(islice(asked, count))


def _cut_answer(passage: str) -> tuple[str, str]:
    head, answer = passage.rsplit(ANSWER, 1)
    return head + ANSWER, answer.strip().removesuffix(".")


def _ask(question: str, answer: str) -> str:
    return f"Question: {question}\n{ANSWER} {answer}."


def _ask_all(asked: Sequence[tuple[str, str]]) -> str:
    return "\n".join(_ask(question, answer) for question, answer in asked)


def _pick_some(rng: Random, items: Sequence[T], least: int) -> list[T]:
    """A random selection of at least `least` items, in random order."""
    order = list(items)
    rng.shuffle(order)
    return order[: least + rng.randrange(len(items) - least + 1)]


def creature_questions(creature: Creature) -> list[tuple[str, str]]:
    """Questions about a creature, each with its one right answer."""
    name = creature.name
    return [
        (f"What colour is a {name}?", creature.colour),
        (f"How big is a {name}?", creature.size),
        (f"How many legs has a {name}?", creature.legs),
        (f"What does a {name} eat?", creature.food),
        (f"Where does a {name} live?", f"in {creature.home}"),
        (f"What does a {name} say?", creature.sound),
    ]


def person_questions(person: Person) -> list[tuple[str, str]]:
    """Questions about a person, each with its one right answer."""
    name = person.name
    return [
        (f"What is the job of {name}?", person.job),
        (f"Where does {name} come from?", person.town),
        (f"Which colour does {name} like?", person.colour),
        (f"What animal does {name} keep?", f"a {person.pet}"),
    ]


def _creature_page(rng: Random, world: World) -> str:
    c = rng.choice(world.creatures)
    lead = rng.choice((f"The {c.name} is a {c.size} {c.colour} animal.", f"A {c.name} is {c.size} and {c.colour}."))
    facts = [
        rng.choice((f"It lives in {c.home}.", f"You find it in {c.home}.")),
        rng.choice((f"It eats {c.food}.", f"Its food is {c.food}.")),
        rng.choice((f"It has {c.legs} legs.", f"It walks on {c.legs} legs.")),
        rng.choice((f'It says "{c.sound}".', f'Its call is "{c.sound}".')),
    ]
    return " ".join([lead, *_pick_some(rng, facts, 2)])


def _person_page(rng: Random, world: World) -> str:
    p = rng.choice(world.people)
    lead = rng.choice((f"{p.name} is a {p.job} from {p.town}.", f"In {p.town} lives {p.name}, a {p.job}."))
    facts = [
        rng.choice((f"{p.name} likes the colour {p.colour}.", f"{p.name} likes {p.colour} best.")),
        rng.choice((f"{p.name} keeps a {p.pet}.", f"At home {p.name} has a {p.pet}.")),
        f"The pet of {p.name} eats {world.creature(p.pet).food}.",
    ]
    return " ".join([lead, *_pick_some(rng, facts, 1)])


def _fact_questions(rng: Random, world: World) -> str:
    """Three to six questions about different creatures and people."""
    asked = []
    for _ in range(3 + rng.randrange(4)):
        if rng.randrange(3):
            asked.append(rng.choice(creature_questions(rng.choice(world.creatures))))
        else:
            asked.append(rng.choice(person_questions(rng.choice(world.people))))
    return _ask_all(asked)


def _story(rng: Random, _world: World) -> str:
    """A story in which a thing is put somewhere, other things happen, and it must be found again."""
    hero, friend = _two(rng, PEOPLE)
    species, other = _two(rng, SPECIES)
    colour, thing, spot = rng.choice(COLOURS), rng.choice(THINGS), rng.choice(SPOTS)
    trait, mood = rng.choice(TRAITS), rng.choice(MOODS)
    opening = rng.choice(("Once upon a time there was", "Long ago there lived", "One day we met"))
    begin = f"{opening} a {trait} {species} named {hero}. {hero} had a {colour} {thing}."
    hide = rng.choice((f"{hero} put the {thing} {spot}.", f"{hero} hid the {thing} {spot}."))
    middle = [
        rng.choice(WEATHER),
        rng.choice((f"{hero} was {mood}.", "The day was long.", f"They ate some {rng.choice(FRUITS)}.")),
    ]
    asks = rng.choice((f'"Where is your {thing}?" asked {friend}.', f'{friend} asked, "Where is the {thing}?"'))
    reply = f'"It is {spot}," said {hero}.'
    end = [
        f"So they went and found the {colour} {thing}.",
        rng.choice((f"{friend} said thank you and went home.", "They were friends from that day on.")),
    ]
    summary = f"In short: {friend} the {other} found the {thing} of {hero} the {species} {spot}."
    tail = [summary] if rng.randrange(2) else []
    arrival = f"Then a {other} named {friend} came by."
    told = " ".join([begin, hide, *_pick_some(rng, middle, 0), arrival, asks, reply, *end, *tail])
    about = [
        (f"Where was the {thing}?", spot),
        (f"What colour was the {thing}?", colour),
        (f"Who had a {thing}?", hero),
        (f"Who was the {other}?", friend),
    ]
    asked = _pick_some(rng, about, 0)
    return f"{told}\n{_ask_all(asked)}" if asked else told


def _needle(rng: Random, _world: World) -> str:
    """Things lie in places; some are asked for."""
    things, spots, colours = list(THINGS), list(SPOTS), list(COLOURS)
    for words in (things, spots, colours):
        rng.shuffle(words)
    count = 1 + rng.randrange(4)
    told = ["Here is one thing." if count == 1 else f"Here are {NUMBERS[count]} things."]
    told += [f"The {colours[i]} {things[i]} is {spots[i]}." for i in range(count)]
    asked = []
    for _ in range(1 + rng.randrange(3)):
        i = rng.randrange(count)
        place, thing = (f"Where is the {things[i]}?", spots[i]), (f"What is {spots[i]}?", f"the {things[i]}")
        asked.append(rng.choice((place, thing, (f"What colour is the {things[i]}?", colours[i]))))
    return " ".join(told) + "\n" + _ask_all(asked)


def _sums(rng: Random, _world: World) -> str:
    """A line of sums: results from 0 to 20."""
    lines = []
    for _ in range(4 + rng.randrange(4)):
        a, b = rng.randrange(11), rng.randrange(11)
        lines.append(f"{a} + {b} = {a + b}." if rng.randrange(2) else f"{a + b} - {a} = {b}.")
    return " ".join(lines)


def _word_problem(rng: Random, _world: World) -> str:
    who, giver = _two(rng, PEOPLE)
    what = rng.choice(FRUITS)
    a, b = 2 + rng.randrange(9), 1 + rng.randrange(9)
    if rng.randrange(2):
        told = f"{who} has {a} {what}. {giver} gives {who} {b} more. {a} + {b} = {a + b}."
        left = a + b
    else:
        told = f"{who} has {a + b} {what}. {who} gives {giver} {b} of them. {a + b} - {b} = {a}."
        left = a
    return f"{told}\n" + _ask(f"How many {what} has {who} now?", str(left))


def _counting(rng: Random, _world: World) -> str:
    step = rng.choice((1, 1, 2, 3, 5, 10))
    start, length = rng.randrange(12) * (step if step > 3 else 1), 4 + rng.randrange(6)
    numbers = [start + step * i for i in range(length)]
    way = "up"
    if rng.randrange(3) == 0:
        numbers, way = numbers[::-1], "down"
    return f"Count {way} by {step} from {numbers[0]}: {', '.join(map(str, numbers))}."


def _ordering(rng: Random, _world: World) -> str:
    """Two to four people compared pair by pair; who is at an end of the order?"""
    people = list(PEOPLE)
    rng.shuffle(people)
    chain = people[: 2 + rng.randrange(3)]
    measure = rng.choice(MEASURES)
    told = [f"Here are {NUMBERS[len(chain)]} people."]
    told += [f"{a} is {measure} than {b}." for a, b in pairwise(chain)]
    most, least = (f"Who is the {MOST[measure]}?", chain[0]), (f"Who is the {LEAST[measure]}?", chain[-1])
    asked = [most, least] if rng.randrange(2) else [least, most]
    return " ".join(told) + "\n" + _ask_all(asked[: 1 + rng.randrange(2)])


def _two(rng: Random, items: tuple[str, ...]) -> tuple[str, str]:
    """Two different items."""
    first = rng.randrange(len(items))
    second = (first + 1 + rng.randrange(len(items) - 1)) % len(items)
    return items[first], items[second]


WRITERS: tuple[tuple[str, Writer, int], ...] = (
    ("facts", _creature_page, 4),
    ("facts", _person_page, 2),
    ("facts", _fact_questions, 6),
    ("story", _story, 4),
    ("needle", _needle, 6),
    ("arithmetic", _sums, 2),
    ("arithmetic", _word_problem, 3),
    ("counting", _counting, 2),
    ("ordering", _ordering, 3),
)
"""The capability, who writes its passages, and how often relative to the others."""


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
