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
from flows.cli.options import DEFAULT_OUTPUTS, DEFAULT_STORE, OnlyStages, OutputsFolder, Overrides, RecipeFile, StoreFolder, grouped_options
from flows.planning import find_recipe, load_recipe, make_plan, select
from flows.planning.source_map import read_value

if TYPE_CHECKING:
    from prefect.client.schemas.objects import WorkPool
    from prefect.deployments.runner import RunnerDeployment
    from prefect.schedules import Schedule

deploy_app = typer.Typer()


@dataclass(frozen=True)
class DeploymentRequest:
    """The options that `serve` and `deploy` share: a recipe, its schedule, and where its results go."""

    recipe: RecipeFile
    cron: Annotated[
        str | None, typer.Option("--cron", help='When to run: "0 3 * * 0" is 3:00 on Sundays. Default: only when someone starts a run.')
    ] = None
    timezone: Annotated[str, typer.Option("--timezone", help="Time zone of --cron, such as Europe/Berlin.")] = "UTC"
    name: Annotated[str | None, typer.Option("--name", help="Name of the deployment. Default: the recipe's.")] = None
    overrides: Overrides = None
    only: OnlyStages = None
    store: StoreFolder = DEFAULT_STORE
    outputs: OutputsFolder = DEFAULT_OUTPUTS


@deploy_app.command()
@grouped_options
def serve(
    request: DeploymentRequest,
    port: Annotated[int, typer.Option(help="Port of Prefect's server and UI, unless PREFECT_API_URL names a server.")] = 4200,
) -> None:
    """Run a recipe on a schedule, on this machine, for as long as this command runs. Ctrl-C ends it, and a run in progress.

    Prefect's UI shows the runs and starts one at once; a retry there resumes a run.

    Example: `edgepress serve demo --cron "0 3 * * 0"`
    """
    from flows.run.prefect_server import check_server, prefect_server

    name, parameters = _check_request(request, Path.cwd(), elsewhere=False)
    with prefect_server(request.store / "prefect", port):
        schedule = _schedule(request)
        api = redacted(check_server())
        deployment = _deployment(name, parameters, schedule)
        # Prefect runs the flow from the working directory: an empty one, because a tasks.py or flows/ here would shadow ours
        with tempfile.TemporaryDirectory(prefix="edgepress-serve-") as empty, contextlib.chdir(empty):
            asyncio.run(_serve(deployment, f"Prefect: {api.removesuffix('/api')}   deployment: {deployment.full_name}   Ctrl-C ends it"))
    print("stopped")


@deploy_app.command()
@grouped_options
def deploy(
    request: DeploymentRequest,
    pool: Annotated[str, typer.Option("--pool", help="The work pool whose workers run it.")],
    directory: Annotated[
        Path | None, typer.Option("--directory", help="Where relative paths start on the workers. Default: this directory.")
    ] = None,
    job_variables: Annotated[
        list[str] | None,
        typer.Option(
            "--job-variable",
            metavar="KEY=VALUE",
            help="A setting of the pool's jobs: image=..., memory=8Gi, env.MLFLOW_TRACKING_URI=http://...",
        ),
    ] = None,
) -> None:
    """Create or change a deployment of a recipe: workers of a Prefect work pool run it, on a schedule or when someone starts it.

    PREFECT_API_URL names the server. Relative paths start in this directory, on the workers too, unless --directory names another.

    Example: `edgepress deploy demo --pool edge --cron "0 3 * * 0" --timezone Europe/Berlin`
    """
    from flows.run.prefect_server import check_server

    schedule = _schedule(request)
    name, parameters = _check_request(request, (directory or Path()).absolute(), elsewhere=True)
    variables = _job_variables(job_variables or ())
    api = redacted(check_server())
    deployment = _deployment(name, parameters, schedule, pool=_work_pool(pool, variables).name, job_variables=variables)
    identifier = deployment.apply()
    print(f"deployed: {deployment.full_name}   {api.removesuffix('/api')}/deployments/deployment/{identifier}")
    print(f"a worker: prefect worker start --pool {pool}   a run now: prefect deployment run {deployment.full_name}")


def _check_request(request: DeploymentRequest, directory: Path, *, elsewhere: bool) -> tuple[str, dict[str, Any]]:
    """Return the deployment's name and its flow's parameters. Raises EdgepressError for a recipe that cannot run.

    A recipe that will run in this directory is planned with its model and data. `elsewhere`: workers run it, maybe on another machine.
    """
    from tasks.store.store import Store

    overrides, only = list(request.overrides or ()), list(request.only or ())
    parsed = load_recipe(find_recipe(request.recipe), tuple(overrides))
    if directory == Path.cwd():
        select(make_plan(parsed, Store(request.store), elsewhere=elsewhere), only=only)
    parameters = {
        "recipe": str(request.recipe), "overrides": overrides, "only": only, "directory": str(directory), "store": str(request.store),
        "outputs": str(request.outputs),
    }  # fmt: skip
    return request.name or parsed.recipe.name, parameters


def _schedule(request: DeploymentRequest) -> "Schedule | None":
    """Raises EdgepressError for an invalid schedule or time zone."""
    from zoneinfo import ZoneInfo

    from prefect.schedules import Cron as CronSchedule

    try:
        ZoneInfo(request.timezone)
    except (KeyError, ValueError, OSError):
        raise EdgepressError(f"--timezone {request.timezone}: there is no such time zone; write it as Europe/Berlin") from None
    try:
        return CronSchedule(request.cron, timezone=request.timezone) if request.cron is not None else None
    except ValueError as error:
        raise EdgepressError(f"--cron: {error}; it is minute, hour, day, month, day of the week, as in '0 3 * * 0'") from None


def _job_variables(settings: Sequence[str]) -> dict[str, Any]:
    """Parse `--job-variable key=value` settings. Values are YAML; those of the environment (`env.KEY=value`) are texts."""
    variables: dict[str, Any] = {"env": {"PYTHONSAFEPATH": "1"}}  # files in a worker's directory must not shadow our packages
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or key in ("", "env"):
            raise EdgepressError(f"--job-variable {setting}: write it as key=value, and a variable of the environment as env.NAME=value")
        if key.startswith("env."):
            variables["env"][key.removeprefix("env.")] = value
            continue
        try:
            variables[key] = read_value(value)
        except ValueError as error:
            raise EdgepressError(f"--job-variable {setting}: {error}") from None
    return variables


def _work_pool(name: str, variables: Mapping[str, Any]) -> "WorkPool":
    """Raises EdgepressError for a work pool that is unknown or whose jobs have no such variables."""
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    with get_client(sync_client=True) as client:
        try:
            pool = client.read_work_pool(name)
        except ObjectNotFound:
            pools = {known.name: f"{known.name} ({known.type})" for known in client.read_work_pools()}
            raise EdgepressError(
                f"there is no work pool {name!r}{nearest(name, pools)}; pools: {', '.join(pools.values()) or 'none'}; "
                f"create it with: prefect work-pool create {name} --type process"
            ) from None
    known = pool.base_job_template.get("variables", {}).get("properties", {})
    for key in variables:
        if known and key not in known:  # a pool created through the API has none before its first worker starts
            raise EdgepressError(
                f"--job-variable {key}: jobs of the pool {name} ({pool.type}) have no such setting{nearest(key, known)}; they have {', '.join(known)}"
            )
    return pool


def _deployment(
    name: str,
    parameters: dict[str, Any],
    schedule: "Schedule | None",
    *,
    pool: str | None = None,
    job_variables: Mapping[str, Any] | None = None,
) -> "RunnerDeployment":
    from prefect.deployments.runner import RunnerDeployment
    from prefect.flows import EntrypointType

    from flows.run import run_recipe

    return RunnerDeployment.from_flow(
        run_recipe, name=name, schedule=schedule, paused=False, parameters=parameters, tags=["edgepress"],
        entrypoint_type=EntrypointType.MODULE_PATH, work_pool_name=pool,
        job_variables=dict(job_variables or {}), version=version("edgepress"),
    )  # fmt: skip


async def _serve(deployment: "RunnerDeployment", greeting: str) -> None:
    """Run scheduled runs one after the other until SIGINT or SIGTERM, which ends a run in progress as Ctrl-C does."""
    from prefect.runner import Runner

    runner = Runner(name=deployment.name, limit=1)
    await runner.aadd_deployment(deployment)
    print(greeting, flush=True)
    serving, stop = asyncio.ensure_future(runner.start()), asyncio.Event()
    await asyncio.sleep(0)  # let the runner install its own handler first; replace it, because it would sys.exit inside the loop
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await asyncio.wait([serving, asyncio.ensure_future(stop.wait())], return_when=asyncio.FIRST_COMPLETED)
    if runner.started:
        await runner.astop()  # ends the run by SIGTERM and waits for it
    elif not serving.done():
        serving.cancel()
    await asyncio.wait([serving])
    if not serving.cancelled():
        serving.result()  # raises the runner's error
