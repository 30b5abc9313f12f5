"""What an algorithm is told about where it runs, and how it tells what it is doing, without knowing any tracker."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


def _silent(*_: object) -> None:
    return None


@dataclass(frozen=True)
class Context:
    """Passed to every long-running algorithm.

    seed       every random draw derives from it
    device     torch device string: "cpu", "cuda", "mps"
    progress   progress(done, total, what): called often and cheaply, drives the progress bar
    metrics    metrics(values, step): a point of a curve (loss terms with the optimizer step)
    warn       warn(message): something a person must see in the report (a fallback, a width K-quants cannot hold)
    """

    seed: int = 0
    device: str = "cpu"
    progress: Callable[[int, int, str], None] = field(default=_silent)
    metrics: Callable[[Mapping[str, float], int], None] = field(default=_silent)
    warn: Callable[[str], None] = field(default=_silent)
