"""The store: content-addressed directories by identity, and records (measurements) about them. Imports no torch.

    objects/<identity>/content/...    what the stage wrote, never changed afterwards
    objects/<identity>/manifest.json  sha256 of every file, the identity document, when and how long
    records/<key>.json                measurements, addressed by what was measured and how, with their own sha256
    work/<identity>/                  scratch of a stage that is running or was killed
    shared/                           what several stages would compute alike (teacher outputs); decides no bytes
    runs/<run>.json                   what each run was asked and how far it came (tasks/store/journal.py)
    runs/<run>.summary.json           what it came to (tasks/store/summaries.py)
    pins/<identity or run>            what garbage collection leaves alone (tasks/store/garbage.py)
    damaged/                          entries, records and journals that no longer match, set aside
    locks/                            empty files, one for each thing that only one process may do at a time

A commit is a rename, so an entry is there whole or not at all; one that was broken off just before its rename is finished by whoever looks next.
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
from compression.files import fsync
from compression.locks import acquire, open_lock, try_acquire
from tasks.errors import Cancelled
from tasks.store.files import fsync_tree, write_json
from tasks.store.identity import digest

SCHEMA = 1  # raise it when what an older edgepress wrote cannot be read; a folder more is no reason
FOLDERS = ("objects", "records", "work", "shared", "runs", "pins", "damaged", "locks")


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
        with self._writing():
            if not schema.exists():
                write_json(schema, {"schema": SCHEMA})
            for name in FOLDERS:
                (self.root / name).mkdir(exist_ok=True)
            text = schema.read_bytes()
        try:
            found = json.loads(text)["schema"]
        except (ValueError, KeyError, TypeError) as error:
            raise EdgepressError(
                f"{schema} is damaged ({error}); if this is a store of edgepress, write {json.dumps({'schema': SCHEMA})} into it, else name another --store"
            ) from None
        if found != SCHEMA:
            raise EdgepressError(
                f"the store {self.root} has schema {found}, this edgepress reads {SCHEMA}; use another --store or matching version"
            )

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Raises EdgepressError where the store cannot be written."""
        try:
            yield
        except OSError as error:
            raise EdgepressError(
                f"the store {self.root} cannot be written ({error.strerror or error}); --store or EDGEPRESS_STORE names another"
            ) from None

    @contextmanager
    def lock(self, identity: str, is_cancelled: Callable[[], bool] | None = None) -> Iterator[None]:
        """Only one process computes an identity; the others wait, then find it done.

        is_cancelled  asked while another one holds it; raises Cancelled when it says so
        """
        with self._lock_file(identity) as handle:
            if not acquire(handle, is_cancelled=is_cancelled):
                raise Cancelled()
            yield

    @contextmanager
    def try_lock(self, identity: str) -> Iterator[bool]:
        """Hold the lock if nobody does; yields whether it is held now."""
        with self._lock_file(identity) as handle:
            yield try_acquire(handle)

    @contextmanager
    def _lock_file(self, identity: str) -> Iterator[int]:
        with ExitStack() as stack:
            with self._writing():
                handle = stack.enter_context(open_lock(self.root / "locks" / f"{identity}.lock"))
            yield handle

    def get(self, identity: str) -> Entry | None:
        """The entry if it is whole: every file is hashed. A damaged one is set aside and counts as absent. Hold its lock."""
        home = self.root / "objects" / identity
        if not home.exists() and not self._finish_commit(identity):
            return None
        try:
            entry = open_entry(home, identity)
        except (OSError, ValueError, KeyError, TypeError):
            self.set_aside(home)
            return None
        workplace = self.root / "work" / identity
        if not (workplace / "out").exists():  # a commit took it over, and was killed before it had swept up
            shutil.rmtree(workplace, ignore_errors=True)
        return entry

    def set_aside(self, path: Path) -> None:
        """Move a damaged entry, record or journal to `damaged/`, for people to look at."""
        with suppress(FileNotFoundError):  # another process did
            path.rename(self.root / "damaged" / f"{path.stem}.{uuid.uuid4().hex[:8]}{path.suffix}")

    def manifest(self, identity: str) -> dict[str, Any]:
        """The manifest of an entry as it stands, without a look at the bytes. Raises EdgepressError for one that cannot be read."""
        file = self.root / "objects" / identity / "manifest.json"
        try:
            manifest = json.loads(file.read_text())
            _ = manifest["identity"], manifest["content"], manifest["files"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise EdgepressError(f"{file} cannot be read ({error}); `edgepress store verify` sets the entry aside") from None
        return manifest

    def has(self, identity: str) -> bool:
        """Whether an entry is there, without reading its bytes: for plans."""
        return (self.root / "objects" / identity / "manifest.json").is_file()

    def workplace(self, identity: str) -> Path:
        """The scratch directory of an identity: an empty `out`, and whatever an attempt before left in `work`."""
        home = self.root / "work" / identity
        for leftover in (home / "out", *home.glob("commit-*")):
            shutil.rmtree(leftover, ignore_errors=True)
        (home / "out").mkdir(parents=True, exist_ok=True)  # another machine's child may be writing its last
        (home / "work").mkdir(exist_ok=True)
        return home

    def commit(
        self, identity: str, document: dict[str, Any], *, metrics: dict[str, float], seconds: float, warnings: list[str], curves: list[Any]
    ) -> Entry:
        """Take the workplace's `out` over as the entry of `identity`, with what the stage said while it was made. Hold its lock.

        Where there is one already, which was computed again: equal content stays where it is, since others may be reading it, and takes the
        new manifest; of other content the older is set aside once the new one is whole on disk.
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
                self.set_aside(target)
            self._take_over(fresh, identity)
        shutil.rmtree(home, ignore_errors=True)
        return Entry(identity, target / "content", manifest)

    def _finish_commit(self, identity: str) -> bool:
        """Take over what a commit left that was killed when all was on disk but the last rename; whether there was such a one."""
        for fresh in (self.root / "work" / identity).glob("commit-*"):
            if (fresh / "manifest.json").exists():  # it is written last
                self._take_over(fresh, identity)
                return True
        return False

    def adopt(self, identity: str, home: Path) -> Entry:
        """Take over an entry (content and manifest) that another store made, from a folder on the same disk. Hold its lock.

        Raises EdgepressError where bytes, manifest and identity do not match.
        """
        try:
            made = open_entry(home, identity)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise EdgepressError(f"the entry {identity} is damaged: {error}") from None
        fsync_tree(home)
        return Entry(identity, self._take_over(home, identity) / "content", made.manifest)

    def _take_over(self, home: Path, identity: str) -> Path:
        target = self.root / "objects" / identity
        home.rename(target)
        fsync(target.parent)
        return target

    def remove(self, path: Path) -> None:
        """Remove something of the store. A folder is renamed first: an entry is there whole or not at all, in whatever moment this ends."""
        if not path.is_dir() or path.is_symlink():
            path.unlink(missing_ok=True)
            return
        doomed = self.root / "work" / f"removed-{uuid.uuid4().hex[:8]}"
        path.rename(doomed)
        shutil.rmtree(doomed)

    def record(self, key: str) -> dict[str, Any] | None:
        """A measurement that was made before. A damaged one is set aside and counts as absent."""
        path = self.root / "records" / f"{key}.json"
        if not path.exists():
            return None
        try:
            return open_record(path.read_bytes())
        except ValueError:
            self.set_aside(path)
            return None

    def put_record(self, key: str, document: dict[str, Any]) -> None:
        write_json(self.root / "records" / f"{key}.json", {**document, "sha256": digest(document)})

    def entries(self) -> list[str]:
        return sorted(p.name for p in (self.root / "objects").iterdir())

    def records(self) -> list[str]:
        return sorted(p.stem for p in (self.root / "records").glob("[!.]*.json"))


def open_entry(home: Path, identity: str) -> Entry:
    """The entry in a folder, every file hashed. Raises OSError, ValueError, KeyError or TypeError where anything does not match."""
    manifest = json.loads((home / "manifest.json").read_text())
    if digest(manifest["identity"]) != identity:
        raise ValueError("its manifest is that of another identity")
    files = file_digests(home / "content")
    wrong = sorted(name for name in files.keys() | manifest["files"].keys() if files.get(name) != manifest["files"].get(name))
    if wrong or digest(files) != manifest["content"]:
        raise ValueError(f"its files are not those of its manifest: {', '.join(wrong[:5])}")
    return Entry(identity, home / "content", manifest)


def open_record(text: bytes) -> dict[str, Any]:
    """A record as it was put. Raises ValueError for a damaged one; one of a version that wrote no sha256 is taken as it stands."""
    document = json.loads(text)
    if not isinstance(document, dict) or ("sha256" in document and document.pop("sha256") != digest(document)):
        raise ValueError("it is no record, or another than was written")
    return document


def check_links(outputs: Path, recipe: str, stages: Iterable[str]) -> None:
    """Raises EdgepressError where `publish` could not put its links, before anything is computed for them."""
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
                f"{link} is in the way of a link to the result of {stage}: it is no link itself, and stays; move it, or name another folder in --outputs"
            )


def publish(entry: Path, outputs: Path, recipe: str, stage: str) -> Path:
    """Link `outputs/<recipe>/<stage>` to a content directory, so that people find results by name."""
    link = outputs / recipe / stage
    link.parent.mkdir(parents=True, exist_ok=True)
    beside = link.with_name(f".{stage}.{uuid.uuid4().hex[:8]}")
    beside.symlink_to(entry.absolute(), target_is_directory=True)
    try:
        beside.replace(link)
    except OSError as error:
        beside.unlink()
        raise EdgepressError(f"{link} cannot become a link to the result of {stage}: {error.strerror}") from None
    return link


def unpublish(outputs: Path, recipe: str, stage: str) -> None:
    """Take back the link of a stage whose bounds no longer hold."""
    link = outputs / recipe / stage
    if link.is_symlink():
        link.unlink()
