"""Read and write the tensors of a checkpoint a few at a time, so that memory never holds the entire model."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from compression.checkpoints.checkpoint import INDEX, SINGLE, weight_map
from compression.errors import EdgepressError, UnusableModel, first_of

SHARD_BYTES = 512 * 2**20  # bounds what the writer holds in memory


def read_tensors(path: Path, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Read the tensors `names` of a checkpoint directory. Raises UnusableModel for one that it does not hold."""
    files = weight_map(path)
    by_file: dict[Path, list[str]] = {}
    for name in names:
        if name not in files:
            raise UnusableModel(f"{path} has no tensor {name}", key="model")
        by_file.setdefault(files[name], []).append(name)
    tensors: dict[str, torch.Tensor] = {}
    for shard, wanted in by_file.items():
        with safe_open(shard, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in wanted}
    return tensors


def check_names(out: Path, written: Iterable[str], expected: Iterable[str]) -> None:
    """Refuse to publish a checkpoint that holds other tensors than its source, but for what the method changes: raises EdgepressError."""
    held, due = set(written), set(expected)
    wrong = {"are missing": due - held, "are not those of the source": held - due}
    if differences := "; ".join(f"{len(names)} {what} ({first_of(names)})" for what, names in wrong.items() if names):
        raise EdgepressError(f"{out}: the tensors of the result are not what they must be: {differences}. Nothing is published")


class CheckpointWriter:
    """Write tensors into a new checkpoint directory as they come. Nothing opens it before `finish`, which writes the config and index."""

    def __init__(self, out: Path, *, shard_bytes: int = SHARD_BYTES):
        out.mkdir(parents=True, exist_ok=True)
        self._out, self._shard_bytes = out, shard_bytes
        self._pending: dict[str, torch.Tensor] = {}
        self._shards: list[list[str]] = []
        self._total = 0

    def add(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Add tensors by their full names in the model."""
        self._pending |= {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        if sum(tensor.nbytes for tensor in self._pending.values()) >= self._shard_bytes:
            self._flush()

    def finish(self, config: Mapping[str, Any], *, names: Iterable[str]) -> None:
        """Write the remaining tensors, give the shards their names, and write the index and config.json.

        Args:
            config: The content of config.json.
            names: The tensors that the checkpoint must hold: those of its source, except for what the method changes.

        Raises:
            EdgepressError: As `check_names` does.
        """
        if self._pending:
            self._flush()
        check_names(self._out, (name for shard in self._shards for name in shard), names)
        count = len(self._shards)
        files = [SINGLE] if count == 1 else [f"model-{index:05d}-of-{count:05d}.safetensors" for index in range(1, count + 1)]
        for index, file in enumerate(files):
            self._part(index).rename(self._out / file)
        if count > 1:
            weight_map = {name: file for file, names in zip(files, self._shards, strict=True) for name in names}
            _write_json(self._out / INDEX, {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(weight_map.items()))})
        _write_json(self._out / "config.json", config)

    def _flush(self) -> None:
        save_file(self._pending, self._part(len(self._shards)), metadata={"format": "pt"})
        self._shards.append(list(self._pending))
        self._total += sum(tensor.nbytes for tensor in self._pending.values())
        self._pending = {}

    def _part(self, index: int) -> Path:
        return self._out / f"shard-{index}.partial"


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")
