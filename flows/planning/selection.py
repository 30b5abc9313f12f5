"""Cut a plan down to the stages named on the command line, and mark those to compute again. Imports no torch."""

from collections.abc import Sequence
from dataclasses import replace

from compression.errors import EdgepressError, nearest
from flows.planning.nodes import BASE
from flows.planning.plan import Plan


def select(plan: Plan, *, only: Sequence[str] = (), start_from: Sequence[str] = (), force: Sequence[str] = ()) -> Plan:
    """Return the part of a plan that is to run, with the stages to compute again marked.

    Args:
        plan: The full plan.
        only: Keep these stages and their ancestors; empty: all.
        start_from: Compute these, and what descends from them, even if the store has them (`--from`).
        force: Compute these even if the store has them.

    Each argument lists names of stages in the recipe, which mean all their copies, or names of copies; one text may hold several, with commas.

    Raises:
        EdgepressError: A name is unknown, or `only` leaves out a stage to compute again.
    """
    kept = set(plan.by_name)
    if only:
        kept = {name for stage in _stage_names(plan, "--only", only) for name in (stage, *plan.by_name[stage].ancestors)}
    roots = _stage_names(plan, "--from", start_from)
    forced = _stage_names(plan, "--force", force)
    for option, names in (("--from", roots), ("--force", forced)):
        if outside := [name for name in names if name not in kept]:
            remaining = [name for name in plan.by_name if name in kept and name != BASE]
            raise EdgepressError(f"{option}: {', '.join(outside)} is not among what --only leaves: {', '.join(remaining)}")
    recomputed = {name for name, stage in plan.by_name.items() if name in {*forced, *roots} or not set(roots).isdisjoint(stage.ancestors)}
    branches = [
        branch.model_copy(update={"leaves": leaves})
        for branch in plan.parsed.branches
        if (leaves := tuple(leaf for leaf in branch.leaves if branch.stages[leaf] in kept))
    ]
    nodes = tuple(node for node in plan.parsed.nodes if node.name in kept)
    return replace(
        plan,
        parsed=plan.parsed.model_copy(update={"nodes": nodes, "branches": tuple(branches)}),
        stages=tuple(replace(stage, recompute=stage.name in recomputed) for stage in plan.stages if stage.name in kept),
        only=tuple(only),
        left_out=sum(len(branch.leaves) for branch in plan.parsed.branches) - sum(len(branch.leaves) for branch in branches),
    )


def _stage_names(plan: Plan, option: str, texts: Sequence[str]) -> list[str]:
    """The names in the graph that an option means. A copy's name may contain commas: the longest name that fits wins."""
    known: dict[str, list[str]] = {}
    for node in plan.parsed.nodes:
        known.setdefault(node.origin, []).append(node.name)
    known |= {node.name: [node.name] for node in plan.parsed.nodes}
    names: list[str] = []
    for text in texts:
        parts = [part.strip() for part in text.split(",")]
        while parts:
            length = next((n for n in range(len(parts), 0, -1) if ",".join(parts[:n]) in known), 0)
            if not length:
                unknown = ",".join(parts) if "@" in parts[0] else parts[0]
                stages = ", ".join(dict.fromkeys(node.origin for node in plan.parsed.nodes))
                raise EdgepressError(f"{option}: there is no stage {unknown!r}{nearest(unknown, known)}; stages: {stages}")
            names += known[",".join(parts[:length])]
            parts = parts[length:]
    return names
