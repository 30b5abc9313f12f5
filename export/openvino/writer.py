"""Write a checkpoint as the directory of an OpenVINO artifact. The graph holds each weight once."""

import re
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import PreTrainedModel

from compression.checkpoints.checkpoint import open_checkpoint
from compression.checkpoints.compressed_tensors import round_weight
from compression.checkpoints.loading import load_model
from compression.checkpoints.schemes import Scheme
from compression.context import Context
from export.atomic_directory import atomic_directory, export_figures
from export.openvino.check import OpenvinoSettings, check_openvino
from export.quiet import quiet_and_offline
from export.telemetry import import_openvino
from export.traced import copy_description, sample_inputs

Role = Literal["linear", "embedding", "head"]


def export_openvino(checkpoint: Path, out: Path, settings: OpenvinoSettings, *, context: Context) -> dict[str, float]:
    """Write a checkpoint as one stateful graph for OpenVINO.

    Example:
        settings = OpenvinoSettings(dtype="int8")
        export_openvino(Path("model"), Path("model-openvino"), settings, context=Context())

    Args:
        checkpoint: A dense checkpoint, or a quantized one, which is dequantized.
        out: Directory for `model.xml`, `model.bin`, `config.json` and the tokenizer; after a failure nothing is written.
        settings: Types that matrices are stored in. With dtype float16 the cache is float16 too, else it is float32.
        context: Receives progress and warnings.

    Returns:
        `bytes` of all files in `out`, and `seconds`.

    Raises:
        Incompatible: `check_openvino` refuses the checkpoint.
        UnusableModel: The checkpoint cannot be opened.
        MissingExtra: OpenVINO is not installed.
    """
    started = time.perf_counter()
    source = open_checkpoint(checkpoint)
    check_openvino(source, settings)
    embedding, head = settings.outer_types(source)
    if source.layout != "dense":
        context.warn(f"export.openvino dequantizes the {source.layout.upper()} checkpoint and writes {settings.dtype} weights")
    openvino = import_openvino()
    with quiet_and_offline():
        model = load_model(checkpoint, dtype=torch.float32)  # the graph shares its memory until it is saved
        graph = trace_generation(model)
        context.progress(1, 2, "traced")
        store_weights(graph, {"linear": settings.dtype, "embedding": embedding, "head": head})
        name_nodes(graph)
        graph.set_rt_info("f32", ["runtime_options", "INFERENCE_PRECISION_HINT"])
        graph.set_rt_info("f16" if settings.dtype == "float16" else "f32", ["runtime_options", "KV_CACHE_PRECISION"])
    with atomic_directory(out) as temporary:
        openvino.save_model(graph, temporary / "model.xml", compress_to_fp16=False)
        context.progress(2, 2, "written")
        copy_description(source, temporary)
    return export_figures(out, started)


def trace_generation(model: PreTrainedModel) -> Any:
    """Trace a causal model whose cache has any length, zero included, into one `openvino.Model` with this package's interface."""
    import_openvino()
    from transformers.exporters.exporter_openvino import OpenVINOConfig, OpenVINOExporter

    inputs, axes = sample_inputs(model)
    return OpenVINOExporter().export(model, inputs, OpenVINOConfig(dynamic=True, dynamic_shapes=axes)).program


def store_weights(graph: Any, types: dict[Role, str]) -> None:
    """Store the matrices of an `openvino.Model` in the types of their roles: `embedding`, `head`, `linear`.

    A matrix is a constant [out, in] that a MatMul or an embedding's Gather reads. Nodes behind float16 and int8 ones make them float32
    again, in the forms that OpenVINO keeps compressed in memory (a Convert; a Convert and a Multiply by the row's scale).
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
    """Number the nodes that OpenVINO named itself by their index in the graph; its own numbers count every node of the process."""
    graph.set_friendly_name("model")
    for index, node in enumerate(graph.get_ordered_ops()):
        if re.fullmatch(rf"{node.get_type_name()}_\d+", node.get_friendly_name()):
            node.set_friendly_name(f"{node.get_type_name()}_{index}")
