"""Gaussian rows of rare patterns of gaps, side by side: one lane a row.

With `e` the distance of a row from a component's mean, zero where missing, `P` the component's
precision, `S` its covariance, `O` the observed and `M` the missing columns, the quadratic form of
the observed entries and the conditional mean of the missing ones' distance are

    e' P e - g' x,   -x,       x = inv(P_MM) g,   g = (P e)_M

or, read off the observed side,

    g' x,            S_MO x,   x = inv(S_OO) g,   g = e_O.

Of the two the one is taken that solves with the smaller matrix. Its factor `L D L'` is the same
for all rows of a pattern, so a block computes it once a pattern, many patterns at a time, by a few
operations a column. What differs from row to row is computed for many rows at a time, component by
component; `P e` and the sum of `r e e'` are matrix products. NumPy does so with all rows of a block
at a time, compiled loops with tiles of them.

Distances are from each component's own mean, so that a mean far out costs no digits.

No `einsum` here sums over nothing: NumPy's multiplies by 0 whatever number lies behind an empty
array, which at times is NaN.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from genstream import compiled
from genstream.families.blocks import LOG_2PI, Array, slices
from genstream.rows import pick

if TYPE_CHECKING:
    from genstream.families.gaussian_walk import GaussianKernel

# At most so many rows are a block, and so many numbers are held for them.
LANE_ROWS = 8192
LANE_NUMBERS = 1 << 21
# Numbers of a temporary beyond which it pays to work on fewer components at a time.
SCRATCH_NUMBERS = 1 << 18
# Rows and columns up to which compiled loops factor matrices however few they are.
SMALL_MATRIX = 32
# Bytes to a multiple of which arrays begin.
ALIGNED = 64
# Pivots whose product stays within the range of float64.
RUN = 8


def lane_rows(n_components: int, n_features: int, n_observed: int) -> int:
    """Rows in a block of lanes that observe `n_observed` columns."""
    size = min(n_observed, n_features - n_observed)
    held = n_components * (size**2 + size + 1) + 4 * n_features + size**2
    return int(np.clip(LANE_NUMBERS // held, 16, LANE_ROWS))


class Sums(Protocol):
    """Where blocks leave their statistics."""

    def add(self, n: Array, s: Array, q: Array) -> None:
        """Add sums of `r`, `r y` and `r y y'`: (K,), (K, d) and (K, d, d), in pivot coordinates."""


class _Group:
    """Components worked on in one arithmetic: their positions `which` and parameters.

    The matrices are (c, d, d) with c = 1 if they are tied; `matrix` says which of them each
    component has.
    """

    def __init__(self, kernel: GaussianKernel, which: Array, dtype: np.dtype[Any]) -> None:
        self.which, self.dtype = which, dtype
        own = np.zeros(1, dtype=np.intp) if kernel.tied else which
        self.matrix = np.zeros_like(which) if kernel.tied else np.arange(len(which))
        self.mean = kernel.mean[which].astype(dtype)
        self.precision = kernel.precision[own].astype(dtype)
        self.covariance = kernel.covariance[own].astype(dtype)
        self.log_det = kernel.log_det[own]

    def of_all(self, numbers: Array) -> Array:
        """Those of the group's components, of all (K, ...)."""
        return numbers if len(self.which) == len(numbers) else numbers[self.which]


class Lanes:
    """What lanes need of a kernel for one walk, and the buffers they share.

    In float32, components whose quadratic form could be off by more than `MAX_ROUNDING` nats are
    worked on in float64, as they are over complete rows. `fast` says that loops are compiled: these
    do all patterns and components in one go, without the interpreter's lock.
    """

    def __init__(self, kernel: GaussianKernel, fast: bool = False) -> None:
        self.kernel = kernel
        self.loops: Any = compiled.loops() if fast else None
        every = np.arange(kernel.n_components)
        fine = np.isin(every, kernel.complete.linear.fine)
        parts = ((every[~fine], kernel.dtype), (every[fine], np.dtype(np.float64)))
        self.groups = [_Group(kernel, which, dtype) for which, dtype in parts if which.size]
        self._buffers: dict[tuple[str, np.dtype[Any]], Array] = {}
        self._memory = np.empty(0, dtype=np.uint8)
        self._at = 0

    def buffer(self, name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
        """An array whose memory the next one of this name and type will take."""
        size = math.prod(shape)
        held = self._buffers.get((name, dtype))
        if held is None or len(held) < size:
            held = self._buffers[name, dtype] = np.empty(size, dtype)
        return held[:size].reshape(shape)

    def keep(self, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
        """An array whose memory is taken again after `clear`."""
        size = math.prod(shape) * dtype.itemsize
        if self._at + size > len(self._memory):
            # Arrays that have the old memory keep it alive. One array, so that blocks after the
            # first find their pages in place.
            self._memory = np.empty(max(2 * len(self._memory), size, LANE_NUMBERS * 8), np.uint8)
            self._at = 0
        taken = self._memory[self._at : self._at + size]
        self._at += -(-size // ALIGNED) * ALIGNED
        return taken.view(dtype).reshape(shape)

    def clear(self) -> None:
        """All blocks so far are done."""
        self._at = 0


class _Rows:
    """Where the columns of the smaller side are, in rows whose patterns observe equally many.

    Of the patterns, `seen` (p, d) is what they observe, `small` (s, p) the columns of the smaller
    side. Of the rows, `pattern` (n,) is the pattern and `columns` (s, n) are the columns of the
    smaller side.
    """

    def __init__(self, lanes: Lanes, seen: NDArray[np.bool_], pattern: NDArray[np.intp]) -> None:
        self.seen, self.pattern = seen, pattern
        n, d = len(pattern), seen.shape[1]
        self.n_observed = int(seen[0].sum())
        self.by_gaps = 2 * self.n_observed >= d
        side = ~seen if self.by_gaps else seen
        size = d - self.n_observed if self.by_gaps else self.n_observed
        self.small = np.ascontiguousarray(np.nonzero(side)[1].reshape(len(seen), size).T)
        self.columns = lanes.keep(np.dtype(np.intp), (size, n))
        # Indices are in range: `clip` only spares a copy.
        self.small.take(pattern, axis=1, out=self.columns, mode="clip")

    @cached_property
    def places(self) -> Array:
        """(s, n) positions of the columns of the smaller side in a (d, n) array."""
        n = len(self.pattern)
        return self.columns * n + np.arange(n)


class LaneBlock:
    """Rows whose patterns observe equally many columns.

    Parameters
    ----------
    lanes
        The kernel and buffers.
    sums
        Where statistics go.
    patterns
        (p, d) masks of what is observed: at least one column, equally many of each pattern.
    of_row
        (n,) the pattern of each row.
    """

    def __init__(
        self, lanes: Lanes, sums: Sums, patterns: NDArray[np.bool_], of_row: NDArray[np.intp]
    ) -> None:
        self.sums, self.lanes, self.kernel = sums, lanes, lanes.kernel
        self.rows = _Rows(lanes, patterns, of_row)
        self.n_observed = self.rows.n_observed
        kind = _ByGaps if self.rows.by_gaps else _ByObserved
        self.parts = [kind(lanes, group, self.rows) for group in lanes.groups]
        # (K, p) score of a pattern's rows were they at distance 0 from each mean.
        level = -0.5 * self.n_observed * LOG_2PI - patterns @ self.kernel.log_scale
        self.peak = self.kernel.log_weights[:, None] + level
        for part in self.parts:
            self.peak[part.group.which] -= 0.5 * part.log_det[part.group.matrix]

    @cached_property
    def constant(self) -> Array:
        """(K, n) score of each row were it at distance 0 from each mean."""
        constant: Array = self.peak.take(self.rows.pattern, axis=1)
        return constant

    def load(self, values: Array, index: Array) -> None:
        """Take the rows at positions `index` (m,) of (n, d)."""
        lanes, pivot, shape = self.lanes, self.kernel.pivot, (values.shape[1], len(index))
        if lanes.loops is None:
            y = pivot.block(pick(values, index), lanes.keep(np.dtype(np.float64), shape))
            for part in self.parts:
                part.y = y.astype(part.group.dtype, copy=False)
            return
        if not values.flags.c_contiguous:
            values, index = np.ascontiguousarray(values[index]), np.arange(len(index))
        for part in self.parts:
            part.y = lanes.keep(part.group.dtype, shape)
            lanes.loops.pivoted_rows(values, index, pivot.shift, 1.0 / pivot.scale, part.y)

    def score(self) -> Array:
        log_p = np.empty((len(self.peak), len(self.rows.pattern)), dtype=self.kernel.dtype)
        for part in self.parts:
            if self.lanes.loops is not None:
                part.score(self.peak, log_p)
                continue
            for k, quadratic in zip(part.group.which, part.quadratics(), strict=True):
                np.subtract(self.constant[k], 0.5 * quadratic, out=log_p[k], casting="same_kind")
        return log_p

    def gather(self, resp: Array, scaled: Array | None = None) -> None:
        """Add the moments under weights `scaled` (K, n), or `resp`, and the conditional covariance
        of missing entries under `resp`.
        """
        mean, moved = self.kernel.mean, resp if scaled is None else scaled
        of_patterns = self._of_patterns(resp)
        n = (of_patterns if scaled is None else scaled).sum(axis=1, dtype=np.float64)
        s = np.empty(mean.shape)
        q = np.empty((*mean.shape, mean.shape[1]))
        for part in self.parts:
            if self.lanes.loops is not None:
                s[part.group.which], q[part.group.which] = part.moments(moved)
                continue
            for i, k in enumerate(part.group.which):
                root = np.sqrt(moved[k]).astype(part.group.dtype, copy=False)
                e = part.distance(i, root)
                s[k], q[k] = e @ root, e @ e.T
        cross = s[:, :, None] * mean[:, None, :]
        s += n[:, None] * mean
        q += cross + mean[:, :, None] * s[:, None, :]
        for part in self.parts:
            part.add_spare(of_patterns, q)
        self.sums.add(n, s, q)

    def _of_patterns(self, weights: Array) -> Array:
        """(K, p) sums of weights (K, n) over each pattern's rows."""
        pattern, n_patterns = self.rows.pattern, len(self.rows.seen)
        if self.lanes.loops is None:
            return np.stack([np.bincount(pattern, w, n_patterns) for w in weights])
        sums = np.zeros((len(weights), n_patterns))
        self.lanes.loops.sums_by_pattern(pattern, np.ascontiguousarray(weights), sums)
        return sums

    def filled(self, resp: Array, drawn: Array | None) -> Array:
        """(d, n) `sum_k r_k E[y | y_O, k]` in pivot coordinates, under weights (K, n), of rows that
        were scored; or `drawn + sum_k r_k E[y - drawn | y_O - drawn_O, k]`.
        """
        filled = self.kernel.mean.T @ resp
        for part in self.parts:
            kept = part.y, part.solved
            if drawn is not None:
                part.y = part.y - drawn.astype(part.group.dtype)
                part.solved = np.empty_like(part.solved)
                deque(part.quadratics(), maxlen=0)
            for i, k in enumerate(part.group.which):
                filled += part.distance(i, resp[k].astype(part.group.dtype))
            part.y, part.solved = kept
        return np.asarray(filled if drawn is None else filled + drawn)


class _Part:
    """The components of one group over a block of lanes.

    `factor` (c, s, s, p) is that of the smaller side of each pattern, as `factor_lanes` leaves it,
    `log_det` (c, p) the log-determinant of the covariance of what a pattern observes, and `solved`
    (k, s, n) is `x`.
    """

    y: Array

    def __init__(self, lanes: Lanes, group: _Group, rows: _Rows) -> None:
        self.lanes, self.group, self.rows = lanes, group, rows
        self.solved = lanes.keep(group.dtype, (len(group.which), *rows.columns.shape))

    def _factor(self, matrices: Array) -> None:
        d, small = self.group.mean.shape[1], self.rows.small
        size, n_patterns = small.shape
        self.factor = self.lanes.keep(matrices.dtype, (len(matrices), size, size, n_patterns))
        if not self._many_lanes:
            cells = small[:, None] * d + small
            self.log_det = factor_lanes(matrices.reshape(len(matrices), d * d), cells, self.factor)
            return
        self.log_det = np.zeros((len(matrices), n_patterns))
        eps = float(np.finfo(matrices.dtype).eps)
        self.lanes.loops.factor_lanes(matrices, small, eps, RUN, self.factor, self.log_det)

    @property
    def _many_lanes(self) -> bool:
        """Whether compiled loops factor and invert: not the large matrices of a few patterns, of
        which NumPy does more in one operation.
        """
        size, n_patterns = self.rows.small.shape
        few = size > SMALL_MATRIX and n_patterns < 2 * size
        return self.lanes.loops is not None and not few

    def _buffer(self, name: str, *shape: int) -> Array:
        return self.lanes.buffer(name, self.group.dtype, shape)

    def score(self, peak: Array, log_p: Array) -> None:
        """Write the group's scores into (K, n), from those at distance 0 (K, p), compiled; leaves
        `x` in `solved`.
        """
        raise NotImplementedError

    def quadratics(self) -> Iterator[Array]:
        """(n,) the quadratic form of each component; leaves `x` in `solved`."""
        raise NotImplementedError

    def distance(self, i: int, root: Array) -> Array:
        """(d, n) the completed distance from a component's mean, times `root` (n,)."""
        raise NotImplementedError

    def add_spare(self, weight: Array, q: Array) -> None:
        """Add to (K, d, d) the conditional covariance of missing entries under weights (K, p)."""
        raise NotImplementedError

    def moments(self, weights: Array) -> tuple[Array, Array]:
        """(k, d) and (k, d, d) sums of `r e` and `r e e'` under weights (K, n), compiled."""
        group, rows = self.group, self.rows
        first, second = np.zeros(group.mean.shape), np.zeros((*group.mean.shape, len(self.y)))
        self.lanes.loops.gather_lanes(
            rows.by_gaps,
            self.y,
            group.mean,
            rows.columns,
            group.matrix,
            group.covariance,
            self.solved,
            np.ascontiguousarray(group.of_all(weights), group.dtype),
            first,
            second,
        )
        return first, second

    def _factors(self) -> Iterator[list[Array]]:
        """Of each component the factor of every row: row i of it is (i + 1, n)."""
        size, n = self.rows.columns.shape
        room = self._buffer("factor", size * (size + 1) // 2, n)
        lower = [room[i * (i + 1) // 2 : (i + 1) * (i + 2) // 2] for i in range(size)]
        held: int | np.signedinteger[Any] = -1
        for c in self.group.matrix:
            if c != held:
                for i, row in enumerate(lower):
                    part = self.factor[c, i, : i + 1]
                    part.take(self.rows.pattern, axis=1, out=row, mode="clip")
                held = c
            yield lower

    def _spares(self, weight: Array) -> tuple[Array, Array, Array]:
        """Positions (c,) of the components, or of one of them if they are tied, their weights (c,),
        and sums (c, d, d) of the inverses of the smaller sides under weights (K, p) of patterns.
        """
        group, small, n = self.group, self.rows.small, len(self.factor)
        d, (size, n_patterns) = group.mean.shape[1], small.shape
        weight = group.of_all(weight)
        if n < len(weight):
            weight = weight.sum(axis=0, keepdims=True)
        sums = np.zeros((n, d, d))
        which, total = group.which[:n], weight.sum(axis=1)
        if self._many_lanes:
            self.lanes.loops.add_inverses(self.factor, small, weight, sums)
            return which, total, sums
        row, column = np.triu_indices(size)
        cells = (small[row] * d + small[column]).ravel()
        step = max(1, SCRATCH_NUMBERS // max(1, size * size * n_patterns))
        for some in slices(n, step):
            factor = self.factor[some]
            inverses = invert_lanes(factor, self._buffer("inverse", *factor.shape))
            for r, inverse, out in zip(weight[some], inverses, sums[some], strict=True):
                terms = (inverse[row, column] * r).ravel()
                half = np.bincount(cells, terms, d * d).reshape(d, d)
                out += half + half.T - np.diag(half.diagonal())
        return which, total, sums


class _ByGaps(_Part):
    """Solving for what is missing."""

    def __init__(self, lanes: Lanes, group: _Group, rows: _Rows) -> None:
        super().__init__(lanes, group, rows)
        self._factor(group.precision)
        self.log_det += group.log_det[:, None]

    def score(self, peak: Array, log_p: Array) -> None:
        rows, group = self.rows, self.group
        self.lanes.loops.score_by_gaps(
            self.y,
            group.mean,
            group.which,
            rows.pattern,
            rows.columns,
            group.matrix,
            group.precision,
            self.factor,
            peak,
            self.solved,
            log_p,
        )

    def quadratics(self) -> Iterator[Array]:
        rows, group, y = self.rows, self.group, self.y
        seen = rows.seen.T.astype(group.dtype).take(rows.pattern, axis=1)
        e, slope = self._buffer("e", *y.shape), self._buffer("slope", *y.shape)
        for i, lower in enumerate(self._factors()):
            np.subtract(y, group.mean[i][:, None], out=e)
            e *= seen
            np.matmul(group.precision[group.matrix[i]], e, out=slope)
            explained = _solve(lower, slope.ravel().take(rows.places), self.solved[i])
            yield np.einsum("dn,dn->n", e, slope) - explained

    def distance(self, i: int, root: Array) -> Array:
        e = self._buffer("e", *self.y.shape)
        np.subtract(self.y, self.group.mean[i][:, None], out=e)
        e *= root
        e.ravel()[self.rows.places] = self.solved[i] * -root
        return e

    def add_spare(self, weight: Array, q: Array) -> None:
        which, _, spare = self._spares(weight)
        q[which] += spare


class _ByObserved(_Part):
    """Solving for what is observed."""

    def __init__(self, lanes: Lanes, group: _Group, rows: _Rows) -> None:
        super().__init__(lanes, group, rows)
        self._factor(group.covariance)

    def score(self, peak: Array, log_p: Array) -> None:
        rows, group = self.rows, self.group
        self.lanes.loops.score_by_observed(
            self.y,
            group.mean,
            group.which,
            rows.pattern,
            rows.columns,
            group.matrix,
            self.factor,
            peak,
            self.solved,
            log_p,
        )

    def quadratics(self) -> Iterator[Array]:
        for i, lower in enumerate(self._factors()):
            yield _solve(lower, self._observed(i), self.solved[i])

    def _observed(self, i: int) -> Array:
        """(s, n) the distance of what is observed."""
        observed: Array = self.y.ravel().take(self.rows.places)
        observed -= self.group.mean[i].take(self.rows.columns)
        return observed

    def distance(self, i: int, root: Array) -> Array:
        e, x = self._buffer("e", *self.y.shape), self._buffer("slope", *self.y.shape)
        x[:] = 0.0
        x.ravel()[self.rows.places] = self.solved[i]
        np.matmul(self.group.covariance[self.group.matrix[i]], x, out=e)
        e.ravel()[self.rows.places] = self._observed(i)
        e *= root
        return e

    def add_spare(self, weight: Array, q: Array) -> None:
        kernel = self.lanes.kernel
        which, total, inverse = self._spares(weight)
        covariance = kernel.covariance if kernel.tied else kernel.covariance[which]
        q[which] += total[:, None, None] * covariance - covariance @ inverse @ covariance


def _solve(lower: list[Array], g: Array, out: Array) -> Array:
    """`x` (s, n) in `out`, of `L D L' x = g`, and returns `g'x` (n,).

    By substitution: where columns nearly determine one another, products with an inverse would
    lose what is left after terms cancel. `g` is overwritten.
    """
    for i in range(1, len(g)):
        g[i] -= np.einsum("jn,jn->n", lower[i][:i], g[:i])
    for i, row in enumerate(lower):
        np.multiply(g[i], row[i], out=out[i])
    square: Array = np.einsum("in,in->n", g, out) if len(g) else np.zeros(g.shape[1], g.dtype)
    for i in range(len(g) - 1, 0, -1):
        out[:i] -= lower[i][:i] * out[i]
    return square


def factor_lanes(matrices: Array, cells: Array, out: Array) -> Array:
    """Factor submatrices of symmetric positive definite matrices as `L D L'`, all at a time.

    `matrices` is (c, d * d) and `cells` (s, s, p) says which of its entries make up each
    submatrix. `out` (c, s, s, p) takes `L` below the diagonal, `1 / D` on it, and nothing above.
    Returns the log-determinants (c, p).
    """
    size, _, n_patterns = cells.shape
    pivots = np.empty((len(matrices), size, n_patterns), matrices.dtype)
    least = np.finfo(matrices.dtype).eps
    for j in range(size):
        column = matrices.take(cells[j:, j], axis=1)
        variance = least * column[:, 0]
        if j:
            weighted = out[:, j, :j] * pivots[:, :j]
            column -= np.einsum("cijp,cjp->cip", out[:, j:, :j], weighted)
        # Rounding may leave nothing of a variance that its companions explain.
        pivot = np.maximum(column[:, 0], variance, out=pivots[:, j])
        np.divide(1.0, pivot, out=out[:, j, j])
        np.divide(column[:, 1:], pivot[:, None], out=out[:, j + 1 :, j])
    log_det = np.zeros((len(matrices), n_patterns))
    for start in range(0, size, RUN):
        log_det += np.log(pivots[:, start : start + RUN].prod(axis=1, dtype=np.float64))
    return log_det


def invert_lanes(factor: Array, out: Array) -> Array:
    """Inverses (c, s, s, p), in `out`, of what `factor_lanes` factored.

    From the last column up, with `C` the inverse of what is below and right of entry j and `l` the
    factor's column j below it, the inverse's column is `-C l`, under `1 / D_j + l'C l`.
    """
    last = factor.shape[1] - 1
    if last >= 0:
        out[:, last, last] = factor[:, last, last]
    for j in range(last - 1, -1, -1):
        below = factor[:, j + 1 :, j]
        column = np.einsum("cikp,ckp->cip", out[:, j + 1 :, j + 1 :], below)
        np.negative(column, out=out[:, j + 1 :, j])
        out[:, j, j + 1 :] = out[:, j + 1 :, j]
        np.add(factor[:, j, j], np.einsum("cip,cip->cp", below, column), out=out[:, j, j])
    return out


def lane_inverse(matrices: Array) -> tuple[Array, Array]:
    """Inverses (s, s, n) and log-determinants (n,) of n symmetric positive definite matrices."""
    factor, out = np.empty((2, 1, *matrices.shape))
    cells = np.arange(matrices.size).reshape(matrices.shape)
    log_det = factor_lanes(matrices.reshape(1, -1), cells, factor)
    return invert_lanes(factor, out)[0], log_det[0]
