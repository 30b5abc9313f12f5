"""The errors of jobs. Imports no torch."""

from pathlib import Path

from compression.errors import PicklableError
from compression.redaction import redacted


class JobFailed(PicklableError):
    """A job that ended without a result. `transient` says whether a retry can help, `log` names the file to read."""

    def __init__(self, message: str, *, transient: bool, log: Path | None = None):
        super().__init__(redacted(message))
        self.transient = transient
        self.log = log


class Cancelled(JobFailed):
    """A job that `Executor.close` ended or did not start: not a failure."""

    def __init__(self) -> None:
        super().__init__("stopped", transient=False)
