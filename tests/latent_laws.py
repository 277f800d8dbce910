"""What the factor models with a bound have in common, judged by quadrature over their factors.

A `Model` says how to make a story and parameters, and where and how heavily to sum over factors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import oracles
from numpy.typing import NDArray
from scipy import special

from genstream.incremental import IncrementalEM
from genstream.learn import ROUNDING, BatchEM, Learner, Outcome, fit
from genstream.online import OnlineEM
from genstream.passes import Passes
from genstream.responsibility import Sampled, Truncated
from genstream.sources import NumpySource
from genstream.start import warm_start
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


# Every way of learning, and whether its trace climbs.
LEARNERS: tuple[tuple[Learner, bool], ...] = (
    (BatchEM(8, 0.0, accelerate=True), True),
    (BatchEM(5, 0.0, responsibility=Truncated(1)), True),
    (BatchEM(5, 0.0, responsibility=Sampled(5)), False),
    (IncrementalEM(3, 0.0, tasks=3, group=1), True),
    (OnlineEM(batch_rows=40, buffer_chunks=2), False),
)


def learns_every_way(story: Story, values: Array, weights: Array) -> None:
    """Every learner ends with finite parameters, and those that climb never fall; in threads they
    come to the same bits.
    """
    source = NumpySource(values, story.schema, weights, 40)
    begun, state = warm_start(story, Passes(source), n_init=1, short_steps=1, long_steps=1)
    for learner, climbs in LEARNERS:
        ends = [fit(begun, learner, Passes(source, workers=n), state) for n in (1, 2)]
        assert oracles.identical(ends[0].params, ends[1].params)
        assert oracles.finite(ends[0].params)
        assert ends[0].outcome in (Outcome.MAX_STEPS, Outcome.CONVERGED)
        trace = np.array([info.mean_objective for info in ends[0].trace])
        slack = ROUNDING[story.dtype] * (1 + abs(trace[-1]))
        assert not climbs or ends[0].events or np.diff(trace).min() >= -slack
