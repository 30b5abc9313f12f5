"""`export.executorch`: a program for ExecuTorch, with its KV cache inside."""

from collections.abc import Mapping
from typing import ClassVar, Literal

from compression.checkpoints.checkpoint import Checkpoint, Layout
from compression.context import Context
from compression.data import DataSpec
from compression.errors import Incompatible
from export.executorch import ExecutorchSettings, check_executorch
from tasks.stage import Artifact, Inputs, Planned, Stage, Workplace


class ExportExecutorch(ExecutorchSettings, Stage):
    """ExecuTorch for XNNPACK through transformers' static cache: one program of a fixed context. Quantized checkpoints are dequantized."""

    uses: Literal["export.executorch"] = "export.executorch"
    version: ClassVar[int] = 1
    metrics: ClassVar[tuple[str, ...]] = ("bytes",)
    libraries: ClassVar[tuple[str, ...]] = ("torch", "transformers", "executorch")
    accepts: ClassVar[frozenset[Layout]] = frozenset({"dense", "gptq", "awq"})
    sparse: ClassVar[bool] = True
    extra: ClassVar[str | None] = "executorch"

    def plan(self, parent: Checkpoint, others: Mapping[str, Planned], data: DataSpec) -> Planned:
        check_executorch(parent, self)
        if (length := self.cache_length(parent)) < data.length:
            raise Incompatible(f"windows of {data.length} tokens (data.length) do not fit into a program of {length}", key="max_length")
        # A tied embedding is in the file twice: ExecuTorch reads its rows, XNNPACK multiplies with it.
        duplicate = parent.vocab_size * parent.hidden_size if parent.tied else 0
        return Artifact("executorch", "float", 4 * (parent.num_parameters + duplicate))

    def run(self, inputs: Inputs, place: Workplace, data: DataSpec, context: Context) -> dict[str, float]:
        from export.executorch import export_executorch

        return export_executorch(inputs.parent, place.out, self, context=context)
