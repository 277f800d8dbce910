"""Laws that every family obeys, judged through its story alone.

Each law takes a story whose pivot and prior are fixed, parameters, and values in which NaN marks a
gap.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import oracles
from numpy.typing import NDArray

from genstream.responsibility import hard, soft
from genstream.rows import Rows
from genstream.story import Params, Story, StoryStats

Array = NDArray[Any]
# Moves some leaves of a family's parameters a little, within what they may be.
Move = Callable[[Any, np.random.Generator, float], Any]


def stored_and_read(story: Story, params: Params, values: Array) -> None:
    """A story comes back from JSON equal to the bit, and its parameters from a dataset."""
    again = Story.from_json(json.loads(json.dumps(story.to_json())))
    assert again.to_json() == story.to_json()
    assert type(again.family) is type(story.family)
    rows = Rows.of(values)
    one, two = story.e_step(params, rows), again.e_step(params, rows)
    assert oracles.identical(one, two)
    assert oracles.identical(story.params_from(params.to_dataset(story.labels())), params)
    assert oracles.identical(story.stats_from(one.to_dataset()), one)


def loads_what_blocks_hold(story: Story, params: Params, values: Array) -> None:
    """Rows loaded in any order, those with nothing observed among them, score and gather alike."""
    rng = np.random.default_rng(0)
    rows = Rows.of(values)
    kernel = story.family.prepare(params.family, np.log(params.weights))
    walk = kernel.walk(rows)
    scores = np.tile(np.log(params.weights)[:, None], rows.n_rows)
    base = np.zeros(rows.n_rows)
    resp = rng.dirichlet(np.ones(story.n_components), rows.n_rows).T
    filled = np.full(values.shape, np.nan)
    for index in walk.blocks():
        scores[:, index] = walk.score()
        base[index] = 0.0 if (h := walk.base()) is None else h
        walk.gather(np.ascontiguousarray(resp[:, index]))
        filled[index] = walk.complete(resp[:, index])
    expected = walk.close()

    other = kernel.walk(rows)
    order = rng.permutation(rows.n_rows)
    cuts = [0, 1, rows.n_rows // 3, rows.n_rows]
    pieces: list[Any] = [order[a:b] for a, b in itertools.pairwise(cuts)]
    if not np.isnan(values).any():
        pieces = [slice(0, 7), slice(7, rows.n_rows)]
    for index in pieces:
        other.load(index)
        np.testing.assert_allclose(other.score(), scores[:, index], rtol=1e-11, atol=1e-11)
        found = other.base()
        np.testing.assert_allclose(0.0 if found is None else found, base[index], atol=1e-12)
        other.gather(np.ascontiguousarray(resp[:, index]))
        known = ~np.isnan(filled[index])
        np.testing.assert_allclose(
            other.complete(resp[:, index])[known], filled[index][known], rtol=1e-12
        )
    assert oracles.distance(other.close(), expected) < 1e-11


def loads_more_than_a_block_holds(story: Story, params: Params, values: Array) -> None:
    """As many rows as another family says, many more than its own blocks have."""
    rows = Rows.of(np.tile(values, (1 + 6000 // len(values), 1)))
    walk = story.family.prepare(params.family, np.log(params.weights)).walk(rows)
    walk.load(np.arange(len(values)))
    few = walk.score().copy()
    walk.load(np.arange(rows.n_rows))
    np.testing.assert_allclose(walk.score(), np.tile(few, rows.n_rows // len(values)), rtol=1e-10)


def mends(story: Story, params: Params, values: Array) -> None:
    """Extrapolated statistics are mended into some from which an M-step makes sound parameters,
    and those of rows are left as they are.
    """
    rng = np.random.default_rng(8)
    rows = Rows.of(values)
    known = story.e_step(params, rows)
    same = story.family.possible(known.family, known.family)
    assert same is not None
    assert oracles.distance(same, known.family) < 1e-9
    for _ in range(20):
        resp = rng.dirichlet(np.full(story.n_components, 0.3), len(values))
        other = story.e_step(params, rows, resp)
        far = known.scale(2.5).merge(other.scale(-1.5))
        mended = story.family.possible(far.family, known.family)
        if mended is not None:
            found, _ = story.family.maximise(mended, params.family)
            assert oracles.finite(found)
            assert np.isfinite(story.log_prob(replace(params, family=found), rows)).all()


def never_falls(
    story: Story,
    params: Params,
    values: Array,
    weights: Array | None = None,
    steps: int = 30,
    rule: Any = soft,
) -> Params:
    """EM raises log-likelihood plus log prior (hard EM that of the best components)."""
    rows = Rows.of(values, weights)
    before = -np.inf
    slack = 1e-9 if story.dtype == "float64" else 1e-5
    for _ in range(steps):
        stats = story.e_step(params, rows, rule)
        objective = stats.objective + story.log_prior(params)
        assert np.isfinite(objective)
        assert objective >= before - slack * (1 + abs(before))
        before = objective
        params, _ = story.maximise(stats, params)
        assert oracles.finite(params)
    return params


def never_falls_however_learned(story: Story, params: Params, values: Array) -> None:
    """Soft and hard EM, with and without weights, every parameter free or one of them frozen."""
    rng = np.random.default_rng(3)
    weights = rng.uniform(0, 2, len(values))
    for rule in (soft, hard):
        for w in (None, weights):
            never_falls(story, params, values, w, steps=12, rule=rule)
    for name in ("weights", *story.family.param_names):
        kept = replace(story, frozen=frozenset((name,)))
        found = never_falls(kept, params, values, weights, steps=6)
        where = found if name == "weights" else found.family
        start = params if name == "weights" else params.family
        np.testing.assert_array_equal(getattr(where, name), getattr(start, name))


def maximises(
    story: Story, params: Params, stats: StoryStats, move: Move, frozen: Iterable[str] = ()
) -> Params:
    """The M-step is the maximum of `E[log p(x, z)] + log prior`, beside what is frozen."""
    story = replace(story, frozen=frozenset(frozen))
    best = story.m_step(stats, params)
    for name in story.frozen:
        np.testing.assert_array_equal(getattr(best.family, name), getattr(params.family, name))

    def value(candidate: Params) -> float:
        return story.expected_log_joint(candidate, stats) + story.log_prior(candidate)

    top = value(best)
    rng = np.random.default_rng(4)
    for size in (1e-4, 1e-2, 0.3):
        for _ in range(20):
            moved = move(best.family, rng, size)
            moved = replace(moved, **{n: getattr(best.family, n) for n in story.frozen})
            assert value(replace(best, family=moved)) <= top + 1e-10 * (1 + abs(top))
    return best


def factorises(story: Story, params: Params, values: Array, given: list[str]) -> None:
    """`log p(x) = log p(x_given) + log p(x_rest | x_given)`, row by row, in data units."""
    names = list(story.schema.names)
    columns = [names.index(name) for name in given]
    rest = [j for j in range(len(names)) if j not in columns]
    whole = story.log_prob(params, Rows.of(values))
    part, theta = story.marginal(params, given)
    known = part.log_prob(theta, Rows.of(values[:, sorted(columns)]))
    for i, x in enumerate(values):
        told = {names[j]: float(x[j]) for j in columns}
        conditional, posterior = story.condition(params, told)
        assert conditional.family.prior is None
        assert conditional.schema.names == tuple(names[j] for j in rest)
        left = conditional.log_prob(posterior, Rows.of(x[None, rest]))[0]
        np.testing.assert_allclose(known[i] + left, whole[i], rtol=1e-10, atol=1e-9)


def marginal_is_what_gaps_leave(story: Story, params: Params, values: Array) -> None:
    """Dropping columns, or leaving them empty, gives the same density."""
    names = story.schema.names
    for j in range(len(names)):
        kept = [k for k in range(len(names)) if k != j]
        gapped = values.copy()
        gapped[:, j] = np.nan
        part, theta = story.marginal(params, [names[k] for k in kept])
        np.testing.assert_allclose(
            part.log_prob(theta, Rows.of(values[:, kept])),
            story.log_prob(params, Rows.of(gapped)),
            rtol=1e-10,
            atol=1e-10,
        )


def fills_with_what_it_would_draw(
    story: Story, params: Params, x: Array, means: Array, draws: int = 4000
) -> None:
    """One row (d,) with gaps: its mean completion is `means` (d,), and the average of its draws
    (of columns that have a mean: NaN elsewhere); observed entries stay to the bit.
    """
    gaps = np.isnan(x)
    filled = story.impute(params, Rows.of(x[None]))[0]
    assert filled[~gaps].tobytes() == x[~gaps].tobytes()
    known = gaps & ~np.isnan(means)
    np.testing.assert_allclose(filled[known], means[known], rtol=1e-9)
    drawn = story.impute(params, Rows.of(np.tile(x, (draws, 1))), np.random.default_rng(5))
    np.testing.assert_array_equal(drawn[:, ~gaps], np.tile(x[~gaps], (draws, 1)))
    Rows.of(drawn).check(story.schema)
    error = drawn.std(axis=0) / np.sqrt(draws) + 1e-12
    assert (np.abs(drawn.mean(axis=0) - means)[known] < 5 * error[known]).all()


def recovers(
    story: Story, truth: Params, n_rows: int, start: Params | None = None, steps: int = 150
) -> Params:
    """Rows drawn, and learned from near the truth; returns what was found."""
    draw = story.draw(truth, n_rows, np.random.default_rng(6))
    rows = Rows.of(draw.values).check(story.schema)
    story = story.anchored(rows)
    params = start or truth
    for _ in range(steps):
        params = story.m_step(story.e_step(params, rows), params)
    return params
