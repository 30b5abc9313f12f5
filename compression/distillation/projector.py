"""Projections between hidden states of different widths, trained with the student and dropped with the objective."""

from collections.abc import Mapping

import torch
from torch import nn


class Projectors(nn.Module):
    """A bias-free linear map for every compared student layer where the widths of student and teacher differ; otherwise the identity.

    Romero et al., "FitNets: Hints for Thin Deep Nets" (2015). The maps start orthogonal, which keeps norms at the first step.
    """

    def __init__(self, layers: Mapping[int, int], student_width: int, teacher_width: int, *, seed: int):
        super().__init__()
        self.maps = nn.ModuleDict()
        if student_width == teacher_width:
            return
        generator = torch.Generator().manual_seed(seed)
        for layer in layers:
            projection = nn.Linear(student_width, teacher_width, bias=False)
            nn.init.orthogonal_(projection.weight, generator=generator)
            self.maps[str(layer)] = projection

    def forward(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """[..., student width] -> [..., teacher width]."""
        return self.maps[str(layer)](hidden) if self.maps else hidden
