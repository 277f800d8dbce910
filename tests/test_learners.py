"""Every learner with every story: what climbs, climbs; what stops, resumes to the same bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genstream.errors import ConfigError
from genstream.incremental import IncrementalEM
from genstream.learn import (
    ROUNDING,
    STRETCH,
    BatchEM,
    FitState,
    Learner,
    Memo,
    Outcome,
    Relay,
    Resident,
    fit,
    leap,
    rescue,
    story_of,
)
from genstream.online import OnlineEM
from genstream.passes import Passes, fold_tree
from genstream.rows import Rows
from genstream.sources import NumpySource
from genstream.start import default_learner, warm_start
from genstream.story import Story, StoryStats

K = 3
ONLINE = OnlineEM(batch_rows=100, buffer_chunks=2)
LEARNERS: dict[str, Learner] = {
    "batch": BatchEM(200, 1e-6),
    "accelerated": BatchEM(200, 1e-6, accelerate=True),
    "online": OnlineEM(batch_rows=100, buffer_chunks=4, max_passes=4),
    "incremental": IncrementalEM(100, 1e-6, tasks=4, group=2),
    "relay": Relay((ONLINE, BatchEM(200, 1e-6, accelerate=True))),
}
# The same, ending after few steps of every kind.
SHORT: dict[str, Learner] = {
    "batch": BatchEM(6, 0.0),
    "accelerated": BatchEM(10, 0.0, accelerate=True),
    "online": OnlineEM(batch_rows=100, buffer_chunks=2, max_passes=2),
    "incremental": IncrementalEM(4, 0.0, tasks=4, group=1),
    "relay": Relay((ONLINE, IncrementalEM(2, 0.0, group=2), BatchEM(5, 0.0, accelerate=True))),
}


def problem(
    kind: str,
    n_rows: int = 1_500,
    gaps: float = 0.0,
    weighted: bool = False,
    apart: float = 3.0,
    chunk_rows: int = 100,
    **options: Any,
) -> tuple[Story, FitState, Passes]:
    """A story anchored and started on rows drawn from it."""
    rng = np.random.default_rng(7)
    story = oracles.make_story(kind, K, **options)
    truth = oracles.random_params(story, rng, apart=apart)
    x = oracles.with_gaps(story.draw(truth, n_rows, rng).values, gaps, rng)
    weights = rng.choice([0.5, 1.0, 2.0], n_rows) if weighted else None
    passes = Passes(NumpySource(x, story.schema, weights, chunk_rows), workers=1)
    return (*warm_start(story, passes, n_init=1, short_steps=2, long_steps=2), passes)


def objective(story: Story, state: FitState, passes: Passes) -> float:
    """What EM climbs, a unit of weight."""
    return (
        fit(story, BatchEM(1), passes, replace(state, outcome=Outcome.RUNNING, origin=99))
        .trace[-1]
        .mean_objective
    )


def same(left: FitState, right: FitState) -> None:
    assert oracles.identical(left.params, right.params)
    assert [i.loglik for i in left.trace] == [i.loglik for i in right.trace]
    assert (left.outcome, left.cursor, left.stage, left.origin) == (
        right.outcome,
        right.cursor,
        right.stage,
        right.origin,
    )


@pytest.mark.parametrize(("gaps", "weighted"), [(0.0, False), (0.0, True), (0.2, True)])
@pytest.mark.parametrize("kind", oracles.STORIES)
def test_every_learner_finds_what_batch_em_finds(kind: str, gaps: float, weighted: bool) -> None:
    story, state, passes = problem(kind, 400, gaps, weighted, apart=7.0)
    ended = {name: fit(story, each, passes, state) for name, each in LEARNERS.items()}
    found = {name: objective(story, each, passes) for name, each in ended.items()}
    for name in ("accelerated", "incremental", "relay"):
        assert ended[name].outcome is Outcome.CONVERGED, name
        assert found[name] == pytest.approx(found["batch"], abs=1e-4), name
    assert found["online"] > found["batch"] - 0.02
    assert all(oracles.is_possible(story, each.params) for each in ended.values())
    for name in ("batch", "accelerated", "incremental"):
        trace = np.array([info.mean_objective for info in ended[name].trace])
        assert np.diff(trace).min() >= -1e-9 * (1 + abs(trace[-1])), name


@pytest.mark.parametrize("name", SHORT)
@pytest.mark.parametrize(("kind", "gaps"), [("full", 0.2), ("tied", 0.0), ("mixed", 0.2)])
def test_a_fit_stopped_anywhere_resumes_to_the_same_bits(name: str, kind: str, gaps: float) -> None:
    story, state, passes = problem(kind, 500, gaps, weighted=True, apart=2.0, chunk_rows=125)
    learner = SHORT[name]
    states: list[FitState] = []
    whole = fit(story, learner, passes, state, [lambda state, _: states.append(state)])
    assert len(states) >= 4
    for stopped in states[:-1]:
        stored = stopped.to_dataset(story)
        resumed = fit(story_of(stored), learner, passes, FitState.from_dataset(stored))
        same(resumed, whole)


class TestAcceleration:
    @pytest.mark.parametrize("dtype", ["float64", "float32"])
    @pytest.mark.parametrize("kind", oracles.STORIES)
    def test_takes_fewer_passes_to_where_em_ends(self, kind: str, dtype: str) -> None:
        story, state, passes = problem(kind, 2_000, apart=1.2, dtype=dtype)
        plain = fit(story, BatchEM(500, 1e-6), passes, state)
        quick = fit(story, BatchEM(500, 1e-6, accelerate=True), passes, state)
        assert plain.step > 20
        assert quick.step < 0.7 * plain.step
        slack = ROUNDING[dtype] * 10
        assert quick.trace[-1].mean_objective > plain.trace[-1].mean_objective - 1e-4
        assert np.diff([info.mean_objective for info in quick.trace]).min() > -slack

    def test_a_leap_that_falls_is_taken_back(self) -> None:
        story, state, passes = problem("full", 800, apart=1.5)
        learner = BatchEM(500, 0.0, accelerate=True)
        while state.stride is None or not state.stride.leapt:
            before, (state, _) = state, learner.step(story, state, passes)
        assert state.stats is not None
        em = story.m_step(state.stats, state.params)
        assert not oracles.identical(em, state.params)
        # A leap to where nothing is explained.
        family: Any = state.params.family
        lost = replace(
            state, params=replace(state.params, family=replace(family, mean=family.mean + 50))
        )
        back, info = learner.step(story, lost, passes)
        assert oracles.identical(back.params, em)
        assert back.outcome is Outcome.RUNNING
        assert info.mean_objective == state.trace[-1].mean_objective
        assert back.stride is not None
        assert state.stride is not None
        assert back.stride.reach == max(1.0, state.stride.reach / STRETCH)
        after, line = learner.step(story, back, passes)
        assert line.mean_objective > info.mean_objective
        assert before.outcome is after.outcome is Outcome.RUNNING

    def test_never_ends_on_a_leap_that_nobody_checked(self) -> None:
        story, state, passes = problem("diag", 800, apart=1.5)
        for steps in range(1, 8):
            ended = fit(story, BatchEM(steps, 0.0, accelerate=True), passes, state)
            assert ended.outcome is Outcome.MAX_STEPS
            assert ended.stats is not None
            again = story.m_step(ended.stats, ended.params)
            assert oracles.identical(again, ended.params)

    @pytest.mark.parametrize("kind", oracles.STORIES)
    def test_what_rows_cannot_have_is_seen_before_a_pass(self, kind: str) -> None:
        story, state, passes = problem(kind, 400, gaps=0.1)
        stats: StoryStats = passes.fold(lambda _, rows: story.e_step(state.params, rows))
        kept = story.possible(stats, stats)
        assert kept is not None
        for (name, _, value), (_, _, old) in zip(kept.leaves(), stats.leaves(), strict=True):
            np.testing.assert_allclose(value, old, rtol=1e-12, err_msg=name)
        assert story.possible(stats.scale(-1.0), stats) is None
        # Three statistics so far apart that their extrapolation has negative sums of squares.
        far = stats.scale(np.array([9.0, 0.2, 0.1]))
        params, _ = leap(story, stats, far, far.merge(stats.scale(-0.04)), state.params, 1e3)
        assert oracles.is_possible(story, params)
        assert oracles.finite(params)

    def test_rescue_restarts_it(self) -> None:
        story, state, passes = problem("full", 800, apart=1.5, prior=None)
        learner = BatchEM(500, 1e-6, accelerate=True)
        for _ in range(2):
            state, _ = learner.step(story, state, passes)
        assert state.past is not None
        # Component 2 sits where no row is.
        family: Any = state.params.family
        mean = family.mean.copy()
        mean[2] = 1e6
        moved = replace(state, params=replace(state.params, family=replace(family, mean=mean)))
        state, info = learner.step(story, replace(moved, trace=()), passes)
        assert "component 2 was empty" in info.events[0]
        assert state.past is None
        assert state.stride is not None
        assert not state.stride.leapt
        ended = fit(story, learner, passes, state)
        assert ended.outcome is Outcome.CONVERGED
        assert oracles.is_possible(story, ended.params)


class TestRelay:
    def test_the_next_learner_does_not_compare_itself_with_the_last(self) -> None:
        story, state, passes = problem("full")
        scored = fit(story, ONLINE, passes, state)
        # An online trace so good that whatever batch EM reports is a fall from it.
        high = replace(scored.trace[-1], loglik=1e9)

        @Step
        def boast(state: FitState) -> FitState:
            return replace(
                state.after(replace(high, step=state.step + 1)), outcome=Outcome.MAX_STEPS
            )

        ended = fit(story, Relay((boast, BatchEM(50, 1e-6))), passes, state)
        assert ended.outcome is Outcome.CONVERGED
        assert (ended.stage, ended.origin) == (1, 1)

    def test_each_learner_has_its_own_steps(self) -> None:
        story, state, passes = problem("full")
        ended = fit(story, Relay((BatchEM(3, 0.0), BatchEM(4, 0.0))), passes, state)
        assert (ended.step, ended.outcome) == (7, Outcome.MAX_STEPS)
        plain = fit(story, BatchEM(7, 0.0), passes, state)
        assert oracles.identical(ended.params, plain.params)

    def test_what_an_online_learner_remembers_ends_with_it(self) -> None:
        story, state, passes = problem("full")
        online = fit(story, ONLINE, passes, state)
        assert online.memory is not None
        on = fit(story, BatchEM(2), passes, replace(online, outcome=Outcome.RUNNING))
        assert on.memory is None
        rows = Rows.concatenate([passes.read(0)])
        again, _ = ONLINE.learn(story, on, rows)
        assert again.memory is not None
        assert again.stats is not None
        assert again.stats.weight == pytest.approx(1.0)


class Step:
    """A learner from a function of the state."""

    def __init__(self, function: Callable[[FitState], FitState]) -> None:
        self.function = function

    def step(self, story: Story, state: FitState, passes: Any) -> Any:
        state = self.function(state)
        return state, state.trace[-1]


class TestIncremental:
    @given(n=st.integers(1, 40), data=st.data())
    @settings(max_examples=40, deadline=None)
    def test_a_renewed_tree_is_the_tree_of_what_was_renewed(self, n: int, data: Any) -> None:
        rng = np.random.default_rng(n)

        def stats() -> StoryStats:
            return StoryStats(1, 0, rng.random(), rng.random(), rng.random(2))

        leaves = [stats() for _ in range(n)]
        memo = Memo.of(leaves)
        for _ in range(3):
            chosen = data.draw(st.sets(st.integers(0, n - 1), max_size=5))
            fresh = {i: stats() for i in chosen}
            memo = memo.renewed(fresh)
            leaves = [fresh.get(i, old) for i, old in enumerate(leaves)]
            assert oracles.identical(memo.total, fold_tree(leaves))

    def test_a_step_merges_a_path_and_no_more(self, monkeypatch: pytest.MonkeyPatch) -> None:
        memo = Memo.of([StoryStats(1, 0, 1.0, 0.0, np.ones(2)) for _ in range(64)])
        merges: list[int] = []
        merge = StoryStats.merge
        monkeypatch.setattr(StoryStats, "merge", lambda a, b: (merges.append(1), merge(a, b))[1])
        memo.renewed({17: memo.total})
        assert len(merges) == 6

    def test_all_tasks_at_once_is_batch_em(self) -> None:
        story, state, passes = problem("full", gaps=0.1)
        batch = fit(story, BatchEM(9, 0.0), passes, state)
        at_once = IncrementalEM(max_passes=9, tolerance=0.0, tasks=8, group=8)
        ended = fit(story, at_once, passes, state)
        assert oracles.identical(ended.params, batch.params)
        np.testing.assert_allclose(
            [info.loglik for info in ended.trace], [info.loglik for info in batch.trace], rtol=1e-9
        )

    def test_the_bound_ends_at_the_log_likelihood(self) -> None:
        story, state, passes = problem("mixed", gaps=0.2, apart=5.0)
        ended = fit(story, IncrementalEM(100, 1e-9, tasks=8, group=1), passes, state)
        assert ended.outcome is Outcome.CONVERGED
        assert ended.trace[-1].mean_objective == pytest.approx(
            objective(story, ended, passes), abs=1e-7
        )

    def test_workers_and_schedulers_do_not_show(self) -> None:
        story, state, passes = problem("full")
        learner = IncrementalEM(5, 0.0, tasks=8, group=3)
        one = fit(story, learner, passes, state)
        for options in ({"workers": 3}, {"scheduler": "synchronous"}, {"task_chunks": 1}):
            other = fit(story, learner, Passes(passes.source, **options), state)
            assert oracles.identical(other.params, one.params)

    def test_takes_fewer_passes_than_batch_em(self) -> None:
        story, state, passes = problem("full", 3_000, apart=1.2)
        batch = fit(story, BatchEM(300, 1e-6), passes, state)
        goal = batch.trace[-1].mean_objective - 1e-4
        learner = IncrementalEM(300, 1e-6, tasks=32, group=1)
        ended = fit(story, learner, passes, state)
        rows = np.cumsum([info.n_rows for info in ended.trace])
        reached = np.flatnonzero([info.mean_objective >= goal for info in ended.trace])[0]
        needed = next(i for i, info in enumerate(batch.trace) if info.mean_objective >= goal)
        assert rows[reached] / 3_000 < 0.8 * needed

    def test_the_memo_is_kept_within_its_bytes(self) -> None:
        story, state, passes = problem("full")
        nothing = story.e_step(state.params, Rows(np.empty((0, 3))))
        size = sum(np.asarray(value).nbytes for _, _, value in nothing.leaves())
        for most in (1, 2, 5, 15):
            learner = IncrementalEM(3, 0.0, tasks=64, memo_nbytes=2 * size * most)
            ended = fit(story, learner, passes, state)
            assert ended.memo is not None
            nodes = sum(map(len, ended.memo.levels))
            assert nodes * size <= learner.memo_nbytes
        with pytest.raises(ConfigError, match=f"one task's statistics take {2 * size}"):
            fit(story, IncrementalEM(memo_nbytes=size), passes, state)

    @pytest.mark.parametrize("group", [1, 2, 4])
    @pytest.mark.parametrize("moved", [(), (1,), (17, 21), (30,), (5, 6, 7), range(1, 99)])
    def test_a_rescue_begins_no_new_count_of_passes(
        self, monkeypatch: pytest.MonkeyPatch, moved: Sequence[int], group: int
    ) -> None:
        story, state, passes = problem("full", 600)
        known = rescue

        def moving(story: Story, state: FitState, *args: Any) -> Any:
            params, rescues, _ = known(story, state, *args)
            return params, rescues, ("moved",) if state.step + 1 in moved else ()

        monkeypatch.setattr("genstream.incremental.rescue", moving)
        learner = IncrementalEM(max_passes=10, tolerance=0.0, tasks=6, group=group)
        seen: list[FitState] = []
        ended = fit(story, learner, passes, state, [lambda state, _: seen.append(state)])
        n_passes = sum(info.n_rows for info in ended.trace) / 600
        assert ended.outcome is Outcome.MAX_STEPS
        if ended.events:
            assert 10 <= n_passes < 10 + group / 6
            # Whatever was moved had a pass to be fitted in.
            last = max(info.step for info in ended.trace if info.events)
            assert sum(info.n_rows for info in ended.trace[:last]) <= 9 * 600
        else:
            assert n_passes == 10
        for part in seen[2:-1:18]:
            again = FitState.from_dataset(part.to_dataset(story))
            assert fit(story, learner, passes, again).step == ended.step

    @pytest.mark.parametrize(
        "wrong", [{"max_passes": 0}, {"tolerance": -1.0}, {"tasks": 0}, {"group": 0}]
    )
    def test_numbers_out_of_range_are_named(self, wrong: dict[str, float]) -> None:
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            IncrementalEM(**wrong)

    def test_rows_in_memory_are_one_task(self) -> None:
        story, state, passes = problem("diag", chunk_rows=10_000)
        ended = fit(story, IncrementalEM(4, 0.0), Resident(passes.read(0)), state)
        assert ended.step == 4


@pytest.mark.parametrize("gaps", [0.0, 0.3])
@pytest.mark.parametrize("kind", oracles.STORIES)
def test_the_expected_log_joint_is_that_of_brute_force(kind: str, gaps: float) -> None:
    """With responsibilities of the same parameters, it is the log-likelihood less the entropy, so
    between two parameters it moves as EM's own function does."""
    story, state, passes = problem(kind, 60, gaps)
    rng = np.random.default_rng(2)
    values = passes.read(0).filled()
    other = oracles.random_params(story, rng, apart=2.0)
    stats: StoryStats = passes.fold(lambda _, rows: story.e_step(state.params, rows))
    values = np.concatenate([passes.read(i).filled() for i in range(passes.n_chunks)])
    resp = oracles.responsibilities(story, state.params, values)
    if not gaps or kind not in ("full", "tied"):
        useful = ~np.isnan(values).all(axis=1)

        def joint(params: Any) -> float:
            return float((resp * oracles.log_joint(story, params, values))[useful].sum())

        moved = joint(other) - joint(state.params)
        found = story.expected_log_joint(other, stats) - story.expected_log_joint(
            state.params, stats
        )
        assert found == pytest.approx(moved, rel=1e-8)
    # The M-step maximises it where there is no prior: no small move gains.
    free = replace(story, prior=None, family=replace(story.family, prior=None))
    best = free.m_step(stats, state.params)
    value = free.expected_log_joint(best, stats)
    family: Any = best.family
    for shift in (0.05, -0.05):
        moved_family = replace(family, mean=family.mean + shift)
        assert free.expected_log_joint(replace(best, family=moved_family), stats) < value


class TestDefaultLearner:
    def test_many_rows_are_gone_through_online_first(self) -> None:
        online = OnlineEM(batch_rows=10)
        few = default_learner(2_559, max_steps=7, tolerance=1e-3, online=online)
        many = default_learner(2_560, max_steps=7, tolerance=1e-3, online=online)
        batch = BatchEM(7, 1e-3, accelerate=True)
        assert few == batch
        assert many == Relay((online, batch))
        # Very many are taken in larger mini-batches, or M-steps would cost more than rows.
        vast = default_learner(2_048_000, max_steps=7, tolerance=1e-3, online=online)
        assert vast == Relay((replace(online, batch_rows=1000), batch))

    def test_ends_as_well_as_batch_em(self) -> None:
        story, state, passes = problem("full", 4_000, apart=2.0, chunk_rows=256)
        learner = default_learner(4_000, tolerance=1e-6, online=OnlineEM(batch_rows=10))
        ended = fit(story, learner, passes, state)
        assert ended.outcome is Outcome.CONVERGED
        assert ended.stage == 1
        plain = fit(story, BatchEM(500, 1e-6), passes, state)
        assert objective(story, ended, passes) > objective(story, plain, passes) - 1e-4


def test_a_relay_needs_somebody_to_run() -> None:
    with pytest.raises(ConfigError, match="at least one learner"):
        Relay(())
