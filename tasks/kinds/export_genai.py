"""`export.genai`: a package for ONNX Runtime GenAI."""

from collections.abc import Mapping
from typing import ClassVar, Literal

from compression.checkpoints.checkpoint import Checkpoint, Layout
from compression.context import Context
from compression.data import DataSpec
from export.genai import GenaiSettings, check_genai
from export.proof import Change
from tasks.stage import Artifact, Inputs, Planned, Stage, Workplace

_BYTES = {"int4": 0.6, "fp16": 2, "fp32": 4}


class ExportGenai(GenaiSettings, Stage):
    """Fused attention and int4 weights; GPTQ and AWQ codes are carried as they are."""

    uses: Literal["export.genai"] = "export.genai"
    version: ClassVar[int] = 2
    metrics: ClassVar[tuple[str, ...]] = ("bytes", "tokenizer_differences")
    libraries: ClassVar[tuple[str, ...]] = ("torch", "transformers", "onnx", "onnxruntime", "onnxruntime-genai")
    accepts: ClassVar[frozenset[Layout]] = frozenset({"dense", "gptq", "awq"})
    sparse: ClassVar[bool] = True
    extra: ClassVar[str | None] = "genai"

    def plan(self, parent: Checkpoint, others: Mapping[str, Planned], data: DataSpec) -> Planned:
        check_genai(parent, self)
        is_rounded = parent.layout == "dense" or "int4" in self.outer_types(parent)
        change: Change = "float" if self.precision != "int4" else "int4" if is_rounded else "carried"
        return Artifact("onnxruntime-genai", change, int(parent.num_parameters * _BYTES[self.precision]))

    def run(self, inputs: Inputs, place: Workplace, data: DataSpec, context: Context) -> dict[str, float]:
        from export.genai import export_genai

        return export_genai(inputs.parent, place.out, self, context=context)
