"""What the Dockerfiles say, and the build of the worker's image run here."""

import re
import shutil
import subprocess
from pathlib import Path

from tests.docker.services import DOCKER

DOCKERFILES = sorted(DOCKER.glob("*.Dockerfile"))


def instructions(file: Path) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile, continued lines joined, comments left out."""
    lines = [line for line in file.read_text().splitlines() if line and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in joined.splitlines())]


def argument(file: Path, name: str) -> str:
    """The default of a build argument."""
    (value,) = {rest.partition("=")[2] for word, rest in instructions(file) if word == "ARG" and rest.startswith(f"{name}=")}
    return value


def copy_context(out: Path) -> None:
    """What .dockerignore lets through of the checkout, as `COPY . .` has it."""
    root = DOCKER.parent
    for line in (root / ".dockerignore").read_text().splitlines():
        source = root / line[1:]
        if line.startswith("!") and source.is_dir():
            shutil.copytree(source, out / line[1:], ignore=shutil.ignore_patterns("__pycache__", ".env"))
        elif line.startswith("!"):
            shutil.copy2(source, out / line[1:])


def install_worker(context: Path, environment: Path, variables: dict[str, str]) -> None:
    """What the first stage of worker.Dockerfile runs, torch coming from pip's own index."""
    extras = argument(DOCKER / "worker.Dockerfile", "EXTRAS")
    quiet = {"PIP_QUIET": "1", "PIP_NO_COMPILE": "1", "EXTRAS": extras}
    done = subprocess.run(
        ["docker/install.sh", str(environment)], cwd=context, env=variables | quiet, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
