"""Linear layers of a graph as integers. Codes and scales are required_input, so those of a checkpoint are carried as they are.

A layer is a product of its input with a constant matrix [in, out], found by its path in the model, which the node is called by.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnx_ir.tape import Tape

from compression.checkpoints.compressed_tensors import ScaledLinear
from compression.checkpoints.layouts import QuantizedLinear
from compression.errors import UnusableModel
from export.onnx.edit import constant, replace, required_input

INT8_LIMIT = 127.0
MICROSOFT = "com.microsoft"


@dataclass(frozen=True)
class Layer:
    """A linear layer of a graph.

    Attributes:
        node: The product.
        matrix: Its constant, [in, out]; of a tied head [out, in].
        transposed: Whether the graph transposes the constant, as for a tied head.
    """

    node: onnx_ir.Node
    matrix: onnx_ir.Value
    transposed: bool

    @property
    def input(self) -> onnx_ir.Value:
        return required_input(self.node)

    def weight(self) -> np.ndarray:
        """Return the weight as the model has it, [out, in]."""
        array = floats_of(self.matrix)
        return array if self.transposed else array.T


def layers_of(graph: onnx_ir.Model, paths: list[str]) -> dict[str, Layer]:
    """Return the linear layers at these paths. Raise UnusableModel where the trace has no product for one of them."""
    found: dict[str, Layer] = {}
    for node in graph.graph:
        if node.op_type != "MatMul" or node.name not in paths:
            continue
        matrix = required_input(node, 1)
        turn = matrix.producer()
        if turn is not None and turn.op_type == "Transpose":
            matrix = required_input(turn)
        if matrix.const_value is not None:
            found[node.name] = Layer(node, matrix, transposed=turn is not None)
    missing = [path for path in paths if path not in found]
    if missing:
        raise UnusableModel(f"the exporter's graph has no product of {', '.join(missing[:4])}, so it cannot be quantized", key="model")
    return found


def quantize_dynamic(graph: onnx_ir.Model, layers: Mapping[str, Layer], weights: Mapping[str, ScaledLinear]) -> None:
    """Store weights as int8, and round inputs to uint8 with one scale and zero point a tensor, found at run time (DynamicQuantizeLinear)."""
    rounded: dict[onnx_ir.Value, list[onnx_ir.Value]] = {}
    for path, weight in weights.items():
        layer = layers[path]
        if layer.input not in rounded:
            tape = Tape()
            rounded[layer.input] = list(tape.op_multi_out("DynamicQuantizeLinear", [layer.input], num_outputs=3))
            graph.graph.insert_before(layer.node, tape.nodes)
        codes, scale, zero = rounded[layer.input]
        tape = Tape()
        sums = tape.op("MatMulInteger", [codes, _codes(graph, path, layer, weight, tape), zero])
        factor = tape.op("Mul", [scale, constant(graph, f"{path}.weight_scale", _scales(weight))])
        product = tape.op("Mul", [tape.op("Cast", [sums], {"to": onnx_ir.DataType.FLOAT}), factor])
        _put(graph, path, layer, tape, product)
    RemoveUnusedNodesPass()(graph)


def quantize_static(
    graph: onnx_ir.Model, layers: Mapping[str, Layer], weights: Mapping[str, ScaledLinear], limits: Mapping[str, float], *, unsigned: bool
) -> None:
    """Store weights as int8, and round inputs to 8 bits with a fixed scale: QuantizeLinear and DequantizeLinear around a float product (QDQ).

    Args:
        graph: The graph to change.
        layers: Its linear layers by path.
        weights: Codes and scales by path.
        limits: The value of each layer's input that becomes step 127, by path; layers that share an input share it.
        unsigned: Store steps −128 … 127 as uint8 with zero point 128, else as int8 with zero point 0. Hardware that multiplies int8 by int8
            (TensorRT, many NPUs) requires zero point 0; ONNX Runtime on x86 fuses only uint8 inputs that several layers share with their
            products, and otherwise multiplies in float, dequantizing the weights in every step.
    """
    rounded: dict[onnx_ir.Value, onnx_ir.Value] = {}
    for path, weight in weights.items():
        layer = layers[path]
        zero = constant(graph, "input_zero", np.array(128, np.uint8) if unsigned else np.array(0, np.int8))
        if layer.input not in rounded:
            scale = constant(graph, f"{path}.input_scale", np.array(limits[path] / INT8_LIMIT, np.float32))
            tape = Tape()
            codes = tape.op("QuantizeLinear", [layer.input, scale, zero])
            rounded[layer.input] = tape.op("DequantizeLinear", [codes, scale, zero])
            graph.graph.insert_before(layer.node, tape.nodes)
        tape = Tape()
        scales = _scales(weight)
        stored = [
            constant(graph, f"{path}.weight_scale", scales),
            constant(graph, f"int8_zeros_{len(scales)}", np.zeros(len(scales), np.int8)),
        ]
        matrix = tape.op("DequantizeLinear", [_codes(graph, path, layer, weight, tape), *stored], {"axis": 1})
        _put(graph, path, layer, tape, tape.op("MatMul", [rounded[layer.input], matrix], name=path))
    RemoveUnusedNodesPass()(graph)


def quantize_blocks(
    graph: onnx_ir.Model, layers: Mapping[str, Layer], weights: Mapping[str, QuantizedLinear], *, accuracy_level: int
) -> None:
    """Store weights as 4-bit codes in blocks along the input, for float inputs: MatMulNBits of ONNX Runtime. Groups must be in storage order."""
    for path, weight in weights.items():
        layer = layers[path]
        out, width = weight.codes.shape
        blocks = width // weight.group_size
        codes = weight.codes.numpy().reshape(out, blocks, weight.group_size)
        stored = [
            constant(graph, f"{path}.weight_codes", codes[..., ::2] | codes[..., 1::2] << 4),
            constant(graph, f"{path}.weight_scale", weight.scales.float().numpy()),
        ]
        zeros = weight.zeros.numpy()
        if (zeros != 8).any():  # without zero points MatMulNBits takes 8
            even = np.pad(zeros, ((0, 0), (0, blocks % 2)))
            stored.append(constant(graph, f"{path}.weight_zeros", even[:, ::2] | even[:, 1::2] << 4))
        attributes = {"K": width, "N": out, "bits": 4, "block_size": weight.group_size, "accuracy_level": accuracy_level}
        tape = Tape()
        _put(graph, path, layer, tape, tape.op("MatMulNBits", [layer.input, *stored], attributes, domain=MICROSOFT, name=path))
    graph.graph.opset_imports[MICROSOFT] = 1
    RemoveUnusedNodesPass()(graph)


def embedding_of(graph: onnx_ir.Model) -> onnx_ir.Value:
    """Return the token embedding, [vocabulary, hidden]: the table from which the token ids gather rows."""
    (tokens,) = [value for value in graph.graph.inputs if value.name == "input_ids"]
    (table,) = [required_input(use.node) for use in tokens.uses() if use.node.op_type == "Gather"]
    return table


def floats_of(value: onnx_ir.Value) -> np.ndarray:
    """Return the values of a constant."""
    assert value.const_value is not None
    return value.const_value.numpy()


def quantize_embedding(graph: onnx_ir.Model, table: onnx_ir.Value, weight: ScaledLinear) -> None:
    """Store the rows of the embedding as int8, each with its scale. A tied head that was rounded shares the codes."""
    (gather,) = [use.node for use in table.uses() if use.node.op_type == "Gather"]
    tokens = gather.inputs[1]
    tape = Tape()
    codes = tape.op("Gather", [constant(graph, f"{table.name}_codes", weight.codes.numpy()), tokens], {"axis": 0})
    scale = tape.op("Gather", [constant(graph, f"{table.name}_scales", _scales(weight)[:, None]), tokens], {"axis": 0})
    floats = tape.op("Mul", [tape.op("Cast", [codes], {"to": onnx_ir.DataType.FLOAT}), scale])
    graph.graph.insert_before(gather, tape.nodes)
    replace(gather.outputs[0], floats)
    RemoveUnusedNodesPass()(graph)


def _codes(graph: onnx_ir.Model, path: str, layer: Layer, weight: ScaledLinear, tape: Tape) -> onnx_ir.Value:
    """Return the codes of a layer, [in, out]; those of a tied head are transposed in the graph, so that embedding and head share them."""
    name = f"{layer.matrix.name}_codes" if layer.transposed else f"{path}.weight_codes"
    codes = weight.codes.numpy()
    if layer.transposed:
        return tape.op("Transpose", [constant(graph, name, codes)], {"perm": [1, 0]})
    return constant(graph, name, codes.T)


def _scales(weight: ScaledLinear) -> np.ndarray:
    """Return the scales, float32 [out], also where the layer has a single one."""
    return weight.scale.float().reshape(-1).expand(len(weight.codes)).numpy()


def _put(graph: onnx_ir.Model, path: str, layer: Layer, tape: Tape, product: onnx_ir.Value) -> None:
    """Put the nodes of a tape in the place of a layer's product."""
    graph.graph.insert_before(layer.node, tape.nodes)
    replace(layer.node.outputs[0], product)
