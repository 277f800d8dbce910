"""Independent columns of every kind: densities, gaps, and parameters at the edge of what they may
be.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import laws
import numpy as np
import oracles
import pytest
from scipy import special, stats

from genstream.families.columns import IndependentColumns, SphericalParams
from genstream.responsibility import hard
from genstream.rows import Rows
from genstream.schema import Column, Kind, Schema
from genstream.stories import mixture
from genstream.story import Params, Story


def column(kind: Kind, n_levels: int = 4) -> Column:
    levels = tuple(f"level {i}" for i in range(n_levels)) if kind == "categorical" else ()
    return Column("x", kind, levels)


def single(kind: Kind, k: int = 1, n_levels: int = 4, **options: Any) -> Story:
    """A story of one column."""
    return mixture(Schema((column(kind, n_levels),)), k, covariance="diag", **options)


def learned(story: Story, values: Any, steps: int = 1, weights: Any = None) -> tuple[Story, Params]:
    """The story anchored on some rows, and its parameters after EM steps from a vague start."""
    rows = Rows.of(values, weights).check(story.schema)
    story = story.anchored(rows)
    params = story.vague()
    for _ in range(steps):
        params = story.m_step(story.e_step(params, rows), params)
    return story, params


class TestKinds:
    """One column, several components: every kind against scipy.stats."""

    @pytest.mark.parametrize("dtype", ["float64", "float32"])
    @pytest.mark.parametrize("kind", ["real", "binary", "count", "categorical"])
    def test_density(self, kind: Kind, dtype: str) -> None:
        rng = np.random.default_rng(1)
        story = single(kind, 3, dtype=dtype)
        params = oracles.random_params(story, rng)
        values = story.draw(params, 200, rng).values
        found = story.log_prob(params, Rows.of(values))
        tolerance = 1e-11 if dtype == "float64" else 1e-4
        expected = oracles.log_prob(story, params, values)
        np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)

    @pytest.mark.parametrize("kind", ["real", "binary", "count", "categorical"])
    def test_maximum_likelihood_is_the_plain_average(self, kind: Kind) -> None:
        rng = np.random.default_rng(2)
        story = single(kind, prior=None)
        params = oracles.random_params(story, rng)
        values = story.draw(params, 300, rng).values
        weights = rng.uniform(0, 2, 300)
        values[::7] = np.nan
        seen = ~np.isnan(values[:, 0])
        x, w = values[seen, 0], weights[seen] / weights[seen].sum()
        _, fitted = learned(story, values, weights=weights)
        family: Any = fitted.family
        if kind == "real":
            assert family.mean[0, 0] == pytest.approx(w @ x, rel=1e-12)
            assert family.variance[0, 0] == pytest.approx(w @ (x - w @ x) ** 2, rel=1e-11)
        elif kind == "binary":
            assert family.probability[0, 0] == pytest.approx(w @ x, rel=1e-12)
        elif kind == "count":
            assert family.rate[0, 0] == pytest.approx(w @ x, rel=1e-12)
        else:
            shares = [w @ (x == code) for code in range(4)]
            np.testing.assert_allclose(family.level_probability[0], shares, rtol=1e-12)

    def test_log_probabilities_of_everything_sum_to_one(self) -> None:
        schema = Schema(
            (
                Column("a", "binary"),
                Column("b", "categorical", ("x", "y", "z")),
                Column("c", "count"),
            )
        )
        story = mixture(schema, 2)
        params = oracles.random_params(story, np.random.default_rng(3))
        grid = np.stack(np.meshgrid(range(2), range(3), range(60), indexing="ij"), -1)
        log_prob = story.log_prob(params, Rows.of(grid.reshape(-1, 3).astype(float)))
        assert special.logsumexp(log_prob) == pytest.approx(0.0, abs=1e-12)
        # A marginal sums over what is not observed.
        gapped = grid.reshape(-1, 3).astype(float)
        gapped[:, 1] = np.nan
        marginal = story.log_prob(params, Rows.of(gapped)).reshape(2, 3, 60)
        summed = special.logsumexp(log_prob.reshape(2, 3, 60), axis=1)
        np.testing.assert_allclose(marginal[:, 0], summed, rtol=1e-11, atol=1e-11)


class TestGaps:
    def test_a_column_never_observed_keeps_what_it_had_or_the_prior(self) -> None:
        rng = np.random.default_rng(5)
        for prior in ("weak", None):
            story = oracles.make_story("mixed", 2, prior=prior)
            params = oracles.random_params(story, rng)
            values = story.draw(params, 100, rng).values
            for j in range(values.shape[1]):
                gapped = values.copy()
                gapped[:, j] = np.nan
                anchored = story.anchored(Rows.of(gapped))
                new = anchored.m_step(anchored.e_step(params, Rows.of(gapped)), params)
                assert oracles.is_possible(anchored, new)
                if prior is None:
                    assert _column_of(story, new, j) == pytest.approx(_column_of(story, params, j))

    def test_gaps_in_one_chunk_and_none_in_another(self) -> None:
        rng = np.random.default_rng(6)
        story = oracles.make_story("mixed", 2)
        params = oracles.random_params(story, rng)
        values = story.draw(params, 100, rng).values
        gapped = oracles.with_gaps(values, 0.3, rng)
        story = story.anchored(Rows.of(values))
        parts = [story.e_step(params, Rows.of(v)) for v in (values, gapped)]
        both = story.e_step(params, Rows.of(np.vstack([values, gapped])))
        assert oracles.distance(parts[0].merge(parts[1]), both) < 1e-12


def _column_of(story: Story, params: Params, j: int) -> list[float]:
    """The parameters of one column, component after component."""
    family: Any = params.family
    source: Any = story.family
    kind = story.schema.kinds[j]
    if kind == "categorical":
        return family.level_probability[:, source.level_column == j].ravel().tolist()
    at = story.schema.of_kind(kind).index(j)
    names = {"real": ("mean", "variance"), "binary": ("probability",), "count": ("rate",)}[kind]
    return np.ravel([getattr(family, name)[:, at] for name in names]).tolist()


class TestEdges:
    """Values that put a parameter where its logarithm ends."""

    @pytest.mark.parametrize("prior", ["weak", None])
    @pytest.mark.parametrize("dtype", ["float64", "float32"])
    @pytest.mark.parametrize(
        ("kind", "value"),
        [("binary", 1), ("binary", 0), ("count", 0), ("count", 10**7), ("categorical", 2)],
    )
    def test_a_column_of_one_value(
        self, kind: Kind, value: float, dtype: str, prior: str | None
    ) -> None:
        values = np.full((50, 1), float(value))
        story, params = learned(single(kind, 2, dtype=dtype, prior=prior), values, steps=5)
        assert oracles.is_possible(story, params)
        log_prob = story.log_prob(params, Rows.of(values))
        assert np.isfinite(log_prob).all()
        tolerance = 1e-3
        if prior is None:
            expected = stats.poisson.logpmf(value, value) if kind == "count" and value else 0.0
            np.testing.assert_allclose(log_prob, expected, atol=tolerance)

    @pytest.mark.parametrize("kind", ["binary", "count", "categorical"])
    def test_a_value_never_seen_is_very_unlikely_but_finite(self, kind: Kind) -> None:
        seen, unseen = (0.0, 3.0) if kind != "binary" else (1.0, 0.0)
        story, params = learned(single(kind, prior=None), np.full((40, 1), seen))
        log_prob = story.log_prob(params, Rows.of([[unseen], [seen]]))
        assert np.isfinite(log_prob).all()
        assert log_prob[0] < -30
        assert log_prob[1] == pytest.approx(0.0, abs=1e-12)
        _, kept = learned(single(kind), np.full((40, 1), seen))
        weak = single(kind).anchored(Rows.of(np.full((40, 1), seen)))
        assert weak.log_prob(kept, Rows.of([[unseen]]))[0] > -40

    def test_a_level_that_no_row_of_a_component_had_stays_drawable(self) -> None:
        story, params = learned(single("categorical", prior=None), np.array([[1.0], [3.0]] * 20))
        codes = story.draw(params, 500, np.random.default_rng(0)).values
        assert set(np.unique(codes)) == {1.0, 3.0}

    def test_one_level(self) -> None:
        story, params = learned(single("categorical", 3, n_levels=1), np.zeros((30, 1)), steps=3)
        np.testing.assert_array_equal(story.log_prob(params, Rows.of([[0.0]])), 0.0)
        assert (story.draw(params, 20, np.random.default_rng(0)).values == 0).all()
        assert story.n_parameters == 2

    def test_two_components_of_huge_counts_stay_apart(self) -> None:
        """Terms of the Poisson log-density reach 1e8 and cancel to a few nats."""
        rng = np.random.default_rng(7)
        rates = np.array([1e7, 1.01e7])
        z = np.arange(400) % 2
        values = rng.poisson(rates[z])[:, None].astype(float)
        for dtype in ("float64", "float32"):
            story = single("count", 2, prior=None, dtype=dtype).anchored(Rows.of(values))
            family: Any = story.vague().family
            params = Params(np.full(2, 0.5), replace(family, rate=rates[:, None]))
            found = story.log_prob(params, Rows.of(values))
            expected = oracles.log_prob(story, params, values)
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-2)
            np.testing.assert_array_equal(story.infer(params, Rows.of(values)).component, z)

    @pytest.mark.parametrize("dtype", ["float64", "float32"])
    def test_counts_of_very_different_size_do_not_overflow(self, dtype: str) -> None:
        values = np.array([[0.0], [1.0], [10.0], [1e4], [1e7], [1e12]] * 10)
        story, params = learned(single("count", 3, dtype=dtype), values, steps=4)
        assert oracles.is_possible(story, params)
        assert np.isfinite(story.log_prob(params, Rows.of(values))).all()

    def test_constant_real_columns(self) -> None:
        values = np.column_stack([np.full(60, 1 / 3), np.arange(60.0)])
        for kind in ("diag", "spherical"):
            for prior in ("weak", None):
                story = mixture(Schema.real(2), 3, covariance=kind, prior=prior)
                story, params = learned(story, values, steps=5)
                assert oracles.is_possible(story, params)
                assert np.isfinite(story.log_prob(params, Rows.of(values))).all()


class TestVariances:
    def test_spherical_shares_one_variance(self) -> None:
        rng = np.random.default_rng(8)
        values = rng.normal(size=(400, 3)) * [1.0, 2.0, 3.0]
        story = mixture(Schema.real(3), 1, covariance="spherical", prior=None)
        _, params = learned(story, values)
        family: Any = params.family
        assert family.variance.shape == (1,)
        assert family.variance[0] == pytest.approx(values.var(axis=0).mean(), rel=1e-12)

    def test_spherical_with_gaps_averages_over_what_is_seen(self) -> None:
        rng = np.random.default_rng(9)
        values = oracles.with_gaps(rng.normal(size=(400, 3)) * [1.0, 2.0, 3.0], 0.4, rng)
        story = mixture(Schema.real(3), 1, covariance="spherical", prior=None)
        _, params = learned(story, values)
        gap = values - np.nanmean(values, axis=0)
        family: Any = params.family
        assert family.variance[0] == pytest.approx(np.nanmean(gap**2), rel=1e-12)

    def test_diag_equals_full_where_there_is_one_column(self) -> None:
        rng = np.random.default_rng(10)
        values = rng.normal(size=(200, 1)) + 3 * (np.arange(200) % 2)[:, None]
        found = []
        for kind in ("full", "diag", "spherical"):
            story = mixture(Schema.real(1), 2, covariance=kind, prior=None).anchored(
                Rows.of(values)
            )
            start = story.vague()
            resp = np.eye(2)[(values[:, 0] > 1.5).astype(int)]
            params = story.m_step(story.e_step(start, Rows.of(values), resp), start)
            for _ in range(10):
                params = story.m_step(story.e_step(params, Rows.of(values)), params)
            found.append(story.log_prob(params, Rows.of(values)))
        np.testing.assert_allclose(found[1], found[0], rtol=1e-9)
        np.testing.assert_allclose(found[2], found[0], rtol=1e-9)


class TestEmbedding:
    def test_coordinates_are_finite_and_zero_where_missing(self) -> None:
        rng = np.random.default_rng(11)
        story = oracles.make_story("mixed", 3)
        params = oracles.random_params(story, rng)
        values = oracles.with_gaps(story.draw(params, 100, rng).values, 0.5, rng)
        values[:, 2] = np.nan
        story = story.anchored(Rows.of(values))
        x, observed = story.family.embed(Rows.of(values))
        assert x.shape == observed.shape
        assert np.isfinite(x).all()
        assert not x[~observed].any()


def moved(family: Any, rng: np.random.Generator, size: float) -> Any:
    """Parameters of independent columns a little elsewhere."""
    variance = family.variance * np.exp(size * rng.normal(size=family.variance.shape))
    if isinstance(family, SphericalParams) and (family.variance == family.variance[0]).all():
        variance = np.full_like(variance, variance[0])
    logit = special.logit(np.clip(family.probability, 1e-9, 1 - 1e-9))
    level = family.level_probability * np.exp(
        size * rng.normal(size=family.level_probability.shape)
    )
    # The columns of MIXED with levels have three and two of them.
    for levels in (slice(0, 3), slice(3, 5)):
        level[:, levels] /= level[:, levels].sum(axis=1, keepdims=True)
    return replace(
        family,
        mean=family.mean + size * rng.normal(size=family.mean.shape),
        variance=variance,
        probability=special.expit(logit + size * rng.normal(size=logit.shape)),
        rate=family.rate * np.exp(size * rng.normal(size=family.rate.shape)),
        level_probability=level,
    )


def told(
    kind: str, n_rows: int = 120, k: int = 3, gaps: float = 0.3, **options: Any
) -> tuple[Story, Params, Any]:
    """A story of `mixed`, `diag`, `spherical` or `shared` columns, anchored on drawn rows."""
    rng = np.random.default_rng(21)
    if kind == "shared":
        schema = Schema.real(3)
        family = IndependentColumns(schema, True, shared=True)
        story = Story(schema, family, k, options.get("prior", "weak"))
        params = oracles.random_params(story, rng)
        params = replace(params, family=replace(params.family, variance=np.full(k, 0.7)))
    else:
        story = oracles.make_story(kind, k, **options)
        params = oracles.random_params(story, rng)
    values = oracles.with_gaps(story.draw(params, n_rows, rng).values, gaps, rng)
    if gaps:
        values[5] = np.nan
    return story.anchored(Rows.of(values)), params, values


COLUMNS = ("mixed", "diag", "spherical", "shared")


@pytest.mark.parametrize("kind", COLUMNS)
class TestLaws:
    def test_stored(self, kind: str) -> None:
        for gaps in (0.0, 0.3):
            laws.stored_and_read(*told(kind, gaps=gaps))

    @pytest.mark.parametrize("gaps", [0.0, 0.4])
    def test_loads_what_blocks_hold(self, kind: str, gaps: float) -> None:
        laws.loads_what_blocks_hold(*told(kind, gaps=gaps))
        laws.loads_more_than_a_block_holds(*told(kind, gaps=gaps))
        laws.mends(*told(kind, gaps=gaps))

    @pytest.mark.parametrize("prior", ["weak", None])
    def test_never_falls(self, kind: str, prior: str | None) -> None:
        laws.never_falls_however_learned(*told(kind, prior=prior))

    @pytest.mark.parametrize("prior", ["weak", None])
    def test_m_step_is_the_maximum_given_what_is_frozen(self, kind: str, prior: str | None) -> None:
        story, params, values = told(kind, prior=prior)
        rng = np.random.default_rng(1)
        resp = rng.dirichlet(np.ones(3), len(values))
        stats = story.e_step(params, Rows.of(values, rng.uniform(0, 2, len(values))), resp)
        for frozen in ((), *((name,) for name in story.family.param_names), ("mean", "rate")):
            laws.maximises(story, params, stats, moved, frozen)

    def test_conditions_and_marginals(self, kind: str) -> None:
        story, params, values = told(kind, n_rows=12, gaps=0.0)
        names = story.schema.names
        laws.factorises(story, params, values, [names[0]])
        laws.factorises(story, params, values, list(names[:0:-1]))
        laws.marginal_is_what_gaps_leave(story, params, values)

    def test_gaps_are_filled(self, kind: str) -> None:
        story, params, values = told(kind, gaps=0.0)
        d = values.shape[1]
        for missing in ([0], [d - 1], list(range(d - 1)), list(range(d))):
            x = values[3].copy()
            x[missing] = np.nan
            resp = oracles.responsibilities(story, params, x[None])[0]
            means = np.full(d, np.nan)
            family: Any = params.family
            means[list(story.schema.of_kind("real"))] = resp @ family.mean
            means[list(story.schema.of_kind("count"))] = resp @ family.rate
            laws.fills_with_what_it_would_draw(story, params, x, means)


def test_likeliest_values_fill_binary_and_categorical_gaps() -> None:
    story, params, values = told("mixed", gaps=0.0)
    x = values[:40].copy()
    x[:, [1, 3, 5]] = np.nan
    filled = story.impute(params, Rows.of(x))
    family: Any = params.family
    resp = oracles.responsibilities(story, params, x)
    np.testing.assert_array_equal(filled[:, 1], resp @ family.probability[:, 0] > 0.5)
    np.testing.assert_array_equal(filled[:, 3], (resp @ family.level_probability)[:, :3].argmax(1))
    np.testing.assert_array_equal(filled[:, 5], (resp @ family.level_probability)[:, 3:].argmax(1))
    # A binary column's draws have its probability.
    drawn = story.impute(params, Rows.of(np.tile(x[0], (4000, 1))), np.random.default_rng(0))
    assert drawn[:, 1].mean() == pytest.approx(resp[0] @ family.probability[:, 0], abs=0.04)


class TestShared:
    """One variance for all components and columns."""

    def test_mode_is_the_hand_derived_one(self) -> None:
        """Scatter pooled over components about each posterior mean, one inverse chi-squared."""
        story, params, values = told("shared", gaps=0.0)
        rng = np.random.default_rng(2)
        resp = rng.dirichlet(np.ones(3), len(values))
        found: Any = story.m_step(story.e_step(params, Rows.of(values), resp), params).family
        prior: Any = story.family.prior
        n = resp.sum(axis=0)
        mean = (prior.strength * prior.mean + resp.T @ values) / (prior.strength + n)[:, None]
        np.testing.assert_allclose(found.mean, mean, rtol=1e-10)
        total = prior.scatter.mean()
        for k in range(3):
            total += float(resp[:, k] @ ((values - mean[k]) ** 2).sum(axis=1))
            total += prior.strength * float(((mean[k] - prior.mean) ** 2).sum())
        variance = total / (prior.dof + len(values) * 3 + 2 + 9)
        np.testing.assert_allclose(found.variance, np.full(3, variance), rtol=1e-10)
        assert story.n_parameters == 2 + 9 + 1

    def test_gaps_are_exact(self) -> None:
        """The variance is the average squared distance of what was observed."""
        story, params, values = told("shared", prior=None)
        labels = np.random.default_rng(3).integers(0, 3, len(values))
        stats = story.e_step(params, Rows.of(values), np.eye(3)[labels])
        found: Any = story.m_step(stats, params).family
        means = np.array([np.nanmean(values[labels == k], axis=0) for k in range(3)])
        np.testing.assert_allclose(found.mean, means, rtol=1e-10)
        expected = np.nanmean((values - means[labels]) ** 2)
        np.testing.assert_allclose(found.variance, expected, rtol=1e-10)

    def test_k_means_is_hard_em_with_even_weights_kept(self) -> None:
        """Lloyd's algorithm, step by step."""
        story, params, values = told("shared", n_rows=300, gaps=0.0, prior=None)
        story = replace(story, frozen=frozenset(("weights",)))
        centres = values[:3].copy()
        params = replace(
            params, weights=np.full(3, 1 / 3), family=replace(params.family, mean=centres)
        )
        for _ in range(8):
            distance = ((values[:, None] - centres) ** 2).sum(axis=2)
            labels = distance.argmin(axis=1)
            np.testing.assert_array_equal(story.infer(params, Rows.of(values)).component, labels)
            centres = np.array([values[labels == k].mean(axis=0) for k in range(3)])
            params = story.m_step(story.e_step(params, Rows.of(values), hard), params)
            family: Any = params.family
            np.testing.assert_allclose(family.mean, centres, rtol=1e-10)
            np.testing.assert_array_equal(params.weights, 1 / 3)

    def test_one_component_is_spherical(self) -> None:
        _, _, values = told("spherical")
        found = []
        for shared in (False, True):
            family = IndependentColumns(Schema.real(3), True, shared=shared)
            story, params = learned(Story(Schema.real(3), family, 1), values)
            found.append((params, story.log_prior(params)))
        assert oracles.distance(found[0][0], found[1][0]) < 1e-12
        assert found[0][1] == pytest.approx(found[1][1], rel=1e-12)


def test_about_a_frozen_mean_the_variance_is_the_hand_derived_one() -> None:
    story, params, values = told("diag", k=1)
    kept = replace(story, frozen=frozenset(("mean",)))
    found: Any = kept.m_step(kept.e_step(params, Rows.of(values)), params).family
    mean: Any = params.family
    prior: Any = story.family.prior
    n = (~np.isnan(values)).sum(axis=0)
    square = np.nansum((values - mean.mean[0]) ** 2, axis=0)
    pull = prior.strength * (mean.mean[0] - prior.mean) ** 2
    expected = (prior.scatter + square + pull) / (prior.dof + n + 3)
    np.testing.assert_allclose(found.variance[0], expected, rtol=1e-10)
