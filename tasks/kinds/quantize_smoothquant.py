"""`quantize.smoothquant`: int8 weights and dynamic int8 activations, after smoothing the activations (Xiao et al. 2022)."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from compression.checkpoints.checkpoint import Checkpoint
from compression.checkpoints.schemes import Scheme
from compression.context import Context
from compression.data import DataSpec
from tasks.stage import Inputs, Planned, Reads, Stage, Workplace


class QuantizeSmoothquant(Stage):
    """SmoothQuant: W8A8, with the outliers of activations moved into the weights first."""

    uses: Literal["quantize.smoothquant"] = "quantize.smoothquant"
    version: ClassVar[int] = 2
    metrics: ClassVar[tuple[str, ...]] = ("scaled_pairs",)
    sparse: ClassVar[bool] = True
    compresses: ClassVar[bool] = True
    reads: ClassVar[Reads] = "calibration"
    libraries: ClassVar[tuple[str, ...]] = ("torch", "transformers", "tokenizers")

    alpha: Annotated[
        float | None, Field(ge=0, le=1, description="How much of the outliers moves into the weights; null moves nothing (the control).")
    ] = 0.5

    def plan(self, parent: Checkpoint, others: Mapping[str, Planned], data: DataSpec) -> Planned:
        if self.alpha is not None:
            _ = parent.family  # scale pairs are declared by family
        return dataclasses.replace(parent, layout="w8a8", config={**parent.config, "quantization_config": Scheme("int").config()})

    def run(self, inputs: Inputs, place: Workplace, data: DataSpec, context: Context) -> dict[str, float]:
        from compression.checkpoints.loading import load_tokenizer
        from compression.data import calibration_windows
        from compression.quantization.smoothquant import quantize_smoothquant

        windows = calibration_windows(data, load_tokenizer(inputs.parent), context.seed)
        return quantize_smoothquant(inputs.parent, place.out, windows, alpha=self.alpha, work=place.work, context=context)
