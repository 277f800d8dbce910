"""One component of which one pass says everything: no further pass is made, and none is missed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from genstream.families.blocks import Pivot
from genstream.families.gaussian_walk import second_moments
from genstream.learn import BatchEM, FitState, Outcome, fit
from genstream.passes import Passes
from genstream.rows import Rows
from genstream.schema import Column, Schema
from genstream.sources import NumpySource
from genstream.start import warm_start
from genstream.stories import factors, mixture
from genstream.story import Params, Story

RNG = np.random.default_rng(4)
X = RNG.normal(size=(700, 3)) @ RNG.normal(size=(3, 5)) + 0.5 * RNG.normal(size=(700, 5)) + 3.0
COUNTS = RNG.poisson(4.0, size=(700, 2)).astype(float)


class Counted(NumpySource):
    """A source that counts how often a chunk is read."""

    n_reads = 0

    def read(self, i: int) -> Rows:
        self.n_reads += 1
        return super().read(i)


def stories() -> dict[str, Story]:
    mixed = Schema((*Schema.real(5).columns, Column("a", "count"), Column("b", "count")))
    return {
        "full": mixture(Schema.real(5), 1, covariance="full"),
        "spherical": mixture(Schema.real(5), 1, covariance="spherical"),
        "mixed": mixture(mixed, 1, covariance="full"),
        "ppca": factors(Schema.real(5), 2, noise="isotropic"),
        "fa": factors(Schema.real(5), 2, prior=None),
    }


def of_dtype(story: Story, dtype: str) -> Story:
    return replace(story, family=story.family.with_dtype(dtype))


def rows_of(story: Story) -> np.ndarray:
    return X if story.schema.n_features == 5 else np.hstack([X, COUNTS])


def fitted(story: Story, x: np.ndarray, learner: BatchEM) -> tuple[Story, FitState, Counted]:
    source = Counted(x, story.schema, chunk_rows=256)
    anchored = story.anchored(Rows.of(x[:300]))
    sample = Rows.of(x[:300])
    vague = anchored.vague()
    resp = np.ones((300, 1))
    params = anchored.m_step(anchored.e_step(vague, sample, resp), vague)
    begun = anchored.family.start(params.family, sample, resp, np.random.default_rng(0))
    params = replace(params, family=begun)
    passes = Passes(source, scheduler="synchronous")
    return anchored, fit(anchored, learner, passes, FitState(params)), source


@pytest.mark.parametrize("accelerate", [False, True])
@pytest.mark.parametrize("name", list(stories()))
def test_one_pass_is_enough_and_tells_the_truth(name: str, accelerate: bool) -> None:
    story = stories()[name]
    x = rows_of(story)
    learner = BatchEM(500, 1e-9, accelerate=accelerate)
    anchored, state, source = fitted(story, x, learner)
    assert source.n_reads == 3
    assert state.outcome is Outcome.CONVERGED
    assert [info.n_rows for info in state.trace][:2] == [700, 0]
    # What the trace says without looking is what looking says.
    exact = anchored.log_prob(state.params, Rows.of(x)).sum()
    assert state.trace[-1].loglik == pytest.approx(exact, rel=1e-10)
    # And it is where EM with all its passes ends.
    params = state.params
    for _ in range(3):
        params = anchored.m_step(anchored.e_step(params, Rows.of(x)), params)
    again = anchored.log_prob(params, Rows.of(x)).sum()
    assert again == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("name", ["full", "ppca"])
def test_a_fit_that_stands_still_is_over(name: str) -> None:
    """Where the M-step of the same statistics gives the same parameters, to the bit."""
    story = stories()[name]
    _, state, _ = fitted(story, rows_of(story), BatchEM(500, 1e-9))
    assert state.outcome is Outcome.CONVERGED
    assert state.step == 2
    # A tolerance below 0 asks for all steps.
    _, state, _ = fitted(story, rows_of(story), BatchEM(6, -1.0))
    assert state.outcome is Outcome.MAX_STEPS
    assert state.step == 6


@pytest.mark.parametrize("name", ["full", "ppca"])
def test_gaps_are_looked_at_again(name: str) -> None:
    story = stories()[name]
    x = rows_of(story).copy()
    x[5, 1] = np.nan
    _, state, source = fitted(story, x, BatchEM(6, -1.0))
    assert source.n_reads == 3 * 6
    assert all(info.n_rows == 700 for info in state.trace)


def test_several_components_are_looked_at_again() -> None:
    story = mixture(Schema.real(5), 2, covariance="diag").anchored(Rows.of(X))
    source = Counted(X, story.schema, chunk_rows=256)
    params = story.vague()
    family = replace(params.family, mean=X[[0, 9]])
    start = FitState(Params(params.weights, family))
    fit(story, BatchEM(4, -1.0), Passes(source, scheduler="synchronous"), start)
    assert source.n_reads == 3 * 4


@pytest.mark.parametrize("n_rows", [60, 700, 20_000])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", ["full", "tied", "spherical", "ppca", "fa"])
def test_the_sums_tell_the_log_likelihood_of_each_row(
    name: str, dtype: str, weighted: bool, n_rows: int
) -> None:
    """Which are not scored for it; compiled or not, as rows are many or few."""
    rng = np.random.default_rng(n_rows)
    x = np.resize(X, (n_rows, 5)) + rng.normal(size=(n_rows, 5))
    weights = rng.uniform(0, 2, n_rows) if weighted else None
    if weights is not None:
        weights[:3] = 0.0
    known = stories() | {"tied": mixture(Schema.real(5), 1, covariance="tied")}
    story = of_dtype(known[name], dtype).anchored(Rows.of(x[:300]))
    rows = Rows.of(x, weights)
    params = story.vague()
    for _ in range(2):
        stats = story.e_step(params, rows)
        of_rows = story.log_prob(params, rows)
        wanted = rows.row_weights @ of_rows
        assert stats.objective == pytest.approx(wanted, rel=1e-9 if dtype == "float64" else 2e-6)
        assert stats.sum_r.tolist() == [pytest.approx(rows.row_weights.sum())]
        params = story.m_step(stats, params)


@pytest.mark.parametrize("name", ["full", "fa"])
def test_what_float32_cannot_sum_is_summed_in_float64(name: str) -> None:
    """Two columns that nearly determine one another: the difference keeps its digits."""
    rng = np.random.default_rng(11)
    x = np.repeat(rng.normal(size=(20_000, 1)), 5, axis=1)
    x += 1e-3 * rng.normal(size=x.shape)
    found = []
    for dtype in ("float32", "float64"):
        story = of_dtype(stories()[name], dtype).anchored(Rows.of(x[:300]))
        params = story.vague()
        params = story.m_step(story.e_step(params, Rows.of(x), np.ones((len(x), 1))), params)
        begun = story.family.start(params.family, Rows.of(x), np.ones((len(x), 1)), rng)
        params = replace(params, family=begun)
        found.append(story.e_step(params, Rows.of(x)))
    one, other = (stats.family.sum_wxx[0] for stats in found)
    gap = np.array([1.0, -1.0, 0.0, 0.0, 0.0])
    assert gap @ one @ gap == pytest.approx(gap @ other @ gap, rel=1e-6)


@pytest.mark.parametrize("name", stories())
def test_no_rows_at_all_sum_to_nothing(name: str) -> None:
    story = stories()[name]
    stats = story.e_step(story.vague(), Rows(np.empty((0, story.schema.n_features))))
    assert stats.n_rows == 0
    assert all(not np.any(value) for path, _, value in stats.leaves() if "sum" in str(path))


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_sums_about_zero_are_those_about_the_pivot(
    dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scale = np.array([1e-3, 1.0, 1e4])
    shift = np.array([0.9, -0.5, 0.0])
    x = ((RNG.normal(size=(20_000, 3)) + shift) * scale).astype(dtype)
    x[:, 1] += x[:, 0] * 1e3
    pivot = Pivot.of(x.mean(axis=0), x.var(axis=0))
    y = (x.astype(np.float64) - pivot.shift) / pivot.scale
    n, first, second = second_moments(Rows(x), pivot, np.dtype(dtype), fast=False)
    assert n == 20_000
    exact = 1e-12 if dtype == "float64" else 1e-5
    np.testing.assert_allclose(first, y.sum(axis=0), atol=exact * n)
    np.testing.assert_allclose(second, y.T @ y, atol=exact * n)

    # A column that does not vary, or whose mean is far from 0, is summed about the pivot.
    x[:, 1] = 0.75
    flat = Pivot.of(x.mean(axis=0), x.var(axis=0))
    assert second_moments(Rows(x), flat, np.dtype(dtype), fast=False)[2][1, 1] == 0.0
    x[:, 1] = 1e6 + RNG.normal(size=20_000)
    far = Pivot.of(x.astype(np.float64).mean(axis=0), x.astype(np.float64).var(axis=0))
    y = (x.astype(np.float64) - far.shift) / far.scale
    found = second_moments(Rows(x), far, np.dtype(dtype), fast=False)[2]
    np.testing.assert_allclose(found, y.T @ y, atol=exact * n)


@pytest.mark.parametrize("name", list(stories()))
def test_a_start_of_complete_rows_is_no_fit(name: str) -> None:
    story = stories()[name]
    x = rows_of(story)
    trace: list[float] = []
    passes = Passes(NumpySource(x, story.schema), scheduler="synchronous")
    _, state = warm_start(story, passes, on_start=lambda _, value: trace.append(value))
    assert state.step == 0
    assert state.trace == ()
    assert state.stats is not None
    assert np.isfinite(state.stats.objective)
    gaps = x.copy()
    gaps[::9, 0] = np.nan
    passes = Passes(NumpySource(gaps, story.schema), scheduler="synchronous")
    _, state = warm_start(story, passes, on_start=lambda _, value: trace.append(value))
    assert len(trace) == 1


@pytest.mark.parametrize(("dtype", "scale"), [("float64", 9.9e151), ("float32", 1e-22)])
def test_squares_beyond_the_range_of_numbers_are_not_summed_about_zero(
    dtype: str, scale: float
) -> None:
    x = (np.clip(RNG.normal(size=(60_000, 2)), -1, 1) * scale).astype(dtype)
    exact = x.astype(np.longdouble)
    pivot = Pivot.of(
        exact.mean(axis=0).astype(float), ((exact / scale).var(axis=0)).astype(float) * scale**2
    )
    y = ((exact - pivot.shift) / pivot.scale).astype(float)
    found = second_moments(Rows(x), pivot, np.dtype(dtype), fast=False)[2]
    np.testing.assert_allclose(found, y.T @ y, rtol=1e-4, atol=1e-4 * len(x))
