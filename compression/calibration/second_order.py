"""Second moments of layer inputs, as GPTQ, AWQ and SparseGPT use them. `hessian` is the mean of x xᵀ over the calibration tokens x."""

import torch

from compression.calibration.walk import Block


def stacked(block: Block, paths: tuple[str, ...]) -> torch.Tensor:
    """Stack the weights of layers that share an input by rows: a new float32 [out, in]."""
    return torch.cat([block.linear(path).weight.float() for path in paths])


def output_power(weight: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """Compute E(w·x)² of each row: diag(W·H·Wᵀ), float32 [out]."""
    return ((weight @ hessian) * weight).sum(1)


def inverse_factor(hessian: torch.Tensor, *, damp_percent: float, order: torch.Tensor | None = None) -> torch.Tensor | None:
    """Compute the upper triangular U with H⁻¹ = UᵀU for the damped H.

    H = VVᵀ with V upper triangular is the Cholesky factor of H read backwards, and U = V⁻¹: one factorization and one triangular inverse.

    Args:
        hessian: [in, in], mean of x xᵀ. A channel that is always zero gets the mean of the diagonal, which leaves it out of every update.
        damp_percent: Share of the mean of the diagonal that is added to the diagonal.
        order: The columns of U as input channels, int64 [in]; None for storage order.

    Returns:
        [in, in]; None where H has no inverse.
    """
    backwards = torch.arange(len(hessian), device=hessian.device) if order is None else order
    backwards = backwards.flip(0)
    h = hessian[backwards[:, None], backwards]
    diagonal = h.diagonal()
    mean = diagonal.mean()
    diagonal[diagonal == 0] = mean
    diagonal += damp_percent * mean
    lower, info = torch.linalg.cholesky_ex(h)
    if info.item() or not torch.isfinite(lower).all():
        return None
    upper = lower.flip(0, 1)
    return torch.linalg.solve_triangular(upper, torch.eye(len(upper), device=h.device, dtype=h.dtype), upper=True)
