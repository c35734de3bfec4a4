"""The invented world that the demo's texts speak of: its creatures, its people, and what is true of each.

A world is drawn from one seed and then fixed: every text that mentions a fact mentions the same one, so a model
trained on the texts can be asked about it and the answer checked. Nothing here exists outside the demo: what a
model knows of this world it has learned from these texts.

Pure standard library. Only `random.Random` with `choice`, `randrange`, `random` and `shuffle` is used, whose
sequences are the same in every supported Python.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

CREATURES = (
    "mipple", "dorvo", "kelfin", "lumbat", "parrow", "zindle", "tovak", "rumple", "sorrel", "vexel", "bindle",
    "garnu", "holpa", "jibber", "quillo", "wobber", "nurbit", "fendle", "murk", "tassel", "grobin", "plover",
    "snarf", "velloo", "yaffle", "drumble", "pentu", "calopy", "bremi", "hodgit", "lirra", "morpet",
)  # fmt: skip
PEOPLE = (
    "Mara", "Tavi", "Bo", "Pia", "Sam", "Lena", "Otto", "Nell", "Rudi", "Fay", "Jon", "Kit", "Dara", "Hugo", "Wim",
    "Zoe", "Lars", "Mina", "Gus", "Vera",
)  # fmt: skip
TOWNS = ("Ondal", "Brimley", "Tarn", "Quayle", "Vost", "Merrin", "Polder", "Sedge")
JOBS = ("baker", "sailor", "teacher", "farmer", "doctor", "painter", "miller", "tailor", "singer", "potter")
COLOURS = ("red", "green", "blue", "yellow", "white", "black", "brown", "purple", "pink", "silver")
SIZES = ("tiny", "small", "big", "huge")
FOODS = ("seeds", "berries", "leaves", "fish", "nuts", "worms", "roots", "honey", "moss", "apples", "corn", "mushrooms")
HOMES = ("caves", "rivers", "forests", "deserts", "lakes", "mountains", "meadows", "swamps")
SOUNDS = ("oorp", "brip", "wheek", "tock", "hoom", "zzat", "pling", "mrow")
LEGS = ("two", "four", "six", "eight")


@dataclass(frozen=True)
class Creature:
    """One kind of animal of the world and what is true of it.

    Attributes:
        name: what it is called, lower case, begins with a consonant.
        size, colour, legs, food, home, sound: one word each, from this module's lists.
    """

    name: str
    size: str
    colour: str
    legs: str
    food: str
    home: str
    sound: str


@dataclass(frozen=True)
class Person:
    """One person of the world and what is true of them.

    Attributes:
        name: first name.
        job, town, colour, pet: profession, home town, favourite colour, kind of creature kept.
    """

    name: str
    job: str
    town: str
    colour: str
    pet: str


@dataclass(frozen=True)
class World:
    """All creatures and people."""

    creatures: tuple[Creature, ...]
    people: tuple[Person, ...]

    def creature(self, name: str) -> Creature:
        """The creature of that name (KeyError if there is none)."""
        return {c.name: c for c in self.creatures}[name]

    def person(self, name: str) -> Person:
        """The person of that name (KeyError if there is none)."""
        return {p.name: p for p in self.people}[name]


def make_world(seed: int) -> World:
    """The world of a seed: the same names in every world, other facts in each."""
    rng = random.Random(f"world {seed}")
    creatures = tuple(
        Creature(name, *(rng.choice(words) for words in (SIZES, COLOURS, LEGS, FOODS, HOMES, SOUNDS)))
        for name in CREATURES
    )
    people = tuple(Person(name, *(rng.choice(words) for words in (JOBS, TOWNS, COLOURS, CREATURES))) for name in PEOPLE)
    return World(creatures, people)
