"""The run in MLflow of one stage, and its points in the charts of the pipeline's run. Imports no torch and no MLflow."""

from collections.abc import Mapping
from pathlib import Path

from tasks.planned_stage import PlannedStage, Result
from tasks.run_context import RunContext
from tasks.stage import Artifact
from tasks.store.provenance import CARRIED
from tasks.tracking.descriptions import charted, fitted, properties, sentence, table
from tasks.tracking.runs_view import RUN


def open_stage_run(context: RunContext, stage: PlannedStage, result: Result, previous: Result | None) -> None:
    """Open the stage's run. A retry continues the run of `previous`, a resumed stage the one that the resumed run opened."""
    if previous is not None and previous.run:
        result.run = previous.run
        context.tracking.reopen(result.run)
        return
    tags = {
        "edgepress.kind": "stage",
        "edgepress.stage": stage.name,
        "edgepress.uses": stage.uses,
        "edgepress.identity": stage.identity,
        "edgepress.recipe": context.name,
        RUN: context.runs.name,
        "edgepress.leaf": str(stage.name in context.runs.leaves).lower(),
        **properties(stage.product, context.base.checkpoint.model_type),
    }
    parameters = stage.definition.model_dump(mode="json", exclude={"uses"}) if stage.definition else {}
    result.run = context.tracking.open_run(
        stage.name,
        parent=context.runs.cells.get(stage.cell, context.runs.parent),
        tags=tags,
        params={"uses": stage.uses, **parameters, "seed": stage.document.get("seed")},
        known=context.runs.known.get(stage.name),
    )
    if superseded := context.runs.superseded.get(stage.name):
        context.tracking.supersede(superseded, by=result.run)
    if stage.document.get("data"):
        context.tracking.log_data(
            result.run,
            "recipe data",
            stage.document["data"],
            context.data.model_dump_json(),
            stage.definition.data_read() if stage.definition else "evaluation",
        )


def finish_stage_run(context: RunContext, stage: PlannedStage, result: Result) -> None:
    """Log what came of a stage on its run and on the pipeline's, and end its run."""
    tracking, cached = context.tracking, result.state == "Cached"
    passed = all(verdict.outcome == "PASS" for verdict in result.verdicts)
    tags = {
        "edgepress.state": result.state,
        "edgepress.cached": str(cached).lower(),
        **_place_tags(result),
        "edgepress.final": str(stage.name in context.runs.leaves and passed).lower(),
    }
    tracking.log(result.run, result.metrics, tags=tags)
    log_series(context, stage, result)
    if isinstance(stage.product, Artifact):
        for file in CARRIED:
            tracking.log_file(result.run, Path(result.path) / file)
    tracking.describe(
        result.run, describe_stage(result, _columns(context, stage, result)), cached_identity=stage.identity if cached else None
    )
    tracking.end(result.run, "FINISHED")


def fail_stage_run(context: RunContext, stage: PlannedStage, result: Result) -> None:
    """Log a failed or stopped stage on its run, if it has one, and end it."""
    if not result.run:
        return
    stopped = result.state == "Stopped"
    context.tracking.log(result.run, result.metrics, tags={"edgepress.state": result.state, **_place_tags(result)})
    context.tracking.describe(result.run, describe_stage(result, _columns(context, stage, result)))
    context.tracking.end(result.run, "KILLED" if stopped else "FAILED", "interrupted" if stopped else result.reason)


def log_series(context: RunContext, stage: PlannedStage, result: Result) -> None:
    """Log the stage's metrics on the pipeline's run with step = the stage's index, one series for each path to a leaf."""
    suffixes = context.runs.series.get(stage.name, ())
    series = {metric + suffix: value for metric, value in charted(result.metrics).items() for suffix in suffixes}
    if series:  # a superseded stage of another identity left points at this step, which these replace
        context.tracking.log(context.runs.parent, series, step=stage.index, again=stage.name in context.runs.superseded)


def _place_tags(result: Result) -> dict[str, str]:
    return {"edgepress.path": result.path, "edgepress.content": result.content} if result.path else {}


def _columns(context: RunContext, stage: PlannedStage, result: Result) -> dict[str, dict[str, float]]:
    """Metrics of the stage, of its parent and of the base, by name."""
    parent = stage.inputs.get("parent", "base")
    others = [name for name in (parent, "base") if name in context.results]
    return {stage.name: result.metrics} | {name: context.results[name].metrics for name in others if name != stage.name}


def describe_stage(result: Result, columns: Mapping[str, Mapping[str, float]]) -> str:
    """Return the description of a stage's run: what it did, its figures, verdicts and warnings.

    Args:
        result: What came of the stage.
        columns: Metrics by the stage that has them, this stage's first.
    """
    action = {"Cached": "from the store", "Failed": "**failed**", "Stopped": "**interrupted**"}.get(result.state, "computed")
    duration = f" ({result.seconds:.1f} s to compute)" if result.seconds else ""
    lines = ["The base model, which everything is compared with."]
    if result.needs:
        lines = [f"`{result.uses}` after {', '.join(result.needs)}: {action}{duration}."]
    if result.reason and result.state == "Failed":
        lines.append(f"**{result.reason}**")
    if figures := sentence(columns):
        lines.append(figures + (f", measured in {result.runtime}." if result.runtime else "."))
    points = [f"- **{verdict.outcome}** {verdict.message}" for verdict in result.verdicts]
    points += [f"- warning: {warning}" for warning in result.warnings]
    return fitted(lines, table(columns), points)
