"""Run a plan: the pipeline, resuming, deployments, and the records of a whole run in MLflow. Imports no torch, and Prefect on first use."""

from typing import TYPE_CHECKING

from compression.lazy import lazy_names

if TYPE_CHECKING:
    from flows.run.deployment import run_recipe
    from flows.run.pipeline import RunOutcome, run_pipeline
    from flows.run.resuming import replan

__all__ = ["RunOutcome", "replan", "run_pipeline", "run_recipe"]
__getattr__ = lazy_names(
    __name__,
    RunOutcome="flows.run.pipeline",
    replan="flows.run.resuming",
    run_pipeline="flows.run.pipeline",
    run_recipe="flows.run.deployment",
)
