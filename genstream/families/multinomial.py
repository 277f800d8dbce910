"""Multinomial rows: counts that share a total, such as the words of a text.

Given its total `n = sum_j x_j`, a row's counts fall on columns by the component's probabilities,

    log p(x | n, k) = log n! - sum_j log x_j! + sum_j x_j log p_kj,

which is linear in x: two matrix products a block, and two sparse ones where values are sparse.
Totals say nothing of the component. They are taken to have the improper prior `1 / n`, under which
this is exact for rows with gaps too. Of observed columns O with total `n_O` and `p_k(O)` their
probability,

    x_O | n_O, k ~ Multinomial(n_O, p_kO / p_k(O)),
    x_M | x_O, k ~ NegativeMultinomial(n_O, p_kM),   E[x_m | x_O, k] = n_O p_km / p_k(O):

counts go on falling until n_O of them are on observed columns (Haldane 1945), and how many that
takes is latent. Completed by these expectations, a row's counts are the sufficient statistics of
the whole, so that EM raises the likelihood of what was observed. A row whose observed counts are
all 0 says nothing, and is completed by zeros.

Rows that are drawn need totals: negative binomial ones with the sample's mean and dispersion, which
`anchored` fixes and no fit changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from genstream.families.blocks import (
    MAX_ROUNDING,
    UNSEEN,
    Array,
    Description,
    Index,
    Linear,
    Pivot,
    block_rows,
)
from genstream.families.columns import LOG_TINY, bounded_log
from genstream.families.columns_walk import ConsecutiveWalk, LinearWalk, log_prob_given
from genstream.families.factorials import log_factorial
from genstream.families.one_kind import OneKind
from genstream.rows import Rows
from genstream.schema import Schema
from genstream.stats import Monoid, Record, axes

TINY = float(np.exp(LOG_TINY))
# Distances between rows of more columns than `WIDE` are those of random projections to `NARROW`
# coordinates, which keep them to about a tenth (Johnson & Lindenstrauss 1984).
WIDE, NARROW = 256, 128
# The largest expected count that is drawn.
MOST = 1e15


@dataclass(frozen=True, eq=False)
class MultinomialParams(Record):
    """Probabilities of K components, which sum to 1 over the columns."""

    probability: Array = axes("component", "count")


@dataclass(frozen=True, eq=False)
class MultinomialStats(Monoid):
    """Sums of `r` and of `r E[x | x_O]`."""

    sum_w: Array = axes("component")
    sum_count: Array = axes("component", "count")


@dataclass(frozen=True, eq=False)
class MultinomialPrior(Record):
    """A Dirichlet prior with exponents `1 + count`: pseudo-counts of each column."""

    count: Array = axes("count")

    def stronger(self, strength: float, spread: float) -> MultinomialPrior:  # noqa: ARG002
        """`strength` times the pseudo-counts."""
        return MultinomialPrior(self.count * strength)


@dataclass(frozen=True, eq=False)
class Multinomial(OneKind):
    """K components of rows that are multinomial given their totals.

    Parameters
    ----------
    total, dispersion
        Totals of rows that are drawn have the mean `total` and the variance
        `total + dispersion total^2`: one mean for all components, or one for each. Fixed by
        `anchored`.
    """

    total: tuple[float, ...] = (1.0,)
    dispersion: float = 0.0

    name: ClassVar[str] = "multinomial"
    sparse: ClassVar[bool] = True
    param_names: ClassVar[tuple[str, ...]] = ("probability",)
    params_type: ClassVar[type[Record]] = MultinomialParams
    stats_type: ClassVar[type[Monoid]] = MultinomialStats
    prior_type: ClassVar[type[Record]] = MultinomialPrior

    def options(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "total": list(self.total), "dispersion": self.dispersion}

    @classmethod
    def of(
        cls, schema: Schema, options: Mapping[str, Any], pivot: Pivot | None, prior: Any
    ) -> Multinomial:
        total, dispersion = tuple(options["total"]), options["dispersion"]
        return cls(schema, options["dtype"], pivot, prior, total, dispersion)

    def anchored(self, sample: Rows, n_components: int, weak_prior: bool) -> Multinomial:  # noqa: ARG002
        """The weak prior is one pseudo-row of the sample's mean counts.

        With `m` the mean total, `E[n_O (n_O - 1)] = (1 + dispersion) m^2 p(O)^2` for negative
        binomial totals of which only the columns O were observed, which gives the dispersion.
        """
        weights = sample.row_weights
        counts = weights @ sample.values
        times = np.full(counts.shape, weights.sum())
        if sample.observed is not None:
            times = weights @ sample.observed
        mean = counts / np.where(times > 0, times, 1.0)
        total = max(float(mean.sum()), TINY)
        share: Any = 1.0
        if sample.observed is not None:
            share = sample.observed @ (mean / total)
        n = _totals(sample.values)
        pairs = total**2 * float((weights * share**2).sum())
        excess = float(weights @ (n * (n - 1.0))) / pairs - 1.0 if pairs > 0 else 0.0
        prior = MultinomialPrior((counts + 0.5) / (times + 1.0)) if weak_prior else None
        return replace(self, prior=prior, total=(total,), dispersion=max(excess, 0.0))

    def vague(self, n_components: int) -> Record:
        row = np.ones(self.schema.n_features) if self.prior is None else self.prior.count
        return MultinomialParams(np.tile(row / row.sum(), (n_components, 1)))

    def prepare(self, params: Any, log_weights: Array) -> MultinomialKernel:
        return MultinomialKernel(self, params, log_weights)

    def maximise(
        self, stats: Any, previous: Any, frozen: frozenset[str] = frozenset()
    ) -> tuple[Record, NDArray[np.bool_]]:
        """`probability = (sum_count + prior) / sum_j (sum_count_j + prior_j)`; a component without
        any count keeps its probabilities where there is no prior.
        """
        counts = stats.sum_count
        total = counts.sum(axis=1)
        faulty = total <= UNSEEN * float(total.sum())
        if "probability" in frozen:
            kept: Record = previous
            return kept, np.zeros_like(faulty)
        if self.prior is not None:
            counts = counts + self.prior.count
            faulty = np.zeros_like(faulty)
        total = counts.sum(axis=1, keepdims=True)
        share = counts / np.where(total > 0, total, 1.0)
        return MultinomialParams(np.where(faulty[:, None], previous.probability, share)), faulty

    def possible(self, stats: Any, known: Any) -> Monoid | None:
        """Sums kept above a tenth of the known ones."""
        if not all(np.isfinite(value).all() for _, _, value in stats.leaves()):
            return None
        return MultinomialStats(
            np.maximum(stats.sum_w, 0.1 * known.sum_w),
            np.maximum(stats.sum_count, 0.1 * known.sum_count),
        )

    def expected_log_prob(self, params: Any, stats: Any) -> float:
        return float((stats.sum_count * bounded_log(params.probability)).sum())

    def log_prior(self, params: Any) -> float:
        if self.prior is None:
            return 0.0
        return float((self.prior.count * bounded_log(params.probability)).sum())

    def place(self, params: Any, component: int, x: Array, observed: Array) -> Record:
        """Half way between the row's frequencies and the mean of all components."""
        probability = params.probability.copy()
        pooled = probability.mean(axis=0)
        seen, n = float(pooled[observed].sum()), float(x[observed].sum())
        target = pooled.copy()
        if n > 0:
            target[observed] = seen * x[observed] / n
        probability[component] = 0.5 * (target + pooled)
        return MultinomialParams(probability)

    def draw(
        self, params: Any, component: Array, rng: np.random.Generator
    ) -> tuple[Array, Array | None]:
        mean = np.broadcast_to(self.total, (len(params.probability),))[component]
        if self.dispersion > 0:
            mean = mean * self.dispersion * rng.standard_gamma(1.0 / self.dispersion, len(mean))
        return _scattered(rng.poisson(mean), params.probability[component], rng), None

    def mean(self, params: Any) -> Array:
        return np.asarray(np.array(self.total)[:, None] * params.probability)

    def describe(self, params: Any) -> Description:
        mean = self.mean(params)
        return Description(mean, np.sqrt(mean + self.dispersion * mean**2))

    def marginal(self, params: Any, columns: Array) -> tuple[Multinomial, Record]:
        """Totals are those of the columns kept."""
        family, kept = super().marginal(params, columns)
        share, probability = _renormalised(kept)
        total = tuple((np.array(self.total) * share).tolist())
        return replace(family, total=total), MultinomialParams(probability)

    def condition(self, params: Any, x: Array, given: Array) -> tuple[Multinomial, Record, Array]:
        """Totals of what is left are those of the negative multinomial given the counts `x`."""
        n = float(x[given].sum())
        family, kept = OneKind.marginal(self, params, np.flatnonzero(~given))
        share, probability = _renormalised(kept)
        seen = np.maximum(params.probability[:, given].sum(axis=1), TINY)
        total = tuple((n * share / seen).tolist())
        rest = replace(family, total=total, dispersion=1.0 / n if n > 0 else 0.0)
        return rest, MultinomialParams(probability), log_prob_given(self, params, x, given)

    def embed(self, rows: Rows) -> tuple[Array, Array]:
        """Square roots of frequencies (Hellinger's distance), as wide as the sample on average."""
        n = _totals(rows.values)
        scale = 1.0 / np.sqrt(np.where(n > 0, n, 1.0))
        mask = rows.is_observed
        d = self.schema.n_features
        roots: Any = np.sqrt(rows.values)
        if d > WIDE:
            projection = np.random.default_rng(d).standard_normal((d, NARROW)) / np.sqrt(NARROW)
            roots = roots @ projection
            mask = np.ones((rows.n_rows, NARROW), dtype=bool)
        elif rows.is_sparse:
            roots = roots.toarray()
        x = roots * scale[:, None]
        weight = np.maximum(mask.sum(axis=0), 1)
        x = np.where(mask, x - (x * mask).sum(axis=0) / weight, 0.0)
        spread = np.sqrt((x**2).sum() / max(1, mask.sum()))
        return x / (spread if spread > 0 else 1.0), mask

    def rounding(self, params: Any) -> Array:
        size = self.terms(params)
        unit = float(np.finfo(self.dtype).eps)
        exact = np.finfo(np.float64).eps
        return np.asarray(np.minimum(unit * size, MAX_ROUNDING) + exact * size)

    def terms(self, params: Any) -> Array:
        """(K,) size of `sum_j x_j log p_j` in a typical row."""
        return np.asarray(-(self.mean(params) * bounded_log(params.probability)).sum(axis=1))

    def n_parameters(self, n_components: int) -> int:
        return n_components * (self.schema.n_features - 1)


def _totals(values: Any) -> Array:
    """(n,) sums of rows that are arrays or sparse, in float64."""
    return np.asarray(values.sum(axis=1, dtype=np.float64)).ravel()


def _renormalised(params: Any) -> tuple[Array, Array]:
    """(K,) probability of some columns, and (K, d) each one's share of it."""
    share = params.probability.sum(axis=1)
    even = 1.0 / params.probability.shape[1]
    safe = np.where(share > 0, share, 1.0)[:, None]
    return share, np.where(share[:, None] > 0, params.probability / safe, even)


def _scattered(n: Array, probability: Array, rng: np.random.Generator) -> Array:
    """(n, d) multinomial counts with totals (n,) and probabilities (n, d)."""
    total = probability.sum(axis=1, keepdims=True)
    return rng.multinomial(n, probability / np.where(total > 0, total, 1.0)).astype(np.float64)


class MultinomialKernel:
    """Multinomial rows prepared for a pass."""

    by_row = True

    def __init__(self, family: Multinomial, params: Any, log_weights: Array) -> None:
        self.family, self.params, self.log_weights = family, params, log_weights
        self.dtype = np.dtype(family.dtype)
        self.n_components = len(log_weights)
        self.probability = np.maximum(params.probability, TINY)
        self.log_p = np.log(self.probability)
        self.rounding = 2 * family.terms(params)
        # Scores of long rows are themselves large, since the coefficient is left to `base`.
        if (np.finfo(self.dtype).eps * self.rounding > MAX_ROUNDING).any():
            self.dtype = np.dtype(np.float64)

    @cached_property
    def by_column(self) -> Array:
        """(d, K) log-probabilities."""
        return np.ascontiguousarray(self.log_p.T, dtype=self.dtype)

    def walk(self, rows: Rows) -> LinearWalk | SparseWalk | GapsWalk:
        if rows.is_sparse:
            return SparseWalk(self, rows)
        return LinearWalk(self, rows) if rows.observed is None else GapsWalk(self, rows)

    def linear(self, gaps: bool) -> Linear:
        del gaps
        eta = np.concatenate([self.log_weights[:, None], self.log_p], axis=1)
        return Linear(eta, self.rounding, self.dtype)

    def features(self, values: Array, observed: Array | None, out: Array) -> Array:
        del observed
        features = out[:, : len(values)]
        features[0] = 1.0
        features[1:] = values.T
        return features

    def direct(self, k: int, values: Array, observed: Array | None, features: Array) -> Array:
        """There is no better form for rows this long: the sum as it is, in float64."""
        del values, observed
        return np.asarray(self.log_weights[k] + self.log_p[k] @ features[1:])

    def base(self, values: Any, observed: Array | None) -> Array:
        """`log n! - sum_j log x_j!`; a missing entry is a 0."""
        del observed
        if sparse.issparse(values):
            stored: Any = values
            factorials = stored.astype(np.float64)
            factorials.data = log_factorial(factorials.data)
        else:
            factorials = log_factorial(values)
        return np.asarray(log_factorial(_totals(values)) - _totals(factorials))

    def statistics(self, sums: Array, gaps: bool) -> Monoid:
        del gaps
        return MultinomialStats(sums[:, 0], sums[:, 1:])


class SparseWalk(ConsecutiveWalk):
    """A walk over sparse rows: two sparse products a block, and nothing made dense."""

    def __init__(self, kernel: MultinomialKernel, rows: Rows) -> None:
        self.kernel = kernel
        k = kernel.n_components
        stored: Any = rows.values
        size = block_rows(stored.nnz // max(1, rows.n_rows) + 2 * k, kernel.dtype.itemsize)
        super().__init__(kernel.family, kernel.params, rows, size)
        self.sum_w = np.zeros(k)
        self.sum_count = np.zeros((rows.n_features, k))

    def load(self, index: Index) -> None:
        super().load(index)
        self.counts: Any = self.values.astype(self.kernel.dtype, copy=False)

    def score(self) -> Array:
        log_p = np.ascontiguousarray((self.counts @ self.kernel.by_column).T)
        log_p += self.kernel.log_weights[:, None].astype(log_p.dtype)
        return log_p

    def base(self) -> Array:
        return self.kernel.base(self.values, None)

    def gather(self, resp: Array) -> None:
        self.sum_w += resp.sum(axis=1, dtype=np.float64)
        self.sum_count += self.counts.T @ np.ascontiguousarray(resp.T)

    def complete(self, resp: Array, rng: np.random.Generator | None = None) -> Array:
        """Sparse rows have no gaps."""
        del resp, rng
        stored: Any = self.values
        return np.asarray(stored.toarray(), dtype=np.float64)

    def close(self) -> Monoid:
        return MultinomialStats(self.sum_w, np.ascontiguousarray(self.sum_count.T))


class GapsWalk(ConsecutiveWalk):
    """A walk over rows with gaps, in float64: a third product gives the probability of what a row
    observed, a fourth one the weight of what it missed.
    """

    def __init__(self, kernel: MultinomialKernel, rows: Rows) -> None:
        self.kernel = kernel
        k = kernel.n_components
        size = block_rows(2 * rows.n_features + 2 * k, 8)
        super().__init__(kernel.family, kernel.params, rows, size)
        self.sum_w = np.zeros(k)
        self.sum_count = np.zeros((k, rows.n_features))
        self.unseen = np.zeros((k, rows.n_features))

    def load(self, index: Index) -> None:
        super().load(index)
        assert self.observed is not None
        self.x = self.values.astype(np.float64)
        self.missing = (~self.observed).astype(np.float64)
        self.n = self.x.sum(axis=1)
        seen = self.kernel.probability @ (1.0 - self.missing).T
        self.seen = np.maximum(seen, TINY)

    def score(self) -> Array:
        log_p = self.kernel.log_p @ self.x.T - self.n * np.log(self.seen)
        log_p += self.kernel.log_weights[:, None]
        return np.asarray(log_p)

    def base(self) -> Array:
        return self.kernel.base(self.values, None)

    def gather(self, resp: Array) -> None:
        assert self.observed is not None
        self.sum_w += resp @ self.observed.any(axis=1)
        self.sum_count += resp @ self.x
        self.unseen += (resp * (self.n / self.seen)) @ self.missing

    def complete(self, resp: Array, rng: np.random.Generator | None = None) -> Array:
        assert self.observed is not None
        if rng is None:
            spread = (resp * (self.n / self.seen)).T @ self.kernel.probability
            return np.where(self.observed, self.x, spread)
        component = resp.argmax(axis=0)
        hidden = self.kernel.probability[component] * self.missing
        rate = hidden.sum(axis=1) / self.seen[component, np.arange(len(component))]
        n = rng.poisson(np.minimum(rng.standard_gamma(self.n) * rate, MOST))
        return np.where(self.observed, self.x, _scattered(n, hidden, rng))

    def close(self) -> Monoid:
        counts = self.sum_count + self.unseen * self.kernel.probability
        return MultinomialStats(self.sum_w, counts)
