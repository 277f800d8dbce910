"""Moves of components: what they are judged by, and where they lead."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import oracles
import pytest
from scipy import stats
from stories_zoo import drawn, passes_over

from genstream.learn import BatchEM, FitState, Outcome, Resident, fit
from genstream.refine import moved, portrait, refine, split
from genstream.responsibility import Sampled, hard
from genstream.rows import Rows
from genstream.schema import Schema
from genstream.start import params_from_labels, seed_within, warm_start
from genstream.stories import mixture
from genstream.story import Params, Story


def without(story: Story, params: Params, k: int) -> tuple[Story, Params]:
    """The mixture with a component deleted."""
    others = [i for i in range(story.n_components) if i != k]
    left = params.take(others)
    left = replace(left, weights=left.weights / left.weights.sum())
    return replace(story, n_components=len(others)), left


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", oracles.STORIES)
def test_the_cost_is_what_deleting_a_component_takes_away(name: str, weighted: bool) -> None:
    story, params, values, weights = drawn(name, 300, gaps=0.2, weighted=weighted)
    rows = Rows.of(values, weights)
    seen = portrait(story, params, rows)
    resp = story.infer(params, rows).responsibilities
    # Rows that no other component explains at all are counted at a finite cost.
    shared = resp.max(axis=1) < 1 - 1e-12
    rows = rows[shared]
    again = portrait(story, params, rows)
    before = rows.row_weights @ story.log_prob(params, rows)
    for k in range(story.n_components):
        fewer, left = without(story, params, k)
        after = rows.row_weights @ fewer.log_prob(left, rows)
        # A row with nothing observed is of no component.
        blind = ~rows.is_observed.any(axis=1) @ rows.row_weights * np.log(1 - params.weights[k])
        assert again.cost[k] == pytest.approx(before - after, rel=1e-3, abs=1e-3 + abs(blind))
        np.testing.assert_array_equal(seen.rows[k], np.flatnonzero(resp[:, k] > 0.01))
        np.testing.assert_allclose(seen.shares[k], resp[seen.rows[k], k])


def heaps(n: int = 120, prior: str | None = "weak") -> tuple[Story, Rows, FitState]:
    """Four heaps in a row, of which two share a component and one has two."""
    rng = np.random.default_rng(0)
    centres = np.array([[-16.0, 0], [-6.0, 0], [8.0, 0], [24.0, 0]])
    label = np.repeat(np.arange(4), n)
    rows = Rows.of(centres[label] + rng.normal(size=(4 * n, 2)))
    story = mixture(Schema.real(2), 4, prior=prior).anchored(rows)
    wrong = np.array([0, 0, 1, 2])[label]
    wrong[(label == 3) & (rows.values[:, 1] > 0)] = 3
    params = params_from_labels(story, rows, wrong, rng)
    state = FitState(params, sample=rows)
    return story, rows, fit(story, BatchEM(200, 1e-5), Resident(rows), state)


class TestSplit:
    def test_the_gain_is_that_of_two_components_on_two_heaps(self) -> None:
        story, rows, state = heaps(prior=None)
        seen = portrait(story, state.params, rows)
        gains = {}
        for k in range(4):
            mine = rows[seen.rows[k]]
            rng = np.random.default_rng(k)
            found = split(story, state.params, k, mine, seen.shares[k], seed_within, rng)
            gains[k] = -np.inf if found is None else found.gain
        assert max(gains, key=lambda k: gains[k]) == 0
        family: Any = state.params.family
        two = rows.values[:240]
        one = stats.multivariate_normal(family.mean[0], family.covariance[0])
        both = [
            stats.multivariate_normal(half.mean(axis=0), np.cov(half.T, ddof=0))
            for half in (two[:120], two[120:])
        ]
        gain = sum(
            each.logpdf(half).sum() for each, half in zip(both, (two[:120], two[120:]), strict=True)
        )
        gain += 240 * np.log(0.5) - one.logpdf(two).sum()
        assert gains[0] == pytest.approx(gain, rel=0.05)

    def test_few_rows_are_not_split(self) -> None:
        story, rows, state = heaps()
        rng = np.random.default_rng(0)
        for n, wanted in ((19, False), (60, True)):
            few = rows[np.r_[: n // 2, 200 : 200 + n - n // 2]]
            found = split(story, state.params, 0, few, np.ones(n), seed_within, rng)
            assert (found is not None) == wanted

    def test_singular_halves_are_refused(self) -> None:
        values = np.repeat([[0.0, 0.0], [4.0, 1.0]], 60, axis=0)
        values[:60] += np.random.default_rng(0).normal(size=(60, 2))
        rows = Rows.of(values)
        story = mixture(Schema.real(2), 3, prior=None).anchored(rows)
        params = params_from_labels(story, rows, np.arange(120) % 3, np.random.default_rng(0))
        rng = np.random.default_rng(0)
        assert split(story, params, 0, rows, np.ones(120), seed_within, rng) is None


@pytest.mark.parametrize("name", oracles.STORIES)
def test_a_move_changes_two_components_and_keeps_the_sum_of_weights(name: str) -> None:
    _, params, _, _ = drawn(name, 5)
    halves = replace(params.take([0, 2]), weights=np.array([0.25, 0.75]))
    new = moved(params, halves, 1, 0)
    assert new.weights.sum() == pytest.approx(1)
    w = params.weights
    np.testing.assert_allclose(new.weights, np.array([0.75 * w[1], 0.25 * w[1], w[2]]) / (1 - w[0]))
    assert new.family is not None
    assert params.family is not None
    for (_, names, now), (_, _, old) in zip(
        new.family.leaves(), params.family.leaves(), strict=True
    ):
        along = names.index("component") if "component" in names else None
        expected = old if along is None else np.take(old, [2, 0, 2], axis=along)
        np.testing.assert_array_equal(now, expected)


def test_a_component_kept_its_rows_where_most_shares_are_the_same() -> None:
    story, rows, state = heaps()
    seen = portrait(story, state.params, rows)
    before = list(zip(seen.rows, seen.shares, strict=True))
    assert all(seen.kept(k, *before[k]) for k in range(4))
    # A component that another one was put in the place of explains other rows.
    swapped = portrait(story, state.params.take([1, 0, 2, 3]), rows)
    assert [swapped.kept(k, *before[k]) for k in range(4)] == [False, False, True, True]
    # Half of the shares left are not most of them.
    assert not any(seen.kept(k, seen.rows[k], seen.shares[k] / 2) for k in range(4))


def test_halves_are_found_anew_only_where_rows_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    centres = 10.0 * np.arange(12)
    rows = Rows.of((np.repeat(centres, 60) + rng.normal(size=720))[:, None])
    story = mixture(Schema.real(1), 12).anchored(rows)
    # Two components on the first heap, and one on the last two.
    labels = np.repeat(np.r_[0, np.arange(2, 12), 11], 60)
    labels[:30] = 1
    params = params_from_labels(story, rows, labels, rng)
    state = fit(story, BatchEM(200, 1e-6), Resident(rows), FitState(params, sample=rows))
    tried: list[int] = []

    def counted(story: Story, params: Params, component: int, *rest: Any) -> Any:
        tried.append(component)
        return split(story, params, component, *rest)

    monkeypatch.setattr("genstream.refine.split", counted)
    better, _ = refine(story, rows, state, seed_within, passes=60)
    assert better.trace[-1].mean_objective > state.trace[-1].mean_objective + 0.05
    assert tried[:12] == list(range(12))
    # The heaps between were as before in the second round.
    assert 1 <= len(tried) - 12 <= 6


class TestRefine:
    @pytest.mark.parametrize("responsibility", [None, hard])
    def test_finds_what_em_alone_cannot(self, responsibility: Any) -> None:
        story, rows, state = heaps()
        options = {} if responsibility is None else {"responsibility": responsibility}
        stuck = fit(story, BatchEM(500, 1e-9, **options), Resident(rows), FitState(state.params))
        better, spent = refine(story, rows, stuck, seed_within, passes=60, **options)
        family: Any = better.params.family
        np.testing.assert_allclose(np.sort(family.mean[:, 0]), [-16, -6, 8, 24], atol=0.5)
        assert better.trace[-1].mean_objective > stuck.trace[-1].mean_objective + 0.1
        assert spent < 90

    @pytest.mark.parametrize("name", oracles.STORIES)
    def test_never_falls_and_follows_from_the_seed(self, name: str) -> None:
        _, _, values, weights = drawn(name, 200, gaps=0.1, weighted=True)
        story = replace(drawn(name, 5)[0], n_components=4)
        rows = Rows.of(values, weights)
        rows = rows[rows.is_observed.any(axis=1) & (rows.row_weights > 0)]
        story = story.anchored(rows)
        state = FitState(seed_within(story, rows, np.random.default_rng(0)), sample=rows)
        state = fit(story, BatchEM(30, 1e-4), Resident(rows), state)
        found = [refine(story, rows, state, seed_within, passes=25) for _ in range(2)]
        assert oracles.identical(found[0][0].params, found[1][0].params)
        assert found[0][0].trace[-1].mean_objective >= state.trace[-1].mean_objective
        assert oracles.finite(found[0][0].params)
        assert found[0][1] < 25 + 25

    def test_leaves_alone_what_it_may_not_move(self) -> None:
        story, rows, state = heaps()
        pair = mixture(Schema.real(2), 2).anchored(rows)
        of_two = FitState(pair.vague(), sample=rows)
        for each, fitted, options in (
            (replace(story, frozen=frozenset({"mean"})), state, {}),
            (pair, fit(pair, BatchEM(3), Resident(rows), of_two), {}),
            (story, state, {"responsibility": Sampled()}),
            (story, state, {"passes": 0.0}),
        ):
            given = {"passes": 50.0, **options}
            assert refine(each, rows, fitted, seed_within, **given)[0] is fitted  # type: ignore[arg-type]

    def test_the_unit_of_weights_does_not_matter(self) -> None:
        story, rows, _ = heaps()
        ends = []
        for scale in (1.0, 2.0**-20):
            weighted = Rows(rows.values, None, np.full(rows.n_rows, scale))
            flat = replace(story, family=replace(story.family, prior=None), prior=None)
            state = FitState(seed_within(flat, weighted, np.random.default_rng(3)))
            state = fit(flat, BatchEM(50), Resident(weighted), state)
            ends.append(refine(flat, weighted, state, seed_within, passes=40)[0].params)
        assert oracles.distance(ends[0], ends[1]) < 1e-9


def test_a_warm_start_moves_components() -> None:
    """A bad start ends better with moves than without; the state is fresh all the same."""
    _, rows, stuck = heaps()
    story = mixture(Schema.real(2), 4)
    passes = passes_over(story, rows.values)

    def seeding(story: Story, sample: Rows, rng: np.random.Generator) -> Params:
        return stuck.params

    found = {}
    for n in (0.0, 50.0):
        anchored, state = warm_start(
            story, passes, n_init=1, seeding=seeding, refine_passes=n, tolerance=1e-6
        )
        assert (state.step, state.trace, state.outcome) == (0, (), Outcome.RUNNING)
        found[n] = anchored.log_prob(state.params, rows).mean()
    assert found[50.0] > found[0.0] + 0.1
