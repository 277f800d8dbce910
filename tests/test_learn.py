"""Learning: every story climbs and finds its parameters, ends in an outcome, and can be resumed."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.optimize import linear_sum_assignment

from genstream.errors import CorruptError
from genstream.learn import (
    MAX_RESCUES,
    ROUNDING,
    BatchEM,
    FitState,
    Outcome,
    Resident,
    StepInfo,
    fit,
    story_of,
)
from genstream.passes import Passes
from genstream.responsibility import hard
from genstream.rows import Rows
from genstream.schema import Column, Schema
from genstream.sources import NumpySource
from genstream.start import params_from_labels, warm_start
from genstream.stories import mixture
from genstream.story import Params, Story, StoryStats

K = 3


def problem(
    kind: str, n_rows: int, gaps: float = 0.0, seed: int = 1, **options: Any
) -> tuple[Story, Params, np.ndarray, np.ndarray]:
    """A story, well separated true parameters, rows drawn from them and their components."""
    rng = np.random.default_rng([seed, 31])
    story = oracles.make_story(kind, K, **options)
    truth = oracles.random_params(story, rng, apart=7.0)
    draw = story.draw(truth, n_rows, rng)
    return story, truth, oracles.with_gaps(draw.values, gaps, rng), draw.component


def started(story: Story, values: np.ndarray, labels: np.ndarray, **rows: Any) -> FitState:
    """A state whose parameters come from labels of which a third is wrong."""
    rng = np.random.default_rng(3)
    wrong = rng.random(len(labels)) < 1 / 3
    labels = np.where(wrong, rng.integers(0, K, len(labels)), labels)
    sample = Rows.of(values, **rows)
    return FitState(
        params_from_labels(story, sample, labels, np.random.default_rng(0)), sample=sample
    )


def aligned(params: Params, truth: Params) -> Params:
    """The same components in the order of the true ones."""
    mine: Any = params.family
    true: Any = truth.family
    gap = ((mine.mean[:, None] - true.mean[None]) ** 2).sum(axis=2)
    order = linear_sum_assignment(gap.T)[1]
    fields = {
        name: value[order] if "component" in names else value
        for name, names, value in mine.leaves()
    }
    return Params(params.weights[order], type(mine)(**fields))


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("prior", ["weak", None])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("gaps", [0.0, 0.2])
@pytest.mark.parametrize("kind", oracles.STORIES)
def test_every_story_climbs_and_recovers(
    kind: str, gaps: float, weighted: bool, prior: str | None, dtype: str
) -> None:
    n = 3000
    story, truth, values, labels = problem(kind, n, gaps, prior=prior, dtype=dtype)
    weights = np.random.default_rng(0).choice([0.0, 1.0, 2.5], n) if weighted else None
    rows = Rows.of(values, weights)
    story = story.anchored(rows)
    state = fit(story, BatchEM(60, 1e-6), Resident(rows), started(story, values, labels))
    assert state.outcome is Outcome.CONVERGED
    trace = np.array([info.mean_objective for info in state.trace])
    assert np.diff(trace).min() >= -ROUNDING[dtype] * (1 + np.abs(trace).max())
    assert trace[-1] > trace[0]
    found = aligned(state.params, truth)
    assert oracles.distance(found.family, truth.family) < 0.25
    np.testing.assert_allclose(found.weights, truth.weights, atol=0.05)
    assert oracles.is_possible(story, found)


@pytest.mark.parametrize("kind", oracles.STORIES)
def test_the_objective_is_that_of_brute_force(kind: str) -> None:
    story, _, values, labels = problem(kind, 150, 0.3)
    rows = Rows.of(values)
    story = story.anchored(rows)
    state = started(story, values, labels)
    after = fit(story, BatchEM(1), Resident(rows), state)
    info = after.trace[0]
    assert info.loglik == pytest.approx(oracles.log_prob(story, state.params, values).sum())
    assert info.log_prior == story.log_prior(state.params)
    assert info.mean_loglik == pytest.approx(info.loglik / info.weight)
    assert info.n_unobserved == int(np.isnan(values).all(axis=1).sum())


class TestOutcomes:
    def setup_method(self) -> None:
        story, _, values, labels = problem("full", 400, prior=None)
        self.rows = Rows.of(values)
        self.story = story.anchored(self.rows)
        self.state = started(self.story, values, labels)

    def run(self, learner: BatchEM, passes: Any = None, **changes: Any) -> FitState:
        passes = passes or Resident(self.rows)
        return fit(self.story, learner, passes, replace(self.state, **changes))

    def test_converged(self) -> None:
        state = self.run(BatchEM(100, 1e-3))
        assert state.outcome is Outcome.CONVERGED
        assert len(state.trace) == state.step < 100
        gains = np.diff([info.mean_objective for info in state.trace])
        assert abs(gains[-1]) < 1e-3 <= np.abs(gains[:-1]).min()

    def test_max_steps(self) -> None:
        state = self.run(BatchEM(3, 0.0))
        assert state.outcome is Outcome.MAX_STEPS
        assert [info.step for info in state.trace] == [1, 2, 3]

    def test_a_state_that_ended_is_left_alone(self) -> None:
        state = self.run(BatchEM(3, 0.0))
        assert fit(self.story, BatchEM(9), Resident(self.rows), state) is state

    def test_decreased(self) -> None:
        falling = Objectives(self.rows, [0.0, 5.0, 4.0])
        state = self.run(BatchEM(10), falling)
        assert state.outcome is Outcome.DECREASED
        assert state.step == 3

    @pytest.mark.parametrize(("fall", "outcome"), [(1e-12, "converged"), (1e-3, "decreased")])
    def test_a_fall_of_rounding_is_none(self, fall: float, outcome: str) -> None:
        n = len(self.rows.values)
        values = [0.0, n * 1.0, n * (1.0 - fall)]
        state = self.run(BatchEM(10), Objectives(self.rows, values))
        assert state.outcome.value == outcome

    def test_a_ridge_may_make_the_objective_fall(self) -> None:
        story, _, _, _ = problem("full", 400, prior=None, reg_covar=0.1)
        self.story = story.anchored(self.rows)
        assert not self.story.monotone
        state = self.run(BatchEM(4), Objectives(self.rows, [0.0, 5e4, 4e4, 3e4]))
        assert state.outcome is Outcome.MAX_STEPS

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_nonfinite_keeps_the_parameters(self, value: float) -> None:
        state = self.run(BatchEM(10), Objectives(self.rows, [0.0, value]))
        assert state.outcome is Outcome.NONFINITE
        assert state.step == 2
        assert oracles.is_possible(self.story, state.params)

    def test_every_outcome_but_success_advises(self) -> None:
        for outcome in Outcome:
            assert bool(outcome.advice) == (outcome is not Outcome.CONVERGED)

    def test_steps_are_told(self) -> None:
        seen: list[tuple[int, StepInfo]] = []
        final = fit(
            self.story,
            BatchEM(4, 0.0),
            Resident(self.rows),
            self.state,
            on_step=[lambda state, info: seen.append((state.step, info))],
        )
        assert [step for step, _ in seen] == [1, 2, 3, 4]
        assert tuple(info for _, info in seen) == final.trace
        assert all(info.seconds > 0 for _, info in seen)

    def test_a_callback_may_stop_a_fit(self) -> None:
        def stop(state: FitState, info: StepInfo) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            fit(self.story, BatchEM(4), Resident(self.rows), self.state, on_step=[stop])


class Objectives:
    """Passes over rows in memory whose objective is replaced by a script."""

    n_chunks = 1

    def __init__(self, rows: Rows, values: list[float]) -> None:
        self.rows, self.values = rows, iter(values)

    def read(self, chunk: int, /) -> Rows:
        return self.rows

    def fold(self, work: Any) -> StoryStats:
        return replace(work(0, self.rows), objective=next(self.values))


class TestTolerance:
    @pytest.mark.parametrize("kind", oracles.STORIES)
    def test_is_a_row_and_does_not_depend_on_how_many_there_are(self, kind: str) -> None:
        story, _, values, labels = problem(kind, 500, 0.1, prior=None)
        story = story.anchored(Rows.of(values))
        state = started(story, values, labels)
        traces = []
        for times in (1, 2, 8):
            rows = Rows.of(np.tile(values, (times, 1)))
            done = fit(story, BatchEM(200, 1e-5), Resident(rows), state)
            traces.append([info.mean_objective for info in done.trace])
        assert len(traces[0]) == len(traces[1]) == len(traces[2])
        np.testing.assert_allclose(traces[2], traces[0], rtol=1e-9)


class TestRescue:
    def test_an_empty_component_is_put_where_rows_are_badly_explained(self) -> None:
        story, truth, values, labels = problem("full", 600)
        rows = Rows.of(values)
        story = story.anchored(rows)
        good = params_from_labels(story, rows, labels, np.random.default_rng(0))
        family: Any = good.family
        # Component 2 sits where no row is; its own rows are badly explained by the other two.
        mean = family.mean.copy()
        mean[2] = 1e6
        start = replace(good, family=replace(family, mean=mean))
        flat = replace(story, prior=None, family=replace(story.family, prior=None))
        state = fit(flat, BatchEM(100), Resident(rows), FitState(start, sample=rows))
        assert state.outcome is Outcome.CONVERGED
        assert "component 2 was empty" in state.events[0]
        assert state.events[0].startswith("step 1: ")
        assert state.rescues[2] >= 1
        found = aligned(state.params, truth)
        assert oracles.distance(found.family, truth.family) < 0.25

    @pytest.mark.parametrize("kind", ["full", "diag", "spherical", "mixed"])
    def test_a_component_on_one_repeated_row_leaves_finite_parameters(self, kind: str) -> None:
        story, _, values, labels = problem(kind, 300, prior=None)
        values[:20] = values[0]
        labels[:20] = 0
        labels[labels == 0] = np.where(np.flatnonzero(labels == 0) < 20, 0, 1)
        rows = Rows.of(values)
        story = story.anchored(rows)
        start = FitState(
            params_from_labels(story, rows, labels, np.random.default_rng(0)), sample=rows
        )
        state = fit(story, BatchEM(60), Resident(rows), start)
        assert state.outcome in (Outcome.CONVERGED, Outcome.MAX_STEPS)
        assert oracles.is_possible(story, state.params)
        assert all(count <= MAX_RESCUES for count in state.rescues)

    def test_rescue_follows_from_the_seed(self) -> None:
        story, _, values, labels = problem("full", 600)
        rows = Rows.of(values)
        story = story.anchored(rows)
        params = params_from_labels(story, rows, np.minimum(labels, 1), np.random.default_rng(0))
        family: Any = params.family
        mean = family.mean.copy()
        mean[2] = 1e6
        params = replace(params, family=replace(family, mean=mean))
        found = []
        for seed in (5, 5, 6):
            state = FitState(params, sample=rows, seed=seed)
            found.append(fit(story, BatchEM(1, 0.0), Resident(rows), state))
            assert len(found[-1].events) == 1
        assert oracles.identical(found[0].params, found[1].params)
        assert not oracles.identical(found[0].params, found[2].params)

    def test_without_a_sample_there_is_no_rescue(self) -> None:
        values = np.repeat(np.arange(4.0)[:, None], 20, axis=0)
        rows = Rows.of(values)
        story = mixture(Schema.real(1), 3, prior=None).anchored(rows)
        labels = np.minimum(np.arange(80) // 20, 2)
        start = FitState(params_from_labels(story, rows, labels, np.random.default_rng(0)))
        state = fit(story, BatchEM(40), Resident(rows), start)
        assert state.events == []
        assert oracles.is_possible(story, state.params)


class TestStored:
    @pytest.mark.parametrize("prior", ["weak", None])
    @pytest.mark.parametrize("gaps", [0.0, 0.3])
    @pytest.mark.parametrize("kind", oracles.STORIES)
    def test_resuming_a_stored_state_gives_the_same_bits(
        self, kind: str, gaps: float, prior: str | None
    ) -> None:
        story, _, values, labels = problem(kind, 300, gaps, prior=prior)
        rows = Rows.of(values)
        story = story.anchored(rows)
        state = started(story, values, labels)
        whole = fit(story, BatchEM(9, 0.0), Resident(rows), state)
        part = fit(story, BatchEM(4, 0.0), Resident(rows), state)
        stored = part.to_dataset(story)
        json.dumps(stored.attrs)
        back = FitState.from_dataset(stored)
        assert back.outcome is Outcome.MAX_STEPS
        again = replace(back, outcome=Outcome.RUNNING)
        resumed = fit(story_of(stored), BatchEM(9, 0.0), Resident(rows), again)
        assert oracles.identical(resumed.params, whole.params)
        assert resumed.stats is not None
        assert whole.stats is not None
        assert oracles.identical(resumed.stats, whole.stats)
        assert [i.loglik for i in resumed.trace] == [i.loglik for i in whole.trace]

    def test_resuming_through_rescues_gives_the_same_bits(self) -> None:
        values = np.repeat(np.random.default_rng(0).normal(size=(8, 2)), 10, axis=0)
        rows = Rows.of(values)
        story = mixture(Schema.real(2), 4, prior=None).anchored(rows)
        labels = np.minimum(np.arange(80) // 10, 3)
        start = FitState(
            params_from_labels(story, rows, labels, np.random.default_rng(0)), sample=rows, seed=5
        )
        whole = fit(story, BatchEM(12, 0.0), Resident(rows), start)
        assert len(whole.events) > 3
        state = start
        for step in range(1, 13):
            state = fit(story, BatchEM(step, 0.0), Resident(rows), state)
            if state.outcome is not Outcome.MAX_STEPS:
                break
            state = FitState.from_dataset(state.to_dataset(story))
            state = replace(state, outcome=Outcome.RUNNING)
        assert oracles.identical(state.params, whole.params)
        assert state.events == whole.events
        assert state.rescues == whole.rescues

    def test_a_state_before_its_first_step(self) -> None:
        story, _, values, labels = problem("mixed", 100, 0.3)
        story = story.anchored(Rows.of(values))
        state = started(story, values, labels)
        back = FitState.from_dataset(state.to_dataset(story), story)
        assert back.stats is None
        assert back.trace == ()
        assert back.sample is not None
        np.testing.assert_array_equal(back.sample.filled(), values)
        assert oracles.identical(back.params, state.params)

    def test_labels_are_kept_for_readers(self) -> None:
        story, _, values, labels = problem("mixed", 100)
        story = story.anchored(Rows.of(values))
        stored = started(story, values, labels).to_dataset(story)
        kept = json.loads(stored.attrs["labels"])
        assert kept["component"] == ["0", "1", "2"]
        assert kept["real"] == ["delay", "distance"]

    def test_an_unknown_format_is_refused(self) -> None:
        story, _, values, labels = problem("full", 50)
        story = story.anchored(Rows.of(values))
        stored = started(story, values, labels).to_dataset(story)
        with pytest.raises(CorruptError, match="format 2"):
            FitState.from_dataset(stored.assign_attrs(format=2))
        with pytest.raises(CorruptError, match="story"):
            story_of(stored.assign_attrs(story="{"))
        with pytest.raises(CorruptError, match="params"):
            FitState.from_dataset(stored.drop_vars("params.weights"))
        del stored.attrs["rescues"]
        with pytest.raises(CorruptError, match="rescues"):
            FitState.from_dataset(stored)


class TestHard:
    def test_hard_em_on_one_spherical_variance_is_lloyd(self) -> None:
        """With far more variance than distance between weights, log-joints order as distances."""
        rng = np.random.default_rng(2)
        values = rng.normal(size=(200, 2)) + np.repeat([[0, 0], [3, 0], [0, 3]], [70, 70, 60], 0)
        story = mixture(Schema.real(2), 3, covariance="spherical", prior=None)
        story = story.anchored(Rows.of(values))
        centres = values[[0, 100, 190]]
        params = story.vague()
        for _ in range(10):
            family: Any = params.family
            equal = Params(
                np.full(3, 1 / 3),
                replace(family, mean=centres, variance=np.full(3, family.variance.mean())),
            )
            params = story.m_step(story.e_step(equal, Rows.of(values), hard), equal)
            labels = ((values[:, None] - centres[None]) ** 2).sum(axis=2).argmin(axis=1)
            centres = np.array([values[labels == k].mean(axis=0) for k in range(3)])
            np.testing.assert_allclose(params.family.mean, centres, rtol=1e-12)  # type: ignore[union-attr]

    def test_classification_em_climbs(self) -> None:
        story, _, values, labels = problem("full", 500, 0.2)
        rows = Rows.of(values)
        story = story.anchored(rows)
        learner = BatchEM(50, 1e-9, responsibility=hard)
        state = fit(story, learner, Resident(rows), started(story, values, labels))
        assert state.outcome is Outcome.CONVERGED


ADVERSARIAL: dict[str, Any] = {
    "one row": [[1.0, -2.0]],
    "one cell": [[3.0]],
    "one row with a gap": [[1.0, np.nan]],
    "one column": np.arange(40.0)[:, None] ** 2,
    "equal rows": np.full((30, 2), 7.5),
    "few distinct rows": np.repeat([[0.0, 1.0], [2.0, 2.0], [5.0, 0.0]], 20, axis=0),
    "a constant column": np.column_stack([np.arange(60.0), np.full(60, 1 / 3)]),
    "fewer rows than columns": np.random.default_rng(0).normal(size=(4, 9)),
    "huge": np.random.default_rng(1).normal(size=(60, 2)) * 1e149,
    "tiny": np.random.default_rng(2).normal(size=(60, 2)) * 1e-300,
    "small": np.random.default_rng(2).normal(size=(60, 2)) * 1e-160,
    "columns of every size": np.random.default_rng(3).normal(size=(60, 3)) * [1e-200, 1, 1e140],
    "an outlier": np.vstack([np.random.default_rng(4).normal(size=(59, 2)), [[1e150, 0.0]]]),
    "integers": np.random.default_rng(5).integers(0, 3, size=(80, 2)),
    "float32 near its end": (np.random.default_rng(6).uniform(-3e38, 3e38, (60, 2))).astype("f4"),
    "far from zero": np.random.default_rng(7).normal(size=(60, 2)) * 1e-4 + 1e12,
    "dependent columns": np.outer(np.arange(50.0), [1.0, 2.0, -1.0]),
    "mostly gaps": oracles.with_gaps(
        np.random.default_rng(8).normal(size=(200, 3)), 0.9, np.random.default_rng(9)
    ),
    "one entry a row": np.where(
        np.arange(90)[:, None] % 3 == np.arange(3),
        np.random.default_rng(0).normal(size=(90, 3)),
        np.nan,
    ),
    "a column never observed": np.column_stack([np.arange(50.0), np.full(50, np.nan)]),
    "heavy tails": np.random.default_rng(10).standard_cauchy((200, 2)),
    "two far heaps": np.repeat([[0.0, 0.0], [1e9, 1e9]], 30, axis=0)
    + np.random.default_rng(11).normal(size=(60, 2)),
}


@pytest.mark.parametrize("prior", ["weak", None])
@pytest.mark.parametrize("kind", ["full", "tied", "diag", "spherical"])
@pytest.mark.parametrize("name", ADVERSARIAL)
def test_strange_rows_end_in_an_outcome(name: str, kind: str, prior: str | None) -> None:
    """No NaN, no warning of numpy, no traceback: possible parameters, however many components."""
    values = ADVERSARIAL[name]
    source = NumpySource(values, chunk_rows=37)
    for k in (1, 3, 50):
        for dtype in ("float64", "float32") if k == 3 else ("float64",):
            story = mixture(source.schema, k, covariance=kind, prior=prior, dtype=dtype)
            passes = Passes(source, scheduler="synchronous")
            story, state = warm_start(story, passes, n_init=1, long_steps=20)
            state = fit(story, BatchEM(20, 1e-5), passes, state)
            assert state.outcome in (Outcome.CONVERGED, Outcome.MAX_STEPS)
            assert oracles.is_possible(story, state.params)
            log_prob = story.log_prob(state.params, source.read(0))
            assert np.isfinite(log_prob).all()
            draw = story.draw(state.params, 5, np.random.default_rng(0)).values
            assert np.isfinite(draw).all()
            story.warnings(state.params)


entries = st.one_of(
    st.just(np.nan),
    st.integers(-3, 3).map(float),
    st.floats(-1e3, 1e3),
    st.floats(-1e150, 1e150),
    st.sampled_from([1e149, -1e150, 1e-300, 5e-324, 1e16, 1e8 + 1e-7]),
)


@settings(max_examples=150, deadline=None)
@given(
    values=hnp.arrays(
        np.float64,
        hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=9),
        elements=entries,
    ).filter(lambda x: not np.isnan(x).all()),
    kind=st.sampled_from(["full", "tied", "diag", "spherical"]),
    prior=st.sampled_from(["weak", None]),
    dtype=st.sampled_from(["float64", "float32"]),
    k=st.integers(1, 6),
    weighted=st.booleans(),
)
def test_any_rows_end_in_an_outcome(
    values: np.ndarray, kind: str, prior: str | None, dtype: str, k: int, weighted: bool
) -> None:
    weights = np.linspace(0.1, 3.0, len(values)) if weighted else None
    source = NumpySource(values, weights=weights, chunk_rows=4)
    story = mixture(source.schema, k, covariance=kind, prior=prior, dtype=dtype)
    passes = Passes(source, scheduler="synchronous")
    story, state = warm_start(story, passes, n_init=1, long_steps=8)
    state = fit(story, BatchEM(8, 1e-6), passes, state)
    assert state.outcome in (Outcome.CONVERGED, Outcome.MAX_STEPS)
    assert oracles.is_possible(story, state.params)
    assert np.isfinite(story.log_prob(state.params, Rows.of(values))).all()


@st.composite
def mixed_tables(draw: st.DrawFn) -> np.ndarray:
    """Rows of `oracles.MIXED` with whatever each column may hold, gaps included."""
    n = draw(st.integers(1, 12))
    columns = []
    for column in oracles.MIXED.columns:
        element = {
            "real": st.floats(-1e20, 1e20),
            "binary": st.integers(0, 1).map(float),
            "count": st.integers(0, 10).map(lambda e: float(10**e - 1)),
            "categorical": st.integers(0, column.n_levels - 1).map(float),
        }[column.kind]
        entry = st.one_of(st.just(np.nan), element)
        columns.append(draw(st.lists(entry, min_size=n, max_size=n)))
    return np.array(columns, dtype=float).T


@settings(max_examples=80, deadline=None)
@given(
    values=mixed_tables().filter(lambda x: not np.isnan(x).all()),
    prior=st.sampled_from(["weak", None]),
    dtype=st.sampled_from(["float64", "float32"]),
    k=st.integers(1, 5),
)
def test_any_mixed_rows_end_in_an_outcome(
    values: np.ndarray, prior: str | None, dtype: str, k: int
) -> None:
    source = NumpySource(values, oracles.MIXED, chunk_rows=5)
    story = mixture(source.schema, k, prior=prior, dtype=dtype)
    passes = Passes(source, scheduler="synchronous")
    story, state = warm_start(story, passes, n_init=1, long_steps=8)
    state = fit(story, BatchEM(8, 1e-6), passes, state)
    assert state.outcome in (Outcome.CONVERGED, Outcome.MAX_STEPS)
    assert oracles.is_possible(story, state.params)
    assert np.isfinite(story.log_prob(state.params, Rows.of(values))).all()


@pytest.mark.parametrize("prior", ["weak", None])
@pytest.mark.parametrize(
    ("column", "values"),
    [
        (Column("x", "binary"), np.ones(60)),
        (Column("x", "binary"), np.zeros(60)),
        (Column("x", "count"), np.zeros(60)),
        (Column("x", "count"), np.full(60, 1e7)),
        (Column("x", "count"), np.arange(60.0) ** 6),
        (Column("x", "categorical", ("only",)), np.zeros(60)),
        (Column("x", "categorical", ("a", "b", "never")), np.arange(60) % 2),
        (Column("x", "categorical", tuple("abcdefghij")), np.full(60, 9.0)),
        (Column("x", "count"), np.full(60, np.nan)),
        (Column("x", "binary"), np.full(60, np.nan)),
        (Column("x", "categorical", ("a", "b")), np.full(60, np.nan)),
    ],
)
def test_strange_columns_end_in_an_outcome(
    column: Column, values: np.ndarray, prior: str | None
) -> None:
    rng = np.random.default_rng(0)
    table = np.column_stack([values, rng.normal(size=60)])
    schema = Schema((column, Column("y")))
    source = NumpySource(table, schema, chunk_rows=17)
    for k in (1, 3, 50):
        for dtype in ("float64", "float32"):
            story = mixture(schema, k, prior=prior, dtype=dtype)
            passes = Passes(source, scheduler="synchronous")
            story, state = warm_start(story, passes, n_init=1, long_steps=20)
            state = fit(story, BatchEM(20, 1e-5), passes, state)
            assert state.outcome in (Outcome.CONVERGED, Outcome.MAX_STEPS)
            assert oracles.is_possible(story, state.params)
            assert np.isfinite(story.log_prob(state.params, source.read(0))).all()
            Rows.of(story.draw(state.params, 50, rng).values).check(schema)
