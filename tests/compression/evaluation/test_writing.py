import pytest
import torch

from compression.context import Context
from compression.errors import Incompatible
from compression.evaluation.samples import generate_samples
from compression.evaluation.sanity import empty, invalid_utf8, repetition
from compression.evaluation.writing import Writer, Written
from tests.compression.evaluation.scripted import Bytes, Scripted


def write(said: str | bytes, new_tokens: int = 40, until: tuple[str, ...] = ()) -> Written:
    return Writer(Scripted(lambda _: said), Bytes(), new_tokens).answer("Say:", until)


def test_writing_ends_with_the_text_with_a_stop_or_with_the_tokens_asked_for() -> None:
    assert write("hello") == Written("hello", list(b"hello"), ended=True)
    assert write("one\ntwo. three", until=(". ", "\n")).text == "one"
    assert write("hello", new_tokens=4) == Written("hell", list(b"hell"), ended=False)
    assert write("") == Written("", [], ended=True)


def test_a_model_with_a_chat_template_is_asked_in_it() -> None:
    runtime = Scripted(lambda _: "yes")
    Writer(runtime, Bytes(templated=True), 8).answer("is it?")
    Writer(runtime, Bytes(), 8).answer("is it?")
    Writer(runtime, Bytes(templated=True), 8, system="be brief").answer("is it?")
    assert runtime.prompts == ["[is it?]", "is it?", "(be brief)[is it?]"]


def test_a_prompt_that_is_too_long_loses_its_beginning() -> None:
    runtime = Scripted(lambda _: "x", max_length=12)
    Writer(runtime, Bytes(), 8).answer("abcdefgh")
    assert runtime.prompts == ["efgh"]
    with pytest.raises(Incompatible, match="12 new tokens leave no room"):
        Writer(runtime, Bytes(), 12)


def test_after_nothing_a_model_goes_on_as_after_the_end_of_a_text() -> None:
    assert Writer(Scripted(lambda _: "x"), Bytes(), 8).continue_from([]).text == "x"


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([], 0),
        ([1, 2, 3], 0),
        ([1, 2, 3, 4, 5], 0),
        ([7] * 10, 1 - 1 / 7),
        ([1, 2] * 5, 1 - 2 / 7),
        ([1, 2, 3, 4, 9, 1, 2, 3, 4], 1 - 5 / 6),
    ],
)
def test_repetition_is_the_share_of_four_grams_seen_before(tokens: list[int], expected: float) -> None:
    assert repetition(tokens) == pytest.approx(expected)


def test_silence_and_broken_characters_are_seen() -> None:
    assert empty(write(" \n\t"))
    assert not empty(write(" ."))
    assert invalid_utf8(write(b"a\xff b"))
    assert invalid_utf8(write("né".encode()[:-1]))
    assert not invalid_utf8(write("né 日本語 🙂"))
    assert not invalid_utf8(write("né", new_tokens=2))  # cut off within the character
    assert invalid_utf8(write(b"\xff" * 32, new_tokens=8))  # nothing but broken bytes, cut off among them


def test_samples_continue_the_windows_and_are_counted() -> None:
    windows = torch.tensor([list(b"abcdefgh"), list(b"ijklmnop"), list(b"qrstuvwx")])
    answers = {"abcd": "la" * 20, "ijkl": "", "qrst": b"\xff!"}
    found = generate_samples(Writer(Scripted(lambda prompt: answers[prompt]), Bytes(), 20), windows, count=9, shown=2, context=Context())
    assert found.details == {"samples": [{"prompt": "abcd", "text": "la" * 10}, {"prompt": "ijkl", "text": ""}]}
    assert found.metrics == {
        "repetition_rate": pytest.approx((1 - 2 / 17) / 3), "empty_rate": pytest.approx(1 / 3), "invalid_utf8_rate": pytest.approx(1 / 3),
        "generations_count": 3,
    }  # fmt: skip
    assert found.items["empty_rate"].sums == (0, 1, 0)
