"""The hidden states of calibration windows between two decoder blocks, in memory or, past a limit, on disk."""

import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

MEMORY_LIMIT = 2 * 2**30


class HiddenStates:
    """Batches of hidden states [windows, length, hidden], kept in the model's dtype on the CPU.

    Args:
        dtype: In which they are kept.
        limit: Bytes (by default `MEMORY_LIMIT`) above which every batch is a file instead, in a directory that is removed with this object.
    """

    def __init__(self, dtype: torch.dtype, *, limit: int | None = None):
        self.dtype, self.limit = dtype, MEMORY_LIMIT if limit is None else limit
        self._memory: list[torch.Tensor] = []
        self._spilled: tempfile.TemporaryDirectory[str] | None = None
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def spilled(self) -> bool:
        return self._spilled is not None

    def __getitem__(self, index: int) -> torch.Tensor:
        if self._spilled is None:
            return self._memory[index]
        return load_file(self._file(index))["hidden_states"]

    def __setitem__(self, index: int, states: torch.Tensor) -> None:
        if self._spilled is None:
            self._memory[index].copy_(states)
        else:
            self._write(index, states)

    def append(self, states: torch.Tensor) -> None:
        """Add a batch; above the limit, move all batches to disk."""
        states = states.detach().to("cpu", self.dtype, copy=True)
        self._count += 1
        if self._spilled is not None:
            self._write(self._count - 1, states)
            return
        self._memory.append(states)
        if sum(batch.nbytes for batch in self._memory) > self.limit:
            self._spilled = tempfile.TemporaryDirectory(prefix="edgepress-hidden-states-")
            for index, batch in enumerate(self._memory):
                self._write(index, batch)
            self._memory = []

    def save(self, folder: Path) -> None:
        """Write a file for each batch into `folder`."""
        for index in range(self._count):
            save_file({"hidden_states": self[index]}, folder / f"batch-{index}.safetensors")

    def restore(self, folder: Path) -> None:
        """Read what `save` wrote, into an object without batches."""
        for index in range(len(list(folder.glob("batch-*.safetensors")))):
            self.append(load_file(folder / f"batch-{index}.safetensors")["hidden_states"])

    def _file(self, index: int) -> Path:
        assert self._spilled is not None
        return Path(self._spilled.name, f"{index}.safetensors")

    def _write(self, index: int, states: torch.Tensor) -> None:
        new = self._file(index).with_suffix(".new")  # the caller's batch may still map the file that this replaces
        save_file({"hidden_states": states.detach().to("cpu", self.dtype).contiguous()}, new)
        new.replace(self._file(index))
