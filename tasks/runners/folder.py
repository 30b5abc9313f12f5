"""The folder of a job, the only connection between its child and the process that waits for it. Imports no torch.

job.json      the call and its arguments
job.lock      locked by the child while it lives: there is never more than one in a folder
events.jsonl  its progress, metrics and warnings; {"started": host/pid} is the first event of each child
log.txt       what it printed
result.json   or error.json: how it ended
"""

import json
from pathlib import Path

from tasks.runners.executor import EventHandler


def prepare_folder(folder: Path) -> None:
    """Create the folder of a job, without the results and events of an earlier job."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("result.json", "error.json", "events.jsonl"):
        (folder / name).unlink(missing_ok=True)


class EventReader:
    """Reads the events of a folder as they are written."""

    def __init__(self, folder: Path):
        self._file = folder / "events.jsonl"
        self._position = 0
        self._starts = 0

    def forward(self, on_event: EventHandler) -> None:
        """Pass on the events since the last call."""
        if not self._file.exists():
            return
        with self._file.open("rb") as stream:
            stream.seek(self._position)
            complete, newline, _ = stream.read().rpartition(b"\n")
        self._position += len(complete) + len(newline)
        for line in complete.splitlines():
            try:
                event = json.loads(line)
            except ValueError:
                continue  # half a line: its writer was killed, and the next one started a new line
            if "started" not in event:
                on_event(event)
                continue
            self._starts += 1
            if self._starts > 1:
                on_event({"restarted": f"its worker was lost; restarted on {event['started']}"})
