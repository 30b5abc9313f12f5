"""What each method of pruning takes. Imports no torch: recipes are validated with it."""

from typing import Annotated, Literal

from pydantic import Field

from compression.pruning.densities import Distribution
from compression.training.settings import TrainingSettings

Scope = Literal["layer", "global"]


class RigLSettings(TrainingSettings):
    """Sparse training that moves its zeros (`compression.pruning.rigl`).

    In a recipe:

        sparse:
          uses: prune.rigl
          sparsity: 0.5
          delta_t: 100
          steps: 1000
    """

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


class LotterySettings(TrainingSettings):
    """Iterative magnitude pruning with rewinding (`compression.pruning.lottery`).

    In a recipe:

        ticket:
          uses: prune.lottery
          sparsity: 0.5
          rounds: 3
          rewind_step: 50
    """

    sparsity: Annotated[
        float, Field(gt=0, lt=1, examples=[0.5], description="Share of the weights of the blocks' linear layers that is zero.")
    ]
    rounds: Annotated[int, Field(ge=1, description="Trainings of `steps` steps; each prunes the same share of what is left.")] = 3
    rewind_step: Annotated[int, Field(ge=0, description="Step of the first round whose weights are gone back to; 0 is its start.")] = 0
    scope: Annotated[Scope, Field(description="Compare the weights of all layers together, or within a layer.")] = "global"
    finish: Annotated[
        bool, Field(description="Train the rewound weights under the mask once more, instead of leaving that to a later stage.")
    ] = False
