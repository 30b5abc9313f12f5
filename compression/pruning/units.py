"""The neurons and heads of a block: which tensors they are made of, and which rows and columns stay when some of them leave."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from compression.checkpoints.checkpoint import Checkpoint
from compression.pruning.settings import Heads
from compression.pruning.structure import head_counts


@dataclass(frozen=True)
class Units:
    """What leaves the blocks of `source`, whose config becomes `config`.

    heads  what leaves of attention: a key/value head with its query heads ("groups"), or single query heads ("queries")
    """

    source: Checkpoint
    config: Mapping[str, Any]
    heads: Heads

    @property
    def counts(self) -> dict[str, int]:
        """How many units there are to choose from, by the projection that reads their output."""
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
        """The weights whose rows belong to the units in front of the projection `path`: gate and up, or query, key and value."""
        family = self.source.family
        if path == family.down:
            return _parts(family.gate_up, weights, [self.source.intermediate_size] * 2)
        parts = _parts(family.qkv, weights, [heads * self.source.head_dim for heads in self._heads_of_parts()])
        return parts if self.heads == "groups" else parts[:1]  # keys and values stay when single query heads leave

    def best(self, scores: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Neurons and query heads that stay in a block, int64, ascending, by projection."""
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
        """The dimension and indices at which each layer of a block is cut, by path: rows of what makes the units, columns of what reads them."""
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
        """Norms with a weight for every channel of all query heads, and of all key heads."""
        return ("self_attn.q_norm", "self_attn.k_norm") if self.source.family.qk_norm == "full" else ()


def strongest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the `count` largest values, ascending; of equal ones the first."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def _parts(paths: Sequence[str], weights: Mapping[str, torch.Tensor], rows: Sequence[int]) -> list[torch.Tensor]:
    """Projections of `rows` rows each, whether they are layers of their own or stacked in one."""
    return [weights[path] for path in paths] if len(paths) > 1 else list(weights[paths[0]].split(list(rows)))


def _rows(paths: Sequence[str], parts: Sequence[tuple[torch.Tensor, int]]) -> dict[str, tuple[int, torch.Tensor]]:
    """Row slices of projections (rows that stay, rows there are), which are layers of their own or stacked in one."""
    if len(paths) > 1:
        return {path: (0, rows) for path, (rows, _) in zip(paths, parts, strict=True)}
    starts = [sum(count for _, count in parts[:number]) for number in range(len(parts))]
    return {paths[0]: (0, torch.cat([rows + start for start, (rows, _) in zip(starts, parts, strict=True)]))}


def _spread(units: torch.Tensor, size: int) -> torch.Tensor:
    """The indices that units of `size` neighbours stand for."""
    return (units[:, None] * size + torch.arange(size)).flatten()
