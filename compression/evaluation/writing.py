"""Greedy text from any runtime, for measurements that judge it. Imports no torch.

A prompt is a message in the model's chat template where it has one, and plain text with the tokenizer's own special tokens where it has none.
Writing ends at an end-of-text token, before the first stop text, or after the given number of tokens. A prompt that does not
fit into the model together with them loses its beginning.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from compression.errors import Incompatible
from compression.evaluation.generation import stream
from compression.evaluation.runtime import Runtime
from compression.evaluation.text import Text, stream_text


@dataclass(frozen=True)
class Written:
    """Text that a model wrote.

    Attributes:
        text: Without the prompt, up to the stop text.
        tokens: As generated, without end-of-text.
        ended: Whether end-of-text or a stop text ended it, not the limit.
    """

    text: str
    tokens: list[int]
    ended: bool


class Writer:
    """Generates greedily with a runtime and its tokenizer.

    Args:
        runtime: The loaded model.
        text: Its tokenizer.
        new_tokens: Tokens of a text, at most.
        system: Message in front of a prompt in a chat template.

    Raises:
        Incompatible: `new_tokens` leave no room for a prompt.
    """

    def __init__(self, runtime: Runtime, text: Text, new_tokens: int, system: str | None = None):
        if new_tokens >= runtime.max_length:
            raise Incompatible(f"{new_tokens} new tokens leave no room for a prompt in the model's {runtime.max_length}", key="new_tokens")
        self.text = text
        self._runtime, self._new_tokens, self._system = runtime, new_tokens, system

    def answer(self, message: str, until: Sequence[str] = ()) -> Written:
        """Return the model's answer to a message."""
        return self.continue_from(self.text.encode_chat(message, self._system) if self.text.templated else self.text.encode(message), until)

    def continue_from(self, prompt: list[int], until: Sequence[str] = ()) -> Written:
        """Continue a prompt of tokens; an empty one counts as the end of another text."""
        prompt = (prompt or sorted(self.text.ends)[:1])[-(self._runtime.max_length - self._new_tokens) :]
        tokens: list[int] = []
        generated = ""
        for piece in stream_text(self.text, prompt, _collect(stream(self._runtime, prompt, self._new_tokens), tokens)):
            generated += piece
            found = [place for stop in until if (place := generated.find(stop)) >= 0]
            if found:
                return Written(generated[: min(found)], tokens, ended=True)
        ended = tokens[-1] in self.text.ends
        return Written(generated, tokens[:-1] if ended else tokens, ended)


def _collect(tokens: Iterator[int], collected: list[int]) -> Iterator[int]:
    for token in tokens:
        collected.append(token)
        yield token
