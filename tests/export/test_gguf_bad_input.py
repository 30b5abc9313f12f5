"""What cannot be exported fails with its reason, and leaves nothing half-written."""

import json
import shutil
import subprocess
from pathlib import Path

import gguf
import pytest
from safetensors.torch import load_file, save_file

from compression.context import Context
from compression.errors import EdgepressError, Incompatible, UnusableModel
from export.gguf import GgufSettings, export_gguf, native
from tests.tiny import tiny_checkpoint, tiny_tokenizer


@pytest.fixture
def source(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "model"))


def left(out: Path) -> list[Path]:
    return list(out.rglob("*")) if out.exists() else []


def test_truncated_safetensors(source: Path, tmp_path: Path) -> None:
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UnusableModel, match=r"model\.safetensors is truncated"):
        export_gguf(source, tmp_path / "out", GgufSettings(type="f16"), context=Context())
    assert left(tmp_path / "out") == []


def test_a_tensor_that_is_not_there(source: Path, tmp_path: Path) -> None:
    weights = load_file(source / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(EdgepressError, match=r"(?s)tensor 'blk\.1\.ffn_up\.weight' not found.*cannot open"):
        export_gguf(source, tmp_path / "out", GgufSettings(type="f16"), context=Context())
    assert left(tmp_path / "out") == []


def test_missing_tokenizer(source: Path, tmp_path: Path) -> None:
    (source / "tokenizer.json").unlink()
    with pytest.raises(UnusableModel, match=r"no tokenizer\.json"):
        export_gguf(source, tmp_path / "out", GgufSettings(type="f16"), context=Context())
    assert left(tmp_path / "out") == []


def test_a_vocabulary_larger_than_the_embedding(source: Path, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(300)
    tokenizer.add_tokens([f"<extra{i}>" for i in range(40)])
    tokenizer.save_pretrained(source)
    with pytest.raises(Incompatible, match="the embedding has only 320 rows"):
        export_gguf(source, tmp_path / "out", GgufSettings(type="f16"), context=Context())
    assert left(tmp_path / "out") == []


def test_a_family_that_llama_cpp_lacks(source: Path, tmp_path: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"]}))
    with pytest.raises(Incompatible, match="does not write the architecture 'gpt_neox'"):
        export_gguf(source, tmp_path / "out", GgufSettings(type="f16"), context=Context())
    assert left(tmp_path / "out") == []


def test_a_disk_that_fills_while_tensors_are_written(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: gguf.GGUFWriter, **_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
    with pytest.raises(OSError, match="No space left"):
        export_gguf(source, tmp_path / "out", GgufSettings(type="f16"), context=Context())
    assert left(tmp_path / "out") == []


def test_a_disk_that_is_full_for_llama_cpp(tmp_path: Path) -> None:
    """/dev/full takes no byte: what its quantizer says of that is the error, not a file that is too short."""
    source = tiny_checkpoint(tmp_path / "model", hidden=32, intermediate=32, layers=1)
    export_gguf(source, tmp_path / "out", GgufSettings(type="f32"), context=Context())
    with pytest.raises(EdgepressError, match="failed to quantize"):
        native.quantize(
            tmp_path / "out" / "model.gguf", Path("/dev/full"), "q4_0", embedding_type="f32", head_type="f32", importance={}, threads=1,
            work=tmp_path,
        )  # fmt: skip


def test_an_abort_of_native_code(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = subprocess.run

    def aborting(command: list[str], **settings: object) -> object:
        return run(
            [command[0], "-c", "import os, sys; sys.stderr.write('GGML_ASSERT(false) failed'); sys.stderr.flush(); os.abort()"], **settings
        )

    monkeypatch.setattr(native.subprocess, "run", aborting)
    with pytest.raises(EdgepressError, match=r"failed to tokenize \(exit code -6\): GGML_ASSERT"):
        export_gguf(source, tmp_path / "out", GgufSettings(type="f16"), context=Context())
    assert left(tmp_path / "out") == []
