"""The command line: results on stdout, one line about an error, and the right exit code."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flows import cli
from flows.run import Interrupted
from genstream import errors


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Call = Callable[..., Ran]


@pytest.fixture
def call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes]
) -> Call:
    """Call `genstream` in an empty folder, in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "prefect"))

    def run(*arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["genstream", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsysbinary.readouterr()
        return Ran(code, out.decode(), err.decode())

    return run


def test_help_names_every_verb_and_comes_at_once() -> None:
    begin = time.monotonic()
    heavy = [
        "numpy",
        "pandas",
        "prefect",
        "dask",
        "zarr",
        "pyarrow",
        "matplotlib",
        "xarray",
        "distributed",
    ]
    code = (
        "import sys; sys.argv = ['genstream', '--help']\n"
        "from flows.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert time.monotonic() - begin < 5
    assert found.stdout.splitlines()[-1] == "[]"
    verbs = "init check plan ingest fit resume score assign sample runs show report schema doctor"
    for verb in verbs.split():
        assert f"\n  {verb} " in found.stdout


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (errors.ConfigError("no such key"), 2, "no such key"),
        (errors.DataError("row 3"), 3, "row 3"),
        (errors.ConflictError("another writer"), 4, "another writer"),
        (errors.ComputeError("worker lost"), 5, "worker lost"),
        (errors.StorageError("full"), 6, "full"),
        (errors.CorruptError("flipped bit"), 7, "flipped bit"),
        (OSError(errno.ENOSPC, "No space left on device", "data/x"), 6, "data/x: No space left"),
        (PermissionError(errno.EACCES, "Permission denied", "runs"), 6, "runs: Permission denied"),
        (MemoryError(), 5, "memory_limit"),
        (Interrupted(2), 130, "SIGINT"),
        (Interrupted(15), 143, "SIGTERM"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_every_error_has_its_exit_code_and_one_line(
    error: BaseException,
    code: int,
    words: str,
    call: Call,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(cli, "app", fail)
    ran = call("runs")
    assert ran.code == code
    assert ran.out == ""
    assert ran.err.startswith("error: ")
    assert words in ran.err
    assert len(ran.err.splitlines()) == 1
    ran = call("runs", "--json")
    assert ran.json["exit_code"] == code
    assert words in ran.json["error"]


def test_a_bug_is_told_in_one_line_and_its_traceback_kept(
    call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail() -> None:
        raise ZeroDivisionError("division by\nzero")

    monkeypatch.setattr(cli, "app", fail)
    ran = call("runs")
    assert ran.code == 70
    assert len(ran.err.splitlines()) == 1
    (kept,) = (tmp_path / ".genstream").glob("crash-*.log")
    assert str(kept.relative_to(tmp_path)) in ran.err
    assert "ZeroDivisionError" in kept.read_text()


def test_wrong_use_is_a_configuration_error(call: Call) -> None:
    assert call("fit").code == 2
    assert call("no-such-verb").code == 2
    assert call("runs", "--no-such-option").code == 2


def test_the_schema_is_json(call: Call) -> None:
    assert "data" in call("schema").json["properties"]


def test_doctor_tells_of_this_machine(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    found = call("doctor", "--json").json
    assert found["numpy"] == np.__version__
    assert found["numba"]
    assert "embedded" in found["prefect server"]
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    assert "does not answer" in call("doctor", "--json").json["prefect server"]
    monkeypatch.setenv("PREFECT_API_URL", "file:///etc/passwd")
    assert "not an http address" in call("doctor", "--json").json["prefect server"]


def test_no_runs_yet(call: Call) -> None:
    assert call("runs").out == "no runs\n"
    assert call("runs", "--json").json == {"runs": []}
    ran = call("resume", "last")
    assert ran.code == 2
    assert "no run 'last'" in ran.err
