"""`prune.width`: fewer MLP neurons and attention heads, by default the weakest by layer-wise L2 norm removed (arXiv 2505.18166)."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Literal

from compression.checkpoints.checkpoint import Checkpoint
from compression.context import Context
from compression.data import DataSpec
from compression.errors import Incompatible
from compression.pruning import WidthSettings
from compression.pruning.structure import width_config
from tasks.kinds._calibrated import CalibratedStage
from tasks.stage import Inputs, Planned, Reads, Workplace


class PruneWidth(CalibratedStage, WidthSettings):
    """Remove MLP neurons and attention heads, the same number in every layer: give `keep`, `keep_heads` or both."""

    uses: Literal["prune.width"] = "prune.width"
    version: ClassVar[int] = 1
    metrics: ClassVar[tuple[str, ...]] = ("kept_ratio", "kept_heads_ratio", "parameters_ratio", "intermediate_size", "num_attention_heads")

    def data_read(self) -> Reads:
        return "calibration" if self.criterion in ("activation", "taylor") else "nothing"

    def plan(self, parent: Checkpoint, others: Mapping[str, Planned], data: DataSpec) -> Planned:
        if not {"keep", "keep_heads"} & self.model_fields_set:
            raise Incompatible("say what stays: keep (share of MLP neurons), keep_heads (share of attention heads), or both", key="uses")
        return dataclasses.replace(parent, config=width_config(parent, self))

    def run(self, inputs: Inputs, place: Workplace, data: DataSpec, context: Context) -> dict[str, float]:
        from compression.pruning import prune_width

        windows = self.windows_if_read(inputs, data, context)
        return prune_width(inputs.parent, place.out, self, windows, context=context)
