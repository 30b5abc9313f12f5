"""Packages of `export.genai` in ONNX Runtime GenAI, on the CPU."""

import json
from pathlib import Path

import numpy as np
import onnxruntime_genai as og


class GenaiRuntime:
    """A package with its cache in one preallocated buffer, as an application would run it."""

    name = "onnxruntime-genai"
    version = og.__version__
    timed = True

    def __init__(self, directory: Path, *, threads: int):
        """threads  that one operator may use (intra-op)"""
        og.disable_telemetry_events()
        config = og.Config(str(directory))
        session = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
        self._model = og.Model(config)
        self._generator: og.Generator = None
        self.max_length: int = json.loads((directory / "genai_config.json").read_text())["model"]["context_length"]

    def logits(self, input_ids: np.ndarray) -> np.ndarray:
        # Row by row: in a batch GenAI masks every token that equals the padding token, which text may well hold.
        rows = []
        for row in input_ids:
            generator = self._read(row, len(row))
            rows.append(generator.get_output("logits").astype(np.float32))
        return np.concatenate(rows)

    def start(self, prompt: list[int], new_tokens: int) -> np.ndarray:
        self._generator = None  # gives its cache back first
        self._generator = self._read(np.array(prompt), len(prompt) + new_tokens)
        return self._generator.get_logits()[0, -1]

    def step(self, token: int) -> np.ndarray:
        # The caller chooses tokens, since GenAI's own search stops computing at end-of-text, which cannot be switched off:
        # what came after would be padding that costs no time.
        self._generator.append_tokens(np.array([[token]], dtype=np.int32))
        return self._generator.get_logits()[0, -1]

    def _read(self, prompt: np.ndarray, max_length: int) -> og.Generator:
        """A generator that has read the prompt, with room for `max_length` tokens in its cache."""
        params = og.GeneratorParams(self._model)
        params.set_search_options(max_length=max_length, do_sample=False)
        generator = og.Generator(self._model, params)
        generator.append_tokens(prompt.astype(np.int32)[None])
        return generator

    def close(self) -> None:
        del self._generator, self._model
