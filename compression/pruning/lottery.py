"""Lottery tickets: iterative magnitude pruning with rewinding.

Frankle and Carbin, "The Lottery Ticket Hypothesis" (arXiv 1803.03635); rewinding to an early step instead of to the start: Frankle et
al., "Linear Mode Connectivity and the Lottery Ticket Hypothesis" (arXiv 1912.05671).
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compression.checkpoints.checkpoint import file_digests, open_checkpoint
from compression.checkpoints.masks import read_masks, write_masks
from compression.checkpoints.skeleton import linear_layers, skeleton
from compression.context import Context
from compression.distillation.objective import Objective
from compression.errors import EdgepressError, Incompatible
from compression.files import atomic_directory, atomic_file
from compression.pruning import Scope
from compression.pruning.selection import PRUNED, keep_strongest, keep_strongest_overall
from compression.resumption import fingerprint, same_work
from compression.training import processes
from compression.training.held_masks import held_masks, hold_masks, zero_pruned
from compression.training.loop import train
from compression.training.settings import TrainingSettings
from compression.training.students import open_student, save_student
from compression.training.trainer import KEPT
from compression.training.validation import HeldOut

CLAIM = "search"  # in the work directory: the name of the search that it belongs to
FOUND = "found"  # below a round's directory: its masks and metrics, there once it is done


def prune_lottery(
    model: Path, out: Path, rows: torch.Tensor, *, mask: torch.Tensor | None = None, validation: HeldOut | None = None, sparsity: float,
    rounds: int = 3, rewind_step: int = 0, scope: Scope = "global", finish: bool = False, settings: TrainingSettings, workdir: Path,
    context: Context,
) -> dict[str, float]:  # fmt: skip
    """Find a mask in `rounds` of training on next tokens and pruning, each from the weights of step `rewind_step`; write these weights
    under the mask to `out`, as a dense checkpoint with masks. `finish` trains them once more first.

    rows, mask   int64 and bool [n, length]: packed tokens, true where a token is a target; None takes all
    sparsity     of every linear layer of every block together. Each round keeps the same share of what is left:
                 after r of R rounds 1 - (1 - sparsity)^(r / R), of a dense model
    rewind_step  0 are the weights of `model`; another is a step of the first round's training, whose schedule, data order and
                 optimizer state the later rounds take up with it
    scope        compare the weights of all layers, or within a layer

    A finished round is kept in `workdir`: a run that was killed goes on at its round, and within it at its last checkpoint. What a sparse
    model has pruned stays pruned, and counts.

    Returns sparsity, and the metrics of `compression.training.train` of the last training.
    Raises EdgepressError for a rewind_step that the training does not reach, and what `open_student` raises.
    """
    if not 0 <= rewind_step < settings.steps:
        raise EdgepressError(f"rewind_step is {rewind_step}; it is a step before the last, {settings.steps}", key="rewind_step")
    if not rounds >= 1:
        raise EdgepressError(f"rounds is {rounds}; at least one is needed", key="rounds")
    checkpoint = open_checkpoint(model)
    linear_layers(skeleton(checkpoint), checkpoint)
    names = checkpoint.linear_tensors()
    masks = read_masks(model)
    densities = _densities(1 - _sparsity(masks, names, model), 1 - sparsity, rounds)
    origin = {
        "method": "lottery",
        "student": file_digests(model),
        "sparsity": sparsity,
        "rounds": rounds,
        "rewind_step": rewind_step,
        "scope": scope,
    }
    _claim(workdir, _run(origin, rows, mask, validation, settings, context), context)
    early = workdir / "round-1" / KEPT / f"checkpoint-{rewind_step}" if rewind_step else None
    metrics: dict[str, float] = {}

    def opened() -> Objective:
        student = open_student(model, rows, context)
        hold_masks(student, masks)
        return Objective(student, beta=1.0)

    def trained(place: Path, what: str, **where: Any) -> tuple[Objective, dict[str, float]]:
        objective = opened()
        figures = train(
            objective, rows, mask=mask, settings=settings, origin=origin, workdir=place, context=context, what=what, validation=validation, **where
        )  # fmt: skip
        return objective, figures

    for number, density in enumerate(densities, 1):
        place, what = workdir / f"round-{number}", f"lottery, round {number} of {rounds}"
        if not (place / FOUND).is_dir():
            where = {"keep_step": rewind_step or None} if number == 1 else {"start": early and early.parent}
            objective, metrics = trained(place, what, **where)
            if processes.is_first():
                _write_found(place, _ticket(objective.student, names, 1 - density, scope), metrics)
        processes.wait()
        if early and not early.is_dir():
            raise EdgepressError(f"round 1 stopped early, before rewind_step {rewind_step}; rewind to an earlier step", key="rewind_step")
        masks, metrics = read_masks(place / FOUND), json.loads((place / FOUND / "metrics.json").read_text())
    if finish:
        objective, metrics = trained(workdir / "ticket", "lottery, the ticket", start=early and early.parent)
    else:
        objective = opened()
        if early:
            _rewind(objective, early)
    save_student(objective.student, out, like=model)
    return metrics | {"sparsity": _sparsity(masks, names, model)}


def _run(
    origin: Mapping[str, Any], rows: torch.Tensor, mask: torch.Tensor | None, validation: HeldOut | None, settings: TrainingSettings,
    context: Context,
) -> str:  # fmt: skip
    """What the rounds in a work directory must agree with to be taken up."""
    data = [tensor for tensor in (rows, mask, *(validation or ())) if tensor is not None]
    document = {
        **origin, "settings": asdict(settings), "seed": context.seed, "data": [list(tensor.shape) for tensor in data],
        "device": torch.device(context.device).type, "processes": processes.count(),
    }  # fmt: skip
    return fingerprint(document, *(tensor.numpy().tobytes() for tensor in data))


def _claim(workdir: Path, run: str, context: Context) -> None:
    """Keep a work directory for one search. Raises EdgepressError where it belongs to another."""
    claim = workdir / CLAIM
    if processes.is_first() and not (claim.is_file() and same_work(claim.read_text(), run, workdir)):
        workdir.mkdir(parents=True, exist_ok=True)
        for left in (*workdir.glob("round-*"), *workdir.glob("ticket")):
            context.warn(f"{left} was left by another version of edgepress and is begun anew")
            shutil.rmtree(left)
        with atomic_file(claim) as stream:
            stream.write(run.encode())
    processes.wait()


def _densities(before: float, after: float, rounds: int) -> list[float]:
    """The share of weights that is kept after each round, falling by the same factor."""
    if after > before:
        raise Incompatible(
            f"the model keeps {before:.3f} of its weights already, and was to keep {after:.3f}; ask for a higher sparsity", key="sparsity"
        )
    return [before * (after / before) ** (number / rounds) for number in range(1, rounds + 1)]


def _sparsity(masks: Mapping[str, torch.Tensor], names: list[str], model: Path) -> float:
    """Of all weights of `names`; those without a mask are all kept."""
    tensors = open_checkpoint(model).tensors
    return sum(int((~masks[name]).sum()) for name in names if name in masks) / sum(tensors[name].numel for name in names)


def _ticket(model: nn.Module, names: list[str], sparsity: float, scope: Scope) -> dict[str, torch.Tensor]:
    """The masks of the largest weights, on the CPU."""
    before = held_masks(model)

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
    """The weights of a checkpoint, under the masks that the objective's carry."""
    saved = torch.load(checkpoint / "trainable.pt", weights_only=True)["weights"]
    for name, weight in objective.named_parameters():
        weight.copy_(saved[name])
    zero_pruned(objective)
