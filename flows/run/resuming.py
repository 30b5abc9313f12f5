"""Plan a run again from its journal, so that it can be resumed. Imports no torch."""

import os
from collections.abc import Callable
from pathlib import Path

from compression.errors import EdgepressError
from flows.planning import Plan, load_recipe, make_plan, select
from tasks.store.journal import Run
from tasks.store.store import Store


def replan(store: Store, run: Run, notify: Callable[[str], None]) -> Plan:
    """Plan a run again: the recipe as it stood then, its overrides, its `only`, and the part of `again` that was not done.

    Changes the working directory to the run's.

    Args:
        store: Where results are kept by identity.
        run: The run to resume.
        notify: Called with a sentence for each difference from then.

    Raises:
        EdgepressError: The directory is gone, or the recipe cannot run any more.
    """
    _notify_if_changed(run, notify)
    if not Path(run.directory).is_dir():
        raise EdgepressError(f"{run.run} ran in {run.directory}, which is not a directory any more; paths of its recipe start there")
    os.chdir(run.directory)
    plan = make_plan(load_recipe(Path(run.file), run.overrides, run.text), store)
    completed = {stage.name for stage in run.stages if stage.state == "Completed"}
    plan = select(plan, only=run.only, force=[name for name in run.again if name not in completed])
    identities = {stage.name: stage.identity for stage in run.stages}
    if changed := [stage.name for stage in plan.stages if identities.get(stage.name, stage.identity) != stage.identity]:
        notify(f"the model, data, edgepress or a library has changed since {run.run}, so these are new: {', '.join(changed)}")
    return plan


def _notify_if_changed(run: Run, notify: Callable[[str], None]) -> None:
    try:
        changed = "has changed" if Path(run.file).read_text() != run.text else ""
    except (OSError, UnicodeDecodeError):
        changed = "cannot be read any more"
    if changed:
        notify(f"{run.file} {changed}; this resumes the recipe as it stood then. To run what stands there now: edgepress run")
