"""The journal: the plan of every run of a pipeline and how far it came, as `runs/<run>.json` in the store. Imports no torch.

It says which runs there were, which entries the last ones need (`edgepress store gc`), and all that resuming one takes: the recipe's file and
text, the overrides, the directory it was started in, MLflow's run. Runs are ordered by `sequence`, which only grows: a clock may jump.

A run holds the lock `run-<run>` while it lives, and the kernel releases it when its process dies, however it dies. So a journal that says
"Running" whose lock is free belongs to a killed run (`current_state`).
"""

import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from compression.errors import EdgepressError
from compression.files import write_json
from compression.redaction import redacted
from tasks.store.owner import owner_tag
from tasks.store.store import Store

RUNS = "runs"  # the folder, and the lock under which runs start and garbage is collected
_FILE = re.compile(r"[^.].*-\d+\.json")
State = Literal["Running", "Completed", "Failed", "Interrupted", "Crashed"]


class StageStatus(NamedTuple):
    """How far a stage has come."""

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
    seconds: float = Field(default=0.0, description="How long its content took to compute, whichever run did.")


class RunBase(BaseModel):
    """The base model of a run."""

    model_config = ConfigDict(frozen=True)

    source: str
    identity: str
    content: str = Field(description="Digest of its bytes, which records refer to.")


class Run(BaseModel):
    """One run of a pipeline, as its journal records it."""

    model_config = ConfigDict(frozen=True)

    run: str = Field(default="", description="<recipe>-<sequence>: its name, and that of its file.")
    sequence: int = Field(default=0, description="Grows with every run of the store: the order of runs, whatever the clock says.")
    recipe: str = Field(description="Name of the pipeline.")
    file: str = Field(description="The recipe's file, absolute.")
    text: str = Field(description="The text of the file.")
    overrides: tuple[str, ...] = Field(default=(), description="Every --set, in order.")
    directory: str = Field(description="The working directory of the command, where relative paths of the recipe begin.")
    outputs: str = Field(description="The folder with the links, absolute.")
    base: RunBase
    stages: tuple[RunStage, ...] = Field(description="In topological order, without the base, and without those that `only` leaves out.")
    only: tuple[str, ...] = Field(default=(), description="Every --only: the run has these stages and their ancestors. Empty: all.")
    again: tuple[str, ...] = Field(default=(), description="Stages to compute even if the store has them, from --from and --force.")
    resumes: str | None = Field(default=None, description="The run that this one resumes.")
    owner: str = Field(default_factory=owner_tag, description="host/pid/start time of the process, for people.")
    started: float = Field(default_factory=time.time, description="Unix time, for people.")
    ended: float | None = None
    state: State = "Running"
    reason: str = Field(default="", description="Why the run itself failed; each stage has its own reason.")
    tracking_uri: str = Field(default="", description="The MLflow store; empty until its run is open.")
    tracking_run: str = Field(default="", description="MLflow's id of the pipeline's run.")
    flow_run: str = Field(default="", description="Prefect's id of the deployment's flow run: its retry resumes this run.")

    @property
    def identities(self) -> frozenset[str]:
        """The entries that the run needs: its plan has every ancestor of every stage."""
        return frozenset(stage.identity for stage in self.stages)


class Journal:
    """The open journal of a run of this process. Threads may share it."""

    def __init__(self, store: Store, run: Run):
        self._store, self.run = store, run
        self._lock = threading.Lock()

    def update(self, **fields: object) -> None:
        """Replace fields of the run."""
        with self._lock:
            self.run = self.run.model_copy(update=fields)
            _write(self._store, self.run)

    def update_stages(self, statuses: Mapping[str, StageStatus]) -> None:
        """Record how far stages have come, by name; names that are not in the plan (the base) are ignored."""
        with self._lock:
            stages = tuple(s.model_copy(update=statuses[s.name]._asdict()) if s.name in statuses else s for s in self.run.stages)
            self.run = self.run.model_copy(update={"stages": stages})
            _write(self._store, self.run)

    def end(self, state: State, reason: str = "") -> None:
        """Record how the run ended. A stage that is still running was stopped."""
        self.update_stages({stage.name: StageStatus("Stopped", stage.reason) for stage in self.run.stages if stage.state == "Running"})
        self.update(state=state, reason=reason, ended=time.time())


@contextmanager
def journal(store: Store, run: Run) -> Iterator[Journal]:
    """Begin a run: give it its name, write its journal, and hold its lock until the block ends.

    The block calls `Journal.end`; if it raises, the run ends as Interrupted (Ctrl-C, a worker that shuts down) or Failed, with the reason.
    While the run lives, nothing it needs is garbage.

    Raises:
        EdgepressError: The run that this one resumes is still running, or another run resumes it already.
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
        except Exception as error:
            opened.end("Failed", redacted(str(error)) or type(error).__name__)
            raise
        except BaseException:
            opened.end("Interrupted")
            raise
        if opened.run.state == "Running":
            raise RuntimeError(f"the run {run.run} ended without a call of `Journal.end`")


def run_names(store: Store) -> list[str]:
    """Return the names of all runs, the oldest first."""
    return sorted((file.stem for file in (store.root / RUNS).iterdir() if _FILE.fullmatch(file.name)), key=_sequence)


def read_run(store: Store, name: str) -> Run:
    """Return the run of a name. Raises EdgepressError where there is none, or its journal cannot be read."""
    file = store.root / RUNS / f"{name}.json"
    try:
        return Run.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        known = run_names(store)
        raise EdgepressError(f"there is no run {name!r} in {store.root}; runs: {', '.join(known[-10:]) or 'none'}") from None
    except ValidationError as error:
        raise EdgepressError(
            f"{file} is not the journal of a run ({error.error_count()} faults); `edgepress store verify` quarantines it"
        ) from None


def read_runs(store: Store) -> list[Run]:
    """Return all runs, the oldest first. Raises EdgepressError for one that cannot be read."""
    return [read_run(store, name) for name in run_names(store)]


def current_state(store: Store, run: Run) -> State:
    """Return the state of a run; "Crashed" where its process died before it could record how it ended."""
    if run.state != "Running":
        return run.state
    with store.try_lock(f"run-{run.run}") as free:
        if not free:
            return "Running"
    latest = read_run(store, run.run)  # it may have ended since it was read
    return "Crashed" if latest.state == "Running" else latest.state


def successors(runs: Iterable[Run]) -> dict[str, Run]:
    """Return the run that resumes each run, by the name of the resumed one: a run is resumed once at most."""
    return {run.resumes: run for run in runs if run.resumes is not None}


def latest_attempt(store: Store, run: Run, say: Callable[[str], None]) -> Run:
    """Follow the runs that resumed this one and return the last, with its current state; `say` gets a sentence for each step."""
    later = successors(read_runs(store))
    while run.run in later:
        say(f"{later[run.run].run} resumed {run.run}")
        run = later[run.run]
    return refresh(store, run)


def refresh(store: Store, run: Run) -> Run:
    """Return the run with its current state; a stage that ran when the run was killed has crashed too."""
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
        raise EdgepressError(f"{later.run} already resumes {name}")


def _sequence(name: str) -> int:
    return int(name.rpartition("-")[2])


def _write(store: Store, run: Run) -> None:
    write_json(store.root / RUNS / f"{run.run}.json", run.model_dump(mode="json"))
