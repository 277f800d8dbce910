"""Negative binomial columns: counts that vary more than a Poisson rate would have them.

    x_j | lambda_j ~ Poisson(lambda_j),   lambda_j | k ~ Gamma(shape_kj, mean rate_kj),

so that `E[x] = rate` and `Var[x] = rate + rate^2 / shape`; a large shape is the Poisson limit. With
`a = shape` and `m = rate`,

    log p(x | k) = log Gamma(a + x) - log Gamma(a) - x log a - (a + x) log(1 + m / a)
                   + x log m - log x!.

The E-step takes `lambda` as latent. Given x it is Gamma distributed with

    E[lambda | x] = m (a + x) / (a + m),   E[log lambda | x] = psi(a + x) - log(a + m) + log m,

and the sums of x and of these two are all that an M-step needs. EM on them alone is slow in the
mean of a column that is nearly all zeros; the M-step therefore expands the model by a factor of
`lambda`, which the data decide at once (PX-EM, Liu, Rubin & Wu 1998): the rate is then the plain
average of x, and EM has only the shape left to find.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln, polygamma, psi

from genstream.families.blocks import UNSEEN, Array, Description, moments
from genstream.families.columns import LOG_TINY
from genstream.families.one_kind import OneKind
from genstream.families.table_walk import TableWalk
from genstream.rows import Rows
from genstream.stats import Monoid, Record, axes

# Bounds of the shape, which else has no maximum where counts vary as little as Poisson ones, or
# where all of a column's counts are in one row. At the upper one the variance of a rate of 1e5 is
# within a thousandth of Poisson's; at the lower one 99% of a column of rate 1 are zeros.
SHAPES = (1e-3, 1e8)
# Shapes from here on are far enough out for Stirling's series to be exact.
STIRLING = 100.0
# The smallest rate, so that its logarithm is finite.
TINY = float(np.exp(LOG_TINY))


@dataclass(frozen=True, eq=False)
class NegativeBinomialParams(Record):
    """Means `rate` and shapes of K components: the variance is `rate + rate^2 / shape`."""

    rate: Array = axes("component", "count")
    shape: Array = axes("component", "count")


@dataclass(frozen=True, eq=False)
class NegativeBinomialStats(Monoid):
    """Sums of `r o`, `r o x`, `r o E[lambda | x]` and `r o E[log lambda | x]` a column."""

    sum_w: Array = axes("component", "count")
    sum_count: Array = axes("component", "count")
    sum_rate: Array = axes("component", "count")
    sum_log: Array = axes("component", "count")


@dataclass(frozen=True, eq=False)
class NegativeBinomialPrior(Record):
    """`rows` pseudo-rows at the sample's means: `p(rate) ~ exp(rows (prior log rate - rate))`, as
    for Poisson columns. The shape's prior is flat within its bounds.
    """

    rate: Array = axes("count")
    rows: float = axes()

    def stronger(self, strength: float, spread: float) -> NegativeBinomialPrior:  # noqa: ARG002
        """`strength` times the pseudo-rows; a rate has no spread of its own."""
        return replace(self, rows=self.rows * strength)


@dataclass(frozen=True, eq=False)
class NegativeBinomial(OneKind):
    """K components of independent negative binomial columns."""

    name: ClassVar[str] = "negative_binomial"
    param_names: ClassVar[tuple[str, ...]] = ("rate", "shape")
    params_type: ClassVar[type[Record]] = NegativeBinomialParams
    stats_type: ClassVar[type[Monoid]] = NegativeBinomialStats
    prior_type: ClassVar[type[Record]] = NegativeBinomialPrior

    def anchored(self, sample: Rows, n_components: int, weak_prior: bool) -> NegativeBinomial:  # noqa: ARG002
        """One pseudo-row at the sample's means is the weak prior."""
        mean, _, total = moments(sample)
        prior = NegativeBinomialPrior((mean * total + 0.5) / (total + 1.0), 1.0)
        return replace(self, prior=prior if weak_prior else None)

    def vague(self, n_components: int) -> Record:
        d = self.schema.n_features
        rate = self.prior.rate if self.prior is not None else np.ones(d)
        return NegativeBinomialParams(np.tile(rate, (n_components, 1)), np.ones((n_components, d)))

    def prepare(self, params: Any, log_weights: Array) -> NegativeBinomialKernel:
        return NegativeBinomialKernel(self, params, log_weights)

    def maximise(
        self, stats: Any, previous: Any, frozen: frozenset[str] = frozenset()
    ) -> tuple[Record, NDArray[np.bool_]]:
        """Rate and shape of each column, over the rows that observed it.

        With `n`, `X`, `L` and `G` the sums of `r`, `r x`, `r E[lambda]` and `r E[log lambda]`, and
        `s = (X + n a) / (m + a)`, the maximum has

            log a - psi(a) = log(L / s) - G / n + s / n - 1,   X / m - s + rows (prior / m - 1) = 0.

        Without a prior `s = n` and `m = X / n`. With one, the two are solved in turn: the first by
        Newton's method, the second is a quadratic. A column that a component never observed keeps
        its shape, and without a prior its rate.
        """
        prior = self.prior
        n = stats.sum_w
        tiny = UNSEEN * float(n.sum(axis=0).max())
        rows, pseudo = 0.0, np.zeros_like(n)
        if prior is not None:
            rows, pseudo = prior.rows, prior.rows * np.broadcast_to(prior.rate, n.shape)
        safe = np.where(n > tiny, n, 1.0)
        level = np.log(np.maximum(stats.sum_rate, TINY)) - stats.sum_log / safe
        rate, shape = np.maximum(previous.rate, TINY).ravel(), previous.shape.ravel().copy()
        known, safe, level, pseudo, count = (
            v.ravel() for v in (n > tiny, safe, level, pseudo, stats.sum_count)
        )
        at = np.arange(len(rate))
        # Few sweeps do, but where the prior outweighs the rows.
        for _ in range(50):
            m, a = rate[at], shape[at]
            weight = np.where(known[at], safe[at], 0.0)
            if "rate" not in frozen:
                free = known[at] if prior is None else np.ones(len(at), dtype=bool)
                m = np.where(free, _best_rate(weight, count[at], a, rows, pseudo[at]), m)
            if "shape" not in frozen:
                s = (count[at] + safe[at] * a) / (m + a)
                c = level[at] - np.log(s) + s / safe[at] - 1.0
                a = np.where(known[at], inverse_log_minus_psi(c), a)
            # What is left to do is of second order in the objective.
            far = np.maximum(np.abs(m / rate[at] - 1.0), np.abs(a / shape[at] - 1.0)) > 1e-7
            rate[at], shape[at] = m, a
            at = at[far]
            if not len(at):
                break
        faulty = n.max(axis=1) <= tiny
        # A prior knows what no row does, and what is frozen is not to be moved to other rows.
        faulty = np.zeros_like(faulty) if prior is not None or frozen else faulty
        kept = previous.rate if "rate" in frozen else rate.reshape(n.shape)
        return NegativeBinomialParams(kept, shape.reshape(n.shape)), faulty

    def possible(self, stats: Any, known: Any) -> Monoid | None:
        """Sums, and how much the mean of logs falls short of the log of the mean, kept above a
        tenth of the known ones.
        """
        if not all(np.isfinite(value).all() for _, _, value in stats.leaves()):
            return None
        n, count, rate = (
            np.maximum(getattr(stats, name), 0.1 * getattr(known, name))
            for name in ("sum_w", "sum_count", "sum_rate")
        )
        spread = np.maximum(
            _spread(n, rate, stats.sum_log),
            0.1 * _spread(known.sum_w, known.sum_rate, known.sum_log),
        )
        return NegativeBinomialStats(n, count, rate, _spread(n, rate, 0.0) - spread)

    def expected_log_prob(self, params: Any, stats: Any) -> float:
        """With the factor of `lambda` that the M-step expands the model by at its maximum."""
        n, count = stats.sum_w, stats.sum_count
        m, a = np.maximum(params.rate, TINY), params.shape
        total = count + n * a
        mean = np.log(np.maximum(stats.sum_rate, TINY) / np.maximum(total, TINY))
        value = count * np.log(m) - total * (np.log(m + a) + mean + 1.0)
        value += n * (a * np.log(a) - gammaln(a)) + (a - 1.0) * stats.sum_log
        return float(value.sum())

    def log_prior(self, params: Any) -> float:
        prior = self.prior
        if prior is None:
            return 0.0
        log_rate = np.log(np.maximum(params.rate, TINY))
        return float(prior.rows * (prior.rate * log_rate - params.rate).sum())

    def place(self, params: Any, component: int, x: Array, observed: Array) -> Record:
        """Rates move half way to the row, from where all components are; shapes to their middle."""
        rate, shape = params.rate.copy(), params.shape.copy()
        pooled = rate.mean(axis=0)
        rate[component] = np.where(observed, 0.5 * (x + pooled), pooled)
        shape[component] = np.exp(np.log(shape).mean(axis=0))
        return NegativeBinomialParams(rate, shape)

    def draw(
        self, params: Any, component: Array, rng: np.random.Generator
    ) -> tuple[Array, Array | None]:
        shape = params.shape[component]
        latent = rng.standard_gamma(shape) * (params.rate[component] / shape)
        return rng.poisson(latent).astype(np.float64), None

    def mean(self, params: Any) -> Array:
        expected: Array = params.rate
        return expected

    def describe(self, params: Any) -> Description:
        return Description(params.rate, np.sqrt(params.rate + params.rate**2 / params.shape))

    def rounding(self, params: Any) -> Array:
        size = params.rate * (1.0 + np.abs(np.log(np.maximum(params.rate, TINY))))
        return np.asarray(np.finfo(np.float64).eps * size.sum(axis=1))

    def n_parameters(self, n_components: int) -> int:
        return 2 * n_components * self.schema.n_features


def _spread(n: Array, rate: Array, log: Any) -> Array:
    """`n log(rate / n) - log`, which is positive where rates vary at all."""
    safe = np.maximum(n, TINY)
    return np.asarray(n * np.log(np.maximum(rate, TINY) / safe) - log)


def _log_minus_psi(a: Array) -> Array:
    """`log a - psi(a)`, by its series where the difference would cancel."""
    series = (0.5 + (1.0 / 12 - (1.0 / 120 - 1.0 / (252 * a**2)) / a**2) / a) / a
    return np.asarray(np.where(a > STIRLING, series, np.log(a) - psi(a)))


def inverse_log_minus_psi(c: Array) -> Array:
    """The shape `a` within its bounds at which `log a - psi(a)` is `c`.

    Since `1 / (2 a) < log a - psi(a) < 1 / a`, `1 / a` lies between c and 2 c, and Newton's method
    in `u = 1 / a` needs few steps: the function is nearly a line there.
    """
    least, most = 1.0 / SHAPES[1], 1.0 / SHAPES[0]
    low, high = np.clip(c, least, most), np.clip(2.0 * c, least, most)
    u = np.clip(1.5 * c, low, high)
    for _ in range(30):
        a = 1.0 / u
        # The derivative of log a - psi(a) by u, with the series of psi' where 1 / a cancels.
        slope = np.where(
            a > STIRLING,
            0.5 + (1.0 / 6 - (1.0 / 30) / a**2) / a,
            a**2 * polygamma(1, a) - a,
        )
        new = np.clip(u - (_log_minus_psi(a) - c) / slope, low, high)
        moved, u = np.abs(new - u) / u, new
        # The next step would be of the square of this one.
        if moved.max(initial=0.0) < 1e-7:
            break
    return np.asarray(1.0 / u)


def _best_rate(n: Array, count: Array, shape: Array, rows: float, pseudo: Array) -> Array:
    """The positive root of `rows m^2 + ((n + rows) a - pseudo) m - a (count + pseudo) = 0`."""
    if not rows:
        return np.asarray(np.maximum(count / np.where(n > 0, n, 1.0), TINY))
    half = 0.5 * ((n + rows) * shape - pseudo)
    # Of the two forms of the root the one in which nothing cancels.
    root = np.sqrt(half**2 + rows * shape * (count + pseudo))
    down = np.where(half > 0, half + root, 1.0)
    up = np.where(half > 0, 0.0, root - half) / rows
    return np.asarray(np.where(half > 0, shape * (count + pseudo) / down, up))


def _log_rising(a: Array, x: Array) -> Array:
    """(K, U) `log Gamma(a + x) - log Gamma(a) - x log a` of shapes (K,) and sorted counts (U,).

    It is `sum_{i < x} log(1 + i / a)`, which is how it is computed where counts are dense.
    """
    a = a[:, None]
    if _dense(x):
        return _cumulated(np.log1p(np.arange(x[-1]) / a), x)
    far = np.maximum(a, STIRLING)
    end = far + x

    def rest(z: Array) -> Array:
        return np.asarray((1.0 / 12 - (1.0 / 360 - 1.0 / (1260 * z**2)) / z**2) / z)

    series = (end - 0.5) * np.log1p(x / far) - x + rest(end) - rest(far)
    near = gammaln(a + x) - gammaln(a) - x * np.log(a)
    return np.asarray(np.where(a >= STIRLING, series, near))


def _psi_rising(a: Array, x: Array) -> Array:
    """(K, U) `psi(a + x)` of shapes (K,) and sorted counts (U,)."""
    a = a[:, None]
    if _dense(x):
        return np.asarray(psi(a) + _cumulated(1.0 / (a + np.arange(x[-1])), x))
    return np.asarray(psi(a + x))


def _dense(x: Array) -> bool:
    """Whether all numbers up to the largest of sorted counts are few enough to go through."""
    return bool(x[-1] <= 8 * len(x))


def _cumulated(terms: Array, x: Array) -> Array:
    """(K, U) sums of the first x terms (K, m), for each of U counts."""
    sums = np.zeros((len(terms), terms.shape[1] + 1))
    np.cumsum(terms, axis=1, out=sums[:, 1:])
    return np.asarray(sums[:, x.astype(np.intp)])


class NegativeBinomialKernel:
    """Negative binomial columns prepared for a pass."""

    def __init__(self, family: NegativeBinomial, params: Any, log_weights: Array) -> None:
        self.family, self.params, self.log_weights = family, params, log_weights
        self.dtype = np.dtype(family.dtype)
        self.rate, self.shape = np.maximum(params.rate, TINY), params.shape

    def _by_column(self, function: Callable[[Array, Array], Array], x: Array, j: Array) -> Array:
        """(K, U) `function(shape, x)`, one column after another."""
        out = np.empty((len(self.log_weights), len(x)))
        edges = np.flatnonzero(np.diff(j, prepend=-1, append=-1))
        for start, stop in itertools.pairwise(edges):
            out[:, start:stop] = function(self.shape[:, j[start]], x[start:stop])
        return out

    def table(self, values: Array, column: Array) -> Array:
        log_p = self._by_column(_log_rising, values, column)
        ratio = np.log1p(self.rate / self.shape)
        log_p += values * (np.log(self.rate) - ratio)[:, column]
        log_p -= (self.shape * ratio)[:, column]
        log_p -= gammaln(values + 1.0)
        return log_p

    def statistics(self, values: Array, column: Array, sums: Array) -> Monoid:
        m, a = self.rate, self.shape
        present, first = np.unique(column, return_index=True)

        def summed(weights: Array) -> Array:
            out = np.zeros(m.shape)
            if len(first):
                out[:, present] = np.add.reduceat(weights, first, axis=1)
            return out

        n, count = summed(sums), summed(sums * values)
        latent = m * (a * n + count) / (a + m)
        log = summed(sums * self._by_column(_psi_rising, values, column))
        return NegativeBinomialStats(n, count, latent, log + n * (np.log(m) - np.log(a + m)))

    def walk(self, rows: Rows) -> TableWalk:
        return TableWalk(self, rows)
