"""`quantize.smoothquant`: int8 weights and dynamic int8 activations, after smoothing the activations (Xiao et al. 2022)."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Literal

from compression.checkpoints.checkpoint import Checkpoint
from compression.checkpoints.schemes import Scheme
from compression.context import Context
from compression.data import DataSpec
from compression.quantization import SmoothQuantSettings
from tasks.kinds._calibrated import CalibratedStage
from tasks.stage import Inputs, Planned, Workplace


class QuantizeSmoothquant(CalibratedStage, SmoothQuantSettings):
    """SmoothQuant: W8A8, with the outliers of activations moved into the weights first."""

    uses: Literal["quantize.smoothquant"] = "quantize.smoothquant"
    version: ClassVar[int] = 2
    metrics: ClassVar[tuple[str, ...]] = ("scaled_pairs",)
    compresses: ClassVar[bool] = True

    def plan(self, parent: Checkpoint, others: Mapping[str, Planned], data: DataSpec) -> Planned:
        if self.alpha is not None:
            _ = parent.family  # scale pairs are declared by family
        return dataclasses.replace(parent, layout="w8a8", config={**parent.config, "quantization_config": Scheme("int").config()})

    def run(self, inputs: Inputs, place: Workplace, data: DataSpec, context: Context) -> dict[str, float]:
        from compression.quantization import quantize_smoothquant

        windows = self.windows(inputs, data, context)
        return quantize_smoothquant(inputs.parent, place.out, self, windows, work=place.work, context=context)
