"""Lottery tickets: iterative magnitude pruning with rewinding.

Frankle and Carbin, "The Lottery Ticket Hypothesis" (arXiv 1803.03635); rewinding to an early step instead of to the start: Frankle et
al., "Linear Mode Connectivity and the Lottery Ticket Hypothesis" (arXiv 1912.05671).
"""

import json
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compression.checkpoints.checkpoint import file_digests, open_checkpoint
from compression.checkpoints.masks import read_masks, write_masks
from compression.checkpoints.skeleton import linear_layers, skeleton
from compression.context import Context
from compression.distillation import NEXT_TOKENS, Objective
from compression.errors import EdgepressError, Incompatible
from compression.files import atomic_directory, atomic_file
from compression.pruning.selection import PRUNED, keep_strongest, keep_strongest_overall
from compression.pruning.settings import LotterySettings, Scope
from compression.resumption import fingerprint, same_work
from compression.training import TrainingRows, TrainingRun, attach_masks, attached_masks, open_student, processes, save_student, train
from compression.training.masks import zero_pruned
from compression.training.trainer import KEPT

CLAIM = "search"  # in the work directory: the name of the search that it belongs to
FOUND = "found"  # below a round's directory: its masks and metrics, there once it is done


def prune_lottery(
    model: Path, out: Path, data: TrainingRows, settings: LotterySettings, *, workdir: Path, context: Context
) -> dict[str, float]:
    """Find a mask in rounds of training on next tokens and pruning, each from the weights of step `rewind_step`.

    Each round keeps the same share of what is left: after r of R rounds 1 - (1 - sparsity)^(r / R), of a dense model, over every linear
    layer of every block together. What a sparse model has pruned stays pruned, and counts. A `rewind_step` of 0 takes the weights of
    `model`; another is a step of the first round's training, whose schedule, data order and optimizer state the later rounds continue.
    `finish` trains the rewound weights once more before they are written.

    A finished round is kept in `workdir`: a run that was killed resumes at its round, and within it at its last checkpoint.

    Args:
        model: A dense checkpoint.
        out: The directory to write: the rewound weights under the mask, as a dense checkpoint with masks.
        data: Rows of tokens, their targets, and rows for early stopping.
        settings: Sparsity, rounds, and the training of each round.
        workdir: Holds the finished rounds and the checkpoints of the unfinished one.
        context: Device, seed and callbacks.

    Returns:
        sparsity, and the metrics of `compression.training.loop.train` of the last training.

    Raises:
        EdgepressError: The training does not reach `rewind_step`, or what `open_student` raises.
    """
    rounds, rewind_step = settings.rounds, settings.rewind_step
    if rewind_step >= settings.steps:
        raise EdgepressError(f"rewind_step is {rewind_step}; it is a step before the last, {settings.steps}", key="rewind_step")
    checkpoint = open_checkpoint(model)
    linear_layers(skeleton(checkpoint), checkpoint)
    names = checkpoint.linear_tensors()
    masks = read_masks(model)
    densities = _densities(1 - _sparsity(masks, names, model), 1 - settings.sparsity, rounds)
    origin = {"method": "lottery", "student": file_digests(model)}
    origin |= settings.model_dump(include={"sparsity", "rounds", "rewind_step", "scope"})
    _claim(workdir, _fingerprint(origin, data, settings, context), context)
    early = workdir / "round-1" / KEPT / f"checkpoint-{rewind_step}" if rewind_step else None
    metrics: dict[str, float] = {}

    def open_ticket() -> Objective:
        student = open_student(model, data.rows, context)
        attach_masks(student, masks)
        return Objective(student, NEXT_TOKENS)

    def train_ticket(
        name: str, folder: Path, *, start: Path | None = None, keep_step: int | None = None
    ) -> tuple[Objective, dict[str, float]]:
        objective = open_ticket()
        return objective, train(objective, data, settings, TrainingRun(name, origin, folder, start, keep_step), context=context)

    for number, density in enumerate(densities, 1):
        folder, name = workdir / f"round-{number}", f"lottery, round {number} of {rounds}"
        if not (folder / FOUND).is_dir():
            if number == 1:
                objective, metrics = train_ticket(name, folder, keep_step=rewind_step or None)
            else:
                objective, metrics = train_ticket(name, folder, start=early and early.parent)
            if processes.is_first():
                _write_found(folder, _ticket(objective.student, names, 1 - density, settings.scope), metrics)
        processes.wait()
        if early and not early.is_dir():
            raise EdgepressError(f"round 1 stopped early, before rewind_step {rewind_step}; rewind to an earlier step", key="rewind_step")
        masks, metrics = read_masks(folder / FOUND), json.loads((folder / FOUND / "metrics.json").read_text())
    if settings.finish:
        objective, metrics = train_ticket("lottery, the ticket", workdir / "ticket", start=early and early.parent)
    else:
        objective = open_ticket()
        if early:
            _rewind(objective, early)
    save_student(objective.student, out, like=model)
    return metrics | {"sparsity": _sparsity(masks, names, model)}


def _fingerprint(origin: Mapping[str, Any], data: TrainingRows, settings: LotterySettings, context: Context) -> str:
    """Digest what the rounds in a work directory must agree with to be continued."""
    tensors = [tensor for tensor in (data.rows, data.mask, *(data.validation or ())) if tensor is not None]
    document = {
        **origin, "settings": settings.training_values(), "seed": context.seed, "data": [list(tensor.shape) for tensor in tensors],
        "device": torch.device(context.device).type, "processes": processes.count(),
    }  # fmt: skip
    return fingerprint(document, *(tensor.numpy().tobytes() for tensor in tensors))


def _claim(workdir: Path, run: str, context: Context) -> None:
    """Reserve a work directory for one search. Raises EdgepressError where it belongs to another."""
    claim = workdir / CLAIM
    if processes.is_first() and not (claim.is_file() and same_work(claim.read_text(), run, workdir)):
        workdir.mkdir(parents=True, exist_ok=True)
        for leftover in (*workdir.glob("round-*"), *workdir.glob("ticket")):
            context.warn(f"{leftover} was left by another version of edgepress and starts anew")
            shutil.rmtree(leftover)
        with atomic_file(claim) as stream:
            stream.write(run.encode())
    processes.wait()


def _densities(before: float, after: float, rounds: int) -> list[float]:
    """Return the share of weights that each round keeps, falling by the same factor."""
    if after > before:
        raise Incompatible(
            f"the model keeps {before:.3f} of its weights already, fewer than the {after:.3f} it is to keep; set a higher sparsity",
            key="sparsity",
        )
    return [before * (after / before) ** (number / rounds) for number in range(1, rounds + 1)]


def _sparsity(masks: Mapping[str, torch.Tensor], names: list[str], model: Path) -> float:
    """Return the sparsity of all weights of `names` together; those without a mask are all kept."""
    tensors = open_checkpoint(model).tensors
    return sum(int((~masks[name]).sum()) for name in names if name in masks) / sum(tensors[name].numel for name in names)


def _ticket(model: nn.Module, names: list[str], sparsity: float, scope: Scope) -> dict[str, torch.Tensor]:
    """Return the masks of the largest weights, on the CPU."""
    before = attached_masks(model)

    def scores(name: str) -> torch.Tensor:
        weight = model.get_parameter(name).detach().abs()
        return weight.masked_fill(~before[name], PRUNED) if name in before else weight

    if scope == "global":
        chosen = dict(keep_strongest_overall({name: partial(scores, name) for name in names}, sparsity))
    else:
        chosen = {name: keep_strongest(scores(name).view(1, -1), sparsity).view_as(model.get_parameter(name)) for name in names}
    return {name: mask.cpu() & before[name].cpu() if name in before else mask.cpu() for name, mask in chosen.items()}


def _write_found(place: Path, masks: Mapping[str, torch.Tensor], metrics: Mapping[str, float]) -> None:
    """Keep what a round found, and remove the checkpoints of its training."""
    with atomic_directory(place / FOUND) as directory:
        write_masks(directory, masks)
        (directory / "metrics.json").write_text(json.dumps(metrics))
    for checkpoint in place.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)


@torch.no_grad()
def _rewind(objective: nn.Module, checkpoint: Path) -> None:
    """Load the weights of a checkpoint, and zero those that the masks of the objective's weights prune."""
    saved = torch.load(checkpoint / "trainable.pt", weights_only=True)["weights"]
    for name, weight in objective.named_parameters():
        weight.copy_(saved[name])
    zero_pruned(objective)
