"""`export.openvino`: a graph for OpenVINO, with its KV cache inside."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from compression.checkpoints.checkpoint import Checkpoint, Layout
from compression.context import Context
from compression.data import DataSpec
from export.edge_checks import check_openvino
from export.proof import Change
from tasks.stage import Artifact, Inputs, Planned, Stage, Workplace

_BYTES = {"float32": 4, "float16": 2, "int8": 1}


class ExportOpenvino(Stage):
    """OpenVINO through transformers' exporter: one stateful graph, which computes in float32. Quantized checkpoints are dequantized."""

    uses: Literal["export.openvino"] = "export.openvino"
    version: ClassVar[int] = 1
    metrics: ClassVar[tuple[str, ...]] = ("bytes",)
    libraries: ClassVar[tuple[str, ...]] = ("torch", "transformers", "openvino")
    accepts: ClassVar[frozenset[Layout]] = frozenset({"dense", "gptq", "awq"})
    sparse: ClassVar[bool] = True
    extra: ClassVar[str | None] = "openvino"

    dtype: Annotated[
        Literal["float32", "float16", "int8"], Field(description="Type of linear layers' weights; int8 has one scale per output channel.")
    ] = "float32"
    embedding_type: Annotated[
        str | None,
        Field(
            description="float32, float16 or int8; default: `dtype` where that is a float type, else the float type as wide as the checkpoint's."
        ),
    ] = None
    head_type: Annotated[str | None, Field(description="As embedding_type, for the output head.")] = None

    def plan(self, parent: Checkpoint, others: Mapping[str, Planned], data: DataSpec) -> Planned:
        check_openvino(parent, **self.model_dump(exclude={"uses"}))
        change: Change = "int8" if "int8" in (self.dtype, self.embedding_type, self.head_type) else "float"
        return Artifact("openvino", change, parent.num_parameters * _BYTES[self.dtype])

    def run(self, inputs: Inputs, place: Workplace, data: DataSpec, context: Context) -> dict[str, float]:
        from export.openvino import export_openvino

        return export_openvino(inputs.parent, place.out, **self.model_dump(exclude={"uses"}), context=context)
