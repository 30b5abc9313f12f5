"""Sparse stays sparse: the masks of a model's weights while it trains."""

from collections.abc import Mapping

import torch
from torch import nn

from compression.errors import UnusableModel

_KEPT = "kept"  # attribute of a parameter: its mask. It goes where the parameter goes, also into the layers that peft puts around it


def hold_masks(model: nn.Module, masks: Mapping[str, torch.Tensor]) -> None:
    """Let weights carry their masks, bool [out, in], true where a weight is kept, by parameter name; what is pruned becomes zero.

    Raises UnusableModel for a mask that is of no weight of the model.
    """
    weights = dict(model.named_parameters())
    for name, mask in masks.items():
        if name not in weights or weights[name].shape != mask.shape:
            raise UnusableModel(f"there is a mask {list(mask.shape)} for {name}, and the model has no such weight", key="model")
        setattr(weights[name], _KEPT, mask.to(weights[name].device))
    zero_pruned(model)


def held_masks(model: nn.Module) -> dict[str, torch.Tensor]:
    """The masks that a model's weights carry, by parameter name; those tensors themselves, not copies."""
    return {name: getattr(weight, _KEPT) for name, weight in model.named_parameters() if hasattr(weight, _KEPT)}


@torch.no_grad()
def zero_pruned(model: nn.Module) -> None:
    """Set the weights that their masks prune to zero."""
    for weight in model.parameters():
        if hasattr(weight, _KEPT):
            weight.masked_fill_(~getattr(weight, _KEPT), 0)


class HeldMasks:
    """Keeps the pruned weights of a module at zero while an optimizer trains it.

    Their gradients are zeroed before gradients are clipped, and they themselves after each step: their moments stay zero, they count
    in no norm, and weight decay finds nothing. Steps are numbered from 1.
    """

    def __init__(self, module: nn.Module):
        self.masks = held_masks(module)
        weights = dict(module.named_parameters())
        self.weights = {name: weights[name] for name in self.masks if weights[name].requires_grad}

    @torch.no_grad()
    def start(self, optimizer: torch.optim.Optimizer) -> None:
        """Once optimizer and weights are loaded, maybe those of a denser model: zero what is pruned, moments too."""
        for name, weight in self.weights.items():
            pruned = ~self.masks[name]
            weight.masked_fill_(pruned, 0)
            zero_moments(optimizer, weight, pruned)

    @torch.no_grad()
    def mask_gradients(self, step: int) -> None:
        for name, weight in self.weights.items():
            if weight.grad is not None:
                weight.grad.masked_fill_(~self.masks[name], 0)

    def before_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Between clipping and the optimizer's step."""

    @torch.no_grad()
    def after_step(self) -> None:
        for name, weight in self.weights.items():
            weight.masked_fill_(~self.masks[name], 0)

    def state(self) -> dict[str, torch.Tensor]:
        """What of the masks a checkpoint must hold: nothing of those that stay as they came."""
        return {}

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take up what `state` gave."""


def zero_moments(optimizer: torch.optim.Optimizer, weight: nn.Parameter, where: torch.Tensor) -> None:
    """Let the optimizer forget the moments of the weights that `where` names."""
    for moment in optimizer.state.get(weight, {}).values():
        if isinstance(moment, torch.Tensor) and moment.shape == weight.shape:
            moment.masked_fill_(where, 0)
