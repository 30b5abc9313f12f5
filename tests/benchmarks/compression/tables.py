"""What was measured, as tables."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean, median

from tests.benchmarks.compression.protocol import OURS, Method
from tests.benchmarks.page import markdown


@dataclass
class Measured:
    """A method by one implementation: a value for each calibration draw."""

    seconds: list[float] = field(default_factory=list)
    perplexity: list[float] = field(default_factory=list)
    peak_rss_mb: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Against:
    """Ours against the best peer in each respect.

    speedup     seconds of the faster peer over ours
    perplexity  ours over the lower of the peers', less 1
    memory      our peak over the lower of the peers'
    """

    speedup: float
    perplexity: float
    memory: float


Results = Mapping[Method, Mapping[str, Measured]]


def against(by: Mapping[str, Measured]) -> Against | None:
    """None for a method that no peer has."""
    ours, peers = by[OURS], [measured for name, measured in by.items() if name != OURS]
    if not peers:
        return None
    return Against(
        min(median(peer.seconds) for peer in peers) / median(ours.seconds),
        mean(ours.perplexity) / min(mean(peer.perplexity) for peer in peers) - 1,
        max(ours.peak_rss_mb) / min(max(peer.peak_rss_mb) for peer in peers),
    )


def results_table(results: Results, floor: float) -> str:
    """A line for each method and implementation. floor: seconds that no calibrated method on the walk can go below."""
    lines = [
        [
            method.title, name, f"{median(measured.seconds):.2f}", f"{median(measured.seconds) / floor:.2f}" if method.calibrated else "",
            f"{mean(measured.perplexity):.3f}", " ".join(f"{value:.3f}" for value in measured.perplexity), f"{max(measured.peak_rss_mb):.0f}",
        ]
        for method, by in results.items()
        for name, measured in by.items()
    ]  # fmt: skip
    headings = ["method", "by", "seconds", "/ floor", "perplexity", "of each draw", "peak RSS MB"]
    return markdown(headings, ["---", "---", *["---:"] * 5], lines)


def against_table(results: Results) -> str:
    """Ours against the best peer, a line for each method that a peer has."""
    found = {method: comparison for method, by in results.items() if (comparison := against(by))}
    lines = [[m.title, f"{c.speedup:.1f}", f"{c.perplexity:+.2%}", f"{c.memory:.2f}"] for m, c in found.items()]
    return markdown(["method", "times faster", "perplexity", "peak RSS"], ["---", "---:", "---:", "---:"], lines)


def size_table(rows: Sequence[tuple[str, float, float]], parameters: int) -> str:
    """At size: (title, seconds, peak RSS MB) of each method."""
    lines = [[title, f"{seconds:.1f}", f"{seconds / parameters * 1e9:.0f}", f"{peak / 1000:.2f}"] for title, seconds, peak in rows]
    return markdown(["method", "seconds", "seconds per billion parameters", "peak RSS GB"], ["---", "---:", "---:", "---:"], lines)
