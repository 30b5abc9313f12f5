"""What stages that read calibration windows share."""

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from compression.context import Context
from compression.data import DataSpec
from tasks.stage import Inputs, Reads, Stage

if TYPE_CHECKING:
    from torch import Tensor


class CalibratedStage(Stage):
    """Base of stages that run the recipe's calibration windows through the model.

    A subclass whose parameters decide whether it needs these overrides `data_read` and calls `windows_if_read`.
    """

    reads: ClassVar[Reads] = "calibration"
    libraries: ClassVar[tuple[str, ...]] = ("torch", "transformers", "tokenizers")
    sparse: ClassVar[bool] = True

    def windows(self, inputs: Inputs, data: DataSpec, context: Context) -> "Tensor":
        """Draw the calibration windows with the context's seed: token ids, int64 [count, length]."""
        from compression.checkpoints.loading import load_tokenizer
        from compression.data import calibration_windows

        return calibration_windows(data, load_tokenizer(inputs.parent), context.seed)

    def windows_if_read(self, inputs: Inputs, data: DataSpec, context: Context) -> "Tensor | None":
        """Return `windows`, or None where a stage with these parameters reads none."""
        return self.windows(inputs, data, context) if self.data_read() == "calibration" else None


class EngineStage(CalibratedStage):
    """Base of quantization stages that have a second implementation, GPTQModel's."""

    compresses: ClassVar[bool] = True

    engine: Annotated[
        Literal["edgepress", "gptqmodel"], Field(description="Whose implementation runs; gptqmodel needs `edgepress[gptqmodel]`.")
    ] = "edgepress"

    def deciding_libraries(self) -> tuple[str, ...]:
        return (*self.libraries, "gptqmodel") if self.engine == "gptqmodel" else self.libraries
