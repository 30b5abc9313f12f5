"""Looking after a store: what is in it, whether it is whole, what must stay, and removing the rest. Imports no torch.

What must stay: everything that the last runs of each recipe, living runs, and pins need. A thing that is needed keeps its ancestors: opening
it takes none of them, but computing it, or what follows it, again does.
"""

import json
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from compression.errors import EdgepressError
from tasks.store.files import size_of, write_json
from tasks.store.identity import digest
from tasks.store.journal import RUNS, Run, current_state, read_run, read_runs, run_names
from tasks.store.store import Store, open_entry, open_record
from tasks.store.summaries import summary_files

_IDENTITY = re.compile(r"[0-9a-f]{64}")
_SHORTEST = 6  # characters of an identity that are taken for it


@dataclass(frozen=True)
class StoreRow:
    """An entry as it is listed."""

    identity: str
    uses: str
    bytes: int
    committed: float  # Unix time, for people
    content: str
    names: tuple[str, ...]  # links that lead to it
    pinned: bool  # itself, not by a run

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "names": list(self.names)}


@dataclass(frozen=True)
class Verified:
    """How much was read again, and what of it was damaged: what it is, and why it is damaged."""

    entries: int
    records: int
    runs: int
    bytes: int
    damaged: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Garbage:
    """Something nothing needs. `kind`: entry, link, record, work, shared, damaged, summary, run."""

    kind: str
    name: str
    path: Path
    bytes: int = 0  # known once nobody can be at work on it


def list_entries(store: Store, outputs: Path) -> list[StoreRow]:
    """All entries, those that were committed first on top. Links are looked for in `outputs` and where the runs put theirs."""
    names = _links(store, _output_folders(outputs, read_runs(store)))
    pinned = pins(store)
    rows = []
    for identity in store.entries():
        manifest = store.manifest(identity)
        found = tuple(f"{link.parent.parent.name}/{link.parent.name}/{link.name}" for link in names.get(identity, ()))
        rows.append(
            StoreRow(identity, manifest["identity"]["uses"], _bytes(store.root / "objects" / identity), manifest["committed"], manifest["content"], found, identity in pinned)
        )  # fmt: skip
    return sorted(rows, key=lambda row: (row.committed, row.identity))


def verify(store: Store) -> Verified:
    """Read every entry, record and journal again; what does not match is set aside."""
    damaged: list[tuple[str, str]] = []
    total = 0
    entries, records, runs = store.entries(), store.records(), run_names(store)
    for identity in entries:
        home = store.root / "objects" / identity
        with store.lock(identity):
            if not home.exists():
                continue  # collected or set aside since it was listed
            total += _bytes(home)
            try:
                open_entry(home, identity)
            except (OSError, ValueError, KeyError, TypeError) as error:
                damaged.append((f"entry {identity}", _error_text(error)))
                store.set_aside(home)
    for key in records:
        path = store.root / "records" / f"{key}.json"
        try:
            document = open_record(path.read_bytes())
            if "key" in document and digest(document["key"]) != key:
                raise ValueError("it is the record of another key")
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            damaged.append((f"record {key}", _error_text(error)))
            store.set_aside(path)
    for name in runs:
        try:
            read_run(store, name)
        except EdgepressError as error:
            path = store.root / RUNS / f"{name}.json"
            if path.exists():
                damaged.append((f"run {name}", str(error)))
                store.set_aside(path)
    return Verified(len(entries), len(records), len(runs), total, tuple(damaged))


def pins(store: Store) -> set[str]:
    """Identities and runs that are pinned."""
    return {file.stem for file in (store.root / "pins").glob("[!.]*.json")}


def pin(store: Store, what: str) -> str:
    """Keep a run, or an entry, with all it needs, from garbage collection; returns its whole name."""
    name = find(store, what)
    write_json(store.root / "pins" / f"{name}.json", {"pinned": time.time()})
    return name


def unpin(store: Store, what: str) -> str:
    """Take a pin back; returns the whole name. Raises EdgepressError where there is none."""
    known = pins(store)
    found = [name for name in known if name == what or (len(what) >= _SHORTEST and _IDENTITY.fullmatch(name) and name.startswith(what))]
    if len(found) != 1:
        raise EdgepressError(f"{what!r} is not pinned; pinned: {', '.join(sorted(known)) or 'nothing'}")
    (store.root / "pins" / f"{found[0]}.json").unlink()
    return found[0]


def find(store: Store, what: str) -> str:
    """The run of this name, or the one entry whose identity begins so. Raises EdgepressError."""
    if what in run_names(store):
        return what
    found = [identity for identity in store.entries() if identity.startswith(what)] if len(what) >= _SHORTEST else []
    if len(found) != 1:
        many = f"{len(found)} identities begin with {what!r}" if found else f"there is no run and no identity {what!r} in {store.root}"
        raise EdgepressError(f"{many}; `edgepress store ls` lists them, {_SHORTEST} characters or more of one are enough")
    return found[0]


def with_ancestors(store: Store, identities: Iterable[str]) -> set[str]:
    """The identities, and whatever the store has of what they were made from. One that is not (yet) in the store has no known ancestors."""
    present = set(store.entries())
    found: set[str] = set()
    waiting = list(identities)
    while waiting:
        identity = waiting.pop()
        if identity in found:
            continue
        found.add(identity)
        if identity in present:
            waiting += present.intersection(store.manifest(identity)["identity"].get("inputs", {}).values())
    return found


def collect_garbage(store: Store, outputs: Path, *, keep_last: int, dry_run: bool) -> list[Garbage]:
    """Find, and unless `dry_run` remove, what neither the last `keep_last` (>= 1) runs of any recipe, nor a living run, nor a pin needs.

    No run can begin meanwhile; one that began before keeps all it needs. What another process holds the lock of is left alone. Raises
    EdgepressError where no run is known, so that nothing says what is needed, or where a journal or a needed manifest cannot be read.
    """
    with store.lock(RUNS):
        runs, pinned = read_runs(store), pins(store)
        alive = [run for run in runs if current_state(store, run) == "Running"]
        if not runs and not pinned and store.entries():
            raise EdgepressError(
                f"no run is recorded in {store.root}, so all of it would be garbage; run the recipes whose results you want to keep "
                "(it takes them from the store), or pin entries: edgepress store pin IDENTITY"
            )
        kept = {run.run: run for run in [*_last(runs, keep_last), *alive, *(run for run in runs if run.run in pinned)]}
        wanted = {identity for run in kept.values() for identity in run.identities} | {name for name in pinned if _IDENTITY.fullmatch(name)}
        needed = with_ancestors(store, wanted)
        garbage = []
        for item in _find_garbage(store, outputs, runs, kept, needed, quiet=not alive):
            with store.try_lock(_lock_of(item)) as free:
                if free and os.path.lexists(item.path):  # whoever held the lock may have removed it
                    garbage.append(replace(item, bytes=_bytes(item.path)))  # not before: files of who works on it come and go
                    if not dry_run:
                        store.remove(item.path)
        return garbage


def _last(runs: Iterable[Run], count: int) -> list[Run]:
    by_recipe: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: run.sequence):
        by_recipe.setdefault(run.recipe, []).append(run)
    return [run for of_one in by_recipe.values() for run in of_one[-count:]]


def _find_garbage(
    store: Store, outputs: Path, runs: list[Run], kept: Mapping[str, Run], needed: set[str], *, quiet: bool
) -> Iterator[Garbage]:  # fmt: skip
    """Everything that is not needed; journals come last, so that a collection that is broken off can be taken up. `quiet`: no run lives."""
    present = store.entries()
    manifests = [store.manifest(identity) for identity in present if identity in needed]
    contents = {manifest["content"] for manifest in manifests} | {run.base.content for run in kept.values()}
    contents |= {read for manifest in manifests for read in manifest["identity"].get("inputs", {}).values()}  # a local base is its content
    links = _links(store, _output_folders(outputs, runs))
    for identity in sorted({*present, *links} - needed):
        yield from (Garbage("link", f"{link.parent.name}/{link.name}", link) for link in links.get(identity, ()))
        if identity in present:
            yield _garbage("entry", store.root / "objects" / identity)
    for key in store.records():
        path = store.root / "records" / f"{key}.json"
        content = _content_of(path)
        if content is not None and content not in contents:
            yield _garbage("record", path)
    for path in sorted((store.root / "work").iterdir()):
        wanted = path.name in needed and path.name not in present  # what a killed stage left to go on from
        asking = path.name.startswith("dask-") and not quiet  # a run asks its workers by it, for a moment and without a lock
        if not (wanted or asking):
            yield _garbage("work", path)
    if quiet:
        yield from (
            _garbage("work", half) for folder in ("", "records", RUNS, "pins") for half in sorted((store.root / folder).glob(".*.json.*"))
        )
        if all(run.identities.issubset(present) for run in kept.values()):  # otherwise a stage that is still to be made may read it
            yield from (_garbage("shared", path) for path in sorted((store.root / "shared").glob("*/*/")))
        yield from (_garbage("base", path) for path in sorted((store.root / "bases").glob("*")) if _base_content(path) not in contents)
    yield from (_garbage("damaged", path) for path in sorted((store.root / "damaged").iterdir()))
    yield from (Garbage("summary", run, file) for run, file in summary_files(store).items() if run not in kept)
    yield from (_garbage("run", store.root / RUNS / f"{run.run}.json") for run in runs if run.run not in kept)


def _content_of(record: Path) -> str | None:
    """What a record is about, where it says so. Damaged ones are `verify`'s."""
    try:
        return open_record(record.read_bytes()).get("key", {}).get("content")
    except (FileNotFoundError, ValueError):
        return None


def _base_content(base: Path) -> str | None:
    """What a model was normalised to; None where that was never finished."""
    report = base / "report.json"
    return json.loads(report.read_text())["content"] if report.is_file() else None


def _garbage(kind: str, path: Path) -> Garbage:
    return Garbage(kind, path.stem if path.suffix == ".json" else path.name, path)


def _lock_of(item: Garbage) -> str:
    """The lock that whoever works on it holds: that of the identity, of the key of a record that is being made, or of the kind of work."""
    name = item.path.name.removeprefix("measure-")
    return name if _IDENTITY.fullmatch(name) else name.partition("-")[0] if item.kind == "work" else item.kind


def _bytes(path: Path) -> int:
    if path.is_symlink():
        return 0
    return size_of(path) if path.is_dir() else path.stat().st_size


def _error_text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if isinstance(error, KeyError) else str(error)


def _output_folders(outputs: Path, runs: Iterable[Run]) -> list[Path]:
    return sorted({outputs.absolute(), *(Path(run.outputs) for run in runs)})


def _links(store: Store, folders: Iterable[Path]) -> dict[str, list[Path]]:
    """Links `<folder>/<recipe>/<stage>` into this store, by identity."""
    objects = (store.root / "objects").resolve()
    found: dict[str, list[Path]] = {}
    for link in (link for folder in folders for link in sorted(folder.glob("*/*")) if link.is_symlink()):
        target = link.resolve()
        if target.is_relative_to(objects) and target != objects:
            found.setdefault(target.relative_to(objects).parts[0], []).append(link)
    return found
