"""Read architecture, parameters and tensors by type from the files of a checkpoint or artifact. Loads neither weights nor torch."""

import json
import math
import struct
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from compression.checkpoints.checkpoint import open_checkpoint
from compression.errors import MissingExtra, UnusableModel
from export.runtimes import runtime_name
from export.runtimes.gguf_file import gguf_file

SAFETENSORS_BYTES = {
    "F64": 8,
    "I64": 8,
    "F32": 4,
    "I32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
ONNX_BITS = {
    "INT4": 4,
    "UINT4": 4,
    "INT2": 2,
    "UINT2": 2,
    "FLOAT16": 16,
    "BFLOAT16": 16,
    "FLOAT": 32,
    "DOUBLE": 64,
    "INT64": 64,
    "INT32": 32,
}  # others: 8
_CONFIG = {
    "hidden_size": "hidden size",
    "intermediate_size": "MLP width",
    "num_attention_heads": "heads",
    "num_key_value_heads": "KV heads",
    "head_dim": "head width",
    "vocab_size": "vocabulary",
    "max_position_embeddings": "context",
}
_GGUF = {
    "embedding_length": "hidden size",
    "feed_forward_length": "MLP width",
    "attention.head_count": "heads",
    "attention.head_count_kv": "KV heads",
    "attention.key_length": "head width",
    "vocab_size": "vocabulary",
    "context_length": "context",
}
_GENAI = {
    "hidden_size": "hidden size",
    "num_attention_heads": "heads",
    "num_key_value_heads": "KV heads",
    "head_size": "head width",
}


@dataclass(frozen=True)
class Tensors:
    """All tensors of one type."""

    type: str  # as the format calls it: BF16, Q4_K, FLOAT
    count: int
    bytes: int


@dataclass(frozen=True)
class Contents:
    """The content of a checkpoint or artifact.

    Attributes:
        runtime: The runtime that opens it.
        architecture: Its shape, by readable names ("hidden size").
        parameters: Of all tensors; without norms and biases where the format does not tell them apart from tables. 0: unknown.
        tensors: By type, the largest first.
        settings: Layout, quantization, and what the format tells besides.
    """

    runtime: str
    architecture: dict[str, Any]
    parameters: int = 0
    tensors: list[Tensors] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def bits_per_weight(self) -> float | None:
        """The bits of all tensors, scales and tables included, divided by the parameters."""
        return 8 * sum(t.bytes for t in self.tensors) / self.parameters if self.parameters and self.tensors else None


def read_contents(path: Path) -> Contents:
    """Read what a checkpoint or artifact holds.

    Raises:
        UnusableModel: No runtime opens the path, or a file is damaged.
        MissingExtra: The format's package is not installed.
    """
    readers: dict[str, Callable[[Path], Contents]] = {
        "transformers": _checkpoint, "llama.cpp": _gguf, "onnxruntime": _onnx, "onnxruntime-genai": _onnx,
        "openvino": _openvino, "executorch": _executorch,
    }  # fmt: skip
    return readers[runtime_name(path)](path)


def _checkpoint(path: Path) -> Contents:
    checkpoint = open_checkpoint(path)
    tensors = _grouped((info.dtype, info.numel * SAFETENSORS_BYTES[info.dtype]) for info in checkpoint.tensors.values())
    settings = {"layout": checkpoint.layout, **checkpoint.config.get("quantization_config", {})}
    return Contents("transformers", _described(path), checkpoint.num_parameters, tensors, settings)


def _gguf(path: Path) -> Contents:
    try:
        from gguf import GGUFReader
    except ImportError:
        raise MissingExtra("gguf", "gguf", "reading a GGUF file") from None
    file = gguf_file(path)
    try:
        reader = GGUFReader(file)
        known = {name: found.contents() for name, found in reader.fields.items() if not name.startswith("tokenizer.")}
        tokens = reader.fields.get("tokenizer.ggml.tokens")
        architecture = str(known["general.architecture"])
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise UnusableModel(f"{file} is truncated or damaged: {error}", key="model") from None
    facts = {"architecture": architecture, "layers": known.get(f"{architecture}.block_count")}
    facts |= {label: known.get(f"{architecture}.{key}") for key, label in _GGUF.items()}
    facts["vocabulary"] = facts["vocabulary"] or (len(tokens.data) if tokens else None)
    tensors = _grouped((tensor.tensor_type.name, int(tensor.n_bytes)) for tensor in reader.tensors)
    parameters = sum(int(tensor.n_elements) for tensor in reader.tensors)
    settings = {key: value for key, value in known.items() if key.startswith("general.") and key != "general.architecture"}
    return Contents("llama.cpp", {key: value for key, value in facts.items() if value is not None}, parameters, tensors, settings)


def _onnx(path: Path) -> Contents:
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError:
        raise MissingExtra("onnx", "onnx", "reading an ONNX file") from None
    try:
        model = onnx.load(path / "model.onnx", load_external_data=False)
    except DecodeError as error:
        raise UnusableModel(f"{path / 'model.onnx'} is truncated or damaged: {error}", key="model") from None
    names = onnx.TensorProto.DataType
    tensors = {t.name: (names.Name(t.data_type), math.prod(t.dims), len(t.dims)) for t in model.graph.initializer}
    sized = ((type, count * ONNX_BITS.get(type, 8) // 8) for type, count, _ in tensors.values())
    settings = {"producer": model.producer_name, "opset": {o.domain or "ai.onnx": o.version for o in model.opset_import}}
    operators = sorted(
        {node.op_type for node in model.graph.node if "Quant" in node.op_type or "NBits" in node.op_type or "Integer" in node.op_type}
    )
    settings |= {"quantizing operators": operators} if operators else {}
    return Contents(runtime_name(path), _described(path), _onnx_parameters(model.graph.node, tensors), _grouped(sized), settings)


def _onnx_parameters(nodes: Iterable[Any], tensors: dict[str, tuple[str, int, int]]) -> int:
    """Count the weights of the matrices.

    Packed codes count as many as their operator says. Of other tensors those with two dimensions or more count, except scales, zero points
    and tables of rotary positions.
    """
    seen: dict[str, int] = {}
    for node in nodes:
        attributes = {a.name: a.i for a in node.attribute}
        for position, name in enumerate(node.input):
            if name not in tensors or tensors[name][2] < 2:
                continue
            if node.op_type == "MatMulNBits":
                seen[name] = attributes["K"] * attributes["N"] if position == 1 else 0
            elif node.op_type == "GatherBlockQuantized":
                packed = 8 // attributes.get("bits", 4) if tensors[name][0] == "UINT8" else 1
                seen[name] = tensors[name][1] * packed if position == 0 else 0
            elif node.op_type not in ("GroupQueryAttention", "RotaryEmbedding"):
                seen.setdefault(name, tensors[name][1])
    return sum(seen.values())


def _openvino(path: Path) -> Contents:
    """Read the constants that model.xml lists; matrices count as parameters, and their scales, which are columns, do not."""
    graph, weights = path / "model.xml", path / "model.bin"
    try:
        root = ElementTree.parse(graph).getroot()
        found = [layer.attrib for layer in root.iterfind(".//layer[@type='Const']/data")]
        types = [data["element_type"] for data in found]
        places = [(int(data["offset"]), int(data["size"])) for data in found]
        shapes = [[int(n) for n in data["shape"].split(",") if n] for data in found]
        present = weights.stat().st_size
    except (ElementTree.ParseError, KeyError, ValueError, OSError) as error:
        raise UnusableModel(f"{graph} or {weights.name} is truncated or damaged: {error}", key="model") from None
    if present < (needed := max(map(sum, places), default=0)):
        raise UnusableModel(f"{weights} is truncated or damaged: {present} bytes of {needed}", key="model")
    # Constants of equal bytes share a place in the file, which counts once.
    tensors = _grouped((type, size) for (_, size), type in dict(zip(places, types, strict=True)).items())
    matrices = {place: math.prod(shape) for place, shape in zip(places, shapes, strict=True) if len(shape) == 2 and min(shape) > 1}
    options = {option.tag: option.attrib["value"] for option in root.iterfind("rt_info/runtime_options/*")}
    return Contents("openvino", _described(path), sum(matrices.values()), tensors, options)


def _executorch(path: Path) -> Contents:
    """Read only the sizes from ExecuTorch's extended header: each backend packs its tensors in a form of its own."""
    file = path / "model.pte"
    size = file.stat().st_size
    with file.open("rb") as stream:
        head = stream.read(40)
    if len(head) < 40 or head[4:6] != b"ET" or head[8:12] != b"eh00":
        raise UnusableModel(f"{file} is truncated or damaged: it does not begin as an ExecuTorch program", key="model")
    program, base, segments = struct.unpack("<QQQ", head[16:40])
    if size < (needed := max(program, base + segments)):
        raise UnusableModel(f"{file} is truncated or damaged: {size} bytes of {needed}", key="model")
    return Contents("executorch", _described(path), settings={"program bytes": program, "weight bytes": segments})


def _described(path: Path) -> dict[str, Any]:
    """Describe the architecture by config.json, or by a GenAI package's genai_config.json."""
    if (path / "config.json").is_file():
        config = json.loads((path / "config.json").read_text())
        names = ", ".join(config.get("architectures", [])) or config.get("model_type", "unknown")
        facts = {"architecture": names, "layers": config.get("num_hidden_layers")}
        facts |= {label: config.get(key) for key, label in _CONFIG.items()} | {"tied embeddings": config.get("tie_word_embeddings")}
        return {key: value for key, value in facts.items() if value is not None}
    if (path / "genai_config.json").is_file():
        model = json.loads((path / "genai_config.json").read_text())["model"]
        facts = {"architecture": model["type"], "layers": model["decoder"].get("num_hidden_layers")}
        facts |= {label: model["decoder"].get(key) for key, label in _GENAI.items()}
        return facts | {"vocabulary": model.get("vocab_size"), "context": model.get("context_length")}
    return {}


def _grouped(tensors: Iterable[tuple[str, int]]) -> list[Tensors]:
    """Group (type, bytes) of single tensors by type, the largest first."""
    sizes: dict[str, list[int]] = defaultdict(list)
    for type, size in tensors:
        sizes[type].append(size)
    return sorted((Tensors(type, len(found), sum(found)) for type, found in sizes.items()), key=lambda t: (-t.bytes, t.type))
