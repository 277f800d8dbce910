"""What arrives: found when its writer is done, copied as it was, and told from what came before."""

from __future__ import annotations

import bz2
import errno
import gzip
import io
import json
import lzma
import os
import resource
import time
import weakref
from collections.abc import Callable, Iterator
from datetime import date, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from genstream import landing
from genstream.errors import ConfigError, DataError, StorageError
from genstream.landing import (
    Arrival,
    Changed,
    Copy,
    RowMultiset,
    Seen,
    copy_in,
    discard,
    find_arrivals,
    spool,
    stream,
    sweep,
)
from genstream.rows import Rows
from genstream.schema import Column, Schema
from genstream.sources import content_digest
from genstream.tables import Encoder, read_tables

TEXT = b"a,b\n1,2\n3,4\n"


def write(path: Path, data: bytes = TEXT, *, age: float | None = 60.0) -> Path:
    """A file that was written so many seconds ago."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    if age is not None:
        os.utime(path, (time.time() - age,) * 2)
    return path


def names(found: tuple[Any, ...]) -> list[str]:
    return [one.name for one in found]


def arrival(path: Path) -> Arrival:
    (one,) = find_arrivals(path, ready="stable_size", settle=0.0).ready
    return one


def folders(inbox: Path) -> list[str]:
    return sorted(p.name for p in inbox.iterdir()) if inbox.is_dir() else []


@pytest.fixture
def remote() -> Iterator[Any]:
    """A file system that is not local."""
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    yield fs
    fs.store.clear()


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The times slept, none of which pass."""
    slept: list[float] = []
    monkeypatch.setattr(landing.time, "sleep", slept.append)
    return slept


class TestFinding:
    def test_names_are_in_natural_order_whatever_the_order_of_patterns(
        self, tmp_path: Path
    ) -> None:
        for name in ("day10.csv", "day2.csv", "day1.csv", "b.csv", "a20b3.csv", "a20b20.csv"):
            write(tmp_path / name)
        patterns = [tmp_path / "day*.csv", tmp_path / "*.csv"]
        expected = ["a20b3.csv", "a20b20.csv", "b.csv", "day1.csv", "day2.csv", "day10.csv"]
        for given_patterns in (patterns, patterns[::-1], [tmp_path], [f"file://{tmp_path}/*.csv"]):
            found = find_arrivals(given_patterns, ready="stable_size")
            assert names(found.ready) == expected
            assert found.waiting == ()
        assert found.ready[0].place == str(tmp_path / "a20b3.csv")
        assert found.ready[0].size == len(TEXT)

    def test_names_that_collide_are_told_apart_by_their_folders(self, tmp_path: Path) -> None:
        for name in ("one/x.csv", "two/x.csv", "two/y.csv"):
            write(tmp_path / name)
        found = find_arrivals(f"{tmp_path}/*/*.csv", ready="stable_size")
        assert names(found.ready) == ["one/x.csv", "two/x.csv", "y.csv"]
        both = [tmp_path / "one" / "x.csv", tmp_path / "two" / "x.csv"]
        assert names(find_arrivals(both, ready="stable_size").ready) == [str(p) for p in both]

    def test_hidden_unfinished_and_marker_files_are_no_arrivals(self, tmp_path: Path) -> None:
        for name in (
            ".x.csv", "x.csv.tmp", "x.csv.part", "x.csv.crdownload", "x.csv~", "x.csv.done",
            "_SUCCESS", "_DONE", ".hidden/x.csv", "_temporary/0/x.csv", "plain/x.csv",
        ):  # fmt: skip
            write(tmp_path / name)
        write(tmp_path / "x.csv")
        assert names(find_arrivals(f"{tmp_path}/*", ready="stable_size").ready) == ["x.csv"]
        deep = find_arrivals(f"{tmp_path}/**", ready="stable_size").ready
        assert names(deep) == ["plain/x.csv", "x.csv"]

    def test_a_path_that_is_there_is_no_pattern(self, tmp_path: Path, remote: Any) -> None:
        for name in ("r[1].csv", "r1.csv", "day[2]/x.csv"):
            write(tmp_path / name)
        for given_path, expected in (
            (tmp_path / "r[1].csv", ["r[1].csv"]),
            (tmp_path / "day[2]", ["x.csv"]),
            (tmp_path / "day[2]" / "x.csv", ["x.csv"]),
            (tmp_path / "r[12].csv", ["r1.csv"]),
            (f"file://{tmp_path}/r[1].csv", ["r[1].csv"]),
        ):
            found = find_arrivals(given_path, ready="stable_size")
            assert (names(found.ready), found.waiting) == (expected, ())
        assert landing.list_data(str(tmp_path / "r[1].csv")) == [str(tmp_path / "r[1].csv")]
        (waiting,) = find_arrivals(tmp_path / "r[1].csv").waiting
        assert waiting.why.startswith("no r[1].csv.done beside it")
        remote.pipe("/in/r[1].csv", TEXT)
        (found_there,) = find_arrivals("memory://in/r[1].csv", ready="stable_size", settle=0).ready
        assert found_there.name == "r[1].csv"

    def test_what_cannot_be_looked_at_is_said(self, tmp_path: Path) -> None:
        with pytest.raises(StorageError, match="no such folder"):
            find_arrivals(tmp_path / "absent" / "*.csv")
        with pytest.raises(ConfigError, match="nosuch"):
            find_arrivals("nosuch://x/*.csv")
        with pytest.raises(ConfigError, match="no path"):
            find_arrivals([])
        with pytest.raises(ConfigError, match="ready 'soon'"):
            find_arrivals(tmp_path, ready="soon")  # type: ignore[arg-type]
        (one,) = find_arrivals(tmp_path / "x.csv").waiting
        assert (one.name, one.why) == ("x.csv", "is not there")
        assert find_arrivals(tmp_path / "*.csv") == landing.Arrivals((), ())


class TestDoneMarker:
    def test_a_file_is_ready_once_marked(self, tmp_path: Path) -> None:
        write(tmp_path / "x.csv", age=None)
        write(tmp_path / "y.csv", age=None)
        found = find_arrivals(tmp_path / "*.csv")
        assert names(found.waiting) == ["x.csv", "y.csv"]
        assert found.waiting[0].why.startswith("no x.csv.done beside it and no _SUCCESS or _DONE")
        write(tmp_path / "x.csv.done", b"")
        found = find_arrivals(tmp_path / "*.csv")
        assert (names(found.ready), names(found.waiting)) == (["x.csv"], ["y.csv"])

    @pytest.mark.parametrize("marker", ["_SUCCESS", "_DONE"])
    def test_a_marker_of_a_folder_holds_for_its_files_alone(
        self, tmp_path: Path, marker: str
    ) -> None:
        write(tmp_path / "one" / "x.csv")
        write(tmp_path / "two" / "y.csv")
        write(tmp_path / "one" / marker, b"")
        found = find_arrivals(f"{tmp_path}/*/*.csv")
        assert (names(found.ready), names(found.waiting)) == (["x.csv"], ["y.csv"])

    @pytest.mark.parametrize("marker", ["x.parquet.done", "x.parquet/_SUCCESS", "_SUCCESS"])
    def test_a_folder_of_parquet_is_one_arrival(self, tmp_path: Path, marker: str) -> None:
        write(tmp_path / "x.parquet" / "part-0.parquet", b"abc")
        write(tmp_path / "x.parquet" / "k=1" / "part-1.parquet", b"de")
        assert names(find_arrivals(f"{tmp_path}/**").waiting) == ["x.parquet"]
        write(tmp_path / marker, b"")
        (one,) = find_arrivals(f"{tmp_path}/**").ready
        assert (one.name, one.size, one.folder) == ("x.parquet", 5, True)


class TestStableSize:
    def test_old_files_are_not_waited_for(self, tmp_path: Path, naps: list[float]) -> None:
        write(tmp_path / "x.csv", age=3.0)
        assert names(find_arrivals(tmp_path / "*.csv", ready="stable_size").ready) == ["x.csv"]
        assert naps == []

    @pytest.mark.parametrize("age", [0.0, 1.0, -3600.0])
    def test_new_files_and_those_from_the_future_are_looked_at_twice(
        self, tmp_path: Path, naps: list[float], age: float
    ) -> None:
        for name in ("x.csv", "y.csv"):
            write(tmp_path / name, age=age)
        found = find_arrivals(tmp_path / "*.csv", ready="stable_size", settle=5.0)
        assert (names(found.ready), found.waiting) == (["x.csv", "y.csv"], ())
        assert naps == [5.0]

    @pytest.mark.parametrize(
        ("happens", "why"),
        [
            (lambda p: p.write_bytes(TEXT + b"5,6\n"), "its size changed from 12 to 16 bytes"),
            (lambda p: write(p, TEXT[::-1], age=-9.0), "it was written to within 5 s"),
            (lambda p: write(p.parent / "new", age=0).replace(p), "it was written to within 5 s"),
            (lambda p: p.unlink(), "vanished within 5 s"),
        ],
    )
    def test_what_changes_in_between_waits(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        happens: Callable[[Path], Any],
        why: str,
    ) -> None:
        path = write(tmp_path / "x.csv", age=0.0)
        write(tmp_path / "y.csv")
        monkeypatch.setattr(landing.time, "sleep", lambda _: happens(path))
        found = find_arrivals(tmp_path / "*.csv", ready="stable_size", settle=5.0)
        assert names(found.ready) == ["y.csv"]
        assert why in found.waiting[0].why

    def test_a_growing_folder_waits(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write(tmp_path / "x.zarr" / "zarr.json", b"{}", age=0.0)
        more = tmp_path / "x.zarr" / "c" / "0"
        monkeypatch.setattr(landing.time, "sleep", lambda _: write(more))
        found = find_arrivals(tmp_path / "*", ready="stable_size")
        assert "size changed" in found.waiting[0].why

    def test_versions_seen_before_are_not_waited_for(
        self, tmp_path: Path, naps: list[float]
    ) -> None:
        path = write(tmp_path / "x.csv", age=0.0)
        seen = Seen(tmp_path / "seen.json")
        seen.put(arrival(path), "a" * 64)
        naps.clear()
        pattern = tmp_path / "*.csv"
        assert names(find_arrivals(pattern, ready="stable_size", seen=seen).ready) == ["x.csv"]
        assert naps == []
        write(path, TEXT * 2, age=0.0)
        find_arrivals(pattern, ready="stable_size", seen=seen)
        assert naps == [2.0]


class TestRemote:
    def test_found_marked_and_copied(self, remote: Any, tmp_path: Path) -> None:
        remote.pipe("/in/day10.csv", TEXT)
        remote.pipe("/in/day9.csv", TEXT * 2)
        remote.pipe("/in/day9.csv.done", b"")
        found = find_arrivals("memory://in/*.csv")
        assert (names(found.ready), names(found.waiting)) == (["day9.csv"], ["day10.csv"])
        assert found.ready[0].place.startswith("memory://")
        copy = copy_in(found.ready[0], tmp_path)
        assert isinstance(copy, Copy)
        assert copy.path.read_bytes() == TEXT * 2
        assert copy.id == content_digest(copy.path)

    def test_a_remote_clock_is_not_trusted(self, remote: Any, naps: list[float]) -> None:
        remote.pipe("/in/x.csv", TEXT)
        remote.store["/in/x.csv"].modified -= timedelta(seconds=60)
        assert names(find_arrivals("memory://in/", ready="stable_size").ready) == ["x.csv"]
        assert naps == [2.0]
        remote.store["/in/x.csv"].modified -= timedelta(seconds=600)
        find_arrivals("memory://in/", ready="stable_size")
        assert naps == [2.0]

    def test_what_changed_meanwhile_is_left(self, remote: Any, tmp_path: Path) -> None:
        remote.pipe("/in/x.csv", TEXT)
        (one,) = find_arrivals("memory://in/x.csv", ready="stable_size", settle=0.0).ready
        remote.pipe("/in/x.csv", TEXT[::-1])
        assert copy_in(one, tmp_path) == Changed(one, "it was written to since it was found")
        remote.rm("/in/x.csv")
        assert copy_in(one, tmp_path) == Changed(one, "vanished since it was found")
        assert folders(tmp_path) == []

    def test_a_folder_is_copied_whole(self, remote: Any, tmp_path: Path) -> None:
        remote.pipe({"/in/x.parquet/a.parquet": b"a", "/in/x.parquet/k/b.parquet": b"bc"})
        (one,) = find_arrivals("memory://in/*", ready="stable_size", settle=0.0).ready
        copy = copy_in(one, tmp_path)
        assert isinstance(copy, Copy)
        assert copy.id == content_digest(copy.path)
        assert (copy.path / "k" / "b.parquet").read_bytes() == b"bc"
        assert (copy.nbytes, copy.path.name) == (3, "x.parquet")


class TestCopying:
    def test_the_copy_has_the_bytes_and_the_ending(self, tmp_path: Path) -> None:
        data = os.urandom(3 << 20)
        path = write(tmp_path / "in" / "x.csv.gz", data)
        copy = copy_in(arrival(path), tmp_path / "inbox")
        assert isinstance(copy, Copy)
        assert copy.path.read_bytes() == data
        assert (copy.path.name, copy.name, copy.nbytes) == ("x.csv.gz", "x.csv.gz", 3 << 20)
        assert copy.id == content_digest(path)
        again = copy_in(arrival(path), tmp_path / "inbox")
        assert isinstance(again, Copy)
        assert again.path != copy.path
        discard(copy)
        discard(copy)
        assert folders(tmp_path / "inbox") == [again.path.parent.name]
        assert path.exists()

    def test_a_zarr_store_is_copied_whole(self, tmp_path: Path) -> None:
        values = np.arange(12.0).reshape(6, 2)
        zarr.save_array(tmp_path / "x.zarr", values)
        copy = copy_in(arrival(tmp_path / "x.zarr"), tmp_path / "inbox")
        assert isinstance(copy, Copy)
        assert copy.id == content_digest(tmp_path / "x.zarr") == content_digest(copy.path)
        assert (zarr.load(copy.path) == values).all()

    @pytest.mark.parametrize(
        ("happens", "why"),
        [
            (lambda p: p.write_bytes(p.read_bytes() + b"more"), "its size changed"),
            (lambda p: p.write_bytes(b"x" * p.stat().st_size), "it was written to"),
            (lambda p: p.unlink(), "vanished"),
            (lambda p: os.truncate(p, 5), "its size changed from"),
        ],
    )
    def test_a_file_that_changes_while_it_is_copied_is_left(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        happens: Callable[[Path], Any],
        why: str,
    ) -> None:
        path = write(tmp_path / "in" / "x.csv", b"1\n" * (2 << 20))
        one = arrival(path)
        blocks = landing._blocks

        def interrupted(stream: BinaryIO, place: str) -> Iterator[bytes]:
            for i, block in enumerate(blocks(stream, place)):
                yield block
                if i == 1:
                    happens(path)

        monkeypatch.setattr(landing, "_blocks", interrupted)
        found = copy_in(one, tmp_path / "inbox")
        assert isinstance(found, Changed)
        assert why in found.why
        assert found.arrival == one
        assert folders(tmp_path / "inbox") == []

    def test_a_file_of_a_folder_that_vanishes_leaves_the_folder(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in "ab":
            write(tmp_path / "x.parquet" / f"{name}.parquet")
        one = arrival(tmp_path / "x.parquet")
        copy = landing._copy

        def gone(fs: Any, path: str, target: Path) -> Any:
            (tmp_path / "x.parquet" / "b.parquet").unlink(missing_ok=True)
            return copy(fs, path, target)

        monkeypatch.setattr(landing, "_copy", gone)
        found = copy_in(one, tmp_path / "inbox")
        assert isinstance(found, Changed)
        assert found.why == "vanished while it was copied"
        assert folders(tmp_path / "inbox") == []

    def test_a_short_read_is_no_copy(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        one = arrival(write(tmp_path / "x.csv"))
        monkeypatch.setattr(landing, "_blocks", lambda stream, place: iter([stream.read(5)]))
        found = copy_in(one, tmp_path / "inbox")
        assert isinstance(found, Changed)
        assert found.why == "5 bytes could be copied of 12"

    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EIO])
    def test_a_full_disk_leaves_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
    ) -> None:
        one = arrival(write(tmp_path / "x.csv"))

        def full(_: int) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(landing.os, "fsync", full)
        monkeypatch.setattr("genstream.manifests.sync_folder", lambda _: None)
        with pytest.raises(StorageError, match=os.strerror(number)):
            copy_in(one, tmp_path / "inbox")
        assert folders(tmp_path / "inbox") == []

    @pytest.mark.parametrize("limit", [100, 1 << 20, (2 << 20) + 5])
    def test_a_write_that_is_refused_midway_leaves_nothing(
        self, tmp_path: Path, limit: int
    ) -> None:
        data = os.urandom(3 << 20)
        one = arrival(write(tmp_path / "x.csv", data))
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            with pytest.raises(StorageError, match=r"x\.csv: cannot be written: File too large"):
                copy_in(one, tmp_path / "inbox")
            with pytest.raises(StorageError, match=r"\.csv: cannot be written: File too large"):
                spool(io.BytesIO(b"a,b\n" + b"1,2\n" * len(data)), tmp_path / "inbox")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert folders(tmp_path / "inbox") == []

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
    def test_an_inbox_that_refuses_is_named(self, tmp_path: Path) -> None:
        one = arrival(write(tmp_path / "x.csv"))
        (tmp_path / "inbox").mkdir(mode=0o500)
        with pytest.raises(StorageError, match="inbox"):
            copy_in(one, tmp_path / "inbox")

    def test_an_inbox_that_is_a_file_is_named(self, tmp_path: Path) -> None:
        one = arrival(write(tmp_path / "x.csv"))
        with pytest.raises(StorageError, match="inbox"):
            copy_in(one, write(tmp_path / "inbox"))

    def test_an_interrupt_leaves_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        one = arrival(write(tmp_path / "x.csv"))

        def interrupted(stream: BinaryIO, place: str) -> Iterator[bytes]:
            yield b"a"
            raise KeyboardInterrupt

        monkeypatch.setattr(landing, "_blocks", interrupted)
        with pytest.raises(KeyboardInterrupt):
            copy_in(one, tmp_path / "inbox")
        assert folders(tmp_path / "inbox") == []

    def test_sweep_removes_only_old_folders_of_copies(self, tmp_path: Path) -> None:
        inbox = tmp_path / "inbox"
        assert sweep(inbox) == 0
        one = arrival(write(tmp_path / "x.csv"))
        old, new = copy_in(one, inbox), copy_in(one, inbox)
        assert isinstance(old, Copy)
        assert isinstance(new, Copy)
        write(inbox / "mine" / "x.csv", age=1e6)
        long_ago = (time.time() - 1e6,) * 2
        os.utime(inbox / "mine", long_ago)
        os.utime(old.path, long_ago)
        assert sweep(inbox) == 0
        os.utime(old.path.parent, long_ago)
        assert sweep(inbox) == 1
        assert folders(inbox) == sorted(["mine", new.path.parent.name])
        assert sweep(inbox, older_than=-1.0) == 1


class TestSeen:
    def test_versions_are_remembered_over_restarts(self, tmp_path: Path) -> None:
        path = write(tmp_path / "x.csv")
        one, place = arrival(path), tmp_path / "state" / "seen.json"
        seen = Seen(place)
        assert seen.get(one) is None
        seen.put(one, "a" * 64)
        seen.save()
        assert Seen(place).get(one) == "a" * 64
        write(path, age=10.0)
        assert Seen(place).get(arrival(path)) is None
        assert folders(tmp_path / "state") == ["seen.json"]

    @pytest.mark.parametrize(
        "damage",
        [
            b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"p":1}', b'{"p":[1,2]}',
            b'{"p":[12,"t","short"]}', b'{"p":["12","t",3]}', b"[" * 100_000,
        ],
    )  # fmt: skip
    def test_damage_does_no_harm(self, tmp_path: Path, damage: bytes) -> None:
        one = arrival(write(tmp_path / "x.csv"))
        place = write(tmp_path / "seen.json", damage)
        seen = Seen(place)
        assert seen.get(one) is None
        seen.put(one, "b" * 64)
        seen.save()
        assert Seen(place).get(one) == "b" * 64

    def test_that_it_cannot_be_saved_does_no_harm(self, tmp_path: Path) -> None:
        one = arrival(write(tmp_path / "x.csv"))
        seen = Seen(write(tmp_path / "file") / "seen.json")
        seen.put(one, "b" * 64)
        seen.save()
        assert seen.get(one) == "b" * 64

    def test_the_oldest_are_forgotten(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(landing, "_SEEN", 2)
        ones = [arrival(write(tmp_path / f"{i}.csv")) for i in range(3)]
        seen = Seen(tmp_path / "seen.json")
        for one in (*ones, ones[0]):
            seen.put(one, "c" * 64)
        seen.put(ones[1], "d" * 64)
        seen.save()
        kept = [Seen(tmp_path / "seen.json").get(one) for one in ones]
        assert kept == [None, "d" * 64, "c" * 64]


def _ipc(table: pa.Table, new: Callable[..., Any]) -> bytes:
    sink = io.BytesIO()
    with new(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def _parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


SMALL = pa.table({"a": [1.5, 2.0, None], "b": ["x", "y", "x"]})
LINES = b'{"a": 1.5, "b": "x"}\n\n{"b": "y", "a": 2}\n{"a": null, "b": "x"}\n'
TABLE_TEXT = b"a,b\n1.5,x\n2,y\n,x\n"


class TestSpooling:
    @pytest.mark.parametrize(
        ("data", "name"),
        [
            (_ipc(SMALL, pa.ipc.new_stream), "stdin.arrows"),
            (_ipc(SMALL, pa.ipc.new_file), "stdin.arrow"),
            (_parquet(SMALL), "stdin.parquet"),
            (LINES, "stdin.jsonl"),
            (b"\xef\xbb\xbf \n" + LINES, "stdin.jsonl"),
            (gzip.compress(LINES, mtime=0), "stdin.jsonl.gz"),
            (lzma.compress(LINES), "stdin.jsonl.xz"),
            (TABLE_TEXT, "stdin.csv"),
            (bz2.compress(TABLE_TEXT), "stdin.csv.bz2"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_formats_are_told_by_their_bytes_and_read_alike(
        self, tmp_path: Path, data: bytes, name: str
    ) -> None:
        copy = spool(io.BytesIO(data), tmp_path)
        assert copy.name == copy.path.name == name
        assert copy.path.read_bytes() == data
        assert (copy.nbytes, copy.id) == (len(data), content_digest(copy.path))
        table = pa.concat_tables(read_tables(copy.path, columns=["b", "a"]))
        assert table["b"].to_pylist() == ["x", "y", "x"]
        numbers = [None if a in (None, "") else float(a) for a in table["a"].to_pylist()]
        assert numbers == [1.5, 2.0, None]

    def test_a_pipe_is_read_in_bounded_pieces(self, tmp_path: Path) -> None:
        asked: list[int] = []

        class Pipe(io.RawIOBase):
            left = 5 << 20

            def readable(self) -> bool:
                return True

            def read(self, n: int = -1) -> bytes:
                asked.append(n)
                n = min(n, 1000 if len(asked) < 9 else n, self.left)
                self.left -= n
                return b"1" * n if len(asked) > 1 else b"a" * (n - 1) + b"\n"

        copy = spool(Pipe(), tmp_path)  # type: ignore[arg-type]
        assert copy.nbytes == 5 << 20
        assert 0 < min(asked) <= max(asked) <= 1 << 20

    @pytest.mark.parametrize(
        ("data", "what"),
        [
            (b"", "is empty"),
            (b" \n\n", "is empty"),
            (b"\x7fELF\0\0\0", "neither text nor"),
            ("a,b\n1,2\n".encode("utf-16"), "UTF-16"),
            (b'[{"a": 1}]', "one object a line"),
            (gzip.compress(_parquet(SMALL), mtime=0), "holds parquet in an archive"),
        ],
    )
    def test_what_is_no_table_is_refused(self, tmp_path: Path, data: bytes, what: str) -> None:
        with pytest.raises(DataError, match=f"^stdin: .*{what}"):
            spool(io.BytesIO(data), tmp_path / "inbox")
        assert folders(tmp_path / "inbox") == []


class TestJsonLines:
    def read(self, path: Path, data: bytes, **options: Any) -> pa.Table:
        return pa.concat_tables(read_tables(write(path, data), **options))

    @settings(max_examples=30, deadline=None)
    @given(
        st.lists(
            st.fixed_dictionaries(
                {},
                optional={
                    "n": st.none() | st.integers(-(2**53), 2**53),
                    "x": st.none() | st.floats(allow_nan=False, allow_infinity=False),
                    "s": st.none() | st.text(st.characters(exclude_categories=["C"])),
                    "t": st.sampled_from(["2013-01-01", "2013-01-01T05:00:00Z", "x"]),
                },
            ),
            min_size=1,
        ),
        st.integers(60, 400),
    )
    def test_values_survive_whatever_the_blocks(
        self, tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]], block: int
    ) -> None:
        path = tmp_path_factory.mktemp("lines") / "x.jsonl"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("genstream.formats.CSV_BLOCK", block * 10)
            data = "".join(json.dumps(row) + "\n" for row in [dict.fromkeys("nxst"), *rows])
            table = self.read(path, data.encode(), columns=["n", "x", "s", "t"])
        found = table.slice(1).to_pylist()
        assert len(found) == len(rows)
        for row, read in zip(rows, found, strict=True):
            for name, kind in (("n", int), ("x", float), ("s", str), ("t", str)):
                text = read[name]
                if name == "n" and text is not None:
                    text = float(text)
                assert (None if text is None else kind(text)) == row.get(name)

    @pytest.mark.parametrize(
        ("data", "what"),
        [
            (b'{"a":1}\n\n{"a":\n{"a":3}\n', "line 3: not a JSON object: Expecting value"),
            (b'{"a":1}\n[1]\n', "line 2: not a JSON object: write one object a line"),
            (b'{"a":1}\n{"a":"\xff"}\n', "line 2: not a JSON object: not UTF-8"),
            (b'{"a":1}\n\n{"a":"x"}\n', "line 3: key 'a' changed from number to string"),
            (b'{"b":1,"a":{"x":1}}\n', "column 'a' holds nested values"),
            (b'{"b":1,"a":[1]}\n', "column 'a' holds nested values"),
            (b'{"a":1,"a":2}\n', "line 1: key 'a' was specified twice"),
            (b"{}\n", "has no rows"),
            (b" \n", "is empty"),
            (b'{"a": "' + b"x" * (3 << 20) + b'"}', "a line is longer than 1 MiB"),
        ],
    )
    def test_bad_lines_are_named(self, tmp_path: Path, data: bytes, what: str) -> None:
        with pytest.raises(DataError, match=what):
            self.read(tmp_path / "x.jsonl", data)

    def test_bad_lines_are_named_in_later_blocks(self, tmp_path: Path) -> None:
        data = b'{"a": 1}\n' * 300_000
        with pytest.raises(DataError, match="line 300001: not a JSON object"):
            self.read(tmp_path / "x.jsonl", data + b'{"a": 1\n')
        with pytest.raises(DataError, match="key 'b' is not one of the first lines'"):
            self.read(tmp_path / "x.jsonl", data + b'{"a": 1, "b": 2}\n')
        late = self.read(tmp_path / "x.jsonl", data + b'{"a": 1, "b": 2}\n', columns=["b"])
        assert late["b"].to_pylist()[-2:] == [None, "2"]

    def test_integers_of_any_size_keep_all_their_digits(self, tmp_path: Path) -> None:
        path = tmp_path / "x.jsonl"
        ids = [2**64 - 1, 2**64 - 2, 2**63, 7, -(10**30), None, 2**53 + 1]
        rows = [{"x": 0.5 * i, "id": one} for i, one in enumerate(ids)]
        rows += [{"id": 1e300}, {"x": 2e19}, {"x": 2**60, "id": 2.5}]
        table = self.read(path, "\n \n".join(map(json.dumps, rows)).encode())
        wanted = [*(None if one is None else str(one) for one in ids), "1e+300", None, "2.5"]
        assert table["id"].to_pylist() == wanted
        assert [None if x is None else float(x) for x in table["x"].to_pylist()] == [
            row.get("x") for row in rows
        ]
        for packed in (b' {"a":1}{"a":%d}\n', b'{"a":\n1}\n\n{"a":%d}'):
            again = self.read(path, packed % (2**53 + 1))
            assert again["a"].to_pylist() == ["1", str(2**53 + 1)]
            again = self.read(path, packed % (2**65 + 1))
            assert again["a"].to_pylist() == ["1", str(2**65 + 1)]
        encoder = Encoder({"id": "categorical"})
        encoder.encode(table.slice(0, 3))
        assert encoder.schema["id"].levels == tuple(map(str, ids[:3]))
        assert Encoder({"x": "real"}).ids(table.slice(0, 3), "id") == list(map(str, ids[:3]))

    def test_nested_values_of_other_columns_do_not_matter(self, tmp_path: Path) -> None:
        table = self.read(tmp_path / "x.ndjson", b'{"a":1,"b":{"x":1}}\n', columns=["a"])
        assert table.to_pydict() == {"a": ["1"]}


def _rows(seed: int, n: int, d: int, *, gaps: bool = True, weighted: bool = True) -> Rows:
    rng = np.random.default_rng(seed)
    values = rng.integers(-2, 3, (n, d)).astype(float)
    values[rng.random((n, d)) < 0.2 * gaps] = np.nan
    return Rows.of(values, rng.integers(0, 3, n) if weighted else None)


def _digest(*pieces: Rows) -> str:
    multiset = RowMultiset()
    for piece in pieces:
        multiset.add(piece)
    return multiset.hexdigest()


class TestRowMultiset:
    @settings(max_examples=50, deadline=None)
    @given(
        st.integers(0, 2**32),
        st.integers(1, 60),
        st.integers(1, 4),
        st.booleans(),
        st.lists(st.integers(0, 60), max_size=5),
    )
    def test_order_and_cuts_do_not_matter(
        self, seed: int, n: int, d: int, weighted: bool, cuts: list[int]
    ) -> None:
        rows = _rows(seed, n, d, weighted=weighted)
        shuffled = rows[np.random.default_rng(seed).permutation(n)]
        edges = [0, *sorted(cuts), n]
        pieces = [shuffled[a:b] for a, b in pairwise(edges)]
        assert _digest(*pieces) == _digest(rows)

    @settings(max_examples=50, deadline=None)
    @given(st.integers(0, 2**32), st.integers(2, 40), st.integers(2, 4), st.data())
    def test_one_row_makes_a_difference(
        self, seed: int, n: int, d: int, data: st.DataObject
    ) -> None:
        rows = _rows(seed, n, d)
        i, j = data.draw(st.integers(0, n - 1)), data.draw(st.integers(0, d - 1))
        assert rows.weights is not None
        changed, heavier = rows.filled().copy(), rows.weights.copy()
        changed[i, j] = 7.0
        heavier[i] += 1.0
        others = [
            Rows.of(changed, rows.weights),
            Rows.of(rows.filled(), heavier),
            rows[np.arange(n) != i],
            rows[np.append(np.arange(n), i)],
            rows[np.append(np.delete(np.arange(n), i), [i, i, i])],
        ]
        digests = {_digest(rows), *map(_digest, others)}
        assert len(digests) == 1 + len(others)

    def test_columns_count_by_position_and_rows_as_wholes(self) -> None:
        values = np.array([[1.0, 2.0], [3.0, 4.0]])
        assert _digest(Rows.of(values)) != _digest(Rows.of(values[:, ::-1]))
        assert _digest(Rows.of(values)) != _digest(Rows.of([[1.0, 4.0], [3.0, 2.0]]))
        assert _digest(Rows.of([[0.0]])) != _digest(Rows.of([[0.0, 0.0]]))
        multiset = RowMultiset()
        multiset.add(Rows.of(values))
        with pytest.raises(DataError, match="1 columns, those before 2"):
            multiset.add(Rows.of([[1.0]]))

    def test_equal_entries_are_equal_whatever_their_bits(self) -> None:
        values = np.array([[0.0, 1.5, np.nan], [-2.0, np.nan, 0.25]])
        plain = _digest(Rows.of(values))
        assert _digest(Rows.of(values.astype(np.float32))) == plain
        negative = np.where(values == 0, -0.0, values)
        assert _digest(Rows.of(negative)) == plain
        odd = values.copy()
        odd.view(np.uint64)[np.isnan(values)] |= np.uint64(1 << 63 | 5)
        assert _digest(Rows.of(odd)) == plain
        junk = Rows(np.where(np.isnan(values), 9.0, values), ~np.isnan(values))
        assert _digest(junk) == plain
        assert _digest(Rows.of(values, np.ones(2))) == plain
        assert _digest(Rows.of(np.where(np.isnan(values), 0.0, values))) != plain

    def test_the_same_rows_of_any_format_have_one_digest(self, tmp_path: Path) -> None:
        rng = np.random.default_rng(5)
        town = rng.choice(["Ulm", "Bonn"], 60)
        frame = pd.DataFrame({"x": rng.normal(size=60), "n": rng.integers(0, 9, 60), "town": town})
        frame.loc[::7, "x"] = np.nan
        backwards = frame[::-1][["town", "n", "x"]]
        frame.to_csv(tmp_path / "x.csv", index=False)
        backwards.to_csv(tmp_path / "b.csv.gz", index=False)
        backwards.to_parquet(tmp_path / "b.parquet", row_group_size=7)
        towns = Column("town", "categorical", ("Ulm", "Bonn"))
        spec = Schema((Column("x"), Column("n", "count"), towns))
        digests = set()
        for name in ("x.csv", "b.csv.gz", "b.parquet"):
            encoder = Encoder(spec)
            tables = read_tables(tmp_path / name, columns=encoder.wanted, chunk_rows=11)
            digests.add(_digest(*map(encoder.encode, tables)))
        lines = backwards.sample(frac=1.0, random_state=1).to_dict("records")
        text = "".join(
            json.dumps({k: None if v != v else v for k, v in row.items()}) + "\n" for row in lines
        )
        write(tmp_path / "y.jsonl", text.encode())
        tables = read_tables(tmp_path / "y.jsonl", columns=["x", "n", "town"], chunk_rows=13)
        digests.add(_digest(*map(Encoder(spec).encode, tables)))
        assert len(digests) == 1

    def test_the_digest_is_the_same_on_every_machine(self) -> None:
        rows = Rows.of([[1.0, np.nan], [2.0, -3.0]], [1.0, 2.0])
        assert _digest(rows) == "000000000000000295f354f27ad83b7c5c9af425bc443d41"
        assert len(_digest(rows)) == 48


class TestStream:
    def test_batches_of_every_kind(self) -> None:
        values = np.array([[1.0, np.nan], [2.0, 3.0]])
        frame = pd.DataFrame(values, columns=["a", "b"])
        batch = pa.record_batch({"a": [1.0, 2.0], "b": [None, 3.0]})
        masked = np.ma.masked_invalid(values)
        items = [values, values.tolist(), masked, Rows.of(values), frame, batch, ("day1", frame)]
        found = list(stream(items))
        assert [one.id for one in found] == [None] * 6 + ["day1"]
        assert [one.identified for one in found] == [False] * 6 + [True]
        assert [one.name for one in found] == [f"item {i}" for i in range(6)] + ["day1"]
        for one in found[:4]:
            np.testing.assert_array_equal(one.rows.filled(), values)
        for one in found[4:]:
            assert one.rows["a"].to_pylist() == [1.0, 2.0]
        schema = Schema.real(["a", "b"])
        for one in stream(iter(items), schema=schema):
            np.testing.assert_array_equal(one.rows.filled(), values)

    def test_tables_are_encoded_by_name_and_known_levels(self) -> None:
        schema = Schema((Column("a", "categorical", ("x", "y")), Column("b")))
        table = pa.table({"b": [1.0, 2.0], "c": [0, 0], "a": ["y", "x"]})
        (one,) = stream([(7, table)], schema=schema)
        assert one.id == "7"
        assert one.rows.values.tolist() == [[1.0, 1.0], [0.0, 2.0]]
        with pytest.raises(DataError, match="item 0: table: row 1, column 'a': 'z' is not one"):
            next(stream([pa.table({"b": [1.0, 2.0], "a": ["y", "z"]})], schema=schema))

    def test_one_batch_is_in_memory_at_a_time(self) -> None:
        alive: list[weakref.ref[Any]] = []

        def batches() -> Iterator[Any]:
            for i in range(5):
                assert all(ref() is None for ref in alive)
                batch = np.full((3, 2), float(i))
                alive.append(weakref.ref(batch))
                yield (str(i), batch) if i % 2 else batch
                del batch

        taken = 0
        for one in stream(batches()):
            taken += one.rows.n_rows
            assert len(alive) == taken // 3
            del one
        assert taken == 15

    @pytest.mark.parametrize(
        ("bad", "what"),
        [
            ("x.csv", "is a str, not a batch of rows"),
            (None, "is a NoneType, not a batch"),
            ({"a": [1]}, "is a dict, not a batch"),
            (3, "cannot read rows from int"),
            (np.zeros(3), "expected a 2D array"),
            ([[1.0], [1.0, 2.0]], "array"),
            (np.zeros((0, 2)), "has no rows"),
            (pa.table({"a": pa.array([], pa.float64())}), "has no rows"),
            (np.array([["a", "b"]]), "are not numbers"),
            (np.array([[np.inf, 1.0]]), "row 0, column 0 is infinite"),
            (np.zeros((2, 3)), "has 3 columns, not 2 as those before"),
            (("", np.zeros((1, 2))), "its id is empty"),
        ],
    )
    def test_a_bad_item_is_named_by_its_number(self, bad: Any, what: str) -> None:
        found = stream([np.zeros((1, 2)), bad])
        next(found)
        with pytest.raises(DataError, match=f"^item 1: .*{what}"):
            next(found)

    def test_the_schema_holds_for_every_kind_of_batch(self) -> None:
        schema = Schema((Column("n", "count"), Column("a")))
        for bad in (
            np.array([[0.5, 1.0]]),
            Rows.of([[0.5, 1.0]]),
            pa.table({"n": [0.5], "a": [1]}),
        ):
            with pytest.raises(DataError, match=r"item 0: .*column 'n'"):
                next(stream([bad], schema=schema))
        with pytest.raises(DataError, match=r"item 0: .*1 columns"):
            next(stream([np.zeros((2, 1))], schema=schema))

    def test_what_cannot_be_iterated_over_is_refused_at_once(self) -> None:
        with pytest.raises(ConfigError, match="cannot take batches from int"):
            stream(3)  # type: ignore[arg-type]


def test_days_are_ids_and_what_is_none_is_said_to_be_none() -> None:
    rows = np.ones((2, 2))
    items = [(date(2013, 1, 19), rows), (np.int64(7), rows)]
    assert [one.id for one in stream(items)] == ["2013-01-19", "7"]
    with pytest.raises(DataError, match="item 0: its id is a float: give text, a whole number"):
        next(stream([(1.5, rows)]))
