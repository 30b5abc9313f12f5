"""SNIP: a weight is worth the change of the loss without it, to first order (Lee et al., arXiv 1810.02340)."""

from collections.abc import Iterable

import torch
from torch import nn

from compression.context import Context

WINDOWS_PER_BATCH = 8  # one loss is the mean over these


def gradient_scores(model: nn.Module, names: Iterable[str], windows: torch.Tensor, *, context: Context) -> dict[str, torch.Tensor]:
    """Compute |w · ∂L/∂w| of weights, the mean over batches of windows.

    L is the mean cross-entropy of the next token. Gradients are dropped weight by weight as the backward pass yields them.

    Args:
        model: A causal language model, float32.
        names: The weights.
        windows: Token ids, int64 [count, length].
        context: Device and progress.

    Returns:
        float32 scores in the shape of the weight, on the CPU, by its name.
    """
    model.requires_grad_(False)
    weights = {name: model.get_parameter(name).requires_grad_(True) for name in names}
    totals = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    batches = windows.split(WINDOWS_PER_BATCH)

    def add(name: str, weight: torch.Tensor) -> None:
        assert weight.grad is not None
        totals[name].add_(weight.grad.abs(), alpha=1 / len(batches))
        weight.grad = None

    hooks = [weight.register_post_accumulate_grad_hook(lambda weight, name=name: add(name, weight)) for name, weight in weights.items()]
    for number, batch in enumerate(batches):
        context.progress(number, len(batches), f"gradients of batch {number + 1} of {len(batches)}")
        ids = batch.to(context.device)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    for hook in hooks:
        hook.remove()
    return {name: totals.pop(name).mul_(weight.detach().abs()).cpu() for name, weight in weights.items()}
