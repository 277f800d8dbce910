"""How strong priors are: pseudo-rows by the equations, exact modes, stored and read again."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from scipy import optimize, stats

from genstream.errors import ConfigError
from genstream.families.gaussian import NormalWishart
from genstream.learn import BatchEM, FitState, Resident, fit
from genstream.passes import Passes
from genstream.priors import Prior
from genstream.rows import Rows
from genstream.schema import Column, Schema
from genstream.sources import NumpySource
from genstream.start import seed_params
from genstream.stories import factors, latent_factors, mixture
from genstream.story import Story
from genstream.tuning import best_prior, scores

MIXED = Schema(
    (
        Column("a"),
        Column("b"),
        Column("late", "binary"),
        Column("bags", "count"),
        Column("carrier", "categorical", ("AA", "B6", "UA")),
    )
)


def real_rows(n: int = 300, d: int = 3, seed: int = 0) -> Rows:
    rng = np.random.default_rng(seed)
    factor = rng.normal(size=(d, d))
    return Rows.of(rng.normal(size=(n, d)) @ factor + 4 * rng.integers(0, 2, (n, 1)))


def mixed_rows(n: int = 200, seed: int = 0) -> Rows:
    rng = np.random.default_rng(seed)
    values = np.column_stack(
        [
            rng.normal(size=(n, 2)),
            rng.random(n) < 0.3,
            rng.poisson(2.0, n),
            rng.integers(0, 3, n),
        ]
    )
    return Rows.of(values)


def count_rows(d: int = 3) -> Rows:
    return Rows.of(np.random.default_rng(2).poisson(3.0, (150, d)).astype(float))


def counts(d: int = 3) -> Schema:
    return Schema(tuple(Column(f"c{j}", "count") for j in range(d)))


STORIES = {
    "full": (lambda p: mixture(Schema.real(3), 2, prior=p), real_rows),
    "tied": (lambda p: mixture(Schema.real(3), 2, covariance="tied", prior=p), real_rows),
    "diag": (lambda p: mixture(Schema.real(3), 2, covariance="diag", prior=p), real_rows),
    "spherical": (lambda p: mixture(Schema.real(3), 2, covariance="spherical", prior=p), real_rows),
    "student": (lambda p: mixture(Schema.real(3), 2, tails="student", prior=p), real_rows),
    "student diag": (
        lambda p: mixture(Schema.real(3), 2, tails="student", covariance="diag", prior=p),
        real_rows,
    ),
    "mixed": (lambda p: mixture(MIXED, 2, prior=p), mixed_rows),
    "factors": (lambda p: factors(Schema.real(3), 1, 2, prior=p), real_rows),
    "negative binomial": (
        lambda p: mixture(counts(), 2, counts=dict.fromkeys(counts().names, "negative_binomial"),
                          prior=p),
        count_rows,
    ),
    "zero-inflated": (
        lambda p: mixture(counts(), 2, counts=dict.fromkeys(counts().names, "zero_inflated"),
                          prior=p),
        count_rows,
    ),
    "gamma-Poisson": (lambda p: latent_factors(counts(), 1, prior=p), count_rows),
}  # fmt: skip


class TestStrength:
    @pytest.mark.parametrize("name", STORIES)
    def test_is_the_power_of_the_weak_density(self, name):
        # Differences of log densities, since priors are known up to a constant: of parameters that
        # keep the means of Gaussians at those of the prior's, whose own density is no power.
        make, rows = STORIES[name]
        sample = rows()
        weak, strong = (make(p).anchored(sample) for p in ("weak", Prior(7.0)))
        points = [seed_params(weak, sample, np.random.default_rng(i)) for i in range(2)]
        at = [weak.log_prior(p) for p in points], [strong.log_prior(p) for p in points]
        # The normalizer of the mean given the covariance belongs to the first power only.
        once = [normal_part(weak, p) for p in points]
        weak_gap = (at[0][0] - once[0]) - (at[0][1] - once[1])
        strong_gap = (at[1][0] - once[0]) - (at[1][1] - once[1])
        assert strong_gap == pytest.approx(7.0 * weak_gap, rel=1e-8, abs=1e-7)

    @pytest.mark.parametrize("name", STORIES)
    def test_of_one_is_the_weak_prior(self, name):
        make, rows = STORIES[name]
        sample = rows()
        weak, one = (make(p).anchored(sample) for p in ("weak", Prior()))
        params = seed_params(weak, sample, np.random.default_rng(0))
        assert one.log_prior(params) == weak.log_prior(params)

    @pytest.mark.parametrize("name", STORIES)
    def test_learning_climbs(self, name):
        make, rows = STORIES[name]
        sample = rows()
        story = make(Prior(5.0, 0.5, 10.0, 3.0, 2.0)).anchored(sample)
        begun = FitState(seed_params(story, sample, np.random.default_rng(0)))
        state = fit(story, BatchEM(25, 0.0), Resident(sample), begun)
        values = np.array([info.mean_objective for info in state.trace])
        assert (np.diff(values) > -1e-9).all()

    def test_covariance_goes_to_what_the_prior_expects(self):
        sample = real_rows()
        story = mixture(Schema.real(3), 1, prior=Prior(1e9, 0.3)).anchored(sample)
        begun = FitState(story.vague())
        state = fit(story, BatchEM(3), Resident(sample), begun)
        weak = mixture(Schema.real(3), 1).anchored(sample).family.prior
        # 2 d + 3 pseudo-rows.
        wanted = 0.3 * np.diag(weak.scatter) / 9
        np.testing.assert_allclose(state.params.family.covariance[0], wanted, rtol=1e-3, atol=1e-6)

    def test_log_prior_is_inverse_wishart_times_normal(self):
        sample = real_rows()
        story = mixture(Schema.real(3), 1, prior=Prior(4.0, 2.0)).anchored(sample)
        prior = story.family.prior
        rng = np.random.default_rng(3)

        def direct(params):
            c, m = params.family.covariance[0], params.family.mean[0]
            return stats.invwishart.logpdf(c, prior.dof, np.diag(prior.scatter)) + (
                stats.multivariate_normal.logpdf(m, prior.mean, c / prior.strength)
            )

        found, wanted = [], []
        for _ in range(3):
            factor = rng.normal(size=(3, 3)) + 2 * np.eye(3)
            params = story.vague()
            family = replace(
                params.family, mean=rng.normal(size=(1, 3)), covariance=(factor @ factor.T)[None]
            )
            params = replace(params, family=family)
            found.append(story.log_prior(params))
            wanted.append(direct(params))
        np.testing.assert_allclose(np.diff(found), np.diff(wanted), rtol=1e-10)

    def test_frequencies_are_of_their_own(self):
        sample = mixed_rows()
        story = mixture(MIXED, 2, covariance="full", prior=Prior(3.0, frequencies=20.0))
        story = story.anchored(sample)
        found = story.e_step(seed_params(story, sample, np.random.default_rng(0)), sample)
        params = story.m_step(found, story.vague())
        n = found.sum_r
        late = sample.values[:, 2].mean()
        sums = found.family.block1.sum_binary[:, 0]
        wanted = (sums + 20 * (late * 200 + 0.5) / 201) / (n + 20)
        np.testing.assert_allclose(params.family.block1.probability[:, 0], wanted, rtol=1e-12)
        assert story.with_prior(Prior(3.0)).family.prior.block1.rows == 3.0
        assert story.with_prior(Prior(2.0, frequencies=0.5)).family.prior.block1.rows == 0.5

    def test_weights(self):
        sample = real_rows()
        story = mixture(Schema.real(3), 2, prior=Prior(3.0)).anchored(sample)
        assert story.weight_prior == 1.5
        story = mixture(Schema.real(3), 2, prior=Prior(3.0, weights=20.0)).anchored(sample)
        stats_ = story.e_step(seed_params(story, sample, np.random.default_rng(0)), sample)
        params = story.m_step(stats_, story.vague())
        np.testing.assert_allclose(params.weights, (stats_.sum_r + 20) / (300 + 40), rtol=1e-14)


def normal_part(story: Story, params) -> float:
    """What the density of a Gaussian's mean has in front: a power of the variances."""
    total = 0.0
    family, theta = story.family, params.family
    name = family.name
    if name == "product":
        for part, one in family._blocks(theta):
            inner = replace(story, family=part.family)
            total += normal_part(inner, replace(params, family=one))
        return total
    if name == "gaussian" or (name == "student" and not family._apart):
        matrix = theta.covariance if name == "gaussian" else theta.scale
        n = len(theta.mean) if family.tied else 1
        total = -0.5 * n * float(np.linalg.slogdet(matrix)[1].sum())
    elif name in ("columns", "student"):
        variance = theta.variance if name == "columns" else theta.scale
        n = len(family.real) if name == "columns" and family.spherical else 1
        total = -0.5 * n * float(np.log(variance).sum())
    elif name == "factors":
        matrix = theta.loadings @ theta.loadings.swapaxes(1, 2)
        noise = np.broadcast_to(theta.noise, theta.mean.shape)
        matrix = matrix + np.einsum("kd,de->kde", noise, np.eye(noise.shape[1]))
        total = -0.5 * float(np.linalg.slogdet(matrix)[1].sum())
    return total


class TestIndependence:
    def story(self, n_components=1, **options):
        sample = real_rows(60)
        prior = Prior(**{"independence": 25.0, **options})
        return mixture(Schema.real(3), n_components, prior=prior).anchored(sample), sample

    def test_log_prior_is_lkj(self):
        story, sample = self.story()
        plain = mixture(Schema.real(3), 1).anchored(sample)
        params = seed_params(story, sample, np.random.default_rng(0))
        covariance = params.family.covariance[0]
        sd = np.sqrt(np.diag(covariance))
        wanted = 12.5 * np.log(np.linalg.det(covariance / np.outer(sd, sd)))
        gap = story.log_prior(params) - plain.log_prior(params)
        assert gap == pytest.approx(wanted, rel=1e-10)

    def test_m_steps_end_at_the_mode(self):
        story, sample = self.story()
        params = seed_params(story, sample, np.random.default_rng(0))
        found = story.e_step(params, sample)
        for _ in range(60):
            params = story.m_step(found, params)

        def loss(theta):
            factor = np.zeros((3, 3))
            factor[np.tril_indices(3)] = theta[3:]
            family = replace(
                params.family, mean=theta[None, :3], covariance=(factor @ factor.T)[None]
            )
            other = replace(params, family=family)
            return -story.expected_log_joint(other, found) - story.log_prior(other)

        theta = np.concatenate(
            [
                params.family.mean[0],
                np.linalg.cholesky(params.family.covariance[0])[np.tril_indices(3)],
            ]
        )
        best = optimize.minimize(loss, theta, method="BFGS", options={"gtol": 1e-6})
        assert loss(theta) <= best.fun + 1e-7
        np.testing.assert_allclose(theta, best.x, rtol=1e-4, atol=1e-4)

    def test_no_m_step_falls(self):
        story, sample = self.story(2, strength=0.5)
        params = seed_params(story, sample, np.random.default_rng(1))
        found = story.e_step(params, sample)
        last = -np.inf
        for _ in range(8):
            value = story.expected_log_joint(params, found) + story.log_prior(params)
            assert value >= last - 1e-9 * abs(value)
            last = value
            params = story.m_step(found, params)

    @pytest.mark.parametrize("independence", [1e-9, 1e9])
    def test_limits(self, independence):
        story, sample = self.story(independence=independence)
        plain = mixture(Schema.real(3), 1).anchored(sample)
        found = story.e_step(story.vague(), sample)
        params = story.vague()
        for _ in range(3):
            params = story.m_step(found, params)
        covariance = params.family.covariance[0]
        other = plain.m_step(found, plain.vague()).family.covariance[0]
        if independence < 1:
            np.testing.assert_allclose(covariance, other, rtol=1e-7)
        else:
            np.testing.assert_allclose(covariance, np.diag(np.diag(other)), rtol=1e-6, atol=1e-6)

    def test_correlations_shrink_by_pseudo_rows(self):
        rng = np.random.default_rng(0)
        sample = Rows.of(rng.normal(size=(400, 2)) @ np.array([[1.0, 0.1], [0.0, 1.0]]))
        plain, drawn = (
            mixture(Schema.real(2), 1, prior=Prior(1e-3, independence=v)).anchored(sample)
            for v in (0.0, 100.0)
        )
        r = []
        for story in (plain, drawn):
            state = fit(story, BatchEM(20, 0.0), Resident(sample), FitState(story.vague()))
            c = state.params.family.covariance[0]
            r.append(c[0, 1] / np.sqrt(c[0, 0] * c[1, 1]))
        assert r[1] / r[0] == pytest.approx(400 / 500, rel=0.01)


class TestFloor:
    def schema(self):
        return Schema((Column("x"), Column("minute", resolution=1.0), Column("z")))

    def rows(self):
        rng = np.random.default_rng(0)
        x = rng.normal(size=200)
        return Rows.of(np.column_stack([x, np.full(200, 7.0), x + 0.3 * rng.normal(size=200)]))

    @pytest.mark.parametrize("covariance", ["full", "tied", "diag"])
    def test_no_variance_is_below_it(self, covariance):
        story = mixture(self.schema(), 2, covariance=covariance, prior=None)
        sample = self.rows()
        story = story.anchored(sample)
        begun = FitState(seed_params(story, sample, np.random.default_rng(0)), sample=sample)
        state = fit(story, BatchEM(10, 0.0), Resident(sample), begun)
        assert not state.events
        theta = state.params.family
        if covariance == "diag":
            variance = theta.variance[:, 1]
        else:
            matrices = theta.covariance.reshape(-1, 3, 3)
            variance = 1 / np.linalg.inv(matrices)[:, 1, 1]
        np.testing.assert_allclose(variance, 1 / 12, rtol=1e-6)
        at = {j for _, j in story.family.floored(theta)}
        assert at == {1}

    def test_is_the_maximum_among_those_above_it(self):
        # Any covariance above the floor is `diag(floor) + L L'`.
        rng = np.random.default_rng(1)
        values = rng.normal(size=(80, 3)) @ np.diag([1.0, 0.2, 0.05]) @ rng.normal(size=(3, 3))
        sample = Rows.of(values)
        schema = Schema(tuple(Column(f"x{j}", resolution=1.0 + 0.3 * j) for j in range(3)))
        story = mixture(schema, 1, prior=None).anchored(sample)
        floor = np.array([c.least_variance for c in schema.columns])
        found = story.e_step(story.vague(), sample)
        params = story.m_step(found, story.vague())

        def loss(theta):
            factor = theta.reshape(3, 3)
            covariance = np.diag(floor) + factor @ factor.T
            family = replace(params.family, covariance=covariance[None])
            return -story.expected_log_joint(replace(params, family=family), found)

        ends = [optimize.minimize(loss, rng.normal(size=9), method="BFGS").fun for _ in range(4)]
        own = -story.expected_log_joint(params, found)
        assert own == pytest.approx(min(ends), rel=1e-6)
        least = np.linalg.eigvalsh(params.family.covariance[0] - np.diag(floor))[0]
        assert least == pytest.approx(0.0, abs=1e-8)

    def test_a_singular_column_without_one_is_still_singular(self):
        schema = Schema((Column("x", resolution=1.0), Column("y")))
        values = np.column_stack([np.random.default_rng(0).normal(size=50), np.full(50, 3.0)])
        story = mixture(schema, 1, prior=None).anchored(Rows.of(values))
        found = story.e_step(story.vague(), Rows.of(values))
        assert story.maximise(found, story.vague())[1].all()

    @pytest.mark.parametrize("independence", [0.0, 30.0])
    def test_learning_climbs(self, independence):
        rng = np.random.default_rng(0)
        x = rng.normal(size=(300, 2))
        sample = Rows.of(np.column_stack([x, np.round(3 * x[:, 0] + x[:, 1])]))
        schema = Schema((Column("x"), Column("y"), Column("m", resolution=1.0)))
        prior = Prior(0.1, independence=independence)
        story = mixture(schema, 6, prior=prior).anchored(sample)
        begun = FitState(seed_params(story, sample, rng))
        state = fit(story, BatchEM(40, 0.0), Resident(sample), begun)
        values = np.array([info.mean_objective for info in state.trace])
        assert (np.diff(values) > -1e-9).all()
        assert story.family.floored(state.params.family)

    def test_marginal_keeps_the_floor_of_its_columns(self):
        sample = self.rows()
        story = mixture(self.schema(), 2).anchored(sample)
        params = seed_params(story, sample, np.random.default_rng(0))
        narrow, _ = story.marginal(params, ["minute", "z"])
        assert narrow.family.floor == (1 / 12, 0.0)

    def test_needs_a_real_column_and_a_positive_number(self):
        with pytest.raises(ConfigError, match="a count column has no resolution"):
            Column("n", "count", resolution=1.0)
        with pytest.raises(ConfigError, match=r"resolution 0\.0 must be a positive number"):
            Column("x", resolution=0.0)


class TestStored:
    @pytest.mark.parametrize("prior", ["weak", None, Prior(20.0, 0.5, 3.0, 2.0, 1.0), Prior()])
    def test_round_trip(self, prior):
        schema = Schema((Column("x"), Column("minute", resolution=1.0)))
        sample = Rows.of(np.random.default_rng(0).normal(size=(50, 2)))
        story = mixture(schema, 2, prior=prior).anchored(sample)
        again = Story.from_json(json.loads(json.dumps(story.to_json())))
        assert again.prior == prior
        assert again.weight_prior == story.weight_prior
        assert again.schema == schema
        params = seed_params(story, sample, np.random.default_rng(0))
        assert again.log_prior(params) == story.log_prior(params)
        found = story.e_step(params, sample)
        mine, its = story.m_step(found, params), again.m_step(found, params)
        np.testing.assert_array_equal(mine.family.covariance, its.family.covariance)

    def test_of_before_there_was_independence(self):
        told = {"mean": [0.0], "scatter": [1.0], "strength": 0.01, "dof": 3.0}
        from genstream.stats import record_from_json

        prior = record_from_json(NormalWishart, told)
        assert prior.independence == 0.0


class TestOf:
    def test_what_may_be_given(self):
        assert Prior.of("weak") == Prior()
        assert Prior.of(None) is None
        assert Prior.of({"strength": 3, "independence": 2}) == Prior(3, independence=2)
        assert Prior.of(Prior(2.0)) == Prior(2.0)

    @pytest.mark.parametrize(
        ("given", "words"),
        [
            ("strong", "prior 'strong' is not one of weak, None"),
            (3.0, "prior 3.0 is not one of"),
            ({"strenght": 3}, "there is no 'strenght'; there are strength, spread"),
            ({"strength": 0}, "strength is 0: it must be a positive number"),
            ({"spread": float("nan")}, "spread is nan"),
            ({"independence": -1.0}, "independence is -1.0: it must be a number that is not"),
            ({"weights": True}, "weights is True"),
            ({"strength": 1e300}, "strength is 1e[+]300: it must be at most 1e[+]09"),
            ({"spread": 1e300}, "spread is 1e[+]300: it must be at most 1e[+]09"),
            ({"independence": 1e300}, "independence is 1e[+]300: it must be at most 1e[+]09"),
        ],
    )
    def test_what_may_not(self, given, words):
        with pytest.raises(ConfigError, match=words):
            mixture(Schema.real(2), 2, prior=given)


class TestTuned:
    def rows(self, n, seed):
        rng = np.random.default_rng(seed)
        return Rows.of(rng.normal(size=(n, 8)))

    def passes(self, rows):
        return Passes(NumpySource(rows.values, weights=rows.weights, chunk_rows=64), workers=1)

    def test_few_rows_want_what_is_true_of_them(self):
        # Independent columns: a covariance from thirty rows has correlations of chance alone.
        learned, held_out = self.rows(30, 0), self.rows(500, 1)
        story = mixture(Schema.real(8), 1, prior=Prior(0.01)).anchored(learned)
        found = story.e_step(story.vague(), learned)
        priors = [Prior(0.01, independence=v) for v in (0.0, 10.0, 1000.0)]
        best, params, tried = best_prior(story, story.vague(), found, priors, self.passes(held_out))
        assert best.prior == priors[2]
        assert [one.prior for one in tried] == priors
        values = [one.mean_loglik for one in tried]
        assert values == sorted(values)
        assert story.log_prob(params, held_out).mean() == pytest.approx(values[2], rel=1e-12)
        # The same as if the story had been anchored under that prior.
        again = mixture(Schema.real(8), 1, prior=priors[2]).anchored(learned)
        assert again.log_prior(params) == pytest.approx(best.log_prior(params), rel=1e-12)

    def test_weights_and_gaps_of_held_out_rows_count(self):
        learned, held_out = self.rows(30, 0), self.rows(200, 1)
        story = mixture(Schema.real(8), 2).anchored(learned)
        params = seed_params(story, learned, np.random.default_rng(0))
        values = held_out.values.copy()
        values[0] = np.nan
        values[1, :3] = np.nan
        weights = np.arange(200.0)
        rows = Rows.of(values, weights)
        (value,) = scores(
            story, [params], Passes(NumpySource(values, weights=weights, chunk_rows=64), workers=1)
        )
        own = story.log_prob(params, rows)
        assert value == pytest.approx(own[1:] @ weights[1:] / weights[1:].sum(), rel=1e-12)

    def test_maximum_likelihood_has_no_other_prior(self):
        learned = self.rows(30, 0)
        story = mixture(Schema.real(8), 1, prior=None).anchored(learned)
        with pytest.raises(ConfigError, match="anchored under a prior"):
            story.with_prior(Prior())


class TestConfigured:
    def test_reaches_the_story(self, tmp_path):
        from flows.config import load
        from flows.model import make_story

        path = tmp_path / "c.yaml"
        path.write_text(
            "version: 1\n"
            "data: {source: x.parquet, columns: {a: real, m: {kind: real, resolution: 1}}}\n"
            "model: {kind: mixture, n_components: 2, prior: {strength: 5, independence: 40}}\n"
        )
        schema = Schema((Column("a"), Column("m", resolution=1.0)))
        story = make_story(load(path), schema)
        assert story.prior == Prior(5.0, independence=40.0)
        assert story.family.floor == (0.0, 1 / 12)

    @pytest.mark.parametrize("name", Prior.__dataclass_fields__)
    def test_no_number_is_without_bound(self, name):
        from flows import config
        from genstream.priors import MOST_PSEUDO_ROWS

        assert config.MOST_PSEUDO_ROWS == MOST_PSEUDO_ROWS
        plain = {"data": {"source": "x.npy"}, "model": {"n_components": 2}}
        config.validate(plain, [f"model.prior={{{name}: {MOST_PSEUDO_ROWS}}}"])
        with pytest.raises(ConfigError) as told:
            config.validate(plain, [f"model.prior={{{name}: 1e300}}"])
        (line,) = str(told.value).splitlines()
        assert f"prior.{name}: expected less than or equal to 1000000000, got 1e+300" in line

    def test_says_what_is_wrong(self, tmp_path):
        from flows.config import load

        path = tmp_path / "c.yaml"
        path.write_text(
            "version: 1\n"
            "data: {source: x.parquet, columns: {n: {kind: count, resolution: 1}}}\n"
            "model: {kind: mixture, n_components: 2, prior: {strength: 0}}\n"
        )
        with pytest.raises(ConfigError) as told:
            load(path)
        assert "prior" in str(told.value)


class TestWarnings:
    def test_of_many_components_are_one_line(self):
        rng = np.random.default_rng(0)
        values = np.column_stack([rng.normal(size=900), np.repeat(np.arange(9), 100)])
        schema = Schema((Column("x"), Column("m", resolution=0.5)))
        story = mixture(schema, 9, prior=None).anchored(Rows.of(values))
        resp = np.eye(9)[np.repeat(np.arange(9), 100)]
        params = story.m_step(story.e_step(story.vague(), Rows.of(values), resp), story.vague())
        (line,) = story.warnings(params)
        assert line.startswith("9 of 9 components sit on the variance floor, in m:")


class TestEstimators:
    def test_take_a_prior(self):
        from sklearn.base import clone

        from genstream.estimators import GaussianMixture

        prior = Prior(2.0, independence=10.0)
        rows = real_rows(200).values
        model = clone(GaussianMixture(2, prior=prior, n_init=1, random_state=0)).fit(rows)
        assert model.story_.prior == prior
        assert model.story_.family.prior.independence == 10.0
        model.partial_fit(rows[:50])
        with pytest.raises(ConfigError, match="prior 'strong' is not one of weak"):
            GaussianMixture(2, prior="strong").fit(rows)
