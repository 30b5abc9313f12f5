"""Maintenance of a store: list and verify its content, pin what must stay, collect the garbage. Imports no torch.

Everything that the last runs of each recipe, living runs, and pins need must stay, with all its ancestors: nobody needs them to open it, but
computing it again, or anything that follows it, does.
"""

import json
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from compression.errors import EdgepressError
from compression.files import size_of, write_json
from tasks.ancestry import walk_ancestors
from tasks.store.identity import digest
from tasks.store.journal import RUNS, Run, current_state, read_run, read_runs, run_names
from tasks.store.store import Store, content_of_record, open_entry, open_record
from tasks.store.summaries import summary_files

_IDENTITY = re.compile(r"[0-9a-f]{64}")
_SHORTEST = 6  # characters that suffice to name an identity


@dataclass(frozen=True)
class StoreRow:
    """An entry as `edgepress store ls` lists it."""

    identity: str
    uses: str
    bytes: int
    committed: float  # Unix time, for people
    content: str
    names: tuple[str, ...]  # links to it, as outputs/recipe/stage
    pinned: bool  # itself; a pinned run does not count

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "names": list(self.names)}


@dataclass(frozen=True)
class Verified:
    """How much `verify` read, and what of it was damaged: what it is, and why it is damaged."""

    entries: int
    records: int
    runs: int
    bytes: int
    damaged: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Garbage:
    """Something that nothing needs. `kind`: entry, link, record, work, shared, base, damaged, summary, run."""

    kind: str
    name: str
    path: Path
    bytes: int = 0  # measured only under its lock: without, files come and go


def list_entries(store: Store, outputs: Path) -> list[StoreRow]:
    """Return all entries, in the order of their commits. Names are those of links in `outputs` and in the output folders of all runs."""
    links = _links(store, _output_folders(outputs, read_runs(store)))
    pinned = pins(store)
    rows = []
    for identity in store.entries():
        manifest = store.manifest(identity)
        row = StoreRow(
            identity,
            uses=manifest["identity"]["uses"],
            bytes=_bytes(store.root / "objects" / identity),
            committed=manifest["committed"],
            content=manifest["content"],
            names=tuple("/".join(link.parts[-3:]) for link in links.get(identity, ())),
            pinned=identity in pinned,
        )
        rows.append(row)
    return sorted(rows, key=lambda row: (row.committed, row.identity))


def verify(store: Store) -> Verified:
    """Read every entry, record and journal again, and quarantine the damaged ones."""
    damaged: list[tuple[str, str]] = []
    total = 0
    entries, records, runs = store.entries(), store.records(), run_names(store)
    for identity in entries:
        home = store.root / "objects" / identity
        with store.lock(identity):
            if not home.exists():
                continue  # collected or quarantined since it was listed
            total += _bytes(home)
            try:
                open_entry(home, identity)
            except (OSError, ValueError, KeyError, TypeError) as error:
                damaged.append((f"entry {identity}", _error_text(error)))
                store.quarantine(home)
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
            store.quarantine(path)
    for name in runs:
        try:
            read_run(store, name)
        except EdgepressError as error:
            path = store.root / RUNS / f"{name}.json"
            if path.exists():
                damaged.append((f"run {name}", str(error)))
                store.quarantine(path)
    return Verified(len(entries), len(records), len(runs), total, tuple(damaged))


def pins(store: Store) -> set[str]:
    """Return the identities and the names of runs that are pinned."""
    return {file.stem for file in (store.root / "pins").glob("[!.]*.json")}


def pin(store: Store, name: str) -> str:
    """Exempt a run or an entry, and all it needs, from garbage collection; return its full name."""
    name = find(store, name)
    write_json(store.root / "pins" / f"{name}.json", {"pinned": time.time()})
    return name


def unpin(store: Store, name: str) -> str:
    """Remove a pin; return the full name. Raises EdgepressError where it is not pinned."""
    known = pins(store)
    matches = [pin for pin in known if pin == name or (len(name) >= _SHORTEST and _IDENTITY.fullmatch(pin) and pin.startswith(name))]
    if len(matches) != 1:
        raise EdgepressError(f"{name!r} is not pinned; pinned: {', '.join(sorted(known)) or 'nothing'}")
    (store.root / "pins" / f"{matches[0]}.json").unlink()
    return matches[0]


def find(store: Store, name: str) -> str:
    """Return the name of a run as it is, or the one identity of an entry that begins so. Raises EdgepressError for any other name."""
    if name in run_names(store):
        return name
    matches = [identity for identity in store.entries() if identity.startswith(name)] if len(name) >= _SHORTEST else []
    if len(matches) != 1:
        reason = (
            f"{len(matches)} identities begin with {name!r}" if matches else f"there is no run and no identity {name!r} in {store.root}"
        )
        raise EdgepressError(f"{reason}; `edgepress store ls` lists them, {_SHORTEST} characters or more of one are enough")
    return matches[0]


def with_ancestors(store: Store, identities: Iterable[str]) -> set[str]:
    """Return the identities, and all entries that they were made from. One that is not (yet) in the store has no known ancestors."""
    present = set(store.entries())

    def inputs(identity: str) -> set[str]:
        return present.intersection(store.manifest(identity)["identity"].get("inputs", {}).values()) if identity in present else set()

    return set(walk_ancestors(identities, inputs))


def collect_garbage(store: Store, outputs: Path, *, keep_last: int, dry_run: bool) -> list[Garbage]:
    """Find, and unless `dry_run` remove, everything that no kept run and no pin needs; return it.

    No run can begin meanwhile; one that began before keeps all it needs. Whatever another process has locked stays.

    Args:
        store: The store.
        outputs: A folder with links to results, searched besides those of the runs.
        keep_last: How many runs of each recipe are kept besides living and pinned ones, 1 or more.
        dry_run: Remove nothing.

    Raises:
        EdgepressError: The store has entries and neither runs nor pins, so nothing says what is needed; or a journal or a needed manifest
            cannot be read.
    """
    with store.lock(RUNS):
        runs, pinned = read_runs(store), pins(store)
        living = [run for run in runs if current_state(store, run) == "Running"]
        if not runs and not pinned and store.entries():
            raise EdgepressError(
                f"no run is recorded in {store.root}, so all of it would be garbage; run the recipes whose results you want to keep "
                "(it takes them from the store), or pin entries: edgepress store pin IDENTITY"
            )
        kept = {run.run: run for run in [*_last_runs(runs, keep_last), *living, *(run for run in runs if run.run in pinned)]}
        wanted = {identity for run in kept.values() for identity in run.identities} | {name for name in pinned if _IDENTITY.fullmatch(name)}
        needed = with_ancestors(store, wanted)
        garbage = []
        for item in _find_garbage(store, outputs, runs, kept, needed, idle=not living):
            with store.try_lock(_lock_of(item)) as free:
                if free and os.path.lexists(item.path):  # its last user may have removed it
                    garbage.append(replace(item, bytes=_bytes(item.path)))
                    if not dry_run:
                        store.remove(item.path)
        return garbage


def _last_runs(runs: Iterable[Run], count: int) -> list[Run]:
    by_recipe: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: run.sequence):
        by_recipe.setdefault(run.recipe, []).append(run)
    return [run for recipe_runs in by_recipe.values() for run in recipe_runs[-count:]]


def _find_garbage(
    store: Store,
    outputs: Path,
    runs: list[Run],
    kept: Mapping[str, Run],
    needed: set[str],
    *,
    idle: bool,
) -> Iterator[Garbage]:
    """Yield everything that is not needed. Journals come last: the next collection finishes one that was killed. `idle`: no run is living."""
    present = store.entries()
    manifests = [store.manifest(identity) for identity in present if identity in needed]
    contents = {manifest["content"] for manifest in manifests} | {run.base.content for run in kept.values()}
    contents |= {
        source for manifest in manifests for source in manifest["identity"].get("inputs", {}).values()
    }  # of a local base: its content
    links = _links(store, _output_folders(outputs, runs))
    for identity in sorted({*present, *links} - needed):
        yield from (Garbage("link", f"{link.parent.name}/{link.name}", link) for link in links.get(identity, ()))
        if identity in present:
            yield _garbage("entry", store.root / "objects" / identity)
    for key in store.records():
        path = store.root / "records" / f"{key}.json"
        content = None
        with suppress(ValueError):  # a damaged record is the business of `verify`
            content = content_of_record(path)
        if content is not None and content not in contents:
            yield _garbage("record", path)
    for path in sorted((store.root / "work").iterdir()):
        resumable = path.name in needed and path.name not in present  # the unfinished work of a killed stage
        handshake = path.name.startswith("dask-") and not idle  # a living run probes its workers through it, without a lock
        if not (resumable or handshake):
            yield _garbage("work", path)
    if idle:
        yield from (
            _garbage("work", partial)
            for folder in ("", "records", RUNS, "pins")
            for partial in sorted((store.root / folder).glob(".*.json.*"))
        )
        if all(run.identities.issubset(present) for run in kept.values()):  # otherwise a stage that is not computed yet may read it
            yield from (_garbage("shared", path) for path in sorted((store.root / "shared").glob("*/*/")))
        yield from (_garbage("base", path) for path in sorted((store.root / "bases").glob("*")) if _base_content(path) not in contents)
    yield from (_garbage("damaged", path) for path in sorted((store.root / "damaged").iterdir()))
    yield from (Garbage("summary", run, file) for run, file in summary_files(store).items() if run not in kept)
    yield from (_garbage("run", store.root / RUNS / f"{run.run}.json") for run in runs if run.run not in kept)


def _base_content(base: Path) -> str | None:
    """Return the digest of a normalised model; None where its normalisation never finished."""
    report = base / "report.json"
    return json.loads(report.read_text())["content"] if report.is_file() else None


def _garbage(kind: str, path: Path) -> Garbage:
    return Garbage(kind, path.stem if path.suffix == ".json" else path.name, path)


def _lock_of(item: Garbage) -> str:
    """Return the name of the lock that its users hold: the identity, the key of the record that is measured, or the kind of work."""
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
    """Return the links `<folder>/<recipe>/<stage>` into this store, by identity."""
    objects = (store.root / "objects").resolve()
    found: dict[str, list[Path]] = {}
    for link in (link for folder in folders for link in sorted(folder.glob("*/*")) if link.is_symlink()):
        target = link.resolve()
        if target.is_relative_to(objects) and target != objects:
            found.setdefault(target.relative_to(objects).parts[0], []).append(link)
    return found
