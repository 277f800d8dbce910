"""Sources that grow in place: new rows are found, old ones must be the same."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from genstream import growing
from genstream.errors import ConfigError, DataError
from genstream.growing import Growth, Range, RangeSource, digest
from genstream.landing import Waiting
from genstream.rows import Rows
from genstream.sources import NumpySource, Source, Split, row_hash
from genstream.tables import open_source

VALUES = np.random.default_rng(3).normal(size=(50, 2)).round(3)
VALUES[::7, 1] = np.nan


def new_rows(place: Path, known: list[Range], hints: Path | None = None) -> Any:
    """New rows of files that have come to rest."""
    for path in (place, *place.rglob("*")):
        old = path.stat().st_mtime_ns - 100 * 10**9
        os.utime(path, ns=(old, old))
    return Growth(hints, settle=2.0).new_rows(open_source(place), known)


def save_zarr(place: Path, values: np.ndarray) -> None:
    array = zarr.create_array(place, shape=values.shape, chunks=(7, 2), dtype=values.dtype)
    array[:] = values


def save_parquet(place: Path, values: np.ndarray) -> None:
    pq.write_table(pa.table({"a": values[:, 0], "b": values[:, 1]}), place, row_group_size=11)


def save_folder(place: Path, values: np.ndarray) -> None:
    place.mkdir(exist_ok=True)
    for i in range(0, len(values), 20):
        save_parquet(place / f"part-{i:03}.parquet", values[i : i + 20])


def append_zarr(place: Path, values: np.ndarray) -> None:
    zarr.open_array(place, mode="r+").append(values)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The ranges that were read."""
    read: list[tuple[int, int]] = []

    def counted(source: Source, first: int, last: int) -> str:
        read.append((first, last))
        return digest(source, first, last)

    monkeypatch.setattr(growing, "digest", counted)
    return read


class TestGrowth:
    @pytest.mark.parametrize(
        ("name", "save"),
        [("x.zarr", save_zarr), ("x.parquet", save_parquet), ("folder.parquet", save_folder)],
    )
    def test_new_rows_of_every_format(
        self, tmp_path: Path, name: str, save: Callable[[Path, np.ndarray], None]
    ) -> None:
        place = tmp_path / name
        known: list[Range] = []
        for n in (20, 30, 50):
            if place.is_file():
                place.unlink()
            if name == "x.zarr" and known:
                append_zarr(place, VALUES[known[-1].last : n])
            else:
                save(place, VALUES[:n])
            found = new_rows(place, known)
            first = known[-1].last if known else 0
            # The digest knows nothing of formats and chunks.
            expected = digest(NumpySource(VALUES[first:n], chunk_rows=3), 0, n - first)
            assert found == Range(first, n, expected)
            known.append(found)
            assert new_rows(place, known) is None

    def test_ids_tell_sources_places_and_contents_apart(self) -> None:
        ranges = [Range(0, 5, "a"), Range(0, 6, "a"), Range(1, 5, "a"), Range(0, 5, "b")]
        ids = {one.batch_id(name) for one in ranges for name in ("x", "y")}
        assert len(ids) == 8
        assert all(len(one) == 64 for one in ids)
        assert Range(0, 5, "a").batch_id("x") == Range(0, 5, "a").batch_id("x")

    def test_nothing_is_read_where_nothing_changed(
        self, tmp_path: Path, reads: list[tuple[int, int]]
    ) -> None:
        place, hints = tmp_path / "x.zarr", tmp_path / "hints.json"
        save_zarr(place, VALUES[:21])
        known = [new_rows(place, [], hints)]
        source = open_source(place)
        for _ in range(2):
            assert Growth(hints).new_rows(source, known) is None
            assert Growth(hints).is_unchanged(source, known[0])
        assert reads == [(0, 21)]
        hints.write_bytes(b'{"' + str(place).encode() + b'": [1, [2], [0, 21, "x", 3]]}')
        assert Growth(hints).new_rows(source, known) is None
        assert reads == [(0, 21)] * 2
        # More rows than are known: those of a commit that was lost are found again.
        assert Growth(hints).new_rows(source, []) == known[0]
        assert Growth(None).new_rows(source, known) is None
        assert reads == [(0, 21)] * 4

    def test_only_ranges_whose_files_changed_are_read_again(
        self, tmp_path: Path, reads: list[tuple[int, int]]
    ) -> None:
        place, growing = tmp_path / "x.zarr", Growth(tmp_path / "hints.json", settle=0.0)
        save_zarr(place, VALUES[:14])
        known = [growing.new_rows(open_source(place), [])]
        for n in (25, 40, 45):
            # Chunks hold 7 rows: 0 to 13 fill two, rows 14 to 24 end within another.
            append_zarr(place, VALUES[known[-1].last : n])
            known.append(growing.new_rows(open_source(place), known))
        assert reads == [(0, 14), (14, 25), (14, 25), (25, 40), (25, 40), (40, 45)]
        reads.clear()
        (place / "c" / "0" / "0").touch()
        assert growing.new_rows(open_source(place), known) is None
        assert reads == [(0, 14)]

    def test_files_of_a_folder_are_watched_one_by_one(
        self, tmp_path: Path, reads: list[tuple[int, int]]
    ) -> None:
        place, growing = tmp_path / "x.parquet", Growth(tmp_path / "hints.json", settle=0.0)
        known: list[Range] = []
        for i, n in enumerate((20, 30, 50)):
            place.mkdir(exist_ok=True)
            first = known[-1].last if known else 0
            save_parquet(place / f"{i}.parquet", VALUES[first:n])
            known.append(growing.new_rows(open_source(place), known))
        assert reads == [(0, 20), (20, 30), (30, 50)]
        save_parquet(place / "1.parquet", VALUES[:10])
        with pytest.raises(DataError, match=r"rows 20 to 29, .* have changed"):
            growing.new_rows(open_source(place), known)

    def test_other_columns_make_it_read_again(
        self, tmp_path: Path, reads: list[tuple[int, int]]
    ) -> None:
        place, growing = tmp_path / "x.parquet", Growth(tmp_path / "hints.json", settle=0.0)
        save_parquet(place, VALUES)
        known = [growing.new_rows(open_source(place, ["a", "b"]), [])]
        with pytest.raises(DataError, match="have changed"):
            growing.new_rows(open_source(place, ["b", "a"]), known)

    @pytest.mark.parametrize("row", [0, 19, 20, 29, 30])
    @pytest.mark.parametrize("hinted", [False, True])
    def test_a_changed_row_names_the_first_range_with_one(
        self, tmp_path: Path, row: int, hinted: bool
    ) -> None:
        place, hints = tmp_path / "x.parquet", tmp_path / "hints.json" if hinted else None
        known: list[Range] = []
        for n in (20, 30):
            save_parquet(place, VALUES[:n])
            known.append(new_rows(place, known, hints))
        changed = VALUES.copy()
        changed[row:, 0] += 0.001
        save_parquet(place, changed)
        if row == 30:
            assert new_rows(place, known, hints).first == 30
            return
        what = "rows 0 to 19" if row < 20 else "rows 20 to 29"
        with pytest.raises(DataError, match=rf"x.parquet: {what}, .* have changed: restore"):
            new_rows(place, known, hints)
        bad = Growth(hints).is_unchanged(open_source(place), known[1])
        assert not bad

    def test_a_prefix_that_shrank_is_refused(self, tmp_path: Path) -> None:
        place = tmp_path / "x.parquet"
        known: list[Range] = []
        for n in (20, 30):
            save_parquet(place, VALUES[:n])
            known.append(new_rows(place, known))
        save_parquet(place, VALUES[:25])
        with pytest.raises(DataError, match=r"rows 20 to 29, .* no longer there \(25 rows are\)"):
            new_rows(place, known)
        assert not Growth().is_unchanged(open_source(place), known[1])
        save_parquet(place, VALUES[25:])
        with pytest.raises(DataError, match=r"rows 0 to 19, .* have changed"):
            new_rows(place, known)

    def test_a_gap_filled_in_is_a_change(self, tmp_path: Path) -> None:
        place = tmp_path / "x.parquet"
        save_parquet(place, VALUES)
        known = [new_rows(place, [])]
        save_parquet(place, np.nan_to_num(VALUES))
        with pytest.raises(DataError, match="have changed"):
            new_rows(place, known)

    def test_ranges_must_follow_each_other(self) -> None:
        source = NumpySource(VALUES)
        for known in ([Range(1, 2, "")], [Range(0, 2, ""), Range(3, 4, "")], [Range(0, -1, "")]):
            with pytest.raises(ConfigError, match="do not follow row"):
                Growth().new_rows(source, known)

    def test_a_source_that_is_written_to_waits(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        place = tmp_path / "x.zarr"
        save_zarr(place, VALUES[:21])
        slept: list[float] = []
        monkeypatch.setattr(growing.time, "sleep", slept.append)
        # Just written, but at rest when looked at again.
        assert isinstance(Growth(settle=9.0).new_rows(open_source(place), []), Range)
        assert slept == [9.0]
        monkeypatch.setattr(growing.time, "sleep", lambda _: append_zarr(place, VALUES[21:30]))
        found = Growth(settle=9.0).new_rows(open_source(place), [])
        assert isinstance(found, Waiting)
        assert found.why == "it was written to within 9 s"

    @pytest.mark.parametrize("damaged", [False, True])
    def test_a_source_that_changes_while_it_is_read_waits(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: bool
    ) -> None:
        place, hints = tmp_path / "x.zarr", tmp_path / "hints.json"
        save_zarr(place, VALUES[:21])
        known = [new_rows(place, [])]

        def meanwhile(source: Source, first: int, last: int) -> str:
            append_zarr(place, VALUES[21:30])
            return "another" if damaged else digest(source, first, last)

        monkeypatch.setattr(growing, "digest", meanwhile)
        found = new_rows(place, known, hints)
        assert isinstance(found, Waiting)
        assert found.why == "it was written to while it was read"
        assert not hints.exists()

    @settings(max_examples=40, deadline=None)
    @given(st.integers(1, 9), st.integers(1, 9), st.sets(st.integers(1, 49), max_size=4))
    def test_digests_and_rows_do_not_depend_on_chunks(
        self, one: int, other: int, cuts: set[int]
    ) -> None:
        sources = [NumpySource(VALUES, chunk_rows=n) for n in (one, other)]
        for first, last in pairwise([0, *sorted(cuts), 50]):
            assert digest(sources[0], first, last) == digest(sources[1], first, last)
            part = RangeSource(sources[0], first, last)
            rows = Rows.concatenate(part.read(i) for i in range(len(part.chunk_rows)))
            np.testing.assert_array_equal(rows.filled(), VALUES[first:last])
            assert sum(part.chunk_rows) == last - first


class TestRangeSource:
    def test_rows_are_told_apart_by_batch_and_row_in_it(self, tmp_path: Path) -> None:
        save_zarr(tmp_path / "x.zarr", VALUES)
        whole = open_source(tmp_path / "x.zarr")
        batch = Range(10, 30, digest(whole, 10, 30)).batch_id("x")
        part = RangeSource(whole, 10, 30, batch=batch)
        assert isinstance(part, Source)
        key = int(batch[:16], 16)
        assert part.chunk_rows == (4, 7, 7, 2)
        assert [part.origin(i) for i in range(4)] == [
            ((key, 0, 4),), ((key, 4, 7),), ((key, 11, 7),), ((key, 18, 2),),
        ]  # fmt: skip
        # Held-out rows are those that the hash of batch, row and seed says.
        test = Split(part, "test", 0.5, seed=1)
        held = np.concatenate([test.read(i).filled() for i in range(4)])
        chosen = row_hash((key, 0, 20), 1) < np.uint64(2**63)
        np.testing.assert_array_equal(held, VALUES[10:30][chosen])
        again = pickle.loads(pickle.dumps(part))
        np.testing.assert_array_equal(again.read(1).filled(), part.read(1).filled())
        assert again.identity() == part.identity()
        assert part.identity()["n_rows"] == 20
        assert part.identity()["name"].endswith("x.zarr[10:30]")

    @pytest.mark.parametrize(("first", "last"), [(0, 51), (5, 5), (-1, 3)])
    def test_rows_that_are_not_there_are_refused(self, first: int, last: int) -> None:
        with pytest.raises(DataError, match="array: has no rows"):
            RangeSource(NumpySource(VALUES), first, last)

    def test_a_growing_source_can_be_watched_through_a_range(self, tmp_path: Path) -> None:
        save_zarr(tmp_path / "x.zarr", VALUES)
        part = RangeSource(open_source(tmp_path / "x.zarr"), 0, 50)
        found = Growth(tmp_path / "hints.json", settle=0.0).new_rows(part, [])
        assert isinstance(found, Range)
        (tmp_path / "x.zarr" / "zarr.json").touch()
        assert Growth(tmp_path / "hints.json", settle=0.0).new_rows(part, [found]) is None
