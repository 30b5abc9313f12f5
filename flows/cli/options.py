"""What several commands share: options, their defaults, the console. Imports no torch."""

import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from tasks.store.store import Store

RecipeFile = Annotated[Path, typer.Argument(help="A recipe file, or the name of a shipped recipe (demo, exports).")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="Override a value of the recipe: --set stages.distilled.temperature=4")]
OnlyStages = Annotated[list[str] | None, typer.Option("--only", metavar="STAGE,...", help="Run only these stages and those they need.")]
StoreFolder = Annotated[Path, typer.Option("--store", envvar="EDGEPRESS_STORE", help="Where results are kept by identity.")]
OutputsFolder = Annotated[Path, typer.Option("--outputs", help="Where results are linked by name.")]
DEFAULT_STORE, DEFAULT_OUTPUTS = Path(".edgepress"), Path("outputs")


def grouped_options(command: Callable[..., None]) -> Callable[..., None]:
    """Let a typer command take dataclasses: each of their fields becomes an argument or option of the command line.

    A field is written as a parameter would be, with `Annotated[..., typer.Option(...)]` as its type.
    """
    signature = inspect.signature(command)
    groups: dict[str, Any] = {
        name: parameter.annotation for name, parameter in signature.parameters.items() if is_dataclass(parameter.annotation)
    }

    @wraps(command)
    def ungrouped(**values: Any) -> None:
        grouped = {name: group(**{field.name: values.pop(field.name) for field in fields(group)}) for name, group in groups.items()}
        command(**grouped, **values)

    def parameter(name: str, default: Any, annotation: Any) -> inspect.Parameter:
        return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)

    parameters = [
        parameter(field.name, inspect.Parameter.empty if field.default is MISSING else field.default, field.type)
        for group in groups.values()
        for field in fields(group)
    ]
    parameters += [parameter(name, p.default, p.annotation) for name, p in signature.parameters.items() if name not in groups]
    ungrouped.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]  # typer reads it
    return ungrouped


def terminal() -> Console:
    """Return the console of the terminal; one wide enough for the tables where the output goes into a file."""
    console = Console()
    return console if console.is_terminal else Console(width=200)


def open_store(store: Path) -> "Store":
    """Open an existing store. Raises EdgepressError where none is there, instead of creating one."""
    from compression.errors import EdgepressError
    from tasks.store.store import Store

    if not (store / "schema.json").is_file():
        raise EdgepressError(f"there is no store in {store}; --store or EDGEPRESS_STORE names another")
    return Store(store)


def write_page(file: Path, text: str) -> None:
    """Write an HTML page and print its path. Raises EdgepressError where the file cannot be written."""
    from compression.errors import EdgepressError

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    except OSError as error:
        raise EdgepressError(f"{file} cannot be written: {error.strerror}") from None
    print(file)
