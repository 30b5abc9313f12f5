"""`edgepress study`: the questions of the literature as shipped recipes, run and compared with what was published. Imports no torch."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from compression.errors import EdgepressError
from flows.cli.options import DEFAULT_OUTPUTS, DEFAULT_STORE, OutputsFolder, StoreFolder, terminal

STUDIES = Path(__file__).parent.parent / "studies"
study_app = typer.Typer()


@study_app.command()
def study(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="A shipped study, or a recipe file with `study:`. Default: list them.")] = None,
    seeds: Annotated[int | None, typer.Option("--seeds", min=1, help="Repeat every setting with so many seeds, from 0. Default: the recipe's.")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="Put a value over the recipe: --set stages.distilled.steps=30")] = None,
    store: StoreFolder = DEFAULT_STORE,
    outputs: OutputsFolder = DEFAULT_OUTPUTS,
) -> None:  # fmt: skip
    """Run a study of the literature, and say what of it holds here: a table, claim by claim, and a plot beside the published one.

    What is in the store already is not computed again. docs/studies.md tells what came of each.

    Example: `edgepress study kd-temperature --seeds 3`
    """
    if name is None:
        _list()
        return
    from flows.cli.run import execute_plan
    from flows.planning.plan import make_plan
    from flows.planning.recipe import load_recipe
    from flows.report.study_page import markdown, svg, tables, verdict
    from flows.report.study_results import results
    from tasks.store.store import Store

    more = [f"matrix.seed={list(range(seeds))}"] if seeds else []
    parsed = load_recipe(find_study(name), (*(overrides or ()), *more))
    if parsed.recipe.study is None:
        raise EdgepressError(f"{name}: the recipe has no `study:`, so there is nothing to conclude; edgepress run runs it")
    opened = Store(store)
    execute_plan(make_plan(parsed, opened), opened, outputs)
    folder = outputs / parsed.recipe.name
    found = results(parsed.recipe.study, json.loads((folder / "run.json").read_text()))
    (folder / "study.md").write_text(markdown(found))
    (folder / "study.svg").write_text(svg(found))
    console = terminal()
    for table in tables(found):
        console.print(table)
    console.print(f"{verdict(found)}   table: {folder / 'study.md'}   plot: {folder / 'study.svg'}", markup=False, highlight=False)


def find_study(name: str) -> Path:
    """The file of a shipped study, or the one given. Raises EdgepressError where there is neither."""
    shipped, given = STUDIES / f"{name}.yaml", Path(name)
    if shipped.is_file() and not given.is_file():
        return shipped
    if not given.is_file():
        raise EdgepressError(f"there is no study {name!r}, and no such file; studies: {', '.join(shipped_studies())}")
    return given


def shipped_studies() -> dict[str, Path]:
    return {file.stem: file for file in sorted(STUDIES.glob("*.yaml"))}


def _list() -> None:
    from flows.planning.recipe import load_recipe

    table = Table("study", "question", "paper", caption="edgepress study NAME runs one; docs/studies.md tells what came of each")
    for name, file in shipped_studies().items():
        found = load_recipe(file).recipe.study
        if found is not None:
            table.add_row(name, escape(found.question), escape(found.paper))
    terminal().print(table)
