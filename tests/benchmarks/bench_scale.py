"""How wall time falls from one worker to two: `python -m tests.benchmarks.bench_scale` writes its part of docs/benchmarks.md.

A sweep of stages that keep one core busy each, on workers of one job at a time: Dask's, and Prefect's. All on this machine, so it needs cores.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from tasks.measurement.measure import machine_fingerprint
from tests.benchmarks import page
from tests.flows.recipes import recipe
from tests.tasks.cluster import DaskCluster, PrefectPool

CELLS = "matrix: {gptq.bits: [2, 3, 4, 8], gptq.group_size: [32, 64]}\n"
STAGES = "  gptq: {uses: quantize.gptq, bits: 4, group_size: 32}\n"
DATA = "{text: embedded, questions: null, length: 256, calibration_windows: 128, evaluation_windows: 32}"
COUNT = 8


class Row(NamedTuple):
    """Seconds of one run of the sweep, from the start of the command to its end."""

    runner: str
    workers: int
    seconds: float


def main() -> None:
    """Run the sweep with each runner and one and two workers, and write the part of the page. Raises CalledProcessError where a run fails."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="edgepress-bench-") as name:
        folder = Path(name)
        (folder / "sweep.yaml").write_text(recipe("embedded", STAGES, CELLS, DATA))
        for workers in (1, 2):
            rows.append(Row("local", workers, seconds(folder, f"local-{workers}", f"execution.cores={workers}")))
            place = folder / f"dask-{workers}-cluster"
            place.mkdir()
            with DaskCluster(place, workers) as dask:
                rows.append(
                    Row("dask", workers, seconds(folder, f"dask-{workers}", "execution.runner=dask", f"execution.address={dask.address}"))
                )
            place = folder / f"prefect-{workers}-cluster"
            place.mkdir()
            with PrefectPool(place, workers) as pool:
                settings = ("execution.runner=prefect", "execution.pool=edge")
                rows.append(Row("prefect", workers, seconds(folder, f"prefect-{workers}", *settings, PREFECT_API_URL=pool.address)))
    page.rewrite("scale", render(rows))


def seconds(folder: Path, store: str, *settings: str, **environment: str) -> float:
    """Seconds of the command, in a store of its own."""
    command = [sys.executable, "-P", "-m", "flows.cli.main", "run", "sweep.yaml", "--store", store, "--outputs", f"{store}-out"]
    elsewhere = ("EDGEPRESS_STORE", "MLFLOW_TRACKING_URI", "PREFECT_API_URL")  # would take the run out of its empty directory
    kept = {key: value for key, value in os.environ.items() if key not in elsewhere}
    started = time.perf_counter()
    subprocess.run(
        [*command, *(word for setting in settings for word in ("--set", setting))], cwd=folder, env=kept | environment, check=True
    )
    return time.perf_counter() - started


def render(rows: list[Row]) -> str:
    """The part of the page."""
    machine = machine_fingerprint()
    by_runner: dict[str, dict[int, float]] = {}
    for row in rows:
        by_runner.setdefault(row.runner, {})[row.workers] = row.seconds
    lines = [[runner, f"{times[1]:.0f}", f"{times[2]:.0f}", f"{times[2] / times[1]:.2f}"] for runner, times in by_runner.items()]
    table = page.markdown(["runner", "one worker s", "two workers s", "ratio"], ["---", "---:", "---:", "---:"], lines)
    return f"""## From one worker to two

Written by `make bench-scale` on {time.strftime("%Y-%m-%d")}: {machine["processor"]}, {machine["cores"]} cores. A sweep of {COUNT} cells of `quantize.gptq` on the \
embedded model, one thread each, in an empty store: seconds of the whole command. A worker does one job at a time (local: `cores` of the budget); all of them, the \
flow, its servers and its MLflow share this machine.

{table}"""


if __name__ == "__main__":
    main()
