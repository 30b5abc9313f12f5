"""`prune.lottery`: find a mask by training, pruning and going back."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Literal

from compression.checkpoints.checkpoint import Checkpoint
from compression.context import Context
from compression.data import DataSpec
from compression.errors import Incompatible
from compression.pruning.settings import LotterySettings
from tasks.kinds._training import TrainingStage
from tasks.stage import Inputs, Planned, Workplace


class PruneLottery(TrainingStage, LotterySettings):
    """Rounds of training, pruning the smallest weights and rewinding the others; leaves the rewound weights under the mask, to be trained."""

    uses: Literal["prune.lottery"] = "prune.lottery"
    version: ClassVar[int] = 1
    compresses: ClassVar[bool] = True
    metrics: ClassVar[tuple[str, ...]] = (*TrainingStage.metrics, "sparsity")

    def plan(self, parent: Checkpoint, others: Mapping[str, Planned], data: DataSpec) -> Planned:
        self.check_data(parent, others, data)
        if self.rewind_step >= self.steps:
            raise Incompatible(f"rewind_step is {self.rewind_step}; it is a step before the last, {self.steps}", key="rewind_step")
        return dataclasses.replace(parent, sparse=True)

    def run(self, inputs: Inputs, place: Workplace, data: DataSpec, context: Context) -> dict[str, float]:
        from compression.pruning.lottery import prune_lottery

        return self.train(prune_lottery, inputs.parent, place.out, self.rows(inputs, data), workdir=place.work, context=context)
