"""Distillation. Importing the package imports no torch; the training is in `compression.distillation.distill`."""

from compression.distillation.compatibility import (
    CacheSettings,
    Divergence,
    Feature,
    FeatureLayers,
    check_length,
    check_vocabularies,
    pair_layers,
)  # fmt: skip

__all__ = ["CacheSettings", "Divergence", "Feature", "FeatureLayers", "check_length", "check_vocabularies", "pair_layers"]
