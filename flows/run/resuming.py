"""What going on with a run takes: its plan again, as its journal has it. Imports no torch."""

import os
from collections.abc import Callable
from pathlib import Path

from compression.errors import EdgepressError
from flows.planning.plan import Plan, make_plan
from flows.planning.recipe import load_recipe
from flows.planning.selection import select
from tasks.store.journal import Run
from tasks.store.store import Store


def replan(store: Store, run: Run, say: Callable[[str], None]) -> Plan:
    """The run's plan: the recipe as it stood then, its overrides, its `only`, and what of `again` was not done. Goes to its directory.

    `say` is told what is another than it was then. Raises EdgepressError where the directory is gone or the recipe cannot run any more.
    """
    _say_if_changed(run, say)
    if not Path(run.directory).is_dir():
        raise EdgepressError(f"{run.run} ran in {run.directory}, which is no directory any more; paths of its recipe start there")
    os.chdir(run.directory)
    plan = make_plan(load_recipe(Path(run.file), run.overrides, run.text), store)
    made = {stage.name for stage in run.stages if stage.state == "Completed"}
    plan = select(plan, only=run.only, force=[name for name in run.again if name not in made])
    before = {stage.name: stage.identity for stage in run.stages}
    if other := [stage.name for stage in plan.stages if before.get(stage.name, stage.identity) != stage.identity]:
        say(f"the model, data, edgepress or a library is another than in {run.run}, so these are new: {', '.join(other)}")
    return plan


def _say_if_changed(run: Run, say: Callable[[str], None]) -> None:
    try:
        changed = "has changed" if Path(run.file).read_text() != run.text else ""
    except (OSError, UnicodeDecodeError):
        changed = "cannot be read any more"
    if changed:
        say(f"{run.file} {changed}; this goes on with what stood in it then. To run what stands there now: edgepress run")
