"""The folder of a job, which its child and whoever waits for it share: nothing else passes between them. Imports no torch.

job.json      what the child is told
job.lock      held by the child while it lives: there is never more than one in a folder
events.jsonl  what it says while it works; a child begins with {"started": host/pid}, so that the next one is told from it
log.txt       what it printed
result.json   or error.json: how it ended
"""

import json
from pathlib import Path

from tasks.runners.executor import EventHandler


def cleared(folder: Path) -> None:
    """Make the folder ready for a job: nothing of the one before is taken for its own."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("result.json", "error.json", "events.jsonl"):
        (folder / name).unlink(missing_ok=True)


class EventReader:
    """The events of a folder, read as they are written."""

    def __init__(self, folder: Path):
        self._file = folder / "events.jsonl"
        self._position = 0
        self._starts = 0

    def forward(self, on_event: EventHandler) -> None:
        """Pass on what was written since the last call."""
        if not self._file.exists():
            return
        with self._file.open("rb") as stream:
            stream.seek(self._position)
            whole, newline, _ = stream.read().rpartition(b"\n")
        self._position += len(whole) + len(newline)
        for line in whole.splitlines():
            try:
                event = json.loads(line)
            except ValueError:
                continue  # half a line: its writer was killed, and the next one began a new line
            if "started" not in event:
                on_event(event)
                continue
            self._starts += 1
            if self._starts > 1:
                on_event({"restarted": f"its worker was lost; restarted on {event['started']}"})
