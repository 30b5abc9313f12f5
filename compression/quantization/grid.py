"""Uniform integer grids over groups of input channels, and how they are fitted to a weight."""

from dataclasses import dataclass

import torch

from compression.checkpoints.quantization_config import WeightScheme

SMALLEST_SCALE = 2.0**-24  # the smallest positive float16: a group of zeros needs some scale
LARGEST_SCALE = 65504.0
WIDEST_BLOCK = 256  # the products with a wider block cost more than they tell
NO_SHRINK = (1.0,)
SHRINKS = tuple(1.0 - 0.025 * step for step in range(21))  # 1.0 ... 0.5 of the full range


@dataclass(frozen=True)
class Grid:
    """w ≈ scale (q − zero), q in 0 … 2^bits − 1, one scale and zero for each row and group of `group_size` neighbouring input channels.

    Attributes:
        scales: float32 [out, groups], every value exactly representable in float16, as it will be stored.
        zeros: float32 [out, groups], whole numbers in 1 … 2^bits − 1.
        bits: Bits of a code.
        group_size: Input channels in a group.
    """

    scales: torch.Tensor
    zeros: torch.Tensor
    bits: int
    group_size: int

    def columns(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Repeat scale and zero for every weight: two float32 [out, in]."""
        return self.scales.repeat_interleave(self.group_size, 1), self.zeros.repeat_interleave(self.group_size, 1)

    def quantize(self, weight: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Round to nearest: [out, in] -> uint8 codes [out, in]; what the mask, bool [out, in], does not keep becomes zero."""
        scales, zeros = self.columns()
        codes = round_to_codes(weight, scales, zeros, self.bits)
        if mask is not None:
            codes = torch.where(mask, codes, zeros)
        return codes.to(torch.uint8)

    def dequantize(self, codes: torch.Tensor) -> torch.Tensor:
        """Turn codes, uint8 [out, in], into weights, float32 [out, in]."""
        scales, zeros = self.columns()
        return (codes.float() - zeros) * scales


def round_to_codes(weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the nearest code of each weight, still a float; scales and zeros broadcast against `weight`."""
    return (weight / scales + zeros).round_().clamp_(0, 2**bits - 1)


def fit_grid(
    weight: torch.Tensor,
    scheme: WeightScheme,
    *,
    symmetric: bool,
    hessian: torch.Tensor | None = None,
    shrinks: tuple[float, ...] = SHRINKS,
) -> Grid:
    """Choose the grid of each group that loses least, among its min/max range shrunk by each of `shrinks`.

    A symmetric grid has its zero in the middle and 2^(bits-1) steps below it, one fewer above; the range reaches to the
    half step between (scale 2·max / (2^bits − 1), as in GPTQ).

    Args:
        weight: [out, in], `in` a multiple of the group size.
        scheme: Bits and group size.
        symmetric: Whether the zero is in the middle.
        hessian: [in, in], mean of x xᵀ over the layer's inputs; the loss of a group is then Δ·H_group·Δᵀ, the mean squared error of
            the output that it causes, where H_group is its diagonal block (only the diagonal of it in groups wider than
            `WIDEST_BLOCK`). None: H is the identity.
        shrinks: (1.0,) is the plain min/max (symmetric: absolute maximum) grid; the first one applies where no loss is finite.
    """
    bits, group_size = scheme.bits, scheme.width(weight.shape[1])
    groups = weight.float().unflatten(1, (-1, group_size))  # [out, groups, group]
    low, high = groups.amin(2).clamp_(max=0), groups.amax(2).clamp_(min=0)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    blocks = None
    if hessian is not None:
        wide = group_size > WIDEST_BLOCK
        blocks = hessian.diagonal().unflatten(0, (-1, group_size)) if wide else diagonal_blocks(hessian, group_size)
    best_scales, best_zeros = _grid_of_range(low * shrinks[0], high * shrinks[0], bits, symmetric)
    if len(shrinks) == 1:
        return Grid(best_scales, best_zeros, bits, group_size)
    best = torch.full_like(low, torch.inf)
    for shrink in shrinks:
        scales, zeros = _grid_of_range(low * shrink, high * shrink, bits, symmetric)
        rounded = round_to_codes(groups, scales[..., None], zeros[..., None], bits)
        loss = _group_losses(rounded.sub_(zeros[..., None]).mul_(scales[..., None]).sub_(groups), blocks)
        better = loss < best
        best = torch.where(better, loss, best)
        best_scales, best_zeros = torch.where(better, scales, best_scales), torch.where(better, zeros, best_zeros)
    return Grid(best_scales, best_zeros, bits, group_size)


def _grid_of_range(low: torch.Tensor, high: torch.Tensor, bits: int, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor]:
    steps = 2**bits - 1
    scales = ((high - low) / steps).clamp_(SMALLEST_SCALE, LARGEST_SCALE).half().float()
    if symmetric:
        return scales, torch.full_like(scales, 2 ** (bits - 1))
    # The GPTQ layout stores zero − 1 and its readers disagree on what −1 wraps to: zeros start at 1.
    return scales, (-low / scales).round_().clamp_(1, steps)


def _group_losses(delta: torch.Tensor, blocks: torch.Tensor | None) -> torch.Tensor:
    """[out, groups, group], [groups, group, group] (or the diagonals [groups, group]) -> Δ·H·Δᵀ of each row and group, [out, groups]."""
    if blocks is None:
        return delta.square().sum(2)
    if blocks.dim() == 2:
        return (delta.square() * blocks).sum(2)
    return (torch.bmm(delta.transpose(0, 1), blocks).transpose(0, 1) * delta).sum(2)


def diagonal_blocks(hessian: torch.Tensor, group_size: int) -> torch.Tensor:
    """Return the blocks on the diagonal of [in, in]: [in / group_size, group_size, group_size]."""
    count = hessian.shape[0] // group_size
    return (
        hessian.unflatten(1, (count, group_size)).unflatten(0, (count, group_size)).diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()
    )
