"""Steps of rewriting a graph."""

import numpy as np
import onnx_ir


def constant(graph: onnx_ir.Model, name: str, array: np.ndarray) -> onnx_ir.Value:
    """Return the constant `name` of a graph, and add it where it is missing."""
    known = graph.graph.initializers.get(name)
    if known is not None:
        return known
    tensor = onnx_ir.tensor(np.asarray(array, order="C"), name=name)
    value = onnx_ir.Value(name=name, shape=onnx_ir.Shape(array.shape), type=onnx_ir.TensorType(tensor.dtype), const_value=tensor)
    graph.graph.register_initializer(value)
    return value


def required_input(node: onnx_ir.Node, index: int = 0) -> onnx_ir.Value:
    """Return an input of a node that its operator requires."""
    value = node.inputs[index]
    assert value is not None
    return value


def replace(old: onnx_ir.Value, new: onnx_ir.Value) -> None:
    """Put `new` in the place of `old`, with its name, type and shape."""
    name, new.type, new.shape = old.name, old.type, old.shape
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    old.name, new.name = None, name
