"""How long and how fast a stage trains. Imports no torch: recipes are validated with it."""

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from compression.settings import Settings

Precision = Literal["float32", "bfloat16", "float16"]
Schedule = Literal["cosine", "linear", "constant"]


class TrainingSettings(Settings):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) under a linear warm-up and then a schedule.

    Every stage that trains has these keys in a recipe, and every training function takes them in its own settings object:

        steps: 300
        batch_size: 8
        learning_rate: 1.0e-4
        evaluate_every: 50      # with early stopping on the validation split:
        patience: 3

    Lifecycle: the learning rate rises over `warmup_ratio` of the steps and then follows `schedule`. A crash-safe checkpoint is written
    every `save_every` steps and at the last. With `evaluate_every`, training stops after `patience` evaluations without a lower loss.

    An optimizer step gets `batch_size * gradient_accumulation` rows; its loss is the mean over the targets of all of them.
    Where rows of the validation split are evaluated, training ends with the weights of the lowest validation loss.
    Weights and optimizer state are float32 in every precision.

    Raises:
        pydantic.ValidationError: A value is out of range.
    """

    steps: Annotated[int, Field(ge=1, description="Optimizer steps.")] = 300
    batch_size: Annotated[int, Field(ge=1, description="Rows in one forward pass.")] = 8
    gradient_accumulation: Annotated[int, Field(ge=1, description="Forward passes in one optimizer step.")] = 1
    learning_rate: Annotated[float, Field(gt=0, description="Peak of the schedule.")] = 1e-4
    schedule: Annotated[
        Schedule, Field(description="Of the learning rate after its rise: to zero along a cosine or a line, or constant.")
    ] = "cosine"
    warmup_ratio: Annotated[float, Field(ge=0, lt=1, description="Share of the steps over which the learning rate rises.")] = 0.05
    weight_decay: Annotated[float, Field(ge=0, description="AdamW's, on matrices.")] = 0.0
    max_grad_norm: Annotated[float, Field(ge=0, description="Gradients are clipped to this norm; 0 does not clip.")] = 1.0
    precision: Annotated[Precision, Field(description="Of matrix products; weights stay float32. float16 needs a GPU.")] = "float32"
    gradient_checkpointing: Annotated[
        bool, Field(description="Compute activations again in the backward pass instead of keeping them: less memory, more time.")
    ] = False
    group_by_length: Annotated[bool, Field(description="Batches of questions of like length: less padding is computed.")] = True
    save_every: Annotated[int, Field(ge=1, description="Steps between crash-safe checkpoints; the last step always has one.")] = 100
    save_minutes: Annotated[
        float, Field(ge=0, description="Also write a checkpoint when so many minutes passed since the last; 0 is never.")
    ] = 0.0
    evaluate_every: Annotated[
        int,
        Field(ge=0, description="Steps between evaluations of the loss on the validation split; the best weights are kept. 0 is never."),
    ] = 0
    patience: Annotated[int, Field(ge=0, description="Evaluations without a lower loss after which training stops; 0 is never.")] = 0

    @field_validator("patience")
    @classmethod
    def _patience_counts_evaluations(cls, patience: int, info: ValidationInfo) -> int:
        if patience and not info.data.get("evaluate_every", 1):
            raise ValueError("patience counts evaluations, and evaluate_every is 0: there are none; set it")
        return patience

    def of_batch_size(self, size: int) -> "TrainingSettings":
        """Return settings for the same rows a step in batches of `size`, a divisor of batch_size."""
        return self.model_copy(update={"batch_size": size, "gradient_accumulation": self.gradient_accumulation * self.batch_size // size})

    def training_values(self) -> dict[str, Any]:
        """Return the values of `TrainingSettings` alone, without those that a subclass adds."""
        return {name: getattr(self, name) for name in TrainingSettings.model_fields}
