"""The curve of a training: loss terms averaged over the steps between two points."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from compression.training import processes


class Curve:
    """Sums of loss terms since the last point; part of the checkpoint, so that a resumed curve is the same. A step counts once it is complete."""

    def __init__(self) -> None:
        self.sums: dict[str, torch.Tensor | float] = {}
        self.tokens: torch.Tensor | int = 0
        self.steps = 0
        self.seconds = 0.0
        self.last: dict[str, float] = {}
        self._step: dict[str, torch.Tensor] = {}
        self._step_tokens: torch.Tensor | int = 0

    def add(self, terms: Mapping[str, torch.Tensor], tokens: torch.Tensor) -> None:
        """Add the terms of one batch, already divided by the targets of the whole step, and its number of `tokens`, int64 []."""
        for name, value in terms.items():
            self._step[name] = self._step[name] + value.detach() if name in self._step else value.detach()
        self._step_tokens = self._step_tokens + tokens

    def end_step(self, seconds: float) -> torch.Tensor:
        """Count the step, over all processes; return its loss."""
        terms = {name: processes.summed(value) for name, value in self._step.items()}
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.tokens = self.tokens + processes.summed(torch.as_tensor(self._step_tokens))
        self.steps += 1
        self.seconds += seconds
        self._step, self._step_tokens = {}, 0
        return terms["loss"]

    @property
    def tokens_per_second(self) -> float:
        return float(self.tokens) / max(self.seconds, 1e-9)

    def point(self, learning_rate: float) -> dict[str, float]:
        """End the interval; return the mean of every term, learning_rate and training_tokens_per_second."""
        self.last = {name: float(value) / self.steps for name, value in self.sums.items()}
        self.last |= {"learning_rate": learning_rate, "training_tokens_per_second": self.tokens_per_second}
        self.sums, self.tokens, self.steps, self.seconds = {}, 0, 0, 0.0
        return self.last

    def save(self, file: Path) -> None:
        sums = {name: float(value) for name, value in self.sums.items()}
        state = {"sums": sums, "tokens": int(self.tokens), "steps": self.steps, "seconds": self.seconds, "last": self.last}
        file.write_text(json.dumps(state))

    def load(self, file: Path) -> None:
        vars(self).update(json.loads(file.read_text()))
