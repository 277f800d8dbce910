"""A Prefect server of one's own: on loopback, quiet, and gone with the process that wanted it.

Schedules fire on a real server only, not on the one that Prefect embeds in a flow. The server is a
process whose standard input is a pipe from its owner. The pipe closes when the owner ends, however
it ends, and the server then ends too: no kill leaves one behind.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from genstream.errors import ComputeError, StorageError

if TYPE_CHECKING:
    import uvicorn

START_SECONDS = 180.0
"""How long a server may take to answer: a fresh database on a busy machine is slow."""

END_SECONDS = 10.0
"""How long it may take to finish what it is asked when it is told to end."""

LOG = "server.log"
"""In the server's folder: what it had to say since it was started last."""

_SETTINGS = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "PREFECT_LOGGING_SERVER_LEVEL": "ERROR",
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "ERROR",
    # A queued run asks again for its turn this often.
    "PREFECT_SERVER_DEPLOYMENTS_CONCURRENCY_SLOT_WAIT_SECONDS": "5",
    # A schedule runs for years: runs and events of past months leave the database.
    "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED": "events,flow_runs",
}


@dataclass(frozen=True)
class Server:
    """A running server: the address of its API, and its process."""

    address: str
    process: subprocess.Popen[bytes]

    @property
    def ended(self) -> bool:
        """Whether the server is no more."""
        return self.process.poll() is not None


@contextlib.contextmanager
def loopback_server(home: Path) -> Iterator[Server]:
    """A Prefect server on a free port of 127.0.0.1, whose state is kept in folder `home`.

    It answers when the context is entered and is gone when that is left. Raises ComputeError where
    it does not come up, StorageError where its state cannot be kept.
    """
    log = home / LOG
    try:
        home.mkdir(parents=True, exist_ok=True)
        output = log.open("wb")
    except OSError as error:
        message = f"{home}: the server's state cannot be kept here: {error.strerror}"
        raise StorageError(message) from None
    # The same modules as here, whatever lies in the working directory.
    code = f"import sys; sys.path[:] = {sys.path!r}; from flows.server import host; host()"
    kept = {key: value for key, value in os.environ.items() if key != "PREFECT_API_URL"}
    with output:
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=output,
            env={**kept, **_SETTINGS, "PREFECT_HOME": str(home)},
            start_new_session=True,  # Ctrl-C is for the owner, who ends its runs first
        )
    try:
        yield Server(_answering(process, log), process)
    finally:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        try:
            process.wait(2 * END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def _answering(process: subprocess.Popen[bytes], log: Path) -> str:
    """Address of a server once it answers."""
    import httpx

    assert process.stdout is not None
    address = process.stdout.readline().decode().strip()  # empty where the process ended first
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{address}/health", timeout=5.0).status_code == httpx.codes.OK:
                return address
        time.sleep(0.1)
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    raise ComputeError(
        f"the Prefect server did not come up ({lines[-1] if lines else 'it said nothing'}): "
        f"{log} has all it said; PREFECT_API_URL names another server"
    )


def host() -> None:
    """Be the server: print the address of the API, then serve until standard input closes."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(128)
        address = f"http://127.0.0.1:{listener.getsockname()[1]}/api"
        os.environ["PREFECT_UI_API_URL"] = address
        print(address, flush=True)

        import uvicorn  # now, after the settings above: Prefect reads them when imported

        config = uvicorn.Config(
            "prefect.server.api.server:create_app",
            factory=True,
            log_level="error",
            timeout_graceful_shutdown=int(END_SECONDS / 2),
        )
        server = uvicorn.Server(config)
        threading.Thread(
            target=_end_with_owner, args=(sys.stdin.buffer, server), daemon=True
        ).start()
        server.run(sockets=[listener])


def _end_with_owner(pipe: IO[bytes], server: uvicorn.Server) -> None:
    pipe.read()
    server.should_exit = True
    time.sleep(END_SECONDS)
    os._exit(0)  # some request never ended
