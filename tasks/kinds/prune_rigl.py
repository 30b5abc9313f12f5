"""`prune.rigl`: sparse training whose zeros move to where they cost least."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from compression.checkpoints.checkpoint import Checkpoint
from compression.context import Context
from compression.data import DataSpec
from compression.errors import Incompatible
from compression.pruning.densities import Distribution
from tasks.kinds._training import TrainingStage
from tasks.stage import Inputs, Planned, Workplace


class PruneRigL(TrainingStage):
    """Prune by magnitude, then train while the smallest weights leave and those with the largest gradient grow (RigL)."""

    uses: Literal["prune.rigl"] = "prune.rigl"
    version: ClassVar[int] = 1
    compresses: ClassVar[bool] = True
    metrics: ClassVar[tuple[str, ...]] = (*TrainingStage.metrics, "sparsity", "mask_updates")

    sparsity: Annotated[
        float, Field(gt=0, lt=1, examples=[0.5], description="Share of the weights of the blocks' linear layers that is zero.")
    ]
    distribution: Annotated[
        Distribution, Field(description="The same sparsity in every layer, or less in small ones (Erdős-Rényi-Kernel).")
    ] = "uniform"
    drop_fraction: Annotated[
        float, Field(gt=0, lt=1, description="Share of a layer's weights that moves in an update; falls to 0 along a cosine.")
    ] = 0.3
    delta_t: Annotated[int, Field(ge=1, description="Steps from one update to the next.")] = 100
    stop_at: Annotated[float, Field(gt=0, le=1, description="Share of the steps after which the zeros stay where they are.")] = 0.75

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

        return self.train(
            prune_rigl, inputs.parent, place.out, **self.rows(inputs, data, context), sparsity=self.sparsity, distribution=self.distribution,
            drop_fraction=self.drop_fraction, delta_t=self.delta_t, stop_at=self.stop_at, settings=self.settings(), workdir=place.work,
            context=context,
        )  # fmt: skip
