"""The embedded Prefect server: `python -P -m flows.server FD PARENT`, a child that dies with the command that started it.

Prefect's own temporary server outlives a killed flow. This one asks the kernel for a parent-death signal, and takes a listening socket that
was opened before it, so that no port can be lost between choosing and using it.
"""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_SETTINGS = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
    "PREFECT_UI_ENABLED": "0",
    "PREFECT__SERVER_EPHEMERAL": "1",
    "PREFECT__SERVER_FINAL": "1",
}


@contextmanager
def prefect_server(home: Path) -> Iterator[None]:
    """Point Prefect to `PREFECT_API_URL`, or to an embedded server with its database in `home` for as long as the block runs.

    Must be entered before prefect is imported, from the main thread.
    """
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW", "ignore")
    if os.environ.get("PREFECT_API_URL"):
        yield
        return
    home.mkdir(parents=True, exist_ok=True)
    listening = socket.create_server(("127.0.0.1", 0), backlog=128)
    environment = {
        "PREFECT_API_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{home.absolute() / 'prefect.db'}",
        **os.environ,
        **_SETTINGS,
    }
    with (home / "prefect-server.log").open("a") as log:
        command = [sys.executable, "-P", "-m", "flows.server", str(listening.fileno()), str(os.getpid())]
        process = subprocess.Popen(
            command,
            pass_fds=[listening.fileno()],
            env=environment,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    os.environ["PREFECT_API_URL"] = f"http://127.0.0.1:{listening.getsockname()[1]}/api"
    listening.close()  # the server has it now; were it open here too, calls to a server that died would wait instead of fail
    try:
        yield
    finally:
        del os.environ["PREFECT_API_URL"]
        process.terminate()
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def main() -> None:
    from tasks.worker import die_with_parent

    die_with_parent(int(sys.argv[2]))
    import uvicorn
    from prefect.server.api.server import create_app

    listening = socket.socket(fileno=int(sys.argv[1]))
    uvicorn.Server(uvicorn.Config(create_app(), log_level="error", lifespan="on")).run(sockets=[listening])


if __name__ == "__main__":
    main()
