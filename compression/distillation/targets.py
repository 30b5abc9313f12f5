"""Two compact forms of a teacher's distribution, expanded to the vocabulary chunk by chunk."""

from typing import Protocol

import torch
from torch import nn

from compression.distillation.losses import log_probabilities, merge_tail


class Targets(Protocol):
    """Teacher distributions over the first `vocabulary` tokens: either model may have padded its embeddings."""

    vocabulary: int

    def compare(self, student: torch.Tensor, *teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return log-probabilities of student [n, vocabulary] and teacher (its stored outputs, [n, ...] each) over the same outcomes."""


class HeadTargets:
    """The whole distribution, stored as the input of the teacher's output head: [n, width] instead of [n, vocabulary]."""

    def __init__(self, head: nn.Module, vocabulary: int, temperature: float):
        self.head, self.vocabulary, self.temperature = head, vocabulary, temperature

    def compare(self, student: torch.Tensor, *teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            return student, log_probabilities(self.head(*teacher)[:, : self.vocabulary], self.temperature)


class TopTargets:
    """The k likeliest tokens, int64 [n, k], and the log-probabilities of each and of all others together, [n, k + 1]."""

    def __init__(self, vocabulary: int):
        self.vocabulary = vocabulary

    def compare(self, student: torch.Tensor, *teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        indices, theirs = teacher
        return merge_tail(student, indices), theirs.log_softmax(-1)  # kept in float16, their sum is not quite one
