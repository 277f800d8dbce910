"""Linear-Gaussian factors: both routes against dense Gaussians, closed forms and peers."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import oracles
import pytest
from scipy import optimize, stats
from sklearn.datasets import load_digits
from sklearn.decomposition import FactorAnalysis

from genstream.errors import ConfigError
from genstream.families import factors_walk
from genstream.families.factors import FLOOR, Factors
from genstream.families.gaussian import FullParams
from genstream.families.low_rank import NoisePrior, best_loadings, diagonal_noise, spherical_noise
from genstream.families.rotation import varimax
from genstream.incremental import IncrementalEM
from genstream.learn import BatchEM, FitState, Outcome, Resident, fit
from genstream.passes import Passes
from genstream.rows import Rows
from genstream.schema import Column, Schema
from genstream.sources import NumpySource
from genstream.start import warm_start
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
        monkeypatch.setattr("genstream.families.factors_walk.FREQUENT", 10**9)
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
    noise, q = theta.noise[k], w.shape[1]
    joint = np.block([[np.eye(q), w.T], [w, w @ w.T + np.diag(noise)]])
    family = FullParams(np.concatenate([np.zeros(q), theta.mean[k]])[None], joint[None])
    return oracles.conditional_moments(family, 0, np.concatenate([np.full(q, np.nan), x]))


class TestMaximum:
    """What the M-step finds, and where EM ends."""

    @pytest.mark.parametrize("route", ROUTES)
    @pytest.mark.parametrize("noise, shared", NOISES)
    @pytest.mark.parametrize("gaps", [0.0, 0.3])
    def test_em_never_falls(self, route: str, noise: str, shared: bool, gaps: float) -> None:
        cases: list[tuple[str | None, tuple[str, ...]]] = [
            (None, ()),
            ("weak", ()),
            ("weak", ("mean",)),
            (None, ("loadings",)),
            ("weak", ("noise",)),
            (None, ("mean", "noise", "weights")),
            ("weak", ("mean", "loadings")),
        ]
        for prior, frozen in cases:
            story, _, values = drawn(
                200,
                d=6,
                gaps=gaps,
                noise=noise,
                shared_noise=shared,
                statistics=route,
                prior=prior,
                frozen=frozen,
            )
            weights = np.random.default_rng(4).uniform(0, 2, len(values))
            rows = Rows.of(values, weights)
            begin = params = random_params(story, seed=7, apart=2.0)
            last = -np.inf
            for _ in range(6):
                found = story.e_step(params, rows)
                objective = found.objective + story.log_prior(params)
                assert objective > last - 1e-9 * abs(objective), (prior, frozen)
                last, params = objective, story.m_step(found, params)
            for name in frozen:
                record: Any = params if name == "weights" else params.family
                old: Any = begin if name == "weights" else begin.family
                assert np.array_equal(getattr(record, name), getattr(old, name)), name

    @pytest.mark.parametrize("route", ROUTES)
    @pytest.mark.parametrize(
        "noise, shared, prior, frozen",
        [
            ("diagonal", False, "weak", ()),
            ("diagonal", False, "weak", ("mean",)),
            ("diagonal", False, "weak", ("loadings",)),
            ("diagonal", False, None, ("noise",)),
            ("diagonal", True, None, ("mean",)),
            ("isotropic", False, None, ()),
            ("isotropic", True, "weak", ()),
        ],
    )
    def test_where_em_ends_the_observed_objective_is_flat(
        self, route: str, noise: str, shared: bool, prior: str | None, frozen: tuple[str, ...]
    ) -> None:
        """With gaps: the dense likelihood of what was observed, plus the prior written out, has no
        slope left along anything that is not frozen.
        """
        story, params, values = drawn(
            200,
            d=4,
            q=1,
            k=2,
            gaps=0.2,
            noise=noise,
            shared_noise=shared,
            statistics=route,
            prior=prior,
            frozen=frozen,
        )
        state = reached(story, values, params, tolerance=1e-10)
        assert state.outcome is Outcome.CONVERGED
        at = state.params
        free = [n for n in ("mean", "loadings", "noise") if n not in frozen]
        for name in free:
            value = np.atleast_1d(getattr(at.family, name))
            for i in range(value.size):
                ends = []
                for sign in (1, -1):
                    moved = value.copy()
                    moved.flat[i] *= np.exp(sign * 1e-4) if name == "noise" else 1.0
                    moved.flat[i] += 0.0 if name == "noise" else sign * 1e-4
                    leaf = moved if np.ndim(getattr(at.family, name)) else float(moved[0])
                    there = replace(at, family=replace(at.family, **{name: leaf}))
                    ends.append(objective(story, there, values))
                assert abs(ends[0] - ends[1]) / 2e-4 < 0.02, (name, i)

    @pytest.mark.parametrize("route", ROUTES)
    def test_the_bound_of_incremental_em_never_falls(self, route: str) -> None:
        story, _, values = drawn(600, k=2, gaps=0.2, statistics=route)
        passes = Passes(NumpySource(values, chunk_rows=100))
        learner = IncrementalEM(max_passes=4, tolerance=0.0, tasks=6, group=2)
        state = fit(story, learner, passes, FitState(random_params(story, seed=7, apart=2.0)))
        gains = np.diff([info.mean_objective for info in state.trace])
        assert len(gains) > 6
        assert gains.min() > -1e-9

    @pytest.mark.parametrize("noise, shared", NOISES)
    @pytest.mark.parametrize("prior", ["weak", None])
    def test_both_routes_end_at_the_same_place(
        self, noise: str, shared: bool, prior: str | None
    ) -> None:
        ends = []
        for route in ROUTES:
            story, params, values = drawn(
                300, k=2, noise=noise, shared_noise=shared, statistics=route, prior=prior
            )
            ends.append((story, reached(story, values, params)))
        (one, first), (two, second) = ends
        assert first.trace[-1].mean_objective == pytest.approx(
            second.trace[-1].mean_objective, abs=1e-7
        )
        a, b = dense(one, first.params), dense(two, second.params)
        assert oracles.distance(a[1], b[1]) < 1e-3

    def test_gaps_end_where_direct_maximisation_does(self) -> None:
        """L-BFGS on the observed-data likelihood of a dense Gaussian, from the same start."""
        story, params, values = drawn(150, d=4, q=1, k=1, gaps=0.25, prior=None)

        def build(theta: np.ndarray) -> Params:
            mean, w, log_noise = np.split(theta, 3)
            family = story.family.params_type(mean[None], w[None, :, None], np.exp(log_noise)[None])
            return Params(np.ones(1), family)

        begin: Any = params.family
        result = optimize.minimize(
            lambda theta: -objective(story, build(theta), values),
            np.concatenate([begin.mean[0], begin.loadings[0, :, 0], np.log(begin.noise[0])]),
            method="L-BFGS-B",
            options={"maxiter": 300, "ftol": 1e-12},
        )
        for route in ROUTES:
            again = make(4, 1, prior=None, statistics=route).anchored(Rows.of(values))
            state = reached(again, values, params, tolerance=1e-9)
            assert state.trace[-1].loglik == pytest.approx(-result.fun, abs=1e-4)

    def test_ppca_is_the_eigen_decomposition(self) -> None:
        """Tipping & Bishop (1999), eq. 7 and 8, after one pass."""
        story, _, values = drawn(500, d=8, q=3, k=1, noise="isotropic", prior=None)
        rows = Rows.of(values)
        theta: Any = story.m_step(story.e_step(story.vague(), rows), story.vague()).family
        value, vector = np.linalg.eigh(np.cov(values.T, bias=True))
        left = value[:-3].mean()
        assert theta.noise[0] == pytest.approx(left, rel=1e-10)
        signal = (vector[:, -3:] * (value[-3:] - left)) @ vector[:, -3:].T
        np.testing.assert_allclose(theta.loadings[0] @ theta.loadings[0].T, signal, atol=1e-10)
        np.testing.assert_allclose(theta.mean[0], values.mean(axis=0), atol=1e-12)

    def test_complete_rows_of_one_component_need_one_pass(self) -> None:
        for noise in ("diagonal", "isotropic"):
            for prior in ("weak", None):
                story, _, values = drawn(300, d=7, k=1, noise=noise, prior=prior)
                state = reached(story, values, story.vague(), tolerance=1e-9)
                gains = np.diff([info.mean_objective for info in state.trace])
                assert state.outcome is Outcome.CONVERGED
                assert np.abs(gains[1:]).max(initial=0.0) < 1e-9

    def test_factor_analysis_is_that_of_scikit_learn(self) -> None:
        values = drawn(400, d=8, q=2, k=1)[2]
        story = make(8, 2, prior=None).anchored(Rows.of(values))
        state = reached(story, values, story.vague())
        peer = FactorAnalysis(2, tol=1e-9, max_iter=20_000, svd_method="lapack").fit(values)
        theta: Any = state.params.family
        np.testing.assert_allclose(theta.noise[0], peer.noise_variance_, rtol=1e-3)
        w = peer.components_.T
        np.testing.assert_allclose(
            theta.loadings[0] @ theta.loadings[0].T, w @ w.T, rtol=0, atol=2e-3
        )
        mean = story.log_prob(state.params, Rows.of(values)).mean()
        assert mean == pytest.approx(peer.score(values), abs=1e-6)
        assert mean >= peer.score(values) - 1e-9

    def test_all_directions_but_one_make_a_full_mixture(self) -> None:
        """With q = d - 1 every covariance is possible."""
        _, params, values = drawn(400, d=4, q=3, k=2)
        story = make(4, 3, 2, prior=None).anchored(Rows.of(values))
        full, wide = dense(story, params)
        full = full.anchored(Rows.of(values))
        ours, theirs = reached(story, values, params), reached(full, values, wide)
        assert ours.trace[-1].mean_loglik == pytest.approx(theirs.trace[-1].mean_loglik, abs=1e-5)

    def test_diagonal_noise_beats_any_neighbour(self) -> None:
        rng = np.random.default_rng(0)
        d, q = 6, 2
        w = rng.normal(size=(2, d, q))
        moment = w @ w.swapaxes(1, 2) + np.array([np.diag(rng.uniform(0.3, 2, d)) for _ in w])
        moment += 0.1 * np.cov(rng.normal(size=(d, 30)))
        count = np.array([30.0, 80.0])
        prior = NoisePrior(5.0, rng.uniform(0.5, 2, d), np.full(d, 1e-9))

        def value(noise: np.ndarray, loadings: np.ndarray | None) -> float:
            found = loadings
            if found is None:
                found = best_loadings(moment, np.tile(noise, (2, 1)), q)
            total = -0.5 * float((prior.weight * np.log(noise) + prior.pull / noise).sum())
            for s, n, b in zip(moment, count, found, strict=True):
                c = b @ b.T + np.diag(noise)
                total -= 0.5 * n * (np.linalg.slogdet(c)[1] + np.trace(np.linalg.solve(c, s)))
            return total

        for given in (None, w):
            found = diagonal_noise(moment, count, np.ones(d), prior, n_factors=q, loadings=given)
            peak = optimize.minimize(
                lambda t, g=given: -value(np.exp(t), g),
                np.log(found),
                method="Nelder-Mead",
                options={"maxfev": 2000, "xatol": 1e-8, "fatol": 1e-10},
            )
            assert value(found, given) >= -peak.fun - 1e-7

    def test_spherical_noise_counts_small_eigenvalues_in(self) -> None:
        """Where a component's factors find less than the noise, they are left out."""
        moment = np.array([np.diag([9.0, 0.5, 1.0, 1.0]), np.diag([1.2, 1.1, 0.9, 0.8])])
        count = np.array([10.0, 40.0])
        prior = NoisePrior(3.0, np.array([6.0]), np.array([1e-9]))
        found = spherical_noise(moment, count, 2, prior)

        def value(noise: float) -> float:
            total = -0.5 * (3.0 * np.log(noise) + 6.0 / noise)
            for s, n in zip(moment, count, strict=True):
                b = best_loadings(s[None], np.full((1, 4), noise), 2)[0]
                c = b @ b.T + noise * np.eye(4)
                total -= 0.5 * n * (np.linalg.slogdet(c)[1] + np.trace(np.linalg.solve(c, s)))
            return total

        grid = found * np.exp(np.linspace(-1, 1, 201))
        assert value(found) >= max(map(value, grid)) - 1e-12


def objective(story: Story, params: Params, values: np.ndarray) -> float:
    """Observed-data log-likelihood plus log prior, entry by entry from scipy.stats."""
    full, wide = dense(story, params)
    total = float(oracles.log_prob(full, wide, values).sum())
    prior: Any = story.family.prior
    if prior is None:
        return total
    theta: Any = params.family
    k = story.n_components
    noise = np.atleast_1d(theta.noise)
    scatter = prior.scatter.mean() if story.family.isotropic else prior.scatter
    total += float(stats.invgamma.logpdf(noise, prior.dof / 2, scale=scatter / 2).sum())
    for i in range(k):
        total += stats.multivariate_normal.logpdf(
            theta.mean[i], prior.mean, wide.family.covariance[i] / prior.strength
        )
    return total + float(np.log(params.weights).sum()) / k


@pytest.mark.parametrize("route", ROUTES)
class TestViews:
    """Draws, gaps filled, margins and conditions."""

    @pytest.mark.parametrize("noise, shared", NOISES)
    def test_margins_and_conditions_are_those_of_the_dense_mixture(
        self, route: str, noise: str, shared: bool
    ) -> None:
        story, params, values = drawn(50, noise=noise, shared_noise=shared, statistics=route)
        some = values[:, [1, 3, 4]]
        part, theta = story.marginal(params, ["x4", "x1", "x3"])
        whole = np.full((50, 5), np.nan)
        whole[:, [1, 3, 4]] = some
        full, wide = dense(story, params)
        np.testing.assert_allclose(
            part.log_prob(theta, Rows.of(some)), oracles.log_prob(full, wide, whole), rtol=1e-10
        )
        left, given = story.condition(params, {"x0": values[0, 0], "x2": values[0, 2]})
        whole = np.full((50, 5), np.nan)
        whole[:, [0, 2]] = values[0, [0, 2]]
        known = oracles.log_prob(full, wide, whole)
        whole[:, [1, 3, 4]] = some
        np.testing.assert_allclose(
            left.log_prob(given, Rows.of(some)),
            oracles.log_prob(full, wide, whole) - known,
            atol=1e-10,
        )
        assert left.n_factors == 2

    def test_gaps_are_filled_with_conditional_means(self, route: str) -> None:
        story, params, values = drawn(120, statistics=route)
        rows = mixed_patterns(values)
        found = story.impute(params, Rows.of(rows))
        full, wide = dense(story, params)
        resp = oracles.responsibilities(full, wide, rows)
        resp[np.isnan(rows).all(axis=1)] = params.weights
        for i, x in enumerate(rows):
            means = [oracles.conditional_moments(wide.family, k, x)[0] for k in range(3)]
            np.testing.assert_allclose(found[i], resp[i] @ np.array(means), atol=1e-9)
        seen = ~np.isnan(rows)
        assert np.array_equal(found[seen], rows[seen])

    def test_gaps_are_drawn_from_the_conditional(self, route: str) -> None:
        story, params, values = drawn(1, k=2, statistics=route)
        x = values[0].copy()
        x[[1, 2, 4]] = np.nan
        n = 20_000
        draws = story.impute(params, Rows.of(np.tile(x, (n, 1))), np.random.default_rng(0))
        left, given = story.condition(params, {"x0": x[0], "x3": x[3]})
        free = draws[:, [1, 2, 4]]
        theta: Any = given.family
        shape = dense(left, given)[1].family.covariance
        mean = given.weights @ theta.mean
        about = theta.mean - mean
        covariance = np.einsum("k,kij->ij", given.weights, shape)
        covariance += (about * given.weights[:, None]).T @ about
        size = np.sqrt(np.diagonal(covariance))
        np.testing.assert_allclose(free.mean(axis=0), mean, atol=5 * size.max() / np.sqrt(n))
        np.testing.assert_allclose(np.cov(free.T), covariance, atol=0.06 * size.max() ** 2)

    def test_drawn_rows_lead_back_to_their_parameters(self, route: str) -> None:
        story, params, values = drawn(6000, d=6, q=2, k=2, seed=3, statistics=route)
        story, state = warm_start(story, Passes(NumpySource(values)), n_init=2, seed=1)
        state = reached(story, values, state.params, steps=300, tolerance=1e-7)
        mean = state.trace[-1].mean_loglik
        assert mean > story.log_prob(params, Rows.of(values)).mean() - 1e-3
        found, true = (dense(story, p)[1].family for p in (state.params, params))
        order = [int(np.abs(found.mean - m).sum(axis=1).argmin()) for m in true.mean]
        assert sorted(order) == [0, 1]
        np.testing.assert_allclose(found.mean[order], true.mean, atol=0.15)
        np.testing.assert_allclose(found.covariance[order], true.covariance, atol=0.35)
        # The factors span the same plane.
        for k, j in enumerate(order):
            a = np.linalg.qr(params.family.loadings[k])[0]
            b = np.linalg.qr(state.params.family.loadings[j])[0]
            assert np.linalg.svd(a.T @ b)[1].min() > 0.98

    def test_draws_hold_their_factors(self, route: str) -> None:
        story, params, _ = drawn(10, statistics=route)
        draw = story.draw(params, 4000, np.random.default_rng(2))
        theta: Any = params.family
        assert draw.factors is not None
        signal = theta.mean[draw.component] + np.einsum(
            "ndq,nq->nd", theta.loadings[draw.component], draw.factors
        )
        noise = (draw.values - signal) / np.sqrt(theta.noise[draw.component])
        np.testing.assert_allclose(np.cov(draw.factors.T), np.eye(2), atol=0.08)
        np.testing.assert_allclose(np.cov(noise.T), np.eye(5), atol=0.08)

    def test_survives_json_and_datasets(self, route: str) -> None:
        for noise, shared in NOISES:
            story, params, values = drawn(
                60, noise=noise, shared_noise=shared, statistics=route, frozen=["noise"]
            )
            again = Story.from_json(story.to_json())
            assert again.to_json() == story.to_json()
            rows = Rows.of(values)
            one, two = story.e_step(params, rows), again.e_step(params, rows)
            assert oracles.identical(one, two)
            kept = story.params_from(params.to_dataset(story.labels()))
            assert oracles.identical(kept, params)
            assert oracles.identical(story.stats_from(one.to_dataset()), one)


@pytest.mark.parametrize("route", ROUTES)
class TestArithmetic:
    def test_float32_is_close(self, route: str) -> None:
        for gaps in (0.0, 0.2):
            double, params, values = drawn(2000, d=12, q=3, k=4, gaps=gaps, statistics=route)
            single = replace(double, family=double.family.with_dtype("float32"))
            rows = Rows.of(values)
            one, two = double.e_step(params, rows), single.e_step(params, rows)
            assert two.objective == pytest.approx(one.objective, rel=1e-6)
            a, b = double.m_step(one, params), single.m_step(two, params)
            assert oracles.distance(dense(double, b)[1], dense(double, a)[1]) < 1e-4

    def test_thin_noise_far_from_the_pivot_keeps_its_digits(self, route: str) -> None:
        """Deviation of the noise 0.003 at spread 3, where plain float32 is several percent off."""
        rng = np.random.default_rng(8)
        d, n = 6, 4000
        mean = np.array([[-3.0] * d, [3.0] * d])
        loadings = rng.normal(size=(2, d, 1))
        noise = np.full((2, d), 1e-5)
        t = rng.normal(size=(n, 1))
        values = mean[np.arange(n) % 2] + t * loadings[np.arange(n) % 2, :, 0]
        values += np.sqrt(1e-5) * rng.normal(size=(n, d))
        story = make(d, 1, 2, statistics=route, dtype="float32", prior=None)
        story = story.anchored(Rows.of(values))
        params = Params(np.full(2, 0.5), story.family.params_type(mean, loadings, noise))
        full, wide = dense(story, params)
        np.testing.assert_allclose(
            story.log_prob(params, Rows.of(values)),
            oracles.log_prob(full, wide, values),
            atol=1e-2,
        )
        double = replace(story, family=story.family.with_dtype("float64"))
        ends = []
        for each in (story, double):
            at = params
            for _ in range(3):
                at = each.m_step(each.e_step(at, Rows.of(values)), at)
            ends.append(at.family.noise)
        np.testing.assert_allclose(ends[0], ends[1], rtol=1e-3)

    def test_an_offset_changes_nothing_but_means(self, route: str) -> None:
        _, params, values = drawn(400, k=2)
        values = np.round(values * 2**16) / 2**16
        ends = []
        for offset in (0.0, 1e6):
            story = make(5, 2, 2, statistics=route, prior=None)
            story = story.anchored(Rows.of(values + offset))
            theta: Any = params.family
            at = replace(params, family=replace(theta, mean=theta.mean + offset))
            for _ in range(4):
                at = story.m_step(story.e_step(at, Rows.of(values + offset)), at)
            found: Any = dense(story, at)[1].family
            ends.append(replace(found, mean=found.mean - offset))
        assert oracles.distance(ends[1], ends[0]) < 1e-8

    def test_scales_of_columns_do_not_matter(self, route: str) -> None:
        scale = 2.0 ** np.array([-60.0, 0.0, 70.0, 3.0, -2.0])
        story, params, values = drawn(300, gaps=0.2, statistics=route)
        wide = make(5, 2, 3, statistics=route).anchored(Rows.of(values * scale))
        theta: Any = params.family
        one = dense(story, story.m_step(story.e_step(params, Rows.of(values)), params))[1]
        big = replace(
            params,
            family=story.family.params_type(
                theta.mean * scale, theta.loadings * scale[:, None], theta.noise * scale**2
            ),
        )
        two = dense(wide, wide.m_step(wide.e_step(big, Rows.of(values * scale)), big))[1]
        a: Any = one.family
        b: Any = two.family
        np.testing.assert_allclose(b.mean / scale, a.mean, atol=1e-9)
        np.testing.assert_allclose(b.covariance / np.outer(scale, scale), a.covariance, atol=1e-9)

    def test_poor_data_end_in_numbers(self, route: str) -> None:
        """Constant and unobserved columns, fewer rows than factors, an empty component."""
        rng = np.random.default_rng(0)
        values = rng.normal(size=(40, 5))
        values[:, 1] = 3.0
        values[:, 2] = np.nan
        values[:, 3] = values[:, 0]
        for prior in ("weak", None):
            for noise, shared in NOISES:
                story = make(
                    5, 3, 3, prior=prior, noise=noise, shared_noise=shared, statistics=route
                ).anchored(Rows.of(values))
                params = random_params(story)
                params = replace(
                    params, family=replace(params.family, mean=params.family.mean * 1e3)
                )
                for rows in (values, values[:2]):
                    for _ in range(5):
                        params = story.m_step(story.e_step(params, Rows.of(rows)), params)
                        assert oracles.finite(params)
                    assert np.isfinite(story.log_prob(params, Rows.of(rows))).all()

    def test_statistics_are_extrapolated_only_into_possible_ones(self, route: str) -> None:
        story, params, values = drawn(200, k=2, statistics=route)
        rows = Rows.of(values)
        first = story.e_step(params, rows)
        second = story.e_step(story.m_step(first, params), rows)
        for a in (1.5, 4.0, 50.0, 1e4):
            far = first.scale(1 - a).merge(second.scale(a))
            possible = story.possible(far, second)
            if possible is not None:
                assert oracles.finite(story.m_step(possible, params))
        assert story.possible(second, second) is not None


class TestHeywood:
    def test_noise_stays_on_its_floor_and_is_named(self) -> None:
        """Two columns that are the same but for nothing: their factor takes them whole."""
        rng = np.random.default_rng(3)
        values = rng.normal(size=(300, 4))
        values[:, 1] = values[:, 0]
        story = make(4, 1, prior=None).anchored(Rows.of(values))
        state = reached(story, values, story.vague(), steps=200)
        assert state.outcome is Outcome.CONVERGED
        _, _, noise = story.family.pivoted(state.params.family)
        assert noise[0, :2] == pytest.approx(FLOOR, rel=0.01)
        assert story.family.floored(state.params.family) == [(0, 0), (0, 1)]
        assert "x0, x1" in story.warnings(state.params)[0]
        weak = make(4, 1).anchored(Rows.of(values))
        found = reached(weak, values, weak.vague(), steps=200)
        assert weak.family.floored(found.params.family) == []


def test_digits_are_described_as_by_scikit_learn() -> None:
    """597 held out images: better than the peer for each number of factors."""
    x = load_digits().data
    order = np.random.RandomState(42).permutation(len(x))
    test, train = x[order[:597]], x[order[597:]]
    # A pixel that is always 0 has no density: the peer's is that of its own floor.
    lit = train.std(axis=0) > 0
    for q in (5, 10, 20):
        peer = FactorAnalysis(q, svd_method="lapack").fit(train[:, lit])
        story = make(int(lit.sum()), q, prior=None).anchored(Rows.of(train[:, lit]))
        params = story.vague()
        params = story.m_step(story.e_step(params, Rows.of(train[:, lit])), params)
        assert story.log_prob(params, Rows.of(train[:, lit])).mean() > peer.score(train[:, lit])
        held_out = story.log_prob(params, Rows.of(test[:, lit])).mean()
        assert held_out > peer.score(test[:, lit]) - 0.1


class TestVarimax:
    def test_simple_structure_is_found_again(self) -> None:
        rng = np.random.default_rng(0)
        simple = np.zeros((9, 3))
        for f in range(3):
            simple[3 * f : 3 * f + 3, f] = rng.uniform(0.5, 1.0 + f, 3)
        turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
        for normalise in (True, False):
            rotated, rotation = varimax(simple @ turn, normalise=normalise)
            np.testing.assert_allclose(rotation.T @ rotation, np.eye(3), atol=1e-12)
            np.testing.assert_allclose(simple @ turn @ rotation, rotated, atol=1e-12)
            order = np.argsort(-(simple**2).sum(axis=0))
            np.testing.assert_allclose(rotated, simple[:, order], atol=1e-5)

    def test_no_rotation_has_a_higher_criterion(self) -> None:
        rng = np.random.default_rng(1)
        loadings = rng.normal(size=(12, 2))
        best, _ = varimax(loadings, normalise=False)

        def criterion(b: np.ndarray) -> float:
            return float((b**2).var(axis=0).sum())

        for angle in np.linspace(0, np.pi, 180):
            turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
            assert criterion(loadings @ turn) <= criterion(best) + 1e-9


class TestBuilder:
    def test_says_what_does_not_fit(self) -> None:
        wrong: list[tuple[str, dict[str, Any]]] = [
            ("n_factors is 5", {"n_factors": 5}),
            ("n_factors is 0", {"n_factors": 0}),
            ("noise 'full'", {"noise": "full"}),
            ("statistics 'all'", {"statistics": "all"}),
            ("dtype 'int8'", {"dtype": "int8"}),
            ("prior 'strong'", {"prior": "strong"}),
            ("n_components is 0", {"n_components": 0}),
            ("'covariance'", {"frozen": ["covariance"]}),
        ]
        for message, options in wrong:
            with pytest.raises(ConfigError, match=message):
                factors(Schema.real(5), **{"n_factors": 2, **options})
        columns = (Column("a", "real"), Column("b", "binary"), Column("c", "real"))
        with pytest.raises(ConfigError, match="'b' is binary"):
            factors(Schema(columns), 1)

    def test_takes_moments_where_they_are_few(self) -> None:
        def taken(d: int, k: int) -> str:
            family = factors(Schema.real(d), 2, k).family
            assert isinstance(family, Factors)
            return family.statistics

        assert [taken(64, 50), taken(256, 16), taken(256, 17), taken(300, 1)] == [
            "moments",
            "moments",
            "latent",
            "latent",
        ]

    def test_counts_parameters_up_to_rotation(self) -> None:
        assert make(6, 2).n_parameters == 6 + 6 * 2 - 1 + 6
        assert make(6, 2, 3, noise="isotropic").n_parameters == 2 + 3 * (6 + 11) + 3
        assert make(6, 2, 3, shared_noise=True).n_parameters == 2 + 3 * (6 + 11) + 6
        # With all directions but one there are as many as a full covariance has.
        assert make(4, 3).n_parameters >= 4 + 10
