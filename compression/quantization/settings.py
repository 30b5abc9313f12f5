"""The settings of every quantization method, the bits and groups that they give each layer, and the checkpoints they plan. Imports no torch.

A pattern names layers by their path in the model; `*` stands for any characters: `*.down_proj`, `model.layers.0.*`.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from compression.checkpoints.checkpoint import Checkpoint
from compression.checkpoints.quantization_config import FLOAT_BITS, WeightScheme
from compression.errors import Incompatible
from compression.settings import Settings

GROUP_SIZES = (256, 128, 64, 32, 16)

OnIndivisible = Literal["refuse", "smaller_group"]
GroupSize = Annotated[int, Field(ge=-1, description="Input channels that share a scale; 32 can be carried into GGUF, -1 is a row.")]


class Override(Settings):
    """Bits and groups of the layers that a pattern names; what is left out is as for all."""

    bits: Annotated[Literal[2, 3, 4, 8, 16] | None, Field(description="Bits of a weight; 16 leaves the layers as they are.")] = None
    group_size: Annotated[int | None, Field(ge=-1, description="Input channels that share a scale; -1 for a row.")] = None


Overrides = Mapping[str, Override]


class SchemeSettings(Settings):
    """What methods that write the GPTQ layout share: how many bits each layer gets, and in which groups."""

    former_names: ClassVar[Mapping[str, str]] = {"misfit": "on_indivisible"}

    bits: Annotated[Literal[2, 3, 4, 8], Field(description="Bits of a weight.")] = 4
    group_size: GroupSize = 128
    symmetric: Annotated[bool, Field(description="Without zero points.")] = True
    layers: dict[str, Override] = Field(
        default_factory=dict,
        description='Other bits or groups by pattern, the first that fits: {"*.down_proj": {bits: 8}}; bits 16 leaves layers as they are.',
    )
    on_indivisible: Annotated[
        OnIndivisible,
        Field(
            description="What becomes of a layer that group_size does not divide: refuse, or the largest smaller group, counted as a fallback."
        ),
    ] = "refuse"


class RTNSettings(SchemeSettings):
    """Rounding to nearest (`compression.quantization.rtn`), which needs no calibration data.

    In a recipe:

        rounded:
          uses: quantize.rtn
          bits: 4
          group_size: 32
    """

    mse: Annotated[bool, Field(description="Shrink each group's range where that lowers the error of its weights.")] = False


class GPTQSettings(SchemeSettings):
    """GPTQ (Frantar et al., arXiv 2210.17323; `compression.quantization.gptq`).

    In a recipe:

        int4:
          uses: quantize.gptq
          bits: 4
          group_size: 32
          layers: {"*.down_proj": {bits: 8}}

    `act_order` uses static groups: the grids are fitted before the columns are reordered, so that a group stays a run of
    neighbouring channels. Without `mse` a grid spans the minimum and maximum of its group.
    """

    damp_percent: Annotated[float, Field(gt=0, lt=1, description="Of the mean of the Hessian's diagonal, added to it.")] = 0.01
    act_order: Annotated[bool, Field(description="Quantize important columns first; groups stay in storage order.")] = True
    mse: Annotated[bool, Field(description="Shrink each group's range where that lowers the error of its output.")] = True


class AWQSettings(Settings):
    """AWQ (Lin et al., arXiv 2306.00978; `compression.quantization.awq`), with zero points.

    In a recipe:

        int4:
          uses: quantize.awq
          group_size: 32
    """

    bits: Annotated[Literal[4], Field(description="Bits of a weight; the layout holds 4.")] = 4
    group_size: GroupSize = 128
    clip: Annotated[bool, Field(description="Shrink each group's range where that lowers the error of its output.")] = True


class SmoothQuantSettings(Settings):
    """SmoothQuant (Xiao et al., arXiv 2211.10438; `compression.quantization.smoothquant`): int8 weights and activations.

    In a recipe:

        w8a8:
          uses: quantize.smoothquant
          alpha: 0.5
    """

    alpha: Annotated[
        float | None, Field(ge=0, le=1, description="How much of the outliers moves into the weights; null moves nothing (the control).")
    ] = 0.5


class FP8Settings(Settings):
    """E4M3 weights and activations (Micikevicius et al., arXiv 2209.05433; `compression.quantization.fp8`), without calibration data.

    In a recipe:

        fp8:
          uses: quantize.fp8
          strategy: channel
    """

    strategy: Annotated[
        Literal["channel", "tensor"], Field(description="One weight scale for each output channel, or one for the whole matrix.")
    ] = "channel"


def plan_schemes(
    checkpoint: Checkpoint,
    *,
    bits: int,
    group_size: int,
    layers: Overrides | None = None,
    on_indivisible: OnIndivisible = "refuse",
) -> dict[str, WeightScheme | None]:
    """Decide what every linear layer of every block is rounded to.

    Args:
        checkpoint: A dense checkpoint, planned or real.
        bits: Bits of a weight.
        group_size: Input channels that share a scale; -1 for a row.
        layers: Other bits and groups by pattern; the first pattern that fits a layer counts.
        on_indivisible: What becomes of a layer whose width the group size does not divide: "refuse", or "smaller_group", the largest
            of `GROUP_SIZES` below it that does.

    Returns:
        The scheme by the layer's path in the model; None where the layer stays as it is.

    Raises:
        Incompatible: Key "group_size", "bits" or "layers"; the message names the layer and what would fit.
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
    """Return `wanted`, with a smaller group where it does not divide the width and that is allowed."""
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


def planned_schemes(checkpoint: Checkpoint, settings: SchemeSettings) -> dict[str, WeightScheme | None]:
    """Return `plan_schemes` of settings."""
    return plan_schemes(
        checkpoint,
        bits=settings.bits,
        group_size=settings.group_size,
        layers=settings.layers,
        on_indivisible=settings.on_indivisible,
    )


def gptq_config(planned: Mapping[str, WeightScheme | None], settings: SchemeSettings, **more: Any) -> dict[str, Any]:
    """Build `quantization_config` of a checkpoint in the GPTQ layout; layers that differ stand under `dynamic`, as GPTQModel reads it.

    Args:
        planned: What `plan_schemes` returned.
        settings: What it planned for.
        more: Further entries.

    `desc_act` is false: act-order with static groups leaves storage order.
    """
    rules = {f"^{re.escape(module)}$": scheme for module, scheme in planned.items() if scheme is not None and scheme.shrunk}
    rules |= {
        _regex(pattern): WeightScheme(override.bits or settings.bits, override.group_size or settings.group_size)
        for pattern, override in settings.layers.items()
    }
    dynamic: dict[str, dict[str, int]] = {}
    for rule, scheme in rules.items():
        if scheme.bits == FLOAT_BITS:
            dynamic[f"-:{rule}"] = {}
        else:
            dynamic[f"+:{rule}"] = {"bits": scheme.bits, "group_size": scheme.group_size}
    return {
        "quant_method": "gptq", "checkpoint_format": "gptq", "bits": settings.bits, "group_size": settings.group_size, "sym": settings.symmetric,
        "desc_act": False, "lm_head": False, "pack_dtype": "int32", **({"dynamic": dynamic} if dynamic else {}), **more,
    }  # fmt: skip


def plan_gptq(checkpoint: Checkpoint, settings: SchemeSettings) -> Checkpoint:
    """Return the checkpoint in the GPTQ layout that a dense one will become. Raises what `plan_schemes` does."""
    config = gptq_config(planned_schemes(checkpoint, settings), settings)
    return replace(checkpoint, layout="gptq", config={**checkpoint.config, "quantization_config": config})


def _regex(pattern: str) -> str:
    return "^" + ".*".join(re.escape(part) for part in pattern.split("*")) + "$"
