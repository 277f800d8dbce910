"""Gaussian rows of rare patterns of gaps, side by side: one lane a row.

With `e` the distance of a row from a component's mean, zero where missing, `P` the component's
precision, `S` its covariance, `O` the observed and `M` the missing columns, the quadratic form of
the observed entries and the conditional mean of the missing ones are

    e' P e - g' inv(P_MM) g,   e_M = -inv(P_MM) g,   g = (P e)_M

or, read off the observed side,

    e_O' x,   e_M = S_MO x,   x = inv(S_OO) e_O.

Of the two the one is taken that inverts the smaller matrix. Its inverse is the same for all rows
of a pattern, so a block computes it once a pattern, for all its patterns at a time: each entry of
a small `L D L'` factor is one operation on all of them. What differs from row to row is computed
for all rows at once, component by component, in buffers that stay in a core's cache; `P e` and
the sum of `r e e'` are matrix products.

Distances are from each component's own mean, so that a mean far out costs no digits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from genstream.families.blocks import LOG_2PI, Array

if TYPE_CHECKING:
    from genstream.families.gaussian_walk import GaussianKernel

# At most so many rows are a block, and so many numbers of a component are held for them.
LANE_ROWS = 1024
LANE_NUMBERS = 1 << 17
# Pivots of a factor whose product is sure to stay within the range of numbers.
RUN = 8


def lane_rows(n_features: int, n_observed: int) -> int:
    """Rows in a block of lanes that observe `n_observed` columns."""
    size = min(n_observed, n_features - n_observed)
    return int(np.clip(LANE_NUMBERS // (2 * n_features + size * (size + 2)), 16, LANE_ROWS))


class Sums(Protocol):
    """Where blocks leave their statistics."""

    def add(self, n: Array, s: Array, q: Array) -> None:
        """Add sums of `r`, `r y` and `r y y'`: (K,), (K, d) and (K, d, d), in pivot coordinates."""


class _Group:
    """The components `which`, worked on in one arithmetic."""

    def __init__(self, kernel: GaussianKernel, which: Array, dtype: np.dtype[Any]) -> None:
        self.which, self.dtype = which, dtype
        covariances = np.arange(1) if kernel.tied else which
        self.mean = kernel.mean[which].astype(dtype)
        self.precision = kernel.precision[covariances].astype(dtype)
        self.covariance = kernel.covariance[covariances].astype(dtype)
        # Which of these, and of the kernel's, each component has.
        self.own = np.zeros_like(which) if kernel.tied else np.arange(len(which))
        self.shared = np.zeros_like(which) if kernel.tied else which


class Lanes:
    """What lanes need of a kernel for one walk, and their buffers.

    In float32, components whose quadratic form would be off by more than `MAX_ROUNDING` nats are
    worked on in float64, as those of complete rows are.
    """

    def __init__(self, kernel: GaussianKernel) -> None:
        self.kernel = kernel
        every = np.arange(kernel.n_components)
        fine = np.isin(every, kernel.complete.linear.fine)
        parts = ((every[~fine], kernel.dtype), (every[fine], np.dtype(np.float64)))
        self.groups = [_Group(kernel, which, dtype) for which, dtype in parts if which.size]
        self._buffers: dict[tuple[str, np.dtype[Any]], Array] = {}

    def buffer(self, name: str, dtype: np.dtype[Any], *shape: int) -> Array:
        """An array whose memory the next one of this name and type will take."""
        size = int(np.prod(shape))
        held = self._buffers.get((name, dtype))
        if held is None or len(held) < size:
            held = self._buffers[name, dtype] = np.empty(size, dtype)
        return held[:size].reshape(shape)


class LaneBlock:
    """Rows whose patterns miss equally many columns.

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
        self.lanes, self.sums, self.kernel = lanes, sums, lanes.kernel
        self.patterns, self.of_row = patterns, of_row
        n, d = len(of_row), patterns.shape[1]
        self.n_observed = int(patterns[0].sum())
        self.by_gaps = 2 * self.n_observed >= d
        side = ~patterns if self.by_gaps else patterns
        # (s, p) the columns of the smaller side of each pattern, and (s, n) where these entries of
        # each row are in a (d, n) array.
        self.small = np.ascontiguousarray(
            np.nonzero(side)[1].reshape(len(patterns), side[0].sum()).T
        )
        self.columns = self.small.take(of_row, axis=1)
        self.places = self.columns * n + np.arange(n)
        self._invert()

    def _invert(self) -> None:
        """The inverse of the smaller side, once a pattern, and the log-density at distance 0."""
        kernel, (size, n_patterns) = self.kernel, self.small.shape
        matrices = kernel.precision if self.by_gaps else kernel.covariance
        cells = (self.small[:, None] * kernel.n_features + self.small).reshape(-1)
        blocks = np.empty((size * size, len(matrices), n_patterns))
        for c, matrix in enumerate(matrices):
            blocks[:, c] = matrix.take(cells).reshape(-1, n_patterns)
        n_lanes = len(matrices) * n_patterns
        inner, log_det = lane_inverse(blocks.reshape(size, size, n_lanes))
        # (C, s, s, p)
        self.inner = np.ascontiguousarray(
            inner.reshape(size * size, len(matrices), n_patterns).swapaxes(0, 1)
        ).reshape(len(matrices), size, size, n_patterns)
        self.cells = cells
        log_det = log_det.reshape(len(matrices), n_patterns)
        if self.by_gaps:
            log_det = log_det + kernel.log_det[:, None]
        level = -0.5 * (log_det + self.n_observed * LOG_2PI) - self.patterns @ kernel.log_scale
        self.constant = (level + kernel.log_weights[:, None]).take(self.of_row, axis=1)

    def load(self, values: Array) -> None:
        """Take the rows (n, d) at hand."""
        pivot, n = self.kernel.pivot, len(values)
        y = np.subtract(values.T, pivot.shift[:, None], out=np.empty((values.shape[1], n)))
        y *= (1.0 / pivot.scale)[:, None]
        self.y = {group.dtype: y.astype(group.dtype, copy=False) for group in self.lanes.groups}

    def score(self) -> Array:
        kernel, n = self.kernel, len(self.of_row)
        log_p = np.empty((kernel.n_components, n), dtype=kernel.dtype)
        # (s, n) what is inverted, times g or e_O, of each component.
        self.solved = {
            group.dtype: np.empty((len(group.which), len(self.small), n), group.dtype)
            for group in self.lanes.groups
        }
        for group in self.lanes.groups:
            y, dtype = self.y[group.dtype], group.dtype
            if self.by_gaps:
                seen = self.patterns.T.astype(dtype).take(self.of_row, axis=1)
                e = self.lanes.buffer("e", dtype, *y.shape)
                slope = self.lanes.buffer("slope", dtype, *y.shape)
            else:
                entries = y.ravel().take(self.places)
            inner = None
            for i, k in enumerate(group.which):
                if inner is None or not kernel.tied:
                    inner = self._spread(group.shared[i], dtype)
                if self.by_gaps:
                    np.subtract(y, group.mean[i][:, None], out=e)
                    e *= seen
                    np.matmul(group.precision[group.own[i]], e, out=slope)
                    g = slope.ravel().take(self.places)
                else:
                    g = entries - group.mean[i].take(self.columns)
                x = np.einsum("ijn,jn->in", inner, g, out=self.solved[dtype][i])
                quadratic = np.einsum("in,in->n", g, x)
                if self.by_gaps:
                    quadratic = np.einsum("dn,dn->n", e, slope) - quadratic
                log_p[k] = self.constant[k] - 0.5 * quadratic
        return log_p

    def _spread(self, c: int, dtype: np.dtype[Any]) -> Array:
        """(s, s, n) the inverse of each row."""
        return self.inner[c].astype(dtype, copy=False).take(self.of_row, axis=2)

    def gather(self, resp: Array, scaled: Array | None = None) -> None:
        """Add the moments under weights `scaled` (K, n), or `resp`, and the conditional covariance
        of missing entries under `resp`.
        """
        kernel = self.kernel
        moved = resp if scaled is None else scaled
        n_components, d = kernel.mean.shape
        s, q = np.empty((n_components, d)), np.empty((n_components, d, d))
        for group in self.lanes.groups:
            y, dtype = self.y[group.dtype], group.dtype
            e = self.lanes.buffer("e", dtype, *y.shape)
            flat = e.ravel()
            for i, k in enumerate(group.which):
                root = np.sqrt(moved[k]).astype(dtype, copy=False)
                x = self.solved[dtype][i]
                if self.by_gaps:
                    np.subtract(y, group.mean[i][:, None], out=e)
                    e *= root
                    flat[self.places] = -x * root
                else:
                    whole = self.lanes.buffer("slope", dtype, *y.shape)
                    whole[:] = 0.0
                    whole.ravel()[self.places] = x
                    np.matmul(group.covariance[group.own[i]], whole, out=e)
                    flat[self.places] = y.ravel().take(self.places) - group.mean[i].take(
                        self.columns
                    )
                    e *= root
                s[k], q[k] = e @ root, e @ e.T
        mean, total = kernel.mean, moved.sum(axis=1, dtype=np.float64)
        cross = s[:, :, None] * mean[:, None, :]
        q += cross + cross.swapaxes(1, 2)
        q += total[:, None, None] * mean[:, :, None] * mean[:, None, :]
        self._spare(resp, q)
        self.sums.add(total, s + total[:, None] * mean, q)

    def _spare(self, resp: Array, q: Array) -> None:
        """Add to (K, d, d) what missing entries vary beyond their conditional means."""
        kernel, d, n_patterns = self.kernel, self.kernel.n_features, len(self.patterns)
        weight = np.stack([np.bincount(self.of_row, r, n_patterns) for r in resp])
        if kernel.tied:
            weight = weight.sum(axis=0, keepdims=True)
        for c, r in enumerate(weight):
            spare = np.bincount(self.cells, (self.inner[c] * r).ravel(), d * d).reshape(d, d)
            if not self.by_gaps:
                covariance = kernel.covariance[c]
                spare = r.sum() * covariance - covariance @ spare @ covariance
            q[c] += spare


def lane_inverse(matrices: Array) -> tuple[Array, Array]:
    """Inverses (s, s, n) and log-determinants (n,) of n symmetric positive definite matrices.

    `inv(L D L') = W' inv(D) W` with `W = inv(L)`; every step is on all matrices at once.
    """
    size = len(matrices)
    lower = np.zeros_like(matrices)
    scaled = np.zeros_like(matrices)
    pivots = np.empty(matrices.shape[1:])
    least = np.finfo(np.float64).eps
    for j in range(size):
        column = matrices[j:, j] - np.einsum("iln,ln->in", lower[j:, :j], scaled[j, :j])
        # Rounding may leave nothing of a variance that its companions explain.
        np.maximum(column[0], least * matrices[j, j], out=pivots[j])
        scaled[j + 1 :, j] = column[1:]
        np.divide(column[1:], pivots[j], out=lower[j + 1 :, j])
    # `lower` becomes W row by row.
    whiten = np.zeros_like(matrices)
    for i in range(size):
        whiten[i, i] = 1.0
        whiten[i, :i] = -np.einsum("ln,ljn->jn", lower[i, :i], whiten[:i, :i])
    inverse = np.empty_like(matrices)
    weighted = whiten / pivots[:, None]
    for i in range(size):
        inverse[i, : i + 1] = np.einsum("ln,ljn->jn", weighted[i:, i], whiten[i:, : i + 1])
        inverse[: i + 1, i] = inverse[i, : i + 1]
    log_det = np.zeros(matrices.shape[2])
    for start in range(0, size, RUN):
        log_det += np.log(pivots[start : start + RUN].prod(axis=0))
    return inverse, log_det
