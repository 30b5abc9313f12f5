"""OpenVINO graphs against transformers, a float64 formula and the file's own text."""

import json
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from compression.checkpoints.checkpoint import open_checkpoint
from compression.checkpoints.loading import load_model, load_tokenizer
from compression.context import Context
from compression.data import DataSpec
from compression.errors import EdgepressError, Incompatible, UnusableModel
from compression.evaluation.generation import generate
from export.checks import TRACED_FAMILIES
from export.contents import read_contents
from export.openvino import OpenvinoSettings, check_openvino
from export.runtimes import open_runtime
from tasks.stage import stage_kinds
from tests.export.judging import contents, greedy, kl, model_of
from tests.tiny import tiny_checkpoint, tiny_windows

if find_spec("openvino") is None:  # not importorskip, which would import it with its telemetry on
    pytest.skip("OpenVINO is not installed: pip install 'edgepress[openvino]'", allow_module_level=True)

from export.openvino import export_openvino

MATRICES = 7 * 2  # linear layers of a tiny Llama


def constants(directory: Path) -> list[np.ndarray]:
    """Every matrix in the file, read by offset as the xml tells it."""
    types = {"f32": np.float32, "f16": np.float16, "i8": np.int8}
    data = (directory / "model.bin").read_bytes()
    found = []
    for layer in ET.parse(directory / "model.xml").iterfind(".//layer[@type='Const']/data"):
        shape = [int(n) for n in layer.attrib["shape"].split(",") if n]
        if layer.attrib["element_type"] in types and len(shape) == 2 and min(shape) > 1:
            offset, size = int(layer.attrib["offset"]), int(layer.attrib["size"])
            found.append(np.frombuffer(data[offset : offset + size], types[layer.attrib["element_type"]]).reshape(shape))
    return found


@pytest.fixture(scope="module")
def artifact(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("openvino")
    figures = export_openvino(checkpoint, out, OpenvinoSettings(dtype="float32"), context=Context())
    assert figures["bytes"] == sum(f.stat().st_size for f in out.iterdir())
    return out


@pytest.mark.slow
@pytest.mark.parametrize("family", TRACED_FAMILIES)
def test_every_family_equals_transformers_in_prefill_and_decode(family: str, tmp_path: Path) -> None:
    """Also far beyond a sliding window of 8 (gemma3_text, mistral), in a batch, and with a head of its own (qwen2)."""
    source = model_of(tmp_path / "model", family)
    export_openvino(source, tmp_path / "out", OpenvinoSettings(dtype="float32"), context=Context())
    runtime = open_runtime(tmp_path / "out", threads=1)
    assert (runtime.name, runtime.version, runtime.max_length) == ("openvino", metadata.version("openvino"), 128)
    ids = tiny_windows(2, 40)
    expected = load_model(source)(ids).logits.detach().numpy()
    np.testing.assert_allclose(runtime.logits(ids.numpy()), expected, atol=1e-4)
    decoded = [runtime.start(ids[1, :20].tolist(), 20).copy(), *(runtime.step(int(token)).copy() for token in ids[1, 20:])]
    np.testing.assert_allclose(np.array(decoded), expected[1, 19:], atol=1e-4)


def test_generates_what_transformers_does_and_repeats_itself(checkpoint: Path, artifact: Path) -> None:
    runtime = open_runtime(artifact, threads=2)
    tokens = greedy(checkpoint, 9, 24)
    for _ in range(2):  # a second time: the cache of the first is forgotten
        assert generate(runtime, tokens[0, :9].tolist(), 24).tokens == tokens[0, 9:].tolist()
    np.testing.assert_array_equal(runtime.logits(tokens.numpy()), runtime.logits(tokens.numpy()))
    runtime.close()
    with pytest.raises(AttributeError):
        runtime.logits(tokens.numpy())


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "bound"), [("float16", 1e-4), ("int8", 1e-2)])
def test_stored_types_keep_their_bounds(checkpoint: Path, dtype: str, bound: float, tmp_path: Path) -> None:
    export_openvino(checkpoint, tmp_path, OpenvinoSettings(dtype=dtype), context=Context())
    runtime, ids = open_runtime(tmp_path, threads=1), tiny_windows(4, 32)
    expected = load_model(checkpoint)(ids).logits.detach().numpy()
    assert 0 < kl(expected, runtime.logits(ids.numpy())) < bound
    decoded = [runtime.start(ids[0, :16].tolist(), 16).copy(), *(runtime.step(int(token)).copy() for token in ids[0, 16:])]
    assert kl(expected[0, 15:], np.array(decoded)) < bound


@pytest.mark.slow
def test_int8_rounds_the_linear_layers_and_what_else_is_asked(checkpoint: Path, tmp_path: Path) -> None:
    weights = [p.detach().double().numpy() for name, p in load_model(checkpoint).named_parameters() if "proj" in name]
    export_openvino(checkpoint, tmp_path / "linears", OpenvinoSettings(dtype="int8"), context=Context())
    found = constants(tmp_path / "linears")
    assert sorted(str(c.dtype) for c in found) == ["float32"] + ["int8"] * MATRICES
    for weight in weights:  # every code is the nearest one, by float64 formula
        scale = np.abs(weight).max(axis=1, keepdims=True) / 127
        assert any(c.shape == weight.shape and (np.abs(c - weight / scale) <= 0.5001).all() for c in found if c.dtype == np.int8)
    export_openvino(checkpoint, tmp_path / "all", OpenvinoSettings(dtype="float16", embedding_type="int8"), context=Context())
    assert sorted(str(c.dtype) for c in constants(tmp_path / "all")) == ["float16"] * MATRICES + ["int8"]


def test_an_untied_head_has_its_own_type(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "model", layers=1, tied=False, dtype=torch.bfloat16)
    export_openvino(source, tmp_path / "out", OpenvinoSettings(dtype="int8", head_type="int8"), context=Context())
    types = {c.dtype.name for c in constants(tmp_path / "out") if c.shape == (320, 64)}
    assert types == {"float16", "int8"}  # the embedding is as wide as the checkpoint's


def test_weights_are_in_the_file_once(checkpoint: Path, artifact: Path) -> None:
    parameters = sum(p.numel() for p in load_model(checkpoint).parameters())  # tied embeddings count once
    assert (artifact / "model.bin").stat().st_size == pytest.approx(4 * parameters, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_same_bytes_from_another_place_and_nothing_said(
    checkpoint: Path, dtype: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(checkpoint, tmp_path / "elsewhere")
    export_openvino(checkpoint, tmp_path / "one", OpenvinoSettings(dtype=dtype), context=Context())
    export_openvino(tmp_path / "elsewhere", tmp_path / "two", OpenvinoSettings(dtype=dtype), context=Context())
    assert capfd.readouterr() == ("", "")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_says_nothing_of_where_it_was_made(artifact: Path) -> None:
    for file in ("model.xml", "model.bin"):
        content = (artifact / file).read_bytes()
        assert not [trace for trace in (b"/tmp", b"/work", b"/home", b"/root", b"site-packages", b".py") if trace in content]


def test_carries_tokenizer_and_config(checkpoint: Path, artifact: Path) -> None:
    assert json.loads((artifact / "config.json").read_text()) == open_checkpoint(checkpoint).config
    text = "Dalo owns the lamp — 日本語"
    assert load_tokenizer(artifact)(text).input_ids == load_tokenizer(checkpoint)(text).input_ids


def test_sends_no_telemetry(tmp_path: Path) -> None:
    """In a fresh process, where nothing has imported OpenVINO before, with a home directory of its own."""
    code = "import sys; from export.runtimes.openvino_runtime import openvino; print(sys.modules['openvino_telemetry'], openvino.__name__)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"HOME": str(tmp_path), "PATH": "/usr/bin"}
    )
    assert done.stdout == "None openvino\n" and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("family", "changes", "parameters", "key", "pattern"),
    [
        ("llama", {}, {"dtype": "int8", "head_type": "int8"}, "head_type", "one tensor"),
        ("gpt_neox", {}, {"dtype": "float32"}, "uses", "'gpt_neox'"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            {"dtype": "float32"},
            "uses",
            "'dynamic'",
        ),
        ("phi3", {"rope_parameters": {"rope_type": "longrope"}, "sliding_window": None}, {"dtype": "float32"}, "uses", "'longrope'"),
    ],
)
def test_refuses_before_work(
    family: str, changes: dict, parameters: dict, key: str, pattern: str, checkpoint: Path, tmp_path: Path
) -> None:
    source = tmp_path / "model"
    shutil.copytree(checkpoint, source)
    config = json.loads((source / "config.json").read_text()) | {"model_type": family}
    (source / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(Incompatible, match=pattern) as error:
        check_openvino(open_checkpoint(source), OpenvinoSettings(**parameters))
    assert error.value.key == key
    with pytest.raises(Incompatible, match=pattern):
        export_openvino(source, tmp_path / "out", OpenvinoSettings(**parameters), context=Context())
    assert not (tmp_path / "out").exists()


def test_a_truncated_checkpoint_leaves_nothing_behind(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(EdgepressError):
        export_openvino(tmp_path / "model", tmp_path / "out", OpenvinoSettings(dtype="float32"), context=Context())
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_write_error_leaves_nothing(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("export.openvino.writer.copy_description", full)  # when graph and weights are written
    with pytest.raises(OSError, match="No space left"):
        export_openvino(checkpoint, tmp_path / "out", OpenvinoSettings(dtype="float32"), context=Context())
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_inspect_tells_its_tensors_by_type(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "model", tied=False)
    export_openvino(source, tmp_path / "out", OpenvinoSettings(dtype="int8", embedding_type="float16"), context=Context())
    found, model = read_contents(tmp_path / "out"), load_model(source)
    matrices = {name: p.numel() for name, p in model.named_parameters() if p.ndim == 2}
    assert found.runtime == "openvino" and found.architecture == read_contents(source).architecture
    assert found.parameters == sum(matrices.values())
    sizes = {t.type: t.bytes for t in found.tensors}
    assert sizes["i8"] == sum(count for name, count in matrices.items() if "proj" in name)
    assert sizes["f16"] == 2 * matrices["model.embed_tokens.weight"]
    assert sizes["f32"] > 4 * matrices["lm_head.weight"]  # and norms, scales and tables
    assert sum(sizes.values()) <= (tmp_path / "out" / "model.bin").stat().st_size  # which fills places up
    assert found.settings["INFERENCE_PRECISION_HINT"] == "f32"
    for file, keep in (("model.bin", -1), ("model.xml", 1000)):
        shutil.copytree(tmp_path / "out", tmp_path / file)
        (tmp_path / file / file).write_bytes((tmp_path / file / file).read_bytes()[:keep])
        with pytest.raises(UnusableModel, match="truncated or damaged") as error:
            read_contents(tmp_path / file)
        assert error.value.key == "model"


def test_the_stage_plans_what_it_writes(checkpoint: Path) -> None:
    data = DataSpec.model_validate({"text": "embedded", "questions": "embedded"})
    for parameters, change in (({}, "float"), ({"dtype": "int8"}, "int8"), ({"dtype": "float16", "embedding_type": "int8"}, "int8")):
        stage = stage_kinds()["export.openvino"].model_validate({"uses": "export.openvino", **parameters})
        planned = stage.plan(open_checkpoint(checkpoint), {}, data)
        assert (planned.runtime, planned.change) == ("openvino", change)  # type: ignore[union-attr]
