"""Zero-inflated Poisson columns: counts of which some are zero for a reason of their own.

    s_j | k ~ Bernoulli(inflation_kj),   x_j | s_j = 1 is 0,   x_j | s_j = 0 ~ Poisson(rate_kj)

(Lambert 1992). With `q = inflation` and `l = rate`,

    log p(x | k) = [x > 0] (log(1 - q) - l) + [x = 0] log(q + (1 - q) exp(-l)) + x log l - log x!,

which is linear in `[1, x, x = 0]`: a block is two matrix products, as for plain Poisson columns.
The indicator s is latent. A zero is one of its own with probability

    p(s = 1 | x = 0, k) = q / (q + (1 - q) exp(-l)),

the same for all zeros, so that sums over rows of that probability follow from the number of zeros.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from genstream.families.blocks import MAX_ROUNDING, UNSEEN, Array, Description, Linear, moments
from genstream.families.columns import bounded_log, bounded_log1m, poisson_terms
from genstream.families.columns_walk import LinearWalk
from genstream.families.factorials import log_factorial
from genstream.families.one_kind import OneKind
from genstream.rows import Rows
from genstream.stats import Monoid, Record, axes


@dataclass(frozen=True, eq=False)
class ZeroInflatedParams(Record):
    """Poisson rates of K components, and the share of entries that are zero whatever the rate."""

    rate: Array = axes("component", "count")
    inflation: Array = axes("component", "count")


@dataclass(frozen=True, eq=False)
class ZeroInflatedStats(Monoid):
    """Sums of `r o`, `r o p(s = 1 | x)` and `r o x` a column."""

    sum_w: Array = axes("component", "count")
    sum_zero: Array = axes("component", "count")
    sum_count: Array = axes("component", "count")


@dataclass(frozen=True, eq=False)
class ZeroInflatedPrior(Record):
    """A Beta prior of the inflation and a Gamma prior of the rate: `rows` pseudo-rows of known s.

    They have the sample's own `rate` l0 and `inflation` q0,

        p(q, l) ~ exp(rows (q0 log q + (1 - q0) (log(1 - q) + l0 log l - l))).
    """

    rate: Array = axes("count")
    inflation: Array = axes("count")
    rows: float = axes()

    def stronger(self, strength: float, spread: float) -> ZeroInflatedPrior:  # noqa: ARG002
        """`strength` times the pseudo-rows; a rate has no spread of its own."""
        return replace(self, rows=self.rows * strength)


@dataclass(frozen=True, eq=False)
class ZeroInflated(OneKind):
    """K components of independent zero-inflated Poisson columns."""

    name: ClassVar[str] = "zero_inflated"
    param_names: ClassVar[tuple[str, ...]] = ("rate", "inflation")
    params_type: ClassVar[type[Record]] = ZeroInflatedParams
    stats_type: ClassVar[type[Monoid]] = ZeroInflatedStats
    prior_type: ClassVar[type[Record]] = ZeroInflatedPrior

    def anchored(self, sample: Rows, n_components: int, weak_prior: bool) -> ZeroInflated:  # noqa: ARG002
        """The weak prior is one pseudo-row of the zero-inflated Poisson that has the sample's mean
        and share of zeros.
        """
        mean, _, total = moments(sample)
        zero = (sample.values == 0) & sample.is_observed
        share = (sample.row_weights @ zero + 0.5) / (total + 1.0)
        mean = (mean * total + 0.5) / (total + 1.0)
        rate = _rate_of_positive(mean / (1.0 - share))
        inflation = np.clip(1.0 - mean / rate, 0.5 / (total + 1.0), 1.0 - 0.5 / (total + 1.0))
        prior = ZeroInflatedPrior(mean / (1.0 - inflation), inflation, 1.0)
        return replace(self, prior=prior if weak_prior else None)

    def vague(self, n_components: int) -> Record:
        d = self.schema.n_features
        prior = self.prior
        rate = prior.rate if prior is not None else np.ones(d)
        inflation = prior.inflation if prior is not None else np.full(d, 0.5)
        return ZeroInflatedParams(*(np.tile(row, (n_components, 1)) for row in (rate, inflation)))

    def prepare(self, params: Any, log_weights: Array) -> ZeroInflatedKernel:
        return ZeroInflatedKernel(self, params, log_weights)

    def maximise(
        self, stats: Any, previous: Any, frozen: frozenset[str] = frozenset()
    ) -> tuple[Record, NDArray[np.bool_]]:
        """Mode of the conjugate posterior with the indicators' expectations for the indicators.

        With `n`, `Z` and `X` the sums of `r`, `r p(s = 1)` and `r x`, and a prior of a pseudo-rows,
        `inflation = (Z + a q0) / (n + a)` and
        `rate = (X + a (1 - q0) l0) / (n - Z + a (1 - q0))`. A column that a component never
        observed keeps what it has where there is no prior, and so does the rate where all is
        inflation.
        """
        prior = self.prior
        n, zero, count = stats.sum_w, stats.sum_zero, stats.sum_count
        tiny = UNSEEN * float(n.sum(axis=0).max())
        faulty = n.max(axis=1) <= tiny
        if prior is not None:
            rows, share = prior.rows, prior.inflation
            n, zero = n + rows, zero + rows * share
            count = count + rows * (1.0 - share) * prior.rate
        rest = n - zero

        def ratio(name: str, above: Array, below: Array) -> Array:
            old: Array = getattr(previous, name)
            if name in frozen:
                return old
            return np.where(below > tiny, above / np.where(below > tiny, below, 1.0), old)

        rate = ratio("rate", count, rest)
        inflation = ratio("inflation", zero, n)
        if "inflation" not in frozen:
            inflation = np.clip(inflation, 0.0, 1.0)
        # A prior knows what no row does, and what is frozen is not to be moved to other rows.
        faulty = np.zeros_like(faulty) if prior is not None or frozen else faulty
        return ZeroInflatedParams(rate, inflation), faulty

    def possible(self, stats: Any, known: Any) -> Monoid | None:
        """Sums, and the weight of entries that are not inflation, kept above a tenth of the known
        ones.
        """
        if not all(np.isfinite(value).all() for _, _, value in stats.leaves()):
            return None
        zero = np.maximum(stats.sum_zero, 0.1 * known.sum_zero)
        rest = np.maximum(stats.sum_w - stats.sum_zero, 0.1 * (known.sum_w - known.sum_zero))
        return ZeroInflatedStats(
            zero + rest, zero, np.maximum(stats.sum_count, 0.1 * known.sum_count)
        )

    def expected_log_prob(self, params: Any, stats: Any) -> float:
        rest = stats.sum_w - stats.sum_zero
        value = stats.sum_zero * bounded_log(params.inflation) + rest * bounded_log1m(
            params.inflation
        )
        value += stats.sum_count * bounded_log(params.rate) - rest * params.rate
        return float(value.sum())

    def log_prior(self, params: Any) -> float:
        prior = self.prior
        if prior is None:
            return 0.0
        value = prior.inflation * bounded_log(params.inflation)
        value = value + (1.0 - prior.inflation) * (
            bounded_log1m(params.inflation) + prior.rate * bounded_log(params.rate) - params.rate
        )
        return float(prior.rows * value.sum())

    def place(self, params: Any, component: int, x: Array, observed: Array) -> Record:
        """Rates move half way to the row, from where all components are."""
        rate, inflation = params.rate.copy(), params.inflation.copy()
        pooled = rate.mean(axis=0)
        rate[component] = np.where(observed, 0.5 * (x + pooled), pooled)
        inflation[component] = inflation.mean(axis=0)
        return ZeroInflatedParams(rate, inflation)

    def draw(
        self, params: Any, component: Array, rng: np.random.Generator
    ) -> tuple[Array, Array | None]:
        counts = rng.poisson(params.rate[component]).astype(np.float64)
        counts[rng.random(counts.shape) < params.inflation[component]] = 0.0
        return counts, None

    def mean(self, params: Any) -> Array:
        return np.asarray((1.0 - params.inflation) * params.rate)

    def describe(self, params: Any) -> Description:
        mean = self.mean(params)
        return Description(mean, np.sqrt(mean * (1.0 + params.inflation * params.rate)))

    def rounding(self, params: Any) -> Array:
        size = poisson_terms(params.rate)
        unit = float(np.finfo(self.dtype).eps)
        exact = np.finfo(np.float64).eps
        return np.asarray(np.minimum(unit * size, MAX_ROUNDING) + exact * size)

    def n_parameters(self, n_components: int) -> int:
        return 2 * n_components * self.schema.n_features


def _rate_of_positive(mean: Array) -> Array:
    """The Poisson rate whose counts above zero have this mean, `l / (1 - exp(-l))`, roughly."""
    mean = np.maximum(mean, 1.0 + 1e-9)
    rate = mean
    for _ in range(100):
        # The slope of this map is l / (exp(l) - 1) at the root, which is less than 1.
        rate = mean * -np.expm1(-rate)
    return rate


class ZeroInflatedKernel:
    """Zero-inflated columns prepared for a pass, with the features `[1, x, x = 0]`; blocks with
    gaps have a row of ones more where a column is observed.
    """

    by_row = True

    def __init__(self, family: ZeroInflated, params: Any, log_weights: Array) -> None:
        self.family, self.params, self.log_weights = family, params, log_weights
        self.dtype = np.dtype(family.dtype)
        self.n_components = len(log_weights)
        more, rate = bounded_log1m(params.inflation) - params.rate, params.rate
        inflated = bounded_log(params.inflation)
        zero = np.logaddexp(inflated, more)
        self.share = np.exp(inflated - zero)
        self.normaliser = more
        self.slopes = np.concatenate([bounded_log(rate), zero - more], axis=1)
        size = poisson_terms(rate)
        self.rounding = 2 * size
        # Scores of large counts are themselves large, since `log x!` is left to `base`.
        if (np.finfo(self.dtype).eps * size > MAX_ROUNDING).any():
            self.dtype = np.dtype(np.float64)

    def linear(self, gaps: bool) -> Linear:
        constant = self.log_weights
        if not gaps:
            constant = constant + self.normaliser.sum(axis=1)
        pieces = [constant[:, None], self.slopes]
        if gaps:
            pieces.append(self.normaliser)
        return Linear(np.concatenate(pieces, axis=1), self.rounding, self.dtype)

    def walk(self, rows: Rows) -> LinearWalk:
        return LinearWalk(self, rows)

    def features(self, values: Array, observed: Array | None, out: Array) -> Array:
        n, d = values.shape
        features = out[:, :n]
        features[0] = 1.0
        features[1 : 1 + d] = values.T
        zero = features[1 + d : 1 + 2 * d]
        np.equal(values.T, 0.0, out=zero, casting="unsafe")
        if observed is not None:
            zero *= observed.T
            features[1 + 2 * d :] = observed.T
        return features

    def direct(self, k: int, values: Array, observed: Array | None, features: Array) -> Array:
        """There is no better form for rates this large: the sum as it is, in float64."""
        del values
        return np.asarray(self.linear(observed is not None).whole[k] @ features)

    def base(self, values: Array, observed: Array | None) -> Array | None:
        """`-sum log x!` over the observed counts of each row; a missing entry is a 0."""
        del observed
        return np.asarray(-log_factorial(values).sum(axis=1))

    def statistics(self, sums: Array, gaps: bool) -> Monoid:
        d = self.family.schema.n_features
        n, count, zero = sums[:, :1], sums[:, 1 : 1 + d], sums[:, 1 + d : 1 + 2 * d]
        observed = sums[:, 1 + 2 * d :] if gaps else np.repeat(n, d, axis=1)
        return ZeroInflatedStats(observed, zero * self.share, count)
