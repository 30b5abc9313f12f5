"""Compressing a checkpoint on the walk: what a method makes of each block becomes a new checkpoint, also over a crash."""

import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from compression.checkpoint import Checkpoint, open_checkpoint
from compression.context import Context
from compression.files import fsync
from compression.hidden_states import HiddenStates
from compression.loading import copy_tokenizer
from compression.pruning.kept import copy_kept
from compression.pruning.masks import MaskWriter
from compression.resumption import latest_checkpoint, write_checkpoint
from compression.shards import CheckpointWriter, read_tensors
from compression.walk import GRAM, Block, Collect, Walk

REPORT = "layers.json"


@dataclass(frozen=True)
class Outcome:
    """What a method made of a block.

    tensors   stand in the new checkpoint for the weight of the same module: "mlp.up_proj.qweight" for "mlp.up_proj.weight";
              all other parameters are written from the module in their dtype in the checkpoint
    masks     of pruned weights, bool [out, in], True where kept, by path in the block
    counts    added up over the blocks (fallback_layers)
    layers    figures about each layer, by path in the block (relative_error)
    warnings  what a person must see
    """

    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    masks: Mapping[str, torch.Tensor] = field(default_factory=dict)
    counts: Mapping[str, float] = field(default_factory=dict)
    layers: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


Compress = Callable[[Block], Outcome]


@dataclass
class _Report:
    """What the blocks so far told beside their tensors; kept over a crash."""

    counts: dict[str, float] = field(default_factory=dict)
    layers: dict[str, dict[str, float]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def add(self, block: Block, outcome: Outcome) -> None:
        for name, count in outcome.counts.items():
            self.counts[name] = self.counts.get(name, 0.0) + count
        self.layers |= {f"{block.name}.{path}": dict(figures) for path, figures in outcome.layers.items()}
        self.warnings += outcome.warnings


def compress_blocks(
    checkpoint: Path,
    out: Path,
    windows: torch.Tensor,
    compress: Compress,
    *,
    config: Mapping[str, Any] | None = None,
    collect: Collect = GRAM,
    work: Path | None = None,
    context: Context,
) -> dict[str, float]:
    """Walk over a dense checkpoint and write what `compress` makes of it to the new directory `out`; returns the sums of its counts.

    windows   token ids, int64 [count, length]
    compress  changes a block's weights in place, or gives other tensors for them (`Outcome`)
    config    entries added to config.json
    collect   the statistics of the layers' inputs that `compress` needs
    work      where finished blocks are kept: a walk that was killed goes on at the block it was in, and ends in the same bytes
    Figures about layers are written to layers.json, masks to masks.safetensors; everything outside the blocks stays as it was.

    Raises what `Walk` raises; EdgepressError where `work` belongs to another walk.
    """
    source = open_checkpoint(checkpoint)
    with ExitStack() as stack:
        folder = work / "walk" if work else Path(stack.enter_context(tempfile.TemporaryDirectory(dir=out.parent, prefix=".walk-")))
        folder.mkdir(parents=True, exist_ok=True)
        report = _walk(source, windows, compress, folder, collect, context, resumable=work is not None)
        for warning in report.warnings:
            context.warn(warning)
        _assemble(source, out, folder, report, config or {})
    return report.counts


def _walk(
    source: Checkpoint, windows: torch.Tensor, compress: Compress, folder: Path, collect: Collect, context: Context, *, resumable: bool
) -> _Report:
    """Leave a file of tensors and one of masks for each block in `folder`."""
    run = hashlib.sha256(windows.numpy().tobytes() + json.dumps(source.config, sort_keys=True).encode()).hexdigest()
    report, first, states = _Report(), 0, None
    kept = latest_checkpoint(folder, run=run, warn=context.warn)
    if kept is not None:
        report = _Report(**json.loads((kept / "report.json").read_text()))
        first = int(kept.name.removeprefix("checkpoint-"))
        states = HiddenStates(getattr(torch, source.dtype))
        states.restore(kept)

    def passed(block: Block) -> None:
        def fill(directory: Path) -> None:
            walk.states.save(directory)
            (directory / "report.json").write_text(json.dumps(asdict(report)))

        write_checkpoint(folder, block.index + 1, fill, run=run)

    walk = Walk(source, windows, collect=collect, context=context, first=first, states=states, passed=passed if resumable else None)
    for block in walk:
        with torch.no_grad():
            outcome = compress(block)
        report.add(block, outcome)
        replaced = {name.rpartition(".")[0] + ".weight" for name in outcome.tensors}
        _save(folder / f"block-{block.index}.safetensors", block.name, _keep_dtypes(block, replaced) | dict(outcome.tensors))
        _save(folder / f"masks-{block.index}.safetensors", block.name, block.masks | dict(outcome.masks))
    return report


def _save(file: Path, block: str, tensors: Mapping[str, torch.Tensor]) -> None:
    save_file({f"{block}.{path}": tensor.detach().cpu().contiguous() for path, tensor in tensors.items()}, file)
    fsync(file)


def _keep_dtypes(block: Block, replaced: set[str]) -> dict[str, torch.Tensor]:
    """The parameters that stay, in the checkpoint's dtype; the module is rounded to it too, so that what follows sees what is stored."""
    kept = {}
    with torch.no_grad():
        for name, parameter in block.module.named_parameters():
            if name not in replaced:
                kept[name] = parameter.to(block.dtypes[name])
                parameter.copy_(kept[name])
    return kept


def _assemble(source: Checkpoint, out: Path, folder: Path, report: _Report, config: Mapping[str, Any]) -> None:
    """Put the blocks' files and everything outside the blocks together to a checkpoint."""
    writer = CheckpointWriter(out)
    masks = MaskWriter(out)
    for index in range(source.num_layers):
        writer.add(load_file(folder / f"block-{index}.safetensors"))
        masks.add(load_file(folder / f"masks-{index}.safetensors"))
    writer.add(read_tensors(source.path, [name for name in source.tensors if not name.startswith(f"{source.blocks}.")]))
    masks.finish()
    if report.layers:
        (out / REPORT).write_text(json.dumps(report.layers, indent=1, sort_keys=True) + "\n")
    copy_tokenizer(source.path, out)
    if "quantization_config" not in config:  # GenAI's builder takes every safetensors file of a quantized directory for weights
        copy_kept(source.path, out)
    writer.finish(source.config | dict(config))
