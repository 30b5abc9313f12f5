"""The calls that write to MLflow, each as plain JSON that can wait on disk (tasks/tracking/outbox.py). Imports no torch.

Each changes nothing the second time: MLflow appends whatever is logged twice, so `Sender` knows what a run has. A run that was opened while MLflow did
not answer has a name of ours, which replaces MLflow's id in calls until that is known. Calls of an older version may wait on disk: methods and their
arguments keep their names.
"""

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tasks.runners.machine import one_at_a_time
from tasks.tracking.errors import translate
from tasks.tracking.registry import ModelVersion, register

OWNER = "edgepress.owner"
KEY = "edgepress.key"  # tag with our name of a run
REASON = "edgepress.reason"
NOTE = "mlflow.note.content"
COMPUTED = "edgepress.computed"  # tag of a stage's run that computed it, also where that failed later, or found it in the store when it was resumed
LONGEST = 7500  # characters of a description; a tag holds 8,000, and a link may follow
SYSTEM = "system/"  # MLflow's page of a run shows metrics with this prefix apart
_BATCH = 900  # points; MLflow takes 1,000
_CONCURRENT = 4  # calls; MLflow opens 15 connections to a database, and a sixteenth fails when it waits for long, as in a wide sweep

Point = tuple[str, int, float, int]  # metric, step, value, Unix time in milliseconds


@dataclass(frozen=True)
class Call:
    """The name of a method of `Sender` and its arguments, all of them JSON."""

    method: str
    arguments: Mapping[str, Any]

    def document(self) -> dict[str, Any]:
        """Return the call as a line of an outbox."""
        return {"call": self.method, "arguments": dict(self.arguments)}


@dataclass
class _Known:
    """What MLflow has of a run: its start (Unix time in ms), values by metric and step, and its end where it had finished before it was reopened."""

    started: int
    points: dict[tuple[str, int], float] = field(default_factory=dict)
    ended: int | None = None


class Sender:
    """Carries out calls on one MLflow store. Threads may use it at once.

    Attributes:
        client: MLflow's client.
        experiment: The id of our experiment.
        ids: MLflow's ids of runs by our names.
    """

    def __init__(self, client: Any, experiment: str, ids: Mapping[str, str] | None = None):
        self.client = client
        self.experiment = experiment
        self.ids = dict(ids or {})
        self._runs: dict[str, _Known] = {}
        self._reading = threading.Lock()
        self._slots = threading.BoundedSemaphore(_CONCURRENT)

    def send(self, call: Call, *, perhaps_sent: bool = False) -> None:
        """Carry a call out.

        Args:
            call: The call.
            perhaps_sent: It may have been sent before, and the answer was lost.

        Raises:
            TrackingUnavailable: Trying again later can help.
            TrackingRejected: It cannot.
        """
        arguments = dict(call.arguments)
        if "run" in arguments:
            arguments["run"] = self.ids.get(arguments["run"], arguments["run"])
        if call.method == "create":
            arguments["perhaps_sent"] = perhaps_sent
        try:
            with self._slots:
                getattr(self, call.method)(**arguments)
        except Exception as error:  # noqa: BLE001  (sorted there)
            translate(error)

    def create(
        self, key: str, name: str, parent: str | None, tags: dict[str, str], params: dict[str, str], time: int, perhaps_sent: bool
    ) -> None:
        """Open a run; `key` names it in later calls."""
        from mlflow.entities import Param

        run = self.latest_run(KEY, key) if perhaps_sent else None
        if run is None:
            below = {"mlflow.parentRunId": self.ids.get(parent, parent)} if parent else {}
            run = self.client.create_run(self.experiment, start_time=time, run_name=name, tags={**tags, **below, KEY: key}).info.run_id
            self._runs[run] = _Known(time)
        if params:
            self.client.log_batch(run, params=[Param(*param) for param in params.items()])
        self.ids[key] = run

    def reopen(self, run: str, owner: str) -> None:
        """Continue a run that was ended: it runs again, and loses what said how it ended."""
        known = self.client.get_run(run)
        self.client.set_tag(run, OWNER, owner)
        for tag in known.data.tags.keys() & {REASON, NOTE}:
            self.client.delete_tag(run, tag)
        if known.info.status == "FINISHED":
            self._known(run).ended = known.info.end_time
        self.client.update_run(run, status="RUNNING")

    def share_view(self, tag: str, state: str) -> None:
        """Put a view of the table of runs among the shared ones, unless it is there: somebody may have changed it."""
        if tag not in self.client.get_experiment(self.experiment).tags:
            self.client.set_experiment_tag(self.experiment, tag, state)

    def log(self, run: str, points: list[Point], tags: dict[str, str], again: bool = False) -> None:
        """Log metrics and tags. A step of a metric that has a value keeps it; with `again` it gets another one too."""
        from mlflow.entities import Metric, RunTag

        known = self._known(run).points if points else {}
        new = {
            (key, step): Metric(key, value, time, step)
            for key, step, value, time in points
            if (key, step) not in known or (again and known[key, step] != value)
        }
        metrics = list(new.values())
        for start in range(0, max(len(metrics), 1), _BATCH):
            run_tags = [RunTag(key, value) for key, value in tags.items()] if start == 0 else []
            self.client.log_batch(run, metrics=metrics[start : start + _BATCH], tags=run_tags)
        known.update({position: metric.value for position, metric in new.items()})

    def log_system(self, run: str, values: dict[str, float], time: int) -> None:
        """Log figures of the machine at a time. Their step is the seconds since the run began, also in a process that resumes it."""
        step = max(0, time - self._known(run).started) // 1000
        self.log(run, [(SYSTEM + key, step, value, time) for key, value in values.items()], {})

    def describe(self, run: str, text: str, identity: str | None) -> None:
        """Set the run's description. With `identity` it links the run that computed this identity, and a tag names that run."""
        text, links = text[:LONGEST], {}
        if identity:
            computed = self.latest_run("edgepress.identity", identity, f"tags.`{COMPUTED}` = 'true'")
            if computed and computed != run:
                links = {"edgepress.computed_by": computed}
                text += f"\n\nComputed by [this run](#/experiments/{self.experiment}/runs/{computed})."
        self.log(run, [], {NOTE: text, **links})

    def log_data(self, run: str, name: str, digest: str, source: str, context: str) -> None:
        """Name a data set as an input of the run."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        data = Dataset(name=name, digest=digest[:36], source_type="edgepress", source=source)
        with one_at_a_time("edgepress-tracking.lock"):  # MLflow's stores fail when two writers log the same data set
            self.client.log_inputs(run, [DatasetInput(data, [InputTag("mlflow.data.context", context)])])

    def log_file(self, run: str, file: str, folder: str | None) -> None:
        """Keep a copy of a file as an artifact of the run."""
        self.client.log_artifact(run, file, folder)

    def log_text(self, run: str, text: str, path: str) -> None:
        """Keep a text as an artifact of the run."""
        self.client.log_text(run, text, path)

    def end(self, run: str, status: str, time: int, reason: str | None) -> None:
        """End a run. One that had finished before keeps its first end."""
        if reason:
            self.client.set_tag(run, REASON, reason[:5000])
        before = self._runs[run].ended if run in self._runs and status == "FINISHED" else None
        self.client.set_terminated(run, status, end_time=before or time)

    def register(self, run: str, **version: Any) -> None:
        """Put an artifact into the model registry; `version` has the fields of `ModelVersion`."""
        register(self.client, run, ModelVersion(**version))

    def _known(self, run: str) -> _Known:
        with self._reading:
            if run not in self._runs:
                data = self.client.get_run(run)
                keys = [key for key in data.data.metrics if not key.startswith(SYSTEM)]
                history = [point for key in keys for point in self.client.get_metric_history(run, key)]
                points = {(point.key, point.step): point.value for point in sorted(history, key=lambda point: point.timestamp)}
                self._runs[run] = _Known(data.info.start_time, points)
            return self._runs[run]

    def latest_run(self, tag: str, value: str, *conditions: str) -> str | None:
        """Return the latest run with this value of a tag that meets further conditions of MLflow's filter language."""
        condition = " AND ".join([f"tags.`{tag}` = '{value}'", *conditions])
        found = self.client.search_runs([self.experiment], condition, max_results=1, order_by=["attributes.start_time DESC"])
        return found[0].info.run_id if found else None
