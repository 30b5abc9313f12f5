"""`prune.width`: fewer MLP neurons, the weakest by layer-wise L2 norm removed (arXiv 2505.18166)."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from compression.checkpoint import Checkpoint
from compression.context import Context
from compression.data import DataSpec
from compression.pruning import pruned_width
from tasks.stage import Inputs, Planned, Stage, Workplace


class PruneWidth(Stage):
    """Remove the MLP neurons with the smallest L2 norm, the same number in every layer."""

    uses: Literal["prune.width"] = "prune.width"
    version: ClassVar[int] = 1

    keep: Annotated[float, Field(gt=0, le=1, examples=[0.5], description="Share of MLP neurons to keep.")]
    multiple_of: Annotated[int, Field(ge=1, description="The width that remains is a multiple of this; K-quants want 256.")] = 32

    def plan(self, parent: Checkpoint, others: Mapping[str, Planned], data: DataSpec) -> Planned:
        width = pruned_width(parent.intermediate_size, self.keep, self.multiple_of)
        return dataclasses.replace(parent, config={**parent.config, "intermediate_size": width})

    def run(self, inputs: Inputs, place: Workplace, data: DataSpec, context: Context) -> dict[str, float]:
        from compression.pruning.width import prune_width

        return prune_width(inputs.parent, place.out, keep=self.keep, multiple_of=self.multiple_of, context=context)
