"""`finetune`: train on next tokens, all weights or a LoRA adapter that is merged afterwards."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from compression.checkpoint import Checkpoint
from compression.context import Context
from compression.data import DataSpec
from tasks.kinds._training import TrainingStage
from tasks.stage import Inputs, Planned, Workplace


class Finetune(TrainingStage):
    """Fine-tune with LoRA (kept in `adapter/`, merged in full precision) or in full."""

    uses: Literal["finetune"] = "finetune"
    version: ClassVar[int] = 1
    libraries: ClassVar[tuple[str, ...]] = (*TrainingStage.libraries, "peft")

    method: Annotated[Literal["lora", "full"], Field(description="`lora` trains low-rank adapters, `full` every weight.")] = "lora"
    rank: Annotated[int, Field(ge=1, description="Rank of the adapters.")] = 16
    alpha: Annotated[int, Field(ge=1, description="The adapters' update is scaled by alpha / rank.")] = 32
    dropout: Annotated[float, Field(ge=0, lt=1, description="Dropout before the adapters.")] = 0.0
    target_modules: Annotated[str | list[str], Field(description="`all-linear`, or names of layers.")] = "all-linear"

    def plan(self, parent: Checkpoint, others: Mapping[str, Planned], data: DataSpec) -> Planned:
        self.check_data(parent, data)
        return parent

    def run(self, inputs: Inputs, place: Workplace, data: DataSpec, context: Context) -> dict[str, float]:
        from compression.finetuning import finetune

        return finetune(
            inputs.parent, place.out, **self.rows(inputs.parent, data, context), method=self.method, rank=self.rank, alpha=self.alpha,
            dropout=self.dropout, target_modules=self.target_modules, settings=self.settings(), workdir=place.work, context=context,
            adapter_out=place.out / "adapter" if self.method == "lora" else None,
        )  # fmt: skip
