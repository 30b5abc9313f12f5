"""The two on-disk layouts of quantized linear layers: GPTQ (as AutoGPTQ and GPTQModel write it) and AWQ's GEMM.

GPTQ  qweight int32 [in·bits/32, out]: codes along the input, lowest bits first; qzeros int32 [groups, out·bits/32]: zero − 1
      (format "gptq") or zero ("gptq_v2"); scales float16 [groups, out]; g_idx int32 [in]: the group of each input channel
AWQ   qweight int32 [in, out/8] and qzeros int32 [groups, out/8]: codes along the output, eight to a word in the order
      `AWQ_ORDER`; scales float16 [groups, out]
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compression.checkpoints.checkpoint import open_checkpoint
from compression.checkpoints.quantization_config import WeightScheme, layer_scheme
from compression.checkpoints.shards import read_tensors
from compression.errors import UnusableModel

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the lowest four bits of a word hold column 0, the next four column 2, ...
AWQ_BITS = 4
BITS = (2, 3, 4, 8)


@dataclass(frozen=True)
class QuantizedLinear:
    """A linear layer as integers: w[o, i] = scales[o, g(i)] · (codes[o, i] − zeros[o, g(i)]).

    Attributes:
        codes: uint8 [out, in].
        scales: float16 [out, groups].
        zeros: uint8 [out, groups].
        bits: Bits of a code.
        group_size: Input channels in a group.
        g_idx: int32 [in], the group of each input channel; None where groups are neighbours in storage order (i // group_size).
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    bits: int
    group_size: int
    g_idx: torch.Tensor | None = None

    @property
    def storage_ordered(self) -> bool:
        """Whether groups are runs of `group_size` neighbouring input channels, which carried exports need."""
        return self.g_idx is None

    def dequantize(self) -> torch.Tensor:
        """Return the weight, float32 [out, in]: exact products of float16 scales and small integers."""
        groups = self.g_idx if self.g_idx is not None else torch.arange(self.codes.shape[1]) // self.group_size
        groups = groups.long().to(self.codes.device)
        return (self.codes.float() - self.zeros.float()[:, groups]) * self.scales.float()[:, groups]


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack unsigned integers below 2^bits, [rows, n] -> int32 [rows, n·bits/32]: one stream of bits a row, lowest first.

    `n·bits` must be a multiple of 32. For 3 bits some codes cross a word, as in AutoGPTQ.
    """
    rows, n = codes.shape
    if n * bits % 32:
        raise ValueError(f"{n} codes of {bits} bits do not fill whole 32-bit words")
    run_words, run_codes = _run(bits)
    lanes = codes.reshape(rows, -1, run_codes).to(torch.int64)
    words = torch.zeros(rows, lanes.shape[1], run_words + 1, dtype=torch.int64, device=codes.device)
    for lane in range(run_codes):
        word, shift = divmod(lane * bits, 32)
        spread = lanes[:, :, lane] << shift
        words[:, :, word] |= spread & 0xFFFFFFFF
        words[:, :, word + 1] |= spread >> 32
    words = words[:, :, :-1]
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32).reshape(rows, n * bits // 32)


def unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Undo `pack`: int32 [rows, w] -> uint8 [rows, w·32/bits]."""
    rows = words.shape[0]
    run_words, run_codes = _run(bits)
    runs = (words.to(torch.int64) & 0xFFFFFFFF).reshape(rows, -1, run_words)
    codes = torch.empty(rows, runs.shape[1], run_codes, dtype=torch.uint8, device=words.device)
    for lane in range(run_codes):
        word, shift = divmod(lane * bits, 32)
        value = runs[:, :, word] >> shift
        if shift + bits > 32:
            value = value | runs[:, :, word + 1] << (32 - shift)
        codes[:, :, lane] = value & (2**bits - 1)
    return codes.reshape(rows, -1)


def _run(bits: int) -> tuple[int, int]:
    """The shortest run at whose end a code and a word end together: its words and its codes."""
    common = math.gcd(bits, 32)
    return bits // common, 32 // common


def gptq_tensors(layer: QuantizedLinear) -> dict[str, torch.Tensor]:
    """Return the tensors of a layer in the GPTQ layout (format "gptq": zeros stored minus one), by suffix."""
    in_features = layer.codes.shape[1]
    g_idx = layer.g_idx if layer.g_idx is not None else torch.arange(in_features) // layer.group_size
    return {
        "qweight": pack(layer.codes, layer.bits).T.contiguous(),
        "qzeros": pack((layer.zeros - 1).T, layer.bits),
        "scales": layer.scales.T.contiguous(),
        "g_idx": g_idx.to(torch.int32),
    }


def awq_tensors(layer: QuantizedLinear) -> dict[str, torch.Tensor]:
    """Return the tensors of a 4-bit layer in AWQ's GEMM layout, by suffix."""
    return {"qweight": _pack_awq(layer.codes), "qzeros": _pack_awq(layer.zeros), "scales": layer.scales.T.contiguous()}


def read_quantized_linears(path: Path) -> Iterator[tuple[str, QuantizedLinear]]:
    """Yield the quantized layers of a GPTQ or AWQ checkpoint one at a time: (module path in the model, layer).

    Raises UnusableModel for a dense checkpoint, a width or version of the layout that is not read here, or a layer with missing tensors.
    """
    checkpoint = open_checkpoint(path)
    config = checkpoint.config.get("quantization_config", {})
    _check(path, checkpoint.layout, config)
    awq = checkpoint.layout == "awq"
    suffixes = ("qweight", "qzeros", "scales") if awq else ("qweight", "qzeros", "scales", "g_idx")
    for module in sorted(name.removesuffix(".qweight") for name in checkpoint.tensors if name.endswith(".qweight")):
        names = {suffix: f"{module}.{suffix}" for suffix in suffixes}
        missing = [name for name in names.values() if name not in checkpoint.tensors]
        codes = layer_scheme(config, module)
        if missing or codes is None or codes.bits not in BITS:
            wrong = f"lacks {', '.join(missing)}" if missing else f"has {codes.bits} bits" if codes else "is one that its config leaves out"
            raise UnusableModel(f"{path}: the quantized layer {module} {wrong}", key="model")
        found = read_tensors(path, names.values())
        tensors = {suffix: found[name] for suffix, name in names.items()}
        yield module, _read_awq(tensors, codes) if awq else _read_gptq(tensors, codes, offset=0 if _form(config) == "gptq_v2" else 1)


def _form(config: dict[str, Any]) -> str:
    return config.get("checkpoint_format", config.get("format", "gptq"))


def _check(path: Path, layout: str, config: dict[str, Any]) -> None:
    """Raise UnusableModel for what `read_quantized_linears` does not read."""
    if layout not in ("gptq", "awq"):
        raise UnusableModel(f"{path} is {layout}: it holds no integer codes of the GPTQ or AWQ layout", key="model")
    bits, group_size = config.get("bits"), config.get("group_size")
    if bits not in BITS or not isinstance(group_size, int) or (layout == "awq" and bits != AWQ_BITS):
        raise UnusableModel(
            f"{path}: {layout} with bits {bits}, group_size {group_size} is not read; gptq has 2, 3, 4, 8 bits, awq 4", key="model"
        )
    version = str(config.get("version", "gemm")).lower()
    if layout == "awq" and version != "gemm":
        raise UnusableModel(f"{path}: the AWQ version {version!r} is not read; gemm is", key="model")
    if layout == "gptq" and _form(config) not in ("gptq", "gptq_v2"):
        raise UnusableModel(f"{path}: the GPTQ format {_form(config)!r} is not read; gptq and gptq_v2 are", key="model")


def _read_gptq(tensors: dict[str, torch.Tensor], settings: WeightScheme, offset: int) -> QuantizedLinear:
    codes = unpack(tensors["qweight"].T.contiguous(), settings.bits)
    zeros = (unpack(tensors["qzeros"], settings.bits) + offset) & (2**settings.bits - 1)
    group_size, g_idx = settings.width(codes.shape[1]), tensors["g_idx"]
    ordered = torch.equal(g_idx, (torch.arange(len(g_idx)) // group_size).to(g_idx.dtype))
    scales = tensors["scales"].T.contiguous()
    return QuantizedLinear(codes, scales, zeros.T.contiguous(), settings.bits, group_size, None if ordered else g_idx)


def _read_awq(tensors: dict[str, torch.Tensor], settings: WeightScheme) -> QuantizedLinear:
    codes, zeros = (_unpack_awq(tensors[name]) for name in ("qweight", "qzeros"))
    return QuantizedLinear(codes, tensors["scales"].T.contiguous(), zeros, AWQ_BITS, settings.width(codes.shape[1]))


def _pack_awq(codes: torch.Tensor) -> torch.Tensor:
    return pack(codes.T.unflatten(1, (-1, 8))[:, :, torch.tensor(AWQ_ORDER)].flatten(1), AWQ_BITS)


def _unpack_awq(words: torch.Tensor) -> torch.Tensor:
    inverse = torch.tensor(AWQ_ORDER).argsort()
    return unpack(words, AWQ_BITS).unflatten(1, (-1, 8))[:, :, inverse].flatten(1).T.contiguous()
