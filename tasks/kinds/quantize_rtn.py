"""`quantize.rtn`: rounding to nearest, the control that calibrated methods have to beat."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from compression.checkpoint import Checkpoint
from compression.context import Context
from compression.data import DataSpec
from compression.quantization.settings import Misfit, Override, plan_gptq
from tasks.stage import Inputs, Planned, Stage, Workplace


class QuantizeRtn(Stage):
    """Round to nearest: no calibration, the control for GPTQ and AWQ. Writes the GPTQ layout."""

    uses: Literal["quantize.rtn"] = "quantize.rtn"
    version: ClassVar[int] = 1
    sparse: ClassVar[bool] = True

    bits: Annotated[Literal[2, 3, 4, 8], Field(description="Bits of a weight.")] = 4
    group_size: Annotated[int, Field(ge=-1, description="Input channels that share a scale; 32 can be carried into GGUF, -1 is a row.")] = (
        128
    )
    symmetric: Annotated[bool, Field(description="Without zero points.")] = True
    mse: Annotated[bool, Field(description="Shrink each group's range where that lowers the error of its weights.")] = False
    layers: dict[str, Override] = Field(
        default_factory=dict,
        description='Other bits or groups by pattern, the first that fits: {"*.down_proj": {bits: 8}}; bits 16 leaves layers as they are.',
    )
    misfit: Annotated[
        Misfit,
        Field(
            description="What becomes of a layer that group_size does not divide: refuse, or the largest smaller group, counted as a fallback."
        ),
    ] = "refuse"

    def plan(self, parent: Checkpoint, others: Mapping[str, Planned], data: DataSpec) -> Planned:
        return plan_gptq(
            parent, bits=self.bits, group_size=self.group_size, symmetric=self.symmetric, layers=self.layers, misfit=self.misfit
        )

    def run(self, inputs: Inputs, place: Workplace, data: DataSpec, context: Context) -> dict[str, float]:
        from compression.quantization.rtn import quantize_rtn

        settings = self.model_dump(exclude={"uses", "layers"})
        return quantize_rtn(inputs.parent, place.out, **settings, layers=self.layers, context=context)
