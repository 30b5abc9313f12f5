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
from tasks.runners.remote import heartbeat_lock, requested_device, response_file, serve

FLOW = "edgepress-job"
GPU_LIMIT = "edgepress-cuda"


@flow(name=FLOW, persist_result=False, log_prints=False)
def job(folder: str, attempt: str) -> Any:
    """Run one job of an edgepress run, which another flow run waits for.

    Args:
        folder: The job's folder in the store, which the worker must see in the same place.
        attempt: The name of this attempt.
    """
    place = Path(folder)
    if not place.is_dir():
        return Failed(message=f"this worker does not see {folder}: workers need the store in the same place")
    executor = LocalExecutor(Budget())
    slot = concurrency(GPU_LIMIT) if requested_device(place).startswith("cuda") else nullcontext()
    try:
        with file_lock(heartbeat_lock(place, attempt)), slot:
            executor.preload()
            answer = serve(place, attempt, executor)
            write_json(response_file(place, attempt), answer)
    finally:
        executor.close()
    if "stopped" in answer:
        return Cancelled(message="the run that waited for it ended")
    trouble = answer.get("mistake") or answer.get("failed")
    return Failed(message=trouble["message"]) if trouble else Completed(message="done")
