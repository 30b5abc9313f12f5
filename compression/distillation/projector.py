"""Bridges between hidden states of different widths, learned beside the student and dropped with the objective."""

from collections.abc import Mapping

import torch
from torch import nn


class Projectors(nn.Module):
    """One bias-free linear map for every student layer that is compared, where its width is not the teacher's; else nothing.

    Romero et al., "FitNets: Hints for Thin Deep Nets" (2015). Starts orthogonal, so that norms are kept at the first step.
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
