"""Unstructured pruning: single weights of the decoder blocks' linear layers become zero, and masks.safetensors says which."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch

from compression.calibration.calibration import BlockMethod, CompressedBlock, compress_blocks
from compression.calibration.second_order import output_power, stacked
from compression.calibration.walk import Block, Collect, SharedInput, Walk
from compression.checkpoints.checkpoint import Checkpoint, open_checkpoint
from compression.checkpoints.kept import copy_kept
from compression.checkpoints.loading import copy_tokenizer, load_model
from compression.checkpoints.masks import MaskWriter, read_masks
from compression.checkpoints.shards import CheckpointWriter, read_tensors
from compression.checkpoints.skeleton import linear_layers, skeleton
from compression.context import Context
from compression.errors import Incompatible, UnusableData, UnusableModel
from compression.pruning.allocation import allocate, outlier_ratio
from compression.pruning.check import check_unstructured, kept_of_group
from compression.pruning.gradient import gradient_scores
from compression.pruning.selection import PRUNED, keep_n_of_m, keep_strongest, keep_strongest_overall
from compression.pruning.settings import UnstructuredSettings
from compression.pruning.sparsegpt import sparsegpt
from compression.pruning.wanda import wanda, wanda_scores

MEAN_SQUARE: Collect = frozenset({"mean_square"})
Score = Callable[[], torch.Tensor]


def prune_unstructured(
    checkpoint: Path,
    out: Path,
    settings: UnstructuredSettings,
    windows: torch.Tensor | None = None,
    *,
    work: Path | None = None,
    context: Context,
) -> dict[str, float]:
    """Prune a share of the weights of the blocks' linear layers, and write a dense checkpoint with masks.

    What the checkpoint's own masks prune stays pruned and counts. Embeddings and head stay as they are.

    Args:
        checkpoint: A dense checkpoint.
        out: The directory to write.
        settings: The method (magnitude: |w|; gradient: `gradient_scores`; wanda: `wanda`; sparsegpt: `sparsegpt`), and how much is pruned
            where. With allocation sensitivity, blocks with more outliers stay denser (`allocate`): outliers of the method's own scores
            (Wanda's for sparsegpt), found before anything is pruned.
        windows: Calibration token ids, int64 [count, length]; magnitude needs none.
        work: Keeps the finished blocks of wanda and sparsegpt, so that a run that was killed resumes at its block.
        context: Device, progress and warnings.

    Returns:
        `sparsity` (of those layers, as reached) and `fallback_layers`: how many have a Hessian that sparsegpt cannot invert, so that Wanda
        prunes them.

    Raises:
        Incompatible: The checkpoint is quantized, or the settings do not fit it.
        UnusableData: `windows` are missing.
        UnusableModel: A score is not finite.
    """
    source = open_checkpoint(checkpoint)
    if source.layout != "dense":
        raise Incompatible(f"{checkpoint} is quantized ({source.layout}); pruning takes a dense checkpoint")
    check_unstructured(source, settings)
    method, is_uniform = settings.method, settings.allocation == "uniform"
    if windows is None and method != "magnitude":
        raise UnusableData(f"method {method} needs calibration windows", key="data")
    layers = _linear_weights(source)
    if windows is None or method == "magnitude":
        scores = _magnitudes(source, layers)
    elif method == "gradient":
        scores = _gradients(source, layers, windows, context)
    else:
        ratios = None if is_uniform else _outliers_on_the_walk(source, windows, context)
        sparsities = _sparsities(source, layers, ratios, settings.sparsity)
        return _prune_on_the_walk(source, out, windows, settings, sparsities, work=work, context=context)
    if settings.scope == "global":
        masks = keep_strongest_overall(scores, settings.sparsity)
    else:
        ratios = None if is_uniform else _outliers_of(scores, layers)
        sparsities = _sparsities(source, layers, ratios, settings.sparsity)
        masks = _keep_by_layer(scores, layers, sparsities, kept_of_group(settings.pattern))
    return _write_pruned(source, out, masks, total=len(scores), context=context)


def _linear_weights(source: Checkpoint) -> dict[str, list[str]]:
    """Return the names of the weights of each block's linear layers, by block; reads no weights."""
    paths = linear_layers(skeleton(source), source)
    blocks = [f"{source.blocks}.{index}" for index in range(source.num_layers)]
    return {block: [f"{path}.weight" for path in paths if path.startswith(f"{block}.")] for block in blocks}


def _sparsities(
    source: Checkpoint, layers: Mapping[str, list[str]], ratios: Mapping[str, float] | None, sparsity: float
) -> dict[str, float]:
    """Return the sparsity of each block, uniform where there are no ratios of outliers."""
    if ratios is None:
        return dict.fromkeys(layers, sparsity)
    return allocate(ratios, {block: sum(source.tensors[name].numel for name in names) for block, names in layers.items()}, sparsity)


# Magnitude and gradient: scores of the weights as they stand, then one pass from file to file.


def _magnitudes(source: Checkpoint, layers: Mapping[str, list[str]]) -> dict[str, Score]:
    """Return functions that read a weight and score it: the model is never in memory."""

    def score(name: str) -> torch.Tensor:
        return _scores(source, name, read_tensors(source.path, [name])[name].float().abs())

    return {name: partial(score, name) for names in layers.values() for name in names}


def _gradients(source: Checkpoint, layers: Mapping[str, list[str]], windows: torch.Tensor, context: Context) -> dict[str, Score]:
    """Return functions that give the scores of one pass over the model."""
    model = load_model(source.path, device=context.device)
    found = gradient_scores(model, [name for names in layers.values() for name in names], windows, context=context)
    return {name: partial(_scores, source, name, scores) for name, scores in found.items()}


def _scores(source: Checkpoint, name: str, scores: torch.Tensor) -> torch.Tensor:
    """Return scores under which what is already pruned leaves first."""
    if not torch.isfinite(scores).all():
        raise UnusableModel(f"{source.path}: the scores of {name} are not all finite", key="model")
    mask = _mask(source, name)
    return scores if mask is None else scores.masked_fill(~mask, PRUNED)


def _outliers_of(scores: Mapping[str, Score], layers: Mapping[str, list[str]]) -> dict[str, float]:
    return {block: outlier_ratio(scores[name]().clamp(min=0) for name in names) for block, names in layers.items()}


def _mask(source: Checkpoint, name: str) -> torch.Tensor | None:
    return read_masks(source.path, prefix=name).get(name)


def _keep_by_layer(
    scores: Mapping[str, Score], layers: Mapping[str, list[str]], sparsities: Mapping[str, float], group: tuple[int, int] | None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the mask of each layer."""
    for block, names in layers.items():
        for name in names:
            score = scores[name]()
            yield name, keep_n_of_m(score, *group) if group else keep_strongest(score.view(1, -1), sparsities[block]).view(score.shape)


def _write_pruned(
    source: Checkpoint, out: Path, masks: Iterable[tuple[str, torch.Tensor]], *, total: int, context: Context
) -> dict[str, float]:
    writer, mask_writer = CheckpointWriter(out), MaskWriter(out)
    kept = weights = 0
    pruned = set()
    for number, (name, chosen) in enumerate(masks):
        context.progress(number, total, name)
        before = _mask(source, name)
        mask = chosen if before is None else chosen & before
        writer.add({name: read_tensors(source.path, [name])[name].masked_fill(~mask, 0)})
        mask_writer.add({name: mask})
        pruned.add(name)
        kept, weights = kept + int(mask.sum()), weights + mask.numel()
    writer.add(read_tensors(source.path, [name for name in source.tensors if name not in pruned]))
    mask_writer.finish()
    copy_tokenizer(source.path, out)
    copy_kept(source.path, out)
    writer.finish(source.config, names=source.tensors)
    context.progress(total, total, "pruned")
    return {"sparsity": 1 - kept / weights, "fallback_layers": 0.0}


# Wanda and SparseGPT: on the walk, each block sees the outputs of the pruned ones before it.


def _outliers_on_the_walk(source: Checkpoint, windows: torch.Tensor, context: Context) -> dict[str, float]:
    """Return the ratio of outliers of each block under Wanda's scores."""
    ratios = {}
    for block in Walk(source, windows, collect=MEAN_SQUARE, context=context):
        layers = [(block.linear(path), _mean_square(shared)) for shared in block.inputs for path in shared.layers]
        ratios[block.name] = outlier_ratio(wanda_scores(layer.weight, mean_square) for layer, mean_square in layers)
    return ratios


def _prune_on_the_walk(
    source: Checkpoint,
    out: Path,
    windows: torch.Tensor,
    settings: UnstructuredSettings,
    sparsities: Mapping[str, float],
    *,
    work: Path | None,
    context: Context,
) -> dict[str, float]:
    """Prune with SparseGPT or Wanda, block by block."""
    group, damp_percent, compensates = kept_of_group(settings.pattern), settings.damp_percent, settings.method == "sparsegpt"

    def compress(block: Block) -> CompressedBlock:
        masks: dict[str, torch.Tensor] = {}
        figures: dict[str, dict[str, float]] = {}
        fallbacks: list[str] = []
        for shared in block.each_input():
            weight, kept, sparsity = stacked(block, shared.layers), block.mask(shared.layers), sparsities[block.name]
            rows = [block.linear(path).out_features for path in shared.layers]
            pruned = None
            if compensates:
                hessian = shared.second_moment
                pruned = sparsegpt(weight, hessian, rows=rows, sparsity=sparsity, group=group, kept=kept, damp_percent=damp_percent)
                fallbacks += shared.layers if pruned is None else ()
            after, mask = pruned or wanda(weight, _mean_square(shared), sparsity=sparsity, group=group, kept=kept)
            parts = zip(shared.layers, weight.split(rows), after.split(rows), mask.split(rows), strict=True)
            for path, old, new, keep in parts:
                block.linear(path).weight.copy_(new)
                masks[f"{path}.weight"] = keep
                figures[path] = {"sparsity": 1 - int(keep.sum()) / keep.numel()}
                if shared.hessian is not None:
                    figures[path]["relative_error"] = _relative_error(old, new, shared.hessian)
        counts = {
            "kept": float(sum(int(mask.sum()) for mask in masks.values())),
            "weights": float(sum(mask.numel() for mask in masks.values())),
            "fallback_layers": float(len(fallbacks)),
        }
        warnings = [f"{block.name}: {path}: the Hessian cannot be inverted; pruned by Wanda, without compensation" for path in fallbacks]
        return CompressedBlock(masks=masks, counts=counts, layers=figures, warnings=warnings)

    collect: Collect = frozenset({"hessian"}) if compensates else MEAN_SQUARE
    decisive = {"method": settings.method, "sparsities": dict(sparsities), "group": group, "damp_percent": damp_percent}
    method = BlockMethod(compress, decisive, collect=collect)
    counts = compress_blocks(source.path, out, windows, method, work=work, context=context)
    return {"sparsity": 1 - counts["kept"] / counts["weights"], "fallback_layers": counts["fallback_layers"]}


def _mean_square(shared: SharedInput) -> torch.Tensor:
    assert shared.mean_square is not None, "this walk collects no mean square"
    return shared.mean_square


def _relative_error(before: torch.Tensor, after: torch.Tensor, hessian: torch.Tensor) -> float:
    """Return E‖(W' - W)x‖² / E‖Wx‖²; 0 where a layer's outputs are all zero."""
    power = output_power(before, hessian).sum()
    return float(output_power(after - before, hessian).sum() / power) if power > 0 else 0.0
