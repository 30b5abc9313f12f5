"""Write a checkpoint as the directory of an ONNX artifact."""

import time
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import torch

from compression.checkpoints.checkpoint import Checkpoint, open_checkpoint
from compression.checkpoints.compressed_tensors import ScaledLinear, read_scaled_linears, round_weight
from compression.checkpoints.layouts import QuantizedLinear, read_quantized_linears
from compression.checkpoints.loading import load_model
from compression.checkpoints.quantization_config import WeightScheme
from compression.checkpoints.schemes import Scheme, read_scheme
from compression.context import Context
from compression.errors import Incompatible
from compression.quantization.grid import fit_grid
from compression.quantization.rounding import quantized_linear
from export.atomic_directory import atomic_directory, export_figures
from export.onnx.calibrate import input_limits
from export.onnx.check import OnnxSettings, check_onnx
from export.onnx.quantize import (
    Layer,
    embedding_of,
    floats_of,
    layers_of,
    quantize_blocks,
    quantize_dynamic,
    quantize_embedding,
    quantize_static,
)
from export.onnx.save import save_graph
from export.onnx.trace import OPSET, trace_generation
from export.quiet import quiet_and_offline
from export.traced import copy_description


def export_onnx(
    checkpoint: Path, out: Path, settings: OnnxSettings, *, windows: torch.Tensor | None = None, context: Context
) -> dict[str, float]:
    """Write a checkpoint as one ONNX generation graph with a KV cache.

    Example:
        settings = OnnxSettings(dtype="int8")
        export_onnx(Path("model"), Path("model-onnx"), settings, context=Context())

    Args:
        checkpoint: A dense checkpoint; a W8A8 one, whose codes and scales are carried (its inputs are rounded token by token, while here
            a whole tensor shares its range); or a GPTQ or AWQ one, whose codes int4 carries and other types dequantize.
        out: Directory for `model.onnx`, `config.json` and the tokenizer; after a failure nothing is written.
        settings: Types, and whether the graph may use operators of ONNX Runtime's own. Its fused attention was no faster than ONNX's
            Attention, which both targets use.
        windows: Calibration token ids, int64 [count, length], for dtype int8-static only.
        context: Receives progress and warnings.

    Returns:
        `opset`, `bytes` of all files in `out`, and `seconds`.

    Raises:
        Incompatible: `check_onnx` refuses the checkpoint, or windows are missing or not needed.
        UnusableModel: The checkpoint cannot be opened, or the trace has lost one of its linear layers.
    """
    started = time.perf_counter()
    source = open_checkpoint(checkpoint)
    check_onnx(source, settings)
    dtype = settings.dtype
    if (windows is not None) != settings.is_calibrated:
        raise Incompatible("calibration windows are for dtype int8-static, and it needs them", key="dtype")
    if source.layout in ("gptq", "awq") and dtype != "int4":
        context.warn(
            f"export.onnx dequantizes the {source.layout.upper()} checkpoint and writes {dtype} weights; "
            "dtype int4 with target onnxruntime, export.genai and export.gguf carry its codes"
        )
    with atomic_directory(out) as temporary:
        with quiet_and_offline():
            model = load_model(checkpoint, dtype=torch.float16 if dtype == "float16" else torch.float32, inputs_rounded=False)
            graph = trace_generation(model)
            del model
            context.progress(1, 2, "traced")
            _quantize(graph, source, settings, windows, context)
            save_graph(graph, temporary / "model.onnx")
            onnx.checker.check_model(str(temporary / "model.onnx"), full_check=True)
        context.progress(2, 2, "written")
        copy_description(source, temporary)
    return {"opset": OPSET, **export_figures(out, started)}


def _quantize(graph: onnx_ir.Model, source: Checkpoint, settings: OnnxSettings, windows: torch.Tensor | None, context: Context) -> None:
    """Give linear layers, embedding and head the integer types of the settings."""
    embedding, head = settings.outer_types(source)
    if settings.dtype == "int4":
        _round_to_blocks(graph, source, settings)
    if settings.dtype.startswith("int8"):
        carried = dict(read_scaled_linears(source, read_scheme(source))) if source.layout == "w8a8" else {}
        paths = list(carried) or _linears(source)
        layers, weights = _rounded(graph, [*paths, source.family.head] if head == "int8" else paths)
        weights |= carried
        if windows is None:
            quantize_dynamic(graph, layers, weights)
        else:
            limits = input_limits(graph, layers, windows, context)
            quantize_static(graph, layers, weights, limits, unsigned=settings.target == "onnxruntime")
    elif head == "int8":
        quantize_dynamic(graph, *_rounded(graph, [source.family.head]))
    if embedding == "int8":
        table = embedding_of(graph)
        quantize_embedding(graph, table, _int8(floats_of(table), "the embedding"))


def _round_to_blocks(graph: onnx_ir.Model, source: Checkpoint, settings: OnnxSettings) -> None:
    """Store the blocks' linear layers as 4-bit codes: those of a GPTQ or AWQ checkpoint, or the nearest on a symmetric grid."""
    if source.layout == "dense":
        layers = layers_of(graph, _linears(source))
        weights = {path: _int4(layer.weight(), settings.block_size) for path, layer in layers.items()}
    else:
        weights = dict(read_quantized_linears(source.path))
        layers = layers_of(graph, list(weights))
        scattered = [path for path, weight in weights.items() if not weight.storage_ordered]
        if scattered:
            raise Incompatible(f"MatMulNBits has groups in storage order only, and those of {scattered[0]} are not (g_idx)", key="dtype")
    quantize_blocks(graph, layers, weights, accuracy_level=settings.accuracy_level)


def _linears(source: Checkpoint) -> list[str]:
    return [name.removesuffix(".weight") for name in source.linear_tensors()]


def _rounded(graph: onnx_ir.Model, paths: list[str]) -> tuple[dict[str, Layer], dict[str, ScaledLinear]]:
    """Return layers of the graph, and their weights rounded to int8."""
    layers = layers_of(graph, paths)
    return layers, {path: _int8(layer.weight(), path) for path, layer in layers.items()}


def _int8(weight: np.ndarray, name: str) -> ScaledLinear:
    return round_weight(torch.from_numpy(weight.copy()), Scheme("int"), dtype=torch.float32, name=name)


def _int4(weight: np.ndarray, block_size: int) -> QuantizedLinear:
    floats = torch.from_numpy(weight.copy())
    grid = fit_grid(floats, WeightScheme(4, block_size), symmetric=True)
    return quantized_linear(grid.quantize(floats), grid)
