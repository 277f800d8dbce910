"""Linear-Gaussian factors: PPCA, factor analysis and mixtures of both, with gaps.

    t ~ N(0, I_q),    x | k, t ~ N(mean_k + W_k t, noise_k)

so that `x | k` is Gaussian with covariance `C_k = W_k W_k' + noise_k`. Isotropic noise makes PPCA
(Tipping & Bishop 1999), diagonal noise factor analysis; each component has noise of its own or all
share it. Loadings are known up to a rotation of the factors.

Two kinds of statistics learn the same parameters. `moments` sums `x` and `x x'`, as a Gaussian
does, with `t` integrated out: the M-step finds the best `W` and noise for the moments
(`genstream.families.low_rank`), so that complete data of one component need a single pass.
`latent` sums `t`, `t t'`, `x t'` and `x^2` under the posterior of `t` (Ghahramani & Hinton 1996):
q x q solves only, for thousands of columns; EM then takes more steps.
"""

from __future__ import annotations

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
    Description,
    Kernel,
    Pivot,
    by_component,
    moments,
)
from genstream.families.factors_walk import FactorsKernel, MomentWalk
from genstream.families.gaussian import SINGULAR, FullStats
from genstream.families.gaussian_walk import GaussianKernel, GaussianWalk, quadratic_rounding
from genstream.families.low_rank import NoisePrior, best_loadings, diagonal_noise, spherical_noise
from genstream.rows import Rows
from genstream.schema import Schema
from genstream.stats import Monoid, Record, axes, record

NOISES = ("diagonal", "isotropic")
STATISTICS = ("moments", "latent")
# Noise is at least this share of the pivot's variance, so that a factor that takes a column whole
# (a Heywood case) does not make its density infinite.
FLOOR = 1e-6
# The weak prior expects this share of a column's variance to be noise.
NOISE_SHARE = 0.1
# Rows of a component from which its first loadings are taken.
START_ROWS = 2000


@dataclass(frozen=True, eq=False)
class FactorsParams(Record):
    """Means, loadings and diagonal noise variances of K components, in data units."""

    mean: Array = axes("component", "feature")
    loadings: Array = axes("component", "feature", "factor")
    noise: Array = axes("component", "feature")


@dataclass(frozen=True, eq=False)
class SharedNoiseParams(FactorsParams):
    """The same with noise (d,) that all components share."""

    noise: Array = axes("feature")


@dataclass(frozen=True, eq=False)
class IsotropicParams(FactorsParams):
    """The same with one noise variance a component (K,)."""

    noise: Array = axes("component")


@dataclass(frozen=True, eq=False)
class SharedIsotropicParams(FactorsParams):
    """The same with one noise variance in all."""

    noise: float = axes()  # type: ignore[assignment]


@dataclass(frozen=True, eq=False)
class LatentStats(Monoid):
    """Sums of `r`, `r t`, `r t t'`, `r y`, `r y t'` and `r y^2` a component, in pivot coordinates.

    `t` is in the basis of the loadings that the E-step was given.
    """

    sum_w: Array = axes("component")
    sum_wt: Array = axes("component", "factor")
    sum_wtt: Array = axes("component", "factor", "factor_other")
    sum_wx: Array = axes("component", "feature")
    sum_wxt: Array = axes("component", "feature", "factor")
    sum_wxx: Array = axes("component", "feature")


@dataclass(frozen=True, eq=False)
class FactorsPrior(Record):
    """Prior `noise_j ~ InvGamma(dof / 2, scatter_j / 2)`, `mean | C ~ N(mean, C / strength)`, in
    data units; isotropic noise takes the mean of `scatter`. Loadings have a flat prior.
    """

    mean: Array = axes("feature")
    scatter: Array = axes("feature")
    strength: float = axes()
    dof: float = axes()

    @classmethod
    def weak(cls, mean: Array, variance: Array, n_components: int) -> FactorsPrior:
        """`strength` and `dof` of independent columns (Fraley & Raftery 2007, section 3.2), and a
        scatter that takes `NOISE_SHARE` of a column's share of the sample's volume for noise.
        """
        share = n_components ** (2.0 / max(1, len(mean)))
        positive = np.where(variance > 0, variance, 1.0)
        return cls(mean, NOISE_SHARE * positive / share, 0.01, 3.0)

    def stronger(self, strength: float, spread: float) -> FactorsPrior:
        """`strength` times the pseudo-rows, at `spread` times the noise."""
        scatter = self.scatter * (strength * spread)
        dof = strength * (self.dof + 2) - 2
        return FactorsPrior(self.mean, scatter, self.strength * strength, dof)


@dataclass(frozen=True, eq=False)
class Factors:
    """K components of q linear-Gaussian factors over d real columns.

    Parameters
    ----------
    n_features, n_factors
        Numbers d of columns and q of factors.
    isotropic
        One noise variance for all columns (PPCA), not one each (factor analysis).
    shared_noise
        One noise for all components.
    statistics
        `moments` or `latent`: what is summed, see the module. The optimum is the same.
    dtype
        Arithmetic of the E-step, float64 or float32; sums are float64 always.
    pivot, prior
        Fixed by `anchored`; with isotropic noise the pivot has one scale for all columns.
    """

    n_features: int
    n_factors: int
    isotropic: bool = False
    shared_noise: bool = False
    statistics: str = "moments"
    dtype: str = "float64"
    pivot: Pivot | None = record(Pivot)
    prior: FactorsPrior | None = record(FactorsPrior)

    name: ClassVar[str] = "factors"
    bound: ClassVar[bool] = False
    ridge: ClassVar[float] = 0.0
    param_names: ClassVar[tuple[str, ...]] = ("mean", "loadings", "noise")
    prior_type: ClassVar[type[Record]] = FactorsPrior

    @property
    def settled(self) -> bool:
        """Whether complete rows sum to the same under any parameters: to their moments."""
        return self.statistics == "moments"

    def options(self) -> dict[str, Any]:
        return {
            "n_factors": self.n_factors,
            "noise": NOISES[self.isotropic],
            "shared_noise": self.shared_noise,
            "statistics": self.statistics,
            "dtype": self.dtype,
        }

    @classmethod
    def of(
        cls, schema: Schema, options: Mapping[str, Any], pivot: Pivot | None, prior: Any
    ) -> Factors:
        isotropic = bool(NOISES.index(options["noise"]))
        statistics = STATISTICS[STATISTICS.index(options["statistics"])]
        shared, dtype = options["shared_noise"], options["dtype"]
        q = options["n_factors"]
        return cls(schema.n_features, q, isotropic, shared, statistics, dtype, pivot, prior)

    def with_dtype(self, dtype: str) -> Factors:
        return replace(self, dtype=dtype)

    @property
    def params_type(self) -> type[FactorsParams]:
        if self.isotropic:
            return SharedIsotropicParams if self.shared_noise else IsotropicParams
        return SharedNoiseParams if self.shared_noise else FactorsParams

    @property
    def stats_type(self) -> type[Monoid]:
        return FullStats if self.statistics == "moments" else LatentStats

    def anchored(self, sample: Rows, n_components: int, weak_prior: bool) -> Factors:
        """Pivot at the sample's mean and deviations, prior by `FactorsPrior.weak`."""
        mean, variance, _ = moments(sample)
        prior = FactorsPrior.weak(mean, variance, n_components) if weak_prior else None
        return replace(self, pivot=Pivot.of(mean, variance, common=self.isotropic), prior=prior)

    @property
    def _pivot(self) -> Pivot:
        return self.pivot if self.pivot is not None else Pivot.none(self.n_features)

    def _params(self, mean: Array, loadings: Array, noise: Array) -> FactorsParams:
        """Parameters in data units from pivot coordinates; noise (K, d), equal where it is one."""
        pivot = self._pivot
        wide: Any = noise * pivot.scale**2
        if self.isotropic:
            wide = wide[:, 0]
        if self.shared_noise:
            wide = float(wide[0]) if self.isotropic else wide[0]
        centre = pivot.shift + mean * pivot.scale
        return self.params_type(centre, loadings * pivot.scale[:, None], wide)

    def noise(self, params: Any) -> Array:
        """(K, d) noise variances in data units, also where they are shared."""
        noise = np.asarray(params.noise)
        if self.isotropic:
            noise = noise[..., None]
        return np.broadcast_to(noise, params.mean.shape)

    def pivoted(self, params: Any) -> tuple[Array, Array, Array]:
        """Mean (K, d), loadings (K, d, q) and noise (K, d) in pivot coordinates."""
        pivot = self._pivot
        return (
            (params.mean - pivot.shift) / pivot.scale,
            params.loadings / pivot.scale[:, None],
            self.noise(params) / pivot.scale**2,
        )

    def vague(self, n_components: int) -> Record:
        shape = (n_components, self.n_features)
        loadings = np.zeros((*shape, self.n_factors))
        return self._params(np.zeros(shape), loadings, np.ones(shape))

    def start(
        self, params: Any, sample: Rows, responsibilities: Array, rng: np.random.Generator
    ) -> Record:
        """First loadings of the latent route, which EM never moves away from zero.

        They are principal components of each component's rows about its mean, in units of the
        deviations, with gaps at the mean and columns scaled up by what gaps took of them. A factor
        that no component is left for gets small random loadings. The moments route finds its
        loadings itself.
        """
        if self.statistics == "moments":
            return params  # type: ignore[no-any-return]
        mean, loadings, noise = self.pivoted(params)
        loadings, noise = np.zeros_like(loadings), noise.copy()
        weight = responsibilities * sample.row_weights[:, None]
        for k in range(len(mean)):
            index = np.flatnonzero(weight[:, k] > 0)
            if len(index) > START_ROWS:
                index = np.sort(rng.choice(index, START_ROWS, replace=False))
            loadings[k], left = self._principal(
                sample[index], weight[index, k], mean[k], noise[k], rng
            )
            noise[k] *= left
        if self.isotropic:
            noise[:] = noise.mean(axis=1, keepdims=True)
        if self.shared_noise:
            total = weight.sum(axis=0) + 1e-300
            noise[:] = (total @ noise) / total.sum()
        return self._params(mean, loadings, np.maximum(noise, FLOOR))

    def _principal(
        self, rows: Rows, weight: Array, mean: Array, noise: Array, rng: np.random.Generator
    ) -> tuple[Array, Array]:
        """(d, q) loadings from some rows, and (d,) the share of the variance they leave."""
        d, q = self.n_features, self.n_factors
        pivot, deviation = self._pivot, np.sqrt(noise)
        observed = rows.is_observed
        e = ((rows.values - pivot.shift) / pivot.scale - mean) / deviation * observed
        share = weight / max(float(weight.sum()), 1e-300)
        seen = share @ observed
        e *= np.sqrt(share)[:, None] / np.sqrt(np.where(seen > 0, seen, 1.0))
        # The smaller of the two Gram matrices knows the singular values.
        if len(e) < d:
            value, left = np.linalg.eigh(e @ e.T)
            size = np.sqrt(np.maximum(value, 1e-300))
            vector = (e.T @ left) / size
        else:
            value, vector = np.linalg.eigh(e.T @ e)
        value, vector = value[::-1][:q], vector[:, ::-1][:, :q]
        value = np.pad(value, (0, q - len(value)))
        vector = np.pad(vector, ((0, 0), (0, q - vector.shape[1])))
        rest = max(float((e**2).sum() - value.sum()) / max(1, d - q), 0.0)
        length = value - rest
        idle = length < 1e-3
        vector[:, idle] = rng.standard_normal((d, int(idle.sum()))) / np.sqrt(d)
        white = vector * np.sqrt(np.maximum(length, 1e-2))
        return white * deviation[:, None], np.clip(1 - (white**2).sum(axis=1), 0.05, 1.0)

    def prepare(self, params: Any, log_weights: Array) -> Kernel:
        if self.statistics == "moments":
            return MomentsKernel(self, params, log_weights)
        return self.latent_kernel(params, log_weights, self.dtype)

    def latent_kernel(self, params: Any, log_weights: Array, dtype: str) -> FactorsKernel:
        """The kernel that works through the latent, whatever is summed."""
        pivot = self._pivot
        arithmetic = np.dtype(dtype)
        return FactorsKernel(*self.pivoted(params), log_weights, pivot, arithmetic, LatentStats)

    def maximise(
        self, stats: Any, previous: Any, frozen: frozenset[str] = frozenset()
    ) -> tuple[Record, NDArray[np.bool_]]:
        """The mode of the posterior of mean, loadings and noise, or their conditional mode given
        those that are frozen.

        From moments: `mean_k = (strength m0 + sum_wx) / (strength + n_k)`, and loadings and noise
        maximise `-1/2 [(n_k + 1) log|C_k| + tr(inv(C_k) T_k)]` plus the log prior of the noise,
        with `T_k` the scatter about the mean plus `strength (mean - m0)(mean - m0)'`; see
        `genstream.families.low_rank`. Through the latent: a regression of `x` on `[t, 1]`, whose
        residual variance `R_j` gives `noise_j = (R_j + scatter_j) / (n + 1 + dof + 2)`, and the
        prior of the mean is one more row, `sqrt(strength) (m0 - mean) = W t + noise`, whose
        factors have a posterior too. Without a prior `n_k` rows count and nothing is added.

        Noise stays above `FLOOR` of the pivot's variance. Both are maxima under that constraint
        (those of diagonal noise from moments: not lower than before), so that EM never falls. A
        component without any weight, or all of whose noise is on the floor, could not be estimated.
        """
        mean, loadings, noise = self.pivoted(previous)
        n = stats.sum_w
        empty = (n <= UNSEEN * n.sum()) & (self.prior is None)
        found = self._from_moments if self.statistics == "moments" else self._from_latent
        known = ~empty
        if not known.any():
            return previous, empty
        mean, loadings, noise = mean.copy(), loadings.copy(), noise.copy()
        part = found(
            stats.take(np.flatnonzero(known)), mean[known], loadings[known], noise[known], frozen
        )
        mean[known], loadings[known], noise[known] = part
        if self.shared_noise:
            noise[:] = part[2][0]
        params = self._params(mean, loadings, noise)
        # What is frozen stays to the bit, which coordinates might take a digit of.
        params = replace(params, **{name: getattr(previous, name) for name in frozen})
        # Where noise is shared or frozen, moving a component would not make it regular.
        movable = not self.shared_noise and "noise" not in frozen
        return params, empty | ((noise <= 2 * FLOOR).all(axis=1) & movable)

    def _noise_prior(self, raw: Array) -> NoisePrior:
        """Of one noise vector; `raw` (C, d) are second moments that rounding is a share of."""
        prior, scale = self.prior, self._pivot.scale
        weight = 0.0 if prior is None else prior.dof + 2
        pull = np.zeros(self.n_features) if prior is None else prior.scatter / scale**2
        floor = FLOOR + SINGULAR * raw.max(axis=0)
        if self.isotropic:
            pull, floor = pull.mean(keepdims=True), floor.max(keepdims=True)
        return NoisePrior(weight, pull, floor)

    def _groups(self, n_components: int) -> list[Array]:
        """The components that share each noise."""
        every = np.arange(n_components)
        return [every] if self.shared_noise else list(every[:, None])

    def _from_moments(
        self, stats: Any, mean: Array, loadings: Array, noise: Array, frozen: frozenset[str]
    ) -> tuple[Array, Array, Array]:
        """The M-step on moments of components that have weight, in pivot coordinates."""
        prior, pivot = self.prior, self._pivot
        n = stats.sum_w
        strength = 0.0 if prior is None else prior.strength
        m0 = np.zeros(self.n_features)
        if prior is not None:
            m0 = (prior.mean - pivot.shift) / pivot.scale
        if "mean" not in frozen:
            mean = (strength * m0 + stats.sum_wx) / (strength + n)[:, None]
        if {"loadings", "noise"} <= frozen:
            return mean, loadings, noise
        average = stats.sum_wx / np.where(n > 0, n, 1.0)[:, None]
        scatter = stats.sum_wxx - n[:, None, None] * _outer(average)
        scatter += n[:, None, None] * _outer(average - mean) + strength * _outer(mean - m0)
        count = n if prior is None else n + 1
        moment = (scatter + scatter.swapaxes(1, 2)) / (2 * count[:, None, None])
        raw = np.diagonal(stats.sum_wxx, axis1=1, axis2=2) / count[:, None]
        if "noise" not in frozen:
            noise = noise.copy()
            for group in self._groups(len(n)):
                limits = self._noise_prior(raw[group])
                if self.isotropic and "loadings" not in frozen:
                    q = self.n_factors
                    noise[group] = spherical_noise(moment[group], count[group], q, limits)
                    continue
                noise[group] = diagonal_noise(
                    moment[group],
                    count[group],
                    noise[group[0]],
                    limits,
                    n_factors=self.n_factors,
                    loadings=loadings[group] if "loadings" in frozen else None,
                    anew="loadings" not in frozen and not loadings[group].any(),
                )
        if "loadings" not in frozen:
            loadings = best_loadings(moment, noise, self.n_factors)
        return mean, loadings, noise

    def _from_latent(
        self, stats: Any, mean: Array, loadings: Array, noise: Array, frozen: frozenset[str]
    ) -> tuple[Array, Array, Array]:
        """The M-step on moments of `t` and `x` of components that have weight, in pivot
        coordinates.
        """
        q = self.n_factors
        gram, cross, square, count = self._regression(stats, mean, loadings, noise)
        fixed = {"mean", "loadings"} & frozen
        if not fixed:
            both = np.linalg.solve(gram, cross.swapaxes(1, 2)).swapaxes(1, 2)
            loadings, mean = both[:, :, :q], both[:, :, q]
        elif fixed == {"mean"}:
            left = cross[:, :, :q] - mean[:, :, None] * gram[:, None, q, :q]
            loadings = np.linalg.solve(gram[:, :q, :q], left.swapaxes(1, 2)).swapaxes(1, 2)
        elif fixed == {"loadings"}:
            left = cross[:, :, q] - (loadings @ gram[:, :q, q, None])[..., 0]
            mean = left / gram[:, q, q, None]
        if "noise" in frozen:
            return mean, loadings, noise
        slopes = np.concatenate([loadings, mean[:, :, None]], axis=2)
        residual = square + ((slopes @ gram - 2 * cross) * slopes).sum(axis=2)
        noise = noise.copy()
        for group in self._groups(len(count)):
            limits = self._noise_prior(square[group] / count[group, None])
            total, rows = residual[group].sum(axis=0), float(count[group].sum())
            if self.isotropic:
                total, rows = total.sum(keepdims=True), rows * self.n_features
            noise[group] = np.maximum((total + limits.pull) / (rows + limits.weight), limits.floor)
        return mean, loadings, noise

    def _regression(
        self, stats: Any, mean: Array, loadings: Array, noise: Array
    ) -> tuple[Array, Array, Array, Array]:
        """Of the regression of `y` on `[t, 1]`: its Gram matrix (K, q+1, q+1), cross moments
        (K, d, q+1), squares (K, d) and number of rows (K,), with the row that the mean's prior is
        worth, under the parameters given.
        """
        k, q = len(stats.sum_w), self.n_factors
        gram = np.empty((k, q + 1, q + 1))
        gram[:, :q, :q], gram[:, q, q] = stats.sum_wtt, stats.sum_w
        gram[:, q, :q] = gram[:, :q, q] = stats.sum_wt
        cross = np.concatenate([stats.sum_wxt, stats.sum_wx[:, :, None]], axis=2)
        square, count = stats.sum_wxx, stats.sum_w
        prior, pivot = self.prior, self._pivot
        if prior is None:
            return gram, cross, square, count
        m0 = (prior.mean - pivot.shift) / pivot.scale
        root = np.sqrt(prior.strength)
        scaled = loadings / noise[:, :, None]
        spare = np.linalg.inv(np.eye(q) + loadings.swapaxes(1, 2) @ scaled)
        pulled = scaled.swapaxes(1, 2) @ (root * (m0 - mean))[:, :, None]
        design = np.concatenate([(spare @ pulled)[..., 0], np.full((k, 1), root)], axis=1)
        gram += _outer(design)
        gram[:, :q, :q] += spare
        cross = cross + (root * m0)[None, :, None] * design[:, None, :]
        return gram, cross, square + (root * m0) ** 2, count + 1

    def keep(self, stats: Any, components: Sequence[int]) -> Monoid:
        kept: Monoid = stats.take(components)
        return kept

    def possible(self, stats: Any, known: Any) -> Monoid | None:
        """The statistics where every scatter of `x`, or of `t`, is positive definite; residual
        variances of the latent route are kept above a tenth of the known ones.
        """
        if not (stats.sum_w > 0.1 * known.sum_w).all():
            return None
        prior, diagonal = self.prior, np.arange(self.n_features)
        try:
            if self.statistics == "moments":
                scatter = _scatter(stats)
                if prior is not None:
                    scatter[:, diagonal, diagonal] += prior.scatter / self._pivot.scale**2
                np.linalg.cholesky(scatter)
                return stats  # type: ignore[no-any-return]
            left, left_known = _unexplained(stats), _unexplained(known)
        except np.linalg.LinAlgError:
            return None
        lacking = np.maximum(0.1 * np.maximum(left_known, 0.0) - left, 0.0)
        mended: Monoid = replace(stats, sum_wxx=stats.sum_wxx + lacking)
        return mended

    def expected_log_prob(self, params: Any, stats: Any) -> float:
        """From moments `sum_k E[log p(x | k)]`, through the latent `sum_k E[log p(x | k, t)]`."""
        mean, loadings, noise = self.pivoted(params)
        n, d = stats.sum_w, self.n_features
        scale = 2 * np.log(self._pivot.scale).sum() + d * LOG_2PI
        if self.statistics == "latent":
            slopes = np.concatenate([loadings, mean[:, :, None]], axis=2)
            gram, cross, square, _ = replace(self, prior=None)._regression(
                stats, mean, loadings, noise
            )
            residual = square + ((slopes @ gram - 2 * cross) * slopes).sum(axis=2)
            log_det = np.log(noise).sum(axis=1)
            return -0.5 * float(n @ (log_det + scale) + (residual / noise).sum())
        precision, log_det = _precision(loadings, noise)
        gap = stats.sum_wx / np.maximum(n, 1e-300)[:, None] - mean
        spread = _scatter(stats) + n[:, None, None] * _outer(gap)
        return -0.5 * (float(n @ (log_det + scale)) + float((precision * spread).sum()))

    def log_prior(self, params: Any) -> float:
        prior, pivot = self.prior, self._pivot
        if prior is None:
            return 0.0
        mean, loadings, noise = self.pivoted(params)
        scatter = prior.scatter / pivot.scale**2
        free = noise[:1] if self.shared_noise else noise
        if self.isotropic:
            free, scatter = free[:, :1], scatter.mean(keepdims=True)
        total = float(((prior.dof + 2) * np.log(free) + scatter / free).sum())
        gap = mean - (prior.mean - pivot.shift) / pivot.scale
        scaled = loadings / noise[:, :, None]
        inner = np.eye(self.n_factors) + loadings.swapaxes(1, 2) @ scaled
        h = scaled.swapaxes(1, 2) @ gap[:, :, None]
        square = (gap**2 / noise).sum(axis=1) - (h * np.linalg.solve(inner, h)).sum(axis=(1, 2))
        log_det = np.log(noise).sum(axis=1) + np.linalg.slogdet(inner)[1]
        return -0.5 * (total + float((log_det + prior.strength * square).sum()))

    def place(self, params: Any, component: int, x: Array, observed: Array) -> Record:
        """The component moves to the row, with noise as wide as its share of the sample's volume
        and half the loadings of the next component.
        """
        mean, loadings, noise = (part.copy() for part in self.pivoted(params))
        k = len(mean)
        target = (x - self._pivot.shift) / self._pivot.scale
        mean[component] = np.where(observed, target, 0.0)
        loadings[component] = loadings[(component + 1) % k] / 2
        if not self.shared_noise:
            noise[component] = 1.0 / k ** (2.0 / self.n_features)
        return self._params(mean, loadings, noise)

    def draw(
        self, params: Any, component: Array, rng: np.random.Generator
    ) -> tuple[Array, Array | None]:
        factors = rng.standard_normal((len(component), self.n_factors))
        values = rng.standard_normal((len(component), self.n_features))
        deviation = np.sqrt(self.noise(params))
        for k, chosen in by_component(component):
            signal = params.mean[k] + factors[chosen] @ params.loadings[k].T
            values[chosen] = signal + deviation[k] * values[chosen]
        return values, factors

    def fill(self, params: Any, resp: Array, rng: np.random.Generator | None = None) -> Array:
        if rng is None:
            return np.asarray(resp.T @ params.mean)
        return self.draw(params, resp.argmax(axis=0), rng)[0]

    def marginal(self, params: Any, columns: Array) -> tuple[Factors, Record]:
        """The rows of `W` and the noise of these columns."""
        pivot = self._pivot
        family = replace(
            self,
            n_features=len(columns),
            pivot=Pivot(pivot.shift[columns], pivot.scale[columns]),
            prior=None,
        )
        noise = params.noise if self.isotropic else params.noise[..., columns]
        return family, self.params_type(params.mean[:, columns], params.loadings[:, columns], noise)

    def condition(self, params: Any, x: Array, given: Array) -> tuple[Factors, Record, Array]:
        """With `p(t | x_given, k) = N(m, V)` and `V = L L'` the other columns have mean
        `mean + W m`, loadings `W L` and the noise they had.
        """
        columns, left = np.flatnonzero(given), np.flatnonzero(~given)
        known, theta = self.marginal(params, columns)
        kernel = known.latent_kernel(theta, np.zeros(len(params.mean)), "float64")
        walk = kernel.walk(Rows(x[None, columns].astype(np.float64)))
        walk.load(slice(0, 1))
        log_p = walk.score()[:, 0]
        family, others = self.marginal(params, left)
        theta_left: Any = others
        every = [walk.factors(np.array([k])) for k in range(len(params.mean))]
        m = np.concatenate([mean for mean, _ in every])
        root = np.linalg.cholesky(np.concatenate([covariance for _, covariance in every]))
        mean = theta_left.mean + (theta_left.loadings @ m[:, :, None])[..., 0]
        moved = replace(theta_left, mean=mean, loadings=theta_left.loadings @ root)
        return family, moved, log_p

    def embed(self, rows: Rows) -> tuple[Array, Array]:
        observed = rows.is_observed
        pivot = self._pivot
        return np.where(observed, (rows.values - pivot.shift) / pivot.scale, 0.0), observed

    def rounding(self, params: Any) -> Array:
        mean, loadings, noise = self.pivoted(params)
        unit = np.finfo(self.dtype).eps / 2
        # Means are kept in data units, where a large offset takes digits from them.
        lost = np.finfo(np.float64).eps * params.mean / self._pivot.scale
        if self.statistics == "moments":
            precision, _ = _precision(loadings, noise)
            covariance = loadings @ loadings.swapaxes(1, 2)
            diagonal = np.arange(self.n_features)
            covariance[:, diagonal, diagonal] += noise
            blur = unit * quadratic_rounding(mean, covariance, precision)
            moved = np.einsum("ki,kij,kj->k", lost, precision, lost)
            return np.asarray(np.minimum(blur, MAX_ROUNDING) + moved)
        # Residuals are of the size of the noise, but what they are left of is not.
        spread = np.sqrt(((loadings**2).sum(axis=2) + noise) / noise)
        return np.asarray(unit * spread.sum(axis=1) + (lost**2 / noise).sum(axis=1))

    def describe(self, params: Any) -> Description:
        noise = self.noise(params)

        def covariance(k: int) -> Array:
            return np.asarray(params.loadings[k] @ params.loadings[k].T + np.diag(noise[k]))

        sd = np.sqrt((params.loadings**2).sum(axis=2) + noise)
        return Description(params.mean, sd, covariance=covariance, loadings=params.loadings)

    def n_parameters(self, n_components: int) -> int:
        """Loadings count up to a rotation: `d q - q (q - 1) / 2`."""
        d, q = self.n_features, min(self.n_factors, self.n_features)
        noises = (1 if self.shared_noise else n_components) * (1 if self.isotropic else d)
        return n_components * (d + d * q - q * (q - 1) // 2) + noises

    def floored(self, params: Any) -> list[tuple[int, int]]:
        """(component, column position) whose noise sits on its floor: factors take it whole."""
        _, _, noise = self.pivoted(params)
        return [(int(k), int(j)) for k, j in np.argwhere(noise <= 2 * FLOOR)]


class MomentsKernel(GaussianKernel):
    """The Gaussians that are left when factors are integrated out, summed as moments.

    A single component is a tied covariance: its moments are one product of rows with themselves,
    whatever the number of columns.
    """

    def __init__(self, family: Factors, params: Any, log_weights: Array) -> None:
        mean, loadings, noise = family.pivoted(params)
        covariance = loadings @ loadings.swapaxes(1, 2)
        diagonal = np.arange(family.n_features)
        covariance[:, diagonal, diagonal] += noise
        alone = len(mean) == 1
        dtype = np.dtype(family.dtype)
        made: Any = _lone_stats if alone else FullStats
        super().__init__(mean, covariance, log_weights, family._pivot, alone, dtype, made)
        self.family, self.params = family, params

    @cached_property
    def through_latent(self) -> FactorsKernel:
        """The kernel that knows the factors of rows."""
        return self.family.latent_kernel(self.params, self.log_weights, "float64")

    @cached_property
    def of_complete(self) -> FactorsKernel:
        """The kernel that scores complete rows."""
        return self.family.latent_kernel(self.params, self.log_weights, self.family.dtype)

    def take(self, components: Array) -> MomentsKernel:
        some: Any = super().take(components)
        some.params = self.params.take(components)
        for made in ("through_latent", "of_complete"):
            some.__dict__.pop(made, None)
        kept: MomentsKernel = some
        return kept

    # Complete rows need nothing of a Gaussian.
    def walk(self, rows: Rows) -> MomentsWalk | MomentWalk:  # type: ignore[override]
        if rows.observed is not None and not rows.observed.all():
            return MomentsWalk(self, rows)
        whole = rows if rows.observed is None else Rows(rows.values, None, rows.weights)
        return MomentWalk(self.of_complete, whole, FullStats, self.moment_dtype)


class MomentsWalk(GaussianWalk):
    """A walk that knows the factors of its rows."""

    def __init__(self, kernel: MomentsKernel, rows: Rows) -> None:
        super().__init__(kernel, rows)
        self.through_latent = kernel.through_latent

    def factors(self, component: Array) -> tuple[Array, Array]:
        """(n, q) means and (n, q, q) covariances of the factors of the block's rows."""
        walk = self.through_latent.walk(self.rows)
        walk.load(self.index)
        return walk.factors(component)


def _lone_stats(sum_w: Array, sum_wx: Array, sum_wxx: Array) -> FullStats:
    return FullStats(sum_w, sum_wx, sum_wxx[None])


def _outer(vectors: Array) -> Array:
    """(K, d, d) outer products of (K, d) with themselves."""
    return np.asarray(vectors[:, :, None] * vectors[:, None, :])


def _scatter(stats: Any) -> Array:
    """(K, d, d) scatter about each weighted mean."""
    n = np.maximum(stats.sum_w, 1e-300)
    return np.asarray(stats.sum_wxx - n[:, None, None] * _outer(stats.sum_wx / n[:, None]))


def _precision(loadings: Array, noise: Array) -> tuple[Array, Array]:
    """(K, d, d) `inv(W W' + noise)` and (K,) its covariance's log-determinant."""
    scaled = loadings / noise[:, :, None]
    inner = np.eye(loadings.shape[2]) + loadings.swapaxes(1, 2) @ scaled
    precision = -(scaled @ np.linalg.solve(inner, scaled.swapaxes(1, 2)))
    diagonal = np.arange(loadings.shape[1])
    precision[:, diagonal, diagonal] += 1 / noise
    return precision, np.log(noise).sum(axis=1) + np.linalg.slogdet(inner)[1]


def _unexplained(stats: Any) -> Array:
    """(K, d) squares of `y` that no regression on `[t, 1]` explains.

    Raises numpy.linalg.LinAlgError where moments of `t` are not positive definite.
    """
    n = stats.sum_w[:, None]
    about_t = stats.sum_wtt - _outer(stats.sum_wt) / n[:, :, None]
    factor = np.linalg.cholesky(about_t)
    cross = stats.sum_wxt - stats.sum_wx[:, :, None] * (stats.sum_wt / n)[:, None, :]
    u = np.linalg.solve(factor, cross.swapaxes(1, 2))
    return np.asarray(stats.sum_wxx - stats.sum_wx**2 / n - (u**2).sum(axis=1))
