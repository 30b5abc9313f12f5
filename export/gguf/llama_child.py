"""The parts of llama.cpp that may abort the process they run in, as a script of their own: `python -P llama_child.py COMMAND`.

Takes its arguments as JSON on the standard input, answers in JSON on the standard output. Imports nothing of edgepress, so that it runs
wherever llama-cpp-python is installed. export/gguf/native.py calls it.
"""

import ctypes
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp._ggml import libggml

_FLOATS = ctypes.POINTER(ctypes.c_float)
ROWS = 1024  # encoded at once


@llama_cpp.llama_log_callback
def complain(level: int, text: bytes, _: object) -> None:
    """Print warnings and errors (GGML_LOG_LEVEL_WARN, _ERROR): llama.cpp's last words become an error message."""
    if level in (3, 4):
        sys.stderr.write(text.decode(errors="replace"))


def tokenize(model: str, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, begin and end of text added as the model says, special tokens recognized.

    The whole model is opened, mapped and not read, so that a tensor or a key that llama.cpp's graph lacks shows here.
    """
    parameters = llama_cpp.llama_model_default_params()
    parameters.n_gpu_layers, parameters.use_extra_bufts = 0, False  # extra buffers would hold repacked copies of the weights
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


def quantize(*, source: str, target: str, file_type: int, embedding_type: int, head_type: int, importance: str, threads: int) -> int:
    """Quantize a float GGUF file with llama.cpp's own quantizer. Types are ggml's numbers.

    importance  an .npz file: by tensor name, what errors in each column of it weigh, float32 [width]
    """
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.nthread, parameters.ftype = threads, file_type
    parameters.token_embedding_type, parameters.output_tensor_type = embedding_type, head_type
    with np.load(importance) as stored:
        weights = {name.encode(): np.ascontiguousarray(stored[name], np.float32) for name in stored.files}
    if weights:
        matrix = (llama_cpp.llama_model_imatrix_data * (len(weights) + 1))()  # ended by an entry without a name
        for entry, (name, values) in zip(matrix, weights.items(), strict=False):
            entry.name, entry.data, entry.size = name, _pointer(values), len(values)
        parameters.imatrix = matrix
    if code := llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(parameters)):
        sys.exit(f"llama.cpp's quantizer returned {code}")
    return 0


def encode(*, source: str, target: str, type: int, importance: list[float] | None) -> int:
    """The float32 array [rows, width] of an .npy file as ggml's bytes of a type, which is ggml's number."""
    array = np.load(source, mmap_mode="r")
    weights = None if importance is None else np.array(importance, np.float32)
    row = _pointer(weights) if weights is not None else None
    chunk = libggml.ggml_quantize_chunk
    chunk.restype, chunk.argtypes = ctypes.c_size_t, [ctypes.c_int, _FLOATS, ctypes.c_void_p, *[ctypes.c_int64] * 3, _FLOATS]
    with Path(target).open("wb") as out:
        for first in range(0, len(array), ROWS):
            part = np.ascontiguousarray(array[first : first + ROWS])
            room = ctypes.create_string_buffer(part.nbytes)  # no type takes more than float32
            size = chunk(type, _pointer(part), room, 0, *part.shape, row)
            out.write(room.raw[:size])
    return 0


def _pointer(array: np.ndarray) -> Any:
    return array.ctypes.data_as(_FLOATS)


if __name__ == "__main__":
    llama_cpp.llama_log_set(complain, ctypes.c_void_p())
    commands: dict[str, Callable[..., Any]] = {"tokenize": tokenize, "quantize": quantize, "encode": encode}
    json.dump(commands[sys.argv[1]](**json.load(sys.stdin)), sys.stdout)
