"""Run folders: everything one run was given, did and found, so that it can be resumed and redone.

``runs/20261123T021500Z-nightly-3f9a2c/`` holds `config.yaml` (the input, as given), `resolved.yaml`
(every default written out), `run.json` (status and what each stage found), `repro.json` (what it
takes to get the same bits again), `metrics.jsonl` (one line a step), `log.txt`, `checkpoint/` and
`report.html`.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import json
import logging
import os
import re
import secrets
import shutil
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NoReturn

from flows.config import Config, load
from genstream.errors import ConfigError, ConflictError, CorruptError, GenstreamError, StorageError

RUNS = Path("runs")
CANDIDATES = "candidates"
"""Folder of a sweep's run in which its candidates have runs of their own."""
STATE = Path(".genstream")
"""Folder of what the application keeps for itself: Prefect's database, logs of crashes."""

Status = Literal["running", "done", "failed", "interrupted"]
Kind = Literal["fit", "sweep", "update"]

log = logging.getLogger("genstream")


class Interrupted(BaseException):
    """SIGINT or SIGTERM arrived; the exit code is 128 plus the number of the signal."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(signum).name}")
        self.signum = signum

    @property
    def exit_code(self) -> int:
        """What the process exits with (130 for SIGINT, 143 for SIGTERM)."""
        return 128 + self.signum


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Within it, SIGINT and SIGTERM raise `Interrupted`, once; a second one ends the process.

    Outside the main thread signals are not ours to handle, and nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(signum: int, _: FrameType | None) -> NoReturn:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)
        raise Interrupted(signum)

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, handle) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


@dataclass(frozen=True)
class Run:
    """One run folder."""

    path: Path

    @classmethod
    def create(
        cls,
        config_path: str | os.PathLike[str],
        overrides: Sequence[str] = (),
        root: Path = RUNS,
        *,
        kind: Kind = "fit",
    ) -> Run:
        """A new folder for a run of a configuration. Raises ConfigError where that is wrong."""
        config = load(config_path, overrides)
        if config.sweep is None and kind == "sweep":
            raise ConfigError(
                f"{config_path}: has no sweep: say what it is over, such as "
                "sweep: {over: {model.n_components: [2, 4, 8]}}"
            )
        if config.sweep is not None and kind != "sweep":
            raise ConfigError(
                f"{config_path}: describes a sweep: `genstream sweep {config_path}` does it; for "
                "one model of it, say sweep=null and what was swept over"
            )
        now = datetime.now(UTC)
        run = cls(root / f"{now:%Y%m%dT%H%M%SZ}-{config.name}-{secrets.token_hex(3)}")
        run.path.mkdir(parents=True)
        shutil.copyfile(config_path, run.path / "config.yaml")
        _write(run.path / "resolved.yaml", config.to_yaml())
        run._introduce(config, kind, now, config=str(config_path), overrides=list(overrides))
        return run

    @classmethod
    def find(cls, reference: str, root: Path = RUNS) -> Run:
        """The run a user means: a folder, an id, its beginning or end, or `last`.

        A candidate of a sweep is a run of its own, known by its folder or as `ID/candidates/NAME`.

        Raises ConfigError where none or several match.
        """
        if (Path(reference) / "run.json").is_file():
            return cls(Path(reference))
        if (root / reference / "run.json").is_file():
            return cls(root / reference)
        runs = {run.id: run for run in cls.all(root)}
        if reference == "last" and runs:
            # Names tell runs of one second apart by chance only.
            return max(runs.values(), key=lambda run: (run.id[:16], run.info().get("created", "")))
        matches = [
            name for name in runs if name.startswith(reference) or name.endswith(f"-{reference}")
        ]
        if reference in runs or len(matches) == 1:
            return runs[reference if reference in runs else matches[0]]
        if len(matches) > 1:
            raise ConfigError(f"run {reference!r} could be any of {', '.join(sorted(matches))}")
        near = difflib.get_close_matches(reference, runs, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "; `genstream runs` lists them"
        raise ConfigError(f"no run {reference!r} in {root}/{hint}")

    @staticmethod
    def all(root: Path = RUNS) -> list[Run]:
        """All runs, oldest first."""
        return [Run(path.parent) for path in sorted(root.glob("*/run.json"))]

    @property
    def id(self) -> str:
        """Name of the folder; of a candidate, behind that of the sweep."""
        path = self.path.resolve()
        if path.parent.name == CANDIDATES:
            return f"{path.parent.parent.name}/{CANDIDATES}/{path.name}"
        return path.name

    def candidate(self, number: int, label: str, config: Config) -> Run:
        """The run of one candidate of this sweep, made where it is not there yet."""
        name = re.sub(r"[^A-Za-z0-9.]+", "-", label).strip("-.")[:60]
        run = Run(self.path / CANDIDATES / f"{number:03d}-{name}")
        if (run.path / "run.json").exists():
            return run
        run.path.mkdir(parents=True, exist_ok=True)
        for file in ("config.yaml", "resolved.yaml"):
            _write(run.path / file, config.to_yaml())
        run._introduce(config, "fit", datetime.now(UTC), label=label)
        return run

    def _introduce(self, about: Config, kind: Kind, now: datetime, **more: Any) -> None:
        """Write the `run.json` of a new run."""
        self.update(
            id=self.id,
            name=about.name,
            kind=kind,
            **more,
            created=now.isoformat(timespec="milliseconds"),
            **_at_work(),
        )

    @property
    def candidates(self) -> list[Run]:
        """The runs of the candidates of a sweep, in their order."""
        return [Run(path.parent) for path in sorted(self.path.glob(f"{CANDIDATES}/*/run.json"))]

    def take_over(self) -> None:
        """Count the run as interrupted though a process of another machine is said to be at it.

        Raises ConflictError where that process is one of this machine, and alive.
        """
        info = self.info()
        if info["status"] != "running":
            return
        if info["process"]["host"] == socket.gethostname() and _alive(info["process"]):
            raise ConflictError(self._held())
        self.update(status="interrupted")

    def _held(self) -> str:
        process, here = self.info()["process"], socket.gethostname()
        who = f"run {self.id} is being worked on by process {process['pid']}"
        if process["host"] == here:
            return f"{who}: wait for it, or stop it first"
        return (
            f"{who} of the machine {process['host']}, and this is {here}: wait for it, or stop it "
            f"there; if that machine is gone: `genstream resume {self.id} --take-over`"
        )

    def refuse_if_held(self) -> None:
        """Raise ConflictError where another process is at the run."""
        info, mine = self.info(), _this_process()
        if info["status"] == "running" and info["process"] != mine and _alive(info["process"]):
            raise ConflictError(self._held())

    def begun(self) -> None:
        """This process is at work on the run."""
        self.update(**_at_work())

    def ended(self, reason: str = "") -> None:
        """The run is done, or failed for a reason."""
        self.update(
            status="failed" if reason else "done",
            reason=reason,
            finished=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    @property
    def config(self) -> Config:
        """The resolved configuration."""
        path = (self.path / "resolved.yaml").resolve()
        return _resolved(path, path.stat().st_mtime_ns) if path.exists() else load(path)

    @property
    def kind(self) -> Kind:
        """What is run: a fit with all that belongs to it, or an update."""
        kind: Kind = self.info().get("kind", "fit")
        return kind

    @property
    def checkpoint(self) -> Path:
        """Folder of the states a fit can be resumed from."""
        return self.path / "checkpoint"

    @property
    def report(self) -> Path:
        """The report of the run."""
        return self.path / "report.html"

    def info(self) -> dict[str, Any]:
        """Contents of `run.json`. Raises CorruptError where it is not readable."""
        return _read_json(self.path / "run.json")

    def update(self, **values: Any) -> None:
        """Set keys of `run.json`, atomically."""
        path = self.path / "run.json"
        known = _read_json(path) if path.exists() else {}
        _write(path, json.dumps({**known, **values}, indent=2) + "\n")

    def stage(self, name: str) -> dict[str, Any]:
        """What a stage found; empty where it is not done."""
        found: dict[str, Any] = self.info().get("stages", {}).get(name, {})
        return found

    def record(self, stage: str, found: dict[str, Any]) -> dict[str, Any]:
        """Record what a stage found, which marks it as done."""
        self.update(stages={**self.info().get("stages", {}), stage: found})
        return found

    @property
    def status(self) -> Status:
        """Where the run is; a run whose process is gone counts as interrupted."""
        info = self.info()
        status: Status = info["status"]
        if status == "running" and not _alive(info["process"]):
            return "interrupted"
        return status

    def write_json(self, name: str, values: Any) -> None:
        """Write a JSON file of the run, atomically."""
        _write(self.path / name, json.dumps(values, indent=2) + "\n")

    def read_json(self, name: str) -> dict[str, Any]:
        """Read a JSON file of the run; empty where there is none yet."""
        path = self.path / name
        return _read_json(path) if path.exists() else {}

    def append_metrics(self, values: dict[str, Any]) -> None:
        """Add a line to `metrics.jsonl`."""
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`; a step that was redone after a kill appears once."""
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return []
        steps: dict[int, dict[str, Any]] = {}
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # a kill can cut the last line
                values = json.loads(line)
                steps[values["step"]] = values
        return [steps[step] for step in sorted(steps)]

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Within it this process works on the run: its log is kept, its end is recorded.

        Raises ConflictError where another process is at it.
        """
        self.refuse_if_held()
        self.begun()
        handler = logging.FileHandler(self.path / "log.txt", encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(handler)
        level = log.level
        log.setLevel(logging.INFO)
        try:
            with interruptible():
                yield
        except BaseException as error:
            interrupted = not isinstance(error, Exception)  # Prefect has a signal of its own
            if isinstance(error, GenstreamError) or interrupted:
                log.error("%s", error)
            else:
                log.exception("unexpected error")
            with contextlib.suppress(OSError):  # on a full disk the first error is the one to show
                self.update(
                    status="interrupted" if interrupted else "failed",
                    reason=str(error) or type(error).__name__,
                )
            raise
        else:
            self.ended()
        finally:
            log.setLevel(level)
            log.removeHandler(handler)
            handler.close()


@functools.lru_cache(1024)
def _resolved(path: Path, _changed: int) -> Config:
    """A configuration of which the candidates of a sweep ask again and again."""
    return load(path)


def _at_work() -> dict[str, Any]:
    """What `run.json` says while this process is at work."""
    return {"status": "running", "reason": "", "process": _this_process()}


def _write(path: Path, text: str) -> None:
    """Replace a file so that a reader, and a crash, sees the old text or the new one."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise CorruptError(f"{path}: is not the JSON that was written: {error}") from None
    if not isinstance(values, dict):
        raise CorruptError(f"{path}: is not the JSON that was written: not an object")
    return values


def _this_process() -> dict[str, Any]:
    import psutil

    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": psutil.Process().create_time(),
    }


def _alive(process: dict[str, Any]) -> bool:
    """Whether a recorded process still runs; one on another host is taken to."""
    import psutil

    if process["host"] != socket.gethostname():
        return True
    try:
        started = psutil.Process(process["pid"]).create_time()
    except psutil.Error:
        return False
    return bool(abs(started - process["started"]) < 1.0)
