"""What `quantization_config` says of a GPTQ or AWQ checkpoint: the bits and groups of each layer. Imports no torch."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from compression.checkpoints.checkpoint import Checkpoint

ROW = -1  # group size: one group, the whole row
FLOAT_BITS = 16  # of a layer that stays as it is


@dataclass(frozen=True)
class WeightScheme:
    """What a layer is rounded to: bits of a weight, and input channels that share a scale (`ROW`: all of them).

    Attributes:
        bits: Bits of a weight.
        group_size: Input channels that share a scale.
        shrunk: Whether the group is smaller than requested, because that does not divide the layer's width.
    """

    bits: int
    group_size: int
    shrunk: bool = field(default=False, compare=False)

    def width(self, in_features: int) -> int:
        """Return the input channels in a group."""
        return in_features if self.group_size == ROW else self.group_size


def awq_config(*, group_size: int) -> dict[str, Any]:
    """Build `quantization_config` of an AWQ checkpoint."""
    return {
        "quant_method": "awq", "version": "gemm", "bits": 4, "group_size": group_size, "zero_point": True,
        "modules_to_not_convert": ["lm_head"],
    }  # fmt: skip


def layer_scheme(config: Mapping[str, Any], module: str) -> WeightScheme | None:
    """Read what a `quantization_config` says of a layer: the first entry of `dynamic` that fits it, else the values for all. None: not rounded."""
    for rule, settings in (config.get("dynamic") or {}).items():
        if rule.startswith("-:"):
            if re.match(rule.removeprefix("-:"), module):
                return None
        elif re.match(rule.removeprefix("+:"), module):
            return WeightScheme(settings.get("bits", config["bits"]), settings.get("group_size", config["group_size"]))
    return WeightScheme(config["bits"], config["group_size"])


def schemes_of(checkpoint: Checkpoint) -> set[WeightScheme]:
    """Return all schemes of the linear layers of a GPTQ or AWQ checkpoint, planned or real."""
    config = checkpoint.config["quantization_config"]
    return {codes for name in checkpoint.linear_tensors() if (codes := layer_scheme(config, name.removesuffix(".weight"))) is not None}


def linear_bits(checkpoint: Checkpoint, float_bits: int) -> float:
    """Count the bits that the linear layers of a GPTQ or AWQ checkpoint take with their scales and zeros; `float_bits` of a weight that stays as it is."""
    config, total = checkpoint.config["quantization_config"], 0.0
    for path, (out_features, in_features) in checkpoint.linear_widths().items():
        for index in range(checkpoint.num_layers):
            codes = layer_scheme(config, f"{checkpoint.blocks}.{index}.{path}")
            each = float_bits if codes is None else codes.bits + (16 + codes.bits) / codes.width(in_features)
            total += out_features * in_features * each
    return total
