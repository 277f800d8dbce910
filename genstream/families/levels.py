"""Levels of categorical columns, looked up for all rows that have the same ones.

As features, the L levels of a row's c categorical columns are L zeros and ones of which c say
everything: a matrix product multiplies by all of them. Here a chunk's rows are sorted by the
combination of their levels, of which there are few beside rows, so that rows of one combination
come in runs. What a component's table (K, L) of log-probabilities says of a run is looked up once
and added to all its scores, and a run's responsibilities are summed once and added to the sums of
its levels.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from genstream import compiled
from genstream.families.blocks import Array, Index, slices
from genstream.families.columns_walk import LevelledKernel, LinearWalk
from genstream.rows import Rows
from genstream.stats import Monoid

# Nanoseconds, as measured: to sort and fetch a row; of a row and component in a run; of a run and
# component, and of each of its columns. Beside these, to fill in a feature of a row, and of the two
# matrix products a float32 of a feature, row and component. What is chosen by them is only a matter
# of time.
SORT, ROW, RUN, COLUMN = 60.0, 0.5, 4.0, 1.5
FEATURE, PRODUCT = 0.6, 0.06


class Combinations:
    """The combinations of levels among some rows.

    Takes values (n, c) of categorical columns, their mask or None, and how many levels each has.
    `places` (u, c) are the positions, among all L levels, of those of each of u combinations, L for
    a missing entry; `of_row` (n,) is the combination of each row, and `order` (n,) lists the rows
    combination after combination, those of one in their own order.
    """

    def __init__(
        self, values: Array, observed: NDArray[np.bool_] | None, sizes: NDArray[np.intp]
    ) -> None:
        with np.errstate(invalid="ignore"):
            codes = values.astype(np.int32)
        # What is no level says nothing, as in a comparison with each.
        known = (codes == values) & (codes >= 0) & (codes < sizes)
        if observed is not None:
            known &= observed
        if not known.all():
            codes = np.where(known, codes, sizes.astype(np.int32))
        words: list[Array] = []
        room = 0
        for j, size in enumerate(sizes + 1):
            # As many columns as fit in 16 bits are one digit: such are sorted without comparisons.
            if words and room * size <= 1 << 16:
                words[-1] = words[-1] * int(size) + codes[:, j]
                room *= int(size)
            else:
                words.append(codes[:, j])
                room = int(size)
        digits = [w.astype(np.uint16) if w.max(initial=0) < 1 << 16 else w for w in words]
        self.order = np.lexsort(digits)
        n = len(codes)
        other = np.zeros(n, dtype=bool)
        for digit in digits:
            sorted_digit = digit[self.order]
            other[1:] |= sorted_digit[1:] != sorted_digit[:-1]
        other[:1] = True
        self.of_row = np.empty(n, dtype=np.int32)
        self.of_row[self.order] = np.cumsum(other) - 1
        distinct = codes[self.order[other]]
        missing = distinct == sizes
        self.places = distinct + (np.cumsum(sizes) - sizes)
        self.places[missing] = sizes.sum()

    def runs(self, index: Index) -> tuple[Array, Array]:
        """(r, c) places of each run of rows with one combination among some rows, in their order,
        and the runs' edges (r + 1,).
        """
        own = self.of_row[index]
        n = len(own)
        first = np.append(np.zeros(min(1, n), dtype=np.intp), 1 + np.flatnonzero(np.diff(own)))
        return self.places[own[first]], np.append(first, n)


def look_up(kernel: LevelledKernel, rows: Rows) -> LookUpWalk | None:
    """A walk over a chunk that looks levels up, where that is quicker than features of them.

    What decides are the chunk and the shapes alone, so that its sums are always the same.
    """
    sizes = kernel.level_sizes
    k, n, n_levels = kernel.n_components, rows.n_rows, int(sizes.sum())
    wide = kernel.dtype.itemsize / 4
    features = n_levels * (FEATURE + k * PRODUCT * wide)
    if n * k < compiled.SMALL or SORT + k * ROW * wide >= features:
        return None
    observed = None if rows.observed is None else rows.observed[:, kernel.level_columns]
    found = Combinations(rows.values[:, kernel.level_columns], observed, sizes)
    runs_of_row = len(found.places) / n * (RUN + COLUMN * len(sizes))
    if SORT + k * (ROW + runs_of_row) * wide >= features:
        return None
    return LookUpWalk(kernel, rows, found)


class LookUpWalk(LinearWalk):
    """A walk over rows sorted by the combination of their levels.

    Levels are not among its features: who scores those adds what `look_up` does, and who gathers
    them what `take_in` does.
    """

    def __init__(self, kernel: LevelledKernel, rows: Rows, found: Combinations) -> None:
        super().__init__(kernel.without_levels, rows)
        self.found, self.levelled = found, kernel
        # What is missing says nothing: the last column stays zero.
        self.table = np.pad(kernel.level_slopes, ((0, 0), (0, 1))).astype(kernel.dtype)
        self.level_sums = np.zeros(self.table.shape)
        self.compiled = compiled.pays_for(rows.values, kernel.n_components)

    def blocks(self) -> Iterator[Index]:
        order = self.found.order
        if self.rows.observed is not None:
            order = order[self.rows.observed[order].any(axis=1)]
        for piece in slices(len(order), self.size):
            self.load(order[piece])
            yield order[piece]

    def load(self, index: Index) -> None:
        super().load(index)
        self.levels, self.edges = self.found.runs(index)

    def score(self) -> Array:
        log_p = super().score()
        self.look_up(log_p)
        return log_p

    def gather(self, resp: Array) -> None:
        super().gather(resp)
        self.take_in(resp)

    def look_up(self, log_p: Array) -> None:
        """Add to scores (K, n) of the block at hand what its levels add."""
        if self.compiled and log_p.dtype == self.table.dtype:
            _loops().add_levels(log_p, self.table, self.levels, self.edges)
            return
        added = self.table[:, self.levels].sum(axis=2)
        for r, (first, last) in enumerate(zip(self.edges[:-1], self.edges[1:], strict=True)):
            log_p[:, first:last] += added[:, r : r + 1]

    def take_in(self, resp: Array) -> None:
        """Add to the sums of levels those of the block's weights (K, n)."""
        if self.compiled:
            _loops().sum_levels(resp, self.level_sums, self.levels, self.edges)
            return
        if not len(self.levels):
            return
        sums = np.add.reduceat(resp, self.edges[:-1], axis=1)
        hit = np.zeros((len(self.levels), self.table.shape[1]))
        hit[np.arange(len(self.levels))[:, None], self.levels] = 1.0
        # Several entries may be missing: each counts, though none of them is of any use.
        self.level_sums += sums @ hit

    def close(self) -> Monoid:
        return self.levelled.statistics(self.sums, self.gaps, self.level_sums[:, :-1])


@functools.cache
def _loops() -> ModuleType:
    return importlib.import_module("genstream.families.level_loops")
