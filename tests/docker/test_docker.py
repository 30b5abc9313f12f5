"""No engine runs on the test machines: what an image would be built from is checked, and its commands are run here."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.docker.images import DOCKERFILES, instructions, recorded_install
from tests.docker.services import DOCKER, compose, interpolate

ROOT = DOCKER.parent
BIN = Path(sys.executable).parent


def run(*words: object, **more: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False, **more)  # type: ignore[call-overload,no-any-return]


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.stem)
def test_hadolint_finds_nothing(file: Path) -> None:
    found = run(BIN / "hadolint", "--no-color", "--failure-threshold", "info", file)
    assert found.returncode == 0 and not found.stdout, found.stdout + found.stderr


def test_compose_yaml_follows_its_schema() -> None:
    found = run(BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", DOCKER / "compose.yaml")
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.stem)
def test_an_image_is_pinned_and_runs_as_nobody_special(file: Path) -> None:
    said = instructions(file)
    (base,) = {rest.split("=")[1] for word, rest in said if word == "ARG" and rest.startswith("PYTHON=")}
    assert re.fullmatch(r"3\.11\.\d+-slim-\w+", base)
    assert all(rest.startswith("python:${PYTHON}") for word, rest in said if word == "FROM")
    user = [rest for word, rest in said if word == "USER"]
    assert user and user[-1].isdigit() and user[-1] != "0"
    assert "HEALTHCHECK" in [word for word, _ in said]


def test_what_is_copied_into_an_image_reaches_the_build(tmp_path: Path) -> None:
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for file in DOCKERFILES:
        for word, rest in instructions(file):
            if word == "COPY" and not rest.startswith(("--from", ". ")):
                assert all((ROOT / source).is_file() and source.split("/")[0] in kept for source in rest.split()[:-1]), rest
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = {word.rstrip("*") for word in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    needed |= {"pyproject.toml", "constraints.txt", project["project"]["readme"], *project["project"]["license-files"]}
    assert needed <= set(kept)


def test_services_are_pinned_restarted_and_asked_for_their_health() -> None:
    for name, service in compose()["services"].items():
        tag = service["image"].partition(":")[2]
        assert "build" in service or re.search(r"\d", tag), f"{name}: {service['image']}"
        assert name == "bucket" or service["restart"] == "unless-stopped"
        built_with_check = service["image"].startswith("edgepress-worker")
        assert name == "bucket" or built_with_check or service["healthcheck"]["test"][0] == "CMD"
        for need, condition in service.get("depends_on", {}).items():
            assert condition["condition"] == ("service_completed_successfully" if need == "bucket" else "service_healthy")


def test_nothing_is_lost_with_a_container() -> None:
    document = compose()
    kept = {volume.split(":")[0] for service in document["services"].values() for volume in service.get("volumes", ())}
    assert set(document["volumes"]) == kept - {"./postgres"}
    for keeper in ("postgres", "s3", "worker", "worker-cuda"):
        assert document["services"][keeper]["volumes"]


def test_secrets_come_from_the_environment_and_are_asked_for() -> None:
    text = (DOCKER / "compose.yaml").read_text()
    example = dict(line.split("=", 1) for line in (DOCKER / "example.env").read_text().splitlines() if "=" in line and line[0] != "#")
    secrets = {"POSTGRES_PASSWORD", "S3_ACCESS_KEY", "S3_SECRET_KEY"}
    assert {name for name, value in example.items() if not value} == secrets
    for name in secrets:
        with pytest.raises(KeyError, match="docker/.env"):
            interpolate(text, dict.fromkeys(secrets - {name}, "x"))
    filled = interpolate(text, dict.fromkeys(secrets, "a-secret") | example | dict.fromkeys(secrets, "a-secret"))
    assert "${" not in filled and "a-secret" not in text


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.stem)
def test_debian_has_the_packages(file: Path) -> None:
    if shutil.which("apt-cache") is None:
        pytest.skip("no Debian here")
    wanted = [name for word, rest in instructions(file) if word == "RUN" and "apt-get install" in rest
              for name in rest.split("--no-install-recommends")[1].split("&&")[0].split()]  # fmt: skip
    for name in wanted:
        assert "Package:" in run("apt-cache", "show", name).stdout, name


def test_the_worker_is_installed_as_constrained(context: Path, tmp_path: Path) -> None:
    torch, everything = recorded_install(context, tmp_path)
    assert torch == "install -c constraints.txt --index-url https://index torch"
    assert everything == "install -c constraints.txt .[export,harness,s3,dask]"
    assert (context / "constraints.txt").read_text() == (ROOT / "constraints.txt").read_text()


def test_the_worker_runs_with_what_it_requires(worker_environment: Path, tmp_path: Path) -> None:
    programs = worker_environment / "bin"
    made = run(programs / "edgepress", "validate", "demo", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert run(programs / "prefect", "version", cwd=tmp_path).returncode == 0
    assert not (programs / "pytest").exists()  # it is not the environment of the tests


def test_the_servers_requirements_are_of_the_constraints() -> None:
    wanted = [line for line in (DOCKER / "services.txt").read_text().splitlines() if not line.startswith("#")]
    pinned = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    assert set(wanted) <= pinned
