"""The flow that workers of a Prefect pool run for `runner: prefect`: one job. Needs Prefect to be imported; a worker imports it by its name."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.concurrency.sync import concurrency
from prefect.states import Cancelled, Completed, Failed

from compression.files import write_json
from compression.locks import file_lock
from tasks.runners.budget import Budget
from tasks.runners.local import LocalExecutor
from tasks.runners.remote import answered, device_asked, heartbeat_lock, serve

FLOW = "edgepress-job"
GPU_LIMIT = "edgepress-cuda"


@flow(name=FLOW, persist_result=False, log_prints=False)
def job(folder: str, attempt: str) -> Any:
    """One job of an edgepress run, which another flow run waits for.

    Args:
        folder: The job's folder in the store, which must be there on the worker in the same place.
        attempt: What the run that waits calls this attempt.
    """
    place = Path(folder)
    if not place.is_dir():
        return Failed(message=f"this worker does not see {folder}: workers need the store in the same place")
    executor = LocalExecutor(Budget())
    slot = concurrency(GPU_LIMIT) if device_asked(place).startswith("cuda") else nullcontext()
    try:
        with file_lock(heartbeat_lock(place, attempt)), slot:
            executor.preload()
            answer = serve(place, attempt, executor)
            write_json(answered(place, attempt), answer)
    finally:
        executor.close()
    if "stopped" in answer:
        return Cancelled(message="nobody waits for it any more")
    trouble = answer.get("mistake") or answer.get("failed")
    return Failed(message=trouble["message"]) if trouble else Completed(message="done")
