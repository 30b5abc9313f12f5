"""The terms of L = α·L_KD + β·L_task + γ·L_feature as functions on tensors: one value a position, in float32 or better."""

from collections.abc import Callable

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint


def kl_divergence(student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """L_KD = τ²·KL(softmax(teacher/τ) ‖ softmax(student/τ)), [..., vocabulary] twice -> [...].

    Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network" (2015). τ² keeps the size of the gradient when
    the temperature changes.
    """
    student = functional.log_softmax(_precise(student_logits) / temperature, dim=-1)
    teacher = functional.log_softmax(_precise(teacher_logits) / temperature, dim=-1)
    return temperature**2 * functional.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)


def cross_entropy(student_logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """L_task = -log softmax(student)[target], [n, vocabulary] and int64 [n] -> [n]. The caller has shifted the targets."""
    return functional.cross_entropy(_precise(student_logits), targets, reduction="none")


def hidden_mse(student_hidden: torch.Tensor, teacher_hidden: torch.Tensor) -> torch.Tensor:
    """L_feature = mean over features of (student - teacher)², [..., features] twice -> [...].

    Romero et al., "FitNets" (2015); Jiao et al., "TinyBERT" (2020). Widths are equal: a projector comes before.
    """
    return (_precise(student_hidden) - _precise(teacher_hidden)).square().mean(-1)


def sum_in_chunks(loss: Callable[..., torch.Tensor], size: int, *tensors: torch.Tensor) -> torch.Tensor:
    """Σ loss(*chunk) over chunks of at most `size` along the first dimension, so that what a chunk needs inside, logits over a
    large vocabulary above all, is alive for one chunk at a time, in the backward pass too (it is computed again there: Chen et al.,
    "Training Deep Nets with Sublinear Memory Cost", 2016). A single chunk is computed once.
    """
    if len(tensors[0]) <= size:
        return loss(*tensors)
    chunks = zip(*(tensor.split(size) for tensor in tensors), strict=True)
    return torch.stack([checkpoint(loss, *chunk, use_reentrant=False) for chunk in chunks]).sum(0)


def _precise(tensor: torch.Tensor) -> torch.Tensor:
    """float32 where autocast gave less; float64 stays."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
