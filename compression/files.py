"""Bringing files to disk. Imports no torch."""

import os
from pathlib import Path


def fsync(path: Path) -> None:
    """Bring a file, or a directory's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
