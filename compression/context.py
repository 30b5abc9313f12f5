"""The seed and device of an algorithm, and the callbacks through which it reports progress to any tracker."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


def _silent(*_: object) -> None:
    return None


@dataclass(frozen=True)
class Context:
    """Passed to every long-running algorithm.

    Attributes:
        seed: Every random draw derives from it.
        device: A torch device string: "cpu", "cuda", "mps".
        progress: progress(done, total, what) drives the progress bar; called often, so it must be cheap.
        metrics: metrics(values, step) records a point of a curve (loss terms with the optimizer step).
        warn: warn(message) reports what a person must see (a fallback, a width K-quants cannot hold).
    """

    seed: int = 0
    device: str = "cpu"
    progress: Callable[[int, int, str], None] = field(default=_silent)
    metrics: Callable[[Mapping[str, float], int], None] = field(default=_silent)
    warn: Callable[[str], None] = field(default=_silent)
