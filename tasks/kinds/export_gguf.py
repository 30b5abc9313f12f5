"""`export.gguf`: a file for llama.cpp."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from compression.checkpoint import Checkpoint, Layout
from compression.context import Context
from compression.data import DataSpec
from export.gguf.check import CARRY, FLOATS, TYPES, check_gguf
from export.proof import Change
from tasks.stage import Artifact, Inputs, Planned, Stage, Workplace

_BITS = {"f32": 32, "f16": 16, "bf16": 16, "q8_0": 8.5, "carry": 5}


class ExportGguf(Stage):
    """GGUF; `type: carry` keeps the codes of a GPTQ or AWQ checkpoint, nothing is rounded again."""

    uses: Literal["export.gguf"] = "export.gguf"
    version: ClassVar[int] = 1
    libraries: ClassVar[tuple[str, ...]] = ("torch", "transformers", "gguf", "llama-cpp-python")
    accepts: ClassVar[frozenset[Layout]] = frozenset({"dense", "gptq", "awq"})
    sparse: ClassVar[bool] = True
    extra: ClassVar[str | None] = "llamacpp"

    type: Annotated[
        str,
        Field(
            examples=list(TYPES), description="f32, f16, bf16, q8_0, carry, or a type of llama.cpp's quantizer (q4_0, q4_k_m, q6_k, ...)."
        ),
    ] = "f16"
    embedding_type: Annotated[
        str | None, Field(description="f32, f16, bf16 or q8_0; default: a float `type` itself, else the checkpoint's dtype.")
    ] = None
    head_type: Annotated[str | None, Field(description="As embedding_type, for the output head.")] = None

    def plan(self, parent: Checkpoint, others: Mapping[str, Planned], data: DataSpec) -> Planned:
        check_gguf(parent, type=self.type, embedding_type=self.embedding_type, head_type=self.head_type)
        change: Change = "float" if self.type in FLOATS else "carried" if self.type == CARRY else "int8" if self.type == "q8_0" else "int4"
        return Artifact("llama.cpp", change, int(parent.num_parameters * _BITS.get(self.type, 5) / 8))

    def run(self, inputs: Inputs, place: Workplace, data: DataSpec, context: Context) -> dict[str, float]:
        import torch

        from export.gguf.writer import export_gguf

        return export_gguf(inputs.parent, place.out, **self.model_dump(exclude={"uses"}), threads=torch.get_num_threads(), context=context)
