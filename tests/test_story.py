"""Stories against brute force: densities, statistics, M-steps, and the laws of the fold."""

from __future__ import annotations

import itertools
import json
import pickle
from typing import Any

import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special

from genstream.errors import ConfigError, CorruptError, DataError
from genstream.rows import Rows
from genstream.schema import Column, Schema
from genstream.stories import mixture
from genstream.story import Params, Story, StoryStats

STORIES = (*oracles.STORIES, "blocks")
GAPS = (0.0, 0.35)


def drawn(
    kind: str,
    n_rows: int,
    n_components: int = 3,
    gaps: float = 0.0,
    seed: int = 0,
    **options: Any,
) -> tuple[Story, Params, np.ndarray]:
    """A story anchored on rows drawn from random parameters, those parameters, and the rows."""
    rng = np.random.default_rng([seed, 17])
    story = oracles.make_story(kind, n_components, **options)
    params = oracles.random_params(story, rng)
    values = oracles.with_gaps(story.draw(params, n_rows, rng).values, gaps, rng)
    return story.anchored(Rows.of(values)), params, values


@pytest.mark.parametrize("gaps", GAPS)
@pytest.mark.parametrize("kind", STORIES)
class TestDensity:
    def test_log_prob_is_that_of_brute_force(self, kind: str, gaps: float) -> None:
        story, params, values = drawn(kind, 200, gaps=gaps)
        expected = oracles.log_prob(story, params, values)
        np.testing.assert_allclose(story.log_prob(params, Rows.of(values)), expected, rtol=1e-10)

    def test_log_prob_needs_no_anchor(self, kind: str, gaps: float) -> None:
        story, params, values = drawn(kind, 60, gaps=gaps)
        bare = oracles.make_story(kind, 3)
        np.testing.assert_allclose(
            bare.log_prob(params, Rows.of(values)),
            story.log_prob(params, Rows.of(values)),
            rtol=1e-9,
        )

    def test_posterior_is_that_of_brute_force(self, kind: str, gaps: float) -> None:
        story, params, values = drawn(kind, 200, gaps=gaps)
        posterior = story.infer(params, Rows.of(values))
        expected = oracles.responsibilities(story, params, values)
        unseen = np.isnan(values).all(axis=1)
        expected[unseen] = params.weights
        np.testing.assert_allclose(posterior.responsibilities, expected, atol=1e-11)
        np.testing.assert_array_equal(posterior.component, expected.argmax(axis=1))
        np.testing.assert_array_equal(posterior.log_prob, story.log_prob(params, Rows.of(values)))

    def test_float32_rows_and_arithmetic_are_close(self, kind: str, gaps: float) -> None:
        story, params, values = drawn(kind, 300, gaps=gaps)
        single = oracles.make_story(kind, 3, dtype="float32").anchored(Rows.of(values))
        rounded = values.astype(np.float32)
        expected = story.log_prob(params, Rows.of(rounded.astype(np.float64)))
        found = single.log_prob(params, Rows.of(rounded))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)
        a = story.e_step(params, Rows.of(rounded))
        b = single.e_step(params, Rows.of(rounded))
        assert oracles.distance(b, a) < 1e-4

    def test_objective_and_weight_sum_over_rows(self, kind: str, gaps: float) -> None:
        story, params, values = drawn(kind, 150, gaps=gaps)
        weights = np.random.default_rng(5).uniform(0, 3, len(values))
        stats = story.e_step(params, Rows.of(values, weights))
        log_prob = oracles.log_prob(story, params, values)
        seen = ~np.isnan(values).all(axis=1)
        assert stats.objective == pytest.approx(weights @ log_prob, rel=1e-12)
        assert stats.weight == pytest.approx(weights[seen].sum(), rel=1e-12)
        assert stats.sum_r.sum() == pytest.approx(stats.weight, rel=1e-12)
        assert (stats.n_rows, stats.n_unobserved) == (len(values), int((~seen).sum()))

    def test_draws_have_the_density(self, kind: str, gaps: float) -> None:
        """E[log p(x)] under the model equals minus its entropy: here, two draws agree."""
        story, params, _ = drawn(kind, 10)
        scores = [
            story.log_prob(params, Rows.of(story.draw(params, 20_000, rng).values))
            for rng in (np.random.default_rng(1), np.random.default_rng(2))
        ]
        error = np.hypot(*(np.std(s) / np.sqrt(len(s)) for s in scores))
        assert abs(scores[0].mean() - scores[1].mean()) < 5 * error
        counts = np.bincount(story.draw(params, 20_000, np.random.default_rng(3)).component)
        np.testing.assert_allclose(counts / 20_000, params.weights, atol=0.02)


@pytest.mark.parametrize("kind", STORIES)
def test_drawn_moments_are_those_of_the_parameters(kind: str) -> None:
    story, params, _ = drawn(kind, 10)
    draw = story.draw(params, 60_000, np.random.default_rng(4))
    resp = np.eye(story.n_components)[draw.component]
    story = story.anchored(Rows.of(draw.values))
    flat = oracles.make_story(kind, story.n_components, prior=None)
    flat = flat.anchored(Rows.of(draw.values))
    found = flat.m_step(flat.e_step(params, Rows.of(draw.values), resp), params)
    assert oracles.distance(found, params) < 0.05


@pytest.mark.parametrize("kind", STORIES)
def test_draws_repeat(kind: str) -> None:
    story, params, _ = drawn(kind, 10)
    one, two = (story.draw(params, 50, np.random.default_rng(9)) for _ in range(2))
    np.testing.assert_array_equal(one.values, two.values)
    np.testing.assert_array_equal(one.component, two.component)
    Rows.of(one.values).check(story.schema)


@pytest.mark.parametrize("size", [1e6, 1e30, 1e150])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("kind", STORIES)
def test_rows_far_beyond_the_sample_stay_finite(kind: str, dtype: str, size: float) -> None:
    """Even where their squares leave the range of the arithmetic asked for."""
    story, params, values = drawn(kind, 60, dtype=dtype)
    values[3, 0], values[3, 1] = size, np.nan
    values[7, 0] = -size
    rows = Rows.of(values)
    log_prob = story.log_prob(params, rows)
    posterior = story.infer(params, rows)
    np.testing.assert_array_equal(posterior.log_prob, log_prob)
    assert np.isfinite(log_prob).all()
    assert log_prob[[3, 7]].max() < -1e9
    np.testing.assert_allclose(posterior.responsibilities.sum(axis=1), 1.0, rtol=1e-5)
    scored, entropy = story.score(params, rows)
    np.testing.assert_array_equal(scored, log_prob)
    np.testing.assert_allclose(
        entropy, special.entr(posterior.responsibilities).sum(axis=1), atol=1e-4
    )
    stats = story.e_step(params, rows)
    assert oracles.finite(stats)
    assert stats.objective == pytest.approx(log_prob.sum(), rel=1e-5)


class TestUnobserved:
    @pytest.mark.parametrize("kind", STORIES)
    def test_rows_with_nothing_observed_score_zero_and_move_nothing(self, kind: str) -> None:
        story, params, values = drawn(kind, 120, gaps=0.3)
        values = values[~np.isnan(values).all(axis=1)]
        padded = np.insert(values, [0, 5, len(values)], np.nan, axis=0)
        plain = story.e_step(params, Rows.of(values))
        more = story.e_step(params, Rows.of(padded))
        assert oracles.distance(more.family, plain.family) < 1e-13
        assert more.objective == pytest.approx(plain.objective, rel=1e-13)
        assert (more.n_rows, more.n_unobserved) == (len(values) + 3, 3)
        assert more.weight == plain.weight
        log_prob = story.log_prob(params, Rows.of(padded))
        assert log_prob[0] == 0.0
        assert log_prob[-1] == 0.0

    @pytest.mark.parametrize("kind", STORIES)
    def test_nothing_observed_at_all(self, kind: str) -> None:
        story, params, values = drawn(kind, 50)
        rows = Rows.of(np.full((7, values.shape[1]), np.nan))
        stats = story.e_step(params, rows)
        assert (stats.n_rows, stats.n_unobserved, stats.weight, stats.objective) == (7, 7, 0, 0)
        assert not stats.sum_r.any()
        posterior = story.infer(params, rows)
        np.testing.assert_array_equal(posterior.responsibilities, np.tile(params.weights, (7, 1)))
        assert oracles.is_possible(story, story.m_step(stats, params))

    @pytest.mark.parametrize("kind", STORIES)
    def test_no_rows(self, kind: str) -> None:
        story, params, values = drawn(kind, 50)
        for empty in (Rows.of(values[:0]), Rows.of(values)[values[:, 0] != values[:, 0]]):
            stats = story.e_step(params, empty)
            assert stats.n_rows == stats.weight == stats.objective == 0
            assert story.log_prob(params, empty).shape == (0,)
            assert story.infer(params, empty).responsibilities.shape == (0, 3)
        gapped = Rows.of(oracles.with_gaps(values, 0.5, np.random.default_rng(0)))[:0]
        assert story.e_step(params, gapped).n_rows == 0


class TestWeights:
    @pytest.mark.parametrize("gaps", GAPS)
    @pytest.mark.parametrize("kind", STORIES)
    def test_integer_weights_repeat_rows(self, kind: str, gaps: float) -> None:
        story, params, values = drawn(kind, 90, gaps=gaps)
        times = np.random.default_rng(2).integers(0, 4, len(values))
        weighted = story.e_step(params, Rows.of(values, times))
        repeated = story.e_step(params, Rows.of(np.repeat(values, times, axis=0)))
        assert oracles.distance(weighted.family, repeated.family) < 1e-12
        assert weighted.objective == pytest.approx(repeated.objective, rel=1e-12)
        assert weighted.weight == repeated.weight
        one, two = story.m_step(weighted, params), story.m_step(repeated, params)
        assert oracles.distance(one, two) < 1e-11

    @pytest.mark.parametrize("kind", STORIES)
    def test_a_weight_scales_statistics(self, kind: str) -> None:
        story, params, values = drawn(kind, 60, gaps=0.2)
        one = story.e_step(params, Rows.of(values))
        half = story.e_step(params, Rows.of(values, np.full(len(values), 0.5)))
        assert oracles.distance(half, one.scale(0.5)) < 1e-12


def _tree(parts: list[StoryStats], rng: np.random.Generator) -> StoryStats:
    """Merge neighbours at random until one is left: a random tree over the parts."""
    parts = list(parts)
    while len(parts) > 1:
        i = int(rng.integers(len(parts) - 1))
        parts[i : i + 2] = [parts[i].merge(parts[i + 1])]
    return parts[0]


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n_cuts=st.integers(0, 12), gaps=st.sampled_from([0.0, 0.3]))
@pytest.mark.parametrize("kind", STORIES)
def test_statistics_add_over_any_chunking_and_tree(
    kind: str, seed: int, n_cuts: int, gaps: float
) -> None:
    story, params, values = drawn(kind, 140, gaps=gaps, seed=3)
    rng = np.random.default_rng(seed)
    weights = rng.uniform(0, 2, len(values)) if seed % 2 else None
    rows = Rows.of(values, weights)
    cuts = [0, *np.sort(rng.integers(0, len(values) + 1, n_cuts)), len(values)]
    parts = [story.e_step(params, rows[first:last]) for first, last in itertools.pairwise(cuts)]
    whole = story.e_step(params, rows)
    assert oracles.distance(_tree(parts, rng), whole) < 1e-10


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
@pytest.mark.parametrize("kind", STORIES)
def test_statistics_do_not_mind_the_order_of_rows(kind: str, seed: int) -> None:
    story, params, values = drawn(kind, 120, gaps=0.3, seed=4)
    order = np.random.default_rng(seed).permutation(len(values))
    one = story.e_step(params, Rows.of(values))
    two = story.e_step(params, Rows.of(values[order]))
    assert oracles.distance(two, one) < 1e-10
    np.testing.assert_allclose(
        story.log_prob(params, Rows.of(values[order])),
        story.log_prob(params, Rows.of(values))[order],
        rtol=1e-11,
    )


class TestMStep:
    """The M-step maximises the expected log-posterior, as numerical optimisation finds it."""

    @pytest.mark.parametrize("prior", ["weak", None])
    # Each block of a product has its own maximum, which is judged there.
    @pytest.mark.parametrize("kind", oracles.STORIES)
    def test_is_the_maximum_over_complete_rows(self, kind: str, prior: str | None) -> None:
        story, params, values = drawn(kind, 80, n_components=2, prior=prior)
        weights = np.random.default_rng(8).uniform(0.2, 2, len(values))
        stats = story.e_step(params, Rows.of(values, weights))
        found = story.m_step(stats, params)
        resp = oracles.responsibilities(story, params, values)

        def objective(p: Params) -> float:
            expected = oracles.expected_objective(story, p, resp, values, weights)
            return expected + oracles.prior_log_density(story, p)

        assert np.abs(oracles.slope(story, objective, found)).max() < 2e-5 * len(values)
        _, best = oracles.maximum(story, objective, params)
        assert objective(found) >= best - 1e-6

    @pytest.mark.parametrize("prior", ["weak", None])
    @pytest.mark.parametrize("kind", ["diag", "spherical", "mixed"])
    def test_is_the_maximum_with_gaps(self, kind: str, prior: str | None) -> None:
        """Independent columns: a gap leaves its factor out, so the objective is as for no gaps."""
        story, params, values = drawn(kind, 90, n_components=2, gaps=0.4, prior=prior)
        values = values[~np.isnan(values).all(axis=1)]
        found = story.m_step(story.e_step(params, Rows.of(values)), params)
        resp = oracles.responsibilities(story, params, values)
        ones = np.ones(len(values))

        def objective(p: Params) -> float:
            expected = oracles.expected_objective(story, p, resp, values, ones)
            return expected + oracles.prior_log_density(story, p)

        assert np.abs(oracles.slope(story, objective, found)).max() < 2e-5 * len(values)

    @pytest.mark.parametrize("kind", STORIES)
    def test_log_prior_is_the_density_up_to_a_constant(self, kind: str) -> None:
        story, params, _ = drawn(kind, 60)
        others = [
            oracles.random_params(story, np.random.default_rng(s), apart=2.0) for s in range(6)
        ]
        gaps = [story.log_prior(p) - oracles.prior_log_density(story, p) for p in (params, *others)]
        np.testing.assert_allclose(gaps, gaps[0], rtol=1e-9, atol=1e-7)

    @pytest.mark.parametrize("kind", STORIES)
    def test_log_prior_is_zero_without_a_prior(self, kind: str) -> None:
        story, params, _ = drawn(kind, 60, prior=None)
        assert story.log_prior(params) == 0.0

    @pytest.mark.parametrize("kind", STORIES)
    def test_ridge_is_added_to_variances_in_data_units(self, kind: str) -> None:
        plain, params, values = drawn(kind, 80, prior=None)
        ridged, _, _ = drawn(kind, 80, prior=None, reg_covar=0.5)
        one: Any = plain.m_step(plain.e_step(params, Rows.of(values)), params).family
        two: Any = ridged.m_step(ridged.e_step(params, Rows.of(values)), params).family
        if kind == "blocks":
            one, two = one.block0, two.block0
        if kind in ("full", "tied", "blocks"):
            added = np.broadcast_to(0.5 * np.eye(one.mean.shape[1]), one.covariance.shape)
            np.testing.assert_allclose(two.covariance - one.covariance, added, atol=1e-12)
        else:
            np.testing.assert_allclose(two.variance - one.variance, 0.5, rtol=1e-12)


class TestOptimum:
    """EM with gaps climbs to the optimum of the likelihood of what was observed."""

    @pytest.mark.parametrize("prior", ["weak", None])
    # Each block of a product has its own maximum, which is judged there.
    @pytest.mark.parametrize("kind", oracles.STORIES)
    def test_em_ends_where_direct_maximisation_does(self, kind: str, prior: str | None) -> None:
        d = 2
        rng = np.random.default_rng(23)
        story = oracles.make_story(kind, 2, d, prior=prior)
        truth = oracles.random_params(story, rng, apart=4.0)
        values = oracles.with_gaps(story.draw(truth, 90, rng).values, 0.25, rng)
        story = story.anchored(Rows.of(values))
        params = truth
        for _ in range(3000):
            new = story.m_step(story.e_step(params, Rows.of(values)), params)
            moved = oracles.distance(new, params)
            params = new
            if moved < 1e-11:
                break

        def objective(p: Params) -> float:
            loglik = float(oracles.log_prob(story, p, values).sum())
            return loglik + oracles.prior_log_density(story, p)

        seen = story.log_prob(params, Rows.of(values)).sum() + story.log_prior(params)
        assert np.isfinite(seen)
        _, best = oracles.maximum(story, objective, truth)
        assert objective(params) >= best - 1e-5
        if kind != "mixed":  # a probability may sit at 0 or 1 there, where coordinates end
            assert np.abs(oracles.slope(story, objective, params)).max() < 1e-3


class TestWeightScale:
    @pytest.mark.parametrize("scale", [1e-300, 1e-12, 1e100])
    @pytest.mark.parametrize("kind", STORIES)
    def test_maximum_likelihood_does_not_mind_the_unit_of_weights(
        self, kind: str, scale: float
    ) -> None:
        story, params, values = drawn(kind, 90, gaps=0.2, prior=None)
        weights = np.random.default_rng(0).uniform(0.5, 2, len(values))
        found = [
            story.maximise(story.e_step(params, Rows.of(values, weights * by)), params)
            for by in (1.0, scale)
        ]
        assert oracles.distance(found[1][0], found[0][0]) < 1e-9
        assert not found[1][1].any()

    @pytest.mark.parametrize("scale", [1e-20, 1e-35, 1e-44, 1e-200])
    @pytest.mark.parametrize("kind", ["full", "tied", "diag"])
    def test_nor_does_float32(self, kind: str, scale: float) -> None:
        story, params, values = drawn(kind, 90, gaps=0.2, prior=None, dtype="float32")
        weights = np.random.default_rng(0).uniform(0.5, 2, len(values))
        one, other = (story.e_step(params, Rows.of(values, weights * by)) for by in (1.0, scale))
        assert other.weight == pytest.approx(one.weight * scale, rel=1e-6)
        assert oracles.distance(other.scale(1 / scale), one) < 1e-4


class TestPlace:
    @pytest.mark.parametrize("kind", STORIES)
    def test_a_component_moves_to_a_row(self, kind: str) -> None:
        story, params, values = drawn(kind, 80, gaps=0.3)
        row = Rows.of(values[3:4])
        moved = story.place(params, 1, row.values[0], row.is_observed[0])
        assert oracles.is_possible(story, moved)
        before = story.log_prob(params, row)[0]
        assert story.infer(moved, row).responsibilities[0, 1] > 0.0
        assert np.isfinite(story.log_prob(moved, row)[0])
        assert np.isfinite(before)
        for name, at, value in moved.family.leaves():
            if "component" in at:
                old = {n: v for n, _, v in params.family.leaves()}[name]
                kept, had = np.delete(value, 1, 0), np.delete(old, 1, 0)
                np.testing.assert_allclose(kept, had, rtol=1e-13, atol=1e-15)


class TestStored:
    @pytest.mark.parametrize("prior", ["weak", None])
    @pytest.mark.parametrize("kind", STORIES)
    def test_json_round_trip_is_exact(self, kind: str, prior: str | None) -> None:
        story, params, values = drawn(kind, 60, gaps=0.2, prior=prior)
        text = json.dumps(story.to_json())
        back = Story.from_json(json.loads(text))
        assert json.dumps(back.to_json()) == text
        rows = Rows.of(values)
        one, two = story.e_step(params, rows), back.e_step(params, rows)
        assert oracles.identical(one, two)
        assert oracles.identical(story.m_step(one, params), back.m_step(two, params))
        assert back.log_prior(params) == story.log_prior(params)

    @pytest.mark.parametrize("kind", STORIES)
    def test_a_story_that_is_not_anchored_round_trips(self, kind: str) -> None:
        story = oracles.make_story(kind, 2)
        assert Story.from_json(json.loads(json.dumps(story.to_json()))).anchor is None

    @pytest.mark.parametrize("kind", STORIES)
    def test_params_and_statistics_round_trip_as_datasets(self, kind: str) -> None:
        story, params, values = drawn(kind, 60)
        dataset = params.to_dataset(story.labels())
        assert oracles.identical(story.params_from(dataset), params)
        stats = story.e_step(params, Rows.of(values))
        back = story.stats_from(stats.to_dataset())
        assert oracles.identical(back, stats)
        assert isinstance(back.n_rows, int)

    def test_labels_name_columns_and_levels(self) -> None:
        story, params, _ = drawn("mixed", 20)
        dataset = params.to_dataset(story.labels())
        assert list(dataset["real"].values) == ["delay", "distance"]
        assert list(dataset["level"].values)[:4] == [
            "carrier=AA",
            "carrier=B6",
            "carrier=UA",
            "hub=no",
        ]
        story, params, _ = drawn("full", 20)
        dataset = params.to_dataset(story.labels())
        assert list(dataset["feature_other"].values) == ["x0", "x1", "x2"]

    @pytest.mark.parametrize("path", ["schema", "family.name", "family.pivot", "family.options"])
    def test_a_missing_key_is_named(self, path: str) -> None:
        data = drawn("full", 20)[0].to_json()
        *outer, key = path.split(".")
        within: Any = data
        for name in outer:
            within = within[name]
        del within[key]
        with pytest.raises(CorruptError, match=key):
            Story.from_json(data)

    @pytest.mark.parametrize("kind", ["full", "tied", "diag", "spherical"])
    def test_a_story_stored_when_covariance_named_the_family_still_loads(self, kind: str) -> None:
        story = drawn(kind, 50)[0]
        now = story.to_json()
        before = {
            "kind": "mixture",
            "schema": now["schema"],
            "n_components": story.n_components,
            "covariance": kind,
            "prior": story.prior,
            "reg_covar": 0.0,
            "dtype": "float64",
            "pivot": now["family"]["pivot"],
            "family_prior": now["family"]["prior"],
        }
        assert Story.from_json(before).to_json() == now

    def test_a_missing_variable_is_named(self) -> None:
        story, params, _ = drawn("diag", 20)
        dataset = params.to_dataset().drop_vars("family.mean")
        with pytest.raises(CorruptError, match=r"family\.mean"):
            story.params_from(dataset)

    @pytest.mark.parametrize("kind", STORIES)
    def test_a_story_travels_between_processes(self, kind: str) -> None:
        story, params, values = drawn(kind, 40, gaps=0.2)
        back, sent = pickle.loads(pickle.dumps((story, params)))
        rows = Rows.of(values)
        assert oracles.identical(back.e_step(sent, rows), story.e_step(params, rows))


class TestParameterCount:
    @pytest.mark.parametrize(
        ("kind", "expected"),
        [
            ("full", 2 + 3 * 3 + 3 * 6),
            ("tied", 2 + 3 * 3 + 6),
            ("diag", 2 + 3 * 3 + 3 * 3),
            ("spherical", 2 + 3 * 3 + 3),
            ("mixed", 2 + 3 * (2 + 2 + 1 + 1 + 2 + 1)),
        ],
    )
    def test_counts_free_parameters(self, kind: str, expected: int) -> None:
        assert oracles.make_story(kind, 3).n_parameters == expected
        assert (
            len(
                oracles.Coordinates(oracles.make_story(kind, 3)).theta(
                    oracles.random_params(oracles.make_story(kind, 3), np.random.default_rng(0))
                )
            )
            == expected
        )


class TestArguments:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"covariance": "round"}, "round"),
            ({"dtype": "float16"}, "float16"),
            ({"prior": "strong"}, "strong"),
            ({"reg_covar": -1.0}, "reg_covar"),
        ],
    )
    def test_wrong_options_are_named(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            mixture(Schema.real(2), 2, **options)

    def test_components(self) -> None:
        with pytest.raises(ConfigError, match="n_components is 0"):
            mixture(Schema.real(2), 0)

    @pytest.mark.parametrize("covariance", ["full", "tied", "spherical"])
    def test_mixed_columns_are_independent(self, covariance: str) -> None:
        schema = Schema((Column("a"), Column("b", "count")))
        blocks = mixture(schema, 2, covariance=covariance).family.options()["blocks"]
        assert [(b["columns"], b["options"]["covariance"]) for b in blocks] == [
            ([0], covariance),
            ([1], "diag"),
        ]

    def test_covariance_by_default(self) -> None:
        assert mixture(Schema.real(2), 2).family.options()["covariance"] == "full"
        assert mixture(oracles.MIXED, 2).family.options()["covariance"] == "diag"

    @pytest.mark.parametrize("kind", STORIES)
    def test_another_number_of_columns(self, kind: str) -> None:
        story, params, values = drawn(kind, 20)
        with pytest.raises(DataError, match="features"):
            story.log_prob(params, Rows.of(values[:, :-1]))


def test_components_on_the_floor_are_reported() -> None:
    values = np.random.default_rng(0).normal(size=(100, 2))
    values[:50] = 3.0
    story = mixture(Schema.real(["speed", "gap"]), 2, covariance="diag", prior=None)
    story = story.anchored(Rows.of(values))
    resp = np.zeros((100, 2))
    resp[:50, 0] = resp[50:, 1] = 1.0
    params = story.m_step(story.e_step(story.vague(), Rows.of(values), resp), story.vague())
    (warning,) = story.warnings(params)
    assert "component 0" in warning
    assert "speed, gap" in warning
    weak = mixture(Schema.real(2), 2, covariance="diag").anchored(Rows.of(values))
    params = weak.m_step(weak.e_step(weak.vague(), Rows.of(values), resp), weak.vague())
    assert weak.warnings(params) == []
