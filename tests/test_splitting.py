"""Components split in two: what both halves keep together, and fits grown from few to many."""

from __future__ import annotations

import numpy as np
import pytest

from flows.config import load
from flows.stages import begin_fit
from genstream import splitting
from genstream.errors import ConfigError
from genstream.learn import BatchEM, FitState, Resident, fit
from genstream.passes import Passes
from genstream.priors import Prior
from genstream.responsibility import hard
from genstream.rows import Rows
from genstream.schema import Column, Schema
from genstream.sources import NumpySource
from genstream.start import seed_params
from genstream.stories import factors, kmeans, mixture

MIXED = Schema(
    (
        Column("late", "binary"),
        Column("a"),
        Column("carrier", "categorical", ("AA", "B6", "UA")),
        Column("b"),
        Column("bags", "count"),
    )
)
PLAIN = Schema((MIXED["late"], MIXED["carrier"], MIXED["bags"]))


def mixed_values(n: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    group = rng.integers(0, 3, n)
    return np.column_stack(
        [
            rng.random(n) < 0.2 + 0.3 * group,
            rng.normal(3 * group, 1.0),
            (group + (rng.random(n) < 0.2)) % 3,
            rng.normal(-group, 0.5),
            rng.poisson(1 + 3 * group),
        ]
    ).astype(float)


def clover(n: int, leaves: int, seed: int = 0) -> np.ndarray:
    """Rows of many narrow Gaussians on a circle."""
    rng = np.random.default_rng(seed)
    angle = 2 * np.pi * rng.integers(0, leaves, n) / leaves
    centre = np.column_stack([np.cos(angle), np.sin(angle)])
    return centre + 0.02 * rng.normal(size=(n, 2))


def begun(schema, values, k=3, **options):
    story = mixture(schema, k, **options).anchored(Rows.of(values))
    return story, seed_params(story, Rows.of(values), np.random.default_rng(0))


def moments(story, params, components, weights):
    """Mean and covariance of the even mixture of some components, from what they say of columns."""
    told = story.family.describe(params.family)
    share = weights / weights.sum()
    mean = share @ told.mean[components]
    covariance = np.zeros((len(mean), len(mean)))
    for k, w in zip(components, share, strict=True):
        own = np.diag(told.sd[k] ** 2) if told.covariance is None else told.covariance(k)
        covariance += w * (own + np.outer(told.mean[k] - mean, told.mean[k] - mean))
    return mean, covariance


class TestSplit:
    @pytest.mark.parametrize("covariance", ["full", "diag"])
    @pytest.mark.parametrize("apart", [0.3, 0.9])
    def test_halves_keep_the_moments(self, covariance, apart):
        rng = np.random.default_rng(0)
        values = rng.normal(size=(200, 3)) @ rng.normal(size=(3, 3)) * [1, 10, 0.1] + [0, 50, 7]
        story, params = begun(Schema.real(3), values, covariance=covariance)
        more, split = splitting.split(story, params, [2, 0], rng, apart)
        assert more.n_components == 5
        for whole, other in ((2, 3), (0, 4)):
            assert split.weights[whole] == split.weights[other] == params.weights[whole] / 2
            mean, wide = moments(more, split, [whole, other], split.weights[[whole, other]])
            first, second = moments(story, params, [whole], np.ones(1))
            np.testing.assert_allclose(mean, first, rtol=1e-10)
            np.testing.assert_allclose(wide, second, rtol=1e-9, atol=1e-9 * np.abs(second).max())
        np.testing.assert_array_equal(split.family.mean[1], params.family.mean[1])
        assert split.weights.sum() == pytest.approx(1.0)

    def test_goes_along_the_main_axis(self):
        rng = np.random.default_rng(0)
        axis = np.array([0.6, 0.8])
        values = rng.normal(size=(500, 1)) * axis * 5 + rng.normal(size=(500, 2)) * 0.1
        story, params = begun(Schema.real(2), values, k=1)
        _, two = splitting.split(story, params, [0], rng)
        gap = two.family.mean[1] - two.family.mean[0]
        assert abs(gap @ axis) / np.linalg.norm(gap) == pytest.approx(1.0, abs=1e-3)
        assert np.linalg.norm(gap) == pytest.approx(2 * splitting.APART * 5, rel=0.1)

    @pytest.mark.parametrize("covariance", ["tied", "spherical"])
    def test_what_components_share_stays(self, covariance):
        story, params = begun(Schema.real(2), clover(200, 3), covariance=covariance)
        more, two = splitting.split(story, params, [1], np.random.default_rng(0))
        found = more.e_step(two, Rows.of(clover(50, 3)))
        assert np.isfinite(found.objective)
        if covariance == "tied":
            np.testing.assert_array_equal(two.family.covariance, params.family.covariance)

    def test_of_mixed_columns_moves_the_real_ones(self):
        story, params = begun(MIXED, mixed_values(300), covariance="full")
        more, two = splitting.split(story, params, [0, 1, 2], np.random.default_rng(0))
        theta, old = two.family.block0, params.family.block0
        for name in ("probability", "rate", "level_probability"):
            np.testing.assert_array_equal(getattr(theta, name)[3:], getattr(old, name))
        gap = two.family.block1.mean[3:] - two.family.block1.mean[:3]
        assert (np.abs(gap).max(axis=1) > 0.1).all()
        assert more.family.schema == MIXED

    def test_without_real_columns_levels_and_rates_part(self):
        values = mixed_values(300)[:, [0, 2, 4]]
        story, params = begun(PLAIN, values)
        _, two = splitting.split(story, params, [0, 1, 2], np.random.default_rng(0), 0.5)
        one, other, old = two.family.take([0, 1, 2]), two.family.take([3, 4, 5]), params.family
        for name in ("probability", "rate", "level_probability"):
            low, high, middle = (getattr(each, name) for each in (one, other, old))
            np.testing.assert_allclose((low + high) / 2, middle, rtol=1e-12)
            assert (np.abs(low - high) > 0).any()
            assert (low >= 0).all()
            assert (high >= 0).all()
        assert (other.probability <= 1).all()
        np.testing.assert_allclose(one.level_probability.sum(axis=1), 1.0)

    def test_no_covariance_falls_below_its_floor(self):
        rng = np.random.default_rng(0)
        schema = Schema((Column("x", resolution=1.0), Column("y", resolution=0.5)))
        values = np.round(rng.normal(size=(200, 2)))
        story, params = begun(schema, values)
        _, two = splitting.split(story, params, [0, 1, 2], rng, 0.95)
        least = np.diag([c.least_variance for c in schema.columns])
        for covariance in two.family.covariance:
            assert np.linalg.eigvalsh(covariance - least)[0] > -1e-12

    def test_halves_part_under_em(self):
        values = clover(600, 2)
        # As wide one way as the other, so that the pivot leaves the axis alone.
        values[:, 1] = values[:, 0] + 0.02 * np.random.default_rng(1).normal(size=600)
        story, params = begun(Schema.real(2), values, k=1)
        more, two = splitting.split(story, params, [0], np.random.default_rng(0))
        more = more.anchored(Rows.of(values))
        state = fit(more, BatchEM(50), Resident(Rows.of(values)), FitState(two))
        np.testing.assert_allclose(np.sort(state.params.family.mean[:, 0]), [-1, 1], atol=0.02)

    def test_says_what_cannot_be_split(self):
        rows = Rows.of(np.random.default_rng(0).normal(size=(50, 3)))
        story = factors(Schema.real(3), 1, 2).anchored(rows)
        params = seed_params(story, rows, np.random.default_rng(0))
        with pytest.raises(ConfigError, match="a component of a factors story cannot be split"):
            splitting.split(story, params, [0], np.random.default_rng(0))


class TestDoubled:
    def test_splits_the_heaviest_first(self):
        story, params = begun(Schema.real(2), clover(300, 3))
        params = type(params)(np.array([0.2, 0.5, 0.3]), params.family)
        more, two = splitting.doubled(story, params, 5, np.random.default_rng(0))
        assert more.n_components == 5
        np.testing.assert_allclose(two.weights, [0.2, 0.25, 0.15, 0.25, 0.15])
        most, _ = splitting.doubled(story, params, 50, np.random.default_rng(0))
        assert most.n_components == 6

    def test_frozen_weights_stay_equal_or_are_halved(self):
        rng = np.random.default_rng(0)
        story, params = begun(Schema.real(2), clover(300, 3), frozen={"weights"})
        np.testing.assert_array_equal(params.weights, np.full(3, 1 / 3))
        _, two = splitting.doubled(story, params, 5, rng)
        np.testing.assert_array_equal(two.weights, np.full(5, 1 / 5))
        params = type(params)(np.array([0.2, 0.5, 0.3]), params.family)
        _, two = splitting.doubled(story, params, 5, rng)
        np.testing.assert_allclose(two.weights, [0.2, 0.25, 0.15, 0.25, 0.15])


class TestGrow:
    def test_finds_what_starts_miss(self):
        values = clover(6000, 24)
        passes = Passes(NumpySource(values, chunk_rows=1000), workers=2)
        seen = []
        story, state = splitting.grow(
            mixture(Schema.real(2), 48),
            passes,
            first=6,
            rows_each=100,
            on_stage=lambda s, t: seen.append((s.n_components, t.trace[-1].mean_loglik)),
        )
        assert [k for k, _ in seen] == [6, 12, 24, 48]
        assert (np.diff([value for _, value in seen]) > 0).all()
        assert story.n_components == 48
        assert len(state.params.weights) == 48
        # log p of one of 24 equal Gaussians of deviation 0.02.
        best = np.log(1 / (24 * 2 * np.pi * 0.02**2)) - 1
        own = story.log_prob(state.params, Rows.of(clover(2000, 24, seed=1))).mean()
        assert own > best - 0.25

    def test_has_prior_and_pivot_of_its_components(self):
        values = clover(2000, 8)
        passes = Passes(NumpySource(values, chunk_rows=500), workers=1)
        story, state = splitting.grow(
            mixture(Schema.real(2), 12, prior=Prior(2.0, weights=1.0)), passes, first=5, n_passes=2
        )
        again = mixture(Schema.real(2), 12, prior=Prior(2.0, weights=1.0)).anchored(Rows.of(values))
        np.testing.assert_allclose(story.family.prior.scatter, again.family.prior.scatter, rtol=0.1)
        assert story.weight_prior == 1.0
        assert state.stats is not None
        assert state.sample is not None
        learned = fit(story, BatchEM(2), passes, state)
        assert len(learned.trace) == 2

    def test_follows_from_the_seed_whatever_the_workers(self):
        values = clover(1500, 8)
        ends = []
        for workers, seed in ((1, 3), (2, 3), (1, 4)):
            passes = Passes(NumpySource(values, chunk_rows=400), workers=workers)
            _, state = splitting.grow(
                mixture(Schema.real(2), 8), passes, first=4, n_passes=2, seed=seed
            )
            ends.append(state.params.digest())
        assert ends[0] == ends[1]
        assert ends[0] != ends[2]

    def test_takes_gaps_weights_and_mixed_columns(self):
        rng = np.random.default_rng(0)
        values = mixed_values(1500)
        values[rng.random(values.shape) < 0.1] = np.nan
        source = NumpySource(values, MIXED, rng.uniform(0.5, 2, 1500), chunk_rows=500)
        story, state = splitting.grow(mixture(MIXED, 6), Passes(source), first=3, n_passes=3)
        assert story.n_components == 6
        held_out = story.log_prob(state.params, Rows.of(mixed_values(500, 1)))
        one = mixture(MIXED, 1).anchored(Rows.of(mixed_values(1500)))
        plain = fit(one, BatchEM(5), Resident(Rows.of(mixed_values(1500))), FitState(one.vague()))
        assert (
            held_out.mean() > one.log_prob(plain.params, Rows.of(mixed_values(500, 1))).mean() + 0.5
        )

    def test_means_grow_as_k_means(self):
        passes = Passes(NumpySource(clover(600, 5)), workers=1)
        story, state = splitting.grow(
            kmeans(Schema.real(2), 5), passes, first=2, n_passes=2, responsibility=hard
        )
        np.testing.assert_array_equal(state.params.weights, np.full(5, 1 / 5))
        assert story.n_components == 5

    def test_numbers_are_checked(self):
        passes = Passes(NumpySource(clover(100, 2)))
        with pytest.raises(ConfigError, match="rows_each is 0: it must be at least 1"):
            splitting.grow(mixture(Schema.real(2), 4), passes, rows_each=0)


class TestConfigured:
    TEXT = (
        "version: 1\n"
        "data: {source: x.parquet, columns: {x: real, y: real}}\n"
        "model: {kind: mixture, n_components: 8}\n"
        "fit: {grow: 2, seed: 3}\n"
    )

    def test_a_fit_grows(self, tmp_path):
        path = tmp_path / "c.yaml"
        path.write_text(self.TEXT)
        config = load(path)
        schema = Schema.real(["x", "y"])
        passes = Passes(NumpySource(clover(1500, 8), schema, chunk_rows=500), workers=1)
        seen = []
        story, state = begin_fit(config, schema, passes, on_start=lambda i, v: seen.append((i, v)))
        assert [i for i, _ in seen] == [0, 1, 2]
        again = splitting.grow(mixture(schema, 8), passes, first=2, seed=3)[1]
        assert story.n_components == 8
        assert state.params.digest() == again.params.digest()

    def test_only_mixtures_without_a_start_do(self, tmp_path):
        path = tmp_path / "c.yaml"
        path.write_text(self.TEXT.replace("n_components: 8", "n_components: 8, start: models/m"))
        with pytest.raises(ConfigError, match=r"fit\.grow: model\.start says"):
            load(path)
        path.write_text(self.TEXT.replace("kind: mixture", "kind: kmeans"))
        with pytest.raises(ConfigError, match=r"fit\.grow: only mixtures grow"):
            load(path)
