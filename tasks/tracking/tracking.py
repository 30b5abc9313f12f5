"""MLflow: one run a pipeline, one child run a stage, the same metric names on all of them. Imports no torch.

Run ids are passed explicitly: MLflow's stack of active runs belongs to a thread, and stages run in several. What MLflow misses while it does
not answer waits in an outbox on disk (tasks/tracking/outbox.py), and everything after it too, so that it arrives in order. What it answers and refuses
is set aside there, and said: a run ends as its stages do, whatever MLflow makes of it.
"""

import getpass
import math
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compression.errors import EdgepressError
from compression.redaction import MASK, redacted
from tasks.store.owner import is_dead, owner_tag
from tasks.tracking.calls import (
    KEY,
    OWNER,
    REASON,
    Call,
    Point,
    Sender,
    TrackingRejected,
    TrackingUnavailable,
    Unexpected,
    prepare_mlflow,
    translate,
)
from tasks.tracking.database import make_database
from tasks.tracking.outbox import Outbox, set_aside
from tasks.tracking.runs_view import RUN, TAG, view_state

EXPERIMENT = "edgepress"
_PENDING = "edgepress-"  # begins our name of a run that MLflow has no id for yet
_PAUSE = 2.0  # seconds between tries to reach MLflow
_PAGE = 1000  # runs that MLflow is asked for at once
_LIVE = 5.0  # seconds between points of a curve that is still being made


def tracking_uri() -> str:
    """`MLFLOW_TRACKING_URI`, or a sqlite file in the current directory."""
    return os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"


@dataclass(frozen=True)
class OpenRun:
    """The runs of a pipeline that may be gone on with: its own, those of cells by name, those of stages by name and identity."""

    run: str
    cells: Mapping[str, str]
    stages: Mapping[tuple[str, str], str]
    name: str = ""  # by which the table of runs groups them


class Tracking:
    """A connection to MLflow, and the runs of one pipeline. Threads may use it at once; `close` it."""

    def __init__(self, uri: str | None = None, outbox: Path | None = None, say: Callable[[str], None] = lambda _: None):
        """
        outbox  folder for what MLflow misses or refuses; without one such a call raises Away or Refused
        say     gets a word for people when MLflow goes away and comes back, and when it first refuses something
        Raises EdgepressError where MLflow does not answer now.
        """
        prepare_mlflow()
        self.uri = uri or tracking_uri()
        self.kept_uri = redacted(absolute_uri(self.uri))  # as files have it
        self._folder, self._say = outbox, lambda text: say(redacted(text))
        self._outbox: Outbox | None = None
        self._guard = threading.RLock()
        self._wake, self._closed = threading.Event(), False
        self.refused = 0  # calls of this process that MLflow answered, and refused
        self._curves: dict[str, tuple[float, list[Point]]] = {}  # of each run: when points were last sent, and those since
        self.client, self.experiment = _connect(self.uri)
        self._sender = Sender(self.client, self.experiment)

    # --- what there is ---

    def end_orphans(self) -> int:
        """Mark runs whose process is dead as KILLED; returns how many there were. Raises EdgepressError where MLflow does not answer."""
        with _answering(self.uri):
            running = self._search("attributes.status = 'RUNNING'")  # all pages before the first is ended, or later ones would move up
            dead = [run for run in running if OWNER in run.data.tags and is_dead(run.data.tags[OWNER])]
            for run in dead:
                self.client.set_tag(run.info.run_id, REASON, "its process was killed")
                self.client.set_terminated(run.info.run_id, "KILLED")
        return len(dead)

    def find_open_run(self, run: str) -> OpenRun | None:
        """What there is of a pipeline's run and of those below it; None where the tracking server does not have it (any more).

        Raises EdgepressError where MLflow does not answer.
        """
        with _answering(self.uri):
            return self._find_open_run(run)

    def _find_open_run(self, run: str) -> OpenRun | None:
        from mlflow.exceptions import MlflowException

        if run.startswith(_PENDING):
            run = self._sender.found(KEY, run) or run
        try:
            known = self.client.get_run(run)
            if known.info.lifecycle_stage != "active":
                return None
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        below = self._children(run)
        cells = {child.info.run_name: child.info.run_id for child in below if child.data.tags.get("edgepress.kind") == "cell"}
        stages = [child for child in [*below, *(inner for cell in cells.values() for inner in self._children(cell))]
                  if child.data.tags.get("edgepress.kind") == "stage" and "edgepress.superseded" not in child.data.tags]  # fmt: skip
        by_identity = {(s.data.tags["edgepress.stage"], s.data.tags["edgepress.identity"]): s.info.run_id for s in stages}
        return OpenRun(run, cells, by_identity, known.data.tags.get(RUN, ""))

    def _children(self, run: str) -> list[Any]:
        return self._search(f"tags.`mlflow.parentRunId` = '{run}'")

    def _search(self, wanted: str) -> list[Any]:
        """All runs that a filter of MLflow matches."""
        found: list[Any] = []
        token = None
        while True:
            page = self.client.search_runs([self.experiment], wanted, max_results=_PAGE, page_token=token)
            found += page
            token = page.token
            if not token:
                return found

    # --- runs ---

    def open_run(
        self, name: str, *, parent: str | None = None, tags: Mapping[str, str] | None = None, params: Mapping[str, Any] | None = None,
        known: str | None = None,
    ) -> str:  # fmt: skip
        """Start a run (below `parent`), or go on with the `known` one that has this name, tags and parameters.

        Returns its id: MLflow's, or a name of ours while MLflow does not answer (`id_of`). Raises EdgepressError where MLflow refuses a run that is
        below none: then nothing has begun.
        """
        if known is not None:
            self.reopen(known)
            return known
        key = f"{_PENDING}{uuid.uuid4().hex}"
        texts = {name: str(value)[:6000] for name, value in (params or {}).items()}
        said = {OWNER: owner_tag(), "mlflow.user": _user(), **(tags or {})}
        call = Call("create", {"key": key, "name": name, "parent": parent, "tags": said, "params": texts, "time": _now()})
        try:
            self._attempt(call)
        except TrackingRejected as refusal:
            if parent is None:
                raise EdgepressError(f"MLflow at {self.uri} refuses to open a run: {refusal}; nothing was run") from refusal
            self._refuse(call, refusal)
        return self.id_of(key)

    def share_view(self) -> None:
        """Put the view that `edgepress ui` opens among the saved ones of the experiment, unless it is there."""
        self._send("share_view", tag=TAG, state=view_state())

    def id_of(self, run: str) -> str:
        """MLflow's id of a run, as soon as MLflow gave it one."""
        return self._sender.ids.get(run, run)

    def reopen(self, run: str) -> None:
        """Continue a run that was ended, by this process or another. What it has is not logged twice."""
        self._send("reopen", run=run, owner=owner_tag())

    def supersede(self, run: str, by: str) -> None:
        """Mark a stage's run whose place another one takes, because model, data or a library became another."""
        self._send("log", run=run, points=[], tags={"edgepress.superseded": by})

    def log(
        self, run: str, metrics: Mapping[str, float], step: int = 0, tags: Mapping[str, str] | None = None, again: bool = False
    ) -> None:  # fmt: skip
        """Log metrics (and tags). Values that are no number are left out: MLflow's stores refuse them.

        again  a step that has another value already gets this one too; without it the first value stays
        """
        self._send("log", run=run, points=_points([(step, metrics)]), tags=dict(tags or {}), again=again)

    def log_curve(self, run: str, points: Sequence[tuple[int, Mapping[str, float]]], again: bool = False) -> None:
        """Log points of curves: (step, values). Those that `log_live` sent are not sent again; `again` as in `log`."""
        self._curves.pop(run, None)
        if whole := _points(points):
            self._send("log", run=run, points=whole, tags={}, again=again)

    def log_live(self, run: str, step: int, values: Mapping[str, float]) -> None:
        """A point of a curve that is still being made: sent with others every few seconds, so that people can watch it."""
        sent, kept = self._curves.setdefault(run, (time.monotonic(), []))
        kept += _points([(step, values)])
        if time.monotonic() - sent > _LIVE:
            self._curves[run] = (time.monotonic(), [])
            self._send("log", run=run, points=kept, tags={})

    def log_system(self, run: str, values: Mapping[str, float], moment: float) -> None:
        """Figures of the machine at a moment (Unix time)."""
        self._send("log_system", run=run, values=dict(values), time=int(moment * 1000))

    def describe(self, run: str, text: str, *, cached_identity: str | None = None) -> None:
        """The run's description (Markdown). Of a stage that came from the store it links the run that computed it."""
        self._send("describe", run=run, text=text, identity=cached_identity)

    def log_data(self, run: str, name: str, digest: str, source: str, context: str) -> None:
        """Name a data set as an input of the run."""
        self._send("log_data", run=run, name=name, digest=digest, source=source, context=context)

    def log_file(self, run: str, file: Path, folder: str | None = None) -> None:
        self._send("log_file", run=run, file=str(file.absolute()), folder=folder)

    def log_text(self, run: str, text: str, path: str) -> None:
        """Keep a text as an artifact of the run."""
        self._send("log_text", run=run, text=text, path=path)

    def register(self, run: str, **what: Any) -> bool:
        """Put an artifact into the model registry: the arguments are those of tasks.tracking.registry.register. Returns False where MLflow refuses."""
        return self._send("register", run=run, **what)

    def end(self, run: str, status: str, reason: str | None = None) -> None:
        """End a run: FINISHED, FAILED or KILLED. Points of its curves that are held still go first."""
        if held := self._curves.pop(run, (0.0, []))[1]:
            self._send("log", run=run, points=held, tags={})
        self._send("end", run=run, status=status, time=_now(), reason=reason)

    # --- while MLflow is away ---

    @property
    def waiting(self) -> int:
        """How many calls wait in the outbox of this process."""
        return len(self._outbox) if self._outbox is not None else 0

    def flush_leftover(self) -> int:
        """Send what dead processes left in the outbox for this MLflow; returns how many calls. Raises EdgepressError when it goes away meanwhile."""
        if self._folder is None or not self._folder.is_dir():
            return 0
        count = 0
        for box in Outbox.left(self._folder):
            try:
                if redacted(box.uri) == self.kept_uri:
                    with _answering(self.uri):
                        count += self._deliver(box, Sender(self.client, self.experiment, box.ids()))
            finally:
                box.close()
        return count

    def settle(self, seconds: float) -> int:
        """Wait until everything is sent, or so long; returns how many calls wait still."""
        deadline = time.monotonic() + seconds
        while self.waiting and time.monotonic() < deadline:
            self._wake.set()
            time.sleep(0.3)
        return self.waiting

    def close(self) -> None:
        """End the sending. What waits stays on disk."""
        self._closed = True
        self._wake.set()
        with self._guard:
            if self._outbox is not None:
                self._outbox.close()
                self._outbox = None

    def _send(self, what: str, **arguments: Any) -> bool:
        """Send a call now, or behind those that wait. One that MLflow refuses (its run was deleted) is set aside, and False returned."""
        call = Call(what, arguments)
        try:
            self._attempt(call)
        except TrackingRejected as refusal:
            self._refuse(call, refusal)
            return False
        return True

    def _attempt(self, call: Call) -> None:
        """Send a call now, or behind those that wait. Raises Refused."""
        with self._guard:
            if self._outbox is not None:
                self._outbox.add(call)
                return
        try:
            self._sender.send(call)
        except TrackingUnavailable as away:
            if self._folder is None:
                raise
            self._keep(call, str(away))

    def _refuse(self, call: Call, refusal: TrackingRejected) -> None:
        """Keep what MLflow refused, and say so the first time: what is wrong with one call is likely wrong with the next thousand."""
        if self._folder is None:
            raise refusal
        with self._guard:
            set_aside(self._folder, self.kept_uri, call, refusal, self._sender.ids)
            self.refused += 1
            if self.refused == 1:
                what = f"`{call.what}` failed unexpectedly" if isinstance(refusal, Unexpected) else f"refuses `{call.what}`"
                self._say(
                    f"MLflow at {self.uri}: {what} ({refusal}); the run goes on, and what MLflow refuses is kept in "
                    f"{self._folder}/refused.jsonl"
                )

    def _keep(self, call: Call, reason: str) -> None:
        with self._guard:
            if self._outbox is None:
                assert self._folder is not None
                self._say(
                    f"MLflow at {self.uri} does not answer ({reason}); what it misses is kept in {self._folder}, and sent when it answers"
                )
                self._outbox = Outbox(self._folder, self.kept_uri)
                threading.Thread(target=self._send_when_back, args=[self._outbox], daemon=True, name="outbox").start()
            self._outbox.add(call)

    def _send_when_back(self, box: Outbox) -> None:
        """Try until all is sent; the stages go on meanwhile."""
        warned = False
        while not self._closed:
            self._wake.wait(_PAUSE)
            self._wake.clear()
            try:
                self._deliver(box, self._sender)
            except TrackingUnavailable:
                continue
            except Exception as error:  # noqa: BLE001  (the outbox itself failed, as on a full disk; this thread is the only one that sends)
                if not warned:
                    warned = True
                    self._say(f"what MLflow at {self.uri} misses cannot be sent ({type(error).__name__}: {error}); it is tried again")
                continue
            with self._guard:
                if len(box) == 0 and self._outbox is box:
                    self._outbox = None
                    box.close()
                    self._say(f"MLflow at {self.uri} answers again and has everything")
                    return

    def _deliver(self, box: Outbox, sender: Sender) -> int:
        before = box.refused
        count = box.send(sender)
        if box.refused > before:
            if box is self._outbox:
                self.refused += box.refused - before
            self._say(f"MLflow at {self.uri} refused {box.refused - before} calls that waited; they are in {self._folder}/refused.jsonl")
        return count


def whole_address(kept: str) -> str:
    """An address as files have it, which keep neither user nor password: with those of `MLFLOW_TRACKING_URI`, where it is that address.

    Raises EdgepressError where it is not.
    """
    if redacted(absolute_uri(tracking_uri())) == redacted(kept):
        return tracking_uri()
    if MASK in kept:
        raise EdgepressError(f"MLflow at {kept} needs a user or a password, which is not kept: give the address in MLFLOW_TRACKING_URI")
    return kept


def absolute_uri(uri: str) -> str:
    """The address, of a sqlite file relative to this directory that from the root: an outbox may be sent from elsewhere."""
    path = uri.removeprefix("sqlite:///")
    return uri if path == uri or path.startswith("/") else f"sqlite:///{Path(path).absolute()}"


def _connect(uri: str) -> tuple[Any, str]:
    """A client and the id of our experiment. Raises EdgepressError where MLflow does not answer."""
    from mlflow import MlflowClient

    with _answering(uri):
        make_database(uri)
        client = MlflowClient(uri)
        return client, _experiment(client)


@contextmanager
def _answering(uri: str) -> Iterator[None]:
    """Raise EdgepressError for whatever goes wrong in the block, which asks MLflow before a run begins."""
    try:
        yield
    except Exception as error:  # noqa: BLE001  (sorted there)
        try:
            translate(error)
        except (TrackingUnavailable, TrackingRejected) as known:
            raise EdgepressError(
                f"MLflow at {uri} does not answer: {known}. Start it, or set MLFLOW_TRACKING_URI to another (unset: a file mlflow.db here); "
                "nothing was run"
            ) from known


def _experiment(client: Any) -> str:
    """The id of our experiment, which is made once, whoever comes first."""
    from mlflow.exceptions import MlflowException

    if found := client.get_experiment_by_name(EXPERIMENT):
        return found.experiment_id
    try:
        return client.create_experiment(EXPERIMENT, tags={"mlflow.experimentKind": "custom_model_development"})
    except MlflowException as error:
        found = client.get_experiment_by_name(EXPERIMENT) if error.error_code == "RESOURCE_ALREADY_EXISTS" else None
        if found is None:
            raise
        return found.experiment_id


def _points(values: Sequence[tuple[int, Mapping[str, float]]]) -> list[Point]:
    now = _now()
    return [(key, step, float(value), now) for step, metrics in values for key, value in metrics.items() if math.isfinite(value)]


def _now() -> int:
    return int(time.time() * 1000)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return str(os.getuid())
