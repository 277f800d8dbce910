"""Multivariate Gaussians with full or tied covariance, with gaps.

`x | k ~ N(mean_k, covariance_k)`. With pivot coordinates `y = (x - shift) / scale`, precision `P`
and `T(y) = [y_i y_j (i <= j), y, 1]`, `log p` is linear in `T`, so that all components are scored
by one matrix product.

A row with gaps is scored by the marginal of its observed entries `O`; its missing entries `M`
enter the statistics through their conditional moments (Ghahramani & Jordan 1994)

    E[x_M | x_O, k] = mean_M + A_k (x_O - mean_O),   A_k = covariance_MO inv(covariance_OO)
    Cov[x_M | x_O, k] = covariance_MM - A_k covariance_OM.

Both are linear in `x_O` with coefficients that only depend on the pattern of gaps. So rows are
grouped by pattern, the statistics of the *observed* entries are summed as if they were all there
is, and each pattern's sum is completed once, at the end of the chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from genstream.families.blocks import (
    LOG_2PI,
    Array,
    Index,
    Linear,
    Pivot,
    block_rows,
    moments,
    slices,
)
from genstream.rows import Rows
from genstream.stats import Monoid, Record, axes, record

# Patterns with fewer rows than this in a chunk are worked on many at a time.
FREQUENT = 48
# Numbers held at once while many rare patterns are worked on together.
LANE_NUMBERS = 1 << 20
# Below this share of a column's raw second moment a variance is rounding error.
SINGULAR = 1e-13
# Variance given to a component that cannot be estimated, as a share of the pivot's variance.
FLOOR = 1e-9


@dataclass(frozen=True, eq=False)
class FullParams(Record):
    """Means and covariances of K Gaussians, in data units."""

    mean: Array = axes("component", "feature")
    covariance: Array = axes("component", "feature", "feature_other")


@dataclass(frozen=True, eq=False)
class TiedParams(Record):
    """Means of K Gaussians and the covariance they share, in data units."""

    mean: Array = axes("component", "feature")
    covariance: Array = axes("feature", "feature_other")


@dataclass(frozen=True, eq=False)
class FullStats(Monoid):
    """Sums of `r`, `r y` and `r y y'` a component, in pivot coordinates."""

    sum_w: Array = axes("component")
    sum_wx: Array = axes("component", "feature")
    sum_wxx: Array = axes("component", "feature", "feature_other")


@dataclass(frozen=True, eq=False)
class TiedStats(Monoid):
    """Sums of `r` and `r y` a component, and of `y y'` over all, in pivot coordinates."""

    sum_w: Array = axes("component")
    sum_wx: Array = axes("component", "feature")
    sum_wxx: Array = axes("feature", "feature_other")


@dataclass(frozen=True, eq=False)
class NormalWishart(Record):
    """Conjugate prior `covariance ~ InvWishart(diag(scatter), dof)`,
    `mean | covariance ~ N(mean, covariance / strength)`, in data units.
    """

    mean: Array = axes("feature")
    scatter: Array = axes("feature")
    strength: float = axes()
    dof: float = axes()

    @classmethod
    def weak(cls, mean: Array, variance: Array, n_components: int, dof: float) -> NormalWishart:
        """The default prior of Fraley & Raftery (2007, section 3.2): `strength` 0.01, and a
        scatter that gives each of K components its share of the sample's volume.
        """
        share = n_components ** (2.0 / max(1, len(mean)))
        positive = np.where(variance > 0, variance, 1.0)
        return cls(mean, positive / share, 0.01, dof)


@dataclass(frozen=True, eq=False)
class Gaussian:
    """K Gaussians over d real columns, each with its own covariance or all with one (`tied`).

    Parameters
    ----------
    n_features
        Number of columns d.
    tied
        One covariance shared by all components.
    ridge
        Added to every variance after the M-step, in squared data units (scikit-learn's
        `reg_covar`). It is no prior, so the log-likelihood may then fall by a little.
    dtype
        Arithmetic of the E-step, float64 or float32; sums are float64 always.
    pivot, prior
        Fixed by `anchored`.
    """

    n_features: int
    tied: bool = False
    ridge: float = 0.0
    dtype: str = "float64"
    pivot: Pivot | None = record(Pivot)
    prior: NormalWishart | None = record(NormalWishart)

    @property
    def params_type(self) -> type[Record]:
        return TiedParams if self.tied else FullParams

    @property
    def stats_type(self) -> type[Monoid]:
        return TiedStats if self.tied else FullStats

    def anchored(self, sample: Rows, n_components: int, weak_prior: bool) -> Gaussian:
        """Pivot at the sample's mean and deviations, prior by `NormalWishart.weak`."""
        mean, variance, _ = moments(sample)
        prior = None
        if weak_prior:
            prior = NormalWishart.weak(mean, variance, n_components, self.n_features + 2.0)
        return replace(self, pivot=Pivot.of(mean, variance), prior=prior)

    @property
    def _pivot(self) -> Pivot:
        return self.pivot if self.pivot is not None else Pivot.none(self.n_features)

    def vague(self, n_components: int) -> Record:
        pivot = self._pivot
        return self._params(
            np.zeros((n_components, self.n_features)),
            np.broadcast_to(np.eye(self.n_features), (n_components, *pivot.scale.shape * 2)),
        )

    def _params(self, mean: Array, covariance: Array) -> Record:
        """Parameters in data units from pivot coordinates; (K, d, d) or (d, d) covariances."""
        pivot = self._pivot
        wide = covariance * np.outer(pivot.scale, pivot.scale)
        centre = pivot.shift + mean * pivot.scale
        if self.tied:
            return TiedParams(centre, wide[0] if wide.ndim == 3 else wide)
        return FullParams(centre, wide)

    def pivoted(self, params: Any) -> tuple[Array, Array]:
        """Mean (K, d) and covariance (K, d, d), or (1, d, d) if tied, in pivot coordinates."""
        pivot = self._pivot
        covariance = params.covariance / np.outer(pivot.scale, pivot.scale)
        return (params.mean - pivot.shift) / pivot.scale, np.atleast_3d(covariance).reshape(
            -1, self.n_features, self.n_features
        )

    def prepare(self, params: Any, log_weights: Array) -> GaussianKernel:
        """Factors every covariance. Raises numpy.linalg.LinAlgError where one is not positive
        definite, before any data are touched.
        """
        mean, covariance = self.pivoted(params)
        return GaussianKernel(
            mean, covariance, log_weights, self._pivot, self.tied, np.dtype(self.dtype)
        )

    def maximise(self, stats: Any, previous: Any) -> tuple[Record, NDArray[np.bool_]]:
        """Mode of the Normal-inverse-Wishart posterior (Fraley & Raftery 2007, eq. 7-9).

            mean_k = (strength m0 + sum_wx) / (strength + n_k)
            covariance_k = (diag(scatter) + S_k + c_k D_k) / (dof + n_k + d + 2)

        with `S_k` the scatter about the weighted mean, `D_k` the outer product of that mean's
        distance from `m0` and `c_k = strength n_k / (strength + n_k)`; without a prior
        `S_k / n_k`. Tied covariances add `S_k + c_k D_k` over k and divide by
        `dof + n + d + 1 + K` (`n` without a prior).
        """
        d = self.n_features
        pivot, prior = self._pivot, self.prior
        n = stats.sum_w
        faulty = n <= 1e-8
        safe = np.where(faulty, 1.0, n)
        mean = stats.sum_wx / safe[:, None]
        outer = safe[:, None, None] * mean[:, :, None] * mean[:, None, :]
        if self.tied:
            outer = outer[~faulty].sum(axis=0)
        scatter = stats.sum_wxx - outer
        diagonal = np.arange(d)
        raw = stats.sum_wxx[..., diagonal, diagonal]
        if prior is not None:
            m0 = (prior.mean - pivot.shift) / pivot.scale
            gap = np.where(faulty[:, None], 0.0, mean - m0)
            pull = prior.strength * n / (prior.strength + n)
            spread = pull[:, None, None] * gap[:, :, None] * gap[:, None, :]
            scatter = scatter + (spread.sum(axis=0) if self.tied else spread)
            scatter[..., diagonal, diagonal] += prior.scatter / pivot.scale**2
            mean = (prior.strength * m0 + stats.sum_wx) / (prior.strength + n)[:, None]
            count = prior.dof + d + 2 + n
            if self.tied:
                count = prior.dof + d + 1 + len(n) + n.sum()
            faulty = np.zeros_like(faulty)
        else:
            count = n.sum() if self.tied else safe
            mean = np.where(faulty[:, None], self.pivoted(previous)[0], mean)
        covariance = scatter / np.reshape(count, (-1, 1, 1))
        covariance = (covariance + covariance.swapaxes(-1, -2)) / 2
        covariance[:, diagonal, diagonal] += self.ridge / pivot.scale**2
        singular = self._singular(covariance, np.reshape(raw, (-1, d)) / np.reshape(count, (-1, 1)))
        if not self.tied:
            singular |= faulty
        if singular.any():
            # An axis keeps what the data said of its variance, above a floor, and no correlation.
            variance = np.maximum(covariance[singular][:, diagonal, diagonal], FLOOR)
            variance = np.where(np.isfinite(variance), variance, 1.0)
            covariance[singular] = np.eye(d) * variance[:, None, :]
        return self._params(mean, covariance), singular | faulty

    @staticmethod
    def _singular(covariance: Array, raw: Array) -> NDArray[np.bool_]:
        """Which of (C, d, d) covariances are not safely positive definite, given the raw second
        moments (C, d) they were computed from.
        """
        singular = np.zeros(len(covariance), dtype=bool)
        for c, matrix in enumerate(covariance):
            variance = np.diagonal(matrix)
            if not np.isfinite(matrix).all() or (variance <= SINGULAR * raw[c]).any():
                singular[c] = True
                continue
            try:
                factor = np.linalg.cholesky(matrix)
            except np.linalg.LinAlgError:
                singular[c] = True
                continue
            singular[c] = bool((np.diagonal(factor) ** 2 <= SINGULAR * variance).any())
        return singular

    def log_prior(self, params: Any) -> float:
        prior = self.prior
        if prior is None:
            return 0.0
        pivot = self._pivot
        mean, covariance = self.pivoted(params)
        precision = np.linalg.inv(covariance)
        log_det = np.linalg.slogdet(covariance)[1] + 2 * np.log(pivot.scale).sum()
        trace = np.einsum("cii,i->c", precision, prior.scatter / pivot.scale**2)
        gap = mean - (prior.mean - pivot.shift) / pivot.scale
        pull = np.einsum(
            "ki,kij,kj->k", gap, np.broadcast_to(precision, (len(gap), *precision.shape[1:])), gap
        )
        weight = prior.dof + self.n_features + 1 + (len(gap) if self.tied else 1)
        return float(-0.5 * (weight * log_det.sum() + trace.sum() + prior.strength * pull.sum()))

    def place(self, params: Any, component: int, x: Array, observed: Array) -> Record:
        """The component moves to the row, with the vague covariance's share of the volume."""
        mean, covariance = self.pivoted(params)
        target = (x - self._pivot.shift) / self._pivot.scale
        mean, covariance = mean.copy(), covariance.copy()
        mean[component] = np.where(observed, target, 0.0)
        if not self.tied:
            share = len(mean) ** (2.0 / self.n_features)
            covariance[component] = np.eye(self.n_features) / share
        return self._params(mean, covariance)

    def draw(self, params: Any, component: Array, rng: np.random.Generator) -> Array:
        out = np.empty((len(component), self.n_features))
        noise = rng.standard_normal(out.shape)
        for k in np.unique(component):
            chosen = component == k
            covariance = params.covariance if self.tied else params.covariance[k]
            out[chosen] = params.mean[k] + noise[chosen] @ np.linalg.cholesky(covariance).T
        return out

    def embed(self, rows: Rows) -> tuple[Array, Array]:
        observed = rows.is_observed
        pivot = self._pivot
        return np.where(observed, (rows.values - pivot.shift) / pivot.scale, 0.0), observed

    def n_parameters(self, n_components: int) -> int:
        d = self.n_features
        return n_components * d + (1 if self.tied else n_components) * d * (d + 1) // 2

    def floored(self, params: Any) -> list[tuple[int, int]]:
        """(component, column position) whose variance sits on its floor or ridge."""
        _, covariance = self.pivoted(params)
        floor = np.maximum(FLOOR, self.ridge / self._pivot.scale**2) * 1.5
        variance = np.diagonal(covariance, axis1=1, axis2=2)
        return [(int(k), int(j)) for k, j in np.argwhere(variance <= floor)]


class GaussianKernel:
    """Gaussians prepared for a pass, in pivot coordinates."""

    def __init__(
        self,
        mean: Array,
        covariance: Array,
        log_weights: Array,
        pivot: Pivot,
        tied: bool,
        dtype: np.dtype[Any],
    ) -> None:
        self.mean, self.covariance = mean, covariance
        self.log_weights, self.pivot, self.tied, self.dtype = log_weights, pivot, tied, dtype
        factor = np.linalg.cholesky(covariance)
        self.whiten = np.linalg.inv(factor)
        self.precision = self.whiten.swapaxes(1, 2) @ self.whiten
        self.log_det = 2 * np.log(np.diagonal(factor, axis1=1, axis2=2)).sum(axis=1)
        self.n_components, self.n_features = mean.shape
        everything = np.ones((1, self.n_features), dtype=bool)
        self.complete = Marginals(self, everything)

    @cached_property
    def tied_linear(self) -> Linear:
        """Natural parameters of `[y, 1]` where all components share the quadratic term."""
        precision = self.precision[0]
        slope = self.mean @ precision
        quadratic = (slope * self.mean).sum(axis=1)
        constant = self.complete.constant(quadratic)
        return Linear(np.column_stack([slope, constant]), 2 * quadratic, self.dtype)

    def walk(self, rows: Rows) -> GaussianWalk:
        return GaussianWalk(self, rows)


class Marginals:
    """The marginals of P patterns that observe the same number o of columns.

    Everything has leading axes (P, C) with C = K covariances, or 1 where they are tied:
    precision of the observed entries (o, o) and the completion `y = lift @ y_O + offset`,
    with the conditional covariance of the missing entries in `spare` (d, d).
    """

    def __init__(self, kernel: GaussianKernel, patterns: NDArray[np.bool_]) -> None:
        self.kernel = kernel
        n_patterns, d = patterns.shape
        o = int(patterns[0].sum())
        m = d - o
        order = np.argsort(~patterns, axis=1, kind="stable")
        self.seen, missing = order[:, :o], order[:, o:]
        self.n_observed = o
        every = np.arange(n_patterns)
        seen_pair = (slice(None), self.seen[:, :, None], self.seen[:, None, :])
        log_scale = np.log(kernel.pivot.scale)
        self.log_scale = (log_scale * patterns).sum(axis=1)
        mean = kernel.mean
        self.mean = mean[:, self.seen].swapaxes(0, 1)
        if m == 0:
            self.precision = kernel.precision[None]
            self.log_det = kernel.log_det[None]
            return
        # Only the smaller side is factored: the missing block of the precision, or the
        # observed block of the covariance.
        if m <= o:
            hidden = kernel.precision[:, missing[:, :, None], missing[:, None, :]].swapaxes(0, 1)
            cross = kernel.precision[:, missing[:, :, None], self.seen[:, None, :]].swapaxes(0, 1)
            spread = _inverse(hidden)
            gain = -spread @ cross
            self.precision = (
                kernel.precision[seen_pair].swapaxes(0, 1) + cross.swapaxes(2, 3) @ gain
            )
            factor = np.linalg.cholesky(hidden)
            self.log_det = kernel.log_det + 2 * np.log(np.diagonal(factor, axis1=2, axis2=3)).sum(
                axis=2
            )
        else:
            observed = kernel.covariance[seen_pair].swapaxes(0, 1)
            cross = kernel.covariance[:, missing[:, :, None], self.seen[:, None, :]].swapaxes(0, 1)
            self.precision = _inverse(observed)
            factor = np.linalg.cholesky(observed)
            self.log_det = 2 * np.log(np.diagonal(factor, axis1=2, axis2=3)).sum(axis=2)
            gain = cross @ self.precision
            hidden = kernel.covariance[:, missing[:, :, None], missing[:, None, :]].swapaxes(0, 1)
            spread = hidden - gain @ cross.swapaxes(2, 3)
        n_covariances = len(kernel.covariance)
        self.lift = np.zeros((n_patterns, n_covariances, d, o))
        self.lift[every[:, None], :, self.seen, np.arange(o)[None]] = 1.0
        self.lift[every[:, None], :, missing] = gain.swapaxes(1, 2)
        missed = mean[:, missing].swapaxes(0, 1)
        self.offset = np.zeros((n_patterns, len(mean), d))
        self.offset[every[:, None], :, missing] = (
            missed - (gain @ self.mean[..., None])[..., 0]
        ).swapaxes(1, 2)
        self.spare = np.zeros((n_patterns, n_covariances, d, d))
        self.spare[every[:, None, None], :, missing[:, :, None], missing[:, None, :]] = np.moveaxis(
            spread, 1, 3
        )

    def constant(self, quadratic: Array) -> Array:
        """Log-density at `y = 0` from `mean' P mean` (..., K), without the base measure."""
        log_det, log_scale = self.log_det, self.log_scale[:, None]
        if quadratic.ndim == 1:
            log_det, log_scale = log_det[0], log_scale[0]
        return np.asarray(
            -0.5 * (quadratic + log_det + self.n_observed * LOG_2PI)
            - log_scale
            + self.kernel.log_weights
        )

    @cached_property
    def eta(self) -> Array:
        """(P, K, o(o+1)/2 + o + 1) natural parameters of the features of `fill_features`."""
        o = self.n_observed
        slope = (self.precision @ self.mean[..., None])[..., 0]
        self.quadratic = (slope * self.mean).sum(axis=2)
        upper = np.triu_indices(o)
        pairs = -self.precision[:, :, upper[0], upper[1]]
        pairs[..., upper[0] == upper[1]] *= 0.5
        pairs = np.broadcast_to(pairs, (*slope.shape[:2], pairs.shape[2]))
        return np.concatenate([pairs, slope, self.constant(self.quadratic)[..., None]], axis=2)

    @cached_property
    def linear(self) -> Linear:
        """The natural parameters of a single pattern."""
        eta = self.eta[0]
        return Linear(eta, 2 * self.quadratic[0], self.kernel.dtype)

    def complete(self, sums: Array) -> tuple[Array, Array, Array]:
        """Statistics (K,), (K, d), (K, d, d) over all columns from those of the observed ones.

        `sums` is (P, K, p): the sums of the features of each pattern's rows. With lift F, offset
        f and conditional covariance C, `y = F y_O + f` completes a row, so its moments complete to
        `F Q F' + F s f' + f s'F' + n (f f' + C)`.
        """
        o = self.n_observed
        upper = np.triu_indices(o)
        n = sums[..., -1]
        s = sums[..., -1 - o : -1]
        q = np.empty((*sums.shape[:2], o, o))
        q[..., upper[0], upper[1]] = sums[..., : len(upper[0])]
        q[..., upper[1], upper[0]] = sums[..., : len(upper[0])]
        if o == self.kernel.n_features:
            return n.sum(axis=0), s.sum(axis=0), q.sum(axis=0)
        f = self.offset
        lifted = (self.lift @ s[..., None])[..., 0]
        cross = lifted[..., :, None] * f[..., None, :]
        total = self.lift @ q @ self.lift.swapaxes(2, 3) + cross + cross.swapaxes(2, 3)
        total += n[..., None, None] * (f[..., :, None] * f[..., None, :] + self.spare)
        return n.sum(axis=0), (lifted + n[..., None] * f).sum(axis=0), total.sum(axis=0)


def _inverse(matrices: Array) -> Array:
    """Inverse of stacked symmetric positive definite matrices through their Cholesky factors."""
    whiten = np.linalg.inv(np.linalg.cholesky(matrices))
    return whiten.swapaxes(-1, -2) @ whiten


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
        observed = self.rows.observed
        if observed is None:
            yield from self._dense(self.kernel.complete, None)
            return
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
            marginal = Marginals(self.kernel, patterns[p : p + 1])
            if width[p] == self.kernel.n_features:
                marginal = self.kernel.complete
            yield from self._dense(marginal, order[starts[p] : starts[p + 1]])
        for o in range(1, self.kernel.n_features + 1):
            rare = np.flatnonzero(~frequent & (width == o))
            yield from self._sparse(patterns, rare, counts, starts, order)

    def _dense(self, marginal: Marginals, index: Array | None) -> Iterator[Index]:
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

    def _sparse(
        self, patterns: Array, rare: Array, counts: Array, starts: Array, order: Array
    ) -> Iterator[Index]:
        """Blocks of rows whose patterns are rare but observe equally many columns: the linear
        algebra of many patterns at a time.
        """
        if not len(rare):
            return
        kernel = self.kernel
        o = int(patterns[rare[0]].sum())
        numbers = kernel.n_components * kernel.n_features**2 * 4
        batch = max(1, LANE_NUMBERS // numbers)
        for piece in slices(len(rare), batch):
            chosen = rare[piece]
            marginals = Marginals(kernel, patterns[chosen])
            total = np.zeros((len(chosen), kernel.n_components, o * (o + 1) // 2 + o + 1))
            position = np.repeat(np.arange(len(chosen)), counts[chosen])
            index = np.concatenate([order[starts[p] : starts[p + 1]] for p in chosen])
            for part in slices(len(index), batch):
                work = _LaneBlock(self, marginals, total, position[part])
                work.load(self.rows.values[index[part]])
                self.block = work
                yield index[part]
            self.add(marginals, total)

    def score(self) -> Array:
        return self.block.score()  # type: ignore[no-any-return]

    def base(self) -> Array | None:
        return None

    def gather(self, resp: Array) -> None:
        self.block.gather(resp)

    def add(self, marginals: Marginals, sums: Array) -> None:
        """Complete the feature sums (P, K, p) of some patterns and add them up."""
        n, s, q = marginals.complete(sums)
        self.sum_w += n
        self.sum_wx += s
        self.sum_wxx += q.sum(axis=0) if self.kernel.tied else q

    def close(self) -> Monoid:
        kind = TiedStats if self.kernel.tied else FullStats
        return kind(self.sum_w, self.sum_wx, self.sum_wxx)


class _PatternBlock:
    """Blocks of one pattern: features of the observed columns, one GEMM each way."""

    def __init__(self, walk: GaussianWalk, marginal: Marginals) -> None:
        self.walk, self.marginal, self.linear = walk, marginal, marginal.linear
        o = marginal.n_observed
        self.width = o * (o + 1) // 2 + o + 1
        self.sums = np.zeros((walk.kernel.n_components, self.width))
        self.seen = marginal.seen[0]
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
        precision = marginal.precision[0, k if len(marginal.precision[0]) > 1 else 0]
        whiten = np.linalg.cholesky(precision).T
        z = whiten @ (self.y - marginal.mean[0, k][:, None])
        zero = marginal.constant(np.zeros_like(marginal.quadratic))[0, k]
        return np.asarray(zero - 0.5 * np.einsum("in,in->n", z, z))

    def gather(self, resp: Array) -> None:
        self.sums += self.linear.gather(self.features, self.exact, resp)

    def finish(self) -> None:
        self.walk.add(self.marginal, self.sums[None])


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
    """Rows whose patterns differ but observe equally many columns: batched products."""

    def __init__(
        self, walk: GaussianWalk, marginals: Marginals, total: Array, position: Array
    ) -> None:
        self.walk, self.marginals, self.total, self.position = walk, marginals, total, position

    def load(self, values: Array) -> None:
        pivot = self.walk.kernel.pivot
        seen = self.marginals.seen[self.position]
        x = np.take_along_axis(values, seen, axis=1)
        y = (x - pivot.shift[seen]) / pivot.scale[seen]
        self.y = y
        self.features = fill_features(y.T, np.empty((self.total.shape[2], len(y)))).T

    def score(self) -> Array:
        marginals = self.marginals
        eta = marginals.eta[self.position]
        log_p = (eta @ self.features[:, :, None])[:, :, 0].T
        far = np.finfo(np.float64).eps * marginals.quadratic.max(axis=0)
        for k in np.flatnonzero(far > 1e-3):
            gap = self.y - marginals.mean[self.position, k]
            which = k if marginals.precision.shape[1] > 1 else 0
            precision = marginals.precision[self.position, which]
            zero = marginals.constant(np.zeros_like(marginals.quadratic))[self.position, k]
            log_p[k] = zero - 0.5 * np.einsum("ni,nij,nj->n", gap, precision, gap)
        return np.ascontiguousarray(log_p).astype(self.walk.kernel.dtype, copy=False)

    def gather(self, resp: Array) -> None:
        products = resp.T[:, :, None].astype(np.float64) * self.features[:, None, :]
        change = np.flatnonzero(np.diff(self.position, prepend=-1))
        self.total[self.position[change]] += np.add.reduceat(products, change, axis=0)
