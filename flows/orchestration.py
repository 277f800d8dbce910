"""Prefect, kept quiet and local: must be called before `prefect` is imported for the first time.

Without `PREFECT_API_URL` flows run on Prefect's embedded server, which listens on loopback, keeps
its database in the project's own state folder, sends no telemetry and prints nothing.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.run import STATE, Run
from genstream.errors import ComputeError, StorageError

if TYPE_CHECKING:
    from prefect import Task

_SETTINGS = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_API_HOST": "127.0.0.1",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
    "PREFECT_LOGGING_LEVEL": "WARNING",
    # An error is reported once, by whoever called the flow; what Prefect would print of it, and of
    # events its embedded server cannot deliver any more at shutdown, is for its server only.
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    "PREFECT_LOGGING_SERVER_LEVEL": "CRITICAL",
}


def configured() -> bool:
    """Whether the user has a Prefect server, so that `orchestrate: auto` uses it."""
    return bool(os.environ.get("PREFECT_API_URL"))


def prepare() -> None:
    """Set what Prefect reads when it is imported; what the user has set stays.

    Raises StorageError where Prefect's state cannot be kept.
    """
    for key, value in _SETTINGS.items():
        os.environ.setdefault(key, value)
    if configured():
        state = (STATE / "prefect").resolve()
        os.environ.setdefault("PREFECT_LOCAL_STORAGE_PATH", str(state / "storage"))
        return
    home = Path(os.environ.setdefault("PREFECT_HOME", str((STATE / "prefect").resolve())))
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        message = f"{home}: Prefect's state cannot be kept here: {error.strerror}"
        raise StorageError(message) from None
    _end_orphans(home)


def reach() -> None:
    """Raise ComputeError where the server that `PREFECT_API_URL` names does not answer."""
    import httpx

    if not configured():
        return
    url = os.environ["PREFECT_API_URL"]
    try:
        httpx.get(f"{url.rstrip('/')}/health", timeout=10.0)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ComputeError(
            f"PREFECT_API_URL: no Prefect server answers at {url} ({error}): start one, unset the "
            "variable, or say orchestrate=none"
        ) from None


def _end_orphans(home: Path) -> None:
    """End embedded servers of this state folder whose process was killed and left them behind."""
    import psutil

    with contextlib.suppress(psutil.Error):
        first = " ".join(psutil.Process(1).cmdline())
        if "flows" in first or "genstream" in first:
            return  # the first process of a container: its own server looks like an orphan
    for process in psutil.process_iter(["ppid", "cmdline"]):
        line = " ".join(process.info["cmdline"] or ())
        if process.info["ppid"] != 1 or "prefect.server" not in line:
            continue
        with contextlib.suppress(psutil.Error):
            if process.environ().get("PREFECT_HOME") == str(home):
                process.terminate()


def run_task(name: str, work: Callable[[Run], dict[str, Any]]) -> Task[[str], dict[str, Any]]:
    """A Prefect task that does `work` for the run in a folder, again whenever it is called."""
    from prefect import task
    from prefect.cache_policies import NO_CACHE

    def of_folder(run: str) -> dict[str, Any]:
        return work(Run(Path(run)))

    # What Prefect tells tasks apart by, and describes them with.
    of_folder.__name__ = of_folder.__qualname__ = name.replace("-", "_")
    of_folder.__doc__ = f"What `{work.__module__}.{work.__name__}` does, for the run in a folder."
    return task(name=name, cache_policy=NO_CACHE)(of_folder)


def artifact_key(run: str, what: str) -> str:
    """Key of an artifact: its kind and the name of what was run, as Prefect allows it.

    One key for all runs of a name, so that Prefect shows their history.
    """
    name = Path(run).name.split("-", 1)[-1].rsplit("-", 1)[0]
    return re.sub(r"[^a-z0-9]+", "-", f"{name}-{what}".lower()).strip("-")
