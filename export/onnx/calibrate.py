"""The ranges of the inputs of linear layers, measured in the graph that will run."""

import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir
import onnxruntime as ort
import torch

from compression.context import Context
from compression.errors import UnusableModel
from export.onnx.quantize import INT8_LIMIT, Layer
from export.onnx.save import save_graph

CHUNK = 128  # tokens a run: the inputs of all layers must fit into memory together


class Histogram:
    """Count magnitudes by their bfloat16: its bins are relative, so no range is needed in advance."""

    def __init__(self) -> None:
        self.counts = np.zeros(2**15)
        self.largest = 0.0

    def add(self, values: np.ndarray) -> None:
        """Count float32 values of any shape."""
        magnitudes = np.abs(values.reshape(-1))
        self.largest = max(self.largest, float(magnitudes.max()))
        self.counts += np.bincount(magnitudes.view(np.uint32) >> 16, minlength=2**15)

    def limit(self) -> float:
        """Return the t that rounds with the least squared error when −t … t has 2·127 steps and values outside are clipped.

        Below half a step the error is x², up to t a twelfth of the squared step on average, above t it is (x − t)².
        """
        used = np.flatnonzero(self.counts)
        x = (used.astype(np.uint32) << 16 | 1 << 15).view(np.float32).astype(np.float64)  # the middle of a bin
        sums = [np.concatenate([[0.0], np.cumsum(self.counts[used] * x**power)]) for power in range(3)]
        below, above = np.searchsorted(x, x / INT8_LIMIT / 2), np.arange(1, len(x) + 1)
        count, first, second = (s[-1] - s[above] for s in sums)
        error = sums[2][below] + (sums[0][above] - sums[0][below]) * (x / INT8_LIMIT) ** 2 / 12 + second - 2 * x * first + x**2 * count
        return min(float(x[error.argmin()]), self.largest)


def input_limits(graph: onnx_ir.Model, layers: Mapping[str, Layer], windows: torch.Tensor, context: Context) -> dict[str, float]:
    """Measure the largest magnitude that int8 should hold of each layer's input.

    Each window runs in pieces: the first on an empty cache, as a prefill, the others behind a filled one, as when decoding.

    Args:
        graph: The float graph; it is restored afterwards.
        layers: Its linear layers by path.
        windows: Token ids, int64 [count, length].
        context: Receives progress.

    Returns:
        The magnitude by path.

    Raises:
        UnusableModel: An input is not finite, or always 0.
    """
    inputs = {str(layer.input.name): layer.input for layer in layers.values()}
    histograms = {name: Histogram() for name in inputs}
    outputs = list(graph.graph.outputs)
    graph.graph.outputs.extend(inputs.values())
    try:
        with tempfile.TemporaryDirectory() as directory:
            save_graph(graph, Path(directory) / "model.onnx")
            session = _session(Path(directory) / "model.onnx")
            for done, window in enumerate(windows.numpy(), 1):
                _observe(session, window, histograms)
                context.progress(done, len(windows), "calibration windows")
    finally:
        del graph.graph.outputs[len(outputs) :]
    limits = {name: histogram.limit() if histogram.largest > 0 else 0.0 for name, histogram in histograms.items()}
    found = {path: limits[str(layer.input.name)] for path, layer in layers.items()}
    wrong = [path for path, limit in found.items() if not 0 < limit < np.inf]
    if wrong:
        raise UnusableModel(
            f"the inputs of {', '.join(wrong[:4])} are 0 or not finite over the calibration data: no range fits them", key="model"
        )
    return found


def _session(file: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def _observe(session: ort.InferenceSession, window: np.ndarray, histograms: Mapping[str, Histogram]) -> None:
    cached = [value for value in session.get_inputs() if value.name.startswith("past_key_values.")]
    cache = {value.name: np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32) for value in cached}
    wanted = [*histograms, *(name.replace("past_key_values", "present") for name in cache)]
    size = min(CHUNK, -(-len(window) // 2))  # two pieces at least
    for start in range(0, len(window), size):
        tokens = window[None, start : start + size]
        positions = np.arange(start, start + tokens.shape[1])[None]
        found = session.run(wanted, {"input_ids": tokens, "position_ids": positions, **cache})
        cache = dict(zip(cache, found[len(histograms) :], strict=True))
        for histogram, values in zip(histograms.values(), found, strict=False):
            histogram.add(values)
