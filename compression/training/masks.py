"""Sparse stays sparse: the masks of a model's weights while it trains."""

from collections.abc import Mapping

import torch
from torch import nn

from compression.errors import UnusableModel

_MASK = "kept"  # attribute of a parameter: its mask. It follows the parameter, also into the layers that peft puts around it


def attach_masks(model: nn.Module, masks: Mapping[str, torch.Tensor]) -> None:
    """Attach masks to the weights of a model, and set what they prune to zero.

    Args:
        model: Its parameters get the masks.
        masks: bool [out, in] by parameter name, true where a weight is kept.

    Raises:
        UnusableModel: The model has no weight of a mask's name and shape.
    """
    weights = dict(model.named_parameters())
    for name, mask in masks.items():
        if name not in weights or weights[name].shape != mask.shape:
            raise UnusableModel(f"there is a mask {list(mask.shape)} for {name}, and the model has no such weight", key="model")
        setattr(weights[name], _MASK, mask.to(weights[name].device))
    zero_pruned(model)


def attached_masks(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the masks attached to a model's weights, by parameter name: the tensors themselves, not copies."""
    return {name: getattr(weight, _MASK) for name, weight in model.named_parameters() if hasattr(weight, _MASK)}


@torch.no_grad()
def zero_pruned(model: nn.Module) -> None:
    """Set the weights that their masks prune to zero."""
    for weight in model.parameters():
        if hasattr(weight, _MASK):
            weight.masked_fill_(~getattr(weight, _MASK), 0)


class FixedMasks:
    """Keeps the pruned weights of a module at zero while an optimizer trains it.

    Gradients of pruned weights are zeroed before gradients are clipped, the weights themselves after each step: their moments stay zero,
    they count in no norm, and weight decay does not change them. Steps are numbered from 1. A subclass may move the masks (RigL).
    """

    def __init__(self, module: nn.Module):
        self.masks = attached_masks(module)
        weights = dict(module.named_parameters())
        self.weights = {name: weights[name] for name in self.masks if weights[name].requires_grad}

    @torch.no_grad()
    def start(self, optimizer: torch.optim.Optimizer) -> None:
        """Zero what is pruned, moments too. Called once optimizer and weights are loaded, which may be those of a denser model."""
        for name, weight in self.weights.items():
            pruned = ~self.masks[name]
            weight.masked_fill_(pruned, 0)
            zero_moments(optimizer, weight, pruned)

    @torch.no_grad()
    def mask_gradients(self, step: int) -> None:
        """Zero the gradients of pruned weights. Called before clipping."""
        for name, weight in self.weights.items():
            if weight.grad is not None:
                weight.grad.masked_fill_(~self.masks[name], 0)

    def before_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Do nothing. Called between clipping and the optimizer's step."""

    @torch.no_grad()
    def after_step(self) -> None:
        """Zero the pruned weights. Called after the optimizer's step."""
        for name, weight in self.weights.items():
            weight.masked_fill_(~self.masks[name], 0)

    def state(self) -> dict[str, torch.Tensor]:
        """Return what a checkpoint must hold of the masks: nothing, since they stay the same."""
        return {}

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restore what `state` returned."""


def zero_moments(optimizer: torch.optim.Optimizer, weight: nn.Parameter, pruned: torch.Tensor) -> None:
    """Zero an optimizer's moments of a weight where `pruned`, a bool of its shape, is true."""
    for moment in optimizer.state.get(weight, {}).values():
        if isinstance(moment, torch.Tensor) and moment.shape == weight.shape:
            moment.masked_fill_(pruned, 0)
