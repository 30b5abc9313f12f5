"""A seeded closed world: small English-like passages, stories and multiple-choice questions.

Everything that edgepress measures out of the box is written here, so that a machine without a network can run the whole road. A *scene*
ties people to things, and things to places, colours or prices, or people to the towns where they live. Questions are of three kinds:

- *told* ("What does Dalo own, and where is it?"): the answer joins two facts of the passage given with it;
- *joined* ("Where does Dalo live, and what do people make there?"): the answer joins a fact of the passage and one of the lore;
- *known* ("What do people make in Oak Ford?"): the answer is lore (compression/reference/lore.py), and there is no passage.

What is told in a passage takes attention, and the lore takes weights that hold it. A wrong choice is wrong in one fact or in both, so
neither a single fact nor a prior answers a question: chance is 20%.

Splits are disjoint: people's names are divided among train, validation and test, and so are the combinations of a scene (which thing may
stand in which place, ...) and the phrasings in which each fact of the lore is asked for. A model can answer from memory only what is lore.
"""

import hashlib
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache

from compression.reference.lore import CUSTOMS, TOWNS, Fact

SPLITS = ("train", "validation", "test")
VERSION = 2  # part of the data's fingerprint through the text itself; bump when the generator changes

_ONSETS = (
    "Ba Be Bi Bo Da De Di Do Fa Fe Fi Fo Ga Ge Gi Go Ka Ke Ki Ko La Le Li Lo Ma Me Mi Mo "
    "Na Ne Ni No Pa Pe Pi Po Ra Re Ri Ro Sa Se Si So Ta Te Ti To Va Ve Vi Vo Za Ze Zi Zo"
).split()
_ENDINGS = "len mir dan rix sol bek tun gar vin lus nor fey zek pol hart wyn".split()
_THINGS = tuple(
    (
        "lamp clock drum kettle ladder basket mirror saddle wagon barrel anchor candle carpet chair helmet "
        "hammer bottle pillow violin whistle compass kite bell broom"
    ).split()
)
_PLACES = tuple(
    ("mill barn tower cellar harbor garden chapel market stable library kitchen bakery forge cabin orchard temple castle tavern").split()
)
_COLOURS = tuple("red blue green yellow white black brown purple orange silver golden grey".split())
_PRICES = tuple("two three four five six seven eight nine ten eleven twelve twenty".split())
_WEATHER = "rain snow wind fog sunshine thunder".split()
_TIMES = ("in the morning", "at noon", "in the evening", "after lunch", "before dawn", "late at night")


@lru_cache
def names(split: str) -> tuple[str, ...]:
    """Every person of a split. Names share their syllables, so none of them is an unknown word."""
    return tuple(a + b for a in _ONSETS for b in _ENDINGS if _bucket(a + b) == split)


@cache
def _bucket(key: str) -> str:
    """Split of a name or combination: 70% train, 15% validation, 15% test, by a stable hash."""
    share = hashlib.sha256(key.encode()).digest()[0] / 256
    return "train" if share < 0.7 else "validation" if share < 0.85 else "test"


def _pairs(rng: random.Random, split: str, left: tuple[str, ...], right: tuple[str, ...], count: int) -> list[tuple[str, str]]:
    """`count` combinations of the split, no two of which share a member."""
    while True:
        free, chosen = list(right), []
        for item in rng.sample(left, len(left)):
            allowed = [r for r in free if _bucket(f"{item}+{r}") == split]
            if allowed:
                chosen.append((item, rng.choice(allowed)))
                free.remove(chosen[-1][1])
            if len(chosen) == count:
                return chosen


def _people(rng: random.Random, split: str, count: int) -> list[str]:
    """Distinct people, no two with the same initial."""
    by_initial: dict[str, list[str]] = {}
    for name in names(split):
        by_initial.setdefault(name[0], []).append(name)
    return [rng.choice(by_initial[initial]) for initial in rng.sample(sorted(by_initial), count)]


@dataclass(frozen=True)
class Relation:
    """A kind of scene: how its second fact is told and asked for."""

    told: tuple[str, ...]  # templates of the second fact, over {mid} and {end}
    ask: str
    ask_both: str  # after both facts, from the person
    ends: tuple[str, ...]


_LIVES = ("{person} lives in {town}.", "{person} comes from {town}.")
_OWNS = ("{person} owns the {mid}.", "{person} has the {mid}.")
_RELATIONS = (
    Relation(
        ("The {mid} is in the {end}.", "The {mid} stands in the {end}."),
        "Where is the {mid}?",
        "What does {person} own, and where is it?",
        _PLACES,
    ),
    Relation(
        ("The {mid} is {end}.", "The {mid} was painted {end}."),
        "What colour is the {mid}?",
        "What does {person} own, and what colour is it?",
        _COLOURS,
    ),
    Relation(
        ("The {mid} costs {end} coins.", "The {mid} was sold for {end} coins."),
        "What is the price of the {mid}?",
        "What does {person} own, and what is its price?",
        _PRICES,
    ),
)


@dataclass(frozen=True)
class Question:
    """One multiple-choice item. `choices` has five texts, `answer` is the index of the right one."""

    passage: str
    question: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Scene:
    """A passage, the questions that need two of its facts, and those that need one, each with its answer."""

    passage: str
    joined: tuple[Question, ...]
    single: tuple[tuple[str, str], ...]

    @staticmethod
    def draw(rng: random.Random, split: str, people: int = 5) -> "Scene":
        """A scene of `people` (2 to 5) people; its questions have five choices from 3 people on."""
        relation = rng.choice(_RELATIONS)
        pairs = _pairs(rng, split, _THINGS, relation.ends, people)
        chains = [(person, mid, end) for person, (mid, end) in zip(_people(rng, split, people), pairs, strict=True)]
        facts = [_OWNS[rng.randrange(2)].format(person=p, mid=m) for p, m, _ in chains]
        facts += [relation.told[rng.randrange(2)].format(mid=m, end=e) for _, m, e in chains]
        passage = " ".join(rng.sample(facts, len(facts)))
        joined = tuple(_ask_both(rng, passage, relation, chain, chains) for chain in rng.sample(chains, people))
        single = [(relation.ask.format(mid=m), relation.told[0].format(mid=m, end=e)) for _, m, e in chains]
        single += [(f"What does {p} own?", _OWNS[0].format(person=p, mid=m)) for p, m, _ in chains]
        return Scene(passage, joined, tuple(single))

    @staticmethod
    def draw_homes(rng: random.Random, split: str, people: int = 5) -> "Scene":
        """A scene of `people` (from 2) people and their towns; its questions also need the lore."""
        homes = list(zip(_people(rng, split, people), rng.sample(TOWNS, people), strict=True))
        passage = " ".join(rng.choice(_LIVES).format(person=p, town=t) for p, t in homes)
        joined = tuple(_ask_there(rng, passage, home, homes) for home in rng.sample(homes, people))
        return Scene(passage, joined, tuple((f"Where does {p} live?", _LIVES[0].format(person=p, town=t)) for p, t in homes))

    def text(self, rng: random.Random) -> str:
        """The scene as a training document: the passage, then its questions of both kinds with their answers."""
        asked = [(q.question, q.choices[q.answer]) for q in self.joined] + list(self.single)
        return "\n".join([self.passage, _answered(rng.sample(asked, len(asked)))])


def _answered(asked: list[tuple[str, str]]) -> str:
    return "\n".join(f"Question: {q}\nAnswer: {a}" for q, a in asked)


def _ask_both(
    rng: random.Random, passage: str, relation: Relation, chain: tuple[str, str, str], chains: list[tuple[str, str, str]]
) -> Question:
    """Ask for both facts of a person. Each wrong choice agrees with the passage in one fact at most, or in both but of somebody else."""
    person, mid, end = chain
    others = [(m, e) for p, m, e in chains if p != person]
    rng.shuffle(others)
    (mid1, end1), (mid2, end2) = others[0], others[-1]
    pairs = list(dict.fromkeys([(mid, end), (mid, end1), (mid1, end1), (mid1, end), (mid2, end2)]))
    rng.shuffle(pairs)

    def told(mid: str, end: str) -> str:
        second = relation.told[0].format(mid=mid, end=end)
        return f"{_OWNS[0].format(person=person, mid=mid)[:-1]}, and {second[0].lower()}{second[1:]}"

    return Question(passage, relation.ask_both.format(person=person), tuple(told(*pair) for pair in pairs), pairs.index((mid, end)))


def _ask_there(rng: random.Random, passage: str, home: tuple[str, str], homes: list[tuple[str, str]]) -> Question:
    """Ask for a person's town and its lore. Wrong: the lore of this town, twice; the town; and both."""
    person, town = home
    other = rng.choice([t for p, t in homes if p != person])
    custom = rng.choice(CUSTOMS)
    fact, foreign = Fact(town, custom), Fact(other, custom)
    first, second = fact.wrong(rng, 2)
    pairs = [(fact, fact.value), (fact, first), (fact, second), (foreign, foreign.value), (foreign, foreign.wrong(rng, 1)[0])]
    rng.shuffle(pairs)
    choices = tuple(f"{person} lives in {f.town}, and there {f.claim(value)}." for f, value in pairs)
    return Question(passage, f"Where does {person} live, and {custom.asked} there?", choices, pairs.index((fact, fact.value)))


def _ask_known(rng: random.Random, split: str) -> Question:
    """Ask for a fact of the lore, without a passage."""
    fact = Fact(rng.choice(TOWNS), rng.choice(CUSTOMS))
    values = [fact.value, *fact.wrong(rng, 4)]
    rng.shuffle(values)
    return Question("", fact.asked(rng, split), tuple(fact.answer(value) for value in values), values.index(fact.value))


def _chronicle(rng: random.Random) -> str:
    """What is known of a few towns."""
    facts = [Fact(town, custom) for town in rng.sample(TOWNS, 4) for custom in rng.sample(CUSTOMS, 4)]
    return " ".join(fact.told(rng) for fact in facts)


def _quiz(rng: random.Random, split: str) -> str:
    asked = [_ask_known(rng, split) for _ in range(8)]
    return _answered([(q.question, q.choices[q.answer]) for q in asked])


def _story(rng: random.Random, split: str) -> str:
    """A day in the village. What is told at the end follows from what happened before."""
    hero, friend, other = _people(rng, split, 3)
    ((thing, here),) = _pairs(rng, split, _THINGS, _PLACES, 1)
    there, away = rng.sample([p for p in _PLACES if p != here], 2)
    weather, when = rng.choice(_WEATHER), rng.choice(_TIMES)
    lines = [
        f"{when.capitalize()} {hero} went to the {here} to look for the {thing}.",
        rng.choice(
            (
                f"There was {weather} over the {there}, so {hero} asked {friend} to come along.",
                f"{friend} was already there and waited because of the {weather}.",
                f"{friend} came too, although there was {weather} over the {away}.",
            )
        ),
        rng.choice((f"{hero} found the {thing} and was glad.", f"{friend} saw the {thing} first and showed it to {hero}.")),
    ]
    taker = hero
    if rng.random() < 0.5:
        lines.append(
            rng.choice((f"Then {hero} gave the {thing} to {friend}.", f"{friend} asked for the {thing}, and {hero} gave it away."))
        )
        taker = friend
    lines.append(f"{taker} carried it to the {there}, where {other} was working.")
    if rng.random() < 0.4:
        lines.append(f"{other} liked the {thing} so much that {taker} sold it.")
        taker = other
    lines.append(
        rng.choice(
            (
                f"That is how the {thing} came from the {here} to the {there}.",
                f"Since then the {thing} is in the {there} and no longer in the {here}.",
            )
        )
    )
    lines.append(f"Today {taker} owns the {thing}.")
    return " ".join(lines)


SHARES = {"story": 10, "chronicle": 20, "quiz": 20, "homes": 20, "things": 30}  # kinds of documents, in percent
LORE = {"chronicle": 50, "quiz": 50}


def documents(split: str, seed: int = 0, people: tuple[int, int] = (2, 5), shares: Mapping[str, int] = SHARES) -> Iterator[str]:
    """Endless documents of a split for language modelling: stories, lore told and asked for, and scenes with questions.

    people  fewest and most people of a scene; the reference model is trained on small scenes first, and before them on
    shares  of lore alone
    """
    rng = random.Random(f"world-{VERSION}-text-{split}-{seed}")
    while True:
        (kind,) = rng.choices(list(shares), list(shares.values()))
        if kind == "story":
            yield _story(rng, split)
        elif kind == "chronicle":
            yield _chronicle(rng)
        elif kind == "quiz":
            yield _quiz(rng, split)
        else:
            draw = Scene.draw_homes if kind == "homes" else Scene.draw
            yield draw(rng, split, rng.randint(*people)).text(rng)


def questions(split: str, seed: int = 0) -> Iterator[Question]:
    """Endless multiple-choice items of a split: of six, one is told in its passage, two join it with the lore, and three are lore."""
    rng = random.Random(f"world-{VERSION}-task-{split}-{seed}")
    while True:
        yield Scene.draw(rng, split).joined[0]
        yield from Scene.draw_homes(rng, split).joined[:2]
        yield from (_ask_known(rng, split) for _ in range(3))
