"""MLflow: one run a pipeline, one child run a stage, the same metric names on all of them. Imports no torch.

Run ids are passed explicitly: MLflow's stack of active runs belongs to a thread, and stages run in several.
"""

import getpass
import math
import os
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from compression.errors import EdgepressError
from tasks.store.owner import owner_tag
from tasks.tracking import runs
from tasks.tracking.calls import KEY, OWNER, Call, Point, Sender
from tasks.tracking.connection import answer_required, connect, tracking_uri
from tasks.tracking.delivery import Delivery
from tasks.tracking.errors import TrackingRejected
from tasks.tracking.registry import ModelVersion
from tasks.tracking.runs import SUPERSEDED, OpenRun
from tasks.tracking.runs_view import TAG, view_state

_PENDING = "edgepress-"  # begins our name of a run that MLflow has no id for yet


class Tracking:
    """A connection to MLflow, and the runs of one pipeline. Threads may use it at once; `close` it.

    Attributes:
        uri: The address of MLflow.
        client: MLflow's client.
        experiment: The id of our experiment.
        delivery: Sends what is logged here.
    """

    def __init__(
        self,
        uri: str | None = None,
        outbox: Path | None = None,
        notify: Callable[[str], None] = lambda _: None,
        pause: float = 2.0,
        live_interval: float = 5.0,
    ):
        """Connect to MLflow.

        Args:
            uri: Its address; None: that of the environment.
            outbox: The folder for what MLflow misses or refuses; None: such a call raises TrackingUnavailable or TrackingRejected.
            notify: Gets a sentence for people when MLflow goes away, comes back, or first refuses something.
            pause: Seconds between tries to reach MLflow.
            live_interval: Seconds between points of a curve while its stage still runs.

        Raises:
            EdgepressError: MLflow does not answer now.
        """
        self.uri = uri or tracking_uri()
        self.client, self.experiment = connect(self.uri)
        self.delivery = Delivery(Sender(self.client, self.experiment), self.uri, outbox, notify, pause)
        self._live_interval = live_interval
        self._curves: dict[str, tuple[float, list[Point]]] = {}  # of each run: when points were last sent, and those since

    # --- runs that MLflow has already ---

    def end_orphans(self) -> int:
        """Mark runs whose process is dead as KILLED; returns how many there were. Raises EdgepressError where MLflow does not answer."""
        with answer_required(self.uri):
            return runs.end_orphans(self.client, self.experiment)

    def find_open_run(self, run: str) -> OpenRun | None:
        """Return a pipeline's run, by MLflow's id or our name, and those below it; None where MLflow does not have it (any more).

        Raises EdgepressError where MLflow does not answer.
        """
        with answer_required(self.uri):
            if run.startswith(_PENDING):
                run = self.delivery.sender.latest_run(KEY, run) or run
            return runs.find_open_run(self.client, self.experiment, run)

    def id_of(self, run: str) -> str:
        """Return MLflow's id of a run, as soon as MLflow gave it one."""
        return self.delivery.sender.ids.get(run, run)

    # --- what a run gets ---

    def open_run(
        self,
        name: str,
        *,
        parent: str | None = None,
        tags: Mapping[str, str] | None = None,
        params: Mapping[str, Any] | None = None,
        known: str | None = None,
    ) -> str:
        """Start a run, or continue the known one that has this name, tags and parameters.

        Args:
            name: What the table of runs calls it.
            parent: The run that it is below.
            tags: Its tags.
            params: Its parameters, of any type.
            known: The run to continue.

        Returns:
            MLflow's id, or a name of ours while MLflow does not answer (`id_of`).

        Raises:
            EdgepressError: MLflow refuses a run without a parent; then nothing was started.
        """
        if known is not None:
            self.reopen(known)
            return known
        key = f"{_PENDING}{uuid.uuid4().hex}"
        texts = {name: str(value)[:6000] for name, value in (params or {}).items()}
        all_tags = {OWNER: owner_tag(), "mlflow.user": _user(), **(tags or {})}
        call = Call("create", {"key": key, "name": name, "parent": parent, "tags": all_tags, "params": texts, "time": _now()})
        try:
            self.delivery.attempt(call)
        except TrackingRejected as refusal:
            if parent is None:
                raise EdgepressError(f"MLflow at {self.uri} refuses to open a run: {refusal}; nothing was run") from refusal
            self.delivery.refuse(call, refusal)
        return self.id_of(key)

    def reopen(self, run: str) -> None:
        """Continue a run that was ended, by this process or another. What it has is not logged twice."""
        self.delivery.send("reopen", run=run, owner=owner_tag())

    def supersede(self, run: str, by: str) -> None:
        """Mark a stage's run that another one replaces, because model, data or a library changed."""
        self.delivery.send("log", run=run, points=[], tags={SUPERSEDED: by})

    def log(
        self, run: str, metrics: Mapping[str, float], step: int = 0, tags: Mapping[str, str] | None = None, again: bool = False
    ) -> None:
        """Log metrics and tags. Values that are not finite are left out: MLflow's stores refuse them.

        Args:
            run: The run.
            metrics: Values by name.
            step: The step of all of them.
            tags: Values by name.
            again: Give a step that has another value already this one too; otherwise the first value stays.
        """
        self.delivery.send("log", run=run, points=_points([(step, metrics)]), tags=dict(tags or {}), again=again)

    def log_curve(self, run: str, points: Sequence[tuple[int, Mapping[str, float]]], again: bool = False) -> None:
        """Log points of curves: (step, values). Those that `log_live` sent are not sent again; `again` as in `log`."""
        self._curves.pop(run, None)
        if finite := _points(points):
            self.delivery.send("log", run=run, points=finite, tags={}, again=again)

    def log_live(self, run: str, step: int, values: Mapping[str, float]) -> None:
        """Log a point of a curve while its stage still runs: sent with others every few seconds, so that people can watch it."""
        sent, kept = self._curves.setdefault(run, (time.monotonic(), []))
        kept += _points([(step, values)])
        if time.monotonic() - sent > self._live_interval:
            self._curves[run] = (time.monotonic(), [])
            self.delivery.send("log", run=run, points=kept, tags={})

    def log_system(self, run: str, values: Mapping[str, float], moment: float) -> None:
        """Log figures of the machine at a moment (Unix time)."""
        self.delivery.send("log_system", run=run, values=dict(values), time=int(moment * 1000))

    def describe(self, run: str, text: str, *, cached_identity: str | None = None) -> None:
        """Set the run's description (Markdown). That of a stage from the store links the run that computed it."""
        self.delivery.send("describe", run=run, text=text, identity=cached_identity)

    def log_data(self, run: str, name: str, digest: str, source: str, context: str) -> None:
        """Name a data set as an input of the run."""
        self.delivery.send("log_data", run=run, name=name, digest=digest, source=source, context=context)

    def log_file(self, run: str, file: Path, folder: str | None = None) -> None:
        """Keep a copy of a file as an artifact of the run."""
        self.delivery.send("log_file", run=run, file=str(file.absolute()), folder=folder)

    def log_text(self, run: str, text: str, path: str) -> None:
        """Keep a text as an artifact of the run."""
        self.delivery.send("log_text", run=run, text=text, path=path)

    def register(self, run: str, version: ModelVersion) -> bool:
        """Put the run's artifact into the model registry. Returns False where MLflow refuses."""
        return self.delivery.send("register", run=run, **asdict(version))

    def end(self, run: str, status: str, reason: str | None = None) -> None:
        """End a run: FINISHED, FAILED or KILLED. Points of its curves that were not sent yet go first."""
        if unsent := self._curves.pop(run, (0.0, []))[1]:
            self.delivery.send("log", run=run, points=unsent, tags={})
        self.delivery.send("end", run=run, status=status, time=_now(), reason=reason)

    def share_view(self) -> None:
        """Put the view that `edgepress ui` opens among the saved ones of the experiment, unless it is there."""
        self.delivery.send("share_view", tag=TAG, state=view_state())

    # --- while MLflow does not answer ---

    @property
    def waiting(self) -> int:
        """How many calls wait in the outbox of this process."""
        return self.delivery.waiting

    @property
    def refused(self) -> int:
        """How many calls of this process MLflow answered and refused."""
        return self.delivery.refused

    def flush_leftover(self) -> int:
        """Send what dead processes left in the outbox for this MLflow; returns how many calls. Raises EdgepressError when it goes away meanwhile."""
        return self.delivery.flush_leftover()

    def settle(self, seconds: float) -> int:
        """Wait until every call is sent, at most `seconds`; returns how many calls still wait."""
        return self.delivery.settle(seconds)

    def close(self) -> None:
        """Stop sending. Calls that wait stay on disk."""
        self.delivery.close()


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
