"""Files and tables of any known format, read by pieces that are named columns.

`read_tables` walks through one and holds a bounded number of rows. A format whose pieces can be
read by number is `Chunked`, and can be fitted in place.
"""

from __future__ import annotations

import bz2
import codecs
import contextlib
import csv
import difflib
import gzip
import io
import json
import lzma
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from genstream.errors import ConfigError, CorruptError, DataError, StorageError
from genstream.schema import Schema
from genstream.sources import (
    CHUNK_ROWS,
    ArraySource,
    NpySource,
    ZarrSource,
    check_zarr,
    open_npy,
    rows_of_piece,
)

Array = NDArray[Any]

# Bytes of a CSV or JSON lines file that are parsed at once; no line can be longer.
CSV_BLOCK = 1 << 20
HEADER_NBYTES = 1 << 20
# Whole numbers below it are doubles to the last digit.
LARGEST_EXACT = 2.0**53


def table_columns(path: str | Path) -> tuple[str, ...]:
    """Names of the columns of a file, from its header or metadata alone.

    Raises DataError where the file has none, StorageError where it cannot be opened.
    """
    return open_table(path).names


def read_tables(
    data: Any, *, columns: Sequence[str] | None = None, chunk_rows: int = CHUNK_ROWS
) -> Iterator[Any]:
    """Walk through a table, at most `chunk_rows` rows at a time.

    Parameters
    ----------
    data
        The path of a file: CSV (comma, semicolon or tab separated, with a header) or JSON lines
        (one object a line), each also packed as .gz, .bz2, .xz or .zip; parquet (also a folder of
        it), Arrow IPC, npy, zarr or NetCDF. Or a table in memory: pyarrow, pandas or xarray.
    columns
        Those to read, in this order; all of them if left out. The columns of an array without
        names are `x0`, `x1`, ..., or go by the names given where there are as many.

    Yields
    ------
    `pyarrow.Table`s with rows, in order; text of a CSV file is left as it is, and values of a JSON
    lines file are text too.

    Raises
    ------
    DataError
        Naming the file: an unknown column, no rows, or bytes that are not what the name says.
    StorageError
        Where the file is not there or cannot be read.
    """
    opened = open_table(data)
    wanted = list(opened.default if columns is None else columns)
    check_columns(opened.place, opened.choose(columns), wanted)
    n = 0
    with damage(opened.place):
        for table in _regrouped(opened.read(wanted), chunk_rows):
            n += table.num_rows
            yield table
    if not n:
        raise DataError(f"{opened.place}: has no rows")


class Format:
    """A table that can be read: its place for messages, and the names of its columns.

    `default` are the columns meant where none are named.
    """

    place: str
    names: tuple[str, ...]
    # Whether the names are those of the file, not `x0`, `x1`, ...
    named = True

    @property
    def default(self) -> tuple[str, ...]:
        return self.names

    def choose(self, columns: Sequence[str] | None) -> tuple[str, ...]:
        """The names columns go by where `columns` are asked for."""
        if columns is None or self.named or set(columns) <= set(self.names):
            return self.names
        return tuple(columns) if len(columns) == len(self.names) else self.names

    def read(self, columns: list[str]) -> Iterator[Any]:
        """Record batches of some columns."""
        raise NotImplementedError


class Chunked(Format):
    """A table whose pieces can be read by number; picklable."""

    chunk_rows: tuple[int, ...]
    kind = "table"

    def piece(self, i: int, columns: list[str]) -> Any:
        """Some columns of piece `i`, as a table."""
        raise NotImplementedError

    def file(self, i: int) -> str:
        """The file that holds piece `i`."""
        del i
        return self.place

    def read(self, columns: list[str]) -> Iterator[Any]:
        for i in range(len(self.chunk_rows)):
            yield from self.piece(i, columns).to_batches()


@contextlib.contextmanager
def damage(place: str) -> Iterator[None]:
    """What readers raise for damaged files, as one line that names the file."""
    try:
        yield
    except (DataError, StorageError, ConfigError):
        raise
    except CorruptError as error:
        raise DataError(str(error)) from None
    except (EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, gzip.BadGzipFile) as error:
        raise DataError(
            f"{place}: the archive is damaged or cut short ({error}): fetch it again"
        ) from None
    except NotImplementedError as error:
        raise DataError(f"{place}: cannot be unpacked: {first_line(error)}") from None
    except pa.ArrowException as error:
        what = first_line(error)
        if "straddl" in what:
            what = f"a line is longer than {CSV_BLOCK >> 20} MiB: is a quote left open?"
        raise DataError(f"{place}: {what}") from None
    except FileNotFoundError:
        raise StorageError(f"{place}: no such file or folder") from None
    except OSError as error:
        if error.errno is None:
            raise DataError(f"{place}: damaged or cut short: {first_line(error)}") from None
        raise StorageError(f"{place}: cannot be read: {error.strerror or error}") from None


def first_line(error: BaseException) -> str:
    """What an error of another library says, short enough for one line."""
    text = str(error).strip().split("\n")[0]
    return text if len(text) <= 200 else text[:197] + "..."


def _regrouped(batches: Iterable[Any], chunk_rows: int) -> Iterator[Any]:
    """The same rows as tables of `chunk_rows` rows, the last one shorter."""
    held: list[Any] = []
    n = 0
    for batch in batches:
        start = 0
        while start < batch.num_rows:
            piece = batch.slice(start, chunk_rows - n)
            held.append(piece)
            start += piece.num_rows
            n += piece.num_rows
            if n == chunk_rows:
                yield pa.Table.from_batches(held)
                held, n = [], 0
    if held:
        yield pa.Table.from_batches(held)


# How files begin that are not text, archives by their endings. Letters alone do not tell, as the
# first column of a CSV file may be called PK, CDF or PAR1: what no text has must follow. In parquet
# that is a control character of the header of a page, or of the footer where there is none.
_SIGNATURES = {
    name: re.compile(pattern, re.DOTALL)
    for name, pattern in {
        "parquet": rb"PAR1.{0,3}[\x00-\x08\x0e-\x1f]",
        "arrow": rb"ARROW1\x00\x00",
        "npy": rb"\x93NUMPY",
        "netcdf": rb"CDF[\x01\x02\x05]|\x89HDF\r\n\x1a\n",
        ".gz": rb"\x1f\x8b",
        ".bz2": rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)",
        ".xz": rb"\xfd7zXZ\x00",
        ".zip": rb"PK(?:\x03\x04|\x05\x06)",
    }.items()
}
SIGNATURE_NBYTES = 16
_SUFFIXES = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
    ".arrows": "arrow",
    ".feather": "arrow",
    ".ipc": "arrow",
    ".npy": "npy",
    ".zarr": "zarr",
    ".nc": "netcdf",
    ".nc4": "netcdf",
    ".cdf": "netcdf",
    ".netcdf": "netcdf",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
}
_PACKED = (".gz", ".bz2", ".xz", ".zip")


def open_table(data: Any) -> Format:
    """A table of any kind, once its names are known."""
    if not isinstance(data, str | Path):
        found = table_in_memory(data)
        if found is None:
            raise DataError(f"cannot read rows from {type(data).__name__}: give a path or a table")
        return found
    path = Path(data)
    place = str(path)
    with damage(place):
        kind = _kind_of(path)
        if kind == "parquet":
            return _ParquetFolder(path) if path.is_dir() else _Parquet(path)
        if kind == "arrow":
            return _arrow(path)
        if kind == "npy":
            return _npy(path)
        if kind == "zarr":
            return _zarr(path)
        if kind == "netcdf":
            return _netcdf(path)
        if kind == "jsonl":
            return _JsonLines(path)
        return _Csv(path)


def _kind_of(path: Path) -> str:
    """What a file is, by its name or else by its first bytes."""
    endings = [ending.lower() for ending in path.suffixes]
    packed = bool(endings) and endings[-1] in _PACKED
    kind = _SUFFIXES.get("".join(endings[-2:-1] if packed else endings[-1:]), "")
    if path.is_dir():
        if (path / "manifests").is_dir():
            raise DataError(
                f"{path}: is a dataset already, not a file to read: in Python "
                f"genstream.store.Dataset.open({str(path)!r}).source() is its rows"
            )
        return "parquet" if kind == "parquet" or any(path.glob("*.parquet")) else "zarr"
    with path.open("rb") as file:
        start = file.read(4096)
    if not start:
        raise DataError(f"{path}: the file is empty")
    if packed:
        # What an archive holds is told by its name, or else is taken for text.
        return kind if kind == "jsonl" else "csv"
    return kind or kind_of_bytes(start) or "csv"


def kind_of_bytes(start: bytes) -> str:
    """What a file is by its first bytes; nothing where they say no more than that it is text.

    One of `parquet`, `arrow`, `npy`, `netcdf`, `jsonl`.
    """
    known = _signed(start)
    if known and known not in _PACKED:
        return known
    return "jsonl" if start.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"{") else ""


def _signed(start: bytes) -> str:
    """Whose signature the first bytes are: a kind of file, the ending of an archive, or nothing."""
    return next((name for name, form in _SIGNATURES.items() if form.match(start)), "")


def ending_of_bytes(start: bytes) -> str:
    """The ending that a file with these first bytes should have, such as `.parquet` or `.csv.gz`.

    Of an Arrow stream, parquet, Arrow, npy, JSON lines and CSV, the last two also packed. Raises
    DataError where the bytes are none of them.
    """
    inside, ending = start, _signed(start)
    if ending in _PACKED:
        with contextlib.suppress(OSError, EOFError, zlib.error, lzma.LZMAError):
            inside = _unpack(ending, start)
    else:
        ending = ""
    if not ending and start.startswith(b"\xff\xff\xff\xff"):
        return ".arrows"
    kind = kind_of_bytes(inside)
    if ending and kind not in ("", "jsonl"):
        raise DataError(f"holds {kind} in an archive: unpack it first")
    if kind:
        return {"netcdf": ".nc"}.get(kind, f".{kind}") + ending
    if inside.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError("is UTF-16 text: send it as UTF-8")
    if ending != ".zip" and b"\0" in inside:
        raise DataError("is neither text nor of another known format")
    if inside.lstrip().startswith(b"["):
        raise DataError("is a JSON array: write one object a line (JSON lines)")
    return ".csv" + ending


def _unpack(ending: str, start: bytes) -> bytes:
    """The first bytes of what an archive holds; those of the archive where they are not known."""
    if ending == ".gz":
        return zlib.decompressobj(31).decompress(start)
    if ending == ".bz2":
        return bz2.BZ2Decompressor().decompress(start)
    return lzma.LZMADecompressor().decompress(start) if ending == ".xz" else start


def table_in_memory(data: Any) -> Chunked | None:
    """A table in memory, or None for anything that is none."""
    package = type(data).__module__.partition(".")[0]
    if package == "xarray" and hasattr(data, "data_vars"):
        return _Variables(data, "xarray dataset")
    if package == "xarray":
        return ArrayTable(XarraySource(data))
    if isinstance(data, pa.RecordBatch):
        return _Table(pa.Table.from_batches([data]), "table")
    if isinstance(data, pa.Table):
        return _Table(data, "table")
    with damage(f"{package} table"):
        if package == "pandas" and hasattr(data, "columns"):
            names = [str(name) for name in data.columns]
            check_columns("pandas table", names, None)
            # A frame may be named by numbers, and Arrow names columns by text only.
            frame = data.set_axis(names, axis="columns")
            return _Table(pa.Table.from_pandas(frame, preserve_index=False), "pandas table")
        if hasattr(data, "__arrow_c_stream__"):
            return _Table(pa.table(data), f"{package} table")
    return None


class _Csv(Format):
    """Text with a header and one record a line."""

    def __init__(self, path: Path) -> None:
        self.path, self.place = path, str(path)
        with _unpacked(path) as file:
            start = file.read(HEADER_NBYTES)
        if start.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise DataError(f"{path}: is UTF-16 text: save it as UTF-8")
        packed = _signed(start)
        if packed and packed not in _PACKED:
            raise DataError(f"{path}: holds {packed} in an archive: unpack it first")
        if b"\0" in start[:4096]:
            raise DataError(f"{path}: is neither text nor of another known format")
        text = start.decode("utf-8-sig", errors="replace").lstrip("\r\n")
        if not text.strip():
            raise DataError(f"{path}: the file is empty")
        if ".json" in path.suffixes and text.lstrip().startswith("["):
            raise DataError(f"{path}: is a JSON array: write one object a line (JSON lines)")
        self.delimiter = _delimiter(path, text)
        self._raw = next(csv.reader(io.StringIO(text, newline=""), delimiter=self.delimiter))
        self.names = tuple(name.strip() for name in self._raw)
        if all(number_of(name) is not None for name in self.names):
            raise DataError(
                f"{path}: the first line holds numbers, not the names of columns: add a header"
            )

    def read(self, columns: list[str]) -> Iterator[Any]:
        import pyarrow.csv

        raw = [self._raw[self.names.index(name)] for name in columns]
        with _unpacked(self.path) as file:
            reader = pyarrow.csv.open_csv(
                file,
                read_options=pyarrow.csv.ReadOptions(block_size=CSV_BLOCK, use_threads=False),
                parse_options=pyarrow.csv.ParseOptions(
                    delimiter=self.delimiter, newlines_in_values=True
                ),
                convert_options=pyarrow.csv.ConvertOptions(
                    include_columns=raw,
                    column_types=dict.fromkeys(raw, pa.string()),
                    strings_can_be_null=False,
                ),
            )
            with reader:
                for batch in reader:
                    yield pa.RecordBatch.from_arrays(batch.columns, names=columns)


class _JsonLines(Format):
    """Text with one JSON object a line, whose keys are the columns.

    Values become text, as those of a CSV file are, so that what one block of lines suggests for a
    column cannot contradict what another does. The columns are the keys of the first megabyte;
    where others are asked for, the whole file is looked through.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.place = path, str(path)
        # Columns of text that looks like a time, which must stay as it is.
        self._texts: dict[str, Any] = {}
        first = next(self._tables(), None)
        if first is None:
            raise DataError(f"{path}: the file is empty")
        self.names = tuple(first[1].column_names)

    def choose(self, columns: Sequence[str] | None) -> tuple[str, ...]:
        if columns is not None and not set(columns) <= set(self.names):
            found = dict.fromkeys(self.names)
            for _, table in self._tables():
                found.update(dict.fromkeys(table.column_names))
            self.names = tuple(found)
        return self.names

    def read(self, columns: list[str]) -> Iterator[Any]:
        for line, table in self._tables():
            late = [name for name in table.column_names if name not in self.names]
            if late and columns == list(self.names):
                raise DataError(
                    f"{self.place}: from line {line + 1}: key {late[0]!r} is not one of the first "
                    "lines': name the columns to read"
                )
            arrays = [self._text(table, name, line) for name in columns]
            yield pa.RecordBatch.from_arrays(arrays, names=columns)

    def _text(self, table: Any, name: str, line: int) -> Any:
        if name not in table.column_names:
            return pa.nulls(table.num_rows, pa.string())
        column = table.column(name)
        if pa.types.is_nested(column.type):
            raise DataError(
                f"{self.place}: from line {line + 1}: column {name!r} holds nested values: give "
                "each of them a key of its own, or leave the column out"
            )
        column = column.cast(pa.string())
        return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], pa.string())

    def _tables(self) -> Iterator[tuple[int, Any]]:
        """(lines before it, table) of each block of lines."""
        line = 0
        for block in self._blocks():
            if block.strip():
                yield line, self._parsed(block, line)
            line += block.count(b"\n")

    def _blocks(self) -> Iterator[bytes]:
        rest, first = b"", True
        with _unpacked(self.path) as file:
            while data := file.read(CSV_BLOCK):
                if first:
                    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                        raise DataError(f"{self.place}: is UTF-16 text: save it as UTF-8")
                    data, first = data.removeprefix(codecs.BOM_UTF8), False
                end = data.rfind(b"\n") + 1
                if end:
                    yield rest + data[:end]
                    rest = data[end:]
                else:
                    rest += data
                if len(rest) > CSV_BLOCK:
                    raise DataError(
                        f"{self.place}: a line is longer than {CSV_BLOCK >> 20} MiB: does each "
                        "line hold one object?"
                    )
        if rest:
            yield rest

    def _parsed(self, block: bytes, line: int) -> Any:
        import pyarrow.json

        def parse() -> Any:
            return pyarrow.json.read_json(
                io.BytesIO(block),
                read_options=pyarrow.json.ReadOptions(
                    use_threads=False, block_size=2 * CSV_BLOCK + 1
                ),
                parse_options=pyarrow.json.ParseOptions(
                    explicit_schema=pa.schema(self._texts), unexpected_field_behavior="infer"
                ),
            )

        try:
            table = parse()
            times = [f.name for f in table.schema if pa.types.is_temporal(f.type)]
            if times:
                names = table.column_names
                self._texts |= dict.fromkeys(times, pa.string())
                table = parse().select(names)
            return _with_digits(table, block)
        except (pa.ArrowException, ValueError) as error:
            raise self._bad_line(block, line, error) from None

    def _bad_line(self, block: bytes, line: int, error: BaseException) -> DataError:
        """What is wrong with a block, by its first bad line where it can be told."""
        lines = enumerate(block.split(b"\n"), line + 1)
        numbered = [(i, text) for i, text in lines if text.strip()]
        for i, text in numbered:
            try:
                found = json.loads(text)
            except (ValueError, RecursionError) as wrong:
                what = "not UTF-8"
                if isinstance(wrong, json.JSONDecodeError):
                    what = f"{wrong.msg}, at character {wrong.colno}"
                return DataError(f"{self.place}: line {i}: not a JSON object: {what}")
            if not isinstance(found, dict):
                return DataError(
                    f"{self.place}: line {i}: not a JSON object: write one object a line"
                )
        what = first_line(error).removeprefix("JSON parse error: ")
        what = re.sub(r"^Column\(/(.*?)\)", r"key '\1'", what)
        row = re.search(r" in row (\d+)$", what)
        if row is None or int(row[1]) >= len(numbered):
            return DataError(f"{self.place}: from line {line + 1}: {what}")
        return DataError(f"{self.place}: line {numbered[int(row[1])][0]}: {what[: row.start()]}")


def _with_digits(table: Any, block: bytes) -> Any:
    """The table of a block of JSON lines, with integers that became doubles as they are written.

    Arrow reads those beyond 64 bits so, and those beside fractions: two ids could become one.
    """
    rows: list[dict[str, Any]] = []
    for j, field in enumerate(table.schema):
        column = table.column(j)
        if not pa.types.is_floating(field.type):
            continue
        if not pc.any(pc.greater_equal(pc.abs(column), LARGEST_EXACT)).as_py():
            continue
        rows = rows or _objects(block)
        written = [row.get(field.name) for row in rows]
        read = column.cast(pa.string()).to_pylist()
        texts = [x if isinstance(x, str) else y for x, y in zip(written, read, strict=True)]
        table = table.set_column(j, field.name, pa.array(texts, pa.string()))
    return table


def _objects(block: bytes) -> list[dict[str, Any]]:
    """JSON objects that follow each other, their integers as text."""
    decoder, text = json.JSONDecoder(parse_int=str), block.decode().rstrip()
    rows: list[dict[str, Any]] = []
    at = len(text) - len(text.lstrip())
    while at < len(text):
        row, at = decoder.raw_decode(text, at)
        rows.append(row)
        while text[at : at + 1].isspace():
            at += 1
    return rows


def _delimiter(path: Path, text: str) -> str:
    if ".tsv" in path.suffixes or ".tab" in path.suffixes:
        return "\t"
    header = text.splitlines()[0]
    return next((mark for mark in (",", ";", "\t", "|") if mark in header), ",")


@contextlib.contextmanager
def _unpacked(path: Path) -> Iterator[Any]:
    """The bytes of a file, unpacked if it is an archive (told by its first bytes)."""
    with path.open("rb") as file:
        packed = _signed(file.read(SIGNATURE_NBYTES))
        file.seek(0)
        if packed == ".gz":
            with gzip.open(file) as unpacked:
                yield unpacked
        elif packed == ".bz2":
            with bz2.open(file) as unpacked:
                yield unpacked
        elif packed == ".xz":
            with lzma.open(file) as unpacked:
                yield unpacked
        elif packed == ".zip":
            with zipfile.ZipFile(file) as archive:
                members = [
                    name
                    for name in archive.namelist()
                    if not name.endswith("/") and not name.startswith("__MACOSX/")
                ]
                if len(members) != 1:
                    raise DataError(
                        f"{path}: the archive holds {len(members)} files ({listed(members, 5)}): "
                        "pack the one to read alone"
                    )
                if archive.getinfo(members[0]).flag_bits & 1:
                    raise DataError(f"{path}: the archive is encrypted: unpack it first")
                with archive.open(members[0]) as member:
                    yield member
        else:
            yield file


class _Table(Chunked):
    """A table in memory, in pieces that share its memory."""

    def __init__(self, table: Any, place: str) -> None:
        self.place, self.names, self._table = place, tuple(table.column_names), table
        self.chunk_rows = _even(table.num_rows, CHUNK_ROWS)

    def piece(self, i: int, columns: list[str]) -> Any:
        return self._table.select(columns).slice(i * CHUNK_ROWS, CHUNK_ROWS)


def _even(n: int, chunk_rows: int) -> tuple[int, ...]:
    full, rest = divmod(n, chunk_rows)
    return (chunk_rows,) * full + ((rest,) if rest else ())


class _Parquet(Chunked):
    """A parquet file; a piece is a row group."""

    kind = "parquet"

    def __init__(self, path: Path) -> None:
        import pyarrow.parquet

        self.path, self.place = path, str(path)
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                self.names = tuple(file.schema_arrow.names)
                self._metadata = file.metadata
                groups = [
                    file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)
                ]
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise DataError(f"{path}: not a whole parquet file: {first_line(error)}") from None
        self._groups = tuple(i for i, n in enumerate(groups) if n)
        self.chunk_rows = tuple(n for n in groups if n)

    def piece(self, i: int, columns: list[str]) -> Any:
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(self.path, metadata=self._metadata) as file:
            group = file.read_row_group(self._groups[i], columns=columns, use_threads=False)
        return group.select(columns)

    def read(self, columns: list[str]) -> Iterator[Any]:
        # A row group may be larger than what the caller wants to hold at once.
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(self.path, pre_buffer=False) as file:
            n = rows_of_piece(len(columns))
            for batch in file.iter_batches(batch_size=n, columns=columns, use_threads=False):
                yield batch.select(columns)


class _ParquetFolder(Chunked):
    """The parquet files below a folder, one after another by name; a piece is a row group.

    Hidden ones, and those whose names begin with `_`, as metadata do, are left out.
    """

    kind = "parquet"

    def __init__(self, path: Path) -> None:
        self.place = str(path)
        files = []
        for file in sorted(path.rglob("*.parquet")):
            below = file.relative_to(path).parts
            keyed = next((part for part in below[:-1] if "=" in part), None)
            if keyed is not None:
                raise DataError(
                    f"{path}: folder {keyed!r} holds a column in its name, which is not read: "
                    "write the column into the files"
                )
            if file.is_file() and not any(part.startswith((".", "_")) for part in below):
                files.append(_Parquet(file))
        if not files:
            raise DataError(f"{path}: no parquet file in this folder")
        self.names = files[0].names
        for one in files:
            if set(one.names) != set(self.names):
                raise DataError(
                    f"{one.place}: its columns ({listed(one.names)}) are not those of "
                    f"{files[0].place} ({listed(self.names)})"
                )
        self._files = tuple(files)
        self._pieces = [(file, i) for file in files for i in range(len(file.chunk_rows))]
        self.chunk_rows = tuple(n for file in files for n in file.chunk_rows)

    def piece(self, i: int, columns: list[str]) -> Any:
        file, j = self._pieces[i]
        return file.piece(j, columns)

    def file(self, i: int) -> str:
        return self._pieces[i][0].place

    def read(self, columns: list[str]) -> Iterator[Any]:
        for file in self._files:
            with damage(file.place):
                yield from file.read(columns)


class _ArrowFile(Chunked):
    """An Arrow IPC file (or Feather), mapped; a piece is a record batch."""

    kind = "arrow"

    def __init__(self, path: Path) -> None:
        self.path, self.place = path, str(path)
        with self._open() as file:
            self.names = tuple(file.schema.names)
            counts = [file.get_batch(i).num_rows for i in range(file.num_record_batches)]
        self._batches = tuple(i for i, n in enumerate(counts) if n)
        self.chunk_rows = tuple(n for n in counts if n)

    def _open(self) -> Any:
        import pyarrow.ipc

        return pyarrow.ipc.open_file(pa.memory_map(str(self.path)))

    def piece(self, i: int, columns: list[str]) -> Any:
        with self._open() as file:
            batch = file.get_batch(self._batches[i]).select(columns)
        # The bytes are somebody else's: offsets that point elsewhere must not be followed.
        batch.validate(full=True)
        return pa.Table.from_batches([batch])


class _ArrowStream(Format):
    """An Arrow IPC stream, which can only be read from its beginning."""

    def __init__(self, path: Path) -> None:
        self.path, self.place = path, str(path)
        with self._open() as stream:
            self.names = tuple(stream.schema.names)

    def _open(self) -> Any:
        import pyarrow.ipc

        return pyarrow.ipc.open_stream(pa.memory_map(str(self.path)))

    def read(self, columns: list[str]) -> Iterator[Any]:
        with self._open() as stream:
            for batch in stream:
                batch.validate(full=True)
                yield batch.select(columns)


def _arrow(path: Path) -> Format:
    with path.open("rb") as file:
        start = file.read(6)
    if start.startswith(b"FEA1"):
        raise DataError(f"{path}: is of Feather version 1: save it as version 2, or as parquet")
    return _ArrowFile(path) if start == b"ARROW1" else _ArrowStream(path)


class ArrayTable(Chunked):
    """A two-dimensional array, whose columns may go by names that a caller gives them."""

    def __init__(self, source: ArraySource) -> None:
        self.place, self.kind = source.name, source.kind
        self.source = source
        self.names = source.schema.names
        self.named = self.names != Schema.real(len(self.names)).names
        self.chunk_rows = source.chunk_rows

    def piece(self, i: int, columns: list[str]) -> Any:
        order = list(self.choose(columns))
        values = self.source.read(i).filled()
        arrays = [pa.array(values[:, order.index(name)]) for name in columns]
        return pa.Table.from_arrays(arrays, names=columns)


class _Fields(Chunked):
    """Arrays of one length, one a column; `take` gives the rows of one from `first` to `last`."""

    kind = "columns"

    def __init__(
        self,
        place: str,
        names: Sequence[str],
        n_rows: int,
        chunk_rows: int,
        take: Callable[[str, int, int], Any],
    ) -> None:
        self.place, self.names, self._take = place, tuple(names), take
        self._step = min(max(chunk_rows, 1), CHUNK_ROWS)
        self._n_rows = n_rows
        self.chunk_rows = _even(n_rows, self._step)

    def piece(self, i: int, columns: list[str]) -> Any:
        first = i * self._step
        last = min(first + self._step, self._n_rows)
        own = dict(zip(self.choose(columns), self.names, strict=True))
        arrays = [
            _arrow_array(self.place, name, self._take(own[name], first, last)) for name in columns
        ]
        return pa.Table.from_arrays(arrays, names=columns)


def _arrow_array(place: str, name: str, values: Any) -> Any:
    array = np.asarray(values)
    if array.ndim != 1:
        raise DataError(f"{place}: column {name!r} has {array.ndim} dimensions, not one")
    if array.dtype.kind == "c":
        raise DataError(f"{place}: column {name!r} is complex: give its two parts as columns")
    if array.dtype.kind == "S":
        array = np.char.decode(array, "utf-8", "replace")
    if array.dtype.kind in "UT":
        array = array.astype(object)
    if array.dtype.kind == "f" and array.dtype.itemsize > 8:
        array = array.astype(np.float64)
    if array.dtype.byteorder == ">" or not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    try:
        return pa.array(array, from_pandas=True)
    except (pa.ArrowException, ValueError, TypeError) as error:
        raise DataError(f"{place}: column {name!r}: {first_line(error)}") from None


@dataclass(frozen=True)
class _FromNpy:
    """Takes rows of a one-dimensional or structured `.npy` file, mapped for the time of a read."""

    path: Path

    def __call__(self, name: str, first: int, last: int) -> Any:
        array = open_npy(self.path)[first:last]
        return np.array(array[name] if array.dtype.names else array)


def _npy(path: Path) -> Chunked:
    array = open_npy(path)
    if array.ndim != 1:
        width = array.shape[1] if array.ndim else 1
        return ArrayTable(NpySource(path, chunk_rows=rows_of_piece(width)))
    names = array.dtype.names or ("x0",)
    fields = _Fields(str(path), names, len(array), CHUNK_ROWS, _FromNpy(path))
    fields.named = bool(array.dtype.names)
    return fields


@dataclass(frozen=True)
class _FromZarr:
    """Takes rows of one of the arrays of a zarr group."""

    group: Any
    place: str

    def __call__(self, name: str, first: int, last: int) -> Any:
        try:
            return self.group[name][first:last]
        except Exception as error:  # codecs raise what they like
            raise CorruptError(
                f"{self.place}/{name}: rows {first} to {last - 1} cannot be decoded: {error}"
            ) from error


def _zarr(path: Path) -> Chunked:
    import zarr

    try:
        opened = zarr.open(str(path), mode="r")
        arrays = dict(opened.arrays()) if isinstance(opened, zarr.Group) else {}
    except (OSError, ValueError, TypeError, KeyError):
        arrays = {}  # what is wrong with it is said where an array is opened
    for name, a in arrays.items():
        check_zarr(f"{path}/{name}", a, a.shards or a.chunks)
    if any(_named_dimensions(a) for a in arrays.values()):
        return _written_by_xarray(path)
    if not arrays or {a.ndim for a in arrays.values()} != {1}:
        return ArrayTable(ZarrSource(path))
    lengths = {name: a.shape[0] for name, a in arrays.items()}
    if len(set(lengths.values())) > 1:
        shown = ", ".join(f"{name} ({n})" for name, n in sorted(lengths.items()))
        raise DataError(f"{path}: its arrays are of different lengths: {shown}")
    step = max(a.chunks[0] for a in arrays.values())
    n_rows = next(iter(lengths.values()))
    return _Fields(str(path), sorted(arrays), n_rows, step, _FromZarr(opened, str(path)))


def _named_dimensions(array: Any) -> bool:
    # Zarr 3 has a place for the names; for zarr 2 xarray made its own.
    named = getattr(array.metadata, "dimension_names", None)
    return bool(named) or "_ARRAY_DIMENSIONS" in array.attrs


def _written_by_xarray(path: Path) -> Chunked:
    """A zarr group with named dimensions, whose attributes may say how entries are packed."""
    import xarray

    try:
        dataset = xarray.open_zarr(path, chunks=None, consolidated=False)
    except Exception as error:  # noqa: BLE001 - whatever the metadata make the readers raise
        raise CorruptError(f"{path}: its metadata cannot be used: {first_line(error)}") from None
    return _of_dataset(dataset, str(path))


def _of_dataset(dataset: Any, place: str) -> Chunked:
    arrays = list(dataset.data_vars.values())
    if len(arrays) == 1 and arrays[0].ndim == 2:
        return ArrayTable(XarraySource(arrays[0], name=place))
    return _Variables(dataset, place)


class _Variables(_Fields):
    """The variables of an xarray dataset that lie along its rows."""

    kind = "xarray"

    def __init__(self, dataset: Any, place: str) -> None:
        along = {str(name): v.dims for name, v in dataset.data_vars.items() if v.ndim == 1}
        dims = sorted({str(d[0]) for d in along.values()})
        if not dims:
            found = ", ".join(f"{n} {v.dims}" for n, v in dataset.data_vars.items()) or "none"
            raise DataError(f"{place}: no variable has one dimension ({found})")
        if len(dims) > 1:
            raise DataError(
                f"{place}: its variables lie along different dimensions ({', '.join(dims)}): "
                "keep those that lie along the rows"
            )
        self._default = tuple(along)
        others = [str(name) for name, c in dataset.coords.items() if c.dims == (dims[0],)]
        names = [*along, *(name for name in others if name not in along)]
        chunks = dataset.chunksizes.get(dims[0])
        step = max(chunks) if chunks else _stored_rows(dataset.data_vars.values(), dims[0])
        take = _FromXarray(dataset, dims[0], place)
        super().__init__(place, names, dataset.sizes[dims[0]], step, take)

    @property
    def default(self) -> tuple[str, ...]:
        return self._default


@dataclass(frozen=True)
class _FromXarray:
    """Takes rows of one of the variables of an xarray dataset."""

    dataset: Any
    dim: str
    place: str

    def __call__(self, name: str, first: int, last: int) -> Any:
        piece = self.dataset[name].isel({self.dim: slice(first, last)})
        try:
            return piece.compute(scheduler="synchronous").values
        except Exception as error:  # the libraries of both formats raise what they like
            raise CorruptError(
                f"{self.place}: {name}: rows {first} to {last - 1} cannot be decoded: {error}"
            ) from error


def _netcdf(path: Path) -> Chunked:
    import xarray

    with path.open("rb") as file:
        engine = "h5netcdf" if file.read(4) == b"\x89HDF" else "scipy"
    try:
        dataset = xarray.open_dataset(path, engine=engine, cache=False)
    except Exception as error:  # noqa: BLE001 - whatever the bytes make the two readers raise
        raise DataError(f"{path}: not a whole NetCDF file: {first_line(error)}") from None
    return _of_dataset(dataset, str(path))


class XarraySource(ArraySource):
    """A two-dimensional xarray array; its first dimension are the rows.

    Labels of text along the second dimension name the columns, and a schema then says which of
    them are taken, in its order. A chunk is one of dask's where the
    array has those, else `CHUNK_ROWS` rows, and is computed in the thread that reads it. Parameters
    and errors as for `NumpySource`.
    """

    kind = "xarray"

    def __init__(
        self,
        array: Any,
        schema: Schema | Sequence[str] | None = None,
        weights: Any = None,
        *,
        name: str = "xarray array",
    ) -> None:
        labels = _feature_labels(array)
        if labels and schema is None:
            schema = labels
        elif labels and schema is not None:
            names = list(schema.names if isinstance(schema, Schema) else schema)
            check_columns(name, labels, names)
            array = array.isel({array.dims[1]: [labels.index(label) for label in names]})
        self.array = array
        chunks = array.chunksizes.get(array.dims[0]) if array.ndim else None
        chunk_rows: Sequence[int] | int = chunks or _stored_rows([array], *array.dims[:1])
        super().__init__(name, array.shape, array.dtype, chunk_rows, schema, weights)

    def _take(self, first: int, last: int) -> Array:
        piece = self.array.isel({self.array.dims[0]: slice(first, last)})
        taken: Array = piece.compute(scheduler="synchronous").values
        return taken


def _stored_rows(arrays: Iterable[Any], dim: Any = None) -> int:
    """Rows to read at once: whole stored chunks, about `CHUNK_ROWS` rows of them."""
    stored = [int(a.encoding.get("preferred_chunks", {}).get(dim, 1)) for a in arrays]
    rows = max(stored, default=1)
    return rows * max(CHUNK_ROWS // rows, 1)


def _feature_labels(array: Any) -> list[str]:
    """Names of the columns of an xarray array, where it has such."""
    if array.ndim != 2 or array.dims[1] not in array.coords:
        return []
    labels = array.coords[array.dims[1]].values
    return [str(label) for label in labels] if labels.dtype.kind in "UOT" else []


# --- messages -------------------------------------------------------------------------------------


def check_columns(place: str, present: Sequence[str], wanted: Iterable[str] | None) -> None:
    """Raise DataError where a wanted column (None: any) is absent, without name, or there twice."""
    names = list(present)
    for name in names if wanted is None else wanted:
        if name not in names:
            raise DataError(
                f"{place}: no column {name!r}{did_you_mean(name, names)}: "
                f"the columns are {listed(names)}"
            )
        if not name:
            raise DataError(
                f"{place}: column {names.index(name) + 1} has no name: name it in the file, or "
                "list the columns to use"
            )
        if names.count(name) > 1:
            raise DataError(f"{place}: column {name!r} is there {names.count(name)} times")


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """` (did you mean ...?)`, or nothing where no name is close."""
    known = {text.lower(): text for text in names}
    close = difflib.get_close_matches(name.lower(), known, n=1)
    return f" (did you mean {known[close[0]]!r}?)" if close else ""


def listed(names: Iterable[str], most: int = 20) -> str:
    """Names as they are read in a message: the first ones, and how many more there are."""
    texts = list(names)
    rest = f" and {len(texts) - most} more" if len(texts) > most else ""
    return ", ".join(texts[:most]) + rest


def number_of(text: str) -> float | None:
    """The number a text means, or None."""
    if "_" in text:
        return None
    try:
        return float(text)
    except ValueError:
        return None
