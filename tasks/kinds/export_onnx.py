"""`export.onnx`: one ONNX generation graph with a KV cache."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from compression.checkpoints.checkpoint import Checkpoint, Layout
from compression.context import Context
from compression.data import DataSpec
from export.checks import check_onnx, outer_types
from export.proof import Change
from tasks.stage import Artifact, Inputs, Planned, Reads, Stage, Workplace

_BYTES = {"float32": 4.0, "float16": 2.0, "int8": 1.0, "int8-static": 1.0, "int4": 0.6}
_CALIBRATED = "int8-static"


class ExportOnnx(Stage):
    """ONNX through transformers' exporter; codes of W8A8 checkpoints are carried, and of GPTQ and AWQ ones with dtype int4."""

    uses: Literal["export.onnx"] = "export.onnx"
    version: ClassVar[int] = 2
    metrics: ClassVar[tuple[str, ...]] = ("opset", "bytes")
    libraries: ClassVar[tuple[str, ...]] = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime")
    accepts: ClassVar[frozenset[Layout]] = frozenset({"dense", "gptq", "awq", "w8a8"})
    sparse: ClassVar[bool] = True
    extra: ClassVar[str | None] = "onnx"

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
    block_size: Annotated[int, Field(description="int4: weights that share a scale where a dense checkpoint is rounded here.")] = 32
    accuracy_level: Annotated[Literal[1, 4], Field(description="int4: 4 multiplies with int8 activations (faster), 1 with float32.")] = 4
    embedding_type: Annotated[
        Literal["float32", "float16", "int8"] | None, Field(description="Of the token embedding; default: the float type of the graph.")
    ] = None
    head_type: Annotated[
        Literal["float32", "float16", "int8"] | None,
        Field(description="As embedding_type, for the output head; a tied one is stored once."),
    ] = None

    def data_read(self) -> Reads:
        return "calibration" if self.dtype == _CALIBRATED else "nothing"

    def deciding_libraries(self) -> tuple[str, ...]:
        return (*self.libraries, "tokenizers") if self.dtype == _CALIBRATED else self.libraries

    def plan(self, parent: Checkpoint, others: Mapping[str, Planned], data: DataSpec) -> Planned:
        check_onnx(parent, **self.model_dump(exclude={"uses"}))
        return Artifact("onnxruntime", self._change(parent), int(parent.num_parameters * _BYTES[self.dtype]))

    def _change(self, parent: Checkpoint) -> Change:
        if self.dtype == _CALIBRATED:
            return "int8-static"
        if self.dtype == "int4" and parent.layout == "dense":
            return "int4"
        outer = outer_types(parent, type=self.dtype, embedding_type=self.embedding_type, head_type=self.head_type)
        if "int8" in (self.dtype, *outer):
            return "int8"
        return "carried" if self.dtype == "int4" else "float"

    def run(self, inputs: Inputs, place: Workplace, data: DataSpec, context: Context) -> dict[str, float]:
        from compression.checkpoints.loading import load_tokenizer
        from compression.data import calibration_windows
        from export.onnx import export_onnx

        windows = calibration_windows(data, load_tokenizer(inputs.parent), context.seed) if self.dtype == _CALIBRATED else None
        return export_onnx(inputs.parent, place.out, **self.model_dump(exclude={"uses"}), windows=windows, context=context)
