"""What came of the shipped studies: `python -m tests.benchmarks.bench_studies` runs them one after another, and writes their parts of
docs/studies.md and the plots beside it. Each takes 4 to 10 minutes on two cores.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from flows.cli.study import shipped_studies
from flows.planning.study import Study
from flows.report.study_page import markdown, svg
from flows.report.study_results import results
from tests.benchmarks import page

PAGE = Path(__file__).resolve().parents[2] / "docs" / "studies.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("studies", nargs="*", default=list(shipped_studies()), help="default: all")
    parser.add_argument("--folder", type=Path, help="keep the store here, to go on after a stop; default: a temporary directory")
    parser.add_argument("--only-write", action="store_true", help="run nothing; write what the folder's runs say")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="edgepress-bench-") as temporary:
        folder = given.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for name in given.studies:
            if not given.only_write:
                subprocess.run([sys.executable, "-P", "-m", "flows.cli.main", "study", name], cwd=folder, check=True)
            write(name, json.loads((folder / "outputs" / name / "run.json").read_text()))


def write(name: str, summary: dict[str, Any]) -> None:
    """The study's part of the page, and its plot."""
    found = results(Study.model_validate(summary["recipe"]["study"]), summary)
    (PAGE.parent / "studies").mkdir(exist_ok=True)
    (PAGE.parent / "studies" / f"{name}.svg").write_text(svg(found))
    PAGE.write_text(page.replaced(PAGE.read_text(), name, render(name, summary, markdown(found))))


def render(name: str, summary: dict[str, Any], body: str) -> str:
    machine = summary["environment"]["machine"]
    day = time.strftime("%Y-%m-%d", time.gmtime(summary["started"]))
    computed = sum(row["seconds"] for row in summary["rows"]) / 60
    return (
        f"{body}\n![{found_title(summary)}](studies/{name}.svg)\n\nRun with `edgepress study {name}` on {day}: {machine['processor']}, {machine['cores']} "
        f"cores, {summary['environment']['threads']} thread a stage; its stages computed for {computed:.0f} minutes in all."
    )


def found_title(summary: dict[str, Any]) -> str:
    return str(summary["recipe"]["study"]["question"])


if __name__ == "__main__":
    main()
