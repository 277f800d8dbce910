"""Components that are empty, singular or the same: moved, told, and never NaN."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import oracles
import pytest
from stories_zoo import drawn, passes_over

from genstream.learn import MAX_RESCUES, BatchEM, FitState, Learner, Outcome, Resident, fit
from genstream.responsibility import Sampled, hard
from genstream.rows import Rows
from genstream.schema import Schema
from genstream.start import warm_start
from genstream.stories import mixture
from genstream.story import Params, Story

LEARNERS: dict[str, Learner] = {
    "batch": BatchEM(40, 1e-6),
    "accelerated": BatchEM(40, 1e-6, accelerate=True),
    "hard": BatchEM(40, 1e-6, responsibility=hard),
    "sampled": BatchEM(20, responsibility=Sampled()),
}


def finite(story: Story, state: FitState, rows: Rows) -> bool:
    return (
        state.outcome in (Outcome.CONVERGED, Outcome.MAX_STEPS)
        and oracles.finite(state.params)
        and bool(np.isfinite(story.log_prob(state.params, rows)).all())
        and all(count <= MAX_RESCUES for count in state.rescues)
    )


class TestTwins:
    @pytest.mark.parametrize("name", oracles.STORIES)
    def test_are_seen_whatever_their_weights(self, name: str) -> None:
        story, params, values, _ = drawn(name, 40, gaps=0.2)
        rows = Rows.of(values)
        assert story.twins(params, rows) == []
        doubled = replace(story, n_components=5)
        again = params.take([0, 1, 2, 1, 1])
        weights = np.array([0.1, 0.2, 0.3, 0.25, 0.15])
        assert doubled.twins(replace(again, weights=weights), rows) == [(3, 1), (3, 4)]

    def test_are_told_from_near_ones(self) -> None:
        story = mixture(Schema.real(1), 2)
        rows = Rows.of(np.linspace(-2, 2, 9)[:, None])
        family: Any = story.vague().family
        for apart, pairs in ((0.0, [(0, 1)]), (1e-13, [(0, 1)]), (1e-6, [])):
            mean = np.array([[0.0], [apart]])
            params = Params(np.full(2, 0.5), replace(family, mean=mean))
            assert story.twins(params, rows) == pairs

    def test_a_row_that_cannot_tell_others_apart_hides_none(self) -> None:
        """In whatever order they come: the first row is as likely under all, or under some."""
        story = mixture(Schema.real(2), 5, covariance="diag")
        rng = np.random.default_rng(0)
        rows = Rows.of(np.concatenate([np.zeros((1, 2)), rng.standard_normal((20, 2))]))
        story = story.anchored(rows)
        family: Any = story.vague().family
        places = np.array([[1.0, 0], [-1, 0], [1, 0], [0, 1], [0, 1]])
        for order in itertools.permutations(range(5)):
            means = places[list(order)]
            alike = replace(family, mean=means, variance=np.ones((5, 2)))
            first, second = (
                tuple(np.flatnonzero((means == m).all(axis=1))) for m in ((1, 0), (0, 1))
            )
            assert story.twins(Params(np.full(5, 1 / 5), alike), rows) == sorted([first, second])

    def test_of_very_many_are_found_without_comparing_all(self) -> None:
        """Thousands of which each is a twin of another, and none differs at the first row."""
        n = 4_000
        story = mixture(Schema.real(2), n, covariance="diag")
        rows = Rows.of(np.concatenate([np.zeros((1, 2)), np.eye(2), -np.eye(2)]))
        story = story.anchored(rows)
        family: Any = story.vague().family
        angle = np.tile(np.arange(n // 2), 2) * 2 * np.pi / n
        means = np.column_stack([np.cos(angle), np.sin(angle)])
        params = Params(np.full(n, 1 / n), replace(family, mean=means, variance=np.ones((n, 2))))
        assert story.twins(params, rows) == [(k, k + n // 2) for k in range(n // 2)]

    @pytest.mark.parametrize("dtype", ["float32", "float64"])
    @pytest.mark.parametrize("learner", LEARNERS)
    @pytest.mark.parametrize("name", oracles.STORIES)
    def test_equal_components_part(self, name: str, learner: str, dtype: str) -> None:
        """EM from equal components stays where it is for ever, unless they are moved."""
        story, _, values, _ = drawn(name, 240)
        story = replace(story, family=story.family.with_dtype(dtype))
        rows = Rows.of(values)
        story = story.anchored(rows)
        one = fit(
            replace(story, n_components=1),
            BatchEM(3),
            Resident(rows),
            FitState(replace(story, n_components=1).vague()),
        )
        equal = one.params.take([0, 0, 0])
        equal = replace(equal, weights=np.full(3, 1 / 3))
        state = fit(story, LEARNERS[learner], Resident(rows), FitState(equal, sample=rows))
        assert finite(story, state, rows)
        assert story.twins(state.params, rows) == []
        if learner in ("batch", "accelerated"):  # others part or empty equal ones themselves
            assert any("was the same as component" in event for event in state.events)
        before = one.trace[-1].mean_loglik
        assert story.log_prob(state.params, rows).mean() > before + 0.02

    def test_many_are_told_in_one_line(self) -> None:
        story, params, values, _ = drawn("full", 240)
        rows = Rows.of(values)
        many = replace(story, n_components=12)
        again = params.take([0, 1, 2, *[1] * 9])
        state = FitState(replace(again, weights=np.full(12, 1 / 12)), sample=rows)
        state = fit(many, BatchEM(1), Resident(rows), state)
        assert len(state.events) == 1
        assert "9 components were re-seeded" in state.events[0]
        assert "(9 the same as another): 3, 4, 5, 6, 7, ..." in state.events[0]

    def test_without_a_sample_they_stay(self) -> None:
        story, _, values, _ = drawn("full", 60)
        rows = Rows.of(values)
        story = story.anchored(rows)
        state = fit(story, BatchEM(10), Resident(rows), FitState(story.vague()))
        assert state.events == []
        assert state.outcome is Outcome.CONVERGED


DEGENERATE: dict[str, Any] = {
    "two distinct rows": np.repeat([[0.0, 1.0], [2.0, 2.0]], 20, axis=0),
    "one distinct row": np.full((30, 2), 7.5),
    "each row ten times": np.repeat(np.random.default_rng(0).normal(size=(12, 2)), 10, axis=0),
    "fewer rows than components": np.random.default_rng(1).normal(size=(4, 2)),
    "a constant column": np.column_stack([np.arange(60.0), np.full(60, 1 / 3)]),
    "constant columns": np.tile([3.0, -1e6], (50, 1)),
}


@pytest.mark.parametrize("prior", ["weak", None])
@pytest.mark.parametrize("covariance", ["full", "tied", "diag", "spherical"])
@pytest.mark.parametrize("what", DEGENERATE)
def test_degenerate_rows_end_finite(what: str, covariance: str, prior: str | None) -> None:
    rows = Rows.of(DEGENERATE[what])
    story = mixture(Schema.real(2), 5, covariance=covariance, prior=prior)
    story, state = warm_start(story, passes_over(story, rows.values), n_init=2, long_steps=20)
    for learner in LEARNERS.values():
        assert finite(story, fit(story, learner, Resident(rows), state), rows)
    # From equal components too.
    state = replace(state, params=story.vague())
    assert finite(story, fit(story, BatchEM(30), Resident(rows), state), rows)


class TestFrozen:
    def test_what_is_frozen_stays_where_a_component_is_moved(self) -> None:
        values = np.random.default_rng(0).normal(size=(200, 2))
        rows = Rows.of(values)
        story = mixture(
            Schema.real(2),
            2,
        ).anchored(rows)
        story = replace(story, frozen=frozenset({"mean", "weights"}))
        family: Any = story.vague().family
        mean = np.array([[0.0, 0.0], [1e4, 1e4]])
        start = Params(np.array([0.75, 0.25]), replace(family, mean=mean))
        state = fit(story, BatchEM(20), Resident(rows), FitState(start, sample=rows))
        found: Any = state.params.family
        np.testing.assert_array_equal(found.mean, mean)
        np.testing.assert_array_equal(state.params.weights, [0.75, 0.25])

    def test_nothing_to_move_is_no_event(self) -> None:
        values = np.random.default_rng(0).normal(size=(200, 2))
        rows = Rows.of(values)
        story = mixture(Schema.real(2), 2).anchored(rows)
        story = replace(story, frozen=frozenset({"mean", "covariance"}))
        state = fit(story, BatchEM(20), Resident(rows), FitState(story.vague(), sample=rows))
        assert state.events == []
        assert state.outcome is Outcome.CONVERGED
