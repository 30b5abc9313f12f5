"""Move per-channel scales from a norm or linear layer into the linear layers that read it; the block still computes the same function."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from compression.calibration.walk import Block
from compression.checkpoints.families import Family


@dataclass(frozen=True)
class ScalePair:
    """A norm or linear layer, and the linear layers that read its output and nothing else.

    Attributes:
        producer: The norm or linear layer.
        consumers: The paths of `layers` in the block.
        layers: The linear layers that read it.
        rows: The producer's output channels that the consumers read; in a fused layer its last ones.
        offset: A norm multiplies by offset + weight.
    """

    producer: nn.Module
    consumers: tuple[str, ...]
    layers: tuple[nn.Linear, ...]
    rows: slice
    offset: float

    @torch.no_grad()
    def fold(self, scales: torch.Tensor) -> None:
        """Multiply the consumers' input channels by `scales` [in] and divide the producer's outputs by them."""
        for parameter in self.producer.parameters(recurse=False):
            divisor = scales if parameter.dim() == 1 else scales[:, None]
            parameter[self.rows] = (parameter[self.rows] + self.offset) / divisor - self.offset
        for layer in self.layers:
            layer.weight.mul_(scales)


def scale_pairs(block: Block, family: Family) -> Iterator[ScalePair]:
    """Yield the pairs of a block through which scales can move.

    Left out: v -> o under grouped-query attention, where one value channel feeds several heads.
    """
    for path, consumers in family.scale_pairs:
        producer = block.module.get_submodule(path)
        layers = tuple(block.linear(consumer) for consumer in consumers)
        width = layers[0].in_features
        if not isinstance(producer, nn.Linear):
            yield ScalePair(producer, consumers, layers, slice(None), family.norm_offset)
        elif producer.out_features == family.parts(path) * width:
            yield ScalePair(producer, consumers, layers, slice(producer.out_features - width, None), 0.0)
