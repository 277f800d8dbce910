"""What every face can do besides fitting: fill gaps, condition, drop columns, draw, and begin where
it is told to.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import dask.array as da
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import xarray
import zarr
from scipy.stats import multivariate_normal
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

from genstream.errors import ConfigError, DataError
from genstream.estimators import (
    PPCA,
    FactorAnalysis,
    GaussianMixture,
    KMeans,
    LatentFactors,
    Mixture,
    MixtureOfFactorAnalyzers,
    MixtureOfPPCA,
    StudentMixture,
    face,
)
from genstream.rows import Rows

NAMES = ["length", "width", "mass"]
MEANS = np.array([[0.0, 0.0, 0.0], [4.0, -4.0, 2.0]])
COVARIANCES = np.array([np.eye(3), 0.4 * np.eye(3) + 0.6])


def two_groups(n_rows: int = 600, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    component = rng.integers(2, size=n_rows)
    roots = np.linalg.cholesky(COVARIANCES)
    noise = rng.normal(size=(n_rows, 3))
    return MEANS[component] + np.einsum("nij,nj->ni", roots[component], noise), component


def with_gaps(X: np.ndarray, share: float = 0.2, seed: int = 1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.where(rng.random(X.shape) < share, np.nan, X)


def fitted(**options: Any) -> GaussianMixture:
    return GaussianMixture(2, random_state=0, **options).fit(two_groups()[0])


def named() -> GaussianMixture:
    return GaussianMixture(2, random_state=0).fit(pd.DataFrame(two_groups()[0], columns=NAMES))


# --- gaps ----------------------------------------------------------------------------------------


def expected_fill(model: Any, X: np.ndarray, seed: int | None = None) -> np.ndarray:
    rng = None if seed is None else np.random.default_rng([seed, 0])
    return model.story_.impute(model.state_.params, Rows.of(X), rng)


def test_a_gap_holds_its_expectation() -> None:
    model = fitted()
    X = np.array([[1.0, np.nan, 2.0]])
    seen, missing = [0, 2], [1]
    log_joint, means = [], []
    for weight, mean, cov in zip(model.weights_, model.means_, model.covariances_, strict=True):
        inner = cov[np.ix_(seen, seen)]
        log_joint.append(np.log(weight) + multivariate_normal(mean[seen], inner).logpdf(X[0, seen]))
        pull = cov[np.ix_(missing, seen)] @ np.linalg.solve(inner, X[0, seen] - mean[seen])
        means.append(mean[missing] + pull)
    share = np.exp(np.array(log_joint) - np.logaddexp(*log_joint))
    found = model.impute(X)
    assert found[0, 1] == pytest.approx(float(share @ np.ravel(means)), rel=1e-10)
    assert (found[0, seen] == X[0, seen]).all()


@pytest.mark.parametrize("seed", [None, 3])
def test_filled_rows_take_the_form_of_the_rows(seed: int | None, tmp_path: Path) -> None:
    model = fitted()
    X = with_gaps(two_groups()[0])
    X[5] = np.nan
    expected = expected_fill(model, X, seed)
    assert not np.isnan(expected).any()
    np.testing.assert_array_equal(model.impute(X, seed), expected)
    single = model.impute(X.astype(np.float32), seed)
    assert single.dtype == np.float32
    frame = pd.DataFrame(X, index=np.arange(len(X)) * 2)
    filled = model.impute(frame, seed)
    assert isinstance(filled, pd.DataFrame)
    assert filled.index.equals(frame.index)
    np.testing.assert_array_equal(filled.to_numpy(), expected)
    array = da.from_array(X, chunks=(200, 2))
    lazy = model.impute(array, seed)
    assert isinstance(lazy, da.Array)
    assert lazy.numblocks == (3, 1)
    if seed is None:
        np.testing.assert_allclose(np.asarray(lazy), expected, rtol=1e-9)
    else:
        first = expected_fill(model, X[:200], seed)
        np.testing.assert_array_equal(np.asarray(lazy)[:200], first)
    zarr.save(tmp_path / "rows.zarr", X)
    np.save(tmp_path / "rows.npy", X)
    for rows in (zarr.open_array(tmp_path / "rows.zarr"), tmp_path / "rows.npy"):
        filled = model.impute(rows, seed)
        assert isinstance(filled, da.Array)
        np.testing.assert_array_equal(np.asarray(filled), expected)


def test_filled_xarray_keeps_its_labels() -> None:
    model = named()
    X = with_gaps(two_groups()[0])
    expected = expected_fill(model, X)
    rows = xarray.DataArray(
        X,
        dims=("bird", "trait"),
        coords={"trait": NAMES, "bird": np.arange(600) * 10, "unit": ("trait", ["cm", "cm", "g"])},
        attrs={"source": "field"},
        name="sizes",
    )
    filled = model.impute(rows)
    np.testing.assert_array_equal(filled.values, expected)
    assert filled.attrs == rows.attrs
    assert filled.name == "sizes"
    assert filled.isel(bird=0, drop=True).coords.keys() == {"trait", "unit"}
    lazy = model.impute(rows.chunk(bird=250))
    assert lazy.chunks == ((250, 250, 100), (3,))
    np.testing.assert_allclose(lazy.values, expected, rtol=1e-9)
    # Columns go by their name.
    turned = model.impute(rows.isel(trait=[2, 0, 1]))
    np.testing.assert_array_equal(turned.sel(trait=NAMES).values, expected)
    apart = rows.to_dataset("trait")
    filled = model.impute(apart)
    assert isinstance(filled, xarray.Dataset)
    np.testing.assert_array_equal(filled["mass"].values, expected[:, 2])
    np.testing.assert_array_equal(filled["bird"], rows["bird"])


def test_filled_dask_frames_stay_lazy() -> None:
    model = named()
    X = with_gaps(two_groups()[0])
    frame = pd.DataFrame(X, columns=NAMES).assign(note="kept")
    partitions = dd.from_pandas(frame[["note", *NAMES[::-1]]], npartitions=3)
    filled = model.impute(partitions)
    assert isinstance(filled, dd.DataFrame)
    found = filled.compute()
    assert list(found.columns) == ["note", *NAMES[::-1]]
    assert found.index.equals(frame.index)
    np.testing.assert_allclose(found[NAMES].to_numpy(), expected_fill(model, X), rtol=1e-9)


COLUMNS = {
    "delay": "real",
    "late": "binary",
    "seats": "count",
    "carrier": "categorical",
    "month": "categorical",
    "size": "categorical",
}
CARRIERS = np.array(["AA", "UA", "DL"])


def flights(n_rows: int = 800) -> pd.DataFrame:
    """Two groups of flights whose columns are of every kind, with gaps in each."""
    rng = np.random.default_rng(0)
    group = rng.integers(2, size=n_rows)
    chance = np.array([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]])
    carrier = (rng.random(n_rows)[:, None] > chance[group].cumsum(axis=1)).sum(axis=1)
    frame = pd.DataFrame(
        {
            "note": "kept",
            "delay": rng.normal(6.0 * group).astype(np.float32),
            "late": pd.array(rng.random(n_rows) < 0.2 + 0.6 * group, dtype="boolean"),
            "seats": pd.array(rng.poisson(3 + 9 * group), dtype="Int64"),
            "carrier": CARRIERS[carrier],
            "month": rng.integers(1, 13, size=n_rows).astype(float),
            "size": pd.Categorical(np.array(["small", "large"])[group], ordered=True),
        },
        index=np.arange(n_rows) + 1000,
    )
    hidden = rng.random((n_rows, 6)) < 0.15
    for j, name in enumerate(COLUMNS):
        frame.loc[hidden[:, j], name] = None
    return frame


@pytest.mark.parametrize("seed", [None, 3])
def test_filled_tables_keep_types_labels_and_further_columns(seed: int | None) -> None:
    frame = flights()
    model = Mixture(2, columns=COLUMNS, random_state=0, n_init=1).fit(frame)
    filled = model.impute(frame, seed)
    pd.testing.assert_series_equal(filled.dtypes, frame.dtypes)
    assert filled.index.equals(frame.index)
    assert (filled["note"] == "kept").all()
    assert not filled.isna().any().any()
    for name in COLUMNS:
        seen = frame[name].notna()
        assert seen.mean() < 0.95
        pd.testing.assert_series_equal(filled.loc[seen, name], frame.loc[seen, name])
    codes = expected_fill(model, model._open(frame).source.array, seed)
    carriers = np.array(model.schema_["carrier"].levels)
    np.testing.assert_array_equal(filled["carrier"], carriers[codes[:, 3].astype(int)])
    np.testing.assert_array_equal(filled["seats"].astype(int), np.rint(codes[:, 2]))
    np.testing.assert_array_equal(filled["delay"], codes[:, 0].astype(np.float32))
    table = pa.Table.from_pandas(frame, preserve_index=False)
    found = model.impute(table, seed)
    assert isinstance(found, pa.Table)
    assert found.schema.names == table.schema.names
    assert [t for t in found.schema.types if not pa.types.is_dictionary(t)] == [
        t for t in table.schema.types if not pa.types.is_dictionary(t)
    ]
    assert found["carrier"].to_pylist() == filled["carrier"].tolist()
    assert found["size"].to_pylist() == filled["size"].tolist()
    batch = table.combine_chunks().to_batches()[0]
    assert isinstance(model.impute(batch, seed), pa.RecordBatch)
    values = frame[list(COLUMNS)].to_numpy(dtype=object, na_value=np.nan)
    found = model.impute(values, seed)
    assert found.shape == values.shape
    assert found[:, 3].tolist() == filled["carrier"].tolist()


def test_filled_tables_in_files_and_datasets(tmp_path: Path) -> None:
    frame = flights(300)
    model = Mixture(2, columns=COLUMNS, random_state=0, n_init=1).fit(frame)
    filled = model.impute(frame)
    frame.to_parquet(tmp_path / "flights.parquet", row_group_size=120)
    lazy = model.impute(tmp_path / "flights.parquet")
    assert isinstance(lazy, dd.DataFrame)
    assert lazy.npartitions == 3
    found = lazy.compute()
    assert list(found.columns) == list(COLUMNS)
    assert found["carrier"].tolist() == filled["carrier"].tolist()
    np.testing.assert_allclose(found["delay"], filled["delay"], rtol=1e-6)
    names = ["delay", "carrier"]
    rows = frame[names].astype({"carrier": object}).rename_axis("flight").to_xarray()
    model = Mixture(2, columns={n: COLUMNS[n] for n in names}, random_state=0).fit(rows)
    found = model.impute(rows)
    assert isinstance(found, xarray.Dataset)
    np.testing.assert_array_equal(found["flight"], rows["flight"])
    seen = frame["carrier"].notna().to_numpy()
    assert (found["carrier"].values[seen] == frame["carrier"].to_numpy()[seen]).all()
    assert set(found["carrier"].values) <= set(CARRIERS)


def test_draws_for_gaps_follow_the_seed_and_spread_as_the_model_does() -> None:
    model = fitted()
    X = np.tile([1.0, np.nan, np.nan], (20_000, 1))
    one, other = model.impute(X, 1), model.impute(X, 2)
    np.testing.assert_array_equal(one, model.impute(X, 1))
    assert (one[:, 1] != other[:, 1]).any()
    rest = model.condition({0: 1.0})
    drawn, _ = rest.sample(20_000)
    np.testing.assert_allclose(one[:, 1:].mean(axis=0), drawn.mean(axis=0), atol=0.06)
    np.testing.assert_allclose(np.cov(one[:, 1:].T), np.cov(drawn.T), atol=0.15)


# --- models of some of the columns ---------------------------------------------------------------


@pytest.mark.parametrize("covariance_type", ["full", "tied", "diag", "spherical"])
def test_a_joint_is_a_marginal_times_a_conditional(covariance_type: str) -> None:
    model = fitted(covariance_type=covariance_type)
    X = two_groups(20, seed=3)[0]
    given = model.marginal([1])
    assert isinstance(given, GaussianMixture)
    assert given.n_features_in_ == 1
    for row in X:
        rest = model.condition({1: row[1]})
        assert isinstance(rest, GaussianMixture)
        assert rest.covariance_type == covariance_type
        total = given.score_samples(row[None, 1:2]) + rest.score_samples(row[None, [0, 2]])
        np.testing.assert_allclose(total, model.score_samples(row[None]), rtol=1e-9)
        np.testing.assert_allclose(
            rest.predict_proba(row[None, [0, 2]]), model.predict_proba(row[None]), atol=1e-9
        )


def test_a_conditioned_model_is_fitted_and_named() -> None:
    model = named()
    rest = model.condition({"width": -4.0})
    assert list(rest.feature_names_in_) == ["length", "mass"]
    assert rest.means_.shape == (2, 2)
    assert rest.weights_.argmax() == np.argmin(model.means_[:, 1])
    again = pickle.loads(pickle.dumps(rest))
    frame = pd.DataFrame(two_groups()[0][:, [0, 2]], columns=["length", "mass"])
    np.testing.assert_array_equal(again.predict(frame), rest.predict(frame))
    assert not np.isnan(rest.impute(frame.mask(frame > 1))).any().any()
    assert clone(rest).fit(frame).converged_
    assert rest.marginal(["mass"]).params_["feature"].values.tolist() == ["mass"]
    for wrong, error in (
        ({"width": "wide"}, DataError),
        ({"height": 1.0}, DataError),
        ({}, ConfigError),
        (dict.fromkeys(NAMES, 0.0), ConfigError),
    ):
        with pytest.raises(error):
            model.condition(wrong)
    with pytest.raises(NotFittedError):
        GaussianMixture().marginal([0])


def test_labels_condition_mixed_columns() -> None:
    frame = flights()
    model = Mixture(2, columns=COLUMNS, random_state=0, n_init=1).fit(frame)
    rest = model.condition({"carrier": "DL", "late": True})
    assert isinstance(rest, Mixture)
    assert rest.schema_.names == ("delay", "seats", "month", "size")
    drawn, component = rest.sample(400)
    assert isinstance(drawn, pd.DataFrame)
    pd.testing.assert_series_equal(
        drawn.dtypes, model.sample(5)[0].dtypes[["delay", "seats", "month", "size"]]
    )
    # Late flights of this carrier nearly all are of the second group.
    assert rest.weights_.max() > 0.9
    assert (rest.predict(drawn) == component).mean() > 0.99
    assert rest.columns == rest.schema_


def test_k_means_given_a_value_is_a_mixture() -> None:
    X, _ = two_groups()
    model = KMeans(2, random_state=0).fit(X)
    some = model.marginal([0, 2])
    assert isinstance(some, KMeans)
    np.testing.assert_array_equal(some.cluster_centers_, model.cluster_centers_[:, [0, 2]])
    rest = model.condition({1: -4.0})
    assert isinstance(rest, Mixture)
    assert rest.weights_.max() > 0.9


# --- draws ---------------------------------------------------------------------------------------


def test_draws_are_lazy_and_keyed() -> None:
    model = fitted()
    rows = model.draw(10**9, seed=4, chunk_rows=10_000)
    assert rows["values"].shape == (10**9, 3)
    part = rows["values"][123_456_780:123_456_785].compute()
    chunk = model.story_.draw(model.state_.params, 10_000, np.random.default_rng([4, 12_345]))
    np.testing.assert_array_equal(part, chunk.values[6_780:6_785])


# --- starts and what is frozen -------------------------------------------------------------------


def test_a_fit_begins_where_it_is_told() -> None:
    X, _ = two_groups()
    model = fitted()
    for start in (model, model.state_.params, model.params_):
        same = GaussianMixture(2, start=start, max_iter=0).fit(X)
        np.testing.assert_array_equal(same.means_, model.means_)
        np.testing.assert_array_equal(same.covariances_, model.covariances_)
        on = GaussianMixture(2, start=start, random_state=7).fit(X)
        assert on.lower_bound_ >= model.lower_bound_ - 1e-9
    means = model.means_[::-1]
    turned = GaussianMixture(2, start={"mean": means}, random_state=7).fit(X)
    np.testing.assert_allclose(turned.means_, means, atol=0.1)


def test_a_model_of_another_kind_says_which_rows_belong_together() -> None:
    X, _ = two_groups()
    clusters = KMeans(2, random_state=0).fit(X)
    model = GaussianMixture(2, start=clusters, max_iter=0).fit(X)
    for k in range(2):
        own = X[clusters.labels_ == k]
        assert np.abs(model.means_[k] - own.mean(axis=0)).max() < 0.1
    with pytest.raises(ConfigError, match="2 components and 3 columns, where 3 and 3"):
        GaussianMixture(3, start=clusters).fit(X)


def test_labels_of_a_start_may_come_in_any_order() -> None:
    frame = pd.DataFrame(two_groups()[0], columns=NAMES)
    model = named()
    start = model.params_.isel(feature=[2, 0, 1], feature_other=[2, 0, 1])
    same = GaussianMixture(2, start=start, max_iter=0).fit(frame)
    np.testing.assert_array_equal(same.means_, model.means_)
    np.testing.assert_array_equal(same.covariances_, model.covariances_)
    other = start.assign_coords(feature=["a", "b", "c"], feature_other=["a", "b", "c"])
    with pytest.raises(ConfigError, match="is labelled a, b, c, and the columns are length"):
        GaussianMixture(2, start=other).fit(frame)


@pytest.mark.parametrize("rows", ["few", "many"])
def test_what_is_frozen_stays(rows: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if rows == "many":
        monkeypatch.setattr(face, "START_ROWS", 300)
    X, _ = two_groups()
    model = GaussianMixture(
        2, start={"mean": MEANS}, frozen=("mean", "weights"), random_state=0
    ).fit(X)
    np.testing.assert_array_equal(model.means_, MEANS)
    free = GaussianMixture(2, start={"mean": MEANS}, random_state=0).fit(X)
    assert (free.means_ != MEANS).all()
    assert free.lower_bound_ > model.lower_bound_
    np.testing.assert_allclose(model.covariances_[0], COVARIANCES[0], atol=0.3)
    with pytest.raises(ConfigError, match="no parameter 'means'; there are weights, mean"):
        GaussianMixture(2, frozen=("means",)).fit(X)
    with pytest.raises(ConfigError, match="'frozen' parameter"):
        GaussianMixture(2, frozen="mean").fit(X)


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ({"centre": MEANS}, "no parameter 'centre'; there are weights, family.mean"),
        ({"mean": MEANS[:1]}, r"shape \(1, 3\), but \(2, 3\) is needed"),
        ({"mean": np.full((2, 3), np.nan)}, "NaN"),
        ({"mean": "here"}, "no array of numbers"),
        ({"weights": [0.5, 0.6]}, "add up to 1, not 1.1"),
        ({"covariance": -COVARIANCES}, "positive definite"),
        (7, "'start' parameter must be Params"),
        (GaussianMixture(), "not fitted"),
    ],
)
def test_wrong_starts_are_named(start: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GaussianMixture(2, start=start).fit(two_groups(100)[0])


# --- rows that arrive, and labels ----------------------------------------------------------------


def test_every_face_learns_rows_that_arrive() -> None:
    X = two_groups(1_200)[0]
    for model in (
        StudentMixture(2, random_state=0),
        KMeans(2, random_state=0),
        PPCA(1),
        FactorAnalysis(1),
        MixtureOfPPCA(2, 1, random_state=0),
        MixtureOfFactorAnalyzers(2, 1, random_state=0),
    ):
        whole = clone(model).fit(X)
        for n in range(0, 1_200, 300):
            model.partial_fit(X[n : n + 300])
        assert model.n_iter_ == 4
        assert model.score(X) > whole.score(X) - 0.05 * abs(whole.score(X))
    counts = np.random.default_rng(0).poisson(3.0, (400, 3))
    model = LatentFactors(1, random_state=0).partial_fit(counts[:200]).partial_fit(counts[200:])
    assert np.isfinite(model.score(counts))
    with pytest.raises(ConfigError, match="partial_fit goes on with the same model"):
        model.set_params(n_components=2).partial_fit(counts)


def test_a_conditioned_model_learns_on() -> None:
    X = two_groups()[0]
    rest = fitted().condition({1: 0.0})
    before = rest.score(X[:, [0, 2]])
    for _ in range(5):
        rest.partial_fit(X[:, [0, 2]])
    assert rest.score(X[:, [0, 2]]) > before


def test_answers_about_xarray_say_which_component() -> None:
    rows = xarray.DataArray(two_groups(50)[0], dims=("row", "feature"))
    model = fitted()
    shares = model.predict_proba(rows)
    assert shares["component"].values.tolist() == [0, 1]
    clusters = KMeans(2, random_state=0).fit(rows)
    assert clusters.transform(rows)["component"].values.tolist() == [0, 1]
    assert clusters.labels_.dims == ("row",)
