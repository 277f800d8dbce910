"""Addressable chunks of rows, wherever the data live.

A source knows how many chunks it has and how many rows each of them holds before anything is read,
and reads any chunk by its number, in any order and from any thread, holding one chunk at a time.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from genstream.errors import ConfigError, CorruptError, DataError, StorageError
from genstream.profile import mark
from genstream.rows import Rows, pick
from genstream.schema import Schema

if TYPE_CHECKING:
    import dask.array as da
    import zarr

Array = NDArray[Any]
Piece = tuple[int, int, int]
Part = Literal["train", "test"]

CHUNK_ROWS = 65_536
# Rows in memory are cut into a multiple of so many chunks, or a smaller power of two where there
# are fewer than so many rows for each: the same whoever works on them, and as much for each of a
# few workers.
EVEN_CHUNKS, LEAST_ROWS = 16, 8192
# Tables are decoded by pieces of so many bytes, or of so few rows where they are very wide.
PIECE_NBYTES, LEAST_PIECE_ROWS = 8 << 20, 256
MAX_CHUNK_NBYTES = 2**31
_COMPRESSORS = ("blosc", "bz2", "gzip", "lz4", "lzma", "zlib", "zstd")
_CHECKSUMS = ("adler32", "crc32", "crc32c", "fletcher32")
_LAYOUTS = ("bytes", "delta", "sharding_indexed", "shuffle", "transpose", "vlen-utf8")
_CODECS = frozenset(_COMPRESSORS + _CHECKSUMS + _LAYOUTS)


@runtime_checkable
class Source(Protocol):
    """Rows in chunks that can be read by number; picklable, so that other processes can read too.

    A chunk may hold no rows (a hold-out part of it can be empty).
    """

    @property
    def schema(self) -> Schema:
        """The columns, in the order of `Rows.values`."""

    @property
    def chunk_rows(self) -> tuple[int, ...]:
        """Rows of each chunk, in order; their sum is the number of rows."""

    @property
    def chunk_nbytes(self) -> int:
        """Memory of the largest decoded chunk, in bytes."""

    def read(self, i: int) -> Rows:
        """Chunk `i`: float32 or float64 values, codes for labels, gaps masked.

        Raises DataError on values that cannot be used, CorruptError on bytes that cannot be
        decoded and StorageError on what cannot be opened; each names the place.
        """

    def origin(self, i: int) -> tuple[Piece, ...]:
        """Where chunk `i` comes from: (batch key, first row in that batch, rows), in order.

        The pair (batch key, row in batch) identifies a row however the data are chunked.
        """

    def identity(self) -> dict[str, Any]:
        """What was read, as JSON: kind, place, rows, chunks and, where known, a digest."""


def fingerprint(path: str | Path) -> str:
    """Digest of the names, sizes and times of change of a file, or of all files below a folder.

    It tells that data changed without reading them. Empty for what is not a local path.
    """
    place = Path(path)
    if "://" in str(path) or not place.exists():
        return ""
    sha = hashlib.sha256()
    for file in sorted(place.rglob("*")) if place.is_dir() else [place]:
        if file.is_file():
            found = file.stat()
            name = file.relative_to(place).as_posix()
            sha.update(f"{name} {found.st_size} {found.st_mtime_ns}\n".encode())
    return sha.hexdigest()


def content_digest(path: str | Path) -> str:
    """SHA-256 of a file, or of the names and bytes of all files below a folder.

    Raises StorageError where it cannot be read.
    """
    place = Path(path)
    try:
        if place.is_dir():
            files = [p for p in place.rglob("*") if p.is_file()]
            return folder_digest({p.relative_to(place): content_digest(p) for p in files})
        with place.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise _storage_error(path, error) from error


def folder_digest(files: Mapping[PurePath, str]) -> str:
    """What `content_digest` says of a folder with files of these digests, by their paths in it."""
    sha = hashlib.sha256()
    for name in sorted(files):
        sha.update(f"{name.as_posix()}\n".encode())
        sha.update(bytes.fromhex(files[name]))
    return sha.hexdigest()


def even_rows(n: int) -> int:
    """Rows of a chunk where nothing is said of `n` rows in memory: at most `CHUNK_ROWS`."""
    chunks = EVEN_CHUNKS * max(1, -(-n // (EVEN_CHUNKS * CHUNK_ROWS)))
    fitting = max(1, n // LEAST_ROWS)
    return max(1, -(-n // min(chunks, 1 << (fitting.bit_length() - 1))))


def rows_of_piece(n_columns: int) -> int:
    """Rows of a table to decode at once: as many as are 8 MiB of float64, at most `CHUNK_ROWS`."""
    return min(CHUNK_ROWS, max(LEAST_PIECE_ROWS, PIECE_NBYTES // (8 * max(1, n_columns))))


def n_rows(source: Source) -> int:
    """Rows of a source."""
    return sum(source.chunk_rows)


class ArraySource:
    """What the sources of one two-dimensional array share: rows cut at given boundaries.

    Subclasses say in `_take` how to get the rows from `first` to `last` as an array, or read whole
    chunks in their own way.
    """

    kind = "array"
    # Whether a missing entry is an error.
    forbid_missing = False
    # Numbers that stand for a missing entry.
    null_numbers: tuple[float, ...] = ()

    def __init__(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        chunk_rows: Sequence[int] | int,
        schema: Schema | Sequence[str] | None,
        weights: Any = None,
    ) -> None:
        self.name = name
        rows, features = _checked_shape(name, shape, dtype)
        self.schema = _schema_for(name, features, schema)
        self.dtype = np.dtype(np.float32 if dtype in _SMALL else np.float64)
        if isinstance(chunk_rows, int):
            if chunk_rows < 1:
                raise ConfigError(f"chunk_rows must be at least 1, not {chunk_rows}")
            full, rest = divmod(rows, chunk_rows)
            chunk_rows = (chunk_rows,) * full + ((rest,) if rest else ())
        self.chunk_rows: tuple[int, ...] = tuple(int(n) for n in chunk_rows)
        self._starts = tuple(np.concatenate([[0], np.cumsum(self.chunk_rows)]).tolist())
        self.weights = _checked_weights(name, weights, rows)

    @property
    def chunk_nbytes(self) -> int:
        """Memory of the largest decoded chunk, in bytes."""
        width = self.schema.n_features * (self.dtype.itemsize + 1) + 8
        return max(self.chunk_rows) * width

    def read(self, i: int) -> Rows:
        """Chunk `i`; see `Source.read`."""
        taken = self._take(self._starts[i], self._starts[i + 1])
        mark("read")
        rows = self._rows(i, taken)
        mark("decode")
        return rows

    def _rows(self, i: int, taken: Any) -> Rows:
        first, last = self._starts[i], self._starts[i + 1]
        stored: Any = taken
        if sparse.issparse(taken):
            values = stored.astype(self.dtype)
            # Sparse rows cannot have gaps, and say so of their first NaN.
            values.data = with_gaps(values.data, self.null_numbers)
        else:
            values = np.ascontiguousarray(taken, dtype=self.dtype)
            values = with_gaps(values, self.null_numbers)
        weights = None if self.weights is None else _numbers(self.weights[first:last])
        try:
            rows = Rows.of(values, weights, first_row=first, names=self.schema.names)
            rows.check(self.schema, first_row=first)
        except DataError as error:
            raise DataError(f"{self.name}: {error}") from None
        if self.forbid_missing and rows.observed is not None:
            row, j = np.argwhere(~rows.observed)[0]
            raise DataError(
                f"{self.name}: row {first + row}, column {self.schema.names[j]!r}: is missing, and "
                "data.missing is 'forbid'"
            )
        return rows

    def origin(self, i: int) -> tuple[Piece, ...]:
        """One piece: the whole array is one batch, so its split does not depend on its home."""
        return ((0, self._starts[i], self.chunk_rows[i]),)

    def files(self, i: int) -> tuple[str, ...]:
        """Local files, or folders of such, that chunk `i` is decoded from; none if not known."""
        del i
        return ()

    def identity(self) -> dict[str, Any]:
        """Kind, name, rows, chunks and type; see `Source.identity`."""
        return {
            "kind": self.kind,
            "name": self.name,
            "n_rows": self._starts[-1],
            "n_chunks": len(self.chunk_rows),
            "columns": list(self.schema.names),
            "dtype": str(self.dtype),
            "fingerprint": fingerprint(self.name),
        }

    def _take(self, first: int, last: int) -> Array:
        raise NotImplementedError


class NumpySource(ArraySource):
    """An array in memory, cut into chunks of `chunk_rows` rows that share its memory.

    Parameters
    ----------
    array
        (n, d) numbers; NaN, or a masked entry, is missing. Sparse arrays stay sparse.
    schema
        The columns, or their names; real columns `x0`, `x1`, ... when left out.
    weights
        (n,) row weights, not negative.
    chunk_rows
        Rows of a chunk; `even_rows` of them when left out.
    name
        What error messages call the array.

    Raises DataError when the array is not (n, d) real numbers with n, d > 0.
    """

    kind = "numpy"

    def __init__(
        self,
        array: Any,
        schema: Schema | Sequence[str] | None = None,
        weights: Any = None,
        chunk_rows: int | None = None,
        *,
        name: str = "array",
    ) -> None:
        if isinstance(array, np.ma.MaskedArray):
            small = array.dtype in _SMALL
            array = np.ma.filled(array.astype(np.float32 if small else np.float64), np.nan)
        stored: Any = array if sparse.issparse(array) else None
        self.array: Any = np.asarray(array) if stored is None else sparse.csr_array(stored)
        shape = self.array.shape
        if chunk_rows is None:
            chunk_rows = even_rows(shape[0] if shape else 0)
        super().__init__(name, shape, self.array.dtype, chunk_rows, schema, weights)

    def _take(self, first: int, last: int) -> Array:
        taken: Array = self.array[first:last]
        return taken

    def pick(self, index: NDArray[np.intp]) -> Rows:
        """Some rows by their positions, at least one; no other row is looked at.

        Raises DataError where one of them cannot be used.
        """
        weights = None if self.weights is None else _numbers(self.weights)[index]
        few = NumpySource(pick(self.array, index), self.schema, weights, len(index), name=self.name)
        few.forbid_missing, few.null_numbers = self.forbid_missing, self.null_numbers
        return few.read(0)

    @property
    def chunk_nbytes(self) -> int:
        """Memory of the largest chunk, in bytes."""
        if not sparse.issparse(self.array):
            return super().chunk_nbytes
        array: Any = self.array
        stored = np.diff(array.indptr[list(self._starts)]).max(initial=0)
        return int(stored) * (self.dtype.itemsize + 4) + 16 * max(self.chunk_rows)


class RowsSource:
    """Rows that were read and checked before, cut into chunks that share their memory.

    `chunk_rows` are the rows of a chunk; `even_rows` of them when left out.
    """

    kind = "rows"

    def __init__(self, rows: Rows, schema: Schema, chunk_rows: int | None = None) -> None:
        self.rows, self.schema = rows, schema
        size = chunk_rows or even_rows(rows.n_rows)
        self._starts = (*range(0, rows.n_rows, size), rows.n_rows)
        self.chunk_rows = tuple(b - a for a, b in pairwise(self._starts))

    @property
    def chunk_nbytes(self) -> int:
        """Memory of the largest chunk, in bytes."""
        return int(self.rows.nbytes * max(self.chunk_rows) // self.rows.n_rows)

    def read(self, i: int) -> Rows:
        """Chunk `i`; see `Source.read`."""
        return self.rows[self._starts[i] : self._starts[i + 1]]

    def origin(self, i: int) -> tuple[Piece, ...]:
        """One piece: the rows are one batch."""
        return ((0, self._starts[i], self.chunk_rows[i]),)

    def identity(self) -> dict[str, Any]:
        """Kind, rows and chunks; see `Source.identity`."""
        n_chunks = len(self.chunk_rows)
        return {"kind": self.kind, "n_rows": self.rows.n_rows, "n_chunks": n_chunks}


class NpySource(ArraySource):
    """A `.npy` file read by slices; the whole is never in memory.

    The file is mapped for the time of a read only, so that pages already used do not count as
    memory of this process. Parameters and errors as for `NumpySource`, and CorruptError for a file
    that is not one array or is cut short.
    """

    kind = "npy"

    def __init__(
        self,
        path: str | Path,
        schema: Schema | Sequence[str] | None = None,
        weights: Any = None,
        chunk_rows: int = CHUNK_ROWS,
    ) -> None:
        self.path = Path(path)
        array = open_npy(self.path)
        super().__init__(str(path), array.shape, array.dtype, chunk_rows, schema, weights)

    def _take(self, first: int, last: int) -> Array:
        return np.array(open_npy(self.path)[first:last], dtype=self.dtype, order="C")

    def files(self, i: int) -> tuple[str, ...]:
        """The file."""
        del i
        return (str(self.path),)


def open_npy(path: Path) -> Array:
    """The array of a `.npy` file, mapped. Raises as `NpySource` does."""
    try:
        array: Array = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise _storage_error(path, error) from None
    except (ValueError, EOFError) as error:
        if "allow_pickle" in str(error) or "Python objects" in str(error):
            raise DataError(
                f"{path}: holds Python objects, not numbers: save a plain array"
            ) from None
        raise CorruptError(f"{path}: not a whole .npy file: {error}") from None
    if not isinstance(array, np.ndarray):
        raise DataError(f"{path}: holds several arrays: save the one to use as .npy")
    return array


class ZarrSource(ArraySource):
    """A zarr array (v2 or v3) of rows by features; a chunk is a row range of its chunks.

    An array chunked along features too is read with all feature chunks of the row range together.
    A sharded array is read shard by shard.

    Parameters
    ----------
    array
        A zarr array, or the path of one or of a group that holds exactly one.
    schema, weights
        As for `NumpySource`.

    Raises DataError when it is no (n, d) array of real numbers, declares chunks above 2 GiB, has
    no chunk stored, or uses a codec outside the allowed ones.
    """

    kind = "zarr"

    def __init__(
        self,
        array: zarr.Array[Any] | str | Path,
        schema: Schema | Sequence[str] | None = None,
        weights: Any = None,
    ) -> None:
        opened = _open_zarr(array) if isinstance(array, str | Path) else array
        name = str(array) if isinstance(array, str | Path) else f"zarr array {array.store_path}"
        self.array = opened
        chunks = opened.shards or opened.chunks
        _checked_shape(name, opened.shape, opened.dtype)
        check_zarr(name, opened, chunks)
        n, c = opened.shape[0], chunks[0]
        super().__init__(name, opened.shape, opened.dtype, min(n, c), schema, weights)

    def _take(self, first: int, last: int) -> Array:
        try:
            return np.asarray(self.array[first:last, :])
        except Exception as error:
            raise CorruptError(
                f"{self.name}: rows {first} to {last - 1} cannot be decoded: {error}"
            ) from error

    def files(self, i: int) -> tuple[str, ...]:
        """The stored chunks or shards of the row range, whether they are there or left out."""
        from zarr.storage import LocalStore

        store = self.array.store
        if not isinstance(store, LocalStore):
            return ()
        width = (self.array.shards or self.array.chunks)[1]
        across = range(-(-self.array.shape[1] // width))
        keys = [self.array.metadata.encode_chunk_key((i, j)) for j in across]
        return tuple(str(store.root / self.array.path / key) for key in keys)

    def identity(self) -> dict[str, Any]:
        """As for every array, with its zarr format and chunk shape."""
        return super().identity() | {
            "zarr_format": self.array.metadata.zarr_format,
            "chunks": list(self.array.chunks),
        }


class DaskSource(ArraySource):
    """A dask array of rows by features; a chunk is a block, all feature blocks of it together.

    A block is computed in the thread that reads it, so the caller decides how many are in memory.
    Unknown chunk sizes are computed once, here. Parameters and errors as for `NumpySource`.
    """

    kind = "dask"

    def __init__(
        self,
        array: da.Array,
        schema: Schema | Sequence[str] | None = None,
        weights: Any = None,
        *,
        name: str = "dask array",
    ) -> None:
        if array.ndim == 2 and any(math.isnan(n) for n in (*array.chunks[0], *array.chunks[1])):
            array = array.compute_chunk_sizes()
        _checked_shape(name, array.shape, array.dtype)
        if array.numblocks[1] > 1:
            array = array.rechunk({1: -1})
        self.array = array
        chunk_rows = tuple(int(n) for n in array.chunks[0])
        super().__init__(name, array.shape, array.dtype, chunk_rows, schema, weights)

    def read(self, i: int) -> Rows:
        """Chunk `i`; see `Source.read`."""
        return self._rows(i, self.array.blocks[i].compute(scheduler="synchronous"))

    def identity(self) -> dict[str, Any]:
        """As for every array, with dask's name for the graph, which hashes its inputs."""
        return super().identity() | {"token": self.array.name}


class Split:
    """The training or the held-out rows of a source.

    A row is held out when `splitmix64(batch key, row in batch, seed) < fraction * 2**64`
    (Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators"): its part depends
    on the row's identity alone, never on chunking, order or on the rows around it.

    Parameters
    ----------
    source
        Any source, a split included.
    part
        `test`: the rows held out; `train`: all the others.
    fraction
        Expected share of rows held out, strictly between 0 and 1.
    seed
        Another seed draws another part.
    """

    def __init__(self, source: Source, part: Part, fraction: float, seed: int = 0) -> None:
        if part not in ("train", "test"):
            raise ConfigError(f"part {part!r} is not one of train, test")
        if not 0 < fraction < 1:
            raise ConfigError(f"the held-out fraction must lie between 0 and 1, not {fraction}")
        self.source = source
        self.part = part
        self.fraction = float(fraction)
        self.seed = int(seed)
        self._chunk_rows: tuple[int, ...] | None = None

    @property
    def schema(self) -> Schema:
        """The schema of the source."""
        return self.source.schema

    @property
    def chunk_nbytes(self) -> int:
        """Twice the source's: a chunk is decoded whole before its rows are chosen."""
        return 2 * self.source.chunk_nbytes

    @property
    def chunk_rows(self) -> tuple[int, ...]:
        """Rows of this part in each chunk of the source; found on first use, by hashing only."""
        if self._chunk_rows is None:
            chunks = range(len(self.source.chunk_rows))
            self._chunk_rows = tuple(int(np.count_nonzero(self._chosen(i))) for i in chunks)
        return self._chunk_rows

    def read(self, i: int) -> Rows:
        """The rows of chunk `i` that belong to this part."""
        rows = self.source.read(i)
        mark("read")
        rows = rows[self._chosen(i)]
        mark("decode")
        return rows

    def origin(self, i: int) -> tuple[Piece, ...]:
        """The runs of neighbouring rows of chunk `i` that belong to this part."""
        pieces: list[Piece] = []
        done = 0
        chosen = self._chosen(i)
        for key, first, n in self.source.origin(i):
            flags = np.concatenate([[False], chosen[done : done + n], [False]])
            edges = np.flatnonzero(flags[1:] != flags[:-1])
            for start, stop in edges.reshape(-1, 2).tolist():
                pieces.append((key, first + start, stop - start))
            done += n
        return tuple(pieces)

    def identity(self) -> dict[str, Any]:
        """The identity of the source, with part, fraction and seed."""
        return {
            "kind": "split",
            "part": self.part,
            "fraction": self.fraction,
            "seed": self.seed,
            "source": self.source.identity(),
        }

    def _chosen(self, i: int) -> NDArray[np.bool_]:
        below = np.uint64(min(int(self.fraction * 2.0**64), 2**64 - 1))
        hashes = [row_hash(piece, self.seed) for piece in self.source.origin(i)]
        held_out: NDArray[np.bool_] = (
            np.concatenate(hashes) if hashes else np.empty(0, np.uint64)
        ) < below
        return held_out if self.part == "test" else ~held_out


def row_hash(piece: Piece, seed: int) -> NDArray[np.uint64]:
    """(n,) uniform 64-bit hashes of the rows of a piece: a splitmix64 stream per batch and seed."""
    key, first, n = piece
    state = mix(np.array([key], dtype=np.uint64) ^ mix(_uint64(seed)))
    rows = np.arange(first + 1, first + n + 1, dtype=np.uint64)
    return mix(state + rows * np.uint64(0x9E3779B97F4A7C15))


def _uint64(number: int) -> NDArray[np.uint64]:
    return np.array([number % 2**64], dtype=np.uint64)


def mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64, a bijection of 64 bits, elementwise."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[np.uint64] = z ^ (z >> np.uint64(31))
    return mixed


# What float32 holds exactly.
_SMALL = (np.bool_, np.int8, np.uint8, np.int16, np.uint16, np.float16, np.float32)


def _checked_shape(name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[int, int]:
    if dtype.kind == "c":
        raise DataError(f"{name}: Complex data not supported: give real numbers")
    if dtype.kind not in "fiub":
        raise DataError(
            f"{name}: values of type {dtype} are not numbers: convert them, or give a table with "
            "named columns so that labels can be encoded"
        )
    if len(shape) != 2:
        raise DataError(
            f"{name}: expected a 2D array of rows and columns, got {len(shape)} dimensions "
            f"(shape={shape}): Reshape your data with reshape(-1, 1) for a single feature"
        )
    rows, features = shape
    if not rows:
        raise DataError(f"{name}: found array with 0 sample(s) (shape={shape}): give some rows")
    if not features:
        raise DataError(f"{name}: found array with 0 feature(s) (shape={shape}): give some columns")
    return rows, features


def _schema_for(name: str, features: int, schema: Schema | Sequence[str] | None) -> Schema:
    if schema is None:
        return Schema.real(features)
    if not isinstance(schema, Schema):
        schema = Schema.real(schema)
    if schema.n_features != features:
        raise DataError(
            f"{name}: has {features} columns, but {schema.n_features} are described: "
            f"{', '.join(schema.names)}"
        )
    return schema


def _checked_weights(name: str, weights: Any, rows: int) -> Any:
    """Row weights as something that can be sliced: kept lazy, checked chunk by chunk."""
    if weights is None:
        return None
    if isinstance(weights, str):
        raise ConfigError(
            f"{name}: weights name a column ({weights!r}), but an array has no further columns: "
            "give an array of one weight a row"
        )
    if not hasattr(weights, "shape") or isinstance(weights, np.generic):
        weights = np.asarray(weights, dtype=np.float64)
    if weights.shape == ():
        weights = np.full(rows, float(weights))
    if tuple(weights.shape) != (rows,):
        raise DataError(
            f"{name}: sample_weight.shape == {tuple(weights.shape)}, expected {(rows,)}: "
            "one weight a row"
        )
    return weights


def with_gaps(values: Array, nulls: Sequence[float]) -> Array:
    """Floats with NaN for those that stand for a missing entry; the same array where none does."""
    for number in as_held(nulls, values.dtype):
        gaps = values == number
        if gaps.any():
            values = np.where(gaps, values.dtype.type(np.nan), values)
    return values


def as_held(numbers: Sequence[float], dtype: np.dtype[Any]) -> Array:
    """Numbers as a type of floats rounds them; those out of its range are left out."""
    exact = np.array(numbers, np.float64)
    with np.errstate(over="ignore", under="ignore"):
        held = exact.astype(dtype)
    kept: Array = held[np.isfinite(held) & ((held != 0) | (exact == 0))]
    return kept


def _numbers(piece: Any) -> Array:
    """A slice of a lazy array as numbers, computed in this thread."""
    compute: Callable[..., Any] | None = getattr(piece, "compute", None)
    return np.asarray(piece if compute is None else compute(scheduler="synchronous"))


def _storage_error(path: Path | str, error: OSError) -> StorageError:
    if isinstance(error, FileNotFoundError):
        return StorageError(f"{path}: no such file or folder")
    return StorageError(f"{path}: cannot be read: {error.strerror or error}")


def _open_zarr(path: str | Path) -> zarr.Array[Any]:
    import zarr
    import zarr.errors

    if "://" not in str(path) and not Path(path).exists():
        raise StorageError(f"{path}: no such file or folder")
    try:
        opened = zarr.open(str(path), mode="r")
    except (zarr.errors.BaseZarrError, FileNotFoundError):
        raise DataError(f"{path}: not a zarr array: no zarr.json or .zarray in it") from None
    except OSError as error:
        raise _storage_error(path, error) from None
    except (ValueError, TypeError, KeyError) as error:
        raise CorruptError(f"{path}: its zarr metadata cannot be used: {error}") from None
    if isinstance(opened, zarr.Array):
        return opened
    try:
        arrays = dict(opened.arrays())
    except (ValueError, TypeError, KeyError) as error:
        what = str(error).partition("\n")[0]
        raise DataError(
            f"{path}: a zarr group, and the metadata of one of its arrays cannot be used ({what}): "
            "name the one to read in the path"
        ) from None
    if len(arrays) == 1:
        (found,) = arrays.values()
        return found
    listed = ", ".join(sorted(arrays)) or "none"
    raise DataError(f"{path}: a zarr group; name one of its arrays in the path ({listed})")


def check_zarr(name: str, array: zarr.Array[Any], chunks: tuple[int, ...]) -> None:
    """Refuse, before anything is decoded, what a small store can do: declare terabytes.

    Raises DataError, naming the array, on chunks above 2 GiB, on a codec that is not one of those
    allowed, and where data are declared but no chunk is stored, a scalar's excepted.
    """
    from zarr.core.metadata import ArrayV2Metadata

    nbytes = math.prod(chunks) * array.dtype.itemsize
    if nbytes > MAX_CHUNK_NBYTES:
        raise DataError(
            f"{name}: declares chunks of {nbytes / 2**30:.1f} GiB, more than "
            f"{MAX_CHUNK_NBYTES / 2**30:g} GiB: rechunk it"
        )
    metadata = array.metadata
    if isinstance(metadata, ArrayV2Metadata):
        used = [c for c in (metadata.compressor, *(metadata.filters or ())) if c is not None]
        names = [str(getattr(c, "codec_id", type(c).__name__)) for c in used]
    else:
        names = [str(codec.to_dict()["name"]) for codec in metadata.codecs]
    for codec in names:
        if codec.removeprefix("numcodecs.") not in _CODECS:
            raise DataError(
                f"{name}: is stored with codec {codec!r}, which is not one of those allowed: "
                f"{', '.join(sorted(_CODECS))}"
            )
    if array.ndim and _holds_no_chunk(array):
        raise DataError(f"{name}: declares {array.nbytes} bytes, but no chunk is stored")


def _holds_no_chunk(array: zarr.Array[Any]) -> bool:
    """Whether nothing but metadata is stored, where that is cheap to know (a local folder)."""
    from zarr.storage import LocalStore

    if not isinstance(array.store, LocalStore):
        return False
    files = (p for p in (array.store.root / array.path).rglob("*") if p.is_file())
    return all(p.name in ("zarr.json", ".zarray", ".zattrs") for p in files)
