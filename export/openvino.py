"""A checkpoint as one OpenVINO graph that keeps its KV cache itself.

Inputs   `input_ids`, `position_ids` int64 [batch, sequence]; `beam_idx` int32 [batch], the rows of the cache that the batch goes on from
Output   `logits` float32 [batch, sequence, vocabulary]
State    keys and values of every layer, empty after `reset_state`

It computes in float32 whatever type the weights are stored in; each weight is in the file once.
"""

import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from compression.checkpoints.checkpoint import open_checkpoint
from compression.checkpoints.compressed_tensors import round_weight
from compression.checkpoints.loading import load_model
from compression.checkpoints.schemes import Scheme
from compression.context import Context
from export.atomic_directory import whole
from export.edge_checks import Role, StoredType, check_openvino, stored_types
from export.quiet import quiet_and_offline
from export.telemetry import import_openvino
from export.traced import describe, sample_inputs


def export_openvino(
    checkpoint: Path,
    out: Path,
    *,
    dtype: StoredType,
    embedding_type: StoredType | None = None,
    head_type: StoredType | None = None,
    context: Context,
) -> dict[str, float]:
    """Write `model.xml`, `model.bin`, `config.json` and the tokenizer into `out`; return bytes and the seconds it took.

    dtype           of the blocks' linear layers: float32, float16, or int8 with one scale per output channel. Everything small (norms,
                    biases) stays float32. The cache is float16 with float16, else float32.
    embedding_type  of the token embedding; None: dtype, or with int8 float16 for a checkpoint of 16 bits and float32 for one of 32
    head_type       of the output head, likewise; a tied head is the embedding
    Layouts that are not dense are dequantized first.
    Raises Incompatible for a family it is not proven for, UnusableModel for a directory that cannot be opened, MissingExtra.
    """
    started = time.perf_counter()
    description = open_checkpoint(checkpoint)
    check_openvino(description, dtype=dtype, embedding_type=embedding_type, head_type=head_type)
    types = stored_types(description, dtype=dtype, embedding_type=embedding_type, head_type=head_type)
    if description.layout != "dense":
        context.warn(f"export.openvino dequantizes the {description.layout.upper()} checkpoint and writes {dtype} weights")
    openvino = import_openvino()
    with quiet_and_offline():
        model = load_model(checkpoint, dtype=torch.float32)  # whose memory the graph shares until it is saved
        graph = trace_generation(model)
        context.progress(1, 2, "traced")
        store_weights(graph, types)
        name_nodes(graph)
        graph.set_rt_info("f32", ["runtime_options", "INFERENCE_PRECISION_HINT"])
        graph.set_rt_info("f16" if dtype == "float16" else "f32", ["runtime_options", "KV_CACHE_PRECISION"])
    with whole(out) as place:
        openvino.save_model(graph, place / "model.xml", compress_to_fp16=False)
        context.progress(2, 2, "written")
        describe(description, place)
    return {"bytes": sum(f.stat().st_size for f in out.rglob("*") if f.is_file()), "seconds": time.perf_counter() - started}


def trace_generation(model: PreTrainedModel) -> Any:
    """Trace a causal model whose cache has any length, zero included, into one `openvino.Model` with the interface above."""
    import_openvino()
    from transformers.exporters.exporter_openvino import OpenVINOConfig, OpenVINOExporter

    inputs, axes = sample_inputs(model)
    return OpenVINOExporter().export(model, inputs, OpenVINOConfig(dynamic=True, dynamic_shapes=axes)).program


def store_weights(graph: Any, types: dict[Role, str]) -> None:
    """Store the matrices of an `openvino.Model` in the types of their roles: `embedding`, `head`, `linear`.

    A matrix is a constant [out, in] that a MatMul or an embedding's Gather reads. float16 and int8 ones are followed by what makes them
    float32 again, in the forms that OpenVINO keeps compressed in memory (a Convert; a Convert and a Multiply by the row's scale).
    """
    import_openvino()
    from openvino import opset13

    matmuls = [node for node in graph.get_ordered_ops() if node.get_type_name() == "MatMul" and _is_matrix(node.input_value(1).get_node())]
    head = matmuls[-1].input_value(1).get_node().get_friendly_name()
    for constant in [node for node in graph.get_ordered_ops() if _is_matrix(node)]:
        readers = {reader.get_node().get_type_name() for reader in constant.output(0).get_target_inputs()}
        if not readers & {"MatMul", "Gather"}:
            continue
        role: Role = "embedding" if "Gather" in readers else "head" if constant.get_friendly_name() == head else "linear"
        stored = types[role]
        if stored == "float16":
            wide = opset13.convert(opset13.constant(constant.get_data().astype(np.float16)), "f32")
        elif stored == "int8":
            weight = torch.from_numpy(constant.get_data().copy())
            rounded = round_weight(weight, Scheme("int"), dtype=torch.float32, name=constant.get_friendly_name())
            codes, scale = opset13.constant(rounded.codes.numpy()), opset13.constant(rounded.scale.numpy())
            wide = opset13.multiply(opset13.convert(codes, "f32"), scale)
        else:
            continue
        constant.output(0).replace(wide.output(0))
    graph.validate_nodes_and_infer_types()


def _is_matrix(node: Any) -> bool:
    return node.get_type_name() == "Constant" and node.get_element_type().get_type_name() == "f32" and len(node.shape) == 2


def name_nodes(graph: Any) -> None:
    """Number the nodes that OpenVINO named itself by their place in the graph; its own numbers count every node of the process."""
    graph.set_friendly_name("model")
    for place, node in enumerate(graph.get_ordered_ops()):
        if re.fullmatch(rf"{node.get_type_name()}_\d+", node.get_friendly_name()):
            node.set_friendly_name(f"{node.get_type_name()}_{place}")
