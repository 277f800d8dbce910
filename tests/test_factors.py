"""Linear-Gaussian factors: both routes against dense Gaussians, closed forms and peers."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import oracles
import pytest

from genstream.families import factors_walk
from genstream.families.gaussian import FullParams
from genstream.learn import BatchEM, FitState, Resident, fit
from genstream.rows import Rows
from genstream.schema import Schema
from genstream.stories import factors, mixture
from genstream.story import Params, Story

ROUTES = ("moments", "latent")
NOISES = tuple(itertools.product(("diagonal", "isotropic"), (False, True)))


def make(d: int, q: int, k: int = 1, **options: Any) -> Story:
    return factors(Schema.real(d), q, k, **options)


def random_params(story: Story, seed: int = 0, apart: float = 3.0) -> Params:
    rng = np.random.default_rng([seed, 1])
    family: Any = story.family
    k, d, q = story.n_components, family.n_features, family.n_factors
    loadings = rng.normal(0, 0.8, (k, d, q))
    shape = {
        (False, False): (k, d),
        (False, True): (d,),
        (True, False): (k,),
        (True, True): (),
    }[family.isotropic, family.shared_noise]
    noise = rng.uniform(0.2, 1.5, shape)
    mean = rng.normal(0, 0.3, (k, d)) + apart * oracles._corners(k, d)
    theta = family.params_type(mean, loadings, noise if shape else float(noise))
    return Params(rng.dirichlet(np.full(k, 8.0)), theta)


def drawn(
    n: int, d: int = 5, q: int = 2, k: int = 3, seed: int = 0, gaps: float = 0.0, **options: Any
) -> tuple[Story, Params, np.ndarray]:
    """An anchored story, parameters, and rows drawn from them."""
    story = make(d, q, k, **options)
    params = random_params(story, seed)
    rng = np.random.default_rng([seed, 2])
    values = oracles.with_gaps(story.draw(params, n, rng).values, gaps, rng)
    return story.anchored(Rows.of(values)), params, values


def dense(story: Story, params: Params) -> tuple[Story, Params]:
    """The same mixture with its covariances written out."""
    theta: Any = params.family
    family: Any = story.family
    noise = family.noise(theta)
    covariance = np.array(
        [w @ w.T + np.diag(psi) for w, psi in zip(theta.loadings, noise, strict=True)]
    )
    full = mixture(story.schema, story.n_components, covariance="full", prior=None)
    return full, Params(params.weights, FullParams(theta.mean, covariance))


def every_pattern(values: np.ndarray) -> np.ndarray:
    """Rows with each pattern of gaps once or more, nothing observed among them."""
    n, d = values.shape
    bits = np.random.default_rng(0).permutation(np.arange(n) % 2**d)
    seen = (bits[:, None] >> np.arange(d)) & 1 == 1
    return np.where(seen, values, np.nan)


def mixed_patterns(values: np.ndarray) -> np.ndarray:
    """Complete rows, two frequent patterns, and rare ones."""
    out = every_pattern(values)
    n = len(out)
    out[: n // 4] = values[: n // 4]
    out[n // 4 : n // 2] = np.where([True, False] + [True] * (values.shape[1] - 2), values, np.nan)[
        n // 4 : n // 2
    ]
    frequent = slice(n // 2, 3 * n // 4)
    out[frequent] = values[frequent]
    out[frequent, 2:] = np.nan
    return np.random.default_rng(1).permutation(out)


def reached(story: Story, values: np.ndarray, params: Params, steps: int = 3000, **o: Any) -> Any:
    learner = BatchEM(steps, o.pop("tolerance", 1e-11), accelerate=o.pop("accelerate", True))
    return fit(story, learner, Resident(Rows.of(values, **o)), FitState(params))


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("noise, shared", NOISES)
class TestDensity:
    def test_is_that_of_the_dense_gaussian_in_every_pattern(
        self, route: str, noise: str, shared: bool
    ) -> None:
        story, params, values = drawn(600, noise=noise, shared_noise=shared, statistics=route)
        full, wide = dense(story, params)
        for rows in (values, every_pattern(values), mixed_patterns(values)):
            np.testing.assert_allclose(
                story.log_prob(params, Rows.of(rows)),
                oracles.log_prob(full, wide, rows),
                rtol=1e-10,
                atol=1e-10,
            )
            np.testing.assert_allclose(
                story.infer(params, Rows.of(rows)).responsibilities,
                np.where(
                    np.isnan(rows).all(axis=1, keepdims=True),
                    params.weights,
                    oracles.responsibilities(full, wide, rows),
                ),
                atol=1e-11,
            )

    def test_factors_have_the_dense_posterior(self, route: str, noise: str, shared: bool) -> None:
        """`t` and `x` are jointly Gaussian: the posterior of `t` is a block of that Gaussian's."""
        story, params, values = drawn(300, noise=noise, shared_noise=shared, statistics=route)
        rows = mixed_patterns(values)
        found = story.factors(params, Rows.of(rows))
        likeliest = story.infer(params, Rows.of(rows)).component
        np.testing.assert_array_equal(found.component, likeliest)
        theta: Any = params.family
        _, wide = dense(story, params)
        for i, x in enumerate(rows):
            k, o = likeliest[i], ~np.isnan(x)
            w = theta.loadings[k]
            inner = oracles.covariance_of(wide.family, k)[np.ix_(o, o)]
            gain = np.linalg.solve(inner, w[o]).T if o.any() else np.zeros((2, 0))
            np.testing.assert_allclose(found.mean[i], gain @ (x[o] - theta.mean[k][o]), atol=1e-10)
            np.testing.assert_allclose(found.covariance[i], np.eye(2) - gain @ w[o], atol=1e-10)


class TestStatistics:
    @pytest.mark.parametrize("patterns", [every_pattern, mixed_patterns, lambda x: x])
    def test_of_the_latent_are_expectations(self, patterns: Any) -> None:
        """Row by row, from the joint Gaussian of `t` and the missing entries."""
        story, params, values = drawn(200, statistics="latent")
        rows = patterns(values)
        weights = np.random.default_rng(3).uniform(0, 2, len(rows))
        found: Any = story.e_step(params, Rows.of(rows, weights)).family
        full, wide = dense(story, params)
        resp = oracles.responsibilities(full, wide, rows) * weights[:, None]
        theta: Any = params.family
        pivot: Any = story.anchor
        k, d, q = theta.loadings.shape
        wanted = [np.zeros(s) for s in ((k,), (k, q), (k, q, q), (k, d), (k, d, q), (k, d))]
        for x, r in zip(rows, resp, strict=True):
            if np.isnan(x).all():
                continue
            for i in range(k):
                first, second = joint_moments(theta, i, x)
                y = (first[q:] - pivot.shift) / pivot.scale
                cross = (second[q:, :q] - np.outer(pivot.shift, first[:q])) / pivot.scale[:, None]
                square = np.diagonal(second)[q:] - 2 * pivot.shift * first[q:] + pivot.shift**2
                parts = (1.0, first[:q], second[:q, :q], y, cross, square / pivot.scale**2)
                for total, part in zip(wanted, parts, strict=True):
                    total[i] += r[i] * part
        names = ("sum_w", "sum_wt", "sum_wtt", "sum_wx", "sum_wxt", "sum_wxx")
        for name, total in zip(names, wanted, strict=True):
            np.testing.assert_allclose(
                getattr(found, name), total, rtol=1e-9, atol=1e-9, err_msg=name
            )

    def test_rare_and_frequent_patterns_agree(self, monkeypatch: pytest.MonkeyPatch) -> None:
        story, params, values = drawn(400, statistics="latent")
        rows = Rows.of(mixed_patterns(values))
        mixed = story.e_step(params, rows)
        monkeypatch.setattr("genstream.families.gaussian_walk.FREQUENT", 10**9)
        monkeypatch.setattr(factors_walk, "LANE_NUMBERS", 1)
        assert oracles.distance(story.e_step(params, rows), mixed) < 1e-11

    def test_components_that_do_not_matter_are_left_out_unseen(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Coarse scores decide which components get a closer look, and nothing else."""
        story, params, values = drawn(400, k=6, statistics="latent")
        rows = Rows.of(values)
        pruned = story.e_step(params, rows)
        monkeypatch.setattr(factors_walk, "DEPTH", 1e9)
        monkeypatch.setattr(factors_walk, "NEGLIGIBLE", 0.0)
        assert oracles.distance(pruned, story.e_step(params, rows)) < 1e-12
        monkeypatch.setattr(factors_walk, "HELD", 0)
        assert oracles.distance(pruned, story.e_step(params, rows)) < 1e-12

    @pytest.mark.parametrize("route", ROUTES)
    def test_do_not_depend_on_chunks(self, route: str) -> None:
        story, params, values = drawn(500, statistics=route)
        rows = mixed_patterns(values)
        whole = story.e_step(params, Rows.of(rows))
        rng = np.random.default_rng(5)
        for _ in range(5):
            cuts = np.sort(rng.integers(0, len(rows) + 1, 3))
            parts = [story.e_step(params, Rows.of(p)) for p in np.split(rows, cuts)]
            total = parts[0].merge(parts[1]).merge(parts[2].merge(parts[3]))
            assert oracles.distance(total, whole) < 1e-10

    def test_rows_with_nothing_observed_may_be_loaded(self) -> None:
        for route in ROUTES:
            story, params, values = drawn(60, statistics=route)
            values[:20] = np.nan
            values[20:30, 1:3] = np.nan
            rows = Rows.of(values)
            walk = story.family.prepare(params.family, np.log(params.weights)).walk(rows)
            order = np.random.default_rng(0).permutation(60)
            resp = np.empty((3, 60))
            for piece in (order[:25], order[25:]):
                walk.load(piece)
                log_joint = walk.score()
                full, wide = dense(story, params)
                np.testing.assert_allclose(
                    log_joint.T, oracles.log_joint(full, wide, values[piece]), atol=1e-9
                )
                resp = np.exp(log_joint - np.logaddexp.reduce(log_joint, axis=0))
                walk.gather(resp)
            assert oracles.distance(walk.close(), story.e_step(params, rows).family) < 1e-10


def joint_moments(theta: Any, k: int, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """E[z] and E[z z'] of `z = (t, x)` given the observed entries of x and the component."""
    w = theta.loadings[k]
    d, q = w.shape
    noise = theta.noise[k]
    joint = np.block([[np.eye(q), w.T], [w, w @ w.T + np.diag(noise)]])
    family = FullParams(np.concatenate([np.zeros(q), theta.mean[k]])[None], joint[None])
    return oracles.conditional_moments(family, 0, np.concatenate([np.full(q, np.nan), x]))
