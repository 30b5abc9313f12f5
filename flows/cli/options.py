"""What several commands share: options, their defaults, the console. Imports no torch."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    from tasks.store.store import Store

RecipeFile = Annotated[Path, typer.Argument(help="A recipe file, or the name of a shipped recipe (demo, exports).")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="Put a value over the recipe: --set stages.distilled.temperature=4")]
StoreFolder = Annotated[Path, typer.Option("--store", envvar="EDGEPRESS_STORE", help="Where results are kept by identity.")]
OutputsFolder = Annotated[Path, typer.Option("--outputs", help="Where results are linked by name.")]
DEFAULT_STORE, DEFAULT_OUTPUTS = Path(".edgepress"), Path("outputs")


def terminal() -> Console:
    """The terminal; wide enough for the tables where the output goes into a file."""
    console = Console()
    return console if console.is_terminal else Console(width=200)


def open_store(store: Path) -> "Store":
    """A store that is there: looking into one makes none."""
    from compression.errors import EdgepressError
    from tasks.store.store import Store

    if not (store / "schema.json").is_file():
        raise EdgepressError(f"there is no store in {store}; --store or EDGEPRESS_STORE names another")
    return Store(store)


def write_page(file: Path, text: str) -> None:
    """Write an HTML page where it was asked for, and say so. Raises EdgepressError where that cannot be."""
    from compression.errors import EdgepressError

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    except OSError as error:
        raise EdgepressError(f"{file} cannot be written: {error.strerror}") from None
    print(file)
