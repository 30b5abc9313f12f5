"""The command line. Imports no torch: planning and help stay fast."""

import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
import urllib.request
import webbrowser
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from compression.redaction import redacted
from flows.cli.deploy import deploy_app
from flows.cli.failures import report_failure
from flows.cli.model import model_app
from flows.cli.options import (
    DEFAULT_OUTPUTS,
    DEFAULT_STORE,
    OnlyStages,
    OutputsFolder,
    Overrides,
    RecipeFile,
    StoreFolder,
    terminal,
    write_page,
)
from flows.cli.report import report_app
from flows.cli.run import execute_plan, run_app
from flows.cli.store import store_app
from flows.cli.study import study_app
from flows.cli.tracking import tracking_app
from flows.planning import Plan, check_disk, find_recipe, json_schema, load_recipe, make_plan, select

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Compress language models for the edge: prune, distil, fine-tune, quantize, export; one resumable graph, measured at every step.",
)

app.add_typer(run_app)
app.add_typer(deploy_app)
app.add_typer(study_app)
app.add_typer(report_app)
app.add_typer(model_app)
app.add_typer(store_app, name="store")
app.add_typer(tracking_app)


def main() -> None:
    """Run the console script: an error the user can fix prints a message and exits with 2, any other a message and a log and exits with 1."""
    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        app()
    except Exception as error:  # noqa: BLE001  (outermost handler)
        sys.exit(report_failure(error, debug=debug))
    except SystemExit as exit_:
        if exit_.code == 130 and sys.argv[1:2] in (["run"], ["resume"]):  # what typer makes of a KeyboardInterrupt
            Console(stderr=True, soft_wrap=True).print(
                "interrupted: the same command continues from here, and `edgepress resume` in the same MLflow run", markup=False
            )
        raise


def _interrupt(*_: Any) -> NoReturn:
    raise KeyboardInterrupt


@app.command()
def run(
    recipe: RecipeFile,
    overrides: Overrides = None,
    store: StoreFolder = DEFAULT_STORE,
    outputs: OutputsFolder = DEFAULT_OUTPUTS,
    start_from: Annotated[
        list[str] | None,
        typer.Option("--from", metavar="STAGE", help="Compute this stage, and what descends from it, even if the store has it."),
    ] = None,
    force: Annotated[
        list[str] | None, typer.Option("--force", metavar="STAGE", help="Compute only this stage even if the store has it.")
    ] = None,
    only: OnlyStages = None,
    remeasure: Annotated[
        bool, typer.Option("--remeasure", help="Take timings (speed, latency, energy) again even if the store has them.")
    ] = False,
) -> None:
    """Run a recipe. Results in the store are not computed again.

    --from, --force and --only take names of stages, with commas between them. In a sweep, a stage's name means all its copies.

    Example: `edgepress run demo --set stages.distilled.steps=100`
    """
    from tasks.store.store import Store

    opened = Store(store)
    plan = make_plan(load_recipe(find_recipe(recipe), tuple(overrides or ())), opened)
    plan = select(plan, only=only or (), start_from=start_from or (), force=force or ())
    execute_plan(replace(plan, remeasure=remeasure), opened, outputs)


@app.command()
def validate(recipe: RecipeFile, overrides: Overrides = None, store: StoreFolder = DEFAULT_STORE) -> None:
    """Check all of a recipe, against the model's config and the data, without running anything.

    Example: `edgepress validate recipe.yaml`
    """
    from tasks.store.store import Store

    plan = make_plan(load_recipe(find_recipe(recipe), tuple(overrides or ())), Store(store))
    print(f"{recipe}: valid, {len(plan.stages) - 1} stages on {plan.base.source}")
    for warning in plan.base.warnings:
        print(f"warning: {warning}")
    _print_gates(plan)


@app.command()
def plan(recipe: RecipeFile, overrides: Overrides = None, store: StoreFolder = DEFAULT_STORE) -> None:
    """Show the graph: which results the store has, and the estimated size, memory and disk of every stage.

    Example: `edgepress plan demo`
    """
    from flows.cli.screen import plan_table
    from tasks.store.store import Store

    opened = Store(store)
    planned = make_plan(load_recipe(find_recipe(recipe), tuple(overrides or ())), opened)
    terminal().print(plan_table(planned, opened))
    _print_gates(planned)
    check_disk(planned, opened)


@app.command()
def sensitivity(
    recipe: RecipeFile,
    overrides: Overrides = None,
    store: StoreFolder = DEFAULT_STORE,
    bits: Annotated[float, typer.Option(help="Average bits of a weight, from 2 to 8.")] = 4.0,
    group_size: Annotated[int, typer.Option(help="Input channels that share a scale; -1 for a row.")] = 128,
    symmetric: Annotated[bool, typer.Option(help="Round without zero points.")] = True,
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Also write maps of the layers as an HTML page.")] = None,
) -> None:
    """Show which layers of the recipe's model need more bits, and how to distribute an average number of them.

    Example: `edgepress sensitivity demo --bits 4 --group-size 32`
    """
    from flows.cli.sensitivity import show_sensitivity
    from tasks.base import open_base

    parsed = load_recipe(find_recipe(recipe), tuple(overrides or ()))
    model = parsed.recipe.model
    base = open_base(model.path, model.revision, model.license, store)
    page = show_sensitivity(
        parsed.recipe, base.checkpoint, average_bits=bits, group_size=group_size, symmetric=symmetric, console=terminal()
    )
    if html is not None:
        write_page(html, page)


@app.command()
def schema() -> None:
    """Print the JSON schema of recipes, for editors.

    Example: `edgepress schema > recipe.schema.json`
    """

    print(json.dumps(json_schema(), indent=2))


@app.command()
def ui(
    port: Annotated[int, typer.Option(help="Port of the MLflow UI.")] = 5000,
    prefect: Annotated[bool, typer.Option("--prefect", help="Also start Prefect's UI, on port 4200.")] = False,
    browse: Annotated[bool, typer.Option("--open/--no-open", help="Open the address in a browser, where there is a desktop.")] = True,
    store: StoreFolder = DEFAULT_STORE,
) -> None:
    """Start the MLflow UI (and Prefect's), print its address and open it: all runs, grouped by pipeline, with their figures. Ctrl-C ends it.

    Example: `edgepress ui --prefect`
    """
    from tasks.tracking import Tracking
    from tasks.tracking.runs_view import runs_address

    tracking = Tracking(outbox=store / "outbox")
    tracking.flush_leftover()
    tracking.end_orphans()
    servers = [[sys.executable, "-P", "-m", "mlflow", "ui", "--port", str(port)]]
    tracking.share_view()
    address = runs_address(f"http://127.0.0.1:{port}", tracking.experiment)
    print(f"MLflow: {address}", flush=True)
    environment = {**os.environ, "MLFLOW_BACKEND_STORE_URI": tracking.uri, "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    if prefect:
        environment.setdefault("PREFECT_API_DATABASE_CONNECTION_URL", f"sqlite+aiosqlite:///{store.absolute() / 'prefect' / 'prefect.db'}")
        servers.append([sys.executable, "-P", "-m", "prefect", "server", "start"])
        print("Prefect: http://127.0.0.1:4200", flush=True)
    processes = [subprocess.Popen(command, env=environment) for command in servers]
    if browse and sys.stdout.isatty() and (sys.platform == "darwin" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        threading.Thread(target=_open_page, args=[address], daemon=True).start()
    try:
        for process in processes:
            process.wait()
    finally:
        for process in processes:
            process.terminate()


def _open_page(address: str) -> None:
    """Open an address in the browser as soon as its server answers."""
    while True:
        try:
            urllib.request.urlopen(address.partition("#")[0], timeout=10).close()
        except OSError:
            time.sleep(0.5)
        else:
            webbrowser.open(address)
            return


@app.command()
def doctor() -> None:
    """List versions, devices, runtimes and servers, and the packages that stages lack.

    Example: `edgepress doctor`
    """
    from export.runtimes import installed_runtimes
    from tasks.extras import ELSEWHERE, EXTRAS, missing
    from tasks.measurement.measure import machine_fingerprint
    from tasks.stage import stage_kinds
    from tasks.tracking import tracking_uri

    table = Table(title=f"edgepress {metadata.version('edgepress')}", show_header=False)
    table.add_row("python", platform.python_version())
    for package in ("torch", "transformers", "peft", "datasets", "prefect", "mlflow"):
        table.add_row(package, metadata.version(package))
    table.add_row("machine", ", ".join(f"{key} {value}" for key, value in machine_fingerprint().items()))
    table.add_row("devices", _devices())
    for name, version in installed_runtimes().items():
        table.add_row(f"runtime {name}", version or "[red]not installed[/]")
    for extra in EXTRAS:
        absent = missing(extra)
        stages = ", ".join(uses for uses, kind in stage_kinds().items() if kind.extra == extra) or ELSEWHERE[extra]
        table.add_row(
            f"extra {extra}",
            "complete" if not absent else f"[red]missing {', '.join(absent)}[/]: pip install 'edgepress\\[{extra}]' (for {stages})",
        )
    table.add_row("MLflow", redacted(_reachability(tracking_uri())))
    table.add_row(
        "Prefect",
        redacted(_reachability(os.environ["PREFECT_API_URL"] + "/health"))
        if "PREFECT_API_URL" in os.environ
        else "embedded (no PREFECT_API_URL)",
    )
    terminal().print(table)


def _print_gates(plan: "Plan") -> None:
    """Print each gate, presets written out."""
    from flows.planning.gate_checks import gate_lines

    for line in gate_lines(plan.parsed, plan.by_name):
        print(f"gate {line}")


def _devices() -> str:
    done = subprocess.run(
        [sys.executable, "-P", "-c", "import torch; print(*(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())), sep=', ')"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return (
        ", ".join(filter(None, ["cpu", done.stdout.strip()]))
        if done.returncode == 0
        else f"torch fails: {done.stderr.strip().splitlines()[-1]}"
    )


def _reachability(uri: str) -> str:
    if not uri.startswith("http"):
        return uri
    try:
        with urllib.request.urlopen(uri, timeout=3) as response:
            return f"{uri}: reached ({response.status})"
    except OSError as error:
        return f"[red]{uri}: not reached ({error})[/]"


if __name__ == "__main__":
    main()
