"""Masks of unstructured pruning: which weights are kept, one bit each, in `masks.safetensors` next to the weights."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from compression.errors import UnusableModel

MASKS = "masks.safetensors"


def pack_mask(mask: torch.Tensor) -> torch.Tensor:
    """Pack bool [out, in] as uint8 [out, ceil(in / 8)]: bit i % 8 (lowest first) of byte i // 8 is column i; spare bits are 0."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy(), axis=1, bitorder="little"))


def unpack_mask(packed: torch.Tensor, in_features: int) -> torch.Tensor:
    """Undo `pack_mask`: bool [out, in_features]."""
    return torch.from_numpy(np.unpackbits(packed.cpu().numpy(), axis=1, count=in_features, bitorder="little").view(np.bool_))


class MaskWriter:
    """Collect masks, packed, until `finish` writes the file; without masks it writes none."""

    def __init__(self, out: Path):
        self._out = out
        self._packed: dict[str, torch.Tensor] = {}
        self._widths: dict[str, int] = {}

    def add(self, masks: Mapping[str, torch.Tensor]) -> None:
        """Add masks, bool [out, in], True where a weight is kept, by the full name of the weight in the model."""
        self._packed |= {name: pack_mask(mask) for name, mask in masks.items()}
        self._widths |= {name: mask.shape[1] for name, mask in masks.items()}

    def finish(self) -> None:
        """Write the file, if there are masks."""
        if not self._packed:
            return
        # One entry of metadata: safetensors writes several in an order that changes from run to run.
        save_file(self._packed, self._out / MASKS, metadata={"in_features": json.dumps(dict(sorted(self._widths.items())))})


def write_masks(out: Path, masks: Mapping[str, torch.Tensor]) -> None:
    """Write masks (as in `MaskWriter.add`) into the checkpoint directory `out`."""
    writer = MaskWriter(out)
    writer.add(masks)
    writer.finish()


def read_masks(path: Path, *, prefix: str = "") -> dict[str, torch.Tensor]:
    """Read the masks of a checkpoint directory, bool [out, in] by weight name, of the weights whose name begins with `prefix`.

    A directory without masks has none. Raises UnusableModel for a file that no `MaskWriter` wrote.
    """
    if not (path / MASKS).is_file():
        return {}
    with safe_open(path / MASKS, framework="pt") as file:
        metadata = file.metadata() or {}
        if "in_features" not in metadata:
            raise UnusableModel(f"{path / MASKS} holds no masks of edgepress: its metadata has no in_features", key="model")
        widths = json.loads(metadata["in_features"])
        return {name: unpack_mask(file.get_tensor(name), width) for name, width in widths.items() if name.startswith(prefix)}
