"""`quantize.gptq`: weight-only quantization by second-order error compensation (Frantar et al. 2022)."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from compression.checkpoints.checkpoint import Checkpoint
from compression.context import Context
from compression.data import DataSpec
from compression.errors import Incompatible
from compression.quantization.gptqmodel_limits import check_gptqmodel
from tasks.extras import require
from tasks.kinds._codes import CodesStage
from tasks.stage import Inputs, Planned, Reads, Workplace


class QuantizeGptq(CodesStage):
    """GPTQ: quantize column by column, each time moving the error to the columns that are left."""

    uses: Literal["quantize.gptq"] = "quantize.gptq"
    version: ClassVar[int] = 3
    metrics: ClassVar[tuple[str, ...]] = ("fallback_layers", "damped_layers")
    reads: ClassVar[Reads] = "calibration"
    libraries: ClassVar[tuple[str, ...]] = ("torch", "transformers", "tokenizers")

    damp_percent: Annotated[float, Field(gt=0, lt=1, description="Of the mean of the Hessian's diagonal, added to it.")] = 0.01
    act_order: Annotated[bool, Field(description="Quantize important columns first; groups stay in storage order.")] = True
    mse: Annotated[bool, Field(description="Shrink each group's range where that lowers the error of its output.")] = True
    engine: Annotated[
        Literal["edgepress", "gptqmodel"], Field(description="Whose implementation runs; gptqmodel needs `edgepress[gptqmodel]`.")
    ] = "edgepress"

    def deciding_libraries(self) -> tuple[str, ...]:
        return (*self.libraries, "gptqmodel") if self.engine == "gptqmodel" else self.libraries

    def plan(self, parent: Checkpoint, others: Mapping[str, Planned], data: DataSpec) -> Planned:
        if self.engine == "gptqmodel":
            self._check_gptqmodel(parent)
        return super().plan(parent, others, data)

    def _check_gptqmodel(self, parent: Checkpoint) -> None:
        require("gptqmodel", "engine: gptqmodel")
        if self.layers or self.on_indivisible != "refuse":
            raise Incompatible(
                "engine: gptqmodel takes the same bits and groups for all layers here; engine: edgepress takes patterns", key="layers"
            )
        check_gptqmodel(parent, method="gptq", bits=self.bits, group_size=self.group_size)

    def run(self, inputs: Inputs, place: Workplace, data: DataSpec, context: Context) -> dict[str, float]:
        from compression.checkpoints.loading import load_tokenizer
        from compression.data import calibration_windows
        from compression.quantization.gptq import quantize_gptq
        from compression.quantization.gptqmodel_engine import quantize_with_gptqmodel

        windows = calibration_windows(data, load_tokenizer(inputs.parent), context.seed)
        if self.engine == "gptqmodel":
            settings = self.model_dump(include={"bits", "group_size", "symmetric", "damp_percent", "act_order"})
            return quantize_with_gptqmodel(inputs.parent, place.out, windows, **settings, context=context)
        settings = self.model_dump(exclude={"uses", "engine", "layers"})
        return quantize_gptq(inputs.parent, place.out, windows, **settings, layers=self.layers, work=place.work, context=context)
