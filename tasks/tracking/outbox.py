"""What MLflow missed while it did not answer: calls in order, one file for each process that met this, sent when it answers again.

    <folder>/<name>.jsonl     the address of MLflow, then a call a line; only ever appended to, each line on disk before the flow continues
    <folder>/<name>.sent      how many of them were sent, and MLflow's ids of the runs that were opened without it
    <folder>/<name>.files/    copies of files to send
    <folder>/<name>.lock      held by the process that writes and sends it, and free once that is dead
    <folder>/refused.jsonl    calls that MLflow refused, at once or later, and those that failed unexpectedly (but no copies of files)

A crash can break off the last line. It is not a call: the flow waits until the line is complete. A call may be sent twice (the answer got lost, or the
process died before it noted it), so every call changes nothing the second time (tasks/tracking/calls.py). Imports no torch.
"""

import json
import os
import shutil
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from traceback import format_exception
from typing import Any

from compression.errors import EdgepressError
from compression.files import fsync
from compression.locks import open_lock, try_acquire
from compression.redaction import redacted
from tasks.tracking.calls import Call, Sender
from tasks.tracking.errors import TrackingRejected, Unexpected

_REFUSED = "refused.jsonl"
_NAMES = "[0-9]*-*.jsonl"


class Outbox:
    """An outbox of this process: a new one, or that of a dead process, which this one takes over. Threads may use it at once.

    Attributes:
        uri: The address of MLflow.
        refused: How many of its calls MLflow refused.
    """

    def __init__(self, folder: Path, uri: str, name: str | None = None):
        """Create an outbox, or take over the one called `name`. Raises BlockingIOError where its process lives."""
        folder.mkdir(parents=True, exist_ok=True)
        self.uri = uri
        self.refused = 0
        self._file = folder / f"{name or f'{time.time_ns()}-{uuid.uuid4().hex[:8]}'}.jsonl"
        self._guard = threading.RLock()
        self._sending = threading.Lock()
        self._calls: deque[Call] = deque()
        self._sent = 0
        self._closed = False
        with ExitStack() as stack:
            if not try_acquire(stack.enter_context(open_lock(self._sibling(".lock")))):
                raise BlockingIOError(f"the process of the outbox {self._file} lives")
            self._lock = stack.pop_all()
        if name is None:
            _append(self._file, {"uri": uri})

    @classmethod
    def abandoned(cls, folder: Path) -> Iterator["Outbox"]:
        """Yield the outboxes of dead processes, the oldest first. Close each before the next."""
        for file in sorted(folder.glob(_NAMES)):
            try:
                found = cls(folder, "", file.stem)
            except BlockingIOError:
                continue  # its process lives, and sends it
            if found._read():
                yield found
            else:
                found._remove()

    def __len__(self) -> int:
        return len(self._calls)

    def add(self, call: Call) -> None:
        """Keep a call, on disk when this returns. A file that it sends is copied, for its owner may change it.

        Raises TrackingRejected where the file is gone.
        """
        with self._guard:
            if "file" in call.arguments:
                kept = self._sibling(".files") / uuid.uuid4().hex[:8] / Path(call.arguments["file"]).name
                kept.parent.mkdir(parents=True)
                try:
                    shutil.copyfile(call.arguments["file"], kept)
                except FileNotFoundError as gone:
                    raise TrackingRejected(str(gone)) from gone
                fsync(kept)
                call = Call(call.method, {**call.arguments, "file": str(kept)})
            _append(self._file, call.document())
            self._calls.append(call)

    def send(self, sender: Sender) -> int:
        """Send the calls in order, and set aside those that MLflow refuses; returns how many calls went.

        Raises TrackingUnavailable when MLflow does not answer; the rest stays.
        """
        count = 0
        with self._sending:
            while self._calls and not self._closed:
                try:
                    sender.send(self._calls[0], perhaps_sent=True)
                except TrackingRejected as refusal:
                    self.refused += 1
                    set_aside(self._file.parent, self.uri, self._calls[0], refusal, sender.ids)
                with self._guard:
                    self._sent += 1
                    _append(self._sibling(".sent"), {"sent": self._sent, "ids": sender.ids})
                    self._calls.popleft()
                count += 1
        return count

    def close(self) -> None:
        """Remove the outbox where every call was sent; else leave it to the next process."""
        with self._guard:
            self._closed = True
            if self._calls:
                self._lock.close()
            else:
                self._remove()

    def ids(self) -> dict[str, str]:
        """Return MLflow's ids of the runs that were opened without it, as far as they were sent."""
        lines = _lines(self._sibling(".sent"))
        return lines[-1]["ids"] if lines else {}

    def _read(self) -> bool:
        """Read the calls that were not sent; whether there are any."""
        lines = _lines(self._file)
        if not lines:
            return False
        sent = _lines(self._sibling(".sent"))
        self.uri, self._sent = lines[0]["uri"], sent[-1]["sent"] if sent else 0
        self._calls.extend(Call(line["call"], line["arguments"]) for line in lines[1 + self._sent :])
        return bool(self._calls)

    def _remove(self) -> None:
        for file in (self._file, self._sibling(".sent")):
            file.unlink(missing_ok=True)
        shutil.rmtree(self._sibling(".files"), ignore_errors=True)
        self._sibling(".lock").unlink(missing_ok=True)
        self._lock.close()

    def _sibling(self, suffix: str) -> Path:
        return self._file.with_suffix(suffix)


def set_aside(folder: Path, uri: str, call: Call, refusal: TrackingRejected, ids: Mapping[str, str]) -> None:
    """Append a call that MLflow refused, or that failed unexpectedly, to `refused.jsonl`.

    Args:
        folder: The folder of outboxes.
        uri: The address of MLflow.
        call: The call.
        refusal: The reason.
        ids: MLflow's ids of runs that the call may name by ours.
    """
    folder.mkdir(parents=True, exist_ok=True)
    trace = {"traceback": redacted("".join(format_exception(refusal.__cause__)))} if isinstance(refusal, Unexpected) else {}
    _append(folder / _REFUSED, {"uri": uri, "error": redacted(str(refusal)), **trace, **call.document(), "ids": dict(ids)})


def addresses(folder: Path) -> list[str]:
    """Return the addresses of MLflow for which calls wait."""
    return list(dict.fromkeys(lines[0]["uri"] for file in sorted(folder.glob(_NAMES)) if (lines := _lines(file))))


def waiting(folder: Path) -> int:
    """Return how many calls wait in a folder, of all processes."""
    return sum(max(0, len(_lines(file)) - 1 - len(_lines(file.with_suffix(".sent")))) for file in folder.glob(_NAMES))


def _append(file: Path, document: dict[str, Any]) -> None:
    """Add a line, on disk when this returns."""
    new, line = not file.exists(), json.dumps(document).encode() + b"\n"
    with file.open("ab", buffering=len(line)) as stream:  # in one write: several processes may add to refused.jsonl at once
        stream.write(line)
        stream.flush()
        os.fsync(stream.fileno())
    if new:
        fsync(file.parent)


def _lines(file: Path) -> list[dict[str, Any]]:
    """The complete lines of a file; none where it does not exist. Raises EdgepressError for a damaged one."""
    if not file.exists():
        return []
    complete, _, _ = file.read_bytes().rpartition(b"\n")
    try:
        return [dict(json.loads(line)) for line in complete.splitlines()]
    except (ValueError, TypeError) as error:
        raise EdgepressError(f"{file} is damaged ({error}): move it elsewhere to continue without what MLflow missed") from None
