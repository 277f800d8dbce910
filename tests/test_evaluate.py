"""Held-out fit, criteria, agreement and predictive checks against direct computation."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable
from dataclasses import replace
from functools import reduce
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from genstream.errors import DataError
from genstream.evaluate import (
    HeldOut,
    LevelCheck,
    NumericCheck,
    ScoreRows,
    agreement,
    aic,
    bic,
    criteria,
    held_out,
    icl,
    predictive_check,
    sample_rows,
)
from genstream.families.columns import ColumnsParams
from genstream.families.gaussian import FullParams
from genstream.learn import Resident
from genstream.rows import Rows
from genstream.schema import Column, Schema
from genstream.sources import NumpySource
from genstream.stories import mixture
from genstream.story import Params, Story

MIXED = Schema(
    (
        Column("delay", "real", unit="min"),
        Column("height", "real"),
        Column("late", "binary", ("no", "yes")),
        Column("seats", "count"),
        Column("carrier", "categorical", ("AA", "UA", "DL")),
    )
)


def mixed() -> tuple[Story, Params]:
    params = Params(
        np.array([0.3, 0.7]),
        ColumnsParams(
            mean=np.array([[0.0, -4.0], [30.0, 4.0]]),
            variance=np.array([[4.0, 1.0], [9.0, 2.0]]),
            probability=np.array([[0.1], [0.8]]),
            rate=np.array([[2.0], [11.0]]),
            level_probability=np.array([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]]),
        ),
    )
    return mixture(MIXED, 2), params


def plane() -> tuple[Story, Params]:
    params = Params(
        np.array([0.5, 0.5]),
        FullParams(
            np.array([[0.0, 0.0], [3.0, 1.0]]),
            np.array([[[1.0, 0.6], [0.6, 2.0]], [[2.0, -0.3], [-0.3, 1.0]]]),
        ),
    )
    return mixture(Schema.real(["a", "b"]), 2), params


def drawn(story: Story, params: Params, n: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return story.draw(params, n, np.random.default_rng(seed)).values


class Chunked:
    """A pass over pieces of an array, merged from left to right."""

    def __init__(self, rows: Rows, *cuts: int) -> None:
        bounds = [0, *sorted(cuts), rows.n_rows]
        self.pieces = [rows[a:b] for a, b in pairwise(bounds)]

    def fold(self, work: Callable[[int, Rows], Any]) -> Any:
        parts = [work(i, piece) for i, piece in enumerate(self.pieces)]
        return reduce(lambda a, b: a.merge(b), parts)


def gappy(seed: int = 1, n: int = 300) -> Rows:
    story, params = plane()
    x = drawn(story, params, n, seed)
    rng = np.random.default_rng(seed)
    x[rng.random(x.shape) < 0.2] = np.nan
    x[:3] = np.nan
    return Rows.of(x, rng.random(n))


def test_held_out_is_the_weighted_mean_of_log_densities() -> None:
    story, params = plane()
    x = drawn(story, params, 200)
    weights = np.random.default_rng(3).random(200)
    family: Any = params.family
    density = sum(
        w * stats.multivariate_normal(m, c).pdf(x)
        for w, m, c in zip(params.weights, family.mean, family.covariance, strict=True)
    )
    score = held_out(story, params, Resident(Rows.of(x, weights)))
    assert score.loglik == pytest.approx(weights @ np.log(density), rel=1e-10)
    assert score.mean_loglik == pytest.approx(np.average(np.log(density), weights=weights))
    assert score.missing == {"a": 0.0, "b": 0.0}


def test_standard_error_is_the_textbook_one_without_weights() -> None:
    story, params = plane()
    rows = Rows.of(drawn(story, params, 500))
    log_p = story.log_prob(params, rows)
    score = held_out(story, params, Resident(rows))
    assert score.standard_error == pytest.approx(np.std(log_p) / math.sqrt(500), rel=1e-9)


def test_entropy_is_that_of_the_responsibilities() -> None:
    story, params = plane()
    rows = gappy()
    seen = rows.is_observed.any(axis=1)
    r = story.infer(params, rows).responsibilities
    expected = rows.row_weights[seen] @ stats.entropy(r[seen], axis=1)
    score = held_out(story, params, Resident(rows))
    assert score.entropy == pytest.approx(expected, rel=1e-9)


def test_rows_with_nothing_observed_count_but_weigh_nothing() -> None:
    story, params = plane()
    rows = gappy()
    score = held_out(story, params, Resident(rows))
    rest = held_out(story, params, Resident(rows[3:]))
    n_unobserved = int((~rows.is_observed.any(axis=1)).sum())
    assert n_unobserved >= 3
    assert score.n_unobserved == n_unobserved
    assert score.n_rows == rest.n_rows + 3
    assert score.mean_loglik == pytest.approx(rest.mean_loglik, rel=1e-12)
    assert score.missing["a"] == pytest.approx(
        rows.row_weights[~rows.is_observed[:, 0]].sum() / rows.row_weights.sum()
    )


@given(st.lists(st.integers(0, 300), max_size=6))
def test_held_out_does_not_depend_on_chunks(cuts: list[int]) -> None:
    story, params = plane()
    rows = gappy()
    whole = held_out(story, params, Resident(rows)).to_json()
    pieces = held_out(story, params, Chunked(rows, *cuts)).to_json()
    missing, other = whole.pop("missing"), pieces.pop("missing")
    assert pieces == pytest.approx(whole, rel=1e-9)
    assert other == pytest.approx(missing, rel=1e-9)


def test_integer_weights_are_repeated_rows_except_for_the_error() -> None:
    story, params = plane()
    x = drawn(story, params, 100)
    times = np.random.default_rng(0).integers(0, 4, 100)
    weighted = held_out(story, params, Resident(Rows.of(x, times)))
    repeated = held_out(story, params, Resident(Rows.of(np.repeat(x, times, axis=0))))
    for name in ("weight", "loglik", "mean_loglik", "entropy"):
        assert getattr(weighted, name) == pytest.approx(getattr(repeated, name), rel=1e-10)


def test_work_of_the_pass_can_be_pickled() -> None:
    story, params = mixed()
    rows = Rows.of(drawn(story, params, 50))
    work = ScoreRows(story, params)
    again = pickle.loads(pickle.dumps(work))
    assert again(0, rows).sum_wl == work(0, rows).sum_wl


def test_scores_are_those_of_the_posterior() -> None:
    story, params = mixed()
    values = drawn(story, params, 3000)
    values[np.random.default_rng(0).random(values.shape) < 0.3] = np.nan
    values[:5] = np.nan
    rows = Rows.of(values)
    log_prob, entropy = story.score(params, rows)
    posterior = story.infer(params, rows)
    np.testing.assert_array_equal(log_prob, posterior.log_prob)
    r = posterior.responsibilities
    np.testing.assert_allclose(entropy, -np.where(r > 0, r * np.log(r), 0).sum(axis=1), atol=1e-12)


def test_nothing_to_score_is_an_error() -> None:
    story, params = plane()
    with pytest.raises(DataError, match="none of the 4 rows"):
        held_out(story, params, Resident(Rows.of(np.full((4, 2), np.nan))))
    with pytest.raises(DataError, match="positive weight"):
        held_out(story, params, Resident(Rows.of(np.zeros((4, 2)), np.zeros(4))))


def test_criteria_follow_their_definitions() -> None:
    story, params = plane()
    rows = Rows.of(drawn(story, params, 400))
    train = held_out(story, params, Resident(rows))
    p = 1 + 4 + 6
    found = criteria(story, train)
    assert found.n_parameters == p
    assert found.bic == pytest.approx(-2 * train.loglik + p * math.log(400))
    assert found.aic == pytest.approx(-2 * train.loglik + 2 * p)
    assert found.icl - found.bic == pytest.approx(2 * train.entropy)
    assert (bic(-10, 3, 20), aic(-10, 3), icl(-10, 1, 3, 20)) == pytest.approx(
        (20 + 3 * math.log(20), 26, 22 + 3 * math.log(20))
    )


@pytest.mark.parity
def test_bic_and_aic_have_the_sign_of_scikit_learn() -> None:
    from sklearn.mixture import GaussianMixture

    x = np.random.default_rng(0).normal(size=(200, 2))
    peer = GaussianMixture(1, reg_covar=0.0).fit(x)
    story = mixture(Schema.real(["a", "b"]), 1)
    params = Params(np.ones(1), FullParams(peer.means_, peer.covariances_))
    found = criteria(story, held_out(story, params, Resident(Rows.of(x))))
    assert (found.bic, found.aic) == pytest.approx((peer.bic(x), peer.aic(x)), rel=1e-10)


def test_agreement_ignores_names() -> None:
    assert agreement([0, 0, 1, 1], ["b", "b", "a", "a"]) == 1.0
    rng = np.random.default_rng(0)
    assert abs(agreement(rng.integers(0, 3, 2000), rng.integers(0, 3, 2000))) < 0.02
    with pytest.raises(DataError, match=r"\(2,\) and \(3,\)"):
        agreement([0, 1], [0, 1, 2])


# --- samples and predictive checks ---------------------------------------------------------------


def test_a_sample_has_rows_of_all_chunks_once() -> None:
    x = np.arange(1000.0)[:, None]
    source = NumpySource(x, chunk_rows=64)
    rows = sample_rows(source, 600, np.random.default_rng(0))
    values = rows.values[:, 0]
    assert len(values) == 600
    assert (np.diff(values) > 0).all()
    assert abs(values.mean() - 499.5) < 30
    everything = sample_rows(source, 5000, np.random.default_rng(0))
    np.testing.assert_array_equal(everything.values, x)


def test_a_sample_of_many_chunks_reads_few() -> None:
    x = np.arange(1000.0)[:, None]
    source = NumpySource(x, chunk_rows=10)
    rows = sample_rows(source, 200, np.random.default_rng(0), max_chunks=25)
    assert rows.n_rows == 200
    assert len(np.unique(rows.values // 10)) <= 25


def test_rows_of_the_story_itself_pass_the_check() -> None:
    story, params = mixed()
    source = NumpySource(drawn(story, params, 6000, 5), MIXED, chunk_rows=1000)
    check = predictive_check(story, params, source, np.random.default_rng(1))
    assert (check.n_real, check.n_drawn) == (6000, 6000)
    assert [c.name for c in check.columns] == list(MIXED.names)
    for column in check.columns:
        assert 0 < column.distance < 3 * column.expected_distance
        assert sum(column.real_shares) == pytest.approx(1)
        assert sum(column.drawn_shares) == pytest.approx(1)
    assert check.correlation_error < 0.05
    assert {check.pairs[0].first, check.pairs[0].second} == {"delay", "height"}


def test_a_wrong_story_is_found_column_by_column() -> None:
    story, params = mixed()
    x = drawn(story, params, 6000, 5)
    family: Any = params.family
    wrong = replace(
        params,
        family=replace(
            family,
            mean=family.mean + np.array([5.0, 0.0]),
            level_probability=np.array([[0.1, 0.2, 0.7], [0.6, 0.3, 0.1]]),
        ),
    )
    source = NumpySource(x, MIXED)
    check = predictive_check(story, wrong, source, np.random.default_rng(1))
    far = {c.name for c in check.columns if c.distance > 4 * c.expected_distance}
    assert far == {"delay", "carrier"}
    delay = check.columns[0]
    assert isinstance(delay, NumericCheck)
    assert delay.drawn.mean - delay.real.mean == pytest.approx(5, abs=1.5)


@given(st.integers(0, 2**32 - 1))
def test_distance_is_that_of_scipy_without_weights(seed: int) -> None:
    from genstream.evaluate import _kolmogorov_smirnov

    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, 30, 60) / 2.0, rng.normal(7, 4, 90)
    found = _kolmogorov_smirnov(x, np.full(60, 0.3), y, np.ones(90))
    assert found == pytest.approx(stats.ks_2samp(x, y).statistic, abs=1e-12)


def test_summaries_heed_weights_and_leave_gaps_out() -> None:
    story, params = mixed()
    x = drawn(story, params, 2000, 5)
    times = np.random.default_rng(2).integers(0, 3, 2000)
    x[::7, 0] = np.nan
    x[::5, 4] = np.nan
    source = NumpySource(x, MIXED, weights=times.astype(float))
    check = predictive_check(story, params, source, np.random.default_rng(1))
    delay, carrier = check.columns[0], check.columns[4]
    assert isinstance(delay, NumericCheck)
    assert isinstance(carrier, LevelCheck)
    repeated = np.repeat(x[:, 0], times)
    seen = repeated[~np.isnan(repeated)]
    assert delay.real.mean == pytest.approx(seen.mean())
    assert delay.real.sd == pytest.approx(seen.std())
    assert delay.real.quantiles[3] == np.quantile(seen, 0.5, method="inverted_cdf")
    assert delay.missing == pytest.approx(np.isnan(repeated).mean())
    codes = np.repeat(x[:, 4], times)
    shares = np.bincount(codes[~np.isnan(codes)].astype(int), minlength=3)
    assert carrier.real_shares == pytest.approx(shares / shares.sum())
    assert carrier.levels == ("AA", "UA", "DL")


def test_correlations_use_rows_that_observe_both_columns() -> None:
    story, params = plane()
    x = drawn(story, params, 4000, 3)
    x[:1500, 0] = np.nan
    x[2500:, 1] = np.nan
    source = NumpySource(x, story.schema)
    check = predictive_check(story, params, source, np.random.default_rng(0))
    both = x[1500:2500]
    assert check.pairs[0].real == pytest.approx(np.corrcoef(both.T)[0, 1])
    assert check.pairs[0].difference == check.pairs[0].drawn - check.pairs[0].real


def test_counts_are_binned_by_whole_numbers() -> None:
    story, params = mixed()
    source = NumpySource(drawn(story, params, 3000, 5), MIXED)
    seats = predictive_check(story, params, source, np.random.default_rng(1)).columns[3]
    assert isinstance(seats, NumericCheck)
    assert set(np.diff(seats.edges)) == {1.0}
    assert seats.edges[0] % 1 == 0.5


def test_results_are_json_even_for_a_column_never_observed() -> None:
    story, params = plane()
    x = drawn(story, params, 500)
    x[:, 1] = np.nan
    check = predictive_check(story, params, NumpySource(x, story.schema), np.random.default_rng(0))
    plain = json.loads(json.dumps(check.to_json(), allow_nan=False))
    assert plain["columns"][1]["missing"] == 1.0
    assert plain["columns"][1]["distance"] is None
    assert plain["pairs"] == []
    score = HeldOut(1, 0, 1.0, math.inf, math.inf, math.nan, 0.0, {"a": 0.0})
    assert score.to_json()["loglik"] is None


def test_no_rows_is_an_error() -> None:
    class Empty:
        schema = Schema.real(["a", "b"])
        chunk_rows = (0, 0)

    source: Any = Empty()
    story, params = plane()
    with pytest.raises(DataError, match="no rows"):
        predictive_check(story, params, source, np.random.default_rng(0))
    weightless = NumpySource(np.ones((5, 2)), story.schema, weights=np.zeros(5))
    with pytest.raises(DataError, match="weigh 0"):
        predictive_check(story, params, weightless, np.random.default_rng(0))
