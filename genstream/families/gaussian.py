"""Multivariate Gaussians with full or tied covariance, with gaps.

`x | k ~ N(mean_k, covariance_k)`. With pivot coordinates `y = (x - shift) / scale`, precision `P`
and `T(y) = [y_i y_j (i <= j), y, 1]`, `log p` is linear in `T`, so that all components are scored
by one matrix product.

The E-step is in `genstream.families.gaussian_walk`. A row with gaps is scored by the
marginal of its observed entries `O`; its missing entries `M` enter the statistics through their
conditional moments (Ghahramani & Jordan 1994)

    E[x_M | x_O, k] = mean_M + A_k (x_O - mean_O),   A_k = covariance_MO inv(covariance_OO)
    Cov[x_M | x_O, k] = covariance_MM - A_k covariance_OM.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from genstream.families.blocks import (
    LOG_2PI,
    MAX_ROUNDING,
    UNSEEN,
    Array,
    Begun,
    Description,
    Family,
    Pivot,
    by_component,
    moments,
    slices,
)
from genstream.families.gaussian_walk import GaussianKernel, quadratic_rounding
from genstream.rows import Rows
from genstream.schema import Schema
from genstream.stats import Monoid, Record, axes, record

# Below this share of a column's raw second moment a variance is rounding error.
SINGULAR = 1e-13
# Fewer rows than this a component are drawn side by side, in pieces of so many numbers.
FEW_DRAWN, DRAWN_NUMBERS = 128, 1 << 18
# Variance given to a component that cannot be estimated, as a share of the pivot's variance.
FLOOR = 1e-9
# A variance at most this many times the floor of its column's resolution sits on it.
ON_FLOOR = 1.01
# Rounds in which an M-step under a prior of correlations climbs; later M-steps go on from there.
ROUNDS = 3


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

    Times `|R|^(independence / 2)`, where `R` is the matrix of correlations within a component: an
    LKJ prior with shape `1 + independence / 2` (Lewandowski, Kurowicka & Joe 2009), which draws
    correlations towards 0 and leaves every scale as it is.
    """

    mean: Array = axes("feature")
    scatter: Array = axes("feature")
    strength: float = axes()
    dof: float = axes()
    # States of before there was one have none.
    independence: float = field(default=0.0, metadata={"axes": ()})

    @classmethod
    def weak(cls, mean: Array, variance: Array, n_components: int, dof: float) -> NormalWishart:
        """The default prior of Fraley & Raftery (2007, section 3.2): `strength` 0.01, and a
        scatter that gives each of K components its share of the sample's volume.
        """
        share = n_components ** (2.0 / max(1, len(mean)))
        positive = np.where(variance > 0, variance, 1.0)
        return cls(mean, positive / share, 0.01, dof)

    def stronger(self, strength: float, spread: float) -> NormalWishart:
        """`strength` times the pseudo-rows, at `spread` times the covariance.

        An inverse Wishart to the power s has `dof + d + 1` and `scatter` times s.
        """
        width = len(self.mean) + 1
        return NormalWishart(
            self.mean,
            self.scatter * (strength * spread),
            self.strength * strength,
            strength * (self.dof + width) - width,
            self.independence,
        )


@dataclass(frozen=True, eq=False)
class NormalChiSquared(NormalWishart):
    """The same of every column on its own: `variance ~ InvChiSquared(dof, scatter / dof)`."""

    def stronger(self, strength: float, spread: float) -> NormalChiSquared:
        scatter = self.scatter * (strength * spread)
        dof = strength * (self.dof + 2) - 2
        return NormalChiSquared(
            self.mean, scatter, self.strength * strength, dof, self.independence
        )


class Conditional(NamedTuple):
    """Some columns given others, in pivot coordinates: their mean (K, m) and covariance
    (C, m, m), and of the given ones the squared distance from the mean (K,) and the
    log-determinant of their covariance (K,).
    """

    mean: Array
    covariance: Array
    distance: Array
    log_det: Array


@dataclass(frozen=True, eq=False)
class Gaussian(Begun):
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
    floor
        (d,) least variances in squared data units, or nothing: covariances are kept at or above
        `diag(floor)` in every direction, as those of values that had such noise added.
    """

    n_features: int
    tied: bool = False
    ridge: float = 0.0
    dtype: str = "float64"
    pivot: Pivot | None = record(Pivot)
    prior: NormalWishart | None = record(NormalWishart)
    floor: tuple[float, ...] = ()

    name: ClassVar[str] = "gaussian"
    bound: ClassVar[bool] = False
    n_factors: ClassVar[int] = 0
    param_names: ClassVar[tuple[str, ...]] = ("mean", "covariance")
    prior_type: ClassVar[type[Record]] = NormalWishart
    settled: ClassVar[bool] = True

    def options(self) -> dict[str, Any]:
        covariance = "tied" if self.tied else "full"
        told = {"covariance": covariance, "reg_covar": self.ridge, "dtype": self.dtype}
        return told | ({"floor": list(self.floor)} if self.floor else {})

    @classmethod
    def of(
        cls, schema: Schema, options: Mapping[str, Any], pivot: Pivot | None, prior: Any
    ) -> Gaussian:
        tied = {"full": False, "tied": True}[options["covariance"]]
        ridge, dtype = options["reg_covar"], options["dtype"]
        floor = tuple(options.get("floor", ()))
        return cls(schema.n_features, tied, ridge, dtype, pivot, prior, floor)

    def with_dtype(self, dtype: str) -> Gaussian:
        return replace(self, dtype=dtype)

    @property
    def params_type(self) -> type[FullParams | TiedParams]:
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
        return self.unpivoted(
            np.zeros((n_components, self.n_features)),
            np.broadcast_to(np.eye(self.n_features), (n_components, *pivot.scale.shape * 2)),
        )

    def unpivoted(self, mean: Array, covariance: Array) -> Record:
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
            mean,
            covariance,
            log_weights,
            self._pivot,
            self.tied,
            np.dtype(self.dtype),
            self.stats_type,
        )

    def maximise(
        self, stats: Any, previous: Any, frozen: frozenset[str] = frozenset()
    ) -> tuple[Record, NDArray[np.bool_]]:
        """Mode of the Normal-inverse-Wishart posterior (Fraley & Raftery 2007, eq. 7-9).

            mean_k = (strength m0 + sum_wx) / (strength + n_k)
            covariance_k = (diag(scatter) + S_k + strength D_k) / (dof + n_k + d + 2)

        with `S_k` the scatter about `mean_k` and `D_k` the outer product of that mean's distance
        from `m0`; without a prior `S_k / n_k`. Tied covariances add `S_k + strength D_k` over k
        and divide by `dof + n + d + 1 + K` (`n` without a prior). The mean of the mode does not
        depend on the covariance, and the covariance is the maximum for any mean, so that either
        may be frozen. Under the constraint that no direction has a variance below `FLOOR` of the
        pivot's, and covariances are at or above `diag(floor)`, this is still the maximum once
        eigenvalues in the coordinates of the floor are lifted to it, so that EM never falls; a
        component that is below the first is singular.

        A prior of correlations has no maximum in closed form: see `_uncorrelated`.
        """
        d = self.n_features
        n = stats.sum_w
        unseen = n <= UNSEEN * n.sum()
        old_mean, old_covariance = self.pivoted(previous)
        mean = old_mean
        if "mean" not in frozen:
            mean = self.modal_mean(n, stats.sum_wx, old_mean)
        thin = np.zeros(len(n), dtype=bool)
        covariance = old_covariance
        # Of nothing at all there is nothing to learn.
        if "covariance" not in frozen and (self.prior is not None or n.any()):
            # Only without a prior has an unseen component nothing to be divided by.
            safe = np.where(unseen, 1.0, n) if self.prior is None else n
            count = n.sum() if self.tied else safe
            if self.prior is not None:
                count = count + self.prior.dof + d + (1 + len(n) if self.tied else 2)
            count = np.reshape(count, (-1, 1, 1))
            scatter = self.modal_scatter(mean, stats).reshape(-1, d, d)
            covariance = scatter / count
            independence = self.prior.independence if self.prior is not None else 0.0
            if independence > 0:
                covariance = _uncorrelated(scatter, count, independence, old_covariance)
            raw = (
                np.reshape(np.diagonal(stats.sum_wxx, axis1=-2, axis2=-1), (-1, d)) / count[..., 0]
            )
            covariance, thin = self.regular(covariance, raw)
            if independence > 0:
                # Lifting is the maximum of the conjugate part alone: it must not lose what rounds
                # gained.
                gain = _covariance_objective(covariance, scatter, count, independence)
                kept = _covariance_objective(old_covariance, scatter, count, independence)
                worse = gain < kept
                covariance[worse] = np.broadcast_to(old_covariance, covariance.shape)[worse]
        params = self.unpivoted(mean, covariance)
        # Frozen leaves stay to the bit.
        params = replace(params, **{name: getattr(previous, name) for name in frozen})
        faulty = unseen if self.prior is None else np.zeros_like(unseen)
        # All components share a tied covariance: moving one of them would not make it regular.
        return params, faulty if self.tied else faulty | thin

    def pivoted_prior(self) -> tuple[Array, Array, float]:
        """Mean (d,), scatter (d,) and strength of the prior in pivot coordinates; 0 without one."""
        pivot, prior = self._pivot, self.prior
        if prior is None:
            return np.zeros(self.n_features), np.zeros(self.n_features), 0.0
        mean = (prior.mean - pivot.shift) / pivot.scale
        return mean, prior.scatter / pivot.scale**2, prior.strength

    def modal_mean(self, n: Array, sum_wx: Array, old: Array) -> Array:
        """(K, d) `(strength m0 + sum_wx) / (strength + n)`; the old mean where n is nothing."""
        m0, _, strength = self.pivoted_prior()
        if self.prior is None:
            unseen = n <= UNSEEN * n.sum()
            return np.where(unseen[:, None], old, sum_wx / np.where(unseen, 1.0, n)[:, None])
        return np.asarray((strength * m0 + sum_wx) / (strength + n)[:, None])

    def modal_scatter(self, mean: Array, stats: Any) -> Array:
        """(K, d, d) of `diag(scatter) + S_k + strength D_k` about given means (K, d), in pivot
        coordinates; summed over k, with `diag(scatter)` once, if tied.
        """
        m0, psi, strength = self.pivoted_prior()
        gap = mean - m0
        pull = strength * gap[:, :, None] * gap[:, None, :]
        scatter: Array = self.scatter(stats, mean) + (pull.sum(axis=0) if self.tied else pull)
        diagonal = np.arange(self.n_features)
        scatter[..., diagonal, diagonal] += psi
        return scatter

    def regular(self, covariance: Array, raw: Array) -> tuple[Array, NDArray[np.bool_]]:
        """Covariances (C, d, d) made symmetric, with the ridge, and no eigenvalue below `FLOOR` or
        the rounding of raw second moments (C, d); and (C,) which ones were lifted.
        """
        covariance = (covariance + covariance.swapaxes(-1, -2)) / 2
        diagonal = np.arange(self.n_features)
        covariance[:, diagonal, diagonal] += self.ridge / self._pivot.scale**2
        # Below a share of the raw second moment an eigenvalue is rounding error.
        least = FLOOR + SINGULAR * raw.max(axis=1)
        if not self.floor:
            return covariance, _lift(covariance, least)
        floor = np.array(self.floor) / self._pivot.scale**2
        # What a column's own floor saves is not singular.
        saved = covariance.copy()
        saved[:, diagonal, diagonal] += floor
        root = np.sqrt(np.maximum(floor, least[:, None]))
        unit = root[:, :, None] * root[:, None, :]
        covariance = covariance / unit
        _lift(covariance, np.ones(len(covariance)))
        return covariance * unit, _lift(saved, least)

    def keep(self, stats: Any, components: Sequence[int]) -> Monoid:
        """Tied components share one sum of `y y'`, which gives back what the others are worth in
        it, `n_k covariance + sum_wx_k sum_wx_k' / n_k`, so that the covariance stays.
        """
        kept: FullStats | TiedStats = stats.take(components)
        if not self.tied:
            return kept
        total, left = float(stats.sum_w.sum()), float(kept.sum_w.sum())
        scatter = stats.sum_wxx - _outer(stats.sum_w, stats.sum_wx)
        share = left / total if total > 0 else 1.0
        return replace(kept, sum_wxx=scatter * share + _outer(kept.sum_w, kept.sum_wx))

    def possible(self, stats: Any, known: Any) -> Monoid | None:
        """The statistics where every scatter, with the prior's, is positive definite."""
        n = stats.sum_w
        if not (n > 0.1 * known.sum_w).all():
            return None
        scatter = self.scatter(stats)
        diagonal = np.arange(self.n_features)
        scatter[..., diagonal, diagonal] += self.pivoted_prior()[1]
        try:
            np.linalg.cholesky(scatter)
        except np.linalg.LinAlgError:
            return None
        return stats  # type: ignore[no-any-return]

    def scatter(self, stats: Any, mean: Array | None = None) -> Array:
        """(K, d, d) scatter about each weighted mean, or given means (K, d), in pivot coordinates;
        (d, d) of them all if tied.
        """
        n = np.maximum(stats.sum_w, 1e-300)
        centre = stats.sum_wx / n[:, None]
        outer = stats.sum_wx[:, :, None] * centre[:, None, :]
        scatter = np.asarray(stats.sum_wxx - (outer.sum(axis=0) if self.tied else outer))
        if mean is None:
            return scatter
        # By way of the weighted mean, so that one far from the pivot costs no digits.
        gap = centre - mean
        outer = n[:, None, None] * gap[:, :, None] * gap[:, None, :]
        return np.asarray(scatter + (outer.sum(axis=0) if self.tied else outer))

    def expected_log_prob(self, params: Any, stats: Any) -> float:
        pivot, d = self._pivot, self.n_features
        mean, covariance = self.pivoted(params)
        precision = np.linalg.inv(covariance)
        log_det = np.linalg.slogdet(covariance)[1] + 2 * np.log(pivot.scale).sum()
        square = float((precision * np.reshape(self.scatter(stats, mean), precision.shape)).sum())
        return -0.5 * (float((stats.sum_w * (log_det + d * LOG_2PI)).sum()) + square)

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
        value = -0.5 * (weight * log_det.sum() + trace.sum() + prior.strength * pull.sum())
        if prior.independence:
            value += 0.5 * prior.independence * _log_det_correlation(covariance).sum()
        return float(value)

    def place(self, params: Any, component: int, x: Array, observed: Array) -> Record:
        """The component moves to the row, with the vague covariance's share of the volume."""
        mean, covariance = self.pivoted(params)
        target = (x - self._pivot.shift) / self._pivot.scale
        mean, covariance = mean.copy(), covariance.copy()
        mean[component] = np.where(observed, target, 0.0)
        if not self.tied:
            share = len(mean) ** (2.0 / self.n_features)
            covariance[component] = np.eye(self.n_features) / share
        return self.unpivoted(mean, covariance)

    splits: ClassVar[bool] = True

    def halves(
        self,
        params: Any,
        components: Array,
        apart: float,
        rng: np.random.Generator,  # noqa: ARG002
    ) -> tuple[Record, Record]:
        """Along the longest axis in pivot coordinates; below a floor no covariance falls."""
        mean, covariance = self.pivoted(params)
        covariance = np.broadcast_to(covariance, (len(mean), *covariance.shape[1:]))[components]
        values, vectors = np.linalg.eigh(covariance)
        step = apart * np.sqrt(values[:, -1:]) * vectors[:, :, -1]
        if not self.tied:
            covariance = covariance - step[:, :, None] * step[:, None, :]
            raw = np.diagonal(covariance, axis1=1, axis2=2)
            covariance = replace(self, ridge=0.0).regular(covariance, raw)[0]
        one, other = (
            self.unpivoted(mean[components] + way * step, covariance) for way in (-1.0, 1.0)
        )
        return one, other

    def draw(
        self, params: Any, component: Array, rng: np.random.Generator
    ) -> tuple[Array, Array | None]:
        out = np.empty((len(component), self.n_features))
        noise = rng.standard_normal(out.shape)
        if not self.tied and len(component) < FEW_DRAWN * len(params.mean):
            roots = np.linalg.cholesky(params.covariance)
            for piece in slices(len(component), max(1, DRAWN_NUMBERS // self.n_features**2)):
                turned = (roots[component[piece]] @ noise[piece, :, None])[..., 0]
                out[piece] = params.mean[component[piece]] + turned
            return out, None
        factor = np.linalg.cholesky(params.covariance) if self.tied else None
        for k, chosen in by_component(component):
            root = np.linalg.cholesky(params.covariance[k]) if factor is None else factor
            out[chosen] = params.mean[k] + noise[chosen] @ root.T
        return out, None

    def fill(self, params: Any, resp: Array, rng: np.random.Generator | None = None) -> Array:
        if rng is not None:
            return self.draw(params, resp.argmax(axis=0), rng)[0]
        return np.asarray(resp.T @ params.mean)

    def _narrowed(self, columns: Array) -> Gaussian:
        """The family of some of the columns, without a prior."""
        pivot = self.pivot and self.pivot.take(columns.tolist(), axis="feature")
        floor = tuple(self.floor[j] for j in columns) if self.floor else ()
        return replace(self, n_features=len(columns), pivot=pivot, prior=None, floor=floor)

    def marginal(self, params: Any, columns: Array) -> tuple[Family, Record]:
        covariance = params.covariance[..., columns[:, None], columns]
        return self._narrowed(columns), self.params_type(params.mean[:, columns], covariance)

    def condition(self, params: Any, x: Array, given: Array) -> tuple[Family, Record, Array]:
        """Means `mean_M + A_k (x_O - mean_O)` and covariances `covariance_MM - A_k covariance_OM`.

        Computed in pivot coordinates, where columns of different units are alike.
        """
        seen, missing = np.flatnonzero(given), np.flatnonzero(~given)
        conditional = self.conditional(params, x, seen, missing)
        family = self._narrowed(missing)
        narrowed = family.unpivoted(conditional.mean, conditional.covariance)
        log_p = conditional.log_det + conditional.distance + len(seen) * LOG_2PI
        return family, narrowed, -0.5 * log_p - np.log(self._pivot.scale[seen]).sum()

    def conditional(self, params: Any, x: Array, seen: Array, missing: Array) -> Conditional:
        """The columns `missing` given values `x` (d,) of those `seen`, in pivot coordinates."""
        mean, covariance = self.pivoted(params)
        gap = ((x - self._pivot.shift) / self._pivot.scale - mean)[:, seen]
        factor = np.linalg.cholesky(covariance[:, seen[:, None], seen])
        cross = np.linalg.solve(factor, covariance[:, seen[:, None], missing])
        white = np.linalg.solve(
            np.broadcast_to(factor, (len(mean), *factor.shape[1:])), gap[..., None]
        )
        log_det = 2 * np.log(np.diagonal(factor, axis1=1, axis2=2)).sum(axis=1)
        return Conditional(
            mean[:, missing] + (cross.swapaxes(1, 2) @ white)[..., 0],
            covariance[:, missing[:, None], missing] - cross.swapaxes(1, 2) @ cross,
            (white[..., 0] ** 2).sum(axis=1),
            np.broadcast_to(log_det, len(mean)),
        )

    def embed(self, rows: Rows) -> tuple[Array, Array]:
        observed = rows.is_observed
        pivot = self._pivot
        return np.where(observed, (rows.values - pivot.shift) / pivot.scale, 0.0), observed

    def rounding(self, params: Any) -> Array:
        mean, covariance = self.pivoted(params)
        precision = np.linalg.inv(covariance)
        blur = quadratic_rounding(mean, covariance, precision) * np.finfo(self.dtype).eps / 2
        # Means are kept in data units, where a large offset takes digits from them.
        lost = np.finfo(np.float64).eps * params.mean / self._pivot.scale
        precision = np.broadcast_to(precision, (len(mean), *precision.shape[1:]))
        moved = np.einsum("ki,kij,kj->k", lost, precision, lost)
        return np.asarray(np.minimum(blur, MAX_ROUNDING) + moved)

    def describe(self, params: Any) -> Description:
        covariance = np.broadcast_to(
            params.covariance, (len(params.mean), *2 * params.mean.shape[1:])
        )
        sd = np.sqrt(np.diagonal(covariance, axis1=1, axis2=2))
        return Description(params.mean, sd, covariance=lambda k: covariance[k])

    def n_parameters(self, n_components: int) -> int:
        d = self.n_features
        return n_components * d + (1 if self.tied else n_components) * d * (d + 1) // 2

    def floored(self, params: Any) -> list[tuple[int, int]]:
        """(component, column position) whose variance, given the other columns, sits on its floor
        or ridge.
        """
        _, covariance = self.pivoted(params)
        # A direction on the floor spreads over the columns that determine one another.
        floor = np.maximum(FLOOR, self.ridge / self._pivot.scale**2) * 1.5 * self.n_features
        if self.floor:
            floor = np.maximum(floor, np.array(self.floor) / self._pivot.scale**2 * ON_FLOOR)
        variance = 1.0 / np.diagonal(np.linalg.inv(covariance), axis1=1, axis2=2)
        return [(int(k), int(j)) for k, j in np.argwhere(variance <= floor)]


def _outer(sum_w: Array, sum_wx: Array) -> Array:
    """(d, d) `sum_k sum_wx_k sum_wx_k' / sum_w_k` over components that have any weight."""
    safe = np.where(sum_w > 0, sum_w, 1.0)
    return np.asarray((sum_wx / safe[:, None]).T @ sum_wx)


def _log_det_correlation(covariance: Array) -> Array:
    """(C,) log-determinants of the correlations of (C, d, d) covariances; at most 0."""
    variance = np.diagonal(covariance, axis1=1, axis2=2)
    return np.asarray(np.linalg.slogdet(covariance)[1] - np.log(variance).sum(axis=1))


def _covariance_objective(
    covariance: Array, scatter: Array, count: Array, independence: float
) -> Array:
    """(C,) `-1/2 (count log|C| + tr(inv(C) scatter)) + independence / 2 log|R|`."""
    trace = (np.linalg.inv(covariance) * scatter).sum(axis=(1, 2))
    value = -0.5 * (count[:, 0, 0] * np.linalg.slogdet(covariance)[1] + trace)
    return np.asarray(value + 0.5 * independence * _log_det_correlation(covariance))


def _uncorrelated(scatter: Array, count: Array, independence: float, old: Array) -> Array:
    """(C, d, d) covariances that climb `_covariance_objective` from old ones, in `ROUNDS` rounds.

    With v = `independence` and N = `count`, `-v/2 sum_j log C_jj` is convex, so that its tangent at
    D, the diagonal of the covariance before, bounds it from below (Hunter & Lange 2004). What is
    left has its maximum where

        (N - v) A + v A^2 = inv(D)^(1/2) scatter inv(D)^(1/2),   C = D^(1/2) A D^(1/2),

    which is solved in the eigenvectors of the right side. No round falls. To first order a
    correlation becomes `N / (N + v)` of the scatter's. Where v outweighs N rounds are short, and
    those that begin at the scatter's own variances may end higher than those from the old ones.
    """
    own = scatter / count
    fresh, near = (
        _rounds(scatter, count, independence, np.diagonal(begin, axis1=1, axis2=2))
        for begin in (own, np.broadcast_to(old, scatter.shape))
    )
    higher = _covariance_objective(fresh, scatter, count, independence) > (
        _covariance_objective(near, scatter, count, independence)
    )
    return np.where(higher[:, None, None], fresh, near)


def _rounds(scatter: Array, count: Array, independence: float, variance: Array) -> Array:
    """The rounds of `_uncorrelated` from variances D (C, d)."""
    rest = count[:, :, 0] - independence
    for _ in range(ROUNDS):
        root = np.sqrt(variance)
        unit = root[:, :, None] * root[:, None, :]
        values, vectors = np.linalg.eigh(scatter / unit)
        values = np.maximum(values, 0.0)
        size = np.sqrt(rest**2 + 4.0 * independence * values)
        # Of two equal forms the one that does not cancel.
        values = np.where(
            rest > 0,
            2.0 * values / np.where(rest > 0, rest + size, 1.0),
            (size - rest) / (2.0 * independence),
        )
        covariance = (vectors * values[:, None, :]) @ vectors.swapaxes(1, 2) * unit
        variance = np.diagonal(covariance, axis1=1, axis2=2)
    return np.asarray(covariance)


def _lift(covariance: Array, floor: Array) -> NDArray[np.bool_]:
    """Lift eigenvalues of (C, d, d) covariances to a floor (C,), in place.

    Returns (C,) which ones had an eigenvalue below it.
    """
    least = floor[:, None, None] * np.eye(covariance.shape[-1])
    try:
        np.linalg.cholesky(covariance - least)
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(covariance)
    else:
        return np.zeros(len(covariance), dtype=bool)
    thin = values[:, 0] < floor
    values = np.maximum(values, floor[:, None])[thin]
    lifted = (vectors[thin] * values[:, None, :]) @ vectors[thin].swapaxes(1, 2)
    covariance[thin] = (lifted + lifted.swapaxes(1, 2)) / 2
    return np.asarray(thin)
