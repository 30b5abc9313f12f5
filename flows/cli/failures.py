"""How a command ends in which something went wrong: one message, an exit status and, of what nobody expected, a file with the traceback."""

import errno
import os
import tempfile
import traceback

from rich.console import Console

from compression.errors import EdgepressError
from compression.redaction import redacted

USER, UNEXPECTED = 2, 1
_SYSTEM = {  # what the system says of a file, and the user mends
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EMFILE,
}  # fmt: skip


def report_failure(error: Exception, *, debug: bool) -> int:
    """Print what went wrong to the standard error; returns the exit status.

    2  a mistake that the user can mend: the message
    1  what nobody expected: its type and first line, and where its traceback was written
    debug  the traceback instead
    """
    console = Console(stderr=True, soft_wrap=True)
    expected = isinstance(error, EdgepressError) or (isinstance(error, OSError) and error.errno in _SYSTEM)
    if debug:
        message = redacted("".join(traceback.format_exception(error)))
    elif isinstance(error, OSError) and expected:
        message = f"error: {error.filename}: {error.strerror}" if error.filename else f"error: {error}"
    elif expected:
        message = f"error: {error}"
    else:
        first = (str(error).strip().splitlines() or [""])[0]
        message = redacted(f"error: unexpected {type(error).__name__}: {first}\n{_written(error)}")
    console.print(message, style="red", markup=False, highlight=False)
    return USER if expected else UNEXPECTED


def _written(error: Exception) -> str:
    """Write the traceback down; returns what to say of it."""
    text = redacted("".join(traceback.format_exception(error)))
    try:
        handle, name = tempfile.mkstemp(prefix="edgepress-error-", suffix=".log", text=True)
        with os.fdopen(handle, "w", errors="backslashreplace") as file:
            file.write(text)
    except OSError:
        return "--debug prints the traceback"
    return f"the traceback is in {name}, and --debug prints it"
