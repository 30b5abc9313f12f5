"""A checkpoint as one ONNX graph with a KV cache, which prefills on an empty cache and decodes on a full one.

Inputs   `input_ids`, `position_ids` int64 [batch, sequence]; `past_key_values.{layer}.key|value` [batch, kv_heads, past, head_dim]
Outputs  `logits` [batch, sequence, vocabulary]; `present.{layer}.key|value` [batch, kv_heads, total, head_dim], total = past + sequence

Every operator is ONNX's own, at opset `OPSET`, and weights are in the file once.
"""

import json
import re
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import onnx
import onnx_ir
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from transformers import PreTrainedModel
from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

from compression.checkpoint import open_checkpoint
from compression.context import Context
from compression.loading import copy_tokenizer, load_model
from export.checks import check_onnx
from export.quiet import quiet_and_offline

OPSET = 23  # whose Attention, RotaryEmbedding and RMSNormalization decode twice as fast in ONNX Runtime as opset 20's small operators
EXTERNAL_DATA_BYTES = 1_500_000_000  # protobuf stops at 2 GiB: weights of larger models go beside the graph

Dtype = Literal["float32", "float16", "int8"]


def export_onnx(checkpoint: Path, out: Path, *, dtype: Dtype, context: Context) -> dict[str, float]:
    """Write `model.onnx`, `config.json` and the tokenizer into `out`; return its opset, bytes and the seconds it took.

    dtype  float32, or float16 (weights, activations and cache), or int8: ONNX Runtime's dynamic quantization of the
           blocks' linear layers (weights int8 per output channel, activations uint8 per tensor at run time); embedding,
           head and cache stay float32
    GPTQ and AWQ checkpoints are dequantized first: this format does not carry their codes.
    Raises Incompatible for a family it is not proven for, UnusableModel for a directory that cannot be opened.
    """
    started = time.perf_counter()
    description = open_checkpoint(checkpoint)
    check_onnx(description, dtype=dtype)
    if description.layout != "dense":
        context.warn(
            f"export.onnx dequantizes the {description.layout.upper()} checkpoint and writes {dtype} weights; "
            "export.genai and export.gguf carry its codes"
        )
    out.mkdir(parents=True, exist_ok=True)
    with quiet_and_offline():
        graph = trace_generation(load_model(checkpoint, dtype=torch.float16 if dtype == "float16" else torch.float32))
        context.progress(1, 2, "traced")
        if dtype == "int8":
            graph = quantize_linears(graph)
        save_graph(graph, out / "model.onnx")
        onnx.checker.check_model(str(out / "model.onnx"), full_check=True)
    context.progress(2, 2, "written")
    config = {key: value for key, value in description.config.items() if key != "quantization_config"}
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    copy_tokenizer(checkpoint, out)
    return {"opset": OPSET, "bytes": sum(f.stat().st_size for f in out.iterdir()), "seconds": time.perf_counter() - started}


def trace_generation(model: PreTrainedModel) -> onnx_ir.Model:
    """Trace a causal model with a key-value cache of any length, zero included, into one graph with the inputs and outputs above.

    Of the two graphs that `transformers.exporters` makes for generation only the one that decodes several tokens is needed:
    it prefills as well. The sample has two rows of several tokens after several cached ones, as axes of length 1 would be fixed.
    """
    model.config.sliding_window = None  # `check_onnx` let it pass: the window spans the whole context, so it masks nothing
    model.config.use_cache = True
    with torch.no_grad():
        cache = model(torch.arange(8).reshape(2, 4), use_cache=True).past_key_values
    inputs = {"input_ids": torch.arange(6).reshape(2, 3), "position_ids": torch.arange(4, 7).expand(2, 3), "past_key_values": cache}
    config = OnnxConfig(dynamic=True, dynamic_shapes=_varying_axes(len(cache.layers)), opset_version=OPSET)
    graph = OnnxExporter().export(model, inputs, config).program
    _name_interface(graph)
    return graph


def _varying_axes(layers: int) -> dict[str, Any]:
    """Batch and length of the tokens, and of each cached key and value. Naming them is faster than leaving every axis open."""
    auto = torch.export.Dim.AUTO
    tokens, cached = {0: auto, 1: auto}, {0: auto, 2: auto}
    return {"input_ids": tokens, "position_ids": tokens, "past_key_values": [cached] * (2 * layers)}


def _name_interface(graph: onnx_ir.Model) -> None:
    """Give inputs, outputs and their axes the names that ONNX decoders usually have."""
    for value in (*graph.graph.inputs, *graph.graph.outputs):
        traced = list(value.shape or ())
        cached = re.fullmatch(r"(input|output)\.past_key_values\.layers\.(\d+)\.(key|value)s", value.name or "")
        if cached:
            side, layer, kind = cached.groups()
            value.name = f"{'past_key_values' if side == 'input' else 'present'}.{layer}.{kind}"
            value.shape = onnx_ir.Shape(["batch", traced[1], "past" if side == "input" else "total", traced[3]])
        else:
            value.shape = onnx_ir.Shape(["batch", "sequence", *traced[2:]])


def quantize_linears(graph: onnx_ir.Model) -> onnx_ir.Model:
    """ONNX Runtime's dynamic int8 quantization of every product with a constant matrix, the head excepted.

    MatMul only: other operators gain no speed on a CPU, and a quantized embedding would change the parent's types.
    """
    (head,) = (node.name for node in graph.graph if any(output.name == "logits" for output in node.outputs))
    with tempfile.TemporaryDirectory() as directory:
        source, target = Path(directory) / "float.onnx", Path(directory) / "int8.onnx"
        save_graph(graph, source)
        quantize_dynamic(
            source,
            target,
            op_types_to_quantize=["MatMul"],
            nodes_to_exclude=[head],
            per_channel=True,
            weight_type=QuantType.QInt8,
            use_external_data_format=_bytes_of_weights(graph) > EXTERNAL_DATA_BYTES,
        )
        quantized = onnx_ir.load(target)
        onnx_ir.external_data.load_to_model(quantized)  # before the temporary directory goes
    return quantized


def save_graph(graph: onnx_ir.Model, path: Path) -> None:
    """Write a graph without what tells where and how it was made; weights beside it (`<name>.data`) only where they are large."""
    strip(graph)
    external = f"{path.name}.data" if _bytes_of_weights(graph) > EXTERNAL_DATA_BYTES else None
    onnx_ir.save(graph, path, external_data=external)


def strip(graph: onnx_ir.Model) -> None:
    """Drop metadata (stack traces, local paths, module names), doc strings, and the shapes of inner values.

    Inner shapes name symbols of the trace (`s44 + s70`) that mean nothing next to the interface's own; runtimes infer them.
    """
    interface = {*graph.graph.inputs, *graph.graph.outputs}
    graph.doc_string = None
    graph.metadata_props.clear()
    for part in graph.graphs():
        part.doc_string = None
        part.metadata_props.clear()
        for value in (*part.inputs, *part.initializers.values()):
            _strip_value(value)
        for node in part:
            node.doc_string = None
            node.metadata_props.clear()
            for value in node.outputs:
                _strip_value(value)
                if value not in interface:
                    value.shape = None


def _strip_value(value: onnx_ir.Value) -> None:
    value.doc_string = None
    value.metadata_props.clear()


def _bytes_of_weights(graph: onnx_ir.Model) -> int:
    return sum(value.const_value.nbytes for value in graph.graph.initializers.values() if value.const_value is not None)
