"""What every scorer needs of a runtime. Imports no torch: transformers, ONNX Runtime, GenAI and llama.cpp implement it alike."""

from typing import Protocol

import numpy as np


class Runtime(Protocol):
    """A loaded model. Close it to give its memory back.

    Generation (compression/evaluation/generation.py) is `start` and then `step` after `step`, on a KV cache that the runtime keeps.
    """

    name: str  # "transformers", "onnxruntime", "onnxruntime-genai", "openvino", "executorch", "llama.cpp"
    version: str  # of the library, part of every record's key
    max_length: int  # tokens that fit, prompt and generation together
    timed: bool  # False where the layout has no fast kernel here, so that a tokens/s would mislead

    def logits(self, input_ids: np.ndarray) -> np.ndarray:
        """Next-token logits at every position: int64 [batch, length] -> float32 [batch, length, vocabulary].

        Rows may be padded on the right with any valid token: attention is causal, so padding never changes what is before it.
        """
        ...

    def start(self, prompt: list[int], new_tokens: int) -> np.ndarray:
        """Forget what was before, read a prompt of one token or more, and return the logits of the next token: float [vocabulary].

        new_tokens  that will be generated at most, for caches of a fixed size; with the prompt they fit into max_length
        The array may be the runtime's own memory: it is good until the next call.
        """
        ...

    def step(self, token: int) -> np.ndarray:
        """Read one token more and return the logits of the next: float [vocabulary], good until the next call."""
        ...

    def close(self) -> None: ...
