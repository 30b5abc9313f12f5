"""Parameters of stages that write the GPTQ layout: how many bits each layer gets, and in which groups."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from compression.checkpoints.checkpoint import Checkpoint
from compression.data import DataSpec
from compression.quantization.settings import OnIndivisible, Override, plan_gptq
from tasks.stage import Planned, Stage


class CodesStage(Stage):
    """Base of `quantize.rtn` and `quantize.gptq`."""

    sparse: ClassVar[bool] = True
    compresses: ClassVar[bool] = True
    former_names: ClassVar[Mapping[str, str]] = {"misfit": "on_indivisible"}

    bits: Annotated[Literal[2, 3, 4, 8], Field(description="Bits of a weight.")] = 4
    group_size: Annotated[int, Field(ge=-1, description="Input channels that share a scale; 32 can be carried into GGUF, -1 is a row.")] = (
        128
    )

    symmetric: Annotated[bool, Field(description="Without zero points.")] = True
    layers: dict[str, Override] = Field(
        default_factory=dict,
        description='Other bits or groups by pattern, the first that fits: {"*.down_proj": {bits: 8}}; bits 16 leaves layers as they are.',
    )
    on_indivisible: Annotated[
        OnIndivisible,
        Field(
            description="What becomes of a layer that group_size does not divide: refuse, or the largest smaller group, counted as a fallback."
        ),
    ] = "refuse"

    def plan(self, parent: Checkpoint, others: Mapping[str, Planned], data: DataSpec) -> Planned:
        return plan_gptq(
            parent,
            bits=self.bits,
            group_size=self.group_size,
            symmetric=self.symmetric,
            layers=self.layers,
            on_indivisible=self.on_indivisible,
        )
