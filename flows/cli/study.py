"""`edgepress study`: run shipped recipes that repeat studies of the literature, and compare the results. Imports no torch."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from compression.errors import EdgepressError
from flows.cli.options import DEFAULT_OUTPUTS, DEFAULT_STORE, OutputsFolder, Overrides, StoreFolder, terminal
from flows.planning import load_recipe, make_plan

_STUDIES = Path(__file__).parent.parent / "studies"
study_app = typer.Typer()


@study_app.command()
def study(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="A shipped study, or a recipe file with `study:`. Default: list them.")
    ] = None,
    seeds: Annotated[
        int | None, typer.Option("--seeds", min=1, help="Repeat every setting with this many seeds, from 0. Default: the recipe's.")
    ] = None,
    overrides: Overrides = None,
    store: StoreFolder = DEFAULT_STORE,
    outputs: OutputsFolder = DEFAULT_OUTPUTS,
) -> None:
    """Run a study of the literature and judge its claims: a table, a verdict for each claim, and a plot beside the published one.

    Results in the store are not computed again. docs/studies.md shows the results of each study.

    Example: `edgepress study kd-temperature --seeds 3`
    """
    if name is None:
        _list()
        return
    from flows.cli.run import execute_plan
    from flows.report.study_page import markdown, svg, tables, verdict
    from flows.report.study_results import results
    from tasks.store.store import Store

    seed_override = [f"matrix.seed={list(range(seeds))}"] if seeds else []
    parsed = load_recipe(find_study(name), (*(overrides or ()), *seed_override))
    if parsed.recipe.study is None:
        raise EdgepressError(f"{name}: the recipe has no `study:`, so there is nothing to conclude; edgepress run runs it")
    opened = Store(store)
    execute_plan(make_plan(parsed, opened), opened, outputs)
    folder = outputs / parsed.recipe.name
    concluded = results(parsed.recipe.study, json.loads((folder / "run.json").read_text()))
    (folder / "study.md").write_text(markdown(concluded))
    (folder / "study.svg").write_text(svg(concluded))
    console = terminal()
    for table in tables(concluded):
        console.print(table)
    console.print(f"{verdict(concluded)}   table: {folder / 'study.md'}   plot: {folder / 'study.svg'}", markup=False, highlight=False)


def find_study(name: str) -> Path:
    """Return the file of this name, or the shipped study. Raises EdgepressError where neither exists."""
    shipped, file = _STUDIES / f"{name}.yaml", Path(name)
    if file.is_file():
        return file
    if not shipped.is_file():
        raise EdgepressError(f"there is no study {name!r}, and no such file; studies: {', '.join(shipped_studies())}")
    return shipped


def shipped_studies() -> dict[str, Path]:
    return {file.stem: file for file in sorted(_STUDIES.glob("*.yaml"))}


def _list() -> None:

    table = Table("study", "question", "paper", caption="edgepress study NAME runs one; docs/studies.md shows their results")
    for name, file in shipped_studies().items():
        declared = load_recipe(file).recipe.study
        if declared is not None:
            table.add_row(name, escape(declared.question), escape(declared.paper))
    terminal().print(table)
