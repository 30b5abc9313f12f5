"""Graphs of `export.onnx` in ONNX Runtime, on the CPU."""

import json
import time
from pathlib import Path

import numpy as np
import onnxruntime as ort

from compression.errors import Incompatible
from compression.evaluation.runtime import Generation

NUMPY_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class OnnxRuntime:
    """One generation graph, prefilled on an empty cache and decoded with the cache bound from step to step.

    Dynamic int8 graphs take one activation range over the whole batch, so their logits depend a little on the rows
    beside them and on padding; float graphs do not.
    """

    name = "onnxruntime"
    version = ort.__version__
    timed = True

    def __init__(self, directory: Path, *, threads: int):
        """threads  that one operator may use (intra-op); operators run one after another"""
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3  # errors: warnings about initializers nobody uses go to the terminal otherwise
        self._session = ort.InferenceSession(str(directory / "model.onnx"), options, providers=["CPUExecutionProvider"])
        self._past = [value for value in self._session.get_inputs() if value.name.startswith("past_key_values.")]
        self.max_length: int = json.loads((directory / "config.json").read_text())["max_position_embeddings"]

    def logits(self, input_ids: np.ndarray) -> np.ndarray:
        batch, length = input_ids.shape
        positions = np.broadcast_to(np.arange(length), (batch, length))
        feeds = {"input_ids": input_ids.astype(np.int64), "position_ids": np.ascontiguousarray(positions), **self._empty_cache(batch)}
        (logits,) = self._session.run(["logits"], feeds)
        return logits.astype(np.float32, copy=False)

    def generate(self, prompt: list[int], new_tokens: int) -> Generation:
        """As the protocol says. Raises Incompatible when prompt and generation do not fit into the context."""
        if len(prompt) + new_tokens > self.max_length:
            raise Incompatible(f"{len(prompt)} + {new_tokens} tokens do not fit into the model's {self.max_length}")
        started = time.perf_counter()
        cache = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in self._empty_cache(1).items()}
        token, cache = self._step(np.array([prompt], dtype=np.int64), 0, cache)
        prefilled = time.perf_counter()
        tokens = [token]
        while len(tokens) < new_tokens:
            token, cache = self._step(np.array([[token]], dtype=np.int64), len(prompt) + len(tokens) - 1, cache)
            tokens.append(token)
        return Generation(tokens, prefilled - started, time.perf_counter() - prefilled)

    def _step(self, input_ids: np.ndarray, start: int, cache: dict[str, ort.OrtValue]) -> tuple[int, dict[str, ort.OrtValue]]:
        """Run tokens that stand at positions `start`...; return the most likely next token and the grown cache.

        Bound outputs stay with ONNX Runtime and become the next step's inputs: nothing of the cache passes through numpy.
        """
        binding = self._session.io_binding()
        binding.bind_cpu_input("input_ids", input_ids)
        binding.bind_cpu_input("position_ids", np.arange(start, start + input_ids.shape[1], dtype=np.int64)[None])
        for name, value in cache.items():
            binding.bind_ortvalue_input(name, value)
        binding.bind_output("logits")
        for past in self._past:
            binding.bind_output(past.name.replace("past_key_values", "present"))
        self._session.run_with_iobinding(binding)
        logits, *present = binding.get_outputs()
        return int(logits.numpy()[0, -1].argmax()), dict(zip(cache, present, strict=True))

    def _empty_cache(self, batch: int) -> dict[str, np.ndarray]:
        return {past.name: np.zeros((batch, past.shape[1], 0, past.shape[3]), NUMPY_TYPES[past.type]) for past in self._past}

    def close(self) -> None:
        del self._session
