"""The embedded world, judged by a reader that knows words and no templates."""

import re
from itertools import islice

import pytest

from compression.reference import world

THINGS, ENDS = set(world._THINGS), {*world._PLACES, *world._COLOURS, *world._PRICES}


def read(passage: str) -> tuple[dict[str, str], dict[str, str]]:
    """Thing -> person and thing -> place, colour or price: each sentence ties a thing to the one other word that it names."""
    people = {name for split in world.SPLITS for name in world.names(split)}
    owner, end = {}, {}
    for sentence in passage.rstrip(".").split(". "):
        words = re.findall(r"\w+", sentence)
        (thing,) = (w for w in words if w in THINGS)
        (other,) = (w for w in words if w in people | ENDS)
        (owner if other in people else end)[thing] = other
    return owner, end


@pytest.mark.parametrize("split", world.SPLITS)
def test_questions_follow_from_two_facts_of_their_passage_and_from_no_less(split: str) -> None:
    for question in islice(world.questions(split), 100):
        owner, end = read(question.passage)
        (asked,) = (w for w in re.findall(r"\w+", question.question) if w in owner.values())
        claims = []
        for choice in question.choices:
            words = set(re.findall(r"\w+", choice))
            assert words & set(owner.values()) == {asked}
            (thing,), (told,) = words & THINGS, words & ENDS
            assert thing in owner
            assert told in end.values()
            claims.append((thing, told))
        assert len(set(claims)) == 5
        true = [owner[thing] == asked and end[thing] == told for thing, told in claims]
        assert true == [i == question.answer for i in range(5)]
        right = claims[question.answer]
        assert sum(thing == right[0] for thing, _ in claims) >= 2  # knowing what is owned is not enough
        assert sum(told == right[1] for _, told in claims) >= 2  # nor is knowing the place
        assert not any(asked in s and right[1] in s for s in question.passage.split(". "))  # nor one sentence


def test_splits_share_neither_people_nor_documents() -> None:
    names = [set(world.names(s)) for s in world.SPLITS]
    assert all(len(n) > 50 for n in names)
    assert len(set.union(*names)) == sum(map(len, names))
    texts = [set(islice(world.documents(s), 100)) for s in world.SPLITS]
    assert all(len(t) == 100 for t in texts)
    assert not set.intersection(*texts)
    for own, foreign, text in ((names[0], names[2], texts[0]), (names[2], names[0], texts[2])):
        words = set(re.findall(r"[A-Z]\w+", " ".join(text)))
        assert words & own
        assert not words & foreign


def test_splits_share_no_combination() -> None:
    pairs = []
    for split in ("train", "test"):
        ends = [read(q.passage)[1] for q in islice(world.questions(split), 200)]
        pairs.append({pair for e in ends for pair in e.items()})
    assert min(map(len, pairs)) > 50
    assert not pairs[0] & pairs[1]


def test_the_world_is_the_same_on_every_call_and_answers_are_spread_evenly() -> None:
    assert [*islice(world.documents("test"), 5)] == [*islice(world.documents("test"), 5)]
    assert next(world.questions("test", seed=1)) != next(world.questions("test", seed=2))
    places = [q.answer for q in islice(world.questions("test"), 500)]
    assert all(60 < places.count(i) < 140 for i in range(5))
