"""What kind of tokenizer a tokenizer.json defines, in llama.cpp's words. Imports no torch and no gguf: used while planning.

llama.cpp has two tokenizers that fit: `gpt2`, byte-level BPE by merge ranks behind a splitting regex that it knows by a name, and `llama`,
which merges the neighbours whose joined token scores highest.
"""

import json
from dataclasses import dataclass
from typing import Any

from compression.errors import Incompatible

GPT2 = "gpt2"  # ByteLevel(use_regex=True): the splitting of GPT-2
DIGITS = "digits"  # Digits(individual_digits=True)
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
LLAMA3 = _CONTRACTIONS + r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = LLAMA3.replace("{1,3}", "")
QWEN35 = _CONTRACTIONS + r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?"
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
O200K = f"{_WORD}{_UPPER}*{_LOWER}+{_SUFFIX}|{_WORD}{_UPPER}+{_LOWER}*{_SUFFIX}|\\p{{N}}{{1,3}}{_REST}"  # gpt-oss, Phi-4-mini
TEKKEN = f"{_WORD}{_UPPER}*{_LOWER}+|{_WORD}{_UPPER}+{_LOWER}*|\\p{{N}}{_REST}"  # Mistral's since Nemo

# How text is split, and whether a whole word of the vocabulary skips the merges -> llama.cpp's name for it
PRE_TOKENIZERS: dict[tuple[tuple[str, ...], bool], str] = {
    ((GPT2,), False): "gpt-2",
    ((DIGITS, GPT2), False): "smollm",
    ((LLAMA3,), True): "llama-bpe",
    ((LLAMA3,), False): "dbrx",
    ((QWEN2,), False): "qwen2",
    ((QWEN35,), False): "qwen35",
    # Not "gpt-4o", whose words end at combining marks (Hindi, Bengali, Thai). This name skips the merges of whole words, which changes
    # nothing: the merges of every word of o200k lead to it.
    ((O200K,), False): "granite-embed-multi-97m",
    ((O200K,), True): "granite-embed-multi-97m",
    ((TEKKEN,), True): "tekken",
}
# Where llama.cpp's words under a name are not the tokenizer's: they end at combining marks, or go on over a capital letter beyond ASCII that
# follows a small one.
INEXACT: dict[str, frozenset[str]] = {"tekken": frozenset({"marks", "capitals"}), "granite-embed-multi-97m": frozenset({"capitals"})}
SPACE = "▁"  # SentencePiece's visible space


@dataclass(frozen=True)
class Definition:
    """What kind of tokenizer a tokenizer.json defines.

    model         GGUF's tokenizer.ggml.model: "gpt2" or "llama"
    pre           its tokenizer.ggml.pre
    prepend       where SentencePiece's leading space goes: "always" in front of a text and after a special token, as in llama.cpp;
                  "metaspace" only where there is none (and perhaps only in front of the text), which llama.cpp cannot do; "never"
    composes      text is normalized to NFC first, which llama.cpp does not do
    inexact       where llama.cpp splits text otherwise (`INEXACT`)
    """

    model: str
    pre: str
    prepend: str = "never"
    composes: bool = False
    inexact: frozenset[str] = frozenset()


def recognize(tokenizer: dict[str, Any]) -> Definition:
    """Tell the kind of a tokenizer from its definition (the content of tokenizer.json).

    Raises Incompatible: no BPE, or a normalizer, a splitting or a leading space that llama.cpp has no name for.
    """
    model = tokenizer["model"]
    if model.get("type", "BPE") != "BPE" or "merges" not in model:
        raise Incompatible(f"llama.cpp needs a BPE tokenizer; this one is of type {model.get('type')}", key="model")
    normalizers, splitters = _flat(tokenizer.get("normalizer"), "normalizers"), _flat(tokenizer.get("pre_tokenizer"), "pretokenizers")
    if model.get("byte_fallback"):
        return Definition("llama", "default", _prepend_scheme(normalizers, splitters))
    if any(n["type"] != "NFC" for n in normalizers):
        raise Incompatible(f"llama.cpp does not apply this tokenizer's normalizer: {json.dumps(normalizers)}", key="model")
    splits = _splits(splitters)
    name = PRE_TOKENIZERS.get((splits, bool(model.get("ignore_merges"))))
    if name is None:
        raise Incompatible(f"llama.cpp has no name known to edgepress for this pre-tokenizer: {json.dumps(splitters)}", key="model")
    return Definition("gpt2", name, composes=bool(normalizers), inexact=INEXACT.get(name, frozenset()))


def _flat(part: dict[str, Any] | None, children: str) -> list[dict[str, Any]]:
    if part is None:
        return []
    return [leaf for child in part[children] for leaf in _flat(child, children)] if part["type"] == "Sequence" else [part]


def _splits(splitters: list[dict[str, Any]]) -> tuple[str, ...]:
    if not splitters or splitters[-1]["type"] != "ByteLevel" or splitters[-1].get("add_prefix_space"):
        raise Incompatible(
            f"llama.cpp needs a byte-level pre-tokenizer without a leading space; this one is {json.dumps(splitters)}", key="model"
        )
    splits = []
    for splitter in splitters:
        match splitter:
            case {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False} | {
                "type": "Split", "pattern": {"Regex": regex}, "behavior": "Removed", "invert": True
            }:  # fmt: skip
                splits.append(regex)
            case {"type": "Digits", "individual_digits": True}:
                splits.append(DIGITS)
            case {"type": "ByteLevel", "use_regex": False}:
                pass
            case {"type": "ByteLevel"}:
                splits.append(GPT2)
            case _:
                splits.append(json.dumps(splitter))
    return tuple(splits)


def _prepend_scheme(normalizers: list[dict[str, Any]], splitters: list[dict[str, Any]]) -> str:
    visible = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    match normalizers, splitters:
        case [{"type": "Prepend", "prepend": "▁"}, replace], [] if replace == visible:
            return "always"
        case [replace], [] | [{"type": "Split", "pattern": {"String": " "}}] if replace == visible:  # Gemma's split finds no space any more
            return "never"
        case [], [{"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}]:
            return "never" if scheme == "never" else "metaspace"
    raise Incompatible(
        f"llama.cpp's SentencePiece tokenizer cannot do this normalizer and pre-tokenizer: {json.dumps([normalizers, splitters])}",
        key="model",
    )
