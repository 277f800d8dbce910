"""Walks over independent columns: consecutive blocks, gaps masked exactly.

Where columns are independent given the component, a missing entry is a factor left out and
its value given the rest of the row is a draw from its own column. `ConsecutiveWalk` holds what all
such walks share; `LinearWalk` is that of families that are linear in features of single columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from genstream import compiled
from genstream.families.blocks import Array, Index, Linear, Pivot, block_rows, slices
from genstream.rows import Rows, pick
from genstream.stats import Monoid


class Filling(Protocol):
    """A family of columns that do not depend on one another given the component."""

    def fill(self, params: Any, resp: Array, rng: np.random.Generator | None = None) -> Array:
        """(n, d) values of columns under responsibilities (K, n)."""


def log_prob_given(family: Any, params: Any, x: Array, given: Array) -> Array:
    """(K,) `log p(x_given | k)` in float64, of the columns `given` (d,) of one row (d,)."""
    columns = np.flatnonzero(given)
    part, known = family.with_dtype("float64").marginal(params, columns)
    n_components = len(next(known.leaves())[2])
    walk = part.prepare(known, np.zeros(n_components)).walk(Rows(x[None, columns]))
    walk.load(slice(0, 1))
    base = walk.base()
    return np.asarray(walk.score()[:, 0] + (0.0 if base is None else base[0]))


class ConsecutiveWalk:
    """A walk over one chunk in consecutive blocks.

    Parameters
    ----------
    family, params
        What fills gaps: given the component, a missing entry does not depend on observed ones.
    rows
        The chunk.
    size
        Rows in a block.
    """

    def __init__(self, family: Filling, params: Any, rows: Rows, size: int) -> None:
        self.family, self.params, self.rows, self.size = family, params, rows, size
        self.values = rows.values[:0]
        self.observed: NDArray[np.bool_] | None = None

    def blocks(self) -> Iterator[Index]:
        # Rows with nothing observed say nothing: they are in no block.
        useful: Array | None = None
        if self.rows.observed is not None:
            some = self.rows.observed.any(axis=1)
            if not some.all():
                useful = np.flatnonzero(some)
        for piece in slices(self.rows.n_rows if useful is None else len(useful), self.size):
            index = piece if useful is None else useful[piece]
            self.load(index)
            yield index

    def load(self, index: Index) -> None:
        self.values = pick(self.rows.values, index)
        observed = self.rows.observed
        self.observed = None if observed is None else observed[index]

    def complete(self, resp: Array, rng: np.random.Generator | None = None) -> Array:
        """(n, d) the block's rows with gaps filled from responsibilities (K, n) alone."""
        values = self.values.astype(np.float64)
        if self.observed is not None:
            gaps = np.flatnonzero(~self.observed.all(axis=1))
            filled = self.family.fill(self.params, resp[:, gaps], rng)
            values[gaps] = np.where(self.observed[gaps], values[gaps], filled)
        return values


@dataclass(frozen=True)
class FastFeatures:
    """Features of complete rows, all of real columns, in compiled loops: `[1, y, y^2]` in a pivot's
    coordinates, or `[1, y, |y|^2]` if `together`.
    """

    pivot: Pivot
    together: bool

    def build(self, values: Array, out: Array) -> Array:
        """(p, n) features of rows (n, d) in a part of `out`."""
        return compiled.squares(self.pivot, self.together, values, out)


class LinearKernel(Protocol):
    """Independent columns prepared for a pass, linear in features of single columns.

    The first feature is 1 and takes `log_weights`; the d last ones of a block with gaps are 1 where
    a column is observed and take what an observed entry adds whatever its value. One that can build
    the features of complete blocks in compiled loops has `fast_features`, or None.
    """

    params: Any
    dtype: np.dtype[Any]
    n_components: int

    @property
    def family(self) -> Filling: ...

    @property
    def by_row(self) -> bool:
        """Whether features are hardly more than the values, so that they are best left in the order
        of these, row by row, which a matrix product takes as well.
        """

    def linear(self, gaps: bool) -> Linear:
        """Natural parameters of the features of complete blocks, or of blocks with gaps."""

    def features(self, values: Array, observed: Array | None, out: Array) -> Array:
        """(p, n) features of rows (n, d), whose mask is (n, d) or None, in a part of `out`."""

    def direct(self, k: int, values: Array, observed: Array | None, features: Array) -> Array:
        """(n,) scores of a component whose linear form would lose too many digits."""

    def base(self, values: Array, observed: Array | None) -> Array | None:
        """(n,) the part of the log-density that no component changes, or None."""

    def statistics(self, sums: Array, gaps: bool) -> Monoid:
        """Statistics from the features' sums (K, p)."""


class LevelledKernel(LinearKernel, Protocol):
    """A kernel of columns of which some are categorical."""

    @property
    def level_columns(self) -> NDArray[np.intp]:
        """(c,) positions of the categorical columns."""

    @property
    def level_sizes(self) -> NDArray[np.intp]:
        """(c,) how many levels each has."""

    @property
    def level_slopes(self) -> Array:
        """(K, L) what an entry of each level adds to a score."""

    @property
    def without_levels(self) -> LinearKernel:
        """The kernel of the same rows whose features are not those of levels."""

    def statistics(self, sums: Array, gaps: bool, levels: Array | None = None) -> Monoid:
        """Statistics from the features' sums (K, p), those of levels (K, L) apart if given."""


class LinearWalk(ConsecutiveWalk):
    """A walk whose blocks are scored and gathered by one matrix product each.

    All blocks are alike, so that the walk itself stands for the one at hand where a product of
    families asks for it.
    """

    def __init__(self, kernel: LinearKernel, rows: Rows) -> None:
        self.kernel = kernel
        self.gaps = rows.observed is not None
        # What builds features of complete blocks in compiled loops, if they can be.
        self.fast: FastFeatures | None = None
        if not self.gaps and compiled.pays_for(rows.values, kernel.n_components):
            self.fast = getattr(kernel, "fast_features", None)
        self.linear = kernel.linear(self.gaps)
        self.width = self.linear.eta.shape[1]
        size = block_rows(
            self.width + kernel.n_components, kernel.dtype.itemsize, self.fast is not None
        )
        size = min(size, max(1, rows.n_rows))
        super().__init__(kernel.family, kernel.params, rows, size)
        self.sums = np.zeros((kernel.n_components, self.width))
        self._allocate(size)

    def _allocate(self, n_rows: int) -> None:
        shape = (n_rows, self.width) if self.kernel.by_row else (self.width, n_rows)
        buffer = np.empty(shape, dtype=self.kernel.dtype)
        self.build_in(buffer.T if self.kernel.by_row else buffer)

    def build_in(self, buffer: Array) -> None:
        self._buffer = buffer
        shape = (self.kernel.n_components, buffer.shape[1])
        self._log_p = np.empty(shape, dtype=self.kernel.dtype)

    @property
    def linear_block(self) -> LinearWalk:
        return self

    def load(self, index: Index) -> None:
        super().load(index)
        if len(self.values) > self._buffer.shape[1]:
            self._allocate(len(self.values))
        self._exact: Array | None = None
        if self.fast is not None and self._buffer.flags.c_contiguous:
            self.features = self.fast.build(self.values, self._buffer)
        else:
            self.features = self.kernel.features(self.values, self.observed, self._buffer)

    def swept(self, sum_r: Array, likeliest: bool) -> tuple[Index, Array] | None:
        """As `SweptWalk.swept`."""
        if self.fast is None or not self._buffer.flags.c_contiguous:
            return None
        value = compiled.swept(
            "together" if self.fast.together else "squares",
            self.fast.pivot,
            self.linear,
            self.rows.values,
            self.rows.weights,
            (self._buffer, self._log_p),
            sum_r,
            self.sums,
            likeliest,
        )
        return None if value is None else (slice(None), value)

    def exact(self) -> Array:
        """Features in float64."""
        if self.features.dtype == np.float64:
            return self.features
        if self._exact is None:
            self._exact = self.kernel.features(
                self.values, self.observed, np.empty(self.features.shape)
            )
        return self._exact

    def score(self) -> Array:
        log_p = self.linear.score(self.features, self.exact, self._log_p)
        for k in self.linear.direct:
            log_p[k] = self.kernel.direct(int(k), self.values, self.observed, self.exact())
        return log_p

    def base(self) -> Array | None:
        return self.kernel.base(self.values, self.observed)

    def gather(self, resp: Array) -> None:
        self.add(self.linear.gather(self.features, self.exact, resp))

    def add(self, sums: Array) -> None:
        """Sums (K, p) of `r T(x)` over a block, in the order of `features`."""
        self.sums += sums

    def close(self) -> Monoid:
        return self.kernel.statistics(self.sums, self.gaps)
