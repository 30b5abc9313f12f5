"""The neurons and heads of a block: the tensors that hold them, and the rows and columns that stay when some of them leave."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from compression.checkpoints.checkpoint import Checkpoint
from compression.pruning.settings import Heads
from compression.pruning.structure import head_counts


@dataclass(frozen=True)
class Units:
    """The neurons and heads that leave the blocks of a checkpoint.

    Attributes:
        source: The checkpoint.
        config: Its config when they have left (`width_config`).
        heads: What leaves of attention: a key/value head with its query heads ("groups"), or single query heads ("queries").
    """

    source: Checkpoint
    config: Mapping[str, Any]
    heads: Heads

    @property
    def counts(self) -> dict[str, int]:
        """The number of units to choose from, by the projection that reads their output."""
        queries, groups = head_counts(self.source.config)
        counts = {self.source.family.down: self.source.intermediate_size}
        if head_counts(self.config) != (queries, groups):
            counts[self.source.family.out] = groups if self.heads == "groups" else queries
        return counts

    @property
    def layers(self) -> set[str]:
        """Paths of the layers of a block that get smaller."""
        family = self.source.family
        attention = {family.out, *family.qkv, *self._norms()} if family.out in self.counts else set()
        return attention | {family.down, *family.gate_up}

    def incoming(self, path: str, weights: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """Return the weights whose rows belong to the units in front of the projection `path`: gate and up, or query, key and value."""
        family = self.source.family
        if path == family.down:
            return _parts(family.gate_up, weights, [self.source.intermediate_size] * 2)
        parts = _parts(family.qkv, weights, [heads * self.source.head_dim for heads in self._heads_of_parts()])
        return parts if self.heads == "groups" else parts[:1]  # keys and values stay when single query heads leave

    def best(self, scores: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the neurons and query heads that stay in a block, int64, ascending, by projection."""
        family = self.source.family
        left = {family.down: strongest(scores[family.down], self.config["intermediate_size"])}
        if family.out in scores:
            (queries, groups), (queries_left, groups_left) = head_counts(self.source.config), head_counts(self.config)
            per_group = queries // groups
            if self.heads == "groups":
                left[family.out] = _spread(strongest(scores[family.out], groups_left), per_group)
            else:
                of_groups = scores[family.out].view(groups, per_group)
                left[family.out] = torch.cat([strongest(row, queries_left // groups) + n * per_group for n, row in enumerate(of_groups)])
        return left

    def slices(self, left: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, torch.Tensor]]:
        """Return the dimension and the indices to which each layer of a block is cut, by path.

        Layers that make the units lose rows, the one that reads them columns.
        """
        family, d = self.source.family, self.source.head_dim
        neurons = left[family.down]
        slices = _rows(family.gate_up, [(neurons, self.source.intermediate_size)] * 2) | {family.down: (1, neurons)}
        if family.out in left:
            queries, groups = head_counts(self.source.config)
            of_heads = _spread(left[family.out], d)
            of_groups = _spread((left[family.out] // (queries // groups)).unique(), d)
            parts = list(zip((of_heads, of_groups, of_groups), (heads * d for heads in self._heads_of_parts()), strict=True))
            slices |= _rows(family.qkv, parts) | {family.out: (1, of_heads)}
            slices |= {path: (0, rows) for path, rows in zip(self._norms(), (of_heads, of_groups), strict=False)}
        return slices

    def _heads_of_parts(self) -> tuple[int, int, int]:
        queries, groups = head_counts(self.source.config)
        return queries, groups, groups

    def _norms(self) -> tuple[str, ...]:
        """Return the norms with a weight for every channel of all query heads, and of all key heads."""
        return ("self_attn.q_norm", "self_attn.k_norm") if self.source.family.qk_norm == "full" else ()


def strongest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Return the indices of the `count` largest values, ascending; of equal values the first."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def _parts(paths: Sequence[str], weights: Mapping[str, torch.Tensor], rows: Sequence[int]) -> list[torch.Tensor]:
    """Return projections of `rows` rows each, whether they are separate layers or stacked in one."""
    return [weights[path] for path in paths] if len(paths) > 1 else list(weights[paths[0]].split(list(rows)))


def _rows(paths: Sequence[str], parts: Sequence[tuple[torch.Tensor, int]]) -> dict[str, tuple[int, torch.Tensor]]:
    """Return the row slices of projections (rows that stay, all rows), whether they are separate layers or stacked in one."""
    if len(paths) > 1:
        return {path: (0, rows) for path, (rows, _) in zip(paths, parts, strict=True)}
    starts = [sum(count for _, count in parts[:number]) for number in range(len(parts))]
    return {paths[0]: (0, torch.cat([rows + start for start, (rows, _) in zip(starts, parts, strict=True)]))}


def _spread(units: torch.Tensor, size: int) -> torch.Tensor:
    """Return the indices of the channels of units, which have `size` neighbouring channels each."""
    return (units[:, None] * size + torch.arange(size)).flatten()
