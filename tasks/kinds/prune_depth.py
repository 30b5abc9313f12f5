"""`prune.depth`: remove the blocks that the model needs least (ShortGPT, arXiv 2403.03853; SLEB, arXiv 2402.09025)."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Literal

from compression.checkpoints.checkpoint import Checkpoint
from compression.context import Context
from compression.data import DataSpec
from compression.pruning import DepthSettings
from compression.pruning.structure import blocks_left, depth_config
from tasks.kinds._calibrated import CalibratedStage
from tasks.stage import Inputs, Planned, Reads, Workplace


class PruneDepth(CalibratedStage, DepthSettings):
    """Remove blocks: give one of `drop`, `keep` and `blocks`."""

    uses: Literal["prune.depth"] = "prune.depth"
    version: ClassVar[int] = 1
    metrics: ClassVar[tuple[str, ...]] = ("kept_ratio", "num_hidden_layers", "parameters_ratio")

    def data_read(self) -> Reads:
        return "nothing" if self.blocks else "calibration"

    def plan(self, parent: Checkpoint, others: Mapping[str, Planned], data: DataSpec) -> Planned:
        left = blocks_left(parent, self)
        # A criterion chooses the blocks only when the stage runs; until then the first ones stand for those that remain.
        kept = [block for block in range(parent.num_layers) if block not in self.blocks] if self.blocks else range(left)
        return dataclasses.replace(parent, config=depth_config(parent, kept))

    def run(self, inputs: Inputs, place: Workplace, data: DataSpec, context: Context) -> dict[str, float]:
        from compression.pruning import prune_depth

        windows = self.windows_if_read(inputs, data, context)
        return prune_depth(inputs.parent, place.out, self, windows, context=context)
