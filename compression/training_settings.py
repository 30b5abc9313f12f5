"""How long and how fast a stage trains. Imports no torch: recipes are validated with it."""

from dataclasses import dataclass, fields
from typing import Literal

from compression.errors import EdgepressError

Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class TrainingSettings:
    """AdamW (Loshchilov and Hutter, 2019) under a linear warm-up and a cosine decay to zero.

    steps                  optimizer steps
    batch_size             rows in one forward pass
    gradient_accumulation  forward passes in one optimizer step; the loss is the mean over the tokens of all of them
    learning_rate          at its peak
    warmup_ratio           share of `steps` over which the learning rate rises, in [0, 1)
    weight_decay           of every matrix; norms and biases are left out
    max_grad_norm          gradients are clipped to this norm; 0 leaves them
    precision              of the matrix products (autocast); weights and optimizer state are float32 in either case
    save_every             steps between crash-safe checkpoints; the last step always has one

    Raises EdgepressError for a value out of range.
    """

    steps: int = 300
    batch_size: int = 8
    gradient_accumulation: int = 1
    learning_rate: float = 1e-4
    warmup_ratio: float = 0.05
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    precision: Precision = "float32"
    save_every: int = 100

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "gradient_accumulation", "save_every"):
            if getattr(self, name) < 1:
                raise EdgepressError(f"{name} is {getattr(self, name)}; at least 1 is needed", key=name)
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float) and value < 0:
                raise EdgepressError(f"{field.name} is {value}; it cannot be negative", key=field.name)
        if self.warmup_ratio >= 1:
            raise EdgepressError(f"warmup_ratio is {self.warmup_ratio}; it is a share of the steps, below 1", key="warmup_ratio")
        if self.precision not in ("float32", "bfloat16"):
            raise EdgepressError(f"precision is {self.precision!r}; float32 or bfloat16 is needed", key="precision")
