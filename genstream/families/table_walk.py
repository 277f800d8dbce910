"""A walk over columns of which each distinct value is scored once.

Where the log-density of an entry is not linear in finitely many features of it (the negative
binomial's), it is still a table of its distinct values, which are few in columns of counts. A row
is then the list of its entries' places in the tables, so that a block is scored and gathered by one
sparse product each, and costly functions are evaluated once a distinct value and component, not
once an entry.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from genstream.families.blocks import BLOCK_BYTES, Array, Index, block_rows
from genstream.families.columns_walk import ConsecutiveWalk, Filling
from genstream.rows import Rows
from genstream.stats import Monoid

# Whole numbers below this are looked up; larger ones, and few of them, are searched for.
LOOKED_UP = 1 << 16


class TableKernel(Protocol):
    """Columns prepared for a pass, whose entries are scored by value."""

    params: Any
    dtype: np.dtype[Any]
    log_weights: Array

    @property
    def family(self) -> Filling: ...

    def table(self, values: Array, column: Array) -> Array:
        """(K, U) `log p` of entries `values` (U,) of the columns `column` (U,)."""

    def statistics(self, values: Array, column: Array, sums: Array) -> Monoid:
        """Statistics of entries that took the weights `sums` (K, U)."""


class Distinct:
    """The distinct values (U,) of each column of some rows, one column after another.

    Takes values (n, d) that are whole numbers from 0, and their mask (n, d) or None.
    """

    def __init__(self, values: Array, observed: NDArray[np.bool_] | None) -> None:
        d = values.shape[1]
        found, self.places = [], []
        start = 0
        for j in range(d):
            x = values[:, j] if observed is None else values[observed[:, j], j]
            place: NDArray[np.intp] | None = None
            if x.max(initial=0.0) < LOOKED_UP:
                present = np.bincount(x.astype(np.intp)) > 0
                distinct = np.flatnonzero(present).astype(np.float64)
                place = start - 1 + np.cumsum(present)
            else:
                distinct = np.unique(x).astype(np.float64)
            self.places.append((start, place))
            found.append(distinct)
            start += len(distinct)
        self.values = np.concatenate(found)
        self.column = np.repeat(np.arange(d), [len(f) for f in found])
        self.n = len(self.values)

    def rows(self, values: Array, observed: NDArray[np.bool_] | None, dtype: np.dtype[Any]) -> Any:
        """(n, U) CSR of ones where each entry's value is; a missing entry has none."""
        n, d = values.shape
        at = np.empty((n, d), dtype=np.int32)
        for j, (start, place) in enumerate(self.places):
            if place is None:
                stop = self.places[j + 1][0] if j + 1 < d else self.n
                at[:, j] = start + np.searchsorted(self.values[start:stop], values[:, j])
            elif len(place):
                # A missing entry is a 0, which need not be among the values.
                at[:, j] = place[values[:, j].astype(np.intp)]
        if observed is None:
            ends = np.arange(0, n * d + 1, d, dtype=np.int32)
            entries = at.ravel()
        else:
            ends = np.concatenate([[0], np.cumsum(observed.sum(axis=1))]).astype(np.int32)
            entries = at[observed]
        return sparse.csr_array(
            (np.ones(len(entries), dtype=dtype), entries, ends), shape=(n, self.n)
        )


class TableWalk(ConsecutiveWalk):
    """A walk whose tables are those of the chunk where they are small, else those of each block."""

    def __init__(self, kernel: TableKernel, rows: Rows) -> None:
        self.kernel = kernel
        k, d = len(kernel.log_weights), rows.n_features
        size = block_rows(d + 2 * k, kernel.dtype.itemsize)
        self.total: Monoid | None = None
        self.whole = Distinct(rows.values, rows.observed)
        if self.whole.n * k * 16 <= BLOCK_BYTES:
            self._tabulate(self.whole)
            self.of_chunk = True
        else:
            size, self.of_chunk = block_rows(2 * d * k, 8), False
            self._tabulate(Distinct(rows.values[:0], None))
        super().__init__(kernel.family, kernel.params, rows, size)

    def _tabulate(self, distinct: Distinct) -> None:
        self.distinct = distinct
        table = self.kernel.table(distinct.values, distinct.column)
        self.table = np.ascontiguousarray(table.T, dtype=self.kernel.dtype)
        self.sums = np.zeros((len(self.kernel.log_weights), distinct.n))

    def load(self, index: Index) -> None:
        super().load(index)
        if not self.of_chunk:
            self._settle()
            self._tabulate(Distinct(self.values, self.observed))
        self.entries = self.distinct.rows(self.values, self.observed, self.kernel.dtype)

    def score(self) -> Array:
        log_p = np.ascontiguousarray((self.entries @ self.table).T)
        log_p += self.kernel.log_weights[:, None].astype(log_p.dtype)
        return log_p

    def base(self) -> Array | None:
        return None

    def gather(self, resp: Array) -> None:
        self.sums += (self.entries.T @ np.ascontiguousarray(resp.T)).T

    def _settle(self) -> None:
        """Add up what the tables at hand have gathered."""
        stats = self.kernel.statistics(self.distinct.values, self.distinct.column, self.sums)
        self.total = stats if self.total is None else self.total.merge(stats)

    def close(self) -> Monoid:
        self._settle()
        assert self.total is not None
        return self.total
