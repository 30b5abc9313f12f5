"""`export.executorch`: a program for ExecuTorch, with its KV cache inside."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from compression.checkpoints.checkpoint import Checkpoint, Layout
from compression.context import Context
from compression.data import DataSpec
from compression.errors import Incompatible
from export.edge_checks import cache_length, check_executorch
from tasks.stage import Artifact, Inputs, Planned, Stage, Workplace


class ExportExecutorch(Stage):
    """ExecuTorch for XNNPACK through transformers' static cache: one program of a fixed context. Quantized checkpoints are dequantized."""

    uses: Literal["export.executorch"] = "export.executorch"
    version: ClassVar[int] = 1
    metrics: ClassVar[tuple[str, ...]] = ("bytes",)
    libraries: ClassVar[tuple[str, ...]] = ("torch", "transformers", "executorch")
    accepts: ClassVar[frozenset[Layout]] = frozenset({"dense", "gptq", "awq"})
    sparse: ClassVar[bool] = True
    extra: ClassVar[str | None] = "executorch"

    dtype: Annotated[Literal["float32"], Field(description="Type of weights, activations and KV cache.")] = "float32"
    max_length: Annotated[
        int | None, Field(ge=16, description="Tokens that fit, prompt and generation together; default: the model's context, 2048 at most.")
    ] = None
    chunk: Annotated[int, Field(ge=8, description="Tokens that a call reads at most; memory for activations is planned for so many.")] = 128

    def plan(self, parent: Checkpoint, others: Mapping[str, Planned], data: DataSpec) -> Planned:
        check_executorch(parent, **self.model_dump(exclude={"uses"}))
        if (length := cache_length(parent, self.max_length)) < data.length:
            raise Incompatible(f"windows of {data.length} tokens (data.length) do not fit into a program of {length}", key="max_length")
        # A tied embedding is in the file twice: ExecuTorch takes rows of it, XNNPACK multiplies with it.
        twice = parent.vocab_size * parent.hidden_size if parent.tied else 0
        return Artifact("executorch", "float", 4 * (parent.num_parameters + twice))

    def run(self, inputs: Inputs, place: Workplace, data: DataSpec, context: Context) -> dict[str, float]:
        from export.executorch import export_executorch

        return export_executorch(inputs.parent, place.out, **self.model_dump(exclude={"uses"}), context=context)
