"""A model that writes: greedy text from any runtime, to be judged. Imports no torch.

A prompt is a message in the model's chat template where it has one, and plain text with the tokenizer's own special tokens where it has none.
Writing ends with an end-of-text token, in front of the first stop text, or after as many tokens as were asked for. A prompt that does not
fit into the model beside them loses its beginning.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from compression.errors import Incompatible
from compression.evaluation.generation import stream
from compression.evaluation.runtime import Runtime
from compression.evaluation.text import Text, stream_text


@dataclass(frozen=True)
class Written:
    """What a model wrote.

    text    without the prompt, up to the stop text
    tokens  as generated, without end-of-text
    ended   by end-of-text or a stop text, and not cut off
    """

    text: str
    tokens: list[int]
    ended: bool


class Writer:
    """Greedy generation of at most `new_tokens` tokens with a runtime and its tokenizer.

    system  message in front of a prompt in a chat template
    Raises Incompatible where so many leave no room for a prompt.
    """

    def __init__(self, runtime: Runtime, text: Text, new_tokens: int, system: str | None = None):
        if new_tokens >= runtime.max_length:
            raise Incompatible(f"{new_tokens} new tokens leave no room for a prompt in the model's {runtime.max_length}", key="new_tokens")
        self.text = text
        self._runtime, self._new_tokens, self._system = runtime, new_tokens, system

    def answer(self, message: str, until: Sequence[str] = ()) -> Written:
        """What the model says to a message."""
        return self.continue_from(self.text.encode_chat(message, self._system) if self.text.templated else self.text.encode(message), until)

    def continue_from(self, prompt: list[int], until: Sequence[str] = ()) -> Written:
        """How the model goes on after tokens; after none at all, as after a text that ended."""
        prompt = (prompt or sorted(self.text.ends)[:1])[-(self._runtime.max_length - self._new_tokens) :]
        tokens: list[int] = []
        said = ""
        for piece in stream_text(self.text, prompt, _kept(stream(self._runtime, prompt, self._new_tokens), tokens)):
            said += piece
            found = [place for stop in until if (place := said.find(stop)) >= 0]
            if found:
                return Written(said[: min(found)], tokens, ended=True)
        ended = tokens[-1] in self.text.ends
        return Written(said, tokens[:-1] if ended else tokens, ended)


def _kept(tokens: Iterator[int], kept: list[int]) -> Iterator[int]:
    for token in tokens:
        kept.append(token)
        yield token
