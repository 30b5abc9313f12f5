"""`quantize.awq`: weight-only quantization that first scales salient channels up (Lin et al. 2023)."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from compression.checkpoint import Checkpoint
from compression.context import Context
from compression.data import DataSpec
from compression.quantization import check_group_size
from tasks.stage import Inputs, Planned, Reads, Stage, Workplace


class QuantizeAwq(Stage):
    """AWQ: 4-bit codes with zero points, after a search for per-channel scales and clips."""

    uses: Literal["quantize.awq"] = "quantize.awq"
    version: ClassVar[int] = 1
    reads: ClassVar[Reads] = "calibration"
    libraries: ClassVar[tuple[str, ...]] = ("torch", "transformers", "tokenizers")

    bits: Annotated[Literal[4], Field(description="Bits of a weight; the layout holds 4.")] = 4
    group_size: Annotated[int, Field(ge=8, description="Input channels that share a scale; 32 can be carried into GGUF.")] = 128
    clip: Annotated[bool, Field(description="Shrink each group's range where that lowers the error of its output.")] = True

    def plan(self, parent: Checkpoint, others: Mapping[str, Planned], data: DataSpec) -> Planned:
        _ = parent.family  # scale pairs are declared by family
        check_group_size(parent, self.group_size, self.bits)
        settings = {"quant_method": "awq", "bits": self.bits, "group_size": self.group_size, "zero_point": True, "version": "gemm"}
        return dataclasses.replace(parent, layout="awq", config={**parent.config, "quantization_config": settings})

    def run(self, inputs: Inputs, place: Workplace, data: DataSpec, context: Context) -> dict[str, float]:
        from compression.data import calibration_windows
        from compression.loading import load_tokenizer
        from compression.quantization.awq import quantize_awq

        windows = calibration_windows(data, load_tokenizer(inputs.parent), context.seed)
        return quantize_awq(inputs.parent, place.out, windows, **self.model_dump(exclude={"uses"}), context=context)
