"""`edgepress serve` and `edgepress deploy`: recipes on a schedule, on this machine or through a work pool. Prefect is imported late."""

import asyncio
import contextlib
import signal
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compression.errors import EdgepressError, nearest
from compression.redaction import redacted
from flows.cli.options import DEFAULT_OUTPUTS, DEFAULT_STORE, OutputsFolder, Overrides, RecipeFile, StoreFolder
from flows.planning.recipe import find_recipe
from flows.planning.source_map import read_value

if TYPE_CHECKING:
    from prefect.client.schemas.objects import WorkPool
    from prefect.deployments.runner import RunnerDeployment
    from prefect.schedules import Schedule

deploy_app = typer.Typer()

Cron = Annotated[
    str | None, typer.Option("--cron", help='When to run: "0 3 * * 0" is 3:00 on Sundays. Without: only when it is asked for.')
]
Timezone = Annotated[str, typer.Option("--timezone", help="Time zone of --cron, such as Europe/Berlin.")]
Name = Annotated[str | None, typer.Option("--name", help="Name of the deployment. Default: the recipe's.")]
Only = Annotated[list[str] | None, typer.Option("--only", metavar="STAGE,...", help="Run only these stages and those they need.")]


@dataclass(frozen=True)
class DeploymentRequest:
    """What is to be deployed: checked, and not known to Prefect yet."""

    name: str
    parameters: Mapping[str, Any]


@deploy_app.command()
def serve(
    recipe: RecipeFile, cron: Cron = None, timezone: Timezone = "UTC", name: Name = None, overrides: Overrides = None, only: Only = None,
    store: StoreFolder = DEFAULT_STORE, outputs: OutputsFolder = DEFAULT_OUTPUTS,
    port: Annotated[int, typer.Option(help="Port of Prefect's server and UI, where PREFECT_API_URL names no other.")] = 4200,
) -> None:  # fmt: skip
    """Run a recipe on a schedule, on this machine, for as long as this command runs. Ctrl-C ends it, and a run that is under way.

    Prefect's UI shows the runs, starts one at once, and retries one: it goes on where it was.

    Example: `edgepress serve demo --cron "0 3 * * 0"`
    """
    from flows.run.prefect_server import prefect_server, reached_server

    wish = _checked(recipe, name, overrides or (), only or (), store, outputs, Path.cwd(), elsewhere=False)
    with prefect_server(store / "prefect", port):
        schedule = _schedule(cron, timezone)
        api = redacted(reached_server())
        deployment = _deployment(wish, schedule)
        # a run imports from where it starts: an empty place, for a tasks.py or flows/ here would shadow ours
        with tempfile.TemporaryDirectory(prefix="edgepress-serve-") as empty, contextlib.chdir(empty):
            asyncio.run(_serve(deployment, f"Prefect: {api.removesuffix('/api')}   deployment: {deployment.full_name}   Ctrl-C ends it"))
    print("stopped")


@deploy_app.command()
def deploy(
    recipe: RecipeFile,
    pool: Annotated[str, typer.Option("--pool", help="The work pool whose workers run it.")],
    cron: Cron = None, timezone: Timezone = "UTC", name: Name = None, overrides: Overrides = None, only: Only = None,
    store: StoreFolder = DEFAULT_STORE, outputs: OutputsFolder = DEFAULT_OUTPUTS,
    directory: Annotated[Path | None, typer.Option("--directory", help="Where relative paths start on the workers. Default: this directory.")] = None,
    job_variables: Annotated[list[str] | None, typer.Option("--job-variable", metavar="KEY=VALUE", help="A setting of the pool's jobs: image=..., memory=8Gi, env.MLFLOW_TRACKING_URI=http://...")] = None,
) -> None:  # fmt: skip
    """Make a deployment of a recipe, or change it: workers of a Prefect work pool run it, on a schedule or when asked.

    PREFECT_API_URL names the server. Relative paths start in this directory, on the workers too; --directory names another.

    Example: `edgepress deploy demo --pool edge --cron "0 3 * * 0" --timezone Europe/Berlin`
    """
    from flows.run.prefect_server import reached_server

    schedule = _schedule(cron, timezone)
    wish = _checked(recipe, name, overrides or (), only or (), store, outputs, (directory or Path()).absolute(), elsewhere=True)
    variables = _job_variables(job_variables or ())
    api = redacted(reached_server())
    deployment = _deployment(wish, schedule, pool=_pool(pool, variables).name, job_variables=variables)
    identifier = deployment.apply()
    print(f"deployed: {deployment.full_name}   {api.removesuffix('/api')}/deployments/deployment/{identifier}")
    print(f"a worker: prefect worker start --pool {pool}   a run now: prefect deployment run {deployment.full_name}")


def _checked(
    recipe: Path, name: str | None, overrides: Sequence[str], only: Sequence[str], store: Path, outputs: Path, directory: Path, *,
    elsewhere: bool,
) -> DeploymentRequest:  # fmt: skip
    """Refuse a recipe that cannot run: checked whole, with model and data, where it will run in this directory.

    elsewhere  by workers that may have another machine
    """
    from flows.planning.plan import make_plan
    from flows.planning.recipe import load_recipe
    from flows.planning.selection import select
    from tasks.store.store import Store

    parsed = load_recipe(find_recipe(recipe), tuple(overrides))
    if directory == Path.cwd():
        select(make_plan(parsed, Store(store), elsewhere=elsewhere), only=only)
    parameters = {
        "recipe": str(recipe), "overrides": list(overrides), "only": list(only), "directory": str(directory), "store": str(store),
        "outputs": str(outputs),
    }  # fmt: skip
    return DeploymentRequest(name or parsed.recipe.name, parameters)


def _schedule(cron: str | None, timezone: str) -> "Schedule | None":
    """The schedule. Raises EdgepressError for one that is none."""
    from zoneinfo import ZoneInfo

    from prefect.schedules import Cron as CronSchedule

    try:
        ZoneInfo(timezone)
    except (KeyError, ValueError, OSError):
        raise EdgepressError(f"--timezone {timezone}: there is no such time zone; write it as Europe/Berlin") from None
    try:
        return CronSchedule(cron, timezone=timezone) if cron is not None else None
    except ValueError as error:
        raise EdgepressError(f"--cron: {error}; it is minute, hour, day, month, day of the week, as in '0 3 * * 0'") from None


def _job_variables(words: Sequence[str]) -> dict[str, Any]:
    """`--job-variable env.KEY=value` and so on, as a mapping. Values are YAML, but those of the environment, which are texts."""
    variables: dict[str, Any] = {"env": {"PYTHONSAFEPATH": "1"}}  # what lies in a worker's directory shadows none of our packages
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or key in ("", "env"):
            raise EdgepressError(f"--job-variable {word}: write it as key=value, and a variable of the environment as env.NAME=value")
        if key.startswith("env."):
            variables["env"][key.removeprefix("env.")] = value
            continue
        try:
            variables[key] = read_value(value)
        except ValueError as error:
            raise EdgepressError(f"--job-variable {word}: {error}") from None
    return variables


def _pool(name: str, variables: Mapping[str, Any]) -> "WorkPool":
    """The work pool; it must take these variables."""
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    with get_client(sync_client=True) as client:
        try:
            pool = client.read_work_pool(name)
        except ObjectNotFound:
            pools = [f"{known.name} ({known.type})" for known in client.read_work_pools()]
            raise EdgepressError(
                f"there is no work pool {name!r}{nearest(name, [known.split(' (')[0] for known in pools])}; pools: {', '.join(pools) or 'none'}; "
                f"make it with: prefect work-pool create {name} --type process"
            ) from None
    known = pool.base_job_template.get("variables", {}).get("properties", {})
    for key in variables:
        if known and key not in known:  # a pool that the API made has none before its first worker comes
            raise EdgepressError(
                f"--job-variable {key}: jobs of the pool {name} ({pool.type}) have no such setting{nearest(key, list(known))}; they have {', '.join(known)}"
            )
    return pool


def _deployment(
    wish: DeploymentRequest, schedule: "Schedule | None", *, pool: str | None = None, job_variables: Mapping[str, Any] | None = None
) -> "RunnerDeployment":
    from prefect.deployments.runner import RunnerDeployment
    from prefect.flows import EntrypointType

    from flows.run.deployment import run_recipe

    return RunnerDeployment.from_flow(
        run_recipe, name=wish.name, schedule=schedule, paused=False,
        parameters=dict(wish.parameters), tags=["edgepress"], entrypoint_type=EntrypointType.MODULE_PATH, work_pool_name=pool,
        job_variables=dict(job_variables or {}), version=version("edgepress"),
    )  # fmt: skip


async def _serve(deployment: "RunnerDeployment", greeting: str) -> None:
    """Run what is scheduled, one after the other, until SIGINT or SIGTERM: then the run under way is ended as by Ctrl-C."""
    from prefect.runner import Runner

    runner = Runner(name=deployment.name, limit=1)
    await runner.aadd_deployment(deployment)
    print(greeting, flush=True)
    serving, asked = asyncio.ensure_future(runner.start()), asyncio.Event()
    await asyncio.sleep(0)  # the runner puts in its own handler first, which would leave by sys.exit in the middle of the loop
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, asked.set)
    await asyncio.wait([serving, asyncio.ensure_future(asked.wait())], return_when=asyncio.FIRST_COMPLETED)
    if runner.started:
        await runner.astop()  # ends the run by SIGTERM, and waits for it
    elif not serving.done():
        serving.cancel()
    await asyncio.wait([serving])
    if not serving.cancelled():
        serving.result()  # raises what the runner failed of
