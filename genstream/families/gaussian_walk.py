"""The E-step of Gaussians: kernel, blocks and gaps.

Complete rows, and rows that share a frequent pattern of gaps, are scored and gathered by one matrix
product each. A pattern's sums are of its observed entries alone; they are completed once a chunk,
since the conditional moments of the missing entries are linear in the observed ones with
coefficients that only the pattern decides.

Rows of rare patterns are worked on in lanes: rows that miss equally many columns side by side, one
small Cholesky factor a row, each of its entries computed for all rows at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from genstream.families.blocks import LOG_2PI, Array, Index, Linear, Pivot, block_rows, slices
from genstream.rows import Rows
from genstream.stats import Monoid

# Patterns with fewer rows than this in a chunk are worked on in lanes.
FREQUENT = 64
# Numbers held for a block of lanes.
LANE_NUMBERS = 1 << 19


class GaussianKernel:
    """Gaussians prepared for a pass, in pivot coordinates.

    Takes means (K, d) and covariances (C, d, d), where C is K, or 1 if they are tied.
    """

    by_pattern = True

    def __init__(
        self,
        mean: Array,
        covariance: Array,
        log_weights: Array,
        pivot: Pivot,
        tied: bool,
        dtype: np.dtype[Any],
        stats_type: type[Any],
    ) -> None:
        self.mean, self.covariance = mean, covariance
        self.log_weights, self.pivot, self.tied, self.dtype = log_weights, pivot, tied, dtype
        self.stats_type = stats_type
        factor = np.linalg.cholesky(covariance)
        self.whiten = np.linalg.inv(factor)
        self.precision = self.whiten.swapaxes(1, 2) @ self.whiten
        self.log_det = 2 * np.log(np.diagonal(factor, axis1=1, axis2=2)).sum(axis=1)
        self.log_scale = np.log(pivot.scale)
        self.n_components, self.n_features = mean.shape
        self.complete = Marginal(self, np.ones(self.n_features, dtype=bool))

    @cached_property
    def tied_linear(self) -> Linear:
        """Natural parameters of `[y, 1]` where all components share the quadratic term."""
        precision = self.precision[0]
        slope = self.mean @ precision
        quadratic = (slope * self.mean).sum(axis=1)
        constant = self.complete.constant(quadratic)
        rounding = 2 * (np.abs(slope) * _spread(self.mean, self.covariance)).sum(axis=1)
        return Linear(np.column_stack([slope, constant]), rounding, self.dtype)

    def walk(self, rows: Rows) -> GaussianWalk:
        return GaussianWalk(self, rows)


class Marginal:
    """The marginal of the columns that one pattern observes, and what completes it.

    `precision` (C, o, o) is that of the observed entries. A row is completed by
    `y = lift @ y_O + offset`, with lift (C, d, o) and offset (K, d), and `spare` (C, d, d) is the
    conditional covariance of its missing entries.
    """

    def __init__(self, kernel: GaussianKernel, pattern: NDArray[np.bool_]) -> None:
        self.kernel = kernel
        seen, missing = np.flatnonzero(pattern), np.flatnonzero(~pattern)
        self.seen, self.n_observed = seen, len(seen)
        self.log_scale = float(kernel.log_scale[seen].sum())
        self.mean = kernel.mean[:, seen]
        self.precision, self.log_det = kernel.precision, kernel.log_det
        if not len(missing):
            return
        # Only the smaller side is factored: the missing block of the precision, or the observed
        # block of the covariance.
        if len(missing) <= len(seen):
            hidden = kernel.precision[:, missing[:, None], missing]
            cross = kernel.precision[:, missing[:, None], seen]
            spread, log_det = _inverse(hidden)
            gain = -spread @ cross
            self.precision = kernel.precision[:, seen[:, None], seen] + cross.swapaxes(1, 2) @ gain
            self.log_det = kernel.log_det + log_det
        else:
            cross = kernel.covariance[:, missing[:, None], seen]
            self.precision, self.log_det = _inverse(kernel.covariance[:, seen[:, None], seen])
            gain = cross @ self.precision
            hidden = kernel.covariance[:, missing[:, None], missing]
            spread = hidden - gain @ cross.swapaxes(1, 2)
        n_covariances, d = len(kernel.covariance), kernel.n_features
        self.lift = np.zeros((n_covariances, d, len(seen)))
        self.lift[:, seen, np.arange(len(seen))] = 1.0
        self.lift[:, missing] = gain
        self.offset = np.zeros((kernel.n_components, d))
        self.offset[:, missing] = kernel.mean[:, missing] - (gain @ self.mean[..., None])[..., 0]
        self.spare = np.zeros((n_covariances, d, d))
        self.spare[:, missing[:, None], missing] = spread

    def constant(self, quadratic: Array) -> Array:
        """(K,) log-density at `y = 0` plus log weight, from `mean' P mean` (K,)."""
        normaliser = quadratic + self.log_det + self.n_observed * LOG_2PI
        return np.asarray(-0.5 * normaliser - self.log_scale + self.kernel.log_weights)

    @cached_property
    def linear(self) -> Linear:
        """Natural parameters (K, o(o+1)/2 + o + 1) of the features of `fill_features`."""
        slope = (self.precision @ self.mean[..., None])[..., 0]
        quadratic = (slope * self.mean).sum(axis=1)
        row, column = np.triu_indices(self.n_observed)
        pairs = np.where(row == column, -0.5, -1.0) * self.precision[:, row, column]
        pairs = np.broadcast_to(pairs, (len(slope), pairs.shape[1]))
        eta = np.column_stack([pairs, slope, self.constant(quadratic)])
        covariance = self.kernel.covariance[:, self.seen[:, None], self.seen]
        rounding = quadratic_rounding(self.mean, covariance, self.precision)
        return Linear(eta, rounding, self.kernel.dtype)

    def completed(self, sums: Array) -> tuple[Array, Array, Array]:
        """Statistics (K,), (K, d), (K, d, d) over all columns from feature sums (K, p).

        With lift F, offset f and conditional covariance C, the moments `n`, `s`, `Q` of the
        observed entries complete to `n`, `F s + n f` and
        `F Q F' + F s f' + f s'F' + n (f f' + C)`.
        """
        o = self.n_observed
        row, column = np.triu_indices(o)
        n, s = sums[:, -1], sums[:, -1 - o : -1]
        q = np.empty((len(sums), o, o))
        q[:, row, column] = sums[:, : len(row)]
        q[:, column, row] = sums[:, : len(row)]
        if o == self.kernel.n_features:
            return n, s, q
        f = self.offset
        lifted = (self.lift @ s[..., None])[..., 0]
        cross = lifted[:, :, None] * f[:, None, :]
        second = self.lift @ q @ self.lift.swapaxes(1, 2) + cross + cross.swapaxes(1, 2)
        second += n[:, None, None] * (f[:, :, None] * f[:, None, :] + self.spare)
        return n, lifted + n[:, None] * f, second


def _spread(mean: Array, covariance: Array) -> Array:
    """(K, o) root mean square of the pivot coordinates of each component's rows."""
    return np.asarray(np.sqrt(np.diagonal(covariance, axis1=1, axis2=2) + mean**2))


def quadratic_rounding(mean: Array, covariance: Array, precision: Array) -> Array:
    """(K,) how far rounding moves `y'P y - 2 m'P y + m'P m`, in units of the unit roundoff.

    The terms cancel where a mean is far out, and those of `y'P y` among themselves where columns
    nearly determine one another.
    """
    size = _spread(mean, covariance)
    pairs = (np.abs(precision) @ size[..., None])[..., 0] * size
    return np.asarray((pairs + (precision @ mean[..., None])[..., 0] * mean).sum(axis=1))


def _inverse(matrices: Array) -> tuple[Array, Array]:
    """Inverse and log-determinant of stacked symmetric positive definite matrices."""
    factor = np.linalg.cholesky(matrices)
    whiten = np.linalg.inv(factor)
    log_det = 2 * np.log(np.diagonal(factor, axis1=-2, axis2=-1)).sum(axis=-1)
    return whiten.swapaxes(-1, -2) @ whiten, log_det


def fill_features(y: Array, out: Array) -> Array:
    """`[y_i y_j (i <= j), y, 1]` of a block (o, n), as (p, n) in `out`."""
    o, n = y.shape
    features = out[:, :n]
    start = 0
    for i in range(o):
        np.multiply(y[i], y[i:], out=features[start : start + o - i])
        start += o - i
    features[start : start + o] = y
    features[start + o] = 1.0
    return features


class GaussianWalk:
    """A walk over one chunk, pattern by pattern."""

    def __init__(self, kernel: GaussianKernel, rows: Rows) -> None:
        self.kernel, self.rows = kernel, rows
        k, d = kernel.n_components, kernel.n_features
        self.width = d * (d + 1) // 2 + d + 1
        self.size = block_rows(self.width + k, kernel.dtype.itemsize)
        self.sum_w = np.zeros(k)
        self.sum_wx = np.zeros((k, d))
        self.sum_wxx = np.zeros((d, d) if kernel.tied else (k, d, d))
        self.y = np.empty((d, self.size))
        self.features = np.empty((self.width, self.size), dtype=kernel.dtype)
        self.log_p = np.empty((k, self.size), dtype=kernel.dtype)
        self.block: Any = None

    def blocks(self) -> Iterator[Index]:
        if self.rows.observed is None:
            yield from self._dense(self.kernel.complete, None)
        else:
            yield from self._by_pattern(self.rows.observed)
        # The block refers back to the walk: without this a chunk would outlive its use until the
        # garbage collector comes round.
        self.block = None

    def _by_pattern(self, observed: NDArray[np.bool_]) -> Iterator[Index]:
        """Blocks of one pattern after another, then those of all rare patterns."""
        packed = np.packbits(observed, axis=1)
        keys = np.ascontiguousarray(packed).view(f"V{packed.shape[1]}").ravel()
        _, first, inverse, counts = np.unique(
            keys, return_index=True, return_inverse=True, return_counts=True
        )
        order = np.argsort(inverse, kind="stable")
        starts = np.concatenate([[0], np.cumsum(counts)])
        patterns = observed[first]
        width = patterns.sum(axis=1)
        frequent = (counts >= FREQUENT) & (width > 0)
        for p in np.flatnonzero(frequent):
            whole = width[p] == self.kernel.n_features
            marginal = self.kernel.complete if whole else Marginal(self.kernel, patterns[p])
            yield from self._dense(marginal, order[starts[p] : starts[p + 1]])
        yield from self._lanes(observed, order, np.repeat(np.where(frequent, 0, width), counts))

    def _dense(self, marginal: Marginal, index: Array | None) -> Iterator[Index]:
        """Blocks of rows that share one pattern: two matrix products each."""
        if marginal.n_observed == self.kernel.n_features and self.kernel.tied:
            work: Any = _TiedBlock(self)
        else:
            work = _PatternBlock(self, marginal)
        n = self.rows.n_rows if index is None else len(index)
        for piece in slices(n, self.size):
            chosen: Index = piece if index is None else index[piece]
            work.load(self.rows.values[chosen])
            self.block = work
            yield chosen
        work.finish()

    def _lanes(self, observed: NDArray[np.bool_], order: Array, width: Array) -> Iterator[Index]:
        """Blocks of rows with rare patterns; `width` counts what each of `order` observed, 0 for
        rows that are done or have nothing observed.
        """
        kernel = self.kernel
        d = kernel.n_features
        for o in range(1, d + 1):
            index = order[width == o]
            held = kernel.n_components * (d + min(o, d - o) ** 2)
            for piece in slices(len(index), max(16, LANE_NUMBERS // held)):
                chosen = index[piece]
                block = _LaneBlock(self, observed[chosen])
                block.load(self.rows.values[chosen])
                self.block = block
                yield chosen

    @property
    def linear_block(self) -> _PatternBlock | None:
        """The block at hand where it is linear in its features: of one pattern, and not tied."""
        return self.block if isinstance(self.block, _PatternBlock) else None

    def score(self) -> Array:
        log_p: Array = self.block.score()
        return log_p

    def base(self) -> Array | None:
        return None

    def gather(self, resp: Array) -> None:
        self.block.gather(resp)

    def add(self, marginal: Marginal, sums: Array) -> None:
        """Complete the feature sums (K, p) of one pattern and add them up."""
        n, s, q = marginal.completed(sums)
        self.sum_w += n
        self.sum_wx += s
        self.sum_wxx += q.sum(axis=0) if self.kernel.tied else q

    def close(self) -> Monoid:
        stats: Monoid = self.kernel.stats_type(self.sum_w, self.sum_wx, self.sum_wxx)
        return stats


class _PatternBlock:
    """Blocks of one pattern: features of the observed columns, one GEMM each way."""

    def __init__(self, walk: GaussianWalk, marginal: Marginal) -> None:
        self.walk, self.marginal, self.linear = walk, marginal, marginal.linear
        o = marginal.n_observed
        self.width = o * (o + 1) // 2 + o + 1
        self.sums = np.zeros((walk.kernel.n_components, self.width))
        self.seen = marginal.seen
        self.pivot = Pivot(walk.kernel.pivot.shift[self.seen], walk.kernel.pivot.scale[self.seen])
        self.whole = o == walk.kernel.n_features
        self._exact: Array | None = None

    def load(self, values: Array) -> None:
        self.y = self.pivot.block(
            values if self.whole else values[:, self.seen], self.walk.y[: len(self.seen)]
        )
        buffer = self.walk.features[: self.width]
        y = self.y if buffer.dtype == np.float64 else self.y.astype(buffer.dtype)
        self.features = fill_features(y, buffer)
        self._exact = None

    def exact(self) -> Array:
        """Features in float64."""
        if self.features.dtype == np.float64:
            return self.features
        if self._exact is None:
            self._exact = fill_features(self.y, np.empty((self.width, self.y.shape[1])))
        return self._exact

    def score(self) -> Array:
        log_p = self.linear.score(self.features, self.exact, self.walk.log_p)
        for k in self.linear.direct:
            log_p[k] = self._direct(int(k))
        return log_p

    def _direct(self, k: int) -> Array:
        """Score of one component by the whitened distance, for a mean far out in pivot units."""
        marginal = self.marginal
        precision = marginal.precision[0 if self.walk.kernel.tied else k]
        whiten = np.linalg.cholesky(precision).T
        z = whiten @ (self.y - marginal.mean[k][:, None])
        zero = marginal.constant(np.zeros(len(marginal.mean)))[k]
        return np.asarray(zero - 0.5 * np.einsum("in,in->n", z, z))

    @property
    def built(self) -> Array:
        """(p, n) features of the block."""
        return self.features

    def add(self, sums: Array) -> None:
        """Add (K, p) sums of features to those of the pattern."""
        self.sums += sums

    def gather(self, resp: Array) -> None:
        self.add(self.linear.gather(self.features, self.exact, resp))

    def finish(self) -> None:
        self.walk.add(self.marginal, self.sums)


class _TiedBlock:
    """Blocks of complete rows under a tied covariance.

    `y' P y` is the same for all components, so only `[y, 1]` meets the K components, and the
    second moment is summed once over all of them.
    """

    def __init__(self, walk: GaussianWalk) -> None:
        self.walk, self.kernel = walk, walk.kernel
        self.linear = walk.kernel.tied_linear
        k, d = walk.kernel.n_components, walk.kernel.n_features
        self.sums = np.zeros((k, d + 1))
        self.second = np.zeros((d, d))
        # A precision that one component needs all must have: they share the quadratic term.
        self.exactly = bool(self.linear.fine.size)

    def load(self, values: Array) -> None:
        self.y = self.kernel.pivot.block(values, self.walk.y)
        d, n = self.y.shape
        features = np.empty((d + 1, n)) if self.exactly else self.walk.features[: d + 1, :n]
        features[:d] = self.y
        features[d] = 1.0
        self.features = features

    def score(self) -> Array:
        n = self.y.shape[1]
        log_p = self.walk.log_p[:, :n]
        z = self.kernel.whiten[0] @ self.y
        if self.linear.direct.size:
            zero = self.kernel.complete.constant(np.zeros(self.kernel.n_components))
            for k, mean in enumerate(self.kernel.mean):
                gap = z - (self.kernel.whiten[0] @ mean)[:, None]
                log_p[k] = zero[k] - 0.5 * np.einsum("in,in->n", gap, gap)
            return log_p
        common = -0.5 * np.einsum("in,in->n", z, z)
        if self.exactly:
            slope = self.kernel.mean @ self.kernel.precision[0]
            constant = self.kernel.complete.constant((slope * self.kernel.mean).sum(axis=1))
            log_p[:] = slope @ self.y + constant[:, None] + common
            return log_p
        np.matmul(self.linear.eta, self.features, out=log_p)
        log_p += common.astype(log_p.dtype)
        return log_p

    def gather(self, resp: Array) -> None:
        self.sums += resp.astype(self.features.dtype, copy=False) @ self.features.T
        weight = resp.sum(axis=0, dtype=np.float64)
        self.second += (self.y * weight) @ self.y.T

    def finish(self) -> None:
        self.walk.sum_w += self.sums[:, -1]
        self.walk.sum_wx += self.sums[:, :-1]
        self.walk.sum_wxx += (self.second + self.second.T) / 2


class _LaneBlock:
    """Rows of rare patterns that miss equally many columns, side by side.

    With `e` the distance from a component's mean, zero where missing, `P` its precision and `M` the
    missing columns, a row's quadratic form is `e'P e - g' inv(P_MM) g` with `g = (P e)_M`, and the
    completed distance has `-inv(P_MM) g` in the gaps. Where more is missing than observed the same
    is read off the observed block of the covariance.
    """

    def __init__(self, walk: GaussianWalk, observed: NDArray[np.bool_]) -> None:
        self.walk, self.kernel = walk, walk.kernel
        n, d = observed.shape
        o = int(observed[0].sum())
        self.by_gaps = 2 * (d - o) <= d
        order = np.argsort(observed if self.by_gaps else ~observed, axis=1, kind="stable")
        # (s, n) the columns of the smaller side of each row, missing or observed.
        self.small = order[:, : d - o if self.by_gaps else o].T
        self.observed = observed.T
        self.n_observed = o
        size, k = len(self.small), self.kernel.n_components
        self.distance = np.empty((k, d, n))
        self.inner = np.empty((len(self.kernel.covariance), size, size, n))

    def load(self, values: Array) -> None:
        pivot = self.kernel.pivot
        self.y = (values.T - pivot.shift[:, None]) / pivot.scale[:, None]
        self.log_scale = self.kernel.log_scale @ self.observed

    def score(self) -> Array:
        kernel, small = self.kernel, self.small
        matrices = kernel.precision if self.by_gaps else kernel.covariance
        log_p = np.empty((kernel.n_components, self.y.shape[1]))
        factor = log_det = None
        for k in range(kernel.n_components):
            c = 0 if kernel.tied else k
            if factor is None or not kernel.tied:
                factor = _lane_factor(matrices[c][small[:, None], small[None, :]])
                log_det = 2 * np.log(factor[range(len(small)), range(len(small))]).sum(axis=0)
                self.inner[c] = _lane_inverse(factor)
            e = self.distance[k]
            np.multiply(self.y - kernel.mean[k][:, None], self.observed, out=e)
            if self.by_gaps:
                h = kernel.precision[c] @ e
                g = np.take_along_axis(h, small, axis=0)
                gap = np.einsum("ijn,jn->in", self.inner[c], g)
                quadratic = np.einsum("dn,dn->n", e, h) - np.einsum("in,in->n", g, gap)
                np.put_along_axis(e, small, -gap, axis=0)
                spread = kernel.log_det[c] + log_det
            else:
                g = np.take_along_axis(e, small, axis=0)
                slope = np.einsum("ijn,jn->in", self.inner[c], g)
                quadratic = np.einsum("in,in->n", g, slope)
                whole = np.zeros_like(e)
                np.put_along_axis(whole, small, slope, axis=0)
                gaps = ~self.observed
                e[gaps] = (kernel.covariance[c] @ whole)[gaps]
                spread = log_det
            log_p[k] = kernel.log_weights[k] - 0.5 * (
                quadratic + spread + self.n_observed * LOG_2PI
            )
        log_p -= self.log_scale
        return log_p.astype(kernel.dtype, copy=False)

    def gather(self, resp: Array) -> None:
        kernel, walk, d = self.kernel, self.walk, self.kernel.n_features
        cells = (self.small[:, None] * d + self.small[None, :]).ravel()
        resp = resp.astype(np.float64)
        walk.sum_w += resp.sum(axis=1)
        for k, r in enumerate(resp):
            c = 0 if kernel.tied else k
            inner = np.bincount(cells, (self.inner[c] * r).ravel(), d * d).reshape(d, d)
            spare = inner
            if not self.by_gaps:
                covariance = kernel.covariance[c]
                spare = r.sum() * covariance - covariance @ inner @ covariance
            e, mean, total = self.distance[k], kernel.mean[k], r.sum()
            weighted = e @ r
            cross = np.outer(weighted, mean)
            second = (e * r) @ e.T + cross + cross.T + total * np.outer(mean, mean) + spare
            walk.sum_wx[k] += weighted + total * mean
            if kernel.tied:
                walk.sum_wxx += second
            else:
                walk.sum_wxx[k] += second


def _lane_factor(matrices: Array) -> Array:
    """Cholesky factors (s, s, n) of n matrices, one entry of all of them at a time."""
    size = len(matrices)
    factor = np.zeros_like(matrices)
    for j in range(size):
        pivot = matrices[j, j] - np.einsum("in,in->n", factor[j, :j], factor[j, :j])
        # Rounding may leave nothing of a variance that its companions explain.
        factor[j, j] = np.sqrt(np.maximum(pivot, np.finfo(np.float64).eps * matrices[j, j]))
        for i in range(j + 1, size):
            left = matrices[i, j] - np.einsum("in,in->n", factor[i, :j], factor[j, :j])
            factor[i, j] = left / factor[j, j]
    return factor


def _lane_inverse(factor: Array) -> Array:
    """`inv(L L')` (s, s, n) of n Cholesky factors."""
    size = len(factor)
    whiten = np.zeros_like(factor)
    for j in range(size):
        whiten[j, j] = 1.0 / factor[j, j]
        for i in range(j + 1, size):
            inner = np.einsum("in,in->n", factor[i, j:i], whiten[j:i, j])
            whiten[i, j] = -inner / factor[i, i]
    return np.asarray(np.einsum("lin,ljn->ijn", whiten, whiten))
