"""The services of docker/compose.yaml, run natively: its commands, its environments, its health checks, with the hosts and ports of this machine."""

import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from tests.waiting import PATIENCE

DOCKER = Path(__file__).resolve().parents[2] / "docker"
SETTINGS = {"POSTGRES_PASSWORD": "a-pass", "S3_ACCESS_KEY": "key", "S3_SECRET_KEY": "secret"}
_VARIABLE = re.compile(r"\$\{(\w+)(?::?([-?])([^}]*))?\}")


def compose() -> dict[str, Any]:
    return yaml.safe_load((DOCKER / "compose.yaml").read_text())


def interpolate(text: str, settings: Mapping[str, str]) -> str:
    """Compose's `${NAME}`, `${NAME:-default}` and `${NAME:?message}`; raises KeyError for a name that has to be set."""

    def value(found: re.Match[str]) -> str:
        name, how, rest = found.groups()
        if settings.get(name):
            return settings[name]
        if how == "-":
            return rest
        raise KeyError(f"{name}: {rest or 'not set'}")

    return _VARIABLE.sub(value, text)


def postgres_programs() -> Path | None:
    """The folder of Debian's newest PostgreSQL; None where it is not installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    return found[-1].parent if found else None


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    listening = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(each.getsockname()[1]) for each in listening]
    for each in listening:
        each.close()
    return ports


class Stack:
    """Services by their names in compose.yaml. Everything they write is below `home`."""

    def __init__(self, home: Path):
        self.home = home
        self.services = compose()["services"]
        names = ("postgres", "s3", "prefect", "mlflow", "worker")
        self.ports = dict(zip(names, free_ports(len(names)), strict=True))
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def here(self, text: str) -> str:
        """A text of the file with variables filled in, and this machine's addresses instead of those of the containers."""
        text = interpolate(text, SETTINGS)
        for name, inside in (("postgres", "5432"), ("s3", "9000"), ("prefect", "4200"), ("mlflow", "5000"), ("worker", "8080")):
            text = text.replace(f"{name}:{inside}", f"127.0.0.1:{self.ports[name]}")
            text = re.sub(rf"((?<=127\.0\.0\.1:)|(?<=localhost:)|(?<=^-s3\.port=)|^){inside}\b", str(self.ports[name]), text)
        return text.replace("0.0.0.0", "127.0.0.1").replace("/opt/edgepress/", f"{DOCKER}/")

    def environment(self, service: str) -> dict[str, str]:
        given = {key: self.here(value) for key, value in self.services[service].get("environment", {}).items()}
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "MLFLOW_", "AWS_"))}
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        return {**inherited, "PATH": path, "PREFECT_HOME": str(self.home / "prefect-home"), **given}

    def start(self, service: str, command: list[str] | None = None, folder: Path | None = None, **more: str) -> None:
        """Start a service by its command, or the one of its image."""
        words = [self.here(word) for word in command or self.services[service]["command"]]
        folder = folder or self.home
        with (self.home / f"{service}.log").open("ab") as log:
            self.running[service] = subprocess.Popen(
                words, env={**self.environment(service), **more}, cwd=folder, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip

    def finish(self, service: str) -> None:
        """Run a service that ends by itself."""
        self.start(service)
        assert self.running.pop(service).wait(timeout=PATIENCE) == 0, self.log(service)

    def stop(self, service: str) -> None:
        process = self.running.pop(service)
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def log(self, service: str) -> str:
        return (self.home / f"{service}.log").read_text()[-3000:]

    def wait_until_healthy(self, service: str, check: list[str] | None = None, seconds: float = PATIENCE) -> None:
        """Ask as compose or the image does (a `CMD` list), until it says yes."""
        kind, *words = check or self.services[service]["healthcheck"]["test"]
        assert kind == "CMD"
        words = [self.here(word) for word in words]
        deadline = time.monotonic() + seconds
        while subprocess.run(words, env=self.environment(service), capture_output=True, check=False).returncode != 0:
            assert service not in self.running or self.running[service].poll() is None, f"{service} ended: {self.log(service)}"
            assert time.monotonic() < deadline, f"{service} is not well: {self.log(service)}"
            time.sleep(0.3)

    @contextmanager
    def postgres(self, programs: Path) -> Iterator[None]:
        """What PostgreSQL's image does at its first start: a superuser with a password, and the scripts of docker-entrypoint-initdb.d."""
        owner = "postgres" if os.geteuid() == 0 else None  # it refuses to run as root
        environment = self.environment("postgres")
        with tempfile.TemporaryDirectory(prefix="edgepress-postgres-") as folder:
            data = Path(folder) / "data"
            secret = Path(folder) / "password"
            secret.write_text(environment["POSTGRES_PASSWORD"])
            if owner:
                for path in (Path(folder), secret):
                    subprocess.run(["chown", owner, path], check=True)
            user = environment["POSTGRES_USER"]
            init = [programs / "initdb", "--pgdata", data, "--username", user, "--pwfile", secret, "--auth", "scram-sha-256", "--no-sync"]
            subprocess.run([str(word) for word in init], check=True, capture_output=True, user=owner, cwd=folder)
            address = ["-h", "127.0.0.1", "-p", str(self.ports["postgres"]), "-k", folder]
            with (self.home / "postgres.log").open("ab") as log:
                command = [str(programs / "postgres"), "-D", str(data), *address]
                self.running["postgres"] = subprocess.Popen(
                    command, user=owner, cwd=folder, stdout=log, stderr=log, stdin=subprocess.DEVNULL
                )
            try:
                connection = {
                    "PGHOST": "127.0.0.1",
                    "PGPORT": str(self.ports["postgres"]),
                    "PGUSER": user,
                    "PGPASSWORD": SETTINGS["POSTGRES_PASSWORD"],
                }
                os.environ.update(connection)
                self.wait_until_healthy("postgres")
                for script in sorted((DOCKER / "postgres").iterdir()):
                    subprocess.run(["psql", "--dbname=postgres", "--quiet", "--file", str(script), "-v", "ON_ERROR_STOP=1"], check=True)
                yield
            finally:
                for name in connection:
                    os.environ.pop(name, None)
                self.stop("postgres")

    @contextmanager
    def up(self, programs: Path) -> Iterator[None]:
        """All servers, started in the order of `depends_on`, each when those before it are well."""
        with self.postgres(programs):
            try:
                self.start_s3()
                self.wait_until_healthy("s3")
                self.finish("bucket")
                for service in ("prefect", "mlflow"):
                    self.start(service)
                for service in ("prefect", "mlflow"):
                    self.wait_until_healthy(service)
                yield
            finally:
                for service in [name for name in self.running if name != "postgres"]:
                    self.stop(service)

    def start_s3(self) -> None:
        """SeaweedFS by the service's command, which the entry point of its image hands to `weed`. Inside a container all of its ports are free."""
        data = self.home / "s3"
        data.mkdir(exist_ok=True)
        parts = ("master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc", "s3.port.grpc")
        own = [f"-{part}={port}" for part, port in zip(parts, free_ports(len(parts)), strict=True)]
        self.start("s3", ["weed", *self.services["s3"]["command"], f"-dir={data}", *own])
