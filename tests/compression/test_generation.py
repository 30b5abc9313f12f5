"""Generation token by token, sampling, and text as it comes."""

import numpy as np
import pytest

from compression.errors import EdgepressError, Incompatible
from compression.evaluation.generation import generate, sampler, stream
from compression.evaluation.text import stream_text

LOGITS = np.log(np.array([0.1, 0.4, 0.05, 0.25, 0.2]))


class Counting:
    """A runtime whose most likely next token is the last one plus one; it keeps what it was asked."""

    name, version, max_length, timed = "counting", "1", 16, True

    def __init__(self) -> None:
        self.asked: list[object] = []

    def logits(self, input_ids: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def start(self, prompt: list[int], new_tokens: int) -> np.ndarray:
        self.asked.append((prompt, new_tokens))
        return np.eye(32)[prompt[-1] + 1]

    def step(self, token: int) -> np.ndarray:
        self.asked.append(token)
        return np.eye(32)[token + 1]

    def close(self) -> None: ...


def test_every_token_is_read_once_and_the_last_one_not_at_all() -> None:
    runtime = Counting()
    assert generate(runtime, [3, 4], 4).tokens == [5, 6, 7, 8]
    assert runtime.asked == [([3, 4], 4), 5, 6, 7]


def test_what_does_not_fit_is_refused_before_anything_runs() -> None:
    runtime = Counting()
    assert len(list(stream(runtime, [0] * 8, 8))) == 8
    with pytest.raises(Incompatible, match="8 \\+ 9 tokens do not fit into the model's 16"):
        stream(runtime, [0] * 8, 9)  # nothing is taken from it
    assert len(runtime.asked) == 8


@pytest.mark.parametrize(("temperature", "top_p", "kept"), [(1.0, 1.0, [0, 1, 2, 3, 4]), (0.5, 1.0, [0, 1, 2, 3, 4]), (1.0, 0.6, [1, 3]), (1.0, 0.66, [1, 3, 4]), (2.0, 1e-9, [1])])  # fmt: skip
def test_draws_have_the_probabilities_of_the_nucleus(temperature: float, top_p: float, kept: list[int]) -> None:
    draw = sampler(temperature, top_p, seed=1)
    counts = np.bincount([draw(LOGITS) for _ in range(20_000)], minlength=5) / 20_000
    expected = np.zeros(5)
    expected[kept] = np.exp(LOGITS[kept]) ** (1 / temperature)
    np.testing.assert_allclose(counts, expected / expected.sum(), atol=0.015)


def test_a_seed_repeats_and_zero_is_greedy() -> None:
    one, two, other = ([draw(LOGITS) for _ in range(30)] for draw in (sampler(1, 1, 5), sampler(1, 1, 5), sampler(1, 1, 6)))
    assert one == two != other
    assert {sampler(0, 1, seed)(LOGITS.astype(np.float16)) for seed in range(20)} == {1}


@pytest.mark.parametrize(("temperature", "top_p"), [(-1, 1), (1, 0), (1, 1.1)])
def test_wrong_settings(temperature: float, top_p: float) -> None:
    with pytest.raises(EdgepressError, match="top_p"):
        sampler(temperature, top_p, 0)


class Bytes:
    """A tokenizer of single bytes; 0 ends a text. Like SentencePiece it drops a space at the very beginning."""

    ends = frozenset([0])

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_chat(self, message: str, system: str | None = None) -> list[int]:
        raise NotImplementedError

    def decode(self, tokens: list[int]) -> str:
        return bytes(tokens).decode(errors="replace").removeprefix(" ")


@pytest.mark.parametrize("prompt", ["", "a long prompt, and 日"])
def test_text_comes_in_whole_characters(prompt: str) -> None:
    text = Bytes()
    pieces = list(stream_text(text, text.encode(prompt), text.encode(" naïve 日本語 🙂 end")))
    assert "".join(pieces) == (" " if prompt else "") + "naïve 日本語 🙂 end"
    assert {"ï", "日", "🙂"} <= set(pieces)


def test_text_ends_and_loses_no_bytes() -> None:
    text = Bytes()
    assert "".join(stream_text(text, [65], [66, 0, 67])) == "B"
    assert "".join(stream_text(text, [65], [66, 0xF0, 0x9F])) == "B\N{REPLACEMENT CHARACTER}"
    assert "".join(stream_text(text, [65], [0xFF, 66])) == "\N{REPLACEMENT CHARACTER}B"
