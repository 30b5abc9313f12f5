"""The transformers runtime: any checkpoint, run as plain torch."""

import time
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import DynamicCache

from compression.checkpoint import open_checkpoint
from compression.errors import Incompatible
from compression.evaluation.runtime import Generation
from compression.loading import load_model


class TransformersRuntime:
    """Implements compression.evaluation.runtime.Runtime in float32, with scaled dot product attention.

    Dense checkpoints are timed. GPTQ and AWQ ones run dequantized, which tells their quality but not their speed.

    device   torch device
    threads  torch's threads, set for the whole process: sums differ in their last bits between one and two
    Raises UnusableModel as `load_model` does.
    """

    name = "transformers"
    version = transformers.__version__

    def __init__(self, path: Path, *, device: str = "cpu", threads: int):
        torch.set_num_threads(threads)
        checkpoint = open_checkpoint(path)
        self.max_length = checkpoint.max_length
        self.timed = checkpoint.layout == "dense"
        self._model = load_model(path, device=device)

    @torch.inference_mode()
    def logits(self, input_ids: np.ndarray) -> np.ndarray:
        tokens = torch.from_numpy(input_ids).to(self._model.device)
        return self._model(input_ids=tokens, use_cache=False).logits.float().cpu().numpy()

    @torch.inference_mode()
    def generate(self, prompt: list[int], new_tokens: int) -> Generation:
        """As the protocol says. Raises Incompatible when prompt and generation do not fit into the context."""
        if len(prompt) + new_tokens > self.max_length:
            raise Incompatible(f"{len(prompt)} + {new_tokens} tokens do not fit into the model's {self.max_length}")
        begin = time.perf_counter()
        cache = DynamicCache(config=self._model.config)
        tokens = [self._next(torch.tensor([prompt]), cache)]
        first = time.perf_counter()
        while len(tokens) < new_tokens:
            tokens.append(self._next(torch.tensor([tokens[-1:]]), cache))
        return Generation(tokens, first - begin, time.perf_counter() - first)

    def _next(self, input_ids: torch.Tensor, cache: DynamicCache) -> int:
        inputs = input_ids.to(self._model.device)
        logits = self._model(input_ids=inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return int(logits[0, -1].argmax())  # waits for the device, so the clock is honest

    def close(self) -> None:
        del self._model
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
