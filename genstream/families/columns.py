"""Independent columns of any kind: real, binary, count and categorical.

Given the component, columns are independent,

    x_j ~ N(mean, variance) | Bernoulli(probability) | Poisson(rate) | Categorical(p)

so a missing entry is simply left out of the product, exactly. The features of a row are

    T(x) = [1, y, y^2, binary x, count x, one-hot levels, beyond limits]

with `y` the real columns in pivot coordinates; a block with gaps adds one row of ones where a
column is observed, which carries that column's normaliser. A diagonal Gaussian is the case of real
columns only; `spherical` shares one variance among a component's real columns, `shared` one among
those of all components. With equal weights kept and responsibilities of 0 or 1 the latter is
K-means. Entries beyond a real column's detection limits have no `y`; their moments given the
component are in the sums (`genstream.families.censored`).
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from genstream.families.blocks import (
    LOG_2PI,
    MAX_ROUNDING,
    UNSEEN,
    Array,
    Begun,
    Description,
    Index,
    Linear,
    Pivot,
    moments,
)
from genstream.families.censored import Limits, Tails
from genstream.families.columns_walk import FastFeatures, LinearWalk, log_prob_given
from genstream.families.factorials import log_factorial
from genstream.families.levels import look_up
from genstream.rows import Rows
from genstream.schema import Schema
from genstream.stats import Monoid, Record, axes, record

# Smallest log-probability of a level, and log-rate of a count: finite, so that products stay so.
LOG_TINY = -600.0
# Smallest variance of a real column, as a share of the pivot's variance.
FLOOR = 1e-9
# A variance at most this many times the floor of its column's resolution sits on it.
ON_FLOOR = 1.01
# A variance below this share of the raw second moment is rounding error.
SINGULAR = 1e-14


@dataclass(frozen=True, eq=False)
class ColumnsParams(Record):
    """Parameters of K components over independent columns, in data units.

    `variance` is (K,) where the real columns share one, and the same K times where the components
    do too. `level_probability` holds the levels of all categorical columns side by side; those of
    one column sum to 1.
    """

    mean: Array = axes("component", "real")
    variance: Array = axes("component", "real")
    probability: Array = axes("component", "binary")
    rate: Array = axes("component", "count")
    level_probability: Array = axes("component", "level")


@dataclass(frozen=True, eq=False)
class SphericalParams(ColumnsParams):
    """Means of K spherical Gaussians with a variance each, in data units."""

    variance: Array = axes("component")


@dataclass(frozen=True, eq=False)
class ColumnsStats(Monoid):
    """Sums of `r o` a column (the weight that observed it), and of `r o x` or `r o y`, `r o y^2`,
    in pivot coordinates for real columns.
    """

    sum_w: Array = axes("component", "feature")
    sum_real: Array = axes("component", "real")
    sum_square: Array = axes("component", "real")
    sum_binary: Array = axes("component", "binary")
    sum_count: Array = axes("component", "count")
    sum_level: Array = axes("component", "level")


@dataclass(frozen=True, eq=False)
class SphericalStats(ColumnsStats):
    """The same with squares summed over the columns as well."""

    sum_square: Array = axes("component")


@dataclass(frozen=True, eq=False)
class ColumnsPrior(Record):
    """Conjugate priors of independent columns, in data units.

    Real columns: Normal-inverse-chi-squared with `scatter`, `dof` and mean `mean` worth `strength`
    rows. All others: `rows` pseudo-rows at the sample's own frequencies and means.
    """

    mean: Array = axes("real")
    scatter: Array = axes("real")
    strength: float = axes()
    dof: float = axes()
    probability: Array = axes("binary")
    rate: Array = axes("count")
    level_probability: Array = axes("level")
    rows: float = axes()

    def stronger(self, strength: float, spread: float) -> ColumnsPrior:
        """`strength` times the pseudo-rows, at `spread` times the variance of real columns."""
        return replace(
            self,
            scatter=self.scatter * (strength * spread),
            strength=self.strength * strength,
            dof=strength * (self.dof + 2) - 2,
            rows=self.rows * strength,
        )


@dataclass(frozen=True, eq=False)
class IndependentColumns(Begun):
    """K components whose columns are independent of one another.

    Parameters
    ----------
    schema
        The columns, of any kind.
    spherical
        One variance a component, shared by its real columns.
    ridge
        Added to every variance after the M-step, in squared data units (scikit-learn's
        `reg_covar`); no prior, so the log-likelihood may then fall by a little.
    dtype
        Arithmetic of the E-step, float64 or float32; sums are float64 always.
    pivot, prior
        Fixed by `anchored`; the pivot has an entry for every column, neutral where not real.
    shared
        One variance for the real columns of all components; only where `spherical`.
    """

    schema: Schema
    spherical: bool = False
    ridge: float = 0.0
    dtype: str = "float64"
    pivot: Pivot | None = record(Pivot)
    prior: ColumnsPrior | None = record(ColumnsPrior)
    shared: bool = False

    name: ClassVar[str] = "columns"
    bound: ClassVar[bool] = False
    n_factors: ClassVar[int] = 0
    param_names: ClassVar[tuple[str, ...]] = (
        "mean",
        "variance",
        "probability",
        "rate",
        "level_probability",
    )
    prior_type: ClassVar[type[Record]] = ColumnsPrior

    @property
    def settled(self) -> bool:
        """Whether complete rows sum to the same under any parameters: not where an entry beyond a
        detection limit stands for what it is expected to be.
        """
        return self.limits.none

    def options(self) -> dict[str, Any]:
        covariance = "shared" if self.shared else "spherical" if self.spherical else "diag"
        return {"covariance": covariance, "reg_covar": self.ridge, "dtype": self.dtype}

    @classmethod
    def of(
        cls, schema: Schema, options: Mapping[str, Any], pivot: Pivot | None, prior: Any
    ) -> IndependentColumns:
        kind = ("diag", "spherical", "shared").index(options["covariance"])
        ridge, dtype = options["reg_covar"], options["dtype"]
        return cls(schema, kind > 0, ridge, dtype, pivot, prior, kind > 1)

    def with_dtype(self, dtype: str) -> IndependentColumns:
        return replace(self, dtype=dtype)

    @property
    def params_type(self) -> type[ColumnsParams]:
        return SphericalParams if self.spherical else ColumnsParams

    @property
    def stats_type(self) -> type[ColumnsStats]:
        return SphericalStats if self.spherical else ColumnsStats

    @cached_property
    def real(self) -> Array:
        """Positions of the real columns."""
        return np.array(self.schema.of_kind("real"), dtype=np.intp)

    @cached_property
    def limits(self) -> Limits:
        """Detection limits of the real columns."""
        return Limits(self.schema, self.real)

    @cached_property
    def binary(self) -> Array:
        """Positions of the binary columns."""
        return np.array(self.schema.of_kind("binary"), dtype=np.intp)

    @cached_property
    def count(self) -> Array:
        """Positions of the count columns."""
        return np.array(self.schema.of_kind("count"), dtype=np.intp)

    @cached_property
    def level_column(self) -> Array:
        """Position of the categorical column of each level, in the order of `level_probability`."""
        sizes = [(j, self.schema.columns[j].n_levels) for j in self.schema.of_kind("categorical")]
        return np.array([j for j, size in sizes for _ in range(size)], dtype=np.intp)

    @cached_property
    def level_code(self) -> Array:
        """Code of each level within its column."""
        sizes = [self.schema.columns[j].n_levels for j in self.schema.of_kind("categorical")]
        return np.array([code for size in sizes for code in range(size)], dtype=np.float64)

    @cached_property
    def level_start(self) -> Array:
        """Where each categorical column begins among the levels."""
        return np.flatnonzero(np.diff(self.level_column, prepend=-1))

    def level_totals(self, levels: Array) -> Array:
        """(..., L) sums over the levels of each column, repeated for each of its levels."""
        if not levels.shape[-1]:
            return levels
        sums = np.add.reduceat(levels, self.level_start, axis=-1)
        sizes = np.diff(np.append(self.level_start, levels.shape[-1]))
        return np.repeat(sums, sizes, axis=-1)

    @property
    def pivot_at(self) -> Pivot:
        """The pivot, neutral before `anchored`."""
        return self.pivot if self.pivot is not None else Pivot.none(self.schema.n_features)

    def anchored(self, sample: Rows, n_components: int, weak_prior: bool) -> IndependentColumns:
        """Pivot at the real columns' means and deviations.

        The weak prior is Fraley & Raftery's (2007, section 3.2) for variances, each column on its
        own, and one pseudo-row at the sample's frequencies for every other kind.
        """
        mean, variance, total = moments(sample)
        others = np.ones(self.schema.n_features, dtype=bool)
        others[self.real] = False
        pivot = Pivot.of(
            np.where(others, 0.0, mean), np.where(others, 1.0, variance), common=self.spherical
        )
        if self.spherical:
            pivot = Pivot.of(mean, variance, common=True)
        prior = None
        if weak_prior:
            d = max(1, len(self.real))
            spread = np.where(variance > 0, variance, 1.0)[self.real]
            scatter = spread / n_components ** (2.0 / d)
            levels = _level_sums(self, sample) + 0.5
            prior = ColumnsPrior(
                mean=mean[self.real],
                scatter=np.full_like(scatter, scatter.mean()) if self.spherical else scatter,
                strength=0.01,
                dof=3.0,
                probability=((mean * total + 0.5) / (total + 1.0))[self.binary],
                rate=((mean * total + 0.5) / (total + 1.0))[self.count],
                level_probability=levels / self.level_totals(levels),
                rows=1.0,
            )
        return replace(self, pivot=pivot, prior=prior)

    def vague(self, n_components: int) -> Record:
        pivot = self.pivot_at
        shape = (n_components, len(self.real))
        mean = np.broadcast_to(pivot.shift[self.real], shape).copy()
        variance = np.broadcast_to(pivot.scale[self.real] ** 2, shape).copy()
        prior = self.prior
        ones = np.ones(len(self.level_column))
        levels = prior.level_probability if prior else ones / self.level_totals(ones)
        binary = prior.probability if prior else np.full(len(self.binary), 0.5)
        rate = prior.rate if prior else np.ones(len(self.count))

        def stacked(row: Array) -> Array:
            return np.tile(row, (n_components, 1))

        return self.params_type(
            mean,
            variance[:, 0] if self.spherical else variance,
            stacked(binary),
            stacked(rate),
            stacked(levels),
        )

    def variances(self, params: Any) -> Array:
        """(K, real) variances, also where they are shared."""
        if not self.spherical:
            return np.asarray(params.variance)
        return np.repeat(params.variance[:, None], len(self.real), axis=1)

    def prepare(self, params: Any, log_weights: Array) -> ColumnsKernel:
        return ColumnsKernel(self, params, log_weights)

    def maximise(
        self, stats: Any, previous: Any, frozen: frozenset[str] = frozenset()
    ) -> tuple[Record, NDArray[np.bool_]]:
        """Mode of the conjugate posterior, column by column, over the rows that observed it.

        Real, with `n` the observed weight, `S` the scatter about the weighted mean and `D` its
        squared distance from the prior mean: `mean = (strength m0 + sum) / (strength + n)` and
        `variance = (scatter + S + strength n / (strength + n) D) / (dof + n + 3)`. A spherical
        variance sums over the d columns, a shared one over the components too, and divides by
        `dof + n + 2` and the number of means it is about. About a frozen mean, `S` and the last
        term are `S + n (average - mean)^2` and `strength (mean - m0)^2`. Others:
        `(sum + rows * prior) / (n + rows)`. Without a prior these are the plain averages; a column
        that a component never observed keeps its previous parameters. A variance below the least
        one of its column is the maximum at that.
        """
        prior = self.prior
        rows = prior.rows if prior else 0.0
        tiny = UNSEEN * float(stats.sum_w.sum(axis=0).max())

        def average(name: str, sums: Array, positions: Array) -> Array:
            old = np.asarray(getattr(previous, name))
            if name in frozen:
                return old
            total = stats.sum_w[:, positions] + rows
            if prior is not None:
                sums = sums + rows * getattr(prior, name)
            return np.where(total > tiny, sums / np.where(total > tiny, total, 1.0), old)

        mean, variance = self._maximise_real(stats, previous, tiny, frozen)
        levels = average("level_probability", stats.sum_level, self.level_column)
        if "level_probability" not in frozen:
            levels = levels / self.level_totals(levels)
        params = self.params_type(
            mean,
            variance,
            np.clip(average("probability", stats.sum_binary, self.binary), 0.0, 1.0),
            average("rate", stats.sum_count, self.count),
            levels,
        )
        faulty = stats.sum_w.max(axis=1) <= tiny
        # A prior knows what no row does, and what is frozen is not to be moved to other rows.
        return params, np.zeros_like(faulty) if prior is not None or frozen else faulty

    def _maximise_real(
        self, stats: Any, previous: Any, tiny: float, frozen: frozenset[str]
    ) -> tuple[Array, Array]:
        """Means (K, real) in data units, and variances (K, real) or (K,)."""
        prior, pivot = self.prior, self.pivot_at
        shift, scale = pivot.shift[self.real], pivot.scale[self.real]
        n = stats.sum_w[:, self.real]
        known = n > tiny
        safe = np.where(known, n, 1.0)
        average = stats.sum_real / safe
        about = np.where(known, safe * average**2, 0.0)
        if self.spherical:
            about = about.sum(axis=1)
        scatter = np.maximum(stats.sum_square - about, SINGULAR * stats.sum_square)
        fixed = (previous.mean - shift) / scale
        if "mean" in frozen:
            pull = np.where(known, n * (average - fixed) ** 2, 0.0)
            mean = fixed
        else:
            pull = np.zeros_like(n)
            mean = np.where(known, average, fixed)
        if prior is not None:
            m0 = (prior.mean - shift) / scale
            if "mean" in frozen:
                pull += prior.strength * (fixed - m0) ** 2
            else:
                gap = np.where(known, average - m0, 0.0)
                pull = prior.strength * n / (prior.strength + n) * gap**2
                mean = (prior.strength * m0 + stats.sum_real) / (prior.strength + n)
        centre = previous.mean if "mean" in frozen else shift + mean * scale
        if "variance" in frozen:
            return centre, previous.variance
        if self.spherical:
            unit: Any = scale[0] ** 2
            scatter, n, n_means = scatter + pull.sum(axis=1), n.sum(axis=1), len(self.real)
            if self.shared:
                n_means *= len(n)
                scatter, n = np.full_like(n, scatter.sum()), np.full_like(n, n.sum())
        else:
            unit, scatter, n_means = scale**2, scatter + pull, 1
        if prior is not None:
            psi = prior.scatter / scale**2
            variance = (psi.mean() if self.spherical else psi) + scatter
            variance = variance / (prior.dof + n + 2 + n_means)
        else:
            variance = scatter / np.where(n > tiny, n, 1.0)
            variance = np.where(n > tiny, variance, previous.variance / unit)
        return centre, np.maximum(variance * unit + self.ridge, self._floor(unit))

    def _floor(self, unit: Any) -> Any:
        """Least variance of each real column, of all together where they share one."""
        least = np.array([self.schema.columns[j].least_variance for j in self.real])
        return np.maximum(FLOOR * unit, least.max() if self.spherical else least)

    def keep(self, stats: Any, components: Sequence[int]) -> Monoid:
        kept: Monoid = stats.take(components)
        return kept

    def possible(self, stats: Any, known: Any) -> Monoid | None:
        """Sums, and the scatter of each real column, kept above a tenth of the known ones."""
        if not all(np.isfinite(value).all() for _, _, value in stats.leaves()):
            return None

        def kept(value: Array, old: Array) -> Array:
            return np.maximum(value, 0.1 * old)

        n, n_old = kept(stats.sum_w, known.sum_w), known.sum_w
        misses = kept(
            n[:, self.binary] - stats.sum_binary, n_old[:, self.binary] - known.sum_binary
        )
        about, about_old = self._about(n, stats), self._about(n_old, known)
        return self.stats_type(
            n,
            stats.sum_real,
            about + kept(stats.sum_square - about, known.sum_square - about_old),
            kept(n[:, self.binary] - misses, known.sum_binary),
            kept(stats.sum_count, known.sum_count),
            kept(stats.sum_level, known.sum_level),
        )

    def _about(self, n: Array, stats: Any) -> Array:
        """Squares of the weighted means times the weight: what scatter leaves of the squares."""
        about = stats.sum_real**2 / np.maximum(n[:, self.real], 1e-300)
        return np.asarray(about.sum(axis=1) if self.spherical else about)

    def expected_log_prob(self, params: Any, stats: Any) -> float:
        kernel = self.prepare(params, np.zeros(len(stats.sum_w)))
        square = stats.sum_square[:, None] if self.spherical else stats.sum_square
        sums = np.concatenate(
            [stats.sum_real, square, stats.sum_binary, stats.sum_count, stats.sum_level], axis=1
        )
        # Sums of censored entries are among the others here.
        slopes = kernel.slopes[:, : sums.shape[1]]
        return float((slopes * sums).sum() + (kernel.normaliser * stats.sum_w).sum())

    def log_prior(self, params: Any) -> float:
        prior = self.prior
        if prior is None:
            return 0.0
        variance = self.variances(params)
        total = 0.0
        if len(self.real):
            pull = prior.strength * (params.mean - prior.mean) ** 2 / variance
            total -= 0.5 * float(pull.sum())
            if self.spherical:
                shared = params.variance[:1] if self.shared else params.variance
                n_means = len(self.real) * len(params.variance) // len(shared)
                width = prior.dof + 2 + n_means
                total -= 0.5 * float((width * np.log(shared) + prior.scatter.mean() / shared).sum())
            else:
                total -= 0.5 * float(
                    ((prior.dof + 3) * np.log(variance) + prior.scatter / variance).sum()
                )
        success, failure = bounded_log(params.probability), bounded_log1m(params.probability)
        total += prior.rows * float(
            (prior.probability * success + (1 - prior.probability) * failure).sum()
        )
        total += prior.rows * float((prior.rate * bounded_log(params.rate) - params.rate).sum())
        total += prior.rows * float(
            (prior.level_probability * bounded_log(params.level_probability)).sum()
        )
        return total

    def place(self, params: Any, component: int, x: Array, observed: Array) -> Record:
        """Real and count columns move to the row, categories lean half towards it."""
        pivot = self.pivot_at
        mean, rate = params.mean.copy(), params.rate.copy()
        probability, levels = params.probability.copy(), params.level_probability.copy()
        mean[component] = np.where(observed[self.real], x[self.real], pivot.shift[self.real])
        variance = params.variance.copy()
        scale = pivot.scale[self.real] ** 2
        if not self.shared:
            variance[component] = scale[0] if self.spherical else scale
        pooled = params.rate.mean(axis=0)
        rate[component] = np.where(observed[self.count], 0.5 * (x[self.count] + pooled), pooled)
        pooled = params.probability.mean(axis=0)
        probability[component] = np.where(
            observed[self.binary], 0.5 * (x[self.binary] + pooled), pooled
        )
        pooled = params.level_probability.mean(axis=0)
        hit = x[self.level_column] == self.level_code
        levels[component] = np.where(observed[self.level_column], 0.5 * (hit + pooled), pooled)
        return self.params_type(mean, variance, probability, rate, levels)

    splits: ClassVar[bool] = True

    def halves(
        self, params: Any, components: Array, apart: float, rng: np.random.Generator
    ) -> tuple[Record, Record]:
        """Along the real column that varies most, measured by the pivot. Without a real column, all
        others move a share `apart` of the way to where one of them would be certain or 0, each one
        way or the other by chance; of a categorical column the likeliest level moves against the
        others.
        """
        kept = params.take(components.tolist())
        every = np.arange(len(components))
        if len(self.real):
            scale = self.pivot_at.scale[self.real]
            variance = self.variances(kept)
            widest = (variance / scale**2).argmax(axis=1)
            step = np.zeros_like(variance)
            step[every, widest] = apart * np.sqrt(variance[every, widest])
            if not self.spherical:
                variance = variance - step**2
                least = self._floor(scale**2)
                kept = replace(kept, variance=np.maximum(variance, least))
            one, other = (replace(kept, mean=kept.mean + way * step) for way in (-1.0, 1.0))
            return one, other

        def sign(value: Array) -> Array:
            return rng.choice([-1.0, 1.0], value.shape)

        room = apart * np.minimum(kept.probability, 1 - kept.probability)
        binary, rate = sign(room) * room, sign(kept.rate) * apart * kept.rate
        levels = kept.level_probability
        tilt = np.zeros_like(levels)
        for own in np.split(np.arange(levels.shape[1]), self.level_start[1:]):
            p = levels[:, own]
            likeliest = p == p.max(axis=1, keepdims=True, initial=0.0)
            leaning = np.where(likeliest, p, -p) * sign(p[:, :1])
            tilt[:, own] = apart / 2 * (leaning - p * leaning.sum(axis=1, keepdims=True))
        one, other = (
            replace(
                kept,
                probability=kept.probability + way * binary,
                rate=kept.rate + way * rate,
                level_probability=levels + way * tilt,
            )
            for way in (-1.0, 1.0)
        )
        return one, other

    def draw(
        self, params: Any, component: Array, rng: np.random.Generator
    ) -> tuple[Array, Array | None]:
        n = len(component)
        out = np.empty((n, self.schema.n_features))
        if len(self.real):
            deviation = np.sqrt(self.variances(params))
            noise = rng.standard_normal((n, len(self.real)))
            values = params.mean[component] + noise * deviation[component]
            out[:, self.real] = self.limits.recorded(values)
        if len(self.binary):
            uniform = rng.random((n, len(self.binary)))
            out[:, self.binary] = uniform < params.probability[component]
        if len(self.count):
            out[:, self.count] = rng.poisson(params.rate[component])
        edges = np.append(self.level_start, len(self.level_column))
        for start, stop in itertools.pairwise(edges):
            below = np.cumsum(params.level_probability[:, start:stop], axis=1)[:, :-1]
            uniform = rng.random(n)
            code = (uniform[:, None] >= below[component]).sum(axis=1)
            out[:, self.level_column[start]] = code
        return out, None

    def fill(self, params: Any, resp: Array, rng: np.random.Generator | None = None) -> Array:
        if rng is not None:
            return self.draw(params, resp.argmax(axis=0), rng)[0]
        out = np.empty((resp.shape[1], self.schema.n_features))
        out[:, self.real] = resp.T @ self.limits.mean(params.mean, self.variances(params))
        out[:, self.binary] = resp.T @ params.probability > 0.5
        out[:, self.count] = resp.T @ params.rate
        levels = resp.T @ params.level_probability
        edges = np.append(self.level_start, len(self.level_column))
        for start, stop in itertools.pairwise(edges):
            out[:, self.level_column[start]] = levels[:, start:stop].argmax(axis=1)
        return out

    def marginal(self, params: Any, columns: Array) -> tuple[IndependentColumns, Record]:
        schema = Schema(tuple(self.schema.columns[j] for j in columns))
        pivot = None
        if self.pivot is not None:
            pivot = Pivot(self.pivot.shift[columns], self.pivot.scale[columns])
        real = np.isin(self.real, columns)
        return replace(self, schema=schema, pivot=pivot, prior=None), self.params_type(
            params.mean[:, real],
            params.variance if self.spherical else params.variance[:, real],
            params.probability[:, np.isin(self.binary, columns)],
            params.rate[:, np.isin(self.count, columns)],
            params.level_probability[:, np.isin(self.level_column, columns)],
        )

    def condition(
        self, params: Any, x: Array, given: Array
    ) -> tuple[IndependentColumns, Record, Array]:
        rest, kept = self.marginal(params, np.flatnonzero(~given))
        return rest, kept, log_prob_given(self, params, x, given)

    def embed(self, rows: Rows) -> tuple[Array, Array]:
        """Standardised reals and log-counts; binaries and one-hot levels by their spread."""
        observed = rows.is_observed
        pivot = self.pivot_at
        parts, masks = [], []
        seen = observed[:, self.real]
        parts.append((rows.values[:, self.real] - pivot.shift[self.real]) / pivot.scale[self.real])
        masks.append(seen)
        for positions in (self.count, self.binary):
            x = rows.values[:, positions].astype(np.float64)
            seen = observed[:, positions]
            x = np.log1p(np.maximum(x, 0.0))
            n = np.maximum(seen.sum(axis=0), 1)
            centre = (x * seen).sum(axis=0) / n
            spread = np.sqrt((((x - centre) ** 2) * seen).sum(axis=0) / n)
            parts.append((x - centre) / np.where(spread > 0, spread, 1.0))
            masks.append(seen)
        hit = rows.values[:, self.level_column] == self.level_code
        share = np.maximum(_level_sums(self, rows), 1.0)
        # Chi-squared scaling: a rare level sets rows apart more than a common one, up to a bound.
        weight = np.minimum(np.sqrt(self.level_totals(share) / share), 3.0) / np.sqrt(2.0)
        parts.append(hit * weight)
        masks.append(observed[:, self.level_column])
        mask = np.concatenate(masks, axis=1)
        return np.where(mask, np.concatenate(parts, axis=1), 0.0), mask

    def with_levels(
        self, schema: Schema, params: Any, seen: Array
    ) -> tuple[IndependentColumns, Record]:
        family = replace(self, schema=schema)
        index = np.array(_level_index(self.schema, schema))
        sizes = family.level_totals(np.ones(len(index)))
        fresh = np.where(index < 0, 0.5 / (seen[family.level_column] + 0.5 * sizes), 0.0)
        rest = 1.0 - family.level_totals(fresh)

        def grown(record: Any) -> Any:
            wide = record.take(index, "level")
            return replace(wide, level_probability=wide.level_probability * rest + fresh)

        prior = None if self.prior is None else grown(self.prior)
        return replace(family, prior=prior), grown(params)

    def stats_with_levels(self, schema: Schema, stats: Any) -> Monoid:
        wide: Monoid = stats.take(_level_index(self.schema, schema), "level")
        return wide

    def rounding(self, params: Any) -> Array:
        scale = self.pivot_at.scale[self.real]
        variance = self.variances(params)
        mean = params.mean - self.pivot_at.shift[self.real]
        # Means are kept in data units, where a large offset takes digits from them.
        lost = np.finfo(np.float64).eps * params.mean / scale
        moved = lost**2 * scale**2 / variance
        unit = float(np.finfo(self.dtype).eps)
        quadratic = np.minimum(unit * mean**2 / variance, MAX_ROUNDING)
        counts = poisson_terms(params.rate)
        exact = np.finfo(np.float64).eps
        counts = np.minimum(unit * counts, MAX_ROUNDING) + exact * counts
        return np.asarray((quadratic + moved).sum(axis=1) + counts)

    def describe(self, params: Any) -> Description:
        mean = np.full((len(params.mean), self.schema.n_features), np.nan)
        sd = mean.copy()
        mean[:, self.real], sd[:, self.real] = params.mean, np.sqrt(self.variances(params))
        mean[:, self.count], sd[:, self.count] = params.rate, np.sqrt(params.rate)
        success = params.probability
        levels = {
            int(j): np.column_stack([1 - success[:, i], success[:, i]])
            for i, j in enumerate(self.binary)
        }
        for j in np.unique(self.level_column):
            levels[int(j)] = params.level_probability[:, self.level_column == j]
        return Description(mean, sd, levels)

    def n_parameters(self, n_components: int) -> int:
        real = len(self.real)
        levels = len(self.level_column) - len(self.level_start)
        means = n_components * (real + len(self.binary) + len(self.count) + levels)
        if self.shared:
            return means + 1
        return means + n_components * (1 if self.spherical else real)

    def floored(self, params: Any) -> list[tuple[int, int]]:
        """(component, column position) whose variance sits on its floor or ridge."""
        floor = np.maximum(FLOOR * self.pivot_at.scale[self.real] ** 2, self.ridge) * 1.5
        floor = np.maximum(floor, self._floor(0.0) * ON_FLOOR)
        at = np.argwhere(self.variances(params) <= floor)
        return [(int(k), int(self.real[j])) for k, j in at]


def bounded_log(p: Array) -> Array:
    """Log, not below `LOG_TINY`."""
    return np.log(np.maximum(p, np.exp(LOG_TINY)))


def bounded_log1m(p: Array) -> Array:
    """log(1 - p), not below the log of the roundoff of 1."""
    return np.log1p(-np.minimum(p, 1.0 - np.finfo(np.float64).epsneg))


def poisson_terms(rate: Array) -> Array:
    """(K,) size of the terms of `x log rate - rate` near `x = rate`, which cancel."""
    return np.asarray((rate * (1.0 + np.abs(bounded_log(rate)))).sum(axis=1))


def _span(positions: Array) -> Index:
    """Positions as a slice where they are neighbours, so that they index a view."""
    if len(positions) and positions[-1] - positions[0] == len(positions) - 1:
        return slice(positions[0], positions[-1] + 1)
    return positions


def _level_index(old: Schema, new: Schema) -> list[int]:
    """Where each level of the new schema stood among the old ones, -1 for new levels."""
    index: list[int] = []
    at = 0
    for before, after in zip(old.columns, new.columns, strict=True):
        index += range(at, at + before.n_levels)
        index += [-1] * (after.n_levels - before.n_levels)
        at += before.n_levels
    return index


def _level_sums(family: IndependentColumns, rows: Rows) -> Array:
    """(L,) weight of each level in some rows."""
    hit = rows.values[:, family.level_column] == family.level_code
    hit &= rows.is_observed[:, family.level_column]
    return np.asarray(rows.row_weights @ hit)


class ColumnsKernel:
    """Independent columns prepared for a pass."""

    def __init__(self, family: IndependentColumns, params: Any, log_weights: Array) -> None:
        self.family, self.params, self.log_weights = family, params, log_weights
        self.dtype = np.dtype(family.dtype)
        self.n_components = len(log_weights)
        shift, scale = family.pivot_at.shift[family.real], family.pivot_at.scale[family.real]
        self.real_pivot = Pivot(shift, scale)
        self.mean = (params.mean - shift) / scale
        self.variance = family.variances(params) / scale**2
        slope = self.mean / self.variance
        quadratic = self.mean * slope
        # The normaliser of each column: what an observed entry adds at y = 0 or x = 0.
        self.normaliser = np.zeros((self.n_components, family.schema.n_features))
        # The same about each mean: beside a large quadratic term its digits would be lost.
        self.about_mean = -0.5 * (np.log(self.variance) + LOG_2PI) - np.log(scale)
        self.normaliser[:, family.real] = self.about_mean - 0.5 * quadratic
        failure = bounded_log1m(params.probability)
        self.normaliser[:, family.binary] = failure
        self.normaliser[:, family.count] = -params.rate
        curvature = -0.5 / self.variance
        if family.spherical:
            curvature = curvature[:, :1]
        log_rate = bounded_log(params.rate)
        limits = family.limits
        self.tails = Tails(limits, shift, scale, self.mean, self.variance)
        # A censored entry adds the log of a tail in place of its column's normaliser.
        self.limited = np.concatenate([limits.low, limits.high])
        beyond = self.tails.log_p - self.normaliser[:, family.real[self.limited]]
        self.slopes = np.concatenate(
            [
                slope,
                curvature,
                bounded_log(params.probability) - failure,
                log_rate,
                bounded_log(params.level_probability),
                beyond,
            ],
            axis=1,
        )
        counts = poisson_terms(params.rate)
        self.rounding = 2 * quadratic.sum(axis=1) + 2 * counts
        # Scores of large counts are themselves large, since `log x!` is left to `base`: float32
        # cannot hold them, however exactly they were computed.
        if (np.finfo(self.dtype).eps * counts > MAX_ROUNDING).any():
            self.dtype = np.dtype(np.float64)
        self.n_square = curvature.shape[1]
        before = 2 * len(family.real) if not family.spherical else len(family.real) + 1
        before += len(family.binary) + len(family.count)
        self.level_slot = slice(before, before + len(family.level_column))
        # Whether levels are among the features.
        self.one_hot = True

    @property
    def by_row(self) -> bool:
        family = self.family
        return not (len(family.real) or (self.one_hot and len(family.level_column)))

    @property
    def level_columns(self) -> NDArray[np.intp]:
        return self.family.level_column[self.family.level_start]

    @property
    def level_sizes(self) -> NDArray[np.intp]:
        return np.diff(np.append(self.family.level_start, len(self.family.level_column)))

    @property
    def level_slopes(self) -> Array:
        return self.slopes[:, self.level_slot]

    @cached_property
    def without_levels(self) -> ColumnsKernel:
        """The same kernel without features of levels."""
        kernel = copy.copy(self)
        kernel.one_hot = False
        return kernel

    @property
    def feature_slopes(self) -> Array:
        """The natural parameters of the features between the constant and the normalisers."""
        if self.one_hot:
            return self.slopes
        return np.delete(self.slopes, self.level_slot, axis=1)

    def linear(self, gaps: bool) -> Linear:
        constant = self.log_weights
        if not gaps:
            constant = constant + self.normaliser.sum(axis=1)
        pieces = [constant[:, None], self.feature_slopes]
        if gaps:
            pieces.append(self.normaliser)
        return Linear(np.concatenate(pieces, axis=1), self.rounding, self.dtype)

    def take(self, components: Array) -> ColumnsKernel:
        """The kernel of some of the components (C,)."""
        params, log_weights = self.params.take(components), self.log_weights[components]
        if not self.family.limits.none:
            return ColumnsKernel(self.family, params, log_weights)
        some = copy.copy(self)
        # What was made of all components is not that of some.
        some.__dict__.pop("without_levels", None)
        some.params, some.log_weights, some.n_components = params, log_weights, len(components)
        for name in ("mean", "variance", "normaliser", "about_mean", "slopes", "rounding"):
            setattr(some, name, getattr(self, name)[components])
        return some

    def walk(self, rows: Rows) -> LinearWalk:
        found = look_up(self, rows) if len(self.family.level_column) else None
        return LinearWalk(self, rows) if found is None else found

    def _centred(self, values: Array, observed: Array | None) -> tuple[Array, Array]:
        """(real, n) real columns in pivot coordinates, zero where missing or censored, and which
        entries are censored: (limits, n), by lower limits first.
        """
        real, limits = self.family.real, self.family.limits
        chosen = values[:, real]
        y = self.real_pivot.block(chosen, np.empty((len(real), len(values))))
        seen = None if observed is None else observed[:, real]
        if seen is not None:
            y *= seen.T
        if limits.none:
            return y, np.empty((0, len(values)), dtype=bool)
        below, above = limits.beyond(chosen, seen)
        y[limits.low] *= ~below
        y[limits.high] *= ~above
        return y, np.concatenate([below, above])

    def features(self, values: Array, observed: Array | None, out: Array) -> Array:
        family = self.family
        n = len(values)
        features = out[:, :n]
        real, columns = len(family.real), values.T
        y, beyond = self._centred(values, observed)
        features[0] = 1.0
        at = 1
        features[at : at + real] = y
        at += real
        if family.spherical:
            np.einsum("in,in->n", y, y, out=features[at], casting="same_kind")
        else:
            np.multiply(y, y, out=features[at : at + real], casting="same_kind")
        at += self.n_square
        for positions in (family.binary, family.count):
            features[at : at + len(positions)] = values[:, _span(positions)].T
            at += len(positions)
        levels = zip(family.level_column, family.level_code, strict=True) if self.one_hot else ()
        for j, code in levels:
            np.equal(columns[j], code, out=features[at], casting="unsafe")
            if observed is not None and code == 0.0:
                features[at] *= observed[:, j]
            at += 1
        features[at : at + len(beyond)] = beyond
        at += len(beyond)
        if observed is not None:
            features[at:] = observed.T
        return features

    @cached_property
    def fast_features(self) -> FastFeatures | None:
        """None where there are other columns than real ones without limits."""
        family = self.family
        if len(family.real) < family.schema.n_features or not family.limits.none:
            return None
        return FastFeatures(self.real_pivot, family.spherical)

    def direct(self, k: int, values: Array, observed: Array | None, features: Array) -> Array:
        """Squared distances, for a mean far out in pivot units."""
        real = len(self.mean[k])
        eta = np.concatenate([self.log_weights[k : k + 1], self.feature_slopes[k]])
        eta[1 : 1 + real + self.n_square] = 0.0
        eta[len(eta) - len(self.limited) :] = self.tails.log_p[k]
        log_p = eta @ features[: len(eta)]
        constant = self.normaliser[k].copy()
        constant[self.family.real] = 0.0
        y, beyond = self._centred(values, observed)
        known = np.ones(y.shape)
        if observed is not None:
            known *= observed[:, self.family.real].T
        np.subtract.at(known, self.limited, beyond)
        gap = (y - self.mean[k][:, None]) ** 2 / self.variance[k][:, None]
        inside = known * (self.about_mean[k][:, None] - 0.5 * gap)
        others = constant.sum() if observed is None else constant @ observed.T
        return np.asarray(log_p + others + inside.sum(axis=0))

    def base(self, values: Array, observed: Array | None) -> Array | None:
        """`-sum log x!` over the observed counts of each row."""
        counts = self.family.count
        if not len(counts):
            return None
        factorials = log_factorial(values[:, _span(counts)])
        if observed is not None:
            factorials *= observed[:, counts]
        return np.asarray(-factorials.sum(axis=1))

    def statistics(self, sums: Array, gaps: bool, levels: Array | None = None) -> Monoid:
        family = self.family
        if levels is not None:
            sums = np.insert(sums, [1 + self.level_slot.start] * levels.shape[1], levels, axis=1)
        sizes = [1, len(family.real), self.n_square, len(family.binary), len(family.count)]
        sizes.append(len(family.level_column))
        edges = np.cumsum([*sizes, len(self.limited)])
        n, first, second, binary, count, level, beyond = np.split(
            sums[:, : edges[-1]], edges[:-1], axis=1
        )
        if len(self.limited):
            first, second = first.copy(), second.copy()
            np.add.at(first.T, self.limited, (beyond * self.tails.first).T)
            square = (beyond * self.tails.second).T
            np.add.at(
                second.T, np.zeros_like(self.limited) if family.spherical else self.limited, square
            )
        observed = sums[:, edges[-1] :] if gaps else np.repeat(n, family.schema.n_features, axis=1)
        return family.stats_type(
            observed, first, second[:, 0] if family.spherical else second, binary, count, level
        )
