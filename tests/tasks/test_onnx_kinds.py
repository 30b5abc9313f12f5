"""What `export.onnx` and `export.genai` plan: the change that decides the bound of their proof, and the data they read."""

from pathlib import Path

import pytest

from compression.checkpoints.checkpoint import Checkpoint, Layout, open_checkpoint
from compression.checkpoints.quantization_config import awq_config
from compression.checkpoints.schemes import Scheme
from compression.data import DataSpec
from compression.errors import Incompatible
from compression.quantization.settings import GPTQSettings, plan_gptq
from tasks.kinds.export_genai import ExportGenai
from tasks.kinds.export_onnx import ExportOnnx
from tasks.stage import Artifact

DATA = DataSpec.model_validate("embedded")


@pytest.fixture
def planned(checkpoint: Path) -> dict[Layout, Checkpoint]:
    """The tiny checkpoint, and what the quantizers will make of it."""
    dense = open_checkpoint(checkpoint)

    def as_layout(layout: Layout, quantization: dict) -> Checkpoint:
        return Checkpoint(dense.path, dense.config | {"quantization_config": quantization}, layout)

    gptq = plan_gptq(dense, GPTQSettings(bits=4, group_size=32, symmetric=True))
    return {
        "dense": dense,
        "gptq": gptq,
        "awq": as_layout("awq", awq_config(group_size=32)),
        "w8a8": as_layout("w8a8", Scheme("int").config()),
    }


@pytest.mark.parametrize(
    ("layout", "parameters", "change", "reads"),
    [
        ("dense", {}, "float", "nothing"),
        ("dense", {"dtype": "float16"}, "float", "nothing"),
        ("dense", {"embedding_type": "int8"}, "int8", "nothing"),
        ("dense", {"dtype": "int8"}, "int8", "nothing"),
        ("dense", {"dtype": "int8-static"}, "int8-static", "calibration"),
        ("dense", {"dtype": "int4", "target": "onnxruntime"}, "int4", "nothing"),
        ("gptq", {}, "float", "nothing"),
        ("gptq", {"dtype": "int4", "target": "onnxruntime"}, "carried", "nothing"),
        ("awq", {"dtype": "int4", "target": "onnxruntime"}, "carried", "nothing"),
        ("awq", {"dtype": "int4", "target": "onnxruntime", "embedding_type": "int8"}, "int8", "nothing"),
        ("w8a8", {"dtype": "int8"}, "int8", "nothing"),
        ("w8a8", {"dtype": "int8-static"}, "int8-static", "calibration"),
    ],
)
def test_onnx(planned: dict[Layout, Checkpoint], layout: Layout, parameters: dict, change: str, reads: str) -> None:
    stage = ExportOnnx.model_validate(parameters)
    artifact = stage.plan(planned[layout], {}, DATA)
    assert isinstance(artifact, Artifact) and artifact.change == change
    assert stage.data_read() == reads and ("tokenizers" in stage.deciding_libraries()) == (reads == "calibration")


@pytest.mark.parametrize(
    ("layout", "parameters", "change"),
    [
        ("dense", {"precision": "fp16"}, "float"),
        ("dense", {}, "int4"),
        ("gptq", {}, "carried"),
        ("awq", {"embedding_type": "int4"}, "int4"),  # the tied embedding is rounded here, whatever the layers carry
    ],
)
def test_genai(planned: dict[Layout, Checkpoint], layout: Layout, parameters: dict, change: str) -> None:
    artifact = ExportGenai.model_validate(parameters).plan(planned[layout], {}, DATA)
    assert isinstance(artifact, Artifact) and artifact.change == change


def test_int4_is_onnx_runtimes_own(planned: dict[Layout, Checkpoint]) -> None:
    with pytest.raises(Incompatible, match="target: onnxruntime") as error:
        ExportOnnx(dtype="int4").plan(planned["dense"], {}, DATA)
    assert error.value.key == "target"
