"""Carrying entries from one store to another: as one `.tar`, or as a directory, at any place fsspec reaches (a path, s3://). Imports no torch.

Both are laid out as the store is (`objects/<identity>/content/...`, `objects/<identity>/manifest.json`, `records/<key>.json`). In a directory an
entry's manifest is written last, in a tar the list of what it holds (`export.json`): what broke off is not taken for whole. A directory may
be exported to again and again; what is there already is not written a second time.
"""

import io
import json
import re
import shutil
import sys
import tarfile
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from compression.errors import EdgepressError, MissingExtra
from tasks.store.files import written_beside
from tasks.store.identity import digest
from tasks.store.store import SCHEMA, Entry, Store, open_record

LIST = "export.json"
_MEMBER = re.compile(r"objects/[0-9a-f]{64}/(manifest\.json|content/.+)|records/[0-9a-f]{64}\.json")
_OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "az", "abfs"}  # they have no directories; fsspec would make a bucket where one is mistyped
_PUSHED = 16 * 2**20  # bytes read and written at once


@dataclass(frozen=True)
class Carried:
    """What was written or read; `present` entries were there before."""

    entries: tuple[str, ...]
    present: tuple[str, ...]
    records: int
    bytes: int


def export_entries(store: Store, url: str, identities: Iterable[str]) -> Carried:
    """Write entries with their manifests, and all records about their contents.

    url  ends with .tar for one file, which replaces one that is there; else a directory

    Raises EdgepressError for a damaged entry (before anything is written), and for a place that cannot be written.
    """
    entries = [_whole(store, identity) for identity in sorted(identities)]
    contents = {entry.content for entry in entries}
    records = [path for path in (store.root / "records" / f"{key}.json" for key in store.records()) if _about(path) in contents]
    with _place(url) as (fs, root):
        if url.endswith(".tar"):
            return _export_tar(fs, root, entries, records)
        return _export_directory(fs, root, entries, records)


def import_entries(store: Store, url: str) -> Carried:
    """Take over every entry and record of an export, or of another store's directory, that this store has not.

    All of it is read beside first, and verified: every file against its manifest, the manifest against the identity it stands for. Raises
    EdgepressError for what is damaged, broken off, or no export; the store is then as it was, but for entries that came before the damaged one.
    """
    with store.lock("import"):
        staged = store.root / "work" / f"import-{uuid.uuid4().hex[:8]}"
        staged.mkdir()
        try:
            with _place(url) as (fs, root):
                fetch = _fetch_tar if url.endswith(".tar") else _fetch_directory
                size, present = fetch(fs, root, staged, store)
            return _take_over(store, staged, size, present)
        finally:
            shutil.rmtree(staged, ignore_errors=True)


def _whole(store: Store, identity: str) -> Entry:
    with store.lock(identity):
        entry = store.get(identity)
    if entry is None:
        raise EdgepressError(f"the entry {identity} is not in {store.root}, or was damaged and is set aside now")
    return entry


def _about(record: Path) -> str | None:
    """The digest of the content a record is about."""
    try:
        return open_record(record.read_bytes()).get("key", {}).get("content")
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise EdgepressError(f"{record} is damaged ({error}); `edgepress store verify` sets it aside") from None


@contextmanager
def _place(url: str) -> Iterator[tuple[Any, str]]:
    """The file system of a URL and the path in it; what goes wrong there becomes an EdgepressError."""
    try:
        fs, root = fsspec.core.url_to_fs(url)
    except ImportError as error:
        if url.startswith("s3"):
            raise MissingExtra("s3fs", "s3", url) from None
        raise EdgepressError(f"{url}: {error}") from None
    except ValueError as error:
        raise EdgepressError(f"{url}: {error}") from None
    fs.invalidate_cache()  # file systems are kept for a process, with what they listed before
    try:
        yield fs, root.rstrip("/")
    except FileNotFoundError as error:
        raise EdgepressError(f"{url}: there is no {error.filename or error}") from None
    except (OSError, tarfile.TarError) as error:
        raise EdgepressError(f"{url}: {error}") from None
    except _botocore_errors() as error:
        raise EdgepressError(f"{url}: {error}") from None


def _botocore_errors() -> type[Exception]:
    """What s3fs lets through as it is: a server that could not even be asked (no credentials, no connection). None where it is not in use."""
    return getattr(sys.modules.get("botocore.exceptions"), "BotoCoreError", OSError)


def _members(entry: Entry) -> Iterator[tuple[str, Path]]:
    """(name in an export, file) of an entry, the manifest last."""
    home = f"objects/{entry.identity}"
    for name in sorted(entry.manifest["files"]):
        yield f"{home}/content/{name}", entry.path / name
    yield f"{home}/manifest.json", entry.path.parent / "manifest.json"


def _export_tar(fs: Any, path: str, entries: list[Entry], records: list[Path]) -> Carried:
    """One after the other into a stream; the file is there when all of it is. Equal entries make equal bytes."""
    files = [member for entry in entries for member in _members(entry)] + [(f"records/{file.name}", file) for file in records]
    listed = {"schema": SCHEMA, "members": [name for name, _ in files]}
    _make_parents(fs, path)
    with _writing(fs, path) as stream, tarfile.open(fileobj=stream, mode="w|", bufsize=2**20) as tar:
        for name, file in files:
            with file.open("rb") as source:
                _add(tar, name, file.stat().st_size, source)
        text = json.dumps(listed).encode()
        _add(tar, LIST, len(text), io.BytesIO(text))
    return Carried(tuple(entry.identity for entry in entries), (), len(records), sum(file.stat().st_size for _, file in files))


def _add(tar: tarfile.TarFile, name: str, size: int, source: IO[bytes]) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o644
    tar.addfile(member, source)


def _export_directory(fs: Any, root: str, entries: list[Entry], records: list[Path]) -> Carried:
    written: list[str] = []
    size = count = 0
    schema = f"{root}/schema.json"
    if fs.exists(schema):
        _read_head(fs.cat_file(schema), schema)
    else:
        _put(fs, schema, json.dumps({"schema": SCHEMA}).encode())
    for entry in entries:
        *files, (manifest, last) = _members(entry)
        if fs.exists(f"{root}/{manifest}"):
            continue
        for name, file in files:
            _make_parents(fs, f"{root}/{name}")
            fs.put_file(str(file), f"{root}/{name}")
        _put(fs, f"{root}/{manifest}", last.read_bytes())
        written.append(entry.identity)
        size += sum(file.stat().st_size for _, file in files)
    for file in records:
        name = f"{root}/records/{file.name}"
        if not fs.exists(name):
            _put(fs, name, file.read_bytes())
            count += 1
    return Carried(tuple(written), tuple(e.identity for e in entries if e.identity not in written), count, size)


def _put(fs: Any, path: str, content: bytes) -> None:
    _make_parents(fs, path)
    with _writing(fs, path) as stream:
        stream.write(content)


@contextmanager
def _writing(fs: Any, path: str) -> Iterator[IO[bytes]]:
    """A stream into a file that is there, whole, when the block has ended well, and not before."""
    if not isinstance(fs, LocalFileSystem):
        with fs.transaction, fs.open(path, "wb", block_size=_PUSHED) as stream:
            yield stream
        return
    with written_beside(Path(path)) as stream:  # fsspec's own would wait in another file system
        yield stream


def _make_parents(fs: Any, path: str) -> None:
    protocols = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
    if not protocols & _OBJECT_STORES:
        fs.makedirs(path.rpartition("/")[0], exist_ok=True)


def _fetch_tar(fs: Any, path: str, staged: Path, store: Store) -> tuple[int, list[str]]:
    """Unpack into `staged`, and see that nothing is missing at the end. Returns the bytes, and the entries it left out: none."""
    _check_room(fs.size(path), store)
    seen: list[str] = []
    listed: list[str] | None = None
    size = 0
    with fs.open(path, "rb") as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
        for member in tar:
            content = tar.extractfile(member) if member.isreg() else None
            if content is None:
                raise EdgepressError(f"{path}: {member.name!r} is no plain file, so this is no export of a store")
            if member.name == LIST:
                listed = _read_head(content.read(), f"{path}: {LIST}").get("members", [])
                continue
            target = _safe(staged, member.name, path)
            with target.open("wb") as out:
                shutil.copyfileobj(content, out, _PUSHED)
            seen.append(member.name)
            size += member.size
    if listed is None:
        raise EdgepressError(f"{path} has no {LIST} at its end: it broke off, or is no export of a store")
    if sorted(seen) != sorted(listed):
        raise EdgepressError(f"{path} does not hold what its {LIST} lists")
    return size, []


def _fetch_directory(fs: Any, root: str, staged: Path, store: Store) -> tuple[int, list[str]]:
    """Copy every entry that this store has not, and every record, into `staged`. Returns the bytes, and the entries it has."""
    if not fs.exists(f"{root}/schema.json"):
        raise EdgepressError(f"{root} has no schema.json, so it is no export of a store, or not there")
    _read_head(fs.cat_file(f"{root}/schema.json"), f"{root}/schema.json")
    entries = [
        name for path in _listed(fs, f"{root}/objects") if fs.exists(f"{root}/objects/{(name := path.rpartition('/')[2])}/manifest.json")
    ]
    present = [name for name in entries if store.has(name)]
    files = {
        path: facts["size"]
        for name in entries
        if name not in present
        for path, facts in fs.find(f"{root}/objects/{name}", detail=True).items()
    }
    files |= {path: facts["size"] for path, facts in _listed(fs, f"{root}/records").items() if path.endswith(".json")}
    _check_room(sum(files.values()), store)
    for path in files:
        fs.get_file(path, str(_safe(staged, path.removeprefix(f"{root}/"), root)))
    return sum(files.values()), present


def _listed(fs: Any, folder: str) -> dict[str, Any]:
    """What is in a folder: path -> facts. Empty where there is none; half-written files (a dot in front) are left out."""
    if not fs.exists(folder):
        return {}
    return {facts["name"]: facts for facts in fs.ls(folder, detail=True) if not facts["name"].rpartition("/")[2].startswith(".")}


def _read_head(text: bytes, where: str) -> dict[str, Any]:
    """What a store or an export says about itself. Raises EdgepressError for another schema."""
    try:
        document = json.loads(text)
        found = document["schema"]
    except (ValueError, KeyError, TypeError) as error:
        raise EdgepressError(f"{where} is none of a store's: {error!r}") from None
    if found != SCHEMA:
        raise EdgepressError(f"{where} has schema {found}, this edgepress reads {SCHEMA}")
    return document


def _check_room(needed: int, store: Store) -> None:
    free = shutil.disk_usage(store.root).free
    if needed > free:
        raise EdgepressError(f"the disk of {store.root} has {free / 1e9:.1f} GB free, and this import needs {needed / 1e9:.1f} GB")


def _safe(staged: Path, name: str, source: str) -> Path:
    """Where a member goes. Raises EdgepressError for a name that no export has, such as one that leads elsewhere."""
    if not _MEMBER.fullmatch(name) or {"", ".", ".."} & set(name.split("/")):
        raise EdgepressError(f"{source}: {name!r} is nothing an export of a store holds")
    target = staged / name
    target.parent.mkdir(parents=True, exist_ok=True)
    return target


def _take_over(store: Store, staged: Path, size: int, present: list[str]) -> Carried:
    taken = []
    for home in sorted((staged / "objects").glob("*")):
        with store.lock(home.name):
            if store.get(home.name) is None:
                store.adopt(home.name, home)
                taken.append(home.name)
            else:
                present.append(home.name)
    count = 0
    for file in sorted((staged / "records").glob("*")):
        try:
            record = open_record(file.read_bytes())
            if digest(record.get("key")) != file.stem:
                raise ValueError("it is the record of another key")
        except ValueError as error:
            raise EdgepressError(f"the record {file.stem} is damaged: {error}") from None
        with store.lock(file.stem):
            if store.record(file.stem) is None:
                store.put_record(file.stem, record)
                count += 1
    return Carried(tuple(taken), tuple(present), count, size)
