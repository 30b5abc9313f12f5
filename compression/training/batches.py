"""The rows of a training, and which of them each step gets."""

from dataclasses import dataclass

import torch
from torch.utils.data import Dataset

from compression.errors import UnusableData
from compression.training.settings import TrainingSettings

POOL = 50  # batches whose rows are sorted by length together: similar lengths, and still another mix in every permutation
HeldOut = tuple[torch.Tensor, torch.Tensor | None]


@dataclass(frozen=True)
class TrainingRows:
    """Rows of tokens to train on.

    Attributes:
        rows: Packed tokens, int64 [n, length].
        mask: bool [n, length], true where a token is a target (not prompt, not padding); None makes all targets.
        validation: Further rows and their mask, for early stopping; read where `TrainingSettings.evaluate_every` is set.
    """

    rows: torch.Tensor
    mask: torch.Tensor | None = None
    validation: HeldOut | None = None


def check_rows(rows: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Return the loss mask as bool [n, length]. Raises UnusableData where rows and mask cannot be trained on."""
    if rows.ndim != 2 or rows.dtype != torch.int64 or rows.shape[0] < 1 or rows.shape[1] < 2:
        raise UnusableData(
            f"training rows are {rows.dtype} {list(rows.shape)}; int64 [rows, length], two tokens or longer, is needed", key="data"
        )
    if mask is None:
        return torch.ones_like(rows, dtype=torch.bool)
    if mask.shape != rows.shape:
        raise UnusableData(f"the loss mask is {list(mask.shape)} and the training rows are {list(rows.shape)}; they must agree", key="data")
    if not mask[:, 1:].any():
        raise UnusableData("the loss mask leaves no token to learn from: every prompt fills its row; make the rows longer", key="data")
    return mask.bool()


class Batches(Dataset):
    """Every row of a training in order: permutation after permutation, as one epoch.

    One epoch has no remainder batch at its seams, and resuming skips the first k batches. The order is an order of rows, so that a
    step gets the same rows however they are divided into batches and processes.

    Args:
        rows: Packed tokens, int64 [n, length].
        mask: bool [n, length], true where a token is a target.
        settings: Steps, batch sizes, and whether to group by length.
        seed: Decides the permutations.
        processes: Number of processes that train together; each takes every `processes`-th batch.
    """

    def __init__(self, rows: torch.Tensor, mask: torch.Tensor, settings: TrainingSettings, seed: int, processes: int = 1):
        self.rows, self.mask = rows, mask
        self.needed = settings.steps * settings.gradient_accumulation * settings.batch_size * processes
        generator = torch.Generator().manual_seed(seed)
        rounds = -(-self.needed // len(rows))
        order = torch.cat([torch.randperm(len(rows), generator=generator) for _ in range(rounds)])[: self.needed]
        lengths = used_lengths(mask)
        if settings.group_by_length and lengths.unique().numel() > 1:
            step = settings.gradient_accumulation * settings.batch_size * processes
            order = _group_by_length(order, lengths, settings.batch_size, POOL * step, generator)
        self.order = order

    def __len__(self) -> int:
        return self.needed

    def __getitems__(self, positions: list[int]) -> dict[str, torch.Tensor]:
        return batch_of(self.rows, self.mask, self.order[positions])


def batch_of(rows: torch.Tensor, mask: torch.Tensor, chosen: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the chosen rows, cut after the last target among them: what follows it decides nothing in a causal model."""
    tokens, targets = rows[chosen], mask[chosen]
    longest = max(2, int(used_lengths(targets).max()))
    return {"input_ids": tokens[:, :longest], "loss_mask": targets[:, :longest]}


def used_lengths(mask: torch.Tensor) -> torch.Tensor:
    """Return the number of tokens of each row up to its last target, int64 [n]."""
    return (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).amax(1)


def _group_by_length(order: torch.Tensor, lengths: torch.Tensor, batch_size: int, pool: int, generator: torch.Generator) -> torch.Tensor:
    """Sort the rows of `order` by length within pools of `pool` rows, and put the batches of a pool in a random order."""
    grouped = []
    for part in order.split(pool):
        batches = part[lengths[part].argsort(stable=True)].split(batch_size)
        grouped += [batches[number] for number in torch.randperm(len(batches), generator=generator).tolist()]
    return torch.cat(grouped)
