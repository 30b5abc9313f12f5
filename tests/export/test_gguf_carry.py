"""GPTQ's and AWQ's codes in GGUF blocks: against a float64 formula, the official dequantizer, and the checkpoint itself in llama.cpp."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from compression.checkpoints.checkpoint import open_checkpoint
from compression.checkpoints.families import FAMILIES
from compression.checkpoints.layouts import QuantizedLinear, awq_tensors, gptq_tensors
from compression.checkpoints.quantization_config import ROW, awq_config
from compression.context import Context
from compression.errors import Incompatible
from compression.quantization.settings import GPTQSettings, gptq_config
from export.gguf import GgufSettings, export_gguf
from export.gguf.carry import pack
from tests.export.test_gguf import divergence, types_in
from tests.tiny import tiny_checkpoint, tiny_windows


def random_layer(out: int, width: int, bits: int, group_size: int, *, symmetric: bool, seed: int) -> QuantizedLinear:
    generator = torch.Generator().manual_seed(seed)
    shape = (out, width // group_size)
    codes = torch.randint(0, 2**bits, (out, width), generator=generator, dtype=torch.uint8)
    zeros = (
        torch.full(shape, 2 ** (bits - 1), dtype=torch.uint8)
        if symmetric
        else torch.randint(0, 2**bits, shape, generator=generator, dtype=torch.uint8)
    )
    scales = ((torch.rand(shape, generator=generator) + 0.5) * 0.3 / 2**bits).half()
    return QuantizedLinear(codes, scales, zeros, bits, group_size)


def float64_weight(layer: QuantizedLinear) -> np.ndarray:
    scales, zeros = (np.repeat(part.numpy().astype(np.float64), layer.group_size, axis=1) for part in (layer.scales, layer.zeros))
    return scales * (layer.codes.numpy().astype(np.float64) - zeros)


@given(
    out=st.integers(1, 5), groups=st.integers(1, 3), group_size=st.sampled_from([32, 64, 128]),
    kind=st.sampled_from([(4, True), (4, False), (8, True)]),
    seed=st.integers(0, 2**20),
)  # fmt: skip
def test_blocks_dequantize_to_the_checkpoints_weights(out: int, groups: int, group_size: int, kind: tuple[int, bool], seed: int) -> None:
    bits, symmetric = kind
    layer = random_layer(out, groups * group_size, bits, group_size, symmetric=symmetric, seed=seed)
    type, packed = pack(layer.codes.numpy(), layer.scales.numpy(), layer.zeros.numpy(), bits)
    weight = float64_weight(layer)
    found = gguf.dequantize(packed, gguf.GGMLQuantizationType[type.upper()]).astype(np.float64)
    if type != "q4_1":
        np.testing.assert_array_equal(found, weight)  # a product of a float16 and 8 bits is exact in float32
    else:  # the offset d z is rounded to float16: half of 2^-10 of it
        offset = np.repeat((layer.scales.double() * layer.zeros.double()).numpy(), group_size, axis=1)
        assert (np.abs(found - weight) <= offset * 2**-11 * 1.001 + 1e-7).all()


def test_nibbles_are_where_ggml_looks_for_them() -> None:
    codes = np.arange(32, dtype=np.uint8)[None] % 16
    type, packed = pack(codes, np.ones((1, 1), np.float16), np.full((1, 1), 8, np.uint8), 4)
    assert type == "q4_0" and packed.shape == (1, 18) and packed[0, :2].tobytes() == np.float16(1).tobytes()
    assert [int(b) & 15 for b in packed[0, 2:]] == list(range(16)) == [int(b) >> 4 for b in packed[0, 2:]]


@pytest.mark.parametrize(
    ("codes", "scales", "zeros", "bits", "pattern"),
    [
        (np.zeros((1, 64), np.uint8), np.ones((1, 1)), np.full((1, 1), 100, np.uint8), 8, "asymmetric codes of 8 bits"),
        (np.zeros((1, 64), np.uint8), np.ones((1, 4)), np.full((1, 4), 8, np.uint8), 4, "4 groups in rows of 64"),
        (np.zeros((1, 64), np.uint8), np.full((1, 2), 1e5), np.full((1, 2), 8, np.uint8), 4, "100000"),
    ],
)
def test_what_blocks_cannot_hold_is_refused(codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray, bits: int, pattern: str) -> None:
    with pytest.raises(Incompatible, match=pattern):
        pack(codes, scales, zeros, bits)


FITTING: dict[str, dict[str, Any]] = {"gemma3_text": {"query_pre_attn_scalar": 32}, "smollm3": {"no_rope_layers": [1, 1]}}  # to llama.cpp


def quantized_checkpoint(
    path: Path, layout: str, bits: int, group_size: int, *, family: str = "llama", act_order: bool = False, intermediate: int = 128
) -> Path:
    """A checkpoint whose linear layers are random codes."""
    tiny_checkpoint(path, family, hidden=128, intermediate=intermediate, tied=family != "llama", **FITTING.get(family, {}))
    weights, symmetric = load_file(path / "model.safetensors"), layout == "gptq"
    for name in [n for n in weights if n.rpartition(".weight")[0].endswith(FAMILIES[family].linears)]:
        shape = weights.pop(name).shape
        layer = random_layer(*shape, bits, shape[1] if group_size == ROW else group_size, symmetric=symmetric, seed=len(weights))
        tensors = gptq_tensors(layer) if layout == "gptq" else awq_tensors(layer)
        if act_order and "g_idx" in tensors:
            tensors["g_idx"] = tensors["g_idx"].flip(0)
        weights |= {f"{name.removesuffix('.weight')}.{part}": tensor.contiguous() for part, tensor in tensors.items()}
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    settings = (
        gptq_config({}, GPTQSettings(bits=bits, group_size=group_size, symmetric=True))
        if layout == "gptq"
        else awq_config(group_size=group_size)
    )
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return path


CARRIED = {
    "llama": ("Q4_0", "gptq", 4, 32), "llama, awq": ("Q4_1", "awq", 4, 64), "qwen3": ("Q8_0", "gptq", 8, 128),
    "phi3": ("Q4_0", "gptq", 4, 32), "gemma3_text": ("Q4_0", "gptq", 4, 32), "smollm3": ("Q4_0", "gptq", 4, 64), "olmo2": ("Q4_1", "awq", 4, 32),
}  # fmt: skip


@pytest.mark.parametrize("kind", CARRIED)
def test_llama_cpp_runs_the_checkpoints_own_weights(tmp_path: Path, kind: str) -> None:
    (type, layout, bits, group_size), family = CARRIED[kind], kind.partition(",")[0]
    source = quantized_checkpoint(tmp_path / "model", layout, bits, group_size, family=family)
    metrics = export_gguf(source, tmp_path / "out", GgufSettings(type="carry"), context=Context())
    tensors = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    assert {found for name, found in tensors.items() if name.startswith("blk.") and "norm" not in name} == {type}
    assert tensors["token_embd.weight"] == "F32"  # the checkpoint's own
    assert metrics["carry_worst_difference_in_steps"] <= (15 * 2**-11 if type == "Q4_1" else 0)
    assert divergence(source, tmp_path / "out") < 2e-3  # llama.cpp rounds activations to 8 bits in front of quantized weights


def test_groups_between_blocks_become_f16(tmp_path: Path) -> None:
    source, warnings = quantized_checkpoint(tmp_path / "model", "gptq", 4, ROW, intermediate=144), list[str]()
    metrics = export_gguf(source, tmp_path / "out", GgufSettings(type="carry"), context=Context(warn=warnings.append))
    types = types_in(tmp_path / "out")
    assert (types["blk.0.ffn_up.weight"], types["blk.0.ffn_down.weight"]) == ("Q4_0", "F16")
    assert metrics["fallback_tensors"] == 2 and any("rows of 144" in warning for warning in warnings)
    assert divergence(source, tmp_path / "out") < 2e-3


def test_dequantized_weights_are_exact_in_f32(tmp_path: Path) -> None:
    source = quantized_checkpoint(tmp_path / "model", "gptq", 4, 32)
    export_gguf(source, tmp_path / "out", GgufSettings(type="f32"), context=Context())
    assert divergence(source, tmp_path / "out") < 1e-5


def test_requantize_rounds_openly_what_cannot_be_carried(tmp_path: Path) -> None:
    source = quantized_checkpoint(tmp_path / "model", "gptq", 3, 32)
    with pytest.raises(Incompatible, match="3 bits.*requantize: true"):
        export_gguf(source, tmp_path / "out", GgufSettings(type="carry"), context=Context())
    with pytest.raises(Incompatible, match="a second time.*requantize: true"):
        export_gguf(source, tmp_path / "out", GgufSettings(type="q5_1"), context=Context())
    for type, windows, bound in (("q8_0", None, 1e-2), ("q5_1", None, 0.1), ("q5_1", tiny_windows(2), 0.1)):
        warnings: list[str] = []
        export_gguf(
            source,
            tmp_path / type,
            GgufSettings(type=type, requantize=True, importance=windows is not None),
            windows=windows,
            context=Context(warn=warnings.append),
        )
        assert f"rounded a second time, to {type}" in warnings[0]
        assert divergence(source, tmp_path / type) < bound


def test_groups_out_of_order_are_refused(tmp_path: Path) -> None:
    source = quantized_checkpoint(tmp_path / "model", "gptq", 4, 32, act_order=True)
    with pytest.raises(Incompatible, match="out of storage order.*requantize: true"):
        export_gguf(source, tmp_path / "out", GgufSettings(type="carry"), context=Context())
    export_gguf(source, tmp_path / "out", GgufSettings(type="q8_0", requantize=True), context=Context())
    assert divergence(source, tmp_path / "out") < 1e-2


def test_a_layer_left_dense_is_refused(tmp_path: Path) -> None:
    source = quantized_checkpoint(tmp_path / "model", "gptq", 4, 32)
    weights = load_file(source / "model.safetensors")
    kept = {n: t for n, t in weights.items() if not n.startswith("model.layers.0.mlp.up_proj.")}
    save_file(kept | {"model.layers.0.mlp.up_proj.weight": torch.zeros(128, 128)}, source / "model.safetensors", {"format": "pt"})
    assert open_checkpoint(source).layout == "gptq"
    with pytest.raises(Incompatible, match=r"model\.layers\.0\.mlp\.up_proj\.weight is not quantized"):
        export_gguf(source, tmp_path / "out", GgufSettings(type="carry"), context=Context())
