"""The E-step of many components against that of all, and starts at large K."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import oracles
import pytest
from numpy.typing import NDArray
from stories_zoo import ZOO, drawn, passes_over

from genstream import start
from genstream.errors import ConfigError
from genstream.incremental import IncrementalEM
from genstream.learn import BatchEM, EStep, FitState, Outcome, Resident, fit
from genstream.nearest import SHORT, Search
from genstream.online import OnlineEM
from genstream.refine import MOST_SPLITS, _tried, refine
from genstream.responsibility import MANY, Nearest, by_size, climbs, named, soft
from genstream.rows import Rows
from genstream.schema import Schema
from genstream.start import (
    CANDIDATES_EACH,
    cluster_many,
    default_learner,
    distances,
    draw_many,
    exchange,
    seed_centres,
    seed_many,
    warm_start,
)
from genstream.stats import Placed
from genstream.stories import mixture
from genstream.story import Params, Story

Array = NDArray[Any]
SMALL = Nearest(cell_rows=128)


def crowd(name: str, n_rows: int, **options: Any) -> tuple[Story, Params, Rows]:
    """A story of the zoo with each component many times over, and rows drawn from it."""
    story, params, values, weights = drawn(name, n_rows, **options)
    times = 20
    rows = Rows.of(values, weights)
    many = replace(story, n_components=times * story.n_components).anchored(rows)
    index = list(range(story.n_components)) * times
    params = params.take(index)
    weights = np.random.default_rng(1).dirichlet(np.full(len(index), 3.0))
    return many, replace(params, weights=weights), rows


@cache
def heaps(k: int = 512, d: int = 6, n: int = 40_000, dtype: str = "float64") -> Any:
    """Rows of many Gaussians, which overlap, and the story and parameters they are drawn from."""
    rng = np.random.default_rng([k, d])
    story = mixture(Schema.real(d), k, dtype=dtype)
    factor = np.tril(rng.normal(0, 0.3, (k, d, d)), -1)
    factor[:, np.arange(d), np.arange(d)] = rng.uniform(0.4, 1.2, (k, d))
    mean = 3.0 * rng.normal(size=(k, d))
    kind: Any = story.family.params_type
    weights = rng.dirichlet(np.full(k, 2.0))
    params = Params(weights, kind(mean, factor @ factor.swapaxes(1, 2)))
    values = story.draw(params, n, rng).values
    return story.anchored(Rows.of(values)), params, values


def distance(left: Any, right: Any) -> float:
    """Largest difference over the leaves of two records, each to its own size or 1."""
    return max(
        float(np.abs(np.asarray(a) - b).max() / max(1.0, np.abs(b).max()))
        for (_, _, a), (_, _, b) in zip(left.leaves(), right.leaves(), strict=True)
        if np.size(a)
    )


def begun(story: Story, values: Array) -> Params:
    """Parameters that EM has still to better: a component at each of some rows."""
    rng = np.random.default_rng(0)
    params = story.vague()
    family: Any = params.family
    mean = values[rng.choice(len(values), story.n_components, replace=False)]
    covariance = 0.1 * np.asarray(family.covariance)
    return replace(params, family=replace(family, mean=mean, covariance=covariance))


class TestStatistics:
    @pytest.mark.parametrize("name", sorted(ZOO))
    def test_of_all_components_they_are_those_of_soft_em(self, name: str) -> None:
        story, params, rows = crowd(name, 600, gaps=0.15, weighted=True)
        exact = story.e_step(params, rows)
        found = story.e_step(params, rows, replace(SMALL, checked=1.0))
        assert distance(exact, found) < 1e-9

    @pytest.mark.parametrize("gaps", [0.0, 0.15])
    @pytest.mark.parametrize("name", sorted(ZOO))
    def test_they_are_those_of_responsibilities_among_lists(self, name: str, gaps: float) -> None:
        story, params, rows = crowd(name, 600, gaps=gaps, weighted=True)
        found = story.e_step(params, rows, SMALL)
        resp = among_lists(story, params, rows, SMALL)
        expected = story.e_step(params, rows, resp)
        assert distance(replace(expected, objective=found.objective), found) < 1e-7

    def test_their_objective_is_the_bound(self) -> None:
        story, params, values = heaps(64, 3, 2000)
        rows = Rows.of(values, np.random.default_rng(0).uniform(0, 2, len(values)))
        found = story.e_step(params, rows, SMALL)
        resp = among_lists(story, params, rows, SMALL)
        joint = oracles.log_joint(story, params, values)
        entropy = -(resp * np.log(np.where(resp > 0, resp, 1.0))).sum(axis=1)
        bound = rows.row_weights @ ((resp * joint).sum(axis=1) + entropy)
        assert found.objective == pytest.approx(bound, rel=1e-10)
        assert found.objective < story.e_step(params, rows).objective

    def test_rows_with_nothing_observed_or_no_weight_add_nothing(self) -> None:
        story, params, values = heaps(64, 3, 2000)
        rows = Rows.of(values)
        plain = story.e_step(params, rows, SMALL)
        gone = Rows.of(np.vstack([values, np.full((30, 3), np.nan)]))
        found = story.e_step(params, gone, replace(SMALL, checked=1.0))
        exact = story.e_step(params, rows)
        assert (found.n_rows, found.n_unobserved, found.weight) == (2030, 30, 2000.0)
        assert found.objective == pytest.approx(exact.objective, rel=1e-12)
        weightless = story.e_step(params, Rows.of(values, np.zeros(2000)), SMALL)
        assert weightless.objective == weightless.weight == 0.0
        assert not weightless.sum_r.any()
        assert plain.weight == 2000.0

    def test_they_add_over_chunks(self) -> None:
        story, params, values = heaps(128, 4, 12_000)
        whole = story.e_step(params, Rows.of(values), SMALL)
        pieces = [story.e_step(params, Rows.of(each), SMALL) for each in np.split(values, [5000])]
        total = pieces[0].merge(pieces[1])
        exact = story.e_step(params, Rows.of(values))
        assert total.weight == whole.weight
        for found in (whole, total):
            assert 0 <= (exact.objective - found.objective) / len(values) < 5e-3
            assert np.abs(found.sum_r - exact.sum_r).max() < 0.02 * exact.sum_r.max()
            assert found.sum_r.sum() == pytest.approx(len(values))

    def test_few_rows_or_components_are_scored_as_ever(self) -> None:
        story, params, values = heaps(128, 4, 12_000)
        few = Rows.of(values[: 2 * SMALL.cell_rows - 1])
        assert distance(story.e_step(params, few), story.e_step(params, few, SMALL)) < 1e-9
        narrow = replace(story, n_components=SHORT)
        some = params.take(list(range(SHORT)))
        rows = Rows.of(values)
        exact, found = narrow.e_step(some, rows), narrow.e_step(some, rows, SMALL)
        assert distance(exact, found) < 1e-9

    def test_outliers_get_what_they_are_worth(self) -> None:
        story, params, values = heaps(256, 4, 20_000)
        values = values.copy()
        values[::500] += 60.0
        rows = Rows.of(values)
        found, exact = story.e_step(params, rows, SMALL), story.e_step(params, rows)
        assert np.isfinite(found.objective)
        assert 0 <= (exact.objective - found.objective) / len(values) < 5e-3

    @pytest.mark.parametrize("dtype", ["float64", "float32"])
    def test_the_gap_is_small(self, dtype: str) -> None:
        story, params, values = heaps(dtype=dtype)
        rows = Rows.of(values.astype(dtype))
        found, exact = (
            story.e_step(params, rows, Nearest(cell_rows=256)),
            story.e_step(params, rows),
        )
        assert -1e-4 < (exact.objective - found.objective) / len(values) < 5e-3
        assert distance(exact.family, found.family) < 0.05

    def test_a_row_beyond_float32_is_done_in_float64(self) -> None:
        story, params, values = heaps(64, 3, 2000, "float32")
        values = values.copy()
        values[7] = 1e25
        found = story.e_step(params, Rows.of(values), SMALL)
        assert all(np.isfinite(value).all() for _, _, value in found.leaves())

    def test_where_lists_would_lose_much_all_are_scored(self) -> None:
        story, params, values = heaps(128, 4, 12_000)
        rows = Rows.of(values)
        strict = replace(SMALL, tolerance=0.0, checked=0.0)
        cells = list(searching(story, params, rows, strict).cells())
        assert max(len(cell.components) for cell in cells) == 128
        loose = story.e_step(params, rows, replace(SMALL, tolerance=1.0, checked=0.0))
        found, exact = story.e_step(params, rows, strict), story.e_step(params, rows)
        assert exact.objective - found.objective < exact.objective - loose.objective

    def test_each_row_meets_few_components(self) -> None:
        story, params, values = heaps()
        search = searching(story, params, Rows.of(values), Nearest(cell_rows=256))
        cells = list(search.cells())
        seen = np.sort(np.concatenate([cell.rows for cell in cells]))
        np.testing.assert_array_equal(seen, np.arange(len(values)))
        met = sum(len(cell.rows) * len(cell.components) for cell in cells) / len(values)
        assert met < story.n_components / 4


def searching(story: Story, params: Params, rows: Rows, rule: Nearest) -> Search:
    return Search(story.family, params.family, np.log(params.weights), rows, rule, (0, 0))


def among_lists(story: Story, params: Params, rows: Rows, rule: Nearest) -> Array:
    """(n, K) responsibilities among the list of each row's cell, computed under all components."""
    posterior = story.infer(params, rows)
    joint = np.log(np.maximum(posterior.responsibilities, 1e-300)) + posterior.log_prob[:, None]
    resp = posterior.responsibilities.copy()
    search = searching(story, params, rows, rule)
    for cell in search.cells():
        listed = np.zeros(story.n_components, dtype=bool)
        listed[cell.components] = True
        value = np.logaddexp.reduce(joint[np.ix_(cell.rows, cell.components)], axis=1)
        kept = cell.rows[value >= search.floor]
        mine = np.where(listed, resp[kept], 0.0)
        resp[kept] = mine / mine.sum(axis=1, keepdims=True)
    return resp


class TestLearning:
    def test_lists_follow_from_parameters_rows_and_seed(self) -> None:
        story, _, values = heaps(128, 4, 12_000)
        params = begun(story, values)
        found = [
            passes_over(story, values, chunk=3000, workers=workers).fold(
                EStep(story, params, SMALL, seed=3, step=step)
            )
            for workers, step in ((1, 0), (3, 0), (2, 9))
        ]
        assert oracles.identical(found[0], found[1])
        assert oracles.identical(found[0], found[2])

    def test_em_by_lists_ends_where_em_does(self) -> None:
        story, _, values = heaps(128, 4, 12_000)
        rows = Rows.of(values)
        start = FitState(begun(story, values))
        ends = []
        for rule in (soft, SMALL):
            state = fit(story, BatchEM(10, 0.0, rule), Resident(rows), start)
            assert state.outcome is Outcome.MAX_STEPS
            ends.append(story.log_prob(state.params, rows).mean())
        assert abs(ends[0] - ends[1]) < 0.01

    def test_a_fall_by_other_lists_is_no_fall(self) -> None:
        story, params, values = heaps(128, 4, 12_000)
        state = FitState(params)
        rough = Nearest(cell_rows=64, checked=0.0)
        state = fit(story, BatchEM(12, 1e-7, rough), Resident(Rows.of(values)), state)
        assert state.outcome in (Outcome.MAX_STEPS, Outcome.CONVERGED)

    @pytest.mark.parametrize(
        "learner",
        [
            BatchEM(10, 1e-4, SMALL, accelerate=True),
            OnlineEM(batch_rows=1500, max_passes=2, responsibility=SMALL),
            IncrementalEM(max_passes=5, tasks=8, responsibility=SMALL),
        ],
    )
    def test_every_learner_takes_it(self, learner: Any) -> None:
        story, _, values = heaps(128, 4, 12_000)
        state = FitState(begun(story, values))
        rows = Rows.of(values)
        before = story.log_prob(state.params, rows).mean()
        state = fit(story, learner, passes_over(story, values, chunk=2500), state)
        assert state.outcome in (Outcome.MAX_STEPS, Outcome.CONVERGED)
        assert story.log_prob(state.params, rows).mean() > before + 0.5

    def test_it_has_a_name_and_limits(self) -> None:
        assert named("nearest") == Nearest()
        for wrong in ({"least": 1.0}, {"checked": -0.1}, {"cell_rows": 0}, {"tolerance": -1.0}):
            with pytest.raises(ConfigError):
                Nearest(**wrong)


class TestStart:
    def test_centres_one_at_a_time_are_drawn_by_squared_distance(self) -> None:
        x = np.array([[0.0], [1.0], [3.0], [7.0]])
        weight = np.array([1.0, 2.0, 1.0, 0.5])
        observed = np.ones(x.shape, dtype=bool)
        expected = np.zeros((4, 4))
        for i in range(4):
            mass = weight * (x[:, 0] - x[i, 0]) ** 2
            expected[i] = weight[i] / weight.sum() * mass / mass.sum()
        n = 2_000
        found = np.zeros((4, 4))
        rng = np.random.default_rng(0)
        for _ in range(n):
            centres, _ = draw_many(x, observed, weight, 2, rng)
            found[tuple(np.searchsorted(x[:, 0], centres[:, 0]))] += 1 / n
        assert np.abs(found - expected).max() < 5 * np.sqrt(0.25 / n)

    @pytest.mark.parametrize("gaps", [0.0, 0.2])
    def test_centres_are_rows_none_twice_and_labels_the_closest(self, gaps: float) -> None:
        rng = np.random.default_rng(0)
        x = rng.normal(size=(2000, 3)).astype(np.float32).astype(np.float64)
        x = np.concatenate([x, x[:1000]])
        observed = rng.random(x.shape) >= gaps
        observed[~observed.any(axis=1), 0] = True
        x[~observed] = 0.0
        centres, labels = seed_many(x, observed, np.ones(len(x)), 700, rng)
        assert len(np.unique(centres, axis=0)) == 700
        rows = {tuple(row) for row in x}
        assert all(tuple(centre) in rows for centre in centres)
        far = distances(x, observed, centres)
        own = far[np.arange(len(x)), labels]
        np.testing.assert_allclose(own, far.min(axis=1), atol=1e-4)

    def test_fewer_distinct_rows_than_centres_give_repeated_ones(self) -> None:
        x = np.repeat(np.arange(5.0), 40)[:, None]
        centres, labels = seed_many(
            x, np.ones(x.shape, dtype=bool), np.ones(200), 12, np.random.default_rng(0)
        )
        assert len(centres) == 12
        assert set(centres[:, 0]) == set(x[:, 0])
        np.testing.assert_array_equal(centres[labels, 0], x[:, 0])

    def test_many_centres_spread_as_well_as_those_drawn_one_by_one(self) -> None:
        x = heaps(256, 4, 6000)[2]
        observed, weight = np.ones(x.shape, dtype=bool), np.ones(len(x))
        left = []
        for seeding in (seed_many, seed_centres):
            rng = np.random.default_rng(0)
            found: Any = seeding(x, observed, weight, 256, rng)
            centres = found[0] if isinstance(found, tuple) else found
            left.append(distances(x, observed, centres).min(axis=1).sum())
        assert left[0] < 1.05 * left[1]

    def test_exchanges_are_those_of_a_plain_search(self) -> None:
        rng = np.random.default_rng(0)
        points, weight = rng.normal(size=(60, 3)), rng.uniform(0.1, 3, 60)
        squared = ((points[:, None] - points) ** 2).sum(axis=2)

        def left(centres: Array) -> float:
            return float(weight @ squared[:, centres].min(axis=1))

        k, draws = 20, np.random.default_rng(1)
        expected, n_exchanged = np.arange(k), 0
        for _ in range(CANDIDATES_EACH * k):
            mass = (weight * squared[:, expected].min(axis=1)).cumsum()
            new = int(np.searchsorted(mass, draws.random() * mass[-1], side="right"))
            tries = [np.where(np.arange(k) == i, new, expected) for i in range(k)]
            best = min(tries, key=left)
            if left(best) < left(expected):
                expected, n_exchanged = best, n_exchanged + 1
        assert n_exchanged > 10
        found = exchange(points, weight, k, np.random.default_rng(1))
        np.testing.assert_array_equal(found, expected)

    @pytest.mark.parametrize("gaps", [0.0, 0.15])
    def test_every_one_of_many_separate_heaps_has_a_centre(self, gaps: float) -> None:
        rng = np.random.default_rng(3)
        heart = rng.uniform(-20, 20, (600, 6))
        heap = np.repeat(np.arange(600), 20)
        x = heart[heap] + rng.normal(size=(len(heap), 6)) * 0.3
        observed = rng.random(x.shape) >= gaps
        x[~observed] = 0.0
        _, label = seed_many(x, observed, np.ones(len(x)), 600, rng)
        whole = observed.all(axis=1)
        pairs = np.unique(np.stack([heap[whole], label[whole]]), axis=1)
        # Draws alone leave out some forty heaps, while as many have two.
        assert (np.bincount(pairs[0], minlength=600) == 1).sum() >= 590

    def test_lloyds_step_takes_rows_to_the_closest_mean(self) -> None:
        rng = np.random.default_rng(0)
        x, label = rng.normal(size=(500, 2)), rng.integers(0, 9, 500)
        label[label == 4] = 5
        weight = rng.uniform(0.5, 2, 500)
        found = cluster_many(x, np.ones(x.shape, dtype=bool), weight, label, 9)
        means = np.array(
            [
                np.average(x[label == k], axis=0, weights=weight[label == k])
                for k in range(9)
                if k != 4
            ]
        )
        expected = np.delete(np.arange(9), 4)[
            ((x[:, None] - means) ** 2).sum(axis=2).argmin(axis=1)
        ]
        np.testing.assert_array_equal(found, expected)

    @pytest.mark.parametrize("name", ["full", "tied", "mixed", "factors"])
    def test_many_components_are_begun_as_few_are(self, name: str, monkeypatch: Any) -> None:
        story, _, values, weights = drawn(name, 400, gaps=0.1, weighted=True)
        rows = Rows.of(values, weights)
        story = replace(story, n_components=36).anchored(rows)
        labels = np.random.default_rng(0).integers(0, 35, 400)
        few = start.params_from_labels(story, rows, labels, np.random.default_rng(1))
        monkeypatch.setattr(start, "MANY", 36)
        many = start.params_from_labels(story, rows, labels, np.random.default_rng(1))
        assert distance(few, many) < 1e-9

    def test_a_thousand_components_are_found_in_a_few_steps(self) -> None:
        story, params, values = heaps(600, 3, 12_000)
        passes = passes_over(story, values, chunk=6_000)
        vague = mixture(Schema.real(3), 600)
        asked: Any = {"responsibility": by_size(600), "n_init": 1, "long_steps": 0}
        begun, state = warm_start(vague, passes, **asked)
        assert state.sample is not None
        rows = Rows.of(values)
        assert (state.params.weights > 0).all()
        best = story.log_prob(params, rows).mean()
        assert begun.log_prob(state.params, rows).mean() > best - 0.1
        again = warm_start(vague, passes, **asked)[1]
        assert oracles.identical(state.params, again.params)

    def test_rules_go_by_size(self) -> None:
        assert by_size(255) is soft
        assert by_size(MANY) == Nearest()
        assert climbs(soft)
        assert climbs(Nearest())
        assert not climbs(named("hard"))
        learner: Any = default_learner(10**7, n_components=2000)
        online, batch = learner.learners
        assert online.responsibility == batch.responsibility == Nearest()
        assert online.batch_rows >= 16 * 2000
        assert batch.accelerate

    def test_refinement_tries_no_more_than_pays(self) -> None:
        assert _tried(8, 0, 0) == list(range(8))
        some = _tried(5000, 0, 1)
        assert len(set(some)) == len(some) == MOST_SPLITS
        assert some != _tried(5000, 0, 2)
        story, params, values = heaps(600, 3, 2000)
        state = FitState(params)
        assert refine(story, Rows.of(values), state, start.seed_within, passes=9.0) == (state, 0.0)


def test_statistics_are_put_in_their_places() -> None:
    story, params, values = heaps(8, 3, 400)
    rows = Rows.of(values)
    whole = story.e_step(params, rows)
    total = Placed(8)
    for index in ([5, 0, 3], [1, 2, 4, 6, 7], [0, 1]):
        scale = 0.5 if len(index) == 2 else 1.0
        total.add(whole.take(index).scale(scale), np.array(index))
    found = total.close()
    weight = np.array([1.5, 1.5, 1, 1, 1, 1, 1, 1])
    np.testing.assert_allclose(found.sum_r, whole.sum_r * weight)
    assert whole.family is not None
    np.testing.assert_allclose(found.family.sum_wx, whole.family.sum_wx * weight[:, None])
    assert found.objective == pytest.approx(2.5 * whole.objective)
