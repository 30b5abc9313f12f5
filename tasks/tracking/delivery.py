"""Calls on their way to MLflow: sent at once, kept while it does not answer, set aside where it refuses. Imports no torch and no MLflow.

While MLflow does not answer, a call waits in an outbox on disk (tasks/tracking/outbox.py), and every later call behind it, so that they arrive in order.
What MLflow refuses is set aside there: a run ends as its stages do, whatever MLflow makes of it.
"""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compression.redaction import redacted
from tasks.tracking.calls import Call, Sender
from tasks.tracking.connection import answer_required, stored_address
from tasks.tracking.errors import TrackingRejected, TrackingUnavailable, Unexpected
from tasks.tracking.outbox import Outbox, set_aside


class Delivery:
    """Sends calls to one MLflow store in order. Threads may use it at once; `close` it.

    Attributes:
        sender: Carries a call out.
        refused: How many calls of this process MLflow answered and refused.
    """

    def __init__(self, sender: Sender, uri: str, folder: Path | None, notify: Callable[[str], None], pause: float):
        """
        Args:
            sender: Carries a call out.
            uri: The address of MLflow.
            folder: Of the outbox. None: a call that MLflow misses or refuses raises.
            notify: Gets a sentence for people when MLflow goes away, comes back, or first refuses something.
            pause: Seconds between tries to reach MLflow.
        """
        self.sender = sender
        self.refused = 0
        self._uri, self._stored_uri = uri, stored_address(uri)
        self._folder = folder
        self._notify = lambda text: notify(redacted(text))
        self._pause = pause
        self._outbox: Outbox | None = None
        self._guard = threading.RLock()
        self._wake, self._closed = threading.Event(), False

    @property
    def waiting(self) -> int:
        """How many calls wait in the outbox of this process."""
        return len(self._outbox) if self._outbox is not None else 0

    def send(self, method: str, **arguments: Any) -> bool:
        """Call a method of `Sender`, now or behind the calls that wait. Returns False where MLflow refuses it (its run was deleted)."""
        call = Call(method, arguments)
        try:
            self.attempt(call)
        except TrackingRejected as refusal:
            self.refuse(call, refusal)
            return False
        return True

    def attempt(self, call: Call) -> None:
        """Send a call, now or behind those that wait. Raises TrackingRejected where MLflow refuses it."""
        with self._guard:
            if self._outbox is not None:
                self._outbox.add(call)
                return
        try:
            self.sender.send(call)
        except TrackingUnavailable as away:
            if self._folder is None:
                raise
            self._postpone(call, self._folder, str(away))

    def refuse(self, call: Call, refusal: TrackingRejected) -> None:
        """Set a refused call aside, and say so the first time: what is wrong with one call is likely wrong with the next thousand."""
        if self._folder is None:
            raise refusal
        with self._guard:
            set_aside(self._folder, self._stored_uri, call, refusal, self.sender.ids)
            self.refused += 1
            if self.refused == 1:
                event = f"`{call.method}` failed unexpectedly" if isinstance(refusal, Unexpected) else f"refuses `{call.method}`"
                self._notify(
                    f"MLflow at {self._uri}: {event} ({refusal}); the run continues, and what MLflow refuses is kept in "
                    f"{self._folder}/refused.jsonl"
                )

    def flush_leftover(self) -> int:
        """Send what dead processes left in the outbox for this MLflow; returns how many calls. Raises EdgepressError when it goes away meanwhile."""
        if self._folder is None or not self._folder.is_dir():
            return 0
        count = 0
        for box in Outbox.abandoned(self._folder):
            try:
                if redacted(box.uri) == self._stored_uri:
                    with answer_required(self._uri):
                        count += self._deliver(box, Sender(self.sender.client, self.sender.experiment, box.ids()))
            finally:
                box.close()
        return count

    def settle(self, seconds: float) -> int:
        """Wait until every call is sent, at most `seconds`; returns how many calls still wait."""
        deadline = time.monotonic() + seconds
        while self.waiting and time.monotonic() < deadline:
            self._wake.set()
            time.sleep(0.3)
        return self.waiting

    def close(self) -> None:
        """Stop sending. Calls that wait stay on disk."""
        self._closed = True
        self._wake.set()
        with self._guard:
            if self._outbox is not None:
                self._outbox.close()
                self._outbox = None

    def _postpone(self, call: Call, folder: Path, reason: str) -> None:
        with self._guard:
            if self._outbox is None:
                self._notify(
                    f"MLflow at {self._uri} does not answer ({reason}); what it misses is kept in {folder}, and sent when it answers"
                )
                self._outbox = Outbox(folder, self._stored_uri)
                threading.Thread(target=self._send_when_back, args=[self._outbox], daemon=True, name="outbox").start()
            self._outbox.add(call)

    def _send_when_back(self, box: Outbox) -> None:
        """Try until every call is sent; the stages continue meanwhile."""
        warned = False
        while not self._closed:
            self._wake.wait(self._pause)
            self._wake.clear()
            try:
                self._deliver(box, self.sender)
            except TrackingUnavailable:
                continue
            except Exception as error:  # noqa: BLE001  (the outbox itself failed, as on a full disk; this thread is the only one that sends)
                if not warned:
                    warned = True
                    self._notify(f"what MLflow at {self._uri} misses cannot be sent ({type(error).__name__}: {error}); it is tried again")
                continue
            with self._guard:
                if len(box) == 0 and self._outbox is box:
                    self._outbox = None
                    box.close()
                    self._notify(f"MLflow at {self._uri} answers again and has everything")
                    return

    def _deliver(self, box: Outbox, sender: Sender) -> int:
        before = box.refused
        count = box.send(sender)
        if refused := box.refused - before:
            if box is self._outbox:
                self.refused += refused
            self._notify(f"MLflow at {self._uri} refused {refused} calls that waited; they are in {self._folder}/refused.jsonl")
        return count
