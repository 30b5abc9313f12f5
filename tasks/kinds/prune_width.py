"""`prune.width`: fewer MLP neurons and attention heads, by default the weakest by layer-wise L2 norm removed (arXiv 2505.18166)."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from compression.checkpoints.checkpoint import Checkpoint
from compression.context import Context
from compression.data import DataSpec
from compression.errors import Incompatible
from compression.pruning.structure import Heads, WidthCriterion, width_config
from tasks.stage import Inputs, Planned, Reads, Stage, Workplace


class PruneWidth(Stage):
    """Remove MLP neurons and attention heads, the same number in every layer: give `keep`, `keep_heads` or both."""

    uses: Literal["prune.width"] = "prune.width"
    version: ClassVar[int] = 1
    metrics: ClassVar[tuple[str, ...]] = ("kept_ratio", "kept_heads_ratio", "parameters_ratio", "intermediate_size", "num_attention_heads")
    reads: ClassVar[Reads] = "calibration"
    libraries: ClassVar[tuple[str, ...]] = ("torch", "transformers", "tokenizers")
    sparse: ClassVar[bool] = True

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
            description="What the weakest are told by: l2 (the norm of their weights), activation (what they add to the output in the calibration "
            "data), taylor (first-order change of the loss without them), random (the control)."
        ),
    ] = "l2"
    multiple_of: Annotated[int, Field(ge=1, description="The MLP width that remains is a multiple of this; K-quants want 256.")] = 32

    def data_read(self) -> Reads:
        return "calibration" if self.criterion in ("activation", "taylor") else "nothing"

    def plan(self, parent: Checkpoint, others: Mapping[str, Planned], data: DataSpec) -> Planned:
        if not {"keep", "keep_heads"} & self.model_fields_set:
            raise Incompatible("say what stays: keep (share of MLP neurons), keep_heads (share of attention heads), or both", key="uses")
        parameters = self.model_dump(exclude={"uses", "criterion"})
        return dataclasses.replace(parent, config=width_config(parent, **parameters))

    def run(self, inputs: Inputs, place: Workplace, data: DataSpec, context: Context) -> dict[str, float]:
        from compression.checkpoints.loading import load_tokenizer
        from compression.data import calibration_windows
        from compression.pruning.width import prune_width

        reads = self.data_read() == "calibration"
        windows = calibration_windows(data, load_tokenizer(inputs.parent), context.seed) if reads else None
        return prune_width(inputs.parent, place.out, windows, **self.model_dump(exclude={"uses"}), context=context)
