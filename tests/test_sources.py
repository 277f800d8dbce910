from __future__ import annotations

import json
import pickle
from pathlib import Path

import dask.array as da
import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

from genstream.errors import ConfigError, CorruptError, DataError, GenstreamError, StorageError
from genstream.rows import Rows
from genstream.schema import Column, Schema
from genstream.sources import (
    CHUNK_ROWS,
    DaskSource,
    NpySource,
    NumpySource,
    Source,
    Split,
    ZarrSource,
    n_rows,
)
from genstream.tables import open_source


def everything(source: Source) -> Rows:
    rows = Rows.concatenate(source.read(i) for i in range(len(source.chunk_rows)))
    assert rows.n_rows == n_rows(source)
    for i, n in enumerate(source.chunk_rows):
        assert sum(piece[2] for piece in source.origin(i)) == n
    return rows


def with_gaps(n: int = 1000, d: int = 3, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d))
    x[rng.random((n, d)) < 0.1] = np.nan
    return x


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("chunks", [(100, 3), (64, 2), (5000, 1)])
def test_zarr_numpy_npy_give_the_same_rows(tmp_path: Path, zarr_format: int, chunks: tuple) -> None:
    x = with_gaps()
    array = zarr.create_array(
        str(tmp_path / "x.zarr"), shape=x.shape, chunks=chunks, dtype="f8", zarr_format=zarr_format
    )
    array[:] = x
    np.save(tmp_path / "x.npy", x)
    sources = [
        NumpySource(x, chunk_rows=77),
        ZarrSource(tmp_path / "x.zarr"),
        ZarrSource(array),
        NpySource(tmp_path / "x.npy", chunk_rows=300),
        NumpySource(np.ma.masked_invalid(x), chunk_rows=77),
        NumpySource(np.asfortranarray(x), chunk_rows=77),
        NumpySource(x.astype(">f8"), chunk_rows=77),
    ]
    for source in sources:
        for copy in (source, pickle.loads(pickle.dumps(source))):
            assert isinstance(copy, Source)
            np.testing.assert_array_equal(everything(copy).filled(), x)
            first = copy.read(0)
            assert first.values.dtype == np.float64
            assert first.values.flags.c_contiguous
            assert first.nbytes <= copy.chunk_nbytes
    assert sources[1].chunk_rows[0] == min(chunks[0], 1000)


@pytest.mark.parametrize(
    "given_dtype, read", [("f4", "f4"), ("f2", "f4"), ("i8", "f8"), ("u1", "f4"), ("?", "f4")]
)
def test_stored_type_decides_the_type_read(given_dtype: str, read: str) -> None:
    source = NumpySource(np.ones((5, 2), given_dtype))
    assert source.read(0).values.dtype == np.dtype(read)


def test_sharded_zarr_is_read_by_shards(tmp_path: Path) -> None:
    x = with_gaps(1000)
    array = zarr.create_array(
        str(tmp_path / "x.zarr"), shape=x.shape, chunks=(50, 3), shards=(200, 3), dtype="f8"
    )
    array[:] = x
    source = ZarrSource(tmp_path / "x.zarr")
    assert source.chunk_rows == (200,) * 5
    np.testing.assert_array_equal(everything(source).filled(), x)


def test_weights_follow_their_rows(tmp_path: Path) -> None:
    x = with_gaps(100)
    w = np.arange(100.0)
    lazy = zarr.create_array(str(tmp_path / "w"), shape=(100,), chunks=(30,), dtype="f8")
    lazy[:] = w
    for weights in (w, list(w), lazy):
        rows = everything(NumpySource(x, weights=weights, chunk_rows=40))
        np.testing.assert_array_equal(rows.row_weights, w)
    assert everything(NumpySource(x, weights=2.0)).row_weights.tolist() == [2.0] * 100


@given(
    cut_a=st.integers(1, 300),
    cut_b=st.integers(1, 300),
    seed=st.integers(-(2**63), 2**63),
    fraction=st.floats(0.01, 0.99),
)
def test_split_does_not_depend_on_chunking(
    cut_a: int, cut_b: int, seed: int, fraction: float
) -> None:
    x = np.arange(300.0)[:, None]
    a = everything(Split(NumpySource(x, chunk_rows=cut_a), "test", fraction, seed)).values
    b = everything(Split(NumpySource(x, chunk_rows=cut_b), "test", fraction, seed)).values
    rest = everything(Split(NumpySource(x, chunk_rows=cut_b), "train", fraction, seed)).values
    np.testing.assert_array_equal(a, b)
    assert sorted(np.concatenate([a, rest]).ravel()) == list(range(300))


@pytest.mark.parametrize("n", [1, 4095, 8192, 100_000, 300_000, 1_659_917])
def test_rows_in_memory_are_cut_evenly(n: int) -> None:
    """So that two or four workers have as much to do."""
    chunks = NumpySource(np.broadcast_to(0.0, (n, 1))).chunk_rows
    assert sum(chunks) == n
    assert max(chunks) <= CHUNK_ROWS
    assert min(chunks) >= min(n, 8192) - len(chunks)
    assert max(chunks) - min(chunks) < len(chunks)
    assert len(chunks) % 16 == 0 or len(chunks) in {1, 2, 4, 8}
    assert NumpySource(np.zeros((10, 1)), chunk_rows=4).chunk_rows == (4, 4, 2)


def test_split_holds_out_the_fraction_asked_for() -> None:
    x = np.zeros((200_000, 1))
    for fraction in (0.1, 0.5, 0.9):
        n = n_rows(Split(NumpySource(x), "test", fraction, 3))
        assert abs(n / 200_000 - fraction) < 5 * np.sqrt(fraction * (1 - fraction) / 200_000)


def test_parts_of_two_seeds_are_independent() -> None:
    x = np.arange(100_000.0)[:, None]
    a = set(everything(Split(NumpySource(x), "test", 0.5, 1)).values.ravel())
    b = set(everything(Split(NumpySource(x), "test", 0.5, 2)).values.ravel())
    assert abs(len(a & b) / 100_000 - 0.25) < 0.01


def test_split_of_a_split_keeps_row_identity() -> None:
    x = np.arange(1000.0)[:, None]
    train = Split(NumpySource(x, chunk_rows=90), "train", 0.3, 1)
    inner = Split(train, "test", 0.5, 2)
    got = set(everything(inner).values.ravel())
    expected = set(everything(Split(NumpySource(x), "test", 0.5, 2)).values.ravel())
    assert got == expected & set(everything(train).values.ravel())
    assert pickle.loads(pickle.dumps(inner)).chunk_rows == inner.chunk_rows
    assert inner.identity()["source"]["source"]["n_rows"] == 1000


@pytest.mark.parametrize(
    "array, says",
    [
        (np.zeros(3), "1 dimensions"),
        (np.zeros((0, 3)), "0 sample"),
        (np.zeros((3, 0)), "0 feature"),
        (np.zeros((3, 2), complex), "Complex"),
        (np.array([["a", "b"]]), "not numbers"),
        (np.array([[1, "b"]], dtype=object), "not numbers"),
        (np.zeros((2, 2), "M8[s]"), "not numbers"),
    ],
)
def test_unusable_arrays_get_one_clear_error(array: np.ndarray, says: str) -> None:
    with pytest.raises(DataError, match=says):
        NumpySource(array)


def test_bad_values_name_the_array_row_and_column() -> None:
    x = np.zeros((100, 2))
    x[70, 1] = np.inf
    with pytest.raises(DataError, match="here: row 70, column 'b' is infinite"):
        everything(NumpySource(x, ["a", "b"], chunk_rows=30, name="here"))
    counts = Schema((Column("a", "count"), Column("b")))
    y = np.zeros((100, 2))
    y[95, 0] = 1.5
    with pytest.raises(DataError, match=r"row 95, column 'a': 1\.5"):
        everything(NumpySource(y, counts, chunk_rows=30))
    weights = np.ones(100)
    weights[41] = -1
    with pytest.raises(DataError, match="row 41 has weight -1"):
        everything(NumpySource(y, weights=weights, chunk_rows=30))
    with pytest.raises(DataError, match="2 columns, but 3 are described"):
        NumpySource(y, ["a", "b", "c"])
    with pytest.raises(DataError, match="sample_weight"):
        NumpySource(y, weights=np.ones(99))
    with pytest.raises(ConfigError, match="between 0 and 1"):
        Split(NumpySource(y), "test", 1.0)


def flipped(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def test_bad_files_get_one_clear_error(tmp_path: Path) -> None:
    x = with_gaps(100)
    np.save(tmp_path / "x.npy", x)
    whole = (tmp_path / "x.npy").read_bytes()
    (tmp_path / "cut.npy").write_bytes(whole[:-100])
    (tmp_path / "empty.npy").write_bytes(b"")
    (tmp_path / "text.npy").write_text("hello world")
    np.save(tmp_path / "objects.npy", np.array([[{}]]), allow_pickle=True)
    np.savez(tmp_path / "several.npz", a=x, b=x)
    expected: dict[str, tuple[type[GenstreamError], str]] = {
        "cut.npy": (CorruptError, "whole"),
        "empty.npy": (CorruptError, "whole"),
        "text.npy": (DataError, "objects"),
        "objects.npy": (DataError, "objects"),
        "several.npz": (DataError, "several"),
        "absent.npy": (StorageError, "no such file"),
    }
    for name, (kind, says) in expected.items():
        with pytest.raises(kind, match=f"{name}.*{says}"):
            NpySource(tmp_path / name)


def test_bad_zarr_gets_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no such"):
        ZarrSource(tmp_path / "absent.zarr")
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="not a zarr array"):
        ZarrSource(tmp_path / "folder")
    group = zarr.open_group(str(tmp_path / "group"), mode="w")
    for name in "ab":
        group.create_array(name, shape=(10, 2), dtype="f8")[:] = 1
    with pytest.raises(DataError, match=r"name one of its arrays.*\(a, b\)"):
        ZarrSource(tmp_path / "group")
    assert n_rows(ZarrSource(tmp_path / "group" / "a")) == 10
    huge = {"shape": (2**40, 1), "chunks": (2**16, 1), "dtype": "f4"}
    zarr.create_array(str(tmp_path / "huge"), **huge)
    with pytest.raises(DataError, match="no chunk is stored"):
        ZarrSource(tmp_path / "huge")
    zarr.create_array(str(tmp_path / "bomb"), shape=(2**30, 8), chunks=(2**30, 8), dtype="f8")
    with pytest.raises(DataError, match="rechunk"):
        ZarrSource(tmp_path / "bomb")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "zarr.json").write_text("{")
    with pytest.raises(GenstreamError, match="bad"):
        ZarrSource(tmp_path / "bad")


@pytest.mark.parametrize("shape", [[], [3]])
def test_a_member_that_zarr_cannot_know_is_told_in_one_line(tmp_path: Path, shape: list) -> None:
    path = tmp_path / "g.zarr"
    group = zarr.open_group(str(path), mode="w", zarr_format=2)
    group.create_array("x", shape=(3,), dtype="f8")[:] = 1.0
    bad = {"zarr_format": 2, "shape": shape, "chunks": shape, "dtype": "<f8", "fill_value": 0}
    bad |= {"compressor": {"id": "pickle", "protocol": 5}, "order": "C", "filters": None}
    (path / "t").mkdir()
    (path / "t" / ".zarray").write_text(json.dumps(bad))
    for opened in (open_source, ZarrSource):
        with pytest.raises(DataError, match=r"g\.zarr: .*pickle.*: name the one to read") as caught:
            opened(path)
        assert "\n" not in str(caught.value)


def test_scalars_of_a_zarr_group_are_stored_by_codecs_allowed(tmp_path: Path) -> None:
    path = tmp_path / "g.zarr"
    group = zarr.open_group(str(path), mode="w", zarr_format=2)
    group.create_array("x", shape=(3,), dtype="f8")[:] = 1.0
    group["x"].attrs["_ARRAY_DIMENSIONS"] = ["row"]
    # Nothing is stored of a scalar that is its fill value.
    group.create_array("crs", shape=(), dtype="i8").attrs["_ARRAY_DIMENSIONS"] = []
    assert open_source(path).read(0).values.tolist() == [[1.0]] * 3
    metadata = json.loads((path / "crs" / ".zarray").read_text())
    metadata["compressor"] = {"id": "packbits"}
    (path / "crs" / ".zarray").write_text(json.dumps(metadata))
    with pytest.raises(DataError, match=r"crs: is stored with codec 'packbits'"):
        open_source(path)


def test_flipped_bits_of_a_checksummed_zarr_are_found(tmp_path: Path) -> None:
    array = zarr.create_array(
        str(tmp_path / "x"),
        shape=(100, 2),
        chunks=(50, 2),
        dtype="f8",
        compressors=zarr.codecs.ZstdCodec(checksum=True),
    )
    array[:] = np.random.default_rng(0).normal(size=(100, 2))
    flipped(tmp_path / "x" / "c" / "1" / "0")
    source = ZarrSource(tmp_path / "x")
    source.read(0)
    with pytest.raises(CorruptError, match="rows 50 to 99"):
        source.read(1)


def test_dask_blocks_are_chunks() -> None:
    x = with_gaps(500, 4)
    source = DaskSource(da.from_array(x, chunks=(120, 3)))
    assert source.chunk_rows == (120, 120, 120, 120, 20)
    np.testing.assert_array_equal(everything(source).filled(), x)
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy.read(2).filled(), x[240:360])
    unknown = da.from_array(x, chunks=(120, 3))
    unknown = unknown[da.from_array(np.arange(500), chunks=120) % 2 == 0]
    np.testing.assert_array_equal(everything(DaskSource(unknown)).filled(), x[::2])
    with pytest.raises(DataError, match="dask array: expected a 2D array"):
        DaskSource(da.zeros(10))
