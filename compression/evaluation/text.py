"""Turn text into tokens and back, and stream it while a model generates. Imports no torch."""

from collections.abc import Iterable, Iterator
from typing import Protocol

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # stands for bytes that are not (yet) a complete character


class Text(Protocol):
    """A model's tokenizer."""

    @property
    def ends(self) -> frozenset[int]:
        """Tokens that end a text."""
        ...

    @property
    def templated(self) -> bool:
        """Whether the model has a chat template, so that `encode_chat` works."""
        ...

    def encode(self, text: str) -> list[int]:
        """Encode a text to be continued: begin-of-text in front (once) where the model needs it, no end-of-text, special tokens recognized."""
        ...

    def encode_chat(self, message: str, system: str | None = None) -> list[int]:
        """Encode a user's message in the model's chat template, after the system message if there is one, up to the start of the answer.

        Raises:
            Incompatible: The model has no chat template.
        """
        ...

    def decode(self, tokens: list[int]) -> str:
        """Decode tokens, without special ones; U+FFFD stands for bytes that are not a complete character."""
        ...


def stream_text(text: Text, prompt: list[int], tokens: Iterable[int]) -> Iterator[str]:
    """Yield the text of `tokens` as soon as it is certain: a character of several tokens waits for the last of them.

    An end-of-text token ends it. New tokens are decoded together with those before them, on which spaces depend in some tokenizers; the
    first ones follow the last tokens of the prompt.
    """
    window = prompt[-8:]
    characters = len(text.decode(window))  # of the window that were yielded
    written = len(window)  # tokens of the window whose text was yielded
    for token in tokens:
        if token in text.ends:
            break
        window.append(token)
        decoded = text.decode(window)
        if len(decoded) > characters and not decoded.endswith(INCOMPLETE):
            yield decoded[characters:]
            window, characters, written = window[written:], len(text.decode(window[written:])), len(window) - written
    if rest := text.decode(window)[characters:]:
        yield rest
