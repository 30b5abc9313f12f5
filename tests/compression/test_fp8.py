"""fp8: what is written, for any decoder, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from compression.checkpoints.checkpoint import open_checkpoint
from compression.checkpoints.loading import load_model
from compression.checkpoints.masks import read_masks, write_masks
from compression.context import Context
from compression.errors import Incompatible, UnusableModel
from compression.quantization.fp8 import quantize_fp8
from compression.quantization.settings import FP8Settings
from tests.tiny import tiny_checkpoint, tiny_windows


@pytest.mark.parametrize("strategy", ["channel", "tensor"])
def test_what_is_written(tmp_path: Path, strategy: str) -> None:
    source = tiny_checkpoint(tmp_path / "in", dtype=torch.float32)
    figures = [quantize_fp8(source, tmp_path / name, FP8Settings(strategy=strategy), context=Context()) for name in ("a", "b")]
    assert figures == [{"quantized_layers": 14.0}] * 2
    after = open_checkpoint(tmp_path / "a")
    assert after.layout == "fp8"
    group = after.config["quantization_config"]["config_groups"]["group_0"]
    assert group["weights"]["strategy"] == strategy and group["input_activations"]["strategy"] == "token"
    before, stored = load_file(source / "model.safetensors"), load_file(tmp_path / "a" / "model.safetensors")
    assert set(stored) - set(before) == {f"{n.removesuffix('weight')}weight_scale" for n in before if n.endswith("_proj.weight")}
    for name, tensor in before.items():
        if not name.endswith("_proj.weight"):
            assert torch.equal(stored[name], tensor)
            continue
        weight = tensor.double().numpy()
        scale = np.abs(weight).max(1 if strategy == "channel" else None, keepdims=True) / 448
        error = np.abs(stored[name].double().numpy() * scale - weight)
        # half a step: 3 bits of mantissa are stored, and nothing is finer than 2^-9 scales
        assert (error <= np.maximum(np.abs(weight) * 2**-4, scale * 2**-10) * (1 + 1e-5)).all(), name
        np.testing.assert_allclose(stored[f"{name}_scale"].numpy().reshape(-1), scale.reshape(-1), rtol=1e-6)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_a_scale_for_each_channel_loses_less(tmp_path: Path, checkpoint: Path) -> None:
    model = load_model(checkpoint)
    for parameter in model.model.layers.parameters():
        if parameter.dim() == 2:
            parameter.data *= torch.logspace(-7, 0, len(parameter))[:, None]  # below 2^-15 of the largest, E4M3 has few or no digits
    source = tiny_checkpoint(tmp_path / "in")
    save_file({n: p.contiguous() for n, p in model.state_dict().items() if n != "lm_head.weight"}, source / "model.safetensors")
    errors = {}
    for strategy in ("channel", "tensor"):
        quantize_fp8(source, tmp_path / strategy, FP8Settings(strategy=strategy), context=Context())
        rounded = load_model(tmp_path / strategy)
        errors[strategy] = sum(
            float(((p - q) / p.abs().amax(1, keepdim=True)).square().mean())
            for p, q in zip(model.model.layers.parameters(), rounded.model.layers.parameters(), strict=True)
            if p.dim() == 2
        )
    assert errors["channel"] < 0.5 * errors["tensor"]


@pytest.mark.parametrize("family", ["stablelm", "gpt_neox", "opt", "phi3"])  # only phi3 is listed
def test_any_decoder_of_linear_layers(tmp_path: Path, family: str) -> None:
    source = tiny_checkpoint(tmp_path / "in", family, tied=False, kv_heads=4, word_embed_proj_dim=32)
    quantize_fp8(source, tmp_path / "q", FP8Settings(), context=Context())
    ignored = open_checkpoint(tmp_path / "q").config["quantization_config"]["ignore"]
    assert ignored == (["lm_head", "model.decoder.project_in", "model.decoder.project_out"] if family == "opt" else ["lm_head"])
    with torch.no_grad():
        dense, logits = (load_model(path)(tiny_windows()).logits for path in (source, tmp_path / "q"))
    assert 0 < float((logits - dense).std()) < 0.2 * float(dense.std())


def test_zeros_and_masks_stay(tmp_path: Path, checkpoint: Path) -> None:
    source = tiny_checkpoint(tmp_path / "in")
    tensors = load_file(source / "model.safetensors")
    masks = {n: torch.rand(t.shape, generator=torch.Generator().manual_seed(0)) < 0.5 for n, t in tensors.items() if "_proj" in n}
    save_file({n: t * masks[n] if n in masks else t for n, t in tensors.items()}, source / "model.safetensors", metadata={"format": "pt"})
    write_masks(source, masks)
    quantize_fp8(source, tmp_path / "q", FP8Settings(), context=Context())
    model = load_model(tmp_path / "q")
    assert open_checkpoint(tmp_path / "q").sparse
    for name, mask in read_masks(tmp_path / "q").items():
        assert torch.equal(mask, masks[name]) and not model.get_parameter(name)[~mask].any()


def test_what_cannot_be_rounded_is_refused(tmp_path: Path, checkpoint: Path) -> None:
    quantize_fp8(checkpoint, tmp_path / "q", FP8Settings(), context=Context())
    with pytest.raises(Incompatible, match=r"quantized already \(fp8\)"):
        quantize_fp8(tmp_path / "q", tmp_path / "again", FP8Settings(), context=Context())
    source = tiny_checkpoint(tmp_path / "in")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = torch.nan
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnusableModel, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds values that are not finite"):
        quantize_fp8(source, tmp_path / "out", FP8Settings(), context=Context())
    assert not (tmp_path / "out" / "config.json").exists()
    experts = tiny_checkpoint(tmp_path / "experts", "mixtral", num_local_experts=2)  # transformers holds them in one tensor
    with pytest.raises(Incompatible, match=r"layers\.0\.mlp\.experts\.down_proj"):
        quantize_fp8(experts, tmp_path / "out2", FP8Settings(), context=Context())
