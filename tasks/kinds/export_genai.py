"""`export.genai`: a package for ONNX Runtime GenAI."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from compression.checkpoints.checkpoint import Checkpoint, Layout
from compression.context import Context
from compression.data import DataSpec
from export.checks import check_genai, outer_types
from export.proof import Change
from tasks.stage import Artifact, Inputs, Planned, Stage, Workplace

_BYTES = {"int4": 0.6, "fp16": 2, "fp32": 4}


class ExportGenai(Stage):
    """Fused attention and int4 weights; GPTQ and AWQ codes are carried as they are."""

    uses: Literal["export.genai"] = "export.genai"
    version: ClassVar[int] = 2
    metrics: ClassVar[tuple[str, ...]] = ("bytes", "tokenizer_differences")
    libraries: ClassVar[tuple[str, ...]] = ("torch", "transformers", "onnx", "onnxruntime", "onnxruntime-genai")
    accepts: ClassVar[frozenset[Layout]] = frozenset({"dense", "gptq", "awq"})
    sparse: ClassVar[bool] = True
    extra: ClassVar[str | None] = "genai"

    precision: Annotated[Literal["int4", "fp32", "fp16"], Field(description="Type of the weights of linear layers.")] = "int4"
    block_size: Annotated[int, Field(description="Weights that share a scale where a dense checkpoint is rounded here.")] = 32
    embedding_type: Annotated[
        Literal["float32", "float16", "int4"] | None, Field(description="Of the token embedding; default: the float type of the package.")
    ] = None
    head_type: Annotated[
        Literal["float32", "float16", "int4"] | None,
        Field(description="As embedding_type, for the output head; a tied one is stored once."),
    ] = None
    accuracy_level: Annotated[Literal[1, 4], Field(description="4 multiplies with int8 activations (faster), 1 with float32.")] = 4

    def plan(self, parent: Checkpoint, others: Mapping[str, Planned], data: DataSpec) -> Planned:
        check_genai(parent, **self.model_dump(exclude={"uses"}))
        outer = outer_types(parent, type=self.precision, embedding_type=self.embedding_type, head_type=self.head_type)
        rounded = parent.layout == "dense" or "int4" in outer
        change: Change = "float" if self.precision != "int4" else "int4" if rounded else "carried"
        return Artifact("onnxruntime-genai", change, int(parent.num_parameters * _BYTES[self.precision]))

    def run(self, inputs: Inputs, place: Workplace, data: DataSpec, context: Context) -> dict[str, float]:
        from export.genai import export_genai

        return export_genai(inputs.parent, place.out, **self.model_dump(exclude={"uses"}), context=context)
