"""Parameters that every training stage has, and the rows it trains on."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from compression.checkpoint import Checkpoint
from compression.context import Context
from compression.data import DataSpec
from compression.errors import Incompatible
from compression.training_settings import TrainingSettings
from tasks.stage import Reads, Stage

if TYPE_CHECKING:
    from torch import Tensor


class TrainingStage(Stage):
    """Base of stages that train. A subclass adds its loss."""

    reads: ClassVar[Reads] = "training"
    libraries: ClassVar[tuple[str, ...]] = ("torch", "transformers", "accelerate", "tokenizers")

    train_on: Annotated[Literal["text", "questions"], Field(description="Running text, or questions with the prompt masked.")] = "text"
    steps: Annotated[int, Field(ge=1, description="Optimizer steps.")] = 300
    batch_size: Annotated[int, Field(ge=1, description="Rows in one forward pass.")] = 8
    gradient_accumulation: Annotated[int, Field(ge=1, description="Forward passes in one optimizer step.")] = 1
    learning_rate: Annotated[float, Field(gt=0, description="Peak of the cosine schedule.")] = 1e-4
    warmup_ratio: Annotated[float, Field(ge=0, lt=1, description="Share of the steps over which the learning rate rises.")] = 0.05
    weight_decay: Annotated[float, Field(ge=0, description="AdamW's, on matrices.")] = 0.0
    precision: Annotated[Literal["float32", "bfloat16"], Field(description="Of matrix products; weights stay float32.")] = "float32"
    save_every: Annotated[int, Field(ge=1, description="Steps between crash-safe checkpoints.")] = 100

    def settings(self) -> TrainingSettings:
        names = ("steps", "batch_size", "gradient_accumulation", "learning_rate", "warmup_ratio", "weight_decay", "precision", "save_every")
        return TrainingSettings(**{name: getattr(self, name) for name in names})

    def check_data(self, parent: Checkpoint, data: DataSpec) -> None:
        """Refuse what the recipe's data does not hold, and rows longer than the model's positions."""
        if self.train_on == "questions" and data.questions is None:
            raise Incompatible("train_on: questions needs `data.questions` in the recipe", key="train_on")
        if data.length > parent.max_length:
            raise Incompatible(
                f"rows of data.length {data.length} are longer than the model's {parent.max_length} positions", key="train_on"
            )

    def rows(self, model: Path, data: DataSpec, context: Context) -> "dict[str, Any]":
        """`rows` and `mask`, as the training functions take them."""
        from compression.data import question_rows, training_rows
        from compression.loading import load_tokenizer

        tokenizer = load_tokenizer(model)
        mask: Tensor | None = None
        if self.train_on == "questions":
            rows, mask = question_rows(data, tokenizer)
        else:
            rows = training_rows(data, tokenizer)
        return {"rows": rows, "mask": mask}
