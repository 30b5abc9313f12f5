"""What every scorer needs of a runtime. Imports no torch: transformers, ONNX Runtime, GenAI and llama.cpp implement it alike."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np


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


class Runtime(Protocol):
    """A loaded model. Close it to give its memory back."""

    name: str  # "transformers", "onnxruntime", "onnxruntime-genai", "llama.cpp"
    version: str  # of the library, part of every record's key
    max_length: int  # tokens that fit, prompt and generation together
    timed: bool  # False where the layout has no fast kernel here, so that a tokens/s would mislead

    def logits(self, input_ids: np.ndarray) -> np.ndarray:
        """Next-token logits at every position: int64 [batch, length] -> float32 [batch, length, vocabulary].

        Rows may be padded on the right with any valid token: attention is causal, so padding never changes what is before it.
        """
        ...

    def generate(self, prompt: list[int], new_tokens: int) -> Generation:
        """Greedy generation of exactly `new_tokens` tokens with a KV cache; end-of-text does not stop it."""
        ...

    def close(self) -> None: ...
