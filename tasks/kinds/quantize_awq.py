"""`quantize.awq`: weight-only quantization that first scales salient channels up (Lin et al. 2023)."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Literal

from compression.checkpoints.checkpoint import Checkpoint
from compression.checkpoints.quantization_config import awq_config
from compression.context import Context
from compression.data import DataSpec
from compression.quantization import AWQSettings
from compression.quantization.gptqmodel_limits import check_gptqmodel
from compression.quantization.settings import plan_schemes
from tasks.extras import require
from tasks.kinds._calibrated import EngineStage
from tasks.stage import Inputs, Planned, Workplace


class QuantizeAwq(EngineStage, AWQSettings):
    """AWQ: 4-bit codes with zero points, after a search for per-channel scales and clips."""

    uses: Literal["quantize.awq"] = "quantize.awq"
    version: ClassVar[int] = 2
    metrics: ClassVar[tuple[str, ...]] = ("fallback_layers", "damped_layers", "scaled_pairs")

    def plan(self, parent: Checkpoint, others: Mapping[str, Planned], data: DataSpec) -> Planned:
        _ = parent.family  # scale pairs are declared by family
        if self.engine == "gptqmodel":
            require("gptqmodel", "engine: gptqmodel")
            check_gptqmodel(parent, self)
        plan_schemes(parent, bits=self.bits, group_size=self.group_size)
        return dataclasses.replace(
            parent, layout="awq", config={**parent.config, "quantization_config": awq_config(group_size=self.group_size)}
        )

    def run(self, inputs: Inputs, place: Workplace, data: DataSpec, context: Context) -> dict[str, float]:
        from compression.quantization import quantize_awq, quantize_with_gptqmodel

        windows = self.windows(inputs, data, context)
        if self.engine == "gptqmodel":
            return quantize_with_gptqmodel(inputs.parent, place.out, self, windows, context=context)
        return quantize_awq(inputs.parent, place.out, self, windows, work=place.work, context=context)
