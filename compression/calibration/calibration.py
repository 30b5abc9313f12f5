"""Compress a checkpoint on the walk: what a method makes of each block becomes a new checkpoint, also over a crash."""

import json
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from compression.calibration.hidden_states import HiddenStates
from compression.calibration.walk import HESSIAN, Block, Collect, Walk
from compression.checkpoints.checkpoint import Checkpoint, file_digests, open_checkpoint
from compression.checkpoints.kept import copy_kept
from compression.checkpoints.loading import copy_tokenizer
from compression.checkpoints.masks import MaskWriter
from compression.checkpoints.shards import CheckpointWriter, read_tensors
from compression.context import Context
from compression.files import fsync
from compression.resumption import fingerprint, latest_checkpoint, write_checkpoint

REPORT = "layers.json"


@dataclass(frozen=True)
class CompressedBlock:
    """What a method made of a block.

    Attributes:
        tensors: They replace the weight of the same module in the new checkpoint: "mlp.up_proj.qweight" for "mlp.up_proj.weight".
            All other parameters and buffers are written from the module in their dtype in the checkpoint.
        masks: Of pruned weights, bool [out, in], True where kept, by path in the block.
        counts: Added up over the blocks (fallback_layers).
        layers: Figures about each layer, by path in the block (relative_error).
        warnings: What a person must see.
    """

    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    masks: Mapping[str, torch.Tensor] = field(default_factory=dict)
    counts: Mapping[str, float] = field(default_factory=dict)
    layers: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class BlockMethod:
    """What a method does with every block.

    Attributes:
        compress: Changes a block's weights in place, or returns other tensors for them.
        settings: The name of the method and everything that decides what `compress` does, as JSON: a walk resumes only under the same.
        config: Entries added to config.json.
        collect: The statistics of the layers' inputs that `compress` needs.
    """

    compress: Callable[[Block], CompressedBlock]
    settings: Mapping[str, Any]
    config: Mapping[str, Any] = field(default_factory=dict)
    collect: Collect = HESSIAN


@dataclass
class _Report:
    """What is known of the finished blocks besides their tensors; kept over a crash.

    Attributes:
        replaced: Names of the source's tensors that others replace.
        instead: Names of those others.
    """

    counts: dict[str, float] = field(default_factory=dict)
    layers: dict[str, dict[str, float]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)
    instead: list[str] = field(default_factory=list)

    def add(self, block: Block, outcome: CompressedBlock) -> None:
        for name, count in outcome.counts.items():
            self.counts[name] = self.counts.get(name, 0.0) + count
        self.layers |= {f"{block.name}.{path}": dict(figures) for path, figures in outcome.layers.items()}
        self.warnings += outcome.warnings
        self.replaced += [f"{block.name}.{path}" for path in _replaced(outcome)]
        self.instead += [f"{block.name}.{path}" for path in outcome.tensors]


def _replaced(outcome: CompressedBlock) -> set[str]:
    """Return the weights that tensors of an outcome replace, by path in the block."""
    return {f"{path.rpartition('.')[0]}.weight" for path in outcome.tensors}


def compress_blocks(
    checkpoint: Path,
    out: Path,
    windows: torch.Tensor,
    method: BlockMethod,
    *,
    work: Path | None = None,
    context: Context,
) -> dict[str, float]:
    """Walk over a dense checkpoint and write what a method makes of its blocks to a new checkpoint.

    Figures about layers are written to layers.json, masks to masks.safetensors; everything outside the blocks stays as it was.

    Args:
        checkpoint: A dense checkpoint directory.
        out: A new directory.
        windows: Token ids, int64 [count, length].
        method: What happens to each block.
        work: Where finished blocks are kept: a walk that was killed resumes at its block, and ends in the same bytes. None keeps nothing.
        context: Seed, device and callbacks.

    Returns:
        The method's counts, added up over the blocks.

    Raises:
        EdgepressError: `work` belongs to another walk, or the result would hold other tensors than it must; and what `Walk` raises.
    """
    source = open_checkpoint(checkpoint)
    with ExitStack() as stack:
        folder = work / "walk" if work else Path(stack.enter_context(tempfile.TemporaryDirectory(dir=out.parent, prefix=".walk-")))
        folder.mkdir(parents=True, exist_ok=True)
        decides = {**method.settings, "config": dict(method.config), "collect": sorted(method.collect)}
        run = _fingerprint(source, windows, decides, context) if work else None
        report = _walk(source, windows, method, folder, context, run)
        for warning in report.warnings:
            context.warn(warning)
        _assemble(source, out, folder, report, method.config)
    return report.counts


def _fingerprint(source: Checkpoint, windows: torch.Tensor, settings: Mapping[str, Any], context: Context) -> str:
    """Identify the walks that may resume from each other's work."""
    machine = {"seed": context.seed, "device": torch.device(context.device).type}
    return fingerprint(
        {**settings, **machine, "model": file_digests(source.path), "windows": list(windows.shape)}, windows.numpy().tobytes()
    )


def _walk(source: Checkpoint, windows: torch.Tensor, method: BlockMethod, folder: Path, context: Context, run: str | None) -> _Report:
    """Write a file of tensors and one of masks for each block into `folder`; a walk with a fingerprint (`run`) resumes at its block."""
    report, first, states = _Report(), 0, None
    kept = None if run is None else latest_checkpoint(folder, run=run, warn=context.warn)
    if kept is not None:
        report = _Report(**json.loads((kept / "report.json").read_text()))
        first = int(kept.name.removeprefix("checkpoint-"))
        states = HiddenStates(getattr(torch, source.dtype))
        states.restore(kept)

    def passed(block: Block) -> None:
        def fill(directory: Path) -> None:
            walk.states.save(directory)
            (directory / "report.json").write_text(json.dumps(asdict(report)))

        assert run is not None
        write_checkpoint(folder, block.index + 1, fill, run=run)

    walk = Walk(source, windows, collect=method.collect, context=context, first=first, states=states, passed=passed if run else None)
    for block in walk:
        with torch.no_grad():
            outcome = method.compress(block)
        report.add(block, outcome)
        kept_tensors = _keep_dtypes(block, _replaced(outcome))
        _save(folder / f"block-{block.index}.safetensors", block.name, kept_tensors | dict(outcome.tensors))
        _save(folder / f"masks-{block.index}.safetensors", block.name, block.masks | dict(outcome.masks))
    return report


def _save(file: Path, block: str, tensors: Mapping[str, torch.Tensor]) -> None:
    save_file({f"{block}.{path}": tensor.detach().cpu().contiguous() for path, tensor in tensors.items()}, file)
    fsync(file)


def _keep_dtypes(block: Block, replaced: set[str]) -> dict[str, torch.Tensor]:
    """Return the parameters and buffers that stay, in the checkpoint's dtype; round the module to it too, so that later blocks see what is stored."""
    kept = {}
    with torch.no_grad():
        for name, tensor in block.module.state_dict().items():
            if name not in replaced:
                kept[name] = tensor.to(block.dtypes[name])
                tensor.copy_(kept[name])
    return kept


def _assemble(source: Checkpoint, out: Path, folder: Path, report: _Report, config: Mapping[str, Any]) -> None:
    """Build a checkpoint from the blocks' files and everything outside the blocks."""
    writer = CheckpointWriter(out)
    masks = MaskWriter(out)
    replaced = set(report.replaced)
    remaining, written = [name for name in source.tensors if name not in replaced], set[str]()
    for index in range(source.num_layers):
        tensors = load_file(folder / f"block-{index}.safetensors")
        writer.add(tensors)
        masks.add(load_file(folder / f"masks-{index}.safetensors"))
        written |= tensors.keys()
    writer.add(read_tensors(source.path, [name for name in remaining if name not in written]))
    masks.finish()
    if report.layers:
        (out / REPORT).write_text(json.dumps(report.layers, indent=1, sort_keys=True) + "\n")
    copy_tokenizer(source.path, out)
    if "quantization_config" not in config:  # GenAI's builder takes every safetensors file of a quantized directory for weights
        copy_kept(source.path, out)
    writer.finish(source.config | dict(config), names=[*remaining, *report.instead])
