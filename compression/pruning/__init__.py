"""Pruning: weights that become zero, and neurons, heads or blocks that leave. Importing the package imports no torch."""

from typing import TYPE_CHECKING

from compression.lazy import lazy_names
from compression.pruning.settings import DepthSettings, LotterySettings, RigLSettings, UnstructuredSettings, WidthSettings

if TYPE_CHECKING:
    from compression.pruning.depth import prune_depth
    from compression.pruning.lottery import prune_lottery
    from compression.pruning.rigl import prune_rigl
    from compression.pruning.unstructured import prune_unstructured
    from compression.pruning.width import prune_width

__all__ = [
    "DepthSettings",
    "LotterySettings",
    "RigLSettings",
    "UnstructuredSettings",
    "WidthSettings",
    "prune_depth",
    "prune_lottery",
    "prune_rigl",
    "prune_unstructured",
    "prune_width",
]
__getattr__ = lazy_names(
    __name__,
    prune_depth="compression.pruning.depth",
    prune_lottery="compression.pruning.lottery",
    prune_rigl="compression.pruning.rigl",
    prune_unstructured="compression.pruning.unstructured",
    prune_width="compression.pruning.width",
)
