"""Removing parts of a model. Planning imports this module: no torch here."""

import math
from typing import Literal

from compression.checkpoints.checkpoint import Checkpoint
from compression.errors import Incompatible
from compression.pruning.settings import Scope

PruningMethod = Literal["magnitude", "gradient", "wanda", "sparsegpt"]
Pattern = Literal["unstructured", "2:4", "4:8"]
Allocation = Literal["uniform", "sensitivity"]


def pruned_width(intermediate_size: int, keep: float, multiple_of: int = 32) -> int:
    """The MLP width after keeping the share `keep` of `intermediate_size` neurons: the nearest multiple of `multiple_of`, at least one.

    Raises Incompatible(key="keep") for a share outside (0, 1], Incompatible(key="multiple_of") where no multiple fits.
    """
    if not 0 < keep <= 1:
        raise Incompatible(f"keep {keep} is no share of the neurons: it lies above 0 and at most at 1", key="keep")
    if not 1 <= multiple_of <= intermediate_size:
        raise Incompatible(f"multiple_of {multiple_of} does not fit an MLP of {intermediate_size} neurons", key="multiple_of")
    multiples = math.floor(intermediate_size * keep / multiple_of + 0.5)
    return min(max(multiples, 1), intermediate_size // multiple_of) * multiple_of


def kept_of_group(pattern: Pattern) -> tuple[int, int] | None:
    """(n, m) of a pattern that keeps n of each m neighbouring weights of a row; None where weights may be pruned anywhere."""
    if pattern == "unstructured":
        return None
    pruned, group = (int(number) for number in pattern.split(":"))
    return group - pruned, group


def check_unstructured(
    checkpoint: Checkpoint, *, method: PruningMethod, scope: Scope, sparsity: float, pattern: Pattern, allocation: Allocation
) -> None:
    """Refuse settings of unstructured pruning that contradict each other or do not fit the widths of the checkpoint's linear layers.

    Raises Incompatible with the key of the parameter at fault.
    """
    if not 0 < sparsity < 1:
        raise Incompatible(f"sparsity {sparsity} is no share of the weights to prune: it lies between 0 and 1", key="sparsity")
    if scope == "global" and method not in ("magnitude", "gradient"):
        raise Incompatible(
            f"{method} compares the weights of one layer; scope: global goes with method: magnitude or gradient", key="scope"
        )
    if scope == "global" and allocation != "uniform":
        raise Incompatible("scope: global settles by itself how sparse each layer gets; leave allocation at uniform", key="allocation")
    group = kept_of_group(pattern)
    if group is None:
        return
    kept, size = group
    if sparsity != 1 - kept / size:
        raise Incompatible(f"the pattern {pattern} is a sparsity of {1 - kept / size}, not {sparsity}", key="sparsity")
    if scope == "global":
        raise Incompatible(f"the pattern {pattern} is settled within {size} neighbours; leave scope at layer", key="scope")
    if allocation != "uniform":
        raise Incompatible(f"the pattern {pattern} makes every layer equally sparse; leave allocation at uniform", key="allocation")
    for layer, (_, width) in checkpoint.linear_widths().items():
        if width % size:
            raise Incompatible(
                f"the pattern {pattern} needs rows that are a multiple of {size} wide; {layer} is {width} wide", key="pattern"
            )
