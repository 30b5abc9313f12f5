"""The journal: what every run of a pipeline was asked to do and how far it came, as `runs/<run>.json` in the store. Imports no torch.

It says which entries the last runs need (`edgepress store gc`), which runs there were, and what going on with one takes: the recipe's file and
text, the overrides, the directory it was started in, MLflow's run. Runs are ordered by `sequence`, which only grows: a clock may jump.

A run holds the lock `run-<run>` while it lives, and the kernel takes it back when it dies, however it dies. So a journal that says "Running"
whose lock is free is that of a killed run (`current_state`).
"""

import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from compression.errors import EdgepressError
from compression.redaction import redacted
from tasks.store.files import write_json
from tasks.store.owner import owner_tag
from tasks.store.store import Store

RUNS = "runs"  # the folder, and the lock under which runs begin and garbage is collected
_FILE = re.compile(r"[^.].*-\d+\.json")
State = Literal["Running", "Completed", "Failed", "Interrupted", "Crashed"]


class StageStatus(NamedTuple):
    """What there is to say of a stage."""

    state: str
    reason: str = ""
    seconds: float = 0.0


class RunStage(BaseModel):
    """A stage of a run's plan."""

    model_config = ConfigDict(frozen=True)

    name: str
    uses: str
    identity: str
    inputs: dict[str, str] = Field(default_factory=dict, description="Names of the stages it reads, by role.")
    state: str = Field(
        default="Pending", description="Pending, or as in the summary: Running, Completed, Cached, Failed, Stopped, Skipped."
    )
    reason: str = ""
    seconds: float = Field(default=0.0, description="How long its content took to compute, when that was.")


class RunBase(BaseModel):
    """The base model of a run."""

    model_config = ConfigDict(frozen=True)

    source: str
    identity: str
    content: str = Field(description="Digest of its bytes: records are about it.")


class Run(BaseModel):
    """One run of a pipeline, as its journal has it."""

    model_config = ConfigDict(frozen=True)

    run: str = Field(default="", description="<recipe>-<sequence>: its name for people, and of its file.")
    sequence: int = Field(default=0, description="Grows with every run of the store: the order of runs, whatever the clock says.")
    recipe: str = Field(description="Name of the pipeline.")
    file: str = Field(description="The recipe's file, absolute.")
    text: str = Field(description="What stood in the file.")
    overrides: tuple[str, ...] = Field(default=(), description="Every --set, in order.")
    directory: str = Field(description="Where the command was given: relative paths of the recipe start here.")
    outputs: str = Field(description="The folder with the links, absolute.")
    base: RunBase
    stages: tuple[RunStage, ...] = Field(description="In topological order, without the base, and without what `only` leaves out.")
    only: tuple[str, ...] = Field(default=(), description="Every --only: the run is of these stages and their ancestors. Empty: of all.")
    again: tuple[str, ...] = Field(default=(), description="Stages to compute whatever the store has, from --from and --force.")
    resumes: str | None = Field(default=None, description="The run that this one goes on with.")
    owner: str = Field(default_factory=owner_tag, description="host/pid/start time of the process, for people.")
    started: float = Field(default_factory=time.time, description="Unix time, for people.")
    ended: float | None = None
    state: State = "Running"
    reason: str = Field(default="", description="What the run itself failed of; a stage has its own.")
    tracking_uri: str = Field(default="", description="The MLflow store; empty until its run is open.")
    tracking_run: str = Field(default="", description="MLflow's id of the pipeline's run.")
    flow_run: str = Field(
        default="", description="Prefect's id of the deployment's flow run: when that is retried it goes on with this run."
    )

    @property
    def identities(self) -> frozenset[str]:
        """Entries that the run needs: its plan has every ancestor of every stage."""
        return frozenset(stage.identity for stage in self.stages)


class Journal:
    """The open journal of a run of this process. Threads may use it at once."""

    def __init__(self, store: Store, run: Run):
        self._store, self.run = store, run
        self._lock = threading.Lock()

    def note(self, **fields: object) -> None:
        """Put values in place of fields of the run."""
        with self._lock:
            self.run = self.run.model_copy(update=fields)
            _write(self._store, self.run)

    def stages(self, told: Mapping[str, StageStatus]) -> None:
        """Take down how far stages came, by name; names that are none of the plan's (the base) are left out."""
        with self._lock:
            stages = [
                stage.model_copy(update=told[stage.name]._asdict()) if stage.name in told else stage for stage in self.run.stages
            ]  # fmt: skip
            self.run = self.run.model_copy(update={"stages": tuple(stages)})
            _write(self._store, self.run)

    def end(self, state: State, reason: str = "") -> None:
        """Take down how the run ended. A stage that still ran then was stopped."""
        self.stages({stage.name: StageStatus("Stopped", stage.reason) for stage in self.run.stages if stage.state == "Running"})
        self.note(state=state, reason=reason, ended=time.time())


@contextmanager
def journal(store: Store, run: Run) -> Iterator[Journal]:
    """Begin a run: give it its name, write it down, and hold its lock until the block ends.

    The block calls `end`. One that raises ends the run as Interrupted (Ctrl-C, a worker that goes) or Failed, with the reason.
    From its beginning until its end nothing the run needs is garbage. Raises EdgepressError where the run it resumes lives, or was resumed already.
    """
    with ExitStack() as stack:
        with store.lock(RUNS):
            if run.resumes is not None:
                _check_resumable(store, run.resumes)
            sequence = 1 + max((_sequence(name) for name in run_names(store)), default=0)
            run = run.model_copy(update={"sequence": sequence, "run": f"{run.recipe}-{sequence}"})
            stack.enter_context(store.lock(f"run-{run.run}"))
            _write(store, run)
        opened = Journal(store, run)
        try:
            yield opened
        except BaseException as error:
            if isinstance(error, Exception):
                opened.end("Failed", redacted(str(error)) or type(error).__name__)
            else:
                opened.end("Interrupted")
            raise
        if opened.run.state == "Running":
            raise RuntimeError(f"the run {run.run} ended, and nobody said how")


def run_names(store: Store) -> list[str]:
    """Names of all runs, the oldest first."""
    return sorted((file.stem for file in (store.root / RUNS).iterdir() if _FILE.fullmatch(file.name)), key=_sequence)


def read_run(store: Store, name: str) -> Run:
    """Raises EdgepressError when there is no such run, or its journal cannot be read."""
    file = store.root / RUNS / f"{name}.json"
    try:
        return Run.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        known = run_names(store)
        raise EdgepressError(f"there is no run {name!r} in {store.root}; runs: {', '.join(known[-10:]) or 'none'}") from None
    except ValidationError as error:
        raise EdgepressError(
            f"{file} is no journal of a run ({error.error_count()} faults); `edgepress store verify` sets it aside"
        ) from None


def read_runs(store: Store) -> list[Run]:
    """All runs, the oldest first. Raises EdgepressError for one that cannot be read."""
    return [read_run(store, name) for name in run_names(store)]


def current_state(store: Store, run: Run) -> State:
    """The state of a run; "Crashed" when its process died without a word."""
    if run.state != "Running":
        return run.state
    with store.try_lock(f"run-{run.run}") as free:
        if not free:
            return "Running"
    latest = read_run(store, run.run)  # it may have ended since it was read
    return "Crashed" if latest.state == "Running" else latest.state


def successors(runs: Iterable[Run]) -> dict[str, Run]:
    """By a run's name the one that goes on with it: each run is resumed once at most."""
    return {run.resumes: run for run in runs if run.resumes is not None}


def latest_attempt(store: Store, run: Run, say: Callable[[str], None]) -> Run:
    """The run at the end of the chain that goes on with this one, as it is now. `say` is told of each step."""
    later = successors(read_runs(store))
    while run.run in later:
        say(f"{later[run.run].run} went on with {run.run}")
        run = later[run.run]
    return refresh(store, run)


def refresh(store: Store, run: Run) -> Run:
    """The run with its state now; what ran when it was killed has crashed too."""
    state = current_state(store, run)
    if state == run.state:
        return run
    if state != "Crashed":
        return read_run(store, run.run)  # it ended since it was read
    stages = tuple(s.model_copy(update={"state": "Crashed"}) if s.state == "Running" else s for s in run.stages)
    return run.model_copy(update={"state": state, "stages": stages})


def _check_resumable(store: Store, name: str) -> None:
    if current_state(store, read_run(store, name)) == "Running":
        raise EdgepressError(f"{name} is still running")
    if later := successors(read_runs(store)).get(name):
        raise EdgepressError(f"{later.run} goes on with {name} already")


def _sequence(name: str) -> int:
    return int(name.rpartition("-")[2])


def _write(store: Store, run: Run) -> None:
    write_json(store.root / RUNS / f"{run.run}.json", run.model_dump(mode="json"))
