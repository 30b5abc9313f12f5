"""The store: content-addressed directories by identity, and records (measurements) about them. Imports no torch.

    objects/<identity>/content/...    the files of the stage, never changed afterwards
    objects/<identity>/manifest.json  sha256 of every file, the identity document, when it was computed and for how long
    records/<key>.json                measurements, by the digest of their subject and settings, with their own sha256
    work/<identity>/                  scratch of a stage that is running or was killed
    shared/                           results that several stages share (teacher outputs); they decide no bytes
    runs/<run>.json                   the journal of a run: its plan, and how far it came (tasks/store/journal.py)
    runs/<run>.summary.json           its results (tasks/store/summaries.py)
    pins/<identity or run>            what garbage collection must keep (tasks/store/garbage.py)
    damaged/                          the quarantine: entries, records and journals that no longer match their sha256
    locks/                            empty files, one for each thing that only one process may do at a time

A commit is a rename, so an entry is complete or absent; the next reader finishes a commit that was killed just before its rename.
Locks die with their owner (compression/locks.py).
"""

import json
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compression.checkpoints.checkpoint import file_digests
from compression.errors import EdgepressError
from compression.files import fsync, fsync_tree, write_json
from compression.locks import acquire, open_lock, try_acquire
from tasks.errors import Cancelled
from tasks.store.identity import digest

SCHEMA = 1  # raise it when the store of an older edgepress cannot be read; a new folder does not count
FOLDERS = ("objects", "records", "work", "shared", "runs", "pins", "damaged", "locks")


@dataclass(frozen=True)
class Entry:
    """The verified output of a stage."""

    identity: str
    path: Path  # the content directory
    manifest: dict[str, Any]

    @property
    def content(self) -> str:
        """The digest of the bytes: equal for equal content under different identities."""
        return self.manifest["content"]


class Store:
    """A local store below `root`, created where there is none. Several processes may use it at once.

    Raises:
        EdgepressError: It cannot be written, is damaged, or has the schema of another version.
    """

    def __init__(self, root: Path):
        self.root = root.absolute()
        schema = self.root / "schema.json"
        with self._explaining_unwritable():
            if not schema.exists():
                write_json(schema, {"schema": SCHEMA})
            for name in FOLDERS:
                (self.root / name).mkdir(exist_ok=True)
            text = schema.read_bytes()
        try:
            written = json.loads(text)["schema"]
        except (ValueError, KeyError, TypeError) as error:
            raise EdgepressError(
                f"{schema} is damaged ({error}); if this is a store of edgepress, write {json.dumps({'schema': SCHEMA})} into it, else name another --store"
            ) from None
        if written != SCHEMA:
            raise EdgepressError(
                f"the store {self.root} has schema {written}, this edgepress reads {SCHEMA}; use another --store or matching version"
            )

    @contextmanager
    def _explaining_unwritable(self) -> Iterator[None]:
        """Turn an OSError of the block into an EdgepressError that names the store."""
        try:
            yield
        except OSError as error:
            raise EdgepressError(
                f"the store {self.root} cannot be written ({error.strerror or error}); --store or EDGEPRESS_STORE names another"
            ) from None

    @contextmanager
    def lock(self, name: str, is_cancelled: Callable[[], bool] | None = None) -> Iterator[None]:
        """Hold the lock of an identity, or of another name, while the block runs; wait while another process or thread holds it.

        Args:
            name: What only one process at a time may compute or change.
            is_cancelled: Called again and again while another one holds the lock.

        Raises:
            Cancelled: `is_cancelled` returned True.
        """
        with self._lock_file(name) as handle:
            if not acquire(handle, is_cancelled=is_cancelled):
                raise Cancelled()
            yield

    @contextmanager
    def try_lock(self, name: str) -> Iterator[bool]:
        """Acquire a lock if it is free; yield whether it was."""
        with self._lock_file(name) as handle:
            yield try_acquire(handle)

    @contextmanager
    def _lock_file(self, name: str) -> Iterator[int]:
        with ExitStack() as stack:
            with self._explaining_unwritable():
                handle = stack.enter_context(open_lock(self.root / "locks" / f"{name}.lock"))
            yield handle

    def get(self, identity: str) -> Entry | None:
        """Return the entry after hashing every file; None where it is absent or damaged, which puts it into quarantine. Hold its lock."""
        home = self.root / "objects" / identity
        if not home.exists() and not self._finish_commit(identity):
            return None
        try:
            entry = open_entry(home, identity)
        except (OSError, ValueError, KeyError, TypeError):
            self.quarantine(home)
            return None
        workplace = self.root / "work" / identity
        if not (workplace / "out").exists():  # a commit was killed after its rename, before it removed this
            shutil.rmtree(workplace, ignore_errors=True)
        return entry

    def quarantine(self, path: Path) -> None:
        """Move a damaged entry, record or journal to `damaged/`, where a person can inspect it."""
        with suppress(FileNotFoundError):  # another process did
            path.rename(self.root / "damaged" / f"{path.stem}.{uuid.uuid4().hex[:8]}{path.suffix}")

    def manifest(self, identity: str) -> dict[str, Any]:
        """Return the manifest of an entry without hashing its files. Raises EdgepressError for one that cannot be read."""
        file = self.root / "objects" / identity / "manifest.json"
        try:
            manifest = json.loads(file.read_text())
            _ = manifest["identity"], manifest["content"], manifest["files"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise EdgepressError(f"{file} cannot be read ({error}); `edgepress store verify` quarantines the entry") from None
        return manifest

    def has(self, identity: str) -> bool:
        """Return whether the store has an entry, without reading its bytes: for plans."""
        return (self.root / "objects" / identity / "manifest.json").is_file()

    def workplace(self, identity: str) -> Path:
        """Return the scratch directory of an identity: an empty `out`, and in `work` the progress of an earlier attempt."""
        home = self.root / "work" / identity
        for leftover in (home / "out", *home.glob("commit-*")):
            shutil.rmtree(leftover, ignore_errors=True)
        (home / "out").mkdir(parents=True, exist_ok=True)  # a lost child on another machine may still be writing
        (home / "work").mkdir(exist_ok=True)
        return home

    def commit(
        self,
        identity: str,
        document: dict[str, Any],
        *,
        metrics: dict[str, float],
        seconds: float,
        warnings: list[str],
        curves: list[Any],
    ) -> Entry:
        """Make `out` of the workplace the entry of `identity`. Hold its lock.

        An entry that exists already, because the stage was recomputed, stays in place if its content is equal, since others may be reading it,
        and gets the new manifest; one of other content goes into quarantine once the new one is complete on disk.

        Args:
            identity: The digest of `document`.
            document: What decides the bytes of the stage.
            metrics: What the stage's method measured.
            seconds: How long the stage worked.
            warnings: What it warned of.
            curves: (step, values) of its training curve.
        """
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
        if target.exists() and self.manifest(identity)["content"] == manifest["content"]:
            write_json(target / "manifest.json", manifest)
        else:
            if target.exists():
                self.quarantine(target)
            self._install(fresh, identity)
        shutil.rmtree(home, ignore_errors=True)
        return Entry(identity, target / "content", manifest)

    def _finish_commit(self, identity: str) -> bool:
        """Finish a commit that was killed just before its last rename; return whether there was one."""
        for fresh in (self.root / "work" / identity).glob("commit-*"):
            if (fresh / "manifest.json").exists():  # it is written last
                self._install(fresh, identity)
                return True
        return False

    def adopt(self, identity: str, home: Path) -> Entry:
        """Move an entry (content and manifest) of another store into this one, from a folder on the same disk. Hold its lock.

        Raises:
            EdgepressError: Bytes, manifest and identity do not match.
        """
        try:
            entry = open_entry(home, identity)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise EdgepressError(f"the entry {identity} is damaged: {error}") from None
        fsync_tree(home)
        return Entry(identity, self._install(home, identity) / "content", entry.manifest)

    def _install(self, home: Path, identity: str) -> Path:
        target = self.root / "objects" / identity
        home.rename(target)
        fsync(target.parent)
        return target

    def remove(self, path: Path) -> None:
        """Remove a file or folder of the store. A folder is renamed first: a kill at any moment leaves an entry complete or absent."""
        if not path.is_dir() or path.is_symlink():
            path.unlink(missing_ok=True)
            return
        doomed = self.root / "work" / f"removed-{uuid.uuid4().hex[:8]}"
        path.rename(doomed)
        shutil.rmtree(doomed)

    def record(self, key: str) -> dict[str, Any] | None:
        """Return an earlier measurement; None where it is absent or damaged, which puts it into quarantine."""
        path = self.root / "records" / f"{key}.json"
        if not path.exists():
            return None
        try:
            return open_record(path.read_bytes())
        except ValueError:
            self.quarantine(path)
            return None

    def put_record(self, key: str, document: dict[str, Any]) -> None:
        """Keep a measurement, with the sha256 of its document."""
        write_json(self.root / "records" / f"{key}.json", {**document, "sha256": digest(document)})

    def entries(self) -> list[str]:
        """Return the identities of all entries, damaged ones too."""
        return sorted(p.name for p in (self.root / "objects").iterdir())

    def records(self) -> list[str]:
        """Return the keys of all records, damaged ones too."""
        return sorted(p.stem for p in (self.root / "records").glob("[!.]*.json"))


def open_entry(home: Path, identity: str) -> Entry:
    """Return the entry in a folder after hashing every file. Raises OSError, ValueError, KeyError or TypeError where anything does not match."""
    manifest = json.loads((home / "manifest.json").read_text())
    if digest(manifest["identity"]) != identity:
        raise ValueError("its manifest belongs to another identity")
    files = file_digests(home / "content")
    wrong = sorted(name for name in files.keys() | manifest["files"].keys() if files.get(name) != manifest["files"].get(name))
    if wrong or digest(files) != manifest["content"]:
        raise ValueError(f"its files differ from its manifest: {', '.join(wrong[:5])}")
    return Entry(identity, home / "content", manifest)


def open_record(text: bytes) -> dict[str, Any]:
    """Return a record without its sha256. Raises ValueError for a damaged one; one of a version that wrote no sha256 is not checked."""
    document = json.loads(text)
    if not isinstance(document, dict) or ("sha256" in document and document.pop("sha256") != digest(document)):
        raise ValueError("it is not a record, or its sha256 does not match")
    return document


def content_of_record(path: Path) -> str | None:
    """Return the digest of the content that a record is about; None where there is none. Raises ValueError for a damaged record."""
    try:
        return open_record(path.read_bytes()).get("key", {}).get("content")
    except FileNotFoundError:
        return None


def check_links(outputs: Path, recipe: str, stages: Iterable[str]) -> None:
    """Raise EdgepressError where `publish` could not make its links, before anything is computed for them."""
    folder = outputs / recipe
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".{uuid.uuid4().hex[:8]}"
        probe.symlink_to(folder)
        probe.unlink()
    except OSError as error:
        raise EdgepressError(f"the folder {folder} cannot take links to results ({error.strerror}); --outputs names another") from None
    for stage in stages:
        link = folder / stage
        if link.exists() and not link.is_symlink():
            raise EdgepressError(
                f"{link} is in the way of a link to the result of {stage}: it is not a link, and stays; move it, or name another folder in --outputs"
            )


def publish(entry: Path, outputs: Path, recipe: str, stage: str) -> Path:
    """Link `outputs/<recipe>/<stage>` to a content directory, so that people find results by name; return the link."""
    link = outputs / recipe / stage
    link.parent.mkdir(parents=True, exist_ok=True)
    fresh = link.with_name(f".{stage}.{uuid.uuid4().hex[:8]}")
    fresh.symlink_to(entry.absolute(), target_is_directory=True)
    try:
        fresh.replace(link)
    except OSError as error:
        fresh.unlink()
        raise EdgepressError(f"{link} cannot become a link to the result of {stage}: {error.strerror}") from None
    return link


def unpublish(outputs: Path, recipe: str, stage: str) -> None:
    """Remove the link of a stage whose gates do not hold."""
    link = outputs / recipe / stage
    if link.is_symlink():
        link.unlink()
