"""Graphs of `export.openvino` in OpenVINO, on the CPU."""

import json
from pathlib import Path

import numpy as np

from export.telemetry import import_openvino

openvino = import_openvino()


class OpenvinoRuntime:
    """One graph that keeps its cache itself, from one call to the next."""

    name = "openvino"
    version: str = openvino.__version__.partition("-")[0]
    timed = True

    def __init__(self, directory: Path, *, threads: int):
        """threads  of every computation"""
        # Processors with AMX would compute in bfloat16 by default, which moves logits further than the types of the weights do; and the
        # file's own hint is not read. (With a single thread, 2026.4.1 even dies of SIGFPE in bfloat16: openvinotoolkit/openvino#33300.)
        settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
        self._request = openvino.Core().compile_model(directory / "model.xml", "CPU", settings).create_infer_request()
        self._length = 0  # tokens in the cache
        self.max_length: int = json.loads((directory / "config.json").read_text())["max_position_embeddings"]

    def logits(self, input_ids: np.ndarray) -> np.ndarray:
        self._forget()
        return self._read(input_ids).copy()

    def start(self, prompt: list[int], new_tokens: int) -> np.ndarray:
        self._forget()
        return self._read(np.array([prompt]))[0, -1]

    def step(self, token: int) -> np.ndarray:
        return self._read(np.array([[token]]))[0, -1]

    def _forget(self) -> None:
        self._request.reset_state()
        self._length = 0

    def _read(self, input_ids: np.ndarray) -> np.ndarray:
        """Run tokens [batch, length] behind those in the cache; returns their logits, in OpenVINO's own memory."""
        batch, length = input_ids.shape
        positions = np.broadcast_to(np.arange(self._length, self._length + length), (batch, length))
        feeds = {
            "input_ids": input_ids.astype(np.int64),
            "position_ids": np.ascontiguousarray(positions),
            "beam_idx": np.arange(batch, dtype=np.int32),
        }
        self._request.infer(feeds, share_inputs=True)
        self._length += length
        return self._request.get_tensor("logits").data

    def close(self) -> None:
        del self._request
