"""Runs that MLflow has already: those a resumed pipeline continues, and those whose process died. Imports no torch and no MLflow."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tasks.store.owner import is_dead
from tasks.tracking.calls import OWNER, REASON
from tasks.tracking.runs_view import RUN

SUPERSEDED = "edgepress.superseded"  # tag of a stage's run: the run that took its place


@dataclass(frozen=True)
class OpenRun:
    """The runs of a pipeline that a resumed one can continue.

    Attributes:
        run: The run of the whole pipeline.
        cells: The runs of a sweep's cells, by name.
        stages: The runs of stages, by name and identity.
        name: The tag by which the table of runs groups them.
    """

    run: str
    cells: Mapping[str, str]
    stages: Mapping[tuple[str, str], str]
    name: str = ""


def find_open_run(client: Any, experiment: str, run: str) -> OpenRun | None:
    """Return a pipeline's run and those below it; None where MLflow does not have it or it was deleted."""
    from mlflow.exceptions import MlflowException

    try:
        known = client.get_run(run)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    if known.info.lifecycle_stage != "active":
        return None
    below = _children(client, experiment, run)
    cells = {child.info.run_name: child.info.run_id for child in below if child.data.tags.get("edgepress.kind") == "cell"}
    below += [child for cell in cells.values() for child in _children(client, experiment, cell)]
    stages = {
        (child.data.tags["edgepress.stage"], child.data.tags["edgepress.identity"]): child.info.run_id
        for child in below
        if child.data.tags.get("edgepress.kind") == "stage" and SUPERSEDED not in child.data.tags
    }
    return OpenRun(run, cells, stages, known.data.tags.get(RUN, ""))


def end_orphans(client: Any, experiment: str, page_size: int = 1000) -> int:
    """Mark runs whose process is dead as KILLED; returns how many there were."""
    running = _search(client, experiment, "attributes.status = 'RUNNING'", page_size)  # all pages before one ends, or later runs move up
    dead = [run.info.run_id for run in running if OWNER in run.data.tags and is_dead(run.data.tags[OWNER])]
    for run in dead:
        client.set_tag(run, REASON, "its process was killed")
        client.set_terminated(run, "KILLED")
    return len(dead)


def _children(client: Any, experiment: str, run: str) -> list[Any]:
    return _search(client, experiment, f"tags.`mlflow.parentRunId` = '{run}'")


def _search(client: Any, experiment: str, condition: str, page_size: int = 1000) -> list[Any]:
    """All runs that match a filter of MLflow."""
    found: list[Any] = []
    token = None
    while True:
        page = client.search_runs([experiment], condition, max_results=page_size, page_token=token)
        found += page
        token = page.token
        if not token:
            return found
