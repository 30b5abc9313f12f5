"""`edgepress sync`: send MLflow what it missed while it did not answer. Imports no torch."""

import typer

from compression.errors import EdgepressError
from compression.redaction import redacted
from flows.cli.options import DEFAULT_STORE, StoreFolder, open_store

tracking_app = typer.Typer()


@tracking_app.command()
def sync(store: StoreFolder = DEFAULT_STORE) -> None:
    """Send MLflow what it missed while it did not answer. `edgepress run` and `edgepress resume` do so too before they start.

    Runs in progress send their own calls. Exit code 1 where calls still wait or were refused.

    Example: `edgepress sync`
    """
    from tasks.tracking import Tracking, full_address
    from tasks.tracking.outbox import addresses, waiting

    folder = open_store(store).root / "outbox"
    problems: list[str] = []
    for uri in addresses(folder):
        try:
            tracking = Tracking(full_address(uri), folder, problems.append)
            print(f"MLflow at {redacted(uri)}: {tracking.flush_leftover()} calls sent")
            tracking.end_orphans()
        except EdgepressError as error:
            problems.append(str(error))
    if count := waiting(folder):
        problems.append(f"{count} calls still wait in {folder}")
    elif not problems:
        print("MLflow has everything")
    if problems:
        typer.echo("\n".join(problems), err=True)
        raise typer.Exit(1)
