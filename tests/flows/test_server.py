"""The embedded Prefect server, alone: it answers, and it dies with the command that started it."""

import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import psutil
import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from compression.errors import EdgepressError
from flows.run.prefect_flow import mark_orphans_crashed
from flows.run.prefect_server import prefect_server
from tasks.store.owner import owner_tag
from tests.prefect_api import ask
from tests.waiting import PATIENCE, until

START = """
import os, sys
from pathlib import Path
from flows.run.prefect_server import prefect_server
with prefect_server(Path(sys.argv[1])):
    print(os.environ["PREFECT_API_URL"], flush=True)
    sys.stdin.read()
print("ended", flush=True)
"""


def test_a_configured_server_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://elsewhere/api")
    before = psutil.Process().children()
    with prefect_server(tmp_path / "home"):
        assert os.environ["PREFECT_API_URL"] == "http://elsewhere/api"
        assert psutil.Process().children() == before
    assert os.environ["PREFECT_API_URL"] == "http://elsewhere/api" and not (tmp_path / "home").exists()


def start(home: Path) -> tuple[subprocess.Popen[str], str, psutil.Process]:
    environment = {**os.environ, "PREFECT_HOME": str(home)}
    environment.pop("PREFECT_API_URL", None)
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", START, home], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )  # fmt: skip
    assert process.stdout is not None
    url = process.stdout.readline().strip()
    (server,) = psutil.Process(process.pid).children()
    return process, url, server


def healthy(url: str) -> bool:
    """Whether a server answers, which may take it long; False where none listens."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=PATIENCE) as answer:
            return bool(answer.read() == b"true")
    except OSError:
        return False


@pytest.mark.slow
def test_the_server_ends_with_its_owner(tmp_path: Path) -> None:
    process, url, server = start(tmp_path)
    assert healthy(url)  # connects at once: the socket listens before the server runs
    process.communicate("", timeout=PATIENCE)
    assert process.returncode == 0 and not server.is_running()
    assert (tmp_path / "prefect.db").is_file()

    process, _, server = start(tmp_path)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert psutil.wait_procs([server], timeout=PATIENCE)[1] == []


@pytest.mark.slow
def test_two_servers_create_one_database_safely(tmp_path: Path) -> None:
    both = [start(tmp_path) for _ in range(2)]
    for _, url, _ in both:
        assert healthy(url)
    for process, _, _ in both:
        process.communicate("", timeout=PATIENCE)
        assert process.returncode == 0


@pytest.mark.slow
def test_orphaned_runs_are_marked_crashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_SERVER_API_DEFAULT_LIMIT", "2")  # of 200: what Prefect gives at a time
    process, url, _ = start(tmp_path)
    host = f"{socket.gethostname()}/{process.pid}"
    for number, owner in enumerate((*[f"{host}/long ago"] * 5, owner_tag())):
        run = {"task_key": "stage", "dynamic_key": str(number), "tags": ["edgepress", f"owner:{owner}"], "state": {"type": "RUNNING"}}
        ask(f"{url}/task_runs/", run)
    with temporary_settings({PREFECT_API_URL: url}):
        mark_orphans_crashed()
    states = [run["state_type"] for page in (0, 2, 4) for run in ask(f"{url}/task_runs/filter", {"offset": page})]
    process.communicate("", timeout=PATIENCE)
    assert sorted(states) == [*["CRASHED"] * 5, "RUNNING"]


@pytest.fixture
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PREFECT_SERVER_ANALYTICS_ENABLED", "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW"):
        monkeypatch.setenv(name, os.environ.get(name, "false" if "ANALYTICS" in name else "ignore"))  # what it sets goes with the test
    monkeypatch.delenv("PREFECT_API_URL", raising=False)


def the_server() -> psutil.Process:
    (server,) = [child for child in psutil.Process().children() if _is_server(child)]
    return server


@pytest.mark.slow
@pytest.mark.usefixtures("own_environment")
def test_a_killed_server_restarts_at_its_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with prefect_server(Path("home")):
        monkeypatch.chdir("/")  # as `edgepress serve` goes elsewhere
        first = the_server()
        first.kill()
        until(lambda: healthy(os.environ["PREFECT_API_URL"]))
        second = the_server()
        assert second.pid != first.pid
    assert not second.is_running()


@pytest.mark.usefixtures("own_environment")
def test_errors_of_a_dead_server_name_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.run.prefect_server._RESTARTS", 0)
    named = pytest.raises(EdgepressError, match="ended from outside .*prefect-server.log.* `edgepress resume`")
    with named, prefect_server(tmp_path):
        server = the_server()
        server.kill()
        psutil.wait_procs([server], timeout=PATIENCE)
        raise ConnectionError("refused")
    with pytest.raises(ZeroDivisionError), prefect_server(tmp_path):  # what went wrong beside a living server stays what it is
        _ = 1 / 0


def _is_server(child: psutil.Process) -> bool:
    return (
        child.status() != psutil.STATUS_ZOMBIE and "flows.run.prefect_server" in child.cmdline()
    )  # of a zombie nobody can ask its command
