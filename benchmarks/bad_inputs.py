"""What a user gets for bad input: one line, an exit code, and nothing half-written.

    python -m benchmarks.bad_inputs

Prints a Markdown table of every case. `tests/test_bad_inputs.py` holds each of them to its promise.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import lzma
import os
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import zarr

CONFIG = """\
version: 1
name: small
data: {source: %s, dataset: data/small, columns: %s, holdout: 0.1}
model: {kind: mixture, n_components: 2}
fit: {max_steps: 3, n_init: 1}
compute: {workers: 1}
report: false
orchestrate: none
"""
COLUMNS = "{x: real, n: count, c: categorical}"


@dataclass(frozen=True)
class Case:
    """A bad input: what it is, how to make it in a folder, the command, and what must come."""

    name: str
    make: Callable[[Path], list[str]]
    exit_code: int
    says: tuple[str, ...]


@dataclass(frozen=True)
class Result:
    """What a command did: exit code, its lines on stderr, and the files it left behind."""

    exit_code: int
    lines: tuple[str, ...]
    left: tuple[str, ...]


def good_csv(n: int = 60) -> str:
    """A small table that nothing is wrong with."""
    rng = np.random.default_rng(0)
    rows = [f"{rng.normal():.4f},{rng.poisson(3)},{'ab'[i % 2]}" for i in range(n)]
    return "\n".join(["x,n,c", *rows]) + "\n"


def _config(folder: Path, source: str, columns: str = COLUMNS, **replaced: str) -> list[str]:
    text = CONFIG % (source, columns)
    for old, new in replaced.items():
        text = text.replace(old.replace("_", " "), new)
    (folder / "config.yaml").write_text(text)
    return ["fit", "config.yaml"]


def _file(name: str, content: str | bytes, columns: str = COLUMNS) -> Callable[[Path], list[str]]:
    """A fit of a file with this content."""

    def make(folder: Path) -> list[str]:
        data = content.encode() if isinstance(content, str) else content
        (folder / name).write_bytes(data)
        return _config(folder, name, columns)

    return make


def _edited(old: str, new: str, *overrides: str) -> Callable[[Path], list[str]]:
    """A fit of good data under a configuration with one edit."""

    def make(folder: Path) -> list[str]:
        (folder / "data.csv").write_text(good_csv())
        command = _config(folder, "data.csv")
        text = (folder / "config.yaml").read_text()
        assert old in text
        (folder / "config.yaml").write_text(text.replace(old, new))
        return [*command, *overrides]

    return make


def _override(*overrides: str) -> Callable[[Path], list[str]]:
    return _edited("version: 1", "version: 1", *overrides)


def _array(name: str, array: Any, model: str = "") -> Callable[[Path], list[str]]:
    """A fit in place of an npy array."""

    def make(folder: Path) -> list[str]:
        np.save(folder / name, array, allow_pickle=True)
        text = "version: 1\ndata: {source: %s}\nmodel: {n_components: 2%s}\nreport: false\n"
        (folder / "config.yaml").write_text(text % (name, model))
        return ["fit", "config.yaml"]

    return make


def _zarr(change: Callable[[Path], None]) -> Callable[[Path], list[str]]:
    """A fit in place of a zarr array that was tampered with."""

    def make(folder: Path) -> list[str]:
        rng = np.random.default_rng(0)
        values = rng.standard_normal((400, 3))
        zarr.create_array(str(folder / "a.zarr"), data=values, chunks=(100, 3))
        change(folder / "a.zarr")
        text = "version: 1\ndata: {source: a.zarr}\nmodel: {n_components: 2}\nreport: false\n"
        (folder / "config.yaml").write_text(text)
        return ["fit", "config.yaml"]

    return make


def _declare(path: Path) -> None:
    """Let a store of a few kilobytes declare terabytes in one chunk."""
    metadata = json.loads((path / "zarr.json").read_text())
    metadata["shape"] = [1 << 38, 3]
    metadata["chunk_grid"]["configuration"]["chunk_shape"] = [1 << 38, 3]
    (path / "zarr.json").write_text(json.dumps(metadata))


def _half(path: Path) -> None:
    for chunk in (path / "c").rglob("*"):
        if chunk.is_file():
            chunk.write_bytes(chunk.read_bytes()[:-40])


def _parquet(cut: int) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"x": [1.0] * 50, "n": [1] * 50, "c": ["a"] * 50}), sink)
    return sink.getvalue()[:-cut] if cut else sink.getvalue()


def _zip(*names: str) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        for name in names:
            archive.writestr(name, good_csv())
    return sink.getvalue()


def _arrow(cut: int) -> bytes:
    sink = io.BytesIO()
    pyarrow.feather.write_feather(
        pa.table({"x": [1.0], "n": [1], "c": ["a"]}), sink, "uncompressed"
    )
    return sink.getvalue()[:-cut]


def _damaged_dataset(folder: Path) -> list[str]:
    command = _edited("version: 1", "version: 1")(folder)
    assert run(folder, ["ingest", "config.yaml"]).exit_code == 0
    (chunk,) = (folder / "data" / "small" / "segments").rglob("values/c.*")
    data = chunk.read_bytes()
    chunk.write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])
    return command


def _torn_manifest(folder: Path) -> list[str]:
    command = _edited("version: 1", "version: 1")(folder)
    assert run(folder, ["ingest", "config.yaml"]).exit_code == 0
    (manifest,) = (folder / "data" / "small" / "manifests").glob("*.json")
    manifest.write_bytes(manifest.read_bytes()[:-20])
    return command


def _other_columns(folder: Path) -> list[str]:
    _edited("version: 1", "version: 1")(folder)
    assert run(folder, ["ingest", "config.yaml"]).exit_code == 0
    return _config(folder, "data.csv", "{x: real, n: real, c: categorical}")


def _unseen_level(folder: Path) -> list[str]:
    command = _edited("report: false", "report: false\npublish: {model: models/m}")(folder)
    assert run(folder, command).exit_code == 0
    (folder / "new.csv").write_text("x,n,c\n0.5,2,a\n0.1,3,zebra\n")
    return ["score", "models/m", "new.csv"]


def _missing_column(folder: Path) -> list[str]:
    command = _edited("report: false", "report: false\npublish: {model: models/m}")(folder)
    assert run(folder, command).exit_code == 0
    (folder / "new.csv").write_text("x,c\n0.5,a\n")
    return ["assign", "models/m", "new.csv"]


def _bare(*command: str) -> Callable[[Path], list[str]]:
    return lambda _: list(command)


CSV = good_csv()
CASES: list[Case] = [
    # files
    Case("a file that is not there", lambda f: _config(f, "none.csv"), 3, ("none.csv",)),
    Case("a glob that matches nothing", lambda f: _config(f, "'*.nothing'"), 3, ("*.nothing",)),
    Case("an empty file", _file("d.csv", ""), 3, ("d.csv", "empty")),
    Case("a header without rows", _file("d.csv", "x,n,c\n"), 3, ("d.csv", "no rows")),
    Case("a column that is not there", _file("d.csv", CSV, "{y: real}"), 3, ("y", "x, n, c")),
    Case("a misspelt column", _file("d.csv", CSV, "{x: real, nn: count}"), 3, ("nn", "mean")),
    Case("a column named twice", _file("d.csv", "x,x,c\n1,2,a\n"), 3, ("d.csv", "x")),
    Case("a ragged row", _file("d.csv", CSV + "1,2\n"), 3, ("d.csv", "3 columns")),
    Case("text where a number belongs", _file("d.csv", CSV + "abc,1,a\n"), 3, ("row 60", "abc")),
    Case("a negative count", _file("d.csv", CSV + "1,-2,a\n"), 3, ("row 60", "'n'", "-2")),
    Case("a fractional count", _file("d.csv", CSV + "1,2.5,a\n"), 3, ("row 60", "'n'", "2.5")),
    Case("an infinite entry", _file("d.csv", CSV + "inf,2,a\n"), 3, ("row 60", "'x'")),
    Case("an entry too large to be squared", _file("d.csv", CSV + "1e200,2,a\n"), 3, ("row 60",)),
    Case("a column that is always missing", _file("d.csv", "x,n,c\n1,2,\n2,3,\n"), 3, ("'c'",)),
    Case(
        "a thousand and one levels",
        _file("d.csv", "x,n,c\n" + "".join(f"1,2,l{i}\n" for i in range(1001))),
        3,
        ("'c'", "1000"),
    ),
    Case("a cut gzip file", _file("d.csv.gz", gzip.compress(CSV.encode())[:-30]), 3, ("d.csv.gz",)),
    Case("a cut xz file", _file("d.csv.xz", lzma.compress(CSV.encode())[:-30]), 3, ("d.csv.xz",)),
    Case("a zip with two files", _file("d.zip", _zip("a.csv", "b.csv")), 3, ("d.zip",)),
    Case("a cut zip", _file("d.zip", _zip("a.csv")[:-30]), 3, ("d.zip",)),
    Case("a cut parquet file", _file("d.parquet", _parquet(9)), 3, ("d.parquet",)),
    Case("a cut Arrow file", _file("d.arrow", _arrow(9)), 3, ("d.arrow",)),
    Case("bytes that are no table", _file("d.csv", bytes(range(256)) * 20), 3, ("d.csv",)),
    Case("UTF-16 text", _file("d.csv", CSV.encode("utf-16")), 3, ("d.csv", "UTF-16")),
    Case(
        "a gap where gaps are forbidden",
        lambda f: [*_file("d.csv", CSV + ",2,a\n")(f), "data.missing=forbid"],
        3,
        ("row 60", "'x'", "missing"),
    ),
    # arrays
    Case("an array of three axes", _array("a.npy", np.zeros((2, 2, 2))), 3, ("a.npy",)),
    Case("an array of objects", _array("a.npy", np.array([[1, "a"]], object)), 3, ("a.npy",)),
    Case("an array of complex numbers", _array("a.npy", np.ones((9, 2), complex)), 3, ("a.npy",)),
    Case("an array without rows", _array("a.npy", np.zeros((0, 3))), 3, ("a.npy",)),
    Case(
        "an infinite entry of an array",
        _array("a.npy", np.where(np.eye(30, 3) > 0, np.inf, 1.0)),
        3,
        ("a.npy", "row 0", "infinite"),
    ),
    Case(
        "an array of nothing but gaps", _array("a.npy", np.full((50, 2), np.nan)), 3, ("observed",)
    ),
    Case("a zarr store that declares terabytes", _zarr(_declare), 3, ("a.zarr", "GiB")),
    Case("a zarr store without chunks", _zarr(lambda p: shutil.rmtree(p / "c")), 3, ("a.zarr",)),
    Case("a zarr store with cut chunks", _zarr(_half), 7, ("a.zarr",)),
    # configurations
    Case("a configuration that is not there", _bare("fit", "none.yaml"), 2, ("none.yaml",)),
    Case("YAML that cannot be read", _edited("version: 1", "version: [1"), 2, ("config.yaml:",)),
    Case(
        "a key given twice", _edited("version: 1", "version: 1\nversion: 1"), 2, ("config.yaml:2",)
    ),
    Case("an unknown key", _edited("max_steps", "max_step"), 2, ("fit.max_step", "max_steps")),
    Case("a wrong word", _edited("kind: mixture", "kind: mixtur"), 2, ("model.kind", "mixture")),
    Case("no component", _edited("n_components: 2", "n_components: 0"), 2, ("n_components",)),
    Case("all rows held out", _edited("holdout: 0.1", "holdout: 1.0"), 2, ("data.holdout",)),
    Case("an unknown kind", _edited("x: real", "x: reel"), 2, ("data.columns.x", "real")),
    Case(
        "full covariance where no column is real",
        _edited("x: real", "x: count", "model.covariance=full"),
        2,
        ("covariance", "real"),
    ),
    Case("an override without a value", _override("fit.seed"), 2, ("fit.seed",)),
    Case("an override of nothing", _override("fit.sead=3"), 2, ("fit.sead", "seed")),
    Case("a memory limit that is too small", _override("compute.memory_limit=20MiB"), 2, ("MiB",)),
    Case(
        "a scheduler that is not there",
        lambda f: [*_array("a.npy", np.eye(60, 3))(f), "compute.scheduler=tcp://127.0.0.1:9"],
        5,
        ("127.0.0.1",),
    ),
    Case(
        "a pickle in the configuration",
        _edited("name: small", "name: !!python/object:os.system x"),
        2,
        ("config.yaml:2", "name", "tags"),
    ),
    # what is stored
    Case("a flipped bit in a dataset", _damaged_dataset, 7, ("data/small", "c.0.0")),
    Case("a torn manifest", _torn_manifest, 7, ("data/small", "000001.json")),
    Case("other columns than the dataset's", _other_columns, 2, ("'n'", "count", "real")),
    Case("a level the model never saw", _unseen_level, 3, ("new.csv", "row 1", "zebra")),
    Case("a column the model needs", _missing_column, 3, ("new.csv", "'n'")),
    Case("a model that is not there", _bare("score", "models/none", "x.csv"), 2, ("models/none",)),
    Case("a run that is not there", _bare("resume", "nothing"), 2, ("nothing",)),
]


def run(folder: Path, arguments: list[str]) -> Result:
    """The command line in a folder, in this process."""
    from flows.cli import main

    def files() -> set[str]:
        return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}

    before = files()
    out, err = io.TextIOWrapper(io.BytesIO()), io.StringIO()
    code = 0
    here = Path.cwd()
    os.chdir(folder)
    try:
        with (
            mock.patch.object(sys, "argv", ["genstream", *arguments]),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            main()
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        os.chdir(here)
    lines = tuple(line for line in err.getvalue().splitlines() if line.strip())
    return Result(code, lines, tuple(sorted(files() - before)))


def main() -> None:
    """Run every case and print what came of it."""
    print("| input | exit | what the user reads |\n|---|---|---|")
    wrong = 0
    for case in CASES:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            found = run(folder, case.make(folder))
            said = " ".join(found.lines).replace(name + "/", "").replace("|", "\\|")
            good = found.exit_code == case.exit_code and all(word in said for word in case.says)
            wrong += not good
            print(f"| {case.name} | {found.exit_code} | {said}{'' if good else ' **WRONG**'} |")
    print(f"\n{len(CASES)} cases, {wrong} not as promised")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
