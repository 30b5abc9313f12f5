"""`quantize.rtn`: rounding to nearest, the control that calibrated methods have to beat."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from compression.context import Context
from compression.data import DataSpec
from tasks.kinds._codes import CodesStage
from tasks.stage import Inputs, Workplace


class QuantizeRtn(CodesStage):
    """Round to nearest: no calibration, the control for GPTQ and AWQ. Writes the GPTQ layout."""

    uses: Literal["quantize.rtn"] = "quantize.rtn"
    version: ClassVar[int] = 1
    metrics: ClassVar[tuple[str, ...]] = ("fallback_layers",)

    mse: Annotated[bool, Field(description="Shrink each group's range where that lowers the error of its weights.")] = False

    def run(self, inputs: Inputs, place: Workplace, data: DataSpec, context: Context) -> dict[str, float]:
        from compression.quantization.rtn import quantize_rtn

        settings = self.model_dump(exclude={"uses", "layers"})
        return quantize_rtn(inputs.parent, place.out, **settings, layers=self.layers, context=context)
