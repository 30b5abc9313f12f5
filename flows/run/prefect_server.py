"""A Prefect server of one's own: `python -P -m flows.run.prefect_server FD PARENT LOCK`, a child that dies with the command that started it.

Prefect's own temporary server outlives a killed flow. This one asks the kernel for a parent-death signal, and takes a listening socket that
was opened before it, so that no port can be lost between choosing and using it.
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

    With a `port` it is a whole one, with UI and scheduler; without, it is embedded: an API on any port.
    Must be entered before prefect is imported, from the main thread. Raises EdgepressError where the port is taken, and in place of
    whatever went wrong in the block when the server died under it for good. Yields a block that does so too, for within another.
    """
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW", "ignore")
    if os.environ.get("PREFECT_API_URL"):
        yield nullcontext
        return
    home = home.absolute()  # whose log and lock are needed again when the server is, wherever this process has gone
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
        **(_EMBEDDED if port is None else {"PREFECT_SERVER_API_PORT": str(port)}),  # the UI asks its API there
    }
    server = _Server(home, listening, environment)
    os.environ["PREFECT_API_URL"] = f"http://127.0.0.1:{server.port}/api"
    try:
        with server.blamed():
            yield server.blamed
    finally:
        del os.environ["PREFECT_API_URL"]
        server.stop()


def reached_server() -> str:
    """The address of Prefect's API. Raises EdgepressError where none is named, or none answers."""
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL

    api = PREFECT_API_URL.value()
    if not api:
        raise EdgepressError("PREFECT_API_URL names no server: a deployment needs one that stays, such as that of `prefect server start`")
    try:
        with get_client(sync_client=True) as client:
            error = client.api_healthcheck()
    except ValueError as wrong:  # an address that is none
        error = wrong
    if error is not None:
        raise EdgepressError(
            f"Prefect's server at {api} does not answer ({error or type(error).__name__}); start it, or let PREFECT_API_URL name another "
            "(unset: `edgepress run` and `edgepress serve` start one of their own); nothing was run"
        )
    return str(api)


class _Server:
    """The server's process. One that is killed is started again on the same port, a few times: Prefect's client asks until it answers."""

    def __init__(self, home: Path, listening: socket.socket, environment: Mapping[str, str]):
        self.port: int = listening.getsockname()[1]
        self.log = home / "prefect-server.log"
        self._lock, self._environment = home / ".prefect.db.lock", environment
        self._stopping = threading.Event()
        self.process = self._start(listening)
        threading.Thread(target=self._watch, daemon=True).start()

    def _start(self, listening: socket.socket) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-P", "-m", "flows.run.prefect_server", str(listening.fileno()), str(os.getpid()), str(self._lock)]
        with listening, self.log.open("a") as log:  # the server has it then; were it open here too, calls to a server that died would wait
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
                    log.write(f"it was ended, and cannot be started again on port {self.port}: {error}\n")
                return
        self.process.wait()  # the kernel ends a child with the thread that started it

    @contextmanager
    def blamed(self) -> Iterator[None]:
        """Raises EdgepressError in place of whatever went wrong in the block when the server died under it for good."""
        try:
            yield
        except EdgepressError:
            raise
        except Exception as error:
            if (status := self.ended()) is None:
                raise
            raise EdgepressError(
                f"the Prefect server of this command was ended from outside (status {status}; {self.log}) and did not come "
                "back; `edgepress resume` goes on from here"
            ) from error

    def ended(self) -> int | None:
        """The exit status of a server that is no more, which may take a moment to be known; None of one that runs."""
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
        """Starts, and so makes or migrates its database, while no other server of this database does: two at once break each other."""

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            with file_lock(Path(sys.argv[3])):
                await super().startup(sockets=sockets)

    listening = socket.socket(fileno=int(sys.argv[1]))
    Server(uvicorn.Config(create_app(), log_level="error", lifespan="on")).run(sockets=[listening])


if __name__ == "__main__":
    main()
