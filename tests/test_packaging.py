import os
import re
import subprocess
import tomllib

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.constraints import HEADER, ROOT, declared, installed_closure, render


def test_constraints_are_what_is_installed_and_nothing_else():
    assert (ROOT / "constraints.txt").read_text() == render(installed_closure(declared("dev"))), (
        "constraints.txt is not what this environment proves: run python -m tests.constraints > constraints.txt"
    )


def test_constraints_lie_in_the_declared_ranges():
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().removeprefix(HEADER).splitlines())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    dev = [
        *project["dependencies"],
        *(line for name in ("onnx", "genai", "llamacpp", "dev") for line in project["optional-dependencies"][name]),
    ]
    asked = [requirement for requirement in map(Requirement, dev) if requirement.name != "edgepress"]
    assert len(asked) > 20
    for requirement in asked:
        assert pins[canonicalize_name(requirement.name)] in requirement.specifier, requirement


def test_make_test_checks_everything_in_order_and_ci_calls_it():
    printed = subprocess.run(["make", "--dry-run", "test"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    checks = re.findall(
        r"^\.venv/bin/(ruff check|ruff format --check|lint-imports|mypy|python -m pytest -n 2 --durations=10)$", printed, re.MULTILINE
    )
    assert checks == ["ruff check", "ruff format --check", "lint-imports", "mypy", "python -m pytest -n 2 --durations=10"]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    commands = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line and not line.startswith("#")]
    assert [*commands[:2], commands[-1]] == ["set -euo pipefail", 'cd "$(dirname "$0")/.."', "make test"]
