"""Checkpoints as directories: what one is, told from its config and safetensors headers alone. Imports no torch.

A checkpoint is a Hugging Face model directory. Its *layout* is one of `Layout`; dense ones open in plain transformers.
"""

import json
import math
import re
import struct
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from compression.checkpoints.families import FAMILIES, Family
from compression.errors import UnusableModel
from compression.files import digest_file

Layout = Literal["dense", "gptq", "awq", "w8a8", "fp8"]
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
UNLIMITED = 2**31 - 1
"""Positions of an architecture that has no limit of them."""
COMPRESSED_TENSORS: dict[str, Layout] = {"int-quantized": "w8a8", "float-quantized": "fp8"}  # the format of that package -> layout
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json",
    "tokenizer.model", "vocab.json", "merges.txt", "generation_config.json",
)  # fmt: skip
MORE_TEMPLATES = "additional_chat_templates"  # a folder of chat templates besides the default one, each named by its use
PRUNING_FILES = ("masks.safetensors", "kept.safetensors")
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_IN_A_LIST = re.compile(r"(.+?)\.\d+\..+\.weight")


@dataclass(frozen=True)
class TensorInfo:
    dtype: str  # safetensors' name: F16, BF16, F32, I32, ...
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Limits:
    """Why an architecture cannot be compressed or trained; empty where it can (`compression.checkpoints.normalization`)."""

    compression: str = ""  # of the linear layers of its blocks
    training: str = ""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint directory that `open_checkpoint` has read, or a planned one.

    A planned one has the config and layout it will have, and the `path` of the checkpoint whose tokenizer it will carry. Configs are
    complete (`compression.checkpoints.normalization`): what one does not state is an error here, never a default.
    """

    path: Path
    config: dict[str, Any]
    layout: Layout = "dense"
    sparse: bool = False  # carries masks.safetensors
    tensors: dict[str, TensorInfo] = field(default_factory=dict, repr=False)
    limits: Limits = Limits()

    def setting(self, key: str) -> Any:
        """Return a value of the config. Raises UnusableModel where it does not state one."""
        if key not in self.config:
            raise UnusableModel(
                f"{self.path / 'config.json'} states no {key}, and transformers alone knows what it then is; "
                "compression.checkpoints.normalization.normalize writes it out",
                key="model",
            )
        return self.config[key]

    @property
    def model_type(self) -> str:
        return self.setting("model_type")

    @property
    def family(self) -> Family:
        """Raises UnusableModel for an architecture without a row in compression/checkpoints/families.py."""
        if self.model_type not in FAMILIES:
            raise UnusableModel(
                f"the architecture {self.model_type!r} has no row in compression/checkpoints/families.py, which this needs to know the layers by name; "
                f"known: {', '.join(sorted(FAMILIES))}; any decoder of linear layers takes prune.unstructured, quantize.rtn, quantize.gptq, quantize.fp8",
                key="model",
            )
        return FAMILIES[self.model_type]

    @property
    def hidden_size(self) -> int:
        return self.setting("hidden_size")

    @property
    def intermediate_size(self) -> int:
        return self.setting("intermediate_size")

    @property
    def num_layers(self) -> int:
        return self.setting("num_hidden_layers")

    @property
    def head_dim(self) -> int:
        return self.config.get("head_dim") or self.hidden_size // self.setting("num_attention_heads")

    @property
    def vocab_size(self) -> int:
        return self.setting("vocab_size")

    @property
    def tied(self) -> bool:
        return bool(self.setting("tie_word_embeddings"))

    @property
    def max_length(self) -> int:
        """Positions that it takes; UNLIMITED where its architecture has no limit (null in the config)."""
        limit = self.setting("max_position_embeddings")
        return UNLIMITED if limit is None else limit

    @property
    def dtype(self) -> str:
        """ "float16", "bfloat16" or "float32"; `torch_dtype` is what transformers 4 calls it."""
        return self.config.get("torch_dtype") or self.setting("dtype")

    @cached_property
    def blocks(self) -> str:
        """Path of the list of decoder blocks. Of an unlisted family, the numbered list that most of the checkpoint's matrices are in."""
        if self.model_type in FAMILIES:
            return self.family.blocks
        lists = [match[1] for name, info in self.tensors.items() if len(info.shape) == 2 and (match := _IN_A_LIST.fullmatch(name))]
        if not lists:
            raise UnusableModel(f"{self.path} holds no numbered decoder blocks with matrices in them", key="model")
        return max(sorted(set(lists)), key=lists.count)

    def linear_widths(self) -> dict[str, tuple[int, int]]:
        """(out_features, in_features) of every linear layer of a block, by its path in the block."""
        if self.model_type not in FAMILIES:
            prefix = f"{self.blocks}.0."
            return {
                name.removeprefix(prefix).removesuffix(".weight"): (info.shape[0], info.shape[1])
                for name, info in self.tensors.items()
                if name.startswith(prefix) and name.endswith(".weight") and len(info.shape) == 2
            }
        c, family, d, hidden = self.config, self.family, self.head_dim, self.hidden_size
        heads = c["num_attention_heads"]
        q, kv = heads * d, (c.get("num_key_value_heads") or heads) * d
        separate = dict(zip(family.qkv, (q, kv, kv), strict=False)) if len(family.qkv) == 3 else {family.qkv[0]: q + 2 * kv}
        shapes = {path: (rows, hidden) for path, rows in separate.items()}
        shapes[family.out] = (hidden, q)
        shapes |= {path: (family.parts(path) * self.intermediate_size, hidden) for path in family.gate_up}
        shapes[family.down] = (hidden, self.intermediate_size)
        return shapes

    @cached_property
    def num_parameters(self) -> int:
        """Parameters of the dense model it stands for: tied embeddings once, norms and biases left out."""
        per_block = sum(out * inp for out, inp in self.linear_widths().values())
        return per_block * self.num_layers + self.vocab_size * self.hidden_size * (1 if self.tied else 2)

    def linear_tensors(self) -> list[str]:
        """Full names of the weights of all linear layers of all blocks, block by block."""
        return [f"{self.blocks}.{index}.{path}.weight" for index in range(self.num_layers) for path in self.linear_widths()]


def open_checkpoint(path: Path) -> Checkpoint:
    """Read a model directory without loading weights.

    Raises UnusableModel: no such directory, no config.json, pickled weights only, a truncated or missing safetensors file, no tokenizer.
    """
    path = Path(path)
    if not path.is_dir():
        raise UnusableModel(f"there is no model directory {path}", key="model")
    if not (path / "config.json").is_file():
        raise UnusableModel(f"{path} has no config.json, so it is not a Hugging Face model directory", key="model")
    try:
        config = json.loads((path / "config.json").read_bytes())
        if not isinstance(config, dict):
            raise ValueError("it holds no mapping")
    except ValueError as error:
        raise UnusableModel(f"{path / 'config.json'} is not JSON: {error}", key="model") from None
    tensors = _read_headers(path)
    if not (path / "tokenizer.json").is_file():
        raise UnusableModel(f"{path} has no tokenizer.json; save the tokenizer into it in the fast format", key="model")
    return Checkpoint(path, config, _layout(path, config.get("quantization_config")), (path / "masks.safetensors").is_file(), tensors)


def _layout(path: Path, quantization: dict[str, Any] | None) -> Layout:
    method = (quantization or {}).get("quant_method", "dense")
    plain: dict[str, Layout] = {"dense": "dense", "gptq": "gptq", "awq": "awq"}
    if method in plain:
        return plain[method]
    form = (quantization or {}).get("format")
    if method == "compressed-tensors" and form in COMPRESSED_TENSORS:
        return COMPRESSED_TENSORS[form]
    raise UnusableModel(
        f"{path} is quantized in the layout {method!r}{f' with format {form!r}' if form else ''}; edgepress reads dense, gptq, awq, "
        f"and compressed-tensors of the formats {', '.join(COMPRESSED_TENSORS)}",
        key="model",
    )


def weight_map(path: Path) -> dict[str, Path]:
    """The file of each tensor of a model directory: those of model.safetensors, or else those that the index names, as transformers reads them.

    Raises UnusableModel when there are neither, or a file is missing or damaged.
    """
    if (path / SINGLE).is_file():
        return dict.fromkeys(read_safetensors_header(path / SINGLE), path / SINGLE)
    if (path / INDEX).is_file():
        try:
            return {name: path / file for name, file in json.loads((path / INDEX).read_text())["weight_map"].items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UnusableModel(f"{path / INDEX} is damaged: it holds no weight_map of tensors to files", key="model") from None
    pickled = [f.name for pattern in PICKLED for f in path.glob(pattern)]
    if pickled:
        raise UnusableModel(
            f"{path} holds only pickled weights ({pickled[0]}), which can run code when opened; convert them to safetensors first",
            key="model",
        )
    raise UnusableModel(f"{path} has no {SINGLE}", key="model")


def tokenizer_files(path: Path) -> list[str]:
    """The files of a model directory that make its tokenizer, its chat templates and its generation settings, relative to it."""
    templates = sorted(f"{MORE_TEMPLATES}/{file.name}" for file in (path / MORE_TEMPLATES).glob("*.jinja"))
    return [name for name in TOKENIZER_FILES if (path / name).is_file()] + templates


def model_files(path: Path) -> list[Path]:
    """Every file of a model directory that is read, the model card included: it states the licence."""
    weights = {*weight_map(path).values()} | ({path / INDEX} if not (path / SINGLE).is_file() else set())
    named = [path / name for name in ("config.json", "README.md", *PRUNING_FILES) if (path / name).is_file()]
    return sorted({*weights, *named, *(path / name for name in tokenizer_files(path))})


def _read_headers(path: Path) -> dict[str, TensorInfo]:
    files = weight_map(path)
    headers = {file: read_safetensors_header(file) for file in sorted(set(files.values()))}
    if lost := [name for name, file in files.items() if name not in headers[file]]:
        raise UnusableModel(f"{path / INDEX} names tensors that are not in its files: {', '.join(lost[:4])}", key="model")
    return {name: headers[file][name] for name, file in files.items()}


def read_safetensors_header(file: Path) -> dict[str, TensorInfo]:
    """Read names, types and shapes of a safetensors file. Raises UnusableModel when it is missing, truncated or damaged."""
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
    """Compute the sha256 of every file below `path`, by its relative path: content identities consist of these."""
    if not path.is_dir():
        raise FileNotFoundError(path)
    return {p.relative_to(path).as_posix(): digest_file(p) for p in sorted(path.rglob("*")) if p.is_file()}
