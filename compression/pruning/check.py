"""Refuse settings of unstructured pruning that do not fit a checkpoint. Imports no torch: planning uses it."""

from compression.checkpoints.checkpoint import Checkpoint
from compression.errors import Incompatible
from compression.pruning.settings import Pattern, UnstructuredSettings


def kept_of_group(pattern: Pattern) -> tuple[int, int] | None:
    """Return (n, m) of a pattern that keeps n of each m neighbouring weights of a row; None where any weight may be pruned."""
    if pattern == "unstructured":
        return None
    pruned, group = (int(number) for number in pattern.split(":"))
    return group - pruned, group


def check_unstructured(checkpoint: Checkpoint, settings: UnstructuredSettings) -> None:
    """Refuse settings that contradict each other, or a pattern that does not divide the rows of the checkpoint's linear layers.

    Raises:
        Incompatible: `key` names the parameter.
    """
    method, pattern, sparsity = settings.method, settings.pattern, settings.sparsity
    is_global, is_uniform = settings.scope == "global", settings.allocation == "uniform"
    if is_global and method not in ("magnitude", "gradient"):
        raise Incompatible(
            f"{method} compares the weights of one layer; scope: global goes with method: magnitude or gradient", key="scope"
        )
    if is_global and not is_uniform:
        raise Incompatible("scope: global decides by itself how sparse each layer gets; leave allocation at uniform", key="allocation")
    group = kept_of_group(pattern)
    if group is None:
        return
    kept, size = group
    if sparsity != 1 - kept / size:
        raise Incompatible(f"the pattern {pattern} is a sparsity of {1 - kept / size}, not {sparsity}", key="sparsity")
    if is_global:
        raise Incompatible(f"the pattern {pattern} compares {size} neighbours; leave scope at layer", key="scope")
    if not is_uniform:
        raise Incompatible(f"the pattern {pattern} makes every layer equally sparse; leave allocation at uniform", key="allocation")
    for layer, (_, width) in checkpoint.linear_widths().items():
        if width % size:
            raise Incompatible(
                f"the pattern {pattern} needs rows that are a multiple of {size} wide; {layer} is {width} wide", key="pattern"
            )
