"""Run a Prefect server for one command: `python -P -m flows.run.prefect_server FD PARENT LOCK`, a child that dies with the command.

Prefect's own temporary server outlives a killed flow. This one asks the kernel for a parent-death signal, and inherits a socket that listens
already, so that no other process can take the port between choosing and using it.
"""

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from compression.errors import EdgepressError

_SETTINGS = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
    "PREFECT__SERVER_FINAL": "1",
}
_RESTARTS = 5
_EMBEDDED = {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1"}  # neither UI nor scheduler


@contextmanager
def prefect_server(home: Path, port: int | None = None) -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """Point Prefect to `PREFECT_API_URL`, or to a server with its database in `home` for as long as the block runs.

    Must be entered from the main thread, before Prefect is imported.

    Args:
        home: Folder of the database and the log.
        port: Port of a full server, with UI and scheduler. Without: an API only, on any free port.

    Yields:
        A context manager for inner blocks, which raises EdgepressError in place of any error once the server is dead and cannot restart.
        This block does the same.

    Raises:
        EdgepressError: The port is taken, or the server died.
    """
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW", "ignore")
    if os.environ.get("PREFECT_API_URL"):
        yield nullcontext
        return
    home = home.absolute()  # a restarted server needs log and lock, in any working directory
    home.mkdir(parents=True, exist_ok=True)
    try:
        listening = socket.create_server(("127.0.0.1", port or 0), backlog=128)
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise EdgepressError(f"port {port}: {reason}; take another, or name the server there in PREFECT_API_URL") from None
    environment = {
        "PREFECT_API_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{home / 'prefect.db'}",
        **os.environ,
        **_SETTINGS,
        **(_EMBEDDED if port is None else {"PREFECT_SERVER_API_PORT": str(port)}),  # the UI calls its API there
    }
    server = _Server(home, listening, environment)
    os.environ["PREFECT_API_URL"] = f"http://127.0.0.1:{server.port}/api"
    try:
        with server.guard():
            yield server.guard
    finally:
        del os.environ["PREFECT_API_URL"]
        server.stop()


def check_server() -> str:
    """Return the address of Prefect's API. Raises EdgepressError where none is configured, or it does not answer."""
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL

    api = PREFECT_API_URL.value()
    if not api:
        raise EdgepressError("PREFECT_API_URL names no server: a deployment needs one that stays, such as that of `prefect server start`")
    try:
        with get_client(sync_client=True) as client:
            error = client.api_healthcheck()
    except ValueError as invalid_address:
        error = invalid_address
    if error is not None:
        raise EdgepressError(
            f"Prefect's server at {api} does not answer ({error or type(error).__name__}); start it, or let PREFECT_API_URL name another "
            "(unset: `edgepress run` and `edgepress serve` start one of their own); nothing was run"
        )
    return str(api)


class _Server:
    """The server's process. It starts again on the same port after a kill, a few times: Prefect's client retries until it answers."""

    def __init__(self, home: Path, listening: socket.socket, environment: Mapping[str, str]):
        self.port: int = listening.getsockname()[1]
        self.log = home / "prefect-server.log"
        self._lock, self._environment = home / ".prefect.db.lock", environment
        self._stopping = threading.Event()
        self.process = self._start(listening)
        threading.Thread(target=self._watch, daemon=True).start()

    def _start(self, listening: socket.socket) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-P", "-m", "flows.run.prefect_server", str(listening.fileno()), str(os.getpid()), str(self._lock)]
        with listening, self.log.open("a") as log:  # close our copy of the socket: otherwise calls to a dead server would wait
            return subprocess.Popen(
                command,
                pass_fds=[listening.fileno()],
                env=self._environment,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def _watch(self) -> None:
        for _ in range(_RESTARTS):
            self.process.wait()
            if self._stopping.is_set():
                return
            try:
                self.process = self._start(socket.create_server(("127.0.0.1", self.port), backlog=128))
            except OSError as error:
                with self.log.open("a") as log:
                    log.write(f"the server was ended, and cannot start again on port {self.port}: {error}\n")
                return
        self.process.wait()  # keep this thread: the kernel ends a child with the thread that started it

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Raise EdgepressError in place of any other error in the block once the server is dead and cannot restart."""
        try:
            yield
        except EdgepressError:
            raise
        except Exception as error:
            if (status := self.exit_status()) is None:
                raise
            raise EdgepressError(
                f"the Prefect server of this command was ended from outside (status {status}; {self.log}) and could not be "
                "restarted; `edgepress resume` continues the run"
            ) from error

    def exit_status(self) -> int | None:
        """The exit status of a dead server, which may take a moment to be known; None while it runs."""
        try:
            return self.process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            return None

    def stop(self) -> None:
        self._stopping.set()
        self.process.terminate()
        try:
            self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def main() -> None:
    from compression.locks import file_lock
    from tasks.runners.worker import die_with_parent

    die_with_parent(int(sys.argv[2]))
    import uvicorn
    from prefect.server.api.server import create_app

    class Server(uvicorn.Server):
        """Start under a lock: two servers that create or migrate one database at once break each other."""

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            with file_lock(Path(sys.argv[3])):
                await super().startup(sockets=sockets)

    listening = socket.socket(fileno=int(sys.argv[1]))
    Server(uvicorn.Config(create_app(), log_level="error", lifespan="on")).run(sockets=[listening])


if __name__ == "__main__":
    main()
