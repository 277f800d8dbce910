"""Kernels of all families: each quicker way gives what the plain formula gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose

from genstream import compiled
from genstream.families import columns as columns_module
from genstream.families.levels import Combinations, LookUpWalk
from genstream.rows import Rows
from genstream.schema import Column, Schema
from genstream.stories import Block, mixture
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
