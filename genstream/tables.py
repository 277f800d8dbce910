"""Tables of named columns encoded as rows of numbers, while they are read or in place.

`Encoder` learns the levels of categorical columns on the way; `TableSource` reads tables by chunks,
and `open_source` whatever holds rows.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from genstream.errors import ConfigError, DataError
from genstream.formats import (
    ArrayTable,
    Chunked,
    Format,
    XarraySource,
    check_columns,
    damage,
    did_you_mean,
    first_line,
    listed,
    number_of,
    open_table,
    read_tables,
    table_columns,
    table_in_memory,
)
from genstream.rows import Rows
from genstream.schema import KINDS, Column, Kind, Schema
from genstream.sources import (
    ArraySource,
    DaskSource,
    NpySource,
    NumpySource,
    Piece,
    Source,
    ZarrSource,
    as_held,
    fingerprint,
    with_gaps,
)

__all__ = [
    "NULL_VALUES",
    "ColumnSpec",
    "Concatenated",
    "Encoder",
    "TableSource",
    "XarraySource",
    "check_columns",
    "open_source",
    "read_tables",
    "table_columns",
]

Array = NDArray[Any]
Missing = Literal["allow", "forbid"]
Unseen = Literal["error", "missing"]

# Texts that stand for a missing entry where the caller names no others.
NULL_VALUES = ("", "NA", "N/A", "n/a", "NaN", "nan", "NULL", "null", "None", "?")
MAX_LEVELS = 1000


# --- encoding ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ColumnSpec:
    """What is known of a column before its data are seen.

    `levels` are fixed labels (an unseen one is an error), or None where a categorical column
    learns them in the order in which they appear; for a binary column the labels of 0 and 1.
    `lower` and `upper` are detection limits, `resolution` the step it is recorded in.
    """

    name: str
    kind: Kind = "real"
    levels: tuple[str, ...] | None = None
    unit: str = ""
    lower: float | None = None
    upper: float | None = None
    resolution: float | None = None

    @classmethod
    def of(cls, name: str, given: Kind | Column | ColumnSpec) -> ColumnSpec:
        """A specification from a kind or a column. Raises ConfigError for an unknown kind."""
        if isinstance(given, ColumnSpec):
            return given
        if isinstance(given, Column):
            return cls(
                given.name,
                given.kind,
                given.levels or None,
                given.unit,
                given.lower,
                given.upper,
                given.resolution,
            )
        if given not in KINDS:
            raise ConfigError(f"column {name!r}: kind {given!r} is not one of {', '.join(KINDS)}")
        return cls(name, given)

    def column(self, levels: tuple[str, ...] | None = None) -> Column:
        """The column, once its levels are known; those of the specification by default."""
        known = levels if levels is not None else self.levels or ()
        return Column(
            self.name, self.kind, known, self.unit, self.lower, self.upper, self.resolution
        )


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
        self._null_numbers = _null_numbers(nulls)
        self._specs: tuple[ColumnSpec, ...] | None = None
        self._codes: dict[str, dict[str, int]] = {}
        if isinstance(specs, Schema):
            specs = {column.name: column for column in specs.columns}
        if specs is not None:
            self._settle(tuple(ColumnSpec.of(name, given) for name, given in specs.items()), known)
        elif known is not None:
            # Whether levels were learned or fixed is not recorded; here nobody fixes them.
            told = (ColumnSpec.of(column.name, column) for column in known.columns)
            learned = (replace(s, levels=None) if s.kind == "categorical" else s for s in told)
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

    @property
    def levels(self) -> dict[int, tuple[str, ...]]:
        """Levels seen so far of each categorical column, by its position."""
        return {
            j: tuple(self._codes[spec.name])
            for j, spec in enumerate(self.specs)
            if spec.kind == "categorical"
        }

    def _column(self, spec: ColumnSpec) -> Column:
        levels = tuple(self._codes.get(spec.name, spec.levels or ()))
        if spec.kind == "categorical" and not levels:
            raise DataError(
                f"column {spec.name!r}: every entry is missing, so there is no level to learn: "
                "leave the column out, or list its levels"
            )
        return spec.column(levels)

    def infer(self, tables: Iterable[Any], *, place: str = "table") -> None:
        """Settle the kinds of the columns by the first rows, in one table or several.

        Raises DataError for a column whose values cannot be used, or where there is none.
        """
        looks: dict[str, _Look] = {}
        for table in tables:
            for name in table.column_names:
                if name in self.carried:
                    continue
                column = _plain(table.column(name))
                look = looks.setdefault(name, _Look())
                if _is_text(column.type):
                    look.add(pc.unique(self._texts(column).drop_null()))
                elif pa.types.is_boolean(column.type):
                    look.truth = True
                elif not _is_number(column.type):
                    raise DataError(f"{place}: column {name!r}: {_refusal(column.type)}")
        if not looks:
            raise DataError(f"{place}: has no column besides {', '.join(self.carried)}")
        self._settle(tuple(ColumnSpec(name, look.kind) for name, look in looks.items()), None)

    def encode(self, table: Any, *, first_row: int = 0, place: str = "table") -> Rows:
        """(n, d) float64 rows of a table, gaps masked; further columns are left aside.

        `first_row` and `place` only serve error messages. Raises DataError, naming place, row and
        column, for an entry that cannot be used.
        """
        if self._specs is None:
            self.infer([table], place=place)
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
        if _is_text(column.type):
            trimmed = pc.utf8_trim_whitespace(column)
            column = pc.if_else(pc.equal(trimmed, ""), pa.scalar(None, pa.string()), trimmed)
        if column.null_count:
            row = int(np.argmax(column.is_null().to_numpy(zero_copy_only=False)))
            raise DataError(f"{place}: row {first_row + row}, column {name!r}: the id is missing")
        if pa.types.is_integer(column.type):
            whole: list[int] = column.to_pylist()
            return whole
        texts: list[str] = _labels(column).to_pylist()
        return texts

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
        if not pa.types.is_floating(column.type):
            column = column.cast(pa.float64(), safe=False)
        # As the column's own type rounds them: -999.9 in float32 is another number in float64.
        found = with_gaps(column.to_numpy(zero_copy_only=False), self._null_numbers)
        return found.astype(np.float64, copy=False)

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
                    f"{label!r} is not one of its levels{did_you_mean(label, codes)}: "
                    f"{listed(codes)}",
                )
        found = [float(codes.get(label, math.nan)) for label in labels]
        return _taken(encoded, np.array(found, dtype=np.float64))

    def _categories(self, column: Any) -> Any:
        """The column as indices into its labels, in the order in which they first appear."""
        numeric = _is_number(column.type)
        texts = self._texts(_labels(column))
        if numeric and self._null_numbers:
            kind = np.dtype(np.float32 if pa.types.is_float32(column.type) else np.float64)
            gaps = [_number_label(float(x)) for x in as_held(self._null_numbers, kind)]
            texts = pc.if_else(
                pc.is_in(texts, value_set=pa.array(gaps, pa.string())),
                pa.scalar(None, pa.string()),
                texts,
            )
        return texts.dictionary_encode()


def _null_numbers(null_values: Sequence[str]) -> tuple[float, ...]:
    """Those of the texts for a missing entry that are numbers, for columns of numbers."""
    numbers = map(number_of, null_values)
    return tuple(x for x in numbers if x is not None and math.isfinite(x))


@dataclass
class _Look:
    """What a column's entries have looked like: truth values, or numbers, or else any labels."""

    truth: bool = False
    numbers: bool = True
    first: tuple[str, ...] = ()

    def add(self, labels: Any) -> None:
        """Look at further distinct labels."""
        self.first = tuple(dict.fromkeys((*self.first, *labels[:3].to_pylist())))[:3]
        try:
            if self.numbers:
                _parsed(labels)
        except _EntryError:
            self.numbers = False

    @property
    def kind(self) -> Kind:
        words = {text.lower() for text in self.first}
        if self.truth or (words and words <= {"true", "false"}):
            return "binary"
        return "real" if self.numbers else "categorical"


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
                f"column {spec.name!r}: its levels in the dataset are {listed(column.levels)}, "
                "and those named must begin with them, in this order"
            )


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
    if pa.types.is_decimal(kind):
        column = column.cast(pa.float64())
    if pa.types.is_floating(column.type):
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


def _parsed(texts: Any) -> Any:
    """Numbers from text; raises _EntryError for the first that is none."""
    try:
        return texts.cast(pa.float64())
    except pa.ArrowInvalid:
        encoded = texts.dictionary_encode()
    numbers = []
    for position, text in enumerate(encoded.dictionary.to_pylist()):
        number = number_of(text)
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


# --- sources -------------------------------------------------------------------------------------


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
        self._tables: list[Chunked] = []
        for one in data if isinstance(data, list | tuple) else [data]:
            opened = one if isinstance(one, Format) else open_table(one)
            if not isinstance(opened, Chunked):
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
        # The row of its own file with which each chunk begins.
        self._first_rows = [
            end - n
            for t in self._tables
            for n, end in zip(t.chunk_rows, itertools.accumulate(t.chunk_rows), strict=True)
        ]
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
                walk.encode(piece, first_row=self._first_rows[number], place=table.place)
            found = {column.name: column for column in walk.schema.columns}
        return Schema(tuple(found.get(spec.name) or spec.column() for spec in specs))

    def _piece(self, number: int, columns: list[str]) -> Any:
        table, i = self._places[number]
        with damage(table.place):
            check_columns(table.place, table.choose(columns), columns)
            return table.piece(i, columns)

    @property
    def chunk_nbytes(self) -> int:
        """Memory of the largest decoded chunk, in bytes, with the table it is decoded from."""
        return 2 * super().chunk_nbytes

    def read(self, i: int) -> Rows:
        """Chunk `i`; see `Source.read`."""
        place, first = self._places[i][0].place, self._first_rows[i]
        piece = self._piece(i, self._wanted)
        rows = self._encoder.encode(piece, first_row=first, place=place)
        if self._weights_column is not None:
            weights = self._encoder.weights(
                piece, self._weights_column, first_row=first, place=place
            )
            return replace(rows, weights=weights)
        return rows if self.weights is None else self._rows(i, rows.filled())

    def files(self, i: int) -> tuple[str, ...]:
        """The file of the chunk, where the table is not in memory."""
        table, piece = self._places[i]
        place = table.file(piece)
        return (place,) if Path(place).exists() else ()

    def identity(self) -> dict[str, Any]:
        """As for every array, with the files."""
        files = [table.place for table in self._tables]
        return super().identity() | {
            "files": files,
            "fingerprint": [fingerprint(place) for place in files],
        }


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

    def files(self, i: int) -> tuple[str, ...]:
        """Those of the chunk's own source, where it knows them."""
        s, j = self._places[i]
        known = getattr(self._sources[s], "files", None)
        return () if known is None else tuple(known(j))

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
        As for `Encoder`; those that are numbers count in arrays too.
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
        opened = [open_table(data)]
    elif paths:
        opened = [open_table(path) for path in data]
    else:
        table = None if _is_path(data) else table_in_memory(data)
        opened = [] if table is None else [table]
    if opened and not any(isinstance(one, ArrayTable) for one in opened):
        return TableSource(opened, schema, weights, null_values=null_values, missing=missing)
    if len(opened) > 1:
        if weights is not None:
            raise ConfigError("weights are not known of several arrays: name them file by file")
        return Concatenated(
            [open_source(path, schema, null_values=null_values, missing=missing) for path in data]
        )
    array = opened[0].source if opened and isinstance(opened[0], ArrayTable) else data
    source = _array_source(array, _array_schema(schema), weights)
    source.forbid_missing = missing == "forbid"
    source.null_numbers = _null_numbers(null_values or ())
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
        raise DataError(f"array: not rows of equal length: {first_line(error)}") from None
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
        columns.append(spec.column())
    return Schema(tuple(columns))
