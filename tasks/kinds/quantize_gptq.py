"""`quantize.gptq`: weight-only quantization by second-order error compensation (Frantar et al. 2022)."""

from collections.abc import Mapping
from typing import ClassVar, Literal

from compression.checkpoints.checkpoint import Checkpoint
from compression.context import Context
from compression.data import DataSpec
from compression.quantization import GPTQSettings
from compression.quantization.gptqmodel_limits import check_gptqmodel
from compression.quantization.settings import plan_gptq
from tasks.extras import require
from tasks.kinds._calibrated import EngineStage
from tasks.stage import Inputs, Planned, Workplace


class QuantizeGptq(EngineStage, GPTQSettings):
    """GPTQ: quantize column by column, each time moving the error to the columns that are left."""

    uses: Literal["quantize.gptq"] = "quantize.gptq"
    version: ClassVar[int] = 3
    metrics: ClassVar[tuple[str, ...]] = ("fallback_layers", "damped_layers")

    def plan(self, parent: Checkpoint, others: Mapping[str, Planned], data: DataSpec) -> Planned:
        if self.engine == "gptqmodel":
            require("gptqmodel", "engine: gptqmodel")
            check_gptqmodel(parent, self)
        return plan_gptq(parent, self)

    def run(self, inputs: Inputs, place: Workplace, data: DataSpec, context: Context) -> dict[str, float]:
        from compression.quantization import quantize_gptq, quantize_with_gptqmodel

        windows = self.windows(inputs, data, context)
        if self.engine == "gptqmodel":
            return quantize_with_gptqmodel(inputs.parent, place.out, self, windows, context=context)
        return quantize_gptq(inputs.parent, place.out, self, windows, work=place.work, context=context)
