"""From a checkpoint to the directory of an ONNX artifact."""

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
from export.atomic_directory import whole
from export.checks import check_onnx, outer_types
from export.onnx.calibrate import input_limits
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
from export.traced import describe


def export_onnx(
    checkpoint: Path,
    out: Path,
    *,
    target: str = "portable",
    dtype: str = "float32",
    block_size: int = 32,
    accuracy_level: int = 4,
    embedding_type: str | None = None,
    head_type: str | None = None,
    windows: torch.Tensor | None = None,
    context: Context,
) -> dict[str, float]:
    """Write `model.onnx`, `config.json` and the tokenizer into `out`; return its opset, bytes and the seconds it took.

    target  "portable": every operator is ONNX's own, and inputs rounded to int8 have zero point 0; "onnxruntime": what runs fast there,
            its own operators for int4, and uint8 inputs for int8-static. Its fused attention was no faster than ONNX's Attention
    dtype   float32, or float16 (weights, activations and cache), or of the blocks' linear layers, everything else being float32,
            int8         weights int8 per output channel, inputs uint8 with a range for each tensor found at run time
            int8-static  weights int8 per output channel, inputs in 8 bits with ranges calibrated on `windows`, as QDQ
            int4         weights in blocks (MatMulNBits): a GPTQ or AWQ checkpoint's own codes, a dense one's rounded to nearest
    block_size, accuracy_level  of int4: weights of a dense checkpoint that share a scale; 4 multiplies with inputs in int8, 1 in float32
    embedding_type, head_type   the float type of the graph, or int8 with a scale for each token; a tied head is stored once
    windows  calibration token ids, int64 [count, length]; for int8-static only
    A W8A8 checkpoint's codes and scales are carried. It means inputs rounded token by token; here a whole tensor shares its range.
    GPTQ and AWQ checkpoints are dequantized for other types than int4.
    Raises Incompatible for what `check_onnx` refuses, UnusableModel for a directory that cannot be opened.
    """
    started = time.perf_counter()
    source = open_checkpoint(checkpoint)
    check_onnx(
        source, target=target, dtype=dtype, block_size=block_size, accuracy_level=accuracy_level,
        embedding_type=embedding_type, head_type=head_type,
    )  # fmt: skip
    if (windows is not None) != (dtype == "int8-static"):
        raise Incompatible("calibration windows are for dtype int8-static, and it needs them", key="dtype")
    if source.layout in ("gptq", "awq") and dtype != "int4":
        context.warn(
            f"export.onnx dequantizes the {source.layout.upper()} checkpoint and writes {dtype} weights; "
            "dtype int4 with target onnxruntime, export.genai and export.gguf carry its codes"
        )
    embedding, head = outer_types(source, type=dtype, embedding_type=embedding_type, head_type=head_type)
    with whole(out) as place:
        with quiet_and_offline():
            model = load_model(checkpoint, dtype=torch.float16 if dtype == "float16" else torch.float32, inputs_rounded=False)
            graph = trace_generation(model)
            del model
            context.progress(1, 2, "traced")
            if dtype == "int4":
                _round_to_blocks(graph, source, block_size, accuracy_level)
            elif dtype in ("int8", "int8-static"):
                _round_to_bytes(graph, source, target, head == "int8", windows, context)
            if head == "int8" and not dtype.startswith("int8"):
                quantize_dynamic(graph, *_rounded(graph, [source.family.head]))
            if embedding == "int8":
                table = embedding_of(graph)
                quantize_embedding(graph, table, _int8(floats_of(table), "the embedding"))
            save_graph(graph, place / "model.onnx")
            onnx.checker.check_model(str(place / "model.onnx"), full_check=True)
        context.progress(2, 2, "written")
        describe(source, place)
    return {"opset": OPSET, "bytes": sum(f.stat().st_size for f in out.rglob("*") if f.is_file()), "seconds": time.perf_counter() - started}


def _round_to_bytes(
    graph: onnx_ir.Model, source: Checkpoint, target: str, with_head: bool, windows: torch.Tensor | None, context: Context
) -> None:
    """The blocks' linear layers as int8, with the codes of a W8A8 checkpoint; static where there are windows to calibrate on."""
    carried = dict(read_scaled_linears(source, read_scheme(source))) if source.layout == "w8a8" else {}
    paths = list(carried) or _linears(source)
    layers, weights = _rounded(graph, [*paths, source.family.head] if with_head else paths)
    weights |= carried
    if windows is None:
        quantize_dynamic(graph, layers, weights)
    else:
        quantize_static(graph, layers, weights, input_limits(graph, layers, windows, context), unsigned=target == "onnxruntime")


def _round_to_blocks(graph: onnx_ir.Model, source: Checkpoint, block_size: int, accuracy_level: int) -> None:
    """The blocks' linear layers as 4-bit codes: those of a GPTQ or AWQ checkpoint, or the nearest on a symmetric grid."""
    if source.layout == "dense":
        layers = layers_of(graph, _linears(source))
        weights = {path: _int4(layer.weight(), block_size) for path, layer in layers.items()}
    else:
        weights = dict(read_quantized_linears(source.path))
        layers = layers_of(graph, list(weights))
        scattered = [path for path, weight in weights.items() if not weight.storage_ordered]
        if scattered:
            raise Incompatible(f"MatMulNBits has groups in storage order only, and those of {scattered[0]} are not (g_idx)", key="dtype")
    quantize_blocks(graph, layers, weights, accuracy_level=accuracy_level)


def _linears(source: Checkpoint) -> list[str]:
    return [name.removesuffix(".weight") for name in source.linear_tensors()]


def _rounded(graph: onnx_ir.Model, paths: list[str]) -> tuple[dict[str, Layer], dict[str, ScaledLinear]]:
    """Layers of the graph, and their weights rounded to int8."""
    layers = layers_of(graph, paths)
    return layers, {path: _int8(layer.weight(), path) for path, layer in layers.items()}


def _int8(weight: np.ndarray, name: str) -> ScaledLinear:
    return round_weight(torch.from_numpy(weight.copy()), Scheme("int"), dtype=torch.float32, name=name)


def _int4(weight: np.ndarray, block_size: int) -> QuantizedLinear:
    floats = torch.from_numpy(weight.copy())
    grid = fit_grid(floats, WeightScheme(4, block_size), symmetric=True)
    return quantized_linear(grid.quantize(floats), grid)
