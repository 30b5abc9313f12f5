"""`prune.unstructured`: single weights become zero, by magnitude, gradient (SNIP), Wanda or SparseGPT."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Literal

from compression.checkpoints.checkpoint import Checkpoint
from compression.context import Context
from compression.data import DataSpec
from compression.pruning import UnstructuredSettings
from compression.pruning.check import check_unstructured
from tasks.stage import Inputs, Planned, Reads, Stage, Workplace


class PruneUnstructured(UnstructuredSettings, Stage):
    """Set a share of the weights of every linear layer to zero; masks.safetensors keeps them zero in the stages that follow."""

    uses: Literal["prune.unstructured"] = "prune.unstructured"
    version: ClassVar[int] = 2
    metrics: ClassVar[tuple[str, ...]] = ("sparsity", "fallback_layers")
    reads: ClassVar[Reads] = "calibration"
    libraries: ClassVar[tuple[str, ...]] = ("torch", "transformers", "tokenizers")
    sparse: ClassVar[bool] = True
    compresses: ClassVar[bool] = True

    def data_read(self) -> Reads:
        return "nothing" if self.method == "magnitude" else "calibration"

    def plan(self, parent: Checkpoint, others: Mapping[str, Planned], data: DataSpec) -> Planned:
        check_unstructured(parent, self)
        return dataclasses.replace(parent, sparse=True)

    def run(self, inputs: Inputs, place: Workplace, data: DataSpec, context: Context) -> dict[str, float]:
        from compression.checkpoints.loading import load_tokenizer
        from compression.data import calibration_windows
        from compression.pruning import prune_unstructured

        reads = self.data_read() == "calibration"
        windows = calibration_windows(data, load_tokenizer(inputs.parent), context.seed) if reads else None
        return prune_unstructured(inputs.parent, place.out, self, windows, work=place.work, context=context)
