"""What the processes of one training exchange; a process that trains alone gets its own values back."""

from typing import Any, TypeVar

import torch
from torch import distributed

Value = TypeVar("Value")


def count() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def is_first() -> bool:
    """Return whether this process is the one that writes and reports."""
    return rank() == 0


def summed(value: torch.Tensor) -> torch.Tensor:
    """Return the sum of every process's value."""
    if count() == 1:
        return value
    total = value.clone() if distributed.get_backend() == "gloo" else value.cuda()
    distributed.all_reduce(total)
    return total.to(value.device)


def agreed(value: Value) -> Value:
    """Return the first process's value."""
    if count() == 1:
        return value
    values: list[Any] = [value]
    distributed.broadcast_object_list(values)
    return values[0]


def gathered(value: Value) -> list[Value]:
    """Return every process's value, by rank."""
    if count() == 1:
        return [value]
    values: list[Any] = [None] * count()
    distributed.all_gather_object(values, value)
    return values


def wait() -> None:
    """Block until every process is here."""
    if count() > 1:
        distributed.barrier()
