"""How a model writes its own corpus. Imports no torch: recipes are validated with it."""

from dataclasses import dataclass

from compression.errors import EdgepressError

CORPUS = "corpus.jsonl"  # the file it becomes, {"text": ...} a line


@dataclass(frozen=True)
class SynthesisSettings:
    """Exactly one of `documents` and `tokens` says how much.

    documents    documents to keep
    tokens       tokens to keep, counted in whole documents: the last one may go past it
    length       tokens of a document at most, the start token and the prompt among them
    temperature  logits are divided by it
    top_p        share of the probability, in (0, 1], that the likeliest tokens to draw from hold
    min_tokens   a document to which the model wrote less than this is dropped
    batch_size   documents sampled at once

    Raises EdgepressError for a value out of range.
    """

    documents: int | None = None
    tokens: int | None = None
    length: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    min_tokens: int = 8
    batch_size: int = 32

    def __post_init__(self) -> None:
        if (self.documents is None) == (self.tokens is None):
            raise EdgepressError("give `documents` or `tokens`, one of them: how much the corpus is to hold", key="documents")
        for name in ("documents", "tokens", "min_tokens", "batch_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise EdgepressError(f"{name} is {value}; at least 1 is needed", key=name)
        if self.temperature <= 0:
            raise EdgepressError(f"temperature is {self.temperature}; above 0 is needed (a small top_p is greedy)", key="temperature")
        if not 0 < self.top_p <= 1:
            raise EdgepressError(f"top_p is {self.top_p}; it is a share, above 0 and at most 1", key="top_p")
        if self.min_tokens >= self.length:
            raise EdgepressError(f"documents of {self.length} tokens cannot hold {self.min_tokens} that the model wrote", key="min_tokens")

    def check_prompts(self, prompt_tokens: int) -> None:
        """Raises EdgepressError where a prompt of so many tokens leaves no room for what the model writes."""
        if 1 + prompt_tokens + self.min_tokens > self.length:
            raise EdgepressError(
                f"a start token, a prompt of {prompt_tokens} and at least {self.min_tokens} written tokens are more than length, {self.length}",
                key="prompt_tokens",
            )
