"""`export.openvino`: a graph for OpenVINO, with its KV cache inside."""

from collections.abc import Mapping
from typing import ClassVar, Literal

from compression.checkpoints.checkpoint import Checkpoint, Layout
from compression.context import Context
from compression.data import DataSpec
from export.openvino import OpenvinoSettings, check_openvino
from export.proof import Change
from tasks.stage import Artifact, Inputs, Planned, Stage, Workplace

_BYTES = {"float32": 4, "float16": 2, "int8": 1}


class ExportOpenvino(OpenvinoSettings, Stage):
    """OpenVINO through transformers' exporter: one stateful graph, which computes in float32. Quantized checkpoints are dequantized."""

    uses: Literal["export.openvino"] = "export.openvino"
    version: ClassVar[int] = 1
    metrics: ClassVar[tuple[str, ...]] = ("bytes",)
    libraries: ClassVar[tuple[str, ...]] = ("torch", "transformers", "openvino")
    accepts: ClassVar[frozenset[Layout]] = frozenset({"dense", "gptq", "awq"})
    sparse: ClassVar[bool] = True
    extra: ClassVar[str | None] = "openvino"

    def plan(self, parent: Checkpoint, others: Mapping[str, Planned], data: DataSpec) -> Planned:
        check_openvino(parent, self)
        change: Change = "int8" if "int8" in (self.dtype, self.embedding_type, self.head_type) else "float"
        return Artifact("openvino", change, parent.num_parameters * _BYTES[self.dtype])

    def run(self, inputs: Inputs, place: Workplace, data: DataSpec, context: Context) -> dict[str, float]:
        from export.openvino import export_openvino

        return export_openvino(inputs.parent, place.out, self, context=context)
