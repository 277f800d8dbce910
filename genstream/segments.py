"""Arrays as checksummed zarr v3 in immutable pieces.

Each piece holds one zarr group, readable by anything that reads zarr: either a *segment*, rows in
chunks of about 8 MB that span all columns, or a *record*, the variables of a labelled dataset.
Every chunk is written, also where it is all fill value, and ends in a CRC-32C that the piece's
index knows, so that a chunk lost, changed or swapped with another is noticed when it is read.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from genstream.errors import CorruptError, DataError, StorageError
from genstream.manifests import Piece, PieceRef, PieceWriter, Storage
from genstream.profile import mark
from genstream.rows import Rows
from genstream.sources import check_zarr

if TYPE_CHECKING:
    import xarray
    import zarr

Array = NDArray[Any]
DType = Literal["float32", "float64"]
Ids = Sequence[str] | Sequence[int]

CHUNK_NBYTES = 8 * 2**20
# Wide rows come so many at a time, up to so many bytes: products of thin matrices are slow.
LEAST_ROWS, WIDE_NBYTES = 1024, 64 * 2**20
SEGMENT_CHUNKS = 256
RECORD_CHUNK_NBYTES = 64 * 2**20


def rows_of_chunk(n_features: int, itemsize: int) -> int:
    """Rows of a chunk that spans all columns: about 8 MB, and 64 MB at most for wide rows.

    Chunks of 8 MB are read nearly as fast as larger ones, and each of several workers holds some.
    """
    row = n_features * itemsize
    return max(1, CHUNK_NBYTES // row, min(LEAST_ROWS, WIDE_NBYTES // row))


class SegmentWriter:
    """Writes rows as they come into segments, holding one chunk in memory.

    Parameters
    ----------
    storage
        Where to.
    n_features, dtype
        Columns of every row, and the type in which they are stored; a missing entry as NaN.
    weighted
        Whether row weights are stored; rows without any weigh 1.
    chunk_rows
        Rows of a chunk; those of `rows_of_chunk` when left out. Rows that do not fill one chunk
        are stored as a chunk of their own size.
    digest
        Whether to compute a digest of the rows, for those that come from no file.
    """

    def __init__(
        self,
        storage: Storage,
        n_features: int,
        dtype: DType = "float64",
        *,
        weighted: bool = False,
        chunk_rows: int | None = None,
        digest: bool = True,
    ) -> None:
        self.storage = storage
        self.dtype = np.dtype(dtype)
        self.chunk_rows = chunk_rows or rows_of_chunk(n_features, self.dtype.itemsize)
        self.n_rows = 0
        self._digest = hashlib.sha256() if digest else None
        self._values = np.empty((self.chunk_rows, n_features), self.dtype)
        self._weights = np.empty(self.chunk_rows) if weighted else None
        self._ids: list[Any] | None = None
        self._n_held = 0
        self._n_chunks = 0
        self._piece: PieceWriter | None = None
        self._sealed: list[tuple[PieceWriter, dict[str, Any]]] = []

    @property
    def digest(self) -> str:
        """SHA-256 of the rows, once `close` has stored them all."""
        assert self._digest is not None
        return self._digest.hexdigest()

    def add(self, rows: Rows, ids: Ids | None = None) -> None:
        """Store further rows, with their ids if the first rows had any.

        Raises DataError when the rows have ids or weights that the others do not, or a value is
        too large for float32.
        """
        if ids is not None and self._ids is None and self.n_rows == 0:
            self._ids = []
        if (ids is None) != (self._ids is None):
            raise DataError("either all rows of a batch have an id or none has")
        if rows.weights is not None and self._weights is None:
            raise DataError("these rows have weights, but the dataset was made without any")
        filled = rows.filled()
        done = 0
        while done < rows.n_rows:
            n = min(rows.n_rows - done, self.chunk_rows - self._n_held)
            here, taken = slice(self._n_held, self._n_held + n), slice(done, done + n)
            with np.errstate(over="ignore"):
                self._values[here] = filled[taken]
            if self.dtype == np.float32 and np.isinf(self._values[here]).any():
                i, j = np.argwhere(np.isinf(self._values[here]))[0]
                raise DataError(
                    f"row {self.n_rows + i}, column {j}: {filled[done + i, j]:g} is too large for "
                    "float32: store the dataset as float64"
                )
            if self._weights is not None:
                self._weights[here] = rows.row_weights[taken]
            if ids is not None and self._ids is not None:
                self._ids += list(ids[taken])
            self._n_held += n
            self.n_rows += n
            done += n
            if self._n_held == self.chunk_rows:
                self._flush()

    def close(self) -> list[dict[str, Any]]:
        """Store what is left and seal; the segments in order, as the ledger names them."""
        if self._n_held:
            self._flush()
        if self._piece is not None:
            self._seal()
        return [entry for _, entry in self._sealed]

    def discard(self) -> None:
        """Delete everything that was written."""
        for piece, _ in self._sealed:
            piece.discard()
        if self._piece is not None:
            self._piece.discard()

    def _flush(self) -> None:
        n = self._n_held
        if self._piece is None:
            self._piece = PieceWriter(self.storage, "segments")
            self._segment_rows = 0
            # Rows that fill no chunk get one of their own size rather than a padded one.
            self._segment_chunk = self.chunk_rows if n == self.chunk_rows else n
        size = self._segment_chunk
        held: dict[str, Array] = {"values": self._values}
        if self._weights is not None:
            held["weights"] = self._weights
        for name, buffer in held.items():
            chunk = buffer[:size]
            chunk[n:] = np.nan
            if self._digest is not None:
                self._digest.update(chunk[:n].data)
            file = f"zarr/{name}/{_chunk_key(self._n_chunks, chunk.ndim)}"
            self._piece.add({file: _checked([chunk])[0]}, checksummed=[file])
        if self._ids is not None:
            data = json.dumps(self._ids, ensure_ascii=False).encode()
            if self._digest is not None:
                self._digest.update(data)
            self._piece.add({f"ids/{self._n_chunks}.json": data})
            self._ids = []
        self._segment_rows += n
        self._n_chunks += 1
        self._n_held = 0
        if self._n_chunks == SEGMENT_CHUNKS:
            self._seal()

    def _seal(self) -> None:
        assert self._piece is not None
        shape: tuple[int, ...] = (self._segment_rows, self._values.shape[1])
        chunk: tuple[int, ...] = (self._segment_chunk, self._values.shape[1])
        files = {"zarr/zarr.json": _group_metadata()}
        arrays = {"values": (2, self.dtype)}
        if self._weights is not None:
            arrays["weights"] = (1, self._weights.dtype)
        for name, (n_axes, dtype) in arrays.items():
            axes = ("row", "feature")[:n_axes]
            files[f"zarr/{name}/zarr.json"] = _metadata(shape[:n_axes], chunk[:n_axes], dtype, axes)
        self._piece.add(files)
        entry = {"n_rows": self._segment_rows, "chunk_rows": self._segment_chunk}
        content = entry | {
            "n_features": self._values.shape[1],
            "dtype": str(self.dtype),
            "weighted": self._weights is not None,
            "ids": self._ids is not None,
        }
        ref = self._piece.seal(content)
        self._sealed.append((self._piece, ref.to_json() | entry))
        self._piece = None
        self._n_chunks = 0


class Segment:
    """A sealed segment, read chunk by chunk."""

    def __init__(self, storage: Storage, entry: Mapping[str, Any]) -> None:
        self.piece = Piece(storage, PieceRef.from_json(entry))
        self.place = f"{storage.name}/{self.piece.ref.key}"
        content = self.piece.content
        if any(content[name] != entry[name] for name in ("n_rows", "chunk_rows")):
            raise CorruptError(f"{self.place}.json: declares other rows than its manifest")
        self.n_rows: int = content["n_rows"]
        self.chunk_rows: int = content["chunk_rows"]
        self.n_features: int = content["n_features"]
        self.weighted: bool = content["weighted"]
        self.has_ids: bool = content["ids"]
        self._metadata = {
            name: self.piece.read(f"zarr/{name}/zarr.json")
            for name in ("values", *(["weights"] if self.weighted else []))
        }
        self._types = {"values": np.dtype(content["dtype"]), "weights": np.dtype(np.float64)}
        self._check()

    def read(self, i: int) -> Rows:
        """Rows of chunk `i`. Raises CorruptError, naming the file, on damage."""
        n = min(self.chunk_rows, self.n_rows - i * self.chunk_rows)
        weights = self._chunk("weights", i, 1)[:n] if self.weighted else None
        rows = Rows.of(self._chunk("values", i, 2)[:n], weights)
        mark("decode")
        return rows

    def ids(self, i: int) -> list[str] | list[int] | None:
        """Ids of the rows of chunk `i`, or None where the rows have none."""
        if not self.has_ids:
            return None
        found: list[str] | list[int] = json.loads(self.piece.read(f"ids/{i}.json"))
        return found

    def _check(self) -> None:
        for name, metadata in self._metadata.items():
            place = f"{self.place}.zarr/{name}"
            array = _open({"zarr.json": metadata})
            check_zarr(place, array, array.chunks)
            shape = (self.n_rows, self.n_features)[: array.ndim]
            if array.shape != shape or array.chunks[0] != self.chunk_rows:
                raise CorruptError(f"{place}: declares another shape")
            if array.dtype != self._types[name]:
                raise CorruptError(f"{place}: declares another type")
            if json.loads(metadata)["codecs"] != _template(array.dtype, ("",))["codecs"]:
                raise CorruptError(f"{place}: declares other codecs than segments have")

    def _chunk(self, name: str, i: int, n_axes: int) -> Array:
        file = _chunk_key(i, n_axes)
        data = self.piece.read(f"zarr/{name}/{file}")
        mark("read")
        place = f"{self.place}.zarr/{name}/{file}"
        # What zarr would decode, without the copies that zarr makes on the way: the numbers stay
        # where the file was read to.
        body = _without_checksum(data, place)
        width = self.n_features if n_axes == 2 else 1
        if body.size != self.chunk_rows * width * self._types[name].itemsize:
            raise CorruptError(f"{place}: is damaged: holds another number of bytes")
        stored = body.view(self._types[name].newbyteorder("<"))
        return np.asarray(stored.reshape(-1, width) if n_axes == 2 else stored, self._types[name])


def write_record(
    storage: Storage, folder: str, dataset: xarray.Dataset, content: Mapping[str, Any]
) -> PieceRef:
    """Store a labelled dataset of numbers as a new sealed piece below `folder`.

    Numbers of any shape keep every bit. Variables without entries, which zarr cannot chunk, and
    the attributes go to the piece's index, with any further JSON `content`.
    """
    variables = {str(name): variable.variable for name, variable in dataset.data_vars.items()}
    empty = {name: v for name, v in variables.items() if v.size == 0}
    files, chunks = {"zarr/zarr.json": _group_metadata()}, {}
    for name, v in variables.items():
        if name in empty:
            continue
        values, place = np.asarray(v.values), f"zarr/{name}"
        size = _record_chunk(values.shape, values.dtype.itemsize)
        dims = tuple(map(str, v.dims))
        files[f"{place}/zarr.json"] = _metadata(values.shape, size, values.dtype, dims)
        for i in range(-(-len(values) // size[0]) if size else 1):
            part = values[i * size[0] : (i + 1) * size[0]] if size else values
            if part.shape != size:
                part = np.concatenate([part, np.zeros((size[0] - len(part), *size[1:]), v.dtype)])
            chunks[f"{place}/{_chunk_key(i, values.ndim)}"] = part
    files |= zip(chunks, _checked([*chunks.values()]), strict=True)
    piece = PieceWriter(storage, folder)
    try:
        piece.add(files, checksummed=chunks)
        return piece.seal(
            {
                "attributes": dataset.attrs,
                "empty": {
                    name: {"dims": list(v.dims), "shape": list(v.shape), "dtype": v.dtype.str}
                    for name, v in empty.items()
                },
                "record": dict(content),
            }
        )
    except BaseException:
        with contextlib.suppress(StorageError):
            piece.discard()
        raise


def read_record(storage: Storage, ref: PieceRef) -> tuple[xarray.Dataset, dict[str, Any]]:
    """Inverse of `write_record`: the dataset, in memory, and its `content`.

    Raises CorruptError, naming the file, where anything is missing or not as it was stored.
    """
    import xarray
    from zarr.storage import MemoryStore

    piece = Piece(storage, ref)
    place = f"{storage.name}/{ref.key}"
    files = {
        name.removeprefix("zarr/"): _buffer(piece.read(name, whole=True)) for name in piece.names
    }
    try:
        stored = xarray.open_zarr(
            MemoryStore(files), consolidated=False, decode_cf=False, chunks=None
        )
        variables = {name: (v.dims, v.values) for name, v in stored.variables.items()}
        for name, entry in piece.content["empty"].items():
            array = np.zeros(entry["shape"], np.dtype(entry["dtype"]))
            variables[name] = (tuple(entry["dims"]), array)
        found = xarray.Dataset(variables, attrs=piece.content["attributes"])
        return found, piece.content["record"]
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CorruptError(f"{place}: is damaged: {error}") from error


def _record_chunk(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """One chunk, unless that is very large; then some of the first axis."""
    if not shape:
        return ()
    row = itemsize * int(np.prod(shape[1:], dtype=np.int64))
    return (min(shape[0], max(1, RECORD_CHUNK_NBYTES // max(1, row))), *shape[1:])


def _buffer(data: bytes) -> Any:
    from zarr.core.buffer import default_buffer_prototype

    return default_buffer_prototype().buffer.from_bytes(data)


def _metadata(
    shape: tuple[int, ...], chunk: tuple[int, ...], dtype: np.dtype[Any], axes: tuple[str, ...]
) -> bytes:
    """What zarr says of an array of some shape."""
    data = _template(dtype.newbyteorder("<"), axes) | {"shape": shape}
    data["chunk_grid"] = {"name": "regular", "configuration": {"chunk_shape": chunk}}
    return json.dumps(data).encode()


@functools.lru_cache(maxsize=256)
def _template(dtype: np.dtype[Any], axes: tuple[str, ...]) -> dict[str, Any]:
    """What zarr says of an array of one entry: all but the shape is the same for any."""
    import zarr
    from zarr.storage import MemoryStore

    files: dict[str, Any] = {}
    zarr.create_array(
        MemoryStore(files),
        shape=(1,) * len(axes),
        chunks=(1,) * len(axes),
        dtype=dtype,
        compressors=_checksum(),
        fill_value=np.nan if dtype.kind == "f" else 0,
        dimension_names=axes,
        chunk_key_encoding={"name": "default", "separator": "."},
    )
    found: dict[str, Any] = json.loads(files["zarr.json"].to_bytes())
    return found


def _checked(chunks: Sequence[Array]) -> list[bytes]:
    """Chunks as they are stored: little-endian numbers in C order, and their checksum."""
    from zarr.core.sync import sync

    codec, spec = _checksum(), _spec()
    raw = [np.ascontiguousarray(c, dtype=c.dtype.newbyteorder("<")) for c in chunks]
    found = sync(codec.encode([(_buffer(chunk.tobytes()), spec) for chunk in raw]))
    return [data.to_bytes() for data in found]


def _without_checksum(data: bytes, place: str) -> NDArray[np.uint8]:
    """The bytes before a CRC-32C, read-only. Raises CorruptError where that is of others."""
    import google_crc32c

    held = np.frombuffer(data, np.uint8)
    body, stored = held[:-4], int.from_bytes(data[-4:], "little")
    if google_crc32c.value(body) != stored:
        raise CorruptError(f"{place}: is damaged: its checksum is of other bytes")
    return body


def _checksum() -> Any:
    from zarr.codecs import Crc32cCodec

    return Crc32cCodec()


def _spec() -> Any:
    """What a codec wants to know of a chunk, of which a checksum uses nothing."""
    import zarr
    from zarr.core.array_spec import ArrayConfig, ArraySpec
    from zarr.core.buffer import default_buffer_prototype

    kind = zarr.dtype.parse_dtype("uint8", zarr_format=3)
    return ArraySpec((1,), kind, 0, ArrayConfig("C", True), default_buffer_prototype())


def _open(files: Mapping[str, bytes]) -> zarr.Array[Any]:
    """The array that some of its files make."""
    import zarr
    from zarr.storage import MemoryStore

    store = MemoryStore({name: _buffer(data) for name, data in files.items()})
    return zarr.open_array(store, mode="r", zarr_format=3)


def _chunk_key(i: int, n_axes: int) -> str:
    return ".".join(["c", *[str(i), *["0"] * (n_axes - 1)][:n_axes]])


def _group_metadata() -> bytes:
    return json.dumps({"zarr_format": 3, "node_type": "group", "attributes": {}}).encode()
