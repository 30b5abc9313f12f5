"""The layering: imports run downward only, and planning stays free of torch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
LIST = """
import importlib, json, pathlib, sys
for package in sys.argv[1:]:
    for file in sorted(pathlib.Path(package).rglob("*.py")):
        name = ".".join(file.with_suffix("").parts).removesuffix(".__init__")
        if name != "tasks.runners.jobs":
            importlib.import_module(name)
            heavy = [m for m in ("torch", "transformers") if m in sys.modules]
            assert not heavy, f"{name} imports {heavy}"
print(json.dumps(sorted(sys.modules)))
"""


def modules_after_importing(*packages: str) -> set[str]:
    done = subprocess.run([sys.executable, "-c", LIST, *packages], capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout))


def test_no_module_of_flows_or_tasks_imports_torch_or_transformers() -> None:
    modules = modules_after_importing("tasks", "flows")
    assert {"flows.cli.main", "flows.run.pipeline", "tasks.execution", "tasks.kinds.distill", "tasks.task"} <= modules


def test_the_command_line_starts_without_prefect_and_mlflow() -> None:
    code = "import json, sys, flows.cli.main, flows.planning.plan, flows.planning.recipe; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "prefect", "mlflow", "datasets"} & set(json.loads(done.stdout))


def test_imports_run_downward_only() -> None:
    command = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run(
        [command, "--config", REPOSITORY / "pyproject.toml", "--no-cache"], capture_output=True, text=True, cwd=REPOSITORY, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "kept, 0 broken" in done.stdout


@pytest.mark.parametrize("package", ["compression", "export"])
def test_algorithms_and_exporters_run_without_prefect_and_mlflow(package: str) -> None:
    forbidden = ("import prefect", "from prefect", "import mlflow", "from mlflow")
    for file in (REPOSITORY / package).rglob("*.py"):
        lines = [line.strip() for line in file.read_text().splitlines()]
        assert not [line for line in lines if line.startswith(forbidden)], file
