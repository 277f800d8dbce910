"""Count factor models: the bound against quadrature, ascent, recovery, gaps, sparse rows, draws."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import laws
import numpy as np
import oracles
import pytest
from latent_laws import Model, learns_every_way, product_grid
from scipy import sparse, special, stats

from genstream.evaluate import importance_log_prob
from genstream.families import gamma_poisson
from genstream.families.gamma_poisson import LEAST_SHAPE, GammaPoissonParams, _trigamma
from genstream.learn import BatchEM, FitState, Outcome, Resident, fit
from genstream.passes import Passes
from genstream.rows import Rows
from genstream.schema import Column, Schema
from genstream.sources import NumpySource
from genstream.start import warm_start
from genstream.stories import latent_factors, mixture
from genstream.story import Params, Story

Array = np.ndarray[Any, Any]
BIKES = Path(__file__).parents[1] / ".data" / "hourly_bikesharing.csv"


def columns(d: int) -> Schema:
    return Schema(tuple(Column(f"x{j}", "count") for j in range(d)))


def make(d: int, q: int, k: int = 1, **options: Any) -> Story:
    return latent_factors(columns(d), q, k, **options)


def random_params(story: Story, rng: np.random.Generator, size: float = 2.0) -> Params:
    k, d, q = story.n_components, story.schema.n_features, story.n_factors
    loadings = size * rng.gamma(0.7, size=(k, d, q))
    return Params(
        rng.dirichlet(np.full(k, 8.0)),
        GammaPoissonParams(loadings, rng.uniform(LEAST_SHAPE, 3.0, (k, q))),
    )


def grid(theta: Any, k: int) -> tuple[Array, Array]:
    """Evenly spaced logs of the factors."""
    q = theta.shape.shape[1]
    lines, log_weights = [], []
    for a in theta.shape[k]:
        line = np.linspace(-30.0 if q == 1 else -22.0, 3.5, 1200 if q == 1 else 180)
        lines.append(np.exp(line))
        log_weights.append(a * (line - np.exp(line)))
    return product_grid(lines, log_weights)


def log_given(theta: Any, k: int, values: Array, points: Array) -> Array:
    rates = points @ theta.loadings[k].T
    x = np.nan_to_num(values)
    seen = (~np.isnan(values)).astype(float)
    return x @ np.log(rates).T - seen @ rates.T - special.gammaln(x + 1).sum(axis=1)[:, None]


MODEL = Model(make, random_params, grid, log_given, lambda theta, k, t: t @ theta.loadings[k].T)


def drawn(
    n: int,
    d: int = 6,
    q: int = 2,
    k: int = 1,
    *,
    size: float = 2.0,
    gaps: float = 0.0,
    seed: int = 0,
    **options: Any,
) -> tuple[Story, Params, Array]:
    """An anchored story, parameters, and rows drawn from them."""
    rng = np.random.default_rng([seed, d, q, k])
    story = make(d, q, k, **options)
    params = random_params(story, rng, size)
    values = oracles.with_gaps(story.draw(params, n, rng).values, gaps, rng)
    return story.anchored(Rows.of(values)), params, values


def move(theta: Any, rng: np.random.Generator, size: float) -> Any:
    shape = theta.shape * np.exp(size * rng.normal(size=theta.shape.shape))
    return replace(
        theta,
        loadings=theta.loadings * np.exp(size * rng.normal(size=theta.loadings.shape)),
        shape=np.maximum(shape, LEAST_SHAPE),
    )


def em_in_plain_words(theta: Any, x: Array, steps: int = 3000) -> float:
    """The bound of one row (d,) by the plain iteration, and by the sum of its parts."""
    w, a = theta.loadings[0], theta.shape[0]
    seen = ~np.isnan(x)
    w, x = w[seen], x[seen]
    beta = a + w.sum(axis=0)
    alpha = a + x.sum() / len(a)
    for _ in range(steps):
        share = w * np.exp(special.digamma(alpha)) / beta
        share /= share.sum(axis=1, keepdims=True)
        alpha = a + x @ share
    t, log_t = alpha / beta, special.digamma(alpha) - np.log(beta)
    z = x[:, None] * share
    of_counts = (z * (np.log(w) + log_t)).sum() - (w * t).sum() - special.gammaln(x + 1).sum()
    of_counts -= special.xlogy(z, share).sum()
    prior = (a * np.log(a) - special.gammaln(a) + (a - 1) * log_t - a * t).sum()
    return float(of_counts + prior + stats.gamma(alpha, scale=1 / beta).entropy().sum())


class TestBound:
    def test_trigamma(self) -> None:
        x = np.geomspace(0.5, 1e7, 200)
        np.testing.assert_allclose(_trigamma(x), special.polygamma(1, x), rtol=1e-7)
        assert (1 / _trigamma(x) > x - 0.5).all()

    @pytest.mark.parametrize("q, k", [(1, 1), (2, 1), (2, 2)])
    def test_below_the_log_likelihood_and_near_it(self, q: int, k: int) -> None:
        story, params, values = drawn(200, q=q, k=k, gaps=0.2)
        truth = MODEL.log_prob(params, values)
        found = story.log_prob(params, Rows.of(values))
        assert story.bound
        assert (found <= truth + 1e-4).all()
        assert (truth - found).mean() < 0.9
        if q == 1:
            # One factor is conjugate: there is nothing to bound.
            np.testing.assert_allclose(found, truth, atol=1e-6)

    @pytest.mark.parametrize("size", [0.1, 2.0, 100.0])
    def test_the_plain_iteration_ends_there_too(self, size: float) -> None:
        story, params, values = drawn(6, d=7, q=3, size=size, gaps=0.2)
        values = values[~np.isnan(values).all(axis=1)]
        found = story.log_prob(params, Rows.of(values))
        expected = [em_in_plain_words(params.family, x) for x in values]
        np.testing.assert_allclose(found, expected, atol=1e-6 * max(1.0, size))

    def test_wherever_a_row_begins_its_bound_ends_alike(self) -> None:
        """Shapes of one half, and counts that either factor could have made."""
        rng = np.random.default_rng(1)
        w = np.array([[1.0, 1.0], [2.0, 1.9], [0.5, 0.6]])
        a = np.full(2, LEAST_SHAPE)
        beta = a + w.sum(axis=0)
        x = np.array([1.0, 0.0, 3.0])
        ends = []
        for _ in range(4):
            alpha = rng.uniform(0.5, 4.5, 2)
            for _ in range(4000):
                share = w * np.exp(special.digamma(alpha)) / beta
                alpha = a + x @ (share / share.sum(axis=1, keepdims=True))
            ends.append(alpha)
        np.testing.assert_allclose(ends, np.broadcast_to(ends[0], (4, 2)), rtol=1e-4)

    def test_posterior_of_the_factors_is_near_the_truth(self) -> None:
        story, params, values = drawn(100, d=8, size=5.0, gaps=0.2)
        values[3] = np.nan
        found = story.factors(params, Rows.of(values))
        mean, _ = MODEL.posterior(params, 0, values)
        assert np.abs(found.mean - mean).mean() < 0.05
        np.testing.assert_allclose(found.mean[3], 1.0)
        np.testing.assert_allclose(found.covariance[3], np.diag(1 / params.family.shape[0]))


class TestImportance:
    @pytest.mark.parametrize("q, k", [(1, 1), (2, 1), (2, 2)])
    def test_agrees_with_quadrature(self, q: int, k: int) -> None:
        story, params, values = drawn(150, q=q, k=k, gaps=0.2)
        values[7] = np.nan
        rng = np.random.default_rng(3)
        found = importance_log_prob(story, params, Rows.of(values), 2000, rng)
        truth = MODEL.log_prob(params, values)
        np.testing.assert_allclose(found.log_prob, truth, atol=0.15)
        assert abs((found.log_prob - truth).mean()) < 0.005
        bound = story.log_prob(params, Rows.of(values))
        assert (found.log_prob - bound > -0.1).all()
        assert (found.n_effective > 100).all()

    def test_large_counts_leave_enough_draws(self) -> None:
        story, params, values = drawn(50, d=24, q=4, size=100.0)
        found = importance_log_prob(story, params, Rows.of(values), 500, np.random.default_rng(0))
        assert (found.log_prob > story.log_prob(params, Rows.of(values))).all()
        assert np.median(found.n_effective) > 100


class TestLearning:
    @pytest.mark.parametrize("prior", ["weak", None])
    @pytest.mark.parametrize("k", [1, 2])
    def test_never_falls(self, k: int, prior: str | None) -> None:
        story, params, values = drawn(80, d=5, k=k, gaps=0.25, prior=prior)
        values[4] = np.nan
        weights = np.random.default_rng(5).uniform(0, 2, len(values))
        laws.never_falls(story, params, values, weights, steps=80)
        laws.never_falls_however_learned(story, params, values)

    @pytest.mark.parametrize("size", [0.05, 300.0])
    def test_never_falls_on_rare_or_large_counts(self, size: float) -> None:
        story, params, values = drawn(150, d=5, q=3, size=size, gaps=0.1, prior=None)
        values[:, 2] = 0.0
        found = laws.never_falls(story, params, values, steps=120)
        assert found.family.loadings[0, 2].max() == 0.0

    @pytest.mark.parametrize("frozen", [(), ("loadings",), ("shape",)])
    @pytest.mark.parametrize("prior", ["weak", None])
    def test_the_m_step_is_a_maximum(self, frozen: tuple[str, ...], prior: str | None) -> None:
        story, params, values = drawn(120, d=4, k=2, gaps=0.2, prior=prior)
        found = laws.maximises(story, params, story.e_step(params, Rows.of(values)), move, frozen)
        assert (found.family.shape >= LEAST_SHAPE).all()

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
            assert oracles.distance(total, whole) < 1e-8
            assert total.objective == pytest.approx(whole.objective, rel=1e-11)

    def test_sparse_rows_are_the_same_rows(self, monkeypatch: pytest.MonkeyPatch) -> None:
        story, params, values = drawn(500, d=40, q=3, size=0.02)
        stored = Rows.of(sparse.csr_array(values))
        assert stored.is_sparse
        one = story.e_step(params, stored)
        two = story.e_step(params, Rows.of(values))
        monkeypatch.setattr(gamma_poisson, "SPARSE", 0.0)
        three = story.e_step(params, Rows.of(values))
        for other in (two, three):
            assert oracles.distance(one.family, other.family) < 1e-8
            assert one.objective == pytest.approx(other.objective, rel=1e-11)
        begun, state = warm_start(
            story, Passes(NumpySource(values, story.schema)), n_init=1, long_steps=20
        )
        assert (
            begun.log_prob(state.params, stored).sum() > story.log_prob(story.vague(), stored).sum()
        )

    def test_drawn_rows_lead_back_to_their_loadings(self) -> None:
        rng = np.random.default_rng(8)
        story = make(12, 2)
        loadings = np.zeros((1, 12, 2))
        loadings[0, :8, 0], loadings[0, 5:, 1] = rng.uniform(2, 9, 8), rng.uniform(2, 9, 7)
        truth = Params(np.ones(1), GammaPoissonParams(loadings, np.array([[1.5, 4.0]])))
        values = story.draw(truth, 3000, rng).values
        story, state = warm_start(story, Passes(NumpySource(values, story.schema)), n_init=1)
        state = fit(
            story,
            BatchEM(150, 1e-6, accelerate=True),
            Resident(Rows.of(values)),
            FitState(state.params),
        )
        found: Any = state.params.family
        order = np.argsort(found.shape[0])
        np.testing.assert_allclose(found.loadings[0][:, order], loadings[0], atol=0.6)
        np.testing.assert_allclose(found.shape[0, order], [1.5, 4.0], rtol=0.15)

    def test_accelerated_em_reaches_what_em_does(self) -> None:
        story, params, values = drawn(300, d=8, gaps=0.1)
        ends = []
        for learner in (BatchEM(5000, 1e-7), BatchEM(5000, 1e-7, accelerate=True)):
            state = fit(story, learner, Resident(Rows.of(values)), FitState(params))
            assert state.outcome is Outcome.CONVERGED
            ends.append((state.step, state.trace[-1].mean_objective))
        assert ends[1][0] < ends[0][0]
        assert ends[1][1] == pytest.approx(ends[0][1], abs=1e-3)

    @pytest.mark.parametrize("size", [0.5, 200.0])
    def test_float32_is_the_same_to_its_digits(self, size: float) -> None:
        story, params, values = drawn(400, d=12, q=3, k=2, size=size, gaps=0.2)
        single = replace(story, family=story.family.with_dtype("float32"))
        one = story.e_step(params, Rows.of(values))
        two = single.e_step(params, Rows.of(values.astype(np.float32)))
        assert two.objective == pytest.approx(one.objective, rel=1e-6)
        assert oracles.distance(two.family, one.family) < 1e-3
        laws.never_falls(single, params, values, steps=20)


class TestWhatItSays:
    def test_stored_and_read(self) -> None:
        for options in ({}, {"prior": None}, {"frozen": ("shape",), "dtype": "float32"}):
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
        """`log p(rest | given)` to within what the approximation loses."""
        story, params, values = drawn(40, k=2)
        conditions = []
        for x in values:
            rest, theta = story.condition(params, {"x1": x[1], "x4": x[4]})
            assert rest.schema.names == ("x0", "x2", "x3", "x5")
            conditions.append(MODEL.log_prob(theta, x[None, [0, 2, 3, 5]])[0])
        given = values.copy()
        given[:, [0, 2, 3, 5]] = np.nan
        truth = MODEL.log_prob(params, values) - MODEL.log_prob(params, given)
        assert abs((np.array(conditions) - truth).mean()) < 0.1
        assert np.abs(np.array(conditions) - truth).mean() < 0.25

    def test_one_factor_conditions_exactly(self) -> None:
        """Conjugacy: nothing is approximate."""
        laws.factorises(*drawn(20, q=1, k=2), ["x1", "x4"])

    def test_gaps_are_filled_with_means_and_draws(self) -> None:
        story, params, values = drawn(100, gaps=0.3)
        values[0] = np.nan
        values[1, :2] = np.nan
        _, expected = MODEL.posterior(params, 0, values)
        filled = story.impute(params, Rows.of(values))
        gaps = np.isnan(values)
        assert np.abs(filled - expected)[gaps].mean() < 0.06 * expected[gaps].mean()
        assert filled[gaps].mean() == pytest.approx(expected[gaps].mean(), rel=0.03)
        for i in (0, 1):
            laws.fills_with_what_it_would_draw(story, params, values[i], filled[i])
        # Columns with a common factor are drawn together.
        none = story.impute(params, Rows.of(np.full((20000, 6), np.nan)), np.random.default_rng(2))
        told = story.family.describe(params.family)
        assert told.covariance is not None
        np.testing.assert_allclose(np.cov(none.T), told.covariance(0), rtol=0.2, atol=0.4)
        np.testing.assert_allclose(none.mean(axis=0), told.mean[0], rtol=0.05)
        np.testing.assert_allclose(np.diag(told.covariance(0)) ** 0.5, told.sd[0])

    def test_draws_have_the_distribution(self) -> None:
        story, params, _ = drawn(10, d=2, k=2, size=0.7)
        draw = story.draw(params, 20000, np.random.default_rng(4))
        assert draw.factors is not None
        cells = np.array([[i, j] for i in range(4) for j in range(4)], dtype=float)
        expected = np.exp(MODEL.log_prob(params, cells))
        found = [(draw.values == cell).all(axis=1).mean() for cell in cells]
        np.testing.assert_allclose(found, expected, atol=5 * np.sqrt(expected / 20000).max())

    def test_a_component_moves_to_a_row(self) -> None:
        story, params, values = drawn(30, k=2)
        seen = np.array([True, True, False, True, True, True])
        moved = story.place(params, 1, values[0], seen)
        mean = story.family.mean(moved.family)[1]
        pooled = story.family.mean(params.family).mean(axis=0)
        np.testing.assert_allclose(mean[seen], 0.5 * (values[0] + pooled)[seen])
        np.testing.assert_array_equal(moved.family.loadings[0], params.family.loadings[0])


def bike_days() -> Array:
    """(3267, 24) hourly counts of whole days, from lines of date, time and count."""
    days: dict[str, dict[str, float]] = {}
    with BIKES.open() as file:
        next(file)
        for line in file:
            day, time, count = line.split(",")[:3]
            days.setdefault(day, {})[time[11:13]] = float(count)
    return np.array([[day[h] for h in sorted(day)] for day in days.values() if len(day) == 24])


@pytest.mark.slow
@pytest.mark.skipif(not BIKES.exists(), reason="the bike counts are not here: run `make data`")
def test_bike_counts_are_explained_better_than_by_as_large_a_mixture() -> None:
    """Held-out days, in nats a day."""
    x = bike_days()
    assert len(x) == 3267
    order = np.random.default_rng(42).permutation(len(x))
    test, train = x[order[:667]], x[order[667:]]
    story, state = warm_start(make(24, 4), Passes(NumpySource(train, columns(24))), n_init=1)
    state = fit(
        story,
        BatchEM(60, 1e-2, accelerate=True),
        Resident(Rows.of(train)),
        FitState(state.params),
    )
    rng = np.random.default_rng(0)
    found = importance_log_prob(story, state.params, Rows.of(test), 500, rng)
    bound = story.log_prob(state.params, Rows.of(test))
    other, start = warm_start(mixture(columns(24), 4), Passes(NumpySource(train, columns(24))))
    peer = other.log_prob(start.params, Rows.of(test)).mean()
    print(f"bound {bound.mean():.1f}, importance {found.log_prob.mean():.1f}, mixture {peer:.1f}")
    assert other.n_parameters >= story.n_parameters - 1
    assert found.log_prob.mean() > bound.mean()
    assert found.log_prob.mean() > peer + 300
