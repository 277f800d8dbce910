"""Data drawn from a story whose parameters are known, and how well a fit recovers them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from flows.config import Drawn
from genstream.dreams import draws
from genstream.families.columns import ColumnsParams
from genstream.families.gaussian import FullParams
from genstream.rows import Rows
from genstream.schema import Schema
from genstream.sources import CHUNK_ROWS
from genstream.stories import mixture
from genstream.story import Params, Story

Array = NDArray[Any]


def known_story(drawn: Drawn) -> tuple[Story, Params]:
    """The story that data are drawn from, and its parameters.

    Weights are Dirichlet(10). Means are normal with standard deviation `separation` in every
    column. Each component has its own covariance: a random rotation (none for `diag`) of
    variances that are log-uniform in [1/4, 4], scaled to mean 1.
    """
    rng = np.random.default_rng([drawn.seed, 0])
    k, d = drawn.n_components, drawn.n_features
    weights = rng.dirichlet(np.full(k, 10.0))
    means = drawn.separation * rng.standard_normal((k, d))
    variances = 4.0 ** rng.uniform(-1.0, 1.0, (k, d))
    variances /= variances.mean(axis=1, keepdims=True)
    story = mixture(Schema.real(d), k, covariance=drawn.covariance, prior=None)
    if drawn.covariance == "diag":
        none = np.empty((k, 0))
        family: Any = ColumnsParams(means, variances, none, none, none)
    else:
        rotations = np.linalg.qr(rng.standard_normal((k, d, d)))[0]
        family = FullParams(means, (rotations * variances[:, None, :]) @ rotations.swapaxes(1, 2))
    return story, Params(weights, family)


def n_rows(drawn: Drawn, dtype: str) -> int:
    """Rows whose values take `gigabytes` (of 2^30 bytes) in numbers of type `dtype`."""
    return max(1, int(drawn.gigabytes * 2**30 / (drawn.n_features * np.dtype(dtype).itemsize)))


def draw_rows(
    drawn: Drawn, dtype: str, *, workers: int = 2, chunk_rows: int = CHUNK_ROWS
) -> Iterator[Rows]:
    """The rows, a chunk at a time; a chunk depends on nothing but its number and the seed."""
    story, params = known_story(drawn)
    total = n_rows(drawn, dtype)
    for piece in draws(story, params, total, (drawn.seed, 1), chunk_rows, workers=workers):
        yield Rows(piece.values.astype(dtype))


@dataclass(frozen=True)
class Recovery:
    """Distance of fitted parameters from those the data were drawn from.

    Components are matched so that the sum of the distances of their means is least. `mean` is the
    largest distance of a mean from the true one, in standard deviations of the true component;
    `covariance` the largest relative error of a covariance (Frobenius norm); `weight` the largest
    difference of a mixing weight. `matched` of the `n_components` true components have a fitted
    mean within a tenth of a standard deviation.
    """

    n_components: int
    matched: int
    mean: float
    covariance: float
    weight: float

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "n_components": self.n_components,
            "matched": self.matched,
            "mean": self.mean,
            "covariance": self.covariance,
            "weight": self.weight,
        }


def recovery(drawn: Drawn, fitted: Params) -> Recovery:
    """How far `fitted` is from the parameters of `known_story`, over the components matched."""
    _, truth = known_story(drawn)
    mean, covariance = _moments(truth, drawn.n_features)
    other, other_covariance = _moments(fitted, drawn.n_features)
    whiten = np.linalg.inv(np.linalg.cholesky(covariance))
    difference = other[None] - mean[:, None]
    distance = np.linalg.norm(np.einsum("kij,klj->kli", whiten, difference), axis=2)
    mine, theirs = linear_sum_assignment(distance)
    apart = distance[mine, theirs]
    error = np.linalg.norm(other_covariance[theirs] - covariance[mine], axis=(1, 2))
    relative = error / np.linalg.norm(covariance[mine], axis=(1, 2))
    return Recovery(
        drawn.n_components,
        int((apart < 0.1).sum()),
        float(apart.max()),
        float(relative.max()),
        float(np.abs(fitted.weights[theirs] - truth.weights[mine]).max()),
    )


def _moments(params: Params, d: int) -> tuple[Array, Array]:
    """Means (K, d) and covariances (K, d, d) of a mixture over real columns."""
    family: Any = params.family
    k = len(params.weights)
    if hasattr(family, "covariance"):
        return family.mean, np.broadcast_to(family.covariance, (k, d, d))
    variance = family.variance if family.variance.ndim == 2 else family.variance[:, None]
    return family.mean, np.broadcast_to(variance, (k, d))[:, :, None] * np.eye(d)
