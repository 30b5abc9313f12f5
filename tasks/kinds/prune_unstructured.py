"""`prune.unstructured`: single weights become zero, by magnitude, gradient (SNIP), Wanda or SparseGPT."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Literal

from compression.checkpoints.checkpoint import Checkpoint
from compression.context import Context
from compression.data import DataSpec
from compression.pruning import UnstructuredSettings
from compression.pruning.check import check_unstructured
from tasks.kinds._calibrated import CalibratedStage
from tasks.stage import Inputs, Planned, Reads, Workplace


class PruneUnstructured(CalibratedStage, UnstructuredSettings):
    """Set a share of the weights of every linear layer to zero; masks.safetensors keeps them zero in the stages that follow."""

    uses: Literal["prune.unstructured"] = "prune.unstructured"
    version: ClassVar[int] = 2
    metrics: ClassVar[tuple[str, ...]] = ("sparsity", "fallback_layers")
    compresses: ClassVar[bool] = True

    def data_read(self) -> Reads:
        return "nothing" if self.method == "magnitude" else "calibration"

    def plan(self, parent: Checkpoint, others: Mapping[str, Planned], data: DataSpec) -> Planned:
        check_unstructured(parent, self)
        return dataclasses.replace(parent, sparse=True)

    def run(self, inputs: Inputs, place: Workplace, data: DataSpec, context: Context) -> dict[str, float]:
        from compression.pruning import prune_unstructured

        windows = self.windows_if_read(inputs, data, context)
        return prune_unstructured(inputs.parent, place.out, self, windows, work=place.work, context=context)
