"""Student-t components against scipy's multivariate t, quadrature over the scale of a row, and
direct maximisation.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import laws
import numpy as np
import oracles
import pytest
from scipy import integrate, optimize, special, stats

from genstream.families import student
from genstream.families.student import Student
from genstream.rows import Rows
from genstream.schema import Schema
from genstream.story import Params, Story

Array = np.ndarray[Any, Any]
SHAPES = ("full", "tied", "diag", "spherical")
every_shape = pytest.mark.parametrize("shape", SHAPES)
with_and_without_prior = pytest.mark.parametrize("prior", ["weak", None])


def told(
    shape: str,
    *,
    d: int = 3,
    k: int = 2,
    n: int = 300,
    gaps: float = 0.25,
    seed: int = 0,
    prior: str | None = "weak",
    dtype: str = "float64",
    dof: tuple[float, ...] = (3.0, 8.0, 30.0),
) -> tuple[Story, Params, Array]:
    """A story, its parameters, and rows drawn from them with some of their entries missing."""
    rng = np.random.default_rng([seed, 3])
    family = Student(d, shape, dtype=dtype)
    factor = np.tril(rng.normal(0, 0.4, (k, d, d)), -1) + np.eye(d) * rng.uniform(
        0.6, 1.4, (k, 1, d)
    )
    full = factor @ factor.swapaxes(1, 2)
    variance = np.diagonal(full, axis1=1, axis2=2)
    scale = {"full": full, "tied": full[0], "diag": variance, "spherical": variance[:, 0]}[shape]
    mean = rng.normal(0, 0.3, (k, d)) + 4 * np.arange(k)[:, None] * (-1) ** np.arange(d)
    weights = rng.dirichlet(np.full(k, 8.0))
    params = Params(weights, family.params_type(mean, scale.copy(), np.array(dof[:k])))
    story = Story(Schema.real(d), family, k, prior)
    values = story.draw(params, n, rng).values
    if gaps:
        values = oracles.with_gaps(values, gaps, rng)
    return story.anchored(Rows.of(values)), params, values


def scale_of(story: Story, params: Params, k: int) -> Array:
    """(d, d) scale matrix of one component."""
    family: Any = params.family
    scale, d = family.scale, story.schema.n_features
    shape = story.family.options()["covariance"]
    if shape == "tied":
        return np.asarray(scale)
    if shape == "full":
        return np.asarray(scale[k])
    return np.asarray(scale[k] * np.eye(d) if shape == "spherical" else np.diag(scale[k]))


def brute_log_joint(story: Story, params: Params, values: Array) -> Array:
    """(n, K) of `log weight_k + log p(x_observed | k)`, row by row, by scipy."""
    out = np.tile(np.log(params.weights), (len(values), 1))
    family: Any = params.family
    seen = ~np.isnan(values)
    for pattern in np.unique(seen[seen.any(axis=1)], axis=0):
        rows = (seen == pattern).all(axis=1)
        for k in range(story.n_components):
            scale = scale_of(story, params, k)[np.ix_(pattern, pattern)]
            t = stats.multivariate_t(family.mean[k][pattern], scale, df=family.dof[k])
            out[rows, k] += t.logpdf(values[np.ix_(rows, pattern)])
    return out


def brute_log_prob(story: Story, params: Params, values: Array) -> Array:
    empty = np.isnan(values).all(axis=1)
    joint = brute_log_joint(story, params, values)
    return np.where(empty, 0.0, special.logsumexp(joint, axis=1))


def brute_log_prior(story: Story, params: Params) -> float:
    """By scipy, normalised where the library drops constants; the degrees of freedom are flat."""
    if story.prior is None:
        return 0.0
    family, prior = params.family, story.family.prior
    assert isinstance(family, student.StudentParams)
    assert prior is not None
    told: Any = prior
    k = story.n_components
    total = float(stats.dirichlet.logpdf(params.weights, np.full(k, 1 + 1 / k))) if k > 1 else 0.0
    shape = story.family.options()["covariance"]
    matrices = [family.scale] if shape == "tied" else family.scale
    for scale in matrices:
        if shape in ("full", "tied"):
            total += stats.invwishart.logpdf(scale, told.dof, np.diag(told.scatter))
        elif shape == "diag":
            terms = stats.invgamma.logpdf(scale, told.dof / 2, scale=told.scatter / 2)
            total += float(terms.sum())
        else:
            scatter = told.scatter.mean()
            total += float(stats.invgamma.logpdf(scale, told.dof / 2, scale=scatter / 2))
    for i in range(k):
        wide = scale_of(story, params, i) / told.strength
        total += float(stats.multivariate_normal.logpdf(family.mean[i], told.mean, wide))
    return total


def quadrature(params: Params, k: int, scale: Array, x: Array) -> tuple[float, ...]:
    """log p(x_O), E[u], E[log u], E[u x], E[u x x'] of one row by integrals over its scale u."""
    family: Any = params.family
    o, dof, mean = ~np.isnan(x), family.dof[k], family.mean[k]
    m = ~o
    gain = np.linalg.solve(scale[np.ix_(o, o)], scale[np.ix_(o, m)]).T
    first = x.copy()
    first[m] = mean[m] + gain @ (x[o] - mean[o])
    spare = np.zeros_like(scale)
    spare[np.ix_(m, m)] = scale[np.ix_(m, m)] - gain @ scale[np.ix_(o, m)]

    log_u = np.linspace(-16, 7, 6000)
    u = np.exp(log_u)
    inside = scale[np.ix_(o, o)]
    delta = (x[o] - mean[o]) @ np.linalg.solve(inside, x[o] - mean[o])
    log_normal = -0.5 * (np.linalg.slogdet(2 * np.pi * inside)[1] + u * delta - o.sum() * log_u)
    density = stats.gamma.pdf(u, dof / 2, scale=2 / dof) * u * np.exp(log_normal)

    def mean_of(function: Any) -> float:
        return float(integrate.trapezoid(function(u) * density, log_u))

    total = mean_of(np.ones_like)
    scaled, log = mean_of(lambda u: u) / total, mean_of(np.log) / total
    # Given u, x_M has covariance spare / u.
    second = scaled * np.outer(first, first) + spare
    return np.log(total), scaled, log, scaled * first, second


class TestDensity:
    @every_shape
    @pytest.mark.parametrize("gaps", [0.0, 0.4])
    def test_is_scipys(self, shape: str, gaps: float) -> None:
        story, params, values = told(shape, d=4, k=3, gaps=gaps)
        np.testing.assert_allclose(
            story.log_prob(params, Rows.of(values)),
            brute_log_prob(story, params, values),
            rtol=1e-11,
            atol=1e-11,
        )
        posterior = story.infer(params, Rows.of(values))
        np.testing.assert_allclose(
            posterior.responsibilities,
            special.softmax(brute_log_joint(story, params, values), axis=1),
            atol=1e-11,
        )

    @every_shape
    def test_in_float32(self, shape: str) -> None:
        story, params, values = told(shape, d=4, k=3, dtype="float32")
        np.testing.assert_allclose(
            story.log_prob(params, Rows.of(values)),
            brute_log_prob(story, params, values),
            rtol=1e-4,
            atol=1e-4,
        )

    def test_far_out_a_row_keeps_its_digits(self) -> None:
        story, params, _ = told("full", k=1, gaps=0.0)
        values = np.outer(10.0 ** np.arange(12), np.ones(3))
        for dtype in ("float64", "float32"):
            other = replace(story, family=story.family.with_dtype(dtype))
            found = other.log_prob(params, Rows.of(values))
            rtol = 1e-12 if dtype == "float64" else 1e-5
            np.testing.assert_allclose(found, brute_log_prob(story, params, values), rtol=rtol)

    def test_many_degrees_of_freedom_make_a_gaussian(self) -> None:
        story, params, values = told("full", k=1, gaps=0.2, dof=(1000.0,))
        family: Any = params.family
        normal = oracles.make_story("full", 1, 3)
        kind: Any = normal.family.params_type
        same = Params(params.weights, kind(family.mean, family.scale))
        found = story.log_prob(params, Rows.of(values))
        wanted = oracles.log_prob(normal, same, values)
        assert np.abs(np.mean(found - wanted)) < 1e-3

    def test_a_draw_has_the_distances_of_a_t(self) -> None:
        story, params, _ = told("full", k=1)
        values = story.draw(params, 4000, np.random.default_rng(1)).values
        family: Any = params.family
        gap = values - family.mean[0]
        delta = np.einsum("ni,ij,nj->n", gap, np.linalg.inv(family.scale[0]), gap)
        # delta / d is F with (d, dof) degrees of freedom.
        assert stats.kstest(delta / 3, stats.f(3, family.dof[0]).cdf).pvalue > 0.01


class TestStatistics:
    @every_shape
    def test_are_those_of_quadrature_over_the_scale_of_a_row(self, shape: str) -> None:
        story, params, values = told(shape, n=4, gaps=0.0, seed=4)
        values[1, 0] = values[2, [0, 2]] = values[3, :] = np.nan
        weights = np.array([0.5, 2.0, 1.5, 1.0])
        found: Any = story.e_step(params, Rows.of(values, weights)).family
        resp = special.softmax(brute_log_joint(story, params, values), axis=1) * weights[:, None]
        k, d = 2, 3
        n, log, scaled = np.zeros(k), np.zeros(k), np.zeros(k)
        first, second = np.zeros((k, d)), np.zeros((k, d, d))
        each: list[float] = []
        for x, r in zip(values[:3], resp[:3], strict=True):
            for i in range(k):
                log_p, u, log_u, ux, uxx = quadrature(params, i, scale_of(story, params, i), x)
                whole = brute_log_joint(story, params, x[None])[0, i] - np.log(params.weights[i])
                assert log_p == pytest.approx(whole, rel=1e-6)
                each.append(r[i] * u)
                n[i] += r[i]
                log[i] += r[i] * log_u
                scaled[i] += r[i] * u
                first[i] += r[i] * np.asarray(ux)
                second[i] += r[i] * np.asarray(uxx)
        np.testing.assert_allclose(found.sum_r, n, rtol=1e-10)
        np.testing.assert_allclose(found.sum_log, log, rtol=1e-6)
        inner = found.moments
        np.testing.assert_allclose(inner.sum_w, scaled, rtol=1e-6)
        pivot = story.anchor
        assert pivot is not None
        if shape in ("diag", "spherical"):
            y = (values[:3] - pivot.shift) / pivot.scale
            o = ~np.isnan(y)
            y = np.where(o, y, 0.0)
            ru = np.array(each).reshape(3, k).T
            np.testing.assert_allclose(inner.count, resp[:3].T @ o, rtol=1e-10)
            np.testing.assert_allclose(inner.seen, ru @ o, rtol=1e-6)
            np.testing.assert_allclose(inner.sum_wx, ru @ y, rtol=1e-6)
            np.testing.assert_allclose(inner.sum_wxx, ru @ y**2, rtol=1e-6)
            return
        moved = inner.sum_wx * pivot.scale + inner.sum_w[:, None] * pivot.shift
        np.testing.assert_allclose(moved, first, rtol=1e-6)
        # About the pivot: E[u y y'] from the raw moments.
        cross = first[:, :, None] * pivot.shift
        square = scaled[:, None, None] * np.outer(pivot.shift, pivot.shift)
        about = (second - cross - cross.swapaxes(1, 2) + square) / np.outer(
            pivot.scale, pivot.scale
        )
        wanted = about.sum(axis=0) if shape == "tied" else about
        np.testing.assert_allclose(inner.sum_wxx, wanted, rtol=1e-5, atol=1e-6)

    @every_shape
    def test_in_float32(self, shape: str) -> None:
        story, params, values = told(shape, dtype="float32")
        double = replace(story, family=story.family.with_dtype("float64"))
        one, two = (s.e_step(params, Rows.of(values)) for s in (story, double))
        assert oracles.distance(one, two) < 1e-5


def moved(family: Any, rng: np.random.Generator, size: float) -> Any:
    """Parameters a little off, within what they may be."""
    scale = family.scale
    if scale.ndim >= 2 and scale.shape[-1] == scale.shape[-2] == family.mean.shape[1]:
        turn = np.eye(scale.shape[-1]) + size * rng.normal(size=scale.shape)
        scale = turn @ scale @ np.swapaxes(turn, -1, -2)
    else:
        scale = scale * np.exp(size * rng.normal(size=scale.shape))
    dof = family.dof * np.exp(size * rng.normal(size=family.dof.shape))
    mean = family.mean + size * rng.normal(size=family.mean.shape)
    return type(family)(mean, scale, np.clip(dof, student.LEAST_DOF, student.MOST_DOF))


@every_shape
class TestLaws:
    @pytest.mark.parametrize("gaps", [0.0, 0.3])
    def test_protocol(self, shape: str, gaps: float) -> None:
        laws.stored_and_read(*told(shape, gaps=gaps))
        laws.loads_what_blocks_hold(*told(shape, gaps=gaps, n=900))

    @with_and_without_prior
    def test_em_never_falls(self, shape: str, prior: str | None) -> None:
        story, params, values = told(shape, prior=prior)
        laws.never_falls_however_learned(story, params, values)
        complete = told(shape, prior=prior, gaps=0.0)
        laws.never_falls(*complete)

    @with_and_without_prior
    def test_the_m_step_is_the_maximum(self, shape: str, prior: str | None) -> None:
        story, params, values = told(shape, prior=prior)
        found = story.e_step(params, Rows.of(values))
        off = replace(params, family=moved(params.family, np.random.default_rng(2), 0.1))
        for r in range(3):
            for frozen in itertools.combinations(("mean", "scale", "dof"), r):
                laws.maximises(story, off, found, moved, frozen)

    def test_the_prior_is_scipys(self, shape: str) -> None:
        story, params, _ = told(shape)
        other = replace(params, family=moved(params.family, np.random.default_rng(3), 0.2))
        found = story.log_prior(params) - story.log_prior(other)
        wanted = brute_log_prior(story, params) - brute_log_prior(story, other)
        assert found == pytest.approx(wanted, rel=1e-9)

    def test_conditions_and_marginals(self, shape: str) -> None:
        story, params, values = told(shape, gaps=0.0, n=10)
        names = list(story.schema.names)
        laws.factorises(story, params, values, [names[0]])
        laws.factorises(story, params, values, names[1:])
        laws.marginal_is_what_gaps_leave(story, params, values)

    def test_gaps_are_filled_with_the_conditional_mean(self, shape: str) -> None:
        story, params, values = told(shape, gaps=0.0, dof=(6.0, 9.0))
        family: Any = params.family
        for i, missing in enumerate([(0,), (1, 2), (0, 1, 2)]):
            x = values[i].copy()
            x[list(missing)] = np.nan
            resp = special.softmax(brute_log_joint(story, params, x[None]), axis=1)[0]
            means = np.zeros(3)
            o, m = ~np.isnan(x), np.isnan(x)
            for k in range(2):
                scale = scale_of(story, params, k)
                gain = np.linalg.solve(scale[np.ix_(o, o)], scale[np.ix_(o, m)]).T
                means[m] += resp[k] * (family.mean[k][m] + gain @ (x[o] - family.mean[k][o]))
            laws.fills_with_what_it_would_draw(story, params, x, means)

    def test_more_components_that_can_be_seen(self, shape: str) -> None:
        """Statistics of some components are as if the rows of the others had not been."""
        story, params, values = told(shape, k=3, gaps=0.2)
        rng = np.random.default_rng(5)
        resp = np.eye(3)[rng.integers(0, 3, len(values))]
        rows = Rows.of(values)
        family: Any = story.family
        whole: Any = story.e_step(params, rows, resp).family
        kept: Any = family.keep(whole, [0, 2])
        without: Any = story.e_step(params, rows[resp[:, 1] == 0], resp[resp[:, 1] == 0]).family
        np.testing.assert_allclose(kept.sum_r, without.sum_r[[0, 2]])
        np.testing.assert_allclose(kept.sum_log, without.sum_log[[0, 2]])
        if shape != "tied":
            assert oracles.distance(kept.moments, without.moments.take([0, 2])) < 1e-10

    def test_no_component_is_left_without_sense(self, shape: str) -> None:
        for prior in ("weak", None):
            story, params, values = told(shape, prior=prior)
            resp = np.zeros((len(values), 2))
            resp[:, 0] = 1.0
            found = story.e_step(params, Rows.of(values), resp)
            after, faulty = story.maximise(found, params)
            assert oracles.finite(after)
            story.family.prepare(after.family, np.zeros(2))
            assert faulty[1] == (prior is None)
            placed = story.place(after, 1, values[0], ~np.isnan(values[0]))
            assert np.isfinite(story.log_prob(placed, Rows.of(values))).all()


class TestDraws:
    def test_what_is_missing_is_a_t_given_what_is_not(self) -> None:
        """Far out the other columns are wider: a normal draw would not pass."""
        story, params, _ = told("full", k=1, dof=(3.0,))
        family: Any = params.family
        mean, scale, dof = family.mean[0], family.scale[0], family.dof[0]
        x = mean + np.array([0.0, 6.0, 0.0])
        x[[0, 2]] = np.nan
        rows = Rows.of(np.tile(x, (4000, 1)))
        drawn = story.impute(params, rows, np.random.default_rng(7))
        delta = 36.0 / scale[1, 1]
        centre = mean[0] + scale[0, 1] / scale[1, 1] * 6.0
        wide = (scale[0, 0] - scale[0, 1] ** 2 / scale[1, 1]) * (dof + delta) / (dof + 1)
        t = stats.t(dof + 1, centre, np.sqrt(wide))
        assert stats.kstest(drawn[:, 0], t.cdf).pvalue > 0.01
        assert stats.kstest(drawn[:, 0], stats.norm(centre, np.sqrt(wide)).cdf).pvalue < 1e-3

    def test_conditions_are_what_draws_come_from(self) -> None:
        story, params, _ = told("tied", d=2)
        family: Any = params.family
        names = story.schema.names
        narrow, theta = story.condition(params, {names[0]: 1.0})
        told_: Any = theta.family
        np.testing.assert_allclose(told_.dof, family.dof + 1)
        delta = (1.0 - family.mean[:, 0]) ** 2 / family.scale[0, 0]
        spare = family.scale[1, 1] - family.scale[0, 1] ** 2 / family.scale[0, 0]
        wanted = spare * (family.dof + delta) / (family.dof + 1)
        np.testing.assert_allclose(told_.scale[:, 0, 0], wanted)
        assert narrow.family.options()["covariance"] == "full"

    @every_shape
    def test_are_learnt_again(self, shape: str) -> None:
        story, truth, _ = told(shape)
        off = replace(truth, family=replace(truth.family, dof=np.full(2, 40.0)))
        found: Any = laws.recovers(story, truth, 20000, off, steps=60).family
        wanted: Any = truth.family
        np.testing.assert_allclose(found.dof, wanted.dof, rtol=0.2)
        np.testing.assert_allclose(found.scale, wanted.scale, rtol=0.15, atol=0.05)
        np.testing.assert_allclose(found.mean, wanted.mean, atol=0.1)


class TestDegreesOfFreedom:
    def test_of_gaussian_rows_end_within_bounds(self) -> None:
        values = np.random.default_rng(8).normal(size=(500, 2))
        story = Story(Schema.real(2), Student(2), 1).anchored(Rows.of(values))
        params = story.vague()
        for _ in range(150):
            params = story.m_step(story.e_step(params, Rows.of(values)), params)
        family: Any = params.family
        assert 30 < family.dof[0] <= student.MOST_DOF

    def test_of_wilder_rows_than_a_cauchy_end_at_one(self) -> None:
        rng = np.random.default_rng(9)
        values = rng.normal(size=(2000, 2)) / rng.gamma(0.2, size=(2000, 1))
        story = Story(Schema.real(2), Student(2), 1).anchored(Rows.of(values))
        params = story.vague()
        for _ in range(60):
            params = story.m_step(story.e_step(params, Rows.of(values)), params)
        family: Any = params.family
        assert family.dof[0] == pytest.approx(student.LEAST_DOF)

    def test_stay_where_they_are_put(self) -> None:
        _, _, values = told("full", k=1)
        family = Student(3, dof=4.0)
        story = Story(Schema.real(3), family, 1, frozen=frozenset({"dof"}))
        story = story.anchored(Rows.of(values))
        params = story.vague()
        params = story.m_step(story.e_step(params, Rows.of(values)), params)
        learnt: Any = params.family
        assert learnt.dof[0] == 4.0

    def test_solve_their_equation(self) -> None:
        s = np.array([-1.3, -1.05, -1.002, -0.5, -4.0])
        dof = student._modal_dof(s)
        np.testing.assert_allclose(
            np.log(dof[:3] / 2) - special.digamma(dof[:3] / 2) + 1 + s[:3], 0, atol=1e-12
        )
        np.testing.assert_allclose(dof[3:], [student.MOST_DOF, student.LEAST_DOF])


class TestMode:
    @every_shape
    def test_is_that_of_the_conjugate_posterior_by_hand(self, shape: str) -> None:
        """One component of known degrees of freedom: rows weigh `r (dof + d) / (dof + delta)`."""
        d, n = 2, 40
        family = Student(d, shape, dof=3.0)
        rng = np.random.default_rng(13)
        x = rng.normal(size=(n, d)) @ np.array([[1.0, 0.5], [0.0, 1.3]]) + [3.0, -1.0]
        weights = rng.uniform(0, 2, n)
        story = Story(Schema.real(d), family, 1).anchored(Rows.of(x))
        told_: Any = story.family.prior
        params = story.vague()
        before: Any = params.family
        gap = x - before.mean[0]
        wide = scale_of(story, params, 0)
        delta = np.einsum("ni,ij,nj->n", gap, np.linalg.inv(wide), gap)
        u = weights * (3.0 + d) / (3.0 + delta)
        mean = (told_.strength * told_.mean + u @ x) / (told_.strength + u.sum())
        gap, far = x - mean, mean - told_.mean
        scatter = (gap.T * u) @ gap + told_.strength * np.outer(far, far)
        if shape in ("full", "tied"):
            wanted = scatter + np.diag(told_.scatter)
            wanted = wanted / (told_.dof + weights.sum() + d + 2)
        elif shape == "diag":
            wanted = np.diag(np.diag(scatter) + told_.scatter) / (told_.dof + weights.sum() + 3)
        else:
            total = np.trace(scatter) + told_.scatter.mean()
            wanted = np.eye(d) * total / (told_.dof + d * weights.sum() + 2 + d)
        fitted = story.m_step(story.e_step(params, Rows.of(x, weights)), params)
        learnt: Any = fitted.family
        np.testing.assert_allclose(learnt.mean[0], mean, rtol=1e-12)
        np.testing.assert_allclose(scale_of(story, fitted, 0), wanted, rtol=1e-10, atol=1e-14)


class TestOptimum:
    @with_and_without_prior
    @every_shape
    def test_em_ends_where_direct_maximisation_does(self, shape: str, prior: str | None) -> None:
        """The log-likelihood of what was observed, with the log prior, of one component."""
        d = 2
        story, truth, values = told(shape, d=d, k=1, n=60, prior=prior, dof=(2.5,), seed=2)
        params = truth
        for _ in range(2000):
            new = story.m_step(story.e_step(params, Rows.of(values)), params)
            step, params = oracles.distance(new, params), new
            if step < 1e-10:
                break
        lower = np.tril_indices(d)

        def at(theta: Array) -> Params:
            mean, dof = theta[None, :d], np.exp(theta[d : d + 1])
            rest = theta[d + 1 :]
            if shape in ("full", "tied"):
                factor = np.zeros((d, d))
                factor[lower] = rest
                scale = factor @ factor.T
                scale = scale if shape == "tied" else scale[None]
            else:
                scale = np.exp(rest)[None] if shape == "diag" else np.exp(rest)
            return replace(truth, family=story.family.params_type(mean, scale, dof))

        def objective(p: Params) -> float:
            return float(brute_log_prob(story, p, values).sum()) + brute_log_prior(story, p)

        family: Any = truth.family
        if shape in ("full", "tied"):
            rest = np.linalg.cholesky(scale_of(story, truth, 0))[lower]
        else:
            rest = np.log(np.ravel(family.scale))
        start = np.concatenate([family.mean[0], np.log(family.dof), rest])
        found = optimize.minimize(
            lambda theta: -objective(at(theta)), start, method="BFGS", options={"gtol": 1e-5}
        )
        assert objective(params) >= -found.fun - 1e-6
        best: Any = at(found.x).family
        learnt: Any = params.family
        np.testing.assert_allclose(learnt.dof, best.dof, rtol=1e-2)
        np.testing.assert_allclose(learnt.scale, best.scale, rtol=1e-2, atol=1e-3)


class TestRobust:
    def test_rows_far_away_move_neither_pivot_nor_location(self) -> None:
        rng = np.random.default_rng(11)
        values = rng.normal([1.0, -2.0], [0.5, 2.0], (1000, 2))
        values[:30] = 1e6 * rng.normal(size=(30, 2))
        story = Story(Schema.real(2), Student(2), 1).anchored(Rows.of(values))
        assert story.anchor is not None
        np.testing.assert_array_equal(story.anchor.scale, [0.5, 2.0])
        params = story.vague()
        for _ in range(100):
            params = story.m_step(story.e_step(params, Rows.of(values)), params)
        family: Any = params.family
        np.testing.assert_allclose(family.mean[0], [1.0, -2.0], atol=0.15)
        assert family.dof[0] < 3

    def test_a_column_mostly_of_one_value(self) -> None:
        values = np.zeros((400, 2))
        values[:, 1] = np.random.default_rng(12).normal(size=400)
        values[:50, 0] = np.arange(50)
        story = Story(Schema.real(2), Student(2), 2).anchored(Rows.of(values))
        params = story.vague()
        for _ in range(20):
            params = story.m_step(story.e_step(params, Rows.of(values)), params)
        assert oracles.finite(params)
