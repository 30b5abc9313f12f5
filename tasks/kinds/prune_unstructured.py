"""`prune.unstructured`: single weights become zero, by magnitude, gradient (SNIP), Wanda or SparseGPT."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from compression.checkpoints.checkpoint import Checkpoint
from compression.context import Context
from compression.data import DataSpec
from compression.pruning import Allocation, Pattern, PruningMethod, Scope, check_unstructured
from tasks.stage import Inputs, Planned, Reads, Stage, Workplace


class PruneUnstructured(Stage):
    """Set a share of the weights of every linear layer to zero; masks.safetensors keeps them zero in the stages that follow."""

    uses: Literal["prune.unstructured"] = "prune.unstructured"
    version: ClassVar[int] = 2
    metrics: ClassVar[tuple[str, ...]] = ("sparsity", "fallback_layers")
    reads: ClassVar[Reads] = "calibration"
    libraries: ClassVar[tuple[str, ...]] = ("torch", "transformers", "tokenizers")
    sparse: ClassVar[bool] = True
    compresses: ClassVar[bool] = True

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

    def data_read(self) -> Reads:
        return "nothing" if self.method == "magnitude" else "calibration"

    def plan(self, parent: Checkpoint, others: Mapping[str, Planned], data: DataSpec) -> Planned:
        check_unstructured(
            parent, method=self.method, scope=self.scope, sparsity=self.sparsity, pattern=self.pattern, allocation=self.allocation
        )
        return dataclasses.replace(parent, sparse=True)

    def run(self, inputs: Inputs, place: Workplace, data: DataSpec, context: Context) -> dict[str, float]:
        from compression.checkpoints.loading import load_tokenizer
        from compression.data import calibration_windows
        from compression.pruning.unstructured import prune_unstructured

        reads = self.data_read() == "calibration"
        windows = calibration_windows(data, load_tokenizer(inputs.parent), context.seed) if reads else None
        settings = self.model_dump(exclude={"uses"})
        return prune_unstructured(inputs.parent, place.out, windows, **settings, work=place.work, context=context)
