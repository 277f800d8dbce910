"""The E-step of linear-Gaussian factors through the latent: q x q solves, never d x d.

With `e = (x - mean) / sqrt(noise)`, `B = W / sqrt(noise)` (d, q) and `O` what a row observed,

    V = inv(I + B_O' B_O),    m = V B_O' e_O,    p(t | x_O, k) = N(m, V)
    log p(x_O | k) = -1/2 [ sum_O log(2 pi noise) - log|V| + |e_O - B_O m|^2 + |m|^2 ]

(Ghahramani & Hinton 1996). `V` is the same for all rows of a pattern, so that a block of complete
rows, or of a frequent pattern, is scored for all components by two matrix products. That form
cancels, so it only says which components matter to a row; those few are scored again by the
residuals `e_O - B_O m`, which cancel nothing and keep their digits in float32 too. Rows of rare
patterns have a `V` each, from one matrix product and small factors in lanes.

Statistics are gathered as moments of `m` and of the residuals, those numbers being of the size of
the noise, and are turned into moments of `x` and `t` once a chunk, in float64. A missing entry has
residual 0 in the mean, of variance 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from genstream.families.blocks import (
    LOG_2PI,
    MAX_ROUNDING,
    Array,
    Index,
    Pivot,
    block_rows,
    slices,
)
from genstream.families.lanes import lane_inverse
from genstream.families.patterns import Patterns
from genstream.rows import Rows, pick
from genstream.stats import Monoid

# A component this many nats below a row's best one is not scored again: what it would get of the
# row is lost in the last digit of the sums.
DEPTH = 37.0
# A responsibility below this share of its row's weight is not gathered.
NEGLIGIBLE = 1e-16
# Units of roundoff by which the sum of a long product may be off, relative to its terms.
SLACK = 64.0
# A score that is off by less than this many nats, or sixteen times less as a rule, is good enough.
TIGHT = 16 * MAX_ROUNDING
# Residuals are kept from scoring to gathering for at most so many components a row on average.
HELD = 4
# Patterns with fewer rows than this in a chunk are worked on a row at a time.
FREQUENT = 64
# Numbers held for a block of rows of rare patterns.
LANE_NUMBERS = 1 << 20


class FactorsKernel:
    """Factors prepared for a pass, in pivot coordinates.

    Takes means (K, d), loadings (K, d, q) and noise variances (K, d).
    """

    def __init__(
        self,
        mean: Array,
        loadings: Array,
        noise: Array,
        log_weights: Array,
        pivot: Pivot,
        dtype: np.dtype[Any],
        stats_type: type[Any],
    ) -> None:
        self.mean, self.loadings = mean, loadings
        self.log_weights, self.pivot, self.dtype = log_weights, pivot, dtype
        self.stats_type = stats_type
        self.n_components, self.n_features, self.n_factors = loadings.shape
        self.deviation = np.sqrt(noise)
        self.white = loadings / self.deviation[:, :, None]
        # What an observed entry adds to the log-density beside its residual.
        self.normaliser = -0.5 * LOG_2PI - np.log(self.deviation) - np.log(pivot.scale)
        q = self.n_factors
        self.triangle = np.tril_indices(q)
        self.complete = Marginal(self, np.arange(self.n_features))

    def walk(self, rows: Rows) -> FactorsWalk:
        return FactorsWalk(self, rows)

    def moments(self, sums: Sums) -> tuple[Array, Array, Array, Array, Array, Array]:
        """Sums of `r`, `r t`, `r t t'`, `r x`, `r x t'`, `r x^2` from those of residuals.

        `x = mean + W t + sqrt(noise) e`, with `e` the residual.
        """
        mean, deviation, w = self.mean, self.deviation, sums.weight
        lifted = (self.loadings @ sums.t[:, :, None])[..., 0] + deviation * sums.e
        crossed = self.loadings @ sums.tt + deviation[:, :, None] * sums.et
        x = w[:, None] * mean + lifted
        xt = mean[:, :, None] * sums.t[:, None, :] + crossed
        square = ((self.loadings @ sums.tt) * self.loadings).sum(axis=2)
        square += 2 * deviation * (self.loadings * sums.et).sum(axis=2) + deviation**2 * sums.ee
        return w, sums.t, sums.tt, x, xt, mean * (w[:, None] * mean + 2 * lifted) + square


@dataclass
class Sums:
    """Sums over rows under their responsibilities, for K components and d columns: of 1, of `t`
    and `t t'`, of residuals `e`, of `e t'` and of `e^2`.
    """

    weight: Array
    t: Array
    tt: Array
    e: Array
    et: Array
    ee: Array

    @classmethod
    def zero(cls, k: int, d: int, q: int) -> Sums:
        return cls(
            np.zeros(k),
            np.zeros((k, q)),
            np.zeros((k, q, q)),
            np.zeros((k, d)),
            np.zeros((k, d, q)),
            np.zeros((k, d)),
        )

    def add(self, k: int, r: Array, m: Array, residual: Array) -> None:
        """Rows of component k with weights (n,), factor means (n, q) and residuals (n, d)."""
        weighted = m * r[:, None]
        self.weight[k] += r.sum(dtype=np.float64)
        self.t[k] += weighted.sum(axis=0, dtype=np.float64)
        self.tt[k] += weighted.T @ m
        self.e[k] += r @ residual
        self.et[k] += residual.T @ weighted
        self.ee[k] += r @ residual**2


class Marginal:
    """The marginal of the columns `seen` (o,) that a pattern observes.

    `spare` (K, q, q) is the factors' covariance given such a row, and `gain` (K, o, q) makes their
    mean, `m = e @ gain`.
    """

    def __init__(self, kernel: FactorsKernel, seen: Array) -> None:
        self.seen = seen
        self.white = kernel.white[:, seen]
        self.mean = kernel.mean[:, seen]
        self.inverse = 1.0 / kernel.deviation[:, seen]
        turned = self.white.swapaxes(1, 2)
        factor = np.linalg.cholesky(np.eye(kernel.n_factors) + turned @ self.white)
        root = np.linalg.inv(factor)
        self.spare = root.swapaxes(1, 2) @ root
        self.gain = self.white @ self.spare
        log_det = np.log(np.diagonal(factor, axis1=1, axis2=2)).sum(axis=1)
        self.constant = kernel.log_weights + kernel.normaliser[:, seen].sum(axis=1) - log_det
        dtype = kernel.dtype
        self.gain_ = self.gain.astype(dtype, copy=False)
        self.back_ = np.ascontiguousarray(turned, dtype=dtype)
        if kernel.n_components == 1:
            # |e|^2 - |e - B m|^2 - |m|^2 = |u|^2, u = e @ explain of length q.
            self.explain = (self.white[0] @ root[0].T).astype(dtype)
            return
        # |e|^2 as a product of [y^2, y] and |e|^2 - |e - B m|^2 - |m|^2 = |u|^2, u of length q.
        square = self.inverse**2
        self.form = np.concatenate([square, -2 * self.mean * square], axis=1).astype(dtype)
        self.centre = (self.mean**2 * square).sum(axis=1)
        project = (self.white * self.inverse[:, :, None]) @ root.swapaxes(1, 2)
        offset = self.mean[:, None, :] @ project
        self.offset = np.ascontiguousarray(offset[:, 0].T, dtype=dtype).reshape(-1, 1)
        # Factor by factor, so that what they explain adds up along rows.
        flat = project.transpose(2, 0, 1).reshape(-1, len(seen))
        self.project = np.ascontiguousarray(flat, dtype=dtype)


class PatternBlock:
    """Rows of one pattern: coarse scores of all components, fine ones of those that matter."""

    def __init__(self, walk: FactorsWalk, marginal: Marginal) -> None:
        self.walk, self.kernel, self.marginal = walk, walk.kernel, marginal
        kernel = walk.kernel
        self.pivot = Pivot(kernel.pivot.shift[marginal.seen], kernel.pivot.scale[marginal.seen])
        self.whole = len(marginal.seen) == kernel.n_features
        self.sums = Sums.zero(kernel.n_components, len(marginal.seen), kernel.n_factors)

    def load(self, values: Array) -> None:
        seen = values if self.whole else values[:, self.marginal.seen]
        self.y = np.subtract(seen, self.pivot.shift, dtype=np.float64)
        self.y *= 1.0 / self.pivot.scale
        self.held: dict[int, tuple[Array, Array, Array]] = {}

    def score(self) -> Array:
        kernel, n = self.kernel, len(self.y)
        if kernel.n_components == 1:
            every = np.arange(n)
            return self._fine(0, every, HELD * n)[None]
        log_p, wanted = self._coarse()
        if wanted is None:
            return log_p
        room = HELD * n
        for k in range(kernel.n_components):
            index = np.flatnonzero(wanted[k])
            if len(index):
                log_p[k, index] = self._fine(k, index, room)
                room -= len(index)
        return log_p

    def _coarse(self) -> tuple[Array, NDArray[np.bool_] | None]:
        """(K, n) scores by products that cancel, and whether each needs a closer look; None where
        none does.
        """
        kernel, marginal = self.kernel, self.marginal
        n, o = self.y.shape
        features = np.empty((n, 2 * o), dtype=kernel.dtype)
        features[:, o:] = self.y
        np.square(features[:, o:], out=features[:, :o])
        log_p: Array = (marginal.form @ features.T).astype(np.float64, copy=False)
        log_p += marginal.centre[:, None]
        # Of the residuals a row's best components leave, which is all that matters, the rounding.
        unit = SLACK * np.finfo(kernel.dtype).eps
        loose = unit * (np.abs(log_p) + marginal.centre[:, None])
        u = marginal.project @ features[:, o:].T
        u -= marginal.offset
        np.square(u, out=u)
        for explained in u.reshape(-1, *log_p.shape):
            log_p -= explained
        log_p *= -0.5
        log_p += marginal.constant[:, None]
        bar = (log_p - loose).max(axis=0) - DEPTH
        wanted = log_p + loose >= bar
        if not (wanted & (loose > TIGHT)).any():
            return log_p, None
        return log_p, wanted

    def _residuals(self, k: int, index: Array, dtype: Any) -> tuple[Array, Array]:
        """Factor means (n, q) and residuals (n, o) of some rows under component k."""
        marginal = self.marginal
        y = self.y if len(index) == len(self.y) else self.y[index]
        distance = y - marginal.mean[k]
        e = np.multiply(
            distance,
            marginal.inverse[k],
            out=distance if dtype == np.float64 else np.empty(y.shape, dtype),
            casting="same_kind",
        )
        m = e @ marginal.gain_[k] if dtype == self.kernel.dtype else e @ marginal.gain[k]
        e -= m @ (marginal.back_[k] if dtype == self.kernel.dtype else marginal.white[k].T)
        return m, e

    def _fine(self, k: int, index: Array, room: int) -> Array:
        m, residual = self._residuals(k, index, self.kernel.dtype)
        if len(index) <= room:
            self.held[k] = (index, m, residual)
        square = np.einsum("ij,ij->i", residual, residual) + np.einsum("ij,ij->i", m, m)
        return np.asarray(self.marginal.constant[k] - 0.5 * square.astype(np.float64))

    def gather(self, resp: Array) -> None:
        wanted = _wanted(resp)
        for k in np.flatnonzero(wanted.any(axis=1)):
            held = self.held.get(int(k))
            if held is None or wanted[k, held[0]].sum() < wanted[k].sum():
                index = np.flatnonzero(wanted[k])
                held = (index, *self._residuals(int(k), index, self.kernel.dtype))
            index, m, residual = held
            self.sums.add(int(k), resp[k, index].astype(m.dtype), m, residual)

    def posterior(self, k: int, index: Array) -> tuple[Array, Array]:
        """(n, q) means and (n, q, q) covariances of some rows' factors under component k."""
        m, _ = self._residuals(k, index, np.dtype(np.float64))
        return m, np.broadcast_to(
            self.marginal.spare[k], (len(index), *self.marginal.spare[k].shape)
        )

    def finish(self) -> None:
        """Add the pattern's sums to the walk's: `m` has covariance V about `t`, which residuals
        share, and missing entries have nothing but their noise.
        """
        total, sums, marginal = self.walk.sums, self.sums, self.marginal
        weight, seen = sums.weight, marginal.seen
        spare = weight[:, None, None] * marginal.spare
        shared = marginal.white @ spare
        total.weight += weight
        total.t += sums.t
        total.tt += sums.tt + spare
        total.e[:, seen] += sums.e
        total.et[:, seen] += sums.et - shared
        total.ee += weight[:, None]
        total.ee[:, seen] += sums.ee + (shared * marginal.white).sum(axis=2) - weight[:, None]


class LaneBlock:
    """Rows of any patterns: a `V` a row, from one product of the mask and the pairs of loadings."""

    def __init__(self, walk: FactorsWalk, observed: NDArray[np.bool_]) -> None:
        self.walk, self.kernel = walk, walk.kernel
        self.observed = observed.astype(np.float64)

    def load(self, values: Array) -> None:
        pivot = self.kernel.pivot
        self.y = (values - pivot.shift) / pivot.scale

    def _solve(self, k: int, index: Index) -> tuple[Array, Array, Array, Array]:
        """Of some rows under component k: `e` (n, d), zero where missing, `V` (q, q, n), the
        log-determinant of its inverse (n,), and `m` (q, n).
        """
        kernel, seen = self.kernel, self.observed[index]
        white = kernel.white[k]
        e = (self.y[index] - kernel.mean[k]) / kernel.deviation[k] * seen
        row, column = kernel.triangle
        pairs = (white[:, row] * white[:, column]).T @ seen.T
        q = kernel.n_factors
        matrices = np.empty((q, q, len(e)))
        matrices[row, column] = pairs
        matrices[column, row] = pairs
        matrices[range(q), range(q)] += 1.0
        spare, log_det = lane_inverse(matrices)
        return e, spare, log_det, np.einsum("ijn,jn->in", spare, white.T @ e.T)

    def score(self) -> Array:
        kernel = self.kernel
        log_p = self.observed @ kernel.normaliser.T + kernel.log_weights
        log_p = np.ascontiguousarray(log_p.T)
        for k in range(kernel.n_components):
            e, _, log_det, m = self._solve(k, slice(None))
            explained = np.einsum("qn,qn->n", m, kernel.white[k].T @ e.T)
            log_p[k] -= 0.5 * (np.einsum("ij,ij->i", e, e) - explained + log_det)
        return log_p

    def posterior(self, k: int, index: Array) -> tuple[Array, Array]:
        """(n, q) means and (n, q, q) covariances of some rows' factors under component k."""
        _, spare, _, m = self._solve(k, index)
        return m.T, np.moveaxis(spare, 2, 0)

    def gather(self, resp: Array) -> None:
        kernel, total = self.kernel, self.walk.sums
        # A row with nothing observed may be here, but says nothing.
        resp = resp * self.observed.any(axis=1)
        wanted = _wanted(resp)
        row, column = kernel.triangle
        for k in np.flatnonzero(wanted.any(axis=1)):
            index = np.flatnonzero(wanted[k])
            seen, r = self.observed[index], resp[k, index].astype(np.float64)
            e, spare, _, lanes = self._solve(int(k), index)
            m, white = lanes.T, kernel.white[k]
            residual = e - (m @ white.T) * seen
            total.add(int(k), r, m, residual)
            total.tt[k] += spare @ r
            weight = seen * r[:, None]
            # (d, q, q) sums of V over the rows that observed each column.
            shared = np.empty((kernel.n_features, *spare.shape[:2]))
            shared[:, row, column] = weight.T @ spare[row, column].T
            shared[:, column, row] = shared[:, row, column]
            moved = np.einsum("dij,dj->di", shared, white)
            total.et[k] -= moved
            total.ee[k] += (moved * white).sum(axis=1) + r.sum() - weight.sum(axis=0)

    def finish(self) -> None:
        """Sums are the walk's already."""


class FactorsWalk:
    """A walk over one chunk: frequent patterns one after another, then all other rows."""

    pattern_block = PatternBlock

    def __init__(self, kernel: FactorsKernel, rows: Rows) -> None:
        self.kernel, self.rows = kernel, rows
        k, d, q = kernel.n_components, kernel.n_features, kernel.n_factors
        self.size = block_rows(4 * d + k * (q + 1), 8)
        # Solving lanes is one step of the interpreter an entry, so that blocks must not be short.
        self.lane_size = int(np.clip(LANE_NUMBERS // (2 * d + 2 * q * q), 64, self.size))
        self.sums = Sums.zero(k, d, q)
        self.block: PatternBlock | LaneBlock | None = None
        self.index: Index = slice(0)
        self._whole: PatternBlock | None = None

    def blocks(self) -> Iterator[Index]:
        rows = self.rows
        if rows.observed is None:
            yield from self._dense(self.kernel.complete, None)
        else:
            found = Patterns(rows.observed)
            frequent = found.frequent(FREQUENT)
            for p in np.flatnonzero(frequent):
                seen = np.flatnonzero(found.observed[p])
                whole = len(seen) == self.kernel.n_features
                marginal = self.kernel.complete if whole else Marginal(self.kernel, seen)
                yield from self._dense(marginal, found.rows(int(p)))
            rare = ~frequent & (found.width > 0)
            left = found.order[np.repeat(rare, found.counts)]
            for piece in slices(len(left), self.lane_size):
                self._load_lanes(left[piece])
                yield left[piece]
        # The block refers back to the walk: without this a chunk would outlive its use until the
        # garbage collector comes round.
        self.block = None

    def _dense(self, marginal: Marginal, index: Array | None) -> Iterator[Index]:
        work = self.pattern_block(self, marginal)
        n = self.rows.n_rows if index is None else len(index)
        for piece in slices(n, self.size):
            self.index = piece if index is None else index[piece]
            work.load(pick(self.rows.values, self.index))
            self.block = work
            yield self.index
        work.finish()

    def _load_lanes(self, index: Index) -> None:
        block = LaneBlock(self, self.rows.is_observed[index])
        block.load(pick(self.rows.values, index))
        self.block, self.index = block, index

    def load(self, index: Index) -> None:
        observed = self.rows.observed
        if observed is not None and not observed[index].all():
            self._load_lanes(index)
            return
        if self._whole is None:
            self._whole = self.pattern_block(self, self.kernel.complete)
        self._whole.load(pick(self.rows.values, index))
        self.block, self.index = self._whole, index

    @property
    def _at_hand(self) -> PatternBlock | LaneBlock:
        assert self.block is not None
        return self.block

    def score(self) -> Array:
        return self._at_hand.score()

    def base(self) -> Array | None:
        return None

    def gather(self, resp: Array) -> None:
        self._at_hand.gather(resp)

    def complete(self, resp: Array, rng: np.random.Generator | None = None) -> Array:
        """Gaps filled by `mean + W m`, or by a draw of `t` and then of the noise."""
        kernel, pivot = self.kernel, self.kernel.pivot
        values = self.rows.values[self.index].astype(np.float64)
        if self.rows.observed is None:
            return values
        observed = self.rows.observed[self.index]
        filled = np.zeros_like(values)
        for k in np.flatnonzero(resp.any(axis=1)):
            index = np.flatnonzero(resp[k] > 0)
            m, spare = self._at_hand.posterior(int(k), index)
            if rng is not None:
                noise = rng.standard_normal((*m.shape, 1))
                m = m + (np.linalg.cholesky(spare) @ noise)[..., 0]
            y = kernel.mean[k] + m @ kernel.loadings[k].T
            if rng is not None:
                y += kernel.deviation[k] * rng.standard_normal(y.shape)
            filled[index] += resp[k, index, None] * y
        whole = resp.sum(axis=0)[:, None]
        return np.where(observed, values, pivot.shift * whole + pivot.scale * filled)

    def factors(self, component: Array) -> tuple[Array, Array]:
        n, q = len(component), self.kernel.n_factors
        mean, covariance = np.empty((n, q)), np.empty((n, q, q))
        for k in np.unique(component):
            index = np.flatnonzero(component == k)
            mean[index], covariance[index] = self._at_hand.posterior(int(k), index)
        return mean, covariance

    def close(self) -> Monoid:
        if self._whole is not None:
            self._whole.finish()
            self._whole = None
        self.block = None
        stats: Monoid = self.kernel.stats_type(*self.kernel.moments(self.sums))
        return stats


class MomentBlock(PatternBlock):
    """Complete rows, scored through the latent and gathered as moments of `x`."""

    walk: MomentWalk

    def __init__(self, walk: FactorsWalk, marginal: Marginal) -> None:
        super().__init__(walk, marginal)
        # Fresh memory for each block would take as long as all that is written to it.
        d, dtype = self.kernel.n_features, self.kernel.dtype
        self._room, self._rest = np.empty((0, d)), np.empty((0, d), dtype)

    def load(self, values: Array) -> None:
        n = len(values)
        if len(self._room) < n:
            self._room, self._rest = (
                np.empty(values.shape),
                np.empty(values.shape, self._rest.dtype),
            )
        self.y = np.subtract(values, self.pivot.shift, out=self._room[:n])
        self.y *= 1.0 / self.pivot.scale
        self.held = {}

    def score(self) -> Array:
        if self.kernel.n_components > 1:
            return super().score()
        marginal = self.marginal
        e = self._rest[: len(self.y)]
        np.subtract(self.y, marginal.mean[0], out=e, casting="same_kind")
        e *= marginal.inverse[0].astype(e.dtype)
        u = e @ marginal.explain
        square = np.einsum("ij,ij->i", e, e)
        if np.finfo(e.dtype).eps * float(square.max(initial=0.0)) > MAX_ROUNDING:
            # What factors explain is so much that little is left of its digits.
            return super().score()
        square -= np.einsum("ij,ij->i", u, u)
        return np.asarray(marginal.constant[0] - 0.5 * square.astype(np.float64))[None]

    def gather(self, resp: Array) -> None:
        """Add weighted products of rows with themselves, component by component.

        Only rows that a component has a part in are multiplied, and of a symmetric product only
        half is computed: with rows that are sure of their component that is a small part of what
        products of all rows' features take.
        """
        total, wanted = self.walk, _wanted(resp)
        for k in np.flatnonzero(wanted.any(axis=1)):
            weight, y = resp[k].astype(np.float64, copy=False), self.y
            index = np.flatnonzero(wanted[k])
            if 2 * len(index) < len(y):
                weight, y = weight[index], y[index]
            total.sum_w[k] += weight.sum()
            total.sum_wx[k] += weight @ y
            if not (weight == 1.0).all():
                y = y * np.sqrt(weight)[:, None]
            total.sum_wxx[k] += y.T @ y

    def finish(self) -> None:
        """Sums are the walk's already."""


class MomentWalk(FactorsWalk):
    """A walk over complete rows that sums 1, `x` and `x x'` a component.

    `dtype` is the arithmetic of moments. With d columns and q factors a score takes about
    2 d (q + 1) operations, where that of a Gaussian's features takes `d^2`.
    """

    pattern_block = MomentBlock

    def __init__(
        self, kernel: FactorsKernel, rows: Rows, stats_type: type[Any], dtype: np.dtype[Any]
    ) -> None:
        super().__init__(kernel, rows)
        k, d = kernel.n_components, kernel.n_features
        self.stats_type, self.dtype = stats_type, dtype
        self.sum_w, self.sum_wx, self.sum_wxx = np.zeros(k), np.zeros((k, d)), np.zeros((k, d, d))

    def close(self) -> Monoid:
        super().close()
        stats: Monoid = self.stats_type(self.sum_w, self.sum_wx, self.sum_wxx)
        return stats


def _wanted(resp: Array) -> NDArray[np.bool_]:
    """(K, n) which responsibilities are more than rounding."""
    return np.asarray(resp > NEGLIGIBLE * resp.sum(axis=0))
