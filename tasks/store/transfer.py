"""Export and import of entries: as one `.tar`, or as a directory, wherever fsspec reaches (a path, s3://). Imports no torch.

Both are laid out as the store is (`objects/<identity>/content/...`, `objects/<identity>/manifest.json`, `records/<key>.json`). In a directory the
manifest of an entry is written last, in a tar the list of its members (`export.json`), so that no interrupted export passes for a whole one. A
directory may be exported to again and again; what it has already is not written a second time.
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
from compression.files import atomic_file
from tasks.store.identity import digest
from tasks.store.store import SCHEMA, Entry, Store, content_of_record, open_record

LIST = "export.json"
_MEMBER = re.compile(r"objects/[0-9a-f]{64}/(manifest\.json|content/.+)|records/[0-9a-f]{64}\.json")
_OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "az", "abfs"}  # they have no directories, and fsspec would create a mistyped bucket
_BLOCK = 16 * 2**20  # bytes read and written at once


@dataclass(frozen=True)
class TransferReport:
    """What an export or import wrote. `present` are the identities that the target had before, `bytes` those of the files that were written."""

    entries: tuple[str, ...]
    present: tuple[str, ...]
    records: int
    bytes: int


def export_entries(store: Store, url: str, identities: Iterable[str]) -> TransferReport:
    """Write entries with their manifests, and all records about their contents.

    Args:
        store: The store to read.
        url: One file, replaced where it exists, if it ends with .tar; else a directory.
        identities: The entries to export.

    Raises:
        EdgepressError: An entry is damaged (then nothing is written), or the place cannot be written.
    """
    entries = [_verified(store, identity) for identity in sorted(identities)]
    contents = {entry.content for entry in entries}
    records = [path for path in (store.root / "records" / f"{key}.json" for key in store.records()) if _content_of(path) in contents]
    with _open_place(url) as (fs, root):
        if url.endswith(".tar"):
            return _export_tar(fs, root, entries, records)
        return _export_directory(fs, root, entries, records)


def import_entries(store: Store, url: str) -> TransferReport:
    """Add every entry and record of an export, or of another store's directory, that this store lacks.

    All of it is copied into the scratch of the store and verified first: every file against its manifest, the manifest against its identity.

    Args:
        store: The store to extend.
        url: A .tar or a directory, as `export_entries` writes it.

    Raises:
        EdgepressError: It is damaged, incomplete, or not an export. The store is then unchanged, except for entries before the damaged one.
    """
    with store.lock("import"):
        staged = store.root / "work" / f"import-{uuid.uuid4().hex[:8]}"
        staged.mkdir()
        try:
            with _open_place(url) as (fs, root):
                fetch = _fetch_tar if url.endswith(".tar") else _fetch_directory
                size, present = fetch(fs, root, staged, store)
            return _adopt(store, staged, size, present)
        finally:
            shutil.rmtree(staged, ignore_errors=True)


def _verified(store: Store, identity: str) -> Entry:
    with store.lock(identity):
        entry = store.get(identity)
    if entry is None:
        raise EdgepressError(f"the entry {identity} is not in {store.root}, or was damaged and is in quarantine now")
    return entry


def _content_of(record: Path) -> str | None:
    try:
        return content_of_record(record)
    except ValueError as error:
        raise EdgepressError(f"{record} is damaged ({error}); `edgepress store verify` quarantines it") from None


@contextmanager
def _open_place(url: str) -> Iterator[tuple[Any, str]]:
    """Yield the file system of a URL and the path in it; every failure there becomes an EdgepressError."""
    try:
        fs, root = fsspec.core.url_to_fs(url)
    except ImportError as error:
        if url.startswith("s3"):
            raise MissingExtra("s3fs", "s3", url) from None
        raise EdgepressError(f"{url}: {error}") from None
    except ValueError as error:
        raise EdgepressError(f"{url}: {error}") from None
    fs.invalidate_cache()  # fsspec keeps its file systems for the whole process, with their old listings
    try:
        yield fs, root.rstrip("/")
    except FileNotFoundError as error:
        raise EdgepressError(f"{url}: there is no {error.filename or error}") from None
    except (OSError, tarfile.TarError) as error:
        raise EdgepressError(f"{url}: {error}") from None
    except _botocore_errors() as error:
        raise EdgepressError(f"{url}: {error}") from None


def _botocore_errors() -> type[Exception]:
    """Return the base of the errors that s3fs passes on unchanged (no credentials, no connection); OSError where botocore is not loaded."""
    return getattr(sys.modules.get("botocore.exceptions"), "BotoCoreError", OSError)


def _members(entry: Entry) -> Iterator[tuple[str, Path]]:
    """Yield (name in an export, file) of an entry, the manifest last."""
    home = f"objects/{entry.identity}"
    for name in sorted(entry.manifest["files"]):
        yield f"{home}/content/{name}", entry.path / name
    yield f"{home}/manifest.json", entry.path.parent / "manifest.json"


def _export_tar(fs: Any, path: str, entries: list[Entry], records: list[Path]) -> TransferReport:
    """Stream all members into one file, which appears when it is whole. Equal entries make equal bytes."""
    files = [member for entry in entries for member in _members(entry)] + [(f"records/{file.name}", file) for file in records]
    listed = {"schema": SCHEMA, "members": [name for name, _ in files]}
    _make_parents(fs, path)
    with _atomic(fs, path) as stream, tarfile.open(fileobj=stream, mode="w|", bufsize=2**20) as tar:
        for name, file in files:
            with file.open("rb") as source:
                _add(tar, name, file.stat().st_size, source)
        text = json.dumps(listed).encode()
        _add(tar, LIST, len(text), io.BytesIO(text))
    return TransferReport(tuple(entry.identity for entry in entries), (), len(records), sum(file.stat().st_size for _, file in files))


def _add(tar: tarfile.TarFile, name: str, size: int, source: IO[bytes]) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o644
    tar.addfile(member, source)


def _export_directory(fs: Any, root: str, entries: list[Entry], records: list[Path]) -> TransferReport:
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
    return TransferReport(tuple(written), tuple(e.identity for e in entries if e.identity not in written), count, size)


def _put(fs: Any, path: str, content: bytes) -> None:
    _make_parents(fs, path)
    with _atomic(fs, path) as stream:
        stream.write(content)


@contextmanager
def _atomic(fs: Any, path: str) -> Iterator[IO[bytes]]:
    """Yield a stream into a file that appears, whole, when the block ends."""
    if not isinstance(fs, LocalFileSystem):
        with fs.transaction, fs.open(path, "wb", block_size=_BLOCK) as stream:
            yield stream
        return
    with atomic_file(Path(path)) as stream:  # the transactions of fsspec would keep it in another file system
        yield stream


def _make_parents(fs: Any, path: str) -> None:
    protocols = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
    if not protocols & _OBJECT_STORES:
        fs.makedirs(path.rpartition("/")[0], exist_ok=True)


def _fetch_tar(fs: Any, path: str, staged: Path, store: Store) -> tuple[int, list[str]]:
    """Unpack into `staged`, and check that nothing is missing. Return the bytes, and the entries that it skipped: none."""
    _check_space(fs.size(path), store)
    seen: list[str] = []
    listed: list[str] | None = None
    size = 0
    with fs.open(path, "rb") as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
        for member in tar:
            content = tar.extractfile(member) if member.isreg() else None
            if content is None:
                raise EdgepressError(f"{path}: {member.name!r} is not a plain file, so this is not an export of a store")
            if member.name == LIST:
                listed = _read_head(content.read(), f"{path}: {LIST}").get("members", [])
                continue
            target = _safe_target(staged, member.name, path)
            with target.open("wb") as out:
                shutil.copyfileobj(content, out, _BLOCK)
            seen.append(member.name)
            size += member.size
    if listed is None:
        raise EdgepressError(f"{path} has no {LIST} at its end: it is incomplete, or not an export of a store")
    if sorted(seen) != sorted(listed):
        raise EdgepressError(f"{path} does not hold what its {LIST} lists")
    return size, []


def _fetch_directory(fs: Any, root: str, staged: Path, store: Store) -> tuple[int, list[str]]:
    """Copy every entry that this store lacks, and every record, into `staged`. Return the bytes, and the entries that it has."""
    if not fs.exists(f"{root}/schema.json"):
        raise EdgepressError(f"{root} has no schema.json, so it is not an export of a store, or does not exist")
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
    _check_space(sum(files.values()), store)
    for path in files:
        fs.get_file(path, str(_safe_target(staged, path.removeprefix(f"{root}/"), root)))
    return sum(files.values()), present


def _listed(fs: Any, folder: str) -> dict[str, Any]:
    """Return the facts of everything in a folder, by path, but hidden files, which are half written; empty where there is no folder."""
    if not fs.exists(folder):
        return {}
    return {facts["name"]: facts for facts in fs.ls(folder, detail=True) if not facts["name"].rpartition("/")[2].startswith(".")}


def _read_head(text: bytes, place: str) -> dict[str, Any]:
    """Return the document with the schema of a store or an export. Raises EdgepressError for another schema; `place` names it there."""
    try:
        document = json.loads(text)
        schema = document["schema"]
    except (ValueError, KeyError, TypeError) as error:
        raise EdgepressError(f"{place} does not belong to a store: {error!r}") from None
    if schema != SCHEMA:
        raise EdgepressError(f"{place} has schema {schema}, this edgepress reads {SCHEMA}")
    return document


def _check_space(needed: int, store: Store) -> None:
    free = shutil.disk_usage(store.root).free
    if needed > free:
        raise EdgepressError(f"the disk of {store.root} has {free / 1e9:.1f} GB free, and this import needs {needed / 1e9:.1f} GB")


def _safe_target(staged: Path, name: str, source: str) -> Path:
    """Return where a member goes. Raises EdgepressError for a name that no export has, such as one that leads outside `staged`."""
    if not _MEMBER.fullmatch(name) or {"", ".", ".."} & set(name.split("/")):
        raise EdgepressError(f"{source}: {name!r} does not belong into an export of a store")
    target = staged / name
    target.parent.mkdir(parents=True, exist_ok=True)
    return target


def _adopt(store: Store, staged: Path, size: int, present: list[str]) -> TransferReport:
    adopted = []
    for home in sorted((staged / "objects").glob("*")):
        with store.lock(home.name):
            if store.get(home.name) is None:
                store.adopt(home.name, home)
                adopted.append(home.name)
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
    return TransferReport(tuple(adopted), tuple(present), count, size)
