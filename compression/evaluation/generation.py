"""Generation with any runtime, token by token: written once, for streaming, sampling and timing alike. Imports no torch."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from compression.errors import EdgepressError, Incompatible
from compression.evaluation.runtime import Runtime

Choose = Callable[[np.ndarray], int]  # logits [vocabulary] -> a token


@dataclass(frozen=True)
class Generation:
    """One timed greedy generation.

    tokens           the generated token ids, without the prompt
    prefill_seconds  from the call until the first token is known
    decode_seconds   from then until the last
    """

    tokens: list[int]
    prefill_seconds: float
    decode_seconds: float


def greedy(logits: np.ndarray) -> int:
    """The most likely token."""
    return int(logits.argmax())


def stream(runtime: Runtime, prompt: list[int], new_tokens: int, choose: Choose = greedy) -> Iterator[int]:
    """Generate exactly `new_tokens` tokens, each of them as soon as it is known; end-of-text stops nothing (the caller does).

    Raises Incompatible when prompt and generation do not fit into the runtime's context.
    """
    if len(prompt) + new_tokens > runtime.max_length:
        raise Incompatible(f"{len(prompt)} + {new_tokens} tokens do not fit into the model's {runtime.max_length}")
    return _stream(runtime, prompt, new_tokens, choose)


def _stream(runtime: Runtime, prompt: list[int], new_tokens: int, choose: Choose) -> Iterator[int]:
    token = choose(runtime.start(prompt, new_tokens))
    yield token
    for _ in range(new_tokens - 1):
        token = choose(runtime.step(token))
        yield token


def generate(runtime: Runtime, prompt: list[int], new_tokens: int) -> Generation:
    """Greedy generation of exactly `new_tokens` tokens (one or more), timed. Raises Incompatible as `stream` does."""
    begin = time.perf_counter()
    tokens = stream(runtime, prompt, new_tokens)
    generated = [next(tokens)]
    first = time.perf_counter()
    generated.extend(tokens)
    return Generation(generated, first - begin, time.perf_counter() - first)


def sampler(temperature: float, top_p: float, seed: int) -> Choose:
    """Draw tokens of softmax(logits / temperature), from the fewest most likely ones whose probabilities reach `top_p` together.

    temperature  0 or more; 0 takes the most likely token
    top_p        above 0, up to 1, which leaves all tokens in (nucleus sampling, Holtzman et al. 2020, arXiv:1904.09751)
    Raises EdgepressError for values outside of these.
    """
    if temperature < 0 or not 0 < top_p <= 1:
        raise EdgepressError(f"temperature {temperature:g} must be 0 or more, and top_p {top_p:g} above 0, up to 1", key="temperature")
    if temperature == 0:
        return greedy
    random = np.random.default_rng(seed)

    def draw(logits: np.ndarray) -> int:
        scaled = logits.astype(np.float64) / temperature
        weights = np.exp(scaled - scaled.max())
        order = np.argsort(-weights, kind="stable")
        reached = np.cumsum(weights[order])
        kept = int(np.searchsorted(reached, top_p * reached[-1])) + 1
        chosen = np.searchsorted(reached[:kept], random.random() * reached[kept - 1], side="right")
        return int(order[min(chosen, kept - 1)])

    return draw
