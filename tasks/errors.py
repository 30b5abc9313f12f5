"""How work fails. Imports no torch."""

from pathlib import Path

from compression.errors import PicklableError
from compression.redaction import redacted


class JobFailed(PicklableError):
    """A child that did not bring a result. `transient` says whether trying again can help."""

    def __init__(self, message: str, *, transient: bool, log: Path | None = None):
        super().__init__(redacted(message))
        self.transient = transient
        self.log = log


class Cancelled(JobFailed):
    """What `Executor.close` ended, or did not let start: nobody's failure."""

    def __init__(self) -> None:
        super().__init__("stopped", transient=False)
