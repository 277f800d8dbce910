"""Kernels of all families: each quicker way gives what the plain formula gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import oracles
import pytest
import scipy.special
import scipy.stats
from numpy.testing import assert_allclose
from numpy.typing import NDArray

from genstream import compiled
from genstream.errors import DataError
from genstream.families import columns as columns_module
from genstream.families.factorials import log_factorial
from genstream.families.levels import Combinations, LookUpWalk
from genstream.rows import Rows
from genstream.schema import Column, Schema
from genstream.stories import Block, factors, mixture
from genstream.story import Params, Story, StoryStats

N_LEVELS = (40, 7, 25)


def levelled_schema() -> Schema:
    categorical = [
        Column(f"c{j}", "categorical", tuple(map(str, range(n)))) for j, n in enumerate(N_LEVELS)
    ]
    return Schema(
        (
            Column("a"),
            categorical[0],
            Column("b", "binary"),
            categorical[1],
            Column("d"),
            Column("e", "count"),
            categorical[2],
        )
    )


def levelled_rows(n: int, rng: np.random.Generator, *, gaps: bool, weights: bool) -> Rows:
    """Rows of which most share few combinations; the last level of each column never occurs."""
    often = rng.integers(0, 3, (n, 3))
    any_level = rng.integers(0, np.array(N_LEVELS) - 1, (n, 3))
    codes = np.where(rng.random((n, 1)) < 0.9, often, any_level)
    x = np.empty((n, 7))
    x[:, [1, 3, 6]] = codes
    x[:, [0, 4]] = rng.normal(3.0, 2.0, (n, 2)) + codes[:, :2]
    x[:, 2] = rng.random(n) < 0.3
    x[:, 5] = rng.poisson(4.0, n)
    if gaps:
        x[rng.random(x.shape) < 0.1] = np.nan
        x[5] = np.nan
    return Rows.of(x, weights=rng.random(n) + 0.5 if weights else None)


def levelled_story(rows: Rows, dtype: str, kind: str, n_components: int) -> Story:
    schema = levelled_schema()
    blocks: tuple[Block, ...] = (Block(schema.names, "independent"),) if kind == "columns" else ()
    covariance = None if blocks else "full"
    story = mixture(schema, n_components, covariance=covariance, blocks=blocks, dtype=dtype)
    return story.anchored(rows)


def some_params(story: Story, rows: Rows, rng: np.random.Generator) -> Params:
    resp = rng.dirichlet(np.ones(story.n_components), rows.n_rows)
    vague = story.vague()
    return story.m_step(story.e_step(vague, rows, resp), vague)


def assert_same_stats(found: StoryStats, expected: StoryStats, tolerance: float) -> None:
    for (name, _, a), (_, _, b) in zip(found.leaves(), expected.leaves(), strict=True):
        # What cancels is as large as what it is a sum of: a row or more.
        size = max(1.0, float(np.max(np.abs(b), initial=0.0)))
        assert_allclose(a, b, rtol=tolerance, atol=tolerance * size, err_msg=name)


def one_hot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Levels as features, whatever the shapes."""
    monkeypatch.setattr(columns_module, "look_up", lambda kernel, rows: None)


@pytest.mark.parametrize("kind", ["columns", "product"])
@pytest.mark.parametrize(
    ("gaps", "weights", "n_components", "dtype"),
    [
        (False, False, 30, "float64"),
        (True, True, 30, "float64"),
        (False, True, 30, "float32"),
        (True, False, 30, "float32"),
        (False, False, 1, "float64"),
    ],
)
@pytest.mark.parametrize("switch", ["1", "0"])
def test_levels_looked_up_are_levels_as_features(
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    gaps: bool,
    weights: bool,
    n_components: int,
    dtype: str,
    switch: str,
) -> None:
    monkeypatch.setenv(compiled.SWITCH, switch)
    monkeypatch.setattr(compiled, "SMALL", 1000)
    monkeypatch.setattr("genstream.families.levels.SORT", 0.0)
    rng = np.random.default_rng(4)
    rows = levelled_rows(3000, rng, gaps=gaps, weights=weights)
    story = levelled_story(rows, dtype, kind, n_components)
    params = some_params(story, rows, rng)
    walk: Any = story._walk(params, rows)
    walks = walk.walks if kind == "product" else [walk]
    assert any(isinstance(one, LookUpWalk) for one in walks)
    stats, log_p = story.e_step(params, rows), story.log_prob(params, rows)
    posterior = story.infer(params, rows)
    one_hot(monkeypatch)
    tolerance = 1e-11 if dtype == "float64" else 2e-5
    assert_same_stats(stats, story.e_step(params, rows), tolerance)
    assert_allclose(log_p, story.log_prob(params, rows), rtol=tolerance, atol=10 * tolerance)
    expected = story.infer(params, rows).responsibilities
    assert_allclose(posterior.responsibilities, expected, atol=10 * tolerance)
    # Whatever the chunks, and with the plain densities of each column.
    parts = [slice(0, 700), slice(700, 1900), slice(1900, 3000)]
    monkeypatch.undo()
    monkeypatch.setattr(compiled, "SMALL", 1000)
    cut = [story.e_step(params, rows[part]) for part in parts]
    assert_same_stats(cut[0].merge(cut[1]).merge(cut[2]), stats, tolerance)


def test_rows_of_a_combination_come_in_a_run() -> None:
    rng = np.random.default_rng(0)
    sizes = np.array([300, 5, 400, 2])
    values = rng.integers(0, [9, 5, 6, 2], (5000, 4)).astype(np.float64)
    observed = rng.random(values.shape) < 0.95
    found = Combinations(values, observed, sizes)
    assert np.array_equal(np.sort(found.order), np.arange(5000))
    code = np.where(observed, values + np.cumsum(sizes) - sizes, sizes.sum())
    assert np.array_equal(found.places[found.of_row], code)
    places, edges = found.runs(found.order)
    assert len(places) == len(np.unique(code, axis=0)) == len(found.places)
    assert np.array_equal(np.repeat(places, np.diff(edges), axis=0), code[found.order])
    places, edges = found.runs(slice(100, 900))
    assert np.array_equal(np.repeat(places, np.diff(edges), axis=0), code[100:900])


def test_few_levels_and_short_chunks_stay_features() -> None:
    rng = np.random.default_rng(1)
    rows = levelled_rows(3000, rng, gaps=False, weights=False)
    story = levelled_story(rows, "float64", "columns", 50)
    params = some_params(story, rows, rng)
    assert isinstance(story._walk(params, rows), LookUpWalk)
    assert not isinstance(story._walk(params, rows[:100]), LookUpWalk)
    schema = Schema(tuple(Column(f"c{j}", "categorical", ("x", "y")) for j in range(3)))
    few = mixture(schema, 50).anchored(Rows.of(rng.integers(0, 2, (100, 3)).astype(np.float64)))
    rows = Rows.of(rng.integers(0, 2, (3000, 3)).astype(np.float64))
    assert not isinstance(few._walk(few.vague(), rows), LookUpWalk)


def clustered(
    n: int, d: int, q: int, k: int, rng: np.random.Generator, *, apart: float
) -> NDArray[np.float64]:
    """Rows of k groups with q factors each, means of order `apart`."""
    group = rng.integers(0, k, n)
    centre, loadings = apart * rng.normal(size=(k, d)), rng.normal(size=(k, q, d))
    factor = rng.normal(size=(n, q))
    noise = rng.normal(size=(n, d)) * (0.2 + 0.8 * rng.random(d))
    return centre[group] + np.einsum("nq,nqd->nd", factor, loadings[group]) + noise


class TestFactors:
    """Moments gathered through the latent are those of Gaussians, from `scipy.stats` too."""

    @pytest.mark.parametrize("noise", ["diagonal", "isotropic"])
    @pytest.mark.parametrize("n_components", [1, 4])
    @pytest.mark.parametrize(("dtype", "apart"), [("float64", 1.0), ("float32", 30.0)])
    def test_moments_are_those_of_gaussians(
        self, noise: str, n_components: int, dtype: str, apart: float
    ) -> None:
        rng = np.random.default_rng(7)
        x = clustered(6000, 9, 2, n_components, rng, apart=apart)
        rows = Rows.of(x, weights=rng.random(6000) + 0.5)
        story = factors(
            Schema.real(9), 2, n_components=n_components, noise=noise, dtype=dtype
        ).anchored(rows)
        params = some_params(story, rows, rng)
        for _ in range(3):
            params = story.m_step(story.e_step(params, rows), params)
        family: Any = params.family
        covariance = family.loadings @ family.loadings.swapaxes(1, 2)
        covariance[:, range(9), range(9)] += np.reshape(family.noise, (n_components, -1))
        log_joint = np.log(params.weights) + np.column_stack(
            [
                scipy.stats.multivariate_normal(m, c).logpdf(x)
                for m, c in zip(family.mean, covariance, strict=True)
            ]
        )
        log_p = scipy.special.logsumexp(log_joint, axis=1)
        near = 1e-9 if dtype == "float64" else 2e-3
        assert_allclose(story.log_prob(params, rows), log_p, rtol=0, atol=near)
        resp = np.exp(log_joint - log_p[:, None]) * rows.row_weights[:, None]
        pivot: Any = story.family.pivot
        y = (x - pivot.shift) / pivot.scale
        stats: Any = story.e_step(params, rows)
        tolerance = 1e-9 if dtype == "float64" else 1e-4
        assert_allclose(stats.family.sum_w, resp.sum(axis=0), rtol=tolerance)
        assert_allclose(stats.family.sum_wx, resp.T @ y, rtol=tolerance, atol=6000 * tolerance)
        second = np.einsum("nk,ni,nj->kij", resp, y, y)
        assert_allclose(stats.family.sum_wxx, second, rtol=tolerance, atol=6000 * tolerance)
        cut = [story.e_step(params, rows[part]) for part in (slice(0, 999), slice(999, 6000))]
        assert_same_stats(cut[0].merge(cut[1]), stats, tolerance)

    def test_a_mask_that_says_nothing_does_not_show(self) -> None:
        rng = np.random.default_rng(8)
        x = clustered(2000, 6, 2, 3, rng, apart=1.0)
        story = factors(Schema.real(6), 2, n_components=3).anchored(Rows.of(x))
        params = some_params(story, Rows.of(x), rng)
        masked = Rows(x, np.ones(x.shape, dtype=bool))
        assert oracles.identical(story.e_step(params, masked), story.e_step(params, Rows.of(x)))


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32, np.float64, np.int64])
def test_factorials_are_those_of_the_gamma_function(dtype: type[Any]) -> None:
    counts = np.array([[0, 1, 2, 3, 100], [7, 20, 60, 9, 1]]).astype(dtype)
    expected = scipy.special.gammaln(counts.astype(np.float64) + 1)
    assert np.array_equal(log_factorial(counts), expected)
    if dtype in (np.float64, np.int64):
        counts[0, 0] = 1 << 40
        assert log_factorial(counts)[0, 0] == scipy.special.gammaln(2.0**40 + 1)
        assert log_factorial(counts[:0]).shape == (0, 5)
    assert log_factorial(np.array([2.5]))[0] == scipy.special.gammaln(3.5)


@pytest.mark.parametrize("dtype", [np.bool_, np.uint8, np.int64, np.float64])
@pytest.mark.parametrize("arithmetic", ["float64", "float32"])
def test_bits_and_bytes_are_scored_as_they_are(dtype: type[Any], arithmetic: str) -> None:
    rng = np.random.default_rng(9)
    bits = rng.random((4000, 30)) < rng.random(30)
    schema = Schema(tuple(Column(f"b{j}", "binary") for j in range(30)))
    rows = Rows.of(bits.astype(dtype), weights=rng.random(4000))
    assert rows.values.dtype == (np.float32 if dtype in (np.bool_, np.uint8) else np.float64)
    story = mixture(schema, 5, dtype=arithmetic).anchored(rows)
    params = some_params(story, rows, rng)
    family: Any = params.family
    log_joint = np.log(params.weights) + scipy.stats.bernoulli.logpmf(
        bits[:, None].astype(int), family.probability
    ).sum(axis=2)
    log_p = scipy.special.logsumexp(log_joint, axis=1)
    near = 1e-10 if arithmetic == "float64" else 1e-4
    assert_allclose(story.log_prob(params, rows), log_p, atol=near, rtol=0)
    resp = np.exp(log_joint - log_p[:, None]) * rows.row_weights[:, None]
    stats: Any = story.e_step(params, rows)
    assert_allclose(stats.family.sum_binary, resp.T @ bits, rtol=10 * near)


def test_what_is_no_level_is_looked_up_as_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that no schema has checked are not read beyond the table."""
    rng = np.random.default_rng(2)
    rows = levelled_rows(3000, rng, gaps=False, weights=False)
    story = levelled_story(rows, "float64", "columns", 30)
    params = some_params(story, rows, rng)
    wrong = rows.values.copy()
    wrong[::7, 1], wrong[::5, 3], wrong[3, 6] = 40.0, -3.0, 1.5
    assert isinstance(story._walk(params, Rows.of(wrong)), LookUpWalk)
    stats = story.e_step(params, Rows.of(wrong))
    one_hot(monkeypatch)
    assert_same_stats(stats, story.e_step(params, Rows.of(wrong)), 1e-11)


@pytest.mark.parametrize("wrong", [-1.0, 0.5, 2.0])
@pytest.mark.parametrize("place", [(0, 0), (2999, 29), (1024, 3)])
def test_what_is_impossible_is_found_wherever_it_is(wrong: float, place: tuple[int, int]) -> None:
    schema = Schema((Column("a"), *(Column(f"b{j}", "binary") for j in range(29))))
    x = np.ones((3000, 30))
    x[:, 0] = -0.5
    assert Rows.of(x).check(schema).n_rows == 3000
    x[place] = wrong
    rows = Rows.of(x)
    if place[1] == 0:
        assert rows.check(schema) is rows
        return
    with pytest.raises(DataError, match=f"row {place[0]}, column 'b{place[1] - 1}'"):
        rows.check(schema)
    # Behind a mask it is not there.
    hidden = np.ones(x.shape, dtype=bool)
    hidden[place] = False
    assert Rows(x, hidden).check(schema).n_rows == 3000
