"""The parts of llama.cpp that may abort the process they run in, as a script of their own: `python -P llama_child.py COMMAND`.

Takes its arguments as JSON on the standard input, answers in JSON on the standard output. Imports nothing of edgepress, so that it runs
wherever llama-cpp-python is installed. export/gguf/native.py calls it.
"""

import ctypes
import json
import sys
from collections.abc import Callable
from typing import Any

import llama_cpp


def tokenize(model: str, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, begin and end of text added as the model says, special tokens recognized."""
    parameters = llama_cpp.llama_model_default_params()
    parameters.vocab_only = True
    opened = llama_cpp.llama_model_load_from_file(model.encode(), parameters)
    if not opened:
        sys.exit(f"llama.cpp cannot open {model}")
    vocabulary = llama_cpp.llama_model_get_vocab(opened)
    return [_tokenize(vocabulary, text.encode()) for text in texts]


def _tokenize(vocabulary: Any, text: bytes) -> list[int]:
    room = len(text) + 16  # a token is at least a byte; SentencePiece adds a space, begin and end of text one token each
    ids = (llama_cpp.llama_token * room)()
    count = llama_cpp.llama_tokenize(vocabulary, text, len(text), ids, room, True, True)
    if count < 0:
        sys.exit(f"llama.cpp cannot tokenize {text!r}")
    return list(ids[:count])


def quantize(*, source: str, target: str, file_type: int, embedding_type: int, head_type: int, threads: int) -> int:
    """Quantize a float GGUF file with llama.cpp's own quantizer. Types are ggml's numbers."""
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.nthread, parameters.ftype = threads, file_type
    parameters.token_embedding_type, parameters.output_tensor_type = embedding_type, head_type
    if code := llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(parameters)):
        sys.exit(f"llama.cpp's quantizer returned {code}")
    return 0


if __name__ == "__main__":
    commands: dict[str, Callable[..., Any]] = {"tokenize": tokenize, "quantize": quantize}
    json.dump(commands[sys.argv[1]](**json.load(sys.stdin)), sys.stdout)
