"""Student-t components: Gaussians that forgive rows far away, with gaps.

    u | k ~ Gamma(dof_k / 2, rate dof_k / 2),    x | k, u ~ N(mean_k, scale_k / u)

so that `x | k` is a multivariate t with `dof_k` degrees of freedom. Of a row with `o` observed
entries at squared distance `delta = (x_O - mean_O)' inv(scale_OO) (x_O - mean_O)`

    u | x_O, k ~ Gamma((dof + o) / 2, rate (dof + delta) / 2),
    E[u] = (dof + o) / (dof + delta),    E[log u] = psi((dof + o) / 2) - log((dof + delta) / 2)

(Peel & McLachlan 2000, section 4; with gaps Liu & Rubin 1995, section 3). Given `u` all is
Gaussian, so that the E-step (`genstream.families.student_walk`) is that of Gaussians with moments
weighed by `r E[u]` and the conditional covariance of missing entries by `r`, and costs a logarithm
and a few passes over (K, n) numbers more.

Every M-step is the exact maximum of the expected log-joint of `x` and `u`, mean, scale and degrees
of freedom each on its own. Dividing the scatter by `sum r E[u]` instead of `sum r` (Kent, Tyler &
Vardi 1994) would climb faster, but it is the maximum of another bound: under priors, frozen
parameters or statistics that are in part of older parameters, as incremental EM keeps them, the
objective may fall.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy.special import digamma, gammaln

from genstream.families.blocks import (
    LOG_2PI,
    UNSEEN,
    Array,
    Begun,
    Description,
    Family,
    Pivot,
    moments,
)
from genstream.families.columns import (
    ColumnsKernel,
    ColumnsParams,
    ColumnsPrior,
    IndependentColumns,
)
from genstream.families.gaussian import (
    FLOOR,
    SINGULAR,
    FullStats,
    Gaussian,
    NormalChiSquared,
    NormalWishart,
    TiedStats,
)
from genstream.families.gaussian_walk import GaussianKernel
from genstream.families.student_walk import ColumnMoments, StudentKernel, log_normaliser
from genstream.rows import Rows
from genstream.schema import Schema
from genstream.stats import Monoid, Record, axes, record

# Not even a mean exists at one degree of freedom; and the likelihood has no bound once more than a
# share dof / (dof + d) of the rows coincide (Kent & Tyler 1991). At the upper end a Gaussian is
# less than 1e-4 nats a row away up to 16 columns: there is nothing left to learn.
LEAST_DOF, MOST_DOF = 1.0, 1000.0
# Where learning begins: tails that pull a mean little, but from which either end is near.
START_DOF = 10.0


@dataclass(frozen=True, eq=False)
class StudentParams(Record):
    """Locations and scale matrices of K multivariate t distributions, in (squared) data units, and
    their degrees of freedom. The covariance is `scale dof / (dof - 2)` where `dof > 2`.
    """

    mean: Array = axes("component", "feature")
    scale: Array = axes("component", "feature", "feature_other")
    dof: Array = axes("component")


@dataclass(frozen=True, eq=False)
class TiedStudentParams(StudentParams):
    """The same with one scale matrix for all components."""

    scale: Array = axes("feature", "feature_other")


@dataclass(frozen=True, eq=False)
class DiagStudentParams(StudentParams):
    """The same with diagonal scale matrices: uncorrelated, but not independent, columns."""

    scale: Array = axes("component", "feature")


@dataclass(frozen=True, eq=False)
class SphericalStudentParams(StudentParams):
    """The same with scale matrices that are multiples of the identity."""

    scale: Array = axes("component")


@dataclass(frozen=True, eq=False)
class StudentStats(Monoid):
    """Sums of `r` and `r E[log u]`, and of `r E[u]`, `r E[u y]` and `r E[u y y']`, in pivot
    coordinates.
    """

    sum_r: Array = axes("component")
    sum_log: Array = axes("component")
    moments: Monoid | None = record(FullStats)


@dataclass(frozen=True, eq=False)
class TiedStudentStats(StudentStats):
    """The same, with `r E[u y y']` summed over all components."""

    moments: Monoid | None = record(TiedStats)


@dataclass(frozen=True, eq=False)
class ColumnsStudentStats(StudentStats):
    """The same column by column, over observed entries alone."""

    moments: Monoid | None = record(ColumnMoments)


PARAMS: dict[str, type[StudentParams]] = {
    "full": StudentParams,
    "tied": TiedStudentParams,
    "diag": DiagStudentParams,
    "spherical": SphericalStudentParams,
}


@dataclass(frozen=True, eq=False)
class Student(Begun):
    """K multivariate t distributions over d real columns.

    Parameters
    ----------
    n_features
        Number of columns d.
    covariance
        Shape of the scale matrices: `full`, `tied` (one for all), `diag` or `spherical`.
    ridge
        Added to the diagonal of every scale matrix after the M-step, in squared data units.
    dtype
        Arithmetic of the E-step, float64 or float32; sums are float64 always.
    dof
        Degrees of freedom that learning begins with; it ends within 1 to 1000, and stays here
        where `dof` is frozen.
    pivot, prior
        Fixed by `anchored`. The prior is the Gaussian's, on the scale matrix in place of the
        covariance; that of the degrees of freedom is flat from 1 to 1000.
    """

    n_features: int
    covariance: str = "full"
    ridge: float = 0.0
    dtype: str = "float64"
    dof: float = START_DOF
    pivot: Pivot | None = record(Pivot)
    prior: NormalWishart | None = record(NormalWishart)

    name: ClassVar[str] = "student"
    bound: ClassVar[bool] = False
    n_factors: ClassVar[int] = 0
    param_names: ClassVar[tuple[str, ...]] = ("mean", "scale", "dof")
    prior_type: ClassVar[type[Record]] = NormalWishart

    def options(self) -> dict[str, Any]:
        return {
            "covariance": self.covariance,
            "reg_covar": self.ridge,
            "dtype": self.dtype,
            "dof": self.dof,
        }

    @classmethod
    def of(
        cls, schema: Schema, options: Mapping[str, Any], pivot: Pivot | None, prior: Any
    ) -> Student:
        shape, ridge = options["covariance"], options["reg_covar"]
        if shape not in PARAMS:
            raise ValueError(f"there is no scale matrix {shape!r}")
        dtype, dof = options["dtype"], options["dof"]
        return cls(schema.n_features, shape, ridge, dtype, dof, pivot, prior)

    def with_dtype(self, dtype: str) -> Student:
        return replace(self, dtype=dtype)

    @property
    def tied(self) -> bool:
        """Whether one scale matrix is shared by all components."""
        return self.covariance == "tied"

    @property
    def params_type(self) -> type[StudentParams]:
        return PARAMS[self.covariance]

    @property
    def stats_type(self) -> type[StudentStats]:
        if self._apart:
            return ColumnsStudentStats
        return TiedStudentStats if self.tied else StudentStats

    @property
    def _apart(self) -> bool:
        """Whether columns are independent given the scale of a row."""
        return self.covariance in ("diag", "spherical")

    @property
    def _gaussian(self) -> Gaussian:
        """What a row is given `u = 1`, where columns are correlated."""
        return Gaussian(self.n_features, self.tied, self.ridge, self.dtype, self.pivot, self.prior)

    @property
    def _columns(self) -> IndependentColumns:
        """What a row is given `u = 1`, where they are not."""
        prior, none = self.prior, np.empty(0)
        known = None
        if prior is not None:
            known = ColumnsPrior(
                prior.mean, prior.scatter, prior.strength, prior.dof, none, none, none, 0.0
            )
        return IndependentColumns(
            Schema.real(self.n_features),
            self.covariance == "spherical",
            self.ridge,
            self.dtype,
            pivot=self.pivot,
            prior=known,
        )

    @property
    def _normal(self) -> Family:
        return self._columns if self._apart else self._gaussian

    @property
    def _pivot(self) -> Pivot:
        return self.pivot if self.pivot is not None else Pivot.none(self.n_features)

    def anchored(self, sample: Rows, n_components: int, weak_prior: bool) -> Student:
        """Pivot at the sample's medians and quartiles, which rows far away do not move, and prior
        by `NormalWishart.weak` there; diagonal and spherical scales take each column on its own.
        """
        centre, variance = _middle(sample)
        pivot = Pivot.of(centre, variance, common=self.covariance == "spherical")
        prior = None
        if weak_prior:
            kind: type[NormalWishart] = NormalWishart
            dof = self.n_features + 2.0
            if self._apart:
                kind, dof = NormalChiSquared, 3.0
            prior = kind.weak(centre, variance, n_components, dof)
        return replace(self, pivot=pivot, prior=prior)

    def vague(self, n_components: int) -> Record:
        return self._with_dof(self._normal.vague(n_components), np.full(n_components, self.dof))

    def given(self, params: Any) -> Any:
        """The parameters of `x | k, u = 1`, in data units, as those of `_normal`."""
        if not self._apart:
            return self._gaussian.params_type(params.mean, params.scale)
        none = np.empty((len(params.mean), 0))
        return self._columns.params_type(params.mean, params.scale, none, none, none)

    def _with_dof(self, given: Any, dof: Array) -> StudentParams:
        """The inverse of `given`."""
        scale = given.variance if self._apart else given.covariance
        return self.params_type(given.mean, scale, dof)

    def _variance(self, params: Any) -> Array:
        """(K, d) diagonals of diagonal scale matrices, in pivot coordinates."""
        return np.asarray(self._columns.variances(self.given(params)) / self._pivot.scale**2)

    def prepare(self, params: Any, log_weights: Array) -> StudentKernel:
        """Factors every scale matrix. Raises numpy.linalg.LinAlgError where one is not positive
        definite, before any data are touched.
        """
        given = self.given(params)
        inner: GaussianKernel | ColumnsKernel
        if self._apart:
            # Shared variances have features of single columns too, for the sums they need.
            columns = replace(self._columns, spherical=False)
            each = self._columns.variances(given)
            inner = columns.prepare(
                ColumnsParams(given.mean, each, *3 * [np.empty((len(each), 0))]), log_weights
            )
        else:
            inner = self._gaussian.prepare(given, log_weights)
        return StudentKernel(inner, params.dof, self.stats_type)

    def maximise(
        self, stats: Any, previous: Any, frozen: frozenset[str] = frozenset()
    ) -> tuple[Record, NDArray[np.bool_]]:
        """Mode of the posterior given the rows' scales `u`.

            mean_k = (strength m0 + sum_ux) / (strength + sum_u)
            scale_k = (diag(scatter) + S_k + strength D_k) / (dof0 + sum_r + d + 2)

        as for Gaussians, but for the weight of a row being `r u` in `sum_u`, `sum_ux` and the
        scatter `S_k`, and `r` where rows are counted. Diagonal scales take each column on its own
        and divide by `dof0 + sum_r + 3`, spherical ones sum over columns and divide by
        `dof0 + d sum_r + 2 + d`. Degrees of freedom solve

            log(dof / 2) - psi(dof / 2) + 1 + sum r (E[log u] - E[u]) / sum_r = 0

        or end at 1 or 1000, where the concave objective is largest.
        """
        n, inner = stats.sum_r, stats.moments
        unseen = n <= UNSEEN * n.sum()
        if self._apart:
            given = self._modal_columns(inner, previous, "mean" in frozen)
            thin = np.zeros(len(n), dtype=bool)
        else:
            given, thin = self._modal(np.where(unseen, 1.0, n), n.sum(), inner, previous, frozen)
        found = _modal_dof((stats.sum_log - inner.sum_w) / np.where(unseen, 1.0, n))
        params = self._with_dof(given, np.where(unseen, previous.dof, found))
        # Frozen leaves stay to the bit.
        params = replace(params, **{name: getattr(previous, name) for name in frozen})
        faulty = unseen if self.prior is None else np.zeros_like(unseen)
        # All components share a tied scale: moving one of them would not make it regular.
        return params, faulty if self.tied else faulty | thin

    def _modal(
        self, n: Array, total: float, inner: Any, previous: Any, frozen: frozenset[str]
    ) -> tuple[Any, NDArray[np.bool_]]:
        """Mean and scale matrices, and whether each component was lifted to the floor. `n` (K,)
        counts rows, none of it 0; `total` is their sum.
        """
        d, gaussian = self.n_features, self._gaussian
        mean, scale = gaussian.pivoted(self.given(previous))
        thin = np.zeros(len(n), dtype=bool)
        if "mean" not in frozen:
            mean = gaussian.modal_mean(inner.sum_w, inner.sum_wx, mean)
        if "scale" not in frozen:
            count = np.array([total]) if self.tied else n
            if self.prior is not None:
                count = count + self.prior.dof + d + (1 + len(n) if self.tied else 2)
            scatter = gaussian.modal_scatter(mean, inner).reshape(-1, d, d)
            raw = np.reshape(np.diagonal(inner.sum_wxx, axis1=-2, axis2=-1), (-1, d))
            scale, thin = gaussian.regular(scatter / count[:, None, None], raw / count[:, None])
        return gaussian.unpivoted(mean, scale), thin

    def _modal_columns(self, inner: Any, previous: Any, keeps_mean: bool) -> Any:
        """Means and the diagonals of scale matrices, of each column over the rows that observed it;
        a column that a component never observed keeps what it had, where there is no prior.
        """
        pivot, d = self._pivot, self.n_features
        m0, psi, strength = self._gaussian.pivoted_prior()
        old = (previous.mean - pivot.shift) / pivot.scale
        tiny = UNSEEN * float(inner.count.sum(axis=0).max())
        known = inner.count > tiny
        mean = old
        if not keeps_mean:
            weight = np.where(known, inner.seen, 0.0 if self.prior is not None else 1.0)
            mean = (strength * m0 + inner.sum_wx) / (strength + weight)
            mean = np.where(known | (self.prior is not None), mean, old)
        square = self._scatter(inner, mean) + strength * (mean - m0) ** 2
        count, raw = inner.count, inner.sum_wxx
        if self.covariance == "spherical":
            # The prior's scatter is that of one variance, not of d.
            square = np.repeat(square.sum(axis=1, keepdims=True) + psi.mean(), d, axis=1)
            count = np.repeat(count.sum(axis=1, keepdims=True), d, axis=1)
            raw = np.repeat(raw.sum(axis=1, keepdims=True), d, axis=1)
        else:
            square = square + psi
        if self.prior is not None:
            count = count + self.prior.dof + (2 + d if self.covariance == "spherical" else 3)
        seen = count > tiny
        safe = np.where(seen, count, 1.0)
        least = FLOOR + SINGULAR * raw / safe
        variance = np.maximum(square / safe + self.ridge / pivot.scale**2, least)
        variance = np.where(seen, variance, self._variance(previous)) * pivot.scale**2
        if self.covariance == "spherical":
            variance = variance[:, 0].copy()
        none = np.empty((len(mean), 0))
        centre = pivot.shift + mean * pivot.scale
        return self._columns.params_type(centre, variance, none, none, none)

    def _scatter(self, inner: Any, mean: Array) -> Array:
        """(K, d) scatter of each column about given means (K, d), in pivot coordinates."""
        weight = np.maximum(inner.seen, 1e-300)
        centre = inner.sum_wx / weight
        about = np.maximum(inner.sum_wxx - inner.sum_wx * centre, 0.0)
        # By way of the weighted mean, so that one far from the pivot costs no digits.
        return np.asarray(about + inner.seen * (centre - mean) ** 2)

    def keep(self, stats: Any, components: Sequence[int]) -> Monoid:
        """As Gaussians do, with rows weighed by `u`."""
        kept: StudentStats = stats.take(components)
        if self._apart:
            return kept
        return replace(kept, moments=self._gaussian.keep(stats.moments, components))

    def possible(self, stats: Any, known: Any) -> Monoid | None:
        """The statistics where every scatter, with the prior's, is positive definite; of single
        columns, with weights and scatter kept above a tenth of the known ones.
        """
        if not (stats.sum_r > 0.1 * known.sum_r).all() or not np.isfinite(stats.sum_log).all():
            return None
        inner = stats.moments
        if not self._apart:
            mended = self._gaussian.possible(inner, known.moments)
            return None if mended is None else self.stats_type(stats.sum_r, stats.sum_log, mended)
        if not all(np.isfinite(value).all() for _, _, value in inner.leaves()):
            return None
        old = known.moments
        count, seen, total = (
            np.maximum(getattr(inner, name), 0.1 * getattr(old, name))
            for name in ("count", "seen", "sum_w")
        )
        about = inner.sum_wx**2 / np.maximum(seen, 1e-300)
        about_old = old.sum_wx**2 / np.maximum(old.seen, 1e-300)
        scatter = np.maximum(inner.sum_wxx - about, 0.1 * (old.sum_wxx - about_old))
        mended = ColumnMoments(total, count, seen, inner.sum_wx, about + scatter)
        return self.stats_type(stats.sum_r, stats.sum_log, mended)

    def expected_log_prob(self, params: Any, stats: Any) -> float:
        """Of `x` and `u` together: what an M-step climbs."""
        pivot, n, half, inner = self._pivot, stats.sum_r, params.dof / 2, stats.moments
        if self._apart:
            variance = self._variance(params)
            mean = (params.mean - pivot.shift) / pivot.scale
            square = self._scatter(inner, mean) / variance
            level = inner.count * (np.log(variance) + LOG_2PI + 2 * np.log(pivot.scale))
            rows = -0.5 * float((level + square).sum())
        else:
            mean, scale = self._gaussian.pivoted(self.given(params))
            log_det = np.linalg.slogdet(scale)[1] + 2 * np.log(pivot.scale).sum()
            scatter = self._gaussian.scatter(inner, mean).reshape(scale.shape)
            square = (np.linalg.inv(scale) * scatter).sum()
            rows = -0.5 * float((n * (log_det + self.n_features * LOG_2PI)).sum() + square)
        scales = n * (half * np.log(half) - gammaln(half))
        return rows + float((scales + half * (stats.sum_log - inner.sum_w)).sum())

    def log_prior(self, params: Any) -> float:
        """Of mean and scale; that of the degrees of freedom is flat."""
        return self._normal.log_prior(self.given(params))

    def place(self, params: Any, component: int, x: Array, observed: Array) -> Record:
        """The component moves to the row, as wide as a Gaussian would and with the degrees of
        freedom that learning begins with.
        """
        placed = self._normal.place(self.given(params), component, x, observed)
        dof = params.dof.copy()
        dof[component] = self.dof
        return self._with_dof(placed, dof)

    def draw(
        self, params: Any, component: Array, rng: np.random.Generator
    ) -> tuple[Array, Array | None]:
        values, _ = self._normal.draw(self.given(params), component, rng)
        half = params.dof[component] / 2
        root = np.sqrt(rng.gamma(half) / half)
        mean = params.mean[component]
        return mean + (values - mean) / root[:, None], None

    def fill(self, params: Any, resp: Array, rng: np.random.Generator | None = None) -> Array:
        if rng is not None:
            return self.draw(params, resp.argmax(axis=0), rng)[0]
        return np.asarray(resp.T @ params.mean)

    def _narrowed(self, columns: Array, shape: str) -> Student:
        """The family of some of the columns, without a prior."""
        pivot = self.pivot and self.pivot.take(columns.tolist(), axis="feature")
        return replace(self, n_features=len(columns), covariance=shape, pivot=pivot, prior=None)

    def marginal(self, params: Any, columns: Array) -> tuple[Family, Record]:
        """A t of the same degrees of freedom."""
        scale = params.scale
        if self.covariance in ("full", "tied"):
            scale = scale[..., columns[:, None], columns]
        elif self.covariance == "diag":
            scale = scale[:, columns]
        narrowed = self.params_type(params.mean[:, columns], scale, params.dof)
        return self._narrowed(columns, self.covariance), narrowed

    def condition(self, params: Any, x: Array, given: Array) -> tuple[Family, Record, Array]:
        """A t of `dof + o` degrees of freedom, at the Gaussian's conditional mean and with its
        conditional covariance times `(dof + delta) / (dof + o)` for a scale (Ding 2016). A tied
        scale is then no longer tied: the given values lie at another `delta` of each component.
        """
        seen, missing = np.flatnonzero(given), np.flatnonzero(~given)
        o, dof = len(seen), params.dof
        log_p = log_normaliser(dof, o) - 0.5 * o * LOG_2PI - np.log(self._pivot.scale[seen]).sum()
        if self._apart:
            variance = self._variance(params)[:, seen]
            gap = (x - params.mean)[:, seen] / self._pivot.scale[seen]
            distance = (gap**2 / variance).sum(axis=1)
            by = (dof + distance) / (dof + o)
            shape, scale = self.covariance, params.scale
            scale = scale[:, missing] * by[:, None] if shape == "diag" else scale * by
            narrowed = self.params_type(params.mean[:, missing], scale, dof + o)
            log_det = np.log(variance).sum(axis=1)
        else:
            known = self._gaussian.conditional(self.given(params), x, seen, missing)
            distance, log_det, shape = known.distance, known.log_det, "full"
            by = (dof + distance) / (dof + o)
            full = self._narrowed(missing, shape)
            inner = full._gaussian.unpivoted(known.mean, known.covariance * by[:, None, None])
            narrowed = full._with_dof(inner, dof + o)
        log_p = log_p - 0.5 * log_det - (dof + o) / 2 * np.log1p(distance / dof)
        return self._narrowed(missing, shape), narrowed, log_p

    def embed(self, rows: Rows) -> tuple[Array, Array]:
        return self._normal.embed(rows)

    def rounding(self, params: Any) -> Array:
        """That of the Gaussian form, which a t only dampens."""
        return self._normal.rounding(self.given(params))

    def describe(self, params: Any) -> Description:
        """Deviations are those of the scale matrix, which exist where no variance does."""
        return self._normal.describe(self.given(params))

    def n_parameters(self, n_components: int) -> int:
        d = self.n_features
        spread = {
            "full": n_components * d * (d + 1) // 2,
            "tied": d * (d + 1) // 2,
            "diag": n_components * d,
            "spherical": n_components,
        }
        return n_components * (d + 1) + spread[self.covariance]

    def floored(self, params: Any) -> list[tuple[int, int]]:
        """(component, column position) whose scale, given the other columns, sits on its floor."""
        return self._normal.floored(self.given(params))


def _middle(sample: Rows) -> tuple[Array, Array]:
    """Median (d,) of each column, and the variance (d,) of a Gaussian with its quartiles.

    Where more than half of a column is the same value its variance stands in. Weights that are
    not 0 are taken as equal.
    """
    mean, variance, _ = moments(sample)
    seen = sample.is_observed & (sample.row_weights > 0)[:, None]
    centre, wide = mean.copy(), variance.copy()
    for j in np.flatnonzero(variance > 0):
        low, middle, high = np.quantile(
            sample.values[seen[:, j], j].astype(np.float64), [0.25, 0.5, 0.75]
        )
        # The quartiles of a Gaussian are 1.349 deviations apart.
        if high > low:
            centre[j], wide[j] = middle, ((high - low) / 1.349) ** 2
    return centre, wide


def _modal_dof(log_less_scale: Array) -> Array:
    """(K,) the root of `log(dof / 2) - psi(dof / 2) + 1 + s`, which falls as dof rises, or the end
    of the allowed range where there is none.
    """
    low = np.full(len(log_less_scale), np.log(LEAST_DOF))
    high = np.full(len(log_less_scale), np.log(MOST_DOF))
    # Halves the range, about 7 in log(dof), to the last digit.
    for _ in range(60):
        middle = (low + high) / 2
        half = np.exp(middle) / 2
        rises = np.log(half) - digamma(half) + 1 + log_less_scale > 0
        low, high = np.where(rises, middle, low), np.where(rises, high, middle)
    return np.asarray(np.exp((low + high) / 2))
