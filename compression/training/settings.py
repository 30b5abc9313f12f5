"""How long and how fast a stage trains. Imports no torch: recipes are validated with it."""

from dataclasses import dataclass, fields, replace
from typing import Literal, get_args

from compression.errors import EdgepressError

Precision = Literal["float32", "bfloat16", "float16"]
Schedule = Literal["cosine", "linear", "constant"]


@dataclass(frozen=True)
class TrainingSettings:
    """AdamW (Loshchilov and Hutter, 2019) under a linear warm-up and then a schedule.

    steps                   optimizer steps
    batch_size              rows in one forward pass (of one process)
    gradient_accumulation   forward passes in one optimizer step; the loss is the mean over the tokens of all of them
    learning_rate           at its peak
    schedule                after the warm-up: down to zero along a cosine or a line, or constant
    warmup_ratio            share of `steps` over which the learning rate rises, in [0, 1)
    weight_decay            of every matrix; norms and biases are left out
    max_grad_norm           gradients are clipped to this norm; 0 leaves them
    precision               of the matrix products (autocast); weights and optimizer state are float32 in every case
    gradient_checkpointing  activations are computed again in the backward pass instead of kept: less memory, the same weights
    group_by_length         batches hold rows of like length, where rows differ: less padding is computed
    save_every              steps between crash-safe checkpoints; the last step always has one
    save_minutes            also a checkpoint when this much time has passed since the last; 0 is never
    evaluate_every          steps between evaluations on validation rows, the last step among them; 0 is never.
                            Where there are any, the weights of the lowest validation loss are what the training ends with
    patience                evaluations without a lower loss after which training stops; 0 is never

    Raises EdgepressError for a value out of range.
    """

    steps: int = 300
    batch_size: int = 8
    gradient_accumulation: int = 1
    learning_rate: float = 1e-4
    schedule: Schedule = "cosine"
    warmup_ratio: float = 0.05
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    precision: Precision = "float32"
    gradient_checkpointing: bool = False
    group_by_length: bool = False
    save_every: int = 100
    save_minutes: float = 0.0
    evaluate_every: int = 0
    patience: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "gradient_accumulation", "save_every"):
            if getattr(self, name) < 1:
                raise EdgepressError(f"{name} is {getattr(self, name)}; at least 1 is needed", key=name)
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int | float) and value < 0:
                raise EdgepressError(f"{field.name} is {value}; it cannot be negative", key=field.name)
        if self.warmup_ratio >= 1:
            raise EdgepressError(f"warmup_ratio is {self.warmup_ratio}; it is a share of the steps, below 1", key="warmup_ratio")
        for name, choices in (("precision", get_args(Precision)), ("schedule", get_args(Schedule))):
            if getattr(self, name) not in choices:
                raise EdgepressError(f"{name} is {getattr(self, name)!r}; {', '.join(choices)} can be chosen", key=name)
        if self.patience and not self.evaluate_every:
            raise EdgepressError("patience counts evaluations, and evaluate_every is 0: there are none; set it", key="patience")

    def of_batch_size(self, size: int) -> "TrainingSettings":
        """The same rows a step in batches of `size`, a divisor of batch_size."""
        return replace(self, batch_size=size, gradient_accumulation=self.gradient_accumulation * self.batch_size // size)
