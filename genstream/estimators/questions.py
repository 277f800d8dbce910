"""Questions put to rows, wherever they live, and answers in the form in which rows were given."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from genstream.errors import DataError
from genstream.families.blocks import Array
from genstream.rows import Rows
from genstream.schema import Column, Schema
from genstream.sources import DaskSource, Source
from genstream.story import Params, Story
from genstream.threads import one_blas_thread

if TYPE_CHECKING:
    import xarray

# Packages whose objects hold data that need not be in memory.
LAZY_PACKAGES = ("dask", "xarray", "zarr")


@dataclass(frozen=True)
class Data:
    """Data given to a method: where to read the rows, and how to give answers about them.

    `lazy` data may exceed memory, so answers are dask arrays; `wrap` turns an answer with the rows
    along its first axis into the type the caller expects.
    """

    source: Source
    lazy: bool = False
    wrap: Callable[[Any], Any] = lambda answer: answer


@dataclass(frozen=True, eq=False)
class Ask:
    """One question put to the rows of a chunk.

    `what` is `component` (n,), `responsibilities` (n, K) or `log_prob` (n,).
    """

    story: Story
    params: Params
    what: str

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the answers."""
        return np.dtype(np.intp if self.what == "component" else np.float64)

    @property
    def trailing(self) -> tuple[int, ...]:
        """Shape of an answer after its row axis."""
        return (self.story.n_components,) if self.what == "responsibilities" else ()

    def __call__(self, _chunk: int, rows: Rows) -> Array:
        """The answers for the rows of one chunk."""
        with one_blas_thread():
            if self.what == "log_prob":
                return self.story.log_prob(self.params, rows)
            answer: Array = getattr(self.story.infer(self.params, rows), self.what)
            return answer

    def of_chunk(self, source: Source, block_id: tuple[int, ...]) -> Array:
        """The answers for a chunk of a source, for dask."""
        return self(block_id[0], source.read(block_id[0]))

    def of_block(self, block: Array, block_info: Any) -> Array:
        """The answers for a block of a dask array, for dask."""
        first_row = block_info[0]["array-location"][0][0]
        schema = self.story.schema
        rows = Rows.of(np.asarray(block), first_row=first_row, names=schema.names)
        return self(0, rows.check(schema, first_row=first_row))

    def lazily(self, source: Source) -> Any:
        """A dask array of the answers for all rows of a source, one block a chunk."""
        import dask.array as da

        shape = self.trailing
        chunks = (tuple(source.chunk_rows), *((size,) for size in shape))
        # A name of its own each time: what a path holds may have changed since it was last asked.
        options: dict[str, Any] = {
            "chunks": chunks,
            "meta": np.empty((0,) * len(chunks), self.dtype),
            "name": f"{self.what}-{uuid.uuid4().hex}",
        }
        if not isinstance(source, DaskSource):
            return da.map_blocks(self.of_chunk, source, **options)
        # The blocks of the caller's own graph are answered where they are computed.
        if not shape:
            options["drop_axis"] = 1
        return da.map_blocks(self.of_block, source.array, **options)


@dataclass(frozen=True)
class Form:
    """The form in which rows were given to a fit, so that rows drawn can take it.

    `encoded` rows had labels or types that were turned into numbers. `package` is what their table
    came from, `types` the type of each column in Arrow's terms.
    """

    encoded: bool = False
    package: str = "numpy"
    types: Mapping[str, Any] = field(default_factory=dict)

    def decode(self, schema: Schema, values: Array) -> Any:
        """Rows of codes (n, d) in this form: a table, or an array."""
        if not self.encoded:
            return values
        arrays = [self._column(column, values[:, j]) for j, column in enumerate(schema.columns)]
        table = pa.Table.from_arrays(arrays, names=list(schema.names))
        if self.package == "pandas":
            return table.to_pandas()
        if self.package == "numpy":
            return np.column_stack([x.to_numpy(zero_copy_only=False) for x in arrays])
        if self.package == "xarray":
            import xarray

            return xarray.Dataset({name: ("row", table[name].to_numpy()) for name in schema.names})
        return table

    def _column(self, column: Column, x: Array) -> Any:
        kind = self.types.get(column.name)
        if column.kind == "real":
            known = kind is not None and pa.types.is_floating(kind)
            return pa.array(x).cast(kind, safe=False) if known else pa.array(x)
        found = pa.array(x.astype(np.int64))
        if column.levels:
            found = pa.array(column.levels, pa.string()).take(found)
        if kind is None:
            return found
        if pa.types.is_dictionary(kind):
            return found.cast(kind.value_type).dictionary_encode()
        return found.cast(kind)


@dataclass(frozen=True, eq=False)
class Labelled:
    """Gives answers the row labels of the xarray object that was asked about."""

    row: str
    coordinates: dict[Any, Any]

    @classmethod
    def like(cls, X: xarray.DataArray | xarray.Dataset) -> Labelled:
        row = X.dims[0] if isinstance(X.dims, tuple) else next(iter(X.sizes))
        labels = {name: x for name, x in X.coords.items() if x.dims == (row,)}
        return cls(str(row), labels)

    def __call__(self, answer: Any) -> xarray.DataArray:
        import xarray

        dims = (self.row, "component")[: answer.ndim]
        return xarray.DataArray(answer, dims=dims, coords=self.coordinates)


def as_table(X: Any) -> Any:
    """A table in memory as Arrow's, or None for anything else."""
    try:
        if type(X).__module__.startswith("pandas.") and hasattr(X, "columns"):
            return pa.Table.from_pandas(X, preserve_index=False)
        if hasattr(X, "__arrow_c_stream__") and hasattr(X, "columns"):
            return pa.table(X)
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise DataError(f"X: {error}") from None
    return None


def columns_of(X: Any, names: Sequence[str]) -> Any:
    """The columns of an array by the names given to them."""
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


def is_lazy(X: Any) -> bool:
    """Whether the rows of X need not be in memory."""
    package = type(X).__module__.partition(".")[0]
    return package in LAZY_PACKAGES or isinstance(X, str | os.PathLike | Source)
