"""`export.onnx`: one ONNX generation graph with a KV cache."""

from collections.abc import Mapping
from typing import ClassVar, Literal

from compression.checkpoints.checkpoint import Checkpoint, Layout
from compression.context import Context
from compression.data import DataSpec
from export.onnx import OnnxSettings, check_onnx
from export.proof import Change
from tasks.stage import Artifact, Inputs, Planned, Reads, Stage, Workplace

_BYTES = {"float32": 4.0, "float16": 2.0, "int8": 1.0, "int8-static": 1.0, "int4": 0.6}


class ExportOnnx(OnnxSettings, Stage):
    """ONNX through transformers' exporter; codes of W8A8 checkpoints are carried, and of GPTQ and AWQ ones with dtype int4."""

    uses: Literal["export.onnx"] = "export.onnx"
    version: ClassVar[int] = 2
    metrics: ClassVar[tuple[str, ...]] = ("opset", "bytes")
    libraries: ClassVar[tuple[str, ...]] = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime")
    accepts: ClassVar[frozenset[Layout]] = frozenset({"dense", "gptq", "awq", "w8a8"})
    sparse: ClassVar[bool] = True
    extra: ClassVar[str | None] = "onnx"

    def data_read(self) -> Reads:
        return "calibration" if self.is_calibrated else "nothing"

    def deciding_libraries(self) -> tuple[str, ...]:
        return (*self.libraries, "tokenizers") if self.is_calibrated else self.libraries

    def plan(self, parent: Checkpoint, others: Mapping[str, Planned], data: DataSpec) -> Planned:
        check_onnx(parent, self)
        return Artifact("onnxruntime", self._change(parent), int(parent.num_parameters * _BYTES[self.dtype]))

    def _change(self, parent: Checkpoint) -> Change:
        if self.dtype == "int8-static":
            return "int8-static"
        if self.dtype == "int4" and parent.layout == "dense":
            return "int4"
        if "int8" in (self.dtype, *self.outer_types(parent)):
            return "int8"
        return "carried" if self.dtype == "int4" else "float"

    def run(self, inputs: Inputs, place: Workplace, data: DataSpec, context: Context) -> dict[str, float]:
        from compression.checkpoints.loading import load_tokenizer
        from compression.data import calibration_windows
        from export.onnx import export_onnx

        windows = calibration_windows(data, load_tokenizer(inputs.parent), context.seed) if self.is_calibrated else None
        return export_onnx(inputs.parent, place.out, self, windows=windows, context=context)
