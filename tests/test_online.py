"""Online EM: each row once, at a chosen pace, to the same bits when it is resumed."""

from __future__ import annotations

import dataclasses
import itertools
import weakref
from collections.abc import Iterator

import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genstream.errors import ConfigError, DataError
from genstream.learn import BatchEM, FitState, Outcome, Resident, fit
from genstream.online import TRACE_LINES, OnlineEM
from genstream.passes import Passes
from genstream.rows import Rows
from genstream.schema import Column, Schema
from genstream.sources import NumpySource
from genstream.start import warm_start
from genstream.stories import mixture
from genstream.story import Params

MEANS = np.array([[-4.0, 0.0], [4.0, 2.0], [0.0, 8.0]])


def three_clusters(n: int, seed: int, weights: tuple[float, ...] = (0.5, 0.3, 0.2)) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return MEANS[rng.choice(3, n, p=weights)] + rng.standard_normal((n, 2))


def aligned(params: Params) -> np.ndarray:
    """Fitted means in the order of `MEANS`."""
    distance = ((params.family.mean[None] - MEANS[:, None]) ** 2).sum(axis=2)
    return params.family.mean[distance.argmin(axis=1)]


def begun(x: np.ndarray, covariance: str = "full", **options: object) -> tuple:
    source = NumpySource(x, chunk_rows=2048)
    passes = Passes(source, workers=1)
    story = mixture(source.schema, 3, covariance=covariance, **options)
    return (*warm_start(story, passes, n_init=2, sample_rows=500, long_steps=5), passes)


STARTS = {kind: begun(three_clusters(1_000, 21), kind)[:2] for kind in ("full", "diag")}


@pytest.mark.parametrize("covariance", ["full", "tied", "diag", "spherical"])
@pytest.mark.parametrize("gaps", [0.0, 0.2])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_one_pass_recovers_clusters_and_beats_its_start(
    covariance: str, gaps: float, dtype: str
) -> None:
    x = three_clusters(40_000, 0)
    x[np.random.default_rng(1).random(x.shape) < gaps] = np.nan
    story, state, passes = begun(x, covariance, dtype=dtype)
    unseen = Rows.of(three_clusters(20_000, 2))
    before = story.log_prob(state.params, unseen).mean()
    ended = fit(story, OnlineEM(batch_rows=1024), passes, state)
    after = story.log_prob(ended.params, unseen).mean()
    best = fit(story, BatchEM(200, 1e-7), passes, state)
    assert ended.outcome is Outcome.MAX_STEPS
    assert sum(info.n_rows for info in ended.trace) == 40_000
    assert np.abs(aligned(ended.params) - MEANS).max() < 0.15
    assert after > before - 1e-3
    assert after > story.log_prob(best.params, unseen).mean() - 0.01


def test_sorted_data_are_mixed() -> None:
    x = three_clusters(30_000, 3)
    x = x[np.argsort(x[:, 0])]
    story, state, passes = begun(x)
    ended = fit(story, OnlineEM(batch_rows=512, buffer_chunks=8), passes, state)
    assert np.abs(aligned(ended.params) - MEANS).max() < 0.3


def test_a_resumed_pass_ends_in_the_same_bits() -> None:
    story, state, passes = begun(three_clusters(30_000, 4))
    learner = OnlineEM(batch_rows=700, max_passes=2)
    whole = fit(story, learner, passes, state)
    for stop in (1, 5, 7):
        part = state
        for _ in range(stop):
            part, _ = learner.step(story, part, passes)
        again = FitState.from_dataset(part.to_dataset(story))
        ended = fit(story, learner, passes, again)
        assert ended.params.digest() == whole.params.digest()
        assert ended.cursor == whole.cursor == 8


def test_a_rare_component_keeps_its_looks() -> None:
    story, state, _ = begun(three_clusters(20_000, 5))
    learner = OnlineEM(batch_rows=1000, forgetting=0.1)
    state, _ = learner.learn(story, state, Rows.of(three_clusters(20_000, 6)))
    rare = int(((state.params.family.mean - MEANS[2]) ** 2).sum(axis=1).argmin())
    looks = state.params.family.covariance[rare]
    for day in range(20):
        x = three_clusters(2_000, 7 + day, (0.6, 0.4, 0.0))
        state, _ = learner.learn(story, state, Rows.of(x))
    assert state.params.weights[rare] < 0.01
    assert np.abs(state.params.family.mean[rare] - MEANS[2]).max() < 0.4
    assert np.abs(state.params.family.covariance[rare] - looks).max() < 0.5
    state, info = learner.learn(story, state, Rows.of(three_clusters(500, 50, (0.0, 0.0, 1.0))))
    assert state.params.weights[rare] > 0.03
    assert np.isfinite(info.mean_loglik)


def test_a_constant_pace_follows_a_drift() -> None:
    story, state, _ = begun(three_clusters(20_000, 8))
    steady = OnlineEM(batch_rows=500, kappa=1.0)
    quick = OnlineEM(batch_rows=500, forgetting=0.05)
    slow, fast = state, state
    for day in range(40):
        x = Rows.of(three_clusters(1_000, 100 + day) + 0.1 * day)
        slow, _ = steady.learn(story, slow, x)
        fast, last = quick.learn(story, fast, x)
    today = Rows.of(three_clusters(5_000, 999) + 3.9)
    # A constant step follows at a distance of drift over step: 0.05 a mini-batch over 0.05.
    assert np.abs(aligned_to(fast.params, MEANS + 3.9)).max() < 1.1
    assert story.log_prob(fast.params, today).mean() > story.log_prob(slow.params, today).mean()
    assert last.n_rows == 1_000


def aligned_to(params: Params, means: np.ndarray) -> np.ndarray:
    distance = ((params.family.mean[None] - means[:, None]) ** 2).sum(axis=2)
    return params.family.mean[distance.argmin(axis=1)] - means


@given(clock=st.floats(0, 1e6), rows=st.integers(1, 10**6), kappa=st.floats(0.51, 1.0))
def test_steps_shrink_and_grow_with_rows(clock: float, rows: int, kappa: float) -> None:
    learner = OnlineEM(kappa=kappa)
    rho = learner.rate(clock, rows)
    assert 0 < rho < 1 or rows > 100 * learner.batch_rows
    assert learner.rate(clock + 1, rows) <= rho
    half = learner.rate(clock, rows / 2)
    assert 1 - rho == pytest.approx((1 - half) ** 2, rel=1e-9, abs=1e-12)


def test_effective_rows_keep_a_prior_honest() -> None:
    story, state, _ = begun(three_clusters(5_000, 9))
    learner = OnlineEM(batch_rows=100, forgetting=0.5)
    for day in range(30):
        state, _ = learner.learn(story, state, Rows.of(three_clusters(100, 200 + day)))
    assert state.memory is not None
    # Weights 1/2, 1/4, ... of 100 rows each: (sum w)^2 / sum w^2 = 3 mini-batches.
    assert state.memory.n_eff == pytest.approx(300, rel=1e-3)


def test_weights_and_rows_without_an_observed_entry() -> None:
    story, state, _ = begun(three_clusters(5_000, 10))
    learner = OnlineEM(batch_rows=1000)
    x = three_clusters(1_000, 11)
    nothing = np.full((300, 2), np.nan)
    alone, _ = learner.learn(story, state, Rows.of(x))
    padded = Rows.of(np.concatenate([x, x * 0 + 99]), np.repeat([1.0, 0.0], 1_000))
    weighed, _ = OnlineEM(batch_rows=2000).learn(story, state, padded)
    plain, _ = OnlineEM(batch_rows=2000).learn(story, state, Rows.of(x))
    np.testing.assert_allclose(weighed.params.family.mean, plain.params.family.mean, rtol=1e-12)
    empty, info = learner.learn(story, alone, Rows.of(nothing))
    assert empty.params.digest() == alone.params.digest()
    assert info.n_unobserved == 300


@pytest.mark.parametrize("known", ["statistics", "parameters"])
@pytest.mark.parametrize("pace", [{"kappa": 0.6}, {"forgetting": 0.02}])
@pytest.mark.parametrize("unit", [1000.0, 430.0, 1e-3])
def test_the_unit_of_weights_does_not_show(unit: float, pace: dict, known: str) -> None:
    """In a pass as in what arrives; nothing but a prior knows of how much weight there is."""
    x = three_clusters(6_000, 60)
    story, state, _ = begun(x[:1_000], prior=None)
    if known == "parameters":
        state = FitState(state.params, seed=state.seed)
    rng = np.random.default_rng(61)
    for weights in (np.ones(6_000), rng.choice([0.0, 0.5, 1.0, 3.0], 6_000)):
        learner = OnlineEM(batch_rows=200, **pace)
        found = []
        for times in (1.0, unit):
            source = NumpySource(x, weights=times * weights, chunk_rows=500)
            ended = fit(story, learner, Passes(source, workers=1), state)
            arrived = state
            for i in range(0, 6_000, 1_500):
                rows = Rows.of(x[i : i + 1_500], times * weights[i : i + 1_500])
                arrived, _ = learner.learn(story, arrived, rows)
            assert ended.memory is not None
            assert arrived.memory is not None
            assert arrived.memory.clock == pytest.approx(np.count_nonzero(weights) / 200)
            found.append((ended, arrived))
        for plain, scaled in zip(*found, strict=True):
            for (name, _, a), (_, _, b) in zip(
                plain.params.leaves(), scaled.params.leaves(), strict=True
            ):
                np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-9, err_msg=name)


def test_rows_count_by_their_weight_beside_others() -> None:
    """Mini-batches of one kind, thrice as heavy as those of another, are three quarters."""
    story, state, _ = begun(three_clusters(2_000, 62))
    kinds = [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0)]
    for unit in (1.0, 700.0):
        learned = state
        learner = OnlineEM(batch_rows=100, forgetting=0.02)
        shares = []
        for day in range(300):
            x = three_clusters(100, 800 + day, kinds[day % 2])
            weight = unit * (1.0, 3.0)[day % 2]
            learned, _ = learner.learn(story, learned, Rows.of(x, np.full(100, weight)))
            distance = ((learned.params.family.mean - MEANS[1]) ** 2).sum(axis=1)
            shares.append(learned.params.weights[distance.argmin()])
        assert np.mean(shares[200:]) == pytest.approx(0.75, abs=0.01)


def test_a_light_row_is_not_the_measure_of_all_that_follow() -> None:
    story, state, _ = begun(three_clusters(5_000, 63))
    learner = OnlineEM(batch_rows=1_000)
    odd = Rows.of(np.full((1, 2), 4.0), np.array([1e-4]))
    light, _ = learner.learn(story, state, odd)
    x = Rows.of(three_clusters(1_000, 64, (1.0, 0.0, 0.0)))
    after, _ = learner.learn(story, light, x)
    plain, _ = learner.learn(story, state, x)
    np.testing.assert_allclose(after.params.weights, plain.params.weights, atol=0.01)


def test_weights_that_grow_without_measure_leave_parameters_finite() -> None:
    story, state, _ = begun(three_clusters(2_000, 65))
    learner = OnlineEM(batch_rows=500)
    for day, weight in enumerate([1e-200, 1e-3, 1.0, 1e4, 1e30, 1e200, 1.0, 1e-100]):
        x = three_clusters(1_000, 66 + day, (1.0, 0.0, 0.0))
        state, info = learner.learn(story, state, Rows.of(x, np.full(1_000, weight)))
        assert np.isfinite(info.mean_objective)
        assert oracles.finite(state.params)


def test_a_state_of_before_weights_had_a_unit_goes_on() -> None:
    story, state, _ = begun(three_clusters(5_000, 67))
    learner = OnlineEM(batch_rows=300)
    x = three_clusters(4_000, 68)
    state, _ = learner.learn(story, state, Rows.of(x[:2_000]))
    stored = state.to_dataset(story)
    before = FitState.from_dataset(stored.drop_vars("memory.unit"))
    ends = [
        learner.learn(story, each, Rows.of(x[2_000:]))[0]
        for each in (state, FitState.from_dataset(stored), before)
    ]
    for end in ends:
        assert end.params.digest() == ends[0].params.digest()
        assert end.memory is not None
        assert end.memory.unit == 1.0


def test_mixed_columns_learn_from_parameters_alone() -> None:
    rng = np.random.default_rng(12)
    schema = Schema(
        (Column("x"), Column("n", "count"), Column("c", "categorical", ("a", "b", "c")))
    )
    k = rng.integers(0, 2, 20_000)
    values = np.column_stack(
        [rng.normal(6 * k, 1), rng.poisson(2 + 8 * k), np.where(rng.random(20_000) < 0.8, k, 2)]
    )
    passes = Passes(NumpySource(values, schema, chunk_rows=4096), workers=1)
    story, state = warm_start(mixture(schema, 2), passes, n_init=1, sample_rows=300)
    ended = fit(story, OnlineEM(batch_rows=512), passes, state)
    assert np.sort(ended.params.family.rate[:, 0]) == pytest.approx([2, 10], rel=0.05)
    assert np.sort(ended.params.family.mean[:, 0]) == pytest.approx([0, 6], abs=0.1)


def test_a_resident_is_one_chunk() -> None:
    x = Rows.of(three_clusters(5_000, 13))
    story, state, _ = begun(three_clusters(2_000, 14))
    ended = fit(story, OnlineEM(batch_rows=500, max_passes=3), Resident(x), state)
    assert ended.step == 3
    assert np.abs(aligned(ended.params) - MEANS).max() < 0.3


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch_rows": 0},
        {"kappa": 0.5},
        {"kappa": 1.1},
        {"t0": 0.0},
        {"forgetting": 1.0},
        {"max_passes": 0},
        {"average": 1.0},
        {"buffer_chunks": 0},
    ],
)
def test_numbers_out_of_range_are_named(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        OnlineEM(**wrong)


@st.composite
def cuttings(draw: st.DrawFn) -> tuple[int, list[int]]:
    n = draw(st.integers(1, 400))
    return n, sorted(draw(st.lists(st.integers(0, n), max_size=8)))


@pytest.mark.parametrize("kind", ["full", "diag"])
@given(cut=cuttings(), batch_rows=st.integers(5, 150), gaps=st.booleans(), weighted=st.booleans())
@settings(max_examples=25, deadline=None)
def test_how_pieces_are_cut_does_not_show(
    kind: str, cut: tuple[int, list[int]], batch_rows: int, gaps: bool, weighted: bool
) -> None:
    n, edges = cut
    x = three_clusters(n, 20)
    weights = np.ones(n)
    if gaps:
        # Only the later rows have gaps, so that some pieces come with a mask and some without.
        x[n // 2 :: 3, 0] = np.nan
    if weighted:
        weights[n // 3 :: 2] = 2.5
    story, state = STARTS[kind]
    learner = OnlineEM(batch_rows=batch_rows)
    whole, info = learner.learn(story, state, Rows.of(x, weights if weighted else None))
    pieces = [
        Rows.of(x[a:b], weights[a:b] if weighted or a % 2 else None)
        for a, b in itertools.pairwise([0, *edges, n])
    ]
    again, line = learner.learn(story, state, iter(pieces), n_rows=n)
    assert again.params.digest() == whole.params.digest()
    assert again.stats is not None
    assert whole.stats is not None
    assert again.stats.digest() == whole.stats.digest()
    assert (line.loglik, line.n_rows, line.weight) == (info.loglik, info.n_rows, info.weight)


def test_pieces_are_let_go_of() -> None:
    alive: list[weakref.ref[np.ndarray]] = []
    most = 0

    def pieces() -> Iterator[Rows]:
        nonlocal most
        for day in range(20):
            values = three_clusters(1_000, 30 + day)
            alive.append(weakref.ref(values))
            yield Rows(values)
            del values
            most = max(most, sum(ref() is not None for ref in alive))

    story, state = STARTS["full"]
    OnlineEM(batch_rows=300).learn(story, state, pieces(), n_rows=20_000)
    assert most == 1


def test_a_wrong_number_of_rows_is_told() -> None:
    story, state = STARTS["full"]
    pieces = [Rows.of(three_clusters(100, 40)), Rows.of(three_clusters(100, 41))]
    with pytest.raises(DataError, match="said to hold 250 rows, and hold only 200"):
        OnlineEM().learn(story, state, pieces, n_rows=250)
    with pytest.raises(DataError, match="said to hold 150 rows, and hold more"):
        OnlineEM().learn(story, state, pieces, n_rows=150)
    with pytest.raises(ConfigError, match="n_rows"):
        OnlineEM().learn(story, state, pieces)


def test_the_trace_of_a_long_life_is_bounded() -> None:
    story, state = STARTS["full"]
    learner = OnlineEM(batch_rows=10)
    for day in range(TRACE_LINES + 10):
        state, info = learner.learn(story, state, Rows.of(three_clusters(5, day)))
    assert len(state.trace) == TRACE_LINES
    assert state.trace[-1] is info
    assert state.step == info.step == TRACE_LINES + 10


def test_a_component_that_grows_does_not_forget_the_sooner() -> None:
    """What a rare component looks like rests on the same number of rows as the others' once it
    is as common: its variance does not jump with every mini-batch."""
    story, state, _ = begun(three_clusters(20_000, 5, (0.599, 0.4, 0.001)), prior="weak")
    learner = OnlineEM(batch_rows=200, forgetting=0.02)
    rare = int(((state.params.family.mean - MEANS[2]) ** 2).sum(axis=1).argmin())
    seen = []
    for day in range(400):
        state, _ = learner.learn(story, state, Rows.of(three_clusters(200, 700 + day)))
        seen.append(state.params.family.mean[rare])
    # 1 / (rho share / 2) / batch_rows rows, 20 of them a day: a deviation of 1 / sqrt(4000).
    assert np.std(seen[200:], axis=0).max() < 3 / np.sqrt(4_000)


def test_a_start_is_worth_no_more_rows_than_were_seen() -> None:
    story, state, _ = begun(three_clusters(5_000, 9))
    state = dataclasses.replace(state, stats=None)
    learner = OnlineEM(batch_rows=1_000, kappa=1.0, t0=64.0)
    state, _ = learner.learn(story, state, Rows.of(three_clusters(50, 10)))
    assert state.memory is not None
    assert state.memory.n_eff < 101
