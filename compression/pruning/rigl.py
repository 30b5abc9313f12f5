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
from compression.distillation import NEXT_TOKENS, Objective
from compression.errors import Incompatible
from compression.pruning.densities import Distribution, layer_sparsities
from compression.pruning.selection import PRUNED, keep_strongest
from compression.pruning.settings import RigLSettings
from compression.training import FixedMasks, TrainingRows, TrainingRun, attach_masks, attached_masks, open_student, save_student, train
from compression.training.masks import zero_moments


def prune_rigl(model: Path, out: Path, data: TrainingRows, settings: RigLSettings, *, workdir: Path, context: Context) -> dict[str, float]:
    """Prune every linear layer of every block by magnitude, then train on next tokens while the zeros move.

    What a sparse model has pruned is pruned at the start, and may grow back.

    Args:
        model: A dense checkpoint.
        out: The directory to write: a dense checkpoint with masks.
        data: Rows of tokens, their targets, and rows for early stopping.
        settings: Sparsity (`layer_sparsities`), how the zeros move (`RigL`), and the training.
        workdir: Holds the checkpoints of the unfinished training.
        context: Device, seed and callbacks.

    Returns:
        The metrics of `compression.training.loop.train` with sparsity (of those layers) and mask_updates.

    Raises:
        Incompatible: A layer of the model is sparser already; also what `open_student` raises.
    """
    checkpoint = open_checkpoint(model)
    student = open_student(model, data.rows, context)
    linear_layers(student, checkpoint)
    attach_masks(student, _starting_masks(student, checkpoint.linear_tensors(), settings.sparsity, settings.distribution))
    objective = Objective(student, NEXT_TOKENS)
    last_step = math.ceil(settings.stop_at * settings.steps)
    rigl = RigL(objective, drop_fraction=settings.drop_fraction, delta_t=settings.delta_t, last_step=last_step)
    origin = {"method": "rigl", "student": file_digests(model)}
    origin |= settings.model_dump(include={"sparsity", "distribution", "drop_fraction", "delta_t", "stop_at"})
    metrics = train(objective, data, settings, TrainingRun("RigL", origin, workdir), context=context, masks=rigl)
    save_student(student, out, like=model)
    masks = attached_masks(student).values()
    return metrics | {
        "sparsity": 1 - sum(int(kept.sum()) for kept in masks) / sum(kept.numel() for kept in masks),
        "mask_updates": float(sum(rigl.moves(step) for step in range(1, int(metrics["steps"]) + 1))),
    }


class RigL(FixedMasks):
    """The masks of a module in dynamic sparse training. Every layer keeps its number of weights.

    At step t, where `delta_t` divides t and t < `last_step`, no weight is trained; of the n weights that a layer keeps, k = fraction(t)·n
    move: the k smallest are dropped, and of the pruned weights the k with the largest gradient grow, starting from zero with moments
    of zero. A weight that is dropped and grows again has not moved. All other steps train as with fixed masks.
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
        """Keep the gradients of pruned weights at a step that moves: they decide where weights grow."""
        if not self.moves(step):
            super().mask_gradients(step)

    @torch.no_grad()
    def before_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        if not self.moves(step):
            return
        for name, weight in self.weights.items():
            before, mask = self.masks[name].clone(), self.masks[name]
            if weight.grad is None:
                raise Incompatible(f"{name} has no gradient, which decides where its weights grow")
            mask.copy_(moved(weight, weight.grad, before, self.fraction(step)))
            weight.masked_fill_(~mask, 0)
            zero_moments(optimizer, weight, ~(mask & before))
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None  # the optimizer skips a parameter without gradient

    def state(self) -> dict[str, torch.Tensor]:
        """Return the masks, packed."""
        return {name: pack_mask(mask) for name, mask in self.masks.items()}

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        for name, packed in state.items():
            self.masks[name].copy_(unpack_mask(packed, self.masks[name].shape[1]))


def moved(weight: torch.Tensor, gradient: torch.Tensor, mask: torch.Tensor, fraction: float) -> torch.Tensor:
    """Return the mask after `fraction` of the kept weights moved, bool like the tensors [out, in]; of equal weights the earlier moves."""
    count = int(fraction * int(mask.sum()))
    dropped = _extreme(weight.abs().masked_fill(~mask, math.inf), count, largest=False)
    kept = mask & ~dropped
    return kept | _extreme(gradient.abs().masked_fill(kept, -1), count, largest=True)


def _extreme(values: torch.Tensor, count: int, *, largest: bool) -> torch.Tensor:
    chosen = torch.zeros(values.numel(), dtype=torch.bool, device=values.device)
    chosen[values.flatten().argsort(descending=largest, stable=True)[:count]] = True
    return chosen.view(values.shape)


def _starting_masks(model: nn.Module, names: list[str], sparsity: float, distribution: Distribution) -> dict[str, torch.Tensor]:
    """Return masks of the largest weights of each layer. Raises Incompatible where these include pruned ones."""
    weights = {name: model.get_parameter(name).detach() for name in names}
    before = attached_masks(model)
    sparsities = layer_sparsities({name: (weight.shape[0], weight.shape[1]) for name, weight in weights.items()}, sparsity, distribution)
    masks = {}
    for name, weight in weights.items():
        scores = weight.abs().masked_fill(~before[name], PRUNED) if name in before else weight.abs()
        masks[name] = keep_strongest(scores.view(1, -1), sparsities[name]).view(weight.shape)
        if name in before and (masks[name] & ~before[name]).any():
            raise Incompatible(
                f"{name} is {1 - int(before[name].sum()) / weight.numel():.3f} sparse already, above the {sparsities[name]:.3f} it is to have; "
                "set a sparsity at or above that of the model",
                key="sparsity",
            )
    return masks
