"""When memory runs out: telling it from other failures, and the size of batch that fits."""

import gc
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

_SAID = ("out of memory", "DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory")


class BatchTooLarge(Exception):
    """Memory ran out in the forward or backward pass of a batch that can be divided."""


@dataclass(frozen=True)
class BatchPlan:
    """The size of batch that a training has come down to. Part of its checkpoints: what did not fit once is not tried again."""

    batch_size: int
    oom_retries: int = 0

    def halved(self) -> "BatchPlan":
        """Half the size, or the largest divisor below it, so that a step has as many rows."""
        size = max(divisor for divisor in range(1, self.batch_size // 2 + 1) if self.batch_size % divisor == 0)
        return BatchPlan(size, self.oom_retries + 1)

    def save(self, directory: Path) -> None:
        (directory / "fit.json").write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, directory: Path) -> "BatchPlan":
        return cls(**json.loads((directory / "fit.json").read_text()))


def is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in _SAID)


def free_memory() -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
