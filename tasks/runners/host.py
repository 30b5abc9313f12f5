"""A process that runs jobs for a worker: `python -P -m tasks.runners.host`. Imports no torch; its fork server does, once.

Workers are often daemons (Dask's are), which may have no children of their own in Python's multiprocessing. It reads one request a line,
{"id", "folder", "attempt"}, answers each with a line when it is done, and ends, with all it runs, when its input does: when its worker dies.
"""

import json
import os
import socket
import subprocess
import sys
import threading
import uuid
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any

from tasks.runners.budget import Budget
from tasks.runners.local import LocalExecutor
from tasks.runners.remote import serve


class Host:
    """The worker's side of such a process, which the first job starts, and the next job starts again when it was lost."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._open: dict[str, Future[dict[str, Any]]] = {}

    def ask(self, folder: str, attempt: str) -> dict[str, Any]:
        """Have the process serve a folder; wait for the answer (tasks/runners/remote.py)."""
        name, answer = uuid.uuid4().hex, Future[dict[str, Any]]()
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._start()
            assert self._process is not None and self._process.stdin is not None
            self._open[name] = answer
            with suppress(BrokenPipeError):  # it was killed this instant: `_listen` reports it
                self._process.stdin.write(json.dumps({"id": name, "folder": folder, "attempt": attempt}) + "\n")
                self._process.stdin.flush()
        return answer.result()

    def close(self) -> None:
        """End the process and what it runs."""
        with self._lock:
            if self._process is not None and self._process.poll() is None and self._process.stdin is not None:
                self._process.stdin.close()
                self._process.wait(10)

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "tasks.runners.host"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._open = {}  # of this process
        threading.Thread(target=self._listen, args=(self._process, self._open), daemon=True).start()

    def _listen(self, process: "subprocess.Popen[str]", waiting: dict[str, Future[dict[str, Any]]]) -> None:
        """Pass on the answers of a process; when it ends, answer all that still wait with its loss."""
        for line in process.stdout or ():
            answer = json.loads(line)
            waiting.pop(answer.pop("id")).set_result(answer)
        process.wait()  # from here on `ask` starts another process, so `waiting` gets no more entries
        lost = {"message": "the process that runs jobs for this worker was killed", "transient": True, "log": ""}
        with self._lock:
            for future in waiting.values():
                future.set_result({"failed": lost, "host": socket.gethostname(), "notes": []})


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what anything prints must not come between the answers
    writing = threading.Lock()
    executor = LocalExecutor(Budget())
    executor.preload()

    def answer(request: dict[str, str]) -> None:
        response = serve(Path(request["folder"]), request["attempt"], executor)
        with writing:
            answers.write(json.dumps({"id": request["id"], **response}) + "\n")

    for line in sys.stdin:
        threading.Thread(target=answer, args=(json.loads(line),), daemon=True).start()
    executor.close()


if __name__ == "__main__":
    main()
