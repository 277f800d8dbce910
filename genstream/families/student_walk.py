"""The E-step of Student-t components: that of Gaussians, and the scale of each row.

Where columns are correlated the walk is that of `genstream.families.gaussian_walk`. Diagonal scale
matrices need the features `[1, y, y^2]` of single columns only, and one row of ones where a column
is observed: given `u` columns are independent, so that a gap is left out of the product.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy.special import digamma, gammaln

from genstream.families.blocks import Array, Index
from genstream.families.columns import ColumnsKernel
from genstream.families.columns_walk import LinearWalk
from genstream.families.gaussian_walk import GaussianKernel, GaussianWalk
from genstream.rows import Rows
from genstream.stats import Monoid, axes


@dataclass(frozen=True, eq=False)
class ColumnMoments(Monoid):
    """Sums of `r E[u]` a component, and column by column, with `o` 1 where a row observed it, of
    `r o` (`count`), `r o E[u]` (`seen`) and `r o E[u] y`, `r o E[u] y^2`, in pivot coordinates.
    """

    sum_w: Array = axes("component")
    count: Array = axes("component", "feature")
    seen: Array = axes("component", "feature")
    sum_wx: Array = axes("component", "feature")
    sum_wxx: Array = axes("component", "feature")


def log_normaliser(dof: Array, n_observed: int | Array) -> Array:
    """Log-density at distance 0 of a t less that of a Gaussian of the same scale matrix."""
    half = dof / 2
    more = n_observed / 2
    return np.asarray(gammaln(half + more) - gammaln(half) - more * np.log(half))


class ColumnsOfRows(LinearWalk):
    """Independent columns given the scale of a row, offering what `GaussianWalk` does."""

    kernel: ColumnsKernel

    def __init__(self, kernel: ColumnsKernel, rows: Rows) -> None:
        super().__init__(kernel, rows)
        self.count = np.zeros(kernel.mean.shape)

    @property
    def constant(self) -> Array:
        """(K, 1) or (K, n) score of the block's rows were they at distance 0 from each mean."""
        each, base = self.kernel.about_mean, self.kernel.log_weights[:, None]
        if self.observed is None:
            return np.asarray(base + each.sum(axis=1, keepdims=True))
        return np.asarray(base + each @ self.observed.T)

    @property
    def n_observed(self) -> int | Array:
        """How many entries the block's rows have observed."""
        if self.observed is None:
            return int(self.values.shape[1])
        n_observed: Array = self.observed.sum(axis=1)
        return n_observed

    def gather(self, resp: Array, scaled: Array | None = None) -> None:
        """Add moments under weights `scaled` (K, n), and how much of `resp` observed a column."""
        if self.observed is None:
            self.count += resp.sum(axis=1, dtype=np.float64)[:, None]
        else:
            self.count += resp @ self.observed.astype(resp.dtype)
        super().gather(resp if scaled is None else scaled)

    def complete(
        self, resp: Array, rng: np.random.Generator | None = None, spread: Array | None = None
    ) -> Array:
        """The block's rows (n, d) with gaps filled; `spread` (n,) multiplies deviations drawn."""
        values = self.values.astype(np.float64)
        if self.observed is None:
            return values
        y = resp.T @ self.kernel.mean
        if rng is not None:
            noise = rng.standard_normal(values.shape)
            if spread is not None:
                noise *= spread[:, None]
            y += noise * np.sqrt(resp.T @ self.kernel.variance)
        pivot = self.kernel.real_pivot
        return np.where(self.observed, values, pivot.shift + y * pivot.scale)

    def close(self) -> Monoid:
        total, first, second, seen = np.split(
            self.sums, np.cumsum([1, *2 * [self.count.shape[1]]]), axis=1
        )
        if not self.gaps:
            seen = np.repeat(total, self.count.shape[1], axis=1)
        return ColumnMoments(total[:, 0], self.count, seen, first, second)


class StudentKernel:
    """Student-t components prepared for a pass: `inner` are the Gaussians with scale matrices in
    place of covariances.
    """

    def __init__(
        self, inner: GaussianKernel | ColumnsKernel, dof: Array, stats_type: type[Any]
    ) -> None:
        self.inner, self.dof, self.stats_type = inner, dof, stats_type
        self.by_pattern = isinstance(inner, GaussianKernel)

    def take(self, components: Array) -> StudentKernel:
        """The kernel of some of the components (C,)."""
        return StudentKernel(self.inner.take(components), self.dof[components], self.stats_type)

    def walk(self, rows: Rows) -> StudentWalk:
        return StudentWalk(self, rows)


class _Terms(NamedTuple):
    """Of each component, (K, 1) or (K, n): `(dof + o) / 2`, the log-density at `v = 1` less the
    Gaussian's at distance 0, `E[log u]` at `v = 1`, and v at distance 0.
    """

    half: Array
    peak: Array
    expected: Array
    least: Array


class StudentWalk:
    """A walk over one chunk, in the blocks of the Gaussian one.

    With `v = (dof + delta) / (dof + o) = 1 / E[u]` the log-density is that at distance 0 less
    `(dof + o) / 2 log(v (dof + o) / dof)`.
    """

    def __init__(self, kernel: StudentKernel, rows: Rows) -> None:
        self.kernel = kernel
        self.inner: GaussianWalk | ColumnsOfRows
        if isinstance(kernel.inner, GaussianKernel):
            self.inner = GaussianWalk(kernel.inner, rows)
        else:
            self.inner = ColumnsOfRows(kernel.inner, rows)
        self.sum_r = np.zeros(len(kernel.dof))
        self.sum_log = np.zeros(len(kernel.dof))
        # (K, n) of v, log v and r / v.
        self.room = np.empty((3, len(kernel.dof), 0), dtype=kernel.inner.dtype)
        self.terms: dict[int, _Terms] = {}

    @property
    def size(self) -> int:
        """Rows in a block at most."""
        return self.inner.size

    @size.setter
    def size(self, size: int) -> None:
        self.inner.size = size

    def blocks(self) -> Iterator[Index]:
        yield from self.inner.blocks()

    def load(self, index: Index) -> None:
        self.inner.load(index)

    def base(self) -> Array | None:
        return None

    def _of_observed(self, n_observed: int | Array) -> _Terms:
        """What the number of observed entries decides; (K, n) where rows differ in it."""
        if not isinstance(n_observed, int):
            widths, at = np.unique(n_observed, return_inverse=True)
            columns = [self._of_observed(int(o)) for o in widths]
            return _Terms(*(np.concatenate(c, axis=1)[:, at] for c in zip(*columns, strict=True)))
        if n_observed not in self.terms:
            dof = self.kernel.dof[:, None]
            half = (dof + n_observed) / 2
            self.terms[n_observed] = _Terms(
                half,
                log_normaliser(dof, n_observed) - half * np.log(2 * half / dof),
                digamma(half) - np.log(half),
                dof / 2 / half,
            )
        return self.terms[n_observed]

    def score(self) -> Array:
        log_p = self.inner.score()
        if self.room.shape[2] < log_p.shape[1]:
            self.room = np.empty((3, *log_p.shape), dtype=log_p.dtype)
        constant = self.inner.constant
        self.at = terms = self._of_observed(self.inner.n_observed)
        self.v, self.log_v, self.scaled = self.room[:, :, : log_p.shape[1]]
        # Distance is twice what the score lies below that at distance 0.
        dtype, half = log_p.dtype, terms.half
        np.multiply(log_p, (-1 / half).astype(dtype), out=self.v)
        self.v += (terms.least + constant / half).astype(dtype)
        # Rounding may put a row nearer than its mean.
        np.maximum(self.v, terms.least.astype(dtype), out=self.v)
        np.log(self.v, out=self.log_v)
        np.multiply(self.log_v, -half.astype(dtype), out=log_p)
        log_p += (constant + terms.peak).astype(dtype)
        return log_p

    def gather(self, resp: Array) -> None:
        o = self.inner.n_observed
        # A row with nothing observed is no evidence of any scale.
        if not np.all(o):
            resp = resp * np.greater(o, 0)
        np.divide(resp, self.v, out=self.scaled)
        self.inner.gather(resp, self.scaled)
        total = resp.sum(axis=1, dtype=np.float64)
        self.sum_r += total
        expected = self.at.expected
        if expected.shape[1] == 1:
            self.sum_log += total * expected[:, 0]
        else:
            self.sum_log += np.vecdot(resp, expected)
        self.sum_log -= np.vecdot(resp, self.log_v)

    def complete(self, resp: Array, rng: np.random.Generator | None = None) -> Array:
        """The conditional mean is the Gaussian's. A draw is of the row's `u` first."""
        if rng is None:
            return self.inner.complete(resp)
        at = resp.argmax(axis=0), np.arange(resp.shape[1])
        half = np.broadcast_to(self.at.half, resp.shape)[at]
        rate = half * self.v[at].astype(np.float64)
        return self.inner.complete(resp, rng, np.sqrt(rate / rng.gamma(half)))

    def close(self) -> Monoid:
        stats: Monoid = self.kernel.stats_type(self.sum_r, self.sum_log, self.inner.close())
        return stats
