"""Writers of what can be looked up or retold: facts of the world, needles in text, stories, another language.

Every writer is a function from (random source, world) to one `Passage`.
"""

from __future__ import annotations

from nano.demo.passage import Passage, Random, pick_some, shuffled
from nano.demo.world import ADJECTIVES, COLOURS, NOUNS, PEOPLE, VERBS, Creature, Person, World

PRICES = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "twelve", "twenty", "fifty")
THINGS = ("key", "kite", "drum", "lamp", "bell", "coin", "ring", "map", "hat", "ball", "cup", "shell")
PLACES = ("barn", "mill", "attic", "cellar", "garden", "kitchen", "tower", "school", "shop", "church")
TOOLS = ("hammer", "rope", "saw", "ladder", "brush", "needle")
WORKS = ("mend the roof", "paint the boat", "build a wall", "fix the gate", "move the stove", "dig a well")
MOODS = ("tired", "busy", "ill", "away")
FILLERS = (
    "It rained all morning.", "The sun was warm.", "Snow fell on the roofs.", "A cold wind blew.", "The sky was clear.",
    "Fog lay on the fields.", "The day was long.", "Nobody said a word.", "The soup was hot.", "A clock struck ten.",
)  # fmt: skip


def creature_questions(creature: Creature) -> list[tuple[tuple[str, ...], str]]:
    """Ways to ask for each thing that is true of a creature, and its one right answer."""
    name = creature.name
    return [
        (_three("colour", name, f"What colour is a {name}?"), creature.colour),
        (_three("number of legs", name, f"How many legs has a {name}?"), creature.legs),
        (_three("food", name, f"What does a {name} eat?"), creature.food),
        (_three("home", name, f"Where does a {name} live?"), creature.home),
        (_three("call", name, f"What does a {name} say?"), creature.sound),
    ]


def person_questions(person: Person) -> list[tuple[tuple[str, ...], str]]:
    """Ways to ask for each thing that is true of a person, and its one right answer."""
    name = person.name
    return [
        (_three("job", name, f"What work does {name} do?"), person.job),
        (_three("town", name, f"Where does {name} come from?"), person.town),
        (_three("best colour", name, f"Which colour does {name} like?"), person.colour),
        (_three("pet", name, f"What animal does {name} keep?"), person.pet),
    ]


def _three(what: str, name: str, plain: str) -> tuple[str, str, str]:
    owner = name if name[0].isupper() else f"a {name}"
    return plain, f"What is the {what} of {owner}?", f"Tell the {what} of {owner}."


def fact_question(rng: Random, world: World) -> Passage:
    """One question about a creature or a person."""
    everybody: tuple[Creature | Person, ...] = (*world.creatures, *world.people)
    about = rng.choice(everybody)
    ways, answer = rng.choice(creature_questions(about) if isinstance(about, Creature) else person_questions(about))
    question = rng.choice(ways)
    return Passage("", ((question, answer),), key=question)


def creature_page(rng: Random, world: World) -> Passage:
    """What is true of a creature, told."""
    c = rng.choice(world.creatures)
    facts = [
        rng.choice((f"It is {c.colour}.", f"Its colour is {c.colour}.")),
        rng.choice((f"It lives in {c.home}.", f"Its home is in {c.home}.")),
        rng.choice((f"It eats {c.food}.", f"Its food is {c.food}.")),
        rng.choice((f"It has {c.legs} legs.", f"It walks on {c.legs} legs.")),
        rng.choice((f"It says {c.sound}.", f"Its call is {c.sound}.")),
    ]
    return Passage(" ".join([f"The {c.name} is an animal.", *pick_some(rng, facts, 2)]))


def person_page(rng: Random, world: World) -> Passage:
    """What is true of a person, told."""
    p = rng.choice(world.people)
    facts = [
        rng.choice((f"{p.name} comes from {p.town}.", f"The town of {p.name} is {p.town}.")),
        rng.choice((f"{p.name} is a {p.job}.", f"The job of {p.name} is {p.job}.")),
        rng.choice((f"{p.name} likes the colour {p.colour}.", f"{p.name} likes {p.colour} best.")),
        rng.choice((f"{p.name} keeps a {p.pet}.", f"The pet of {p.name} is a {p.pet}.")),
    ]
    return Passage(" ".join(pick_some(rng, facts, 2)))


def note(rng: Random, world: World) -> Passage:
    """Needles in little text."""
    return _needles(rng, world, rng.randrange(4))


def needle(rng: Random, world: World) -> Passage:
    """Needles in much text."""
    return _needles(rng, world, 9 + rng.randrange(13))


def _needles(rng: Random, world: World, others: int) -> Passage:
    """A thing in a place, a guest, and the price of something, each among so many other sentences or missing."""
    thing, second = shuffled(rng, THINGS)[:2]
    guest, place, price = rng.choice(PEOPLE), rng.choice(PLACES), rng.choice(PRICES)
    needles = [
        (f"The {thing} is in the {place}.", f"Where is the {thing}?", f"in the {place}"),
        (f"A guest was {guest}.", "What was the name of the guest?", guest),
        (f"The {second} costs {price} coins.", f"What is the price of the {second}?", f"{price} coins"),
    ]
    chosen = pick_some(rng, needles, 1)
    told = [sentence for sentence, _, _ in chosen]
    told += [rng.choice(FILLERS) if rng.randrange(2) else _known(rng, world) for _ in range(others)]
    return Passage(" ".join(shuffled(rng, told)), tuple((question, answer) for _, question, answer in chosen))


def _known(rng: Random, world: World) -> str:
    """A sentence about a creature, to hide others among."""
    c = rng.choice(world.creatures)
    return rng.choice(
        (f"The {c.name} lives in {c.home}.", f"The {c.name} eats {c.food}.", f"The {c.name} is {c.colour}.")
    )


def story(rng: Random, _world: World) -> Passage:
    """A story of one of three plots, and what happened in short."""
    begin = rng.choice(("Once upon a time", "Long ago", "One day"))
    sentences, short = rng.choice((_lost, _swapped, _helped))(rng, *shuffled(rng, PEOPLE)[:3])
    told = [f"{begin} {sentences[0]}"]
    for sentence in sentences[1:]:
        told += [rng.choice(FILLERS)] if rng.randrange(3) == 0 else []
        told.append(sentence)
    return Passage(" ".join(told), (("What happened, in short?", short),))


def _lost(rng: Random, hero: str, other: str, third: str) -> tuple[list[str], str]:
    thing, place, colour, mood = rng.choice(THINGS), rng.choice(PLACES), rng.choice(COLOURS), rng.choice(MOODS)
    told = [
        f"{hero} lost a {colour} {thing}.",
        f"{other} was {mood} and did not look for it.",
        f"Then {third} came by and looked in the {place}.",
        f"There it was, and {hero} was glad.",
    ]
    return told, f"{third} found the {colour} {thing} of {hero} in the {place}"


def _swapped(rng: Random, hero: str, other: str, third: str) -> tuple[list[str], str]:
    (one, two), colour = shuffled(rng, THINGS)[:2], rng.choice(COLOURS)
    told = [
        f"{hero} had a {colour} {one} and wanted a {two}.",
        f"{other} had no {two}.",
        f"But {third} had a {two} to give for the {one}.",
        "Both were glad.",
    ]
    return told, f"{hero} gave a {colour} {one} to {third} for a {two}"


def _helped(rng: Random, hero: str, other: str, third: str) -> tuple[list[str], str]:
    work, mood, tool = rng.choice(WORKS), rng.choice(MOODS), rng.choice(TOOLS)
    told = [
        f"{hero} had to {work}.",
        f"{other} was {mood} and could not help.",
        f"But {third} brought a {tool}.",
        "In the evening all was done.",
    ]
    return told, f"{third} helped {hero} to {work} with a {tool}"


def translate(language: str, words: tuple[str, ...], world: World) -> str:
    """An English phrase in a language: Orvi puts adjectives after their noun and the verb last, Tessan is in order."""
    if language == "English":
        return " ".join(words)
    order = list(words)
    if language == "Orvi":
        verb = [word for word in order if word in VERBS]
        order = [word for word in order if word not in VERBS] + verb
        for i, word in enumerate(order[:-1]):
            if word in ADJECTIVES and order[i + 1] in NOUNS:
                order[i], order[i + 1] = order[i + 1], word
    return " ".join(world.dictionary[language][word] for word in order)


def translation(rng: Random, world: World) -> Passage:
    """A word, a noun with its adjective, or a sentence, from one language to another; its meaning is the key."""
    subject, object = shuffled(rng, NOUNS)[:2]
    kind = rng.randrange(6)
    words: tuple[str, ...] = (rng.choice(ADJECTIVES), subject)
    if kind >= 3:
        words = (subject, rng.choice(VERBS), object) if kind < 5 else (*words, rng.choice(VERBS), object)
    source, target = shuffled(rng, ("English", *world.dictionary))[:2]
    question = f"Say in {target}: {translate(source, words, world)}"
    return Passage("", ((question, translate(target, words, world)),), key=" ".join(words))


def dictionary_page(rng: Random, world: World) -> Passage:
    """What some words are in another language."""
    language = rng.choice(tuple(world.dictionary))
    words = shuffled(rng, tuple(world.dictionary[language].items()))[: 3 + rng.randrange(3)]
    asked = tuple((f"Say in {language}: {english}", word) for english, word in words[:2])
    back = tuple((f"Say in English: {word}", english) for english, word in words[2:4])
    return Passage(f"Words of {language}: " + ", ".join(f"{e} is {w}" for e, w in words) + ".", (*asked, *back))
