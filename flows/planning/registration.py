"""Which stages a recipe registers in MLflow's model registry. Imports no torch."""

from collections.abc import Sequence

from compression.errors import nearest
from flows.planning.recipe import ParsedRecipe
from tasks.planned_stage import PlannedStage
from tasks.stage import Artifact, Corpus


def registered_models(parsed: ParsedRecipe, stages: Sequence[PlannedStage]) -> dict[str, str]:
    """Map each stage that the recipe registers to the model it becomes a version of.

    Raises:
        EdgepressError: With file and line: the recipe is a sweep, a stage is unknown or a corpus, nothing is exported, or a champion has no gate.
    """
    registry = parsed.recipe.registry
    if registry is None:
        return {}
    if parsed.branches:
        raise parsed.error(("registry",), "a sweep has many results and no best one; register from a recipe without a matrix")
    known = {stage.name: stage for stage in stages if stage.definition is not None}
    for name in registry.stages:
        if name not in known:
            raise parsed.error(("registry", "stages"), f"there is no stage {name!r}{nearest(name, known)}; stages: {', '.join(known)}")
        if isinstance(product := known[name].product, Corpus):
            raise parsed.error(("registry", "stages"), f"{name} is {product.words}")
    followed = {name for stage in stages for name in stage.inputs.values()}
    exports = [name for name, stage in known.items() if name not in followed and isinstance(stage.product, Artifact)]
    chosen = list(dict.fromkeys(registry.stages or exports))
    if not chosen:
        raise parsed.error(("registry",), "nothing is exported; name the stages to register in `stages`")
    if registry.champion and (ungated := [name for name in chosen if not known[name].gates]):
        raise parsed.error(
            ("registry", "champion"), f"a champion is a result that passed a gate, and {', '.join(ungated)} has none: give one in `gates`"
        )
    return {name: registry.name if len(chosen) == 1 else f"{registry.name}-{name}" for name in chosen}
