"""Write a graph without traces of where and how it was made."""

from pathlib import Path

import onnx_ir

EXTERNAL_DATA_BYTES = 1_500_000_000  # protobuf stops at 2 GiB: weights of larger models go into a file of their own


def save_graph(graph: onnx_ir.Model, path: Path) -> None:
    """Strip a graph and write it, large weights into `<name>.data`."""
    strip(graph)
    external = f"{path.name}.data" if bytes_of_weights(graph) > EXTERNAL_DATA_BYTES else None
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


def bytes_of_weights(graph: onnx_ir.Model) -> int:
    """Return the bytes of all constants that are in memory."""
    return sum(value.const_value.nbytes for value in graph.graph.initializers.values() if value.const_value is not None)
