"""What pruning and quantization share of the second moments of layer inputs."""

import torch

from compression.calibration.walk import Block


def stacked(block: Block, paths: tuple[str, ...]) -> torch.Tensor:
    """The weights of layers that share an input, rows of one below those of the other: a new float32 [out, in]."""
    return torch.cat([block.linear(path).weight.float() for path in paths])


def output_power(weight: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """E(w·x)² of each row: diag(W·H·Wᵀ), float32 [out]."""
    return ((weight @ hessian) * weight).sum(1)


def inverse_factor(hessian: torch.Tensor, *, damp_percent: float, order: torch.Tensor | None = None) -> torch.Tensor | None:
    """The upper triangular U with H⁻¹ = UᵀU for the damped H, columns in `order`; None where H has no inverse.

    hessian  [in, in], mean of x xᵀ. A channel that is always zero (nothing to make up for, nothing to make up with) gets the mean
          of the diagonal, which leaves it out of every update.
    H = VVᵀ with V upper triangular is the Cholesky factor of H read backwards, and U = V⁻¹: one factorization and one triangular inverse.
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
