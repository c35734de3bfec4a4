"""The invented world that the demo's texts speak of: its creatures, people, measures and languages.

A world is drawn from one seed and then fixed: every text that mentions a fact mentions the same one, so a model
trained on the texts can be asked about it and the answer checked. Nothing here exists outside the demo: what a
model knows of this world it has learned from these texts.

Pure standard library. Only `random.Random` with `choice`, `randrange`, `random` and `shuffle` is used, whose
sequences are the same in every supported Python.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
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
FOODS = ("seeds", "berries", "leaves", "fish", "nuts", "worms", "roots", "honey", "moss", "apples", "corn", "mushrooms")
HOMES = ("caves", "rivers", "forests", "deserts", "lakes", "mountains", "meadows", "swamps")
SOUNDS = ("oorp", "brip", "wheek", "tock", "hoom", "zzat", "pling", "mrow")
LEGS = ("two", "three", "four", "five", "six", "seven", "eight", "nine")
UNITS = (("zorm", "pip"), ("tolk", "bem"), ("drim", "sut"), ("gant", "lop"), ("harl", "ved"), ("mosk", "nid"))
LARGEST_RATIO = 9

NOUNS = ("fox", "hen", "dog", "cat", "bear", "boat", "tree", "house", "king", "child", "moon", "river")
ADJECTIVES = ("big", "small", "old", "young", "red", "blue", "kind", "wild")
VERBS = ("sees", "finds", "likes", "helps", "hears", "fears")
LANGUAGES: Mapping[str, tuple[str, ...]] = {
    "Orvi": (
        "brel", "dano", "fisk", "gora", "hule", "jant", "kima", "lorn", "mesu", "nedo", "olf", "prin", "quat",
        "rasu", "silm", "tamo", "ulka", "vint", "woro", "yebb", "zaru", "chan", "drol", "esk", "flim", "grat",
    ),
    "Tessan": (
        "abra", "beko", "celu", "dime", "elto", "furi", "gape", "hiso", "ilda", "juno", "kalo", "lupe", "mavo",
        "nire", "obel", "palu", "quen", "rofi", "sute", "tibo", "umar", "vedo", "wali", "xano", "yori", "zeph",
    ),
}  # fmt: skip
"""The invented languages and their words; a world's seed says which word means what."""


@dataclass(frozen=True)
class Creature:
    """One kind of animal of the world and what is true of it.

    Attributes:
        name: what it is called, lower case, begins with a consonant.
        colour, legs, food, home, sound: one word each, from this module's lists.
    """

    name: str
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
class Measure:
    """One large unit is `ratio` small ones."""

    large: str
    small: str
    ratio: int


@dataclass(frozen=True)
class World:
    """All creatures and people, the measures, and each language's word for each English one."""

    creatures: tuple[Creature, ...]
    people: tuple[Person, ...]
    measures: tuple[Measure, ...]
    dictionary: Mapping[str, Mapping[str, str]]

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
        Creature(name, *(rng.choice(words) for words in (COLOURS, LEGS, FOODS, HOMES, SOUNDS))) for name in CREATURES
    )
    people = tuple(Person(name, *(rng.choice(words) for words in (JOBS, TOWNS, COLOURS, CREATURES))) for name in PEOPLE)
    measures = tuple(Measure(large, small, 2 + rng.randrange(LARGEST_RATIO - 1)) for large, small in UNITS)
    dictionary = {}
    for language, words in LANGUAGES.items():
        order = list(words)
        rng.shuffle(order)
        dictionary[language] = dict(zip((*NOUNS, *ADJECTIVES, *VERBS), order, strict=True))
    return World(creatures, people, measures, dictionary)
