"""Which stages a recipe registers in MLflow's model registry. Imports no torch."""

from collections.abc import Sequence

from flows.planning.graph import nearest
from flows.planning.recipe import ParsedRecipe
from tasks.planned_stage import PlannedStage
from tasks.stage import Artifact, Corpus


def registered(parsed: ParsedRecipe, stages: Sequence[PlannedStage]) -> dict[str, str]:
    """By stage the model it becomes a version of. Raises EdgepressError with file and line for a wish that cannot come true."""
    wish = parsed.recipe.registry
    if wish is None:
        return {}
    if parsed.branches:
        raise parsed.error(("registry",), "a sweep has many results and no best one; register one from a recipe without a matrix")
    known = {stage.name: stage for stage in stages if stage.definition is not None}
    for name in wish.stages:
        if name not in known:
            raise parsed.error(
                ("registry", "stages"), f"there is no stage {name!r}{nearest(name, list(known))}; stages: {', '.join(known)}"
            )
        if isinstance(planned := known[name].product, Corpus):
            raise parsed.error(("registry", "stages"), f"{name} is {planned.words}")
    followed = {name for stage in stages for name in stage.inputs.values()}
    exports = [name for name, stage in known.items() if name not in followed and isinstance(stage.product, Artifact)]
    chosen = list(dict.fromkeys(wish.stages or exports))
    if not chosen:
        raise parsed.error(("registry",), "nothing is exported; name what is to be registered in `stages`")
    if wish.champion and (ungated := [name for name in chosen if not known[name].gates]):
        raise parsed.error(
            ("registry", "champion"), f"a champion is a result that passed a gate, and {', '.join(ungated)} has none: give one in `gates`"
        )
    return {name: wish.name if len(chosen) == 1 else f"{wish.name}-{name}" for name in chosen}
