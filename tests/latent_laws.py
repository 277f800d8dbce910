"""What the factor models with a bound have in common, judged by quadrature over their factors.

A `Model` says how to make a story and parameters, and where and how heavily to sum over factors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special

from genstream.story import Params, Story

Array = NDArray[Any]


@dataclass(frozen=True)
class Model:
    """One kind of factor model.

    `story(d, q, k, **options)`; `params(story, rng)`; `grid(params, k)` points (p, q) and
    log-weights (p,) of a sum over the factors' prior; `log_given(params, k, values, points)`
    (n, p) `log p(x_observed | k, t)`; `expected(params, k, points)` (p, d) `E[x | k, t]`.
    """

    story: Callable[..., Story]
    params: Callable[..., Params]
    grid: Callable[[Any, int], tuple[Array, Array]]
    log_given: Callable[[Any, int, Array, Array], Array]
    expected: Callable[[Any, int, Array], Array]

    def log_joint(self, params: Params, values: Array) -> Array:
        """(K, n) `log weight_k + log p(x_observed | k)`."""
        each = []
        for k in range(len(params.weights)):
            points, log_weight = self.grid(params.family, k)
            inside = self.log_given(params.family, k, values, points) + log_weight
            each.append(np.log(params.weights[k]) + special.logsumexp(inside, axis=1))
        return np.array(each)

    def log_prob(self, params: Params, values: Array) -> Array:
        """(n,) `log p(x_observed)`."""
        return special.logsumexp(self.log_joint(params, values), axis=0)

    def posterior(self, params: Params, k: int, values: Array) -> tuple[Array, Array]:
        """(n, q) mean of the factors and (n, d) of the columns, given what is observed."""
        points, log_weight = self.grid(params.family, k)
        inside = self.log_given(params.family, k, values, points) + log_weight
        chance = special.softmax(inside, axis=1)
        return chance @ points, chance @ self.expected(params.family, k, points)


def product_grid(lines: list[Array], log_weights: list[Array]) -> tuple[Array, Array]:
    """Points and normalised log-weights of every combination of points on lines."""
    points = np.stack(np.meshgrid(*lines, indexing="ij"), axis=-1).reshape(-1, len(lines))
    total = np.zeros(())
    for line in log_weights:
        total = np.add.outer(total, line - special.logsumexp(line))
    return points, np.ravel(total)
