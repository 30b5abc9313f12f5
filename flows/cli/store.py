"""`edgepress store`: what is in the store, whether it is whole, what may go, and carrying results to other stores. Imports no torch."""

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

SHORT = 12  # characters of an identity that are shown
store_app = typer.Typer(no_args_is_help=True, help="Look after the store: list, verify, collect garbage, pin, export, import.")

What = Annotated[str, typer.Argument(help="A run (demo-3), or the first characters of an identity.")]
Place = Annotated[str, typer.Argument(help="A .tar file or a directory: a path, or any URL that fsspec reaches (s3://bucket/results).")]


@store_app.command("ls")
def list_store(
    store: StoreFolder = DEFAULT_STORE,
    outputs: OutputsFolder = DEFAULT_OUTPUTS,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with whole identities.")] = False,
) -> None:
    """List what is in the store, the oldest first.

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
        when = datetime.fromtimestamp(row.committed).strftime("%Y-%m-%d %H:%M")
        table.add_row(row.identity[:SHORT], row.uses, _size(row.bytes), when, "\n".join(row.names), "pinned" if row.pinned else "")
    terminal().print(table)


@store_app.command()
def verify(store: StoreFolder = DEFAULT_STORE) -> None:
    """Read every result, measurement and journal again. Damaged ones are set aside and named; exit code 1 if there are any.

    What was set aside is computed again by the next run that needs it.

    Example: `edgepress store verify`
    """
    from tasks.store.garbage import verify as verify_store

    opened = open_store(store)
    found = verify_store(opened)
    for what, why in found.damaged:
        print(f"damaged: {what}: {why}")
    print(
        f"{found.entries} entries ({_size(found.bytes)}), {found.records} records, {found.runs} runs: "
        + (f"{len(found.damaged)} damaged, set aside in {opened.root / 'damaged'}" if found.damaged else "all whole")
    )
    if found.damaged:
        raise typer.Exit(1)


@store_app.command()
def gc(
    keep_last: Annotated[int, typer.Option("--keep-last", min=1, help="Runs of each recipe whose results stay.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    store: StoreFolder = DEFAULT_STORE,
    outputs: OutputsFolder = DEFAULT_OUTPUTS,
) -> None:
    """Remove what the last runs of each recipe do not need. What a living run or a pin needs stays, with all it was made from.

    With the results go their links and measurements, the scratch of dead runs, `damaged/`, teacher outputs that no unfinished run may read, and older journals.

    Example: `edgepress store gc --keep-last 3 --dry-run`
    """
    from tasks.store.garbage import collect_garbage

    garbage = collect_garbage(open_store(store), outputs, keep_last=keep_last, dry_run=dry_run)
    for item in garbage:
        print(f"{item.kind:<8} {item.name[:SHORT] if item.kind in {'entry', 'record'} else item.name}  {_size(item.bytes)}")
    counts = Counter(item.kind for item in garbage)
    listed = ", ".join(f"{count} {kind}" for kind, count in counts.items()) or "nothing"
    print(f"{'would remove' if dry_run else 'removed'}: {listed}; {_size(sum(item.bytes for item in garbage))}")


@store_app.command()
def pin(what: What, store: StoreFolder = DEFAULT_STORE) -> None:
    """Keep a run's results, or one result and what it was made from, from garbage collection.

    Example: `edgepress store pin demo-3`
    """
    from tasks.store.garbage import pin as pin_in

    print(f"pinned: {pin_in(open_store(store), what)}")


@store_app.command()
def unpin(what: What, store: StoreFolder = DEFAULT_STORE) -> None:
    """Take a pin back.

    Example: `edgepress store unpin demo-3`
    """
    from tasks.store.garbage import unpin as unpin_in

    print(f"no longer pinned: {unpin_in(open_store(store), what)}")


@store_app.command("export")
def export_store(
    place: Place,
    what: Annotated[list[str] | None, typer.Argument(help="Runs, recipes (their last run) or identities. Default: everything.")] = None,
    ancestors: Annotated[bool, typer.Option("--ancestors", help="With all that the named identities were made from.")] = False,
    store: StoreFolder = DEFAULT_STORE,
) -> None:
    """Write results with their manifests and measurements into a .tar or a directory, for another store.

    A directory may be exported to again: what it has is not written twice. `AWS_ENDPOINT_URL` names another S3 server.

    Example: `edgepress store export s3://models/edgepress demo`
    """
    from tasks.store.garbage import with_ancestors
    from tasks.store.transfer import export_entries

    opened = open_store(store)
    chosen = _chosen(opened, what) if what else set(opened.entries())
    if ancestors:
        chosen = with_ancestors(opened, chosen)
    done = export_entries(opened, place, chosen)
    there = f", {len(done.present)} were there" if done.present else ""
    print(f"exported {len(done.entries)} entries and {done.records} records, {_size(done.bytes)}, to {redacted(place)}{there}")


@store_app.command("import")
def import_store(place: Place, store: StoreFolder = DEFAULT_STORE) -> None:
    """Take over results that `store export` wrote, or those of another store's directory. Every file is verified.

    Example: `edgepress store import s3://models/edgepress`
    """
    from tasks.store.store import Store
    from tasks.store.transfer import import_entries

    done = import_entries(Store(store), place)
    there = f", {len(done.present)} were there" if done.present else ""
    print(f"imported {len(done.entries)} entries and {done.records} records, {_size(done.bytes)}, from {redacted(place)}{there}")
    if done.entries:
        print("no run names them yet: `edgepress store pin` keeps them from garbage collection until one does")


def _chosen(store: "Store", what: Iterable[str]) -> set[str]:
    """Identities in the store that these words name. Raises EdgepressError for one that names nothing."""
    from tasks.store.garbage import find
    from tasks.store.journal import read_run, read_runs

    last = {run.recipe: run.run for run in read_runs(store)}
    names = [find(store, last.get(word, word)) for word in what]
    present = set(store.entries())
    return {identity for name in names for identity in ({name} if name in present else read_run(store, name).identities & present)}


def _size(count: int) -> str:
    return f"{count / 1e6:.2f} MB"
