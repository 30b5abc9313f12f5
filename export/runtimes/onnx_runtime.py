"""Graphs of `export.onnx` in ONNX Runtime, on the CPU."""

import json
from pathlib import Path

import numpy as np
import onnxruntime as ort

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
        self._cache: dict[str, ort.OrtValue] = {}
        self._length = 0  # tokens in it
        self.max_length: int = json.loads((directory / "config.json").read_text())["max_position_embeddings"]

    def logits(self, input_ids: np.ndarray) -> np.ndarray:
        batch, length = input_ids.shape
        positions = np.broadcast_to(np.arange(length), (batch, length))
        feeds = {"input_ids": input_ids.astype(np.int64), "position_ids": np.ascontiguousarray(positions), **self._empty_cache(batch)}
        (logits,) = self._session.run(["logits"], feeds)
        return logits.astype(np.float32, copy=False)

    def start(self, prompt: list[int], new_tokens: int) -> np.ndarray:
        self._length = 0
        self._cache = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in self._empty_cache(1).items()}
        return self._read(prompt)

    def step(self, token: int) -> np.ndarray:
        return self._read([token])

    def _read(self, tokens: list[int]) -> np.ndarray:
        """Run tokens behind those in the cache; returns the logits after the last.

        Bound outputs stay with ONNX Runtime and become the next step's inputs: nothing of the cache passes through numpy.
        """
        binding = self._session.io_binding()
        binding.bind_cpu_input("input_ids", np.array([tokens], dtype=np.int64))
        binding.bind_cpu_input("position_ids", np.arange(self._length, self._length + len(tokens), dtype=np.int64)[None])
        for name, value in self._cache.items():
            binding.bind_ortvalue_input(name, value)
        binding.bind_output("logits")
        for past in self._past:
            binding.bind_output(past.name.replace("past_key_values", "present"))
        self._session.run_with_iobinding(binding)
        logits, *present = binding.get_outputs()
        self._cache = dict(zip(self._cache, present, strict=True))
        self._length += len(tokens)
        return logits.numpy()[0, -1]

    def _empty_cache(self, batch: int) -> dict[str, np.ndarray]:
        return {past.name: np.zeros((batch, past.shape[1], 0, past.shape[3]), NUMPY_TYPES[past.type]) for past in self._past}

    def close(self) -> None:
        del self._session, self._cache
