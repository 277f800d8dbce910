"""Compiled loops and NumPy come to the same, whatever the numbers; and do without one another."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import pytest
from scipy.special import logsumexp
from scipy.stats import multivariate_normal

from genstream import compiled
from genstream.errors import ConfigError
from genstream.families import gaussian_walk
from genstream.families.blocks import Pivot
from genstream.families.gaussian_walk import fill_features
from genstream.passes import Passes
from genstream.responsibility import Responsibility, Sampled, Truncated, hard, soft, weighted_soft
from genstream.rows import Rows
from genstream.schema import Schema
from genstream.sources import NumpySource
from genstream.stories import mixture
from genstream.story import Story, StoryStats

needs_compiler = pytest.mark.skipif(
    not compiled.compiled_available(), reason="Numba is not installed"
)
DTYPES = ("float64", "float32")
ROUNDING = {"float64": 1e-13, "float32": 3e-6}


def scores(k: int, n: int, spread: float, dtype: str, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng([k, n, seed])
    return (rng.normal(size=(k, n)) * spread - spread).astype(dtype)


def both(
    log_joint: np.ndarray, weights: np.ndarray | None = None
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Responsibilities, values and their sums, compiled and by NumPy."""
    found = []
    for fast in (True, False):
        block, sum_r = log_joint.copy(), np.ones(len(log_joint))
        with np.errstate(all="ignore"):
            value = weighted_soft(block, weights, sum_r, fast)
        found.append((block, value, sum_r))
    return found


@pytest.fixture
def everything_compiled(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Switches compiled loops on or off, for blocks of any size."""
    monkeypatch.setattr(compiled, "pays", lambda *_: compiled.compiled_available())

    def switch(on: bool) -> None:
        monkeypatch.setenv(compiled.SWITCH, "1" if on else "0")

    return switch


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
class TestSoft:
    @pytest.mark.parametrize("k", (1, 2, 50))
    @pytest.mark.parametrize("n", (1, 255, 256, 257, 1000))
    @pytest.mark.parametrize("weighted", (False, True))
    def test_is_numpys(self, dtype: str, k: int, n: int, weighted: bool) -> None:
        weights = np.random.default_rng(n).uniform(0, 3, n) if weighted else None
        for spread in (0.0, 1.0, 30.0, 1e4, 1e30):
            fast, plain = both(scores(k, n, spread, dtype), weights)
            for a, b in zip(fast, plain, strict=True):
                np.testing.assert_allclose(a, b, rtol=ROUNDING[dtype], atol=ROUNDING[dtype])

    def test_is_the_definition(self, dtype: str) -> None:
        log_joint = scores(7, 300, 5.0, dtype)
        (resp, value, sum_r), _ = both(log_joint)
        wide = log_joint.astype(np.longdouble)
        total = np.log(np.exp(wide).sum(axis=0))
        np.testing.assert_allclose(
            value, total.astype(float), rtol=ROUNDING[dtype], atol=ROUNDING[dtype]
        )
        np.testing.assert_allclose(
            resp, np.exp(wide - total).astype(float), rtol=10 * ROUNDING[dtype], atol=1e-30
        )
        np.testing.assert_allclose(sum_r - 1, resp.sum(axis=1, dtype=float), rtol=1e-12)

    def test_exponentials_keep_their_digits_down_to_the_clip(self, dtype: str) -> None:
        edge = -80.0 if dtype == "float32" else -700.0
        below = np.linspace(edge, 0, 4001).astype(dtype)
        log_joint = np.stack([np.zeros_like(below), below])
        (resp, _, _), _ = both(log_joint)
        # The likelier one takes 1 / total, so that the ratio is the exponential alone.
        wanted = np.exp(below.astype(np.longdouble)).astype(float)
        eps = float(np.finfo(dtype).eps)
        np.testing.assert_allclose(resp[1].astype(float) / resp[0], wanted, rtol=8 * eps)

    def test_below_the_clip_is_nothing(self, dtype: str) -> None:
        edge = -80.0 if dtype == "float32" else -700.0
        log_joint = np.array([[0.0] * 4, [edge * 1.01, -np.inf, edge * 100, edge]]).astype(dtype)
        for resp, value, _ in both(log_joint):
            assert (resp[1, :3] == 0).all()
            assert resp[1, 3] > 0
            np.testing.assert_array_equal(resp[0], 1)
            np.testing.assert_array_equal(value, 0)

    @pytest.mark.parametrize("weighted", (False, True))
    def test_what_is_not_finite_shows_in_its_row_alone(self, dtype: str, weighted: bool) -> None:
        log_joint = scores(5, 600, 3.0, dtype)
        bad = {3: np.nan, 256: np.inf, 300: -np.inf, 511: np.nan}
        for row, what in bad.items():
            log_joint[2, row] = what
        log_joint[:, 17] = -np.inf
        log_joint[0, 90] = np.nan
        weights = np.full(600, 2.0) if weighted else None
        (fast_r, fast_v, _), (plain_r, plain_v, _) = both(log_joint, weights)
        lost = [3, 17, 90, 256, 511]
        assert not np.isfinite(fast_v[lost]).any()
        assert not np.isfinite(plain_v[lost]).any()
        assert np.isnan(fast_r[:, lost]).any(axis=0).all()
        kept = np.delete(np.arange(600), lost)
        assert np.isfinite(fast_v[kept]).all()
        # A logarithm near 0 has no digits of its own.
        near = {"rtol": ROUNDING[dtype], "atol": ROUNDING[dtype]}
        np.testing.assert_allclose(fast_v[kept], plain_v[kept], **near)
        np.testing.assert_allclose(fast_r[:, kept], plain_r[:, kept], atol=ROUNDING[dtype])

    def test_a_part_of_a_wider_buffer_is_done_in_place(self, dtype: str) -> None:
        wide = scores(6, 400, 3.0, dtype)
        piece, whole = wide[:, :123], wide[:, :123].copy()
        after = wide[:, 123:].copy()
        weighted_soft(piece, None, np.zeros(6), True)
        weighted_soft(whole, None, np.zeros(6), True)
        np.testing.assert_array_equal(wide[:, :123], whole)
        np.testing.assert_array_equal(wide[:, 123:], after)

    def test_the_same_bits_again(self, dtype: str) -> None:
        log_joint = scores(9, 777, 4.0, dtype)
        first, second = both(log_joint)[0], both(log_joint)[0]
        for a, b in zip(first, second, strict=True):
            assert a.tobytes() == b.tobytes()

    @pytest.mark.parametrize("weighted", (False, True))
    def test_the_likeliest_is_the_first_of_the_largest(self, dtype: str, weighted: bool) -> None:
        log_joint = np.round(scores(6, 700, 2.0, dtype))
        log_joint[3, 40], log_joint[1, 41], log_joint[0, 42] = np.nan, -np.inf, np.nan
        log_joint[4, 40] = log_joint[5, 42] = np.nan
        log_joint[:, 43] = -np.inf
        weights = np.linspace(0, 3, 700) if weighted else None
        for k in (6, 5, 1):
            some, found = log_joint[:k].copy(), np.empty(700, dtype=np.int32)
            best, value, sum_r = some.argmax(axis=0), np.empty(700), np.ones(k)
            given = np.empty(0) if weights is None else weights
            compiled.loops().hard(some, given, found, value, sum_r)
            weight = np.ones(700) if weights is None else weights
            np.testing.assert_array_equal(found, best)
            np.testing.assert_array_equal(value, some[best, np.arange(700)])
            np.testing.assert_allclose(sum_r - 1, np.bincount(best, weight, k), rtol=1e-12)

    @pytest.mark.parametrize("rule", (soft, hard, Truncated(2), Sampled(3)))
    def test_every_rule(
        self, dtype: str, rule: Responsibility, everything_compiled: Callable[[bool], None]
    ) -> None:
        found = []
        for on in (True, False):
            everything_compiled(on)
            bound = rule.bind((1, 2, 3)) if isinstance(rule, Sampled) else rule
            log_joint = scores(6, 500, 2.0, dtype)
            value = bound(log_joint)
            found.append((log_joint, value))
        for a, b in zip(*found, strict=True):
            np.testing.assert_allclose(a, b, rtol=ROUNDING[dtype], atol=ROUNDING[dtype])


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("given", DTYPES)
class TestFeatures:
    def test_are_those_of_numpy(self, dtype: str, given: str) -> None:
        rng = np.random.default_rng(1)
        x = (rng.normal(size=(130, 5)) * [1, 10, 0.1, 5, 1] + 100).astype(given)
        pivot = Pivot.of(x.mean(axis=0), x.var(axis=0))
        y = pivot.block(x, np.empty((5, 130)))
        room = np.full((40, 200), 7.0, dtype)
        wanted = fill_features(y.astype(dtype), np.empty((21, 130), dtype))
        np.testing.assert_allclose(compiled.quadratic(x, pivot, room), wanted, rtol=1e-6)
        assert (room[:, 130:] == 7).all()
        np.testing.assert_array_equal(compiled.pivoted(x, pivot, room), y.astype(dtype))
        for together, square in ((False, y**2), (True, (y**2).sum(axis=0, keepdims=True))):
            found = compiled.squares(pivot, together, x, room)
            np.testing.assert_array_equal(found[0], 1)
            np.testing.assert_array_equal(found[1:6], y.astype(dtype))
            np.testing.assert_allclose(found[6:], square, rtol=1e-6)
        # Columns side by side in memory, and every second row.
        for other in (np.asfortranarray(x), np.repeat(x, 2, axis=0)[::2]):
            np.testing.assert_array_equal(compiled.pivoted(other, pivot, room), y.astype(dtype))

    def test_sums(self, dtype: str, given: str) -> None:
        resp = np.random.default_rng(2).random((7, 301)).astype(dtype)
        for fast in (True, False):
            np.testing.assert_allclose(
                compiled.total(resp, fast), resp.sum(axis=0, dtype=float), rtol=1e-14
            )
            z = resp[:6].reshape(2, 3, 301)
            np.testing.assert_allclose(
                compiled.half_square(z, fast),
                -0.5 * (z.astype(float) ** 2).sum(axis=1),
                rtol=ROUNDING[dtype],
            )


KINDS = ("full", "tied", "diag", "spherical")


def take_out(values: np.ndarray, rng: np.random.Generator) -> None:
    """Make gaps in at least 2040 rows: patterns of many rows and of few."""
    values[:2000, 1] = np.nan
    values[2000:2040] = oracles.with_gaps(values[2000:2040], 0.4, rng)


@needs_compiler
@pytest.mark.parametrize("kind", KINDS)
class TestSteps:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("gaps", (False, True))
    @pytest.mark.parametrize("weighted", (False, True))
    @pytest.mark.parametrize("k", (3, 7))
    @pytest.mark.parametrize("rule", (soft, hard))
    def test_compiled_or_not_a_step_is_the_same(
        self,
        kind: str,
        rule: Responsibility,
        k: int,
        dtype: str,
        gaps: bool,
        weighted: bool,
        everything_compiled: Callable[[bool], None],
    ) -> None:
        rng = np.random.default_rng(4)
        # Of few components columns are taken four at a time, and then what is left.
        story = oracles.make_story(kind, k, 6 if k == 3 else 4, dtype=dtype)
        params = oracles.random_params(story, rng)
        values = story.draw(params, 5000, rng).values
        if gaps:
            take_out(values, rng)
        rows = Rows.of(values, rng.uniform(0, 2, 5000) if weighted else None)
        story = story.anchored(rows)
        found: list[StoryStats] = []
        for on in (True, False):
            everything_compiled(on)
            found.append(story.e_step(params, rows, rule))
            assert found[-1].n_rows == 5000
        assert oracles.distance(*found) < 20 * ROUNDING[dtype]
        assert found[0].objective == pytest.approx(found[1].objective, rel=ROUNDING[dtype])
        np.testing.assert_allclose(found[0].sum_r.sum(), found[0].weight, rtol=1e-6)

    @pytest.mark.parametrize("k", (3, 7))
    def test_complete_rows_are_not_walked_block_by_block(
        self, kind: str, k: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Which takes the interpreter's lock, for which threads would wait."""
        story = oracles.make_story(kind, k, 4)
        params = oracles.random_params(story, np.random.default_rng(9))
        rows = story.draw(params, 20_000, np.random.default_rng(9)).values
        walked: list[Any] = []
        known = Story._e_step_by_block
        monkeypatch.setattr(
            Story, "_e_step_by_block", lambda *given: walked.append(1) or known(*given)
        )
        story.e_step(params, Rows(rows))
        story.e_step(params, Rows(rows), hard)
        assert bool(walked) == (kind == "tied")
        story.e_step(params, Rows(rows[:100]))
        assert walked

    @pytest.mark.parametrize("on", (True, False))
    @pytest.mark.parametrize("k", (3, 7))
    def test_float32_that_overflows_is_done_in_float64(
        self, kind: str, k: int, on: bool, everything_compiled: Callable[[bool], None]
    ) -> None:
        everything_compiled(on)
        rng = np.random.default_rng(5)
        story = oracles.make_story(kind, k, 4, dtype="float32")
        params = oracles.random_params(story, rng)
        values = story.draw(params, 900, rng).values
        story = story.anchored(Rows.of(values))
        values[77] = 1e25
        found = story.e_step(params, Rows.of(values))
        wanted = story._in_float64().e_step(params, Rows.of(values))
        assert found.objective == wanted.objective
        assert np.isfinite(found.objective)

    @pytest.mark.parametrize("on", (True, False))
    @pytest.mark.parametrize("k", (3, 7))
    @pytest.mark.parametrize("rule", (soft, hard))
    def test_beyond_all_arithmetic_it_shows(
        self,
        kind: str,
        rule: Responsibility,
        k: int,
        on: bool,
        everything_compiled: Callable[[bool], None],
    ) -> None:
        everything_compiled(on)
        rng = np.random.default_rng(6)
        story = oracles.make_story(kind, k, 4)
        params = oracles.random_params(story, rng)
        values = story.draw(params, 900, rng).values
        story = story.anchored(Rows.of(values))
        values[77] = 1e200
        assert not np.isfinite(story.e_step(params, Rows(values), rule).objective)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("on", (True, False))
    def test_a_row_of_weight_zero_is_counted_and_no_more(
        self, kind: str, dtype: str, on: bool, everything_compiled: Callable[[bool], None]
    ) -> None:
        everything_compiled(on)
        rng = np.random.default_rng(7)
        story = oracles.make_story(kind, 3, 4, dtype=dtype)
        params = oracles.random_params(story, rng)
        values = story.draw(params, 900, rng).values
        weights = rng.uniform(1, 2, 900)
        weights[[5, 400, 899]] = 0.0
        story = story.anchored(Rows.of(values))
        values[[5, 400]] = 1e200
        values[899] = np.nan
        observed = np.isfinite(values)
        rows = Rows(np.where(observed, values, 0.0), observed, weights)
        found = story.e_step(params, rows)
        kept = np.flatnonzero(weights)
        wanted = story.e_step(params, Rows(values[kept], observed[kept], weights[kept]))
        assert (found.n_rows, found.n_unobserved) == (900, 1)
        assert found.objective == wanted.objective
        assert oracles.distance(found.family, wanted.family) == 0
        resp = rng.dirichlet(np.ones(3), 900)
        given = story.e_step(params, rows, resp)
        np.testing.assert_allclose(given.sum_r, weights @ resp, rtol=1e-5)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_any_number_of_threads_gives_the_same_bits(self, kind: str, dtype: str) -> None:
        rng = np.random.default_rng(8)
        values = rng.normal(size=(40_000, 4))
        story = oracles.make_story(kind, 20, 4, dtype=dtype).anchored(Rows.of(values))
        params = oracles.random_params(story, rng)
        source = NumpySource(values, chunk_rows=5_000)
        assert compiled.pays(5_000 * 20)
        found = [
            Passes(source, workers=workers).fold(lambda _, rows: story.e_step(params, rows))
            for workers in (1, 2, 4)
        ]
        for one in found[1:]:
            for (_, _, a), (_, _, b) in zip(found[0].leaves(), one.leaves(), strict=True):
                assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


STEP = """
import numpy as np
from genstream import compiled
from genstream.rows import Rows
from genstream.schema import Schema
from genstream.stories import mixture
values = np.random.default_rng(0).normal(size=({n}, 2))
story = mixture(Schema.real(2), 8, dtype="float32").anchored(Rows.of(values))
stats = story.e_step(story.vague(), Rows.of(values))
"""


def outcome(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        cwd=Path(__file__).parent.parent,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


class TestWithout:
    def test_without_the_package_numpy_does_it(self) -> None:
        absent = """
import sys
sys.path.insert(0, "tests")
from conftest import Without
sys.meta_path[:] = [Without(finder, ["numba"]) for finder in sys.meta_path]
"""
        ask = "\nprint(compiled.compiled_available(), compiled.version(), stats.n_rows)"
        assert outcome(absent + STEP.format(n=10_000) + ask) == "False none 10000"

    def test_switched_off_it_is_never_imported(self) -> None:
        ask = "\nimport sys; print('numba' in sys.modules, compiled.version())"
        assert outcome(STEP.format(n=10_000) + ask, GENSTREAM_COMPILED="0") == "False none"

    @pytest.mark.parametrize("said", ("off", "2"))
    def test_the_switch_is_0_or_1(self, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(compiled.SWITCH, said)
        with pytest.raises(ConfigError, match=f"GENSTREAM_COMPILED is '{said}': say 0 for"):
            compiled.version()

    def test_small_data_never_import_it(self) -> None:
        ask = "\nimport sys; print('numba' in sys.modules)"
        assert outcome(STEP.format(n=1_000) + ask) == "False"

    @needs_compiler
    def test_where_nothing_can_be_kept_it_is_compiled_anew(self, tmp_path: Path) -> None:
        # A folder that not even the superuser can make.
        file = tmp_path / "file"
        file.touch()
        ask = "\nimport sys; print('numba' in sys.modules, stats.n_rows)"
        found = outcome(STEP.format(n=10_000) + ask, NUMBA_CACHE_DIR=str(file / "folder"))
        assert found == "True 10000"


@needs_compiler
@pytest.mark.parametrize("kind", ("full", "tied"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gaps", (False, True))
@pytest.mark.parametrize("weighted", (False, True))
@pytest.mark.parametrize("on", (True, False))
@pytest.mark.parametrize("scales", (False, True))
def test_gathered_by_component_or_all_at_once_a_step_is_the_same(
    kind: str,
    scales: bool,
    on: bool,
    dtype: str,
    gaps: bool,
    weighted: bool,
    everything_compiled: Callable[[bool], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However many rows may be of several components, also of a mixture of scales."""
    everything_compiled(on)
    monkeypatch.setattr(compiled, "MANY_FEATURES", 0)
    monkeypatch.setattr(gaussian_walk, "SURE_ROWS", 700)
    monkeypatch.setattr(gaussian_walk, "SURE_CALL", 0.0)
    monkeypatch.setattr(gaussian_walk, "SURE_PAIR", 0.0)
    rng = np.random.default_rng(4)
    story = oracles.make_story(kind, 5, 4, dtype=dtype)
    params = oracles.random_params(story, rng)
    values = story.draw(params, 5000, rng).values
    if gaps:
        take_out(values, rng)
    rows = Rows.of(values, rng.uniform(0.1, 2, 5000) if weighted else None)
    resp = story.infer(params, rows).responsibilities
    if scales:
        story = mixture(Schema.real(4), 5, covariance=kind, tails="student", dtype=dtype)
    story = story.anchored(rows)
    vague = story.vague()
    params = story.m_step(story.e_step(vague, rows, resp), vague)
    found: list[StoryStats] = []
    for width in (0, 10**9):
        monkeypatch.setattr(gaussian_walk, "SURE_WIDTH", width)
        found.append(story.e_step(params, rows))
    assert oracles.distance(*found) < 20 * ROUNDING[dtype]


@needs_compiler
@pytest.mark.parametrize("apart", (True, False))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", (12, 6))
def test_wide_rows_that_are_sure_of_their_component_are_gathered_by_it(
    k: int, dtype: str, apart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where these are so few that no features are needed."""
    rng = np.random.default_rng(12)
    of_row = np.arange(6000) * k // 6000
    values = rng.normal(size=(6000, 40)) + 4.0 * apart * rng.normal(size=(k, 40))[of_row]
    story = oracles.make_story("full", k, 40, dtype=dtype).anchored(Rows.of(values))
    labels = np.eye(k)[of_row]
    params = story.m_step(story.e_step(story.vague(), Rows.of(values), labels), story.vague())
    if not apart:
        params = story.m_step(story.e_step(params, Rows.of(values), labels * 0.04 + 0.08), params)
    pairs: list[int] = []
    known = compiled.gather_sure

    def count(*given: Any) -> None:
        pairs.append(len(given[3]))
        known(*given)

    monkeypatch.setattr(compiled, "gather_sure", count)
    stats = story.e_step(params, Rows.of(values))
    assert bool(pairs) == apart
    # One component each, but for a row or two.
    assert not apart or 6000 <= sum(pairs) < 6100
    monkeypatch.setattr(gaussian_walk, "SURE_WIDTH", 10**9)
    assert oracles.distance(stats, story.e_step(params, Rows.of(values))) < 20 * ROUNDING[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("on", (True, False))
class TestWithoutFeatures:
    """Of many columns under few components."""

    @pytest.fixture(autouse=True)
    def blocks(
        self,
        on: bool,
        everything_compiled: Callable[[bool], None],
        monkeypatch: pytest.MonkeyPatch,
    ) -> list[int]:
        """How many blocks were scored without features."""
        everything_compiled(on)
        scored: list[int] = []
        known = gaussian_walk._WhitenedBlock.score

        def score(block: Any) -> Any:
            scored.append(1)
            return known(block)

        monkeypatch.setattr(gaussian_walk._WhitenedBlock, "score", score)
        return scored

    def rows(self, k: int, weighted: bool = False, gaps: bool = False) -> tuple[Rows, np.ndarray]:
        rng = np.random.default_rng(5)
        values = rng.normal(size=(3000, 70)) @ np.diag(np.logspace(-1, 1, 70))
        values += 0.2 * values[:, ::-1] + 3.0
        labels = rng.integers(0, k, 3000)
        values += 0.5 * rng.normal(size=(k, 70))[labels]
        if gaps:
            values[:1000, :2] = values[1000:2000, 5] = values[1990:2000, 20:60] = np.nan
        weights = rng.uniform(0.1, 2, 3000) if weighted else None
        return Rows.of(values, weights), np.eye(k)[labels] * 0.8 + 0.2 / k

    @pytest.mark.parametrize("k", (1, 2, 14))
    @pytest.mark.parametrize("tails", ("gaussian", "student"))
    @pytest.mark.parametrize("gaps", (False, True))
    @pytest.mark.parametrize("weighted", (False, True))
    def test_a_step_is_the_same(
        self,
        dtype: str,
        k: int,
        tails: str,
        gaps: bool,
        weighted: bool,
        blocks: list[int],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(gaussian_walk, "FREQUENT", 500 * k)
        rows, labels = self.rows(k, weighted, gaps)
        story = mixture(Schema.real(70), k, covariance="full", tails=tails, dtype=dtype)
        story = story.anchored(rows)
        params = story.m_step(story.e_step(story.vague(), rows, labels), story.vague())
        blocks.clear()
        found = story.e_step(params, rows), story.infer(params, rows).log_prob
        filled = story.impute(params, rows)
        # A single component is summed without scores where nothing is missing.
        assert blocks
        blocks.clear()
        monkeypatch.setattr(gaussian_walk, "WHITENED_WIDTH", 10**9)
        stats, log_prob = story.e_step(params, rows), story.infer(params, rows).log_prob
        assert not blocks
        assert oracles.distance(found[0], stats) < 20 * ROUNDING[dtype]
        np.testing.assert_allclose(found[1], log_prob, atol=1e-10 if dtype == "float64" else 5e-3)
        np.testing.assert_allclose(filled, story.impute(params, rows), rtol=3e-4, atol=1e-4)

    def test_log_densities_are_those_of_the_definition(self, dtype: str, blocks: list[int]) -> None:
        rows, labels = self.rows(3)
        story = mixture(Schema.real(70), 3, covariance="full", dtype=dtype).anchored(rows)
        params = story.m_step(story.e_step(story.vague(), rows, labels), story.vague())
        blocks.clear()
        found = story.infer(params, rows).log_prob
        assert blocks
        described = story.family.describe(params.family)
        each = [
            np.log(params.weights[k])
            + multivariate_normal(described.mean[k], described.covariance(k)).logpdf(rows.values)
            for k in range(3)
        ]
        wanted = logsumexp(each, axis=0)
        np.testing.assert_allclose(found, wanted, atol=1e-10 if dtype == "float64" else 1e-3)

    def test_components_that_need_float64_have_it(
        self, dtype: str, blocks: list[int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """One of three has a column that nearly is the sum of others."""
        rows, labels = self.rows(3)
        values = rows.values.copy()
        first = labels.argmax(axis=1) == 0
        values[first, 0] = values[first, 1:6].sum(axis=1) + 1e-4 * values[first, 0]
        labels = np.where(labels == labels.max(), 1.0, 0.0)
        rows = Rows.of(values)
        story = mixture(Schema.real(70), 3, covariance="full", dtype=dtype).anchored(rows)
        params = story.m_step(story.e_step(story.vague(), rows, labels), story.vague())
        covariance = params.family.covariance.copy()
        variance, axis = np.linalg.eigh(covariance[0])
        variance[0] *= 1e-2
        covariance[0] = (axis * variance) @ axis.T
        params = replace(params, family=replace(params.family, covariance=covariance))
        kernel = story._kernel(params)
        assert kernel.complete.linear.fine.tolist() == ([0] if dtype == "float32" else [])
        blocks.clear()
        found = story.e_step(params, rows), story.infer(params, rows).log_prob
        assert blocks
        exact = replace(story, family=story.family.with_dtype("float64"))
        monkeypatch.setattr(gaussian_walk, "WHITENED_WIDTH", 10**9)
        assert oracles.distance(found[0], exact.e_step(params, rows)) < 20 * ROUNDING[dtype]
        wanted = exact.infer(params, rows).log_prob
        np.testing.assert_allclose(found[1], wanted, atol=1e-6 if dtype == "float64" else 2e-3)


def test_chunks_share_what_is_prepared_and_other_parameters_do_not() -> None:
    rng = np.random.default_rng(9)
    story = oracles.make_story("full", 3, 4)
    params = oracles.random_params(story, rng)
    rows = Rows.of(story.draw(params, 100, rng).values)
    story = story.anchored(rows)
    kernel = story._kernel(params)
    assert story._kernel(params) is kernel
    other = replace(story, family=story.family.with_dtype("float32"))
    assert other._kernel(params) is not kernel
    before = story.log_prob(params, rows)
    # Even where an array was written to.
    params.family.covariance[0] *= 2
    after = story.log_prob(params, rows)
    assert not np.array_equal(before, after)
    np.testing.assert_array_equal(after, story.log_prob(replace(params), rows))
