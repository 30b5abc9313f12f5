"""The terms of L = α·L_KD + β·L_task + γ·L_feature as functions on tensors: one value a position, in float32 or better."""

import math
from collections.abc import Callable

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from compression.distillation.settings import Divergence

MAX_LOGITS = 2**24  # elements of a chunk of logits: 64 MB in float32


def log_probabilities(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """log softmax(logits/τ) over the last dimension."""
    return functional.log_softmax(_precise(logits) / temperature, dim=-1)


def kd_loss(
    student: torch.Tensor, teacher: torch.Tensor, temperature: float, divergence: Divergence = "forward", jsd_beta: float = 0.5
) -> torch.Tensor:
    """Compute L_KD = τ²·D(teacher, student); τ² keeps the size of the gradient when the temperature τ changes.

    Args:
        student: Log-probabilities at the temperature, [..., outcomes].
        teacher: Log-probabilities at the temperature, [..., outcomes].
        temperature: τ.
        divergence: forward: KL(teacher ‖ student), Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network" (2015).
            reverse: KL(student ‖ teacher), token by token, Gu et al., "MiniLLM" (arXiv 2306.08543).
            js: m·KL(teacher ‖ M) + (1-m)·KL(student ‖ M) with M = m·teacher + (1-m)·student, the generalized Jensen-Shannon divergence
            of Agarwal et al., "On-Policy Distillation of Language Models" (arXiv 2306.13649).
        jsd_beta: m, of `js`.

    Returns:
        The loss of each position, [...].
    """
    if divergence == "forward":
        distance = _kl(teacher, student)
    elif divergence == "reverse":
        distance = _kl(student, teacher)
    else:
        middle = torch.logaddexp(teacher + math.log(jsd_beta), student + math.log(1 - jsd_beta))
        distance = jsd_beta * _kl(teacher, middle) + (1 - jsd_beta) * _kl(student, middle)
    return temperature**2 * distance


def merge_tail(log_probs: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Return the log-probabilities of k outcomes, and of all others as one: [n, vocabulary] and int64 [n, k] -> [n, k + 1].

    A divergence between two such distributions is exact for them, and at most that between the full distributions (data processing
    inequality); the two are equal where student and teacher spread the tail in the same proportions.
    """
    rest = log_probs.scatter(-1, indices, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([log_probs.gather(-1, indices), rest], dim=-1)


def cross_entropy(student_logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Compute L_task = -log softmax(student)[target], [n, vocabulary] and int64 [n] -> [n]. The caller shifts the targets."""
    return functional.cross_entropy(_precise(student_logits), targets, reduction="none")


def mean_squares(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Compute the mean over features of (student - teacher)², [..., features] twice -> [...], of hidden states.

    Romero et al., "FitNets" (2015); Jiao et al., "TinyBERT" (2020). Widths are equal: a projector is applied before.
    """
    return (_precise(student) - _precise(teacher)).square().mean(-1)


def cosine_distance(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """1 - cos(student, teacher), [..., features] twice -> [...]: of hidden states (Sanh et al., "DistilBERT", 2019) and gradients."""
    return 1 - functional.cosine_similarity(_precise(student), _precise(teacher), dim=-1)


def attention_distance(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Sum over keys of (student - teacher)², [..., keys] twice -> [...]: of attention maps that are averaged over their heads.

    Jiao et al., "TinyBERT" (2020) compares head by head, and takes the mean over keys. Pruning leaves other numbers of heads, and
    rows of a map sum to one, so that their mean square would fall with the length.
    """
    return (_precise(student) - _precise(teacher)).square().sum(-1)


def sum_in_chunks(loss: Callable[..., torch.Tensor], size: int, *tensors: torch.Tensor) -> torch.Tensor:
    """Σ loss(*chunk) over chunks of at most `size` along the first dimension, so that what a chunk needs inside, logits over a
    large vocabulary above all, is alive for one chunk at a time, in the backward pass too (it is computed again there: Chen et al.,
    "Training Deep Nets with Sublinear Memory Cost", 2016). A single chunk is computed once.
    """
    if len(tensors[0]) <= size:
        return loss(*tensors)
    chunks = zip(*(tensor.split(size) for tensor in tensors), strict=True)
    return torch.stack([checkpoint(loss, *chunk, use_reentrant=False) for chunk in chunks]).sum(0)


def _kl(of: torch.Tensor, to: torch.Tensor) -> torch.Tensor:
    """KL(of ‖ to) = Σ of·(log of - log to)."""
    return functional.kl_div(to, of, reduction="none", log_target=True).sum(-1)


def _precise(tensor: torch.Tensor) -> torch.Tensor:
    """Return float32 where autocast gave less; float64 stays."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
