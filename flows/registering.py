"""Which stages a recipe registers in MLflow's model registry, and doing so at the end of a run. Imports no torch."""

from collections import Counter
from collections.abc import Sequence

from export.runtimes import PACKAGES
from flows.graph import nearest
from flows.recipe import ParsedRecipe
from tasks.assignment import Assignment
from tasks.descriptions import table
from tasks.gates import Verdict
from tasks.perform import Pipeline
from tasks.stage import Artifact, Corpus


def registered(parsed: ParsedRecipe, tasks: Sequence[Assignment]) -> dict[str, str]:
    """By stage the model it becomes a version of. Raises EdgepressError with file and line for a wish that cannot come true."""
    wish = parsed.recipe.registry
    if wish is None:
        return {}
    if parsed.branches:
        raise parsed.error(("registry",), "a sweep has many results and no best one; register one from a recipe without a matrix")
    known = {task.name: task for task in tasks if task.stage is not None}
    for name in wish.stages:
        if name not in known:
            raise parsed.error(
                ("registry", "stages"), f"there is no stage {name!r}{nearest(name, list(known))}; stages: {', '.join(known)}"
            )
        if isinstance(planned := known[name].planned, Corpus):
            raise parsed.error(("registry", "stages"), f"{name} is {planned.words}")
    followed = {name for task in tasks for name in task.inputs.values()}
    exports = [name for name, task in known.items() if name not in followed and isinstance(task.planned, Artifact)]
    chosen = list(dict.fromkeys(wish.stages or exports))
    if not chosen:
        raise parsed.error(("registry",), "nothing is exported; name what is to be registered in `stages`")
    if wish.champion and (ungated := [name for name in chosen if not known[name].gates]):
        raise parsed.error(
            ("registry", "champion"), f"a champion is a result that passed a gate, and {', '.join(ungated)} has none: give one in `gates`"
        )
    return {name: wish.name if len(chosen) == 1 else f"{wish.name}-{name}" for name in chosen}


def register_results(pipeline: Pipeline, tasks: Sequence[Assignment], champion: bool) -> list[str]:
    """Register what was made and passed; returns what there is to say: each stage with its model and aliases."""
    said = []
    for task in tasks:
        result = pipeline.results.get(task.name)
        if not task.registered or result is None or result.state not in ("Completed", "Cached"):
            continue
        judged = [verdict for name in (*task.ancestors, task.name) for verdict in pipeline.results[name].verdicts]
        open_ones = [verdict.message for verdict in judged if verdict.outcome != "PASS"] + _unjudged(task, result.verdicts)
        aliases = ["candidate", *(["champion"] if champion and not open_ones else [])]
        base = pipeline.results["base"].metrics
        kept = pipeline.tracking.register(
            result.run, name=task.registered, path=result.path, content=result.content, aliases=aliases,
            tags={
                "edgepress.identity": task.identity, "edgepress.recipe": pipeline.name, "edgepress.stage": task.name,
                "edgepress.runtime": result.runtime, "edgepress.base": pipeline.base.source,
            },
            description=f"{task.name} of {pipeline.name}, for {result.runtime}.\n\n{table({task.name: result.metrics, 'base': base})}",
            extra=PACKAGES[result.runtime].extra,
        )  # fmt: skip
        why = f"; not champion: {'; '.join(open_ones)}" if champion and open_ones else ""
        here = f"is {' and '.join(aliases)} of" if kept else "was refused by the registry, for"
        said.append(f"{task.name} {here} {task.registered}{why}")
    return said


def _unjudged(task: Assignment, verdicts: Sequence[Verdict]) -> list[str]:
    """What to say of the stage's own gates of which a limit gave no verdict: what they are about was not measured (`if_measured`)."""
    given = Counter(verdict.metric for verdict in verdicts)
    return [
        f"its gate was not judged: {metric} {bound.words()}"
        for metric, bound in task.gates.items()
        if given[metric] < sum(len(list(both[metric].limits())) for both in (task.bounds, task.gates) if metric in both)
    ]
