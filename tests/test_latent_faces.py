"""The face of latent factors: binary and count columns, labelled bounds, labels, gaps and draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pandas as pd
import pytest
import zarr
from scipy.special import expit

from genstream.errors import ConfigError, DataError
from genstream.estimators import LatentFactors, Mixture
from genstream.evaluate import importance_log_prob
from genstream.rows import Rows
from genstream.schema import Column, Schema


def answers(n_rows: int = 600, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Eight yes-or-no answers that depend on one factor, and the factor."""
    rng = np.random.default_rng(seed)
    t = rng.normal(size=n_rows)
    loadings = np.array([2.5, 2.0, 2.0, 1.5, -1.5, -2.0, -2.0, 1.0])
    intercepts = np.array([0.0, 0.5, -0.5, 1.0, 0.0, 0.3, -0.3, 0.0])
    chance = expit(intercepts + t[:, None] * loadings)
    return (rng.random(chance.shape) < chance).astype(float), t


def purchases(n_rows: int = 500, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Counts of six goods that two gamma factors make, and the factors."""
    rng = np.random.default_rng(seed)
    t = rng.gamma(2.0, 0.5, size=(n_rows, 2))
    loadings = np.array([[8.0, 6.0, 4.0, 0.2, 0.1, 1.0], [0.1, 0.3, 1.0, 7.0, 5.0, 3.0]])
    return rng.poisson(t @ loadings).astype(float), t


def with_gaps(X: np.ndarray, share: float = 0.15) -> np.ndarray:
    hidden = np.random.default_rng(1).random(X.shape) < share
    return np.where(hidden, np.nan, X)


def test_binary_columns_show_their_factor() -> None:
    X, t = answers()
    model = LatentFactors(1, likelihood="binary", random_state=0).fit(X)
    assert model.is_bound_
    assert model.schema_.kinds == ("binary",) * 8
    assert model.components_.shape == (1, 8)
    assert model.intercept_.shape == (8,)
    T = model.transform(X)
    assert T.shape == (600, 1)
    assert abs(np.corrcoef(T[:, 0], t)[0, 1]) > 0.85
    chance = model.inverse_transform(T)
    expected = expit(model.intercept_ + T @ model.components_)
    np.testing.assert_allclose(chance, expected, rtol=1e-12)
    assert ((chance > 0.5) == X).mean() > 0.75
    drawn, factors = model.sample(4_000)
    assert set(np.unique(drawn)) == {0.0, 1.0}
    np.testing.assert_allclose(drawn.mean(axis=0), X.mean(axis=0), atol=0.06)
    assert abs(np.corrcoef(model.transform(drawn)[:, 0], factors[:, 0])[0, 1]) > 0.85


def test_count_columns_are_sums_of_their_factors() -> None:
    X, t = purchases()
    model = LatentFactors(2, random_state=0, max_iter=400).fit(X)
    assert model.is_bound_
    assert (model.components_ >= 0).all()
    assert model.shape_.shape == (2,)
    T = model.transform(X)
    rates = model.inverse_transform(T)
    np.testing.assert_allclose(rates, T @ model.components_, rtol=1e-12)
    order = np.argsort(-model.components_[:, 0])
    for i, k in enumerate(order):
        assert np.corrcoef(T[:, k], t[:, i])[0, 1] > 0.9
    drawn, factors = model.sample(4_000)
    assert factors.shape == (4_000, 2)
    np.testing.assert_allclose(drawn.mean(axis=0), X.mean(axis=0), rtol=0.1)
    np.testing.assert_allclose(factors.mean(axis=0), 1.0, atol=0.05)


@pytest.mark.parametrize("likelihood", ["binary", "count"])
def test_scores_are_bounds(likelihood: str) -> None:
    X = answers(60)[0] if likelihood == "binary" else purchases(60)[0]
    model = LatentFactors(1, likelihood=likelihood, random_state=0).fit(X)
    rng = np.random.default_rng(0)
    rows = Rows.of(X)
    found = importance_log_prob(model.story_, model.state_.params, rows, 4_000, rng).log_prob
    bound = model.score_samples(X)
    assert (bound <= found + 0.02).all()
    assert model.score(X) == pytest.approx(bound.mean(), rel=1e-10)
    assert (found - bound).mean() < 1.0


@pytest.mark.parametrize("likelihood", ["binary", "count"])
def test_gaps_conditions_and_draws(likelihood: str) -> None:
    X = answers()[0] if likelihood == "binary" else purchases()[0]
    gappy = with_gaps(X)
    gappy[3] = np.nan
    model = LatentFactors(1, likelihood=likelihood, random_state=0).fit(gappy)
    assert model.score_samples(gappy)[3] == 0
    filled = model.impute(gappy)
    hidden = np.isnan(gappy)
    np.testing.assert_array_equal(filled[~hidden], X[~hidden])
    drawn = model.impute(gappy, 0)
    assert (drawn == np.rint(drawn)).all()
    if likelihood == "binary":
        assert (filled[hidden] == X[hidden]).mean() > (drawn[hidden] == X[hidden]).mean() > 0.5
    else:
        assert ((filled - X)[hidden] ** 2).mean() < ((drawn - X)[hidden] ** 2).mean()
    rest = model.condition({0: 1.0, 1: 1.0})
    assert isinstance(rest, LatentFactors)
    assert rest.n_features_in_ == X.shape[1] - 2
    assert rest.transform(X[:5, 2:]).shape == (5, 1)
    # Knowing more of the factors leaves them less to vary.
    assert rest.sample(2_000)[0].var(axis=0).sum() < model.sample(2_000)[0][:, 2:].var(axis=0).sum()
    some = model.marginal([1, 2])
    assert isinstance(some, LatentFactors)
    np.testing.assert_array_equal(np.abs(some.components_), np.abs(model.components_[:, 1:3]))
    lazy = model.draw(10**9, seed=1, chunk_rows=1_000)
    assert lazy["factors"].shape == (10**9, 1)
    part = lazy["values"][10**8 : 10**8 + 3].compute()
    assert (part == np.rint(part)).all()


def test_labels_of_binary_columns() -> None:
    X, _ = answers(200)
    frame = pd.DataFrame(np.where(X > 0, "yes", "no"), columns=list("abcdefgh"))
    frame.loc[::5, "c"] = None
    truths = pd.DataFrame(X > 0, columns=list("abcdefgh"))
    plain = LatentFactors(1, likelihood="binary", random_state=0)
    by_type = plain.fit(truths)
    assert by_type.schema_.kinds == ("binary",) * 8
    assert by_type.sample(3)[0].dtypes.eq(bool).all()
    columns = Schema(tuple(Column(n, "binary", ("no", "yes")) for n in frame.columns))
    model = LatentFactors(1, likelihood="binary", columns=columns, random_state=0).fit(frame)
    filled = model.impute(frame)
    assert set(filled["c"]) == {"no", "yes"}
    drawn = model.sample(5)[0]
    assert set(drawn.to_numpy().ravel()) <= {"no", "yes"}
    rest = model.condition({"a": "yes"})
    assert list(rest.feature_names_in_) == list("bcdefgh")
    names = model.set_output(transform="pandas").transform(frame).columns
    assert list(names) == ["latentfactors0"]


def test_data_beyond_memory_are_what_the_face_says(tmp_path: Path) -> None:
    X, _ = purchases(300)
    expected = LatentFactors(2, random_state=0).fit(X)
    zarr.save(tmp_path / "rows.zarr", X)
    frame = pd.DataFrame(X.astype(int), columns=list("abcdef"))
    frame.to_parquet(tmp_path / "rows.parquet", row_group_size=100)
    for rows in (
        da.from_array(X, chunks=(100, 6)),
        tmp_path / "rows.zarr",
        tmp_path / "rows.parquet",
        frame,
    ):
        model = LatentFactors(2, random_state=0).fit(rows)
        assert model.schema_.kinds == ("count",) * 6
        np.testing.assert_allclose(model.components_, expected.components_, rtol=1e-9)
        np.testing.assert_allclose(
            np.asarray(model.transform(rows)), expected.transform(X), rtol=1e-6
        )


def test_entries_above_a_number_are_ones() -> None:
    X, _ = answers(300)
    grey = with_gaps(X + 0.3 * np.random.default_rng(0).random(X.shape))
    crisp = np.where(np.isnan(grey), np.nan, X)
    expected = LatentFactors(1, likelihood="binary", random_state=0).fit(crisp)
    model = LatentFactors(1, likelihood="binary", binarize=0.5, random_state=0)
    for rows in (grey, da.from_array(grey, chunks=(100, 8)), pd.DataFrame(grey)):
        found = model.fit(rows)
        np.testing.assert_allclose(found.components_, expected.components_, rtol=1e-9)
        np.testing.assert_allclose(
            np.asarray(found.score_samples(rows)), expected.score_samples(crisp), rtol=1e-9
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"likelihood": "real"}, "'likelihood' parameter of LatentFactors must be one of count"),
        ({"binarize": 0.5}, "'binarize' parameter of LatentFactors is for binary"),
        ({"likelihood": "binary"}, "row 0, column 'x0'.*not possible in a binary column"),
        ({"n_components": 0}, "'n_components'"),
    ],
)
def test_wrong_factors_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LatentFactors(**options).fit(np.full((10, 3), 2.0))


def test_wrong_rows_are_named() -> None:
    with pytest.raises(DataError, match="Negative values in data: row 1, column 0 is -1"):
        LatentFactors().fit(np.array([[0.0], [-1.0]]))
    with pytest.raises(DataError, match="row 1, column 'x0': -1 is not possible in a count"):
        LatentFactors().fit(da.from_array(np.array([[0.0], [-1.0]])))
    with pytest.raises(ConfigError, match="for arrays only"):
        LatentFactors(likelihood="binary", binarize=0.5).fit(zarr.array(np.eye(4)))


@pytest.mark.parametrize("form", [np.asarray, lambda x: da.from_array(x, chunks=(20, -1))])
def test_an_infinity_is_no_gap_where_columns_are_cut_in_two(form: Any) -> None:
    X = np.random.default_rng(0).normal(size=(60, 3))
    X[4, 0] = np.nan
    model = LatentFactors(1, likelihood="binary", binarize=0.0, max_iter=3, random_state=0)
    assert model.fit(form(X)).score(form(X)) < 0
    X[5, 1] = np.inf
    for ask in (model.fit, model.score):
        with pytest.raises(DataError, match="row 5, column 'x1' is infinite"):
            ask(form(X))


def test_another_model_may_begin_it() -> None:
    X, _ = answers(200)
    model = LatentFactors(1, likelihood="binary", random_state=0).fit(X)
    same = LatentFactors(1, likelihood="binary", start=model, max_iter=0).fit(X)
    np.testing.assert_allclose(same.score_samples(X), model.score_samples(X), rtol=1e-8)
    other = Mixture(1, columns={f"x{j}": "binary" for j in range(8)}, random_state=0, n_init=1).fit(
        X
    )
    begun = LatentFactors(1, likelihood="binary", start=other, random_state=0).fit(X)
    assert begun.score(X) > other.score(X)
