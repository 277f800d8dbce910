"""How every command begins and ends: its arguments, its result, its exit code.

Results go to stdout, all else to stderr. Exit codes: 0 done, 1 finished, but a batch was rejected
or quarantined, or a candidate of a sweep failed, 2 configuration, 3 data, 4 conflict with another
writer, 5 compute lost, 6 storage, 7 corrupt, 70 a bug, 130 and 143 interrupted.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from flows.run import STATE, Interrupted, Run, interruptible
from genstream.errors import GenstreamError, RefusedError, StorageError

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="A configuration (YAML).")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Settings over those of the file."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
RunRef = Annotated[
    str,
    typer.Argument(
        metavar="RUN", help="A run: its id, how that begins or ends, its folder, or `last`."
    ),
]


def put(result: dict[str, Any], text: str, as_json: bool) -> None:
    """Print a result: as JSON, or as text for people."""
    typer.echo(json.dumps(result, indent=2) if as_json else text)


def finish(run: Run, as_json: bool) -> None:
    """Print what a run found."""
    from flows.showing import summary, summary_text

    put(summary(run), summary_text(run), as_json)


def guarded(command: Callable[[], object]) -> None:
    """Call `command`; exit with the code of whatever error it raises, after one line about it."""
    wants_json = "--json" in sys.argv[1:]
    try:
        with interruptible(), _warnings_told():
            command()
    except (Interrupted, KeyboardInterrupt) as error:
        code = error.exit_code if isinstance(error, Interrupted) else 130
        message = (str(error) or "interrupted") + _how_to_go_on()
    except Exception as error:  # noqa: BLE001 - the last place where an error can be explained
        code, message = explain(error)
    else:
        return
    if wants_json:
        typer.echo(json.dumps({"error": message, "exit_code": code}))
    else:
        typer.echo(f"error: {message}", err=True)
    sys.exit(code)


@contextlib.contextmanager
def _warnings_told() -> Iterator[None]:
    """Within it what is logged as a warning is told on stderr, too."""
    log = logging.getLogger("genstream")
    told = logging.StreamHandler(sys.stderr)
    # An error is told once, by whoever ends the command.
    told.addFilter(lambda record: record.levelno == logging.WARNING)
    told.setFormatter(logging.Formatter("warning: %(message)s"))
    log.addHandler(told)
    try:
        yield
    finally:
        log.removeHandler(told)


def _how_to_go_on() -> str:
    with contextlib.suppress(GenstreamError, OSError, KeyError):
        runs = Run.all()
        mine = runs and runs[-1].info()["process"]["pid"] == os.getpid()
        if mine and runs[-1].status in ("interrupted", "running"):
            return f": `genstream resume {runs[-1].id}` goes on"
    return ""


def run_config(flow: Callable[[str], object]) -> None:
    """The command line of a flow's module: make a run of a configuration and call the flow."""

    def command(config: ConfigPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
        from flows import orchestration
        from flows.stages import begin

        orchestration.reach()
        run = begin(config, overrides or ())
        flow(str(run.path))
        finish(run, as_json)

    _single(command)


def run_update(flow: Callable[[str], dict[str, Any]]) -> None:
    """The command line of the flow that carries an update out."""

    def command(config: ConfigPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
        from flows import orchestration
        from flows.updating import begin

        orchestration.reach()
        finish_update(begin(config, overrides or ()), flow, as_json)

    _single(command)


def finish_update(run: Run, flow: Callable[[str], dict[str, Any]], as_json: bool) -> None:
    """Carry an update out and print what it did. Raises RefusedError where a batch was refused."""
    from flows.showing import update_text
    from flows.updating import refuse

    try:
        found = flow(str(run.path))
    except RefusedError:  # so that the flow fails; what it did is told all the same
        found = run.stage("update")
    put(found, update_text(found), as_json)
    refuse(found)


def run_sweep(flow: Callable[[str], object]) -> None:
    """The command line of the flow that carries a sweep out."""

    def command(config: ConfigPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
        from flows import orchestration
        from flows.sweeping import begin

        orchestration.reach()
        finish_sweep(begin(config, overrides or ()), flow, as_json)

    _single(command)


def finish_sweep(run: Run, flow: Callable[[str], object], as_json: bool) -> None:
    """Carry a sweep out and print what it found. Raises RefusedError where a candidate failed."""
    from flows.showing import sweep_summary, sweep_text
    from flows.sweeping import refuse

    flow(str(run.path))
    put(sweep_summary(run), sweep_text(run), as_json)
    refuse(run)


def run_existing(flow: Callable[[str], object]) -> None:
    """The command line of a flow's module that takes a run which is there already."""

    def command(run: RunRef, as_json: AsJson = False) -> None:
        from flows import orchestration

        found = Run.find(run)
        orchestration.reach()
        flow(str(found.path))
        finish(found, as_json)

    _single(command)


def _single(command: Callable[..., None]) -> None:
    alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    alone.command()(command)
    guarded(alone)


def explain(error: Exception) -> tuple[int, str]:
    """Exit code and message of an error; the traceback of a bug is written to a file."""
    if isinstance(error, GenstreamError):
        return error.exit_code, str(error)
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return StorageError.exit_code, f"{where}{error.strerror}"
    if isinstance(error, MemoryError):
        return 5, "out of memory: set compute.memory_limit, or use fewer compute.workers"
    text = "".join(traceback.format_exception(error))
    name = f"crash-{datetime.now(UTC):%Y%m%dT%H%M%S}-{os.getpid()}.log"
    path = STATE / name
    try:
        STATE.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError:
        path = Path(tempfile.gettempdir()) / name
        path.write_text(text, encoding="utf-8")
    first = " ".join(f"{type(error).__name__}: {error}".split())
    return 70, f"a bug in genstream ({first[:200]}); the traceback is in {path}"
