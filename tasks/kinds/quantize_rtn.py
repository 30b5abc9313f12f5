"""`quantize.rtn`: rounding to nearest, the control that calibrated methods have to beat."""

from collections.abc import Mapping
from typing import ClassVar, Literal

from compression.checkpoints.checkpoint import Checkpoint
from compression.context import Context
from compression.data import DataSpec
from compression.quantization import RTNSettings
from compression.quantization.settings import plan_gptq
from tasks.stage import Inputs, Planned, Stage, Workplace


class QuantizeRtn(Stage, RTNSettings):
    """Round to nearest: no calibration, the control for GPTQ and AWQ. Writes the GPTQ layout."""

    uses: Literal["quantize.rtn"] = "quantize.rtn"
    version: ClassVar[int] = 1
    metrics: ClassVar[tuple[str, ...]] = ("fallback_layers",)
    sparse: ClassVar[bool] = True
    compresses: ClassVar[bool] = True

    def plan(self, parent: Checkpoint, others: Mapping[str, Planned], data: DataSpec) -> Planned:
        return plan_gptq(parent, self)

    def run(self, inputs: Inputs, place: Workplace, data: DataSpec, context: Context) -> dict[str, float]:
        from compression.quantization import quantize_rtn

        return quantize_rtn(inputs.parent, place.out, self, context=context)
