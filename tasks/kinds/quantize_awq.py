"""`quantize.awq`: weight-only quantization that first scales salient channels up (Lin et al. 2023)."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from compression.checkpoints.checkpoint import Checkpoint
from compression.checkpoints.quantization_config import awq_config
from compression.context import Context
from compression.data import DataSpec
from compression.quantization.gptqmodel_limits import check_gptqmodel
from compression.quantization.settings import plan_schemes
from tasks.extras import require
from tasks.stage import Inputs, Planned, Reads, Stage, Workplace


class QuantizeAwq(Stage):
    """AWQ: 4-bit codes with zero points, after a search for per-channel scales and clips."""

    uses: Literal["quantize.awq"] = "quantize.awq"
    version: ClassVar[int] = 2
    metrics: ClassVar[tuple[str, ...]] = ("fallback_layers", "damped_layers", "scaled_pairs")
    sparse: ClassVar[bool] = True
    compresses: ClassVar[bool] = True
    reads: ClassVar[Reads] = "calibration"
    libraries: ClassVar[tuple[str, ...]] = ("torch", "transformers", "tokenizers")

    bits: Annotated[Literal[4], Field(description="Bits of a weight; the layout holds 4.")] = 4
    group_size: Annotated[int, Field(ge=-1, description="Input channels that share a scale; 32 can be carried into GGUF, -1 is a row.")] = (
        128
    )
    clip: Annotated[bool, Field(description="Shrink each group's range where that lowers the error of its output.")] = True

    engine: Annotated[
        Literal["edgepress", "gptqmodel"], Field(description="Whose implementation runs; gptqmodel needs `edgepress[gptqmodel]`.")
    ] = "edgepress"

    def deciding_libraries(self) -> tuple[str, ...]:
        return (*self.libraries, "gptqmodel") if self.engine == "gptqmodel" else self.libraries

    def plan(self, parent: Checkpoint, others: Mapping[str, Planned], data: DataSpec) -> Planned:
        _ = parent.family  # scale pairs are declared by family
        if self.engine == "gptqmodel":
            require("gptqmodel", "engine: gptqmodel")
            check_gptqmodel(parent, method="awq", bits=self.bits, group_size=self.group_size)
        plan_schemes(parent, bits=self.bits, group_size=self.group_size)
        return dataclasses.replace(
            parent, layout="awq", config={**parent.config, "quantization_config": awq_config(group_size=self.group_size)}
        )

    def run(self, inputs: Inputs, place: Workplace, data: DataSpec, context: Context) -> dict[str, float]:
        from compression.checkpoints.loading import load_tokenizer
        from compression.data import calibration_windows
        from compression.quantization.awq import quantize_awq
        from compression.quantization.gptqmodel_engine import quantize_with_gptqmodel

        windows = calibration_windows(data, load_tokenizer(inputs.parent), context.seed)
        if self.engine == "gptqmodel":
            return quantize_with_gptqmodel(
                inputs.parent, place.out, windows, method="awq", bits=self.bits, group_size=self.group_size, context=context
            )
        settings = self.model_dump(include={"bits", "group_size", "clip"})
        return quantize_awq(inputs.parent, place.out, windows, **settings, work=place.work, context=context)
