"""First parameters: a sample over all chunks, seeding that minds gaps, restarts from one seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import oracles
import pytest
from scipy.optimize import linear_sum_assignment

from genstream import start
from genstream.errors import DataError
from genstream.learn import BatchEM, FitState, Outcome, Resident, fit
from genstream.passes import Passes
from genstream.rows import Rows
from genstream.schema import Schema
from genstream.sources import NpySource, NumpySource, Source
from genstream.start import (
    cluster,
    draw_sample,
    params_from_labels,
    rescue_rows,
    seed_centres,
    seed_params,
    warm_start,
)
from genstream.stories import mixture
from genstream.story import Story


def passes_over(values: Any, schema: Any = None, weights: Any = None, chunk: int = 50) -> Passes:
    source = NumpySource(values, schema, weights, chunk_rows=chunk)
    return Passes(source, scheduler="synchronous")


class Reads:
    """A source that notes which chunks are read."""

    def __init__(self, source: Source) -> None:
        self.source, self.chunks = source, list[int]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    def read(self, i: int) -> Rows:
        self.chunks.append(i)
        return self.source.read(i)


class TestSample:
    def test_all_rows_in_order_where_they_fit(self) -> None:
        values = oracles.with_gaps(np.arange(600.0).reshape(300, 2), 0.2, np.random.default_rng(0))
        values = values[~np.isnan(values).all(axis=1)]
        weights = np.arange(1.0, len(values) + 1)
        for n in (None, len(values), 10**9):
            sample = draw_sample(passes_over(values, weights=weights), n, 0)
            np.testing.assert_array_equal(sample.filled(), values)
            np.testing.assert_array_equal(sample.row_weights, weights)

    def test_rows_are_drawn_once_over_all_chunks(self) -> None:
        values = np.arange(5000.0)[:, None]
        sample = draw_sample(passes_over(values, chunk=250), 500, 1)
        drawn = sample.values[:, 0]
        assert len(np.unique(drawn)) == 500
        assert (np.diff(drawn) > 0).all()
        per_chunk = np.bincount((drawn // 250).astype(int), minlength=20)
        # Hypergeometric with mean 25 and deviation 4.6.
        assert per_chunk.min() >= 7
        assert per_chunk.max() <= 43

    def test_the_sample_does_not_depend_on_the_chunking(self) -> None:
        values = np.random.default_rng(0).normal(size=(3000, 2))
        samples = [draw_sample(passes_over(values, chunk=c), 400, 3) for c in (7, 250, 3000)]
        for sample in samples[1:]:
            np.testing.assert_array_equal(sample.values, samples[0].values)
        other = draw_sample(passes_over(values), 400, 4)
        assert not np.array_equal(other.values, samples[0].values)

    def test_only_chunks_with_sampled_rows_are_read(self, tmp_path: Path) -> None:
        np.save(tmp_path / "x.npy", np.arange(5000.0)[:, None])
        source = Reads(NpySource(tmp_path / "x.npy", chunk_rows=100))
        passes = Passes(source, scheduler="synchronous")
        rows = np.array([3, 99, 2500, 2501, 4999])
        np.testing.assert_array_equal(passes.pick(rows).values[:, 0], rows)
        assert sorted(source.chunks) == [0, 25, 49]

    def test_of_rows_in_memory_only_the_sampled_are_looked_at(self) -> None:
        values = np.arange(4000.0).reshape(2000, 2)
        weights = np.arange(2000.0)
        values[7, 1], values[8, 0] = np.inf, np.nan
        passes = passes_over(values, weights=weights)
        found = passes.pick(np.array([8, 50, 1999]))
        np.testing.assert_array_equal(found.filled(), values[[8, 50, 1999]])
        np.testing.assert_array_equal(found.row_weights, [8, 50, 1999])
        with pytest.raises(DataError, match="array: row 7, column 'x1' is infinite"):
            passes.pick(np.array([7, 50]))

    def test_rows_that_say_nothing_are_left_out(self) -> None:
        values = np.arange(400.0).reshape(200, 2)
        values[::4] = np.nan
        weights = np.where(np.arange(200) % 4 == 1, 0.0, 1.0)
        sample = draw_sample(passes_over(values, weights=weights), 1000, 0)
        assert sample.n_rows == 100
        assert sample.is_observed.any(axis=1).all()
        assert (sample.row_weights > 0).all()

    @pytest.mark.parametrize(
        ("values", "weights"),
        [(np.full((60, 2), np.nan), None), (np.ones((60, 2)), np.zeros(60))],
    )
    def test_nothing_to_learn_from_is_said(self, values: Any, weights: Any) -> None:
        story = mixture(Schema.real(2), 2)
        with pytest.raises(DataError, match="nothing can be learned"):
            warm_start(story, passes_over(values, weights=weights))

    def test_memory_is_bounded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(start, "SAMPLE_BYTES", 9 * 3 * 1200)
        values = np.zeros((5000, 3))
        assert draw_sample(passes_over(values), 50_000, 0).n_rows == 1200
        monkeypatch.setattr(start, "SAMPLE_BYTES", 1)
        assert draw_sample(passes_over(values), 50_000, 0).n_rows == 1000

    def test_rescue_rows_are_few_and_repeat(self) -> None:
        sample = Rows.of(np.arange(9000.0).reshape(3000, 3), np.ones(3000))
        kept = rescue_rows(sample, 1)
        assert kept.n_rows == start.RESCUE_ROWS
        assert kept.weights is None
        np.testing.assert_array_equal(kept.values, rescue_rows(sample, 1).values)
        assert np.isin(kept.values, sample.values).all()


class TestSeeding:
    def corners(self, n: int = 400, gaps: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(1)
        z = np.arange(n) % 4
        centres = np.array([[-10, -10, 0], [-10, 10, 5], [10, -10, 5], [10, 10, -5]])
        x = centres[z] + rng.normal(size=(n, 3))
        return oracles.with_gaps((x - x.mean(0)) / x.std(0), gaps, rng), z

    @pytest.mark.parametrize("gaps", [0.0, 0.3])
    def test_separate_clusters_are_found(self, gaps: float) -> None:
        x, z = self.corners(gaps=gaps)
        rows = Rows.of(x)
        seen = rows.is_observed
        centres = seed_centres(rows.values, seen, np.ones(400), 4, np.random.default_rng(0))
        _, labels = cluster(rows.values, seen, np.ones(400), centres)
        table = np.zeros((4, 4))
        np.add.at(table, (z, labels), 1)
        pairs = linear_sum_assignment(-table)
        share = table[pairs].sum() / 400
        assert share == 1.0 if gaps == 0.0 else share > 0.85

    def test_lloyd_never_raises_the_distance(self) -> None:
        x, _ = self.corners()
        seen, ones = np.ones(x.shape, dtype=bool), np.ones(len(x))
        centres = seed_centres(x, seen, ones, 6, np.random.default_rng(2))
        costs = []
        for steps in range(6):
            moved, labels = cluster(x, seen, ones, centres, max_steps=steps)
            costs.append(((x - moved[labels]) ** 2).sum())
        assert np.diff(costs).max() <= 1e-9

    def test_rows_of_no_weight_are_never_centres(self) -> None:
        x, z = self.corners()
        weight = (z != 2).astype(float)
        seen = np.ones(x.shape, dtype=bool)
        for seed in range(10):
            centres = seed_centres(x, seen, weight, 4, np.random.default_rng(seed))
            near = ((centres[:, None] - x[None]) ** 2).sum(axis=2).argmin(axis=1)
            assert (z[near] != 2).all()

    def test_fewer_distinct_rows_than_centres(self) -> None:
        x = np.repeat([[0.0, 1.0], [3.0, -1.0]], 5, axis=0)
        seen = np.ones(x.shape, dtype=bool)
        centres = seed_centres(x, seen, np.ones(10), 6, np.random.default_rng(0))
        assert len(np.unique(centres, axis=0)) == 2

    @pytest.mark.parametrize("kind", oracles.STORIES)
    @pytest.mark.parametrize("gaps", [0.0, 0.6, 0.95])
    def test_seeded_parameters_are_possible(self, kind: str, gaps: float) -> None:
        rng = np.random.default_rng(5)
        story = oracles.make_story(kind, 4, 5)
        values = story.draw(oracles.random_params(story, rng), 300, rng).values
        values = oracles.with_gaps(values, gaps, rng)
        values = values[~np.isnan(values).all(axis=1)]
        story = story.anchored(Rows.of(values))
        params = seed_params(story, Rows.of(values), rng)
        assert oracles.is_possible(story, params)
        assert np.isfinite(story.log_prob(params, Rows.of(values))).all()

    def test_distances_are_reckoned_on_a_bounded_number_of_rows(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(start, "SEED_ROWS", 60)
        x, _ = self.corners()
        story = mixture(Schema.real(3), 4).anchored(Rows.of(x))
        params = seed_params(story, Rows.of(x), np.random.default_rng(0))
        np.testing.assert_allclose(params.weights, 0.25, atol=0.02)

    def test_labels_make_one_m_step(self) -> None:
        x, z = self.corners()
        story = mixture(Schema.real(3), 4, prior=None).anchored(Rows.of(x))
        family: Any = params_from_labels(story, Rows.of(x), z, np.random.default_rng(0)).family
        for k in range(4):
            np.testing.assert_allclose(family.mean[k], x[z == k].mean(axis=0), rtol=1e-10)
            np.testing.assert_allclose(
                family.covariance[k], np.cov(x[z == k].T, ddof=0), rtol=1e-9, atol=1e-12
            )


class TestWarmStart:
    def data(self, kind: str, gaps: float = 0.0) -> tuple[Story, Any, np.ndarray]:
        rng = np.random.default_rng(7)
        story = oracles.make_story(kind, 3)
        truth = oracles.random_params(story, rng, apart=8.0)
        return story, truth, oracles.with_gaps(story.draw(truth, 2000, rng).values, gaps, rng)

    @pytest.mark.parametrize("gaps", [0.0, 0.25])
    @pytest.mark.parametrize("kind", oracles.STORIES)
    def test_finds_the_components(self, kind: str, gaps: float) -> None:
        story, truth, values = self.data(kind, gaps)
        passes = passes_over(values, story.schema, chunk=300)
        anchored, state = warm_start(story, passes, n_init=4)
        state = fit(anchored, BatchEM(50, 1e-6), passes, state)
        rows = Rows.of(values)
        mean = anchored.log_prob(state.params, rows).mean()
        assert mean > anchored.log_prob(truth, rows).mean() - 0.02

    @pytest.mark.parametrize("kind", ["full", "mixed"])
    def test_everything_follows_from_the_seed(self, kind: str) -> None:
        story, _, values = self.data(kind, 0.2)
        runs = [
            warm_start(story, passes_over(values, story.schema, chunk=c), seed=s, sample_rows=900)
            for c, s in ((300, 1), (300, 1), (77, 1), (300, 2))
        ]
        for anchored, state in runs[1:3]:
            assert oracles.identical(state.params, runs[0][1].params)
            assert anchored.to_json() == runs[0][0].to_json()
        assert not oracles.identical(runs[3][1].params, runs[0][1].params)

    def test_the_best_of_the_starts_goes_on(self) -> None:
        story, _, values = self.data("full")
        seen: list[tuple[int, float]] = []
        passes = passes_over(values)
        anchored, state = warm_start(
            story, passes, n_init=6, long_steps=0, on_start=lambda i, value: seen.append((i, value))
        )
        assert [i for i, _ in seen] == list(range(6))
        again = fit(anchored, BatchEM(1), passes, state)
        assert again.trace[0].mean_objective >= max(value for _, value in seen) - 1e-9

    def test_the_state_is_fresh(self) -> None:
        story, _, values = self.data("diag", 0.2)
        weights = np.ones(len(values))
        _, state = warm_start(story, passes_over(values, weights=weights))
        assert (state.step, state.trace) == (0, ())
        assert state.stats is not None
        assert state.stats.weight == (~np.isnan(values)).any(axis=1).sum()
        assert state.outcome is Outcome.RUNNING
        assert state.sample is not None
        assert state.sample.weights is None

    def test_starts_that_are_not_finite_are_refused(self) -> None:
        story, _, values = self.data("full")

        def broken(story: Story, sample: Rows, rng: np.random.Generator) -> Any:
            params = seed_params(story, sample, rng)
            params.family.mean[:] = np.nan  # type: ignore[union-attr]
            return params

        with pytest.raises(DataError, match="no start gave a finite log-likelihood"):
            warm_start(story, passes_over(values), seeding=broken)

    @pytest.mark.parametrize("prior", ["weak", None])
    @pytest.mark.parametrize("kind", ["full", "tied", "diag", "spherical"])
    def test_more_components_than_rows(self, kind: str, prior: str | None) -> None:
        values = np.random.default_rng(0).normal(size=(5, 2))
        story = mixture(Schema.real(2), 12, covariance=kind, prior=prior)
        anchored, state = warm_start(story, passes_over(values), n_init=2)
        assert oracles.is_possible(anchored, state.params)

    def test_one_component_is_the_plain_fit(self) -> None:
        values = np.random.default_rng(0).normal(size=(500, 2)) @ [[2.0, 0.3], [0.0, 1.0]]
        story = mixture(Schema.real(2), 1, prior=None)
        _, state = warm_start(story, passes_over(values))
        family: Any = state.params.family
        np.testing.assert_allclose(family.mean[0], values.mean(axis=0), rtol=1e-10)
        np.testing.assert_allclose(family.covariance[0], np.cov(values.T, ddof=0), rtol=1e-10)

    def test_weights_count(self) -> None:
        """Rows of weight 0 between two heaps are as if they were not there."""
        rng = np.random.default_rng(0)
        heaps = np.repeat([[-5.0, 0.0], [5.0, 0.0]], 100, axis=0) + rng.normal(size=(200, 2))
        noise = rng.normal(0, 30, (400, 2))
        values = np.vstack([heaps, noise])
        weights = np.repeat([1.0, 0.0], [200, 400])
        story = mixture(Schema.real(2), 2)
        one = warm_start(story, passes_over(values, weights=weights))
        two = warm_start(story, passes_over(heaps))
        assert oracles.identical(one[1].params, two[1].params)

    def test_seeding_goes_where_the_weight_is(self) -> None:
        """Two clusters of three heaps: the far one weighs next to nothing, so near ones part."""
        rng = np.random.default_rng(0)
        values = np.repeat([[-5.0], [5.0], [60.0]], 100, axis=0) + rng.normal(size=(300, 1))
        weights = np.repeat([1.0, 1.0, 1e-6], 100)
        story = mixture(Schema.real(1), 2)
        for weight, parted in ((weights, True), (None, False)):
            rows = Rows.of(values, weight)
            anchored = story.anchored(rows)
            params = seed_params(anchored, rows, np.random.default_rng(1))
            label = anchored.infer(params, rows).component
            assert (label[0] != label[150]) == parted

    def test_a_column_nine_tenths_missing_still_separates(self) -> None:
        rng = np.random.default_rng(3)
        z = rng.integers(0, 2, 3000)
        values = np.column_stack([10.0 * z + rng.normal(size=3000), rng.normal(size=3000)])
        values[:, 1] += 20.0 * z
        values[rng.random(3000) < 0.9, 1] = np.nan
        anchored, state = warm_start(mixture(Schema.real(2), 2), passes_over(values))
        component = anchored.infer(state.params, Rows.of(values)).component
        share = (component == z).mean()
        assert max(share, 1 - share) == 1.0


def test_resident_rows_are_one_chunk() -> None:
    rows = Rows.of(np.eye(3))
    resident = Resident(rows)
    assert resident.n_chunks == 1
    assert resident.read(0) is rows
    assert resident.fold(lambda chunk, given: (chunk, given)) == (0, rows)
    state = FitState(mixture(Schema.real(3), 1).vague())
    assert state.events == []
