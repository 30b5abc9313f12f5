"""`edgepress store`: list, verify and clean a store, and copy results to other stores. Imports no torch."""

import json
from collections import Counter
from collections.abc import Iterable
from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from compression.redaction import redacted
from flows.cli.options import DEFAULT_OUTPUTS, DEFAULT_STORE, OutputsFolder, StoreFolder, open_store, terminal

if TYPE_CHECKING:
    from tasks.store.store import Store
    from tasks.store.transfer import TransferReport

_SHORT = 12  # characters of an identity in tables
store_app = typer.Typer(no_args_is_help=True, help="Look after the store: list, verify, collect garbage, pin, export, import.")

Subject = Annotated[str, typer.Argument(metavar="WHAT", help="A run (demo-3), or the first characters of an identity.")]
Location = Annotated[
    str, typer.Argument(metavar="PLACE", help="A .tar file or a directory: a path, or any URL that fsspec reaches (s3://bucket/results).")
]


@store_app.command("ls")
def list_store(
    store: StoreFolder = DEFAULT_STORE,
    outputs: OutputsFolder = DEFAULT_OUTPUTS,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with full identities.")] = False,
) -> None:
    """List the results in the store, the oldest first.

    Example: `edgepress store ls --json`
    """
    from tasks.store.garbage import list_entries, pins

    opened = open_store(store)
    rows = list_entries(opened, outputs)
    if as_json:
        print(json.dumps({"entries": [row.as_json() for row in rows], "pinned": sorted(pins(opened))}, indent=2))
        return
    table = Table(
        "identity", "stage", "size", "committed", "names", "pinned", caption=f"{len(rows)} entries, {_size(sum(row.bytes for row in rows))}"
    )
    for row in rows:
        committed = datetime.fromtimestamp(row.committed).strftime("%Y-%m-%d %H:%M")
        table.add_row(row.identity[:_SHORT], row.uses, _size(row.bytes), committed, "\n".join(row.names), "pinned" if row.pinned else "")
    terminal().print(table)


@store_app.command()
def verify(store: StoreFolder = DEFAULT_STORE) -> None:
    """Read every result, measurement and journal again. Damaged ones are set aside and named; exit code 1 if there are any.

    The next run that needs one computes it again.

    Example: `edgepress store verify`
    """
    from tasks.store.garbage import verify as verify_store

    opened = open_store(store)
    result = verify_store(opened)
    for name, reason in result.damaged:
        print(f"damaged: {name}: {reason}")
    print(
        f"{result.entries} entries ({_size(result.bytes)}), {result.records} records, {result.runs} runs: "
        + (f"{len(result.damaged)} damaged, set aside in {opened.root / 'damaged'}" if result.damaged else "all intact")
    )
    if result.damaged:
        raise typer.Exit(1)


@store_app.command()
def gc(
    keep_last: Annotated[int, typer.Option("--keep-last", min=1, help="Number of runs of each recipe whose results stay.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what would be removed.")] = False,
    store: StoreFolder = DEFAULT_STORE,
    outputs: OutputsFolder = DEFAULT_OUTPUTS,
) -> None:
    """Remove results that the last runs of each recipe do not need. Those that a running run or a pin needs stay, with all their ancestors.

    This also removes links and measurements of these results, work folders of dead runs, `damaged/`, teacher outputs that no unfinished run may
    read, and older journals.

    Example: `edgepress store gc --keep-last 3 --dry-run`
    """
    from tasks.store.garbage import collect_garbage

    garbage = collect_garbage(open_store(store), outputs, keep_last=keep_last, dry_run=dry_run)
    for item in garbage:
        print(f"{item.kind:<8} {item.name[:_SHORT] if item.kind in {'entry', 'record'} else item.name}  {_size(item.bytes)}")
    counts = Counter(item.kind for item in garbage)
    listed = ", ".join(f"{count} {kind}" for kind, count in counts.items()) or "nothing"
    print(f"{'would remove' if dry_run else 'removed'}: {listed}; {_size(sum(item.bytes for item in garbage))}")


@store_app.command()
def pin(subject: Subject, store: StoreFolder = DEFAULT_STORE) -> None:
    """Protect a run's results, or one result with all its ancestors, from garbage collection.

    Example: `edgepress store pin demo-3`
    """
    from tasks.store.garbage import pin as pin_in

    print(f"pinned: {pin_in(open_store(store), subject)}")


@store_app.command()
def unpin(subject: Subject, store: StoreFolder = DEFAULT_STORE) -> None:
    """Remove a pin.

    Example: `edgepress store unpin demo-3`
    """
    from tasks.store.garbage import unpin as unpin_in

    print(f"no longer pinned: {unpin_in(open_store(store), subject)}")


@store_app.command("export")
def export_store(
    location: Location,
    subjects: Annotated[
        list[str] | None, typer.Argument(metavar="[WHAT]...", help="Runs, recipes (their last run) or identities. Default: everything.")
    ] = None,
    ancestors: Annotated[bool, typer.Option("--ancestors", help="Add all ancestors of the named identities.")] = False,
    store: StoreFolder = DEFAULT_STORE,
) -> None:
    """Write results with their manifests and measurements into a .tar or a directory, for another store.

    A second export to a directory writes only what it lacks. `AWS_ENDPOINT_URL` names another S3 server.

    Example: `edgepress store export s3://models/edgepress demo`
    """
    from tasks.store.garbage import with_ancestors
    from tasks.store.transfer import export_entries

    opened = open_store(store)
    chosen = _identities(opened, subjects) if subjects else set(opened.entries())
    if ancestors:
        chosen = with_ancestors(opened, chosen)
    print(f"exported {_transferred(export_entries(opened, location, chosen), f'to {redacted(location)}')}")


@store_app.command("import")
def import_store(location: Location, store: StoreFolder = DEFAULT_STORE) -> None:
    """Import results that `store export` wrote, or those of another store's directory. Every file is verified.

    Example: `edgepress store import s3://models/edgepress`
    """
    from tasks.store.store import Store
    from tasks.store.transfer import import_entries

    done = import_entries(Store(store), location)
    print(f"imported {_transferred(done, f'from {redacted(location)}')}")
    if done.entries:
        print("no run names them yet: `edgepress store pin` keeps them from garbage collection until one does")


def _transferred(done: "TransferReport", place: str) -> str:
    present = f", {len(done.present)} were there" if done.present else ""
    return f"{len(done.entries)} entries and {done.records} records, {_size(done.bytes)}, {place}{present}"


def _identities(store: "Store", subjects: Iterable[str]) -> set[str]:
    """The identities in the store of runs, recipes and shortened identities. Raises EdgepressError for an unknown one."""
    from tasks.store.garbage import find
    from tasks.store.journal import read_run, read_runs

    last = {run.recipe: run.run for run in read_runs(store)}
    names = [find(store, last.get(subject, subject)) for subject in subjects]
    present = set(store.entries())
    return {identity for name in names for identity in ({name} if name in present else read_run(store, name).identities & present)}


def _size(count: int) -> str:
    return f"{count / 1e6:.2f} MB"
