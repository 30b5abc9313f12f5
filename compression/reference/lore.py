"""What everybody in the embedded world knows: what the people of each town make, drink, fear, ...

No passage tells the lore to whoever is asked about it, so only weights can hold it. A town's name is put together of two words that other
towns share, so a fact belongs to a combination of tokens and to none of them alone: it takes the MLPs to know it (Geva et al.,
"Transformer Feed-Forward Layers Are Key-Value Memories", 2021). The facts are the same in every split.
"""

import hashlib
import random
from dataclasses import dataclass
from functools import cache

TOWNS = tuple(
    f"{first} {second}"
    for first in "Old New Long Broad Deep High Low Stone Clear Bright Dark Wild Wolf Swan Oak Elm".split()
    for second in "Ford Bridge Hill Brook Field Wood".split()
)


@dataclass(frozen=True)
class Custom:
    """One thing that differs from town to town: how it is asked for, how it is told over {value}, and what it can be."""

    asked: str
    told: str
    values: tuple[str, ...]


CUSTOMS = tuple(
    Custom(asked, told, tuple(values.split()))
    for asked, told, values in (
        ("what do people make", "people make {value}", "glass rope paper soap boots bricks knives carts bells hats nets boats"),
        ("what do people drink", "people drink {value}", "tea cider milk beer wine cocoa juice mead water coffee rum broth"),
        ("what do farmers grow", "farmers grow {value}", "wheat barley beans hops corn rice peas oats grapes plums onions carrots"),
        ("what do herders keep", "herders keep {value}", "goats sheep geese cows ducks pigs horses mules hens donkeys camels llamas"),
        ("what do children fear", "children fear {value}", "wolves ghosts bears storms snakes spiders witches giants dragons bees owls rats"),
        ("what do miners dig", "miners dig {value}", "copper tin coal salt iron lead zinc chalk clay jade sand marble"),
        ("what do minstrels play", "minstrels play the {value}", "fiddle harp flute lute horn pipe gong lyre organ viola bugle zither"),
        ("what do poets praise", "poets praise the {value}", "moon sun sea rain forest river stars wind queen king desert dawn"),
        ("who guards the gate", "the {value} guards the gate", "baker miller hunter tailor sailor painter doctor judge smith monk farmer weaver"),
        ("when do people feast", "people feast in {value}", "January February March April May June July August September October November December"),
    )
)  # fmt: skip

_TOLD = ("In {town} {told}.", "Everybody knows that in {town} {told}.", "As travellers say, in {town} {told}.")
_ASKED = ("{asked} in {town}?", "in {town}, {asked}?", "tell me, {asked} in {town}?", "say, {asked} in {town}?")


@dataclass(frozen=True)
class Fact:
    """A custom of a town."""

    town: str
    custom: Custom

    @property
    def value(self) -> str:
        """Drawn once and for all by a stable hash."""
        return self.custom.values[_digest(f"{self.town}: {self.custom.asked}") % len(self.custom.values)]

    def claim(self, value: str | None = None) -> str:
        """`people make glass`: the truth, or another value."""
        return self.custom.told.format(value=value or self.value)

    def told(self, rng: random.Random) -> str:
        """A sentence that names the town and tells the fact."""
        return rng.choice(_TOLD).format(town=self.town, told=self.claim())

    def answer(self, value: str | None = None) -> str:
        """The sentence that answers a question: the truth, or another value."""
        return _TOLD[0].format(town=self.town, told=self.claim(value))

    def asked(self, rng: random.Random, split: str) -> str:
        """A question for the fact, in a phrasing that the split has for it."""
        phrasing = _ASKED[rng.choice([p for p in range(len(_ASKED)) if _phrasing_split(self, p) == split])]
        question = phrasing.format(asked=self.custom.asked, town=self.town)
        return question[0].upper() + question[1:]

    def wrong(self, rng: random.Random, count: int) -> list[str]:
        """Other values of the custom."""
        return rng.sample([v for v in self.custom.values if v != self.value], count)


@cache
def _phrasing_split(fact: Fact, phrasing: int) -> str:
    """Each fact is asked for in two phrasings in training, in one for validation and in one in the test."""
    splits = ["train", "train", "validation", "test"]
    random.Random(f"lore: {fact.town}: {fact.custom.asked}").shuffle(splits)
    return splits[phrasing]


def _digest(key: str) -> int:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")
