"""The settings of every pruning method, each defined once. Imports no torch: recipes are validated with them."""

from typing import Annotated, Literal

from pydantic import Field

from compression.pruning.densities import Distribution
from compression.settings import Settings
from compression.training import TrainingSettings

PruningMethod = Literal["magnitude", "gradient", "wanda", "sparsegpt"]
Pattern = Literal["unstructured", "2:4", "4:8"]
Scope = Literal["layer", "global"]
Allocation = Literal["uniform", "sensitivity"]
Heads = Literal["groups", "queries"]
WidthCriterion = Literal["l2", "activation", "taylor", "random"]
DepthCriterion = Literal["influence", "perplexity"]


class UnstructuredSettings(Settings):
    """Single weights that become zero (`compression.pruning.unstructured`).

    In a recipe:

        sparse:
          uses: prune.unstructured
          method: sparsegpt
          sparsity: 0.5
          pattern: "2:4"
    """

    method: Annotated[
        PruningMethod,
        Field(
            description="What a weight is worth: its size (magnitude), what the loss changes by without it (gradient, SNIP), its size "
            "times that of its input (wanda); sparsegpt also lets the weights that stay make up for those that go."
        ),
    ] = "sparsegpt"
    sparsity: Annotated[float, Field(gt=0, lt=1, examples=[0.5], description="Share of the weights to prune; 0.5 with a pattern.")]
    pattern: Annotated[
        Pattern, Field(description="Zeros anywhere, or 2 of each 4 (4 of each 8) neighbouring weights of a row, as sparse hardware wants.")
    ] = "unstructured"
    scope: Annotated[
        Scope, Field(description="Compare weights within a layer, or those of all layers together (magnitude and gradient only).")
    ] = "layer"
    allocation: Annotated[
        Allocation, Field(description="The same sparsity everywhere, or less in blocks with more outliers, at the same average.")
    ] = "uniform"
    damp_percent: Annotated[float, Field(gt=0, lt=1, description="Of the mean of the Hessian's diagonal, added to it (sparsegpt).")] = 0.01


class WidthSettings(Settings):
    """MLP neurons and attention heads that leave, the same number in every block (`compression.pruning.width`).

    In a recipe, `keep`, `keep_heads` or both:

        pruned:
          uses: prune.width
          keep: 0.5
          keep_heads: 0.75
          criterion: activation
    """

    keep: Annotated[float, Field(gt=0, le=1, examples=[0.5], description="Share of MLP neurons to keep.")] = 1.0
    keep_heads: Annotated[float, Field(gt=0, le=1, description="Share of query heads to keep.")] = 1.0
    heads: Annotated[
        Heads,
        Field(
            description="What leaves of attention: a key/value head with its query heads (groups), or as many query heads of each (queries)."
        ),
    ] = "groups"
    criterion: Annotated[
        WidthCriterion,
        Field(
            description="What finds the weakest: l2 (the norm of their weights), activation (what they add to the output in the calibration "
            "data), taylor (first-order change of the loss without them), random (the control)."
        ),
    ] = "l2"
    multiple_of: Annotated[int, Field(ge=1, description="The MLP width that remains is a multiple of this; K-quants want 256.")] = 32


class DepthSettings(Settings):
    """Blocks that leave (`compression.pruning.depth`).

    In a recipe, one of `drop`, `keep` and `blocks`:

        shallow:
          uses: prune.depth
          keep: 0.75
          criterion: influence
    """

    drop: Annotated[int | None, Field(ge=1, description="How many blocks to remove.")] = None
    keep: Annotated[float | None, Field(gt=0, le=1, examples=[0.75], description="Share of blocks to keep.")] = None
    blocks: Annotated[tuple[int, ...] | None, Field(description="The blocks to remove, counted from 0; `criterion` is then not used.")] = (
        None
    )
    criterion: Annotated[
        DepthCriterion,
        Field(
            description="What decides: influence (one minus the cosine of a block's input and output; the least leave), or perplexity "
            "(the block whose removal raises the calibration perplexity least, one after another; much slower)."
        ),
    ] = "influence"


class RigLSettings(TrainingSettings):
    """Sparse training that moves its zeros (`compression.pruning.rigl`).

    In a recipe:

        sparse:
          uses: prune.rigl
          sparsity: 0.5
          delta_t: 100
          steps: 1000

    Lifecycle: every layer is pruned by magnitude; every `delta_t` steps, up to `stop_at` of all steps, a share of its weights moves; then
    the masks stay, and the training ends as `TrainingSettings` says.
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

    Lifecycle: each of `rounds` trains as `TrainingSettings` says, prunes the smallest weights, and rewinds the others to `rewind_step` of
    the first round. With `finish` the ticket is trained once more.
    """

    sparsity: Annotated[
        float, Field(gt=0, lt=1, examples=[0.5], description="Share of the weights of the blocks' linear layers that is zero.")
    ]
    rounds: Annotated[int, Field(ge=1, description="Trainings of `steps` steps; each prunes the same share of what is left.")] = 3
    rewind_step: Annotated[
        int, Field(ge=0, description="Step of the first round to whose weights every round rewinds; 0 is its start.")
    ] = 0
    scope: Annotated[Scope, Field(description="Compare the weights of all layers together, or within a layer.")] = "global"
    finish: Annotated[
        bool, Field(description="Train the rewound weights under the mask once more, instead of leaving that to a later stage.")
    ] = False
