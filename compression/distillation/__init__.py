"""Distillation: settings, checks while planning, losses and their teacher. The training is `compression.distillation.distill`."""

from compression.distillation.compatibility import check_length, check_vocabularies, pair_layers
from compression.distillation.settings import CacheSettings, DistillationSettings, ObjectiveSettings

__all__ = ["CacheSettings", "DistillationSettings", "ObjectiveSettings", "check_length", "check_vocabularies", "pair_layers"]
