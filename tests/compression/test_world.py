"""The embedded world, judged by a reader that knows words and no templates."""

import re
from functools import cache
from itertools import islice

import pytest

from compression.reference import lore, world
from compression.reference.world import Question

THINGS, ENDS = set(world._THINGS), {*world._PLACES, *world._COLOURS, *world._PRICES}
PEOPLE = {name for split in world.SPLITS for name in world.names(split)}
CUSTOM = {value: number for number, custom in enumerate(lore.CUSTOMS) for value in custom.values}


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text))


def towns(text: str) -> list[str]:
    return [town for town in lore.TOWNS if town in text]


def kind(question: Question) -> str:
    if not question.passage:
        return "known"
    return "joined" if towns(question.passage) else "told"


@cache
def asked(split: str, of: str, count: int) -> list[Question]:
    return list(islice((q for q in world.questions(split) if kind(q) == of), count))


def read(passage: str) -> tuple[dict[str, str], dict[str, str]]:
    """Thing -> person and thing -> place, colour or price: each sentence ties a thing to the one other word that it names."""
    owner, end = {}, {}
    for sentence in passage.rstrip(".").split(". "):
        (thing,) = words(sentence) & THINGS
        (other,) = words(sentence) & (PEOPLE | ENDS)
        (owner if other in PEOPLE else end)[thing] = other
    return owner, end


def read_lore(split: str, count: int) -> dict[tuple[str, int], set[str]]:
    """(Town, custom) -> values, as documents tell them in sentences that name a town and a value."""
    known: dict[tuple[str, int], set[str]] = {}
    for sentence in re.split(r"[.?\n]", "\n".join(islice(world.documents(split), count))):
        named, values = towns(sentence), words(sentence) & set(CUSTOM)
        if named and values:
            (town,), (value,) = named, values
            known.setdefault((town, CUSTOM[value]), set()).add(value)
    return known


@pytest.mark.parametrize("split", world.SPLITS)
def test_told_questions_follow_from_two_facts_of_their_passage_and_from_no_less(split: str) -> None:
    for question in asked(split, "told", 100):
        owner, end = read(question.passage)
        (person,) = words(question.question) & set(owner.values())
        claims = []
        for choice in question.choices:
            assert words(choice) & set(owner.values()) == {person}
            (thing,), (told,) = words(choice) & THINGS, words(choice) & ENDS
            assert thing in owner
            assert told in end.values()
            claims.append((thing, told))
        assert len(set(claims)) == 5
        true = [owner[thing] == person and end[thing] == told for thing, told in claims]
        assert true == [i == question.answer for i in range(5)]
        right = claims[question.answer]
        assert sum(thing == right[0] for thing, _ in claims) >= 2  # knowing what is owned is not enough
        assert sum(told == right[1] for _, told in claims) >= 2  # nor is knowing the place
        assert not any(person in s and right[1] in s for s in question.passage.split(". "))  # nor one sentence


def test_training_tells_one_value_of_every_custom_of_every_town() -> None:
    known = read_lore("train", 4000)
    assert len(known) == len(lore.TOWNS) * len(lore.CUSTOMS) == 960
    assert all(len(values) == 1 for values in known.values())
    assert all(known[fact] == values for fact, values in read_lore("test", 500).items())
    for number, custom in enumerate(lore.CUSTOMS):  # no value is so common that a guess would do
        told = [next(iter(known[town, number])) for town in lore.TOWNS]
        assert max(map(told.count, custom.values)) < 0.25 * len(told)


@pytest.mark.parametrize("split", world.SPLITS)
def test_known_questions_follow_from_the_lore_of_the_training_documents(split: str) -> None:
    known = read_lore("train", 4000)
    for question in asked(split, "known", 200):
        (town,) = towns(question.question)
        claims = []
        for choice in question.choices:
            assert towns(choice) == [town]
            claims += words(choice) & set(CUSTOM)
        assert len(set(claims)) == 5
        assert len({CUSTOM[value] for value in claims}) == 1
        assert [value in known[town, CUSTOM[value]] for value in claims] == [i == question.answer for i in range(5)]


@pytest.mark.parametrize("split", world.SPLITS)
def test_joined_questions_need_the_passage_and_the_lore(split: str) -> None:
    known = read_lore("train", 4000)
    for question in asked(split, "joined", 200):
        home = {(words(s) & PEOPLE).pop(): towns(s)[0] for s in question.passage.rstrip(".").split(". ")}
        (person,) = words(question.question) & PEOPLE
        claims = []
        for choice in question.choices:
            assert words(choice) & PEOPLE == {person}
            (town,), (value,) = towns(choice), words(choice) & set(CUSTOM)
            assert town in home.values()
            claims.append((home[person] == town, value in known[town, CUSTOM[value]]))
        assert claims.index((True, True)) == question.answer
        assert sorted(claims) == [(False, False), (False, True), (True, False), (True, False), (True, True)]
        assert len(set(question.choices)) == 5
        assert not words(question.passage) & set(CUSTOM)  # the passage does not tell the lore


def test_of_six_questions_one_is_told_two_are_joined_and_three_are_known() -> None:
    kinds = [kind(q) for q in islice(world.questions("test"), 60)]
    assert [kinds.count(k) for k in ("told", "joined", "known")] == [10, 20, 30]


def test_no_fact_is_asked_for_in_the_words_of_another_split() -> None:
    texts = {split: "\n".join(islice(world.documents(split), 2000)) for split in world.SPLITS}
    for split in world.SPLITS:
        for other in world.SPLITS:
            heard = sum(q.question in texts[other] for q in asked(split, "known", 200))
            assert (heard > 100) if split == other else heard == 0


def test_splits_share_neither_people_nor_documents() -> None:
    names = [set(world.names(s)) for s in world.SPLITS]
    assert all(len(n) > 50 for n in names)
    assert len(set.union(*names)) == sum(map(len, names))
    texts = [set(islice(world.documents(s), 100)) for s in world.SPLITS]
    assert all(len(t) == 100 for t in texts)
    assert not set.intersection(*texts)
    for own, foreign, text in ((names[0], names[2], texts[0]), (names[2], names[0], texts[2])):
        assert words(" ".join(text)) & own
        assert not words(" ".join(text)) & foreign


def test_splits_share_no_combination() -> None:
    pairs = []
    for split in ("train", "test"):
        ends = [read(q.passage)[1] for q in asked(split, "told", 200)]
        pairs.append({pair for e in ends for pair in e.items()})
    assert min(map(len, pairs)) > 50
    assert not pairs[0] & pairs[1]


def test_the_world_is_the_same_on_every_call_and_answers_are_spread_evenly() -> None:
    assert [*islice(world.documents("test"), 5)] == [*islice(world.documents("test"), 5)]
    assert next(world.questions("test", seed=1)) != next(world.questions("test", seed=2))
    places = [q.answer for q in islice(world.questions("test"), 500)]
    assert all(60 < places.count(i) < 140 for i in range(5))
