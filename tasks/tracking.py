"""MLflow: one run a pipeline, one child run a stage, the same metric names on all of them. Imports no torch.

Run ids are passed explicitly: MLflow's stack of active runs belongs to a thread, and stages run in several.
"""

import math
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from tasks.owner import is_dead, owner_tag

EXPERIMENT = "edgepress"
_OWNER = "edgepress.owner"


def tracking_uri() -> str:
    """`MLFLOW_TRACKING_URI`, or a sqlite file in the current directory."""
    return os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"


class Tracking:
    """A connection to the tracking server, and the runs of one pipeline."""

    def __init__(self, uri: str | None = None):
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
        import logging

        logging.getLogger("alembic").setLevel(logging.ERROR)
        from mlflow import MlflowClient

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

    def open_run(
        self, name: str, *, parent: str | None = None, tags: Mapping[str, str] | None = None, params: Mapping[str, Any] | None = None
    ) -> str:  # fmt: skip
        """Start a run (below `parent`) and return its id."""
        tags = {_OWNER: owner_tag(), **(tags or {}), **({"mlflow.parentRunId": parent} if parent else {})}
        run = self.client.create_run(self.experiment, run_name=name, tags=tags)
        if params:
            from mlflow.entities import Param

            self.client.log_batch(run.info.run_id, params=[Param(key, str(value)[:6000]) for key, value in params.items()])
        return run.info.run_id

    def reopen(self, run: str) -> None:
        """Continue a run that was ended, for a stage that is tried again."""
        self.client.update_run(run, status="RUNNING")

    def log(self, run: str, metrics: Mapping[str, float], step: int = 0, tags: Mapping[str, str] | None = None) -> None:
        """Log metrics (and tags) in one request. Values that are no number are left out: MLflow's stores refuse them."""
        from mlflow.entities import Metric, RunTag

        now = int(time.time() * 1000)
        points = [Metric(key, float(value), now, step) for key, value in metrics.items() if math.isfinite(value)]
        self.client.log_batch(run, metrics=points, tags=[RunTag(key, value) for key, value in (tags or {}).items()])

    def log_curve(self, run: str, points: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        """Log points of training curves: (step, values)."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(key, float(value), now, step) for step, values in points for key, value in values.items() if math.isfinite(value)]
        for start in range(0, len(metrics), 900):  # a batch holds at most 1,000
            self.client.log_batch(run, metrics=metrics[start : start + 900])

    def log_data(self, run: str, name: str, digest: str, source: str, context: str) -> None:
        """Name a data set as an input of the run."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        data = Dataset(name=name, digest=digest[:36], source_type="edgepress", source=source)
        with FileLock(Path(tempfile.gettempdir()) / "edgepress-tracking.lock"):  # MLflow's stores fail when two writers bring one data set
            self.client.log_inputs(run, [DatasetInput(data, [InputTag("mlflow.data.context", context)])])

    def log_file(self, run: str, file: Path, folder: str | None = None) -> None:
        self.client.log_artifact(run, str(file), folder)

    def end(self, run: str, status: str, reason: str | None = None) -> None:
        """End a run: FINISHED, FAILED or KILLED."""
        if reason:
            self.client.set_tag(run, "edgepress.reason", reason[:5000])
            self.client.set_tag(run, "mlflow.note.content", f"**{status.lower()}**: {reason[:4000]}")
        self.client.set_terminated(run, status)
