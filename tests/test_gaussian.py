"""Gaussians: gaps by pattern, conditional moments, and arithmetic that keeps its digits."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import laws
import numpy as np
import oracles
import pytest
from scipy import stats

from genstream.families import gaussian_walk, lanes
from genstream.families.blocks import moments
from genstream.rows import LARGEST, Rows
from genstream.schema import Schema
from genstream.stories import mixture
from genstream.story import Params, Story

KINDS = ("full", "tied")
FREQUENT = 64


def drawn(
    kind: str, n_rows: int, d: int, k: int = 3, seed: int = 0, **options: Any
) -> tuple[Story, Params, np.ndarray]:
    rng = np.random.default_rng([seed, 5])
    story = oracles.make_story(kind, k, d, **options)
    params = oracles.random_params(story, rng)
    values = story.draw(params, n_rows, rng).values
    return story.anchored(Rows.of(values)), params, values


def patterned(values: np.ndarray, counts: dict[tuple[int, ...], int]) -> np.ndarray:
    """Rows of given patterns (the columns missing) and counts, shuffled."""
    out, at = values.copy(), 0
    for missing, count in counts.items():
        out[at : at + count, list(missing)] = np.nan
        at += count
    assert at <= len(values)
    return np.random.default_rng(0).permutation(out[:at])


def brute_statistics(
    story: Story, params: Params, values: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sums of r, r E[x] and r E[x x'] in data units, row by row."""
    k, d = story.n_components, story.schema.n_features
    resp = oracles.responsibilities(story, params, values) * weights[:, None]
    n, s, q = np.zeros(k), np.zeros((k, d)), np.zeros((k, d, d))
    for x, r in zip(values, resp, strict=True):
        if np.isnan(x).all():
            continue
        for i in range(k):
            first, second = oracles.conditional_moments(params.family, i, x)
            n[i] += r[i]
            s[i] += r[i] * first
            q[i] += r[i] * second
    return n, s, q


def in_data_units(story: Story, family: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The library's sums, which are about the pivot, in data units."""
    pivot = story.anchor
    assert pivot is not None
    n, s = family.sum_w, family.sum_wx
    total = s * pivot.scale + n[:, None] * pivot.shift
    wide = family.sum_wxx * np.outer(pivot.scale, pivot.scale)
    if wide.ndim == 2:
        s, n = s.sum(axis=0), n.sum()
    cross = (s * pivot.scale)[..., :, None] * pivot.shift
    square = np.outer(pivot.shift, pivot.shift)
    wide = wide + cross + cross.swapaxes(-1, -2) + np.asarray(n)[..., None, None] * square
    return family.sum_w, total, wide


GAPS = {
    "no gaps": {(): 200},
    "rare patterns only": {(0,): 3, (1, 2): 5, (0, 1, 3): 1, (2,): 20, (0, 1, 2): 7, (): 30},
    "frequent patterns only": {(): 100, (0,): 90, (1, 3): 80, (0, 1, 2): 70},
    "both, and nothing observed": {(): 90, (2,): 80, (0, 1, 2): 66, (3,): 5, (0, 1, 2, 3): 9},
    "no row is complete": {(0,): 70, (1,): 3, (2, 3): 64, (1, 2, 3): 30},
    "at the edge of frequent": {
        (0,): FREQUENT - 1,
        (1,): FREQUENT,
        (2,): FREQUENT + 1,
    },
}


@pytest.mark.parametrize("kind", KINDS)
class TestGaps:
    @pytest.fixture(autouse=True)
    def few_rows_are_frequent(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # Of three components.
        monkeypatch.setattr(gaussian_walk, "FREQUENT", 3 * FREQUENT)

    @pytest.mark.parametrize("gaps", GAPS)
    def test_densities_are_those_of_the_marginals(self, kind: str, gaps: str) -> None:
        story, params, values = drawn(kind, 400, 4)
        values = patterned(values, GAPS[gaps])
        np.testing.assert_allclose(
            story.log_prob(params, Rows.of(values)),
            oracles.log_prob(story, params, values),
            rtol=1e-10,
            atol=1e-10,
        )

    @pytest.mark.parametrize("gaps", GAPS)
    def test_statistics_hold_conditional_moments(self, kind: str, gaps: str) -> None:
        story, params, values = drawn(kind, 400, 4)
        values = patterned(values, GAPS[gaps])
        weights = np.random.default_rng(3).uniform(0, 2, len(values))
        found = in_data_units(story, story.e_step(params, Rows.of(values, weights)).family)
        n, s, q = brute_statistics(story, params, values, weights)
        np.testing.assert_allclose(found[0], n, rtol=1e-10)
        np.testing.assert_allclose(found[1], s, rtol=1e-9, atol=1e-9)
        wanted = q.sum(axis=0) if kind == "tied" else q
        np.testing.assert_allclose(found[2], wanted, rtol=1e-9, atol=1e-8)

    def test_one_pattern_a_row(self, kind: str) -> None:
        d = 9
        story, params, values = drawn(kind, 300, d, k=2)
        bits = np.random.default_rng(1).permutation(2**d)[:300]
        seen = (bits[:, None] >> np.arange(d)) & 1 == 1
        values = np.where(seen, values, np.nan)
        np.testing.assert_allclose(
            story.log_prob(params, Rows.of(values)),
            oracles.log_prob(story, params, values),
            rtol=1e-9,
        )

    def test_rare_and_frequent_paths_agree(
        self, kind: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        story, params, values = drawn(kind, 400, 4)
        rows = Rows.of(patterned(values, {(0,): 100, (1, 2): 90, (3,): 80, (): 100}))
        by_pattern = story.e_step(params, rows)
        monkeypatch.setattr(gaussian_walk, "FREQUENT", 10**9)
        in_lanes = story.e_step(params, rows)
        assert oracles.distance(in_lanes, by_pattern) < 1e-11
        monkeypatch.setattr(lanes, "LANE_NUMBERS", 1)
        assert oracles.distance(story.e_step(params, rows), by_pattern) < 1e-11

    def test_more_columns_than_a_byte_of_mask(self, kind: str) -> None:
        d = 11
        story, params, values = drawn(kind, 200, d, k=2)
        values = oracles.with_gaps(values, 0.3, np.random.default_rng(2))
        np.testing.assert_allclose(
            story.log_prob(params, Rows.of(values)),
            oracles.log_prob(story, params, values),
            rtol=1e-9,
        )

    def test_a_mask_that_hides_nothing_changes_nothing(self, kind: str) -> None:
        story, params, values = drawn(kind, 200, 4)
        masked = Rows(values, np.ones(values.shape, dtype=bool))
        one, two = (story.e_step(params, rows) for rows in (masked, Rows(values)))
        assert oracles.distance(one, two) < 1e-12

    def test_a_column_that_is_never_observed(self, kind: str) -> None:
        _, _, values = drawn(kind, 150, 3)
        values[:, 1] = np.nan
        for prior in ("weak", None):
            story = oracles.make_story(kind, 2, 3, prior=prior).anchored(Rows.of(values))
            params = story.vague()
            for _ in range(5):
                params = story.m_step(story.e_step(params, Rows.of(values)), params)
            assert oracles.is_possible(story, params)


class TestOneGaussian:
    """One Gaussian with gaps: what is known in closed form."""

    def test_monotone_gaps_have_a_closed_form(self) -> None:
        """Anderson (1957): with x2 missing at random, the fit is a regression of x2 on x1."""
        rng = np.random.default_rng(4)
        x = rng.normal(size=(400, 2)) @ np.array([[1.0, 0.8], [0.0, 0.5]]) + [1.0, -2.0]
        gapped = x.copy()
        gapped[150:, 1] = np.nan
        story = mixture(Schema.real(2), 1, prior=None).anchored(Rows.of(gapped))
        params = story.vague()
        for _ in range(400):
            params = story.m_step(story.e_step(params, Rows.of(gapped)), params)
        both = x[:150]
        slope, intercept, *_ = stats.linregress(both[:, 0], both[:, 1])
        residual = np.mean((both[:, 1] - intercept - slope * both[:, 0]) ** 2)
        mean0, var0 = x[:, 0].mean(), x[:, 0].var()
        family: Any = params.family
        np.testing.assert_allclose(family.mean[0], [mean0, intercept + slope * mean0], rtol=1e-9)
        wanted = [[var0, slope * var0], [slope * var0, residual + slope**2 * var0]]
        np.testing.assert_allclose(family.covariance[0], wanted, rtol=1e-9)


def gapped(
    kind: str, n_rows: int = 500, d: int = 4, **options: Any
) -> tuple[Story, Params, np.ndarray]:
    """Complete rows, frequent and rare patterns, and rows with nothing observed, shuffled."""
    story, params, values = drawn(kind, n_rows, d, **options)
    rng = np.random.default_rng(31)
    values[:100, 0] = np.nan
    values[100:180, 1:3] = np.nan
    values[180:250] = oracles.with_gaps(values[180:250], 0.5, rng)
    values[250:255] = np.nan
    values = rng.permutation(values)
    return story.anchored(Rows.of(values)), params, values


def moved(family: Any, rng: np.random.Generator, size: float) -> Any:
    """Parameters a little off, within what they may be."""
    turn = np.eye(family.mean.shape[1]) + size * rng.normal(size=family.covariance.shape)
    covariance = turn @ family.covariance @ np.swapaxes(turn, -1, -2)
    return type(family)(family.mean + size * rng.normal(size=family.mean.shape), covariance)


@pytest.mark.parametrize("kind", KINDS)
class TestLaws:
    def test_stored(self, kind: str) -> None:
        laws.stored_and_read(*gapped(kind))

    def test_loads_what_blocks_hold(self, kind: str) -> None:
        laws.loads_what_blocks_hold(*gapped(kind))
        laws.loads_what_blocks_hold(*drawn(kind, 200, 4))

    @pytest.mark.parametrize("dtype", ["float64", "float32"])
    @pytest.mark.parametrize("seed", range(4))
    def test_any_partition_into_blocks_is_the_same(self, kind: str, seed: int, dtype: str) -> None:
        story, params, values = gapped(kind, dtype=dtype)
        rng = np.random.default_rng(seed)
        rows = Rows.of(values)
        resp = rng.dirichlet(np.ones(3), len(values)).T.astype(dtype)
        scaled = resp * rng.gamma(2.0, size=resp.shape).astype(dtype)
        kernel: Any = story.family.prepare(params.family, np.log(params.weights))
        whole = kernel.walk(rows)
        constant = np.repeat(np.log(params.weights)[:, None], len(values), axis=1)
        for index in whole.blocks():
            whole.score()
            constant[:, index] = whole.constant
            whole.gather(resp[:, index], scaled[:, index])
        parts = kernel.walk(rows)
        order = rng.permutation(len(values))
        for index in np.split(order, np.sort(rng.integers(0, len(values), 6))):
            parts.load(index)
            score = parts.score()
            bad = ~np.isfinite(score).all(axis=0)
            assert not bad.any(), (score[:, bad], values[index[bad]], len(index))
            rtol = 1e-10 if dtype == "float64" else 1e-5
            np.testing.assert_allclose(
                score.T, oracles.log_joint(story, params, values[index]), rtol=rtol, atol=100 * rtol
            )
            found = np.broadcast_to(parts.constant, score.shape)
            np.testing.assert_allclose(found, constant[:, index], rtol=1e-12)
            seen = np.broadcast_to(parts.n_observed, len(index))
            np.testing.assert_array_equal(seen, rows.is_observed[index].sum(axis=1))
            parts.gather(resp[:, index], scaled[:, index])
        tolerance = 1e-12 if dtype == "float64" else 1e-6
        assert oracles.distance(parts.close(), whole.close()) < tolerance

    @pytest.mark.parametrize("prior", ["weak", None])
    def test_em_never_falls(self, kind: str, prior: str | None) -> None:
        story, params, values = gapped(kind, prior=prior)
        laws.never_falls_however_learned(story, params, values)

    @pytest.mark.parametrize("prior", ["weak", None])
    def test_the_m_step_is_the_maximum_given_what_is_frozen(
        self, kind: str, prior: str | None
    ) -> None:
        story, params, values = gapped(kind, prior=prior)
        off = replace(params, family=moved(params.family, np.random.default_rng(1), 0.2))
        found = story.e_step(params, Rows.of(values))
        for frozen in ((), ("mean",), ("covariance",), ("mean", "covariance")):
            laws.maximises(story, off, found, moved, frozen)

    def test_conditions_and_marginals(self, kind: str) -> None:
        story, params, values = drawn(kind, 12, 4)
        names = story.schema.names
        for given in itertools.chain(
            itertools.combinations(names, 1), itertools.combinations(names, 3)
        ):
            laws.factorises(story, params, values, list(given))
        laws.marginal_is_what_gaps_leave(story, params, values)

    def test_gaps_are_filled(self, kind: str) -> None:
        story, params, values = drawn(kind, 12, 4)
        family: Any = params.family
        for i, missing in enumerate([(0,), (1, 2, 3), (0, 1, 2, 3)]):
            x = values[i].copy()
            x[list(missing)] = np.nan
            resp = oracles.responsibilities(story, params, x[None])[0]
            means = sum(resp[k] * oracles.conditional_moments(family, k, x)[0] for k in range(3))
            laws.fills_with_what_it_would_draw(story, params, x, np.asarray(means))


@pytest.mark.parametrize("kind", KINDS)
class TestGapsByHand:
    def test_draws_have_the_conditional_covariance(self, kind: str) -> None:
        story, params, _ = drawn(kind, 10, 4, k=1)
        family: Any = params.family
        x = family.mean[0] + 1.0
        x[[0, 2]] = np.nan
        n = 20000
        values = story.impute(params, Rows.of(np.tile(x, (n, 1))), np.random.default_rng(2))
        first, second = oracles.conditional_moments(family, 0, x)
        spread = second - np.outer(first, first)
        np.testing.assert_allclose(values.mean(axis=0), first, atol=5 / np.sqrt(n))
        np.testing.assert_allclose(np.cov(values.T), spread, atol=10 / np.sqrt(n))

    def test_every_row_its_own_pattern_is_filled(self, kind: str) -> None:
        d = 9
        story, params, values = drawn(kind, 300, d, k=2)
        bits = np.random.default_rng(1).permutation(2**d)[:300]
        values = np.where((bits[:, None] >> np.arange(d)) & 1 == 1, values, np.nan)
        found = story.impute(params, Rows.of(values))
        resp = oracles.responsibilities(story, params, values)
        for x, r, filled in zip(values, resp, found, strict=True):
            if np.isnan(x).all():
                r, moments = params.weights, list(params.family.mean)  # type: ignore[union-attr]
            else:
                moments = [oracles.conditional_moments(params.family, k, x)[0] for k in range(2)]
            wanted = r[0] * moments[0] + r[1] * moments[1]
            np.testing.assert_allclose(filled, np.where(np.isnan(x), wanted, x), atol=1e-8)

    @pytest.mark.parametrize("gaps", GAPS)
    def test_moments_may_weigh_otherwise_than_spare_covariance(self, kind: str, gaps: str) -> None:
        story, params, values = drawn(kind, 400, 4)
        values = patterned(values, GAPS[gaps])
        rng = np.random.default_rng(4)
        resp, scaled = rng.random((2, 3, len(values)))
        kernel: Any = story.family.prepare(params.family, np.log(params.weights))
        walk = kernel.walk(Rows.of(values))
        for index in walk.blocks():
            walk.score()
            walk.gather(resp[:, index], scaled[:, index])
        n, s, q = np.zeros(3), np.zeros((3, 4)), np.zeros((3, 4, 4))
        for i, x in enumerate(values):
            if np.isnan(x).all():
                continue
            for k in range(3):
                first, second = oracles.conditional_moments(params.family, k, x)
                square = np.outer(first, first)
                n[k] += scaled[k, i]
                s[k] += scaled[k, i] * first
                q[k] += scaled[k, i] * square + resp[k, i] * (second - square)
        found = in_data_units(story, walk.close())
        np.testing.assert_allclose(found[0], n, rtol=1e-10)
        np.testing.assert_allclose(found[1], s, rtol=1e-9, atol=1e-9)
        wanted = q.sum(axis=0) if kind == "tied" else q
        np.testing.assert_allclose(found[2], wanted, rtol=1e-9, atol=1e-8)


class TestNothing:
    @pytest.mark.parametrize("kind", ("full", "tied", "diag", "spherical"))
    @pytest.mark.parametrize("prior", (None, "weak"))
    def test_rows_of_no_weight_teach_nothing(self, kind: str, prior: str | None) -> None:
        story, params, values = drawn(kind, 40, 3, prior=prior)
        nothing = story.e_step(params, Rows.of(values, np.zeros(40)))
        with np.errstate(all="raise"):
            after = story.m_step(nothing, params)
        assert all(np.isfinite(value).all() for _, _, value in after.leaves())
        if prior is None and kind in KINDS:
            np.testing.assert_allclose(after.family.mean, params.family.mean)
            np.testing.assert_allclose(after.family.covariance, params.family.covariance)

    @pytest.mark.parametrize("kind", ("full", "tied", "diag", "spherical"))
    def test_no_rows_are_drawn(self, kind: str) -> None:
        story, params, _ = drawn(kind, 40, 3)
        assert story.draw(params, 0, np.random.default_rng(0)).values.shape == (0, 3)

    def test_large_numbers_have_a_spread(self) -> None:
        """As large as rows may hold, and many of them: no sum of squares is infinite."""
        values = np.random.default_rng(0).uniform(0.9, 1.0, (100_000, 1)) * LARGEST
        assert np.isfinite(moments(Rows.of(values))[1]).all()


class TestMode:
    """The M-step against the mode of the conjugate posterior, by hand."""

    @pytest.mark.parametrize("frozen", [False, True])
    def test_of_one_component(self, frozen: bool) -> None:
        rng = np.random.default_rng(16)
        x = rng.normal(size=(50, 2)) @ np.array([[1.0, 0.5], [0.0, 2.0]]) + [3.0, -1.0]
        weights = rng.uniform(0, 2, 50)
        kept = frozenset({"mean"}) if frozen else frozenset()
        story = replace(mixture(Schema.real(2), 1), frozen=kept).anchored(Rows.of(x))
        prior: Any = story.family.prior
        params = story.vague()
        fitted: Any = story.m_step(story.e_step(params, Rows.of(x, weights)), params).family
        n, d = weights.sum(), 2
        mean = (prior.strength * prior.mean + weights @ x) / (prior.strength + n)
        if frozen:
            before: Any = params.family
            mean = before.mean[0]
        gap, far = x - mean, mean - prior.mean
        scatter = np.diag(prior.scatter) + (gap.T * weights) @ gap
        scatter += prior.strength * np.outer(far, far)
        np.testing.assert_allclose(fitted.mean[0], mean, rtol=1e-12)
        wanted = scatter / (prior.dof + n + d + 2)
        np.testing.assert_allclose(fitted.covariance[0], wanted, rtol=1e-10)


class TestDigits:
    """Arithmetic far from the origin, and with components far from one another."""

    @pytest.mark.parametrize("kind", ["full", "tied", "diag", "spherical"])
    @pytest.mark.parametrize("offset", [1e4, 1e8])
    def test_an_offset_changes_nothing_but_means(self, kind: str, offset: float) -> None:
        # Grid values stay exact under the offset, so that both fits see the same data.
        _, params, values = drawn_any(kind, 500)
        values = np.round(values * 2**16) / 2**16
        moved = values + offset
        here, there = (
            oracles.make_story(kind, 3, prior=None).anchored(Rows.of(v)) for v in (values, moved)
        )
        q = shifted(params, offset)
        for _ in range(5):
            params = here.m_step(here.e_step(params, Rows.of(values)), params)
            q = there.m_step(there.e_step(q, Rows.of(moved)), q)
        assert oracles.distance(shifted(q, -offset), params) < 1e-16 * offset + 1e-11

    @pytest.mark.parametrize("kind", ["full", "tied", "diag", "spherical"])
    def test_scales_of_columns_do_not_matter(self, kind: str) -> None:
        if kind == "spherical":
            scale = np.full(3, 2.0**-40)
        else:
            scale = 2.0 ** np.array([-60.0, 0.0, 70.0])
        story, params, values = drawn_any(kind, 300, gaps=0.2)
        story = oracles.make_story(kind, 3).anchored(Rows.of(values))
        wide = oracles.make_story(kind, 3).anchored(Rows.of(values * scale))
        one = story.m_step(story.e_step(params, Rows.of(values)), params)
        big = scaled(params, scale)
        two = wide.m_step(wide.e_step(big, Rows.of(values * scale)), big)
        assert oracles.distance(scaled(two, 1 / scale), one) < 1e-9

    @pytest.mark.parametrize("dtype", ["float64", "float32"])
    @pytest.mark.parametrize("gaps", [0.0, 0.3])
    @pytest.mark.parametrize("kind", ["full", "tied", "diag", "spherical"])
    @pytest.mark.parametrize("apart", [1e4, 1e6, 1e8])
    def test_narrow_components_far_from_the_pivot_stay_accurate(
        self, apart: float, kind: str, gaps: float, dtype: str
    ) -> None:
        """Two components many of their deviations apart: the terms of the quadratic form reach
        1e16 and cancel. The bound on rounding is one thousandth of a nat.
        """
        rng = np.random.default_rng(6)
        d, n = 3, 400
        mean = np.array([[-0.5 * apart] * d, [0.5 * apart] * d])
        noise = rng.normal(size=(n, d))
        values = mean[np.arange(n) % 2] + noise
        values = oracles.with_gaps(values, gaps, rng)
        story = oracles.make_story(kind, 2, d, dtype=dtype, prior=None).anchored(Rows.of(values))
        params = exact_params(story, mean, 1.0)
        found = story.log_prob(params, Rows.of(values))
        np.testing.assert_allclose(
            found, oracles.log_prob(story, params, values), rtol=0, atol=1e-3
        )
        stats_ = story.e_step(params, Rows.of(values))
        fitted: Any = story.m_step(stats_, params).family
        if kind in KINDS:  # a gap counts as its conditional mean, which is the old mean here
            seen = ~np.isnan(values).all(axis=1)
            values = np.where(np.isnan(values), mean[np.arange(n) % 2], values)
            values[~seen] = np.nan
        wanted = np.array([np.nanmean(values[k::2], axis=0) for k in range(2)])
        np.testing.assert_allclose(fitted.mean, wanted, rtol=0, atol=1e-12 * apart + 1e-9)

    @pytest.mark.parametrize("kind", ["full", "tied", "diag"])
    def test_float32_keeps_thin_components(self, kind: str) -> None:
        """Deviation 0.003 at spread 3: plain float32 features are 6% off here."""
        rng = np.random.default_rng(8)
        mean = np.array([[-3.0, 3.0], [3.0, -3.0]])
        values = mean[np.arange(4000) % 2] + 0.003 * rng.normal(size=(4000, 2))
        story = oracles.make_story(kind, 2, 2, dtype="float32", prior=None)
        story = story.anchored(Rows.of(values))
        params = exact_params(story, mean, 1e-5)
        for _ in range(3):
            params = story.m_step(story.e_step(params, Rows.of(values)), params)
        family: Any = params.family
        for k in range(2):
            wanted = values[k::2].var(axis=0)
            if kind == "tied":
                wanted = np.mean([values[i::2].var(axis=0) for i in range(2)], axis=0)
            found = (
                family.variance[k]
                if kind == "diag"
                else np.diagonal(oracles.covariance_of(family, k))
            )
            np.testing.assert_allclose(found, wanted, rtol=1e-3)

    @pytest.mark.parametrize("kind", ["full", "diag", "spherical"])
    def test_float32_begins_with_digits_enough(self, kind: str) -> None:
        """Components of one row each have no variance but ridge and floor, however far out."""
        rng = np.random.default_rng(14)
        values = rng.normal(0, 3, (9000, 8))
        story = oracles.make_story(kind, 6, 8, dtype="float32", prior=None, reg_covar=1e-6)
        story = story.anchored(Rows.of(values))
        resp = np.zeros((9000, 6))
        resp[np.arange(6), np.arange(6)] = 1.0
        params = story.m_step(story.e_step(story.vague(), Rows.of(values), resp), story.vague())
        family: Any = params.family
        found = family.covariance if kind == "full" else family.variance
        wanted = 1e-6 * (np.eye(8) if kind == "full" else 1.0)
        np.testing.assert_allclose(found, np.broadcast_to(wanted, found.shape), rtol=0, atol=2e-8)

    @pytest.mark.parametrize("gaps", [0.0, 0.05])
    @pytest.mark.parametrize("n_rows", [400, 40_000])
    def test_float32_keeps_one_thin_component_among_many_columns(
        self, gaps: float, n_rows: int
    ) -> None:
        """One that needs float64 is worked on apart from the others, which do not."""
        rng = np.random.default_rng(13)
        mean = rng.normal(0, 3, (3, 16))
        deviation = np.array([1.0, 0.002, 1.0])
        of_row = np.arange(n_rows) % 3
        values = mean[of_row] + deviation[of_row, None] * rng.normal(size=(n_rows, 16))
        if gaps:
            values[rng.random(n_rows) < gaps, :4] = np.nan
        single, double = (
            oracles.make_story("full", 3, 16, dtype=t, prior=None).anchored(Rows.of(values))
            for t in ("float32", "float64")
        )
        params = exact_params(double, mean, 1.0)
        params.family.covariance[1] *= 0.002**2
        kernel: Any = single.family.prepare(params.family, np.log(params.weights))
        assert kernel.complete.linear.fine.tolist() == [1]
        assert kernel.dtype == np.float32
        found: Any = single.e_step(params, Rows.of(values))
        wanted: Any = double.e_step(params, Rows.of(values))
        assert found.objective == pytest.approx(wanted.objective, rel=1e-6)
        thin, exact = (
            story.m_step(stats, params).family
            for story, stats in ((single, found), (double, wanted))
        )
        np.testing.assert_allclose(thin.mean, exact.mean, rtol=0, atol=1e-5)
        np.testing.assert_allclose(thin.covariance[1], exact.covariance[1], rtol=0, atol=1e-10)
        np.testing.assert_allclose(thin.covariance, exact.covariance, rtol=0, atol=1e-4)

    @pytest.mark.parametrize("kind", KINDS)
    def test_float32_keeps_nearly_dependent_columns(self, kind: str) -> None:
        rng = np.random.default_rng(9)
        x = rng.normal(size=(2000, 1))
        values = np.hstack([x, x + 1e-3 * rng.normal(size=(2000, 1))])
        double, single = (
            oracles.make_story(kind, 1, 2, dtype=t, prior=None).anchored(Rows.of(values))
            for t in ("float64", "float32")
        )
        params = double.m_step(double.e_step(double.vague(), Rows.of(values)), double.vague())
        one = double.e_step(params, Rows.of(values))
        two = single.e_step(params, Rows.of(values))
        assert two.objective == pytest.approx(one.objective, rel=1e-6)
        fitted: Any = single.m_step(two, params).family
        wanted: Any = double.m_step(one, params).family
        residual = np.array([1.0, -1.0])
        thin = [float(residual @ oracles.covariance_of(f, 0) @ residual) for f in (fitted, wanted)]
        assert thin[0] == pytest.approx(thin[1], rel=1e-3)

    def test_mean_of_a_million(self) -> None:
        rng = np.random.default_rng(10)
        values = rng.normal(1e6, 1.0, (5000, 1))
        story = mixture(Schema.real(1), 1, prior=None).anchored(Rows.of(values[:100]))
        fitted: Any = story.m_step(story.e_step(story.vague(), Rows.of(values)), story.vague())
        assert fitted.family.covariance[0, 0, 0] == pytest.approx(values.var(), rel=1e-12)


def drawn_any(kind: str, n_rows: int, gaps: float = 0.0) -> tuple[Story, Params, np.ndarray]:
    rng = np.random.default_rng(12)
    story = oracles.make_story(kind, 3)
    params = oracles.random_params(story, rng)
    values = oracles.with_gaps(story.draw(params, n_rows, rng).values, gaps, rng)
    return story, params, values


def exact_params(story: Story, mean: np.ndarray, variance: float) -> Params:
    """Components at given means with one variance throughout."""
    k, d = mean.shape
    weights = np.full(k, 1 / k)
    kind = story.family.params_type
    name = kind.__name__
    if name == "FullParams":
        return Params(weights, kind(mean, np.tile(variance * np.eye(d), (k, 1, 1))))
    if name == "TiedParams":
        return Params(weights, kind(mean, variance * np.eye(d)))
    shape = (k,) if name == "SphericalParams" else (k, d)
    none = np.empty((k, 0))
    return Params(weights, kind(mean, np.full(shape, variance), none, none, none))


def shifted(params: Params, offset: float) -> Params:
    family: Any = params.family
    return replace(params, family=replace(family, mean=family.mean + offset))


def scaled(params: Params, scale: np.ndarray) -> Params:
    family: Any = params.family
    if hasattr(family, "covariance"):
        wide = family.covariance * np.outer(scale, scale)
        return replace(params, family=replace(family, mean=family.mean * scale, covariance=wide))
    by = scale[0] if family.variance.ndim == 1 else scale
    wide = family.variance * by**2
    return replace(params, family=replace(family, mean=family.mean * scale, variance=wide))


class TestThin:
    """Covariances that lost a direction."""

    @pytest.mark.parametrize("kind", KINDS)
    def test_maximum_likelihood_stops_at_the_floor(self, kind: str) -> None:
        """The lifted covariance is the maximum among those with no eigenvalue below the floor."""
        rng = np.random.default_rng(13)
        x = rng.normal(size=(60, 2))
        values = np.column_stack([x, x @ [1.0, -1.0]])
        story = oracles.make_story(kind, 1, 3, prior=None).anchored(Rows.of(values))
        first = story.m_step(story.e_step(story.vague(), Rows.of(values)), story.vague())
        stats_ = story.e_step(first, Rows.of(values))
        params, faulty = story.maximise(stats_, first)
        assert oracles.is_possible(story, params)
        assert faulty.all() == (kind == "full")
        family: Any = story.family
        mean, covariance = family.pivoted(params.family)
        eigenvalues = np.linalg.eigvalsh(covariance[0])
        assert eigenvalues[0] == pytest.approx(1e-9, rel=1e-2)
        y = (values - story.anchor.shift) / story.anchor.scale
        best = floored_log_likelihood(y, mean[0], covariance[0])
        for _ in range(20):
            turn = np.linalg.qr(np.eye(3) + 1e-6 * rng.normal(size=(3, 3)))[0]
            other = turn @ covariance[0] @ turn.T + 1e-12 * np.diag(rng.uniform(0, 1, 3))
            assert floored_log_likelihood(y, mean[0], other) < best

    @pytest.mark.parametrize("kind", KINDS)
    def test_steps_on_the_floor_never_fall(self, kind: str) -> None:
        rng = np.random.default_rng(14)
        values = rng.normal(size=(12, 15))
        story = oracles.make_story(kind, 2, 15, prior=None).anchored(Rows.of(values))
        params = story.vague()
        resp = np.eye(2)[np.arange(12) % 2]
        params = story.m_step(story.e_step(params, Rows.of(values), resp), params)
        trace = []
        for _ in range(10):
            stats_ = story.e_step(params, Rows.of(values))
            trace.append(stats_.objective)
            params = story.m_step(stats_, params)
        assert np.diff(trace).min() > -1e-5 * len(values)

    @pytest.mark.parametrize("kind", KINDS)
    def test_the_prior_keeps_off_the_floor(self, kind: str) -> None:
        values = np.full((50, 2), 3.0)
        story = oracles.make_story(kind, 3, 2).anchored(Rows.of(values))
        params = story.m_step(story.e_step(story.vague(), Rows.of(values)), story.vague())
        assert oracles.is_possible(story, params)
        assert story.warnings(params) == []

    def test_dependent_columns_are_named(self) -> None:
        x = np.random.default_rng(15).normal(size=(80, 2))
        values = np.column_stack([x[:, 0], x[:, 1], 2 * x[:, 0]])
        story = mixture(Schema.real(["a", "b", "c"]), 1, prior=None).anchored(Rows.of(values))
        params = story.m_step(story.e_step(story.vague(), Rows.of(values)), story.vague())
        (warning,) = story.warnings(params)
        assert "a, c:" in warning

    @pytest.mark.parametrize("value", [1 / 3, 1e6 + 0.1, -1e150, 1e-300])
    def test_a_constant_column_is_not_a_spread_of_rounding(self, value: float) -> None:
        values = np.column_stack([np.full(1000, value), np.arange(1000.0)])
        story = mixture(Schema.real(2), 2).anchored(Rows.of(values))
        assert story.anchor is not None
        assert story.anchor.scale[0] == 1.0
        assert story.anchor.shift[0] == value

    def test_a_column_that_differs_in_its_last_digit_is_constant(self) -> None:
        values = np.column_stack([np.full(100, 0.1), np.arange(100.0)])
        values[::2, 0] = np.nextafter(0.1, 1.0)
        story = mixture(Schema.real(2), 2).anchored(Rows.of(values))
        assert story.anchor is not None
        assert story.anchor.scale[0] == 1.0


def floored_log_likelihood(y: np.ndarray, mean: np.ndarray, covariance: np.ndarray) -> float:
    """Exact to the digits that matter for eigenvalues near 1e-9."""
    values, vectors = np.linalg.eigh(covariance)
    values = np.maximum(values, 1e-9)
    z = (y - mean) @ vectors
    return float(-0.5 * (len(y) * np.log(values).sum() + (z**2 / values).sum()))
