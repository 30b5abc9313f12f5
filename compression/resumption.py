"""Checkpoints of unfinished work: what a training loop or a calibration walk leaves for the process that resumes it. Imports no torch.

A checkpoint of the work is `checkpoint-<step>` below the work directory, an atomic directory (compression/files.py) with the sha256 of every
file in `complete.json`. A process that is killed at any moment leaves either the checkpoint or a `.partial-*`, which the next one removes.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from compression.errors import EdgepressError
from compression.files import atomic_directory, digest_file

MARKER = "complete.json"
FORMAT = "2"  # of fingerprints: another one is that of an edgepress whose fingerprints left something out
KEEP = 2  # the newest, and the one to fall back on where the newest is damaged


def fingerprint(document: Mapping[str, Any], *content: bytes) -> str:
    """Return the name of a piece of work, for `run` below: it covers everything that decides the result, so that no work is resumed as another.

    Args:
        document: JSON: the method and its settings, `file_digests` of every model that it reads, seed, shapes.
        content: The bytes of its data.
    """
    digest = hashlib.sha256(json.dumps(document, sort_keys=True).encode())
    for part in content:
        digest.update(part)
    return f"{FORMAT}:{digest.hexdigest()}"


def write_checkpoint(workdir: Path, step: int, fill: Callable[[Path], None], *, run: str) -> None:
    """Write `checkpoint-<step>` through `fill(directory)`, and remove all older ones but the last.

    Args:
        workdir: The directory of all checkpoints of this work.
        step: How far the work has come.
        fill: Writes the files of the checkpoint, all directly into the directory it gets.
        run: The `fingerprint` of the work; `latest_checkpoint` refuses that of other work.
    """
    with atomic_directory(workdir / f"checkpoint-{step}") as directory:
        fill(directory)
        digests = {file.name: digest_file(file) for file in sorted(directory.iterdir()) if file.is_file()}
        (directory / MARKER).write_text(json.dumps({"run": run, "files": digests}))
    for old in _checkpoints(workdir)[KEEP:]:
        shutil.rmtree(old)


def latest_checkpoint(workdir: Path, *, run: str, warn: Callable[[str], None]) -> Path | None:
    """Return the newest complete checkpoint, or None.

    Incomplete and damaged ones, and those of an older edgepress, are removed, each with a warning.

    Raises:
        EdgepressError: The checkpoint belongs to other work than `run`.
    """
    for partial in workdir.glob(".partial-*"):
        shutil.rmtree(partial)
    for path in _checkpoints(workdir):
        damage = _damage(path)
        if damage is None:
            if same_work(json.loads((path / MARKER).read_text())["run"], run, path):
                return path
            damage = "another version of edgepress left it"
        warn(f"{path} cannot be resumed ({damage}); work resumes from the one before it")
        shutil.rmtree(path)
    return None


def same_work(found: str, run: str, path: Path) -> bool:
    """Return whether the fingerprint `found` at `path` is that of the work `run`; False where another version of edgepress made it.

    Raises:
        EdgepressError: It is that of other work.
    """
    if found.rpartition(":")[0] != run.rpartition(":")[0]:
        return False
    if found != run:
        raise EdgepressError(
            f"{path} belongs to work of another method, on another model or other data, or with other settings; use another work directory"
        )
    return True


def _damage(path: Path) -> str | None:
    """Return what is wrong with a checkpoint, or None."""
    try:
        digests = json.loads((path / MARKER).read_text())["files"]
    except FileNotFoundError:
        return f"no {MARKER}"
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError):
        return f"{MARKER} is damaged"
    for name, digest in digests.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if digest_file(path / name) != digest:
            return f"{name} is damaged"
    return None


def _checkpoints(workdir: Path) -> list[Path]:
    """Return all checkpoints, the newest first."""
    found = [path for path in workdir.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True)
