"""`prune.lottery`: find a mask by training, pruning and going back."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from compression.checkpoints.checkpoint import Checkpoint
from compression.context import Context
from compression.data import DataSpec
from compression.errors import Incompatible
from compression.pruning import Scope
from tasks.kinds._training import TrainingStage
from tasks.stage import Inputs, Planned, Workplace


class PruneLottery(TrainingStage):
    """Rounds of training, pruning the smallest weights and rewinding the others; leaves the rewound weights under the mask, to be trained."""

    uses: Literal["prune.lottery"] = "prune.lottery"
    version: ClassVar[int] = 1
    compresses: ClassVar[bool] = True
    metrics: ClassVar[tuple[str, ...]] = (*TrainingStage.metrics, "sparsity")

    sparsity: Annotated[
        float, Field(gt=0, lt=1, examples=[0.5], description="Share of the weights of the blocks' linear layers that is zero.")
    ]
    rounds: Annotated[int, Field(ge=1, description="Trainings of `steps` steps; each prunes the same share of what is left.")] = 3
    rewind_step: Annotated[int, Field(ge=0, description="Step of the first round whose weights are gone back to; 0 is its start.")] = 0
    scope: Annotated[Scope, Field(description="Compare the weights of all layers together, or within a layer.")] = "global"
    finish: Annotated[
        bool, Field(description="Train the rewound weights under the mask once more, instead of leaving that to a later stage.")
    ] = False

    def plan(self, parent: Checkpoint, others: Mapping[str, Planned], data: DataSpec) -> Planned:
        self.check_data(parent, others, data)
        if self.rewind_step >= self.steps:
            raise Incompatible(f"rewind_step is {self.rewind_step}; it is a step before the last, {self.steps}", key="rewind_step")
        return dataclasses.replace(parent, sparse=True)

    def run(self, inputs: Inputs, place: Workplace, data: DataSpec, context: Context) -> dict[str, float]:
        from compression.pruning.lottery import prune_lottery

        return self.train(
            prune_lottery, inputs.parent, place.out, **self.rows(inputs, data, context), sparsity=self.sparsity, rounds=self.rounds,
            rewind_step=self.rewind_step, scope=self.scope, finish=self.finish, settings=self.settings(), workdir=place.work, context=context,
        )  # fmt: skip
