"""GenAI packages in GenAI against transformers: dense ones, and GPTQ's and AWQ's own codes."""

import dataclasses
import json
import socket
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import pytest

from compression.checkpoints.checkpoint import open_checkpoint
from compression.checkpoints.layouts import read_quantized_linears
from compression.checkpoints.loading import load_model
from compression.context import Context
from compression.errors import Incompatible
from compression.quantization.awq import quantize_awq
from compression.quantization.gptq import quantize_gptq
from compression.quantization.settings import AWQSettings, GPTQSettings
from export.genai import GenaiSettings, check_genai, export_genai
from export.genai.check import GENAI_FAMILIES, GENAI_LACKS
from export.runtimes.genai_runtime import GenaiRuntime
from tests.export.judging import of_type
from tests.tiny import tiny_checkpoint, tiny_windows

CONTEXT = Context()


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("quantized")
    dense = tiny_checkpoint(root / "dense")
    quantize_gptq(dense, root / "gptq", GPTQSettings(group_size=32), tiny_windows(), context=CONTEXT)
    quantize_awq(dense, root / "awq", AWQSettings(group_size=32), tiny_windows(), context=CONTEXT)
    return {layout: root / layout for layout in ("gptq", "awq")}


def difference(checkpoint: Path, artifact: Path, length: int = 24) -> float:
    """Largest difference in logits between a checkpoint in transformers and its package in GenAI."""
    ids = tiny_windows(2, length)
    expected = load_model(checkpoint)(ids).logits.detach().numpy()
    return float(np.abs(GenaiRuntime(artifact, threads=1).logits(ids.numpy()) - expected).max())


def initializers(artifact: Path) -> dict[str, np.ndarray]:
    graph = onnx_ir.load(artifact / "model.onnx").graph
    return {name: value.const_value.numpy() for name, value in graph.initializers.items() if value.const_value is not None}


@pytest.mark.parametrize("family", GENAI_FAMILIES)
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("fp16", 0.05)])
def test_float_packages_equal_transformers(family: str, precision: str, tolerance: float, tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "model", family, layers=1, tied=family != "qwen2")
    export_genai(source, tmp_path / "out", GenaiSettings(precision=precision), context=CONTEXT)
    assert difference(source, tmp_path / "out") < tolerance


@pytest.mark.parametrize("layout", ["gptq", "awq"])
def test_carried_codes_give_the_checkpoints_own_logits(layout: str, quantized: dict[str, Path], tmp_path: Path) -> None:
    export_genai(quantized[layout], tmp_path, GenaiSettings(precision="int4", accuracy_level=1), context=CONTEXT)
    assert difference(quantized[layout], tmp_path) < 1e-3  # rounding them again would move logits by more than 1
    found = initializers(tmp_path)
    layers = dict(read_quantized_linears(quantized[layout]))
    down = layers["model.layers.1.mlp.down_proj"]
    packed = found["model.layers.1.mlp.down_proj.MatMulNBits.qweight"].reshape(down.codes.shape[0], -1)
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(down.codes.shape)
    np.testing.assert_array_equal(codes, down.codes.numpy())
    np.testing.assert_array_equal(
        found["model.layers.1.mlp.down_proj.MatMulNBits.scales"].reshape(down.scales.shape), down.scales.float().numpy()
    )


def test_int4_rounds_blocks_only_unless_told(checkpoint: Path, tmp_path: Path) -> None:
    def quantized_nodes(out: Path, **options: str) -> set[str]:
        export_genai(checkpoint, out, GenaiSettings(precision="int4", **options), context=CONTEXT)
        graph = onnx.load(out / "model.onnx", load_external_data=False).graph
        return {n.name.split("/")[1] + n.name.split("/")[2] for n in graph.node if n.op_type in ("MatMulNBits", "GatherBlockQuantized")}

    assert quantized_nodes(tmp_path / "blocks") == {"modellayers.0", "modellayers.1"}
    assert len(quantized_nodes(tmp_path / "all", embedding_type="int4")) > 2


def test_same_bytes_offline_without_a_word(
    checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(*_: object) -> None:
        raise AssertionError("the builder asked the network")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    for name in ("one", "two"):
        export_genai(checkpoint, tmp_path / name, GenaiSettings(precision="int4"), context=CONTEXT)
    assert capfd.readouterr() == ("", "")
    one, two = ({f.name: f.read_bytes() for f in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two
    for content in one.values():
        assert str(tmp_path).encode() not in content and str(checkpoint).encode() not in content
    assert one["tokenizer.json"] == (checkpoint / "tokenizer.json").read_bytes()


def test_chat_template_is_included(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "model", layers=1)
    (source / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    export_genai(source, tmp_path / "out", GenaiSettings(precision="fp32"), context=CONTEXT)
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == (source / "chat_template.jinja").read_text()


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"precision": "fp32", "head_type": "int4"}, "head_type"),
        ({"precision": "int4", "embedding_type": "int4", "head_type": "float32"}, "head_type"),
    ],
)
def test_refuses_bad_options(checkpoint: Path, options: dict, key: str) -> None:
    with pytest.raises(Incompatible) as error:
        check_genai(open_checkpoint(checkpoint), GenaiSettings(**options))
    assert error.value.key == key


@pytest.mark.parametrize(
    ("layout", "change", "precision", "pattern"),
    [
        ("gptq", {}, "fp32", "precision must be int4"),
        ("gptq", {"bits": 3}, "int4", "3 bits"),
        ("gptq", {"group_size": -1}, "int4", "group_size -1"),
        ("gptq", {"desc_act": True}, "int4", "storage order"),
        ("gptq", {"checkpoint_format": "gptq_v2"}, "int4", "format is gptq"),
        ("awq", {"group_size": 48}, "int4", "group_size 48"),
    ],
)
def test_refuses_codes_it_cannot_carry(quantized: dict[str, Path], layout: str, change: dict, precision: str, pattern: str) -> None:
    checkpoint = open_checkpoint(quantized[layout])
    check_genai(checkpoint, GenaiSettings(precision="int4"))
    config = checkpoint.config | {"quantization_config": checkpoint.config["quantization_config"] | change}
    with pytest.raises(Incompatible, match=pattern):
        check_genai(dataclasses.replace(checkpoint, config=config), GenaiSettings(precision=precision))


@pytest.mark.parametrize("family", GENAI_LACKS)
def test_refuses_a_family_the_builder_lacks(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny_checkpoint(tmp_path / "model", family)
    with pytest.raises(Incompatible, match=f"{family!r}.*its builder"):
        export_genai(source, tmp_path / "out", GenaiSettings(precision="fp32"), context=CONTEXT)
    monkeypatch.setattr("export.genai.writer.check_genai", lambda *_, **__: None)
    with pytest.raises((KeyError, NotImplementedError)):  # if this passes one day, the builder has learned it
        export_genai(source, tmp_path / "out", GenaiSettings(precision="fp32"), context=CONTEXT)
    assert not (tmp_path / "out").exists()


def test_refuses_windows_and_lengths_of_rope(tmp_path: Path) -> None:
    window = open_checkpoint(tiny_checkpoint(tmp_path / "window", "mistral", layers=1, sliding_window=16))
    with pytest.raises(Incompatible, match="16 tokens of 128") as error:
        check_genai(window, GenaiSettings(precision="fp32"))
    assert error.value.key == "uses"
    phi = open_checkpoint(tiny_checkpoint(tmp_path / "phi", "phi3", layers=1))
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    with pytest.raises(Incompatible, match="'longrope'"):
        check_genai(dataclasses.replace(phi, config=phi.config | {"rope_parameters": rope}), GenaiSettings(precision="fp32"))


LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e4}
LLAMA3 = YARN | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("family", "config", "pattern"),
    [
        ("llama", {"rope_parameters": LINEAR}, "'linear'.*export.gguf and export.onnx.*default, llama3"),
        ("llama", {"rope_parameters": YARN}, "'yarn'"),
        ("qwen2", {"rope_parameters": YARN}, "'yarn'.*default, linear"),
        ("mistral", {"rope_parameters": LLAMA3, "sliding_window": None}, "'llama3'"),
        ("llama", {"head_dim": 24}, "multiple of 16.*24 wide"),
        ("phi3", {"original_max_position_embeddings": 64}, "set both to 128"),
        ("phi3", {"original_max_position_embeddings": 128, "sliding_window": 16}, "and original_max_position_embeddings to 16"),
    ],
)
def test_refuses_what_the_builder_writes_wrong(checkpoint: Path, family: str, config: dict, pattern: str) -> None:
    with pytest.raises(Incompatible, match=pattern) as error:
        check_genai(of_type(open_checkpoint(checkpoint), family, **config), GenaiSettings(precision="fp32"))
    assert error.value.key == "uses"


@pytest.mark.parametrize(
    ("family", "config"),
    [("qwen3", {"rope_parameters": LINEAR}), ("llama", {"rope_parameters": LLAMA3}), ("phi3", {"sliding_window": 16})],
)
def test_what_it_writes_right(tmp_path: Path, family: str, config: dict) -> None:
    source = tiny_checkpoint(tmp_path / "model", family, layers=1, **config)
    if family == "phi3":  # as the refusal advises
        shape = json.loads((source / "config.json").read_text())
        shape |= {"max_position_embeddings": 16, "original_max_position_embeddings": 16}
        (source / "config.json").write_text(json.dumps(shape))
    export_genai(source, tmp_path / "out", GenaiSettings(precision="fp32"), context=CONTEXT)
    assert difference(source, tmp_path / "out", 16) < 1e-4


def test_the_tokenizer_is_tried_on_texts(checkpoint: Path, tmp_path: Path) -> None:
    said: list[str] = []
    context = Context(warn=said.append)
    assert (
        export_genai(checkpoint, tmp_path / "right", GenaiSettings(precision="fp32"), context=context)["tokenizer_differences"] == 0
        and not said
    )
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text())
    source = tiny_checkpoint(tmp_path / "model", layers=1)
    tokenizer["normalizer"] = {"type": "Replace", "pattern": {"Regex": "[0-9]"}, "content": "#"}  # which GenAI does not know
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    figures = export_genai(source, tmp_path / "wrong", GenaiSettings(precision="fp32"), context=context)
    assert figures["tokenizer_differences"] > 0 and len(said) == 1 and "GenAI's tokenizer" in said[0]


def test_a_failure_leaves_nothing(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("export.genai.writer.copy_tokenizer", full)
    with pytest.raises(OSError, match="No space left"):
        export_genai(checkpoint, tmp_path / "out", GenaiSettings(precision="fp32"), context=CONTEXT)
    assert not list(tmp_path.iterdir())
