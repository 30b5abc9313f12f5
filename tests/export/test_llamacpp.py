"""The llama.cpp runtime against transformers."""

from pathlib import Path

import numpy as np
import pytest
import torch

from compression.checkpoints.loading import load_model
from compression.context import Context
from compression.errors import Incompatible, UnusableModel
from compression.evaluation.generation import generate
from export.gguf import GgufSettings, export_gguf
from export.runtimes import llamacpp
from export.runtimes.llamacpp import LlamaCppRuntime
from tests.tiny import tiny_windows


@pytest.fixture(scope="module")
def artifact(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gguf")
    export_gguf(checkpoint, out, GgufSettings(type="f32"), context=Context())
    return out


def test_chunks_do_not_show(artifact: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(llamacpp, "CHUNK", 24)  # windows of 64 take three
    runtime = LlamaCppRuntime(artifact, threads=1)
    windows = tiny_windows(3, 64)
    logits = runtime.logits(windows.numpy())
    runtime.close()
    assert capfd.readouterr().err == ""
    with torch.no_grad():
        expected = load_model(checkpoint)(windows).logits.numpy()
    assert logits.dtype == np.float32 and logits.shape == (3, 64, 320)
    np.testing.assert_allclose(logits, expected, atol=0.02)  # the KV cache is float16
    assert (logits.argmax(-1) == expected.argmax(-1)).mean() > 0.99


def test_padding_on_the_right_changes_nothing_before_it(artifact: Path) -> None:
    runtime = LlamaCppRuntime(artifact, threads=1)
    window = tiny_windows(1, 32).numpy()
    padded = np.concatenate([window, np.ones((1, 8), dtype=np.int64)], axis=1)
    np.testing.assert_allclose(runtime.logits(padded)[:, :32], runtime.logits(window), atol=1e-4)
    runtime.close()


def test_greedy_generation_is_the_one_of_transformers(artifact: Path, checkpoint: Path) -> None:
    runtime = LlamaCppRuntime(artifact, threads=1)
    prompt = tiny_windows(1, 12)
    generated = generate(runtime, prompt[0].tolist(), 24)
    again = generate(runtime, prompt[0].tolist(), 24)
    runtime.close()
    with torch.no_grad():
        expected = (
            load_model(checkpoint).generate(prompt, max_new_tokens=24, min_new_tokens=24, do_sample=False, eos_token_id=-1)[0, 12:].tolist()
        )
    assert generated.tokens == expected == again.tokens
    assert generated.prefill_seconds > 0 and generated.decode_seconds > 0


def test_length_is_bounded(artifact: Path) -> None:
    runtime = LlamaCppRuntime(artifact, threads=1, max_length=32)
    assert runtime.max_length == 32
    with pytest.raises(Incompatible, match="20 \\+ 13 tokens do not fit"):
        generate(runtime, [5] * 20, 13)
    with pytest.raises(Incompatible, match="40 tokens do not fit"):
        runtime.logits(tiny_windows(1, 40).numpy())
    with pytest.raises(Incompatible, match="below 320"):
        runtime.logits(np.full((1, 4), 320))
    runtime.close()
    runtime.close()  # a second time does nothing
    longest = LlamaCppRuntime(artifact, threads=1, max_length=4096)
    assert longest.max_length == 128
    longest.close()


def test_a_truncated_file_is_refused(artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes((artifact / "model.gguf").read_bytes()[:-5000])
    with pytest.raises(UnusableModel, match=r"cannot open .*corrupted or incomplete"):
        LlamaCppRuntime(tmp_path, threads=1)
