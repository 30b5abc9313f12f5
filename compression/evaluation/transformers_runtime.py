"""The transformers runtime: any checkpoint, run as plain torch."""

from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import DynamicCache

from compression.checkpoints.checkpoint import open_checkpoint
from compression.checkpoints.loading import load_model


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
        self._cache = DynamicCache(config=self._model.config)

    @torch.inference_mode()
    def logits(self, input_ids: np.ndarray) -> np.ndarray:
        tokens = torch.from_numpy(input_ids).to(self._model.device)
        return self._model(input_ids=tokens, use_cache=False).logits.float().cpu().numpy()

    def start(self, prompt: list[int], new_tokens: int) -> np.ndarray:
        self._cache = DynamicCache(config=self._model.config)
        return self._read(prompt)

    def step(self, token: int) -> np.ndarray:
        return self._read([token])

    @torch.inference_mode()
    def _read(self, tokens: list[int]) -> np.ndarray:
        input_ids = torch.tensor([tokens], device=self._model.device)
        logits = self._model(input_ids=input_ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1).logits
        return logits[0, -1].float().cpu().numpy()  # waits for the device, so the clock is honest

    def close(self) -> None:
        del self._model, self._cache
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
