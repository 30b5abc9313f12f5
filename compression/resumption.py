"""Directories that are whole or not there: what a training loop or a walk leaves for the process that takes over from it. Imports no torch.

A checkpoint of the work is `checkpoint-<step>` below the work directory. It is written beside as `.partial-<step>`, every file is
fsynced, `complete.json` (sha256 per file) is written last, and the directory is renamed. A process killed at any moment
leaves either the checkpoint or something that is not taken for one.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from compression.errors import EdgepressError
from compression.files import digest_file, fsync

MARKER = "complete.json"
FORMAT = "2"  # of fingerprints: what stands under another is of an edgepress that left something out of them
KEEP = 2  # the newest, and the one to fall back on where the newest turns out to be damaged


def fingerprint(document: Mapping[str, Any], *content: bytes) -> str:
    """The name of a piece of work, for `run` below: it holds everything that decides the result, so that no work is continued as another.

    document  JSON: the method and its settings, `file_digests` of every model that it reads, seed, shapes
    content   the bytes of its data
    """
    digest = hashlib.sha256(json.dumps(document, sort_keys=True).encode())
    for part in content:
        digest.update(part)
    return f"{FORMAT}:{digest.hexdigest()}"


def write_checkpoint(workdir: Path, step: int, fill: Callable[[Path], None], *, run: str) -> None:
    """Write `checkpoint-<step>` through `fill(directory)`; older ones but the last are removed.

    run  names the work that the state belongs to; `latest_checkpoint` refuses another's
    """
    partial, final = workdir / f".partial-{step}", workdir / f"checkpoint-{step}"
    _remove(partial)
    partial.mkdir(parents=True)
    fill(partial)
    files = sorted(path for path in partial.iterdir() if path.is_file())
    for file in files:
        fsync(file)
    (partial / MARKER).write_text(json.dumps({"run": run, "files": {file.name: digest_file(file) for file in files}}))
    fsync(partial / MARKER)
    fsync(partial)
    _remove(final)  # an incomplete one, or this process would have started from it
    partial.rename(final)
    fsync(workdir)
    for old in _checkpoints(workdir)[KEEP:]:
        shutil.rmtree(old)


def latest_checkpoint(workdir: Path, *, run: str, warn: Callable[[str], None]) -> Path | None:
    """The newest complete checkpoint, or None. Incomplete and damaged ones, and those of an older edgepress, are named to `warn` and removed.

    Raises EdgepressError when it belongs to other work than `run`.
    """
    for partial in workdir.glob(".partial-*"):
        shutil.rmtree(partial)
    for path in _checkpoints(workdir):
        damage = _damage(path)
        if damage is None:
            if same_work(json.loads((path / MARKER).read_text())["run"], run, path):
                return path
            damage = "another version of edgepress left it"
        warn(f"{path} cannot be continued ({damage}); work continues from the one before it")
        shutil.rmtree(path)
    return None


def same_work(found: str, run: str, path: Path) -> bool:
    """Whether what stands at `path` under the name `found` is of the work `run`; False where only another edgepress can tell.

    Raises EdgepressError when it is of other work.
    """
    if found.rpartition(":")[0] != run.rpartition(":")[0]:
        return False
    if found != run:
        raise EdgepressError(
            f"{path} belongs to work of another method, on another model or other data, or with other settings; "
            "give this one a work directory of its own"
        )
    return True


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
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
    """Newest first."""
    found = [path for path in workdir.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True)


def _remove(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)
