"""What a run in MLflow says of itself: tags to filter by; and for people what it did, its figures beside those of its parent and of the base, and
what to beware of. Imports no torch."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from compression.checkpoints.checkpoint import Checkpoint
from tasks.measurement.figures import FIGURES, SANITY, Figure, Metrics, measured
from tasks.stage import Artifact, Planned
from tasks.tracking.calls import LONGEST

SENTENCE = ("accuracy", "perplexity", "kl_to_base", "top1_agreement", "size_mb", "tokens_per_second")
_BESIDE = "accuracy_stderr"  # a column of tables; here it would be a row and a chart of its own


class HasVerdict(Protocol):
    @property
    def outcome(self) -> str: ...
    @property
    def message(self) -> str: ...


def properties(planned: Planned, family: str) -> dict[str, str]:
    """Tags that runs are filtered by: what a stage makes, told from its plan."""
    tags = {"edgepress.family": family}
    if isinstance(planned, Checkpoint):
        bits = {"w8a8": 8, "fp8": 8}.get(planned.layout, planned.config.get("quantization_config", {}).get("bits"))
        tags |= {"edgepress.makes": "checkpoint", "edgepress.layout": planned.layout, "edgepress.sparse": str(planned.sparse).lower()}
        return tags | ({"edgepress.bits": str(bits)} if bits else {})
    if isinstance(planned, Artifact):
        return tags | {"edgepress.makes": "artifact", "edgepress.runtime": planned.runtime, "edgepress.weights": planned.change}
    return tags | {"edgepress.makes": "corpus"}


def describe_stage(
    *, uses: str, needs: Sequence[str], state: str, reason: str, seconds: float, runtime: str,
    columns: Mapping[str, Mapping[str, float]], warnings: Iterable[str], verdicts: Iterable[HasVerdict],
) -> str:  # fmt: skip
    """columns: metrics by whose they are, this stage's first."""
    did = {"Cached": "from the store", "Failed": "**failed**", "Stopped": "**interrupted**"}.get(state, "computed")
    made = f" ({seconds:.1f} s to compute)" if seconds else ""
    lines = [f"`{uses}` after {', '.join(needs)}: {did}{made}." if needs else "The base model, which everything is compared with."]
    if reason and state == "Failed":
        lines.append(f"**{reason}**")
    if known := sentence(columns):
        lines.append(known + (f", measured in {runtime}." if runtime else "."))
    points = [f"- **{verdict.outcome}** {verdict.message}" for verdict in verdicts]
    points += [f"- warning: {warning}" for warning in warnings]
    return fitted(lines, table(columns), points)


def fitted(paragraphs: Sequence[str], rows: str, points: Sequence[str]) -> str:
    """Paragraphs, a table's rows and a list as one description that MLflow takes. Of what is too long the last rows give way, whole ones, before points."""
    most = LONGEST // 4
    above = [text if len(text) <= most else f"{text[: most - 1]}…" for text in paragraphs if text]
    room = LONGEST - sum(len(text) + 2 for text in above) - 2
    listed = _whole(points, max(room // 2, room - len(rows) - 1))
    return "\n\n".join(filter(None, [*above, _whole(rows.splitlines(), room - len(listed)), listed]))


def _whole(lines: Sequence[str], room: int) -> str:
    """As many of the lines as have room, and after them how many there are more."""
    if sum(len(line) + 1 for line in lines) <= room:
        return "\n".join(lines)
    left, kept = room - len("\n\nand 10000 more"), 0
    while kept < len(lines) and len(lines[kept]) < left:
        left -= len(lines[kept]) + 1
        kept += 1
    return "\n".join(lines[:kept]) + f"\n\nand {len(lines) - kept} more"


def sentence(columns: Mapping[str, Mapping[str, float]]) -> str:
    """The first column's figures in one line, each with what the others have: MLflow folds away what comes after."""
    (_, own), *others = columns.items()
    words = []
    for figure in measured([own]):
        if figure.metric in SENTENCE:
            beside = [f"{name} {figure.text(values)}" for name, values in others if figure.metric in values]
            words.append(f"{figure.heading} **{figure.text(own)}**" + (f" ({', '.join(beside)})" if beside else ""))
    return ", ".join(words)


def table(columns: Mapping[str, Mapping[str, float]], first: str = "") -> str:
    """Figures down, columns across, as Markdown; a figure that nobody has is left out."""
    rows = [f"| {figure.heading} | " + " | ".join(map(figure.text, columns.values())) + " |" for figure in _shown(columns.values())]
    if not rows:
        return ""
    return "\n".join([f"| {first} | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns), *rows])


def results_table(rows: Mapping[str, Metrics], room: int = LONGEST // 4) -> str:
    """Results down, the most asked figures across, as Markdown; of what has no room the last rows give way. Empty where nothing was measured."""
    shown = [figure for figure in measured(rows.values()) if figure.metric in SENTENCE]
    if not shown:
        return ""
    lines = ["| result | " + " | ".join(figure.heading for figure in shown) + " |", "|---|" + "---:|" * len(shown)]
    lines += [f"| {name} | " + " | ".join(figure.text(metrics) for figure in shown) + " |" for name, metrics in rows.items()]
    return _whole(lines, room)


def steps_table(stages: Iterable[tuple[int, str, str, str, Mapping[str, float]]], link: str) -> str:
    """The stages of a pipeline as Markdown: step in the charts, name, run, state, figures. `link` begins the address of a run."""
    known = list(stages)
    shown = _shown(metrics for *_, metrics in known)
    lines = [
        "| step | stage | state | " + " | ".join(figure.heading for figure in shown) + " |",
        "|---:|---|---|" + "---:|" * len(shown),
    ]
    for step, name, run, state, metrics in known:
        figures = [figure.text(metrics) for figure in shown]
        lines.append(f"| {step} | " + " | ".join([f"[{name}]({link}{run})" if run else name, state.lower(), *figures]) + " |")
    return "\n".join(lines)


def charted(metrics: Metrics) -> dict[str, float]:
    """Of a stage's metrics, those that its pipeline's run has a series of."""
    names = [figure.metric for figure in (*FIGURES, *SANITY, *_shown([metrics])) if figure.metric != _BESIDE]
    return {name: metrics[name] for name in (*dict.fromkeys(names), "seconds") if name in metrics}


def _shown(metrics: Iterable[Metrics]) -> list[Figure]:
    return [figure for figure in measured(metrics) if figure.metric != _BESIDE]
