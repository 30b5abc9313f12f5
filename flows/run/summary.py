"""Summarize a run as JSON, for the table, the report, `edgepress report` and `edgepress compare`. Imports no torch."""

import json
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from flows.planning import BASE, Plan
from tasks.measurement.measure import machine_fingerprint
from tasks.planned_stage import PlannedStage, Result
from tasks.run_context import RunContext


def summarize(context: RunContext, plan: Plan, started: float, run: str) -> dict[str, Any]:
    """Summarize a run: rows in topological order, the base first; the cells of a sweep; verdicts; the environment.

    Args:
        context: What its stages shared, with their results.
        plan: Its plan.
        started: When it started, in seconds since the epoch.
        run: Its name in the journal.
    """
    rows = []
    for stage in plan.stages:
        result = context.results.get(stage.name) or _skipped(context, stage)
        figures = {"stage": result.name, "size_bytes": result.metrics.get("size_mb", 0) * 1e6, "layers": _layers(result)}
        rows.append({**asdict(result), **figures})
    return {
        "recipe": json.loads(plan.parsed.recipe.model_dump_json()), "name": context.name, "journal": run, "started": started,
        "seconds": time.time() - started, "rows": rows, "sweep": _sweep(context, plan), "run": context.runs.parent,
        "gates": [{"stage": row["stage"], **verdict} for row in rows for verdict in row["verdicts"]],
        "environment": {
            "edgepress": version("edgepress"), "machine": machine_fingerprint(), "device": plan.machine.device, "threads": plan.machine.threads,
            "data": plan.by_name[BASE].document["data"], "measured_with": dict(plan.measured_with),
            "base": {"source": plan.base.source, "revision": plan.base.revision, "license": plan.base.license, "content": plan.base.content},
        },
    }  # fmt: skip


def _skipped(context: RunContext, stage: PlannedStage) -> Result:
    """The result of a stage that never started: a stage it needs failed, or the run was interrupted before it."""
    failed = next((name for name in stage.ancestors if name in context.results and context.results[name].state == "Failed"), None)
    reason = f"{failed} failed" if failed else "the run was interrupted"
    uses = stage.definition.uses if stage.definition else "base"
    return Result(stage.name, uses, list(dict.fromkeys(stage.inputs.values())), "Skipped", stage.identity, reason=reason)


def _layers(result: Result) -> dict[str, dict[str, float]]:
    """The figures of single layers that the stage's method wrote into its checkpoint; empty where it wrote none."""
    file = Path(result.path) / "layers.json"
    return json.loads(file.read_text()) if result.path and file.is_file() else {}


def _sweep(context: RunContext, plan: Plan) -> dict[str, Any] | None:
    """The cells of the matrix: their values, their leaves (from the name in the recipe to the copy's) and their runs in MLflow.

    left_out  number of the matrix's results that the selection of this run leaves out
    """
    branches = plan.parsed.branches
    if not branches:
        return None
    cells = [
        {"name": b.name, "values": dict(b.values), "leaves": {leaf: b.stages[leaf] for leaf in b.leaves}, "run": context.runs.cells[b.name]}
        for b in branches
    ]
    return {"keys": list(dict.fromkeys(key for b in branches for key in b.values)), "cells": cells, "left_out": plan.left_out}
