"""The importance matrix: against hooks on the whole model in float64, and what llama.cpp's quantizer makes of it."""

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from compression.checkpoints.checkpoint import open_checkpoint
from compression.checkpoints.loading import load_model
from compression.context import Context
from compression.errors import Incompatible
from export.gguf import GgufSettings, export_gguf
from export.gguf.importance import gather_importance
from export.gguf.native import encode
from export.gguf.types import NEEDS_IMPORTANCE, TENSOR_TYPES
from tasks.kinds.export_gguf import ExportGguf
from tests.export.test_gguf import divergence
from tests.export.test_gguf_carry import quantized_checkpoint
from tests.tiny import tiny_checkpoint, tiny_windows


def uneven_checkpoint(path: Path, **settings: int) -> Path:
    """A checkpoint whose layers read a few channels that are far larger than the others, as real ones do."""
    source = tiny_checkpoint(path, **settings)
    weights = load_file(source / "model.safetensors")
    for name, weight in weights.items():
        if name.endswith("layernorm.weight"):
            weight[::7] *= 12
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    return source


def mean_squares(path: Path, windows: torch.Tensor) -> dict[str, np.ndarray]:
    """By transformers' whole model: the mean over all tokens of the squares of what each linear layer and the head read, float64."""
    model, found = load_model(path), dict[str, np.ndarray]()

    def hook(name: str) -> Callable[..., None]:
        def before(_: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
            found[f"{name}.weight"] = inputs[0].double().square().flatten(0, 1).mean(0).numpy()

        return before

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(hook(name))
    with torch.no_grad():
        model(windows)
    return found


@pytest.mark.parametrize("kind", ["llama", "phi3", "gemma3_text", "gptq"])
def test_it_is_the_mean_square_of_every_layers_inputs(tmp_path: Path, kind: str) -> None:
    if kind == "gptq":
        source = quantized_checkpoint(tmp_path / "model", "gptq", 4, 32)
    else:
        source = tiny_checkpoint(tmp_path / "model", kind, tied=kind != "phi3")
    windows, checkpoint = tiny_windows(6, 32), open_checkpoint(source)
    found = gather_importance(checkpoint, windows, Context(), work=tmp_path / "work")
    expected = mean_squares(source, windows)
    if checkpoint.tied:
        expected["model.embed_tokens.weight"] = expected.pop("lm_head.weight")
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-4, err_msg=name)


def test_channels_that_are_never_touched_keep_a_weight(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "model")
    weights = load_file(source / "model.safetensors")
    weights["model.layers.0.input_layernorm.weight"][:5] = 0
    weights["model.layers.1.mlp.up_proj.weight"][:] = 0
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    found = gather_importance(open_checkpoint(source), tiny_windows(2), Context(), work=tmp_path / "work")
    dead = found["model.layers.0.self_attn.q_proj.weight"]
    assert 0 < dead[:5].max() < 1e-5 * dead.mean()
    assert (found["model.layers.1.mlp.down_proj.weight"] == 1).all()


def test_the_quantizer_spends_its_precision_where_inputs_are_large(tmp_path: Path) -> None:
    source = uneven_checkpoint(tmp_path / "model", hidden=256, intermediate=256, layers=1)
    windows = tiny_windows(8, 64)
    squares = mean_squares(source, windows)["model.layers.0.mlp.up_proj.weight"]
    weight = load_file(source / "model.safetensors")["model.layers.0.mlp.up_proj.weight"].double().numpy()
    losses = []
    for out, importance in (("without", False), ("with", True)):
        export_gguf(
            source,
            tmp_path / out,
            GgufSettings(type="q2_k", embedding_type="q6_k", importance=importance),
            windows=windows if importance else None,
            context=Context(),
        )
        tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / out / "model.gguf").tensors}
        assert tensors["token_embd.weight"].tensor_type.name == "Q6_K"
        stored = gguf.dequantize(tensors["blk.0.ffn_up.weight"].data, tensors["blk.0.ffn_up.weight"].tensor_type)
        losses.append((squares * (stored - weight) ** 2).sum())
    assert losses[1] < 0.8 * losses[0]


@pytest.mark.parametrize("type", ["q2_k_s", "iq4_nl", "iq4_xs", "iq3_m", "iq2_xxs"])  # the others take 5 to 30 seconds
def test_iq_types(tmp_path: Path, type: str) -> None:
    source = tiny_checkpoint(tmp_path / "model", hidden=256, intermediate=256, layers=1)
    windows = tiny_windows(4) if type in NEEDS_IMPORTANCE else None
    if windows is not None:
        with pytest.raises(Incompatible, match="importance: true"):
            export_gguf(source, tmp_path / "out", GgufSettings(type=type), context=Context())
    metrics = export_gguf(
        source,
        tmp_path / "out",
        GgufSettings(type=type, embedding_type="q8_0", importance=windows is not None),
        windows=windows,
        context=Context(),
    )
    found = {t.name: t.tensor_type.name.lower() for t in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    assert found["blk.0.ffn_gate.weight"] == {"iq3_m": "iq3_s", "q2_k_s": "q2_k"}.get(type, type)
    assert metrics["fallback_tensors"] == 0
    assert divergence(source, tmp_path / "out") < 8  # it runs


@pytest.mark.parametrize("type", [type for type, block in TENSOR_TYPES.items() if block > 1])
def test_embedding_and_head_types_are_llama_cpps_own(type: str) -> None:
    array = np.random.default_rng(0).normal(size=(1500, 256)).astype(np.float32)
    ggml = gguf.GGMLQuantizationType[type.upper()]
    found = gguf.dequantize(encode(array, type, None), ggml)
    assert found.shape == array.shape and np.abs(found - array).mean() < {"q2_k": 0.4, "q3_k": 0.2, "iq3_s": 0.2}.get(type, 0.1)


def test_embedding_and_head_beside_carried_codes(tmp_path: Path) -> None:
    source = quantized_checkpoint(tmp_path / "model", "gptq", 4, 32)
    metrics = export_gguf(source, tmp_path / "out", GgufSettings(type="carry", embedding_type="q4_0", head_type="q4_0"), context=Context())
    tensors = gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors
    assert {t.tensor_type.name for t in tensors if len(t.shape) == 2} == {"Q4_0"}
    assert metrics["fallback_tensors"] == 0 and metrics["bits_per_weight"] == pytest.approx(
        8 * sum(t.n_bytes for t in tensors) / sum(t.n_elements for t in tensors)
    )


def test_the_identity_depends_on_data_only_where_it_is_used() -> None:
    assert ExportGguf(type="q4_k_m").data_read() == "nothing"
    assert ExportGguf(type="q4_k_m", importance=True).data_read() == "calibration"
    assert "tokenizers" in ExportGguf(type="q4_k_m", importance=True).deciding_libraries()
