"""llama.cpp as a runtime, through llama-cpp-python's low-level API."""

import contextlib
import ctypes
import importlib.util
import logging
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import numpy as np

from compression.errors import Incompatible, MissingExtra, UnusableModel
from compression.evaluation.runtime import Generation

ERROR = 4  # GGML_LOG_LEVEL_ERROR
CHUNK = 512  # tokens decoded at once: bounds the logits that llama.cpp holds


class LlamaCppRuntime:
    """A GGUF artifact opened by llama.cpp on the CPU, with its defaults: float16 KV cache, kernels that repack weights for this processor.

    directory   holds model.gguf
    threads     of every computation
    max_length  tokens of the context; None takes what the model was trained for
    Raises MissingExtra, UnusableModel when llama.cpp cannot open the file.
    """

    name = "llama.cpp"
    timed = True

    def __init__(self, directory: Path, *, threads: int, max_length: int | None = None):
        if importlib.util.find_spec("llama_cpp") is None:
            raise MissingExtra("llama-cpp-python", "llamacpp", "running a GGUF file")
        import llama_cpp

        logging.getLogger("llama-cpp-python").setLevel(logging.CRITICAL)  # whose level decides what llama.cpp prints
        self._llama = llama_cpp
        self.version = version("llama-cpp-python")
        parameters = llama_cpp.llama_model_default_params()
        parameters.n_gpu_layers = 0
        # ggml's AMX kernels crash on some machines (ggml-org/llama.cpp#20824, measured on a Xeon with llama-cpp-python 0.3.36): without
        # them the plain kernels run, slower.
        parameters.use_extra_bufts = b"AMX_INT8 = 1" not in llama_cpp.llama_print_system_info()
        with _errors(llama_cpp) as errors:
            self._model = llama_cpp.llama_model_load_from_file(str(directory / "model.gguf").encode(), parameters)
        self._context = None
        if not self._model:
            raise UnusableModel(f"llama.cpp cannot open {directory / 'model.gguf'}: {' '.join(errors)}", key="model")
        trained = llama_cpp.llama_model_n_ctx_train(self._model)
        self.max_length = min(max_length or trained, trained)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = self.max_length, CHUNK, CHUNK
        settings.n_threads = settings.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, settings)
        if not self._context:
            self.close()
            raise UnusableModel(f"llama.cpp has no memory for a context of {self.max_length} tokens; lower max_length", key="max_length")
        self._batch = llama_cpp.llama_batch_init(CHUNK, 0, 1)

    def logits(self, input_ids: np.ndarray) -> np.ndarray:
        """Next-token logits at every position: int64 [batch, length] -> float32 [batch, length, vocabulary]."""
        rows, length = input_ids.shape
        self._check_length(length)
        logits = np.empty((rows, length, self._vocab_size), dtype=np.float32)
        for row, ids in enumerate(input_ids.tolist()):
            self._forget()
            for start in range(0, length, CHUNK):
                chunk = ids[start : start + CHUNK]
                self._decode(chunk, start, every=True)
                logits[row, start : start + len(chunk)] = self._read_logits(len(chunk))
        return logits

    def generate(self, prompt: list[int], new_tokens: int) -> Generation:
        """Greedy generation of exactly `new_tokens` tokens with a KV cache; end-of-text does not stop it."""
        self._check_length(len(prompt) + new_tokens)
        self._forget()
        start = time.perf_counter()
        for at in range(0, len(prompt), CHUNK):
            self._decode(prompt[at : at + CHUNK], at)
        tokens = [self._greedy()]
        prefilled = time.perf_counter()
        while len(tokens) < new_tokens:
            self._decode(tokens[-1:], len(prompt) + len(tokens) - 1)
            tokens.append(self._greedy())
        return Generation(tokens, prefilled - start, time.perf_counter() - prefilled)

    def close(self) -> None:
        """Give the model's memory back."""
        if self._context:
            self._llama.llama_batch_free(self._batch)
            self._llama.llama_free(self._context)
        if self._model:
            self._llama.llama_model_free(self._model)
        self._context = self._model = None

    def _check_length(self, length: int) -> None:
        if length > self.max_length:
            raise Incompatible(
                f"{length} tokens do not fit into this llama.cpp context of {self.max_length}; raise max_length or shorten",
                key="max_length",
            )

    def _forget(self) -> None:
        self._llama.llama_memory_clear(self._llama.llama_get_memory(self._context), True)

    def _decode(self, ids: list[int], start: int, *, every: bool = False) -> None:
        """Run tokens at positions `start`...; logits of every one of them, or of the last."""
        batch = self._batch
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, start + i, 1, every
            batch.seq_id[i][0] = 0
        batch.logits[len(ids) - 1] = True
        if code := self._llama.llama_decode(self._context, batch):
            raise Incompatible(
                f"llama.cpp could not run tokens {start} to {start + len(ids)} (code {code}); token ids must be below {self._vocab_size}"
            )

    def _read_logits(self, count: int) -> np.ndarray:
        pointer = self._llama.llama_get_logits(self._context)
        return np.ctypeslib.as_array(ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float)), shape=(count, self._vocab_size))

    def _greedy(self) -> int:
        return int(self._read_logits(1)[0].argmax())


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
