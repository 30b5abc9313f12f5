"""A pipeline's run in MLflow and those of a sweep's cells: what they begin with, what they end with. Imports no torch and no MLflow."""

import json
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from compression.redaction import redacted
from flows.planning.graph import BASE
from flows.planning.plan import Plan, estimate
from flows.run.registering import register_results
from tasks.ancestry import walk_ancestors
from tasks.measurement.measure import machine_fingerprint
from tasks.run_context import RunContext
from tasks.store.store import Store
from tasks.tracking.descriptions import charted, fitted, results_table, steps_table, table
from tasks.tracking.runs_view import RUN
from tasks.tracking.tracking import OpenRun, Tracking

_PATIENCE = 10.0  # seconds to wait at the end for an MLflow that is away
_DONE = ("Completed", "Cached")


# --- the beginning ---


def open_parent(tracking: Tracking, plan: Plan, store: Store, name: str, begun: OpenRun | None) -> str:
    """The pipeline's run, with recipe, plan and environment as artifacts and the data as an input. `name`: that of its group in the table of runs."""
    recipe, file = plan.parsed.recipe, plan.parsed.source.file
    commit, changed = git_commit(file.absolute().parent)
    tags = {
        "edgepress.kind": "pipeline", "edgepress.recipe": recipe.name, RUN: name, "edgepress.base": plan.base.source,
        "edgepress.family": plan.base.checkpoint.model_type, "edgepress.device": plan.machine.device,
        "mlflow.source.name": str(file.absolute()), "mlflow.source.type": "LOCAL",
        **({"mlflow.source.git.commit": commit} if commit else {}),
    }  # fmt: skip
    params = {
        "model": recipe.model.path, **({"revision": plan.base.revision} if plan.base.revision else {}), "seed": recipe.seed,
        "stages": ", ".join(n.name for n in plan.parsed.nodes),
    }  # fmt: skip
    tracking.share_view()
    run = tracking.open_run(recipe.name, tags=tags, params=params, known=begun.run if begun else None)
    tracking.log_text(run, plan.parsed.source.text, f"recipe/{file.name}")
    if plan.parsed.overrides:
        tracking.log_text(run, "\n".join(plan.parsed.overrides) + "\n", "recipe/overrides.txt")
    tracking.log_text(run, json.dumps(planned_stages(plan, store), indent=1), "plan.json")
    environment = {
        "python": platform.python_version(), "platform": platform.platform(), "machine": machine_fingerprint(), "device": plan.machine.device,
        "threads": plan.machine.threads, "git_commit": commit, "git_changed": changed, "command": [redacted(word) for word in sys.argv],
    }  # fmt: skip
    tracking.log_text(run, json.dumps(environment, indent=1), "environment/environment.json")
    tracking.log_text(run, lock(), "environment/requirements.txt")
    tracking.log_data(run, "recipe data", plan.stages[0].document["data"], recipe.data.model_dump_json(), "evaluation")
    return run


def open_cells(tracking: Tracking, plan: Plan, run: str, name: str, begun: OpenRun | None) -> dict[str, str]:
    """A run for each cell of the matrix, with its values as parameters: what MLflow compares and draws."""
    tags = {"edgepress.kind": "cell", "edgepress.recipe": plan.parsed.recipe.name, RUN: name}
    known = begun.cells if begun else {}
    return {
        branch.name: tracking.open_run(branch.name, parent=run, tags=tags, params=branch.values, known=known.get(branch.name))
        for branch in plan.parsed.branches
    }


def known_stages(plan: Plan, begun: OpenRun | None) -> tuple[dict[str, str], dict[str, str]]:
    """By stage the run in MLflow to go on with; and the run of a stage that has another identity now, whose place another run takes."""
    identities = {stage.name: stage.identity for stage in plan.stages}
    known: dict[str, str] = {}
    superseded: dict[str, str] = {}
    for (name, identity), run in begun.stages.items() if begun else ():
        if name in identities:
            (known if identities[name] == identity else superseded)[name] = run
    return known, superseded


def leaves(plan: Plan) -> list[str]:
    """Stages that nothing follows."""
    followed = {name for stage in plan.stages for name in stage.inputs.values()}
    return [stage.name for stage in plan.stages if stage.name not in followed]


def lineage(plan: Plan, stage: str) -> list[str]:
    """From the base to a stage, from parent to parent: a teacher or a corpus that helped on the way is not on it."""
    return walk_ancestors([stage], lambda name: [parent] if (parent := plan.by_name[name].inputs.get("parent")) else [])


def auxiliary_stages(plan: Plan) -> list[str]:
    """Stages that others follow, and none as its parent: what only teaches, or is only trained on."""
    parents, ends = {stage.inputs.get("parent") for stage in plan.stages}, leaves(plan)
    return [stage.name for stage in plan.stages if stage.name not in parents and stage.name not in ends]


def series(plan: Plan) -> dict[str, list[str]]:
    """What the names of a stage's metrics end with on the pipeline's run, so that a line of a chart is a road from the base to its end.

    One leaf: nothing (`accuracy`). Several: each leaf the stage is on the road to (`accuracy/gguf`). Besides, each helper (`accuracy/teacher`). Of a
    sweep, whose cells have runs of their own with their roads: only stages that all cells share, and nothing for those on all of their roads.
    """
    ends, beside = leaves(plan), auxiliary_stages(plan)
    found: dict[str, list[str]] = {}
    if plan.parsed.branches:
        shared = set.intersection(*(set(branch.stages.values()) for branch in plan.parsed.branches))
        found = {name: [""] for name in set.intersection(*(set(lineage(plan, leaf)) for leaf in ends))}
        roads = {f"/{name}": lineage(plan, name) for name in beside if name in shared}
    else:
        roads = {f"/{leaf}" if len(ends) > 1 else "": lineage(plan, leaf) for leaf in ends} | {
            f"/{name}": lineage(plan, name) for name in beside
        }
    for ending, names in roads.items():
        for name in names:
            found.setdefault(name, []).append(ending)
    return found


def planned_stages(plan: Plan, store: Store) -> list[dict[str, Any]]:
    """The plan as JSON: stages in order with identity, inputs, and what they are estimated to take (bytes)."""
    found = []
    for stage in plan.stages:
        needed = estimate(stage, plan)
        found.append({
            "step": stage.index, "stage": stage.name, "uses": stage.definition.uses if stage.definition else "base", "identity": stage.identity,
            "inputs": dict(stage.inputs), "in_store": stage.definition is not None and store.has(stage.identity) and not stage.recompute,
            "size": needed.size, "memory": needed.memory, "disk": needed.disk,
        })  # fmt: skip
    return found


def git_commit(folder: Path) -> tuple[str | None, bool | None]:
    """The commit that is checked out where the recipe lies, and whether tracked files differ from it; None where there is no git."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=False)
        except (FileNotFoundError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no") if commit else None
    return commit, None if changed is None else bool(changed)


def lock() -> str:
    """Every installed distribution with its version, as `pip freeze` has them."""
    known = {
        distribution.name.lower(): f"{distribution.name}=={distribution.version}" for distribution in distributions() if distribution.name
    }
    return "\n".join(known[name] for name in sorted(known)) + "\n"


# --- the end ---


def end_cells(context: RunContext, summary: dict[str, Any], plan: Plan, finished: bool) -> None:
    """A cell ends as its leaves did, with the metrics of its whole road, step = index of the stage."""
    tracking, rows = context.tracking, {row["stage"]: row for row in summary["rows"]}
    beside = set(auxiliary_stages(plan))
    for branch, cell in zip(plan.parsed.branches, summary["sweep"]["cells"] if summary["sweep"] else (), strict=True):
        run, points = context.runs.cells[cell["name"]], []
        ends = {name: f"/{leaf}" if len(cell["leaves"]) > 1 else "" for leaf, name in cell["leaves"].items()}
        ends |= {name: f"/{helper}" for helper, name in branch.stages.items() if name in beside}
        for end, ending in ends.items():
            for stage in lineage(plan, end):
                values = {metric + ending: value for metric, value in charted(rows[stage]["metrics"]).items()}
                points.append((plan.by_name[stage].index, values))
        tracking.log_curve(run, points, again=bool(context.runs.superseded))
        results = {leaf: rows[name]["metrics"] for leaf, name in cell["leaves"].items()}
        chosen = ", ".join(f"{key} {value}" for key, value in cell["values"].items())
        tracking.describe(run, f"A cell of the sweep: {chosen}.\n\n{table({**results, BASE: rows[BASE]['metrics']})}")
        broken = [rows[name] for name in cell["leaves"].values() if rows[name]["state"] not in _DONE]
        if broken and not finished:
            tracking.end(run, "KILLED", "interrupted")
        else:
            reasons = "; ".join(f"{row['stage']}: {row['reason']}" for row in broken)
            tracking.end(run, "FAILED" if broken else "FINISHED", reasons or None)


def close_interrupted(context: RunContext, summary: dict[str, Any], plan: Plan) -> None:
    """End every run that is still open as KILLED."""
    for result in context.results.values():
        if result.run and result.state == "Running":
            context.tracking.end(result.run, "KILLED", "interrupted")
    describe_parent(context, summary, plan, "**Interrupted.**")
    context.tracking.end(context.runs.parent, "KILLED", "interrupted")


def end_parent(context: RunContext, summary: dict[str, Any], plan: Plan, files: list[Path]) -> None:
    """Register results, log the summary's files, describe and end the pipeline's run."""
    wish = plan.parsed.recipe.registry
    registered = register_results(context, plan.stages, wish is not None and wish.champion)
    for file in files:
        context.tracking.log_file(context.runs.parent, file)
    failed = [row for row in summary["rows"] if row["state"] in {"Failed", "Skipped"}]
    reason = "; ".join(f"{row['stage']}: {row['reason']}" for row in failed if row["state"] == "Failed")
    end = f"**Failed.** {reason}" if failed else ""
    describe_parent(context, summary, plan, end, [f"- registered: {text}" for text in registered])
    context.tracking.end(context.runs.parent, "FAILED" if failed else "FINISHED", reason or None)


def describe_parent(context: RunContext, summary: dict[str, Any], plan: Plan, end: str, more: Sequence[str] = ()) -> None:
    """The base and the results as a table, how it ended, then a table of all stages, and what to beware of. `more`: lines that stand before that."""
    rows = summary["rows"]
    done = [row for row in rows if row["stage"] != BASE]
    counts = {state: sum(row["state"] == state for row in done) for state in dict.fromkeys(row["state"] for row in done)}
    said = ", ".join(f"{count} {state.lower()}" for state, count in counts.items())
    base, tracking = plan.base, context.tracking
    lines = [
        f"`{base.source}`{f' at {base.revision[:12]}' if base.revision else ''} ({base.checkpoint.model_type}) through {len(done)} stages: {said}; "
        f"{summary['seconds']:.0f} s."
    ]
    metrics = {row["stage"]: row["metrics"] for row in rows}
    results = results_table({name: metrics[name] for name in dict.fromkeys([BASE, *leaves(plan)]) if metrics[name]})
    stages = [(plan.by_name[row["stage"]].index, row["stage"], tracking.id_of(row["run"]), row["state"], row["metrics"]) for row in rows]
    points = [f"- **{verdict['outcome']}** {row['stage']}: {verdict['message']}" for row in rows for verdict in row["verdicts"]]
    points += [f"- warning {row['stage']}: {warning}" for row in rows for warning in row["warnings"]]
    link = f"#/experiments/{tracking.experiment}/runs/"
    above = [results, *lines, end, "\n".join(more)]
    tracking.describe(context.runs.parent, fitted(above, steps_table(stages, link), points))


def settle(tracking: Tracking, outbox: Path, warn: Callable[[str], None]) -> None:
    """Wait a while for an MLflow that is away, say what it still lacks and what it refused, and let go."""
    if tracking.waiting:
        warn(f"waiting up to {_PATIENCE:.0f} s for MLflow at {tracking.uri}, which lacks {tracking.waiting} calls")
        if left := tracking.settle(_PATIENCE):
            warn(
                f"MLflow at {tracking.uri} still lacks {left} calls; they are kept in {outbox}, and `edgepress sync`, the next `edgepress run` "
                "or `edgepress resume` sends them"
            )
    if tracking.refused:
        warn(f"MLflow at {tracking.uri} refused {tracking.refused} calls; they are in {outbox}/refused.jsonl, each with the reason")
    tracking.close()
