"""Unstructured pruning: single weights of the decoder blocks' linear layers become zero, and masks.safetensors says which."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch

from compression.calibration.calibration import CompressedBlock, compress_blocks
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
from compression.pruning import Allocation, Pattern, PruningMethod, Scope, check_unstructured, kept_of_group
from compression.pruning.allocation import allocate, outlier_ratio
from compression.pruning.gradient import gradient_scores
from compression.pruning.selection import PRUNED, keep_n_of_m, keep_strongest, keep_strongest_overall
from compression.pruning.sparsegpt import sparsegpt
from compression.pruning.wanda import wanda, wanda_scores

MEAN_SQUARE: Collect = frozenset({"mean_square"})
Score = Callable[[], torch.Tensor]


def prune_unstructured(
    checkpoint: Path,
    out: Path,
    windows: torch.Tensor | None = None,
    *,
    method: PruningMethod = "sparsegpt",
    sparsity: float = 0.5,
    pattern: Pattern = "unstructured",
    scope: Scope = "layer",
    allocation: Allocation = "uniform",
    damp_percent: float = 0.01,
    work: Path | None = None,
    context: Context,
) -> dict[str, float]:
    """Prune the share `sparsity` of the weights of every linear layer of every block; write a dense checkpoint with masks to `out`.

    windows       calibration token ids, int64 [count, length]; `magnitude` takes none
    method        magnitude (|w|), gradient (SNIP), wanda (compares within a row), sparsegpt (also moves the weights that stay)
    pattern       "2:4" and "4:8" prune 2 of each 4 or 4 of each 8 neighbours in a row
    scope         compare weights within a layer, or those of all layers together
    allocation    the same sparsity in every layer, or less in blocks with more outliers (`allocate`), by the method's own
                  scores (Wanda's for sparsegpt), gathered before anything is pruned
    damp_percent  of the mean of the Hessian's diagonal, added to it (sparsegpt)
    work          where the finished blocks of wanda and sparsegpt are kept: a run that was killed goes on at its block
    What the checkpoint's own masks prune stays pruned and counts. Embeddings and head stay as they are.

    Returns `sparsity` (of those layers, really reached) and `fallback_layers`: those whose Hessian sparsegpt could not invert, where Wanda
    chose. Raises Incompatible for settings that do not fit, UnusableData where windows are missing.
    """
    source = open_checkpoint(checkpoint)
    if source.layout != "dense":
        raise Incompatible(f"{checkpoint} is quantized ({source.layout}); pruning takes a dense checkpoint")
    check_unstructured(source, method=method, scope=scope, sparsity=sparsity, pattern=pattern, allocation=allocation)
    if windows is None and method != "magnitude":
        raise UnusableData(f"method {method} needs calibration windows", key="data")
    layers = _linear_weights(source)
    if windows is None or method == "magnitude":
        scores = _magnitudes(source, layers)
    elif method == "gradient":
        scores = _gradients(source, layers, windows, context)
    else:
        ratios = _outliers_on_the_walk(source, windows, context) if allocation == "sensitivity" else None
        return _prune_on_the_walk(
            source, out, windows, compensate=method == "sparsegpt", sparsities=_sparsities(source, layers, ratios, sparsity),
            group=kept_of_group(pattern), damp_percent=damp_percent, work=work, context=context,
        )  # fmt: skip
    if scope == "global":
        masks = keep_strongest_overall(scores, sparsity)
    else:
        ratios = _outliers_of(scores, layers) if allocation == "sensitivity" else None
        sparsities = _sparsities(source, layers, ratios, sparsity)
        masks = _keep_by_layer(scores, layers, sparsities, kept_of_group(pattern))
    return _write_pruned(source, out, masks, total=len(scores), context=context)


def _linear_weights(source: Checkpoint) -> dict[str, list[str]]:
    """The names of the weights of each block's linear layers, by block, told from the model without weights."""
    paths = linear_layers(skeleton(source), source)
    blocks = [f"{source.blocks}.{index}" for index in range(source.num_layers)]
    return {block: [f"{path}.weight" for path in paths if path.startswith(f"{block}.")] for block in blocks}


def _sparsities(
    source: Checkpoint, layers: Mapping[str, list[str]], ratios: Mapping[str, float] | None, sparsity: float
) -> dict[str, float]:
    """The sparsity of each block, uniform where there are no ratios of outliers."""
    if ratios is None:
        return dict.fromkeys(layers, sparsity)
    return allocate(ratios, {block: sum(source.tensors[name].numel for name in names) for block, names in layers.items()}, sparsity)


# Magnitude and gradient: scores of the weights as they stand, then one pass from file to file.


def _magnitudes(source: Checkpoint, layers: Mapping[str, list[str]]) -> dict[str, Score]:
    """Functions that read a weight and score it, so that no model need be in memory."""

    def score(name: str) -> torch.Tensor:
        return _scores(source, name, read_tensors(source.path, [name])[name].float().abs())

    return {name: partial(score, name) for names in layers.values() for name in names}


def _gradients(source: Checkpoint, layers: Mapping[str, list[str]], windows: torch.Tensor, context: Context) -> dict[str, Score]:
    """Functions that give what one pass of the whole model found."""
    model = load_model(source.path, device=context.device)
    found = gradient_scores(model, [name for names in layers.values() for name in names], windows, context=context)
    return {name: partial(_scores, source, name, scores) for name, scores in found.items()}


def _scores(source: Checkpoint, name: str, scores: torch.Tensor) -> torch.Tensor:
    """Scores under which what is pruned already goes first."""
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
    """The mask of each layer, one after another."""
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


# Wanda and SparseGPT: on the walk, each block behind the pruned ones.


def _outliers_on_the_walk(source: Checkpoint, windows: torch.Tensor, context: Context) -> dict[str, float]:
    """The ratio of outliers of each block under Wanda's scores."""
    ratios = {}
    for block in Walk(source, windows, collect=MEAN_SQUARE, context=context):
        layers = [(block.linear(path), _mean_square(shared)) for shared in block.inputs for path in shared.layers]
        ratios[block.name] = outlier_ratio(wanda_scores(layer.weight, mean_square) for layer, mean_square in layers)
    return ratios


def _prune_on_the_walk(
    source: Checkpoint, out: Path, windows: torch.Tensor, *, compensate: bool, sparsities: Mapping[str, float],
    group: tuple[int, int] | None, damp_percent: float, work: Path | None, context: Context,
) -> dict[str, float]:  # fmt: skip
    """SparseGPT where weights `compensate`, Wanda where they do not."""

    def compress(block: Block) -> CompressedBlock:
        masks: dict[str, torch.Tensor] = {}
        figures: dict[str, dict[str, float]] = {}
        fallbacks: list[str] = []
        for shared in block.each_input():
            weight, kept, sparsity = stacked(block, shared.layers), block.mask(shared.layers), sparsities[block.name]
            rows = [block.linear(path).out_features for path in shared.layers]
            pruned = None
            if compensate:
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
        warnings = [f"{block.name}: {path}: the Hessian cannot be inverted; pruned as by Wanda, nothing made up for" for path in fallbacks]
        return CompressedBlock(masks=masks, counts=counts, layers=figures, warnings=warnings)

    collect: Collect = frozenset({"hessian"}) if compensate else MEAN_SQUARE
    settings = {
        "method": "sparsegpt" if compensate else "wanda",
        "sparsities": dict(sparsities),
        "group": group,
        "damp_percent": damp_percent,
    }
    counts = compress_blocks(source.path, out, windows, compress, settings=settings, collect=collect, work=work, context=context)
    return {"sparsity": 1 - counts["kept"] / counts["weights"], "fallback_layers": counts["fallback_layers"]}


def _mean_square(shared: SharedInput) -> torch.Tensor:
    assert shared.mean_square is not None, "this walk collects no mean square"
    return shared.mean_square


def _relative_error(before: torch.Tensor, after: torch.Tensor, hessian: torch.Tensor) -> float:
    """E‖(W' - W)x‖² / E‖Wx‖²; 0 where a layer gives nothing."""
    power = output_power(before, hessian).sum()
    return float(output_power(after - before, hessian).sum() / power) if power > 0 else 0.0
