"""The compressed-tensors layouts of vLLM and llm-compressor for 8-bit weights with 8-bit activations: W8A8 and fp8.

weight        int8 (format "int-quantized") or float8_e4m3fn ("float-quantized") [out, in]
weight_scale  in the checkpoint's dtype, [out, 1] (strategy "channel") or [1] ("tensor")
The weight is their product. Inputs are rounded while the model runs (`round_inputs`); nothing of them is stored.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from compression.checkpoints.checkpoint import Checkpoint
from compression.checkpoints.schemes import Scheme
from compression.checkpoints.shards import read_tensors
from compression.errors import UnusableModel

E4M3_MAX = 448.0
INT8_MAX = 127.0  # of weights: −128 stays unused, so that a weight and its negative round alike
_STORED = {"int": "I8", "float": "F8_E4M3"}


@dataclass(frozen=True)
class ScaledLinear:
    """A linear layer as 8-bit numbers: w = scale · codes.

    codes  int8 or float8_e4m3fn [out, in]
    scale  float32, bfloat16 or float16, [out, 1] or [1]
    """

    codes: torch.Tensor
    scale: torch.Tensor

    def dequantize(self) -> torch.Tensor:
        """Return the weight, float32 [out, in]: exact products where the scale is a half-precision number."""
        return self.codes.float() * self.scale.float()

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors as they are stored, by suffix."""
        return {"weight": self.codes, "weight_scale": self.scale}


def round_weight(weight: torch.Tensor, scheme: Scheme, *, dtype: torch.dtype, name: str) -> ScaledLinear:
    """Round a weight [out, in] to nearest, with the smallest scale of `dtype` under which its largest value fits.

    Zeros stay zeros. A row of zeros gets scale 1.
    Raises UnusableModel, naming `name`, for a weight that holds a number that is not finite.
    """
    weight = weight.float()
    largest = weight.abs().amax(1, keepdim=True) if scheme.strategy == "channel" else weight.abs().amax()[None]
    if not largest.isfinite().all():
        raise UnusableModel(f"{name} holds values that are not finite numbers; nothing can be rounded to", key="model")
    limit = INT8_MAX if scheme.type == "int" else E4M3_MAX
    scale = _round_up(largest / limit, dtype)
    scale[scale == 0] = 1
    numbers = weight / scale.float()
    if scheme.type == "int":
        codes = numbers.round_().clamp_(-limit, limit).to(torch.int8)
    else:
        codes = numbers.clamp_(-limit, limit).to(torch.float8_e4m3fn)
    return ScaledLinear(codes, scale)


def _round_up(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Nonnegative float32 values as `dtype`, none smaller than it was: rounded down, a small float16 scale would clip much of its row."""
    rounded = values.to(dtype)
    if dtype.itemsize > 2:
        return rounded
    above = (rounded.view(torch.int16) + 1).view(dtype)  # the next larger half-precision number
    return torch.where(rounded.float() < values, above, rounded)


def round_tokens(x: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Round each token of x [..., in] to 8 bits and back, in float32; same shape and dtype.

    The scale of a token is its largest absolute value over 127.5 (int8, clamped to −128 … 127) or 448 (E4M3), as the
    compressed-tensors package computes it; vLLM's int8 kernels divide by 127.
    """
    numbers = x.float()
    largest = numbers.abs().amax(-1, keepdim=True)
    scale = largest / (127.5 if scheme.type == "int" else E4M3_MAX)
    scale = torch.where(scale == 0, 1.0, scale)
    numbers = numbers / scale
    if scheme.type == "int":
        numbers = numbers.round_().clamp_(-128, 127)
    else:
        numbers = numbers.clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float()
    return (numbers * scale).to(x.dtype)


def round_inputs(layer: nn.Module, scheme: Scheme) -> None:
    """Make `layer` read its input through `round_tokens` from now on."""
    layer.register_forward_pre_hook(partial(_round_input, scheme=scheme))


def _round_input(_: nn.Module, arguments: tuple[Any, ...], *, scheme: Scheme) -> tuple[torch.Tensor]:
    (x,) = arguments
    return (round_tokens(x, scheme),)


def read_scaled_linears(checkpoint: Checkpoint, scheme: Scheme) -> Iterator[tuple[str, ScaledLinear]]:
    """Yield the rounded layers of a W8A8 or fp8 checkpoint one at a time: (module path in the model, layer).

    Raises UnusableModel for a layer that lacks its weight or scale, or has them in another type or shape than the scheme says.
    """
    tensors = checkpoint.tensors
    eight_bits = {name.removesuffix(".weight") for name, info in tensors.items() if info.dtype in _STORED.values()}
    scaled = {name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")}
    for module in sorted(eight_bits | scaled):
        weight, scale = tensors.get(f"{module}.weight"), tensors.get(f"{module}.weight_scale")
        if weight is None or scale is None:
            raise UnusableModel(f"{checkpoint.path}: the layer {module} lacks its {'weight_scale' if weight else 'weight'}", key="model")
        shapes = [(weight.shape[0], 1), (weight.shape[0],)] if scheme.strategy == "channel" else [(1,), ()]
        if weight.dtype != _STORED[scheme.type] or scale.shape not in shapes:
            raise UnusableModel(
                f"{checkpoint.path}: the layer {module} has a weight {weight.dtype} {list(weight.shape)} with scales {list(scale.shape)}; "
                f"its config means {_STORED[scheme.type]} with scales {list(shapes[0])}",
                key="model",
            )
        stored = read_tensors(checkpoint.path, [f"{module}.weight", f"{module}.weight_scale"])
        yield module, ScaledLinear(stored[f"{module}.weight"], stored[f"{module}.weight_scale"].reshape(shapes[0]))
