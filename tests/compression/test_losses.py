"""Every loss against its formula in float64 numpy, its gradient against finite differences, and what it needs of the memory."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from compression.distillation.losses import (
    attention_distance,
    cosine_distance,
    cross_entropy,
    kd_loss,
    log_probabilities,
    mean_squares,
    merge_tail,
    sum_in_chunks,
)  # fmt: skip
from compression.distillation.settings import Divergence
from tests.trainings import build_objective

DIVERGENCES: list[Divergence] = ["forward", "reverse", "js"]


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def reference_kl(student: np.ndarray, teacher: np.ndarray, temperature: float) -> np.ndarray:
    return reference("forward", softmax(student / temperature), softmax(teacher / temperature), temperature)


def reference(divergence: Divergence, student: np.ndarray, teacher: np.ndarray, temperature: float, jsd_beta: float = 0.5) -> np.ndarray:
    """From probabilities, as the papers write it."""

    def kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
        return (p * (np.log(p) - np.log(q))).sum(-1)

    middle = jsd_beta * teacher + (1 - jsd_beta) * student
    jensen_shannon = jsd_beta * kl(teacher, middle) + (1 - jsd_beta) * kl(student, middle)
    return temperature**2 * {"forward": kl(teacher, student), "reverse": kl(student, teacher), "js": jensen_shannon}[divergence]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def loss(student: torch.Tensor, teacher: torch.Tensor, temperature: float, *rest: object) -> torch.Tensor:
    return kd_loss(log_probabilities(student, temperature), log_probabilities(teacher, temperature), temperature, *rest)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000), positions=st.integers(1, 6), vocabulary=st.integers(2, 50), temperature=st.floats(0.5, 10),
    scale=st.floats(0.1, 8), divergence=st.sampled_from(DIVERGENCES), jsd_beta=st.floats(0.1, 0.9),
)  # fmt: skip
def test_each_divergence_is_its_formula(
    seed: int, positions: int, vocabulary: int, temperature: float, scale: float, divergence: Divergence, jsd_beta: float
) -> None:
    student, teacher = scale * normal(positions, vocabulary, seed=seed), scale * normal(positions, vocabulary, seed=seed + 1)
    p, q = softmax(student.numpy() / temperature), softmax(teacher.numpy() / temperature)
    expected = reference(divergence, p, q, temperature, jsd_beta)
    rest = temperature, divergence, jsd_beta
    np.testing.assert_allclose(loss(student, teacher, *rest).numpy(), expected, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(loss(student.float(), teacher.float(), *rest).numpy(), expected, rtol=2e-4, atol=2e-4)


def test_logits_of_bfloat16_are_compared_in_float32() -> None:
    student, teacher = normal(4, 300).bfloat16(), normal(4, 300, seed=1).bfloat16()
    expected = reference_kl(student.double().numpy(), teacher.double().numpy(), 2.0)
    np.testing.assert_allclose(loss(student, teacher, 2.0).numpy(), expected, rtol=1e-5)


def test_kl_has_the_gradient_of_matching_logits_at_a_high_temperature() -> None:
    """Hinton et al. (2015), equation 4: for logits of mean zero the gradient tends to (student - teacher) / vocabulary."""
    student, teacher = normal(3, 20), normal(3, 20, seed=1)
    student, teacher = student - student.mean(-1, keepdim=True), teacher - teacher.mean(-1, keepdim=True)
    student.requires_grad_()
    loss(student, teacher, 1e4).sum().backward()
    assert student.grad is not None
    torch.testing.assert_close(student.grad, (student - teacher).detach() / 20, rtol=1e-2, atol=1e-5)


def test_forward_covers_and_reverse_seeks() -> None:
    """MiniLLM's reason: a student that has one of two modes is punished hard by forward KL and mildly by reverse KL."""
    teacher, student = np.array([[0.49, 0.49, 0.02]]).repeat(2, 0), np.array([[0.96, 0.02, 0.02], [0.34, 0.33, 0.33]])
    forward, reverse = (
        kd_loss(torch.from_numpy(student).log(), torch.from_numpy(teacher).log(), 1.0, kind) for kind in ("forward", "reverse")
    )
    assert forward[0] > forward[1]
    assert reverse[0] < reverse[1]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    vocabulary=st.integers(3, 40),
    scale=st.floats(0.1, 8),
    divergence=st.sampled_from(DIVERGENCES),
    data=st.data(),
)
def test_a_merged_tail_is_the_formula_over_k_plus_one_outcomes(
    seed: int, vocabulary: int, scale: float, divergence: Divergence, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, vocabulary - 1))
    student, teacher = scale * normal(3, vocabulary, seed=seed), scale * normal(3, vocabulary, seed=seed + 1)
    indices = teacher.topk(k).indices

    def merged(logits: torch.Tensor) -> np.ndarray:
        whole = softmax(logits.numpy())
        top = np.take_along_axis(whole, indices.numpy(), -1)
        others = np.array([np.delete(row, chosen).sum() for row, chosen in zip(whole, indices.numpy(), strict=True)])
        return np.concatenate([top, others[:, None]], -1)

    mine = [merge_tail(log_probabilities(logits, 1.0), indices) for logits in (student, teacher)]
    np.testing.assert_allclose(mine[0].exp().numpy(), merged(student), rtol=1e-9)
    got = kd_loss(*mine, 1.0, divergence).numpy()
    np.testing.assert_allclose(got, reference(divergence, merged(student), merged(teacher), 1.0), rtol=1e-8, atol=1e-12)
    assert (got <= loss(student, teacher, 1.0, divergence).numpy() + 1e-12).all()  # data processing inequality
    alike = torch.where(torch.zeros_like(student).scatter(-1, indices, 1).bool(), student, teacher)  # the tail in the teacher's proportions
    np.testing.assert_allclose(
        kd_loss(*(merge_tail(log_probabilities(x, 1.0), indices) for x in (alike, teacher)), 1.0, divergence).numpy(),
        loss(alike, teacher, 1.0, divergence).numpy(),
        rtol=1e-7, atol=1e-12,
    )  # fmt: skip


def test_the_other_terms_are_their_formulas() -> None:
    logits, targets = normal(7, 30), torch.tensor([3, 0, 29, 5, 5, 11, 2])
    expected = -np.log(softmax(logits.numpy())[np.arange(7), targets.numpy()])
    np.testing.assert_allclose(cross_entropy(logits, targets).numpy(), expected, rtol=1e-12)
    a, b = normal(7, 16), normal(7, 16, seed=1)
    x, y = a.numpy(), b.numpy()
    np.testing.assert_allclose(mean_squares(a, b).numpy(), ((x - y) ** 2).sum(-1) / 16, rtol=1e-12)
    np.testing.assert_allclose(attention_distance(a, b).numpy(), ((x - y) ** 2).sum(-1), rtol=1e-12)
    unit = x / np.linalg.norm(x, axis=-1, keepdims=True) - y / np.linalg.norm(y, axis=-1, keepdims=True)
    np.testing.assert_allclose(2 * cosine_distance(a, b).numpy(), (unit**2).sum(-1), rtol=1e-12)  # the loss of arXiv 2211.01071


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradients_of_divergences(divergence: Divergence) -> None:
    student, teacher, indices = normal(3, 11).requires_grad_(), normal(3, 11, seed=1), torch.tensor([[0, 3], [10, 1], [4, 5]])

    def chunk(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return loss(student, teacher, 3.0, divergence, 0.3).sum()

    def tail(student: torch.Tensor) -> torch.Tensor:
        return kd_loss(*(merge_tail(log_probabilities(logits, 2.0), indices) for logits in (student, teacher)), 2.0, divergence)

    assert torch.autograd.gradcheck(lambda s: loss(s, teacher, 2.0, divergence, 0.3), student)
    assert torch.autograd.gradcheck(lambda s: sum_in_chunks(chunk, 2, s, teacher), student)
    assert torch.autograd.gradcheck(tail, student)


@pytest.mark.parametrize(
    "term", [mean_squares, cosine_distance, attention_distance, lambda s, _: cross_entropy(s, torch.tensor([0, 10, 4]))]
)
def test_gradients_of_terms(term: Callable[..., torch.Tensor]) -> None:
    """The second ones too: gradients of cross-entropy are a feature."""
    student, teacher = normal(3, 11).requires_grad_(), normal(3, 11, seed=1)
    assert torch.autograd.gradcheck(lambda s: term(s, teacher), student)
    assert torch.autograd.gradgradcheck(lambda s: term(s, teacher), student)


def test_chunks_give_the_same_sum_and_gradient_and_are_small() -> None:
    head, hidden, targets = normal(50, 8), normal(13, 8).requires_grad_(), torch.arange(13)
    sizes = []

    def loss(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        sizes.append(len(hidden))
        return cross_entropy(hidden @ head.T, targets).sum()

    whole = torch.autograd.grad(sum_in_chunks(loss, 13, hidden, targets), hidden)[0]
    assert sizes == [13]
    sizes.clear()
    total = sum_in_chunks(loss, 4, hidden, targets)
    chunked = torch.autograd.grad(total, hidden)[0]
    assert max(sizes) == 4
    assert len(sizes) == 8  # each chunk once forward and once again for the backward pass
    torch.testing.assert_close(chunked, whole)
    torch.testing.assert_close(total, cross_entropy(hidden @ head.T, targets).sum())


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes, in the backward pass too."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor))])
        return result


def large_vocabulary() -> PreTrainedModel:
    config = AutoConfig.for_model(
        "qwen2", vocab_size=151936, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=128, tie_word_embeddings=True,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(("max_logits", "bounded"), [(2**21, True), (2**24, False)])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_vocabulary_of_150k_is_never_whole_in_memory(divergence: Divergence, max_logits: int, bounded: bool) -> None:
    """64 positions have 9.7M logits; nothing above 2**21 elements is made, forward or backward, where that is the limit."""
    objective = build_objective(
        large_vocabulary(), teacher=large_vocabulary(), alpha=1.0, beta=1.0, divergence=divergence, temperature=2.0, max_logits=max_logits
    )  # fmt: skip
    rows = torch.randint(0, 151936, (1, 65), generator=torch.Generator().manual_seed(0))
    with Largest() as largest:
        objective(rows, torch.ones_like(rows, dtype=torch.bool))["loss"].backward()
    assert (largest.elements <= 2**21) is bounded
    assert bounded or largest.elements == 64 * 151936
