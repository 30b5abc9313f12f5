"""Writing so that a crash leaves the old or the new, never a half. Imports no torch."""

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from compression.files import fsync


def write_json(path: Path, document: Any) -> None:
    """Write beside, fsync, rename. What cannot be written (a full disk) leaves nothing behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_beside(path) as stream:
        stream.write(json.dumps(document, indent=1, sort_keys=True).encode() + b"\n")


@contextmanager
def written_beside(path: Path) -> Iterator[IO[bytes]]:
    """A stream into a file that is there, whole and on disk, when the block has ended well; else what was there before stays."""
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with beside.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    fsync(path.parent)


def fsync_tree(root: Path) -> None:
    """Bring every file and directory below `root` to disk."""
    for folder, _, files in os.walk(root):
        for name in files:
            fsync(Path(folder, name))
        fsync(Path(folder))


def size_of(root: Path) -> int:
    """Bytes of all files below a directory, links followed."""
    return sum(f.stat().st_size for f in root.rglob("*") if f.is_file())
