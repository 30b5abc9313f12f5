"""Texts that describe a run in MLflow: tags to filter by, and tables of figures as Markdown. Imports no torch."""

from collections.abc import Iterable, Mapping, Sequence

from compression.checkpoints.checkpoint import Checkpoint
from tasks.measurement.figures import FIGURES, SANITY, Figure, Metrics, measured
from tasks.stage import Artifact, Planned
from tasks.tracking.calls import LONGEST

SENTENCE = ("accuracy", "perplexity", "kl_to_base", "top1_agreement", "size_mb", "tokens_per_second")
_NOT_CHARTED = "accuracy_stderr"  # a column of tables; here it would be a row and a chart of its own


def properties(planned: Planned, family: str) -> dict[str, str]:
    """Return tags that runs are filtered by: what a stage will make, and the model's family."""
    tags = {"edgepress.family": family}
    if isinstance(planned, Checkpoint):
        bits = {"w8a8": 8, "fp8": 8}.get(planned.layout, planned.config.get("quantization_config", {}).get("bits"))
        tags |= {"edgepress.makes": "checkpoint", "edgepress.layout": planned.layout, "edgepress.sparse": str(planned.sparse).lower()}
        return tags | ({"edgepress.bits": str(bits)} if bits else {})
    if isinstance(planned, Artifact):
        return tags | {"edgepress.makes": "artifact", "edgepress.runtime": planned.runtime, "edgepress.weights": planned.change}
    return tags | {"edgepress.makes": "corpus"}


def fitted(paragraphs: Sequence[str], rows: str, points: Sequence[str]) -> str:
    """Join paragraphs, a table's rows and a list into one description that MLflow takes. Where it is too long, the last rows are left out before points."""
    most = LONGEST // 4
    above = [text if len(text) <= most else f"{text[: most - 1]}…" for text in paragraphs if text]
    room = LONGEST - sum(len(text) + 2 for text in above) - 2
    listed = _first_lines(points, max(room // 2, room - len(rows) - 1))
    return "\n\n".join(filter(None, [*above, _first_lines(rows.splitlines(), room - len(listed)), listed]))


def _first_lines(lines: Sequence[str], room: int) -> str:
    """As many of the lines as there is room for, and the number of the others."""
    if sum(len(line) + 1 for line in lines) <= room:
        return "\n".join(lines)
    room, kept = room - len("\n\nand 10000 more"), 0
    while kept < len(lines) and len(lines[kept]) < room:
        room -= len(lines[kept]) + 1
        kept += 1
    return "\n".join(lines[:kept]) + f"\n\nand {len(lines) - kept} more"


def sentence(columns: Mapping[str, Mapping[str, float]]) -> str:
    """Return the first column's figures in one line, each with those of the other columns: MLflow folds away what comes after."""
    (_, metrics), *others = columns.items()
    parts = []
    for figure in measured([metrics]):
        if figure.metric in SENTENCE:
            compared = [f"{name} {figure.text(values)}" for name, values in others if figure.metric in values]
            parts.append(f"{figure.heading} **{figure.text(metrics)}**" + (f" ({', '.join(compared)})" if compared else ""))
    return ", ".join(parts)


def table(columns: Mapping[str, Mapping[str, float]]) -> str:
    """Return figures down, columns across, as Markdown; a figure that no column has is left out."""
    rows = [f"| {figure.heading} | " + " | ".join(map(figure.text, columns.values())) + " |" for figure in _shown(columns.values())]
    if not rows:
        return ""
    return "\n".join([f"|  | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns), *rows])


def results_table(rows: Mapping[str, Metrics], room: int = LONGEST // 4) -> str:
    """Return results down, the main figures across, as Markdown; the last rows are left out where room is short. Empty where nothing was measured."""
    shown = [figure for figure in measured(rows.values()) if figure.metric in SENTENCE]
    if not shown:
        return ""
    lines = ["| result | " + " | ".join(figure.heading for figure in shown) + " |", "|---|" + "---:|" * len(shown)]
    lines += [f"| {name} | " + " | ".join(figure.text(metrics) for figure in shown) + " |" for name, metrics in rows.items()]
    return _first_lines(lines, room)


def steps_table(stages: Iterable[tuple[int, str, str, str, Mapping[str, float]]], link: str) -> str:
    """Return the stages of a pipeline as Markdown.

    Args:
        stages: Of each its step in the charts, name, run, state and metrics.
        link: Begins the address of a run.
    """
    rows = list(stages)
    shown = _shown(metrics for *_, metrics in rows)
    lines = [
        "| step | stage | state | " + " | ".join(figure.heading for figure in shown) + " |",
        "|---:|---|---|" + "---:|" * len(shown),
    ]
    for step, name, run, state, metrics in rows:
        figures = [figure.text(metrics) for figure in shown]
        lines.append(f"| {step} | " + " | ".join([f"[{name}]({link}{run})" if run else name, state.lower(), *figures]) + " |")
    return "\n".join(lines)


def charted(metrics: Metrics) -> dict[str, float]:
    """Return those of a stage's metrics that its pipeline's run has a series of."""
    names = [figure.metric for figure in (*FIGURES, *SANITY, *_shown([metrics])) if figure.metric != _NOT_CHARTED]
    return {name: metrics[name] for name in (*dict.fromkeys(names), "seconds") if name in metrics}


def _shown(metrics: Iterable[Metrics]) -> list[Figure]:
    return [figure for figure in measured(metrics) if figure.metric != _NOT_CHARTED]
