"""What the demo costs and where the time goes: `python -m tests.benchmarks.bench_demo` runs it twice and writes its part of docs/benchmarks.md."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.text import Text

from flows.cli.screen import results_table
from tests.benchmarks import page

ELSEWHERE = ("EDGEPRESS_STORE", "MLFLOW_TRACKING_URI", "PREFECT_API_URL")  # would take the run out of its empty directory

Summary = dict[str, Any]


def main() -> None:
    """Run the demo in an empty directory, then again, and write its part of the page. Raises CalledProcessError where a run fails."""
    with tempfile.TemporaryDirectory(prefix="edgepress-bench-") as folder:
        first = run_demo(Path(folder))
        second = run_demo(Path(folder))
    page.rewrite("demo", render(*first, *second))


def run_demo(folder: Path) -> tuple[Summary, float]:
    """The summary of one run, and the seconds from the start of the command to its end."""
    environment = {key: value for key, value in os.environ.items() if key not in ELSEWHERE}
    started = time.perf_counter()
    subprocess.run([sys.executable, "-P", "-m", "flows.cli.main", "run", "demo"], cwd=folder, env=environment, check=True)
    wall = time.perf_counter() - started
    return json.loads((folder / "outputs" / "demo" / "run.json").read_text()), wall


def render(first: Summary, first_wall: float, second: Summary, second_wall: float) -> str:
    """The part of the page. `first` is the summary of a run that computed everything, `second` of the same one right after it."""
    machine, date = first["environment"]["machine"], time.strftime("%Y-%m-%d", time.gmtime(first["started"]))
    cached = sum(row["state"] == "Cached" for row in second["rows"])
    return f"""## The demo

Written by `make bench-demo` on {date}: {machine["processor"]}, {machine["cores"]} cores, {machine["memory_gib"]} GiB of memory, device \
{first["environment"]["device"]}, {first["environment"]["threads"]} threads a stage, edgepress {first["environment"]["edgepress"]}.

{demo_table(first)}
- First run: {first_wall:.0f} s for the command.
- Second run, nothing changed: {second_wall:.0f} s, {cached} of {len(second["rows"])} rows from the store.

### Where the time goes

{time_table(first["rows"], first_wall)}
Orchestration (Prefect, MLflow, the start of processes, imports, hashing) is what is left of the command's time: \
{orchestration_share(first["rows"], first_wall):.1%}.
"""


def demo_table(summary: Summary) -> str:
    """The table that the command prints, as markdown."""
    columns = results_table(summary).columns
    headings = [str(column.header) for column in columns]
    aligned = ["---:" if column.justify == "right" else "---" for column in columns]
    rows = zip(*([Text.from_markup(str(cell)).plain for cell in column.cells] for column in columns), strict=True)
    return page.markdown(headings, aligned, [list(row) for row in rows])


def time_table(rows: list[dict[str, Any]], wall: float) -> str:
    """Seconds of computing and of measuring by stage, and their share of the command's time, as markdown."""
    lines = [
        [row["stage"], f"{computing(row):.1f}", f"{row['measure_seconds']:.1f}", f"{(computing(row) + row['measure_seconds']) / wall:.1%}"]
        for row in rows
    ]
    return page.markdown(["stage", "computing s", "measuring s", "share"], ["---", "---:", "---:", "---:"], lines)


def computing(row: dict[str, Any]) -> float:
    """Seconds in which a row was computed in this run; what came from the store, and the base model, took none."""
    return float(row["seconds"]) if row["computed"] else 0.0


def orchestration_share(rows: list[dict[str, Any]], wall: float) -> float:
    """1 - (seconds of computing and measuring) / (seconds of the command).

    Raises ValueError where they add up to more than the command took: then stages ran side by side, or the seconds hold waiting.
    """
    inside = sum(computing(row) + row["measure_seconds"] for row in rows)
    if inside > wall:
        raise ValueError(
            f"the stages' seconds add up to {inside:.1f}, and the command took {wall:.1f}: they overlap, so no share can be told"
        )
    return 1 - inside / wall


if __name__ == "__main__":
    main()
