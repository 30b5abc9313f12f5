"""Running out of memory: recognise it, and find the size of batch that fits."""

import gc
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

_MESSAGES = ("out of memory", "DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory")


class BatchTooLarge(Exception):
    """Memory ran out in the forward or backward pass of a batch that can be divided."""


@dataclass(frozen=True)
class BatchPlan:
    """The size of batch that fits. Part of a training's checkpoints: a size that did not fit is not tried again."""

    batch_size: int
    oom_retries: int = 0

    def halved(self) -> "BatchPlan":
        """Return a plan of half the size, or of the largest divisor below it, so that a step has as many rows."""
        size = max(divisor for divisor in range(1, self.batch_size // 2 + 1) if self.batch_size % divisor == 0)
        return BatchPlan(size, self.oom_retries + 1)

    def save(self, directory: Path) -> None:
        (directory / "fit.json").write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, directory: Path) -> "BatchPlan":
        return cls(**json.loads((directory / "fit.json").read_text()))


def is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or any(message in str(error) for message in _MESSAGES)


def free_memory() -> None:
    """Release memory that nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
