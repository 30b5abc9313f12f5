"""The store: content-addressed directories by identity, and records (measurements) about them. Imports no torch.

    objects/<identity>/content/...    what the stage wrote, never changed afterwards
    objects/<identity>/manifest.json  sha256 of every file, the identity document, when and how long
    records/<key>.json                measurements, addressed by what was measured and how
    work/<identity>/                  scratch of a stage that is running or was killed
    damaged/                          entries whose bytes no longer match, set aside

A commit is a rename, so an entry is there whole or not at all. Locks are flock's and die with their owner.
"""

import json
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from compression.checkpoint import file_digests
from compression.errors import EdgepressError
from compression.files import fsync
from tasks.files import fsync_tree, write_json
from tasks.identity import digest

SCHEMA = 1


@dataclass(frozen=True)
class Entry:
    """A whole, verified stage output."""

    identity: str
    path: Path  # the content directory
    manifest: dict[str, Any]

    @property
    def content(self) -> str:
        """Digest of the bytes: equal for equal content, however it was made."""
        return self.manifest["content"]


class Store:
    """A local store below `root`. Several processes may use it at once."""

    def __init__(self, root: Path):
        self.root = root.absolute()
        schema = self.root / "schema.json"
        if not schema.exists():
            for name in ("objects", "records", "work", "damaged", "locks"):
                (self.root / name).mkdir(parents=True, exist_ok=True)
            write_json(schema, {"schema": SCHEMA})
        found = json.loads(schema.read_text())["schema"]
        if found != SCHEMA:
            raise EdgepressError(
                f"the store {self.root} has schema {found}, this edgepress reads {SCHEMA}; use another --store or matching version"
            )

    @contextmanager
    def lock(self, identity: str) -> Iterator[None]:
        """Only one process computes an identity; the others wait, then find it done."""
        with FileLock(self.root / "locks" / f"{identity}.lock"):
            yield

    def get(self, identity: str) -> Entry | None:
        """The entry if it is whole: every file is hashed. A damaged one is set aside and counts as absent."""
        home = self.root / "objects" / identity
        if not home.exists():
            return None
        try:
            manifest = json.loads((home / "manifest.json").read_text())
            actual = file_digests(home / "content")
            whole = actual == manifest["files"]
        except (OSError, ValueError, KeyError):
            whole = False
        if not whole:
            home.rename(self.root / "damaged" / f"{identity}.{uuid.uuid4().hex[:8]}")
            return None
        return Entry(identity, home / "content", manifest)

    def has(self, identity: str) -> bool:
        """Whether an entry is there, without reading its bytes: for plans."""
        return (self.root / "objects" / identity / "manifest.json").is_file()

    def workplace(self, identity: str) -> Path:
        """The scratch directory of an identity: an empty `out`, and whatever a killed run left in `work`."""
        home = self.root / "work" / identity
        for leftover in (home / "out", *home.glob("commit-*")):
            shutil.rmtree(leftover, ignore_errors=True)
        (home / "out").mkdir(parents=True)
        (home / "work").mkdir(exist_ok=True)
        return home

    def commit(
        self, identity: str, document: dict[str, Any], *, metrics: dict[str, float], seconds: float, warnings: list[str], curves: list[Any]
    ) -> Entry:
        """Take the workplace's `out` over as the entry of `identity`, with what the stage said while it was made."""
        home = self.root / "work" / identity
        fresh = home / f"commit-{uuid.uuid4().hex[:8]}"
        fresh.mkdir()
        (home / "out").rename(fresh / "content")
        files = file_digests(fresh / "content")
        manifest = {
            "identity": document, "files": files, "content": digest(files), "metrics": metrics, "seconds": seconds,
            "warnings": warnings, "curves": curves, "committed": time.time(),
        }  # fmt: skip
        fsync_tree(fresh / "content")
        write_json(fresh / "manifest.json", manifest)
        target = self.root / "objects" / identity
        fresh.rename(target)
        fsync(target.parent)
        shutil.rmtree(home, ignore_errors=True)
        return Entry(identity, target / "content", manifest)

    def record(self, key: str) -> dict[str, Any] | None:
        """A measurement that was made before. One that cannot be read is removed and counts as absent."""
        path = self.root / "records" / f"{key}.json"
        if not path.exists():
            return None
        try:
            return json.loads(path.read_text())
        except ValueError:
            path.rename(self.root / "damaged" / f"{key}.{uuid.uuid4().hex[:8]}.json")
            return None

    def put_record(self, key: str, document: dict[str, Any]) -> None:
        write_json(self.root / "records" / f"{key}.json", document)

    def entries(self) -> list[str]:
        return sorted(p.name for p in (self.root / "objects").iterdir())


def publish(entry: Path, outputs: Path, recipe: str, stage: str) -> Path:
    """Link `outputs/<recipe>/<stage>` to a content directory, so that people find results by name."""
    link = outputs / recipe / stage
    link.parent.mkdir(parents=True, exist_ok=True)
    beside = link.with_name(f".{stage}.{uuid.uuid4().hex[:8]}")
    beside.symlink_to(entry.absolute(), target_is_directory=True)
    beside.replace(link)
    return link


def withdraw(outputs: Path, recipe: str, stage: str) -> None:
    """Take back the link of a stage whose bounds no longer hold."""
    link = outputs / recipe / stage
    if link.is_symlink():
        link.unlink()
