"""A model that says what it was told to: tokens are bytes, 256 ends a text."""

from collections.abc import Callable

import numpy as np

END = 256


class Bytes:
    """A tokenizer of bytes. With `templated`, a message is put between marks."""

    ends = frozenset({END})

    def __init__(self, templated: bool = False):
        self.templated = templated

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_chat(self, message: str, system: str | None = None) -> list[int]:
        return list(f"{f'({system})' if system else ''}[{message}]".encode())

    def decode(self, tokens: list[int]) -> str:
        return bytes(t for t in tokens if t != END).decode(errors="replace")


class Scripted:
    """A runtime that answers each prompt with the bytes that `answer` gives, and then ends the text for ever."""

    name, version, timed = "scripted", "1", True

    def __init__(self, answer: Callable[[str], str | bytes], max_length: int = 1024, timed: bool = True):
        self.answer, self.max_length, self.timed = answer, max_length, timed
        self.prompts: list[str] = []
        self.closed = False

    def logits(self, input_ids: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def start(self, prompt: list[int], new_tokens: int) -> np.ndarray:
        assert len(prompt) + new_tokens <= self.max_length
        self.prompts.append(bytes(t for t in prompt if t != END).decode())
        said = self.answer(self.prompts[-1])
        self.left = list(said.encode() if isinstance(said, str) else said)
        return self._next()

    def step(self, token: int) -> np.ndarray:
        return self._next()

    def _next(self) -> np.ndarray:
        return np.eye(END + 1)[self.left.pop(0) if self.left else END]

    def close(self) -> None:
        self.closed = True
