"""Binary columns that depend on a few Gaussian factors.

    t ~ N(0, I_q),    x_j | k, t ~ Bernoulli(sigmoid(b_kj + w_kj . t))

`p(x | k)` has no closed form. With `a = b_j + w_j . t` and one number `xi` a row and column,

    log sigmoid((2 x - 1) a) >= (x - 1/2) a - lambda(xi) (a^2 - xi^2) - xi/2 - log(1 + exp(-xi)),
    lambda(xi) = tanh(xi / 2) / (4 xi)

(Jaakkola & Jordan 2000, section 2) is quadratic in `t`, so that the posterior under it is Gaussian,
`q(t) = N(m, S)` with

    S^-1 = I + 2 sum_j lambda_j w_j w_j',    m = S sum_j (x_j - 1/2 - 2 lambda_j b_j) w_j

and the tightest bound has `xi_j^2 = E_q[(b_j + w_j . t)^2]`. The two are solved for until neither
moves: the problem is concave in what matters, so a row has one best bound (Nickisch & Seeger 2009,
section 3), wherever the iteration begins, and no local state is kept between passes. What is
summed over the rows that observed column j is `lambda_j E[u u']` and `(x_j - 1/2) E[u]`,
`u = (1, t)`, and the M-step solves q + 1 equations a column. A missing entry drops out, exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, log_expit

from genstream.families.blocks import (
    LOG_2PI,
    UNSEEN,
    Array,
    Description,
    Index,
    Pivot,
    block_rows,
    by_component,
    slices,
)
from genstream.families.importance import mean_weights
from genstream.families.one_kind import OneKind
from genstream.rows import Rows
from genstream.schema import Kind, Schema
from genstream.stats import Monoid, Record, axes

# A row's bound counts as tight once a step gains less than this, in nats.
TIGHT = {"float64": 1e-10, "float32": 1e-6}
# Steps after which a row's bound is taken as it is.
MAX_LOCAL = 2000
# What a row's caution is multiplied by after a step that did not overshoot, in the first steps.
RELAXING, MAX_RELAXING = 0.8, 200
# Added to xi^2, so that lambda is finite where it vanishes.
TINY_SQUARE = 1e-12
# Precisions of the weak prior's normal distributions: deviations of 2.5 for loadings and 10 for
# biases, the scales of Gelman, Jakulin, Pittau & Su (2008, section 2) for logistic regression.
LOADING_PRECISION, BIAS_PRECISION = 0.16, 0.01
# The longest loadings a start gives a column.
START_NORM = 3.0
# Dimensions beyond q in the subspace iteration of a start, and its steps.
OVERSAMPLING, POWER = 8, 4
# Nodes of the Gauss-Hermite rule for the mean of a sigmoid under a normal distribution.
NODES = 32


@dataclass(frozen=True, eq=False)
class LogisticParams(Record):
    """Log-odds of each column at `t = 0`, and what a unit of each factor adds to them."""

    bias: Array = axes("component", "binary")
    loadings: Array = axes("component", "binary", "factor")


@dataclass(frozen=True, eq=False)
class LogisticStats(Monoid):
    """Sums over rows of `r o lambda E[u u']`, its upper triangle row by row, and of
    `r o (x - 1/2) E[u]`, with `u = (1, t)`.
    """

    sum_second: Array = axes("component", "binary", "pair")
    sum_first: Array = axes("component", "binary", "moment")


@dataclass(frozen=True, eq=False)
class LogisticPrior(Record):
    """Precisions of the normal priors about 0 of every loading and every bias."""

    loading_precision: float = axes()
    bias_precision: float = axes()

    def stronger(self, strength: float, spread: float) -> LogisticPrior:
        """`strength` times the precisions, for `spread` times the variance."""
        by = strength / spread
        return LogisticPrior(self.loading_precision * by, self.bias_precision * by)


@dataclass(frozen=True, eq=False)
class LogisticFactors(OneKind):
    """K components of binary columns, each with factors of its own.

    Scores are the lower bound of the module's head; arithmetic over factors is in float64 always.

    Parameters
    ----------
    n_factors
        q, at least 1.
    """

    n_factors: int = 1  # type: ignore[misc]

    name: ClassVar[str] = "logistic_factors"
    kind: ClassVar[Kind] = "binary"
    bound: ClassVar[bool] = True
    param_names: ClassVar[tuple[str, ...]] = ("bias", "loadings")
    params_type: ClassVar[type[Record]] = LogisticParams
    stats_type: ClassVar[type[Monoid]] = LogisticStats
    prior_type: ClassVar[type[Record]] = LogisticPrior

    def options(self) -> dict[str, Any]:
        return {"n_factors": self.n_factors, "dtype": self.dtype}

    @classmethod
    def of(
        cls, schema: Schema, options: Mapping[str, Any], pivot: Pivot | None, prior: Any
    ) -> LogisticFactors:
        return cls(schema, options["dtype"], pivot, prior, options["n_factors"])

    def anchored(self, sample: Rows, n_components: int, weak_prior: bool) -> LogisticFactors:  # noqa: ARG002
        """Neutral pivot; the weak prior is the same whatever the sample."""
        prior = LogisticPrior(LOADING_PRECISION, BIAS_PRECISION) if weak_prior else None
        return replace(self, pivot=Pivot.none(self.schema.n_features), prior=prior)

    def vague(self, n_components: int) -> Record:
        d, q = self.schema.n_features, self.n_factors
        return LogisticParams(np.zeros((n_components, d)), np.zeros((n_components, d, q)))

    def start(
        self, params: Any, sample: Rows, responsibilities: Array, rng: np.random.Generator
    ) -> Record:
        """Loadings from the leading eigenvectors of each component's standardised columns.

        With `p` a column's frequency, `(x - p) / sqrt(p (1 - p))` is to first order
        `sqrt(p (1 - p)) w . t` and noise of variance 1, so that with the eigenvalues `l` and
        vectors `v` of its covariance `w = v sqrt((l - 1) / (p (1 - p)))`. Gaps count as the mean.
        """
        bias, loadings = params.bias.copy(), params.loadings.copy()
        for k in range(len(bias)):
            weight = sample.row_weights * responsibilities[:, k]
            seen = weight @ sample.is_observed
            p = (weight @ (sample.values * sample.is_observed) + 0.5) / (seen + 1.0)
            spread = np.sqrt(p * (1 - p))
            share = np.maximum(seen / max(float(weight.sum()), 1e-300), 1e-3)
            z = (sample.values - p) / (spread * share) * sample.is_observed
            z *= np.sqrt(weight / max(float(weight.sum()), 1e-300))[:, None]
            size, vectors = _leading(z, self.n_factors, rng)
            w = vectors * np.sqrt(np.maximum(size - 1.0, 0.1)) / spread[:, None]
            w *= 1 + 0.1 * rng.standard_normal(w.shape)
            w += 0.01 * rng.standard_normal(w.shape)
            norm = np.sqrt((w**2).sum(axis=1, keepdims=True))
            w *= np.minimum(1.0, START_NORM / norm)
            loadings[k] = w
            # A sigmoid's mean over its argument's spread is nearer a half (MacKay 1992, eq. 10).
            bias[k] = np.log(p / (1 - p)) * np.sqrt(1 + np.pi / 8 * (w**2).sum(axis=1))
        return LogisticParams(bias, loadings)

    def prepare(self, params: Any, log_weights: Array) -> LogisticKernel:
        return LogisticKernel(self, params, log_weights)

    def maximise(
        self, stats: Any, previous: Any, frozen: frozenset[str] = frozenset()
    ) -> tuple[Record, NDArray[np.bool_]]:
        """With `theta = (b, w)` of a column, `A` and `c` its sums and `D` the prior's precisions:
        `theta = (2 A + D)^-1 c`, or the part of it that is not frozen given the other part.

        Without a prior a column that a component never observed keeps its previous parameters.
        """
        moves = np.array(["bias" not in frozen] + ["loadings" not in frozen] * self.n_factors)
        free, held = np.flatnonzero(moves), np.flatnonzero(~moves)
        matrix = 2.0 * _unpacked(stats.sum_second, self.n_factors + 1)
        weight = stats.sum_second[:, :, 0]
        known = weight > UNSEEN * float(weight.max())
        faulty = np.zeros(len(weight), dtype=bool)
        if self.prior is None:
            faulty = ~known.any(axis=1)
        else:
            known = np.ones_like(known)
        every = np.arange(self.n_factors + 1)
        matrix[:, :, every, every] += self._precision
        theta = np.concatenate([previous.bias[:, :, None], previous.loadings], axis=2)
        right = stats.sum_first
        if len(held):
            right = right - np.einsum("kdij,kdj->kdi", matrix[..., held], theta[..., held])
        if len(free):
            found = _solved(matrix[..., free[:, None], free], right[..., free], known)
            theta[..., free] = np.where(known[:, :, None], found, theta[..., free])
        return LogisticParams(theta[:, :, 0].copy(), theta[:, :, 1:].copy()), faulty

    @property
    def _precision(self) -> Array:
        """(q + 1,) precisions of the prior of a bias and its loadings."""
        prior = self.prior
        if prior is None:
            return np.zeros(self.n_factors + 1)
        return np.array([prior.bias_precision] + [prior.loading_precision] * self.n_factors)

    def possible(self, stats: Any, known: Any) -> Monoid | None:
        """As they are, if every matrix of second moments exceeds a tenth of the known one."""
        if not all(np.isfinite(value).all() for _, _, value in stats.leaves()):
            return None
        size = self.n_factors + 1
        more = _unpacked(stats.sum_second - 0.1 * known.sum_second, size)
        seen = known.sum_second[:, :, 0] > UNSEEN * float(known.sum_second[:, :, 0].max())
        try:
            np.linalg.cholesky(more[seen])
        except np.linalg.LinAlgError:
            return None
        found: Monoid = stats
        return found

    def expected_log_prob(self, params: Any, stats: Any) -> float:
        theta = np.concatenate([params.bias[:, :, None], params.loadings], axis=2)
        second = _unpacked(stats.sum_second, self.n_factors + 1)
        square = np.einsum("kdi,kdij,kdj->", theta, second, theta, optimize=True)
        return float((theta * stats.sum_first).sum() - square)

    def log_prior(self, params: Any) -> float:
        if self.prior is None:
            return 0.0
        square = self.prior.bias_precision * (params.bias**2).sum()
        square += self.prior.loading_precision * (params.loadings**2).sum()
        return -0.5 * float(square)

    def place(self, params: Any, component: int, x: Array, observed: Array) -> Record:
        """Frequencies lean half towards the row; loadings are those of the next component."""
        bias, loadings = params.bias.copy(), params.loadings.copy()
        pooled = expit(params.bias).mean(axis=0)
        p = np.clip(np.where(observed, 0.5 * (x + pooled), pooled), 0.01, 0.99)
        bias[component] = np.log(p / (1 - p))
        loadings[component] = params.loadings[(component + 1) % len(bias)]
        return LogisticParams(bias, loadings)

    def draw(
        self, params: Any, component: Array, rng: np.random.Generator
    ) -> tuple[Array, Array | None]:
        t = rng.standard_normal((len(component), self.n_factors))
        uniform = rng.random((len(component), self.schema.n_features))
        out = np.empty(uniform.shape)
        for k, rows in by_component(component):
            out[rows] = uniform[rows] < expit(params.bias[k] + t[rows] @ params.loadings[k].T)
        return out, t

    def fill(self, params: Any, resp: Array, rng: np.random.Generator | None = None) -> Array:
        if rng is not None:
            return self.draw(params, resp.argmax(axis=0), rng)[0]
        variance = (params.loadings**2).sum(axis=2)
        chance = resp.T @ _mean_sigmoid(params.bias, variance)
        return np.asarray(chance > 0.5, dtype=np.float64)

    def condition(
        self, params: Any, x: Array, given: Array
    ) -> tuple[LogisticFactors, Record, Array]:
        """Approximate: `q(t) = N(m, L L')` given `x` takes the place of the factors' posterior, so
        that with `t = m + L s` the bias becomes `b + W m` and the loadings `W L`. `log_p` is a
        bound.
        """
        bias, loadings, log_p = (
            params.bias.copy(),
            params.loadings.copy(),
            np.zeros(len(params.bias)),
        )
        walk = self.with_dtype("float64").prepare(params, log_p).walk(Rows(x[None], given[None]))
        walk.load(slice(0, 1))
        log_p = walk.score()[:, 0].copy()
        for k in range(len(bias)):
            mean, covariance = walk.factors(np.array([k]))
            bias[k] += loadings[k] @ mean[0]
            loadings[k] = loadings[k] @ np.linalg.cholesky(covariance[0])
        rest, shifted = self.marginal(LogisticParams(bias, loadings), np.flatnonzero(~given))
        return rest, shifted, log_p

    def describe(self, params: Any) -> Description:
        unknown = np.full(params.bias.shape, np.nan)
        p = _mean_sigmoid(params.bias, (params.loadings**2).sum(axis=2))
        levels = {j: np.stack([1 - p[:, j], p[:, j]], axis=1) for j in range(p.shape[1])}
        return Description(unknown, unknown, levels, loadings=params.loadings)

    def rounding(self, params: Any) -> Array:
        """Sums over the columns, and what an iteration ended early leaves."""
        size = np.abs(params.bias) + np.sqrt((params.loadings**2).sum(axis=2))
        unit = float(np.finfo(self.dtype).eps)
        return np.asarray(unit * (1 + size).sum(axis=1) + 10 * TIGHT[self.dtype])

    def n_parameters(self, n_components: int) -> int:
        """Biases and loadings, less the rotation of the factors that changes nothing."""
        d, q = self.schema.n_features, self.n_factors
        return n_components * (d + max(d * q - q * (q - 1) // 2, 0))


def _unpacked(triangle: Array, size: int) -> Array:
    """(..., size, size) symmetric matrices from their upper triangles, row by row."""
    i, j = np.triu_indices(size)
    out = np.empty((*triangle.shape[:-1], size, size))
    out[..., i, j] = triangle
    out[..., j, i] = triangle
    return out


def _solved(matrix: Array, right: Array, known: Array) -> Array:
    """`matrix^-1 right` of each system, scaled to a unit diagonal first; 0 where not `known`."""
    diagonal = np.einsum("...ii->...i", matrix)
    scale = 1.0 / np.sqrt(np.where(diagonal > 0, diagonal, 1.0))
    scaled = matrix * scale[..., :, None] * scale[..., None, :]
    scaled[~known] = np.eye(matrix.shape[-1])
    found = np.linalg.solve(scaled, (right * scale)[..., None])[..., 0] * scale
    return np.asarray(np.where(known[..., None], found, 0.0))


def _leading(z: Array, q: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """(q,) leading eigenvalues and (d, q) eigenvectors of `z' z`, by subspace iteration from random
    vectors (Halko, Martinsson & Tropp 2011, section 4.5); zeros where there are fewer than q.

    It sees `z' z` alone, so that a row of weight 2 is two rows.
    """
    d = z.shape[1]
    basis = rng.standard_normal((d, min(q + OVERSAMPLING, d)))
    for _ in range(POWER):
        basis = np.linalg.qr(z.T @ (z @ basis))[0]
    image = z @ basis
    size, turn = np.linalg.eigh(image.T @ image)
    size, vectors = size[::-1][:q], (basis @ turn)[:, ::-1][:, :q]
    missing = q - len(size)
    return np.pad(size, (0, missing)), np.pad(vectors, ((0, 0), (0, missing)))


def _mean_sigmoid(mean: Array, variance: Array) -> Array:
    """`E[sigmoid(a)]`, `a ~ N(mean, variance)`, by Gauss-Hermite quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(NODES)
    deviation = np.sqrt(variance)
    total = np.zeros(np.shape(mean))
    for node, weight in zip(nodes, weights / weights.sum(), strict=True):
        total += weight * expit(mean + node * deviation)
    return total


class LogisticKernel:
    """Logistic factors prepared for a pass."""

    def __init__(self, family: LogisticFactors, params: Any, log_weights: Array) -> None:
        self.family, self.params, self.log_weights = family, params, log_weights
        self.components = [
            Component(bias, loadings, family.dtype)
            for bias, loadings in zip(params.bias, params.loadings, strict=True)
        ]

    def walk(self, rows: Rows) -> LogisticWalk:
        return LogisticWalk(self, rows)


class Component:
    """One component: what its rows' bounds are made of, and how they are tightened."""

    def __init__(self, bias: Array, loadings: Array, dtype: str) -> None:
        self.dtype = np.dtype(dtype)
        self.tight = TIGHT[dtype]
        self.q = loadings.shape[1]
        self.i, self.j = np.triu_indices(self.q)
        self.bias = bias.astype(dtype)
        self.loadings = np.ascontiguousarray(loadings, dtype=dtype)
        products = loadings[:, self.i] * loadings[:, self.j]
        # (d, pairs) for sums of w w' under weights, (pairs, d) for w' S w from S's triangle.
        self.products = products.astype(dtype)
        self.quadratic = np.ascontiguousarray(
            (products * np.where(self.i == self.j, 1.0, 2.0)).T, dtype=dtype
        )

    def moments(self, mean: Array, covariance: Array) -> tuple[Array, Array]:
        """(n, d) `E[a]` and `xi = sqrt(E[a^2])` under `q(t)`, `a = b + w . t`."""
        a = mean.astype(self.dtype) @ self.loadings.T
        a += self.bias
        xi = covariance[:, self.i, self.j].astype(self.dtype) @ self.quadratic
        np.maximum(xi, 0.0, out=xi)
        xi += a * a
        xi += TINY_SQUARE
        return a, np.sqrt(xi, out=xi)

    def slope(self, xi: Array, mask: Array | None) -> Array:
        """(n, d) `2 lambda(xi)`, 0 where masked; the argument is overwritten."""
        twice = np.tanh(0.5 * xi)
        xi *= 2.0
        twice /= xi
        if mask is not None:
            twice *= mask
        return twice

    def _curvatures(
        self, half: Array, mask: Array | None, mean: Array, covariance: Array
    ) -> tuple[Array, Array, Array]:
        """Of the bound at its best `xi` under `N(m, S)`: (n, q, q) the `S^-1` that suits `xi`,
        (n, q, q) minus the second derivative in `m`, and (n, q) the first.
        """
        a, xi = self.moments(mean, covariance)
        t = np.tanh(0.5 * xi)
        slope = 0.5 * t
        slope /= xi
        # The derivative of 2 lambda(xi) a, where xi moves with a.
        np.multiply(t, t, out=t)
        t -= 1.0
        t *= -0.25
        t -= slope
        np.divide(a, xi, out=xi)
        xi *= xi
        t *= xi
        t += slope
        if mask is not None:
            slope *= mask
            t *= mask
        every = np.arange(self.q)
        precision = _unpacked((slope @ self.products).astype(np.float64), self.q)
        precision[:, every, every] += 1.0
        curvature = _unpacked((t @ self.products).astype(np.float64), self.q)
        curvature[:, every, every] += 1.0
        slope *= a
        np.subtract(half, slope, out=slope)
        return precision, curvature, (slope @ self.loadings).astype(np.float64) - mean

    def tightened(self, half: Array, mask: Array | None) -> tuple[Array, Array]:
        """(n, q) means and (n, q, q) covariances of each row's `q(t)` at its tightest bound.

        A step takes the best covariance at the `xi` at hand, and moves the mean by Newton's
        method. The plain iteration moves it by `S` times the gradient instead, which always gains
        but crawls where the log-odds are large; a row whose step gained more than the one before
        it has overshot, and moves between the two for a while. `half` is `x - 1/2`, 0 where
        masked. A row is done once the divergence of one `q(t)` from the next, which is what a
        plain step gains, is below the tolerance.
        """
        n, q = len(half), self.q
        means, covariances = np.zeros((n, q)), np.tile(np.eye(q), (n, 1, 1))
        active = np.arange(n)
        mean, covariance = means.copy(), covariances.copy()
        caution, before = np.zeros(n), np.full(n, np.inf)
        for step in range(MAX_LOCAL):
            precision, curvature, gradient = self._curvatures(half, mask, mean, covariance)
            fresh = np.linalg.inv(precision)
            # KL(N(m, S) || N(m', S')) to second order in their difference.
            excess = precision @ covariance
            excess[:, np.arange(q), np.arange(q)] -= 1.0
            gain = 0.25 * np.einsum("nij,nji->n", excess, excess)
            gain += 0.5 * np.einsum("ni,nij,nj->n", gradient, fresh, gradient, optimize=True)
            relaxed = caution * (RELAXING if step < MAX_RELAXING else 1.0)
            caution = np.where(gain > before, 0.5 * (1.0 + caution), relaxed)
            before = gain
            curvature += caution[:, None, None] * (precision - curvature)
            mean = mean + np.linalg.solve(curvature, gradient[:, :, None])[:, :, 0]
            covariance = fresh
            done = gain < self.tight
            if done.any() or step + 1 == MAX_LOCAL:
                means[active], covariances[active] = mean, covariance
                left = ~done
                active, half = active[left], half[left]
                if not len(active):
                    break
                mask = None if mask is None else mask[left]
                mean, covariance = mean[left], covariance[left]
                caution, before = caution[left], before[left]
        return means, covariances

    def value(self, half: Array, mask: Array | None, mean: Array, covariance: Array) -> Array:
        """(n,) the bound of `log p(x)` at `q(t)` and the `xi` that suit it:
        `sum_j (x_j - 1/2) E[a_j] - xi_j / 2 - log(1 + exp(-xi_j))` less the divergence of `q(t)`
        from the factors' prior.
        """
        a, xi = self.moments(mean, covariance)
        a *= half
        tail = np.log1p(np.exp(-xi))
        xi *= 0.5
        tail += xi
        if mask is not None:
            tail *= mask
        a -= tail
        _, log_det = np.linalg.slogdet(covariance)
        trace = np.einsum("nii->n", covariance)
        divergence = 0.5 * (trace + (mean**2).sum(axis=1) - self.q - log_det)
        return np.asarray(a.sum(axis=1, dtype=np.float64) - divergence)


class LogisticWalk:
    """A walk over one chunk in consecutive blocks."""

    def __init__(self, kernel: LogisticKernel, rows: Rows) -> None:
        self.kernel, self.rows = kernel, rows
        family = kernel.family
        d, k, size = family.schema.n_features, len(kernel.components), family.n_factors + 1
        # Rows with nothing observed say nothing: they are in no block.
        self.useful = np.arange(rows.n_rows)
        if rows.observed is not None:
            self.useful = np.flatnonzero(rows.observed.any(axis=1))
        self.size = block_rows(6 * d + 3 * size * size, np.dtype(family.dtype).itemsize)
        self.i, self.j = np.triu_indices(size)
        self.second = np.zeros((k, d, len(self.i)))
        self.first = np.zeros((k, d, size))

    def blocks(self) -> Iterator[Index]:
        whole = len(self.useful) == self.rows.n_rows
        for piece in slices(len(self.useful), self.size):
            index = piece if whole else self.useful[piece]
            self.load(index)
            yield index

    def load(self, index: Index) -> None:
        self.block = self.rows[index]
        dtype = self.kernel.family.dtype
        self.half = self.block.values.astype(dtype)
        self.half -= 0.5
        self.mask: Array | None = None
        if self.block.observed is not None and not self.block.observed.all():
            self.mask = self.block.observed.astype(dtype)
            self.half *= self.mask
        self.local: list[tuple[Array, Array]] = []

    def score(self) -> Array:
        out = np.empty((len(self.kernel.components), len(self.half)))
        self.local = []
        for k, component in enumerate(self.kernel.components):
            mean, covariance = component.tightened(self.half, self.mask)
            self.local.append((mean, covariance))
            out[k] = component.value(self.half, self.mask, mean, covariance)
            out[k] += self.kernel.log_weights[k]
        return out

    def base(self) -> Array | None:
        return None

    def gather(self, resp: Array) -> None:
        for k, component in enumerate(self.kernel.components):
            rows = np.flatnonzero(resp[k] > UNSEEN)
            if not len(rows):
                continue
            mean, covariance = (moment[rows] for moment in self.local[k])
            _, xi = component.moments(mean, covariance)
            weight = component.slope(xi, None if self.mask is None else self.mask[rows])
            weight *= 0.5
            u = np.concatenate([np.ones((len(rows), 1)), mean], axis=1)
            pairs = u[:, :, None] * u[:, None, :]
            pairs[:, 1:, 1:] += covariance
            r = resp[k, rows].astype(np.float64)[:, None]
            dtype = weight.dtype
            self.second[k] += weight.T @ (r * pairs[:, self.i, self.j]).astype(dtype)
            self.first[k] += self.half[rows].T @ (r * u).astype(dtype)

    def close(self) -> Monoid:
        return LogisticStats(self.second, self.first)

    def factors(self, component: Array) -> tuple[Array, Array]:
        means = np.stack([mean for mean, _ in self.local])
        covariances = np.stack([covariance for _, covariance in self.local])
        every = np.arange(len(component))
        return means[component, every], covariances[component, every]

    def importance(self, n_samples: int, rng: np.random.Generator) -> tuple[Array, Array]:
        family, params = self.kernel.family, self.kernel.params
        n, d = self.half.shape
        q = family.n_factors
        half = self.half.astype(np.float64)
        out = np.empty((2, len(self.local), n))
        for k, (mean, _) in enumerate(self.local):
            bias, loadings = params.bias[k], params.loadings[k]
            # The curvature of the likelihood itself: the bound's makes too narrow a posterior.
            p = expit(bias + mean @ loadings.T)
            slope = p * (1 - p) if self.mask is None else p * (1 - p) * self.mask
            precision = np.eye(q) + np.einsum(
                "nd,di,dj->nij", slope, loadings, loadings, optimize=True
            )

            def log_likelihood(
                rows: slice, t: Array, bias: Array = bias, loadings: Array = loadings
            ) -> Array:
                a = t @ loadings.T + bias
                # log sigmoid((2 x - 1) a), but for a / 2 and its share of the rest.
                each = log_expit(a) - 0.5 * a
                if self.mask is None:
                    rest = each.sum(axis=2)
                else:
                    rest = np.einsum("nsd,nd->ns", each, self.mask[rows])
                return np.asarray(np.einsum("nsd,nd->ns", a, half[rows]) + rest)

            out[:, k] = mean_weights(
                log_likelihood,
                lambda t: -0.5 * ((t**2).sum(axis=2) + q * LOG_2PI),
                lambda number: rng.standard_normal((number, q)),
                mean,
                np.linalg.inv(precision),
                n_samples,
                d,
                rng,
            )
        out += np.array([1, 2])[:, None, None] * self.kernel.log_weights[:, None]
        return out[0], out[1]

    def complete(self, resp: Array, rng: np.random.Generator | None = None) -> Array:
        out = self.block.values.astype(np.float64)
        if self.block.observed is None:
            return out
        gaps = ~self.block.observed
        chance = np.zeros(int(gaps.sum()))
        if rng is not None:
            noise = rng.standard_normal((len(out), self.kernel.family.n_factors))
        row = np.nonzero(gaps)[0]
        for k, component in enumerate(self.kernel.components):
            mean, covariance = self.local[k]
            if rng is not None:
                mean = mean + np.einsum("nij,nj->ni", np.linalg.cholesky(covariance), noise)
                covariance = np.zeros_like(covariance)
            a, xi = (
                moment[gaps].astype(np.float64) for moment in component.moments(mean, covariance)
            )
            chance += resp[k, row] * _mean_sigmoid(a, np.maximum(xi * xi - a * a, 0.0))
        out[gaps] = chance > (0.5 if rng is None else rng.random(len(chance)))
        return out
