"""The crash drill: `python -m tests.drill` (or `make drill`) kills a run again and again, and looks at what comes of it.

A recipe runs once undisturbed. Then it runs in another directory, where SIGKILL strikes it at moments that a seed draws: while it starts, in
training, in a calibration walk, while a stage is committed to the store, between stages, while a result is measured; it strikes the command
itself or only one of its children. After each end the run is gone on with, by `edgepress resume` or by the same `edgepress run`. A moment is
recognised by what the run writes into its store, not by the clock, so it is met on any machine; whether the blow fell where it was meant to
is looked at afterwards, and one that fell beside is no kill of the count.
"""

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tasks.measurement.measure import machine_fingerprint
from tests.benchmarks import page
from tests.drill.kills import Report, drill


def lines(report: Report) -> list[tuple[str, str]]:
    """What is to be told: the kills by kind, what they cost, and what held in the end."""
    kinds = Counter((moment.where, moment.whom) for moment, _ in report.kills)
    kills = [
        (f"kills in {where}, of {'the command' if whom == 'command' else 'a child'}", str(count))
        for (where, whom), count in sorted(kinds.items())
    ]
    checks = [(what, f"{'no' if any(f.startswith(what) for f in report.faults) else 'yes'}: {found}") for what, found in report.checks]
    return [
        *kills, ("kills", str(len(report.kills))), ("blows beside their moment", str(report.stray)),
        ("commands", ", ".join(f"{count} {name}" for name, count in report.commands.items())),
        ("seconds, undisturbed and killed", f"{report.undisturbed_seconds:.0f}, {report.seconds:.0f}"),
        ("largest scratch", f"{report.largest_scratch:.0f} MB"), *checks,
    ]  # fmt: skip


def show(report: Report, console: Console) -> None:
    """One table, then every fault."""
    table = Table("", "", title=f"crash drill: {'all is well' if not report.faults else f'{len(report.faults)} faults'}", show_header=False)
    for line in lines(report):
        table.add_row(*line)
    console.print(table)
    for fault in report.faults:
        console.print(f"fault: {fault}", style="red", markup=False)


def part(report: Report, seed: int) -> str:
    """The part of docs/benchmarks.md."""
    date, machine = time.strftime("%Y-%m-%d"), machine_fingerprint()
    return (
        f"## The crash drill\n\nWritten by `make drill` (seed {seed}) on {date}: {machine['processor']}, {machine['cores']} cores, "
        f"{machine['memory_gib']} GiB of memory. What is done: [reliability.md](reliability.md).\n\n"
        + page.markdown(["", ""], ["---", "---"], lines(report))
        + "".join(f"\nFault: {fault}\n" for fault in report.faults)
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.drill", description="Kill a run again and again, and compare what comes of it.")
    parser.add_argument("--kills", type=int, default=30, help="how many times SIGKILL strikes (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="draws the moments (default: %(default)s)")
    parser.add_argument("--recipe", default="demo", help="a shipped recipe, or a file (default: %(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="an override of the recipe; may be repeated")
    parser.add_argument("--folder", type=Path, help="an empty folder to work in and keep (default: a temporary one)")
    parser.add_argument("--page", action="store_true", help="write the result into docs/benchmarks.md")
    given = parser.parse_args()
    if given.kills < 0:
        parser.error("--kills must not be negative")
    recipe = str(Path(given.recipe).absolute()) if Path(given.recipe).suffix in {".yaml", ".yml"} else given.recipe
    console = Console(width=None if sys.stdout.isatty() else 140)
    with tempfile.TemporaryDirectory(prefix="edgepress-drill-") as temporary:
        report = drill(recipe, given.set, given.folder or Path(temporary), kills=given.kills, seed=given.seed, say=console.print)
    show(report, console)
    if given.page:
        page.rewrite("drill", part(report, given.seed))
    return 1 if report.faults else 0


if __name__ == "__main__":
    sys.exit(main())
