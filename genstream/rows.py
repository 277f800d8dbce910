"""Rows: a piece of the data with its gaps and weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse

from genstream import compiled
from genstream.errors import DataError
from genstream.schema import Column, Schema

Array = NDArray[Any]

# The largest magnitude an entry may have, so that squares and sums of them are finite.
LARGEST = 1e150
# Rows whose values are looked through at a time.
CHECKED = 1024


def pick(values: Array, index: slice | Array) -> Array:
    """Some of the rows of an array: a view by a slice, a copy by positions or a mask.

    NumPy copies short rows ten times as fast by `take` as by positions in brackets, but would
    first copy all of an array that is not contiguous.
    """
    if isinstance(index, slice) or sparse.issparse(values) or not values.flags.c_contiguous:
        picked: Array = values[index]
        return picked
    chosen = np.asarray(index)
    return values.take(np.flatnonzero(chosen) if chosen.dtype == bool else chosen, axis=0)


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of data with an observed mask and weights.

    Parameters
    ----------
    values
        (n, d) float32 or float64; zero where an entry is missing. Or a `scipy.sparse.csr_array`
        in canonical form, of which every entry is observed: what is not stored is 0.
    observed
        (n, d) bool, or None where every entry is observed.
    weights
        (n,) float64, not negative, or None where every row weighs 1.
    """

    values: Array
    observed: NDArray[np.bool_] | None = None
    weights: NDArray[np.float64] | None = None

    @classmethod
    def of(
        cls,
        values: ArrayLike,
        weights: ArrayLike | None = None,
        *,
        first_row: int = 0,
        names: Sequence[str] | None = None,
    ) -> Rows:
        """Rows from an array in which NaN marks a missing entry.

        `values` is (n, d) and left untouched; `weights` is (n,). A sparse array of any format is
        kept as CSR, and cannot have gaps. `first_row` and `names` only serve error messages. Raises
        DataError on a wrong shape, an entry that is infinite or beyond 1e150, a NaN among sparse
        values, or a weight that is negative or not finite, naming the first row and column.
        """
        given: Any = values
        if sparse.issparse(given):
            stored = _checked_sparse(given, first_row, names)
            return cls(stored, None, _checked_weights(weights, stored.shape[0], first_row))
        array = np.asarray(values)
        if array.dtype.kind == "c":
            raise DataError("Complex data not supported: give real and imaginary parts as columns")
        if array.dtype.kind not in "biufO":
            # NumPy would read dates as nanoseconds, and a missing date as a very early one.
            raise DataError(f"values of type {array.dtype} are not numbers")
        if array.dtype not in (np.float32, np.float64):
            # What float32 holds exactly, such as bytes, takes no more room than it needs.
            try:
                array = array.astype(_exact(array.dtype))
            except (TypeError, ValueError, OverflowError) as error:
                raise DataError(f"values of type {array.dtype} are not numbers: {error}") from None
        if array.ndim != 2:
            raise DataError(
                f"expected a 2D array of rows and columns, got {array.ndim} dimensions: "
                "Reshape your data with reshape(-1, 1) for a single feature"
            )
        observed: NDArray[np.bool_] | None = None
        if not compiled.within(array, LARGEST):
            array, observed = _gaps_apart(array, first_row, names)
        return cls(array, observed, _checked_weights(weights, len(array), first_row))

    @property
    def n_rows(self) -> int:
        return int(self.values.shape[0])

    @property
    def n_features(self) -> int:
        return int(self.values.shape[1])

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes."""
        arrays = [self.values, self.observed, self.weights]
        if self.is_sparse:
            stored: Any = self.values
            arrays[:1] = [stored.data, stored.indices, stored.indptr]
        return sum(a.nbytes for a in arrays if a is not None)

    @property
    def is_sparse(self) -> bool:
        """Whether `values` is sparse."""
        return bool(sparse.issparse(self.values))

    def dense(self) -> Rows:
        """The same rows with values that are an array."""
        if not self.is_sparse:
            return self
        stored: Any = self.values
        return Rows(stored.toarray(), None, self.weights)

    def __getitem__(self, index: slice | Array) -> Rows:
        """Some of the rows: a slice gives views where values are an array, an index or mask array
        copies.
        """
        return Rows(
            self.values[index] if self.is_sparse else pick(self.values, index),
            None if self.observed is None else pick(self.observed, index),
            None if self.weights is None else self.weights[index],
        )

    def select(self, columns: Sequence[int]) -> Rows:
        """The same rows with some of the columns, by position."""
        index = list(columns)
        observed = None if self.observed is None else self.observed[:, index]
        return Rows(self.values[:, index], observed, self.weights)

    def filled(self, fill: float = np.nan) -> Array:
        """The (n, d) array with missing entries set to `fill` (NaN)."""
        if self.observed is None:
            return self.dense().values
        return np.where(self.observed, self.values, self.values.dtype.type(fill))

    @property
    def row_weights(self) -> NDArray[np.float64]:
        """(n,) weights, ones where none were given."""
        return np.ones(self.n_rows) if self.weights is None else self.weights

    @staticmethod
    def concatenate(pieces: Iterable[Rows]) -> Rows:
        """All pieces one after another; they must have the same columns. Sparse where all are."""
        parts = list(pieces)
        if len(parts) == 1:
            return parts[0]
        if all(p.is_sparse for p in parts):
            stored: Any = [p.values for p in parts]
            stack: Any = sparse.vstack(stored, format="csr")
        else:
            parts = [p.dense() for p in parts]
            stack = np.concatenate([p.values for p in parts])
        gaps = any(p.observed is not None for p in parts)
        weighted = any(p.weights is not None for p in parts)
        return Rows(
            stack,
            np.concatenate([p.is_observed for p in parts]) if gaps else None,
            np.concatenate([p.row_weights for p in parts]) if weighted else None,
        )

    @property
    def is_observed(self) -> NDArray[np.bool_]:
        """(n, d) mask, all true where nothing is missing; not to be written to."""
        if self.is_sparse:
            return np.broadcast_to(np.True_, self.values.shape)
        if self.observed is None:
            return np.ones(self.values.shape, dtype=bool)
        return self.observed

    def check(self, schema: Schema, *, first_row: int = 0) -> Rows:
        """These rows, once they are known to be possible under `schema`.

        Raises DataError naming the first row and column where a binary entry is not 0 or 1, a
        count is negative or fractional, or a category is out of its levels.
        """
        if self.n_features != schema.n_features:
            raise DataError(
                f"the data have {self.n_features} columns, the schema {schema.n_features}"
            )
        if self.is_sparse:
            self._check_sparse(schema, first_row)
            return self
        if self._whole(schema):
            return self
        for j, column in enumerate(schema.columns):
            if column.kind == "real":
                continue
            x = self.values[:, j]
            most, allowed = _allowed(column)
            wrong = (x < 0) | (x != np.floor(x)) | (x > most)
            if self.observed is not None:
                wrong &= self.observed[:, j]
            if wrong.any():
                i = int(np.argmax(wrong))
                raise _impossible(first_row + i, column, x[i], allowed)
        return self

    def _whole(self, schema: Schema) -> bool:
        """Whether all that is not real is plainly possible, gaps that hold anything included.

        Read row by row, as values lie in memory: column by column takes ten times as long.
        """
        most = np.array([_allowed(column)[0] for column in schema.columns])
        real = np.isnan(most)
        if real.all():
            return True
        alike = bool((most == most[0]).all())
        for start in range(0, self.n_rows, CHECKED):
            block = self.values[start : start + CHECKED]
            if alike:
                fits = block.min() >= 0 and block.max() <= most[0]
                if not (fits and (np.floor(block) == block).all()):
                    return False
                continue
            fits = (block.min(axis=0) >= 0) & (block.max(axis=0) <= most)
            if not (fits | real).all():
                return False
            if not ((np.floor(block) == block).all(axis=0) | real).all():
                return False
        return True

    def _check_sparse(self, schema: Schema, first_row: int) -> None:
        stored: Any = self.values
        most = np.array([_allowed(column)[0] for column in schema.columns])[stored.indices]
        x = stored.data
        wrong = ((x < 0) | (x != np.floor(x)) | (x > most)) & ~np.isnan(most)
        if wrong.any():
            at = int(np.argmax(wrong))
            i = int(np.searchsorted(stored.indptr, at, side="right")) - 1
            column = schema.columns[stored.indices[at]]
            raise _impossible(first_row + i, column, x[at], _allowed(column)[1])


def _allowed(column: Column) -> tuple[float, str]:
    """The largest whole number a column takes, NaN for a real one, and what it takes in words."""
    if column.kind == "real":
        return np.nan, "any number"
    if column.kind == "binary":
        return 1.0, "0 or 1"
    if column.kind == "categorical":
        last = column.n_levels - 1
        return float(last), f"a level's position, 0 to {last}"
    return np.inf, "0, 1, 2, ..."


def _impossible(row: int, column: Column, x: float, allowed: str) -> DataError:
    return DataError(
        f"row {row}, column {column.name!r}: {x:g} is not possible in a "
        f"{column.kind} column, which takes {allowed}"
    )


def _gaps_apart(
    array: Array, first_row: int, names: Sequence[str] | None
) -> tuple[Array, NDArray[np.bool_] | None]:
    """Values with 0 for NaN, and which entries were observed; see `Rows.of` for what it raises."""
    parted = compiled.parted(array, LARGEST)
    if parted is not None:
        return parted
    observed: NDArray[np.bool_] | None = None
    finite = np.isfinite(array)
    if not finite.all():
        infinite = np.isinf(array)
        if infinite.any():
            i, j = np.argwhere(infinite)[0]
            column = repr(names[j]) if names is not None else str(j)
            raise DataError(
                f"row {first_row + i}, column {column} is infinite: "
                "mark a missing entry with NaN, or clip the value"
            )
        observed = finite
        array = np.where(finite, array, array.dtype.type(0))
    if max(-float(array.min()), float(array.max())) > LARGEST:
        i, j = np.argwhere(np.abs(array) > LARGEST)[0]
        raise DataError(
            f"row {first_row + i}, column {repr(names[j]) if names is not None else j}: "
            f"{array[i, j]:g} is too large to be squared: give the column another unit"
        )
    return array, observed


def _exact(dtype: np.dtype[Any]) -> type[np.floating[Any]]:
    """The smallest of float32 and float64 that holds numbers of a type exactly, if any does."""
    exact = dtype.kind != "O" and np.can_cast(dtype, np.float32)
    return np.float32 if exact else np.float64


def _checked_sparse(values: Any, first_row: int, names: Sequence[str] | None) -> Any:
    """A sparse array as CSR of float32 or float64, sorted and without doubles."""
    if values.dtype.kind not in "biuf":
        raise DataError(f"values of type {values.dtype} are not numbers")
    if values.ndim != 2:
        raise DataError(f"expected a 2D array of rows and columns, got {values.ndim} dimensions")
    stored = sparse.csr_array(values)
    if stored.dtype not in (np.float32, np.float64):
        stored = stored.astype(_exact(stored.dtype))
    if not stored.has_canonical_format:
        if stored is values or np.shares_memory(stored.data, values.data):
            stored = stored.copy()
        stored.sum_duplicates()
    wrong = ~(np.abs(stored.data) <= LARGEST)
    if wrong.any():
        at = int(np.argmax(wrong))
        i, j = int(np.searchsorted(stored.indptr, at, side="right")) - 1, stored.indices[at]
        column = repr(names[j]) if names is not None else str(j)
        advice = "give the column another unit"
        if np.isinf(stored.data[at]):
            advice = "clip the value"
        if np.isnan(stored.data[at]):
            advice = "sparse values cannot have gaps: leave a 0 out, or give an array"
        raise DataError(f"row {first_row + i}, column {column} is {stored.data[at]:g}: {advice}")
    return stored


def _checked_weights(
    weights: ArrayLike | None, n_rows: int, first_row: int
) -> NDArray[np.float64] | None:
    if weights is None:
        return None
    array = np.asarray(weights, dtype=np.float64)
    if array.ndim == 0:
        array = np.full(n_rows, float(array))
    if array.shape != (n_rows,):
        raise DataError(
            f"sample_weight.shape == {array.shape}, expected {(n_rows,)}: one weight a row"
        )
    wrong = ~(np.isfinite(array) & (array >= 0))
    if wrong.any():
        i = int(np.argmax(wrong))
        raise DataError(
            f"row {first_row + i} has weight {array[i]:g}: weights must be finite and not negative"
        )
    return array
