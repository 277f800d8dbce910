"""Independent columns of every kind: densities, gaps, and parameters at the edge of what they may
be.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import oracles
import pytest
from scipy import special, stats

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
