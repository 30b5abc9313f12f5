"""A seeded closed world: small English-like passages, stories and multiple-choice questions.

Everything that edgepress measures out of the box is written here, so that a machine without a network can run the whole road. A *scene*
ties people to things, and things to places, colours or prices. A question asks for both ("What does Dalo own, and where is it?"): its answer
joins two facts of the passage given with it. The wrong choices take one fact, or both, from somebody else in the passage, so neither a single
fact nor a prior answers it: chance is 20%.

Splits are disjoint twice over: people's names are divided among train, validation and test, and so are the
combinations (which thing may stand in which place, ...). A model can therefore not answer from memory.
"""

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache

SPLITS = ("train", "validation", "test")
VERSION = 1  # part of the data's fingerprint through the text itself; bump when the generator changes

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

    def text(self, rng: random.Random) -> str:
        """The scene as a training document: the passage, then its questions of both kinds with their answers."""
        asked = [(q.question, q.choices[q.answer]) for q in self.joined] + list(self.single)
        return "\n".join([self.passage, *(f"Question: {q}\nAnswer: {a}" for q, a in rng.sample(asked, len(asked)))])


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


def documents(split: str, seed: int = 0, people: tuple[int, int] = (2, 5)) -> Iterator[str]:
    """Endless documents of a split for language modelling: about four scenes with questions to one story.

    people  fewest and most people of a scene; the reference model is trained on small scenes first
    """
    rng = random.Random(f"world-{VERSION}-text-{split}-{seed}")
    while True:
        if rng.random() < 0.2:
            yield _story(rng, split)
        else:
            yield Scene.draw(rng, split, rng.randint(*people)).text(rng)


def questions(split: str, seed: int = 0) -> Iterator[Question]:
    """Endless multiple-choice items of a split, two of each scene, every one joining two facts."""
    rng = random.Random(f"world-{VERSION}-task-{split}-{seed}")
    while True:
        yield from Scene.draw(rng, split).joined[:2]
