"""Tables of named columns, in the formats people keep them in, read by pieces and encoded as rows.

`read_tables` walks through a file of any known format and holds a bounded number of rows;
`Encoder` turns them into numbers and learns the levels of categorical columns on the way.
"""

from __future__ import annotations

import bz2
import contextlib
import csv
import difflib
import gzip
import io
import lzma
import math
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from genstream.errors import ConfigError, CorruptError, DataError, StorageError
from genstream.rows import Rows
from genstream.schema import KINDS, Column, Kind, Schema
from genstream.sources import (
    CHUNK_ROWS,
    ArraySource,
    DaskSource,
    NpySource,
    NumpySource,
    Piece,
    Source,
    ZarrSource,
    check_zarr,
    open_npy,
)

Array = NDArray[Any]
Missing = Literal["allow", "forbid"]
Unseen = Literal["error", "missing"]

# Texts that stand for a missing entry where the caller names no others.
NULL_VALUES = ("", "NA", "N/A", "n/a", "NaN", "nan", "NULL", "null", "None", "?")
MAX_LEVELS = 1000
# Bytes of a CSV file that are parsed at once; no line can be longer.
CSV_BLOCK = 1 << 20
HEADER_NBYTES = 1 << 20


# --- encoding ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ColumnSpec:
    """What is known of a column before its data are seen.

    `levels` are fixed labels (an unseen one is an error), or None where a categorical column
    learns them in the order in which they appear; for a binary column the labels of 0 and 1.
    """

    name: str
    kind: Kind = "real"
    levels: tuple[str, ...] | None = None
    unit: str = ""

    @classmethod
    def of(cls, name: str, given: Kind | Column | ColumnSpec) -> ColumnSpec:
        """A specification from a kind or a column. Raises ConfigError for an unknown kind."""
        if isinstance(given, ColumnSpec):
            return given
        if isinstance(given, Column):
            return cls(given.name, given.kind, given.levels or None, given.unit)
        if given not in KINDS:
            raise ConfigError(f"column {name!r}: kind {given!r} is not one of {', '.join(KINDS)}")
        return cls(name, given)


class Encoder:
    """Encodes tables as rows of numbers, and learns levels as they come.

    Parameters
    ----------
    specs
        What the columns are, by name, or a schema, whose levels are then fixed. None infers it
        from the first table: numbers are real, booleans binary, text categorical.
    null_values
        Texts that stand for a missing entry, in place of `NULL_VALUES`; those that are numbers
        (`-999`) do so in numeric columns too. Nulls and NaN always are missing.
    missing
        `forbid` refuses the first gap.
    known
        The schema of data that were encoded before: its learned levels come first.
    unseen
        What a label outside fixed levels is: an `error`, or `missing`.
    carried
        Columns beside the data (ids, weights), which inference leaves out.
    max_levels
        The most levels a column may learn.

    Codes are given in the order in which labels first appear, so they depend on the order of the
    rows but not on how these are cut into tables.

    Raises ConfigError where `specs` and `known` contradict each other.
    """

    def __init__(
        self,
        specs: Mapping[str, Kind | Column | ColumnSpec] | Schema | None = None,
        *,
        null_values: Sequence[str] | None = None,
        missing: Missing = "allow",
        known: Schema | None = None,
        unseen: Unseen = "error",
        carried: Iterable[str] = (),
        max_levels: int = MAX_LEVELS,
    ) -> None:
        self.missing = missing
        self.unseen = unseen
        self.carried = tuple(dict.fromkeys(carried))
        self.max_levels = max_levels
        nulls = tuple(NULL_VALUES if null_values is None else null_values)
        self._null_texts = pa.array(sorted({*nulls, ""}), pa.string())
        self._null_numbers = [x for x in map(_number, nulls) if x is not None and math.isfinite(x)]
        self._specs: tuple[ColumnSpec, ...] | None = None
        self._codes: dict[str, dict[str, int]] = {}
        if isinstance(specs, Schema):
            specs = {column.name: column for column in specs.columns}
        if specs is not None:
            self._settle(tuple(ColumnSpec.of(name, given) for name, given in specs.items()), known)
        elif known is not None:
            # Whether levels were learned or fixed is not recorded; here nobody fixes them.
            learned = (
                ColumnSpec(c.name, c.kind, c.levels or None if c.kind == "binary" else None, c.unit)
                for c in known.columns
            )
            self._settle(tuple(learned), known)

    def _settle(self, specs: tuple[ColumnSpec, ...], known: Schema | None) -> None:
        if not specs:
            raise ConfigError("no column is named: name at least one")
        for name in self.carried:
            if name in {spec.name for spec in specs}:
                raise ConfigError(f"column {name!r} is named both as data and as id or weights")
        if known is not None:
            _check_known(specs, known)
        for spec in specs:
            if spec.kind == "categorical":
                before = () if known is None else known[spec.name].levels
                levels = before if spec.levels is None else spec.levels
                self._codes[spec.name] = {label: code for code, label in enumerate(levels)}
            elif spec.levels is not None:
                Column(spec.name, spec.kind, spec.levels)
        self._specs = specs

    @property
    def specs(self) -> tuple[ColumnSpec, ...]:
        """What is known of the columns; raises DataError while nothing is."""
        if self._specs is None:
            raise DataError("there are no rows from which the kinds of columns could be inferred")
        return self._specs

    @property
    def wanted(self) -> list[str] | None:
        """Names of the columns to read, carried ones included; None while all are to be seen."""
        if self._specs is None:
            return None
        return [*(spec.name for spec in self._specs), *self.carried]

    @property
    def schema(self) -> Schema:
        """The columns, with the levels seen so far.

        Raises DataError where nothing was seen yet, or no level of a categorical column.
        """
        return Schema(tuple(self._column(spec) for spec in self.specs))

    def _column(self, spec: ColumnSpec) -> Column:
        levels = tuple(self._codes.get(spec.name, spec.levels or ()))
        if spec.kind == "categorical" and not levels:
            raise DataError(
                f"column {spec.name!r}: every entry is missing, so there is no level to learn: "
                "leave the column out, or list its levels"
            )
        return Column(spec.name, spec.kind, levels, spec.unit)

    def encode(self, table: Any, *, first_row: int = 0, place: str = "table") -> Rows:
        """(n, d) float64 rows of a table, gaps masked; further columns are left aside.

        `first_row` and `place` only serve error messages. Raises DataError, naming place, row and
        column, for an entry that cannot be used.
        """
        if self._specs is None:
            self._settle(self._inferred(table, place), None)
        names = [spec.name for spec in self.specs]
        check_columns(place, table.column_names, names)
        values = np.empty((table.num_rows, len(names)))
        for j, spec in enumerate(self.specs):
            column = _plain(table.column(spec.name))
            try:
                if spec.kind == "categorical":
                    values[:, j] = self._coded(spec, column)
                elif spec.kind == "binary":
                    values[:, j] = self._binary(spec, column)
                else:
                    values[:, j] = self._numbers(column)
                if self.missing == "forbid":
                    gaps = np.isnan(values[:, j])
                    if gaps.any():
                        raise _EntryError(
                            int(np.argmax(gaps)),
                            "is missing, and data.missing is 'forbid'",
                        )
            except _EntryError as error:
                where = "" if error.row is None else f"row {first_row + error.row}, "
                raise DataError(f"{place}: {where}column {spec.name!r}: {error}") from None
        try:
            rows = Rows.of(values, first_row=first_row, names=names)
            # Codes are right by construction, and a column may not have a level yet.
            checked = tuple(
                Column(spec.name, "real" if spec.kind == "categorical" else spec.kind)
                for spec in self.specs
            )
            return rows.check(Schema(checked), first_row=first_row)
        except DataError as error:
            raise DataError(f"{place}: {error}") from None

    def numbers(
        self, table: Any, name: str, *, first_row: int = 0, place: str = "table"
    ) -> NDArray[np.float64]:
        """(n,) numbers of one column, such as weights. Raises DataError where one is missing."""
        check_columns(place, table.column_names, [name])
        try:
            found = self._numbers(_plain(table.column(name)))
            if np.isnan(found).any():
                raise _EntryError(int(np.argmax(np.isnan(found))), "is missing")
        except _EntryError as error:
            where = "" if error.row is None else f"row {first_row + error.row}, "
            raise DataError(f"{place}: {where}column {name!r}: {error}") from None
        return found

    def weights(
        self, table: Any, name: str, *, first_row: int = 0, place: str = "table"
    ) -> NDArray[np.float64]:
        """(n,) row weights. Raises DataError where one is missing, negative or infinite."""
        found = self.numbers(table, name, first_row=first_row, place=place)
        wrong = ~(np.isfinite(found) & (found >= 0))
        if wrong.any():
            i = int(np.argmax(wrong))
            raise DataError(
                f"{place}: row {first_row + i}, column {name!r}: {found[i]:g} is no weight: "
                "weights are finite and not negative"
            )
        return found

    def ids(
        self, table: Any, name: str, *, first_row: int = 0, place: str = "table"
    ) -> list[str] | list[int]:
        """Ids of the rows: whole numbers where the column is typed so, else text.

        Raises DataError where one is missing.
        """
        check_columns(place, table.column_names, [name])
        column = _plain(table.column(name))
        if column.null_count:
            row = int(np.argmax(column.is_null().to_numpy(zero_copy_only=False)))
            raise DataError(f"{place}: row {first_row + row}, column {name!r}: the id is missing")
        if pa.types.is_integer(column.type):
            whole: list[int] = column.to_pylist()
            return whole
        texts: list[str] = _labels(column).to_pylist()
        return texts

    def _inferred(self, table: Any, place: str) -> tuple[ColumnSpec, ...]:
        specs = []
        check_columns(place, table.column_names, [])
        for name in table.column_names:
            if name in self.carried:
                continue
            specs.append(ColumnSpec(name, self._kind(name, _plain(table.column(name)), place)))
        if not specs:
            raise DataError(f"{place}: has no column besides {', '.join(self.carried)}")
        return tuple(specs)

    def _kind(self, name: str, column: Any, place: str) -> Kind:
        if pa.types.is_boolean(column.type):
            return "binary"
        if _is_number(column.type):
            return "real"
        if not _is_text(column.type):
            raise DataError(f"{place}: column {name!r}: {_refusal(column.type)}")
        seen = self._texts(column).drop_null()
        if not len(seen):
            return "real"
        labels = pc.unique(seen)
        if {text.lower() for text in labels.to_pylist()[:3]} <= {"true", "false"}:
            return "binary"
        try:
            _parsed(labels)
        except _EntryError:
            return "categorical"
        return "real"

    # --- entries ---------------------------------------------------------------------------------

    def _texts(self, column: Any) -> Any:
        """Trimmed text, null where it stands for a missing entry."""
        trimmed = pc.utf8_trim_whitespace(column)
        return pc.if_else(
            pc.is_in(trimmed, value_set=self._null_texts), pa.scalar(None, pa.string()), trimmed
        )

    def _numbers(self, column: Any) -> NDArray[np.float64]:
        """(n,) float64, NaN where an entry is missing."""
        if _is_text(column.type):
            column = _parsed(self._texts(column))
        elif pa.types.is_boolean(column.type):
            column = column.cast(pa.uint8())
        elif not _is_number(column.type):
            raise _EntryError(None, _refusal(column.type))
        if not pa.types.is_float64(column.type):
            column = column.cast(pa.float64(), safe=False)
        found: NDArray[np.float64] = column.to_numpy(zero_copy_only=False)
        for number in self._null_numbers:
            found = np.where(found == number, np.nan, found)
        return found

    def _binary(self, spec: ColumnSpec, column: Any) -> NDArray[np.float64]:
        if spec.levels is not None:
            codes = {label: code for code, label in enumerate(spec.levels)}
            return self._looked_up(codes, column)
        if not _is_text(column.type):
            return self._numbers(column)
        texts = self._texts(column)
        lower = pc.utf8_lower(texts)
        words = pc.if_else(
            pc.equal(lower, "true"), "1", pc.if_else(pc.equal(lower, "false"), "0", texts)
        )
        try:
            return self._numbers(words)
        except _EntryError as error:
            raise _EntryError(
                error.row,
                f"{texts[error.row].as_py()!r} is neither 0, 1, true nor false: give the labels of "
                "0 and 1 as its levels, or make the column categorical",
            ) from None

    def _coded(self, spec: ColumnSpec, column: Any) -> NDArray[np.float64]:
        codes = self._codes[spec.name]
        if spec.levels is not None:
            return self._looked_up(codes, column)
        encoded = self._categories(column)
        labels = encoded.dictionary.to_pylist()
        for position, label in enumerate(labels):
            if label not in codes:
                if len(codes) == self.max_levels:
                    index = encoded.indices.to_numpy(zero_copy_only=False)
                    raise _EntryError(
                        int(np.argmax(index == position)),
                        f"{label!r} is level number {self.max_levels + 1}, and more than "
                        f"{self.max_levels} are not modelled: is this an id, or a number?",
                    )
                codes[label] = len(codes)
        return _taken(encoded, np.array([codes[label] for label in labels], dtype=np.float64))

    def _looked_up(self, codes: Mapping[str, int], column: Any) -> NDArray[np.float64]:
        encoded = self._categories(column)
        labels = encoded.dictionary.to_pylist()
        for position, label in enumerate(labels):
            if label not in codes and self.unseen == "error":
                index = encoded.indices.to_numpy(zero_copy_only=False)
                raise _EntryError(
                    int(np.argmax(index == position)),
                    f"{label!r} is not one of its levels{_did_you_mean(label, codes)}: "
                    f"{_listed(codes)}",
                )
        found = [float(codes.get(label, math.nan)) for label in labels]
        return _taken(encoded, np.array(found, dtype=np.float64))

    def _categories(self, column: Any) -> Any:
        """The column as indices into its labels, in the order in which they first appear."""
        numeric = _is_number(column.type)
        texts = self._texts(_labels(column))
        if numeric and self._null_numbers:
            gaps = [x for x in map(_number_label, self._null_numbers) if x is not None]
            texts = pc.if_else(
                pc.is_in(texts, value_set=pa.array(gaps, pa.string())),
                pa.scalar(None, pa.string()),
                texts,
            )
        return texts.dictionary_encode()


class _EntryError(Exception):
    """An entry that cannot be used, by its row in the table (None: the whole column)."""

    def __init__(self, row: int | None, what: str) -> None:
        super().__init__(what)
        self.row = row


def _check_known(specs: Sequence[ColumnSpec], known: Schema) -> None:
    names = tuple(spec.name for spec in specs)
    if names != known.names:
        raise ConfigError(
            f"the columns named are {', '.join(names)}; the dataset has {', '.join(known.names)}, "
            "in this order: name the same, or another dataset"
        )
    for spec, column in zip(specs, known.columns, strict=True):
        if spec.kind != column.kind:
            raise ConfigError(
                f"column {spec.name!r} is named as {spec.kind}; in the dataset it is {column.kind}"
            )
        if spec.levels is not None and spec.levels[: len(column.levels)] != column.levels:
            raise ConfigError(
                f"column {spec.name!r}: its levels in the dataset are {_listed(column.levels)}, "
                "and those named must begin with them, in this order"
            )


def check_columns(place: str, present: Sequence[str], wanted: Iterable[str] | None) -> None:
    """Raise DataError where a wanted column (None: any) is absent, without name, or there twice."""
    names = list(present)
    for name in names if wanted is None else wanted:
        if name not in names:
            raise DataError(
                f"{place}: no column {name!r}{_did_you_mean(name, names)}: "
                f"the columns are {_listed(names)}"
            )
        if not name:
            raise DataError(
                f"{place}: column {names.index(name) + 1} has no name: name it in the file, or "
                "list the columns to use"
            )
        if names.count(name) > 1:
            raise DataError(f"{place}: column {name!r} is there {names.count(name)} times")


def _did_you_mean(name: str, names: Iterable[str]) -> str:
    known = {text.lower(): text for text in names}
    close = difflib.get_close_matches(name.lower(), known, n=1)
    return f" (did you mean {known[close[0]]!r}?)" if close else ""


def _listed(names: Iterable[str], most: int = 20) -> str:
    texts = list(names)
    rest = f" and {len(texts) - most} more" if len(texts) > most else ""
    return ", ".join(texts[:most]) + rest


def _plain(column: Any) -> Any:
    """One array of a simple type: chunks joined, dictionaries decoded, one kind of text."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
        if isinstance(column, pa.ChunkedArray):
            column = pa.concat_arrays(column.chunks)
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    kind = column.type
    if pa.types.is_null(kind):
        return column.cast(pa.float64())
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return column.cast(pa.string())
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        with contextlib.suppress(pa.ArrowInvalid):
            return column.cast(pa.string())
    if pa.types.is_float16(kind):
        return column.cast(pa.float32())
    return column


def _is_text(kind: Any) -> bool:
    return bool(pa.types.is_string(kind))


def _is_number(kind: Any) -> bool:
    types = pa.types
    return bool(types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind))


def _refusal(kind: Any) -> str:
    if pa.types.is_temporal(kind):
        return f"holds times ({kind}), not numbers: give a number, such as hours since a start"
    return f"holds values of type {kind}, which are neither numbers nor labels"


def _labels(column: Any) -> Any:
    """Text of each entry: whole numbers without a fraction, whatever their type."""
    kind = column.type
    if _is_text(kind):
        return column
    if pa.types.is_floating(kind):
        distinct = column.dictionary_encode()
        labels = pa.array([_number_label(x) for x in distinct.dictionary.to_pylist()], pa.string())
        return labels.take(distinct.indices)
    if _is_number(kind) or pa.types.is_boolean(kind) or pa.types.is_temporal(kind):
        return column.cast(pa.string())
    raise _EntryError(None, _refusal(kind))


def _number_label(x: float | None) -> str | None:
    if x is None or math.isnan(x):
        return None
    return str(int(x)) if math.isfinite(x) and x == int(x) else repr(x)


def _number(text: str) -> float | None:
    """The number a text means, or None."""
    if "_" in text:
        return None
    try:
        return float(text)
    except ValueError:
        return None


def _parsed(texts: Any) -> Any:
    """Numbers from text; raises _EntryError for the first that is none."""
    try:
        return texts.cast(pa.float64())
    except pa.ArrowInvalid:
        encoded = texts.dictionary_encode()
    numbers = []
    for position, text in enumerate(encoded.dictionary.to_pylist()):
        number = _number(text)
        if number is None:
            index = encoded.indices.to_numpy(zero_copy_only=False)
            shown = text if len(text) <= 40 else text[:37] + "..."
            advice = (
                "write a decimal point and no thousands separator"
                if re.fullmatch(r"[-+]?\d[\d.]*,[\d,.]*", text)
                else "mend it, name it in null_values, or make the column categorical"
            )
            row = int(np.argmax(index == position))
            raise _EntryError(row, f"{shown!r} is not a number: {advice}")
        numbers.append(number)
    return pa.array(numbers, pa.float64()).take(encoded.indices)


def _taken(encoded: Any, codes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Codes of the entries of a dictionary array, NaN for nulls."""
    index = encoded.indices.fill_null(len(codes)).to_numpy(zero_copy_only=False)
    taken: NDArray[np.float64] = np.append(codes, np.nan)[index]
    return taken


# --- reading -------------------------------------------------------------------------------------


def table_columns(path: str | Path) -> tuple[str, ...]:
    """Names of the columns of a file, from its header or metadata alone.

    Raises DataError where the file has none, StorageError where it cannot be opened.
    """
    return _opened(path).names


def read_tables(
    data: Any, *, columns: Sequence[str] | None = None, chunk_rows: int = CHUNK_ROWS
) -> Iterator[Any]:
    """Walk through a table, at most `chunk_rows` rows at a time.

    Parameters
    ----------
    data
        The path of a file: CSV (comma, semicolon or tab separated, with a header; also packed as
        .gz, .bz2, .xz or .zip), parquet, Arrow IPC, npy, zarr or NetCDF. Or a table in memory:
        pyarrow, pandas or xarray.
    columns
        Those to read, in this order; all of them if left out. The columns of an array without
        names are `x0`, `x1`, ..., or go by the names given where there are as many.

    Yields
    ------
    `pyarrow.Table`s with rows, in order; text of a CSV file is left as it is.

    Raises
    ------
    DataError
        Naming the file: an unknown column, no rows, or bytes that are not what the name says.
    StorageError
        Where the file is not there or cannot be read.
    """
    opened = _opened(data)
    wanted = list(opened.default if columns is None else columns)
    check_columns(opened.place, opened.choose(columns), wanted)
    n = 0
    with _damage(opened.place):
        for table in _regrouped(opened.read(wanted), chunk_rows):
            n += table.num_rows
            yield table
    if not n:
        raise DataError(f"{opened.place}: has no rows")


class _Format:
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


class _Chunked(_Format):
    """A table whose pieces can be read by number; picklable."""

    chunk_rows: tuple[int, ...]
    kind = "table"

    def piece(self, i: int, columns: list[str]) -> Any:
        """Some columns of piece `i`, as a table."""
        raise NotImplementedError

    def read(self, columns: list[str]) -> Iterator[Any]:
        for i in range(len(self.chunk_rows)):
            yield from self.piece(i, columns).to_batches()


@contextlib.contextmanager
def _damage(place: str) -> Iterator[None]:
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
    except pa.ArrowException as error:
        raise DataError(f"{place}: {_first_line(error)}") from None
    except FileNotFoundError:
        raise StorageError(f"{place}: no such file or folder") from None
    except OSError as error:
        if error.errno is None:
            raise DataError(f"{place}: damaged or cut short: {_first_line(error)}") from None
        raise StorageError(f"{place}: cannot be read: {error.strerror or error}") from None


def _first_line(error: BaseException) -> str:
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


_MAGIC = (
    (b"PAR1", "parquet"),
    (b"ARROW1", "arrow"),
    (b"\x93NUMPY", "npy"),
    (b"CDF", "netcdf"),
    (b"\x89HDF", "netcdf"),
)
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
}


def _opened(data: Any) -> _Format:
    """A table of any kind, once its names are known."""
    if not isinstance(data, str | Path):
        found = _in_memory(data)
        if found is None:
            raise DataError(f"cannot read rows from {type(data).__name__}: give a path or a table")
        return found
    path = Path(data)
    place = str(path)
    with _damage(place):
        kind = _kind_of(path)
        if kind == "parquet":
            return _Parquet(path)
        if kind == "arrow":
            return _arrow(path)
        if kind == "npy":
            return _npy(path)
        if kind == "zarr":
            return _zarr(path)
        if kind == "netcdf":
            return _netcdf(path)
        return _Csv(path)


def _kind_of(path: Path) -> str:
    """What a file is, by its name or else by its first bytes."""
    kind = _SUFFIXES.get(path.suffix.lower(), "")
    if path.is_dir():
        if (path / "manifests").is_dir():
            raise DataError(f"{path}: is a dataset already, not a file to read")
        return "zarr"
    with path.open("rb") as file:
        start = file.read(8)
    if not start:
        raise DataError(f"{path}: the file is empty")
    return kind or next((k for magic, k in _MAGIC if start.startswith(magic)), "csv")


def _in_memory(data: Any) -> _Chunked | None:
    """A table in memory, or None for anything that is none."""
    package = type(data).__module__.partition(".")[0]
    if package == "xarray" and hasattr(data, "data_vars"):
        return _Variables(data, "xarray dataset")
    if package == "xarray":
        return _Array(XarraySource(data))
    if isinstance(data, pa.RecordBatch):
        return _Table(pa.Table.from_batches([data]), "table")
    if isinstance(data, pa.Table):
        return _Table(data, "table")
    with _damage(f"{package} table"):
        if package == "pandas" and hasattr(data, "columns"):
            names = [str(name) for name in data.columns]
            check_columns("pandas table", names, None)
            # A frame may be named by numbers, and Arrow names columns by text only.
            frame = data.set_axis(names, axis="columns")
            return _Table(pa.Table.from_pandas(frame, preserve_index=False), "pandas table")
        if hasattr(data, "__arrow_c_stream__"):
            return _Table(pa.table(data), f"{package} table")
    return None


class _Csv(_Format):
    """Text with a header and one record a line."""

    def __init__(self, path: Path) -> None:
        self.path, self.place = path, str(path)
        with _unpacked(path) as file:
            start = file.read(HEADER_NBYTES)
        if start.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise DataError(f"{path}: is UTF-16 text: save it as UTF-8")
        if b"\0" in start[:4096]:
            raise DataError(f"{path}: is neither text nor of another known format")
        text = start.decode("utf-8-sig", errors="replace").lstrip("\r\n")
        if not text.strip():
            raise DataError(f"{path}: the file is empty")
        self.delimiter = _delimiter(path, text)
        self._raw = next(csv.reader(io.StringIO(text, newline=""), delimiter=self.delimiter))
        self.names = tuple(name.strip() for name in self._raw)
        if all(_number(name) is not None for name in self.names):
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


def _delimiter(path: Path, text: str) -> str:
    if ".tsv" in path.suffixes or ".tab" in path.suffixes:
        return "\t"
    header = text.splitlines()[0]
    return next((mark for mark in (",", ";", "\t", "|") if mark in header), ",")


@contextlib.contextmanager
def _unpacked(path: Path) -> Iterator[Any]:
    """The bytes of a file, unpacked if it is an archive (told by its first bytes)."""
    with path.open("rb") as file:
        start = file.read(6)
        file.seek(0)
        if start.startswith(b"\x1f\x8b"):
            with gzip.open(file) as unpacked:
                yield unpacked
        elif start.startswith(b"BZh"):
            with bz2.open(file) as unpacked:
                yield unpacked
        elif start.startswith(b"\xfd7zXZ\x00"):
            with lzma.open(file) as unpacked:
                yield unpacked
        elif start.startswith(b"PK"):
            with zipfile.ZipFile(file) as archive:
                members = [
                    name
                    for name in archive.namelist()
                    if not name.endswith("/") and not name.startswith("__MACOSX/")
                ]
                if len(members) != 1:
                    raise DataError(
                        f"{path}: the archive holds {len(members)} files ({_listed(members, 5)}): "
                        "pack the one to read alone"
                    )
                if archive.getinfo(members[0]).flag_bits & 1:
                    raise DataError(f"{path}: the archive is encrypted: unpack it first")
                with archive.open(members[0]) as member:
                    yield member
        else:
            yield file


class _Table(_Chunked):
    """A table in memory, in pieces that share its memory."""

    def __init__(self, table: Any, place: str) -> None:
        self.place, self.names, self._table = place, tuple(table.column_names), table
        self.chunk_rows = _even(table.num_rows, CHUNK_ROWS)

    def piece(self, i: int, columns: list[str]) -> Any:
        return self._table.select(columns).slice(i * CHUNK_ROWS, CHUNK_ROWS)


def _even(n: int, chunk_rows: int) -> tuple[int, ...]:
    full, rest = divmod(n, chunk_rows)
    return (chunk_rows,) * full + ((rest,) if rest else ())


class _Parquet(_Chunked):
    """A parquet file; a piece is a row group."""

    kind = "parquet"

    def __init__(self, path: Path) -> None:
        import pyarrow.parquet

        self.path, self.place = path, str(path)
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                self.names = tuple(file.schema_arrow.names)
                groups = [
                    file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)
                ]
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise DataError(f"{path}: not a whole parquet file: {_first_line(error)}") from None
        self._groups = tuple(i for i, n in enumerate(groups) if n)
        self.chunk_rows = tuple(n for n in groups if n)

    def piece(self, i: int, columns: list[str]) -> Any:
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(self.path) as file:
            group = file.read_row_group(self._groups[i], columns=columns, use_threads=False)
        return group.select(columns)

    def read(self, columns: list[str]) -> Iterator[Any]:
        # A row group may be larger than what the caller wants to hold at once.
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(self.path, pre_buffer=False) as file:
            for batch in file.iter_batches(columns=columns, use_threads=False):
                yield batch.select(columns)


class _ArrowFile(_Chunked):
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


class _ArrowStream(_Format):
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


def _arrow(path: Path) -> _Format:
    with path.open("rb") as file:
        start = file.read(6)
    if start.startswith(b"FEA1"):
        raise DataError(f"{path}: is of Feather version 1: save it as version 2, or as parquet")
    return _ArrowFile(path) if start == b"ARROW1" else _ArrowStream(path)


class _Array(_Chunked):
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


class _Fields(_Chunked):
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
        raise DataError(f"{place}: column {name!r}: {_first_line(error)}") from None


@dataclass(frozen=True)
class _FromNpy:
    """Takes rows of a one-dimensional or structured `.npy` file, mapped for the time of a read."""

    path: Path

    def __call__(self, name: str, first: int, last: int) -> Any:
        array = open_npy(self.path)[first:last]
        return np.array(array[name] if array.dtype.names else array)


def _npy(path: Path) -> _Chunked:
    array = open_npy(path)
    if array.ndim != 1:
        return _Array(NpySource(path))
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


def _zarr(path: Path) -> _Chunked:
    import zarr

    try:
        opened = zarr.open(str(path), mode="r")
        arrays = dict(opened.arrays()) if isinstance(opened, zarr.Group) else {}
    except (OSError, ValueError, TypeError, KeyError):
        arrays = {}  # what is wrong with it is said where an array is opened
    if not arrays or {a.ndim for a in arrays.values()} != {1}:
        return _Array(ZarrSource(path))
    lengths = {name: a.shape[0] for name, a in arrays.items()}
    if len(set(lengths.values())) > 1:
        shown = ", ".join(f"{name} ({n})" for name, n in sorted(lengths.items()))
        raise DataError(f"{path}: its arrays are of different lengths: {shown}")
    for name, a in arrays.items():
        check_zarr(f"{path}/{name}", a, a.shards or a.chunks)
    step = max(a.chunks[0] for a in arrays.values())
    n_rows = next(iter(lengths.values()))
    return _Fields(str(path), sorted(arrays), n_rows, step, _FromZarr(opened, str(path)))


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
        step = max(chunks) if chunks else CHUNK_ROWS
        take = _FromXarray(dataset, dims[0])
        super().__init__(place, names, dataset.sizes[dims[0]], step, take)

    @property
    def default(self) -> tuple[str, ...]:
        return self._default


@dataclass(frozen=True)
class _FromXarray:
    """Takes rows of one of the variables of an xarray dataset."""

    dataset: Any
    dim: str

    def __call__(self, name: str, first: int, last: int) -> Any:
        piece = self.dataset[name].isel({self.dim: slice(first, last)})
        return piece.compute(scheduler="synchronous").values


def _netcdf(path: Path) -> _Chunked:
    import xarray

    with path.open("rb") as file:
        engine = "h5netcdf" if file.read(4) == b"\x89HDF" else "scipy"
    try:
        dataset = xarray.open_dataset(path, engine=engine, cache=False)
    except Exception as error:  # noqa: BLE001 - whatever the bytes make the two readers raise
        raise DataError(f"{path}: not a whole NetCDF file: {_first_line(error)}") from None
    arrays = list(dataset.data_vars.values())
    if len(arrays) == 1 and arrays[0].ndim == 2:
        return _Array(XarraySource(arrays[0], name=str(path)))
    return _Variables(dataset, str(path))


# --- sources -------------------------------------------------------------------------------------


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
        chunk_rows: Sequence[int] | int = chunks or CHUNK_ROWS
        super().__init__(name, array.shape, array.dtype, chunk_rows, schema, weights)

    def _take(self, first: int, last: int) -> Array:
        piece = self.array.isel({self.array.dims[0]: slice(first, last)})
        taken: Array = piece.compute(scheduler="synchronous").values
        return taken


def _feature_labels(array: Any) -> list[str]:
    """Names of the columns of an xarray array, where it has such."""
    if array.ndim != 2 or array.dims[1] not in array.coords:
        return []
    labels = array.coords[array.dims[1]].values
    return [str(label) for label in labels] if labels.dtype.kind in "UOT" else []


class TableSource(ArraySource):
    """Named columns of one or more tables, in place: labels become codes as chunks are read.

    Parameters
    ----------
    data
        A table in memory (pyarrow, pandas, xarray), or the paths of files whose pieces can be read
        by number: parquet (a chunk is a row group), Arrow IPC, NetCDF, zarr groups of columns. The
        rows of several files follow each other.
    schema
        A schema, or kinds and columns by name, or names alone; what the first chunk suggests if
        left out. Levels that are not given are learned here, by a walk over those columns.
    weights
        (n,) row weights, or the name of their column.
    null_values, missing
        As for `Encoder`.

    Raises DataError, naming file and column, where columns are not there or of no use, or there
    are no rows.
    """

    def __init__(
        self,
        data: Any,
        schema: Schema | Mapping[str, Kind | Column | ColumnSpec] | Sequence[str] | None = None,
        weights: Any = None,
        *,
        null_values: Sequence[str] | None = None,
        missing: Missing = "allow",
    ) -> None:
        self._tables: list[_Chunked] = []
        for one in data if isinstance(data, list | tuple) else [data]:
            opened = one if isinstance(one, _Format) else _opened(one)
            if not isinstance(opened, _Chunked):
                raise DataError(
                    f"{opened.place}: can only be read from its beginning, so it cannot be fitted "
                    "in place: ingest it into a dataset first"
                )
            self._tables.append(opened)
        if not self._tables:
            raise ConfigError("there is no file to read")
        self.kind = self._tables[0].kind
        self._weights_column = weights if isinstance(weights, str) else None
        carried = [] if self._weights_column is None else [self._weights_column]
        names = None
        if schema is not None and not isinstance(schema, Schema | Mapping):
            names, schema = [str(name) for name in schema], None
        self._places = [(t, i) for t in self._tables for i in range(len(t.chunk_rows))]
        place = self._tables[0].place
        if len(self._tables) > 1:
            place += f" and {len(self._tables) - 1} more"
        if not self._places:
            raise DataError(f"{place}: has no rows")
        encoder = Encoder(schema, null_values=null_values, missing=missing, carried=carried)
        if schema is None:
            first = list(self._tables[0].default if names is None else names)
            first += [name for name in carried if name not in first]
            encoder.encode(self._piece(0, first), place=place)
        assert encoder.wanted is not None
        self._wanted = encoder.wanted
        for table in self._tables:
            check_columns(table.place, table.choose(self._wanted), self._wanted)
        learned = self._learned(encoder.specs, null_values)
        self._encoder = Encoder(learned, null_values=null_values, missing=missing, carried=carried)
        super().__init__(
            place,
            (sum(sum(t.chunk_rows) for t in self._tables), learned.n_features),
            np.dtype(np.float64),
            [t.chunk_rows[i] for t, i in self._places],
            learned,
            None if carried else weights,
        )

    def _learned(self, specs: Sequence[ColumnSpec], null_values: Sequence[str] | None) -> Schema:
        """The schema with all levels; the columns where they are open are read once for them."""
        learning = {s.name: s for s in specs if s.kind == "categorical" and s.levels is None}
        found: dict[str, Column] = {}
        if learning:
            walk = Encoder(learning, null_values=null_values)
            for number, (table, _) in enumerate(self._places):
                piece = self._piece(number, list(learning))
                walk.encode(piece, first_row=self._first_row(number), place=table.place)
            found = {column.name: column for column in walk.schema.columns}
        return Schema(
            tuple(
                found.get(s.name) or Column(s.name, s.kind, s.levels or (), s.unit) for s in specs
            )
        )

    def _first_row(self, number: int) -> int:
        """The row of its own file with which a chunk begins."""
        table, i = self._places[number]
        return sum(table.chunk_rows[:i])

    def _piece(self, number: int, columns: list[str]) -> Any:
        table, i = self._places[number]
        with _damage(table.place):
            check_columns(table.place, table.choose(columns), columns)
            return table.piece(i, columns)

    @property
    def chunk_nbytes(self) -> int:
        """Memory of the largest decoded chunk, in bytes, with the table it is decoded from."""
        return 2 * super().chunk_nbytes

    def read(self, i: int) -> Rows:
        """Chunk `i`; see `Source.read`."""
        place, first = self._places[i][0].place, self._first_row(i)
        piece = self._piece(i, self._wanted)
        rows = self._encoder.encode(piece, first_row=first, place=place)
        if self._weights_column is not None:
            weights = self._encoder.weights(
                piece, self._weights_column, first_row=first, place=place
            )
            return replace(rows, weights=weights)
        return rows if self.weights is None else self._rows(i, rows.filled())

    def identity(self) -> dict[str, Any]:
        """As for every array, with the files."""
        return super().identity() | {"files": [table.place for table in self._tables]}


class Concatenated:
    """Sources of the same columns, one after another."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = tuple(sources)
        self.schema = sources[0].schema
        for source in sources:
            if source.schema != self.schema:
                raise DataError(
                    f"{source.identity()['name']}: its columns ({', '.join(source.schema.names)}) "
                    f"are not those of {sources[0].identity()['name']} "
                    f"({', '.join(self.schema.names)})"
                )
        self.chunk_rows = tuple(n for source in sources for n in source.chunk_rows)
        self._places = [(s, i) for s, one in enumerate(sources) for i in range(len(one.chunk_rows))]
        counts = [sum(source.chunk_rows) for source in sources]
        self._before = [sum(counts[:s]) for s in range(len(counts))]

    @property
    def chunk_nbytes(self) -> int:
        """Memory of the largest decoded chunk, in bytes."""
        return max(source.chunk_nbytes for source in self._sources)

    def read(self, i: int) -> Rows:
        """Chunk `i`; see `Source.read`."""
        s, j = self._places[i]
        return self._sources[s].read(j)

    def origin(self, i: int) -> tuple[Piece, ...]:
        """Rows are counted over all sources, as if they were one."""
        s, j = self._places[i]
        pieces = self._sources[s].origin(j)
        return tuple((key, first + self._before[s], n) for key, first, n in pieces)

    def identity(self) -> dict[str, Any]:
        """The identities of the sources."""
        return {
            "kind": "concatenated",
            "name": ", ".join(str(source.identity()["name"]) for source in self._sources),
            "n_rows": sum(self.chunk_rows),
            "n_chunks": len(self.chunk_rows),
            "columns": list(self.schema.names),
            "sources": [source.identity() for source in self._sources],
        }


def open_source(
    data: Any,
    schema: Schema | Mapping[str, Kind | Column | ColumnSpec] | Sequence[str] | None = None,
    weights: Any = None,
    *,
    null_values: Sequence[str] | None = None,
    missing: Missing = "allow",
) -> Source:
    """Rows in chunks of whatever holds them, in place.

    Parameters
    ----------
    data
        A numpy array or nested lists, a dask or zarr array, an xarray object, a pandas or pyarrow
        table, the path of an .npy, zarr, parquet, Arrow or NetCDF file, several such paths, or a
        source, which is returned as it is.
    schema
        A schema, kinds and columns by name, or names alone. Left out, arrays have real columns,
        and those of a table are what their types suggest.
    weights
        (n,) row weights; of a table also the name of their column.
    null_values
        As for `Encoder`; it has a meaning for tables only.
    missing
        `forbid` refuses the first gap met.

    Raises
    ------
    DataError
        Naming file, row or column, where the data cannot be used.
    StorageError
        Where a file is not there or cannot be read.
    """
    if isinstance(data, Source):
        return data
    paths = isinstance(data, list | tuple) and bool(data) and all(map(_is_path, data))
    if paths and len(data) == 1:
        data, paths = data[0], False
    if _is_path(data) and "://" not in str(data):
        opened = [_opened(data)]
    elif paths:
        opened = [_opened(path) for path in data]
    else:
        table = None if _is_path(data) else _in_memory(data)
        opened = [] if table is None else [table]
    if opened and not any(isinstance(one, _Array) for one in opened):
        return TableSource(opened, schema, weights, null_values=null_values, missing=missing)
    if len(opened) > 1:
        if weights is not None:
            raise ConfigError("weights are not known of several arrays: name them file by file")
        return Concatenated([open_source(path, schema, missing=missing) for path in data])
    array = opened[0].source if opened and isinstance(opened[0], _Array) else data
    source = _array_source(array, _array_schema(schema), weights)
    source.forbid_missing = missing == "forbid"
    return source


def _is_path(data: Any) -> bool:
    return isinstance(data, str | Path)


def _array_source(data: Any, schema: Schema | Sequence[str] | None, weights: Any) -> ArraySource:
    """The source of an array, or of the same array as another source with this schema."""
    if isinstance(data, XarraySource):
        return XarraySource(data.array, schema, weights, name=data.name)
    if isinstance(data, NpySource):
        return NpySource(data.path, schema, weights)
    if isinstance(data, ZarrSource):
        return ZarrSource(data.name, schema, weights)
    package = type(data).__module__.partition(".")[0]
    if package == "dask" and hasattr(data, "numblocks"):
        return DaskSource(data, schema, weights)
    if _is_path(data) or (package == "zarr" and hasattr(data, "chunks")):
        return ZarrSource(data, schema, weights)
    if isinstance(data, np.ma.MaskedArray):
        return NumpySource(data, schema, weights)
    try:
        array = np.asarray(data)
    except (ValueError, TypeError) as error:
        raise DataError(f"array: not rows of equal length: {_first_line(error)}") from None
    return NumpySource(array, schema, weights)


def _array_schema(schema: Any) -> Schema | Sequence[str] | None:
    """A schema for an array, whose entries are codes: all levels must be given."""
    if not isinstance(schema, Mapping):
        found: Schema | Sequence[str] | None = schema
        return found
    columns = []
    for name, given in schema.items():
        spec = ColumnSpec.of(name, given)
        if spec.kind == "categorical" and spec.levels is None:
            raise ConfigError(
                f"column {name!r}: an array holds codes, not labels: list the levels in their order"
            )
        columns.append(Column(spec.name, spec.kind, spec.levels or (), spec.unit))
    return Schema(tuple(columns))
