"""The set that CI proves: `python -m tests.constraints > constraints.txt`, in an environment where `make test` passes."""

import re
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
HEADER = """\
# Every package that `edgepress[dev]` needs, directly or not, at the version that `make test` proves (Linux, Python 3.11, CPU).
# Written by `python -m tests.constraints > constraints.txt`.
"""


def declared(extra: str) -> list[str]:
    """What pyproject.toml asks for with an extra of edgepress."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [*project["dependencies"], *_expanded(project["optional-dependencies"], extra)]


def _expanded(extras: dict[str, list[str]], extra: str) -> list[str]:
    found = []
    for line in extras[extra]:
        asked = Requirement(line)
        found += [line] if asked.name != "edgepress" else [inner for name in asked.extras for inner in _expanded(extras, name)]
    return found


def installed_closure(lines: list[str]) -> dict[str, str]:
    """Installed version of every distribution that the requirements `lines` reach, by canonical name; torch without its build (+cpu).

    Raises PackageNotFoundError for one that is not installed.
    """
    versions: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    waiting = [(Requirement(line), "") for line in lines]
    while waiting:
        needed, outer = waiting.pop()
        if needed.marker and not needed.marker.evaluate({"extra": outer}):
            continue
        name = canonicalize_name(needed.name)
        for extra in {"", *needed.extras} - {e for n, e in seen if n == name}:
            seen.add((name, extra))
            waiting += [(Requirement(line), extra) for line in metadata.requires(name) or []]
        versions[name] = re.sub(r"\+.*", "", metadata.version(name))
    return dict(sorted(versions.items()))


def render(versions: dict[str, str]) -> str:
    """A constraints file."""
    return HEADER + "".join(f"{name}=={version}\n" for name, version in versions.items())


if __name__ == "__main__":
    print(render(installed_closure(declared("dev"))), end="")
