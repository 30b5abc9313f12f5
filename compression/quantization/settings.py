"""How many bits each layer gets and in which groups, and how `quantization_config` says so. Planning imports this module: no torch here.

A pattern names layers by their path in the model, `*` standing for any characters: `*.down_proj`, `model.layers.0.*`.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field

from compression.checkpoints.checkpoint import Checkpoint
from compression.checkpoints.quantization_config import FLOAT_BITS, WeightScheme
from compression.errors import Incompatible
from compression.settings import Settings

GROUP_SIZES = (256, 128, 64, 32, 16)

OnIndivisible = Literal["refuse", "smaller_group"]


class Override(Settings):
    """Bits and groups of the layers that a pattern names; what is left out is as for all."""

    bits: Annotated[Literal[2, 3, 4, 8, 16] | None, Field(description="Bits of a weight; 16 leaves the layers as they are.")] = None
    group_size: Annotated[int | None, Field(ge=-1, description="Input channels that share a scale; -1 for a row.")] = None


Overrides = Mapping[str, Override]


def plan_schemes(
    checkpoint: Checkpoint, *, bits: int, group_size: int, layers: Overrides | None = None, on_indivisible: OnIndivisible = "refuse"
) -> dict[str, WeightScheme | None]:
    """The codes of every linear layer of every block by its path in the model; None where it stays as it is.

    layers  by pattern; the first that fits a layer counts
    on_indivisible  what becomes of a layer whose width the group size does not divide: "refuse", or "smaller_group", the largest of
            `GROUP_SIZES` below it that does
    Raises Incompatible (key "group_size", "bits" or "layers") naming the layer and what would fit.
    """
    shapes = checkpoint.linear_widths()
    planned: dict[str, WeightScheme | None] = {}
    unused = set(layers or {})
    for index in range(checkpoint.num_layers):
        for path, shape in shapes.items():
            module = f"{checkpoint.blocks}.{index}.{path}"
            pattern = next((pattern for pattern in layers or {} if re.match(_regex(pattern), module)), None)
            unused.discard(pattern or "")
            override = (layers or {})[pattern] if pattern is not None else Override()
            wanted = WeightScheme(override.bits or bits, override.group_size or group_size)
            planned[module] = None if wanted.bits == FLOAT_BITS else _fit(checkpoint, path, shape, wanted, on_indivisible)
    if unused:
        raise Incompatible(f"no layer fits the pattern {', '.join(sorted(unused))}; layers are called {module}", key="layers")
    return planned


def _fit(checkpoint: Checkpoint, path: str, shape: tuple[int, int], wanted: WeightScheme, on_indivisible: OnIndivisible) -> WeightScheme:
    out_features, in_features = shape
    size = wanted.width(in_features)
    if size < 1 or in_features % size:
        smaller = [fitting for fitting in GROUP_SIZES if fitting < size and in_features % fitting == 0]
        if on_indivisible == "refuse" or not smaller:
            every = [g for g in sorted(GROUP_SIZES) if all(width % g == 0 for _, width in checkpoint.linear_widths().values())]
            raise Incompatible(
                f"group_size {wanted.group_size} does not divide {path}, which is {in_features} wide; group sizes that divide every layer: "
                f"{', '.join(map(str, every)) or 'none of ' + ', '.join(map(str, sorted(GROUP_SIZES)))}"
                + ("; or on_indivisible: smaller_group" if smaller else ""),
                key="group_size",
            )
        wanted = WeightScheme(wanted.bits, smaller[0], shrunk=True)
    for width in shape:
        if width * wanted.bits % 32:
            raise Incompatible(
                f"{wanted.bits}-bit codes of {path} ({out_features} x {in_features}) do not fill whole 32-bit words; "
                f"{width} x {wanted.bits} bits must be a multiple of 32",
                key="bits",
            )
    return wanted


def gptq_config(
    planned: Mapping[str, WeightScheme | None], *, bits: int, group_size: int, symmetric: bool, layers: Overrides | None = None, **more: Any
) -> dict[str, Any]:
    """`quantization_config` of a checkpoint in the GPTQ layout; layers that differ stand under `dynamic`, as GPTQModel reads it.

    `desc_act` is false: act-order with static groups leaves storage order.
    """
    rules = {f"^{re.escape(module)}$": codes for module, codes in planned.items() if codes is not None and codes.shrunk}
    rules |= {_regex(pattern): WeightScheme(o.bits or bits, o.group_size or group_size) for pattern, o in (layers or {}).items()}
    dynamic: dict[str, dict[str, int]] = {}
    for rule, codes in rules.items():
        left = codes.bits == FLOAT_BITS
        dynamic[f"-:{rule}" if left else f"+:{rule}"] = {} if left else {"bits": codes.bits, "group_size": codes.group_size}
    return {
        "quant_method": "gptq", "checkpoint_format": "gptq", "bits": bits, "group_size": group_size, "sym": symmetric,
        "desc_act": False, "lm_head": False, "pack_dtype": "int32", **({"dynamic": dynamic} if dynamic else {}), **more,
    }  # fmt: skip


def plan_gptq(
    checkpoint: Checkpoint,
    *,
    bits: int,
    group_size: int,
    symmetric: bool,
    layers: Overrides | None = None,
    on_indivisible: OnIndivisible = "refuse",
) -> Checkpoint:
    """The checkpoint in the GPTQ layout that a dense one will become. Raises what `plan_schemes` does."""
    planned = plan_schemes(checkpoint, bits=bits, group_size=group_size, layers=layers, on_indivisible=on_indivisible)
    config = gptq_config(planned, bits=bits, group_size=group_size, symmetric=symmetric, layers=layers)
    return replace(checkpoint, layout="gptq", config={**checkpoint.config, "quantization_config": config})


def _regex(pattern: str) -> str:
    return "^" + ".*".join(re.escape(part) for part in pattern.split("*")) + "$"
