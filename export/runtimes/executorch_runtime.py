"""Programs of `export.executorch` in ExecuTorch, on the CPU."""

from importlib import metadata
from pathlib import Path

import numpy as np
import torch

from compression.errors import UnusableModel
from export.quiet import quiet_and_offline, quiet_library

with quiet_and_offline():  # ExecuTorch looks for libraries of other backends, and says so
    from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool
    from executorch.runtime import Runtime


class ExecutorchRuntime:
    """One program that keeps its cache itself, from one call to the next."""

    name = "executorch"
    version: str = metadata.version("executorch")
    timed = True

    def __init__(self, directory: Path, *, threads: int):
        """threads  of every computation; ExecuTorch has one pool for the whole process

        Raises UnusableModel for a file that is no whole program of `export.executorch`.
        """
        with quiet_library():  # counting the processor's cores is told file by file
            _unsafe_reset_threadpool(threads)
        file = directory / "model.pte"
        try:
            program = Runtime.get().load_program(file)
            self.max_length, self._chunk = (int(program.load_method(f"get_max_{of}_len").execute([])[0]) for of in ("context", "seq"))
            self._forward = program.load_method("forward")
        except (RuntimeError, KeyError) as error:
            raise UnusableModel(f"{file} is damaged, or no program of export.executorch: {error}", key="model") from None
        self._length = 0  # tokens in the cache

    def logits(self, input_ids: np.ndarray) -> np.ndarray:
        return np.stack([self._read_from_start(row) for row in input_ids])

    def start(self, prompt: list[int], new_tokens: int) -> np.ndarray:
        return self._read_from_start(np.array(prompt))[-1]

    def step(self, token: int) -> np.ndarray:
        return self._read(np.array([token]))[-1]

    def _read_from_start(self, tokens: np.ndarray) -> np.ndarray:
        """Forget what was before and read tokens [length], as many at a time as the program takes; returns their logits."""
        self._length = 0
        return np.concatenate([self._read(tokens[first : first + self._chunk]) for first in range(0, len(tokens), self._chunk)])

    def _read(self, tokens: np.ndarray) -> np.ndarray:
        """Read tokens [length] behind those in the cache; returns their logits [length, vocabulary]."""
        places = torch.arange(self._length, self._length + len(tokens))
        logits = self._forward.execute([torch.from_numpy(tokens.astype(np.int64))[None], places])[0]
        self._length += len(tokens)
        return logits[0].numpy()

    def close(self) -> None:
        del self._forward
