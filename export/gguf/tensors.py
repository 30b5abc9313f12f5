"""Tensors as GGUF wants them: names, row order, bytes."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import gguf
import numpy as np

from compression.checkpoints.checkpoint import Checkpoint
from compression.checkpoints.layouts import QuantizedLinear, read_quantized_linears
from compression.checkpoints.shards import read_tensors
from compression.errors import Incompatible, UnusableModel
from export.gguf import native
from export.gguf.architectures import ARCHITECTURES, rope_settings
from export.gguf.carry import pack
from export.gguf.types import BLOCK, CARRY, NARROW, WRITTEN, row_type

PACKED = ("qweight", "qzeros", "scales", "g_idx")  # what stands for a quantized layer's weight


def tensor_name(name: str, names: gguf.TensorNameMap) -> str:
    """transformers' parameter name -> GGUF's. Raises Incompatible for a tensor that the architecture has no place for."""
    mapped = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if mapped is None:
        raise Incompatible(f"the tensor {name} has no place in llama.cpp's graph of this architecture", key="uses")
    return mapped


def interleave_rope_rows(array: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows of a q or k projection, [heads * head_dim, ...], for llama.cpp's llama graph.

    transformers rotates row i of a head with row i + head_dim / 2, llama.cpp row 2i with row 2i + 1 (GGML_ROPE_TYPE_NORMAL).
    """
    return array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def llama3_rope_factors(rope: dict[str, Any], head_dim: int) -> np.ndarray:
    """What llama.cpp divides each rotary frequency by, float32 [head_dim / 2], for Llama 3.1's scaling (its `rope_freqs` tensor).

    Wavelengths under original / high_freq_factor stay, those over original / low_freq_factor are stretched by `factor`, between them
    both are mixed (Llama 3.1's `apply_scaling`).
    """
    original, factor = rope["original_max_position_embeddings"], rope["factor"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    wavelength = 2 * math.pi * rope["rope_theta"] ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    kept = np.clip((original / wavelength - low) / (high - low), 0.0, 1.0)
    return (1 / (kept + (1 - kept) / factor)).astype(np.float32)


def encode(array: np.ndarray, type: str, name: str, importance: np.ndarray | None = None) -> np.ndarray:
    """float32 [..., width] -> the array in a GGUF type (all but f32 and f16 as bytes): f32, f16, bf16 and q8_0 here, others by llama.cpp.

    importance  mean squares of the inputs that the rows are multiplied with, [width], which llama.cpp then weighs errors by
    Raises Incompatible when f16 cannot hold a value.
    """
    if type not in WRITTEN:
        return native.encode(array, type, importance)
    with np.errstate(over="ignore"):
        encoded = gguf.quantize(np.ascontiguousarray(array, dtype=np.float32), gguf.GGMLQuantizationType[type.upper()])
    if type == "f16" and not np.isfinite(encoded).all():
        raise Incompatible(f"{name} holds {np.abs(array).max():g}, more than f16 can hold (65504); choose bf16 or f32", key="type")
    return encoded


@dataclass(frozen=True)
class Types:
    """GGUF types of a model's matrices; `linear` may be "carry"."""

    linear: str
    embedding: str
    head: str


@dataclass(frozen=True)
class Tensor:
    """A tensor as it goes into the file.

    array       float32, float16 or bytes, rows first
    linear      a matrix of a decoder block
    difference  largest distance of a carried weight to the checkpoint's, and the same in steps of its scale
    """

    name: str
    type: str
    array: np.ndarray
    linear: bool = False
    difference: float = 0.0
    difference_in_steps: float = 0.0


def tensor_names(checkpoint: Checkpoint) -> gguf.TensorNameMap:
    """GGUF's names of this architecture's tensors."""
    return gguf.get_tensor_name_map(gguf.MODEL_ARCH[ARCHITECTURES[checkpoint.model_type].name.upper()], checkpoint.num_layers)


def model_tensors(checkpoint: Checkpoint, types: Types, importance: Mapping[str, np.ndarray]) -> Iterator[Tensor]:
    """Every tensor of the file, one at a time: embedding, head (unless it is the embedding), norms, biases, linear layers, rope factors.

    importance  of the head (of a tied embedding) by its name in the checkpoint, where it was gathered
    """
    names, family = tensor_names(checkpoint), checkpoint.family
    matrices = {f"{family.embed}.weight": types.embedding, f"{family.head}.weight": types.head}
    packed = {f"{name.removesuffix('.qweight')}.{part}" for name in checkpoint.tensors if name.endswith(".qweight") for part in PACKED}
    _check_tied(checkpoint)
    for name, info in checkpoint.tensors.items():
        if name in packed or name.endswith("rotary_emb.inv_freq") or (checkpoint.tied and name == f"{family.head}.weight"):
            continue
        type = "f32" if len(info.shape) == 1 else matrices.get(name) or row_type(types.linear, info.shape[-1])
        array = _reorder(read_tensors(checkpoint.path, [name])[name].float().numpy(), name, checkpoint)
        if len(info.shape) == 1 and name.endswith("norm.weight"):
            array = array + np.float32(family.norm_offset)
        linear = len(info.shape) == 2 and name not in matrices
        if type == CARRY:
            raise Incompatible(
                f"{name} is not quantized, so there are no codes of it to carry; quantize every linear layer or choose a float type",
                key="type",
            )
        tensor = Tensor(tensor_name(name, names), type, encode(array, type, name, importance.get(name)), linear)
        yield tensor
        if checkpoint.tied and name == f"{family.embed}.weight" and not ARCHITECTURES[checkpoint.model_type].ties:
            yield replace(tensor, name=tensor_name(f"{family.head}.weight", names))
    if checkpoint.layout != "dense":
        for module, layer in read_quantized_linears(checkpoint.path):
            yield _quantized(f"{module}.weight", tensor_name(f"{module}.weight", names), layer, types, checkpoint)
    rope = rope_settings(checkpoint.config)
    if rope["rope_type"] == "llama3":
        yield Tensor("rope_freqs.weight", "f32", llama3_rope_factors(rope, checkpoint.head_dim))
    if rope["rope_type"] == "longrope":
        for kind in ("long", "short"):
            yield Tensor(f"rope_factors_{kind}.weight", "f32", np.array(rope[f"{kind}_factor"], np.float32))


def _check_tied(checkpoint: Checkpoint) -> None:
    """Raises UnusableModel for a tied model with a head of other values in its files, which transformers would then use."""
    embed, head = f"{checkpoint.family.embed}.weight", f"{checkpoint.family.head}.weight"
    if not checkpoint.tied or head not in checkpoint.tensors:
        return
    found = read_tensors(checkpoint.path, [embed, head])
    if not found[embed].equal(found[head]):
        raise UnusableModel(
            f"config.json of {checkpoint.path} ties the head to the embedding (tie_word_embeddings), but the files hold a head of other values, "
            "which transformers uses: set tie_word_embeddings to false",
            key="model",
        )


def _quantized(name: str, mapped: str, layer: QuantizedLinear, types: Types, checkpoint: Checkpoint) -> Tensor:
    weight = _reorder(layer.dequantize().numpy(), name, checkpoint)
    if types.linear != CARRY or layer.group_size % BLOCK:
        type = NARROW if types.linear == CARRY else row_type(types.linear, weight.shape[-1])
        return Tensor(mapped, type, encode(weight, type, name), True)
    if not layer.storage_ordered:
        raise Incompatible(
            f"the groups of {name} are out of storage order (act-order), and GGUF's are in order; quantize with static groups, or say "
            "requantize: true with a type such as q4_0, which rounds a second time",
            key="type",
        )
    codes, scales, zeros = (_reorder(part.numpy(), name, checkpoint) for part in (layer.codes, layer.scales, layer.zeros))
    type, array = pack(codes, scales, zeros, layer.bits)
    difference = np.abs(gguf.dequantize(array, gguf.GGMLQuantizationType[type.upper()]) - weight)
    step = np.repeat(scales.astype(np.float32), layer.group_size, axis=1)
    return Tensor(mapped, type, array, True, float(difference.max()), float((difference / step).max()))


def _reorder(array: np.ndarray, name: str, checkpoint: Checkpoint) -> np.ndarray:
    if not ARCHITECTURES[checkpoint.model_type].interleaved:
        return array
    heads = checkpoint.config["num_attention_heads"]
    q, k = (f"{path}." for path in checkpoint.family.qkv[:2])
    if q in name:
        return interleave_rope_rows(array, heads)
    return interleave_rope_rows(array, checkpoint.config["num_key_value_heads"]) if k in name else array
