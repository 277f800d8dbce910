"""Growth: what was learned stays, what is new begins honestly, and learning goes on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genstream.errors import ConfigError, DataError
from genstream.growth import birth, retire, with_levels
from genstream.incremental import IncrementalEM
from genstream.learn import BatchEM, FitState, Outcome, fit
from genstream.online import OnlineEM
from genstream.passes import Passes
from genstream.responsibility import hard
from genstream.rows import Rows
from genstream.schema import Column, Schema
from genstream.sources import NumpySource
from genstream.start import warm_start
from genstream.stories import kmeans, mixture
from genstream.story import Story

MIXED = Schema(
    (
        Column("x"),
        Column("c", "categorical", ("a", "b", "c")),
        Column("n", "count"),
        Column("e", "categorical", ("u", "v")),
        Column("y"),
        Column("b", "binary"),
    )
)
GROWN = Schema(
    tuple(
        replace(c, levels=(*c.levels, *more))
        for c, more in zip(MIXED.columns, [(), ("d", "f"), (), ("w",), (), ()], strict=True)
    )
)
PLANE = Schema.real(3)
COVARIANCES = ["full", "tied", "diag", "spherical"]
ONLINE = OnlineEM(batch_rows=500)


def mixed(n: int, seed: int, planted: float = 0.0, gaps: float = 0.1) -> np.ndarray:
    """Two clusters over columns of all kinds; a third one with share `planted`."""
    rng = np.random.default_rng(seed)
    k = np.where(rng.random(n) < planted, 2, rng.integers(0, 2, n))
    values = np.column_stack(
        [
            rng.normal(np.array([0, 6, 14])[k], 1),
            np.where(rng.random(n) < 0.7, k, rng.integers(0, 3, n)),
            rng.poisson(np.array([2, 9, 40])[k]),
            rng.integers(0, 2, n),
            rng.normal(np.array([0, 3, -9])[k], 1),
            rng.random(n) < np.array([0.2, 0.6, 0.9])[k],
        ]
    )
    values[rng.random(values.shape) < gaps] = np.nan
    return values


def plane(n: int, seed: int, planted: float = 0.0, gaps: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    k = np.where(rng.random(n) < planted, 2, rng.integers(0, 2, n))
    means = np.array([[0.0, 0, 0], [6, 3, 0], [-7, 9, 5]])
    values = means[k] + rng.standard_normal((n, 3)) * [1.0, 1.5, 0.8]
    values[rng.random(values.shape) < gaps] = np.nan
    return values


def begun(values: np.ndarray, schema: Schema, n_components: int = 2, **options: object) -> tuple:
    """Story and state after batch EM."""
    passes = Passes(NumpySource(values, schema, chunk_rows=8192), workers=1)
    story, state = warm_start(
        mixture(schema, n_components, **options), passes, n_init=2, sample_rows=4000
    )
    return story, fit(story, BatchEM(30), passes, state)


def living(values: np.ndarray, schema: Schema, n_components: int = 2, **options: object) -> tuple:
    """Story and state after batch EM and some online learning, with an average under way."""
    story, state = begun(values, schema, n_components, **options)
    state, _ = ONLINE.learn(story, state, Rows.of(values[:3000]))
    assert state.stats is not None
    return story, replace(state, average=state.stats)


def surprising(story: Story, state: FitState, values: np.ndarray, share: float = 0.01) -> Rows:
    """Rows below the quantile of the sample's log-likelihood."""
    rows = Rows.of(values)
    limit = np.quantile(story.log_prob(state.params, state.sample), share)
    return rows[story.log_prob(state.params, rows) < limit]


def same(left: tuple[Story, FitState], right: tuple[Story, FitState]) -> bool:
    """Equal to the bit, but for the time that steps took."""
    a, b = (state.to_dataset(story).drop_vars("trace.seconds") for story, state in (left, right))
    return bool(a.identical(b))


def stored(story: Story, state: FitState) -> tuple[Story, FitState]:
    """Through JSON and a dataset, as a model at rest goes."""
    story = Story.from_json(story.to_json())
    return story, FitState.from_dataset(state.to_dataset(story), story)


# --- levels --------------------------------------------------------------------------------------


@pytest.mark.parametrize("prior", ["weak", None])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_new_levels_change_nothing_for_rows_without_them(prior: str | None, dtype: str) -> None:
    story, state = living(mixed(6000, 0), MIXED, prior=prior, dtype=dtype)
    wide, grown = with_levels(story, state, GROWN)
    assert wide.schema == GROWN
    rows = Rows.of(mixed(2000, 1, gaps=0.2))
    before, after = story.infer(state.params, rows), wide.infer(grown.params, rows)
    near = 1e-10 if dtype == "float64" else 1e-3
    np.testing.assert_allclose(after.responsibilities, before.responsibilities, atol=near)
    # Each observed category is a little less likely, by what the new levels took.
    seen = rows.is_observed
    took = [
        0.5 / (state.sample.is_observed[:, j].sum() + 0.5 * size) for j, size in ((1, 5), (3, 3))
    ]
    less = seen[:, 1] * np.log1p(-2 * took[0]) + seen[:, 3] * np.log1p(-took[1])
    np.testing.assert_allclose(after.log_prob - before.log_prob, less, atol=near * 10)
    p = grown.params.family.level_probability
    np.testing.assert_allclose(p[:, 3:5], took[0], rtol=1e-12)
    np.testing.assert_allclose([p[:, :5].sum(axis=1), p[:, 5:].sum(axis=1)], 1.0, rtol=1e-12)
    # Statistics, averaged ones too, hold no row of a new level.
    for old, new in ((state.stats, grown.stats), (state.average, grown.average)):
        assert not new.family.sum_level[:, [3, 4, 7]].any()
        kept = new.family.sum_level[:, [0, 1, 2, 5, 6]]
        np.testing.assert_array_equal(kept, old.family.sum_level)
    if prior:
        q = wide.family.prior.level_probability
        np.testing.assert_allclose([q[:5].sum(), q[5:].sum()], 1.0, rtol=1e-12)
        np.testing.assert_allclose(q[3:5], took[0], rtol=1e-12)


@pytest.mark.parametrize("prior", ["weak", None])
def test_a_new_level_is_learned_and_resumed_to_the_bit(prior: str | None) -> None:
    story, state = living(mixed(6000, 2), MIXED, prior=prior)
    story, state = with_levels(story, state, GROWN)
    values = mixed(1500, 3)
    values[::5, 1] = 4
    batch = Rows.of(values).check(GROWN)
    learned, info = ONLINE.learn(story, state, batch)
    before, after = (s.params.weights @ s.params.family.level_probability for s in (state, learned))
    assert after[4] > 5 * before[4]
    assert np.isfinite(info.mean_loglik)
    assert np.isfinite(story.log_prior(learned.params))
    # A level nobody has seen keeps a finite logarithm.
    values[0, 3] = 2
    assert np.isfinite(story.log_prob(learned.params, Rows.of(values))).all()
    again = stored(story, state)
    assert same((story, learned), (again[0], ONLINE.learn(*again, batch)[0]))


def test_levels_grow_without_a_sample() -> None:
    story, state = living(mixed(3000, 4), MIXED)
    wide, grown = with_levels(story, replace(state, sample=None), GROWN)
    p = grown.params.family.level_probability[:, 3]
    np.testing.assert_allclose(p, 0.5 / (state.memory.n_eff + 2.5), rtol=1e-12)
    assert with_levels(wide, grown, GROWN) == (wide, grown)


@pytest.mark.parametrize(
    "change, words",
    [
        ({1: Column("c", "categorical", ("b", "a", "c"))}, "do not begin with those of the model"),
        ({1: Column("c", "categorical", ("a", "b"))}, "do not begin"),
        ({1: Column("c", "count")}, "column 'c' is another one"),
        ({0: Column("z")}, "levels can be added to a model, columns cannot"),
        ({0: Column("x", unit="mile")}, "column 'x' is another one"),
        ({5: Column("b", "binary", ("no", "yes"))}, "column 'b' is another one"),
    ],
)
def test_other_changes_of_a_schema_are_refused(change: dict[int, Column], words: str) -> None:
    story, state = begun(mixed(500, 5), MIXED)
    schema = Schema(tuple(change.get(j, column) for j, column in enumerate(MIXED.columns)))
    with pytest.raises(DataError, match=words):
        with_levels(story, state, schema)
    with pytest.raises(DataError, match="columns cannot"):
        with_levels(story, state, Schema(MIXED.columns[:3]))


# --- retiring ------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(index=st.lists(st.integers(-1, 2), min_size=1, max_size=5))
def test_taken_entries_are_those_asked_for(index: list[int]) -> None:
    state = TAKEN[1]
    stats = state.stats.take(index)
    for (_, names, old), (_, _, new) in zip(state.stats.leaves(), stats.leaves(), strict=True):
        if names[:1] != ("component",):
            assert new is old
            continue
        assert len(new) == len(index)
        for i, k in enumerate(index):
            np.testing.assert_array_equal(new[i], old[k] if k >= 0 else np.zeros_like(old[0]))


TAKEN = living(plane(2000, 6), PLANE, 3, covariance="tied")


@pytest.mark.parametrize("covariance", COVARIANCES)
@pytest.mark.parametrize("prior", ["weak", None])
def test_a_retired_component_leaves_the_others_as_they_were(
    covariance: str, prior: str | None
) -> None:
    values = plane(6000, 7, planted=0.03)
    story, state = living(values, PLANE, 3, covariance=covariance, prior=prior)
    rare = int(state.params.weights.argmin())
    fewer, left, events = retire(story, state, 0.1)
    assert events == (
        f"component {rare} was retired: its weight had fallen to {state.params.weights[rare]:.2g}",
    )
    kept = [k for k in range(3) if k != rare]
    assert (fewer.n_components, fewer.weight_prior) == (2, 0.5 if prior else 0.0)
    assert left.params.weights.sum() == pytest.approx(1, rel=1e-12)
    np.testing.assert_array_equal(left.params.family.mean, state.params.family.mean[kept])
    assert left.stats.weight == pytest.approx(1, rel=1e-12)
    # The rows they are worth are the same, and so is what the M-step makes of them.
    np.testing.assert_allclose(
        left.stats.sum_r * left.memory.n_eff,
        state.stats.sum_r[kept] * state.memory.n_eff,
        rtol=0.01,
    )
    again = fewer.m_step(left.stats.scale(left.memory.n_eff), left.params).family
    np.testing.assert_allclose(again.mean, left.params.family.mean, atol=1e-3)
    spread = "covariance" if hasattr(again, "covariance") else "variance"
    np.testing.assert_allclose(
        getattr(again, spread), getattr(left.params.family, spread), atol=0.02
    )
    assert left.memory.share.sum() == pytest.approx(1, rel=1e-12)
    assert left.average.digest() == left.stats.digest()
    rows = Rows.of(plane(1000, 8))
    learned, _ = ONLINE.learn(fewer, left, rows)
    assert fewer.log_prob(learned.params, rows).mean() > -8
    restored = stored(fewer, left)
    assert same((fewer, learned), (restored[0], ONLINE.learn(*restored, rows)[0]))


def test_batch_statistics_lose_the_rows_of_the_retired() -> None:
    story, state = begun(plane(6000, 9, planted=0.03), PLANE, 3, covariance="tied", prior=None)
    before = state.stats.sum_r
    fewer, left, _ = retire(story, state, 0.1)
    kept = np.flatnonzero(before > 600)
    np.testing.assert_array_equal(left.stats.sum_r, before[kept])
    assert left.stats.weight == pytest.approx(before[kept].sum(), rel=1e-12)
    # Their spread about their means is the tied covariance still.
    np.testing.assert_allclose(
        fewer.m_step(left.stats, left.params).family.covariance,
        story.m_step(state.stats, state.params).family.covariance,
        rtol=1e-9,
        atol=1e-9,
    )
    assert len(left.rescues) == 2


def test_one_component_always_stays() -> None:
    story, state = living(plane(2000, 10), PLANE, 3)
    fewer, left, events = retire(story, state, 0.99)
    assert (fewer.n_components, len(events)) == (1, 2)
    np.testing.assert_array_equal(left.params.weights, [1.0])
    assert retire(fewer, left, 0.99) == (fewer, left, ())
    _, _, events = retire(story, state, 0.0, min_rows=1e9)
    assert len(events) == 2
    assert retire(story, state, 1e-6, min_rows=5) == (story, state, ())
    for wrong in (-0.1, 1.0, float("nan")):
        with pytest.raises(ConfigError, match="min_weight"):
            retire(story, state, wrong)
    with pytest.raises(ConfigError, match="min_rows"):
        retire(story, state, 0.1, min_rows=-1)


def changed(story: Story, state: FitState, how: str) -> tuple[Story, FitState]:
    """After a change of size."""
    if how == "levels":
        return with_levels(story, state, GROWN)
    if how == "retire":
        return retire(story, state, 0.49)[:2]
    far = np.full((100, 6), [90.0, 0, 0, 0, -90, 0]) + np.eye(6)[0] * np.arange(100)[:, None] / 50
    return birth(story, state, Rows.of(far))[:2]


@pytest.mark.parametrize("how", ["levels", "retire", "birth"])
def test_incremental_learning_goes_on_with_what_has_changed(how: str) -> None:
    passes = Passes(NumpySource(mixed(2000, 30, 0.2), MIXED, chunk_rows=250), workers=1)
    story, state = warm_start(mixture(MIXED, 3), passes, n_init=1)
    learner = IncrementalEM(3, 0.0, tasks=8, group=2)
    state = fit(story, learner, passes, state)
    assert state.memo is not None
    story, state = changed(story, state, how)
    assert story != mixture(MIXED, 3)
    # The statistics of the tasks are of what was: they are gathered anew.
    assert (state.memo, state.cursor) == (None, 0)
    begin = replace(stored(story, state)[1], outcome=Outcome.RUNNING)
    passes = Passes(NumpySource(mixed(2000, 30, 0.2), story.schema, chunk_rows=250), workers=1)
    again = fit(story, learner, passes, begin)
    assert again.memo is not None
    assert again.outcome is Outcome.MAX_STEPS
    assert [info.n_rows for info in again.trace[state.step :]] == [2000, *[500] * 8]
    assert (np.diff([info.mean_objective for info in again.trace[state.step :]]) > -1e-9).all()


@pytest.mark.parametrize("how", ["levels", "retire", "birth"])
def test_acceleration_begins_anew_with_what_has_changed(how: str) -> None:
    passes = Passes(NumpySource(mixed(2000, 30, 0.2), MIXED, chunk_rows=250), workers=1)
    story, state = warm_start(mixture(MIXED, 3), passes, n_init=1)
    learner = BatchEM(20, 0.0, accelerate=True)
    while state.stride is None or not state.stride.leapt:
        state, _ = learner.step(story, state, passes)
    story, state = changed(story, state, how)
    assert (state.past, state.stride) == (None, None)
    stored(story, state)


@pytest.mark.parametrize("how", ["levels", "retire", "birth"])
def test_a_fit_goes_on_with_what_has_changed(how: str) -> None:
    passes = Passes(NumpySource(mixed(2000, 30, 0.2), MIXED, chunk_rows=250), workers=1)
    story, state = warm_start(mixture(MIXED, 3), passes, n_init=1)
    story, state = changed(story, fit(story, BatchEM(5, 0.0), passes, state), how)
    passes = Passes(NumpySource(mixed(2000, 30, 0.2), story.schema, chunk_rows=250), workers=1)
    again = fit(story, BatchEM(5, 0.0), passes, replace(state, outcome=Outcome.RUNNING))
    # Of another model, it is worth less at first.
    assert (again.outcome, again.step) == (Outcome.MAX_STEPS, 10)


def test_online_learning_keeps_its_place() -> None:
    passes = Passes(NumpySource(mixed(2000, 30, 0.2), MIXED, chunk_rows=250), workers=1)
    story, state = warm_start(mixture(MIXED, 3), passes, n_init=1)
    state, _ = OnlineEM(batch_rows=100, buffer_chunks=2).step(story, state, passes)
    assert changed(story, state, "retire")[1].cursor == 1


# --- births --------------------------------------------------------------------------------------

CASES = [
    *[("plane", covariance, gaps) for covariance in COVARIANCES for gaps in (0.0, 0.2)],
    ("mixed", "diag", 0.0),
    ("mixed", "diag", 0.15),
]


@pytest.mark.parametrize("prior", ["weak", None])
@pytest.mark.parametrize("data, covariance, gaps", CASES)
def test_a_planted_cluster_gives_birth_to_one_component(
    data: str, covariance: str, gaps: float, prior: str | None
) -> None:
    rows_of, schema = (plane, PLANE) if data == "plane" else (mixed, MIXED)
    story, state = living(rows_of(8000, 11, gaps=gaps), schema, covariance=covariance, prior=prior)
    batch = rows_of(3000, 12, 0.1, gaps)
    later = Rows.of(rows_of(3000, 13, 0.1, gaps))
    odd = surprising(story, state, batch)
    wide, grown, events = birth(story, state, odd)
    assert len(events) == 1
    assert events[0].startswith("component 2 was born from ")
    weight = int(events[0].split()[5])
    assert 200 < weight <= odd.n_rows
    # It has the place of the planted cluster, and the weight its rows have among all.
    target = [14, -9] if data == "mixed" else [-7, 9, 5]
    np.testing.assert_allclose(grown.params.family.mean[2], target, atol=0.5)
    total = state.memory.n_eff + odd.n_rows
    assert grown.params.weights[2] == pytest.approx(weight / total, rel=0.02, abs=1e-3)
    np.testing.assert_allclose(grown.params.family.mean[:2], state.params.family.mean, atol=0.05)
    assert wide.log_prob(grown.params, later).mean() > story.log_prob(state.params, later).mean()
    # Learning goes on with it, better than without it, and nothing else is born.
    rows = Rows.of(batch)
    with_it, _ = ONLINE.learn(wide, grown, rows)
    without, _ = ONLINE.learn(story, state, rows)
    gain = wide.log_prob(with_it.params, later) - story.log_prob(without.params, later)
    assert gain.mean() > 0.1
    assert with_it.params.weights[2] > grown.params.weights[2]
    odd = surprising(wide, with_it, rows_of(3000, 14, 0.1, gaps))
    assert birth(wide, with_it, odd)[2] == ()


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_the_tail_of_a_right_model_is_no_reason(covariance: str) -> None:
    story, state = living(plane(8000, 15), PLANE, covariance=covariance)
    for seed in range(10):
        odd = surprising(story, state, plane(12_000, 100 + seed))
        assert odd.n_rows > 60
        # Found among all that the state stands for, or among the rows of these days.
        assert birth(story, state, odd)[2] == ()
        assert birth(story, state, odd, out_of=12_000)[2] == ()


def test_a_cluster_among_scattered_rows_is_born_second() -> None:
    story, state = living(plane(8000, 16), PLANE)
    rng = np.random.default_rng(0)
    for _ in range(2):
        cluster = rng.normal([-7, 9, 5], 0.5, (150, 3))
        scattered = rng.uniform(-40, 40, (150, 3))
        odd = surprising(story, state, np.concatenate([scattered, cluster]))
        story, state, events = birth(story, state, odd)
        assert len(events) == 1
    # First a wide component takes all, then one the rows that lie together.
    assert np.linalg.det(state.params.family.covariance[2]) > 1e4
    np.testing.assert_allclose(state.params.family.mean[3], [-7, 9, 5], atol=0.3)


@pytest.mark.parametrize("covariance", ["full", "tied"])
def test_several_starts_find_what_one_would_cover(covariance: str) -> None:
    rng = np.random.default_rng(7)
    means = rng.uniform(-30, 30, (3, 3))

    def clusters(n: int) -> np.ndarray:
        return means[rng.integers(0, 3, n)] + 0.7 * rng.standard_normal((n, 3))

    story, state = living(plane(8000, 16), PLANE, covariance=covariance)
    for day in range(4):
        values = np.concatenate([clusters(300), plane(2000, 50 + day)])
        story, state, _ = birth(story, state, surprising(story, state, values))
    # A component over all three would leave them at -11.5 nats.
    assert story.log_prob(state.params, Rows.of(clusters(1000))).mean() > -10
    distance = np.linalg.norm(state.params.family.mean[:, None] - means, axis=2)
    assert distance.min(axis=0).max() < 0.5


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("covariance", COVARIANCES)
def test_one_absurd_value_is_no_reason(covariance: str, dtype: str) -> None:
    story, state = living(plane(4000, 16), PLANE, covariance=covariance, dtype=dtype)
    rng = np.random.default_rng(0)
    for absurd in (1e6, 1e20, 1e149):
        far = np.concatenate([rng.normal([-30, 40, 20], 1, (150, 3)), [[absurd, 0, 0]]])
        _, grown, events = birth(story, state, Rows.of(far))
        assert events == ("component 2 was born from 150 badly explained rows",)
        np.testing.assert_allclose(grown.params.family.mean[2], [-30, 40, 20], atol=0.5)
        tail = np.concatenate([surprising(story, state, plane(9000, 26)).values, far[150:]])
        assert birth(story, state, Rows.of(tail))[2] == ()


def test_a_birth_must_be_worth_its_parameters() -> None:
    story, state = living(plane(8000, 27), PLANE)
    x = np.random.default_rng(4).normal([-4, -6, 0], 0.3, (40, 3))
    # A few rows gain some ten nats, and ten parameters cost 0.5 log n each.
    assert birth(story, state, Rows.of(x[:4]), min_rows=3)[2] == ()
    assert len(birth(story, state, Rows.of(x), min_rows=3)[2]) == 1


def test_a_birth_counts_its_rows_once() -> None:
    # Batch statistics are plain sums: those of the newborn's rows are added.
    story, state = begun(plane(6000, 17), PLANE, covariance="tied")
    far = Rows.of(np.random.default_rng(1).normal([-30, 40, 20], 1, (200, 3)))
    wide, grown, _ = birth(story, state, far)
    given = np.tile([0.0, 0.0, 1.0], (200, 1))
    own = wide.e_step(grown.params, far, given)
    assert grown.stats.weight == pytest.approx(6200, rel=1e-9)
    assert grown.stats.n_rows == 6200
    np.testing.assert_allclose(grown.stats.sum_r[:2], state.stats.sum_r, rtol=1e-9)
    np.testing.assert_allclose(grown.stats.sum_r[2], 200, rtol=1e-9)
    np.testing.assert_allclose(
        grown.stats.family.sum_wxx, state.stats.family.sum_wxx + own.family.sum_wxx, rtol=1e-9
    )
    assert grown.memory is None
    # Online statistics are per unit of weight.
    state, _ = ONLINE.learn(story, state, Rows.of(plane(3000, 18)))
    wide, online, _ = birth(story, state, far)
    share = 200 / (state.memory.n_eff + 200)
    assert online.memory.n_eff == pytest.approx(state.memory.n_eff + 200, rel=1e-9)
    assert online.stats.weight == pytest.approx(1, rel=1e-12)
    np.testing.assert_allclose(online.stats.sum_r[2], share, rtol=1e-9)
    np.testing.assert_allclose(online.stats.sum_r[:2], state.stats.sum_r * (1 - share), rtol=1e-9)
    np.testing.assert_allclose(online.memory.share[2], share, rtol=1e-9)
    # Found among fewer rows, they stand for more of the stream, and the past is worth less.
    _, quick, _ = birth(story, state, far, out_of=1000)
    np.testing.assert_allclose(quick.stats.sum_r[2], 0.2, rtol=1e-9)
    assert quick.memory.n_eff < online.memory.n_eff


def test_rows_weigh_what_they_weigh() -> None:
    story, state = living(plane(4000, 19), PLANE)
    x = np.random.default_rng(2).normal([-30, 40, 20], 1, (300, 3))
    nothing = np.full((50, 3), np.nan)
    padded = Rows.of(
        np.concatenate([x, nothing, x + 99]), np.repeat([0.5, 0.5, 0.0], [300, 50, 300])
    )
    _, twice, events = birth(story, state, padded)
    assert events == ("component 2 was born from 150 badly explained rows",)
    _, once, _ = birth(story, state, Rows.of(x, np.full(300, 0.5)))
    assert once.params.digest() == twice.params.digest()
    assert birth(story, state, padded, min_rows=200)[2] == ()


def test_a_birth_follows_from_the_seed_and_resumes_to_the_bit() -> None:
    story, state = living(mixed(5000, 20), MIXED)
    odd = surprising(story, state, mixed(2000, 21, 0.1))
    first = birth(story, state, odd)
    assert same(first[:2], birth(story, state, odd)[:2])
    again = stored(story, state)
    second = birth(*again, odd)
    assert same(first[:2], second[:2])
    batch = Rows.of(mixed(1000, 22, 0.1))
    resumed = stored(*first[:2])
    learned = ONLINE.learn(*first[:2], batch)[0]
    assert same((first[0], learned), (resumed[0], ONLINE.learn(*resumed, batch)[0]))


def test_parameters_alone_give_birth_too() -> None:
    story, state = begun(plane(4000, 23), PLANE)
    bare = replace(state, stats=None, rescues=())
    odd = surprising(story, state, plane(2000, 24, 0.1))
    wide, grown, events = birth(story, bare, odd)
    assert len(events) == 1
    assert grown.stats is None
    np.testing.assert_allclose(grown.params.family.mean[2], [-7, 9, 5], atol=0.4)
    assert wide.n_components == 3


def test_frozen_weights_make_room() -> None:
    far = Rows.of(np.random.default_rng(1).normal([-30, 40, 20], 1, (200, 3)))
    passes = Passes(NumpySource(plane(2000, 28), PLANE), workers=1)
    story, state = warm_start(kmeans(PLANE, 2), passes, n_init=1, responsibility=hard)
    state = fit(story, BatchEM(10, responsibility=hard), passes, state)
    wide, grown, events = birth(story, state, far)
    assert len(events) == 1
    # Equal ones are equal again.
    np.testing.assert_array_equal(grown.params.weights, np.full(3, 1 / 3))
    assert set(wide.draw(grown.params, 100, np.random.default_rng(0)).component) == {0, 1, 2}
    # Others are kept but for the half that the newborn has of the largest.
    story, state = begun(plane(2000, 28), PLANE, frozen={"weights"})
    state = replace(state, params=replace(state.params, weights=np.array([0.2, 0.8])))
    _, grown, _ = birth(story, state, far)
    np.testing.assert_array_equal(grown.params.weights, [0.2, 0.4, 0.4])


def test_what_cannot_be_is_refused() -> None:
    story, state = living(plane(1000, 25), PLANE)
    far = Rows.of(np.random.default_rng(3).normal(50, 1, (100, 3)))
    assert birth(story, state, far[:49])[2] == ()
    assert birth(story, state, far[:0])[2] == ()
    with pytest.raises(DataError, match="no row sample"):
        birth(story, replace(state, sample=None), far)
    with pytest.raises(DataError, match="columns"):
        birth(story, state, far.select([0]))
    with pytest.raises(ConfigError, match="out_of is 99"):
        birth(story, state, far, out_of=99)
    for wrong in ({"n_starts": 0}, {"min_rows": 0}):
        with pytest.raises(ConfigError, match="n_starts"):
            birth(story, state, far, **wrong)
