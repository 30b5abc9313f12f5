"""What a run in MLflow says of itself: tags to filter by; and for people what it did, its figures beside those of its parent and of the base, and
what to beware of. Imports no torch."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from compression.checkpoint import Checkpoint
from tasks.stage import Artifact, Planned

FIGURES = (  # (metric, heading, format)
    ("accuracy", "accuracy", "{:.3f}"),
    ("perplexity", "perplexity", "{:.3f}"),
    ("kl_to_base", "KL to base", "{:.2g}"),
    ("top1_agreement", "top-1 agreement", "{:.3f}"),
    ("size_mb", "size (MB)", "{:.2f}"),
    ("tokens_per_second", "decode (tokens/s)", "{:.0f}"),
    ("prefill_tokens_per_second", "prefill (tokens/s)", "{:.0f}"),
    ("peak_memory_mb", "memory (MB)", "{:.0f}"),
    ("energy_joules", "energy (J)", "{:.2f}"),
)
CHARTED = (*(metric for metric, _, _ in FIGURES), "seconds")  # what the parent run has a series of


class Judged(Protocol):
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
    columns: Mapping[str, Mapping[str, float]], warnings: Iterable[str], verdicts: Iterable[Judged],
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
    return "\n\n".join([*lines, table(columns), "\n".join(points)]).strip()


def sentence(columns: Mapping[str, Mapping[str, float]]) -> str:
    """The first column's figures in one line, each with what the others have: MLflow folds away what comes after."""
    (_, own), *others = columns.items()
    words = []
    for metric, heading, form in FIGURES[:6]:
        if metric in own:
            beside = [f"{name} {form.format(values[metric])}" for name, values in others if metric in values]
            words.append(f"{heading} **{form.format(own[metric])}**" + (f" ({', '.join(beside)})" if beside else ""))
    return ", ".join(words)


def table(columns: Mapping[str, Mapping[str, float]], first: str = "") -> str:
    """Figures down, columns across, as Markdown; a figure that nobody has is left out."""
    rows = [
        f"| {heading} | " + " | ".join(form.format(values[metric]) if metric in values else "" for values in columns.values()) + " |"
        for metric, heading, form in FIGURES
        if any(metric in values for values in columns.values())
    ]
    if not rows:
        return ""
    return "\n".join([f"| {first} | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns), *rows])


def steps_table(stages: Iterable[tuple[int, str, str, str, Mapping[str, float]]], link: str) -> str:
    """The stages of a pipeline as Markdown: step in the charts, name, run, state, figures. `link` begins the address of a run."""
    known = list(stages)
    shown = [figure for figure in FIGURES if any(figure[0] in metrics for *_, metrics in known)]
    lines = [
        "| step | stage | state | " + " | ".join(heading for _, heading, _ in shown) + " |",
        "|---:|---|---|" + "---:|" * len(shown),
    ]
    for step, name, run, state, metrics in known:
        figures = [form.format(metrics[metric]) if metric in metrics else "" for metric, _, form in shown]
        lines.append(f"| {step} | " + " | ".join([f"[{name}]({link}{run})" if run else name, state.lower(), *figures]) + " |")
    return "\n".join(lines)
