"""The calls that write to MLflow, each as plain JSON that can wait on disk (tasks/tracking/outbox.py), and each safe to send twice. Imports no torch.

A run that was opened while MLflow did not answer has a name of ours, which stands in calls in place of MLflow's id until that is known.
"""

import errno
import os
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from compression.redaction import redacted
from tasks.runners.machine import one_at_a_time

OWNER = "edgepress.owner"
KEY = "edgepress.key"  # tag with our name of a run
REASON = "edgepress.reason"
NOTE = "mlflow.note.content"
COMPUTED = "edgepress.computed"  # tag of a stage's run that computed it, also where that failed later, or was gone on with and found it in the store
LONGEST = 7500  # characters of a description; a tag holds 8,000, and a link may follow
SYSTEM = "system/"  # MLflow's page of a run shows metrics that begin so apart
_BATCH = 900  # points; MLflow takes 1,000
_CARRIERS = ("botocore.", "boto3.", "azure.", "google.api_core.", "google.auth.", "google.resumable_media.", "urllib3.")  # of artifacts
_AT_ONCE = 4  # calls; MLflow opens 15 connections to a database, and gives up on a sixteenth that waits for long, as in a wide sweep

Point = tuple[str, int, float, int]  # metric, step, value, Unix time in milliseconds


class TrackingUnavailable(Exception):
    """MLflow does not answer, or cannot do anything now. Trying again later can help."""


class TrackingRejected(Exception):
    """MLflow answered, and will not do this: trying again does not help."""


class Unexpected(TrackingRejected):
    """A call failed of something that nobody foresaw, a fault of ours or of a library. It is treated as refused, and keeps its traceback."""


@dataclass(frozen=True)
class Call:
    """The name of a method of `Sender` and its arguments, all of them JSON."""

    what: str
    arguments: Mapping[str, Any]

    def document(self) -> dict[str, Any]:
        return {"call": self.what, "arguments": dict(self.arguments)}


@dataclass
class _Known:
    """What MLflow has of a run: values by metric and step, when it began (ms) and, where it had finished before it was reopened, ended."""

    started: int
    points: dict[tuple[str, int], float] = field(default_factory=dict)
    ended: int | None = None


def prepare_mlflow() -> None:
    """Settings that must stand before MLflow is imported. It would try for minutes to reach a server that is away: our outbox waits instead."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"  # it would print the password of an address at the end of every run
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # one, for a connection that the server closed while it was idle
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    import logging

    logging.getLogger("alembic").setLevel(logging.ERROR)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # says every try


def translate(error: Exception) -> NoReturn:
    """Raise what an exception of MLflow, or of what carries artifacts, means: Away or Refused; Unexpected for anything else."""
    if isinstance(error, TrackingUnavailable | TrackingRejected):
        raise error
    kind = _meaning(error)
    if kind is None:
        raise Unexpected(redacted(f"{type(error).__name__}: {error}")) from error
    raise kind(redacted(f"{error}".strip().splitlines()[0]) if f"{error}".strip() else type(error).__name__) from error


def _meaning(error: BaseException | None) -> type[TrackingUnavailable] | type[TrackingRejected] | None:
    """What an exception says of the call, by the status of an answer where there was one; None where it is neither of MLflow nor of a carrier."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import OperationalError, SQLAlchemyError
    from sqlalchemy.exc import TimeoutError as NoConnection

    if error is None:
        return None
    if status := _status(error):
        return TrackingRejected if 400 <= status < 500 and status not in (408, 429) else TrackingUnavailable
    if isinstance(error, FileNotFoundError | PermissionError | ImportError) or (isinstance(error, OSError) and error.errno == errno.EROFS):
        return TrackingRejected
    if isinstance(error, OSError | OperationalError | NoConnection):
        return TrackingUnavailable
    if isinstance(error, SQLAlchemyError):  # a file that is no database, an address that is none
        return TrackingRejected
    # the client's own words for what it met on the way, or for an address or a setting that is wrong; boto3's for what botocore was answered
    own = (
        TrackingRejected
        if isinstance(error, MlflowException)
        else TrackingUnavailable
        if type(error).__module__.startswith(_CARRIERS)
        else None
    )
    return own and (_meaning(error.__cause__ or error.__context__) or own)


def _status(error: BaseException) -> int | None:
    """The HTTP status that was answered, by the names that MLflow, requests, botocore, azure.core and google.api_core give it."""
    from mlflow.exceptions import MlflowException, RestException

    if isinstance(error, MlflowException):
        if said := re.search(r"failed with error code (\d{3})", f"{error}"):  # of a status that it has no name for it makes 500
            return int(said[1])
        told = isinstance(error, RestException) or error.error_code != "INTERNAL_ERROR"  # which is what exceptions without a code have
        return error.get_http_status_code() if told else None
    answer = getattr(error, "response", None)
    if isinstance(answer, dict):  # botocore; S3 answers 400 when a connection was too slow
        late = answer.get("Error", {}).get("Code") == "RequestTimeout"
        return 408 if late else answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
    known = (getattr(answer, "status_code", None), getattr(error, "status_code", None), getattr(error, "code", None))
    return next((int(status) for status in known if isinstance(status, int)), None)


class Sender:
    """Writes to one MLflow store. Threads may use it at once.

    MLflow appends whatever is logged twice. So what a run has is known here: read from MLflow once where another process wrote it.
    """

    def __init__(self, client: Any, experiment: str, ids: Mapping[str, str] | None = None):
        self.client = client
        self.experiment = experiment
        self.ids = dict(ids or {})  # MLflow's ids of runs by our names
        self._runs: dict[str, _Known] = {}
        self._reading = threading.Lock()
        self._turns = threading.BoundedSemaphore(_AT_ONCE)

    def send(self, call: Call, *, perhaps_sent: bool = False) -> None:
        """Carry a call out. `perhaps_sent`: it may have been before, and the answer was lost. Raises Away or Refused."""
        arguments = dict(call.arguments)
        if "run" in arguments:
            arguments["run"] = self.ids.get(arguments["run"], arguments["run"])
        if call.what == "create":
            arguments["perhaps_sent"] = perhaps_sent
        try:
            with self._turns:
                getattr(self, call.what)(**arguments)
        except Exception as error:  # noqa: BLE001  (sorted there)
            translate(error)

    def create(
        self, key: str, name: str, parent: str | None, tags: dict[str, str], params: dict[str, str], time: int, perhaps_sent: bool
    ) -> None:
        """Open a run, which is `key` in calls that come after."""
        from mlflow.entities import Param

        run = self.found(KEY, key) if perhaps_sent else None
        if run is None:
            below = {"mlflow.parentRunId": self.ids.get(parent, parent)} if parent else {}
            run = self.client.create_run(self.experiment, start_time=time, run_name=name, tags={**tags, **below, KEY: key}).info.run_id
            self._runs[run] = _Known(time)
        if params:
            self.client.log_batch(run, params=[Param(*param) for param in params.items()])
        self.ids[key] = run

    def reopen(self, run: str, owner: str) -> None:
        """Go on with a run that was ended: it runs again, and nothing says any more how it ended."""
        known = self.client.get_run(run)
        self.client.set_tag(run, OWNER, owner)
        for tag in known.data.tags.keys() & {REASON, NOTE}:
            self.client.delete_tag(run, tag)
        if known.info.status == "FINISHED":
            self._known(run).ended = known.info.end_time
        self.client.update_run(run, status="RUNNING")

    def share_view(self, tag: str, state: str) -> None:
        """Put a view of the table of runs among those that people share, unless it is there: somebody may have changed it to his taste."""
        if tag not in self.client.get_experiment(self.experiment).tags:
            self.client.set_experiment_tag(self.experiment, tag, state)

    def log(self, run: str, points: list[Point], tags: dict[str, str], again: bool = False) -> None:
        """Metrics and tags. A step of a metric that has a value keeps it, but with `again` gets another after it."""
        from mlflow.entities import Metric, RunTag

        known = self._known(run).points if points else {}
        new = {
            (key, step): Metric(key, value, time, step)
            for key, step, value, time in points
            if (key, step) not in known or (again and known[key, step] != value)
        }
        metrics = list(new.values())
        for start in range(0, max(len(metrics), 1), _BATCH):
            said = [RunTag(key, value) for key, value in tags.items()] if start == 0 else []
            self.client.log_batch(run, metrics=metrics[start : start + _BATCH], tags=said)
        known.update({place: metric.value for place, metric in new.items()})

    def log_system(self, run: str, values: dict[str, float], time: int) -> None:
        """Figures of the machine at a time; their step is the seconds since the run began, whoever goes on with it."""
        step = max(0, time - self._known(run).started) // 1000
        self.log(run, [(SYSTEM + key, step, value, time) for key, value in values.items()], {})

    def describe(self, run: str, text: str, identity: str | None) -> None:
        """The run's description. With `identity` the run that computed it is named: a link, and a tag."""
        text, links = text[:LONGEST], {}
        if identity:
            computed = self.found("edgepress.identity", identity, f"tags.`{COMPUTED}` = 'true'")
            if computed and computed != run:
                links = {"edgepress.computed_by": computed}
                text += f"\n\nComputed by [this run](#/experiments/{self.experiment}/runs/{computed})."
        self.log(run, [], {NOTE: text, **links})

    def log_data(self, run: str, name: str, digest: str, source: str, context: str) -> None:
        """Name a data set as an input of the run."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        data = Dataset(name=name, digest=digest[:36], source_type="edgepress", source=source)
        with one_at_a_time("edgepress-tracking.lock"):  # MLflow's stores fail when two writers bring one data set
            self.client.log_inputs(run, [DatasetInput(data, [InputTag("mlflow.data.context", context)])])

    def log_file(self, run: str, file: str, folder: str | None) -> None:
        self.client.log_artifact(run, file, folder)

    def log_text(self, run: str, text: str, path: str) -> None:
        self.client.log_text(run, text, path)

    def end(self, run: str, status: str, time: int, reason: str | None) -> None:
        """End a run. One that had finished before, and was only looked through again, did so when it first did."""
        if reason:
            self.client.set_tag(run, REASON, reason[:5000])
        before = self._runs[run].ended if run in self._runs and status == "FINISHED" else None
        self.client.set_terminated(run, status, end_time=before or time)

    def register(self, run: str, **what: Any) -> None:
        """Put an artifact into the model registry (tasks/tracking/registry.py)."""
        from tasks.tracking.registry import register

        register(self.client, run, **what)

    def _known(self, run: str) -> _Known:
        with self._reading:
            if run not in self._runs:
                data = self.client.get_run(run)
                keys = [key for key in data.data.metrics if not key.startswith(SYSTEM)]
                history = [point for key in keys for point in self.client.get_metric_history(run, key)]
                points = {(point.key, point.step): point.value for point in sorted(history, key=lambda point: point.timestamp)}
                self._runs[run] = _Known(data.info.start_time, points)
            return self._runs[run]

    def found(self, tag: str, value: str, *more: str) -> str | None:
        """The last run with a tag."""
        wanted = " AND ".join([f"tags.`{tag}` = '{value}'", *more])
        found = self.client.search_runs([self.experiment], wanted, max_results=1, order_by=["attributes.start_time DESC"])
        return found[0].info.run_id if found else None
