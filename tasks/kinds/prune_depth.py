"""`prune.depth`: fewer blocks, those left out that the model misses least (ShortGPT, arXiv 2403.03853; SLEB, arXiv 2402.09025)."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from compression.checkpoints.checkpoint import Checkpoint
from compression.context import Context
from compression.data import DataSpec
from compression.pruning.structure import DepthCriterion, blocks_left, depth_config
from tasks.stage import Inputs, Planned, Reads, Stage, Workplace


class PruneDepth(Stage):
    """Remove whole blocks: give one of `drop`, `keep` and `blocks`."""

    uses: Literal["prune.depth"] = "prune.depth"
    version: ClassVar[int] = 1
    metrics: ClassVar[tuple[str, ...]] = ("kept_ratio", "num_hidden_layers", "parameters_ratio")
    reads: ClassVar[Reads] = "calibration"
    libraries: ClassVar[tuple[str, ...]] = ("torch", "transformers", "tokenizers")
    sparse: ClassVar[bool] = True

    drop: Annotated[int | None, Field(ge=1, description="How many blocks to remove.")] = None
    keep: Annotated[float | None, Field(gt=0, le=1, examples=[0.75], description="Share of blocks to keep.")] = None
    blocks: Annotated[tuple[int, ...] | None, Field(description="The blocks to remove, counted from 0; no criterion is asked.")] = None
    criterion: Annotated[
        DepthCriterion,
        Field(
            description="What decides: influence (one minus the cosine of a block's input and output; the least leave), or perplexity "
            "(the block whose removal raises the calibration perplexity least, one after another; much slower)."
        ),
    ] = "influence"

    def data_read(self) -> Reads:
        return "nothing" if self.blocks else "calibration"

    def plan(self, parent: Checkpoint, others: Mapping[str, Planned], data: DataSpec) -> Planned:
        left = blocks_left(parent, drop=self.drop, keep=self.keep, blocks=self.blocks)
        # Which blocks remain is not known before a criterion is asked, only how many: the first stand for them.
        kept = [block for block in range(parent.num_layers) if block not in self.blocks] if self.blocks else range(left)
        return dataclasses.replace(parent, config=depth_config(parent, kept))

    def run(self, inputs: Inputs, place: Workplace, data: DataSpec, context: Context) -> dict[str, float]:
        from compression.checkpoints.loading import load_tokenizer
        from compression.data import calibration_windows
        from compression.pruning.depth import prune_depth

        reads = self.data_read() == "calibration"
        windows = calibration_windows(data, load_tokenizer(inputs.parent), context.seed) if reads else None
        return prune_depth(inputs.parent, place.out, windows, **self.model_dump(exclude={"uses"}), context=context)
