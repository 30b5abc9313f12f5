"""Text of a model that generates: what turns it into tokens and back, and streaming it. Imports no torch."""

from collections.abc import Iterable, Iterator
from typing import Protocol

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what bytes decode to that are no whole character (yet)


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
        """Tokens of a text to go on from, begin-of-text in front where the model wants it (once), no end-of-text behind it, special tokens recognized."""
        ...

    def encode_chat(self, message: str, system: str | None = None) -> list[int]:
        """Tokens of a user's message in the model's chat template, behind a system message where there is one, up to where the answer begins.

        Raises Incompatible for a model without a chat template.
        """
        ...

    def decode(self, tokens: list[int]) -> str:
        """Text of tokens, special ones left out; U+FFFD for bytes that are no whole character."""
        ...


def stream_text(text: Text, prompt: list[int], tokens: Iterable[int]) -> Iterator[str]:
    """The text of `tokens`, which come one by one, as soon as it is certain: a character of several tokens waits for the last of them.

    An end-of-text token ends it. New tokens are decoded behind those before them, on which spaces depend in some tokenizers; the
    prompt's last ones stand in front of the first.
    """
    window = prompt[-8:]
    said = len(text.decode(window))
    written = len(window)  # tokens of the window whose text is out
    for token in tokens:
        if token in text.ends:
            break
        window.append(token)
        whole = text.decode(window)
        if len(whole) > said and not whole.endswith(INCOMPLETE):
            yield whole[said:]
            window, said, written = window[written:], len(text.decode(window[written:])), len(window) - written
    if rest := text.decode(window)[said:]:
        yield rest
