"""SmoothQuant: smoothing changes nothing but the balance, it pays where activations have outliers, and what is written."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from compression.calibration.walk import walk
from compression.checkpoints.checkpoint import open_checkpoint
from compression.checkpoints.families import FAMILIES, Family
from compression.checkpoints.loading import load_model
from compression.checkpoints.masks import read_masks, write_masks
from compression.context import Context
from compression.errors import UnusableModel
from compression.quantization.settings import SmoothQuantSettings
from compression.quantization.smoothquant import quantize_smoothquant, smooth, smoothing_scales
from tests.tiny import tiny_checkpoint, tiny_windows

ABSMAX = frozenset({"absmax"})


def outliers(source: Path) -> Path:
    """Drive a few channels behind each norm, and of what down projections read, far harder than the others, as in trained models."""
    tensors = load_file(source / "model.safetensors")
    for name, tensor in tensors.items():
        if "layers" in name and name.endswith("layernorm.weight"):
            tensor[::9] = tensor[::9] * 30 + 20  # Gemma's weights begin at 0
        if name.endswith("mlp.up_proj.weight"):
            tensor[::17] *= 30
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    return source


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8, 1.0])
def test_scales_are_the_papers(alpha: float) -> None:
    generator = torch.Generator().manual_seed(0)
    absmax, weight = torch.rand(16, generator=generator) * 50, torch.randn(8, 16, generator=generator)
    absmax[3] = 0  # never driven
    weight[:, 5] = 0  # never read
    scales = smoothing_scales(absmax, weight, alpha).double().numpy()
    with np.errstate(divide="ignore"):
        expected = absmax.double().numpy() ** alpha / np.abs(weight.double().numpy()).max(0) ** (1 - alpha)
    expected[[3, 5]] = 1
    np.testing.assert_allclose(scales, expected, rtol=1e-5)


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_the_smoothed_model_is_the_model(tmp_path: Path, family: str, kv_heads: int) -> None:
    source = outliers(tiny_checkpoint(tmp_path / "in", family, kv_heads=kv_heads))
    smoothed, model = load_model(source), load_model(source)
    pairs = []
    for block in walk(open_checkpoint(source), tiny_windows(), collect=ABSMAX, context=Context()):
        before = {name: parameter.clone() for name, parameter in block.module.named_parameters()}
        pairs.append(smooth(block, FAMILIES[family], 0.5))
        assert any(not torch.allclose(parameter, before[name]) for name, parameter in block.module.named_parameters())
        smoothed.get_submodule(block.name).load_state_dict(block.module.state_dict())
    assert pairs == [len(FAMILIES[family].scale_pairs) - (kv_heads == 2)] * 2  # under grouped queries v -> o has no scales
    with torch.no_grad():
        logits, expected = smoothed.double()(tiny_windows()).logits, model.double()(tiny_windows()).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-4 * float(expected.std()))


@pytest.mark.parametrize("pair", FAMILIES["llama"].scale_pairs)
def test_at_one_half_inputs_and_weights_are_as_large(tmp_path: Path, pair: tuple[str, tuple[str, ...]]) -> None:
    source = outliers(tiny_checkpoint(tmp_path / "in", kv_heads=4))
    block = next(walk(open_checkpoint(source), tiny_windows(), collect=ABSMAX, context=Context()))
    smooth(block, Family(scale_pairs=(pair,)), 0.5)
    tensors = load_file(source / "model.safetensors")
    tensors |= {f"{block.name}.{name}": parameter.data for name, parameter in block.module.named_parameters()}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    again = next(walk(open_checkpoint(source), tiny_windows(), collect=ABSMAX, context=Context()))
    (shared,) = (shared for shared in again.inputs if pair[1][0] in shared.layers)
    read = torch.cat([again.linear(path).weight for path in pair[1]]).abs().amax(0)
    torch.testing.assert_close(shared.absmax, read, rtol=1e-3, atol=0)


def logits(path: Path) -> torch.Tensor:
    with torch.no_grad():
        return load_model(path)(tiny_windows(seed=5)).logits


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outliers_cost_less_than_by_plain_rounding(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    source = outliers(tiny_checkpoint(tmp_path / "in", family, kv_heads=4, dtype=dtype))
    expected, loss = logits(source), {}
    for alpha in (None, 0.5):
        figures = quantize_smoothquant(source, tmp_path / str(alpha), SmoothQuantSettings(alpha=alpha), tiny_windows(), context=Context())
        assert figures == {"scaled_pairs": 0.0 if alpha is None else 8.0}
        loss[alpha] = float((logits(tmp_path / str(alpha)) - expected).square().mean())
    assert loss[0.5] < 0.6 * loss[None], loss


def test_what_is_written(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "in", dtype=torch.bfloat16)
    for name in ("a", "b"):
        quantize_smoothquant(source, tmp_path / name, SmoothQuantSettings(), tiny_windows(), context=Context())
    after = open_checkpoint(tmp_path / "a")
    assert after.layout == "w8a8" and not after.sparse
    config = after.config["quantization_config"]
    assert (config["quant_method"], config["format"], config["ignore"]) == ("compressed-tensors", "int-quantized", ["lm_head"])
    down = {name.rpartition(".")[2]: (info.dtype, info.shape) for name, info in after.tensors.items() if "layers.1.mlp.down_proj" in name}
    assert down == {"weight": ("I8", (64, 128)), "weight_scale": ("BF16", (64, 1))}
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_an_unlisted_family_takes_plain_rounding_only(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "in", "opt", word_embed_proj_dim=32)  # has linear layers outside its blocks
    with pytest.raises(UnusableModel, match="'opt' has no row"):
        quantize_smoothquant(source, tmp_path / "q", SmoothQuantSettings(), tiny_windows(), context=Context())
    quantize_smoothquant(source, tmp_path / "q", SmoothQuantSettings(alpha=None), tiny_windows(), context=Context())
    ignored = open_checkpoint(tmp_path / "q").config["quantization_config"]["ignore"]
    assert ignored == ["lm_head", "model.decoder.project_in", "model.decoder.project_out"]
    expected = logits(source)
    assert 0 < float((logits(tmp_path / "q") - expected).std()) < 0.1 * float(expected.std())


def test_zeros_and_masks_stay(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "in")
    tensors = load_file(source / "model.safetensors")
    masks = {n: torch.rand(t.shape, generator=torch.Generator().manual_seed(0)) < 0.5 for n, t in tensors.items() if "_proj" in n}
    save_file({n: t * masks[n] if n in masks else t for n, t in tensors.items()}, source / "model.safetensors", metadata={"format": "pt"})
    write_masks(source, masks)
    quantize_smoothquant(source, tmp_path / "q", SmoothQuantSettings(), tiny_windows(), context=Context())
    model, kept = load_model(tmp_path / "q"), read_masks(tmp_path / "q")
    assert kept.keys() == masks.keys()
    for name, mask in kept.items():
        assert torch.equal(mask, masks[name]) and not model.get_parameter(name)[~mask].any()


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "in")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = torch.inf
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnusableModel, match=r"model\.layers\.1\.mlp\.\w+\.weight holds values that are not finite"):
        quantize_smoothquant(source, tmp_path / "q", SmoothQuantSettings(), tiny_windows(), context=Context())
