"""What orchestration costs: `python -m tests.benchmarks.bench_orchestration` measures it and writes its part of docs/benchmarks.md.

A sweep of stages that only write a line, at three sizes: what such a stage costs is Prefect, MLflow, the journal, the store and the start of
its process. And the demo when all of it is in the store already.
"""

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks import page
from tests.benchmarks.bench_demo import ELSEWHERE, orchestration_share, run_demo
from tests.kinds import installed

SIZES = (50, 100, 200)
RECIPE = """\
name: trivial
model: embedded
data: {{text: embedded, length: 32, evaluation_windows: 2}}
threads: 1
stages:
  trivial: {{uses: test.trivial}}
matrix: {{trivial.number: {numbers}}}
"""


@dataclass(frozen=True)
class Sweep:
    """Seconds of the command, by what was in the store already."""

    cells: int
    first: float
    cached: float


def main() -> None:
    """Measure and write the part of the page. Raises CalledProcessError where a run fails."""
    with tempfile.TemporaryDirectory(prefix="edgepress-bench-") as folder:
        sweeps = [sweep(Path(folder) / str(cells), cells) for cells in SIZES]
        nothing = sweep(Path(folder) / "1", 1)
        demo = Path(folder) / "demo"
        demo.mkdir()
        summary, wall = run_demo(demo)
        _, again = run_demo(demo)
    environment = summary["environment"]
    body = render([nothing, *sweeps], orchestration_share(summary["rows"], wall), wall, again)
    machine = environment["machine"]
    page.rewrite("orchestration", f"{heading(machine)}\n\n{body}")


def sweep(folder: Path, cells: int) -> Sweep:
    """Run a sweep of trivial stages in an empty directory, and the same again."""
    folder.mkdir(parents=True)
    (folder / "trivial.yaml").write_text(RECIPE.format(numbers=list(range(cells))))
    hidden = {key: value for key, value in os.environ.items() if key not in ELSEWHERE}
    environment = hidden | {"PYTHONPATH": installed(folder / "site")}

    def seconds() -> float:
        started = time.perf_counter()
        command = [sys.executable, "-P", "-m", "flows.cli.main", "run", "trivial.yaml"]
        subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - started

    return Sweep(cells, seconds(), seconds())


def heading(machine: dict[str, object]) -> str:
    return (
        f"## Orchestration\n\nWritten by `make bench-orchestration` on {time.strftime('%Y-%m-%d')}: {machine['processor']}, "
        f"{machine['cores']} cores, {machine['memory_gib']} GiB of memory."
    )


def render(sweeps: list[Sweep], share: float, wall: float, again: float) -> str:
    """The part of the page. `sweeps` begin with the one of a single cell, whose time is that of a run as such."""
    one = sweeps[0]
    lines = [
        [str(s.cells), f"{s.first:.1f}", f"{(s.first - one.first) / (s.cells - 1):.3f}", f"{s.cached:.1f}", f"{(s.cached - one.cached) / (s.cells - 1):.3f}"]
        for s in sweeps[1:]
    ]  # fmt: skip
    headings = ["cells", "first run s", "s a stage", "all cached s", "s a stage"]
    return f"""A sweep of stages that write one line, each in a process of its own; a run of one such stage takes {one.first:.1f} s, and \
{one.cached:.1f} s when it is in the store. Seconds a stage are those beyond it.

{page.markdown(headings, ["---:"] * 5, lines)}
- The demo, first run: {wall:.0f} s, of which orchestration {share:.1%}.
- The demo again, nothing changed: {again:.1f} s.
"""


if __name__ == "__main__":
    main()
