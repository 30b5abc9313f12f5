"""Record a whole pipeline in MLflow: its run and those of a sweep's cells, from opening to end. Imports no torch and no MLflow."""

import json
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from compression.redaction import redacted
from flows.planning import BASE, Plan, estimate
from flows.run.registering import register_results
from tasks.ancestry import walk_ancestors
from tasks.measurement.measure import machine_fingerprint
from tasks.run_context import RunContext
from tasks.store.store import Store
from tasks.tracking import OpenRun, Tracking
from tasks.tracking.descriptions import charted, fitted, results_table, steps_table, table
from tasks.tracking.runs_view import RUN

_PATIENCE = 10.0  # seconds to wait at the end for an MLflow that does not answer
_DONE = ("Completed", "Cached")


# --- opening ---


def open_parent(tracking: Tracking, plan: Plan, store: Store, name: str, open_run: OpenRun | None) -> str:
    """Open the pipeline's run, with recipe, plan and environment as artifacts and the data as an input; return its id.

    Args:
        tracking: MLflow.
        plan: The pipeline's plan.
        store: Shows which results exist already.
        name: The group of its runs in MLflow's table.
        open_run: The resumed run, whose runs in MLflow this one continues.
    """
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
    run = tracking.open_run(recipe.name, tags=tags, params=params, known=open_run.run if open_run else None)
    tracking.log_text(run, plan.parsed.source.text, f"recipe/{file.name}")
    if plan.parsed.overrides:
        tracking.log_text(run, "\n".join(plan.parsed.overrides) + "\n", "recipe/overrides.txt")
    tracking.log_text(run, json.dumps(planned_stages(plan, store), indent=1), "plan.json")
    environment = {
        "python": platform.python_version(), "platform": platform.platform(), "machine": machine_fingerprint(), "device": plan.machine.device,
        "threads": plan.machine.threads, "git_commit": commit, "git_changed": changed, "command": [redacted(argument) for argument in sys.argv],
    }  # fmt: skip
    tracking.log_text(run, json.dumps(environment, indent=1), "environment/environment.json")
    tracking.log_text(run, installed_requirements(), "environment/requirements.txt")
    tracking.log_data(run, "recipe data", plan.stages[0].document["data"], recipe.data.model_dump_json(), "evaluation")
    return run


def open_cells(tracking: Tracking, plan: Plan, run: str, name: str, open_run: OpenRun | None) -> dict[str, str]:
    """Open a run for each cell of the matrix, with its values as parameters, which MLflow compares and draws; return their ids by cell."""
    tags = {"edgepress.kind": "cell", "edgepress.recipe": plan.parsed.recipe.name, RUN: name}
    known = open_run.cells if open_run else {}
    return {
        branch.name: tracking.open_run(branch.name, parent=run, tags=tags, params=branch.values, known=known.get(branch.name))
        for branch in plan.parsed.branches
    }


def known_stages(plan: Plan, open_run: OpenRun | None) -> tuple[dict[str, str], dict[str, str]]:
    """Return by stage the run in MLflow to continue, and the run that a new one replaces because the stage has another identity now."""
    identities = {stage.name: stage.identity for stage in plan.stages}
    known: dict[str, str] = {}
    superseded: dict[str, str] = {}
    for (name, identity), run in open_run.stages.items() if open_run else ():
        if name in identities:
            (known if identities[name] == identity else superseded)[name] = run
    return known, superseded


def leaves(plan: Plan) -> list[str]:
    """Return the stages that nothing follows."""
    followed = {name for stage in plan.stages for name in stage.inputs.values()}
    return [stage.name for stage in plan.stages if stage.name not in followed]


def lineage(plan: Plan, stage: str) -> list[str]:
    """Return the stages from the base to a stage, from parent to parent, without teachers and corpora."""
    return walk_ancestors([stage], lambda name: [parent] if (parent := plan.by_name[name].inputs.get("parent")) else [])


def auxiliary_stages(plan: Plan) -> list[str]:
    """Return the stages that only teach others or are only trained on: no stage has them as its parent."""
    parents, ends = {stage.inputs.get("parent") for stage in plan.stages}, leaves(plan)
    return [stage.name for stage in plan.stages if stage.name not in parents and stage.name not in ends]


def series(plan: Plan) -> dict[str, list[str]]:
    """Return by stage the suffixes of its metrics' names on the pipeline's run, so that a line of a chart is the lineage of one stage.

    One leaf: no suffix (`accuracy`). Several: each leaf whose lineage holds the stage (`accuracy/gguf`). Auxiliary stages have suffixes too
    (`accuracy/teacher`). In a sweep each cell has a run of its own with its lineages, so only stages that all cells share are named here, without
    suffix those in the lineages of all leaves.
    """
    ends, auxiliary = leaves(plan), auxiliary_stages(plan)
    suffixes: dict[str, list[str]] = {}
    lineages: dict[str, list[str]] = {}
    if plan.parsed.branches:
        shared = set.intersection(*(set(branch.stages.values()) for branch in plan.parsed.branches))
        suffixes = {name: [""] for name in set.intersection(*(set(lineage(plan, leaf)) for leaf in ends))}
        auxiliary = [name for name in auxiliary if name in shared]
    else:
        lineages = {f"/{leaf}" if len(ends) > 1 else "": lineage(plan, leaf) for leaf in ends}
    for suffix, stages in (lineages | {f"/{name}": lineage(plan, name) for name in auxiliary}).items():
        for stage in stages:
            suffixes.setdefault(stage, []).append(suffix)
    return suffixes


def planned_stages(plan: Plan, store: Store) -> list[dict[str, Any]]:
    """Return the plan as JSON: stages in order with identity, inputs and estimated needs in bytes."""
    rows = []
    for stage in plan.stages:
        needed = estimate(stage, plan)
        rows.append({
            "step": stage.index, "stage": stage.name, "uses": stage.definition.uses if stage.definition else "base", "identity": stage.identity,
            "inputs": dict(stage.inputs), "in_store": stage.definition is not None and store.has(stage.identity) and not stage.recompute,
            "size": needed.size, "memory": needed.memory, "disk": needed.disk,
        })  # fmt: skip
    return rows


def git_commit(folder: Path) -> tuple[str | None, bool | None]:
    """Return the commit that is checked out in the recipe's folder, and whether tracked files differ from it; None without git."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=False)
        except (FileNotFoundError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no") if commit else None
    return commit, None if changed is None else bool(changed)


def installed_requirements() -> str:
    """List every installed distribution with its version, as `pip freeze` does."""
    lines = {each.name.lower(): f"{each.name}=={each.version}" for each in distributions() if each.name}
    return "\n".join(lines[name] for name in sorted(lines)) + "\n"


# --- ending ---


def end_cells(context: RunContext, summary: dict[str, Any], plan: Plan, finished: bool) -> None:
    """End each cell's run as its leaves ended, with the metrics of their lineages; a metric's step is the index of its stage."""
    tracking, rows = context.tracking, {row["stage"]: row for row in summary["rows"]}
    auxiliary = set(auxiliary_stages(plan))
    for branch, cell in zip(plan.parsed.branches, summary["sweep"]["cells"] if summary["sweep"] else (), strict=True):
        run, points = context.runs.cells[cell["name"]], []
        ends = {name: f"/{leaf}" if len(cell["leaves"]) > 1 else "" for leaf, name in cell["leaves"].items()}
        ends |= {name: f"/{origin}" for origin, name in branch.stages.items() if name in auxiliary}
        for end, suffix in ends.items():
            for stage in lineage(plan, end):
                values = {metric + suffix: value for metric, value in charted(rows[stage]["metrics"]).items()}
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
    registry = plan.parsed.recipe.registry
    registered = register_results(context, plan.stages, registry is not None and registry.champion)
    for file in files:
        context.tracking.log_file(context.runs.parent, file)
    failed = [row for row in summary["rows"] if row["state"] in {"Failed", "Skipped"}]
    reason = "; ".join(f"{row['stage']}: {row['reason']}" for row in failed if row["state"] == "Failed")
    ending = f"**Failed.** {reason}" if failed else ""
    describe_parent(context, summary, plan, ending, [f"- registered: {text}" for text in registered])
    context.tracking.end(context.runs.parent, "FAILED" if failed else "FINISHED", reason or None)


def describe_parent(context: RunContext, summary: dict[str, Any], plan: Plan, ending: str, notes: Sequence[str] = ()) -> None:
    """Describe the pipeline's run: base and results as a table, its ending, notes, a table of all stages, verdicts and warnings."""
    rows = summary["rows"]
    done = [row for row in rows if row["stage"] != BASE]
    counts = {state: sum(row["state"] == state for row in done) for state in dict.fromkeys(row["state"] for row in done)}
    states = ", ".join(f"{count} {state.lower()}" for state, count in counts.items())
    base, tracking = plan.base, context.tracking
    lines = [
        f"`{base.source}`{f' at {base.revision[:12]}' if base.revision else ''} ({base.checkpoint.model_type}) through {len(done)} stages: {states}; "
        f"{summary['seconds']:.0f} s."
    ]
    metrics = {row["stage"]: row["metrics"] for row in rows}
    results = results_table({name: metrics[name] for name in dict.fromkeys([BASE, *leaves(plan)]) if metrics[name]})
    stages = [(plan.by_name[row["stage"]].index, row["stage"], tracking.id_of(row["run"]), row["state"], row["metrics"]) for row in rows]
    points = [f"- **{verdict['outcome']}** {row['stage']}: {verdict['message']}" for row in rows for verdict in row["verdicts"]]
    points += [f"- warning {row['stage']}: {warning}" for row in rows for warning in row["warnings"]]
    link = f"#/experiments/{tracking.experiment}/runs/"
    above = [results, *lines, ending, "\n".join(notes)]
    tracking.describe(context.runs.parent, fitted(above, steps_table(stages, link), points))


def close_tracking(tracking: Tracking, outbox: Path, warn: Callable[[str], None]) -> None:
    """Wait a while for an MLflow that does not answer, warn about calls it lacks and calls it refused, and close the connection."""
    if tracking.waiting:
        warn(f"waiting up to {_PATIENCE:.0f} s for MLflow at {tracking.uri}, which lacks {tracking.waiting} calls")
        if unsent := tracking.settle(_PATIENCE):
            warn(
                f"MLflow at {tracking.uri} still lacks {unsent} calls; they are kept in {outbox}, and `edgepress sync`, the next `edgepress run` "
                "or `edgepress resume` sends them"
            )
    if tracking.refused:
        warn(f"MLflow at {tracking.uri} refused {tracking.refused} calls; they are in {outbox}/refused.jsonl, each with the reason")
    tracking.close()
