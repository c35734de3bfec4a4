"""Writers of what has to be worked out: sums and measures, order and logic, small programs.

Every writer is a function from (random source, world) to one `Passage`.
"""

from __future__ import annotations

import re
from itertools import pairwise

from nano.demo.passage import Passage, Random, shuffled
from nano.demo.world import COLOURS, PEOPLE, World

LARGEST_SUM = 60
LARGEST_AMOUNT = 9
FRUITS = ("plums", "pears", "nuts", "shells", "coins", "stones", "beans", "cakes")
KINDS = ("dax", "wug", "fep", "zon", "blick", "tove", "rath", "slith", "gimble", "wabe", "borog", "mim")
MEASURES = {
    ("taller", "tallest"): ("shorter", "shortest"),
    ("older", "oldest"): ("younger", "youngest"),
    ("faster", "fastest"): ("slower", "slowest"),
}
VARIABLES = ("a", "b", "n", "x", "y")


def _pair(rng: Random) -> tuple[int, int, str]:
    """Two numbers and the key that they share with all sums and differences of the two."""
    total = 2 + rng.randrange(LARGEST_SUM - 1)
    a = 1 + rng.randrange(total - 1)
    b = total - a
    return a, b, f"sum of {min(a, b)} and {max(a, b)}"


def sum_question(rng: Random, _world: World) -> Passage:
    """A sum or a difference of numbers up to LARGEST_SUM: the tens first, then all."""
    a, b, key = _pair(rng)
    if rng.randrange(2):
        return Passage("", ((f"What is {a} + {b}, in two steps?", f"{a + b - b % 10}, {a + b}"),), key)
    return Passage("", ((f"What is {a + b} - {a}, in two steps?", f"{b + a % 10}, {b}"),), key)


def word_problem(rng: Random, _world: World) -> Passage:
    """The same in words."""
    a, b, key = _pair(rng)
    (who, giver), what = shuffled(rng, PEOPLE)[:2], rng.choice(FRUITS)
    question = f"How many {what} has {who} now, in two steps?"
    if rng.randrange(2):
        answer = f"{a + b - b % 10}, {a + b}"
        return Passage(f"{who} had {a} {what} and got {b} from {giver}.", ((question, answer),), key)
    return Passage(f"{who} had {a + b} {what} and gave {b} to {giver}.", ((question, f"{a + b % 10}, {a}"),), key)


def conversion(rng: Random, world: World) -> Passage:
    """So many of one unit in another."""
    m = rng.choice(world.measures)
    n = 1 + rng.randrange(LARGEST_AMOUNT)
    question, answer = rng.choice(
        (
            (f"How many {m.small}s are {n} {m.large}s?", n * m.ratio),
            (f"Turn {n} {m.large}s into {m.small}s.", n * m.ratio),
            (f"How many {m.large}s are {n * m.ratio} {m.small}s?", n),
            (f"Turn {n * m.ratio} {m.small}s into {m.large}s.", n),
        )
    )
    return Passage("", ((question, str(answer)),), key=question)


def ordering(rng: Random, _world: World) -> Passage:
    """Three or four people compared pair by pair, upwards or downwards; who follows whom?"""
    chain = shuffled(rng, PEOPLE)[: 3 + (rng.randrange(3) == 0)]
    more, less = rng.choice(tuple(MEASURES.items()))
    (told, first, last) = (more[0], more[1], less[1]) if rng.randrange(2) else (less[0], less[1], more[1])
    asked = [
        (f"Name all, the {first} first.", ", ".join(chain)),
        (f"Name all, the {last} first.", ", ".join(chain[::-1])),
    ]
    return Passage(" ".join(f"{a} is {told} than {b}." for a, b in pairwise(chain)), tuple(shuffled(rng, asked)))


def syllogism(rng: Random, _world: World) -> Passage:
    """A chain of rules in any order; where does it lead?"""
    first, second = shuffled(rng, KINDS)[:2]
    colour, name = rng.choice(COLOURS), rng.choice(PEOPLE)
    rules = [f"Each {first} is a {second}.", f"Each {second} is {colour}.", f"{name} is a {first}."]
    question = f"What colour is {name}, and why?"
    return Passage(" ".join(shuffled(rng, rules)), ((question, f"{first}, {second}, {colour}"),))


def program(rng: Random, _world: World) -> Passage:
    """A small Python program; what does it print? Its key is the program, whatever its variables are called."""
    write = rng.choice((_assign, _assign, _index, _choose, _append, _loop))
    x, y = shuffled(rng, VARIABLES)[:2]
    lines, printed = write(rng, x, y)
    told = "\n".join(lines)
    key = re.sub(rf"\b{y}\b", "second", re.sub(rf"\b{x}\b", "first", told))
    return Passage(told, (("What does this print?", printed),), key)


def _assign(rng: Random, x: str, y: str) -> tuple[list[str], str]:
    a, b = rng.randrange(10), rng.randrange(10)
    if rng.randrange(2):
        return [f"{x} = {a}", f"{y} = {b}", f"print({x} + {y})"], str(a + b)
    return [f"{x} = {a + b}", f"{y} = {x} - {a}", f"print({y})"], str(b)


def _index(rng: Random, x: str, y: str) -> tuple[list[str], str]:
    items = [rng.randrange(10) for _ in range(3 + rng.randrange(2))]
    at = rng.randrange(len(items))
    return [f"{x} = {items}", f"{y} = {x}[{at}]", f"print({y})"], str(items[at])


def _choose(rng: Random, x: str, _y: str) -> tuple[list[str], str]:
    n, limit = shuffled(rng, range(10))[:2]
    yes, no = shuffled(rng, COLOURS)[:2]
    sign = rng.choice("<>")
    right = n < limit if sign == "<" else n > limit
    lines = [f"{x} = {n}", f"if {x} {sign} {limit}:", f'    print("{yes}")', "else:", f'    print("{no}")']
    return lines, yes if right else no


def _append(rng: Random, x: str, _y: str) -> tuple[list[str], str]:
    items, more = [rng.randrange(10) for _ in range(2 + rng.randrange(2))], rng.randrange(10)
    if rng.randrange(2):
        return [f"{x} = {items}", f"{x}.append({more})", f"print({x})"], str([*items, more])
    return [f"{x} = {items}", f"{x}.reverse()", f"print({x})"], str(items[::-1])


def _loop(rng: Random, x: str, y: str) -> tuple[list[str], str]:
    start, times, step = rng.randrange(10), 2 + rng.randrange(3), 1 + rng.randrange(4)
    lines = [f"{x} = {start}", f"for {y} in range({times}):", f"    {x} = {x} + {step}", f"print({x})"]
    return lines, str(start + times * step)
