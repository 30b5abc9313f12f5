"""Running a plan as a Prefect flow, from the first process to the summary. Prefect and MLflow are imported here, after the server was started."""

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from flows.graph import BASE
from flows.planning import Plan, check_disk
from flows.server import prefect_server
from tasks.children import Children
from tasks.files import write_json
from tasks.journal import Run, RunBase, RunStage, Told, journal
from tasks.measure import machine_fingerprint
from tasks.owner import is_dead, owner_tag
from tasks.perform import Pipeline, Result
from tasks.store import Store
from tasks.tracking import Begun, Tracking

Progress = Callable[[str, dict[str, Any]], None]


@dataclass(frozen=True)
class Outcome:
    """A finished pipeline: its summary as written to `outputs/<recipe>/run.json`, and whether everything held."""

    summary: dict[str, Any]
    succeeded: bool


def run_pipeline(
    plan: Plan, store: Store, outputs: Path, progress: Progress, render: Callable[[dict[str, Any]], str], resumes: Run | None = None
) -> Outcome:
    """Run every stage of the plan; `render` turns the summary into the report page. With `resumes` it goes on with that run, in MLflow too.

    Stages that do not depend on a failed one go on. On Ctrl-C the children are ended, the runs are closed, KeyboardInterrupt goes on.
    """
    check_disk(plan, store)
    started = time.time()
    recipe = plan.parsed.recipe
    children = Children(recipe.execution.cores or os.cpu_count() or 1)
    with journal(store, _described(plan, outputs, resumes)) as journaled, prefect_server(store.root / "prefect"):
        children.preload()
        tracking = Tracking(resumes.tracking_uri if resumes and not os.environ.get("MLFLOW_TRACKING_URI") else None)
        tracking.end_orphans()
        begun = _begun(tracking, resumes, progress) if resumes else None
        run = _open_parent(tracking, plan, begun)
        journaled.note(tracking_uri=tracking.uri, tracking_run=run)

        planned = {(task.name, task.identity) for task in plan.assignments}
        heard: set[str] = set()

        def told(stage: str, event: dict[str, Any]) -> None:
            progress(stage, event)
            if "ended" in event or stage not in heard:
                heard.add(stage)
                with pipeline.lock:  # until it is written, or an older state could come after a newer one
                    journaled.stages({name: Told(r.state, r.reason, r.seconds) for name, r in pipeline.results.items()})

        pipeline = Pipeline(
            name=recipe.name, store=store, children=children, tracking=tracking, run=run, data=recipe.data, machine=plan.machine,
            base=plan.base, outputs=outputs, documents={a.name: (a.identity, a.document) for a in plan.assignments}, progress=told,
            cells=_open_cells(tracking, plan, run, begun),
            known_runs={name: known for (name, identity), known in begun.stages.items() if (name, identity) in planned} if begun else {},
        )  # fmt: skip
        finished = False
        try:
            _run_flow(pipeline, plan, [f"resumes:{resumes.run}"] if resumes else [])
            finished = True
        finally:
            children.close()
            summary = summarize(pipeline, plan, started)
            _end_cells(pipeline, summary, finished)
            if not finished:
                _close_interrupted(pipeline)
            else:
                _finish(pipeline, plan, summary, render)
        succeeded = all(row["state"] in {"Completed", "Cached"} for row in summary["rows"])
        journaled.stages({row["stage"]: Told(row["state"], row["reason"], row["seconds"]) for row in summary["rows"]})
        journaled.end("Completed" if succeeded else "Failed")
    return Outcome(summary, succeeded)


def _described(plan: Plan, outputs: Path, resumes: Run | None) -> Run:
    """What the run's journal begins with. That of a resumed one names its run in MLflow from the start: this one may end before it is open."""
    parsed, base = plan.parsed, plan.base
    file = parsed.source.file
    stages = [
        RunStage(name=task.name, uses=task.stage.uses, identity=task.identity, inputs=dict(task.inputs))
        for task in plan.assignments
        if task.stage is not None
    ]
    return Run(
        recipe=parsed.recipe.name, file=str(file.absolute()), text=parsed.source.text, overrides=parsed.overrides, directory=str(Path.cwd()),
        outputs=str(outputs.absolute()), base=RunBase(source=base.source, identity=base.identity, content=base.content), stages=tuple(stages),
        only=plan.only, again=tuple(task.name for task in plan.assignments if task.again), resumes=resumes.run if resumes else None,
        tracking_uri=resumes.tracking_uri if resumes else "", tracking_run=resumes.tracking_run if resumes else "",
    )  # fmt: skip


def _begun(tracking: Tracking, resumes: Run, progress: Progress) -> Begun | None:
    """The runs in MLflow to go on with. Warns where they are gone."""
    begun = tracking.begun(resumes.tracking_run) if resumes.tracking_run else None
    if begun is None and resumes.tracking_run:
        progress(
            resumes.run, {"warning": f"its run {resumes.tracking_run} is not in MLflow at {tracking.uri}; this one gets a new run there"}
        )
    return begun


def _open_parent(tracking: Tracking, plan: Plan, begun: Begun | None) -> str:
    recipe = plan.parsed.recipe
    tags = {
        "edgepress.kind": "pipeline",
        "edgepress.recipe": recipe.name,
        "edgepress.base": plan.base.source,
        "edgepress.device": plan.machine.device,
    }
    params = {
        "model": recipe.model.path,
        "revision": plan.base.revision,
        "seed": recipe.seed,
        "stages": ", ".join(n.name for n in plan.parsed.nodes),
    }
    run = tracking.open_run(recipe.name, tags=tags, params=params, known=begun.run if begun else None)
    tracking.log_text(run, plan.parsed.source.text, f"recipe/{plan.parsed.source.file.name}")
    tracking.log_data(run, "recipe data", plan.assignments[0].document["data"], recipe.data.model_dump_json(), "evaluation")
    return run


def _open_cells(tracking: Tracking, plan: Plan, run: str, begun: Begun | None) -> dict[str, str]:
    """A run for each cell of the matrix, with its values as parameters: what MLflow compares and draws."""
    tags = {"edgepress.kind": "cell", "edgepress.recipe": plan.parsed.recipe.name}
    known = begun.cells if begun else {}
    return {
        branch.name: tracking.open_run(branch.name, parent=run, tags=tags, params=branch.values, known=known.get(branch.name))
        for branch in plan.parsed.branches
    }


def _end_cells(pipeline: Pipeline, summary: dict[str, Any], finished: bool) -> None:
    """A cell ends as its leaves did."""
    rows = {row["stage"]: row for row in summary["rows"]}
    for cell in summary["sweep"]["cells"] if summary["sweep"] else ():
        broken = [rows[name] for name in cell["leaves"].values() if rows[name]["state"] not in {"Completed", "Cached"}]
        if broken and not finished:
            pipeline.tracking.end(cell["run"], "KILLED", "interrupted")
        else:
            reasons = "; ".join(f"{row['stage']}: {row['reason']}" for row in broken)
            pipeline.tracking.end(cell["run"], "FAILED" if broken else "FINISHED", reasons or None)


def _run_flow(pipeline: Pipeline, plan: Plan, more_tags: list[str]) -> None:
    """Submit every stage to Prefect, which starts each one as the graph allows, and wait for all."""
    from prefect import flow, tags
    from prefect.futures import PrefectFuture
    from prefect.logging.handlers import APILogHandler
    from prefect.states import Completed, Failed
    from prefect.task_runners import ThreadPoolTaskRunner

    from tasks.task import stage_task

    _quiet_prefect(pipeline.store.root / "prefect")
    _end_orphans()

    runner: Any = ThreadPoolTaskRunner(max_workers=32)

    @flow(name=pipeline.name, task_runner=runner, persist_result=False, log_prints=False)
    def compress() -> Any:
        futures: dict[str, PrefectFuture[Any]] = {}
        for task in plan.assignments:
            needed = [futures[name] for name in dict.fromkeys(task.inputs.values())]
            if task.stage is not None and BASE not in task.inputs.values():
                needed.append(futures[BASE])  # every stage is compared with the base model
            futures[task.name] = stage_task(pipeline, task).submit(return_state=False, wait_for=needed)
        try:
            states = {name: _wait(future) for name, future in futures.items()}
        except BaseException:  # Ctrl-C: the runner's threads wait for the children, so these go first
            pipeline.children.close()
            raise
        broken = [name for name, state in states.items() if not state.is_completed()]
        return Failed(message=f"failed: {', '.join(broken)}") if broken else Completed(message="all stages done")

    try:
        with tags("edgepress", f"owner:{owner_tag()}", *more_tags):  # of the flow run and all its task runs, from the moment they exist
            compress(return_state=True)
    finally:
        APILogHandler().flush()  # before the server goes


def _wait(future: Any) -> Any:
    future.wait()
    return future.state


def _quiet_prefect(home: Path) -> None:
    """Prefect's console messages go to a file; its API keeps them too. To be called after `from prefect import flow`, which sets logging up."""
    import logging

    from prefect.logging.handlers import PrefectConsoleHandler

    home.mkdir(parents=True, exist_ok=True)
    file = logging.FileHandler(home / "prefect.log")
    for name in [None, *logging.root.manager.loggerDict]:
        logger = logging.getLogger(name)
        for console in [h for h in logger.handlers if isinstance(h, PrefectConsoleHandler)]:
            logger.removeHandler(console)
            logger.addHandler(file)


def _end_orphans() -> None:
    """Mark flow runs and task runs whose process is dead as crashed."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, TaskRunFilter
    from prefect.client.schemas.objects import State
    from prefect.states import Crashed

    def dead(run: Any) -> bool:
        return any(tag.startswith("owner:") and is_dead(tag.removeprefix("owner:")) for tag in run.tags)

    running = {"state": {"type": {"any_": ["RUNNING", "PENDING"]}}, "tags": {"all_": ["edgepress"]}}
    crashed: State[Any] = Crashed(message="its process was killed")
    with get_client(sync_client=True) as client:
        for task_run in filter(dead, client.read_task_runs(task_run_filter=TaskRunFilter.model_validate(running))):
            client.set_task_run_state(task_run.id, crashed, force=True)
        for flow_run in filter(dead, client.read_flow_runs(flow_run_filter=FlowRunFilter.model_validate(running))):
            client.set_flow_run_state(flow_run.id, crashed, force=True)


def _close_interrupted(pipeline: Pipeline) -> None:
    for result in pipeline.results.values():
        if result.run and result.state == "Running":
            pipeline.tracking.end(result.run, "KILLED", "interrupted")
    pipeline.tracking.end(pipeline.run, "KILLED", "interrupted")


def _finish(pipeline: Pipeline, plan: Plan, summary: dict[str, Any], render: Callable[[dict[str, Any]], str]) -> None:
    """Write the summary and the report, log both, end the parent run."""
    folder = pipeline.outputs / pipeline.name
    write_json(folder / "run.json", summary)
    (folder / "report.html").write_text(render(summary))
    for file in ("run.json", "report.html"):
        pipeline.tracking.log_file(pipeline.run, folder / file)
    failed = [row for row in summary["rows"] if row["state"] in {"Failed", "Skipped"}]
    reason = "; ".join(f"{row['stage']}: {row['reason']}" for row in failed if row["state"] == "Failed")
    pipeline.tracking.end(pipeline.run, "FAILED" if failed else "FINISHED", reason or None)


def summarize(pipeline: Pipeline, plan: Plan, started: float) -> dict[str, Any]:
    """Everything the table and the report show, as JSON."""
    rows = []
    for task in plan.assignments:
        result = pipeline.results.get(task.name)
        if result is None:
            broken = next(
                (name for name in task.ancestors if pipeline.results.get(name) is None or pipeline.results[name].state == "Failed"), BASE
            )
            uses = task.stage.uses if task.stage else "base"
            result = Result(task.name, uses, list(dict.fromkeys(task.inputs.values())), "Skipped", task.identity, reason=f"{broken} failed")
        rows.append({**asdict(result), "stage": result.name, "size_bytes": result.metrics.get("size_mb", 0) * 1e6})
    return {
        "recipe": json.loads(plan.parsed.recipe.model_dump_json()), "name": pipeline.name, "started": started, "seconds": time.time() - started,
        "rows": rows, "sweep": _sweep(pipeline, plan), "gates": [{"stage": row["stage"], **verdict} for row in rows for verdict in row["verdicts"]], "run": pipeline.run,
        "environment": {
            "edgepress": version("edgepress"), "machine": machine_fingerprint(), "device": plan.machine.device, "threads": plan.machine.threads,
            "base": {"source": plan.base.source, "revision": plan.base.revision, "license": plan.base.license, "content": plan.base.content},
        },
    }  # fmt: skip


def _sweep(pipeline: Pipeline, plan: Plan) -> dict[str, Any] | None:
    """The cells of the matrix: their values, their leaves (from the name in the recipe to the copy's) and their runs in MLflow."""
    branches = plan.parsed.branches
    if not branches:
        return None
    cells = [
        {"name": b.name, "values": dict(b.values), "leaves": {leaf: b.stages[leaf] for leaf in b.leaves}, "run": pipeline.cells[b.name]}
        for b in branches
    ]
    return {"keys": list(dict.fromkeys(key for b in branches for key in b.values)), "cells": cells}
