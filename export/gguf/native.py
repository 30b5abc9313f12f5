"""Calls into llama.cpp from a process of their own, since native code can abort, and proof that its tokenizer agrees with ours."""

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from compression.errors import EdgepressError, Incompatible, MissingExtra
from export.gguf.tokenizer import Vocabulary
from export.gguf.tokenizer_corpus import tokenizer_corpus


def require_llama() -> None:
    """Raises MissingExtra when llama-cpp-python is not installed."""
    if importlib.util.find_spec("llama_cpp") is None:
        raise MissingExtra("llama-cpp-python", "llamacpp", "GGUF export, which proves its files in llama.cpp,")


def prove_tokenizer(file: Path, vocabulary: Vocabulary) -> int:
    """Tokenize the texts of the corpus in llama.cpp and by tokenizer.json; returns how many texts agreed (all of them).

    Raises Incompatible with the first text whose token ids differ.
    """
    texts = tokenizer_corpus(vocabulary)
    answers = _call("tokenize", model=str(file), texts=texts)
    for text, theirs in zip(texts, answers, strict=True):
        ours = vocabulary.backend.encode(text, add_special_tokens=True).ids
        if ours != theirs:
            raise Incompatible(_first_difference(text, ours, theirs, vocabulary), key="model")
    return len(texts)


def _first_difference(text: str, ours: list[int], theirs: list[int], vocabulary: Vocabulary) -> str:
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    show = [f"{ids[at : at + 4]} {[vocabulary.tokens[id] for id in ids[at : at + 4]]}" for ids in (ours, theirs)]
    kind = f"tokenizer.ggml.model {vocabulary.definition.model}, pre {vocabulary.definition.pre}"
    return (
        f"llama.cpp would tokenize otherwise ({kind}): in the text {text!r}, from token {at}, tokenizer.json has {show[0]}, "
        f"llama.cpp {show[1]}; the model would run on other tokens than it was trained on"
    )


def quantize(
    source: Path, target: Path, type: str, *, embedding_type: str, head_type: str, importance: Mapping[str, np.ndarray], threads: int,
    work: Path,
) -> None:  # fmt: skip
    """Write `target` from the GGUF file `source`, whose linear layers are float32, with llama.cpp's quantizer.

    type        one of export.gguf.types.QUANTIZED
    embedding_type, head_type   those that embedding and head have in `source` already
    importance  mean squares of each linear layer's inputs, [width], by the tensor's name in the file; empty for none
    work        a directory for what goes with it to llama.cpp
    Raises EdgepressError when llama.cpp fails, with its last words.
    """
    ggml = gguf.GGMLQuantizationType
    np.savez(weights := work / "importance.npz", **importance)  # type: ignore[arg-type]
    _call(
        "quantize", source=str(source), target=str(target), file_type=file_type(type), threads=threads, importance=str(weights),
        embedding_type=int(ggml[embedding_type.upper()]), head_type=int(ggml[head_type.upper()]),
    )  # fmt: skip


def encode(array: np.ndarray, type: str, importance: np.ndarray | None) -> np.ndarray:
    """float32 [rows, width] -> llama.cpp's bytes of a type that is rounded, uint8 [rows, bytes]."""
    ggml = gguf.GGMLQuantizationType[type.upper()]
    block, size = gguf.GGML_QUANT_SIZES[ggml]
    with tempfile.TemporaryDirectory(prefix="edgepress-gguf-") as work:
        source, target = Path(work, "array.npy"), Path(work, "encoded")
        np.save(source, np.ascontiguousarray(array, dtype=np.float32))
        _call(
            "encode", source=str(source), target=str(target), type=int(ggml), importance=None if importance is None else importance.tolist()
        )
        return np.fromfile(target, np.uint8).reshape(len(array), array.shape[1] // block * size)


def file_type(type: str) -> int:
    """GGUF's general.file_type."""
    return int(gguf.LlamaFileType["ALL_F32" if type == "f32" else f"MOSTLY_{type.upper()}"])


def _call(command: str, **arguments: Any) -> Any:
    child = Path(__file__).with_name("llama_child.py")
    done = subprocess.run(
        [sys.executable, "-P", str(child), command],
        input=json.dumps(arguments),
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )
    if done.returncode:
        raise EdgepressError(f"llama.cpp failed to {command} (exit code {done.returncode}): {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout)
