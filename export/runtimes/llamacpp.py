"""llama.cpp as a runtime, through llama-cpp-python's low-level API."""

import contextlib
import ctypes
import importlib.util
import logging
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import numpy as np

from compression.errors import Incompatible, MissingExtra, UnusableModel
from export.runtimes.gguf_file import gguf_file

ERROR = 4  # GGML_LOG_LEVEL_ERROR
CHUNK = 512  # tokens decoded at once: bounds the logits that llama.cpp holds


class LlamaCppRuntime:
    """A GGUF artifact opened by llama.cpp on the CPU, with its defaults: float16 KV cache, kernels that repack weights for this processor.

    path        a GGUF file, or a directory that holds one
    threads     of every computation
    max_length  tokens of the context; None takes what the model was trained for
    Raises MissingExtra, UnusableModel when llama.cpp cannot open the file.

    The cache grows to what is asked: models trained for long contexts would take gigabytes for one that nobody uses.
    """

    name = "llama.cpp"
    timed = True

    def __init__(self, path: Path, *, threads: int, max_length: int | None = None):
        if importlib.util.find_spec("llama_cpp") is None:
            raise MissingExtra("llama-cpp-python", "llamacpp", "running a GGUF file")
        import llama_cpp

        logging.getLogger("llama-cpp-python").setLevel(logging.CRITICAL)  # whose level decides what llama.cpp prints
        self.llama = llama_cpp
        self.version = version("llama-cpp-python")
        parameters = llama_cpp.llama_model_default_params()
        parameters.n_gpu_layers = 0
        # ggml's AMX kernels crash on some machines (ggml-org/llama.cpp#20824, measured on a Xeon with llama-cpp-python 0.3.36): without
        # them the plain kernels run, slower.
        parameters.use_extra_bufts = b"AMX_INT8 = 1" not in llama_cpp.llama_print_system_info()
        file = gguf_file(path)
        with _errors(llama_cpp) as errors:
            self.model = llama_cpp.llama_model_load_from_file(str(file).encode(), parameters)
        self._context, self._length = None, 0  # tokens in the cache
        if not self.model:
            raise UnusableModel(f"llama.cpp cannot open {file}: {' '.join(errors)}", key="model")
        trained = llama_cpp.llama_model_n_ctx_train(self.model)
        self.max_length = min(max_length or trained, trained)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self._settings = llama_cpp.llama_context_default_params()
        self._settings.n_ctx, self._settings.n_batch, self._settings.n_ubatch = 0, CHUNK, CHUNK
        self._settings.n_threads = self._settings.n_threads_batch = threads
        self._batch = llama_cpp.llama_batch_init(CHUNK, 0, 1)

    def logits(self, input_ids: np.ndarray) -> np.ndarray:
        """Next-token logits at every position: int64 [batch, length] -> float32 [batch, length, vocabulary]."""
        rows, length = input_ids.shape
        self._make_room(length)
        logits = np.empty((rows, length, self._vocab_size), dtype=np.float32)
        for row, ids in enumerate(input_ids.tolist()):
            self._forget()
            for start in range(0, length, CHUNK):
                chunk = ids[start : start + CHUNK]
                self._decode(chunk, start, every=True)
                logits[row, start : start + len(chunk)] = self._read_logits(len(chunk))
        return logits

    def start(self, prompt: list[int], new_tokens: int) -> np.ndarray:
        self._make_room(len(prompt) + new_tokens)
        self._forget()
        self._length = 0
        for at in range(0, len(prompt), CHUNK):
            logits = self._read(prompt[at : at + CHUNK])
        return logits

    def step(self, token: int) -> np.ndarray:
        return self._read([token])

    def close(self) -> None:
        """Give the model's memory back."""
        if self._context:
            self.llama.llama_free(self._context)
        if self.model:
            self.llama.llama_batch_free(self._batch)
            self.llama.llama_model_free(self.model)
        self._context = self.model = None

    def _make_room(self, length: int) -> None:
        """Have a context of `length` tokens or more, up to twice of it."""
        if length > self.max_length:
            raise Incompatible(
                f"{length} tokens do not fit into this llama.cpp context of {self.max_length}; raise max_length or shorten",
                key="max_length",
            )
        if self._context and self._settings.n_ctx >= length:
            return
        if self._context:
            self.llama.llama_free(self._context)
        self._settings.n_ctx = min(max(256, 1 << (length - 1).bit_length()), self.max_length)
        self._context = self.llama.llama_init_from_model(self.model, self._settings)
        if not self._context:
            raise UnusableModel(f"llama.cpp has no memory for a context of {self._settings.n_ctx} tokens; shorten", key="max_length")

    def _read(self, tokens: list[int]) -> np.ndarray:
        """Run tokens behind those in the cache; returns the logits after the last, in llama.cpp's memory."""
        self._decode(tokens, self._length)
        self._length += len(tokens)
        return self._read_logits(1)[0]

    def _forget(self) -> None:
        self.llama.llama_memory_clear(self.llama.llama_get_memory(self._context), True)

    def _decode(self, ids: list[int], start: int, *, every: bool = False) -> None:
        """Run tokens at positions `start`...; logits of every one of them, or of the last."""
        batch = self._batch
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, start + i, 1, every
            batch.seq_id[i][0] = 0
        batch.logits[len(ids) - 1] = True
        if code := self.llama.llama_decode(self._context, batch):
            raise Incompatible(
                f"llama.cpp could not run tokens {start} to {start + len(ids)} (code {code}); token ids must be below {self._vocab_size}"
            )

    def _read_logits(self, count: int) -> np.ndarray:
        pointer = self.llama.llama_get_logits(self._context)
        return np.ctypeslib.as_array(ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float)), shape=(count, self._vocab_size))


@contextlib.contextmanager
def _errors(llama: ModuleType) -> Iterator[list[str]]:
    """Collect llama.cpp's error messages while the block runs."""
    messages: list[str] = []

    @llama.llama_log_callback
    def collect(level: int, text: bytes, _: object) -> None:
        if level == ERROR:
            messages.append(text.decode(errors="replace").strip())

    before, data = llama.llama_log_callback(), ctypes.c_void_p()
    llama.llama_log_get(ctypes.byref(before), ctypes.byref(data))
    llama.llama_log_set(collect, ctypes.c_void_p())
    try:
        yield messages
    finally:
        llama.llama_log_set(before, data)
