"""Products: what several families on different columns make of a row together."""

from __future__ import annotations

import copy
import gc
import itertools
import json
import pickle
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import laws
import numpy as np
import oracles
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import special, stats

from genstream.errors import ConfigError
from genstream.families.columns import IndependentColumns
from genstream.families.gaussian import Gaussian
from genstream.families.product import Part, Product
from genstream.growth import birth, retire, with_levels
from genstream.incremental import IncrementalEM
from genstream.learn import BatchEM, FitState, Resident, fit, story_of
from genstream.models import ModelStore
from genstream.online import OnlineEM
from genstream.passes import Passes
from genstream.rows import Rows
from genstream.schema import Column, Schema
from genstream.sources import NumpySource
from genstream.start import warm_start
from genstream.stories import Block, factors, mixture
from genstream.story import Params, Story
from genstream.updates import Options, TableDelivery, caller_id, learn_batch

Array = NDArray[Any]

# Blocks that are no neighbours, of all kinds; `e` and `f` are a second block that sorts by pattern.
WIDE = Schema(
    (
        Column("a"),
        Column("c", "categorical", ("x", "y", "z")),
        Column("b"),
        Column("n", "count"),
        Column("e"),
        Column("w", "binary"),
        Column("f"),
        Column("m", "count"),
    )
)


def wide(kind: str, k: int = 3, **options: Any) -> Story:
    """A story over WIDE whose blocks are all of one sort, or of as many as there are."""
    blocks = {
        "gaussian": [],
        "two": [Block(("f", "e"), "tied")],
        "student": [Block(("e", "f"), "student")],
        "all": [
            Block(("e", "f"), "student"),
            Block(("m",), "negative_binomial"),
            Block(("n",), "zero_inflated"),
        ],
        "bag": [Block(("n", "m"), "multinomial")],
    }[kind]
    return mixture(WIDE, k, covariance="full", blocks=blocks, **options)


WEIGHTS = np.random.default_rng(3).uniform(0, 2, 120)
KINDS = ("gaussian", "two", "student", "all", "bag")


def gapped(values: Array, rng: np.random.Generator, share: float = 0.25) -> Array:
    """Values with gaps in all blocks: some rows lack a block, some everything."""
    out = oracles.with_gaps(values, share, rng)
    out[:4] = np.nan
    out[4:9, [0, 2]] = np.nan
    out[9:14, [4, 6]] = np.nan
    out[14:18, [0, 2, 4, 6]] = np.nan
    out[18:60] = values[18:60]
    return out


def told(
    kind: str, n_rows: int = 300, gaps: bool = True, **options: Any
) -> tuple[Story, Params, Array]:
    """An anchored story, parameters of a few steps of EM, and rows drawn near them."""
    rng = np.random.default_rng(5)
    story = wide(kind, **options)
    z = rng.integers(0, 3, n_rows)
    noise = rng.standard_normal((n_rows, 4))
    values = np.column_stack(
        [
            3.0 * z + noise[:, 0],
            (z + (rng.random(n_rows) < 0.3)) % 3,
            -2.0 * z + 0.8 * noise[:, 0] + 0.5 * noise[:, 1],
            rng.poisson(1 + 3 * z),
            1.5 * z + noise[:, 2],
            rng.random(n_rows) < (1 + z) / 5,
            noise[:, 3] + 0.5 * noise[:, 2],
            rng.poisson(rng.gamma(1.5, 2 + z)),
        ]
    )
    if gaps:
        values = gapped(values, rng)
    rows = Rows.of(values)
    story = story.anchored(rows)
    resp = 0.1 / 3 + 0.9 * np.eye(3)[z]
    params = story.m_step(story.e_step(story.vague(), rows, resp), story.vague())
    for _ in range(2):
        params = story.m_step(story.e_step(params, rows), params)
    return story, params, values


def by_hand(story: Story, params: Params, k: int, x: Array) -> float:
    """`log p(x_observed | k)` of one row, block by block, by scipy."""
    total = 0.0
    for columns, alone, theta in oracles.blocks_of(story, params):
        family: Any = theta.family
        own = x[columns]
        seen = ~np.isnan(own)
        if not seen.any():
            continue
        name = alone.family.name
        if name == "student":
            total += stats.multivariate_t.logpdf(
                own[seen], family.mean[k][seen], family.scale[k][np.ix_(seen, seen)], family.dof[k]
            )
        elif name == "negative_binomial":
            shape, rate = family.shape[k], family.rate[k]
            total += stats.nbinom.logpmf(own, shape, shape / (shape + rate))[seen].sum()
        elif name == "multinomial":
            p = family.probability[k][seen] / family.probability[k][seen].sum()
            total += stats.multinomial.logpmf(own[seen], own[seen].sum(), p)
        elif name == "zero_inflated":
            inflation = family.inflation[k]
            p = inflation * (own == 0) + (1 - inflation) * stats.poisson.pmf(own, family.rate[k])
            total += np.log(p[seen]).sum()
        else:
            total += float(oracles.component_log_prob(alone, theta, k, own[None])[0])
    return total


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize(("dtype", "exact"), [("float64", 1e-11), ("float32", 2e-5)])
def test_the_density_is_the_product_of_its_parts(
    kind: str, gaps: bool, dtype: str, exact: float
) -> None:
    story, params, values = told(kind, 64, gaps, dtype=dtype)
    joint = np.array(
        [
            [np.log(params.weights[k]) + by_hand(story, params, k, x) for k in range(3)]
            for x in values
        ]
    )
    expected = np.where(np.isnan(values).all(axis=1), 0.0, special.logsumexp(joint, axis=1))
    rows = Rows.of(values)
    np.testing.assert_allclose(story.log_prob(params, rows), expected, rtol=exact, atol=exact)
    posterior = story.infer(params, rows)
    empty = np.isnan(values).all(axis=1)
    resp = np.where(empty[:, None], params.weights, special.softmax(joint, axis=1))
    np.testing.assert_allclose(posterior.responsibilities, resp, atol=10 * exact)
    assert story.e_step(params, rows).n_unobserved == int(empty.sum())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize(("dtype", "exact"), [("float64", 1e-11), ("float32", 3e-5)])
def test_parts_gather_together_what_they_gather_apart(
    kind: str, gaps: bool, dtype: str, exact: float
) -> None:
    """With given responsibilities, the statistics are those of each block as if it were alone."""
    story, params, values = told(kind, gaps=gaps, dtype=dtype)
    rng = np.random.default_rng(0)
    resp = rng.dirichlet(np.ones(3), len(values))
    weights = rng.uniform(0, 2, len(values))
    found: Any = story.e_step(params, Rows.of(values, weights), resp).family
    blocks = oracles.blocks_of(story, params)
    assert len(blocks) == len(found.blocks) >= 2
    for (columns, alone, theta), own in zip(blocks, found.blocks, strict=True):
        expected = alone.e_step(theta, Rows.of(values[:, columns], weights), resp).family
        assert oracles.distance(own, expected) < exact


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("far", [2e4, 3e8])
def test_components_far_out_keep_their_digits(dtype: str, far: float) -> None:
    """Where the linear form of a part would lose too many digits, it is computed more exactly,
    and the other parts with it."""
    story, params, values = told("two", gaps=False, dtype=dtype)
    family: Any = params.family
    mean = family.block0.mean.copy()
    mean[1] += far
    family = replace(family, block0=replace(family.block0, mean=mean))
    params = replace(params, family=family)
    values = values[:60].copy()
    values[:30, [0, 2]] += far
    expected = oracles.log_prob(story, params, values)
    found = story.log_prob(params, Rows.of(values))
    size = 1e-5 if dtype == "float32" else 1e-9
    np.testing.assert_allclose(found, expected, rtol=size, atol=5e-3)
    # Statistics of the other parts do not suffer.
    resp = np.random.default_rng(0).dirichlet(np.ones(3), len(values))
    sums: Any = story.e_step(params, Rows.of(values), resp).family
    for (columns, alone, theta), own in zip(
        oracles.blocks_of(story, params), sums.blocks, strict=True
    ):
        told_alone = alone.e_step(theta, Rows.of(values[:, columns]), resp).family
        assert oracles.distance(own, told_alone) < 1e-5


@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("kind", ["two", "student"])
def test_a_chunk_is_let_go_once_it_was_used(kind: str, gaps: bool) -> None:
    """No walk and its blocks refer to one another, which would keep a chunk in memory until the
    garbage collector comes round."""
    story, params, values = told(kind, gaps=gaps)
    gc.disable()
    try:
        for use in (story.log_prob, story.infer, story.e_step, story.impute):
            rows = Rows(np.nan_to_num(values), ~np.isnan(values) if gaps else None)
            held = weakref.ref(rows.values)
            use(params, rows)
            del rows
            assert held() is None, use
    finally:
        gc.enable()


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_blocks_longer_than_buffers_make_room(share: float) -> None:
    """Any number of rows can be loaded, of thousands of patterns, and in any order."""
    n, k = 5000, 2
    columns = [Column(f"x{j}") for j in range(9)]
    columns.insert(3, Column("c", "categorical", ("u", "v", "w")))
    schema = Schema((*columns, Column("y"), Column("z")))
    story = mixture(schema, k, covariance="full", blocks=[Block(("y", "z"), "full")])
    rng = np.random.default_rng(7)
    params = oracles.random_params(story, rng, apart=1.0)
    values = oracles.with_gaps(story.draw(params, n, rng).values, share, rng)
    rows = Rows.of(values)
    story = story.anchored(rows)
    resp = rng.dirichlet(np.ones(k), n)
    expected = story.e_step(params, rows, resp).family
    walk = story.family.prepare(params.family, np.log(params.weights)).walk(rows)
    order = rng.permutation(n)
    assert n > walk.size
    walk.load(order)
    joint = oracles.log_joint(story, params, values[order[:50]])
    np.testing.assert_allclose(walk.score()[:, :50].T, joint, rtol=1e-10)
    walk.gather(np.ascontiguousarray(resp[order].T))
    assert oracles.distance(walk.close(), expected) < 1e-11


@pytest.mark.parametrize("prior", ["weak", None])
@pytest.mark.parametrize("gaps", [False, True])
def test_independent_blocks_are_independent_columns(prior: str | None, gaps: bool) -> None:
    """Blocks of independent columns are one family of independent columns, cut up."""
    rng = np.random.default_rng(1)
    schema = Schema(tuple(c for c in WIDE.columns if c.kind != "real" or c.name == "a"))
    whole = mixture(schema, 2, prior=prior)
    cut = mixture(
        schema,
        2,
        prior=prior,
        blocks=[Block(("w", "a"), "independent"), Block(("n",), "independent")],
    )
    assert [part.columns for part in cut.family.parts] == [(0, 3), (1, 4), (2,)]
    values = whole.draw(oracles.random_params(whole, rng), 400, rng).values
    if gaps:
        values = oracles.with_gaps(values, 0.3, rng)
    rows = Rows.of(values, rng.uniform(0, 2, len(values)))
    resp = rng.dirichlet(np.ones(2), len(values))
    found = []
    for story in (whole, cut):
        story = story.anchored(rows)
        params = story.m_step(story.e_step(story.vague(), rows, resp), story.vague())
        trace = []
        for _ in range(10):
            sums = story.e_step(params, rows)
            trace.append(sums.objective + story.log_prior(params))
            params = story.m_step(sums, params)
        found.append((trace, story.log_prob(params, rows), story.infer(params, rows)))
    np.testing.assert_allclose(found[1][0], found[0][0], rtol=1e-12)
    np.testing.assert_allclose(found[1][1], found[0][1], rtol=1e-10)
    np.testing.assert_allclose(
        found[1][2].responsibilities, found[0][2].responsibilities, atol=1e-9
    )


@pytest.mark.parametrize("kind", KINDS)
class TestLaws:
    def test_stored(self, kind: str) -> None:
        for gaps in (False, True):
            laws.stored_and_read(*told(kind, 70, gaps))

    @pytest.mark.parametrize("gaps", [False, True])
    def test_loads_what_blocks_hold(self, kind: str, gaps: bool) -> None:
        laws.loads_what_blocks_hold(*told(kind, 200, gaps))

    def test_never_falls(self, kind: str) -> None:
        story, params, values = told(kind, 120)
        laws.never_falls(story, params, values, WEIGHTS, steps=12)
        laws.never_falls(*told(kind, 120, prior=None), steps=5)

    def test_conditions_and_marginals(self, kind: str) -> None:
        story, params, values = told(kind, 10, gaps=False)
        laws.marginal_is_what_gaps_leave(story, params, values)
        if kind == "bag":
            # Part of a bag says something of its total, which is given beside it.
            return
        for names in (["a"], ["c", "e"], ["a", "b", "n"], ["b", "n", "e", "f", "w", "c", "m"]):
            laws.factorises(story, params, values[:4], names)


def test_a_condition_is_the_conditional_mixture() -> None:
    """Weights are `p(k | given)`; a block of which a column is given is its own conditional."""
    story, params, values = told("two", gaps=False)
    x = values[3]
    conditional, theta = story.condition(params, {"a": x[0], "c": "y", "f": x[6]})
    assert conditional.schema.names == ("b", "n", "e", "w", "m")
    told_x = np.where(np.isin(np.arange(8), [0, 1, 6]), x, np.nan)
    told_x[1] = 1.0
    joint = [np.log(params.weights[k]) + by_hand(story, params, k, told_x) for k in range(3)]
    np.testing.assert_allclose(theta.weights, special.softmax(joint), rtol=1e-10)
    family: Any = params.family
    for k in range(3):
        s, m = family.block0.covariance[k], family.block0.mean[k]
        mean = m[1] + s[1, 0] / s[0, 0] * (x[0] - m[0])
        found: Any = theta.family
        np.testing.assert_allclose(found.block0.mean[k, 0], mean)
        np.testing.assert_allclose(
            found.block0.covariance[k, 0, 0], s[1, 1] - s[1, 0] ** 2 / s[0, 0]
        )
    # A block that is given altogether goes; one that is left alone is its family itself.
    alone, _ = story.condition(params, dict.fromkeys(("c", "n", "e", "w", "f", "m", "a"), 0.0))
    assert isinstance(alone.family, Gaussian)
    assert alone.family.n_features == 1
    part, kept = story.marginal(params, ["c", "w"])
    assert isinstance(part.family, IndependentColumns)
    assert oracles.distance(kept.family, replace(family.block1, rate=np.zeros((3, 0)))) == 0


def test_gaps_are_filled_from_all_blocks() -> None:
    """What one block says of the component moves what another one's gaps are filled with."""
    story, params, values = told("two", gaps=False)
    family: Any = params.family
    for missing in ([0], [2, 6], [0, 2], [3, 4, 6], list(range(8))):
        x = values[7].copy()
        x[missing] = np.nan
        joint = [np.log(params.weights[k]) + by_hand(story, params, k, x) for k in range(3)]
        resp = special.softmax(joint)
        means = np.full(8, np.nan)
        means[[3, 7]] = resp @ family.block1.rate
        for columns, block, tied in (([0, 2], family.block0, 0), ([4, 6], family.block2, 1)):
            each = []
            for k in range(3):
                s, m = (block.covariance if tied else block.covariance[k]), block.mean[k]
                o = ~np.isnan(x[columns])
                filled = np.where(o, x[columns], m)
                if o.any() and not o.all():
                    gain = s[np.ix_(~o, o)] @ np.linalg.inv(s[np.ix_(o, o)])
                    filled[~o] = m[~o] + gain @ (x[columns][o] - m[o])
                each.append(filled)
            means[columns] = resp @ np.array(each)
        laws.fills_with_what_it_would_draw(story, params, x, means, draws=2000)


@pytest.mark.parametrize("names", [("mean",), ("block0.mean", "rate"), ("block2.covariance",)])
def test_frozen_parameters_stay(names: tuple[str, ...]) -> None:
    story, params, values = told("two", 120)
    story = replace(story, frozen=frozenset(names))
    found: Any = laws.never_falls(story, params, values, steps=6).family
    before: Any = params.family
    for i in range(3):
        one, two = getattr(found, f"block{i}"), getattr(before, f"block{i}")
        for leaf, _, value in two.leaves():
            kept = leaf in names or f"block{i}.{leaf}" in names
            if value.size:
                assert (getattr(one, leaf) == value).all() == kept, (i, leaf)


def test_a_frozen_name_that_no_part_knows_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no parameter 'block7\.mean'"):
        wide("two", frozen=("block7.mean",))


@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_statistics_add_over_any_chunking(data: st.DataObject) -> None:
    story, params, values = STUDENT_ROWS
    cuts = data.draw(st.lists(st.integers(0, len(values)), max_size=6))
    edges = [0, *sorted(cuts), len(values)]
    rows = Rows.of(values, np.linspace(0, 2, len(values)))
    whole = story.e_step(params, rows)
    parts = [story.e_step(params, rows[a:b]) for a, b in itertools.pairwise(edges)]
    total = parts[0]
    for part in parts[1:]:
        total = total.merge(part)
    assert total.n_rows == whole.n_rows
    assert oracles.distance(total, whole) < 1e-10


STUDENT_ROWS = told("student", 200)


def test_what_is_drawn_is_found_again() -> None:
    truth_story, truth, _ = told("all", gaps=False)
    rng = np.random.default_rng(8)
    draw = truth_story.draw(truth, 6000, rng)
    values = oracles.with_gaps(draw.values, 0.1, rng)
    rows = Rows.of(values).check(WIDE)
    story = truth_story.anchored(rows)
    state = fit(story, BatchEM(100, 1e-6, accelerate=True), Resident(rows), FitState(truth))
    found: Any = state.params.family
    mean = story.log_prob(state.params, rows).mean()
    assert mean >= story.log_prob(truth, rows).mean()
    true: Any = truth.family
    np.testing.assert_allclose(state.params.weights, truth.weights, atol=0.04)
    sd = np.sqrt(np.diagonal(true.block0.covariance, axis1=1, axis2=2))
    assert (np.abs(found.block0.mean - true.block0.mean) < 0.15 * sd).all()
    np.testing.assert_allclose(found.block0.covariance, true.block0.covariance, atol=0.25)
    np.testing.assert_allclose(
        found.block1.level_probability, true.block1.level_probability, atol=0.06
    )
    np.testing.assert_allclose(found.block2.rate, true.block2.rate, rtol=0.1)


@pytest.mark.parametrize(("kind", "n_rows", "steps"), [("two", 240, 40), ("all", 90, 8)])
def test_every_learner_climbs(kind: str, n_rows: int, steps: int) -> None:
    story, params, values = told(kind, n_rows)
    passes = Passes(NumpySource(values, WIDE, chunk_rows=60), workers=1)
    start = FitState(params, sample=Rows.of(values[:60]))
    ended = {}
    for name, learner in {
        "batch": BatchEM(steps, 1e-6),
        "accelerated": BatchEM(steps, 1e-6, accelerate=True),
        "incremental": IncrementalEM(steps // 2, 1e-6),
        "online": OnlineEM(batch_rows=60),
    }.items():
        state = fit(story, learner, passes, start)
        log_prob = story.log_prob(state.params, Rows.of(values)).sum()
        ended[name] = log_prob + story.log_prior(state.params)
        again = FitState.from_dataset(state.to_dataset(story))
        assert again.params.digest() == state.params.digest()
        assert again.stats is not None
        assert state.stats is not None
        assert again.stats.digest() == state.stats.digest()
        if name != "online":
            trace = np.array([info.mean_objective for info in state.trace])
            assert np.diff(trace).min() > -1e-9
    before = story.log_prob(params, Rows.of(values)).sum() + story.log_prior(params)
    assert min(ended["batch"], ended["accelerated"], ended["incremental"]) > before
    if steps >= 40:
        assert ended["accelerated"] == pytest.approx(ended["batch"], abs=0.3)


def test_a_state_is_stored_and_told_apart() -> None:
    """Axes of blocks have names of their own, and labels; records survive pickling and copying."""
    story, params, values = told("all")
    state = FitState(params, stats=story.e_step(params, Rows.of(values)), sample=Rows.of(values))
    dataset = state.to_dataset(story)
    labels = json.loads(dataset.attrs["labels"])
    assert labels["block0.feature"] == ["a", "b"]
    assert labels["block1.level"] == ["c=x", "c=y", "c=z"]
    assert labels["block4.count"] == ["m"]
    assert dataset["params.family.block3.scale"].dims == (
        "component",
        "block3.feature",
        "block3.feature_other",
    )
    again = story_of(dataset)
    assert again.to_json() == story.to_json()
    told_rows = Rows.of(values)
    one, two = story.e_step(params, told_rows), again.e_step(params, told_rows)
    assert one.digest() == two.digest()
    for twin in (pickle.loads(pickle.dumps(params)), copy.deepcopy(params)):
        assert twin.digest() == params.digest()
        assert type(twin.family) is type(params.family)
    assert pickle.loads(pickle.dumps(story)).to_json() == story.to_json()


def test_a_product_is_judged_like_any_family() -> None:
    story, params, values = told("all", gaps=False)
    per_component = (2 + 3) + (2 + 1) + 2 + (2 + 3 + 1) + 2
    assert story.n_parameters == 2 + 3 * per_component
    portrait: Any = story.family.describe(params.family)
    family: Any = params.family
    np.testing.assert_array_equal(portrait.mean[:, [0, 2]], family.block0.mean)
    assert np.isnan(portrait.mean[:, [1, 5]]).all()
    np.testing.assert_array_equal(portrait.levels[1], family.block1.level_probability)
    covariance = portrait.covariance(1)
    np.testing.assert_array_equal(covariance[np.ix_([0, 2], [0, 2])], family.block0.covariance[1])
    assert covariance[0, 4] == 0
    rounding = sum(
        alone.family.rounding(theta.family) for _, alone, theta in oracles.blocks_of(story, params)
    )
    np.testing.assert_allclose(story.family.rounding(params.family), rounding)
    x, mask = story.family.embed(Rows.of(values))
    assert x.shape == mask.shape
    thin = replace(family.block0, covariance=family.block0.covariance * 0 + 1e-14 * np.eye(2))
    floored = story.family.floored(replace(family, block0=thin))
    assert {(0, 0), (2, 2)} <= set(floored)


GROWN = Schema(
    tuple(
        replace(c, levels=(*c.levels, "new", "newer")) if c.name == "c" else c for c in WIDE.columns
    )
)


@pytest.mark.parametrize("prior", ["weak", None])
def test_levels_are_added_to_the_block_that_has_them(prior: str | None) -> None:
    story, params, values = told("two", prior=prior)
    rows = Rows.of(values)
    state = FitState(params, stats=story.e_step(params, rows), sample=rows)
    grown, after = with_levels(story, state, GROWN)
    assert grown.schema == GROWN
    family: Any = after.params.family
    before: Any = params.family
    n = (~np.isnan(values[:, 1])).sum()
    fresh = 0.5 / (n + 2.5)
    np.testing.assert_allclose(family.block1.level_probability[:, 3:], fresh)
    np.testing.assert_allclose(
        family.block1.level_probability[:, :3],
        before.block1.level_probability * (1 - 2 * fresh),
    )
    assert family.block0.digest() == before.block0.digest()
    np.testing.assert_allclose(
        grown.infer(after.params, rows).responsibilities,
        story.infer(params, rows).responsibilities,
        atol=1e-12,
    )
    assert after.stats is not None
    sums: Any = after.stats.family
    assert (sums.block1.sum_level[:, 3:] == 0).all()
    # Learning goes on, and the new level is learned.
    values = values.copy()
    values[100:120, 1] = 3.0
    resumed = fit(grown, BatchEM(5), Resident(Rows.of(values).check(GROWN)), after)
    learned: Any = resumed.params.family
    assert resumed.params.weights @ learned.block1.level_probability[:, 3] > 2 * fresh
    stored = FitState.from_dataset(resumed.to_dataset(grown))
    assert stored.params.digest() == resumed.params.digest()


@pytest.mark.parametrize("kind", ["two", "all"])
def test_a_component_is_retired_from_all_blocks(kind: str) -> None:
    story, params, values = told(kind)
    params = replace(params, weights=np.array([0.6, 0.397, 0.003]))
    rows = Rows.of(values)
    state = FitState(params, stats=story.e_step(params, rows), sample=rows)
    fewer, after, events = retire(story, state, 0.01)
    assert len(events) == 1
    assert fewer.n_components == 2
    for (_, _, one), (_, _, two) in zip(
        oracles.blocks_of(story, params), oracles.blocks_of(fewer, after.params), strict=True
    ):
        assert two.family.digest() == one.family.take([0, 1]).digest()
    again = fewer.m_step(after.stats, after.params)
    assert oracles.finite(again)
    values_now = fewer.log_prob(after.params, rows)
    assert np.isfinite(values_now).all()


def test_a_component_is_born_in_all_blocks() -> None:
    """A cluster apart in a Gaussian block, in a level and in a count is found from its rows."""
    rng = np.random.default_rng(4)
    schema = WIDE.select(["a", "c", "b", "n"])

    def cluster(n: int, at: float, level: int, rate: float) -> Array:
        x = rng.standard_normal(n)
        return np.column_stack(
            [
                at + x,
                np.where(rng.random(n) < 0.9, level, rng.integers(0, 3, n)),
                at + 0.9 * x + 0.4 * rng.standard_normal(n),
                rng.poisson(rate, n),
            ]
        )

    values = np.concatenate([cluster(1500, 0.0, 0, 2.0), cluster(1500, 6.0, 1, 8.0)])
    passes = Passes(NumpySource(values, schema, chunk_rows=1000), workers=1)
    story, state = warm_start(
        mixture(schema, 2, covariance="full"), passes, n_init=2, sample_rows=2000
    )
    newcomers = cluster(300, 20.0, 2, 30.0)
    newcomers[rng.random(newcomers.shape) < 0.1] = np.nan
    grown, after, events = birth(story, state, Rows.of(newcomers), seed=1)
    assert len(events) == 1
    assert grown.n_components == 3
    family: Any = after.params.family
    np.testing.assert_allclose(family.block0.mean[2], 20.0, atol=0.5)
    assert family.block1.level_probability[2, 2] > 0.8
    assert family.block1.rate[2, 0] == pytest.approx(30.0, rel=0.05)
    # Rows of its own tail are no reason for another one.
    assert not birth(story, state, Rows.of(values[:200]), seed=1)[2]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"covariance": "round"}, "covariance 'round' is not one of full"),
        ({"tails": "thick"}, "tails 'thick' is not one of gaussian, student"),
        ({"blocks": [Block(("a", "z"))]}, "no column 'z'; the columns are a, c"),
        ({"blocks": [Block(("a", "b")), Block(("b", "e"))]}, "column 'b' is named twice"),
        ({"blocks": [Block(("a", "n"))]}, "full takes real columns, and 'n' is count"),
        ({"blocks": [Block(())]}, "full block names no columns"),
        ({"blocks": [Block(("a",), "cubic")]}, "family 'cubic' is not one of full, tied"),
        ({"counts": {"n": "geometric"}}, "'geometric' is not one of poisson"),
        ({"counts": {"a": "negative_binomial"}}, "'a' is a real column: make its kind count"),
        (
            {"counts": {"n": "negative_binomial"}, "blocks": [Block(("n",), "independent")]},
            "'n' is named twice",
        ),
    ],
)
def test_what_does_not_fit_the_columns_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        mixture(WIDE, 2, **options)


def test_what_needs_real_columns_is_told_so() -> None:
    counts = WIDE.select(["n", "m"])
    for options in ({"covariance": "full"}, {"tails": "student"}):
        with pytest.raises(ConfigError, match="needs real columns"):
            mixture(counts, 2, **options)


def test_builders_choose_the_parts() -> None:
    def parts(**options: Any) -> list[tuple[str, tuple[int, ...]]]:
        family: Any = mixture(WIDE, 2, **options).family
        if not isinstance(family, Product):
            return [(family.name, tuple(range(8)))]
        return [(part.family.name, part.columns) for part in family.parts]

    assert parts() == [("columns", tuple(range(8)))]
    assert parts(counts={"n": "poisson"}) == parts()
    assert parts(covariance="tied") == [("gaussian", (0, 2, 4, 6)), ("columns", (1, 3, 5, 7))]
    assert parts(covariance="spherical") == [("columns", (0, 2, 4, 6)), ("columns", (1, 3, 5, 7))]
    assert parts(tails="student") == [("student", (0, 2, 4, 6)), ("columns", (1, 3, 5, 7))]
    assert parts(counts={"m": "negative_binomial"}) == [
        ("columns", (0, 1, 2, 3, 4, 5, 6)),
        ("negative_binomial", (7,)),
    ]
    assert mixture(WIDE, 2, tails="student").family.parts[0].family.covariance == "diag"
    assert mixture(Schema.real(3), 2, tails="student").family.covariance == "full"


def test_a_product_shares_out_its_columns() -> None:
    schema = Schema.real(3)
    one, two = Part((0, 1), Gaussian(2)), Part((2,), Gaussian(1))
    assert Product(schema, (one, two)).n_parameters(2) == 2 * (5 + 2)
    with pytest.raises(ConfigError, match=r"hold columns \[0, 1\], but must hold each of the 3"):
        Product(schema, (one,))
    with pytest.raises(ConfigError, match="not in order"):
        Product(schema, (Part((1, 0), Gaussian(2)), two))
    with pytest.raises(ConfigError, match="cannot be 'factors'"):
        Product(
            Schema.real(4), (Part((0, 1, 2), factors(schema, 1).family), Part((3,), Gaussian(1)))
        )


def test_delays_depend_on_one_another(example_data: Callable[[str], Path]) -> None:
    """Departure and arrival delay, air time and distance are correlated within any group of
    flights: their covariance is worth more than a nat a flight on days held out.
    """
    import pandas as pd

    table = pd.read_csv(example_data("flights.csv.zip")).iloc[::28]
    real = ["dep_delay", "arr_delay", "air_time", "distance"]
    columns = [Column(name) for name in real] + [Column("hour", "count")]
    values = [table[name].to_numpy(dtype=float) for name in (*real, "hour")]
    for name in ("carrier", "origin"):
        codes, levels = pd.factorize(table[name].astype(str))
        columns.append(Column(name, "categorical", tuple(levels)))
        values.append(codes.astype(float))
    schema = Schema(tuple(columns))
    data = np.column_stack(values)
    held_out = np.arange(len(data)) % 5 == 0
    found = {}
    for covariance in ("diag", "full"):
        passes = Passes(NumpySource(data[~held_out], schema, chunk_rows=4096), workers=1)
        story, state = warm_start(
            mixture(schema, 6, covariance=covariance),
            passes,
            n_init=2,
            long_steps=10,
        )
        state = fit(story, BatchEM(12, 1e-4, accelerate=True), passes, state)
        found[covariance] = story.log_prob(state.params, Rows.of(data[held_out])).mean()
    assert found["full"] > found["diag"] + 1.0


def test_a_product_lives_on_in_a_store(tmp_path: Path) -> None:
    """A published product learns a batch that brings a new level, and keeps its blocks."""
    schema = WIDE.select(["a", "c", "b", "n"])
    rng = np.random.default_rng(2)

    def arrays(n: int) -> dict[str, Any]:
        z = rng.integers(0, 2, n)
        x = rng.standard_normal(n)
        return {
            "a": 5.0 * z + x,
            "c": np.array(["x", "y", "z"])[(z + (rng.random(n) < 0.2)) % 3],
            "b": -4.0 * z + 0.8 * x + 0.5 * rng.standard_normal(n),
            "n": rng.poisson(2 + 6 * z),
        }

    first = arrays(800)
    codes = np.searchsorted(["x", "y", "z"], first["c"])
    values = np.column_stack([first["a"], codes, first["b"], first["n"]]).astype(float)
    passes = Passes(NumpySource(values, schema, chunk_rows=200), workers=1)
    story, state = warm_start(
        mixture(schema, 2, covariance="full"), passes, n_init=1, sample_rows=800
    )
    store = ModelStore(tmp_path)
    store.publish(story, state, {"run": "first"})
    data = arrays(400)
    data["c"][:40] = "w"
    table = pa.table(data)
    options = Options(
        learner=OnlineEM(batch_rows=64, t0=8), max_drop=None, new_levels="add", birth=True
    )
    delivery = TableDelivery(table, caller_id("one"), "one", columns=tuple(table.column_names))
    done = learn_batch(store, delivery, options)
    assert done.event.status == "learned"
    grown, after = store.load(done.event.version)
    assert grown.schema["c"].levels == ("x", "y", "z", "w")
    assert [part.family.name for part in grown.family.parts] == ["gaussian", "columns"]
    family: Any = after.params.family
    learned = after.params.weights @ family.block1.level_probability
    assert 0.01 < learned[3] < 0.2
    assert oracles.is_possible(grown, after.params)
