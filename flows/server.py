"""A Prefect server of one's own: `python -P -m flows.server FD PARENT LOCK`, a child that dies with the command that started it.

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

from compression.errors import EdgepressError

_SETTINGS = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
    "PREFECT__SERVER_FINAL": "1",
}
_EMBEDDED = {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1"}  # neither UI nor scheduler


@contextmanager
def prefect_server(home: Path, port: int | None = None) -> Iterator[None]:
    """Point Prefect to `PREFECT_API_URL`, or to a server with its database in `home` for as long as the block runs.

    With a `port` it is a whole one, with UI and scheduler; without, it is embedded: an API on any port.
    Must be entered before prefect is imported, from the main thread. Raises EdgepressError where the port is taken, and in place of
    whatever went wrong in the block when the server died under it.
    """
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW", "ignore")
    if os.environ.get("PREFECT_API_URL"):
        yield
        return
    home.mkdir(parents=True, exist_ok=True)
    try:
        listening = socket.create_server(("127.0.0.1", port or 0), backlog=128)
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise EdgepressError(f"port {port}: {reason}; take another, or name the server there in PREFECT_API_URL") from None
    environment = {
        "PREFECT_API_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{home.absolute() / 'prefect.db'}",
        **os.environ,
        **_SETTINGS,
        **(_EMBEDDED if port is None else {"PREFECT_SERVER_API_PORT": str(port)}),  # the UI asks its API there
    }
    with (home / "prefect-server.log").open("a") as log:
        command = [sys.executable, "-P", "-m", "flows.server", str(listening.fileno()), str(os.getpid()), str(home / ".prefect.db.lock")]
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
    except Exception as error:
        if process.poll() is None:
            raise
        raise EdgepressError(
            f"the Prefect server of this command was ended from outside (status {process.returncode}; {home / 'prefect-server.log'}); "
            "`edgepress resume` goes on from here"
        ) from error
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
    from filelock import FileLock
    from prefect.server.api.server import create_app

    class Server(uvicorn.Server):
        """Starts, and so makes or migrates its database, while no other server of this database does: two at once break each other."""

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            with FileLock(sys.argv[3]):
                await super().startup(sockets=sockets)

    listening = socket.socket(fileno=int(sys.argv[1]))
    Server(uvicorn.Config(create_app(), log_level="error", lifespan="on")).run(sockets=[listening])


if __name__ == "__main__":
    main()
