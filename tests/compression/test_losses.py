"""Every loss against its formula in float64 numpy, and its gradient against finite differences."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compression.distillation.losses import cross_entropy, hidden_mse, kl_divergence, sum_in_chunks


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def reference_kl(student: np.ndarray, teacher: np.ndarray, temperature: float) -> np.ndarray:
    p, q = softmax(teacher / temperature), softmax(student / temperature)
    return temperature**2 * (p * (np.log(p) - np.log(q))).sum(-1)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000), positions=st.integers(1, 6), vocabulary=st.integers(2, 50), temperature=st.floats(0.5, 10),
    scale=st.floats(0.1, 8),
)  # fmt: skip
def test_kl_is_the_formula(seed: int, positions: int, vocabulary: int, temperature: float, scale: float) -> None:
    student, teacher = scale * normal(positions, vocabulary, seed=seed), scale * normal(positions, vocabulary, seed=seed + 1)
    expected = reference_kl(student.numpy(), teacher.numpy(), temperature)
    np.testing.assert_allclose(kl_divergence(student, teacher, temperature).numpy(), expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(kl_divergence(student.float(), teacher.float(), temperature).numpy(), expected, rtol=2e-4, atol=2e-4)


def test_kl_of_bfloat16_logits_is_taken_in_float32() -> None:
    student, teacher = normal(4, 300).bfloat16(), normal(4, 300, seed=1).bfloat16()
    expected = reference_kl(student.double().numpy(), teacher.double().numpy(), 2.0)
    np.testing.assert_allclose(kl_divergence(student, teacher, 2.0).numpy(), expected, rtol=1e-5)


def test_kl_has_the_gradient_of_matching_logits_at_a_high_temperature() -> None:
    """Hinton et al. (2015), equation 4: for logits of mean zero the gradient tends to (student - teacher) / vocabulary."""
    student, teacher = normal(3, 20), normal(3, 20, seed=1)
    student, teacher = student - student.mean(-1, keepdim=True), teacher - teacher.mean(-1, keepdim=True)
    student.requires_grad_()
    kl_divergence(student, teacher, 1e4).sum().backward()
    assert student.grad is not None
    torch.testing.assert_close(student.grad, (student - teacher).detach() / 20, rtol=1e-2, atol=1e-5)


def test_cross_entropy_and_hidden_mse_are_the_formulas() -> None:
    logits, targets = normal(7, 30), torch.tensor([3, 0, 29, 5, 5, 11, 2])
    expected = -np.log(softmax(logits.numpy())[np.arange(7), targets.numpy()])
    np.testing.assert_allclose(cross_entropy(logits, targets).numpy(), expected, rtol=1e-12)
    student, teacher = normal(7, 16), normal(7, 16, seed=1)
    np.testing.assert_allclose(hidden_mse(student, teacher).numpy(), ((student.numpy() - teacher.numpy()) ** 2).sum(-1) / 16, rtol=1e-12)


def test_gradients() -> None:
    student, teacher = normal(3, 11).requires_grad_(), normal(3, 11, seed=1)
    assert torch.autograd.gradcheck(lambda s: kl_divergence(s, teacher, 2.0), student)
    assert torch.autograd.gradcheck(lambda s: cross_entropy(s, torch.tensor([0, 10, 4])), student)
    assert torch.autograd.gradcheck(lambda s: hidden_mse(s, teacher), student)
    assert torch.autograd.gradcheck(lambda s: sum_in_chunks(lambda x, y: kl_divergence(x, y, 3.0).sum(), 2, s, teacher), student)


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
