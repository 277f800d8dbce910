"""Binary factor models: the bound against quadrature, ascent, recovery, gaps and draws."""

from __future__ import annotations

import gzip
from dataclasses import replace
from pathlib import Path
from typing import Any

import laws
import numpy as np
import oracles
import pytest
from latent_laws import Model, learns_every_way, product_grid
from scipy import optimize, special
from sklearn.datasets import load_digits

from genstream.errors import ConfigError
from genstream.evaluate import importance_log_prob
from genstream.families.logistic_factors import LogisticParams
from genstream.learn import BatchEM, FitState, Outcome, Resident, fit
from genstream.passes import Passes
from genstream.rows import Rows
from genstream.schema import Column, Schema
from genstream.sources import NumpySource
from genstream.start import warm_start
from genstream.stories import latent_factors, mixture
from genstream.story import Params, Story

Array = np.ndarray[Any, Any]
FASHION = Path("/usr/share/datasets/fashion-mnist")


def columns(d: int) -> Schema:
    return Schema(tuple(Column(f"x{j}", "binary") for j in range(d)))


def make(d: int, q: int, k: int = 1, **options: Any) -> Story:
    return latent_factors(columns(d), q, k, **options)


def random_params(story: Story, rng: np.random.Generator, size: float = 1.5) -> Params:
    k, d, q = story.n_components, story.schema.n_features, story.n_factors
    family = LogisticParams(rng.normal(0, 1, (k, d)), rng.normal(0, size, (k, d, q)))
    return Params(rng.dirichlet(np.full(k, 8.0)), family)


def grid(theta: Any, k: int) -> tuple[Array, Array]:
    q = theta.loadings.shape[2]
    line = np.linspace(-8, 8, 401 if q == 1 else 49)
    return product_grid([line] * q, [-0.5 * line**2] * q)


def log_odds(theta: Any, k: int, points: Array) -> Array:
    return theta.bias[k] + points @ theta.loadings[k].T


def log_given(theta: Any, k: int, values: Array, points: Array) -> Array:
    a = log_odds(theta, k, points)
    x = np.nan_to_num(values)
    seen = ~np.isnan(values)
    return (seen * x) @ special.log_expit(a).T + (seen * (1 - x)) @ special.log_expit(-a).T


MODEL = Model(
    make, random_params, grid, log_given, lambda theta, k, t: special.expit(log_odds(theta, k, t))
)


def drawn(
    n: int, d: int = 6, q: int = 2, k: int = 1, *, gaps: float = 0.0, seed: int = 0, **options: Any
) -> tuple[Story, Params, Array]:
    """An anchored story, parameters, and rows drawn from them."""
    rng = np.random.default_rng([seed, d, q, k])
    story = make(d, q, k, **options)
    params = random_params(story, rng)
    values = oracles.with_gaps(story.draw(params, n, rng).values, gaps, rng)
    return story.anchored(Rows.of(values)), params, values


def move(theta: Any, rng: np.random.Generator, size: float) -> Any:
    return replace(
        theta,
        bias=theta.bias + size * rng.normal(size=theta.bias.shape),
        loadings=theta.loadings + size * rng.normal(size=theta.loadings.shape),
    )


class TestBound:
    @pytest.mark.parametrize("q, k", [(1, 1), (2, 1), (1, 3)])
    def test_below_the_log_likelihood_and_near_it(self, q: int, k: int) -> None:
        story, params, values = drawn(300, q=q, k=k, gaps=0.2)
        truth = MODEL.log_prob(params, values)
        found = story.log_prob(params, Rows.of(values))
        assert story.bound
        assert (found <= truth + 1e-9).all()
        assert (truth - found).mean() < 0.45
        # Small loadings leave little to bound.
        faint = replace(
            params, family=replace(params.family, loadings=0.1 * params.family.loadings)
        )
        gap = MODEL.log_prob(faint, values) - story.log_prob(faint, Rows.of(values))
        assert (gap > -1e-9).all()
        assert gap.max() < 0.02

    @pytest.mark.parametrize("size", [0.5, 3.0])
    def test_no_other_normal_distribution_bounds_more_tightly(self, size: float) -> None:
        """The bound of any `q(t)`, written down anew, is maximised by any optimiser."""
        rng = np.random.default_rng(1)
        story = make(7, 2)
        params = random_params(story, rng, size)
        theta: Any = params.family
        values = oracles.with_gaps(story.draw(params, 6, rng).values, 0.2, rng)
        found = story.log_prob(params, Rows.of(values))
        for x, ours in zip(values, found, strict=True):
            seen = ~np.isnan(x)
            b, w = theta.bias[0, seen], theta.loadings[0, seen]

            def value(z: Array, b: Array = b, w: Array = w, x: Array = x[seen]) -> float:
                mean, lower = z[:2], np.array([[np.exp(z[2]), 0.0], [z[4], np.exp(z[3])]])
                covariance = lower @ lower.T
                a = b + w @ mean
                xi = np.sqrt(a**2 + np.einsum("di,ij,dj->d", w, covariance, w))
                divergence = 0.5 * (np.trace(covariance) + mean @ mean - 2) - z[2] - z[3]
                return float(((x - 0.5) * a - np.log(2 * np.cosh(xi / 2))).sum() - divergence)

            best = optimize.minimize(lambda z: -value(z), np.zeros(5), tol=1e-12)
            assert ours == pytest.approx(-best.fun, abs=1e-7)

    def test_extreme_parameters_are_solved_all_the_same(self) -> None:
        """Newton's method alone overshoots here for ever."""
        rng = np.random.default_rng(2)
        story = make(60, 4)
        params = random_params(story, rng, 20.0)
        values = story.draw(params, 50, rng).values
        values[:25] = rng.random((25, 60)) < 0.5
        walk: Any = story.family.prepare(params.family, np.zeros(1)).walk(Rows.of(values))
        for _ in walk.blocks():
            scores = walk.score()
            mean, covariance = walk.local[0]
            component = walk.kernel.components[0]
            _, _, gradient = component._curvatures(walk.half, None, mean, covariance)
            assert np.isfinite(scores).all()
            step = np.einsum("ni,nij,nj->n", gradient, covariance, gradient)
            assert step.max() < 1e-8

    def test_posterior_of_the_factors_is_near_the_truth(self) -> None:
        story, params, values = drawn(200, d=8, gaps=0.2)
        values[3] = np.nan
        found = story.factors(params, Rows.of(values))
        mean, _ = MODEL.posterior(params, 0, values)
        assert np.abs(found.mean - mean).mean() < 0.1
        np.testing.assert_array_equal(found.mean[3], 0.0)
        np.testing.assert_array_equal(found.covariance[3], np.eye(2))


class TestImportance:
    @pytest.mark.parametrize("q, k", [(1, 1), (2, 1), (1, 3)])
    def test_agrees_with_quadrature(self, q: int, k: int) -> None:
        story, params, values = drawn(150, q=q, k=k, gaps=0.2)
        values[7] = np.nan
        rng = np.random.default_rng(3)
        found = importance_log_prob(story, params, Rows.of(values), 2000, rng)
        truth = MODEL.log_prob(params, values)
        np.testing.assert_allclose(found.log_prob, truth, atol=0.12)
        assert abs((found.log_prob - truth).mean()) < 0.004
        bound = story.log_prob(params, Rows.of(values))
        assert (found.log_prob - bound > -0.1).all()
        assert (found.log_prob - bound).mean() > 0.02
        assert (found.n_effective > 500).all()
        assert (found.n_effective <= 2000 * k + 1e-6).all()

    def test_an_exact_story_is_scored_exactly(self) -> None:
        values = np.random.default_rng(0).normal(size=(20, 2))
        story = mixture(Schema.real(2), 1)
        params = story.vague()
        found = importance_log_prob(story, params, Rows.of(values), 5)
        np.testing.assert_array_equal(found.log_prob, story.log_prob(params, Rows.of(values)))
        np.testing.assert_array_equal(found.n_effective, 5.0)
        with pytest.raises(ConfigError, match="n_samples"):
            importance_log_prob(story, params, Rows.of(values), 1)


class TestLearning:
    @pytest.mark.parametrize("prior", ["weak", None])
    @pytest.mark.parametrize("k", [1, 2])
    def test_never_falls(self, k: int, prior: str | None) -> None:
        story, params, values = drawn(80, d=5, k=k, gaps=0.25, prior=prior)
        values[4] = np.nan
        weights = np.random.default_rng(5).uniform(0, 2, len(values))
        laws.never_falls(story, params, values, weights, steps=80)
        laws.never_falls_however_learned(story, params, values)

    def test_a_separable_column_does_not_break_maximum_likelihood(self) -> None:
        rng = np.random.default_rng(6)
        values = (rng.random((80, 4)) < 0.5).astype(float)
        values[:, 1] = values[:, 0]
        values[:, 2] = 1.0
        story = make(4, 2, prior=None).anchored(Rows.of(values))
        laws.never_falls(story, random_params(story, rng), values, steps=100)

    @pytest.mark.parametrize("frozen", [(), ("bias",), ("loadings",)])
    @pytest.mark.parametrize("prior", ["weak", None])
    def test_the_m_step_is_a_maximum(self, frozen: tuple[str, ...], prior: str | None) -> None:
        story, params, values = drawn(120, d=4, k=2, gaps=0.2, prior=prior)
        stats = story.e_step(params, Rows.of(values))
        laws.maximises(story, params, stats, move, frozen)

    def test_everything_frozen_stays(self) -> None:
        story, params, values = drawn(50)
        story = replace(story, frozen=frozenset({"bias", "loadings", "weights"}))
        assert oracles.identical(
            story.m_step(story.e_step(params, Rows.of(values)), params), params
        )

    def test_every_learner(self) -> None:
        story, _, values = drawn(120, k=2, gaps=0.25)
        learns_every_way(story, values, np.random.default_rng(9).uniform(0, 2, 120))

    def test_chunks_add_up(self) -> None:
        story, params, values = drawn(700, k=2, gaps=0.2)
        rng = np.random.default_rng(7)
        weights = rng.uniform(0, 2, 700)
        whole = story.e_step(params, Rows.of(values, weights))
        for _ in range(3):
            cuts = np.sort(rng.integers(0, 700, 6))
            pieces = [
                story.e_step(params, Rows.of(x, w))
                for x, w in zip(np.split(values, cuts), np.split(weights, cuts), strict=True)
            ]
            total = pieces[0].zero()
            for piece in pieces:
                total = total.merge(piece)
            assert oracles.distance(total, whole) < 1e-9
            assert total.objective == pytest.approx(whole.objective, rel=1e-11)

    def test_a_row_of_weight_two_is_two_rows(self) -> None:
        story, params, values = drawn(60, gaps=0.2)
        twice = story.e_step(params, Rows.of(np.concatenate([values, values])))
        heavy = story.e_step(params, Rows.of(values, np.full(60, 2.0)))
        assert oracles.distance(heavy.family, twice.family) < 1e-9

    def test_drawn_rows_lead_back_to_their_loadings(self) -> None:
        """The bound shrinks loadings, but not where they point: the spaces spanned agree."""
        rng = np.random.default_rng(8)
        story = make(20, 2)
        truth = random_params(story, rng, 1.2)
        values = story.draw(truth, 4000, rng).values
        story, state = warm_start(story, Passes(NumpySource(values, story.schema)), n_init=1)
        found: Any = state.params.family
        w: Any = truth.family
        one, two = (np.linalg.qr(a.loadings[0])[0] for a in (found, w))
        assert np.linalg.svd(one.T @ two)[1].min() > 0.98
        rates = special.expit(w.bias[0] / np.sqrt(1 + np.pi / 8 * (w.loadings[0] ** 2).sum(axis=1)))
        held = story.draw(state.params, 20000, rng).values.mean(axis=0)
        np.testing.assert_allclose(held, values.mean(axis=0), atol=0.02)
        np.testing.assert_allclose(rates, values.mean(axis=0), atol=0.03)

    def test_accelerated_em_reaches_what_em_does(self) -> None:
        story, params, values = drawn(400, d=8, gaps=0.1)
        ends = []
        for learner in (BatchEM(3000, 1e-8), BatchEM(3000, 1e-8, accelerate=True)):
            state = fit(story, learner, Resident(Rows.of(values)), FitState(params))
            assert state.outcome is Outcome.CONVERGED
            ends.append((state.step, state.trace[-1].mean_objective))
        assert ends[1][0] < ends[0][0]
        assert ends[1][1] == pytest.approx(ends[0][1], abs=1e-4)

    def test_float32_is_the_same_to_its_digits(self) -> None:
        story, params, values = drawn(500, d=12, k=2, gaps=0.2)
        single = replace(story, family=story.family.with_dtype("float32"))
        one = story.e_step(params, Rows.of(values))
        two = single.e_step(params, Rows.of(values.astype(np.float32)))
        assert two.objective == pytest.approx(one.objective, rel=1e-6)
        assert oracles.distance(two.family, one.family) < 1e-4
        laws.never_falls(single, params, values, steps=20)


class TestWhatItSays:
    def test_stored_and_read(self) -> None:
        for options in ({}, {"prior": None}, {"frozen": ("bias",), "dtype": "float32"}):
            laws.stored_and_read(*drawn(30, k=2, gaps=0.2, **options))
        story, params, values = drawn(60)
        state = fit(story, BatchEM(3), Resident(Rows.of(values)), FitState(params))
        again = FitState.from_dataset(state.to_dataset(story))
        assert oracles.identical(again.params, state.params)
        assert again.stats is not None
        assert state.stats is not None
        assert oracles.identical(again.stats, state.stats)

    def test_blocks_of_any_rows(self) -> None:
        story, params, values = drawn(300, k=2, gaps=0.3)
        values[[4, 9, 200]] = np.nan
        laws.loads_what_blocks_hold(story, params, values)
        laws.loads_what_blocks_hold(*drawn(300, k=2))

    def test_marginal_is_what_gaps_leave(self) -> None:
        laws.marginal_is_what_gaps_leave(*drawn(40, k=2))

    def test_conditions_are_near_the_truth(self) -> None:
        """`log p(rest | given)` to within what two bounds lose."""
        story, params, values = drawn(40, k=2)
        conditions = []
        for x in values:
            rest, theta = story.condition(params, {"x1": x[1], "x4": x[4]})
            assert rest.schema.names == ("x0", "x2", "x3", "x5")
            conditions.append(MODEL.log_prob(theta, x[None, [0, 2, 3, 5]])[0])
        given = values.copy()
        given[:, [0, 2, 3, 5]] = np.nan
        truth = MODEL.log_prob(params, values) - MODEL.log_prob(params, given)
        assert np.abs(np.array(conditions) - truth).mean() < 0.1
        assert abs((np.array(conditions) - truth).mean()) < 0.05

    def test_gaps_are_filled_with_the_likeliest_value_and_draws(self) -> None:
        story, params, values = drawn(400, d=6, gaps=0.3)
        values[0] = np.nan
        filled = story.impute(params, Rows.of(values))
        gaps = np.isnan(values)
        np.testing.assert_array_equal(filled[~gaps], values[~gaps])
        _, chance = MODEL.posterior(params, 0, values)
        sure = gaps & (np.abs(chance - 0.5) > 0.1)
        np.testing.assert_array_equal(filled[sure], (chance > 0.5)[sure])
        x = values[1].copy()
        x[:2] = np.nan
        drawn_rows = story.impute(params, Rows.of(np.tile(x, (4000, 1))), np.random.default_rng(1))
        _, chance = MODEL.posterior(params, 0, x[None])
        hole = np.isnan(x)
        np.testing.assert_allclose(drawn_rows.mean(axis=0)[hole], chance[0, hole], atol=0.06)
        # Columns with a common factor are drawn together.
        none = story.impute(params, Rows.of(np.full((5000, 6), np.nan)), np.random.default_rng(2))
        fresh = story.draw(params, 5000, np.random.default_rng(3)).values
        np.testing.assert_allclose(np.cov(none.T), np.cov(fresh.T), atol=0.03)

    def test_draws_have_the_distribution(self) -> None:
        story, params, _ = drawn(10, d=4, k=2)
        draw = story.draw(params, 20000, np.random.default_rng(4))
        assert draw.factors is not None
        assert draw.factors.shape == (20000, 2)
        cells = np.array([[i >> j & 1 for j in range(4)] for i in range(16)], dtype=float)
        expected = np.exp(MODEL.log_prob(params, cells))
        found = np.bincount((draw.values @ (1 << np.arange(4))).astype(int), minlength=16) / 20000
        np.testing.assert_allclose(found, expected, atol=5 * np.sqrt(expected / 20000).max())

    def test_description_integrates_the_factors_out(self) -> None:
        story, params, _ = drawn(10, q=1, k=2)
        told = story.family.describe(params.family)
        points, log_weight = grid(params.family, 0)
        for k in range(2):
            rate = np.exp(log_weight) @ MODEL.expected(params.family, k, points)
            found = [told.levels[j][k, 1] for j in range(6)]
            np.testing.assert_allclose(found, rate, atol=1e-3)

    def test_wrong_arguments_are_named(self) -> None:
        for message, options in [
            ("n_factors is 0", {"n_factors": 0}),
            ("n_components is 0", {"n_factors": 1, "n_components": 0}),
            ("dtype", {"n_factors": 1, "dtype": "int8"}),
            ("prior", {"n_factors": 1, "prior": "strong"}),
            ("no parameter 'mean'", {"n_factors": 1, "frozen": ["mean"]}),
        ]:
            with pytest.raises(ConfigError, match=message):
                latent_factors(columns(3), **options)
        for kinds in (("binary", "count"), ("binary", "real"), ("real", "real")):
            schema = Schema(tuple(Column(f"x{j}", kind) for j, kind in enumerate(kinds)))
            with pytest.raises(ConfigError, match="all binary or all counts"):
                latent_factors(schema, 1)


def peer_of_as_many_parameters(story: Story, train: Array) -> tuple[Story, Params]:
    """A Bernoulli mixture, fitted from the best of a few starts."""
    d = train.shape[1]
    k = round((story.n_parameters + 1) / (d + 1))
    other = mixture(columns(d), k)
    other, state = warm_start(other, Passes(NumpySource(train, other.schema)), n_init=5, seed=1)
    state = fit(other, BatchEM(300, 1e-5), Resident(Rows.of(train)), state)
    return other, state.params


def fitted(story: Story, train: Array) -> tuple[Story, Params]:
    passes = Passes(NumpySource(train, story.schema))
    story, state = warm_start(story, passes, n_init=1, short_steps=5, long_steps=5)
    state = fit(story, BatchEM(40, 1e-3, accelerate=True), Resident(Rows.of(train)), state)
    return story, state.params


def test_digits_are_explained_better_than_by_as_large_a_mixture() -> None:
    """Held-out digits (pixels above 8), in nats a row."""
    x = (load_digits().data > 8).astype(float)
    x = x[:, x.std(axis=0) > 0]
    order = np.random.default_rng(42).permutation(len(x))
    test, train = x[order[:597]], x[order[597:]]
    story, params = fitted(make(x.shape[1], 5, dtype="float32"), train)
    rng = np.random.default_rng(0)
    found = importance_log_prob(story, params, Rows.of(test), 500, rng)
    bound = story.log_prob(params, Rows.of(test))
    other, theirs = peer_of_as_many_parameters(story, train)
    peer = other.log_prob(theirs, Rows.of(test)).mean()
    print(f"bound {bound.mean():.2f}, importance {found.log_prob.mean():.2f}, mixture {peer:.2f}")
    assert found.log_prob.mean() > peer + 0.4
    assert found.log_prob.mean() > bound.mean() + 0.5
    assert np.median(found.n_effective) > 50


@pytest.mark.slow
@pytest.mark.skipif(not FASHION.exists(), reason="Debian's dataset-fashion-mnist is not installed")
def test_clothes_are_explained_better_than_by_as_large_a_mixture() -> None:
    """2,000 images to learn from and 500 held out, pixels above 127, in nats a row."""
    with gzip.open(FASHION / "train-images-idx3-ubyte.gz") as file:
        pixels = np.frombuffer(file.read(), np.uint8)[16:].reshape(-1, 784)
    x = (pixels[:2500] > 127).astype(float)
    train, test = x[:2000], x[2000:]
    story, params = fitted(make(784, 10, dtype="float32"), train)
    rng = np.random.default_rng(0)
    found = importance_log_prob(story, params, Rows.of(test), 200, rng)
    bound = story.log_prob(params, Rows.of(test))
    other, theirs = peer_of_as_many_parameters(story, train)
    peer = other.log_prob(theirs, Rows.of(test)).mean()
    print(f"bound {bound.mean():.2f}, importance {found.log_prob.mean():.2f}, mixture {peer:.2f}")
    assert found.log_prob.mean() > peer
