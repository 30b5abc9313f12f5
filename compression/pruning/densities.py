"""The sparsity of each layer of a model. Imports no torch."""

from collections.abc import Mapping
from typing import Literal

Distribution = Literal["uniform", "erk"]


def layer_sparsities(shapes: Mapping[str, tuple[int, int]], sparsity: float, distribution: Distribution) -> dict[str, float]:
    """Return the sparsity of each layer, by name, so that `sparsity` of all their weights together is pruned.

    Args:
        shapes: (out_features, in_features) by name.
        sparsity: The share of all weights.
        distribution: "uniform", or "erk", the Erdős-Rényi-Kernel of a matrix (Mocanu et al. 2018; Evci et al., arXiv 1911.11134):
            density ∝ (out + in) / (out · in), so that small layers stay denser. A layer whose density would exceed 1 stays dense, and the
            others share the rest.
    """
    if distribution == "uniform":
        return dict.fromkeys(shapes, sparsity)
    sizes = {name: out * width for name, (out, width) in shapes.items()}
    dense: set[str] = set()
    while True:
        rest = [name for name in shapes if name not in dense]
        wanted = (1 - sparsity) * sum(sizes.values()) - sum(sizes[name] for name in dense)
        scale = wanted / sum(sum(shapes[name]) for name in rest)  # density · size = scale · (out + in)
        full = {name for name in rest if scale * sum(shapes[name]) > sizes[name]}
        if not full:
            return {name: 0.0 if name in dense else 1 - scale * sum(shapes[name]) / sizes[name] for name in shapes}
        dense |= full
