"""Real columns with detection limits: what is known of an entry beyond one is only that."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import laws
import numpy as np
import oracles
import pytest
from numpy.typing import NDArray
from scipy import optimize, special, stats

from genstream.errors import ConfigError
from genstream.families.columns import ColumnsParams, IndependentColumns
from genstream.families.product import Product
from genstream.learn import BatchEM, FitState, Resident, fit
from genstream.rows import Rows
from genstream.schema import Column, Schema
from genstream.stories import Block, mixture
from genstream.story import Params, Story

Array = NDArray[Any]
SCHEMA = Schema(
    (
        Column("dose", lower=0.1),
        Column("plain"),
        Column("scale", lower=-1.0, upper=1.5),
        Column("range", upper=2.0),
    )
)


def told(
    kind: str = "diag", n_rows: int = 200, gaps: float = 0.25, k: int = 2, **options: Any
) -> tuple[Story, Params, Array]:
    """An anchored story over SCHEMA, parameters, and rows with about a third censored."""
    rng = np.random.default_rng(1)
    story = mixture(SCHEMA, k, covariance="diag", **options)
    variance = rng.uniform(0.5, 1.5, (k, 4))
    if kind != "diag":
        family = IndependentColumns(SCHEMA, True, dtype=story.dtype, shared=kind == "shared")
        story = replace(story, family=family)
        variance = np.full(k, 0.8) if kind == "shared" else variance[:, 0]
    none = np.empty((k, 0))
    theta = story.family.params_type(rng.normal(0.5, 0.9, (k, 4)), variance, none, none, none)
    params = Params(rng.dirichlet(np.full(k, 8.0)), theta)
    values = oracles.with_gaps(story.draw(params, n_rows, rng).values, gaps, rng)
    if gaps:
        values[2] = np.nan
    return story.anchored(Rows.of(values)), params, values


def log_joint(params: Params, values: Array) -> Array:
    """(n, K) by scipy.stats: a density between limits, a probability at one."""
    theta: Any = params.family
    out = np.tile(np.log(params.weights), (len(values), 1))
    for k in range(out.shape[1]):
        for j, column in enumerate(SCHEMA.columns):
            variance = theta.variance[k] if theta.variance.ndim == 1 else theta.variance[k, j]
            normal = stats.norm(theta.mean[k, j], np.sqrt(variance))
            x = values[:, j]
            term = normal.logpdf(x)
            if column.lower is not None:
                term = np.where(x <= column.lower, normal.logcdf(column.lower), term)
            if column.upper is not None:
                term = np.where(x >= column.upper, normal.logsf(column.upper), term)
            out[:, k] += np.where(np.isnan(x), 0.0, term)
    return out


def moved(family: Any, rng: np.random.Generator, size: float) -> Any:
    variance = family.variance * np.exp(size * rng.normal(size=family.variance.shape))
    if variance.ndim == 1 and (family.variance == family.variance[0]).all():
        variance = np.full_like(variance, variance[0])
    return replace(
        family, mean=family.mean + size * rng.normal(size=family.mean.shape), variance=variance
    )


KINDS = ("diag", "spherical", "shared")


@pytest.mark.parametrize("kind", KINDS)
class TestLaws:
    @pytest.mark.parametrize("gaps", [0.0, 0.3])
    @pytest.mark.parametrize("dtype", ["float64", "float32"])
    def test_density(self, kind: str, dtype: str, gaps: float) -> None:
        story, params, values = told(kind, gaps=gaps, dtype=dtype)
        joint = log_joint(params, values)
        empty = np.isnan(values).all(axis=1)
        expected = np.where(empty, 0.0, special.logsumexp(joint, axis=1))
        # 0.1 is another number in float32, and is a limit all the same.
        rows = Rows.of(values.astype(dtype))
        tolerance = 1e-11 if dtype == "float64" else 2e-5
        np.testing.assert_allclose(
            story.log_prob(params, rows), expected, rtol=tolerance, atol=tolerance
        )

    @pytest.mark.parametrize("gaps", [0.0, 0.3])
    def test_stored_and_loaded(self, kind: str, gaps: float) -> None:
        laws.stored_and_read(*told(kind, gaps=gaps))
        laws.loads_what_blocks_hold(*told(kind, gaps=gaps))

    @pytest.mark.parametrize("prior", ["weak", None])
    def test_never_falls(self, kind: str, prior: str | None) -> None:
        laws.never_falls_however_learned(*told(kind, prior=prior))

    @pytest.mark.parametrize("prior", ["weak", None])
    def test_m_step_is_the_maximum_given_what_is_frozen(self, kind: str, prior: str | None) -> None:
        story, params, values = told(kind, prior=prior)
        sums = story.e_step(params, Rows.of(values))
        for frozen in ((), ("mean",), ("variance",)):
            laws.maximises(story, params, sums, moved, frozen)

    def test_conditions_and_marginals(self, kind: str) -> None:
        story, params, values = told(kind, 12, 0.0)
        laws.factorises(story, params, values, ["dose", "scale"])
        laws.marginal_is_what_gaps_leave(story, params, values)

    def test_gaps_are_filled_with_what_would_be_recorded(self, kind: str) -> None:
        story, params, values = told(kind, gaps=0.0)
        theta: Any = params.family
        for missing in ([0, 2], [3], [0, 1, 2, 3]):
            x = values[5].copy()
            x[missing] = np.nan
            resp = special.softmax(log_joint(params, x[None]), axis=1)[0]
            means = np.zeros(4)
            for k in range(2):
                for j, column in enumerate(SCHEMA.columns):
                    shared = theta.variance.ndim == 1
                    sd = np.sqrt(theta.variance[k] if shared else theta.variance[k, j])
                    grid = theta.mean[k, j] + sd * stats.norm.ppf((np.arange(200_000) + 0.5) / 2e5)
                    low = -np.inf if column.lower is None else column.lower
                    high = np.inf if column.upper is None else column.upper
                    means[j] += resp[k] * np.clip(grid, low, high).mean()
            filled = story.impute(params, Rows.of(x[None]))[0]
            np.testing.assert_allclose(filled[missing], means[missing], atol=1e-4)
            laws.fills_with_what_it_would_draw(story, params, x, filled)


class TestMoments:
    @pytest.mark.parametrize("mean", [-60.0, -2.0, 0.3, 7.0, 3e3, 1e6])
    def test_sums_are_those_of_truncated_normals(self, mean: float) -> None:
        """One row below a limit, one above it, one between, and one that is missing."""
        schema = Schema((Column("x", lower=-1.0, upper=2.0),))
        story = mixture(schema, 1, prior=None)
        none = np.empty((1, 0))
        sd = 1.3
        theta = ColumnsParams(np.array([[mean]]), np.array([[sd**2]]), none, none, none)
        params = Params(np.ones(1), theta)

        def sums(x: float) -> Any:
            return story.e_step(params, Rows.of([[x], [np.nan]])).family

        for x in (-1.0, -7.0):
            found = sums(x)
            first, second = self.moments(mean, sd, -np.inf, -1.0)
            assert found.sum_real[0, 0] == pytest.approx(first, rel=1e-7)
            assert found.sum_square[0, 0] == pytest.approx(second, rel=1e-7)
        found = sums(2.0)
        first, second = self.moments(mean, sd, 2.0, np.inf)
        assert found.sum_real[0, 0] == pytest.approx(first, rel=1e-7)
        assert found.sum_square[0, 0] == pytest.approx(second, rel=1e-7)
        assert (sums(0.5).sum_real, sums(0.5).sum_square, sums(0.5).sum_w) == (0.5, 0.25, 1.0)

    def moments(self, mean: float, sd: float, low: float, high: float) -> tuple[float, float]:
        """First two moments of a truncated normal, by quadrature in a variable that is of order 1
        where the density is.
        """
        edge = high if np.isfinite(high) else low
        sign = -1.0 if np.isfinite(high) else 1.0
        depth = sign * (edge - mean) / sd
        width = sd / max(1.0, depth)
        if depth < 0:
            t = np.linspace(0, -depth + 12, 400_001) * sd / width
        else:
            t = np.linspace(0, 60, 400_001)
        u = edge + sign * width * t
        log_p = -0.5 * ((u - mean) / sd) ** 2
        p = np.exp(log_p - log_p.max())
        total = np.trapezoid(p, t)
        return np.trapezoid(p * u, t) / total, np.trapezoid(p * u**2, t) / total

    def test_a_mean_far_out_is_scored_by_distances(self) -> None:
        """In raw coordinates the quadratic form would have no digits left."""
        shift = 1e9
        schema = Schema((Column("x", lower=shift - 1.0, upper=shift + 1.5), Column("y")))
        none = np.empty((1, 0))
        theta = ColumnsParams(np.array([[shift, 0.0]]), np.array([[1.0, 1.0]]), none, none, none)
        params = Params(np.ones(1), theta)
        story = mixture(schema, 1)
        x = shift + np.array([-3.0, -1.0, 0.25, 1.0, 1.5, 4.0, np.nan])
        values = np.column_stack([x, np.linspace(-1, 1, 7)])
        for part in (values, values[:-1]):
            far = story.log_prob(params, Rows.of(part))
            near = story.anchored(Rows.of(part)).log_prob(params, Rows.of(part))
            np.testing.assert_allclose(far, near, atol=1e-6)


class TestLearning:
    @pytest.mark.parametrize("prior", ["weak", None])
    def test_em_ends_where_direct_maximisation_does(self, prior: str | None) -> None:
        story, params, values = told(n_rows=300, gaps=0.2, prior=prior)
        weights = np.random.default_rng(2).uniform(0.5, 1.5, len(values))
        rows = Rows.of(values, weights)
        learner = BatchEM(800, 1e-12, accelerate=True)
        found = fit(story, learner, Resident(rows), FitState(params)).params

        def at(theta: Array) -> Params:
            mean, variance = theta[1:9].reshape(2, 4), np.exp(theta[9:]).reshape(2, 4)
            return Params(
                special.softmax([theta[0], 0.0]),
                replace(params.family, mean=mean, variance=variance),  # type: ignore[type-var]
            )

        def value(theta: Array) -> float:
            candidate = at(theta)
            return float(weights @ story.log_prob(candidate, rows)) + story.log_prior(candidate)

        theta: Any = found.family
        odds = np.log(found.weights[:1] / found.weights[1])
        start = np.concatenate([odds, theta.mean.ravel(), np.log(theta.variance).ravel()])
        result = optimize.minimize(
            lambda t: -value(t), start, method="BFGS", options={"gtol": 1e-6}
        )
        assert -result.fun <= value(start) + 1e-4
        again: Any = at(result.x).family
        np.testing.assert_allclose(theta.mean, again.mean, atol=0.02)

    def test_what_was_drawn_is_recovered_from_what_was_recorded(self) -> None:
        story, truth, _ = told(prior=None)
        found = laws.recovers(story, truth, 30_000, steps=200)
        one: Any = found.family
        two: Any = truth.family
        np.testing.assert_allclose(one.mean, two.mean, atol=0.12)
        np.testing.assert_allclose(one.variance, two.variance, rtol=0.15)

    def test_taken_as_they_are_the_limits_would_bias_the_mean(self) -> None:
        rng = np.random.default_rng(0)
        latent = rng.normal(0.0, 1.0, 20_000)
        x = np.maximum(latent, 0.2)[:, None]
        found = []
        for lower in (None, 0.2):
            story = mixture(Schema((Column("x", lower=lower),)), 1, covariance="diag", prior=None)
            story = story.anchored(Rows.of(x))
            learner = BatchEM(300, 1e-10, accelerate=True)
            state = fit(story, learner, Resident(Rows.of(x)), FitState(story.vague()))
            theta: Any = state.params.family
            found.append((theta.mean[0, 0], theta.variance[0, 0]))
        assert found[0][0] > 0.4
        assert found[1] == pytest.approx((0.0, 1.0), abs=0.05)

    def test_a_column_that_is_censored_throughout(self) -> None:
        values = np.column_stack([np.full(50, 0.05), np.random.default_rng(0).normal(size=(50, 3))])
        for prior in ("weak", None):
            story = mixture(SCHEMA, 2, prior=prior).anchored(Rows.of(values))
            params = laws.never_falls(story, story.vague(), values, steps=60)
            assert np.isfinite(story.log_prob(params, Rows.of(values))).all()


class TestSchema:
    def test_limits_belong_to_real_columns_and_are_in_order(self) -> None:
        for kind in ("binary", "count"):
            with pytest.raises(ConfigError, match="has no limits"):
                Column("x", kind, lower=0.0)  # type: ignore[arg-type]
        for lower, upper in ((1.0, 1.0), (2.0, 1.0), (np.nan, None), (None, np.inf)):
            with pytest.raises(ConfigError, match="limits"):
                Column("x", lower=lower, upper=upper)

    def test_json_says_limits_where_there_are_any(self) -> None:
        assert Schema.from_json(SCHEMA.to_json()) == SCHEMA
        told = SCHEMA.to_json()
        assert (told[0]["lower"], told[2]["upper"]) == (0.1, 1.5)
        assert set(told[1]) == {"name", "kind", "levels", "unit"}

    def test_builders_keep_limited_columns_apart(self) -> None:
        assert isinstance(mixture(SCHEMA, 2).family, IndependentColumns)
        wide = Schema((*SCHEMA.columns, Column("other")))
        product = mixture(wide, 2, covariance="full").family
        assert isinstance(product, Product)
        assert [(p.columns, p.family.name) for p in product.parts] == [
            ((0, 2, 3), "columns"),
            ((1, 4), "gaussian"),
        ]
        with pytest.raises(ConfigError, match="'dose' has limits"):
            mixture(SCHEMA, 2, blocks=[Block(("dose", "plain"), "full")])
