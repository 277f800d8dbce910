"""The forms in which rows are given: how rows drawn take them, and how gaps are filled in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from scipy.sparse import issparse

from genstream.errors import ConfigError, DataError
from genstream.estimators.questions import Labelled, unchanged
from genstream.families.blocks import Array
from genstream.schema import Column, Schema
from genstream.sources import NumpySource, Source
from genstream.tables import TableSource


@dataclass(frozen=True)
class Form:
    """The form in which rows were given to a fit, so that rows drawn can take it.

    `encoded` rows had labels or types that were turned into numbers. `package` is what their table
    came from, `types` the type of each column in Arrow's terms.
    """

    encoded: bool = False
    package: str = "numpy"
    types: Mapping[str, Any] = field(default_factory=dict)

    def of(self, names: Sequence[str]) -> Form:
        """The same form with some of the columns."""
        return replace(self, types={n: kind for n, kind in self.types.items() if n in names})

    def decode(self, schema: Schema, values: Array) -> Any:
        """Rows of codes (n, d) in this form: a table, or an array."""
        if not self.encoded:
            return values
        arrays = [
            decoded(column, values[:, j], self.types.get(column.name))
            for j, column in enumerate(schema.columns)
        ]
        table = pa.Table.from_arrays(arrays, names=list(schema.names))
        if self.package == "pandas":
            return table.to_pandas()
        if self.package == "numpy":
            return np.column_stack([x.to_numpy(zero_copy_only=False) for x in arrays])
        if self.package == "xarray":
            import xarray

            return xarray.Dataset({name: ("row", table[name].to_numpy()) for name in schema.names})
        return table


def decoded(column: Column, x: Array, kind: Any = None) -> Any:
    """Codes (n,) as an Arrow array of what they stand for, of the type `kind` if it is known."""
    if kind is not None and pa.types.is_dictionary(kind):
        return decoded(column, x, kind.value_type).dictionary_encode()
    whole = kind is not None and pa.types.is_integer(kind)
    if column.levels or column.kind == "binary":
        found = pa.array(x.astype(np.int64))
        if column.levels:
            found = pa.array(column.levels, pa.string()).take(found)
    elif column.kind == "real":
        found = pa.array(np.rint(x) if whole else x)
    else:
        # The mean of a count need not be one.
        fractions = kind is not None and pa.types.is_floating(kind)
        found = pa.array(x if fractions else np.rint(x).astype(np.int64))
    if kind is None or (column.kind == "real" and not whole and not pa.types.is_floating(kind)):
        return found
    return found.cast(kind, safe=False)


@dataclass(frozen=True, eq=False)
class FilledArray:
    """Gives filled rows the floating type of the array in memory that had the gaps."""

    dtype: Any

    def __call__(self, filled: Array, schema: Schema) -> Array:  # noqa: ARG002
        return filled.astype(self.dtype, copy=False)


@dataclass(frozen=True, eq=False)
class FilledColumns:
    """Gives filled rows the form of an array in memory whose columns hold labels."""

    form: Form

    def __call__(self, filled: Array, schema: Schema) -> Any:
        return replace(self.form, package="numpy").decode(schema, filled)


@dataclass(frozen=True, eq=False)
class FilledTable:
    """Fills the gaps of a table in memory: see `fill_table`.

    `source` holds the rows of the model's columns, which `names` tells; None stands for all columns
    of the table, in their order.
    """

    X: Any
    source: NumpySource
    names: Sequence[str] | None = None

    def __call__(self, filled: Array, schema: Schema) -> Any:
        names = as_table(self.X).schema.names if self.names is None else self.names
        return fill_table(self.X, np.isnan(self.source.array), names, filled, schema)


def fill_table(
    X: Any, gaps: NDArray[np.bool_], names: Sequence[str], filled: Array, schema: Schema
) -> Any:
    """A table with its gaps filled: what was there stays, and so do types and row labels.

    `names` are those of the model's columns in the table, `gaps` (n, d) where these are missing,
    and `filled` (n, d) their rows in codes. Columns the model does not know are left as they are.
    Tables of other packages than pandas become Arrow's.
    """
    pandas = type(X).__module__.partition(".")[0] == "pandas"
    table = as_table(X)
    out = X.copy() if pandas else table
    for j, (name, column) in enumerate(zip(names, schema.columns, strict=True)):
        if not gaps[:, j].any():
            continue
        i = table.schema.names.index(name)
        kind = table.schema.field(i).type
        plain = kind.value_type if pa.types.is_dictionary(kind) else kind
        fresh = decoded(column, filled[:, j], plain)
        if pa.types.is_null(plain):
            plain = fresh.type
        before = table.column(i).combine_chunks().cast(plain)
        whole = pc.if_else(pa.array(gaps[:, j]), fresh.cast(plain), before)
        if pandas:
            series = whole.to_pandas()
            series.index = X.index
            out.isetitem(i, series.astype(X.dtypes.iloc[i]))
        else:
            whole = whole.dictionary_encode() if pa.types.is_dictionary(kind) else whole
            out = out.set_column(i, name, whole)
    return out.combine_chunks().to_batches()[0] if isinstance(X, pa.RecordBatch) else out


@dataclass(frozen=True, eq=False)
class FilledXarray:
    """Gives filled rows dimensions, coordinates and attributes of an xarray object."""

    X: Any

    def __call__(self, filled: Any, schema: Schema) -> Any:
        X = self.X
        names = list(schema.names)
        if hasattr(X, "data_vars"):
            row = Labelled.like(X).row
            variables = {
                name: (row, _labels_of(schema.columns[j], filled[:, j]), X[name].attrs)
                for j, name in enumerate(names)
            }
            return X.assign(variables)
        labels = X.coords.get(X.dims[1])
        if labels is not None and labels.dtype.kind in "UOT":
            found = [str(label) for label in labels.values]
            X = X.isel({X.dims[1]: [found.index(name) for name in names]})
        return X.copy(data=filled)


def _labels_of(column: Column, x: Any) -> Any:
    """A column (n,) of codes as what they stand for, lazy where it is."""
    if not column.levels:
        return x
    levels = np.array(column.levels, dtype=object)
    if isinstance(x, np.ndarray):
        return levels[x.astype(np.intp)]
    return x.map_blocks(lambda codes: levels[codes.astype(np.intp)], dtype=object)


@dataclass(frozen=True, eq=False)
class FilledFile:
    """Gives the filled rows of files of tables as a dask DataFrame, a partition a chunk."""

    def __call__(self, filled: Any, schema: Schema) -> Any:
        try:
            import dask.dataframe as dd
        except ImportError:
            raise ConfigError(
                "a table in a file is filled as a dask DataFrame, which needs pandas: install it"
            ) from None
        from dask.delayed import delayed

        form = Form(encoded=True, package="pandas")
        meta = form.decode(schema, np.zeros((1, schema.n_features))).iloc[:0]
        tables = [delayed(form.decode)(schema, block[0]) for block in filled.to_delayed()]
        return dd.from_delayed(tables, meta=meta, verify_meta=False)


@dataclass(frozen=True, eq=False)
class FilledPartitions:
    """Fills a dask DataFrame partition by partition."""

    X: Any
    names: Sequence[str]

    def __call__(self, filled: Any, schema: Schema) -> Any:
        import dask.dataframe as dd
        from dask.delayed import delayed

        def put(table: Any, block: Array) -> Any:
            gaps = table[list(self.names)].isna().to_numpy()
            return fill_table(table, gaps, self.names, block, schema)

        parts = zip(self.X.to_delayed(), (block[0] for block in filled.to_delayed()), strict=True)
        tables = [delayed(put)(table, block) for table, block in parts]
        divisions = self.X.divisions if self.X.known_divisions else None
        return dd.from_delayed(tables, meta=self.X._meta, divisions=divisions)


def refilled(X: Any, source: Source) -> Callable[[Any, Schema], Any]:
    """How the filled rows of lazy data take the form of these: see `Data.refill`."""
    if type(X).__module__.partition(".")[0] == "xarray":
        return FilledXarray(X)
    return FilledFile() if isinstance(source, TableSource) else unchanged


def is_table(X: Any) -> bool:
    """Whether X is a table in memory."""
    pandas = type(X).__module__.partition(".")[0] == "pandas"
    return hasattr(X, "columns") and (pandas or hasattr(X, "__arrow_c_stream__"))


def as_table(X: Any) -> Any:
    """A table in memory as Arrow's."""
    try:
        if type(X).__module__.partition(".")[0] == "pandas":
            return pa.Table.from_pandas(X, preserve_index=False)
        return pa.table(X)
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise DataError(f"X: {error}") from None


def columns_of(X: Any, names: Sequence[str]) -> Any:
    """The columns of an array by the names given to them."""
    if issparse(X):
        raise DataError("X: sparse rows need columns that are a Schema, in place of a mapping")
    array = np.asarray(X)
    if array.ndim != 2 or array.shape[1] != len(names):
        raise DataError(
            f"X has shape {array.shape}, but {len(names)} columns are described: {', '.join(names)}"
        )
    try:
        columns = [pa.array(column, from_pandas=True) for column in array.T]
    except pa.ArrowException as error:
        raise DataError(f"X: {error}") from None
    return pa.Table.from_arrays(columns, names=list(names))


def is_numeric(kind: Any) -> bool:
    """Whether a column of this Arrow type holds numbers."""
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))
