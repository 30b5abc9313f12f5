"""Removing parts of a model. Planning imports this module: no torch here."""

import math

from compression.errors import Incompatible


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
