"""Checkpoints as directories: what one is, told from its config and safetensors headers alone. Imports no torch.

A checkpoint is a Hugging Face model directory. Its *layout* is one of `LAYOUTS`; dense ones open in plain transformers.
"""

import hashlib
import json
import math
import struct
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from compression.errors import UnusableModel
from compression.families import FAMILIES, Family

Layout = Literal["dense", "gptq", "awq"]
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1}


@dataclass(frozen=True)
class TensorInfo:
    dtype: str  # safetensors' name: F16, BF16, F32, I32, ...
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint directory that has been looked at (`open_checkpoint`), or one that is planned.

    A planned one has the config and layout it will have, and the `path` of the checkpoint whose tokenizer it will carry.
    """

    path: Path
    config: dict[str, Any]
    layout: Layout = "dense"
    sparse: bool = False  # carries masks.safetensors
    tensors: dict[str, TensorInfo] = field(default_factory=dict, repr=False)

    @property
    def model_type(self) -> str:
        return self.config["model_type"]

    @property
    def family(self) -> Family:
        """Raises UnusableModel for an architecture without a row in compression/families.py."""
        if self.model_type not in FAMILIES:
            raise UnusableModel(
                f"the architecture {self.model_type!r} is not one edgepress knows by name; known: {', '.join(sorted(FAMILIES))}",
                key="model",
            )
        return FAMILIES[self.model_type]

    @property
    def hidden_size(self) -> int:
        return self.config["hidden_size"]

    @property
    def intermediate_size(self) -> int:
        return self.config["intermediate_size"]

    @property
    def num_layers(self) -> int:
        return self.config["num_hidden_layers"]

    @property
    def head_dim(self) -> int:
        return self.config.get("head_dim") or self.hidden_size // self.config["num_attention_heads"]

    @property
    def vocab_size(self) -> int:
        return self.config["vocab_size"]

    @property
    def tied(self) -> bool:
        return bool(self.config.get("tie_word_embeddings", False))

    @property
    def max_length(self) -> int:
        return self.config["max_position_embeddings"]

    @property
    def dtype(self) -> str:
        """ "float16", "bfloat16" or "float32"."""
        return self.config.get("dtype") or self.config.get("torch_dtype") or "float32"

    def linear_widths(self) -> dict[str, tuple[int, int]]:
        """(out_features, in_features) of every linear layer of a block, by its path in the block."""
        c, family, d = self.config, self.family, self.head_dim
        q = c["num_attention_heads"] * d
        kv = c.get("num_key_value_heads", c["num_attention_heads"]) * d
        gate, up, down = family.mlp
        shapes = dict(
            zip(
                family.attention,
                [(q, self.hidden_size), (kv, self.hidden_size), (kv, self.hidden_size), (self.hidden_size, q)],
                strict=True,
            )
        )
        shapes |= {
            gate: (self.intermediate_size, self.hidden_size),
            up: (self.intermediate_size, self.hidden_size),
            down: (self.hidden_size, self.intermediate_size),
        }
        return shapes

    @cached_property
    def num_parameters(self) -> int:
        """Parameters of the dense model it stands for: tied embeddings once, norms and biases left out."""
        per_block = sum(out * inp for out, inp in self.linear_widths().values())
        return per_block * self.num_layers + self.vocab_size * self.hidden_size * (1 if self.tied else 2)


def open_checkpoint(path: Path) -> Checkpoint:
    """Look at a model directory without loading weights.

    Raises UnusableModel: no such directory, no config.json, no causal language model, pickled weights only, a model
    that wants remote code, a truncated or missing safetensors file, no tokenizer.
    """
    path = Path(path)
    if not path.is_dir():
        raise UnusableModel(f"there is no model directory {path}", key="model")
    if not (path / "config.json").is_file():
        raise UnusableModel(f"{path} has no config.json, so it is no Hugging Face model directory", key="model")
    try:
        config = json.loads((path / "config.json").read_text())
    except json.JSONDecodeError as error:
        raise UnusableModel(f"{path / 'config.json'} is not JSON: {error}", key="model") from None
    if "auto_map" in config:
        raise UnusableModel(
            f"{path} wants to run code of its own (auto_map in config.json); edgepress loads only architectures of transformers",
            key="model",
        )
    architectures = config.get("architectures") or []
    if not any(a.endswith("ForCausalLM") for a in architectures):
        raise UnusableModel(
            f"{path} is no causal language model (architectures: {', '.join(architectures) or 'none'}); one ending in ForCausalLM is needed",
            key="model",
        )
    tensors = _read_headers(path)
    if not (path / "tokenizer.json").is_file():
        raise UnusableModel(f"{path} has no tokenizer.json; save the tokenizer into it in the fast format", key="model")
    method = config.get("quantization_config", {}).get("quant_method", "dense")
    if method not in ("dense", "gptq", "awq"):
        raise UnusableModel(f"{path} is quantized in the layout {method!r}; edgepress reads dense, gptq and awq", key="model")
    return Checkpoint(path, config, method, (path / "masks.safetensors").is_file(), tensors)


def _read_headers(path: Path) -> dict[str, TensorInfo]:
    index = path / "model.safetensors.index.json"
    names = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    if not index.is_file() and not (path / names[0]).is_file():
        pickled = [f.name for pattern in PICKLED for f in path.glob(pattern)]
        if pickled:
            raise UnusableModel(
                f"{path} holds only pickled weights ({pickled[0]}), which can run code when opened; convert them to safetensors first",
                key="model",
            )
        raise UnusableModel(f"{path} has no model.safetensors", key="model")
    tensors: dict[str, TensorInfo] = {}
    for name in names:
        tensors |= read_safetensors_header(path / name)
    return tensors


def read_safetensors_header(file: Path) -> dict[str, TensorInfo]:
    """Names, types and shapes of a safetensors file. Raises UnusableModel when it is missing, truncated or damaged."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
    except FileNotFoundError:
        raise UnusableModel(f"{file} is missing", key="model") from None
    except (struct.error, json.JSONDecodeError, UnicodeDecodeError, OverflowError, MemoryError):
        raise UnusableModel(f"{file} is damaged: its safetensors header cannot be read", key="model") from None
    header.pop("__metadata__", None)
    end = 8 + length + max((t["data_offsets"][1] for t in header.values()), default=0)
    if end != size:
        raise UnusableModel(f"{file} is truncated or damaged: {size} bytes, its header says {end}", key="model")
    return {name: TensorInfo(t["dtype"], tuple(t["shape"])) for name, t in header.items()}


def file_digests(path: Path) -> dict[str, str]:
    """sha256 of every file below `path`, by its relative path: what content identities are made of."""
    if not path.is_dir():
        raise FileNotFoundError(path)
    return {p.relative_to(path).as_posix(): digest_file(p) for p in sorted(path.rglob("*")) if p.is_file()}


def digest_file(path: Path) -> str:
    """sha256 of a file, hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
