"""`export.onnx`: one ONNX generation graph with a KV cache."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from compression.checkpoint import Checkpoint, Layout
from compression.context import Context
from compression.data import DataSpec
from export.checks import check_onnx
from tasks.stage import Artifact, Inputs, Planned, Stage, Workplace

_BYTES = {"float32": 4, "float16": 2, "int8": 1}


class ExportOnnx(Stage):
    """ONNX through transformers' exporter; int8 quantizes linear layers dynamically. Quantized checkpoints are dequantized."""

    uses: Literal["export.onnx"] = "export.onnx"
    version: ClassVar[int] = 1
    libraries: ClassVar[tuple[str, ...]] = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime")
    accepts: ClassVar[frozenset[Layout]] = frozenset({"dense", "gptq", "awq"})
    sparse: ClassVar[bool] = True
    extra: ClassVar[str | None] = "onnx"

    dtype: Annotated[Literal["float32", "float16", "int8"], Field(description="Type of the weights in the graph.")] = "float32"

    def plan(self, parent: Checkpoint, others: Mapping[str, Planned], data: DataSpec) -> Planned:
        check_onnx(parent, dtype=self.dtype)
        size = parent.num_parameters * _BYTES[self.dtype]
        return Artifact("onnxruntime", "int8" if self.dtype == "int8" else "float", size)

    def run(self, inputs: Inputs, place: Workplace, data: DataSpec, context: Context) -> dict[str, float]:
        from export.onnx import export_onnx

        return export_onnx(inputs.parent, place.out, dtype=self.dtype, context=context)
