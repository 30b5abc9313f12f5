"""Register the results of a run in MLflow's model registry. Imports no torch."""

from collections import Counter
from collections.abc import Sequence

from export.runtimes import PACKAGES
from tasks.measurement.gates import Verdict
from tasks.planned_stage import PlannedStage
from tasks.run_context import RunContext
from tasks.tracking import ModelVersion
from tasks.tracking.descriptions import table


def register_results(context: RunContext, stages: Sequence[PlannedStage], champion: bool) -> list[str]:
    """Register the results that passed their gates.

    Returns a sentence for each: the stage, its model and aliases, and why it is not the champion where one was wanted.
    """
    sentences = []
    for stage in stages:
        result = context.results.get(stage.name)
        if not stage.registered or result is None or result.state not in ("Completed", "Cached"):
            continue
        judged = [verdict for name in (*stage.ancestors, stage.name) for verdict in context.results[name].verdicts]
        doubts = [verdict.message for verdict in judged if verdict.outcome != "PASS"] + _unjudged(stage, result.verdicts)
        aliases = ["candidate", *(["champion"] if champion and not doubts else [])]
        base = context.results["base"].metrics
        version = ModelVersion(
            name=stage.registered,
            path=result.path,
            content=result.content,
            aliases=aliases,
            tags={
                "edgepress.identity": stage.identity,
                "edgepress.recipe": context.name,
                "edgepress.stage": stage.name,
                "edgepress.runtime": result.runtime,
                "edgepress.base": context.base.source,
            },
            description=f"{stage.name} of {context.name}, for {result.runtime}.\n\n{table({stage.name: result.metrics, 'base': base})}",
            extra=PACKAGES[result.runtime].extra,
        )
        accepted = context.tracking.register(result.run, version)
        why = f"; not champion: {'; '.join(doubts)}" if champion and doubts else ""
        standing = f"is {' and '.join(aliases)} of" if accepted else "was refused by the registry, for"
        sentences.append(f"{stage.name} {standing} {stage.registered}{why}")
    return sentences


def _unjudged(stage: PlannedStage, verdicts: Sequence[Verdict]) -> list[str]:
    """A sentence for each of the stage's gates without a verdict on all its limits: their metric was not measured (`if_measured`)."""
    judged = Counter(verdict.metric for verdict in verdicts)
    return [
        f"its gate was not judged: {metric} {bound.requirement()}"
        for metric, bound in stage.gates.items()
        if judged[metric] < sum(len(list(both[metric].limits())) for both in (stage.bounds, stage.gates) if metric in both)
    ]
