"""Remove secrets from a text before it is shown, logged or kept. Imports no torch."""

import re

MASK = "***"
_USER_INFO = re.compile(r"(?<=://)(?:[^\s/@:'\"<>]*:[^\s'\"<>]*|[^\s/'\"<>]+)@")  # to the last @: a password may hold one, or a slash
_PARAMETER = re.compile(r"([?&][^\s=&?#]*(?:password|passwd|pwd|secret|token|signature|credential|api_?key|access_?key)[^\s=&?#]*=)[^\s&#'\"]+", re.IGNORECASE)  # fmt: skip


def redacted(text: str) -> str:
    """Return the text with `***` in place of user and password of every address in it, and of secrets among an address's parameters.

    >>> redacted("cannot reach postgresql://user:secret@host/db")
    'cannot reach postgresql://***@host/db'
    """
    return _PARAMETER.sub(rf"\1{MASK}", _USER_INFO.sub(f"{MASK}@", text))
