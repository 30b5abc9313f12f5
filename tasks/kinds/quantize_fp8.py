"""`quantize.fp8`: E4M3 weights and dynamic E4M3 activations, without calibration data."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Literal

from compression.checkpoints.checkpoint import Checkpoint
from compression.checkpoints.schemes import Scheme
from compression.context import Context
from compression.data import DataSpec
from compression.quantization import FP8Settings
from tasks.stage import Inputs, Planned, Stage, Workplace


class QuantizeFp8(Stage, FP8Settings):
    """Round weights to E4M3; activations are rounded to E4M3 token by token while the model runs."""

    uses: Literal["quantize.fp8"] = "quantize.fp8"
    version: ClassVar[int] = 1
    metrics: ClassVar[tuple[str, ...]] = ("quantized_layers",)
    sparse: ClassVar[bool] = True
    compresses: ClassVar[bool] = True

    def plan(self, parent: Checkpoint, others: Mapping[str, Planned], data: DataSpec) -> Planned:
        config = Scheme("float", self.strategy).config()
        return dataclasses.replace(parent, layout="fp8", config={**parent.config, "quantization_config": config})

    def run(self, inputs: Inputs, place: Workplace, data: DataSpec, context: Context) -> dict[str, float]:
        from compression.quantization import quantize_fp8

        return quantize_fp8(inputs.parent, place.out, self, context=context)
