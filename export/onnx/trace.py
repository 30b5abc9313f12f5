"""Trace a transformers model once into a graph with readable names, and fuse its attention with its cache."""

import ast
import re

import onnx_ir
from onnx_ir.passes.common import CommonSubexpressionEliminationPass
from transformers import PreTrainedModel
from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

from export.onnx.attention import fuse_cache
from export.traced import sample_inputs

OPSET = 23  # whose Attention, RotaryEmbedding and RMSNormalization decode twice as fast in ONNX Runtime as opset 20's small operators


def trace_generation(model: PreTrainedModel) -> onnx_ir.Model:
    """Trace a causal model with a key-value cache of any length, zero included, into one graph with the interface of this package.

    Of the two graphs that `transformers.exporters` makes for generation only the one that decodes several tokens is needed:
    it prefills as well.
    Every product with a constant matrix is called by the path of its linear layer in the model (`model.layers.0.mlp.up_proj`).
    """
    inputs, axes = sample_inputs(model)
    config = OnnxConfig(dynamic=True, dynamic_shapes=axes, opset_version=OPSET)
    graph = OnnxExporter().export(model, inputs, config).program
    _name_interface(graph)
    _name_products(graph)
    CommonSubexpressionEliminationPass()(graph)
    fuse_cache(graph, model.config.num_attention_heads)
    return graph


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


def _name_products(graph: onnx_ir.Model) -> None:
    """Call each product of a linear layer by the layer's path, and its matrix [in, out] `<path>.weight`, where that name is free."""
    for node in graph.graph:
        if node.op_type != "MatMul":
            continue
        *_, path, _ = ast.literal_eval(node.metadata_props["pkg.torch.onnx.name_scopes"])
        node.name = path
        matrix = node.inputs[1]
        if matrix is not None and matrix.const_value is not None and f"{path}.weight" not in graph.graph.initializers:
            matrix.name = f"{path}.weight"
