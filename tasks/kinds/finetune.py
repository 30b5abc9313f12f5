"""`finetune`: train on next tokens, all weights or an adapter that is merged afterwards."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from compression.checkpoints.checkpoint import Checkpoint
from compression.context import Context
from compression.data import DataSpec
from compression.finetuning.methods import FinetuningMethod, check_method
from tasks.kinds._training import TrainingStage
from tasks.stage import Inputs, Planned, Workplace


class Finetune(TrainingStage):
    """Fine-tune with adapters (kept in `adapter/`, merged in full precision) or in full. A sparse model stays as sparse."""

    uses: Literal["finetune"] = "finetune"
    version: ClassVar[int] = 2
    metrics: ClassVar[tuple[str, ...]] = (*TrainingStage.metrics, "trainable_parameters")
    libraries: ClassVar[tuple[str, ...]] = (*TrainingStage.libraries, "peft")

    method: Annotated[
        FinetuningMethod,
        Field(
            description="`lora` trains low-rank adapters, `dora` their rows' norms too, `qlora` adapters over a 4-bit base, `full` every weight."
        ),
    ] = "lora"
    rank: Annotated[int, Field(ge=1, description="Rank of the adapters.")] = 16
    rank_pattern: Annotated[
        dict[str, int], Field(default_factory=dict, description="Other ranks, by name or pattern of the layer: {mlp.down_proj: 32}.")
    ]
    alpha: Annotated[int, Field(ge=1, description="The adapters' update is scaled by alpha / rank.")] = 32
    dropout: Annotated[float, Field(ge=0, lt=1, description="Dropout before the adapters.")] = 0.0
    target_modules: Annotated[str | list[str], Field(description="`all-linear`, a pattern of paths, or names of layers.")] = "all-linear"

    def deciding_libraries(self) -> tuple[str, ...]:
        return (*self.libraries, "bitsandbytes") if self.method == "qlora" else self.libraries

    def plan(self, parent: Checkpoint, others: Mapping[str, Planned], data: DataSpec) -> Planned:
        self.check_data(parent, others, data)
        check_method(parent, self.method, self.target_modules)
        return parent

    def run(self, inputs: Inputs, place: Workplace, data: DataSpec, context: Context) -> dict[str, float]:
        from compression.finetuning.finetune import finetune

        return self.train(
            finetune, inputs.parent, place.out, **self.rows(inputs, data, context), method=self.method, rank=self.rank,
            rank_pattern=self.rank_pattern, alpha=self.alpha, dropout=self.dropout, target_modules=self.target_modules,
            settings=self.settings(), workdir=place.work, context=context,
            adapter_out=None if self.method == "full" else place.out / "adapter",
        )  # fmt: skip
