"""MLflow: one run a pipeline, one child run a stage, the same metric names on all of them. Imports no torch.

Run ids are passed explicitly: MLflow's stack of active runs belongs to a thread, and stages run in several.
"""

import math
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from tasks.owner import is_dead, owner_tag

EXPERIMENT = "edgepress"
_OWNER = "edgepress.owner"
_REASONS = ("edgepress.reason", "mlflow.note.content")  # tags that say how a run ended


def tracking_uri() -> str:
    """`MLFLOW_TRACKING_URI`, or a sqlite file in the current directory."""
    return os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"


@dataclass(frozen=True)
class Begun:
    """The runs of a pipeline that may be gone on with: its own, those of cells by name, those of stages by name and identity."""

    run: str
    cells: Mapping[str, str]
    stages: Mapping[tuple[str, str], str]


class Tracking:
    """A connection to the tracking server, and the runs of one pipeline.

    MLflow appends what is logged twice. So of a run that is gone on with everything it has is known, and not sent again.
    """

    def __init__(self, uri: str | None = None):
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
        import logging

        logging.getLogger("alembic").setLevel(logging.ERROR)
        from mlflow import MlflowClient

        self._points: dict[str, dict[tuple[str, int], float]] = {}  # of reopened runs: values by metric and step
        self._ends: dict[str, int] = {}  # of reopened runs that had finished: when
        self.uri = uri or tracking_uri()
        self.client = MlflowClient(self.uri)
        found = self.client.get_experiment_by_name(EXPERIMENT)
        self.experiment = (
            found.experiment_id
            if found
            else self.client.create_experiment(EXPERIMENT, tags={"mlflow.experimentKind": "custom_model_development"})
        )

    def end_orphans(self) -> int:
        """Mark runs whose process is dead as KILLED; returns how many there were."""
        running = self.client.search_runs([self.experiment], filter_string="attributes.status = 'RUNNING'", max_results=1000)
        dead = [run for run in running if _OWNER in run.data.tags and is_dead(run.data.tags[_OWNER])]
        for run in dead:
            self.client.set_tag(run.info.run_id, "edgepress.reason", "its process was killed")
            self.client.set_terminated(run.info.run_id, "KILLED")
        return len(dead)

    def begun(self, run: str) -> Begun | None:
        """What there is of a pipeline's run and of those below it; None where the tracking server does not have it (any more)."""
        from mlflow.exceptions import MlflowException

        try:
            if self.client.get_run(run).info.lifecycle_stage != "active":
                return None
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        below = self._children(run)
        cells = {child.info.run_name: child.info.run_id for child in below if child.data.tags.get("edgepress.kind") == "cell"}
        stages = [child for child in [*below, *(inner for cell in cells.values() for inner in self._children(cell))]
                  if child.data.tags.get("edgepress.kind") == "stage"]  # fmt: skip
        return Begun(run, cells, {(s.data.tags["edgepress.stage"], s.data.tags["edgepress.identity"]): s.info.run_id for s in stages})

    def _children(self, run: str) -> list[Any]:
        found: list[Any] = []
        token = None
        while True:
            page = self.client.search_runs([self.experiment], f"tags.`mlflow.parentRunId` = '{run}'", max_results=1000, page_token=token)
            found += page
            token = page.token
            if not token:
                return found

    def open_run(
        self, name: str, *, parent: str | None = None, tags: Mapping[str, str] | None = None, params: Mapping[str, Any] | None = None,
        known: str | None = None,
    ) -> str:  # fmt: skip
        """Start a run (below `parent`), or go on with the `known` one that has this name, tags and parameters; returns its id."""
        if known is not None:
            self.reopen(known)
            return known
        tags = {_OWNER: owner_tag(), **(tags or {}), **({"mlflow.parentRunId": parent} if parent else {})}
        run = self.client.create_run(self.experiment, run_name=name, tags=tags)
        if params:
            from mlflow.entities import Param

            self.client.log_batch(run.info.run_id, params=[Param(key, str(value)[:6000]) for key, value in params.items()])
        return run.info.run_id

    def reopen(self, run: str) -> None:
        """Continue a run that was ended, by this process or another. What it has is not logged twice."""
        known = self.client.get_run(run)
        self.client.set_tag(run, _OWNER, owner_tag())
        for tag in known.data.tags.keys() & set(_REASONS):
            self.client.delete_tag(run, tag)
        if known.info.status == "FINISHED":
            self._ends[run] = known.info.end_time
        self.client.update_run(run, status="RUNNING")
        history = [point for key in known.data.metrics for point in self.client.get_metric_history(run, key)]
        self._points[run] = {(point.key, point.step): point.value for point in sorted(history, key=lambda point: point.timestamp)}

    def log(self, run: str, metrics: Mapping[str, float], step: int = 0, tags: Mapping[str, str] | None = None) -> None:
        """Log metrics (and tags) in one request. Values that are no number are left out: MLflow's stores refuse them."""
        from mlflow.entities import RunTag

        points = self._new_points(run, [(step, metrics)])
        self.client.log_batch(run, metrics=points, tags=[RunTag(key, value) for key, value in (tags or {}).items()])

    def log_curve(self, run: str, points: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        """Log points of training curves: (step, values)."""
        metrics = self._new_points(run, points)
        for start in range(0, len(metrics), 900):  # a batch holds at most 1,000
            self.client.log_batch(run, metrics=metrics[start : start + 900])

    def _new_points(self, run: str, points: Sequence[tuple[int, Mapping[str, float]]]) -> list[Any]:
        """The points as MLflow's, without those that a reopened run has already."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        known = self._points.get(run, {})
        values = [(key, step, float(value)) for step, metrics in points for key, value in metrics.items() if math.isfinite(value)]
        new = [(key, step, value) for key, step, value in values if known.get((key, step)) != value]
        if run in self._points:
            known.update({(key, step): value for key, step, value in new})
        return [Metric(key, value, now, step) for key, step, value in new]

    def log_data(self, run: str, name: str, digest: str, source: str, context: str) -> None:
        """Name a data set as an input of the run."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        data = Dataset(name=name, digest=digest[:36], source_type="edgepress", source=source)
        with FileLock(Path(tempfile.gettempdir()) / "edgepress-tracking.lock"):  # MLflow's stores fail when two writers bring one data set
            self.client.log_inputs(run, [DatasetInput(data, [InputTag("mlflow.data.context", context)])])

    def log_file(self, run: str, file: Path) -> None:
        self.client.log_artifact(run, str(file))

    def log_text(self, run: str, text: str, path: str) -> None:
        """Keep a text as an artifact of the run."""
        self.client.log_text(run, text, path)

    def end(self, run: str, status: str, reason: str | None = None) -> None:
        """End a run: FINISHED, FAILED or KILLED. One that had finished before, and was only looked through again, did so when it first did."""
        if reason:
            self.client.set_tag(run, "edgepress.reason", reason[:5000])
            self.client.set_tag(run, "mlflow.note.content", f"**{status.lower()}**: {reason[:4000]}")
        self.client.set_terminated(run, status, end_time=self._ends.get(run) if status == "FINISHED" else None)
