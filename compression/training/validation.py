"""Early stopping: the loss on rows that are not trained on, and the weights with the lowest."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compression.errors import EdgepressError
from compression.training.batches import HeldOut, batch_of, check_rows
from compression.training.settings import TrainingSettings

Snapshot = Mapping[str, Any]


@dataclass
class _State:
    best: float = math.inf
    best_step: int = 0
    without: int = 0  # evaluations since the best
    stopped: bool = False


class Validation:
    """Evaluates a training. Its whole state is part of the checkpoint; it draws no random number."""

    def __init__(self, held_out: HeldOut, settings: TrainingSettings):
        self.rows, self.mask = held_out[0], check_rows(*held_out)
        self.settings = settings
        self.state = _State()
        self.best: Snapshot = {}

    def due(self, step: int) -> bool:
        return step % self.settings.evaluate_every == 0 or step == self.settings.steps

    def judge(self, losses: Mapping[str, float], step: int, snapshot: Callable[[], Snapshot]) -> None:
        """Keep the weights of a lower loss, and decide whether to stop. Raises EdgepressError for a loss that is not finite."""
        state = self.state
        if not math.isfinite(losses["validation_loss"]):
            raise EdgepressError(f"the validation loss is no longer finite at step {step}; lower the learning rate", key="learning_rate")
        if losses["validation_loss"] < state.best:
            state.best, state.best_step, state.without = losses["validation_loss"], step, 0
            self.best = snapshot()
        else:
            state.without += 1
        state.stopped = bool(self.settings.patience) and state.without >= self.settings.patience

    @torch.no_grad()
    def losses(self, objective: nn.Module, device: torch.device) -> dict[str, float]:
        """Return the mean of every term over all validation targets, in evaluation mode: validation_loss, validation_loss_kd, ..."""
        training = objective.training
        objective.eval()
        count = self.mask[:, 1:].sum().to(device)
        sums: dict[str, torch.Tensor] = {}
        for chosen in torch.arange(len(self.rows)).split(self.settings.batch_size):
            batch = {name: tensor.to(device) for name, tensor in batch_of(self.rows, self.mask, chosen).items()}
            for name, value in objective(**batch, count=count).items():
                sums[name] = sums[name] + value if name in sums else value
        objective.train(training)
        return {f"validation_{name}": float(value) for name, value in sums.items()}

    def metrics(self) -> dict[str, float]:
        """Return validation_loss and best_step of the best weights, and stopped_early."""
        return {
            "validation_loss": self.state.best, "best_step": float(self.state.best_step), "stopped_early": float(self.state.stopped),
        }  # fmt: skip

    def save(self, directory: Path) -> None:
        (directory / "validation.json").write_text(json.dumps(vars(self.state)))
        torch.save(self.best, directory / "best.pt")

    def load(self, directory: Path) -> None:
        self.state = _State(**json.loads((directory / "validation.json").read_text()))
        self.best = torch.load(directory / "best.pt", weights_only=True)
