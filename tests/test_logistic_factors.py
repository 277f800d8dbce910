"""Binary factor models: the bound against quadrature, ascent, recovery, gaps and what is drawn."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import special

from genstream.families.logistic_factors import LogisticFactors, LogisticParams
from genstream.rows import Rows
from genstream.schema import Column, Schema
from genstream.story import Params, Story

Array = Any


def schema(d: int) -> Schema:
    return Schema(tuple(Column(f"x{j}", "binary") for j in range(d)))


def story(d: int, q: int, k: int = 1, dtype: str = "float64", **options: Any) -> Story:
    return Story(schema(d), LogisticFactors(schema(d), q, dtype), k, **options)


def params(of: Story, rng: np.random.Generator, size: float = 1.5) -> Params:
    k, d, q = of.n_components, of.schema.n_features, of.n_factors
    family = LogisticParams(rng.normal(0, 1, (k, d)), rng.normal(0, size, (k, d, q)))
    return Params(rng.dirichlet(np.full(k, 8.0)), family)


def gappy(values: Array, share: float, rng: np.random.Generator) -> Array:
    return np.where(rng.random(values.shape) < share, np.nan, values)


def grid(q: int, width: float = 8.0) -> tuple[Array, Array]:
    """Points and log-weights of the trapezoid rule for a mean over N(0, I_q)."""
    line = np.linspace(-width, width, 401 if q == 1 else 49)
    points = np.stack(np.meshgrid(*[line] * q, indexing="ij"), axis=-1).reshape(-1, q)
    log_weight = -0.5 * (points**2).sum(axis=1)
    return points, log_weight - special.logsumexp(log_weight)


def log_given(theta: Any, k: int, values: Array, points: Array) -> Array:
    """(n, points) log p(x_observed | k, t)."""
    a = theta.bias[k] + points @ theta.loadings[k].T
    x = np.nan_to_num(values)[:, None, :]
    each = x * special.log_expit(a) + (1 - x) * special.log_expit(-a)
    return np.where(np.isnan(values)[:, None, :], 0.0, each).sum(axis=2)


def exact(of: Story, theta: Params, values: Array) -> Array:
    """(n,) log p(x_observed) by quadrature."""
    points, log_weight = grid(of.n_factors)
    each = [
        np.log(theta.weights[k])
        + special.logsumexp(log_given(theta.family, k, values, points) + log_weight, axis=1)
        for k in range(of.n_components)
    ]
    return special.logsumexp(each, axis=0)


class TestBound:
    @pytest.mark.parametrize("q, k", [(1, 1), (2, 1), (1, 3)])
    def test_below_the_log_likelihood_and_near_it(self, q: int, k: int) -> None:
        rng = np.random.default_rng(1)
        of = story(6, q, k)
        theta = params(of, rng)
        values = gappy(of.draw(theta, 200, rng).values, 0.2, rng)
        truth = exact(of, theta, values)
        found = of.log_prob(theta, Rows.of(values))
        assert of.bound
        assert (found <= truth + 1e-9).all()
        assert (truth - found).mean() < 0.4
        # Small loadings leave little to bound.
        faint = replace(theta, family=replace(theta.family, loadings=0.1 * theta.family.loadings))
        gap = exact(of, faint, values) - of.log_prob(faint, Rows.of(values))
        assert (gap > -1e-9).all()
        assert gap.mean() < 0.01
