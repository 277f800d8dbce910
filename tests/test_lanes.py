"""Rows of rare patterns, worked on side by side: against dense arithmetic, one row at a time."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import oracles
import pytest
from scipy import stats

from genstream import compiled
from genstream.families import gaussian_walk, lanes
from genstream.families.lanes import Lanes, factor_lanes, invert_lanes, lane_inverse
from genstream.families.patterns import Patterns, numbered
from genstream.rows import Rows
from genstream.story import Params, Story

KINDS = ("full", "tied")
D, K = 5, 3


@pytest.fixture(autouse=True)
def no_pattern_is_frequent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gaussian_walk, "FREQUENT", 10**9)


@pytest.fixture(autouse=True, params=["numpy", "compiled"])
def how(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything by NumPy, or in compiled loops."""
    monkeypatch.setenv(compiled.SWITCH, str(int(request.param == "compiled")))
    if request.param == "compiled" and not compiled.compiled_available():
        pytest.skip("Numba is not installed")
    monkeypatch.setattr(compiled, "pays", lambda *_: compiled.compiled_available())


def drawn(
    kind: str, d: int = D, n_rows: int = 8 * (2**D - 1), dtype: str = "float64"
) -> tuple[Story, Params, np.ndarray]:
    """A story, its parameters, and rows in which every pattern that observes something is."""
    rng = np.random.default_rng(21)
    story = oracles.make_story(kind, K, d, dtype=dtype)
    params = oracles.random_params(story, rng, apart=1.0)
    values = story.draw(params, n_rows, rng).values
    story = story.anchored(Rows.of(values))
    patterns = 1 + np.arange(n_rows) % (2**d - 1)
    seen = (patterns[:, None] >> np.arange(d)) & 1 == 1
    return story, params, rng.permutation(np.where(seen, values, np.nan))


def moments(
    params: Params, values: np.ndarray, moved: np.ndarray, spared: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sums of `w`, `w E[x]` and `w E[x] E[x]' + r Cov[x]` by row and component, in data units."""
    d = values.shape[1]
    n, s, q = np.zeros(K), np.zeros((K, d)), np.zeros((K, d, d))
    for x, w, r in zip(values, moved.T, spared.T, strict=True):
        for k in range(K):
            first, second = oracles.conditional_moments(params.family, k, x)
            square = np.outer(first, first)
            n[k] += w[k]
            s[k] += w[k] * first
            q[k] += w[k] * square + r[k] * (second - square)
    return n, s, q


def in_data_units(story: Story, found: Any, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The sums `found`, which are about the pivot, of one component or (tied) of all."""
    pivot = story.anchor
    assert pivot is not None
    n, s, q = found.sum_w[k], found.sum_wx[k], found.sum_wxx
    if q.ndim == 3:
        q = q[k]
    else:
        n, s = found.sum_w.sum(), found.sum_wx.sum(axis=0)
    cross = np.outer(s * pivot.scale, pivot.shift)
    square = np.outer(pivot.shift, pivot.shift)
    q = q * np.outer(pivot.scale, pivot.scale) + cross + cross.T + n * square
    return n, s * pivot.scale + n * pivot.shift, q


def close(story: Story, found: Any, wanted: tuple[np.ndarray, ...], rtol: float) -> None:
    """Assert that sums about the pivot are those wanted in data units."""
    np.testing.assert_allclose(found.sum_w, wanted[0], rtol=rtol)
    for k in range(K):
        _, s, q = in_data_units(story, found, k)
        tied = found.sum_wxx.ndim == 2
        for one, all_of_them in ((s, wanted[1]), (q, wanted[2])):
            want = all_of_them.sum(axis=0) if tied else all_of_them[k]
            np.testing.assert_allclose(one, want, rtol=0, atol=rtol * np.abs(want).max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
class TestAllPatterns:
    def test_densities(self, kind: str, dtype: str) -> None:
        story, params, values = drawn(kind, dtype=dtype)
        wanted = oracles.log_prob(story, params, values)
        found = story.log_prob(params, Rows.of(values))
        np.testing.assert_allclose(
            found, wanted, rtol=0, atol=1e-11 if dtype == "float64" else 2e-5
        )

    def test_statistics(self, kind: str, dtype: str) -> None:
        story, params, values = drawn(kind, dtype=dtype)
        weights = np.random.default_rng(1).uniform(0, 2, len(values))
        resp = oracles.responsibilities(story, params, values).T * weights
        found = story.e_step(params, Rows.of(values, weights)).family
        rtol = 1e-11 if dtype == "float64" else 1e-5
        close(story, found, moments(params, values, resp, resp), rtol)

    def test_moments_may_weigh_otherwise_than_spare_covariance(self, kind: str, dtype: str) -> None:
        """As the mixtures of scales need it: `r E[u]` and `r`."""
        story, params, values = drawn(kind, dtype=dtype)
        rng = np.random.default_rng(2)
        resp, scaled = rng.uniform(0, 1, (2, K, len(values)))
        walk: Any = story.family.prepare(params.family, np.log(params.weights)).walk(
            Rows.of(values)
        )
        for index in walk.blocks():
            walk.score()
            walk.gather(resp[:, index].astype(dtype), scaled[:, index])
        rtol = 1e-11 if dtype == "float64" else 1e-5
        close(story, walk.close(), moments(params, values, scaled, resp), rtol)

    def test_a_score_is_the_peak_less_half_the_distance(self, kind: str, dtype: str) -> None:
        story, params, values = drawn(kind, dtype=dtype)
        walk: Any = story.family.prepare(params.family, np.log(params.weights)).walk(
            Rows.of(values)
        )
        for index in walk.blocks():
            score, constant = walk.score(), walk.constant
            some = list(zip(values[index], score.T, constant.T, strict=True))[::4]
            for x, score_, constant_ in some:
                o = ~np.isnan(x)
                assert walk.n_observed == o.sum()
                for k in range(K):
                    mean = params.family.mean[k][o]
                    covariance = oracles.covariance_of(params.family, k)[np.ix_(o, o)]
                    peak = stats.multivariate_normal.logpdf(mean, mean, covariance)
                    assert constant_[k] == pytest.approx(peak + np.log(params.weights[k]), abs=1e-4)
                    gap = x[o] - mean
                    distance = gap @ np.linalg.solve(covariance, gap)
                    assert score_[k] == pytest.approx(constant_[k] - distance / 2, abs=1e-4)


def sums_over_something(subscripts: str, *operands: np.ndarray) -> bool:
    inputs, output = subscripts.split("->")
    names = zip(inputs.split(","), operands, strict=True)
    sizes = {name: n for each, array in names for name, n in zip(each, array.shape, strict=True)}
    return all(n or name in output for name, n in sizes.items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_no_sum_is_over_nothing(kind: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """NumPy's einsum multiplies by 0 what lies behind an empty array, be it NaN."""
    story, params, values = drawn(kind, dtype=dtype)
    rows = Rows.of(values)
    known = np.einsum

    def checked(subscripts: str, *operands: np.ndarray, **options: Any) -> Any:
        assert sums_over_something(subscripts, *operands)
        return known(subscripts, *operands, **options)

    monkeypatch.setattr(np, "einsum", checked)
    walk: Any = story.family.prepare(params.family, np.log(params.weights)).walk(rows)
    for index in walk.blocks():
        walk.gather(np.exp(walk.score()))
        walk.complete(np.full((K, len(index)), 1 / K))
    walk.close()


@pytest.mark.parametrize("kind", KINDS)
class TestChunks:
    def test_any_chunks_have_the_same_sums(self, kind: str) -> None:
        story, params, values = drawn(kind)
        rng = np.random.default_rng(3)
        whole = story.e_step(params, Rows.of(values))
        for n_cuts in (1, 3, 20):
            cuts = np.sort(rng.integers(0, len(values) + 1, n_cuts)).tolist()
            parts = [
                story.e_step(params, Rows.of(values)[slice(a, b)])
                for a, b in itertools.pairwise([0, *cuts, len(values)])
            ]
            total = parts[0]
            for part in parts[1:]:
                total = total.merge(part)
            assert oracles.distance(total, whole) < 1e-12

    @pytest.mark.parametrize("dtype", ["float64", "float32"])
    def test_many_rows_of_many_patterns_have_the_sums_of_a_few_at_a_time(
        self, kind: str, dtype: str
    ) -> None:
        """More of both than a tile holds, and rows that lie column by column or apart."""
        story, params, _ = drawn(kind, 20, 100, dtype)
        rng = np.random.default_rng(4)
        values = oracles.with_gaps(story.draw(params, 5000, rng).values, 0.3, rng)
        values[::50, 3:] = np.nan
        whole = story.e_step(params, Rows.of(values))
        parts = [story.e_step(params, Rows.of(part)) for part in np.split(values, 250)]
        total = parts[0]
        for part in parts[1:]:
            total = total.merge(part)
        near = 1e-12 if dtype == "float64" else 1e-5
        assert oracles.distance(total, whole) < near
        for other in (np.asfortranarray(values), np.repeat(values, 2, axis=0)[::2]):
            assert oracles.distance(story.e_step(params, Rows.of(other)), whole) < near

    @pytest.mark.parametrize("size", [16, 17, 40])
    def test_any_blocks_have_the_same_sums(
        self, kind: str, size: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        story, params, values = drawn(kind)
        whole = story.e_step(params, Rows.of(values))
        monkeypatch.setattr(lanes, "LANE_ROWS", size)
        monkeypatch.setattr(lanes, "SCRATCH_NUMBERS", size)
        assert oracles.distance(story.e_step(params, Rows.of(values)), whole) < 1e-12

    def test_one_row_of_each_pattern_alone(self, kind: str) -> None:
        story, params, values = drawn(kind, n_rows=2**D - 1)
        found = [story.log_prob(params, Rows.of(x[None]))[0] for x in values]
        np.testing.assert_allclose(found, oracles.log_prob(story, params, values), rtol=1e-11)

    def test_memory_is_given_back_without_the_garbage_collector(
        self, kind: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        story, params, values = drawn(kind)
        made: list[weakref.ref[Lanes]] = []
        begin = Lanes.__init__

        def noted(self: Lanes, *rest: Any) -> None:
            made.append(weakref.ref(self))
            begin(self, *rest)

        monkeypatch.setattr(Lanes, "__init__", noted)
        gc.disable()
        try:
            story.e_step(params, Rows.of(values))
            assert [one() for one in made] == [None]
        finally:
            gc.enable()


class TestDigits:
    """Columns that nearly determine one another: terms cancel, and the bound on rounding holds."""

    @pytest.mark.parametrize("dtype", ["float64", "float32"])
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("frequent", [1, 10**9])
    @pytest.mark.parametrize("thin", [1e-2, 3e-5, 1e-6])
    def test_nearly_dependent_columns(
        self, kind: str, dtype: str, thin: float, frequent: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A deviation of 3e-5 is that of the floor of variances."""
        monkeypatch.setattr(gaussian_walk, "FREQUENT", frequent)
        story, params, values = thinned(kind, dtype, thin)
        wanted = precise_log_prob(story, params, values)
        found = story.log_prob(params, Rows.of(values))
        atol = 1e-3 if thin >= 3e-5 else 1e-2
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=atol)

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("thin", [1e-1, 1e-3])
    def test_float32_keeps_what_gaps_hide(self, kind: str, thin: float) -> None:
        """The thin direction of the covariance comes out of conditional moments."""
        found = []
        for dtype in ("float64", "float32"):
            story, params, values = thinned(kind, dtype, thin)
            family: Any = story.m_step(story.e_step(params, Rows.of(values)), params).family
            found.append(np.linalg.eigvalsh(oracles.covariance_of(family, 0))[0])
        assert found[1] == pytest.approx(found[0], rel=1e-3)

    def test_components_that_need_it_are_worked_on_in_float64(self) -> None:
        story, params, _ = thinned("full", "float32", 1e-6)
        kernel = story.family.prepare(params.family, np.log(params.weights))
        coarse, fine = Lanes(kernel).groups
        assert (coarse.dtype, fine.dtype) == (np.float32, np.float64)
        assert coarse.which.tolist() == [1, 2]
        assert fine.which.tolist() == [0]

    def test_a_mean_far_out_costs_no_digits(self) -> None:
        story, params, values = drawn("full")
        family: Any = params.family
        wanted = oracles.log_prob(story, params, values)
        far = np.full(D, 2.0**20)
        # The grid keeps moved values exact.
        values = np.round(values * 2**20) / 2**20
        wanted = oracles.log_prob(story, params, values)
        moved = Params(params.weights, type(family)(family.mean + far, family.covariance))
        np.testing.assert_allclose(
            story.log_prob(moved, Rows.of(values + far)), wanted, rtol=0, atol=1e-7
        )


def thinned(kind: str, dtype: str, thin: float) -> tuple[Story, Params, np.ndarray]:
    """As `drawn`, where one column of the first component, or of all if tied, is the sum of two
    others but for a deviation of `thin`.
    """
    story, params, _ = drawn(kind, dtype=dtype)
    family: Any = params.family
    covariance = family.covariance.copy()
    first = covariance if kind == "tied" else covariance[0]
    mix = np.eye(D)
    mix[2] = [1.0, 1.0, 0.0, 0.0, 0.0]
    first[:] = mix @ first @ mix.T
    first[2, 2] += thin**2
    params = Params(params.weights, type(family)(family.mean, covariance))
    rng = np.random.default_rng(5)
    values = story.draw(params, 400, rng).values
    story = story.anchored(Rows.of(values))
    return story, params, oracles.with_gaps(values, 0.3, rng)


def precise_log_prob(story: Story, params: Params, values: np.ndarray) -> np.ndarray:
    """`oracles.log_prob` in extended precision, by elimination."""
    long = np.longdouble
    out = np.zeros((len(values), K), dtype=long)
    for row, x in enumerate(values):
        o = ~np.isnan(x)
        for k in range(K):
            covariance = oracles.covariance_of(params.family, k)[np.ix_(o, o)].astype(long)
            gap = x[o].astype(long) - params.family.mean[k][o].astype(long)
            value = long(np.log(params.weights[k]))
            for i in range(len(gap)):
                pivot = covariance[i, i]
                value -= (gap[i] ** 2 / pivot + np.log(2 * np.pi * pivot)) / 2
                gain = covariance[i + 1 :, i] / pivot
                gap[i + 1 :] -= gain * gap[i]
                covariance[i + 1 :, i + 1 :] -= np.outer(gain, covariance[i, i + 1 :])
            out[row, k] = value
    total = np.logaddexp.reduce(out, axis=1)
    return np.where(np.isnan(values).all(axis=1), 0.0, total).astype(float)


class TestInverses:
    @pytest.mark.parametrize("size", [0, 1, 2, 5, 12])
    def test_of_submatrices(self, size: int) -> None:
        rng = np.random.default_rng(6)
        a = rng.normal(size=(2, 12, 12))
        matrices = a @ a.swapaxes(1, 2) + 0.1 * np.eye(12)
        chosen = np.array([rng.permutation(12)[:size] for _ in range(9)]).reshape(9, size)
        cells = chosen.T[:, None] * 12 + chosen.T
        # What is above the diagonal of a factor is nobody's.
        factor = np.full((2, size, size, 9), np.nan)
        log_det = factor_lanes(matrices.reshape(2, -1), cells, factor)
        out = invert_lanes(factor, np.full(factor.shape, np.nan))
        for c, p in itertools.product(range(2), range(9)):
            part = matrices[c][np.ix_(chosen[p], chosen[p])]
            np.testing.assert_allclose(out[c, :, :, p], np.linalg.inv(part), rtol=1e-9, atol=1e-10)
            assert log_det[c, p] == pytest.approx(np.linalg.slogdet(part)[1], rel=1e-11)

    def test_of_matrices_in_lanes(self) -> None:
        a = np.random.default_rng(7).normal(size=(30, 4, 4))
        matrices = a @ a.swapaxes(1, 2) + 0.1 * np.eye(4)
        found, log_det = lane_inverse(np.moveaxis(matrices, 0, 2))
        np.testing.assert_allclose(np.moveaxis(found, 2, 0), np.linalg.inv(matrices), rtol=1e-9)
        np.testing.assert_allclose(log_det, np.linalg.slogdet(matrices)[1], rtol=1e-11)

    @pytest.mark.parametrize("dtype", ["float64", "float32"])
    @pytest.mark.parametrize("variance", [1e-12, 1e12])
    def test_determinants_beyond_the_range_of_numbers(self, variance: float, dtype: str) -> None:
        matrices = variance * np.eye(40, dtype=dtype).reshape(1, -1)
        cells = np.arange(1600).reshape(40, 40, 1)
        log_det = factor_lanes(matrices, cells, np.empty((1, 40, 40, 1), dtype))
        assert log_det[0, 0] == pytest.approx(40 * np.log(variance))

    def test_a_variance_lost_to_rounding_stays_positive(self) -> None:
        """An exactly singular matrix: its inverse is large, but finite and semidefinite."""
        found, log_det = lane_inverse(np.full((2, 2, 1), 3.0))
        assert np.isfinite(log_det).all()
        assert np.linalg.eigvalsh(found[..., 0])[0] >= -1e-9


class TestPatterns:
    @pytest.mark.parametrize("d", [1, 7, 8, 16, 17, 40, 130])
    def test_rows_of_a_pattern_are_together(self, d: int) -> None:
        rng = np.random.default_rng(d)
        several = rng.random((5, d)) < 0.6
        observed = several[rng.integers(5, size=200)]
        # Patterns that differ in their last column only.
        observed[:20, :-1], observed[:20, -1] = True, rng.random(20) < 0.5
        found = Patterns(observed)
        unique, counts = np.unique(observed, axis=0, return_counts=True)
        by_row = {row.tobytes(): n for row, n in zip(unique, counts, strict=True)}
        assert {
            row.tobytes(): n for row, n in zip(found.observed, found.counts, strict=True)
        } == by_row
        np.testing.assert_array_equal(found.width, found.observed.sum(axis=1))
        np.testing.assert_array_equal(found.observed[found.of_row], observed)
        for p, rows in enumerate(parts(found)):
            np.testing.assert_array_equal(rows, np.flatnonzero(found.of_row == p))
        np.testing.assert_array_equal(np.sort(found.order), np.arange(200))

    @pytest.mark.parametrize("order", [lambda a: a, np.sort])
    def test_those_that_are_there_are_numbered(self, order: Any) -> None:
        numbers = order(np.random.default_rng(8).integers(0, 300, 120))
        for some in (numbers, numbers[:1], numbers[:0]):
            present, own = numbered(some)
            assert present.tolist() == sorted(set(some.tolist()))
            np.testing.assert_array_equal(present[own], some)

    def test_no_rows(self) -> None:
        found = Patterns(np.zeros((0, 3), dtype=bool))
        assert len(found.counts) == len(found.order) == len(found.of_row) == 0


def parts(found: Patterns) -> Iterator[np.ndarray]:
    return (found.rows(p) for p in range(len(found.counts)))
