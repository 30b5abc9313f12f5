"""Distillation: train a student on the outputs, and the blocks, of its teacher. Importing the package imports no torch."""

from typing import TYPE_CHECKING

from compression.distillation.compatibility import check_length, check_vocabularies, pair_layers
from compression.distillation.settings import NEXT_TOKENS, CacheSettings, DistillationSettings, ObjectiveSettings
from compression.lazy import lazy_names

if TYPE_CHECKING:
    from compression.distillation.method import distill
    from compression.distillation.objective import Objective

__all__ = [
    "NEXT_TOKENS",
    "CacheSettings",
    "DistillationSettings",
    "Objective",
    "ObjectiveSettings",
    "check_length",
    "check_vocabularies",
    "distill",
    "pair_layers",
]
__getattr__ = lazy_names(
    __name__,
    Objective="compression.distillation.objective",
    distill="compression.distillation.method",
)
