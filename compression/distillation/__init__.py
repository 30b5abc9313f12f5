"""Distillation. Importing the package imports no torch; the training is in `compression.distillation.distill`."""

from compression.distillation.compatibility import FeatureLayers, check_vocabularies, pair_layers

__all__ = ["FeatureLayers", "check_vocabularies", "pair_layers"]
