"""`finetune`: train on next tokens, all weights or an adapter that is merged afterwards."""

from collections.abc import Mapping
from typing import ClassVar, Literal

from compression.checkpoints.checkpoint import Checkpoint
from compression.context import Context
from compression.data import DataSpec
from compression.finetuning import FinetuningSettings, check_method
from tasks.kinds._training import TrainingStage
from tasks.stage import Inputs, Planned, Workplace


class Finetune(TrainingStage, FinetuningSettings):
    """Fine-tune with adapters (kept in `adapter/`, merged in full precision) or in full. A sparse model stays as sparse."""

    uses: Literal["finetune"] = "finetune"
    version: ClassVar[int] = 2
    metrics: ClassVar[tuple[str, ...]] = (*TrainingStage.metrics, "trainable_parameters")
    libraries: ClassVar[tuple[str, ...]] = (*TrainingStage.libraries, "peft")

    def deciding_libraries(self) -> tuple[str, ...]:
        return (*self.libraries, "bitsandbytes") if self.method == "qlora" else self.libraries

    def plan(self, parent: Checkpoint, others: Mapping[str, Planned], data: DataSpec) -> Planned:
        self.check_data(parent, others, data)
        check_method(parent, self.method, self.target_modules)
        return parent

    def run(self, inputs: Inputs, place: Workplace, data: DataSpec, context: Context) -> dict[str, float]:
        from compression.finetuning import finetune

        adapter_out = None if self.method == "full" else place.out / "adapter"
        return self.train(
            finetune, inputs.parent, place.out, self.rows(inputs, data), workdir=place.work, context=context, adapter_out=adapter_out
        )
