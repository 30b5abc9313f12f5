"""What the Dockerfiles say, and the build of the worker's image run here."""

import os
import re
import shutil
import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

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


def recorded_install(context: Path, folder: Path) -> list[str]:
    """What docker/install.sh asks of pip, line by line: a python3 that makes an environment with a pip that only takes notes."""
    notes = folder / "notes.txt"
    notes.touch()
    python = folder / "python3"
    python.write_text(f'#!/bin/sh\nmkdir -p "$3/bin"\nprintf "#!/bin/sh\\necho \\$* >> {notes}\\n" > "$3/bin/pip"\nchmod +x "$3/bin/pip"\n')
    python.chmod(0o755)
    variables = {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "EXTRAS": argument(DOCKER / "worker.Dockerfile", "EXTRAS"),
        "TORCH_INDEX": "https://index",
    }
    subprocess.run(["docker/install.sh", str(folder / "venv")], cwd=context, env=variables, check=True)
    return notes.read_text().splitlines()


def make_worker(context: Path, environment: Path) -> None:
    """Make the environment of the worker's image: what its extras require, linked from this one, and edgepress built from `context`."""
    venv.create(environment, symlinks=True)
    python = environment / "bin" / "python"
    (site,) = environment.glob("lib/python*/site-packages")
    extras = argument(DOCKER / "worker.Dockerfile", "EXTRAS")
    for found in requirements("edgepress", set(extras.split(","))).values():
        for name in {file.parts[0] for file in found.files or () if file.parts[0] != ".."}:
            if not (site / name).exists():
                (site / name).symlink_to(Path(str(found.locate_file(name))))
        for script in (point for point in found.entry_points if point.group == "console_scripts"):
            program = environment / "bin" / script.name
            program.write_text(
                f"#!{python}\nimport sys\n\nfrom {script.module} import {script.attr.partition('.')[0]}\n\nsys.exit({script.attr}())\n"
            )
            program.chmod(0o755)
    pip = [sys.executable, "-m", "pip", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(environment), str(context)], check=True)
    (wheel,) = environment.glob("edgepress-*.whl")
    subprocess.run([*pip, "--python", str(python), "install", "--no-deps", "--no-compile", str(wheel)], check=True)


def requirements(distribution: str, extras: set[str]) -> dict[str, metadata.Distribution]:
    """What a distribution with some extras requires here, directly or not, by name; itself left out."""
    found: dict[str, metadata.Distribution] = {}
    open_ones, done = [(distribution, frozenset(extras))], set()
    while open_ones:
        name, wanted = open_ones.pop()
        if (name, wanted) in done:
            continue
        done.add((name, wanted))
        found[name] = metadata.distribution(name)
        for line in found[name].requires or ():
            needed = Requirement(line)
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in wanted or {""}):
                open_ones.append((canonicalize_name(needed.name), frozenset(needed.extras)))
    del found[distribution]
    return found
