"""Tables of every format: what is read, how it is encoded, and what is said of bad ones."""

from __future__ import annotations

import bz2
import contextlib
import csv
import gzip
import io
import lzma
import pickle
import tempfile
import zipfile
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

import dask.array as da
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.feather
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest
import xarray
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from genstream.errors import ConfigError, DataError, GenstreamError, StorageError
from genstream.formats import ending_of_bytes, kind_of_bytes, open_table
from genstream.schema import Column, Schema
from genstream.sources import DaskSource, NpySource, NumpySource, Source, Split, ZarrSource, n_rows
from genstream.store import Dataset, ingest
from genstream.tables import (
    ColumnSpec,
    Concatenated,
    Encoder,
    TableSource,
    XarraySource,
    open_source,
    read_tables,
    table_columns,
)

TEXT = """\
id,height,visits,town,member
a,1.5,3,Ulm,1
b,,0,"Köln, am Rhein",0
c,2.5e1,NA,Bonn,1
d,-3,7,Ulm,?
"""
KINDS = {"height": "real", "visits": "count", "town": "categorical", "member": "binary"}
CODES = np.array(
    [[1.5, 3, 0, 1], [np.nan, 0, 1, 0], [25, np.nan, 2, 1], [-3, 7, 0, np.nan]], dtype=float
)
TOWNS = ("Ulm", "Köln, am Rhein", "Bonn")
TABLE = pa.table(
    {
        "id": ["a", "b", "c", "d"],
        "height": [1.5, None, 25, -3],
        "visits": pa.array([3, 0, None, 7], pa.int16()),
        "town": pa.array(["Ulm", "Köln, am Rhein", "Bonn", "Ulm"]).dictionary_encode(),
        "member": pa.array([True, False, True, None]),
    }
)


def encoded(
    data: Any, encoder: Encoder | None = None, chunk_rows: int = 65_536
) -> tuple[np.ndarray[Any, Any], Schema]:
    encoder = Encoder(KINDS) if encoder is None else encoder
    values, first = [], 0
    for table in read_tables(data, columns=encoder.wanted, chunk_rows=chunk_rows):
        assert 0 < table.num_rows <= chunk_rows
        rows = encoder.encode(table, first_row=first, place=str(data))
        first += rows.n_rows
        values.append(rows.filled())
    return np.concatenate(values), encoder.schema


def save_csv(path: Path, text: str = TEXT) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def save_gz(path: Path) -> Path:
    path.write_bytes(gzip.compress(TEXT.encode()))
    return path


def save_bz2(path: Path) -> Path:
    path.write_bytes(bz2.compress(TEXT.encode()))
    return path


def save_xz(path: Path) -> Path:
    path.write_bytes(lzma.compress(TEXT.encode()))
    return path


def save_zip(path: Path) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("__MACOSX/._rows.csv", b"\0")
        archive.writestr("rows.csv", TEXT)
    return path


def save_parquet(path: Path) -> Path:
    pq.write_table(TABLE, path, row_group_size=3)
    return path


def save_arrow(path: Path) -> Path:
    with pa.ipc.new_file(path, TABLE.schema) as file:
        file.write_table(TABLE, max_chunksize=3)
    return path


def save_stream(path: Path) -> Path:
    with pa.ipc.new_stream(path, TABLE.schema) as file:
        file.write_table(TABLE, max_chunksize=3)
    return path


def save_feather(path: Path) -> Path:
    pa.feather.write_feather(TABLE, path)
    return path


def save_nc(path: Path) -> Path:
    as_dataset().to_netcdf(path, engine="h5netcdf")
    return path


def save_nc3(path: Path) -> Path:
    as_dataset().to_netcdf(path, engine="scipy", format="NETCDF3_64BIT")
    return path


def save_nothing(path: Path) -> Any:
    return {"table": TABLE, "frame": TABLE.to_pandas(), "dataset": as_dataset()}[path.name]


def as_dataset() -> xarray.Dataset:
    encoding = {"_FillValue": -9.0}
    return xarray.Dataset(
        {
            "height": ("row", [1.5, np.nan, 25, -3], {"units": "cm"}, encoding),
            "visits": ("row", [3.0, 0, np.nan, 7]),
            "town": ("row", ["Ulm", "Köln, am Rhein", "Bonn", "Ulm"]),
            "member": ("row", [1.0, 0, 1, np.nan]),
            "scale": ((), 3.0),
        },
        coords={"id": ("row", ["a", "b", "c", "d"])},
    )


SAVED: dict[str, Callable[[Path], Any]] = {
    "rows.csv": save_csv,
    "rows.csv.gz": save_gz,
    "rows.csv.bz2": save_bz2,
    "rows.csv.xz": save_xz,
    "rows.zip": save_zip,
    "rows.parquet": save_parquet,
    "rows.bin": save_parquet,
    "rows.arrow": save_arrow,
    "rows.arrows": save_stream,
    "rows.feather": save_feather,
    "rows.nc": save_nc,
    "rows3.nc": save_nc3,
    "table": save_nothing,
    "frame": save_nothing,
    "dataset": save_nothing,
}


class TestReading:
    @pytest.mark.parametrize("name", SAVED)
    def test_every_format_holds_the_same_rows(self, name: str, tmp_path: Path) -> None:
        data = SAVED[name](tmp_path / name)
        values, schema = encoded(data)
        np.testing.assert_array_equal(values, CODES)
        assert schema["town"].levels == TOWNS
        again, same = encoded(data, chunk_rows=1)
        np.testing.assert_array_equal(again, CODES)
        assert same == schema
        encoder = Encoder(KINDS, carried=["id"])
        (table,) = read_tables(data, columns=encoder.wanted)
        assert table.column_names == [*KINDS, "id"]
        assert encoder.ids(table, "id") == ["a", "b", "c", "d"]
        if isinstance(data, Path):
            assert set(table_columns(data)) == {"id", *KINDS}

    @pytest.mark.parametrize("mark", [";", "\t", "|"])
    def test_other_separators_and_a_byte_order_mark(self, mark: str, tmp_path: Path) -> None:
        path = tmp_path / "rows.txt"
        path.write_text(f"\ufeffa {mark} b\r\n1{mark}2\r\n\r\n3 {mark} 4\r\n", newline="")
        values, schema = encoded(path, Encoder({"b": "real", "a": "real"}))
        np.testing.assert_array_equal(values, [[2, 1], [4, 3]])
        assert schema.names == ("b", "a")

    def test_a_later_block_may_look_unlike_the_first(self, tmp_path: Path) -> None:
        n = 150_000
        path = tmp_path / "rows.csv"
        lines = [f"{i},{'x' if i > n - 5 else i % 3}\n" for i in range(n)]
        path.write_text("n,c\n" + "".join(lines))
        assert path.stat().st_size > 1 << 20
        values, schema = encoded(path, Encoder({"n": "real", "c": "categorical"}))
        assert schema["c"].levels == ("0", "1", "2", "x")
        np.testing.assert_array_equal(values[:, 0], np.arange(n))

    @pytest.mark.parametrize("name", ["x.csv", "x.parquet", "x.npy"])
    def test_no_more_is_decoded_at_once_of_wide_rows(
        self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("genstream.sources.LEAST_PIECE_ROWS", 4)
        monkeypatch.setattr("genstream.sources.PIECE_NBYTES", 10 * 3 * 8)
        X = np.arange(75.0).reshape(25, 3)
        table = pa.table({f"x{j}": X[:, j] for j in range(3)})
        if name == "x.npy":
            np.save(tmp_path / name, X)
        else:
            pandas = table.to_pandas()
            (pandas.to_csv if name == "x.csv" else pandas.to_parquet)(tmp_path / name, index=False)
        opened = open_table(tmp_path / name)
        if name != "x.csv":  # text comes by bytes
            assert [batch.num_rows for batch in opened.read(list(opened.names))] == [10, 10, 5]
        done: list[int] = []
        ingest([tmp_path / name], tmp_path / "d", on_progress=done.append)
        assert done == [10, 20, 25]
        source = Dataset.open(tmp_path / "d").source()
        assert source.chunk_rows == (25,)
        np.testing.assert_array_equal(source.read(0).values, X)
        # Fitted in place, rows are cut as ever.
        if name != "x.csv":
            assert open_source(tmp_path / name).chunk_rows == (25,)

    def test_arrays_go_by_the_names_given(self, tmp_path: Path) -> None:
        X = np.arange(12.0).reshape(6, 2)
        np.save(tmp_path / "x.npy", X)
        zarr.save_array(str(tmp_path / "x.zarr"), X)
        for path in (tmp_path / "x.npy", tmp_path / "x.zarr"):
            assert table_columns(path) == ("x0", "x1")
            values, schema = encoded(path, Encoder({"a": "real", "b": "count"}), chunk_rows=4)
            assert schema.names == ("a", "b")
            np.testing.assert_array_equal(values, X)
            values, _ = encoded(path, Encoder({"x1": "real"}))
            np.testing.assert_array_equal(values, X[:, 1:])
            with pytest.raises(DataError, match=r"no column 'c'.*x0, x1"):
                encoded(path, Encoder({"c": "real"}))

    def test_columns_of_zarr_groups_and_structured_arrays(self, tmp_path: Path) -> None:
        a, b = np.arange(5.0), np.arange(5, dtype=">i4")
        group = zarr.open_group(str(tmp_path / "g.zarr"), mode="w")
        group.create_array("a", data=a, chunks=(2,))
        group.create_array("b", data=b.astype("<i4"), chunks=(2,))
        fields = np.zeros(5, [("a", "f8"), ("b", ">i4")])
        fields["a"], fields["b"] = a, b
        np.save(tmp_path / "s.npy", fields)
        for name in ("g.zarr", "s.npy"):
            values, schema = encoded(tmp_path / name, Encoder())
            assert schema == Schema.real(["a", "b"])
            np.testing.assert_array_equal(values, np.column_stack([a, b]))
        np.save(tmp_path / "one.npy", a)
        values, _ = encoded(tmp_path / "one.npy", Encoder({"load": "real"}))
        np.testing.assert_array_equal(values[:, 0], a)

    @pytest.mark.filterwarnings("ignore")
    def test_labels_in_zarr(self, tmp_path: Path) -> None:
        as_dataset().drop_vars("scale").to_zarr(tmp_path / "fixed.zarr")
        labels = as_dataset().drop_vars(["scale", "id"])
        labels["town"] = labels["town"].astype(object)
        labels.to_zarr(tmp_path / "any.zarr")
        for name in ("fixed.zarr", "any.zarr"):
            values, schema = encoded(tmp_path / name)
            np.testing.assert_array_equal(values, CODES)
            assert schema["town"].levels == TOWNS

    @pytest.mark.parametrize("zarr_format", [2, 3])
    @pytest.mark.filterwarnings("ignore")
    def test_packed_entries_in_zarr(self, tmp_path: Path, zarr_format: Literal[2, 3]) -> None:
        X = np.array([[1.0, 2], [np.nan, 4], [5, 6]])
        array = xarray.DataArray(X, dims=("t", "f"), coords={"f": ["a", "b"]}, name="x")
        packing = {"_FillValue": -1, "dtype": "int16", "scale_factor": 0.5, "chunks": (2, 1)}
        array.to_dataset().to_zarr(
            tmp_path / "x.zarr", encoding={"x": packing}, zarr_format=zarr_format
        )
        source = open_source(tmp_path / "x.zarr")
        assert source.schema.names == ("a", "b")
        np.testing.assert_array_equal(source.read(0).filled(), X)
        assert pickle.loads(pickle.dumps(source)).read(0).n_rows == 3

    def test_unused_columns_may_be_unnamed_or_doubled(self, tmp_path: Path) -> None:
        path = save_csv(tmp_path / "r.csv", ",a,b,a,c\n0,1,2,3,4\n")
        values, _ = encoded(path, Encoder({"c": "real", "b": "real"}))
        np.testing.assert_array_equal(values, [[4, 2]])
        with pytest.raises(DataError, match=r"column 'a' is there 2 times"):
            encoded(path, Encoder({"a": "real"}))
        with pytest.raises(DataError, match="column 1 has no name"):
            encoded(path, Encoder())


def pack(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def two_members() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.csv", TEXT)
        archive.writestr("b.csv", TEXT)
    return file.getvalue()


def parquet_bytes() -> bytes:
    file = io.BytesIO()
    pq.write_table(TABLE, file)
    return file.getvalue()


def broken_page() -> bytes:
    content = bytearray(parquet_bytes())
    content[4:200] = bytes(196)
    return bytes(content)


LONG = (TEXT * 50).encode()

BAD_FILES: dict[str, tuple[str, bytes, str]] = {
    "empty": ("r.csv", b"", "is empty"),
    "blank": ("r.csv", b"\n\n", "is empty"),
    "header only": ("r.csv", b"height,visits,town,member\n", "has no rows"),
    "no header": ("r.csv", b"1,2,3,4\n5,6,7,8\n", "add a header"),
    "ragged": ("r.csv", TEXT.encode() + b"e,1,2\n", "Expected 5 columns, got 3"),
    "unclosed quote": ("r.csv", TEXT.encode() + b'e,1,2,"Ulm,1\n', "r.csv"),
    "not utf-8": ("r.csv", TEXT.encode("latin-1"), "UTF8"),
    "utf-16": ("r.csv", TEXT.encode("utf-16"), "UTF-16"),
    "binary": ("r.csv", b"\1\2\0\3abc", "neither text"),
    "cut gz": ("r.csv.gz", gzip.compress(LONG)[:-20], "cut short"),
    "cut bz2": ("r.csv.bz2", bz2.compress(LONG)[:-20], "cut short"),
    "cut xz": ("r.csv.xz", lzma.compress(LONG)[:-20], "cut short"),
    "cut zip": ("r.zip", two_members()[:-30], "cut short"),
    "two in a zip": ("r.zip", two_members(), "holds 2 files"),
    "long line": ("r.csv", b"a,b\n1," + b"x" * 3_000_000 + b"\n", "is a quote left open"),
    "packed parquet": ("r.parquet.gz", gzip.compress(parquet_bytes()), "holds parquet in an"),
    "no member": ("r.zip", b"PK\5\6" + bytes(18), "holds 0 files"),
    "cut parquet": ("r.parquet", parquet_bytes()[:-10], "not a whole parquet"),
    "text as parquet": ("r.parquet", TEXT.encode(), "not a whole parquet"),
    "broken page": ("r.parquet", broken_page(), "r.parquet"),
    "text as arrow": ("r.arrow", TEXT.encode(), "r.arrow"),
    "cut arrow": ("r.arrow", b"ARROW1\0\0" + bytes(30), "r.arrow"),
    "feather 1": ("r.feather", b"FEA1" + bytes(30), "version 1"),
    "cut npy": ("r.npy", b"\x93NUMPY\1\0", "npy"),
    "cut netcdf": ("r.nc", b"\x89HDF\r\n\x1a\n" + bytes(40), "NetCDF"),
    "cut netcdf 3": ("r.nc", b"CDF\1" + bytes(3), "NetCDF"),
}


class TestFirstBytes:
    @pytest.mark.parametrize(
        "header", ["PK,name", "PK", "CDF,x", "PAR1,PAR2", "PAR1", "BZh,x", "BZh9,x", "ARROW1,b"]
    )
    def test_text_is_not_taken_for_what_its_first_letters_say(
        self, header: str, tmp_path: Path
    ) -> None:
        row = ",".join(["1"] * len(header.split(",")))
        text = f"{header}\n{row}\n"
        assert ending_of_bytes(text.encode()) == ".csv"
        packed = pack(tmp_path / "r.csv.gz", gzip.compress(text.encode()))
        for path in (save_csv(tmp_path / "r.csv", text), save_csv(tmp_path / "r", text), packed):
            assert table_columns(path) == tuple(header.split(","))
            values, _ = encoded(path, Encoder())
            assert values.tolist() == [[1.0] * values.shape[1]]

    def test_what_is_not_text_is_known(self, tmp_path: Path) -> None:
        for compression in ("none", "snappy", "zstd"):
            for table in (TABLE, TABLE.slice(0, 0), TABLE.select(["height"]), pa.table({})):
                for version in ("1.0", "2.0"):
                    file = io.BytesIO()
                    pq.write_table(
                        table,
                        file,
                        compression=compression,
                        data_page_version=version,
                        use_dictionary=version == "1.0",
                    )
                    assert ending_of_bytes(file.getvalue()[:64]) == ".parquet"
        for name, ending in (
            ("rows.arrow", ".arrow"),
            ("rows.arrows", ".arrows"),
            ("rows.nc", ".nc"),
            ("rows3.nc", ".nc"),
            ("rows.csv.gz", ".csv.gz"),
            ("rows.csv.bz2", ".csv.bz2"),
            ("rows.csv.xz", ".csv.xz"),
            ("rows.zip", ".csv.zip"),
        ):
            assert ending_of_bytes(SAVED[name](tmp_path / name).read_bytes()) == ending
        assert ending_of_bytes(bz2.compress(b"")) == ".csv.bz2"
        np.save(tmp_path / "x.npy", np.zeros((2, 1)))
        assert kind_of_bytes((tmp_path / "x.npy").read_bytes()) == "npy"


class TestBadFiles:
    @pytest.mark.parametrize("case", BAD_FILES)
    def test_is_named_in_one_line(self, case: str, tmp_path: Path) -> None:
        name, content, says = BAD_FILES[case]
        path = pack(tmp_path / name, content)
        with pytest.raises(DataError) as caught:
            encoded(path, Encoder() if case == "long line" else None)
        message = str(caught.value)
        assert message.startswith(str(path))
        assert says in message
        assert "\n" not in message

    def test_missing_files_and_folders_of_something_else(self, tmp_path: Path) -> None:
        with pytest.raises(StorageError, match="no such file"):
            encoded(tmp_path / "none.csv")
        with pytest.raises(GenstreamError, match=r"no zarr\.json"):
            encoded(tmp_path)
        (tmp_path / "manifests").mkdir()
        with pytest.raises(DataError, match=r"is a dataset already.*Dataset\.open\("):
            encoded(tmp_path)
        with pytest.raises(DataError, match="cannot read rows from int"):
            list(read_tables(3))

    def test_bytes_changed_anywhere_never_crash(self, tmp_path: Path) -> None:
        rng = np.random.default_rng(0)
        for name in ("rows.parquet", "rows.arrow", "rows.arrows", "rows.csv.gz", "rows.nc"):
            good = SAVED[name](tmp_path / name).read_bytes()
            for _ in range(25):
                content = bytearray(good)
                for at in rng.integers(len(good), size=8):
                    content[at] = rng.integers(256)
                path = pack(tmp_path / f"bad-{name}", bytes(content[: rng.integers(20, len(good))]))
                with contextlib.suppress(GenstreamError):
                    encoded(path)

    def test_a_column_that_is_not_there_and_what_was_meant(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"no column 'Heigth' \(did you mean 'height'\?\)"):
            encoded(save_csv(tmp_path / "r.csv"), Encoder({"Heigth": "real"}))


def column(values: Any, kind: Any = None) -> pa.Table:
    return pa.table({"x": values if isinstance(values, pa.Array) else pa.array(values, kind)})


def codes(values: Any, spec: Any, kind: Any = None, **options: Any) -> list[float]:
    found = Encoder({"x": spec}, **options).encode(column(values, kind)).filled()[:, 0]
    return [None if np.isnan(x) else float(x) for x in found]  # type: ignore[misc]


class TestParquetFolders:
    def write(self, path: Path, **columns: Any) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), path, row_group_size=2)

    @pytest.mark.parametrize("name", ["x.parquet", "folder"])
    def test_its_files_follow_each_other_by_name(self, tmp_path: Path, name: str) -> None:
        folder = tmp_path / name
        self.write(folder / "b.parquet", b=["x"], a=[4])
        self.write(folder / "a.parquet", a=[1, 2, 3], b=["x", "y", "x"])
        self.write(folder / "_metadata.parquet", c=[1])
        self.write(folder / ".a.parquet", c=[1])
        (folder / "_SUCCESS").touch()
        assert table_columns(folder) == ("a", "b")
        table = pa.concat_tables(read_tables(folder, columns=["b", "a"]))
        assert table.to_pydict() == {"b": ["x", "y", "x", "x"], "a": [1, 2, 3, 4]}
        source = open_source(folder)
        assert source.chunk_rows == (2, 1, 1)
        assert [source.read(i).values.tolist() for i in range(3)] == [
            [[1, 0], [2, 1]], [[3, 0]], [[4, 0]],
        ]  # fmt: skip

    def test_what_would_be_misread_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "x.parquet").mkdir()
        with pytest.raises(DataError, match=r"x\.parquet: no parquet file in this folder"):
            open_source(tmp_path / "x.parquet")
        self.write(tmp_path / "x.parquet" / "a.parquet", a=[1])
        self.write(tmp_path / "x.parquet" / "b.parquet", b=[1])
        with pytest.raises(DataError, match=r"b\.parquet: its columns \(b\) are not those of .*a"):
            open_source(tmp_path / "x.parquet")
        self.write(tmp_path / "y.parquet" / "k=1" / "a.parquet", a=[1])
        with pytest.raises(DataError, match="folder 'k=1' holds a column in its name"):
            open_source(tmp_path / "y.parquet")
        (tmp_path / "x.parquet" / "b.parquet").write_bytes(b"PAR1 cut short")
        with pytest.raises(DataError, match=r"b\.parquet: not a whole parquet file"):
            open_source(tmp_path / "x.parquet")


class TestEncoder:
    def test_numbers_of_every_type(self) -> None:
        assert codes([" 1", "+2", "3e2", "NaN", "", "-0.5 "], "real") == [
            1,
            2,
            300,
            None,
            None,
            -0.5,
        ]
        assert codes([1, None], "real", pa.uint64()) == [1, None]
        assert codes([Decimal("1.25"), None], "real") == [1.25, None]
        assert codes([0.5, float("nan"), None], "real", pa.float32()) == [0.5, None, None]
        assert codes([0.5, None], "real", pa.float16()) == [0.5, None]
        assert codes([True, None, False], "real") == [1, None, 0]
        assert codes([None, None], "real", pa.null()) == [None, None]
        assert codes([b"1", b"2"], "real") == [1, 2]
        assert codes(pa.array(["1", "2", "1"]).dictionary_encode(), "count") == [1, 2, 1]

    def test_null_values(self) -> None:
        assert codes(["-999", "1", "NA"], "real", null_values=["-999", "NA"]) == [None, 1, None]
        assert codes([-999, 1], "real", null_values=["-999"]) == [None, 1]
        assert codes(["none", "x"], "categorical", null_values=["none"]) == [None, 0]
        assert codes([9, 1, 1], "categorical", null_values=["9"]) == [None, 0, 0]
        with pytest.raises(DataError, match="'NA' is not a number"):
            codes(["NA"], "real", null_values=["-"])

    @pytest.mark.parametrize("kind", [pa.float32(), pa.float64()])
    def test_null_numbers_are_what_a_column_holds_of_them(self, kind: Any) -> None:
        nulls = ["-999.9", "1e20"]
        assert codes([1, -999.9, 1e20], "real", kind, null_values=nulls) == [1, None, None]
        assert codes([1, -999.9, 1], "categorical", kind, null_values=nulls) == [0, None, 0]
        # A number out of a type's range is none that a column of it can hold.
        assert codes([0, 1], "real", kind, null_values=["1e-60", "1e300"]) == [0, 1]

    def test_binary_columns(self) -> None:
        assert codes(["TRUE", "false", "1", "0", ""], "binary") == [1, 0, 1, 0, None]
        assert codes([True, False, None], "binary") == [1, 0, None]
        assert codes([1.0, 0.0], "binary") == [1, 0]
        labelled = Column("x", "binary", ("no", "yes"))
        assert codes(["yes", "no", "NA"], labelled) == [1, 0, None]
        with pytest.raises(DataError, match=r"row 1, column 'x': 'yes' is neither 0, 1"):
            codes(["1", "yes"], "binary")
        with pytest.raises(DataError, match=r"row 1, column 'x': 'maybe' is not one of its levels"):
            codes(["no", "maybe"], labelled)
        with pytest.raises(DataError, match=r"row 0, column 'x': 2 is not possible"):
            codes([2], "binary")

    def test_labels_of_every_type(self) -> None:
        for values, kind in (
            (["1", "2", "1"], None),
            ([1, 2, 1], pa.int8()),
            ([1.0, 2.0, 1.0], None),
            ([Decimal(1), Decimal(2), Decimal(1)], None),
        ):
            encoder = Encoder({"x": "categorical"})
            rows = encoder.encode(column(values, kind))
            assert encoder.schema["x"].levels == ("1", "2")
            assert rows.values[:, 0].tolist() == [0, 1, 0]
        encoder = Encoder({"x": "categorical"})
        encoder.encode(column([True, False]))
        assert encoder.schema["x"].levels == ("true", "false")
        assert codes([Decimal("1.00")], Column("x", "categorical", ("1",))) == [0]
        encoder = Encoder({"x": "categorical"})
        encoder.encode(column([0.5, float("nan"), 1.0]))
        assert encoder.schema["x"].levels == ("0.5", "1")

    def test_fixed_levels(self) -> None:
        spec = Column("x", "categorical", ("b", "a"))
        assert codes(["a", "b", ""], spec) == [1, 0, None]
        with pytest.raises(
            DataError, match=r"t: row 12, column 'x': 'B' is not one of its levels "
        ):
            Encoder({"x": spec}).encode(column(["a", "b", "B"]), first_row=10, place="t")
        assert codes(["a", "c"], spec, unseen="missing") == [1, None]
        schema = Schema((spec,))
        encoder = Encoder(schema)
        encoder.encode(column(["a"]))
        assert encoder.schema == schema

    def test_learned_levels_go_on_where_they_ended(self) -> None:
        known = Schema((Column("x", "categorical", ("b", "a")),))
        for specs in (None, {"x": "categorical"}):
            encoder = Encoder(specs, known=known)  # type: ignore[arg-type]
            assert encoder.wanted == ["x"]
            rows = encoder.encode(column(["c", "a"]))
            assert rows.values[:, 0].tolist() == [2, 1]
            assert encoder.schema["x"].levels == ("b", "a", "c")
        for specs, says in (
            ({"x": "real"}, "in the dataset it is categorical"),
            ({"y": "real"}, "the dataset has x"),
            ({"x": ColumnSpec("x", "categorical", ("a", "b"))}, "must begin with them"),
        ):
            with pytest.raises(ConfigError, match=says):
                Encoder(specs, known=known)  # type: ignore[arg-type]

    def test_what_is_known_of_a_column_stays_known(self) -> None:
        known = Schema(
            (
                Column("x", unit="mg", lower=0.1, upper=9.0, resolution=0.5),
                Column("b", "binary", ("no", "yes")),
                Column("c", "categorical", ("u",), "town"),
            )
        )
        assert Encoder(known=known).schema == known

    def test_too_many_levels_and_none(self) -> None:
        assert len(codes([str(i) for i in range(1000)], "categorical")) == 1000
        with pytest.raises(DataError, match=r"row 1000, column 'x': '1000' is level number 1001"):
            codes([str(i) for i in range(1002)], "categorical")
        encoder = Encoder({"x": "categorical"})
        encoder.encode(column(["", None]))
        with pytest.raises(DataError, match="column 'x': every entry is missing"):
            _ = encoder.schema
        with pytest.raises(DataError, match="no rows"):
            _ = Encoder().schema

    @pytest.mark.parametrize(
        ("values", "kind", "says"),
        [
            (["1", "1,5"], "real", r"row 1, column 'x': '1,5' is not a number: write a decimal"),
            (["1", "1_000"], "real", r"row 1, column 'x': '1_000' is not a number"),
            (["x" * 99], "real", r"'x{37}\.\.\.' is not a number"),
            (["1", "inf"], "real", r"row 1, column 'x' is infinite"),
            ([1e200], "real", "too large"),
            ([3, -1], "count", r"row 1, column 'x': -1 is not possible in a count column"),
            (["0", "1.5"], "count", r"row 1, column 'x': 1.5 is not possible"),
            (pa.array([0], pa.timestamp("s")), "real", "holds times"),
            (pa.array([0], pa.duration("s")), "count", "holds times"),
            ([[1], [2]], "real", "neither numbers nor labels"),
            ([[1], [2]], "categorical", "neither numbers nor labels"),
            ([b"\xff"], "categorical", "neither numbers nor labels"),
        ],
    )
    def test_entries_that_cannot_be_used(self, values: Any, kind: str, says: str) -> None:
        with pytest.raises(DataError, match=says):
            codes(values, kind)

    def test_gaps_may_be_forbidden(self) -> None:
        encoder = Encoder({"x": "real"}, missing="forbid")
        encoder.encode(column(["1"]))
        with pytest.raises(DataError, match=r"f: row 8, column 'x': is missing"):
            encoder.encode(column(["1", "", ""]), first_row=7, place="f")

    def test_inference(self) -> None:
        table = pa.table(
            {
                "r": [1, 2],
                "t": ["0.5", ""],
                "c": ["u", None],
                "b": [True, False],
                "w": ["true", "False"],
                "n": pa.nulls(2),
                "key": ["k1", "k2"],
            }
        )
        encoder = Encoder(carried=["key"])
        assert encoder.wanted is None
        encoder.encode(table)
        kinds = ("real", "real", "categorical", "binary", "binary", "real")
        assert encoder.schema.kinds == kinds
        assert encoder.wanted == ["r", "t", "c", "b", "w", "n", "key"]
        with pytest.raises(DataError, match="holds times"):
            Encoder().encode(column(pa.array([0], pa.date32())))
        with pytest.raises(DataError, match="no column besides x"):
            Encoder(carried=["x"]).encode(column([1]))

    def test_inference_does_not_depend_on_how_the_first_rows_are_cut(self) -> None:
        table = pa.table(
            {
                "late": ["1", "2", "", "4", "x", "6"],
                "words": ["true", "", "FALSE", "true", "false", ""],
                "more": ["true", "false", "true", "false", "maybe", "1"],
                "empty": ["", "", "", "", "", ""],
                "number": ["", "", "1.5", "2", "", "-3"],
                "truth": [True, False, None, True, True, True],
                "id": list("abcdef"),
            }
        )
        wanted = {
            "late": "categorical",
            "words": "binary",
            "more": "categorical",
            "empty": "real",
            "number": "real",
            "truth": "binary",
        }
        for n in (1, 2, 4, 6):
            encoder = Encoder(carried=["id"])
            encoder.infer(table.slice(i, n) for i in range(0, 6, n))
            assert {spec.name: spec.kind for spec in encoder.specs} == wanted

    def test_weights_and_ids(self) -> None:
        encoder = Encoder({"x": "real"})
        table = pa.table(
            {"no": ["k", " "], "w": ["1", "0.5"], "bad": [1.0, -1], "gap": [None, 1], "id": [7, 8]}
        )
        assert encoder.weights(table, "w").tolist() == [1, 0.5]
        assert encoder.ids(table, "id") == [7, 8]
        assert encoder.ids(table, "w") == ["1", "0.5"]
        for call, says in (
            (lambda: encoder.weights(table, "bad"), r"row 1, column 'bad': -1 is no weight"),
            (lambda: encoder.weights(table, "gap"), r"row 0, column 'gap': is missing"),
            (lambda: encoder.ids(table, "gap"), r"row 0, column 'gap': the id is missing"),
            (lambda: encoder.ids(table, "no"), r"row 1, column 'no': the id is missing"),
            (lambda: encoder.ids(table, "idd"), r"did you mean 'id'"),
        ):
            with pytest.raises(DataError, match=says):
                call()
        with pytest.raises(ConfigError, match="both as data and as id or weights"):
            Encoder({"x": "real"}, carried=["x"])
        with pytest.raises(ConfigError, match="kind 'rael'"):
            Encoder({"x": "rael"})  # type: ignore[dict-item]

    @settings(max_examples=40, deadline=None)
    @given(
        st.lists(
            st.tuples(
                st.one_of(st.none(), st.floats(-1e6, 1e6)),
                st.one_of(st.none(), st.sampled_from(["a", "b", 'q"', "x,y", "line\nbreak", "é"])),
            ),
            min_size=1,
            max_size=40,
        ),
        st.integers(1, 9),
        st.integers(1, 9),
    )
    def test_codes_do_not_depend_on_how_a_file_is_cut(
        self, rows: list[tuple[float | None, str | None]], one: int, other: int
    ) -> None:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["x", "c"])
        writer.writerows([("NA" if x is None else repr(x), c or "NA") for x, c in rows])
        writer.writerow([1, "last"])
        with tempfile.TemporaryDirectory() as folder:
            path = save_csv(Path(folder) / "r.csv", text.getvalue())
            kinds = {"x": "real", "c": "categorical"}
            a, schema = encoded(path, Encoder(kinds), chunk_rows=one)  # type: ignore[arg-type]
            b, same = encoded(path, Encoder(kinds), chunk_rows=other)  # type: ignore[arg-type]
        np.testing.assert_array_equal(a, b)
        assert schema == same
        labels = [*(c for _, c in rows), "last"]
        levels = schema["c"].levels
        assert [None if np.isnan(x) else levels[int(x)] for x in a[:, 1]] == labels
        expected = [np.nan if x is None else x for x, _ in rows]
        np.testing.assert_array_equal(a[:-1, 0], expected)


class TestSources:
    def test_tables_in_place(self, tmp_path: Path) -> None:
        kinds = KINDS
        for name in (
            "rows.parquet",
            "rows.arrow",
            "rows.nc",
            "rows3.nc",
            "table",
            "frame",
            "dataset",
        ):
            source = open_source(SAVED[name](tmp_path / name), kinds)  # type: ignore[arg-type]
            assert isinstance(source, TableSource)
            assert isinstance(source, Source)
            assert source.schema["town"].levels == TOWNS
            source = pickle.loads(pickle.dumps(source))
            values = [source.read(i).filled() for i in range(len(source.chunk_rows))]
            np.testing.assert_array_equal(np.concatenate(values), CODES)
            assert source.chunk_nbytes >= max(v.nbytes for v in values)
            assert source.identity()["n_rows"] == 4

    def test_a_chunk_is_a_row_group_and_files_follow_each_other(self, tmp_path: Path) -> None:
        paths = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
        pq.write_table(pa.table({"c": ["u", "v", "u"], "w": [1, 2, 3]}), paths[0], row_group_size=2)
        pq.write_table(pa.table({"w": [4.0], "c": ["z"]}), paths[1])
        source = open_source(paths, {"c": "categorical"}, "w")
        assert source.chunk_rows == (2, 1, 1)
        assert source.schema["c"].levels == ("u", "v", "z")
        assert [source.origin(i) for i in range(3)] == [((0, 0, 2),), ((0, 2, 1),), ((0, 3, 1),)]
        assert source.read(2).values.tolist() == [[2.0]]
        weights = [source.read(i).row_weights.tolist() for i in range(3)]
        assert weights == [[1, 2], [3], [4]]
        assert source.identity()["files"] == [str(p) for p in paths]
        fixed = open_source(paths, {"c": Column("c", "categorical", ("u", "v"))})
        with pytest.raises(DataError, match=r"b.parquet: row 0, column 'c': 'z' is not one"):
            fixed.read(2)
        pq.write_table(pa.table({"c": ["u"], "d": [1]}), paths[0])
        with pytest.raises(DataError, match=r"b.parquet: no column 'd'"):
            open_source(paths, {"c": "categorical", "d": "real"})

    def test_weights_of_a_table_may_be_an_array(self) -> None:
        table = pa.table({"a": [1.0, 2.0]})
        assert open_source(table, weights=[3, 4]).read(0).row_weights.tolist() == [3, 4]
        with pytest.raises(DataError, match="one weight a row"):
            open_source(table, weights=[3])

    def test_every_kind_of_array(self, tmp_path: Path) -> None:
        X = np.arange(12.0).reshape(6, 2)
        np.save(tmp_path / "x.npy", X)
        array = zarr.create_array(str(tmp_path / "x.zarr"), data=X, chunks=(2, 2))
        labelled = xarray.DataArray(X, dims=("t", "f"), coords={"f": ["a", "b"]}, name="x")
        labelled.to_netcdf(tmp_path / "x.nc", engine="h5netcdf")
        for data, kind, chunks, names in (
            (X, NumpySource, (6,), ("x0", "x1")),
            (X.tolist(), NumpySource, (6,), ("x0", "x1")),
            (np.ma.array(X), NumpySource, (6,), ("x0", "x1")),
            (tmp_path / "x.npy", NpySource, (6,), ("x0", "x1")),
            (str(tmp_path / "x.zarr"), ZarrSource, (2, 2, 2), ("x0", "x1")),
            (array, ZarrSource, (2, 2, 2), ("x0", "x1")),
            (da.from_array(X, chunks=(4, 1)), DaskSource, (4, 2), ("x0", "x1")),
            (labelled, XarraySource, (6,), ("a", "b")),
            (labelled.chunk(t=4), XarraySource, (4, 2), ("a", "b")),
            (tmp_path / "x.nc", XarraySource, (6,), ("a", "b")),
        ):
            source = open_source(data)
            assert type(source) is kind
            assert source.chunk_rows == chunks
            assert source.schema.names == names
            read = [source.read(i).values for i in range(len(chunks))]
            np.testing.assert_array_equal(np.concatenate(read), X)
            assert open_source(source) is source
            weighted = open_source(data, list(names), np.arange(6))
            assert weighted.read(0).row_weights[1] == 1
        turned = open_source(labelled, ["b"])
        np.testing.assert_array_equal(turned.read(0).values, X[:, 1:])
        with pytest.raises(DataError, match="no column 'c'"):
            open_source(labelled, ["a", "c"])

    def test_several_arrays_are_one(self, tmp_path: Path) -> None:
        X = np.arange(20.0).reshape(10, 2)
        np.save(tmp_path / "a.npy", X[:4])
        np.save(tmp_path / "b.npy", X[4:])
        source = open_source([tmp_path / "a.npy", str(tmp_path / "b.npy")], ["u", "v"])
        assert isinstance(source, Concatenated)
        assert isinstance(source, Source)
        assert source.schema.names == ("u", "v")
        assert source.chunk_rows == (4, 6)
        assert source.origin(1) == ((0, 4, 6),)
        np.testing.assert_array_equal(source.read(1).values, X[4:])
        assert source.chunk_nbytes >= X[4:].nbytes
        whole = Split(NumpySource(X), "test", 0.5, 1)
        parts = Split(source, "test", 0.5, 1)
        assert n_rows(parts) == n_rows(whole)
        assert source.identity()["n_rows"] == 10
        np.save(tmp_path / "c.npy", np.ones((2, 3)))
        with pytest.raises(DataError, match=r"c\.npy: its columns"):
            open_source([tmp_path / "a.npy", tmp_path / "c.npy"])
        with pytest.raises(ConfigError, match="weights"):
            open_source([tmp_path / "a.npy", tmp_path / "b.npy"], weights=np.ones(10))

    def test_levels_of_arrays_must_be_listed(self) -> None:
        with pytest.raises(ConfigError, match=r"column 'c'.*list the levels"):
            open_source(np.zeros((2, 1)), {"c": "categorical"})
        listed = {"c": Column("c", "categorical", ("u", "v"))}
        assert open_source(np.zeros((2, 1)), listed).schema["c"].n_levels == 2

    def test_gaps_may_be_forbidden_in_place(self) -> None:
        X = np.array([[1.0, 2.0], [3.0, np.nan]])
        for data in (X, pa.table({"x0": X[:, 0], "x1": X[:, 1]}), da.from_array(X)):
            open_source(data).read(0)
            with pytest.raises(DataError, match=r"row 1, column 'x1': is missing"):
                open_source(data, missing="forbid").read(0)

    @pytest.mark.parametrize("dtype", ["float32", "float64"])
    def test_null_values_of_arrays_in_place(self, dtype: Any, tmp_path: Path) -> None:
        X = np.array([[1, -999.9], [2, 3], [1e20, 4], [5, 6]], dtype)
        wanted = np.array([[1, np.nan], [2, 3], [np.nan, 4], [5, 6]], dtype)
        np.save(tmp_path / "x.npy", X)
        zarr.create_array(str(tmp_path / "x.zarr"), data=X, chunks=(2, 2))
        labelled = xarray.DataArray(X, dims=("t", "f"), name="x")
        nulls = ["-999.9", "1e20", "none"]
        before = X.copy()
        for data in (X, tmp_path / "x.npy", tmp_path / "x.zarr", da.from_array(X), labelled):
            source = open_source(data, null_values=nulls)
            read = [source.read(i).filled() for i in range(len(source.chunk_rows))]
            np.testing.assert_array_equal(np.concatenate(read), wanted)
            assert read[0].dtype == dtype
            with pytest.raises(DataError, match=r"row 0, column 'x1': is missing"):
                open_source(data, null_values=nulls, missing="forbid").read(0)
        np.testing.assert_array_equal(X, before)
        picked = open_source(X, null_values=nulls)
        assert isinstance(picked, NumpySource)
        np.testing.assert_array_equal(picked.pick(np.array([0, 1])).filled(), wanted[:2])
        several = open_source([tmp_path / "x.npy", tmp_path / "x.zarr"], null_values=nulls)
        np.testing.assert_array_equal(several.read(0).filled(), wanted)
        # Where nothing is missing, nothing is copied.
        whole = np.ascontiguousarray(X[1::2])
        assert np.shares_memory(open_source(whole, null_values=nulls).read(0).values, whole)
        # As what it is ingested from, labels too.
        listed = {"c": Column("c", "categorical", ("u", "v"))}
        coded = open_source(np.array([[0], [-1], [1]]), listed, null_values=["-1"])
        np.testing.assert_array_equal(coded.read(0).filled(), [[0], [np.nan], [1]])

    def test_what_cannot_be_read_in_place(self, tmp_path: Path) -> None:
        for name in ("rows.csv", "rows.arrows"):
            with pytest.raises(DataError, match="ingest it"):
                open_source(SAVED[name](tmp_path / name))
        with pytest.raises(StorageError, match="no such file"):
            open_source(tmp_path / "none.parquet")
        with pytest.raises(DataError, match="array"):
            open_source([[1.0, 2.0], [3.0]])
        with pytest.raises(DataError, match="has no rows"):
            open_source(pa.table({"a": pa.array([], pa.float64())}))
        with pytest.raises(DataError, match="different dimensions"):
            open_source(xarray.Dataset({"a": ("u", [1.0]), "b": ("v", [1.0])}))
        with pytest.raises(DataError, match="no variable has one dimension"):
            open_source(xarray.Dataset({"a": (("u", "v"), [[1.0]])}))
        with pytest.raises(DataError, match="column 'a' is there 2 times"):
            open_source(pd.DataFrame([[1, 2]], columns=["a", "a"]))
        with pytest.raises(DataError, match="pandas table"):
            open_source(pd.DataFrame({"a": [1, "x"]}))

    def test_damage_met_while_reading_names_the_file(self, tmp_path: Path) -> None:
        path = pack(tmp_path / "r.parquet", broken_page())
        with pytest.raises(GenstreamError, match=r"r\.parquet"):
            open_source(path, {"town": "categorical", "height": "real"}).read(0)

    def test_frames_named_by_numbers(self) -> None:
        source = open_source(pd.DataFrame(np.ones((3, 2))))
        assert source.schema.names == ("0", "1")
