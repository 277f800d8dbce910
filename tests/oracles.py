"""Brute force against which the numeric core is judged: one row at a time, by scipy.stats.

Nothing here shares code or algebra with the library beyond the parameter records themselves. It
needs numpy and scipy only, so that the core can be judged where nothing else is installed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special, stats

from genstream.families.columns import ColumnsParams, SphericalParams
from genstream.families.gaussian import FullParams, TiedParams
from genstream.families.product import Product
from genstream.schema import Column, Schema
from genstream.stories import mixture
from genstream.story import Params, Story

Array = NDArray[Any]

MIXED = Schema(
    (
        Column("delay", "real"),
        Column("late", "binary"),
        Column("bags", "count"),
        Column("carrier", "categorical", ("AA", "B6", "UA")),
        Column("distance", "real"),
        Column("hub", "categorical", ("no", "yes")),
    )
)
STORIES = ("full", "tied", "diag", "spherical", "mixed")


def make_story(kind: str, n_components: int, d: int = 3, **options: Any) -> Story:
    """A story of one of STORIES, or `blocks`: `mixed` and `blocks` have the columns of MIXED, of
    which `blocks` makes the real ones jointly Gaussian.
    """
    if kind == "mixed":
        return mixture(MIXED, n_components, **options)
    if kind == "blocks":
        return mixture(MIXED, n_components, covariance="full", **options)
    return mixture(Schema.real(d), n_components, covariance=kind, **options)


def blocks_of(story: Story, params: Params | None = None) -> list[tuple[list[int], Story, Any]]:
    """Positions, story and parameters of each block of a product, as if it were alone."""
    assert isinstance(story.family, Product)
    found = []
    for i, part in enumerate(story.family.parts):
        schema = Schema(tuple(story.schema.columns[j] for j in part.columns))
        alone = Story(schema, part.family, story.n_components, story.prior)
        theta = params and Params(params.weights, getattr(params.family, f"block{i}"))
        found.append((list(part.columns), alone, theta))
    return found


def random_params(story: Story, rng: np.random.Generator, apart: float = 3.0) -> Params:
    """Parameters with components about `apart` deviations from one another."""
    k, d = story.n_components, story.schema.n_features
    weights = rng.dirichlet(np.full(k, 8.0))
    if isinstance(story.family, Product):
        theta = [random_params(alone, rng, apart).family for _, alone, _ in blocks_of(story)]
        return Params(weights, story.family.params_type(*theta))
    kind = story.family.params_type
    if kind in (FullParams, TiedParams):
        shape = (d, d) if kind is TiedParams else (k, d, d)
        factor = np.tril(rng.normal(0, 0.4, shape), -1)
        factor[..., np.arange(d), np.arange(d)] = rng.uniform(0.6, 1.5, shape[:-1])
        covariance = factor @ factor.swapaxes(-1, -2)
        mean = rng.normal(0, 0.3, (k, d)) + apart * _corners(k, d)
        return Params(weights, kind(mean, covariance))
    family: Any = story.family
    n_real, n_binary, n_count = len(family.real), len(family.binary), len(family.count)
    mean = rng.normal(0, 0.3, (k, n_real)) + apart * _corners(k, n_real)
    shape = (k,) if kind is SphericalParams else (k, n_real)
    level = rng.gamma(1.0, size=(k, len(family.level_column))) + 0.05
    for j in np.unique(family.level_column):
        of_column = family.level_column == j
        level[:, of_column] /= level[:, of_column].sum(axis=1, keepdims=True)
    return Params(
        weights,
        kind(
            mean,
            rng.uniform(0.4, 2.0, shape),
            rng.uniform(0.05, 0.95, (k, n_binary)),
            rng.uniform(0.3, 8.0, (k, n_count)),
            level,
        ),
    )


def _corners(k: int, d: int) -> Array:
    """K points about one unit from one another in d dimensions, without randomness."""
    points = np.zeros((k, d))
    for i in range(k):
        if d:
            points[i, i % d] = (1 + i // d) * (1 if (i // d) % 2 == 0 else -1)
    return points


def with_gaps(values: Array, share: float, rng: np.random.Generator) -> Array:
    """A copy with entries set to NaN at random."""
    return np.where(rng.random(values.shape) < share, np.nan, values)


def log_joint(story: Story, params: Params, values: Array) -> Array:
    """(n, K) of `log weight_k + log p(x_observed | k)`, entry by entry."""
    out = np.empty((len(values), story.n_components))
    for k in range(story.n_components):
        out[:, k] = np.log(params.weights[k]) + component_log_prob(story, params, k, values)
    return out


def component_log_prob(story: Story, params: Params, k: int, values: Array) -> Array:
    """(n,) log-density of the observed entries under component k; NaN marks a gap."""
    if isinstance(story.family, Product):
        return np.sum(
            [
                component_log_prob(alone, theta, k, values[:, columns])
                for columns, alone, theta in blocks_of(story, params)
            ],
            axis=0,
        )
    if isinstance(params.family, FullParams | TiedParams):
        return _gaussian_log_prob(params.family, k, values)
    return _columns_log_prob(story, params.family, k, values)


def covariance_of(family: Any, k: int) -> Array:
    return np.asarray(family.covariance if isinstance(family, TiedParams) else family.covariance[k])


def _gaussian_log_prob(family: Any, k: int, values: Array) -> Array:
    covariance = covariance_of(family, k)
    out = np.zeros(len(values))
    seen = ~np.isnan(values)
    for pattern in np.unique(seen, axis=0):
        if not pattern.any():
            continue
        rows = (seen == pattern).all(axis=1)
        marginal = stats.multivariate_normal(
            family.mean[k][pattern], covariance[np.ix_(pattern, pattern)]
        )
        out[rows] = marginal.logpdf(values[np.ix_(rows, pattern)])
    return out


def _columns_log_prob(story: Story, family: Any, k: int, values: Array) -> Array:
    total = np.zeros(len(values))
    seats: dict[str, int] = dict.fromkeys(("real", "binary", "count", "categorical"), 0)
    for j, column in enumerate(story.schema.columns):
        at = seats[column.kind]
        x = np.where(np.isnan(values[:, j]), 0.0, values[:, j])
        if column.kind == "real":
            shared = isinstance(family, SphericalParams)
            variance = family.variance[k] if shared else family.variance[k, at]
            term = stats.norm.logpdf(x, family.mean[k, at], np.sqrt(variance))
        elif column.kind == "binary":
            term = stats.bernoulli.logpmf(x, family.probability[k, at])
        elif column.kind == "count":
            term = stats.poisson.logpmf(x, family.rate[k, at])
        else:
            term = np.log(family.level_probability[k, at + x.astype(int)])
        seats[column.kind] += column.n_levels or 1
        total += np.where(np.isnan(values[:, j]), 0.0, term)
    return total


def log_prob(story: Story, params: Params, values: Array) -> Array:
    """(n,) log-likelihood of each row; 0 where nothing is observed."""
    empty = np.isnan(values).all(axis=1)
    return np.where(empty, 0.0, special.logsumexp(log_joint(story, params, values), axis=1))


def responsibilities(story: Story, params: Params, values: Array) -> Array:
    """(n, K) `p(k | x_observed)`."""
    return np.asarray(special.softmax(log_joint(story, params, values), axis=1))


def conditional_moments(family: Any, k: int, x: Array) -> tuple[Array, Array]:
    """E[x] (d,) and E[x x'] (d, d) of one row given its observed entries and the component."""
    covariance, mean = covariance_of(family, k), family.mean[k]
    o = ~np.isnan(x)
    m = ~o
    first = x.copy()
    spread = np.zeros_like(covariance)
    gain = np.linalg.solve(covariance[np.ix_(o, o)], covariance[np.ix_(o, m)]).T
    first[m] = mean[m] + gain @ (x[o] - mean[o])
    spread[np.ix_(m, m)] = covariance[np.ix_(m, m)] - gain @ covariance[np.ix_(o, m)]
    return first, np.outer(first, first) + spread


def expected_objective(
    story: Story, params: Params, resp: Array, values: Array, weights: Array
) -> float:
    """`sum_n w_n sum_k r_nk log p(x_n, k)` over complete or independent entries."""
    total = 0.0
    for k in range(story.n_components):
        joint = np.log(params.weights[k]) + component_log_prob(story, params, k, values)
        total += float((weights * resp[:, k]) @ joint)
    return total


def prior_log_density(story: Story, params: Params) -> float:
    """Log prior density by scipy.stats, normalised where the library drops constants."""
    if story.prior is None:
        return 0.0
    k = story.n_components
    total = float(stats.dirichlet.logpdf(params.weights, np.full(k, 1 + 1 / k))) if k > 1 else 0.0
    if isinstance(story.family, Product):
        return total + sum(
            prior_log_density(alone, theta) - total for _, alone, theta in blocks_of(story, params)
        )
    prior: Any = story.family.prior
    family: Any = params.family
    if isinstance(family, FullParams | TiedParams):
        d = family.covariance.shape[-1]
        for covariance in family.covariance.reshape(-1, d, d):
            total += stats.invwishart.logpdf(covariance, prior.dof, np.diag(prior.scatter))
        for i in range(k):
            covariance = covariance_of(family, i) / prior.strength
            total += stats.multivariate_normal.logpdf(family.mean[i], prior.mean, covariance)
        return float(total)
    for i in range(k):
        shared = isinstance(family, SphericalParams)
        if len(family.mean[i]):
            variance = family.variance[i]
            scatter = prior.scatter.mean() if shared else prior.scatter
            total += np.sum(stats.invgamma.logpdf(variance, prior.dof / 2, scale=scatter / 2))
            deviation = np.sqrt(variance / prior.strength)
            total += np.sum(stats.norm.logpdf(family.mean[i], prior.mean, deviation))
        a = prior.rows
        total += np.sum(
            stats.beta.logpdf(
                family.probability[i], 1 + a * prior.probability, 1 + a * (1 - prior.probability)
            )
        )
        total += np.sum(stats.gamma.logpdf(family.rate[i], 1 + a * prior.rate, scale=1 / a))
        columns = story.family.level_column
        for j in np.unique(columns):
            of_column = columns == j
            total += stats.dirichlet.logpdf(
                family.level_probability[i, of_column],
                1 + a * prior.level_probability[of_column],
            )
    return float(total)


class Coordinates:
    """Unconstrained coordinates of a story's parameters, for scipy.optimize."""

    def __init__(self, story: Story) -> None:
        self.story = story
        self.k, self.d = story.n_components, story.schema.n_features
        self.kind = story.family.params_type
        self.blocks: list[tuple[Coordinates, int]] = []
        if isinstance(story.family, Product):
            params = random_params(story, np.random.default_rng(0))
            for _, alone, theta in blocks_of(story, params):
                block = Coordinates(alone)
                self.blocks.append((block, len(block.theta(theta)) - (self.k - 1)))

    def params(self, theta: Array) -> Params:
        """Parameters at unconstrained coordinates."""
        k, d = self.k, self.d
        at = 0

        def take(*shape: int) -> Array:
            nonlocal at
            size = int(np.prod(shape))
            at += size
            return theta[at - size : at].reshape(shape)

        weights = special.softmax(np.append(take(k - 1), 0.0))
        if self.blocks:
            even = np.zeros(k - 1)
            found = [b.params(np.append(even, take(size))).family for b, size in self.blocks]
            return Params(weights, self.kind(*found))
        if self.kind in (FullParams, TiedParams):
            mean = take(k, d)
            n = 1 if self.kind is TiedParams else k
            factor = np.zeros((n, d, d))
            lower = np.tril_indices(d)
            factor[:, lower[0], lower[1]] = take(n, len(lower[0]))
            diagonal = np.arange(d)
            factor[:, diagonal, diagonal] = np.exp(factor[:, diagonal, diagonal])
            covariance = factor @ factor.swapaxes(1, 2)
            if self.kind is TiedParams:
                covariance = covariance[0]
            return Params(weights, self.kind(mean, covariance))
        family: Any = self.story.family
        real = len(family.real)
        mean = take(k, real)
        variance = np.exp(take(k) if self.kind is SphericalParams else take(k, real))
        probability = special.expit(take(k, len(family.binary)))
        rate = np.exp(take(k, len(family.count)))
        level = np.empty((k, len(family.level_column)))
        for j in np.unique(family.level_column):
            of_column = family.level_column == j
            free = take(k, int(of_column.sum()) - 1)
            level[:, of_column] = special.softmax(np.column_stack([free, np.zeros(k)]), axis=1)
        return Params(weights, self.kind(mean, variance, probability, rate, level))

    def theta(self, params: Params) -> Array:
        """Coordinates of parameters: the inverse of `params`."""
        d = self.d
        parts = [np.log(params.weights[:-1] / params.weights[-1])]
        family: Any = params.family
        if self.blocks:
            for (block, _), theta in zip(self.blocks, family.blocks, strict=True):
                parts.append(block.theta(Params(params.weights, theta))[self.k - 1 :])
            return np.concatenate(parts)
        if self.kind in (FullParams, TiedParams):
            factor = np.linalg.cholesky(family.covariance.reshape(-1, d, d))
            diagonal = np.arange(d)
            factor[:, diagonal, diagonal] = np.log(factor[:, diagonal, diagonal])
            lower = np.tril_indices(d)
            parts += [family.mean, factor[:, lower[0], lower[1]]]
            return np.concatenate([np.ravel(p) for p in parts])
        parts += [
            family.mean,
            np.log(family.variance),
            special.logit(family.probability),
            np.log(family.rate),
        ]
        columns = self.story.family.level_column
        for j in np.unique(columns):
            level = family.level_probability[:, columns == j]
            parts.append(np.log(level[:, :-1] / level[:, -1:]))
        return np.concatenate([np.ravel(p) for p in parts])


def maximum(story: Story, objective: Any, start: Params) -> tuple[Params, float]:
    """Parameters and value at the local maximum of `objective(params)` reached from `start`."""
    coordinates = Coordinates(story)
    result = optimize.minimize(
        lambda theta: -objective(coordinates.params(theta)),
        coordinates.theta(start),
        method="L-BFGS-B",
        options={"maxiter": 5000, "maxfun": 200_000, "ftol": 1e-15, "gtol": 1e-9},
    )
    return coordinates.params(result.x), -float(result.fun)


def slope(story: Story, objective: Any, params: Params, step: float = 1e-5) -> Array:
    """Central differences of `objective` at `params` along unconstrained coordinates."""
    coordinates = Coordinates(story)
    theta = coordinates.theta(params)
    out = np.empty_like(theta)
    for i in range(len(theta)):
        move = np.zeros_like(theta)
        move[i] = step
        above = objective(coordinates.params(theta + move))
        below = objective(coordinates.params(theta - move))
        out[i] = (above - below) / (2 * step)
    return out


def distance(left: Any, right: Any) -> float:
    """Largest relative difference over the leaves of two records, each to its own size."""
    worst = 0.0
    for (name, _, a), (other, _, b) in zip(left.leaves(), right.leaves(), strict=True):
        assert name == other
        a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
        assert a.shape == b.shape, name
        if a.size:
            size = max(1e-12, float(np.abs(b).max()))
            worst = max(worst, float(np.abs(a - b).max()) / size)
    return worst


def identical(left: Any, right: Any) -> bool:
    """Whether all leaves of two records are equal to the bit."""
    mine, theirs = list(left.leaves()), list(right.leaves())
    return len(mine) == len(theirs) and all(
        a[0] == b[0] and np.asarray(a[2]).tobytes() == np.asarray(b[2]).tobytes()
        for a, b in zip(mine, theirs, strict=True)
    )


def finite(item: Any) -> bool:
    """Whether every number of a record is finite."""
    return all(np.isfinite(np.asarray(value, dtype=float)).all() for _, _, value in item.leaves())


def is_possible(story: Story, params: Params) -> bool:
    """Whether parameters are finite and define a distribution."""
    family: Any = params.family
    if not finite(params) or abs(params.weights.sum() - 1) > 1e-9 or (params.weights < 0).any():
        return False
    if isinstance(story.family, Product):
        return all(is_possible(alone, theta) for _, alone, theta in blocks_of(story, params))
    if isinstance(family, FullParams | TiedParams):
        covariance = family.covariance.reshape(-1, *family.covariance.shape[-2:])
        deviation = np.sqrt(np.diagonal(covariance, axis1=1, axis2=2))
        correlation = covariance / deviation[:, :, None] / deviation[:, None, :]
        return bool((np.linalg.eigvalsh(correlation) > 0).all())
    assert isinstance(family, ColumnsParams)
    return bool(
        (family.variance > 0).all()
        and (family.rate >= 0).all()
        and ((family.probability >= 0) & (family.probability <= 1)).all()
        and (family.level_probability >= 0).all()
    )
