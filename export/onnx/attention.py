"""Fuse attention with its cache into one operator: in the trace, transposing and repeating heads and appending to the cache are others."""

from typing import Any

import numpy as np
import onnx_ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnx_ir.tape import Tape

from export.onnx.edit import constant, replace, required_input

SWAPPED = (0, 2, 1, 3)  # [batch, tokens, heads, head_dim] <-> [batch, heads, tokens, head_dim]


def fuse_cache(graph: onnx_ir.Model, query_heads: int) -> None:
    """Let every Attention (opset 23) append to the cache, share heads among queries and split them itself.

    Concat(past, new) -> repeated heads -> Attention -> Where(nothing is attended to, 0, ·) -> heads side by side becomes
    Attention(query, new key, new value, mask, past key, past value) -> (·, present key, present value), where query, new key and new value
    have their heads side by side as the linear layers write them. The Where is dropped because every token attends at least to itself.
    An Attention of another form stays as it was traced.
    """
    for node in [node for node in graph.graph if node.op_type == "Attention" and len(node.inputs) == 4]:
        query, key, value, mask = (required_input(node, index) for index in range(4))
        key_append, value_append, merged = _append(key), _append(value), _merged(node.outputs[0])
        if key_append is None or value_append is None or merged is None:
            continue
        (past_key, new_key), (past_value, new_value) = (
            (required_input(append, 0), required_input(append, 1)) for append in (key_append, value_append)
        )
        heads, head_dim = _static(past_key, 1), _static(past_key, 3)
        tape = Tape()
        flat = [
            _side_by_side(tape, states, n, constant(graph, f"{n}_heads_side_by_side", np.array([0, 0, n * head_dim])))
            for states, n in ((query, query_heads), (new_key, heads), (new_value, heads))
        ]
        attributes = _attributes(node) | {"q_num_heads": query_heads, "kv_num_heads": heads}
        new = tape.op_multi_out("Attention", [*flat, mask, past_key, past_value], attributes, num_outputs=3)
        graph.graph.insert_before(node, tape.nodes)
        for old, fused in zip((merged, key_append.outputs[0], value_append.outputs[0]), new, strict=True):
            replace(old, fused)
    RemoveUnusedNodesPass()(graph)


def _static(value: onnx_ir.Value, axis: int) -> int:
    """Return the length of an axis that does not vary."""
    assert value.shape is not None
    length = value.shape[axis]
    assert isinstance(length, int)
    return length


def _append(value: onnx_ir.Value) -> onnx_ir.Node | None:
    """Return the Concat that appends to the cache, if `value` is its output, perhaps with repeated heads."""
    for op_type in ("Reshape", "Expand", "Unsqueeze"):
        if (node := _maker(value, op_type)) is not None:
            value = required_input(node)
    node = _maker(value, "Concat")
    return node if node is not None and len(node.inputs) == 2 and required_input(node).is_graph_input() else None


def _merged(attended: onnx_ir.Value) -> onnx_ir.Value | None:
    """Return an Attention's output with its heads side by side, [batch, tokens, heads · head_dim], past a Where that guards it."""
    value = attended
    for op_type in ("Where", "Transpose", "Reshape"):
        uses = [use.node for use in value.uses()]
        if [node.op_type for node in uses] == [op_type]:
            value = uses[0].outputs[0]
        elif op_type != "Where":
            return None
    return value


def _side_by_side(tape: Tape, states: onnx_ir.Value, heads: int, shape: onnx_ir.Value) -> onnx_ir.Value:
    """Turn [batch, heads, tokens, head_dim] into [batch, tokens, heads · head_dim], by undoing the split also in front of a rotation."""
    rotation, swap = _maker(states, "RotaryEmbedding"), _maker(states, "Transpose")
    if rotation is not None:
        attributes = _attributes(rotation) | {"num_heads": heads}
        before = _side_by_side(tape, required_input(rotation), heads, shape)
        return tape.op("RotaryEmbedding", [before, *rotation.inputs[1:]], attributes)
    if swap is not None and tuple(swap.attributes["perm"].value) == SWAPPED:
        split = _maker(required_input(swap), "Reshape")
        return required_input(split) if split is not None else tape.op("Reshape", [required_input(swap), shape])
    return tape.op("Reshape", [tape.op("Transpose", [states], {"perm": SWAPPED}), shape])


def _attributes(node: onnx_ir.Node) -> dict[str, Any]:
    return {name: attribute.value for name, attribute in node.attributes.items()}


def _maker(value: onnx_ir.Value, op_type: str) -> onnx_ir.Node | None:
    """Return the node that makes `value`, if it is an `op_type`."""
    node = value.producer()
    return node if node is not None and node.op_type == op_type else None
