"""Student-t components: Gaussians that forgive rows far away, with gaps.

    u | k ~ Gamma(dof_k / 2, rate dof_k / 2),    x | k, u ~ N(mean_k, scale_k / u)

so that `x | k` is a multivariate t with `dof_k` degrees of freedom. Of a row with `o` observed
entries at squared distance `delta = (x_O - mean_O)' inv(scale_OO) (x_O - mean_O)`

    u | x_O, k ~ Gamma((dof + o) / 2, rate (dof + delta) / 2),
    E[u] = (dof + o) / (dof + delta),    E[log u] = psi((dof + o) / 2) - log((dof + delta) / 2)

(Peel & McLachlan 2000, section 4; with gaps Liu & Rubin 1995, section 3). Given `u` all is
Gaussian, so that the E-step is that of `genstream.families.gaussian_walk` with moments weighed by
`r E[u]` and the conditional covariance of missing entries by `r`, and costs a logarithm and a few
passes over (K, n) numbers more.

Every M-step is the exact maximum of the expected log-joint of `x` and `u`, mean, scale and degrees
of freedom each on its own. Dividing the scatter by `sum r E[u]` instead of `sum r` (Kent, Tyler &
Vardi 1994) would climb faster, but it is the maximum of another bound: under priors, frozen
parameters or statistics that are in part of older parameters, as incremental EM keeps them, the
objective may fall.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import digamma, gammaln

from genstream.families.blocks import (
    LOG_2PI,
    UNSEEN,
    Array,
    Description,
    Family,
    Index,
    Pivot,
    moments,
)
from genstream.families.gaussian import (
    FLOOR,
    SINGULAR,
    FullParams,
    FullStats,
    Gaussian,
    NormalWishart,
    TiedParams,
    TiedStats,
)
from genstream.families.gaussian_walk import GaussianKernel, GaussianWalk
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
    coordinates. Scale matrices of any shape are learnt from full ones.
    """

    sum_r: Array = axes("component")
    sum_log: Array = axes("component")
    moments: Monoid | None = record(FullStats)


@dataclass(frozen=True, eq=False)
class TiedStudentStats(StudentStats):
    """The same, with `r E[u y y']` summed over all components."""

    moments: Monoid | None = record(TiedStats)


PARAMS: dict[str, type[StudentParams]] = {
    "full": StudentParams,
    "tied": TiedStudentParams,
    "diag": DiagStudentParams,
    "spherical": SphericalStudentParams,
}


@dataclass(frozen=True, eq=False)
class Student:
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
        return TiedStudentStats if self.tied else StudentStats

    @property
    def _gaussian(self) -> Gaussian:
        """What a row is given `u = 1`."""
        return Gaussian(self.n_features, self.tied, self.ridge, self.dtype, self.pivot, self.prior)

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
            own = self.covariance in ("diag", "spherical")
            dof = 3.0 if own else self.n_features + 2.0
            prior = NormalWishart.weak(centre, variance, n_components, dof)
        return replace(self, pivot=pivot, prior=prior)

    def vague(self, n_components: int) -> Record:
        d = self.n_features
        dof = np.full(n_components, self.dof)
        eye = np.broadcast_to(np.eye(d), (1 if self.tied else n_components, d, d))
        return self._params(np.zeros((n_components, d)), eye, dof)

    def _params(self, mean: Array, scale: Array, dof: Array) -> StudentParams:
        """Parameters in data units from pivot coordinates; (C, d, d) scale matrices."""
        unit = self._pivot.scale
        centre = self._pivot.shift + mean * unit
        if self.covariance == "tied":
            scale = scale[0] * np.outer(unit, unit)
        elif self.covariance == "full":
            scale = scale * np.outer(unit, unit)
        else:
            scale = np.diagonal(scale, axis1=1, axis2=2) * unit**2
            if self.covariance == "spherical":
                scale = scale[:, 0].copy()
        return self.params_type(centre, scale, dof)

    def given(self, params: Any) -> FullParams | TiedParams:
        """The parameters of `x | k, u = 1`, in data units."""
        scale, d = params.scale, self.n_features
        if self.covariance == "spherical":
            scale = np.repeat(scale[:, None], d, axis=1)
        if self.covariance in ("diag", "spherical"):
            scale = scale[:, :, None] * np.eye(d)
        return self._gaussian.params_type(params.mean, scale)

    def pivoted(self, params: Any) -> tuple[Array, Array]:
        """Mean (K, d) and scale matrix (K, d, d), or (1, d, d) if tied, in pivot coordinates."""
        return self._gaussian.pivoted(self.given(params))

    def start(
        self,
        params: Any,
        sample: Rows,  # noqa: ARG002
        responsibilities: Array,  # noqa: ARG002
        rng: np.random.Generator,  # noqa: ARG002
    ) -> Record:
        started: Record = params
        return started

    def prepare(self, params: Any, log_weights: Array) -> StudentKernel:
        """Factors every scale matrix. Raises numpy.linalg.LinAlgError where one is not positive
        definite, before any data are touched.
        """
        inner = self._gaussian.prepare(self.given(params), log_weights)
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
        gaussian = self._gaussian
        unseen = n <= UNSEEN * n.sum()
        safe = np.where(unseen, 1.0, n)
        mean, scale = self.pivoted(previous)
        dof = previous.dof
        thin = np.zeros(len(n), dtype=bool)
        if "mean" not in frozen:
            mean = gaussian.modal_mean(inner.sum_w, inner.sum_wx, mean)
        if "scale" not in frozen:
            scale, thin = self._modal_scale(mean, safe, n.sum(), inner)
        if "dof" not in frozen:
            known = _modal_dof((stats.sum_log - inner.sum_w) / safe)
            dof = np.where(unseen, dof, known)
        params = self._params(mean, scale, dof)
        # Frozen leaves stay to the bit.
        params = replace(params, **{name: getattr(previous, name) for name in frozen})
        faulty = unseen if self.prior is None else np.zeros_like(unseen)
        # All components share a tied scale: moving one of them would not make it regular.
        return params, faulty if self.tied else faulty | thin

    def _modal_scale(
        self, mean: Array, n: Array, total: float, inner: Any
    ) -> tuple[Array, NDArray[np.bool_]]:
        """(C, d, d) scale matrices about given means in pivot coordinates, and whether each
        component was lifted to the floor. `n` (K,) counts rows, none of it 0; `total` is their sum.
        """
        d, gaussian = self.n_features, self._gaussian
        scatter = gaussian.modal_scatter(mean, inner).reshape(-1, d, d)
        raw = np.reshape(np.diagonal(inner.sum_wxx, axis1=-2, axis2=-1), (-1, d))
        if self.covariance in ("full", "tied"):
            count = np.array([total]) if self.tied else n
            count = count + self._prior_exponent(len(n))
            scale, thin = gaussian.regular(scatter / count[:, None, None], raw / count[:, None])
            return scale, thin
        square = np.diagonal(scatter, axis1=1, axis2=2)
        count = n + self._prior_exponent(len(n))
        if self.covariance == "spherical":
            # The prior's scatter is that of one variance, not of d.
            square = square - gaussian.pivoted_prior()[1] * (1 - 1 / d)
            square = np.repeat(square.sum(axis=1, keepdims=True), d, axis=1)
            count = n * d + self._prior_exponent(len(n))
            raw = np.repeat(raw.sum(axis=1, keepdims=True), d, axis=1)
        floor = FLOOR + SINGULAR * raw / count[:, None]
        variance = square / count[:, None] + self.ridge / self._pivot.scale**2
        scale = np.maximum(variance, floor)[:, :, None] * np.eye(d)
        return scale, np.asarray((variance < floor).any(axis=1))

    def _prior_exponent(self, n_components: int) -> float:
        """What the prior adds to the count that scatter is divided by."""
        if self.prior is None:
            return 0.0
        dof, d = self.prior.dof, self.n_features
        return (
            dof
            + {"full": d + 2, "tied": d + 1 + n_components, "diag": 3, "spherical": 2 + d}[
                self.covariance
            ]
        )

    def keep(self, stats: Any, components: Sequence[int]) -> Monoid:
        """As Gaussians do, with rows weighed by `u`."""
        kept: StudentStats = stats.take(components)
        return replace(kept, moments=self._gaussian.keep(stats.moments, components))

    def possible(self, stats: Any, known: Any) -> Monoid | None:
        """The statistics where every scatter, with the prior's, is positive definite."""
        if not (stats.sum_r > 0.1 * known.sum_r).all() or not np.isfinite(stats.sum_log).all():
            return None
        inner = self._gaussian.possible(stats.moments, known.moments)
        return None if inner is None else replace(stats, moments=inner)

    def expected_log_prob(self, params: Any, stats: Any) -> float:
        """Of `x` and `u` together: what an M-step climbs."""
        pivot, n, half = self._pivot, stats.sum_r, params.dof / 2
        mean, scale = self.pivoted(params)
        log_det = np.linalg.slogdet(scale)[1] + 2 * np.log(pivot.scale).sum()
        scatter = self._gaussian.scatter(stats.moments, mean).reshape(scale.shape)
        square = float((np.linalg.inv(scale) * scatter).sum())
        rows = -0.5 * (float((n * (log_det + self.n_features * LOG_2PI)).sum()) + square)
        scales = n * (half * np.log(half) - gammaln(half))
        return rows + float((scales + half * (stats.sum_log - stats.moments.sum_w)).sum())

    def log_prior(self, params: Any) -> float:
        """Of mean and scale; that of the degrees of freedom is flat."""
        if self.prior is None:
            return 0.0
        if self.covariance in ("full", "tied"):
            return self._gaussian.log_prior(self.given(params))
        d, unit = self.n_features, self._pivot.scale
        mean, scale = self.pivoted(params)
        variance = np.diagonal(scale, axis1=1, axis2=2)
        m0, psi, strength = self._gaussian.pivoted_prior()
        pull = strength * ((mean - m0) ** 2 / variance).sum()
        share = 1 / d if self.covariance == "spherical" else 1.0
        log_det = np.log(variance * unit**2).sum() * share
        square = (psi / variance).sum() * share
        return -0.5 * float(self._prior_exponent(len(mean)) * log_det + square + pull)

    def place(self, params: Any, component: int, x: Array, observed: Array) -> Record:
        """The component moves to the row, with the vague scale's share of the volume and the
        degrees of freedom that learning begins with.
        """
        placed: Any = self._gaussian.place(self.given(params), component, x, observed)
        mean, scale = self._gaussian.pivoted(placed)
        dof = params.dof.copy()
        dof[component] = self.dof
        return self._params(mean, scale, dof)

    def draw(
        self, params: Any, component: Array, rng: np.random.Generator
    ) -> tuple[Array, Array | None]:
        values, _ = self._gaussian.draw(self.given(params), component, rng)
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
        known = self._gaussian.conditional(self.given(params), x, seen, missing)
        o, dof = len(seen), params.dof
        by = (dof + known.distance) / (dof + o)
        family = self._narrowed(missing, "full" if self.tied else self.covariance)
        narrowed = family._params(known.mean, known.covariance * by[:, None, None], dof + o)
        log_p = _log_normaliser(dof, o) - (dof + o) / 2 * np.log1p(known.distance / dof)
        log_p -= 0.5 * (known.log_det + o * LOG_2PI) + np.log(self._pivot.scale[seen]).sum()
        return family, narrowed, log_p

    def embed(self, rows: Rows) -> tuple[Array, Array]:
        return self._gaussian.embed(rows)

    def rounding(self, params: Any) -> Array:
        """That of the Gaussian form, which a t only dampens."""
        return self._gaussian.rounding(self.given(params))

    def describe(self, params: Any) -> Description:
        """Deviations are those of the scale matrix, which exist where no variance does."""
        return self._gaussian.describe(self.given(params))

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
        return self._gaussian.floored(self.given(params))


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


def _log_normaliser(dof: Array, n_observed: int | Array) -> Array:
    """Log-density at distance 0 of a t less that of a Gaussian of the same scale matrix."""
    half = dof / 2
    more = n_observed / 2
    return np.asarray(gammaln(half + more) - gammaln(half) - more * np.log(half))


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


class StudentKernel:
    """Student-t components prepared for a pass: `inner` is the Gaussian with scale matrices in
    place of covariances.
    """

    by_pattern = True

    def __init__(
        self,
        inner: GaussianKernel,
        dof: Array,
        stats_type: type[StudentStats],
    ) -> None:
        self.inner, self.dof, self.stats_type = inner, dof, stats_type

    def walk(self, rows: Rows) -> StudentWalk:
        return StudentWalk(self, rows)


class _Terms(NamedTuple):
    """Of each component, (K, 1) or (K, n): `(dof + o) / 2`, the log-density at `v = 1` less the
    Gaussian's at distance 0, `E[log u]` at `v = 1`, and v at distance 0.
    """

    half: Array
    peak: Array
    expected: Array
    least: Array


class StudentWalk:
    """A walk over one chunk, in the blocks of the Gaussian walk.

    With `v = (dof + delta) / (dof + o) = 1 / E[u]` the log-density is that at distance 0 less
    `(dof + o) / 2 log(v (dof + o) / dof)`.
    """

    def __init__(self, kernel: StudentKernel, rows: Rows) -> None:
        self.kernel = kernel
        self.inner = GaussianWalk(kernel.inner, rows)
        self.sum_r = np.zeros(len(kernel.dof))
        self.sum_log = np.zeros(len(kernel.dof))
        # (K, n) of v, log v and r / v.
        self.room = np.empty((3, *self.inner.log_p.shape), dtype=kernel.inner.dtype)
        self.terms: dict[int, _Terms] = {}

    @property
    def size(self) -> int:
        """Rows in a block at most."""
        return self.inner.size

    @size.setter
    def size(self, size: int) -> None:
        self.inner.size = size

    def blocks(self) -> Iterator[Index]:
        yield from self.inner.blocks()

    def load(self, index: Index) -> None:
        self.inner.load(index)

    def base(self) -> Array | None:
        return None

    def _of_observed(self, n_observed: int | Array) -> _Terms:
        """What the number of observed entries decides; (K, n) where rows differ in it."""
        if not isinstance(n_observed, int):
            widths, at = np.unique(n_observed, return_inverse=True)
            columns = [self._of_observed(int(o)) for o in widths]
            return _Terms(*(np.concatenate(c, axis=1)[:, at] for c in zip(*columns, strict=True)))
        if n_observed not in self.terms:
            dof = self.kernel.dof[:, None]
            half = (dof + n_observed) / 2
            self.terms[n_observed] = _Terms(
                half,
                _log_normaliser(dof, n_observed) - half * np.log(2 * half / dof),
                digamma(half) - np.log(half),
                dof / 2 / half,
            )
        return self.terms[n_observed]

    def score(self) -> Array:
        log_p = self.inner.score()
        if self.room.shape[2] < log_p.shape[1]:
            self.room = np.empty((3, *log_p.shape), dtype=log_p.dtype)
        constant = self.inner.constant
        self.at = terms = self._of_observed(self.inner.n_observed)
        self.v, self.log_v, self.scaled = self.room[:, :, : log_p.shape[1]]
        # Distance is twice what the score lies below that at distance 0.
        dtype, half = log_p.dtype, terms.half
        np.multiply(log_p, (-1 / half).astype(dtype), out=self.v)
        self.v += (terms.least + constant / half).astype(dtype)
        # Rounding may put a row nearer than its mean.
        np.maximum(self.v, terms.least.astype(dtype), out=self.v)
        np.log(self.v, out=self.log_v)
        np.multiply(self.log_v, -half.astype(dtype), out=log_p)
        log_p += (constant + terms.peak).astype(dtype)
        return log_p

    def gather(self, resp: Array) -> None:
        o = self.inner.n_observed
        # A row with nothing observed is no evidence of any scale.
        if not np.all(o):
            resp = resp * np.greater(o, 0)
        np.divide(resp, self.v, out=self.scaled)
        self.inner.gather(resp, self.scaled)
        total = resp.sum(axis=1, dtype=np.float64)
        self.sum_r += total
        expected = self.at.expected
        if expected.shape[1] == 1:
            self.sum_log += total * expected[:, 0]
        else:
            self.sum_log += np.vecdot(resp, expected)
        self.sum_log -= np.vecdot(resp, self.log_v)

    def complete(self, resp: Array, rng: np.random.Generator | None = None) -> Array:
        """The conditional mean is the Gaussian's. A draw is of the row's `u` first."""
        if rng is None:
            return self.inner.complete(resp)
        at = resp.argmax(axis=0), np.arange(resp.shape[1])
        half = np.broadcast_to(self.at.half, resp.shape)[at]
        rate = half * self.v[at].astype(np.float64)
        return self.inner.complete(resp, rng, np.sqrt(rate / rng.gamma(half)))

    def close(self) -> Monoid:
        return self.kernel.stats_type(self.sum_r, self.sum_log, self.inner.close())
