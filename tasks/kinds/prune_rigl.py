"""`prune.rigl`: sparse training whose zeros move to where they cost least."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Literal

from compression.checkpoints.checkpoint import Checkpoint
from compression.context import Context
from compression.data import DataSpec
from compression.errors import Incompatible
from compression.pruning.settings import RigLSettings
from tasks.kinds._training import TrainingStage
from tasks.stage import Inputs, Planned, Workplace


class PruneRigL(TrainingStage, RigLSettings):
    """Prune by magnitude, then train while the smallest weights leave and those with the largest gradient grow (RigL)."""

    uses: Literal["prune.rigl"] = "prune.rigl"
    version: ClassVar[int] = 1
    compresses: ClassVar[bool] = True
    metrics: ClassVar[tuple[str, ...]] = (*TrainingStage.metrics, "sparsity", "mask_updates")

    def plan(self, parent: Checkpoint, others: Mapping[str, Planned], data: DataSpec) -> Planned:
        self.check_data(parent, others, data)
        if self.delta_t >= self.stop_at * self.steps:
            raise Incompatible(
                f"the first update would be at step {self.delta_t}, and none is from step {self.stop_at * self.steps:g} on (stop_at); lower delta_t",
                key="delta_t",
            )
        return dataclasses.replace(parent, sparse=True)

    def run(self, inputs: Inputs, place: Workplace, data: DataSpec, context: Context) -> dict[str, float]:
        from compression.pruning.rigl import prune_rigl

        return self.train(prune_rigl, inputs.parent, place.out, self.rows(inputs, data), workdir=place.work, context=context)
