"""Counts that Poisson columns do not fit: negative binomial and zero-inflated ones."""

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
from genstream.families.gaussian import FullParams, Gaussian
from genstream.families.multinomial import Multinomial, MultinomialParams
from genstream.families.negative_binomial import (
    SHAPES,
    NegativeBinomial,
    NegativeBinomialParams,
    _log_minus_psi,
    _log_rising,
    _psi_rising,
    inverse_log_minus_psi,
)
from genstream.families.product import Part, Product
from genstream.families.zero_inflated import ZeroInflated, ZeroInflatedParams
from genstream.learn import BatchEM, FitState, Resident, fit
from genstream.rows import Rows
from genstream.schema import Column, Schema
from genstream.start import params_from_labels
from genstream.story import Params, Story

Array = NDArray[Any]
FAMILIES = ("negative_binomial", "zero_inflated")


def make(kind: str, k: int = 3, d: int = 3, prior: str | None = "weak", **options: Any) -> Story:
    """A story of d count columns of one of FAMILIES."""
    schema = Schema(tuple(Column(f"c{j}", "count") for j in range(d)))
    if kind == "zero_inflated":
        return Story(schema, ZeroInflated(schema, **options), k, prior)
    return Story(schema, NegativeBinomial(schema, **options), k, prior)


def some_params(story: Story, seed: int = 0) -> Params:
    rng = np.random.default_rng(seed)
    k, d = story.n_components, story.schema.n_features
    weights = rng.dirichlet(np.full(k, 8.0))
    rate = rng.uniform(1, 4, (k, d)) * 3.0 ** rng.permuted(np.tile(np.arange(k), (d, 1)), axis=1).T
    if isinstance(story.family, ZeroInflated):
        return Params(weights, ZeroInflatedParams(rate, rng.uniform(0.1, 0.6, (k, d))))
    return Params(weights, NegativeBinomialParams(rate, np.exp(rng.normal(0.7, 0.8, (k, d)))))


def entry_log_prob(params: Params, k: int, j: int, x: Array) -> Array:
    """`log p(x_j | k)` by scipy.stats."""
    family: Any = params.family
    m = family.rate[k, j]
    if isinstance(family, ZeroInflatedParams):
        q = family.inflation[k, j]
        return np.log(np.where(x == 0, q, 0.0) + (1 - q) * stats.poisson.pmf(x, m))
    a = family.shape[k, j]
    return np.asarray(stats.nbinom.logpmf(x, a, a / (a + m)))


def log_joint(params: Params, values: Array) -> Array:
    """(n, K) entry by entry; NaN marks a gap."""
    out = np.tile(np.log(params.weights), (len(values), 1))
    for k in range(out.shape[1]):
        for j in range(values.shape[1]):
            seen = ~np.isnan(values[:, j])
            out[seen, k] += entry_log_prob(params, k, j, values[seen, j])
    return out


def told(
    kind: str, n_rows: int = 150, gaps: float = 0.3, **options: Any
) -> tuple[Story, Params, Array]:
    story = make(kind, **options)
    params = some_params(story)
    rng = np.random.default_rng(1)
    values = oracles.with_gaps(story.draw(params, n_rows, rng).values, gaps, rng)
    if gaps:
        values[4] = np.nan
    return story.anchored(Rows.of(values).check(story.schema)), params, values


def moved(family: Any, rng: np.random.Generator, size: float) -> Any:
    rate = family.rate * np.exp(size * rng.normal(size=family.rate.shape))
    step = size * rng.normal(size=rate.shape)
    if isinstance(family, ZeroInflatedParams):
        logit = special.logit(np.clip(family.inflation, 1e-9, 1 - 1e-9))
        return ZeroInflatedParams(rate, special.expit(logit + step))
    return NegativeBinomialParams(rate, family.shape * np.exp(step))


@pytest.mark.parametrize("kind", FAMILIES)
class TestBoth:
    @pytest.mark.parametrize("dtype", ["float64", "float32"])
    @pytest.mark.parametrize("gaps", [0.0, 0.4])
    def test_density(self, kind: str, gaps: float, dtype: str) -> None:
        story, params, values = told(kind, 300, gaps, dtype=dtype)
        rows = Rows.of(values.astype(dtype))
        joint = log_joint(params, values)
        empty = np.isnan(values).all(axis=1)
        expected = np.where(empty, 0.0, special.logsumexp(joint, axis=1))
        tolerance = 1e-11 if dtype == "float64" else 1e-5
        np.testing.assert_allclose(
            story.log_prob(params, rows), expected, rtol=tolerance, atol=tolerance
        )
        np.testing.assert_allclose(
            story.infer(params, rows).responsibilities,
            special.softmax(joint, axis=1),
            atol=tolerance,
        )

    def test_probabilities_of_all_counts_sum_to_one(self, kind: str) -> None:
        story = make(kind, 2, 1)
        log_prob = story.log_prob(some_params(story), Rows.of(np.arange(4000.0)[:, None]))
        assert special.logsumexp(log_prob) == pytest.approx(0.0, abs=1e-9)

    @pytest.mark.parametrize("gaps", [0.0, 0.4])
    def test_stored_and_loaded(self, kind: str, gaps: float) -> None:
        laws.stored_and_read(*told(kind, gaps=gaps))
        laws.loads_what_blocks_hold(*told(kind, gaps=gaps))
        laws.loads_more_than_a_block_holds(*told(kind, gaps=gaps))
        laws.mends(*told(kind, gaps=gaps))
        laws.mends(*told(kind, gaps=gaps, prior=None))

    @pytest.mark.parametrize("prior", ["weak", None])
    def test_never_falls(self, kind: str, prior: str | None) -> None:
        laws.never_falls_however_learned(*told(kind, prior=prior))

    @pytest.mark.parametrize("prior", ["weak", None])
    def test_m_step_is_the_maximum_given_what_is_frozen(self, kind: str, prior: str | None) -> None:
        story, params, values = told(kind, prior=prior)
        rng = np.random.default_rng(1)
        weights = rng.uniform(0, 2, len(values))
        sums = story.e_step(params, Rows.of(values, weights))
        for frozen in ((), *((name,) for name in story.family.param_names)):
            laws.maximises(story, params, sums, moved, frozen)

    def test_conditions_and_marginals(self, kind: str) -> None:
        story, params, values = told(kind, 12, 0.0)
        laws.factorises(story, params, values, ["c1"])
        laws.factorises(story, params, values, ["c2", "c0"])
        laws.marginal_is_what_gaps_leave(story, params, values)

    def test_gaps_are_filled(self, kind: str) -> None:
        story, params, values = told(kind, gaps=0.0)
        for missing in ([0], [1, 2], [0, 1, 2]):
            x = values[3].copy()
            x[missing] = np.nan
            resp = special.softmax(log_joint(params, x[None]), axis=1)[0]
            laws.fills_with_what_it_would_draw(
                story, params, x, resp @ story.family.mean(params.family)
            )

    @pytest.mark.parametrize("prior", ["weak", None])
    def test_em_ends_where_direct_maximisation_does(self, kind: str, prior: str | None) -> None:
        """Observed-data likelihood with gaps and weights, by a general optimiser; EM as learners
        run it, with extrapolated statistics.
        """
        story, params, values = told(kind, 250, 0.2, k=2, d=2, prior=prior)
        weights = np.random.default_rng(2).uniform(0.5, 1.5, len(values))
        rows = Rows.of(values, weights)
        learner = BatchEM(500, 1e-11, accelerate=True)
        found = fit(story, learner, Resident(rows), FitState(params)).params
        shape = (2, 2)

        def at(theta: Array) -> Params:
            w = special.softmax([theta[0], 0.0])
            return Params(
                w, self.params_at(kind, theta[1:5].reshape(shape), theta[5:].reshape(shape))
            )

        def value(theta: Array) -> float:
            candidate = at(theta)
            total = weights @ story.log_prob(candidate, rows)
            return float(total) + story.log_prior(candidate)

        theta = self.theta_of(kind, found)
        result = optimize.minimize(
            lambda t: -value(t), theta, method="BFGS", options={"gtol": 1e-6}
        )
        assert -result.fun <= value(theta) + 1e-4
        again = at(result.x)
        np.testing.assert_allclose(
            story.family.mean(found.family), story.family.mean(again.family), rtol=5e-3
        )

    def params_at(self, kind: str, one: Array, two: Array) -> Any:
        if kind == "zero_inflated":
            return ZeroInflatedParams(np.exp(one), special.expit(two))
        return NegativeBinomialParams(np.exp(one), np.exp(two))

    def theta_of(self, kind: str, params: Params) -> Array:
        family: Any = params.family
        if kind == "zero_inflated":
            other = special.logit(np.clip(family.inflation, 1e-6, None))
        else:
            other = np.log(family.shape)
        odds = np.log(params.weights[:1] / params.weights[1])
        return np.concatenate([odds, np.log(family.rate).ravel(), other.ravel()])

    def test_what_was_drawn_is_recovered(self, kind: str) -> None:
        story = make(kind, 2, 2, prior=None)
        truth = some_params(story, seed=4)
        draw = story.draw(truth, 20_000, np.random.default_rng(3))
        start = params_from_labels(
            story.anchored(Rows.of(draw.values)),
            Rows.of(draw.values),
            draw.component,
            np.random.default_rng(0),
        )
        found = laws.recovers(story, truth, 20_000, start)
        np.testing.assert_allclose(found.weights, truth.weights, atol=0.02)
        for name in story.family.param_names:
            np.testing.assert_allclose(
                getattr(found.family, name), getattr(truth.family, name), rtol=0.15, atol=0.02
            )

    def test_a_component_without_rows(self, kind: str) -> None:
        for prior in ("weak", None):
            story, params, values = told(kind, prior=prior)
            resp = np.zeros((len(values), 3))
            resp[:, 0] = 1.0
            new, faulty = story.maximise(story.e_step(params, Rows.of(values), resp), params)
            assert oracles.finite(new)
            assert faulty.tolist() == ([False] * 3 if prior else [False, True, True])

    def test_only_counts(self, kind: str) -> None:
        with pytest.raises(ConfigError, match="'x' is real"):
            type(make(kind).family)(Schema((Column("x"),)))  # type: ignore[call-arg]


class TestNegativeBinomial:
    def test_functions_of_the_shape(self) -> None:
        for a in (1e-3, 0.5, 99.9, 100.1, 3e4, 1e8):
            c = _log_minus_psi(np.array(a))
            expected = np.log(a) - special.psi(a) if a < 1e3 else 1 / (2 * a) + 1 / (12 * a * a)
            assert c == pytest.approx(expected, rel=1e-11)
            assert inverse_log_minus_psi(np.array([c]))[0] == pytest.approx(a, rel=1e-10)
        np.testing.assert_array_equal(inverse_log_minus_psi(np.array([-1.0, 1e9])), SHAPES[::-1])
        shapes = np.array([0.01, 3.0, 150.0, 1e6])
        for x in (np.arange(41.0), np.array([0.0, 1.0, 40.0, 1e4])):
            found, psi = _log_rising(shapes, x), _psi_rising(shapes, x)
            for k, a in enumerate(shapes):
                exact = [np.log1p(np.arange(n) / a).sum() for n in x]
                np.testing.assert_allclose(found[k], exact, rtol=1e-10, atol=1e-10)
                np.testing.assert_allclose(psi[k], special.psi(a + x), rtol=1e-12)

    def test_a_large_shape_is_poisson(self) -> None:
        story = make("negative_binomial", 1, 1)
        for rate in (0.3, 20.0, 3000.0):
            family = NegativeBinomialParams(np.array([[rate]]), np.array([[SHAPES[1]]]))
            x = stats.poisson(rate).rvs(50, random_state=0).astype(float)
            found = story.log_prob(Params(np.ones(1), family), Rows.of(x[:, None]))
            np.testing.assert_allclose(found, stats.poisson.logpmf(x, rate), atol=1e-4)

    def test_rates_are_plain_averages(self) -> None:
        """Whatever the shape: the M-step knows the mean at once, even of all zeros."""
        story, params, values = told("negative_binomial", prior=None, k=1)
        values[:, 1] = np.where(np.isnan(values[:, 1]), np.nan, 0.0)
        found: Any = story.m_step(story.e_step(params, Rows.of(values)), params).family
        np.testing.assert_allclose(
            found.rate[0], np.nanmean(values, axis=0), rtol=1e-12, atol=1e-200
        )

    def test_mode_of_the_rate_is_where_the_density_says(self) -> None:
        """MAP with the shape kept: the root of the derivative of NB likelihood and prior."""
        story, params, values = told("negative_binomial", 40, k=1, d=1)
        story = replace(story, frozen=frozenset(("shape",)))
        x = values[~np.isnan(values[:, 0]), 0]
        theta: Any = params.family
        a, prior = theta.shape[0, 0], story.family.prior
        found: Any = story.m_step(story.e_step(params, Rows.of(values)), params).family

        def slope(m: float) -> float:
            data = x.sum() / m - (x.sum() + len(x) * a) / (m + a)
            return float(data + prior.rows * (prior.rate[0] / m - 1))

        assert found.rate[0, 0] == pytest.approx(optimize.brentq(slope, 1e-6, 1e6), rel=1e-9)

    def test_tables_of_blocks_give_what_tables_of_the_chunk_give(self) -> None:
        """Counts so many and different that tables of the chunk would not fit."""
        rng = np.random.default_rng(5)
        values = np.floor(10 ** rng.uniform(6, 9, (80_000, 3)))
        values[rng.random(values.shape) < 0.1] = np.nan
        story, params, _ = told("negative_binomial")
        params = replace(
            params,
            family=replace(params.family, rate=np.full((3, 3), 1e6), shape=params.family.shape),
        )
        rows = Rows.of(values)
        walk = story.family.prepare(params.family, np.log(params.weights)).walk(rows)
        assert not walk.of_chunk
        whole = story.e_step(params, rows)
        few = story.family.prepare(params.family, np.log(params.weights)).walk(rows[:500])
        assert few.of_chunk
        parts = [story.e_step(params, rows[i : i + 500]) for i in range(0, 80_000, 500)]
        merged = parts[0]
        for part in parts[1:]:
            merged = merged.merge(part)
        assert oracles.distance(whole, merged) < 1e-10
        np.testing.assert_allclose(
            story.log_prob(params, rows[:100]),
            special.logsumexp(log_joint(params, values[:100]), axis=1),
            rtol=1e-7,
        )

    def test_poisson_counts_push_the_shape_up_and_stay_sound(self) -> None:
        values = np.random.default_rng(6).poisson(4.0, (3000, 2)).astype(float)
        story = make("negative_binomial", 1, 2, prior=None).anchored(Rows.of(values))
        learner = BatchEM(200, 1e-7, accelerate=True)
        params = fit(story, learner, Resident(Rows.of(values)), FitState(story.vague())).params
        family: Any = params.family
        assert (family.shape > 100).all()
        poisson = stats.poisson.logpmf(values, values.mean(axis=0)).sum()
        assert story.log_prob(params, Rows.of(values)).sum() > poisson - 1.0


class TestZeroInflated:
    def test_mode_is_the_hand_derived_one(self) -> None:
        """One EM step written out: expected indicators, then Beta and Gamma modes."""
        story, params, values = told("zero_inflated", k=1, gaps=0.2)
        theta: Any = params.family
        prior: Any = story.family.prior
        found: Any = story.m_step(story.e_step(params, Rows.of(values)), params).family
        for j in range(3):
            x = values[~np.isnan(values[:, j]), j]
            q, rate = theta.inflation[0, j], theta.rate[0, j]
            own = np.where(x == 0, q / (q + (1 - q) * np.exp(-rate)), 0.0)
            total = len(x) + 1
            assert found.inflation[0, j] == pytest.approx(
                (own.sum() + prior.inflation[j]) / total, rel=1e-10
            )
            share = 1 - prior.inflation[j]
            assert found.rate[0, j] == pytest.approx(
                (x.sum() + share * prior.rate[j]) / ((1 - own).sum() + share), rel=1e-10
            )

    def test_prior_is_the_samples_own(self) -> None:
        rng = np.random.default_rng(0)
        x = np.where(rng.random(50_000) < 0.4, 0, rng.poisson(3.0, 50_000)).astype(float)
        prior: Any = make("zero_inflated", d=1).anchored(Rows.of(x[:, None])).family.prior
        assert prior.rate[0] == pytest.approx(3.0, rel=0.03)
        assert prior.inflation[0] == pytest.approx(0.4, rel=0.03)
        plain = make("zero_inflated", d=1).anchored(Rows.of(rng.poisson(3.0, (5000, 1)) * 1.0))
        prior = plain.family.prior
        assert prior.inflation[0] < 0.02

    @pytest.mark.parametrize("prior", ["weak", None])
    @pytest.mark.parametrize("value", [0.0, 7.0, 1e7])
    def test_a_column_of_one_value(self, value: float, prior: str | None) -> None:
        values = np.full((60, 1), value)
        for dtype in ("float64", "float32"):
            story = make("zero_inflated", 2, 1, prior=prior, dtype=dtype).anchored(Rows.of(values))
            params = laws.never_falls(story, story.vague(), values, steps=20)
            log_prob = story.log_prob(params, Rows.of(values))
            assert np.isfinite(log_prob).all()
            if prior is None and value:
                np.testing.assert_allclose(log_prob, stats.poisson.logpmf(value, value), atol=1e-2)


class TestInProducts:
    """Beside one another, on columns in any order, with gaps: parts add."""

    def story(self) -> tuple[Story, Params, Array]:
        kinds = ("real", "count", "count", "real", "count", "count", "count", "count")
        schema = Schema(tuple(Column(f"x{j}", kind) for j, kind in enumerate(kinds)))

        def of(columns: tuple[int, ...]) -> Schema:
            return Schema(tuple(schema.columns[j] for j in columns))

        parts = (
            Part((0, 3), Gaussian(2)),
            Part((1, 4), NegativeBinomial(of((1, 4)))),
            Part((2,), ZeroInflated(of((2,)))),
            Part((5, 6, 7), Multinomial(of((5, 6, 7)), total=(9.0,))),
        )
        product = Product(schema, parts)
        story = Story(schema, product, 2)
        rng = np.random.default_rng(0)
        theta = product.params_type(
            FullParams(rng.normal(0, 2, (2, 2)), np.tile(np.eye(2), (2, 1, 1))),
            NegativeBinomialParams(rng.uniform(1, 9, (2, 2)), rng.uniform(1, 4, (2, 2))),
            ZeroInflatedParams(rng.uniform(1, 9, (2, 1)), rng.uniform(0.1, 0.6, (2, 1))),
            MultinomialParams(rng.dirichlet(np.ones(3), 2)),
        )
        params = Params(np.array([0.4, 0.6]), theta)
        values = oracles.with_gaps(story.draw(params, 300, rng).values, 0.25, rng)
        return story.anchored(Rows.of(values)), params, values

    def test_scores_add(self) -> None:
        story, params, values = self.story()
        total = np.tile(np.log(params.weights), (len(values), 1))
        family: Any = story.family
        for part, theta in zip(family.parts, params.family.blocks, strict=True):  # type: ignore[union-attr]
            kernel = part.family.prepare(theta, np.zeros(2))
            walk = kernel.walk(Rows.of(values[:, part.columns]))
            for index in walk.blocks():
                base = walk.base()
                total[index] += walk.score().T + (0.0 if base is None else base[:, None])
        expected = special.logsumexp(total, axis=1)
        empty = np.isnan(values).all(axis=1)
        found = story.log_prob(params, Rows.of(values))
        np.testing.assert_allclose(found, np.where(empty, 0.0, expected), rtol=1e-10)

    def test_laws(self) -> None:
        story, params, values = self.story()
        laws.stored_and_read(story, params, values)
        laws.loads_what_blocks_hold(story, params, values)
        laws.never_falls(story, params, values, steps=12)
        names = ["x1", "x2", "x5", "x7"]
        left, posterior = story.condition(params, dict.fromkeys(names, 2.0))
        assert left.schema.names == ("x0", "x3", "x4", "x6")
        assert left.draw(posterior, 9, np.random.default_rng(0)).values.shape == (9, 4)
