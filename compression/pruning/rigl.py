"""RigL: sparse training that moves its zeros (Evci et al., "Rigging the Lottery", arXiv 1911.11134)."""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from compression.checkpoints.checkpoint import file_digests, open_checkpoint
from compression.checkpoints.masks import pack_mask, unpack_mask
from compression.checkpoints.skeleton import linear_layers
from compression.context import Context
from compression.distillation.objective import Objective
from compression.errors import Incompatible
from compression.pruning.densities import Distribution, layer_sparsities
from compression.pruning.selection import PRUNED, keep_strongest
from compression.training.held_masks import HeldMasks, held_masks, hold_masks, zero_moments
from compression.training.loop import train
from compression.training.settings import TrainingSettings
from compression.training.students import open_student, save_student
from compression.training.validation import HeldOut


def prune_rigl(
    model: Path, out: Path, rows: torch.Tensor, *, mask: torch.Tensor | None = None, validation: HeldOut | None = None, sparsity: float,
    distribution: Distribution = "uniform", drop_fraction: float = 0.3, delta_t: int = 100, stop_at: float = 0.75,
    settings: TrainingSettings, workdir: Path, context: Context,
) -> dict[str, float]:  # fmt: skip
    """Prune every linear layer of every block by magnitude to `sparsity`, then train on next tokens while the zeros move; write a dense
    checkpoint with masks to `out`.

    rows, mask     int64 and bool [n, length]: packed tokens, true where a token is a target; None takes all
    distribution   of the sparsity over layers (`layer_sparsities`)
    drop_fraction  of a layer's weights that moves at first, annealed along a cosine (`RigL.fraction`)
    delta_t        steps from one update to the next
    stop_at        share of the steps after which the masks stay

    What a sparse model has pruned stays pruned at the start, and may grow back.

    Returns the metrics of `compression.training.train` with sparsity (of those layers) and mask_updates.
    Raises Incompatible: a model that is sparser already in a layer, and what `open_student` raises.
    """
    checkpoint = open_checkpoint(model)
    student = open_student(model, rows, context)
    linear_layers(student, checkpoint)
    hold_masks(student, _starting_masks(student, checkpoint.linear_tensors(), sparsity, distribution))
    objective = Objective(student, beta=1.0)
    rigl = RigL(objective, drop_fraction=drop_fraction, delta_t=delta_t, last_step=math.ceil(stop_at * settings.steps))
    origin = {
        "method": "rigl", "student": file_digests(model), "sparsity": sparsity, "distribution": distribution, "drop_fraction": drop_fraction,
        "delta_t": delta_t, "stop_at": stop_at,
    }  # fmt: skip
    metrics = train(
        objective, rows, mask=mask, settings=settings, origin=origin, workdir=workdir, context=context, what="RigL", validation=validation,
        sparsity=rigl,
    )  # fmt: skip
    save_student(student, out, like=model)
    masks = held_masks(student).values()
    return metrics | {
        "sparsity": 1 - sum(int(kept.sum()) for kept in masks) / sum(kept.numel() for kept in masks),
        "mask_updates": float(sum(rigl.moves(step) for step in range(1, int(metrics["steps"]) + 1))),
    }


class RigL(HeldMasks):
    """The masks of a module in dynamic sparse training. Every layer keeps its number of weights.

    At step t, where `delta_t` divides t and t < `last_step`, nothing is trained; of the n weights that a layer keeps, k = fraction(t)·n move:
    the k smallest are dropped, and of those that are not kept then the k with the largest gradient grow, starting from zero with moments
    of zero. One that is dropped and grows again has not moved. All other steps train as with fixed masks.
    """

    def __init__(self, module: nn.Module, *, drop_fraction: float, delta_t: int, last_step: int):
        super().__init__(module)
        self.drop_fraction, self.delta_t, self.last_step = drop_fraction, delta_t, last_step

    def moves(self, step: int) -> bool:
        return step % self.delta_t == 0 and step < self.last_step

    def fraction(self, step: int) -> float:
        """f(t) = α/2 · (1 + cos(π·t / T_end)): the paper's f_decay."""
        return self.drop_fraction / 2 * (1 + math.cos(math.pi * step / self.last_step))

    def mask_gradients(self, step: int) -> None:
        """The gradients of pruned weights are what tells where to grow: they stay at a step that moves."""
        if not self.moves(step):
            super().mask_gradients(step)

    @torch.no_grad()
    def before_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        if not self.moves(step):
            return
        for name, weight in self.weights.items():
            before, mask = self.masks[name].clone(), self.masks[name]
            if weight.grad is None:
                raise Incompatible(f"{name} has no gradient, so there is nothing to grow its weights by")
            mask.copy_(moved(weight, weight.grad, before, self.fraction(step)))
            weight.masked_fill_(~mask, 0)
            zero_moments(optimizer, weight, ~(mask & before))
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None  # the optimizer leaves what has none alone

    def state(self) -> dict[str, torch.Tensor]:
        """The masks, packed."""
        return {name: pack_mask(mask) for name, mask in self.masks.items()}

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        for name, packed in state.items():
            self.masks[name].copy_(unpack_mask(packed, self.masks[name].shape[1]))


def moved(weight: torch.Tensor, gradient: torch.Tensor, mask: torch.Tensor, fraction: float) -> torch.Tensor:
    """The mask after `fraction` of the kept weights moved, bool like the tensors [out, in]; of equal ones the earlier moves."""
    count = int(fraction * int(mask.sum()))
    dropped = _first(weight.abs().masked_fill(~mask, math.inf), count, largest=False)
    kept = mask & ~dropped
    return kept | _first(gradient.abs().masked_fill(kept, -1), count, largest=True)


def _first(values: torch.Tensor, count: int, *, largest: bool) -> torch.Tensor:
    chosen = torch.zeros(values.numel(), dtype=torch.bool, device=values.device)
    chosen[values.flatten().argsort(descending=largest, stable=True)[:count]] = True
    return chosen.view(values.shape)


def _starting_masks(model: nn.Module, names: list[str], sparsity: float, distribution: Distribution) -> dict[str, torch.Tensor]:
    """The largest weights of each layer, none of them pruned already."""
    weights = {name: model.get_parameter(name).detach() for name in names}
    before = held_masks(model)
    sparsities = layer_sparsities({name: (weight.shape[0], weight.shape[1]) for name, weight in weights.items()}, sparsity, distribution)
    masks = {}
    for name, weight in weights.items():
        scores = weight.abs().masked_fill(~before[name], PRUNED) if name in before else weight.abs()
        masks[name] = keep_strongest(scores.view(1, -1), sparsities[name]).view(weight.shape)
        if name in before and (masks[name] & ~before[name]).any():
            raise Incompatible(
                f"{name} is {1 - int(before[name].sum()) / weight.numel():.3f} sparse already, and was to be {sparsities[name]:.3f}; "
                "ask for a sparsity at or above that of the model",
                key="sparsity",
            )
    return masks
