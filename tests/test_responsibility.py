"""Rules that turn log-joints into responsibilities, and the ways of learning they make."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import oracles
import pytest
from scipy import stats
from stories_zoo import drawn, passes_over

from genstream.errors import ConfigError
from genstream.incremental import IncrementalEM
from genstream.learn import BatchEM, FitState, Outcome, Resident, fit
from genstream.online import OnlineEM
from genstream.responsibility import RULES, Nearest, Sampled, Truncated, hard, named, rule_of, soft
from genstream.rows import Rows
from genstream.schema import Schema
from genstream.start import warm_start
from genstream.stories import mixture
from genstream.story import Params, Story

DTYPES = pytest.mark.parametrize("dtype", [np.float32, np.float64])


class TestRules:
    def test_soft_normalises_and_returns_the_log_sum(self) -> None:
        rng = np.random.default_rng(0)
        joint = rng.normal(0, 400, (5, 100))
        expected = np.logaddexp.reduce(joint, axis=0)
        resp = joint.copy()
        np.testing.assert_allclose(soft(resp), expected, rtol=1e-14)
        np.testing.assert_allclose(resp.sum(axis=0), 1.0, rtol=1e-14)

    @DTYPES
    def test_soft_makes_no_denormals(self, dtype: Any) -> None:
        joint = np.linspace(-2000, 0, 4001, dtype=dtype).reshape(-1, 1)
        soft(joint)
        positive = joint[joint > 0]
        assert positive.min() >= np.finfo(dtype).tiny

    def test_hard_takes_the_likeliest(self) -> None:
        joint = np.log(np.array([[0.2, 0.5], [0.7, 0.1], [0.1, 0.4]]))
        resp = joint.copy()
        np.testing.assert_allclose(hard(resp), joint.max(axis=0))
        np.testing.assert_array_equal(resp, [[0, 1], [1, 0], [0, 0]])

    @DTYPES
    @pytest.mark.parametrize("n", [1, 2, 4, 5, 9])
    def test_truncated_is_the_best_bound_of_so_many_components(self, n: int, dtype: Any) -> None:
        joint = np.random.default_rng(n).normal(0, 3, (5, 60)).astype(dtype)
        resp = joint.copy()
        value = Truncated(n)(resp)
        assert ((resp > 0).sum(axis=0) == min(n, 5)).all()
        for row, r, found in zip(joint.T, resp.T, value, strict=True):
            likely = np.sort(row.astype(float))[-n:]
            assert found == pytest.approx(np.logaddexp.reduce(likely), rel=1e-5)
            np.testing.assert_allclose(np.sort(r)[-n:], np.exp(likely - found), rtol=2e-5)
        other = joint.copy()
        if n == 1:
            np.testing.assert_allclose(hard(other), value, rtol=1e-6)
            np.testing.assert_allclose(other, resp, rtol=1e-6)
        if n >= 5:
            np.testing.assert_array_equal(soft(other), value)
            np.testing.assert_array_equal(other, resp)

    def test_truncated_with_ties_still_takes_n(self) -> None:
        resp = np.zeros((6, 4))
        np.testing.assert_allclose(Truncated(2)(resp), np.log(2))
        assert ((resp == 0.5).sum(axis=0) == 2).all()

    @DTYPES
    def test_sampled_draws_from_the_posterior(self, dtype: Any) -> None:
        p = np.array([0.05, 0.0, 0.55, 0.3, 0.1])
        with np.errstate(divide="ignore"):
            joint = np.tile(np.log(p)[:, None] - 7.0, 20_000).astype(dtype)
        value = rule_of(Sampled(), (3, 1, 0))(joint)
        np.testing.assert_allclose(value, -7.0, rtol=1e-6)
        assert (joint.sum(axis=0) == 1).all()
        assert ((joint == 0) | (joint == 1)).all()
        counts = joint.sum(axis=1)
        assert counts[1] == 0
        assert stats.chisquare(counts[p > 0], 20_000 * p[p > 0]).pvalue > 1e-3

    def test_draws_follow_from_seed_and_key(self) -> None:
        def draws(seed: int, key: tuple[int, int, int]) -> list[int]:
            joint = np.zeros((4, 50))
            rule_of(Sampled(seed), key)(joint)
            return list(joint.argmax(axis=0))

        first = draws(0, (1, 2, 3))
        assert draws(0, (1, 2, 3)) == first
        for seed, key in ((1, (1, 2, 3)), (0, (2, 2, 3)), (0, (1, 3, 3)), (0, (1, 2, 4))):
            assert draws(seed, key) != first

    def test_drawing_without_a_key_is_refused(self) -> None:
        story, params, values, _ = drawn("full", 10)
        with pytest.raises(ConfigError, match="need a key"):
            story.e_step(params, Rows.of(values), Sampled())

    def test_rules_by_name(self) -> None:
        assert [named(name, n=2, seed=4) for name in RULES] == [
            soft,
            hard,
            Sampled(4),
            Truncated(2),
            Nearest(),
        ]
        with pytest.raises(ConfigError, match="'fuzzy' is not one of soft, hard"):
            named("fuzzy")

    @pytest.mark.parametrize("make", [lambda: Truncated(0), lambda: Sampled(-1)])
    def test_numbers_out_of_range_are_refused(self, make: Any) -> None:
        with pytest.raises(ConfigError):
            make()


class TestGiven:
    @pytest.mark.parametrize("kind", oracles.STORIES)
    def test_given_responsibilities_are_taken_as_they_are(self, kind: str) -> None:
        story, params, values, _ = drawn(kind, 70, gaps=0.3)
        posterior = story.infer(params, Rows.of(values))
        given_ = story.e_step(params, Rows.of(values), posterior.responsibilities)
        own = story.e_step(params, Rows.of(values))
        assert given_.objective == 0.0
        assert oracles.distance(given_.family, own.family) < 1e-12

    @pytest.mark.parametrize("covariance", ["full", "diag"])
    def test_sums_beyond_float32_are_done_again_in_float64(self, covariance: str) -> None:
        """Their objective is 0, and says nothing of sums that are not finite."""
        values = np.random.default_rng(0).normal(size=(40, 2))
        values[7] = 1e25
        resp = np.random.default_rng(1).dirichlet([1.0, 1.0], 40)
        found = {}
        for dtype in ("float32", "float64"):
            story = mixture(Schema.real(2), 2, covariance=covariance, dtype=dtype)
            story = story.anchored(Rows.of(values[:7]))
            found[dtype] = story.e_step(story.vague(), Rows.of(values), resp)
        assert oracles.finite(found["float32"])
        assert oracles.distance(found["float32"].family, found["float64"].family) < 1e-12


def overlapping(n: int = 3_000) -> tuple[Story, FitState, Rows]:
    """Two heaps that overlap, and a start."""
    rng = np.random.default_rng(3)
    story = mixture(Schema.real(1), 2)
    values = np.concatenate([rng.normal(-1.2, 1, n // 3), rng.normal(1.2, 0.8, n - n // 3)])[
        :, None
    ]
    story, state = warm_start(story, passes_over(story, values), n_init=1, long_steps=1)
    return story, state, Rows.of(values)


def mean_log_prob(story: Story, params: Params, rows: Rows) -> float:
    return float(story.log_prob(params, rows).mean())


class TestSampledEM:
    def test_neither_converges_nor_decreases(self) -> None:
        story, state, rows = overlapping(300)
        for learner in (
            BatchEM(30, 1e9, responsibility=Sampled()),
            IncrementalEM(30, 1e9, responsibility=Sampled()),
        ):
            ended = fit(story, learner, Resident(rows), state)
            assert ended.outcome is Outcome.MAX_STEPS
            assert np.diff([info.loglik for info in ended.trace]).min() < 0

    def test_the_trace_shows_the_log_likelihood(self) -> None:
        story, state, rows = overlapping(300)
        states = [state]
        learner = BatchEM(4, responsibility=Sampled(), average=0.0)
        ended = fit(story, learner, Resident(rows), state, [lambda s, _: states.append(s)])
        for before, info in zip(states, ended.trace, strict=False):
            assert info.mean_loglik == pytest.approx(mean_log_prob(story, before.params, rows))

    def test_averaged_it_ends_where_em_does(self) -> None:
        story, state, rows = overlapping()
        best = mean_log_prob(
            story, fit(story, BatchEM(400, 1e-9), Resident(rows), state).params, rows
        )
        lost = {}
        for average in (0.0, 0.5):
            lost[average] = [
                best - mean_log_prob(story, fit(story, learner, Resident(rows), state).params, rows)
                for learner in (
                    BatchEM(60, responsibility=Sampled(seed), average=average) for seed in range(5)
                )
            ]
        assert max(lost[0.5]) < 1e-3
        assert np.median(lost[0.5]) < 0.5 * np.median(lost[0.0])

    def test_the_last_step_is_of_the_mean_of_the_late_ones(self) -> None:
        story, state, rows = overlapping(300)
        states: list[FitState] = []
        learner = BatchEM(8, responsibility=Sampled(), average=0.5)
        ended = fit(story, learner, Resident(rows), state, [lambda s, _: states.append(s)])
        late = [each.stats for each in states[4:7]]
        key = (states[6].seed, states[6].step, 0)
        late.append(story.e_step(states[6].params, rows, Sampled(), key))
        total = late[0]
        for each in late[1:]:
            assert each is not None
            assert total is not None
            total = total.merge(each)
        assert total is not None
        mean = story.m_step(total.scale(0.25), states[6].params)
        assert oracles.distance(ended.params, mean) < 1e-12
        assert ended.average is None
        assert all(each.average is None for each in states[:4])

    def test_cannot_be_accelerated(self) -> None:
        with pytest.raises(ConfigError, match="cannot be accelerated"):
            BatchEM(responsibility=Sampled(), accelerate=True)
        with pytest.raises(ConfigError, match="average"):
            BatchEM(average=1.0)


@pytest.mark.parametrize("name", oracles.STORIES)
def test_truncated_em_comes_to_what_soft_em_does(name: str) -> None:
    """Where few components compete for a row, the bound is close to the log-likelihood."""
    story, _, values, weights = drawn(name, 300, gaps=0.1, weighted=True)
    passes = passes_over(story, values, weights)
    story, state = warm_start(story, passes, n_init=1, long_steps=1)
    whole = fit(story, BatchEM(100, 1e-7), passes, state)
    part = fit(story, BatchEM(100, 1e-7, responsibility=Truncated(2)), passes, state)
    rows = Rows.of(values, weights)
    found = [
        float(rows.row_weights @ story.log_prob(s.params, rows)) / rows.row_weights.sum()
        for s in (whole, part)
    ]
    assert part.outcome is Outcome.CONVERGED
    assert part.trace[-1].mean_loglik <= found[1] + 1e-12
    assert found[1] > found[0] - 0.05


def test_online_em_takes_any_rule() -> None:
    story, state, rows = overlapping(400)
    found = {}
    for rule in (soft, hard, Truncated(1), Sampled(1), Sampled(2)):
        learner = OnlineEM(batch_rows=100, responsibility=rule)
        found[rule], _ = learner.learn(story, state, rows)
        again, _ = learner.learn(story, replace(state), rows)
        assert oracles.identical(found[rule].params, again.params)
    assert oracles.distance(found[hard].params, found[Truncated(1)].params) < 1e-12
    for other in (soft, hard, Sampled(2)):
        assert not oracles.identical(found[other].params, found[Sampled(1)].params)
