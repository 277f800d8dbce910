"""Count columns that are sums of a few gamma-distributed factors: GaP, or Poisson factorisation.

    t_i ~ Gamma(shape a_ki, rate a_ki),    x_j | k, t ~ Poisson(sum_i W_kji t_i)

(Canny 2004). Factors have mean 1, which settles their scale, so `W_kji` are the counts of column j
that factor i is worth. With `z_ji ~ Poisson(W_ji t_i)` the share of factor i in `x_j`, the bound of
`log p(x | k)` takes `q(t) q(z)` for the posterior (Cemgil 2009, section 3.1):

    q(t_i) = Gamma(alpha_i, beta_i),   beta_i = a_i + sum_j W_ji,   alpha_i = a_i + sum_j E[z_ji],
    E[z_ji] = x_j phi_ji,   phi_ji = W_ji g_i / sum_i W_ji g_i,
    g_i = exp(E[log t_i]) = exp(digamma(alpha_i)) / beta_i

solved for in every E-step. In `u = digamma(alpha)` the bound has the gradient `a + s - alpha`,
`s_i = sum_j x_j phi_ji`, and minus the second derivative

    diag(1 / trigamma(alpha) - s) + sum_j x_j phi_j phi_j',

which is positive wherever the gradient vanishes if `a >= 1/2`, since `1 / trigamma(v) > v - 1/2`:
every stationary point is then a maximum, and so there is one only. Shapes are kept that large, so
that a row has one best bound wherever the iteration begins and no local state is kept between
passes. What is summed are `E[z_ji]`, the exposure `E[t_i]` over the rows that observed column j,
and `E[t_i]` and `E[log t_i]` for the shapes. A missing entry drops out, exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.special import digamma, gammaln

from genstream.families.blocks import (
    MAX_ROUNDING,
    UNSEEN,
    Array,
    Description,
    Index,
    Pivot,
    block_rows,
    by_component,
    moments,
    slices,
)
from genstream.families.factorials import log_factorial
from genstream.families.importance import mean_weights
from genstream.families.negative_binomial import inverse_log_minus_psi
from genstream.families.one_kind import OneKind
from genstream.rows import Rows
from genstream.schema import Schema
from genstream.stats import Monoid, Record, axes

# A row's bound counts as tight once it is estimated to lie this far below its maximum, in nats.
TIGHT = {"float64": 1e-10, "float32": 1e-6}
# Steps after which a row's bound is taken as it is.
MAX_LOCAL = 2000
# What a row's caution is multiplied by after a step that did not overshoot, in the first steps.
RELAXING, MAX_RELAXING = 0.8, 200
# The furthest a logarithm moves in one step.
MAX_MOVE = 2.0
# Shapes of the factors: below the least a row may have several best bounds, and beyond the most a
# factor is as good as constant.
LEAST_SHAPE, MOST_SHAPE = 0.5, 1e6
# A smaller loading is nothing; it would only slow arithmetic.
LEAST_LOADING = {"float64": 1e-200, "float32": 1e-30}
# A smaller rate is this: finite, so that its logarithm is.
LEAST_RATE = {"float64": 1e-280, "float32": 1e-36}
# Steps of the recurrence of the trigamma function before its series.
TRIGAMMA_SHIFT = 4
# Blocks with no larger a share of counts that are not 0 are kept as sparse matrices.
SPARSE = 0.05
# A start looks at no more rows of a component than this, and takes so many multiplicative steps.
START_ROWS, START_STEPS = 2000, 30
# Newton steps towards the mode of a row's factors.
MODE_STEPS = 8
# The largest shape a start gives a factor.
START_SHAPE = 20.0


@dataclass(frozen=True, eq=False)
class GammaPoissonParams(Record):
    """What each factor is worth at its mean, 1, in counts of each column; and its gamma shape."""

    loadings: Array = axes("component", "count", "factor")
    shape: Array = axes("component", "factor")


@dataclass(frozen=True, eq=False)
class GammaPoissonStats(Monoid):
    """Sums over rows of `r E[z]`, of `r E[t]` over the rows that observed the column, and of `r`,
    `r E[t]` and `r E[log t]` over all.
    """

    sum_z: Array = axes("component", "count", "factor")
    sum_exposure: Array = axes("component", "count", "factor")
    sum_w: Array = axes("component")
    sum_t: Array = axes("component", "factor")
    sum_log_t: Array = axes("component", "factor")


@dataclass(frozen=True, eq=False)
class GammaPoissonPrior(Record):
    """`rows` pseudo-rows at the sample's means, whose counts the factors share evenly: a gamma
    distribution of every loading, with its mode at `rate / q`.
    """

    rate: Array = axes("count")
    rows: float = axes()

    def stronger(self, strength: float, spread: float) -> GammaPoissonPrior:  # noqa: ARG002
        """`strength` times the pseudo-rows; a rate has no spread of its own."""
        return replace(self, rows=self.rows * strength)


@dataclass(frozen=True, eq=False)
class GammaPoisson(OneKind):
    """K components of count columns, each with gamma factors of its own.

    Scores are the lower bound of the module's head; arithmetic over factors is in float64 always.

    Parameters
    ----------
    n_factors
        q, at least 1.
    """

    n_factors: int = 1  # type: ignore[misc]

    name: ClassVar[str] = "gamma_poisson"
    sparse: ClassVar[bool] = True
    bound: ClassVar[bool] = True
    param_names: ClassVar[tuple[str, ...]] = ("loadings", "shape")
    params_type: ClassVar[type[Record]] = GammaPoissonParams
    stats_type: ClassVar[type[Monoid]] = GammaPoissonStats
    prior_type: ClassVar[type[Record]] = GammaPoissonPrior

    def options(self) -> dict[str, Any]:
        return {"n_factors": self.n_factors, "dtype": self.dtype}

    @classmethod
    def of(
        cls, schema: Schema, options: Mapping[str, Any], pivot: Pivot | None, prior: Any
    ) -> GammaPoisson:
        return cls(schema, options["dtype"], pivot, prior, options["n_factors"])

    def anchored(self, sample: Rows, n_components: int, weak_prior: bool) -> GammaPoisson:  # noqa: ARG002
        """Neutral pivot; the weak prior is one pseudo-row at the sample's means."""
        prior = None
        if weak_prior:
            mean, _, total = moments(sample.dense())
            prior = GammaPoissonPrior((mean * total + 0.5) / (total + 1.0), 1.0)
        return replace(self, pivot=Pivot.none(self.schema.n_features), prior=prior)

    def vague(self, n_components: int) -> Record:
        d, q = self.schema.n_features, self.n_factors
        rate = np.ones(d) if self.prior is None else self.prior.rate
        loadings = np.broadcast_to(rate[:, None] / q, (n_components, d, q)).copy()
        return GammaPoissonParams(loadings, np.ones((n_components, q)))

    def start(
        self, params: Any, sample: Rows, responsibilities: Array, rng: np.random.Generator
    ) -> Record:
        """Each component's rows factored as `x = W t` by multiplicative steps from random numbers
        (Lee & Seung 2001, theorem 2) over observed entries; shapes fit the variances of `t`.
        """
        loadings, shape = params.loadings.copy(), params.shape.copy()
        sample = sample.dense()
        for k in range(len(shape)):
            weight = sample.row_weights * responsibilities[:, k]
            rows = np.flatnonzero(weight > 0)
            if len(rows) > START_ROWS:
                rows = np.sort(rng.choice(rows, START_ROWS, replace=False))
            w = loadings[k] * rng.uniform(0.5, 1.5, loadings[k].shape)
            if len(rows):
                share = weight[rows] / weight[rows].sum()
                w, t = _factored(sample[rows], w, share)
                spread = np.maximum(share @ (t - 1.0) ** 2, 1 / START_SHAPE)
                shape[k] = np.clip(1 / spread, 1.0, START_SHAPE)
            loadings[k] = w
        return GammaPoissonParams(loadings, shape)

    def prepare(self, params: Any, log_weights: Array) -> GammaPoissonKernel:
        return GammaPoissonKernel(self, params, log_weights)

    def maximise(
        self, stats: Any, previous: Any, frozen: frozenset[str] = frozenset()
    ) -> tuple[Record, NDArray[np.bool_]]:
        """`W_ji = (sum E[z_ji] + rows rate_j / q) / (sum E[t_i] + rows)`, and the shape at which
        `log a - digamma(a) = mean E[t] - mean E[log t] - 1`, by Newton's method.

        Without a prior a column that a component never observed keeps its previous loadings.
        """
        tiny = UNSEEN * float(stats.sum_w.max())
        loadings, shape = previous.loadings, previous.shape
        if "loadings" not in frozen:
            counts, exposure = stats.sum_z, stats.sum_exposure
            if self.prior is not None:
                counts = counts + self.prior.rows * self.prior.rate[:, None] / self.n_factors
                exposure = exposure + self.prior.rows
            known = exposure > tiny
            loadings = np.where(known, counts / np.where(known, exposure, 1.0), loadings)
        weight = stats.sum_w[:, None]
        if "shape" not in frozen:
            safe = np.where(weight > tiny, weight, 1.0)
            excess = (stats.sum_t - stats.sum_log_t) / safe - 1.0
            found = np.clip(inverse_log_minus_psi(excess), LEAST_SHAPE, MOST_SHAPE)
            shape = np.where(weight > tiny, found, shape)
        faulty = stats.sum_w <= tiny
        if self.prior is not None:
            faulty = np.zeros_like(faulty)
        return GammaPoissonParams(loadings, shape), faulty

    def possible(self, stats: Any, known: Any) -> Monoid | None:
        """Sums, and the spread of the factors (arithmetic over geometric mean), kept above a tenth
        of the known ones.
        """
        if not all(np.isfinite(value).all() for _, _, value in stats.leaves()):
            return None

        def kept(value: Array, old: Array) -> Array:
            return np.maximum(value, 0.1 * old)

        sum_w, sum_t = kept(stats.sum_w, known.sum_w), kept(stats.sum_t, known.sum_t)
        spread = kept(
            _log_mean(sum_w, sum_t) - stats.sum_log_t,
            _log_mean(known.sum_w, known.sum_t) - known.sum_log_t,
        )
        return GammaPoissonStats(
            kept(stats.sum_z, known.sum_z),
            kept(stats.sum_exposure, known.sum_exposure),
            sum_w,
            sum_t,
            _log_mean(sum_w, sum_t) - spread,
        )

    def expected_log_prob(self, params: Any, stats: Any) -> float:
        a = params.shape
        of_counts = stats.sum_z * _log(params.loadings) - stats.sum_exposure * params.loadings
        of_factors = stats.sum_w[:, None] * (a * np.log(a) - gammaln(a))
        of_factors += (a - 1.0) * stats.sum_log_t - a * stats.sum_t
        return float(of_counts.sum() + of_factors.sum())

    def log_prior(self, params: Any) -> float:
        if self.prior is None:
            return 0.0
        share = self.prior.rate[:, None] / self.n_factors
        of_loadings = share * _log(params.loadings) - params.loadings
        return float(self.prior.rows * of_loadings.sum())

    def place(self, params: Any, component: int, x: Array, observed: Array) -> Record:
        """Means lean half towards the row, in the proportions of the next component's factors."""
        loadings, shape = params.loadings.copy(), params.shape.copy()
        following = (component + 1) % len(shape)
        pooled = params.loadings.sum(axis=2).mean(axis=0)
        mean = np.where(observed, 0.5 * (x + pooled), pooled)
        total = params.loadings[following].sum(axis=1)
        share = params.loadings[following] / np.where(total > 0, total, 1.0)[:, None]
        loadings[component] = mean[:, None] * np.where(
            total[:, None] > 0, share, 1.0 / self.n_factors
        )
        shape[component] = params.shape[following]
        return GammaPoissonParams(loadings, shape)

    def draw(
        self, params: Any, component: Array, rng: np.random.Generator
    ) -> tuple[Array, Array | None]:
        shape = params.shape[component]
        t = rng.gamma(shape) / shape
        out = np.empty((len(component), self.schema.n_features))
        for k, rows in by_component(component):
            out[rows] = rng.poisson(t[rows] @ params.loadings[k].T)
        return out, t

    def mean(self, params: Any) -> Array:
        return np.asarray(params.loadings.sum(axis=2))

    def condition(self, params: Any, x: Array, given: Array) -> tuple[GammaPoisson, Record, Array]:
        """Approximate: `q(t_i) = Gamma(alpha, beta)` given `x` takes the place of the factors'
        prior, so that with means of 1 again the loadings become `W_i alpha / beta` and the shapes
        `alpha`. `log_p` is a bound.
        """
        loadings, shape = params.loadings.copy(), params.shape.copy()
        kernel = self.with_dtype("float64").prepare(params, np.zeros(len(shape)))
        walk = kernel.walk(Rows(x[None], given[None]))
        walk.load(slice(0, 1))
        log_p = walk.score()[:, 0] + walk.base()
        for k, (alpha, beta) in enumerate(walk.local):
            loadings[k] *= alpha[0] / beta[0]
            shape[k] = alpha[0]
        rest, kept = self.marginal(GammaPoissonParams(loadings, shape), np.flatnonzero(~given))
        return rest, kept, log_p

    def embed(self, rows: Rows) -> tuple[Array, Array]:
        return super().embed(rows.dense())

    def describe(self, params: Any) -> Description:
        rate, loadings = self.mean(params), params.loadings

        def covariance(k: int) -> Array:
            return np.asarray((loadings[k] / params.shape[k]) @ loadings[k].T + np.diag(rate[k]))

        variance = rate + (loadings**2 / params.shape[:, None]).sum(axis=2)
        return Description(rate, np.sqrt(variance), covariance=covariance, loadings=loadings)

    def rounding(self, params: Any) -> Array:
        """Sums over the columns, and what an iteration ended early leaves."""
        counts = _size(params)
        exact = np.finfo(np.float64).eps
        unit = float(np.finfo(self.dtype).eps)
        return np.asarray(
            np.minimum(unit * counts, MAX_ROUNDING) + exact * counts + 10 * TIGHT[self.dtype]
        )

    def n_parameters(self, n_components: int) -> int:
        return n_components * (self.schema.n_features + 1) * self.n_factors


def _log(loadings: Array) -> Array:
    """Log, finite where a loading is 0."""
    return np.log(np.maximum(loadings, LEAST_RATE["float64"]))


def _trigamma(x: Array) -> Array:
    """`psi'(x)` of `x >= 1/2` to seven digits, many times as fast as SciPy's."""
    y = x + TRIGAMMA_SHIFT
    inverse = 1.0 / y
    square = inverse * inverse
    series = (1.0 / 6 - (1.0 / 30 - square / 42) * square) * inverse
    total = inverse * (1.0 + inverse * (0.5 + series))
    for i in range(TRIGAMMA_SHIFT):
        total += 1.0 / (x + i) ** 2
    return np.asarray(total)


def _log_mean(sum_w: Array, sum_t: Array) -> Array:
    """(K, q) weight times the log of the factors' mean."""
    weight = sum_w[:, None]
    return np.asarray(weight * np.log(np.maximum(sum_t, 1e-300) / np.maximum(weight, 1e-300)))


def _size(params: Any) -> Array:
    """(K,) size of the terms `x log rate - rate` near the mean, which cancel."""
    rate = params.loadings.sum(axis=2)
    return np.asarray((rate * (1.0 + np.abs(_log(rate)))).sum(axis=1))


def _factored(rows: Rows, loadings: Array, weight: Array) -> tuple[Array, Array]:
    """(d, q) loadings and (n, q) factors of mean 1, in the divergence of Poisson counts, from
    random loadings and equal factors.
    """
    seen = rows.is_observed.astype(np.float64)
    x = rows.values * seen
    expected = seen @ loadings.sum(axis=1)
    level = (x.sum(axis=1) + 0.5) / (expected + 0.5)
    t = np.repeat(level[:, None], loadings.shape[1], axis=1)
    tiny = 1e-100
    for _ in range(START_STEPS):
        ratio = x / np.maximum(t @ loadings.T, tiny)
        t *= (ratio @ loadings + 1e-3) / (seen @ loadings + 1e-3)
        ratio = x / np.maximum(t @ loadings.T, tiny)
        weighted = weight[:, None] * t
        loadings = loadings * (ratio.T @ weighted) / np.maximum(seen.T @ weighted, tiny)
        mean = np.maximum(weight @ t, tiny)
        t /= mean
        loadings = loadings * mean
    # A loading of 0 stays 0 for ever: none begins there.
    least = 1e-3 * loadings.mean(axis=1, keepdims=True) + 1e-6
    return np.maximum(loadings, least), t


class DenseCounts:
    """A block's counts as an array; `values` (n, d) are all of them."""

    def __init__(self, values: Array) -> None:
        self.values = values

    def take(self, rows: Array) -> DenseCounts:
        """Some of the rows."""
        return DenseCounts(self.values[rows])

    def rates(self, g: Array, loadings: Array) -> Array:
        """`sum_i g_i W_ji` where there are values."""
        return np.asarray(g @ loadings.T)

    def times(self, weights: Array, matrix: Array) -> Array:
        """(n, m) sums over columns of weights, which are like `values`, times (d, m)."""
        return np.asarray(weights @ matrix)

    def across(self, weights: Array, matrix: Array) -> Array:
        """(d, m) sums over rows of weights times (n, m)."""
        return np.asarray(weights.T @ matrix)

    def sums(self, weights: Array) -> Array:
        """(n,) sums of each row's weights."""
        return np.asarray(weights.sum(axis=1, dtype=np.float64))


class SparseCounts:
    """A block's counts where nearly all are 0; `values` are the others, row by row."""

    def __init__(self, matrix: Any) -> None:
        self.matrix = matrix
        self.values = matrix.data
        self.row = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))

    def take(self, rows: Array) -> SparseCounts:
        """Some of the rows."""
        return SparseCounts(self.matrix[rows])

    def _filled(self, weights: Array) -> Any:
        matrix = self.matrix
        return sparse.csr_array((weights, matrix.indices, matrix.indptr), shape=matrix.shape)

    def rates(self, g: Array, loadings: Array) -> Array:
        """`sum_i g_i W_ji` where there are values."""
        return np.asarray(np.einsum("ni,ni->n", g[self.row], loadings[self.matrix.indices]))

    def times(self, weights: Array, matrix: Array) -> Array:
        """(n, m) sums over columns of weights, which are like `values`, times (d, m)."""
        return np.asarray(self._filled(weights) @ matrix)

    def across(self, weights: Array, matrix: Array) -> Array:
        """(d, m) sums over rows of weights times (n, m)."""
        return np.asarray(self._filled(weights).T @ matrix)

    def sums(self, weights: Array) -> Array:
        """(n,) sums of each row's weights."""
        n = self.matrix.shape[0]
        return np.bincount(self.row, weights, minlength=n).astype(np.float64)


class GammaPoissonKernel:
    """Gamma-Poisson factors prepared for a pass."""

    def __init__(self, family: GammaPoisson, params: Any, log_weights: Array) -> None:
        self.family, self.log_weights = family, log_weights
        self.dtype = family.dtype
        # Scores of large counts are themselves large, since `log x!` is left to `base`: float32
        # cannot hold them, however exactly they were computed.
        if (np.finfo(self.dtype).eps * _size(params) > MAX_ROUNDING).any():
            self.dtype = "float64"
        self.components = [
            Component(loadings, shape, self.dtype)
            for loadings, shape in zip(params.loadings, params.shape, strict=True)
        ]

    def walk(self, rows: Rows) -> GammaPoissonWalk:
        return GammaPoissonWalk(self, rows)


class Component:
    """One component: what its rows' bounds are made of, and how they are tightened."""

    def __init__(self, loadings: Array, shape: Array, dtype: str) -> None:
        self.tight, self.least = TIGHT[dtype], LEAST_RATE[dtype]
        self.shape = shape
        self.q = len(shape)
        clean = np.where(loadings > LEAST_LOADING[dtype], loadings, 0.0)
        self.total = clean.sum(axis=0)
        self.loadings = clean.astype(dtype)
        self.i, self.j = np.triu_indices(self.q)
        self.products = (clean[:, self.i] * clean[:, self.j]).astype(dtype)

    def rates_of(self, mask: Array | None, n: int) -> Array:
        """(n, q) `beta`, the rates of `q(t)`."""
        if mask is None:
            return np.tile(self.shape + self.total, (n, 1))
        return np.asarray(self.shape + (mask @ self.loadings).astype(np.float64))

    def _expected(self, counts: Any, log_g: Array) -> tuple[Array, Array, Array]:
        """(n, q) `g` and the `sum_i W_ji g_i` of each count, both over `exp(peak)`, (n, 1)."""
        peak = log_g.max(axis=1, keepdims=True)
        g = np.exp(log_g - peak)
        rates = counts.rates(g.astype(self.loadings.dtype), self.loadings)
        return g, np.maximum(rates, self.least), peak

    def _split(self, counts: Any, log_g: Array) -> tuple[Array, Array]:
        """(n, q) `s = sum_j x_j phi_j` and (n, q, q) `sum_j x_j phi_j phi_j'`."""
        g, rates, _ = self._expected(counts, log_g)
        ratio = counts.values / rates
        s = g * counts.times(ratio, self.loadings)
        ratio /= rates
        triangle = counts.times(ratio, self.products)
        together = np.empty((len(g), self.q, self.q))
        together[:, self.i, self.j] = together[:, self.j, self.i] = triangle
        together *= g[:, :, None] * g[:, None, :]
        return s, together

    def tightened(self, counts: Any, beta: Array) -> Array:
        """(n, q) `alpha` of each row's `q(t)` at its tightest bound.

        Newton's method in `digamma(alpha)`, but for a diagonal that is positive everywhere. The
        plain iteration `alpha = a + s`, which always gains but crawls where factors share columns,
        has the diagonal `1 / trigamma(alpha)` alone; a row whose estimated distance from the
        maximum grew has overshot, and moves between the two for a while.
        """
        n = len(beta)
        out = np.empty((n, self.q))
        active = np.arange(n)
        log_beta = np.log(beta)
        # As if every factor were at its mean but for the row's total.
        level = (counts.sums(counts.values) + self.shape.sum()) / beta.sum(axis=1)
        alpha = level[:, None] * beta
        caution, before = np.zeros(n), np.full(n, np.inf)
        every = np.arange(self.q)
        for step in range(MAX_LOCAL):
            s, curvature = self._split(counts, digamma(alpha) - log_beta)
            gradient = self.shape + s - alpha
            width = 1.0 / _trigamma(alpha)
            curvature[:, every, every] += width - np.minimum(s, alpha - self.shape)
            move = np.linalg.solve(curvature, gradient[:, :, None])[:, :, 0]
            gap = 0.5 * (gradient * move).sum(axis=1)
            relaxed = caution * (RELAXING if step < MAX_RELAXING else 1.0)
            caution = np.where(gap > before, 0.5 * (1.0 + caution), relaxed)
            before = gap
            if caution.any():
                curvature *= 1.0 - caution[:, None, None]
                curvature[:, every, every] += caution[:, None] * width
                move = np.linalg.solve(curvature, gradient[:, :, None])[:, :, 0]
            move *= width / alpha
            alpha = alpha * np.exp(np.clip(move, -MAX_MOVE, MAX_MOVE))
            done = gap < self.tight
            if done.any() or step + 1 == MAX_LOCAL:
                out[active] = alpha
                left = np.flatnonzero(~done)
                active = active[left]
                if not len(active):
                    break
                counts, log_beta, alpha = counts.take(left), log_beta[left], alpha[left]
                caution, before = caution[left], before[left]
        return out

    def mode(self, counts: Any, alpha: Array, beta: Array) -> tuple[Array, Array]:
        """(n, q) `log t` at its likeliest given the row, and (n, q, q) minus the second derivative.

        The density of `log t` is that of `t` times `t`, concave in `t`: it has one mode.
        """
        log_t = np.log(alpha / beta)
        every = np.arange(self.q)
        for _ in range(MODE_STEPS):
            t = np.exp(log_t)
            s, curvature = self._split(counts, log_t)
            curvature[:, every, every] += np.maximum(beta * t - s, self.shape)
            gradient = self.shape + s - beta * t
            move = np.linalg.solve(curvature, gradient[:, :, None])[:, :, 0]
            log_t = log_t + np.clip(move, -1.0, 1.0)
        _, curvature = self._split(counts, log_t)
        curvature[:, every, every] += self.shape
        return log_t, curvature

    def value(self, counts: Any, alpha: Array, beta: Array) -> Array:
        """(n,) the bound of `log p(x)`, but for `-sum log x!`.

        It is `sum_j x_j log sum_i W_ji g_i + sum_i (a - alpha) digamma(alpha) + log Gamma(alpha)
        - a log beta + a log a - log Gamma(a)`.
        """
        a = self.shape
        psi = digamma(alpha)
        _, rates, peak = self._expected(counts, psi - np.log(beta))
        total = counts.sums(counts.values * np.log(rates))
        total += peak[:, 0] * counts.sums(counts.values)
        of_factors = (a - alpha) * psi + gammaln(alpha) - a * np.log(beta / a) - gammaln(a)
        return np.asarray(total + of_factors.sum(axis=1))


class GammaPoissonWalk:
    """A walk over one chunk in consecutive blocks."""

    def __init__(self, kernel: GammaPoissonKernel, rows: Rows) -> None:
        self.kernel, self.rows = kernel, rows
        d, q, k = rows.n_features, kernel.family.n_factors, len(kernel.components)
        # Rows with nothing observed say nothing: they are in no block.
        self.useful = np.arange(rows.n_rows)
        if rows.observed is not None:
            self.useful = np.flatnonzero(rows.observed.any(axis=1))
        self.size = block_rows(4 * d + 3 * q * q, np.dtype(kernel.dtype).itemsize)
        self.sum_z, self.sum_exposure = np.zeros((k, d, q)), np.zeros((k, d, q))
        self.sum_w = np.zeros(k)
        self.sum_t, self.sum_log_t = np.zeros((k, q)), np.zeros((k, q))

    def blocks(self) -> Iterator[Index]:
        whole = len(self.useful) == self.rows.n_rows
        for piece in slices(len(self.useful), self.size):
            index = piece if whole else self.useful[piece]
            self.load(index)
            yield index

    def load(self, index: Index) -> None:
        dtype = self.kernel.dtype
        self.block = self.rows[index]
        values, observed = self.block.values, self.block.observed
        self.mask: Array | None = None
        if observed is not None and not observed.all():
            self.mask = observed.astype(dtype)
        if sparse.issparse(values) or np.count_nonzero(values) <= SPARSE * values.size:
            matrix: Any = sparse.csr_array(values)
            self.counts: Any = SparseCounts(matrix.astype(dtype))
        else:
            self.counts = DenseCounts(values.astype(dtype))
        self.local: list[tuple[Array, Array]] = []

    def score(self) -> Array:
        n = self.block.n_rows
        out = np.empty((len(self.kernel.components), n))
        self.local = []
        for k, component in enumerate(self.kernel.components):
            beta = component.rates_of(self.mask, n)
            alpha = component.tightened(self.counts, beta)
            self.local.append((alpha, beta))
            out[k] = component.value(self.counts, alpha, beta) + self.kernel.log_weights[k]
        return out

    def base(self) -> Array:
        """`-sum log x!` over the observed counts of each row."""
        return -np.asarray(self.counts.sums(log_factorial(self.counts.values)))

    def gather(self, resp: Array) -> None:
        # Rows with nothing observed would count towards the shapes.
        seen = True if self.mask is None else self.mask.any(axis=1)
        for k, component in enumerate(self.kernel.components):
            rows = np.flatnonzero((resp[k] > UNSEEN) & seen)
            if not len(rows):
                continue
            whole = len(rows) == self.block.n_rows
            counts = self.counts if whole else self.counts.take(rows)
            alpha, beta = (of_rows[rows] for of_rows in self.local[k])
            r = resp[k, rows].astype(np.float64)[:, None]
            t, log_t = alpha / beta, digamma(alpha) - np.log(beta)
            g, rates, _ = component._expected(counts, log_t)
            dtype = component.loadings.dtype
            ratio = counts.values / rates
            self.sum_z[k] += component.loadings * counts.across(ratio, (r * g).astype(dtype))
            exposure = r * t
            if self.mask is None:
                self.sum_exposure[k] += exposure.sum(axis=0)
            else:
                self.sum_exposure[k] += self.mask[rows].T @ exposure.astype(dtype)
            self.sum_w[k] += r.sum()
            self.sum_t[k] += exposure.sum(axis=0)
            self.sum_log_t[k] += (r * log_t).sum(axis=0)

    def close(self) -> Monoid:
        return GammaPoissonStats(
            self.sum_z, self.sum_exposure, self.sum_w, self.sum_t, self.sum_log_t
        )

    def factors(self, component: Array) -> tuple[Array, Array]:
        every = np.arange(len(component))
        alpha = np.stack([alpha for alpha, _ in self.local])[component, every]
        beta = np.stack([beta for _, beta in self.local])[component, every]
        return alpha / beta, (alpha / beta**2)[:, :, None] * np.eye(alpha.shape[1])

    def importance(self, n_samples: int, rng: np.random.Generator) -> tuple[Array, Array]:
        x = self.block.dense().values.astype(np.float64)
        base = self.base()
        out = np.empty((2, len(self.local), len(x)))
        for k, (alpha, beta) in enumerate(self.local):
            component = self.kernel.components[k]
            a, loadings = component.shape, component.loadings.astype(np.float64)
            log_t, curvature = component.mode(self.counts, alpha, beta)

            def log_likelihood(
                rows: slice, u: Array, a: Array = a, loadings: Array = loadings, beta: Array = beta
            ) -> Array:
                t = np.exp(u)
                rates = np.maximum(t @ loadings.T, LEAST_RATE["float64"])
                log_rates = np.einsum("nsd,nd->ns", np.log(rates), x[rows])
                return np.asarray(log_rates - np.einsum("nsq,nq->ns", t, beta[rows] - a))

            def log_prior(u: Array, a: Array = a) -> Array:
                return np.asarray((a * (u - np.exp(u) + np.log(a)) - gammaln(a)).sum(axis=2))

            def prior(number: int, a: Array = a) -> Array:
                return np.log(np.maximum(rng.gamma(a, 1 / a, (number, len(a))), 1e-300))

            out[:, k] = mean_weights(
                log_likelihood,
                log_prior,
                prior,
                log_t,
                np.linalg.inv(curvature),
                n_samples,
                x.shape[1],
                rng,
            )
        out += np.array([1, 2])[:, None, None] * (self.kernel.log_weights[:, None] + base)
        return out[0], out[1]

    def complete(self, resp: Array, rng: np.random.Generator | None = None) -> Array:
        out = self.block.dense().values.astype(np.float64)
        if self.block.observed is None:
            return out
        expected = np.zeros(out.shape)
        for k, component in enumerate(self.kernel.components):
            alpha, beta = self.local[k]
            t = (alpha if rng is None else rng.gamma(alpha)) / beta
            expected += resp[k][:, None] * (t @ component.loadings.T.astype(np.float64))
        gaps = ~self.block.observed
        out[gaps] = expected[gaps] if rng is None else rng.poisson(expected[gaps])
        return out
