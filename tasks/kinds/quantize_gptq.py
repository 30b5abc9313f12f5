"""`quantize.gptq`: weight-only quantization by second-order error compensation (Frantar et al. 2022)."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from compression.checkpoint import Checkpoint
from compression.context import Context
from compression.data import DataSpec
from compression.quantization import check_group_size
from tasks.stage import Inputs, Planned, Reads, Stage, Workplace


class QuantizeGptq(Stage):
    """GPTQ: quantize column by column, each time moving the error to the columns that are left."""

    uses: Literal["quantize.gptq"] = "quantize.gptq"
    version: ClassVar[int] = 1
    reads: ClassVar[Reads] = "calibration"
    libraries: ClassVar[tuple[str, ...]] = ("torch", "transformers", "tokenizers")

    bits: Annotated[Literal[2, 3, 4, 8], Field(description="Bits of a weight.")] = 4
    group_size: Annotated[int, Field(ge=8, description="Input channels that share a scale; 32 can be carried into GGUF.")] = 128
    symmetric: Annotated[bool, Field(description="Without zero points.")] = True
    damp_percent: Annotated[float, Field(gt=0, lt=1, description="Of the mean of the Hessian's diagonal, added to it.")] = 0.01
    act_order: Annotated[bool, Field(description="Quantize important columns first; groups stay in storage order.")] = True
    mse: Annotated[bool, Field(description="Shrink each group's range where that lowers the error of its output.")] = True

    def plan(self, parent: Checkpoint, others: Mapping[str, Planned], data: DataSpec) -> Planned:
        check_group_size(parent, self.group_size, self.bits)
        settings = {"quant_method": "gptq", "bits": self.bits, "group_size": self.group_size, "sym": self.symmetric, "desc_act": False}
        return dataclasses.replace(parent, layout="gptq", config={**parent.config, "quantization_config": settings})

    def run(self, inputs: Inputs, place: Workplace, data: DataSpec, context: Context) -> dict[str, float]:
        from compression.data import calibration_windows
        from compression.loading import load_tokenizer
        from compression.quantization.gptq import quantize_gptq

        windows = calibration_windows(data, load_tokenizer(inputs.parent), context.seed)
        return quantize_gptq(inputs.parent, place.out, windows, **self.model_dump(exclude={"uses"}), context=context)
