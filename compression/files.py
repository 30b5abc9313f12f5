"""Write files and directories so that a crash leaves the old ones or the new ones, never a half; hash them. Imports no torch."""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


def fsync(path: Path) -> None:
    """Bring a file, or a directory's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(root: Path) -> None:
    """Bring every file and directory below `root`, and `root` itself, to disk."""
    for folder, _, files in os.walk(root):
        for name in files:
            fsync(Path(folder, name))
        fsync(Path(folder))


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Yield a binary stream that becomes the file `path`, whole and on disk, when the block ends; a block that raises leaves what was there.

    The content is written to a hidden file in the same directory, fsynced and renamed. Several processes may write the same path at once.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with partial.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    fsync(path.parent)


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield an empty directory that becomes `path`, whole and on disk, when the block ends; a block that raises leaves nothing of it.

    The directory is `.partial-<name>` next to `path`; what a killed process left there is removed first. So one process at a time may write a path.
    """
    partial = path.with_name(f".partial-{path.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        fsync_tree(partial)
        shutil.rmtree(path, ignore_errors=True)
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    fsync(path.parent)


def write_json(path: Path, document: Any) -> None:
    """Write a JSON document with sorted keys through `atomic_file`, and make the directories above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as stream:
        stream.write(json.dumps(document, indent=1, sort_keys=True).encode() + b"\n")


def size_of(root: Path) -> int:
    """Return the bytes of all files below a directory, links followed."""
    return sum(file.stat().st_size for file in root.rglob("*") if file.is_file())


def digest_file(path: Path) -> str:
    """Return the sha256 of a file, hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
