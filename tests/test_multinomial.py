"""Multinomial rows: arrays, sparse rows and gaps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import laws
import numpy as np
import oracles
import pytest
from numpy.typing import NDArray
from scipy import optimize, sparse, special, stats

from genstream.families.multinomial import NARROW, WIDE, Multinomial, MultinomialParams
from genstream.incremental import IncrementalEM
from genstream.learn import BatchEM, FitState, Resident, fit
from genstream.online import OnlineEM
from genstream.passes import Passes
from genstream.rows import Rows
from genstream.schema import Column, Schema
from genstream.sources import NumpySource
from genstream.start import params_from_labels, warm_start
from genstream.story import Params, Story

Array = NDArray[Any]


def make(k: int = 3, d: int = 5, prior: str | None = "weak", **options: Any) -> Story:
    schema = Schema(tuple(Column(f"w{j}", "count") for j in range(d)))
    return Story(schema, Multinomial(schema, **options), k, prior)


def told(
    n_rows: int = 150, gaps: float = 0.3, k: int = 3, d: int = 5, **options: Any
) -> tuple[Story, Params, Array]:
    """An anchored story, parameters, and rows with totals of about 12."""
    rng = np.random.default_rng(1)
    story = make(k, d, total=(12.0,), dispersion=0.3, **options)
    params = Params(rng.dirichlet(np.full(k, 8.0)), MultinomialParams(rng.dirichlet(np.ones(d), k)))
    values = oracles.with_gaps(story.draw(params, n_rows, rng).values, gaps, rng)
    if gaps:
        values[4] = np.nan
    return story.anchored(Rows.of(values).check(story.schema)), params, values


def log_joint(params: Params, values: Array) -> Array:
    """(n, K) of the observed counts given their total, by scipy.stats row by row."""
    theta: Any = params.family
    out = np.tile(np.log(params.weights), (len(values), 1))
    for i, x in enumerate(values):
        seen = ~np.isnan(x)
        for k in range(out.shape[1] if seen.any() else 0):
            p = theta.probability[k, seen] / theta.probability[k, seen].sum()
            out[i, k] += stats.multinomial.logpmf(x[seen], int(x[seen].sum()), p)
    return out


def log_prob(params: Params, values: Array) -> Array:
    empty = np.isnan(values).all(axis=1)
    return np.where(empty, 0.0, special.logsumexp(log_joint(params, values), axis=1))


def moved(family: Any, rng: np.random.Generator, size: float) -> Any:
    p = family.probability * np.exp(size * rng.normal(size=family.probability.shape))
    return MultinomialParams(p / p.sum(axis=1, keepdims=True))


@pytest.mark.parametrize("gaps", [0.0, 0.4])
class TestRows:
    @pytest.mark.parametrize("dtype", ["float64", "float32"])
    def test_density(self, gaps: float, dtype: str) -> None:
        story, params, values = told(gaps=gaps, dtype=dtype)
        rows = Rows.of(values.astype(dtype))
        tolerance = 1e-11 if dtype == "float64" else 1e-5
        np.testing.assert_allclose(
            story.log_prob(params, rows), log_prob(params, values), rtol=tolerance, atol=tolerance
        )
        np.testing.assert_allclose(
            story.infer(params, rows).responsibilities,
            special.softmax(log_joint(params, values), axis=1),
            atol=10 * tolerance,
        )

    def test_stored_and_loaded(self, gaps: float) -> None:
        laws.stored_and_read(*told(gaps=gaps))
        laws.loads_what_blocks_hold(*told(gaps=gaps))
        laws.loads_more_than_a_block_holds(*told(gaps=gaps))
        laws.mends(*told(gaps=gaps, prior=None))

    @pytest.mark.parametrize("prior", ["weak", None])
    def test_never_falls(self, gaps: float, prior: str | None) -> None:
        laws.never_falls_however_learned(*told(gaps=gaps, prior=prior))

    @pytest.mark.parametrize("prior", ["weak", None])
    def test_m_step_is_the_maximum(self, gaps: float, prior: str | None) -> None:
        story, params, values = told(gaps=gaps, prior=prior)
        weights = np.random.default_rng(1).uniform(0, 2, len(values))
        sums = story.e_step(params, Rows.of(values, weights))
        for frozen in ((), ("probability",)):
            laws.maximises(story, params, sums, moved, frozen)


def test_probabilities_of_all_rows_of_a_total_sum_to_one() -> None:
    story, params, _ = told(k=2, d=3)
    grid = np.array([(a, b, 6 - a - b) for a in range(7) for b in range(7 - a)], dtype=float)
    assert special.logsumexp(story.log_prob(params, Rows.of(grid))) == pytest.approx(0, abs=1e-11)


class TestGaps:
    def test_counts_are_completed_as_the_latent_ones_are_expected(self) -> None:
        """Brute force over the counts that a row misses, until they are improbable.

        `p(x_M | x_O)` under the prior 1/n of totals is the multinomial of the whole, over n.
        """
        story, _, _ = told(k=1, d=3)
        p = np.array([0.25, 0.15, 0.6])
        params = Params(np.ones(1), MultinomialParams(p[None]))
        x = np.array([3.0, 2.0, np.nan])
        hidden = np.arange(400)
        log = [stats.multinomial.logpmf([3, 2, m], 5 + m, p) - np.log(5 + m) for m in hidden]
        chance = special.softmax(log)
        expected = float(chance @ hidden)
        assert story.impute(params, Rows.of(x[None]))[0, 2] == pytest.approx(expected, rel=1e-9)
        sums: Any = story.e_step(params, Rows.of(x[None])).family
        np.testing.assert_allclose(sums.sum_count[0], [3, 2, expected], rtol=1e-9)
        drawn = story.impute(params, Rows.of(np.tile(x, (20_000, 1))), np.random.default_rng(0))
        counts = np.bincount(drawn[:, 2].astype(int), minlength=30)[:30] / 20_000
        np.testing.assert_allclose(counts, chance[:30], atol=0.01)
        # A condition's draws are the same.
        left, posterior = story.condition(params, {"w0": 3, "w1": 2})
        drawn = left.draw(posterior, 20_000, np.random.default_rng(1)).values
        counts = np.bincount(drawn[:, 0].astype(int), minlength=30)[:30] / 20_000
        np.testing.assert_allclose(counts, chance[:30], atol=0.01)

    def test_what_totals_say_of_the_component_is_nothing(self) -> None:
        """The chance of an observed total under the prior 1/n is 1/n_O, whatever the component."""
        for p in (0.2, 0.7):
            n = np.arange(4, 3000)
            assert (stats.binom.pmf(4, n, p) / n).sum() == pytest.approx(1 / 4, rel=1e-6)

    @pytest.mark.parametrize("prior", ["weak", None])
    def test_em_ends_where_direct_maximisation_does(self, prior: str | None) -> None:
        story, params, values = told(200, 0.35, k=2, d=4, prior=prior)
        weights = np.random.default_rng(2).uniform(0.5, 1.5, len(values))
        rows = Rows.of(values, weights)
        learner = BatchEM(800, 1e-12, accelerate=True)
        found = fit(story, learner, Resident(rows), FitState(params)).params

        def at(theta: Array) -> Params:
            free = np.column_stack([theta[1:].reshape(2, 3), np.zeros(2)])
            w = special.softmax([theta[0], 0.0])
            return Params(w, MultinomialParams(special.softmax(free, axis=1)))

        def value(theta: Array) -> float:
            candidate = at(theta)
            return float(weights @ story.log_prob(candidate, rows)) + story.log_prior(candidate)

        theta: Any = found.family
        p = np.maximum(theta.probability, 1e-9)
        free = np.log(p[:, :3] / p[:, 3:]).ravel()
        start = np.concatenate([np.log(found.weights[:1] / found.weights[1]), free])
        result = optimize.minimize(
            lambda t: -value(t), start, method="BFGS", options={"gtol": 1e-7}
        )
        assert -result.fun <= value(start) + 1e-5
        again: Any = at(result.x).family
        np.testing.assert_allclose(theta.probability, again.probability, atol=2e-3)

    def test_gaps_are_filled(self) -> None:
        story, params, values = told(gaps=0.0)
        theta: Any = params.family
        for missing in ([0], [1, 4], [0, 1, 2, 3]):
            x = values[3].copy()
            x[missing] = np.nan
            seen = ~np.isnan(x)
            resp = special.softmax(log_joint(params, x[None]), axis=1)[0]
            odds = theta.probability / theta.probability[:, seen].sum(axis=1)[:, None]
            laws.fills_with_what_it_would_draw(story, params, x, np.nansum(x) * (resp @ odds))
        nothing = np.full(5, np.nan)
        mean = story.family.total[0] * (params.weights @ theta.probability)  # type: ignore[attr-defined]
        laws.fills_with_what_it_would_draw(story, params, nothing, mean)

    def test_a_row_of_zeros_says_nothing_and_is_completed_by_zeros(self) -> None:
        story, params, _ = told()
        x = np.array([[0.0, np.nan, 0.0, 0.0, np.nan]])
        np.testing.assert_allclose(
            story.infer(params, Rows.of(x)).responsibilities[0], params.weights
        )
        assert story.log_prob(params, Rows.of(x))[0] == pytest.approx(0.0, abs=1e-12)
        assert not story.impute(params, Rows.of(x)).any()
        assert not story.impute(params, Rows.of(x), np.random.default_rng(0)).any()


class TestConditions:
    def test_marginals_are_what_gaps_leave(self) -> None:
        laws.marginal_is_what_gaps_leave(*told(12, 0.0))

    def test_given_counts_decide_the_component_and_the_totals_of_the_rest(self) -> None:
        story, params, _ = told()
        given = {"w1": 4.0, "w3": 1.0}
        x = np.array([[np.nan, 4.0, np.nan, 1.0, np.nan]])
        left, posterior = story.condition(params, given)
        np.testing.assert_allclose(
            posterior.weights, story.infer(params, Rows.of(x)).responsibilities[0], rtol=1e-10
        )
        theta: Any = params.family
        found: Any = posterior.family
        rest = theta.probability[:, [0, 2, 4]]
        np.testing.assert_allclose(found.probability, rest / rest.sum(axis=1, keepdims=True))
        # Draws of what is left are the imputations of the gaps.
        drawn = left.draw(posterior, 20_000, np.random.default_rng(0)).values
        filled = story.impute(params, Rows.of(x))[0, [0, 2, 4]]
        error = drawn.std(axis=0) / np.sqrt(20_000)
        assert (np.abs(drawn.mean(axis=0) - filled) < 5 * error).all()
        again = Story.from_json(left.to_json())
        np.testing.assert_array_equal(
            again.draw(posterior, 50, np.random.default_rng(1)).values,
            left.draw(posterior, 50, np.random.default_rng(1)).values,
        )

    def test_draws_of_a_marginal_are_draws_of_the_whole(self) -> None:
        story, params, _ = told()
        whole = story.draw(params, 40_000, np.random.default_rng(0)).values[:, [0, 3]]
        part, theta = story.marginal(params, ["w0", "w3"])
        drawn = part.draw(theta, 40_000, np.random.default_rng(1)).values
        for of in (whole, drawn):
            assert of.shape == (40_000, 2)
        error = whole.std(axis=0) / np.sqrt(20_000)
        assert (np.abs(whole.mean(axis=0) - drawn.mean(axis=0)) < 5 * error).all()
        np.testing.assert_allclose(np.cov(whole.T), np.cov(drawn.T), rtol=0.1)


class TestTotals:
    @pytest.mark.parametrize("gaps", [0.0, 0.3])
    @pytest.mark.parametrize("dispersion", [0.0, 0.5])
    def test_are_those_of_the_sample(self, dispersion: float, gaps: float) -> None:
        rng = np.random.default_rng(0)
        story = make(1, total=(30.0,), dispersion=dispersion)
        params = Params(np.ones(1), MultinomialParams(rng.dirichlet(np.full(5, 5.0), 1)))
        values = story.draw(params, 20_000, rng).values
        total = values.sum(axis=1)
        assert total.mean() == pytest.approx(30, rel=0.03)
        assert total.var() == pytest.approx(30 + dispersion * 900, rel=0.06)
        found: Any = story.anchored(Rows.of(oracles.with_gaps(values, gaps, rng))).family
        assert found.total[0] == pytest.approx(30, rel=0.03)
        assert found.dispersion == pytest.approx(dispersion, abs=0.04)

    def test_what_was_drawn_is_recovered(self) -> None:
        _, truth, _ = told()
        story = make(3, 5, prior=None, total=(12.0,), dispersion=0.3)
        draw = story.draw(truth, 20_000, np.random.default_rng(3))
        values = oracles.with_gaps(draw.values, 0.2, np.random.default_rng(4))
        story = story.anchored(Rows.of(values))
        start = params_from_labels(story, Rows.of(values), draw.component, np.random.default_rng(0))
        found = laws.never_falls(story, start, values, steps=60)
        np.testing.assert_allclose(found.weights, truth.weights, atol=0.03)
        one: Any = found.family
        two: Any = truth.family
        np.testing.assert_allclose(one.probability, two.probability, atol=0.02)

    def test_mode_is_the_hand_derived_one(self) -> None:
        story, params, values = told(gaps=0.0, k=1)
        found: Any = story.m_step(story.e_step(params, Rows.of(values)), params).family
        prior: Any = story.family.prior
        np.testing.assert_allclose(prior.count, (values.sum(axis=0) + 0.5) / (len(values) + 1))
        counts = values.sum(axis=0) + prior.count
        np.testing.assert_allclose(found.probability[0], counts / counts.sum(), rtol=1e-12)


class TestSparse:
    def pair(self, d: int = 40, n: int = 700) -> tuple[Story, Params, Array, Rows]:
        story, params, values = told(n, 0.0, d=d)
        weights = np.random.default_rng(5).uniform(0, 2, n)
        values[3] = 0.0
        return story, params, values, Rows.of(sparse.csr_array(values), weights)

    @pytest.mark.parametrize("dtype", ["float64", "float32"])
    def test_equals_dense_to_rounding(self, dtype: str) -> None:
        story, params, values, rows = self.pair()
        story = replace(story, family=story.family.with_dtype(dtype))
        dense = Rows.of(values, rows.weights)
        tolerance = 1e-11 if dtype == "float64" else 2e-5
        for question in ("log_prob", "infer"):
            one, two = (getattr(story, question)(params, r) for r in (rows, dense))
            if question == "infer":
                one, two = one.responsibilities, two.responsibilities
            np.testing.assert_allclose(one, two, rtol=tolerance, atol=10 * tolerance)
        sums = [story.e_step(params, r) for r in (rows, dense)]
        assert oracles.distance(*sums) < 10 * tolerance
        anchored = [story.anchored(r).family for r in (rows, dense)]
        assert oracles.distance(anchored[0].prior, anchored[1].prior) < 1e-12
        assert anchored[0].total == pytest.approx(anchored[1].total)  # type: ignore[attr-defined]
        np.testing.assert_array_equal(story.impute(params, rows), values)

    def test_laws(self) -> None:
        story, params, _, rows = self.pair(n=80)
        kernel = story.family.prepare(params.family, np.log(params.weights))
        walk, other = kernel.walk(rows), kernel.walk(rows)
        assert list(walk.blocks()) == [slice(0, 80)]
        order = np.random.default_rng(0).permutation(80)
        other.load(order)
        np.testing.assert_allclose(other.score(), walk.score()[:, order])
        np.testing.assert_allclose(other.base(), walk.base()[order])

    def test_nothing_is_made_dense(self, monkeypatch: pytest.MonkeyPatch) -> None:
        story, params, _, rows = self.pair()

        def refuse(*_: Any) -> None:
            raise AssertionError("made dense")

        monkeypatch.setattr(sparse.csr_array, "toarray", refuse)
        monkeypatch.setattr(sparse.csr_array, "todense", refuse)
        story.m_step(story.e_step(params, rows), params)
        story.anchored(rows).log_prob(params, rows)

    @pytest.mark.parametrize("d", [40, 300])
    def test_a_whole_fit_from_a_sparse_source(self, d: int) -> None:
        """Started, learned and scored in chunks; clusters are found again."""
        rng = np.random.default_rng(6)
        story = make(3, d, total=(60.0,), dispersion=0.2)
        truth = Params(np.full(3, 1 / 3), MultinomialParams(rng.dirichlet(np.full(d, 0.3), 3)))
        draw = story.draw(truth, 900, rng)
        source = NumpySource(sparse.csr_array(draw.values), story.schema, chunk_rows=250)
        passes = Passes(source, scheduler="synchronous")
        x, seen = story.family.embed(Rows.of(sparse.csr_array(draw.values)))
        assert x.shape == seen.shape == (900, NARROW if d > WIDE else d)
        begun, state = warm_start(make(3, d), passes, n_init=2)
        state = fit(
            begun, BatchEM(50, 1e-6), passes, replace(state, outcome=FitState(truth).outcome)
        )
        found = begun.infer(state.params, source.read(0)).component
        table = np.zeros((3, 3))
        np.add.at(table, (draw.component[:250], found), 1)
        rows, columns = optimize.linear_sum_assignment(-table)
        assert table[rows, columns].sum() >= 245

    @pytest.mark.parametrize("learner", [OnlineEM(batch_rows=128), IncrementalEM()])
    def test_learners_see_no_difference(self, learner: Any) -> None:
        story, params, values, _ = self.pair()
        found = []
        for array in (values, sparse.csr_array(values)):
            passes = Passes(NumpySource(array, story.schema, chunk_rows=100))
            found.append(fit(story, learner, passes, FitState(params, seed=1)).params)
        assert oracles.distance(found[0], found[1]) < 1e-9

    def test_other_families_get_arrays(self) -> None:
        _, _, values, rows = self.pair(d=5, n=30)
        schema = Schema(tuple(Column(f"w{j}", "count") for j in range(5)))
        from genstream.stories import mixture

        story = mixture(schema, 2)
        params = story.anchored(rows).vague()
        np.testing.assert_array_equal(
            story.log_prob(params, rows), story.log_prob(params, Rows.of(values))
        )
