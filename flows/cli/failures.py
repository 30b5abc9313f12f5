"""How a failed command ends: one message, an exit status and, for an unexpected error, a file with the traceback."""

import errno
import os
import tempfile
import traceback

from rich.console import Console

from compression.errors import EdgepressError
from compression.redaction import redacted

USER, UNEXPECTED = 2, 1
_USER_ERRNO = {  # errors of the file system that the user can fix
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EMFILE,
}  # fmt: skip


def report_failure(error: Exception, *, debug: bool) -> int:
    """Print an error to the standard error; return the exit status.

    2  for an error that the user can fix: its message
    1  for an unexpected error: its type, its first line, and the file of its traceback

    With `debug` the traceback is printed instead.
    """
    console = Console(stderr=True, soft_wrap=True)
    expected = isinstance(error, EdgepressError) or (isinstance(error, OSError) and error.errno in _USER_ERRNO)
    if debug:
        message = redacted("".join(traceback.format_exception(error)))
    elif isinstance(error, OSError) and expected:
        message = f"error: {error.filename}: {error.strerror}" if error.filename else f"error: {error}"
    elif expected:
        message = f"error: {error}"
    else:
        line = (str(error).strip().splitlines() or [""])[0]
        message = redacted(f"error: unexpected {type(error).__name__}: {line}\n{_write_traceback(error)}")
    console.print(message, style="red", markup=False, highlight=False)
    return USER if expected else UNEXPECTED


def _write_traceback(error: Exception) -> str:
    """Write the traceback to a temporary file; return a sentence that names it."""
    text = redacted("".join(traceback.format_exception(error)))
    try:
        handle, name = tempfile.mkstemp(prefix="edgepress-error-", suffix=".log", text=True)
        with os.fdopen(handle, "w", errors="backslashreplace") as file:
            file.write(text)
    except OSError:
        return "--debug prints the traceback"
    return f"the traceback is in {name}, and --debug prints it"
