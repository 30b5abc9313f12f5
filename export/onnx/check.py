"""The settings of an ONNX graph, and which checkpoints can become one. Imports no torch: planning uses it."""

from typing import Annotated, Literal

from pydantic import Field

from compression.checkpoints.checkpoint import Checkpoint
from compression.checkpoints.quantization_config import schemes_of
from compression.errors import Incompatible
from compression.settings import Settings
from export.checks import BLOCK_SIZES, AccuracyLevel, BlockSize, check_outer_types, check_traceable, outer_types

OuterType = Literal["float32", "float16", "int8"]


class OnnxSettings(Settings):
    """What an ONNX graph is made of.

    `dtype` is the type of the blocks' linear layers. float16 also is the type of activations and cache; beside integers everything else
    is float32:

        int8         weights int8 per output channel, inputs uint8 with a range for each tensor that the runtime finds
        int8-static  weights int8 per output channel, inputs in 8 bits with calibrated ranges, as QDQ
        int4         weights in blocks (MatMulNBits): the codes of a GPTQ or AWQ checkpoint, a dense one's rounded to nearest
    """

    target: Annotated[
        Literal["portable", "onnxruntime"],
        Field(
            description="portable: operators of the ONNX standard only, int8 inputs around 0; onnxruntime: what it runs fast on a CPU "
            "(int4, and uint8 inputs for int8-static, which multiplies in float there when portable)."
        ),
    ] = "portable"
    dtype: Annotated[
        Literal["float32", "float16", "int8", "int8-static", "int4"],
        Field(description="Of the linear layers: a float type, int8 with ranges found at run time or calibrated (QDQ), or int4 in blocks."),
    ] = "float32"
    block_size: Annotated[BlockSize, Field(description="int4: weights that share a scale where a dense checkpoint is rounded here.")] = 32
    accuracy_level: Annotated[AccuracyLevel, Field(description="int4: 4 multiplies with int8 activations (faster), 1 with float32.")] = 4
    embedding_type: Annotated[OuterType | None, Field(description="Of the token embedding; default: the float type of the graph.")] = None
    head_type: Annotated[OuterType | None, Field(description="As embedding_type, for the output head; a tied one is stored once.")] = None

    @property
    def is_calibrated(self) -> bool:
        """Whether the ranges of the layers' inputs are measured on calibration windows."""
        return self.dtype == "int8-static"

    def outer_types(self, checkpoint: Checkpoint) -> tuple[str, str]:
        """Return the types of embedding and head."""
        return outer_types(checkpoint, self, "float16" if self.dtype == "float16" else "float32")


def check_onnx(checkpoint: Checkpoint, settings: OnnxSettings) -> None:
    """Raise Incompatible where `export_onnx` does not take this checkpoint with these settings; `key` names the parameter."""
    check_traceable(checkpoint, "the ONNX exporter")
    dtype = settings.dtype
    check_outer_types(settings, ("float16",) if dtype == "float16" else ("float32", "int8"), key="dtype", value=dtype)
    settings.outer_types(checkpoint)
    if checkpoint.layout == "w8a8" and not dtype.startswith("int8"):
        raise Incompatible(
            f"a W8A8 checkpoint means 8-bit inputs of its layers, which a graph of type {dtype} would not have; choose int8 or int8-static",
            key="dtype",
        )
    if dtype != "int4":
        return
    if settings.target != "onnxruntime":
        raise Incompatible("int4 is MatMulNBits, an operator of ONNX Runtime's own: it needs target: onnxruntime", key="target")
    if checkpoint.layout != "dense":
        _check_codes(checkpoint)
    elif wrong := {path: width for path, (_, width) in checkpoint.linear_widths().items() if width % settings.block_size}:
        raise Incompatible(
            f"block_size {settings.block_size} does not divide the width of {wrong}; prune to a multiple of it", key="block_size"
        )


def _check_codes(checkpoint: Checkpoint) -> None:
    """Raise Incompatible for codes of a GPTQ or AWQ checkpoint that do not fit MatMulNBits."""
    if checkpoint.config["quantization_config"].get("desc_act"):
        raise Incompatible("MatMulNBits has groups in storage order only, and this checkpoint's are not (desc_act)", key="dtype")
    widths = {width for _, width in checkpoint.linear_widths().values()}
    for scheme in schemes_of(checkpoint):
        if scheme.bits != 4 or any(scheme.width(width) not in BLOCK_SIZES for width in widths):
            raise Incompatible(
                f"MatMulNBits carries codes of 4 bits in groups of {', '.join(map(str, BLOCK_SIZES))}; this {checkpoint.layout.upper()} "
                f"checkpoint has {scheme.bits} bits in groups of {scheme.group_size}",
                key="dtype",
            )
