"""The scikit-learn face: its contract, gaps and weights, and data beyond memory."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import dask.array as da
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xarray
import zarr
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from genstream.errors import ConfigError, DataError, GenstreamError
from genstream.estimators import GaussianMixture, Mixture, face
from genstream.learn import FitState, Outcome
from genstream.online import OnlineEM
from genstream.passes import Passes
from genstream.rows import Rows
from genstream.schema import Column, Schema
from genstream.sources import NumpySource

COVARIANCES = ("full", "tied", "diag", "spherical")
MEANS = np.array([[0.0, 0.0, 0.0], [6.0, -6.0, 3.0]])


def two_groups(n_rows: int = 600, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    component = rng.integers(2, size=n_rows)
    return MEANS[component] + rng.normal(size=(n_rows, 3)), component


def with_gaps(X: np.ndarray, share: float = 0.2, seed: int = 1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.where(rng.random(X.shape) < share, np.nan, X)


def aligned(means: np.ndarray) -> np.ndarray:
    return means[np.argsort(means[:, 0])]


def same(one: Any, other: Any) -> bool:
    names = ("weights_", "means_", "covariances_", "precisions_", "precisions_cholesky_")
    return all(np.array_equal(getattr(one, n), getattr(other, n)) for n in names)


# --- the contract --------------------------------------------------------------------------------


def test_constructor_is_scikit_learns_and_more() -> None:
    from sklearn.mixture import GaussianMixture as Reference

    theirs = Reference().get_params()
    ours = GaussianMixture().get_params()
    assert {name: ours[name] for name in theirs} == theirs
    assert set(ours) - set(theirs) == {
        "prior",
        "responsibility",
        "start",
        "frozen",
        "dtype",
        "chunk_rows",
        "scheduler",
        "workers",
    }


def test_clone_pickle_and_copy() -> None:
    X, _ = two_groups()
    model = GaussianMixture(2, random_state=0, means_init=MEANS).fit(X)
    fresh = clone(model)
    assert not hasattr(fresh, "means_")
    assert same(fresh.fit(X), model)
    for again in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        np.testing.assert_array_equal(again.predict_proba(X), model.predict_proba(X))
        np.testing.assert_array_equal(again.sample(5)[0], model.sample(5)[0])
    assert "GaussianMixture" in model._repr_html_()
    assert repr(model).startswith("GaussianMixture(")


def test_in_a_pipeline_and_a_search() -> None:
    X, _ = two_groups()
    pipeline = make_pipeline(StandardScaler(), GaussianMixture(2, random_state=0))
    assert np.isfinite(cross_val_score(pipeline, X, cv=3)).all()
    search = GridSearchCV(GaussianMixture(random_state=0), {"n_components": [1, 2]}, cv=3).fit(X)
    assert search.best_params_ == {"n_components": 2}


def test_fitted_attributes() -> None:
    X, component = two_groups()
    model = GaussianMixture(2, random_state=0).fit(X)
    assert model.converged_
    assert model.outcome_ is Outcome.CONVERGED
    assert model.n_iter_ == len(model.lower_bounds_) == len(model.trace_)
    assert model.lower_bound_ == model.lower_bounds_[-1]
    assert model.lower_bound_ == pytest.approx(model.score(X), abs=1e-3)
    assert model.n_features_in_ == 3
    assert model.warnings_ == []
    assert (model.predict(X) == component).mean() in (0.0, 1.0)
    assert model.predict(X).dtype == np.intp
    np.testing.assert_array_equal(model.predict(X), model.predict_proba(X).argmax(axis=1))
    np.testing.assert_allclose(model.predict_proba(X).sum(axis=1), 1.0)
    assert model.score(X) == pytest.approx(model.score_samples(X).mean(), rel=1e-12)
    stored = FitState.from_dataset(model.state_.to_dataset(model.story_))
    np.testing.assert_array_equal(stored.params.weights, model.weights_)


def test_fit_predict_is_fit_then_predict() -> None:
    X, _ = two_groups()
    model = GaussianMixture(2, random_state=0)
    labels = model.fit_predict(X)
    np.testing.assert_array_equal(labels, model.predict(X))


@pytest.mark.parametrize("covariance_type", COVARIANCES)
def test_rows_drawn_look_like_the_rows_fitted(covariance_type: str) -> None:
    X, _ = two_groups(2000)
    model = GaussianMixture(2, covariance_type=covariance_type, random_state=0).fit(X)
    drawn, component = model.sample(4000)
    assert drawn.shape == (4000, 3)
    assert component.shape == (4000,)
    for k in range(2):
        chosen = component == k
        np.testing.assert_allclose(drawn[chosen].mean(axis=0), model.means_[k], atol=0.15)
        np.testing.assert_allclose(drawn[chosen].std(axis=0), 1.0, atol=0.1)
    np.testing.assert_array_equal(drawn, model.sample(4000)[0])
    with pytest.raises(ValueError, match="at least one"):
        model.sample(0)


@pytest.mark.parametrize("covariance_type", COVARIANCES)
def test_parameters_set_by_hand_make_a_model(covariance_type: str) -> None:
    X, _ = two_groups()
    fitted = GaussianMixture(2, covariance_type=covariance_type, random_state=0).fit(X)
    by_hand = GaussianMixture(2, covariance_type=covariance_type)
    with pytest.raises(NotFittedError):
        by_hand.predict(X)
    by_hand.weights_, by_hand.means_ = fitted.weights_, fitted.means_
    by_hand.precisions_cholesky_ = fitted.precisions_cholesky_
    np.testing.assert_allclose(by_hand.score_samples(X), fitted.score_samples(X), rtol=1e-9)
    by_hand.covariances_ = fitted.covariances_
    np.testing.assert_allclose(by_hand.score_samples(X), fitted.score_samples(X), rtol=1e-12)
    by_hand.means_ = fitted.means_ + 1.0
    assert by_hand.score(X) < fitted.score(X)


def test_a_warm_start_goes_on() -> None:
    X, _ = two_groups()
    whole = GaussianMixture(2, init_params="random", random_state=0, tol=0, max_iter=6)
    model = GaussianMixture(
        2, init_params="random", random_state=0, tol=0, max_iter=3, warm_start=True
    )
    with pytest.warns(ConvergenceWarning):
        whole.fit(X)
    for _ in range(2):
        with pytest.warns(ConvergenceWarning):
            model.fit(X)
    np.testing.assert_allclose(model.means_, whole.means_, rtol=1e-12)
    # A model of another size cannot go on from these parameters, so it begins anew.
    assert len(model.set_params(n_components=3, tol=1.0).fit(X).weights_) == 3


def test_a_warm_start_notices_that_nothing_is_left_to_gain() -> None:
    X, _ = two_groups()
    model = GaussianMixture(2, random_state=0, max_iter=1, warm_start=True)
    fits = 0
    while not (fits and model.converged_):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(X)
        fits += 1
    assert 1 < fits < 10
    again = clone(model).set_params(max_iter=999, init_params="random", tol=1e-7).fit(X)
    assert again.n_iter_ > 2
    assert again.fit(X).n_iter_ == 1
    assert again.converged_


def test_verbose_says_what_scikit_learn_says(capsys: pytest.CaptureFixture[str]) -> None:
    X, _ = two_groups()
    GaussianMixture(2, random_state=0, verbose=1, verbose_interval=1).fit(X)
    text = capsys.readouterr().out
    assert "Initialization 0" in text
    assert "Iteration 1\n" in text
    assert "Initialization converged." in text
    GaussianMixture(2, random_state=0, verbose=2, verbose_interval=1).fit(X)
    text = capsys.readouterr().out
    assert "time lapse" in text
    assert "ll change" in text
    GaussianMixture(2, random_state=0).fit(X)
    assert capsys.readouterr().out == ""


def test_the_best_of_several_starts_is_kept() -> None:
    X = np.vstack([two_groups(300)[0], two_groups(300)[0] + [20.0, 0.0, 0.0]])
    options: dict[str, Any] = {"init_params": "random", "tol": 1e-5, "max_iter": 500}
    several = GaussianMixture(4, n_init=6, random_state=0, **options).fit(X)
    single = [GaussianMixture(4, random_state=seed, **options).fit(X) for seed in range(3)]
    assert several.lower_bound_ >= max(m.lower_bound_ for m in single) - 1e-6


def test_no_convergence_warns_once_with_advice() -> None:
    X, _ = two_groups()
    with pytest.warns(ConvergenceWarning, match="max_steps") as caught:
        GaussianMixture(2, tol=0, max_iter=2, random_state=0).fit(X)
    assert len(caught) == 1
    assert caught[0].filename == __file__


# --- gaps and weights ----------------------------------------------------------------------------


@pytest.mark.parametrize("init_params", ["kmeans", "k-means++", "random", "random_from_data"])
@pytest.mark.parametrize("covariance_type", COVARIANCES)
def test_gaps_are_integrated_out(covariance_type: str, init_params: str) -> None:
    X = with_gaps(two_groups(1500)[0])
    X[::100] = np.nan
    model = GaussianMixture(
        2, covariance_type=covariance_type, init_params=init_params, n_init=3, random_state=0
    )
    # Random responsibilities begin on a plateau, where a step gains next to nothing; a covariance
    # shared by equal components is the data's own, and keeps them equal to first order.
    model.set_params(max_iter=3000, tol=1e-9).fit(X)
    if (covariance_type, init_params) != ("tied", "random"):
        np.testing.assert_allclose(aligned(model.means_), MEANS, atol=0.25)
    unseen = model.score_samples(X)[::100]
    assert (unseen == 0).all()
    np.testing.assert_allclose(model.predict_proba(X)[::100], np.tile(model.weights_, (15, 1)))
    seen = ~np.isnan(X).all(axis=1)
    assert model.score(X) == pytest.approx(model.score_samples(X)[seen].mean(), rel=1e-12)


def test_masked_entries_are_missing() -> None:
    X = with_gaps(two_groups(300)[0])
    masked = np.ma.MaskedArray(np.nan_to_num(X, nan=1e6), np.isnan(X))
    model = GaussianMixture(2, random_state=0)
    assert same(clone(model).fit(masked), model.fit(X))
    np.testing.assert_array_equal(model.score_samples(masked), model.score_samples(X))


@pytest.mark.parametrize("covariance_type", COVARIANCES)
def test_a_weight_is_a_number_of_rows(covariance_type: str) -> None:
    X = with_gaps(two_groups(300)[0], 0.1)
    weight = np.random.default_rng(2).integers(0, 4, size=300)
    repeated = np.repeat(X, weight, axis=0)
    options: dict[str, Any] = {
        "covariance_type": covariance_type,
        "weights_init": [0.5, 0.5],
        "means_init": MEANS,
        "precisions_init": {
            "full": [np.eye(3)] * 2,
            "tied": np.eye(3),
            "diag": np.ones((2, 3)),
            "spherical": np.ones(2),
        }[covariance_type],
    }
    one = GaussianMixture(2, **options).fit(X, sample_weight=weight)
    other = GaussianMixture(2, **options).fit(repeated)
    np.testing.assert_allclose(one.means_, other.means_, rtol=1e-10)
    np.testing.assert_allclose(one.covariances_, other.covariances_, rtol=1e-9)
    assert one.lower_bound_ == pytest.approx(other.lower_bound_, rel=1e-12)
    assert one.score(X, sample_weight=weight) == pytest.approx(one.score(repeated), rel=1e-12)
    assert one.bic(X, sample_weight=weight) == pytest.approx(one.bic(repeated), rel=1e-12)
    assert one.aic(X, sample_weight=weight) == pytest.approx(one.aic(repeated), rel=1e-12)


@pytest.mark.parametrize("init_params", ["kmeans", "k-means++", "random", "random_from_data"])
def test_rows_of_weight_nothing_are_no_rows(init_params: str) -> None:
    X, _ = two_groups(300)
    far = np.full((100, 3), 1e6)
    weight = np.r_[np.ones(300), np.zeros(100)]
    options: dict[str, Any] = {"init_params": init_params, "random_state": 0}
    one = GaussianMixture(2, **options).fit(np.vstack([X, far]), sample_weight=weight)
    assert np.abs(one.means_).max() < 10


def test_a_weak_prior_holds_components_of_few_rows() -> None:
    X, _ = two_groups(40)
    loose = GaussianMixture(6, reg_covar=0, random_state=0, max_iter=1000, n_init=3)
    held = clone(loose).set_params(prior="weak")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        loose.fit(X)
        held.fit(X)
    assert np.linalg.det(held.covariances_).min() > np.linalg.det(loose.covariances_).min()
    assert held.lower_bounds_ == sorted(held.lower_bounds_)


def test_singular_components_are_reported_not_nan() -> None:
    X = np.vstack([np.zeros((50, 2)), np.ones((50, 2))])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = GaussianMixture(3, reg_covar=0, init_params="random", random_state=0).fit(X)
    assert np.isfinite(model.means_).all()
    assert np.isfinite(model.covariances_).all()
    assert any("floor" in line or "re-seeded" in line for line in model.warnings_)


@pytest.mark.parametrize("covariance_type", COVARIANCES)
def test_single_precision_is_close(covariance_type: str) -> None:
    X, _ = two_groups(2000)
    one = GaussianMixture(2, covariance_type=covariance_type, random_state=0).fit(X)
    other = clone(one).set_params(dtype="float32").fit(X)
    np.testing.assert_allclose(other.means_, one.means_, atol=1e-4)
    assert other.score(X) == pytest.approx(one.score(X), rel=1e-5)


# --- the way rows are cut and where they are worked on -------------------------------------------


def test_threads_and_workers_change_no_bit() -> None:
    X = with_gaps(two_groups(3000)[0], 0.05)
    fits = [
        GaussianMixture(2, random_state=0, chunk_rows=256, scheduler=scheduler, workers=workers)
        for scheduler, workers in (("synchronous", None), ("threads", 1), ("threads", 3))
    ]
    first, *others = (model.fit(X) for model in fits)
    for other in others:
        assert same(first, other)
        np.testing.assert_array_equal(first.predict_proba(X), other.predict_proba(X))


def test_many_rows_start_from_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(face, "START_ROWS", 500)
    X, component = two_groups(5000)
    for init_params in ("kmeans", "k-means++", "random", "random_from_data"):
        model = GaussianMixture(2, init_params=init_params, n_init=3, random_state=0)
        model.set_params(tol=1e-5).fit(X)
        assert (model.predict(X) == component).mean() in (0.0, 1.0), init_params
        assert same(clone(model).fit(X), model)
    all_given = GaussianMixture(
        2, weights_init=[0.5, 0.5], means_init=MEANS, precisions_init=[np.eye(3)] * 2
    ).fit(X)
    np.testing.assert_allclose(all_given.means_, MEANS, atol=0.1)


# --- bad input -----------------------------------------------------------------------------------


WRONG_PARAMETERS: list[tuple[dict[str, Any], str]] = [
    ({"n_components": 0}, "'n_components' parameter of GaussianMixture must be an int of at"),
    ({"n_components": 2.5}, "Got 2.5 instead"),
    ({"n_components": 1000}, "Expected n_samples >= n_components"),
    ({"tol": -1}, "'tol'"),
    ({"max_iter": -1}, "'max_iter'"),
    ({"n_init": 0}, "'n_init'"),
    ({"reg_covar": -1e-6}, "'reg_covar'"),
    ({"chunk_rows": 0}, "'chunk_rows'"),
    ({"covariance_type": "round"}, "one of full, tied, diag, spherical. Got 'round'"),
    ({"init_params": "magic"}, "one of kmeans, k-means.., random, random_from_data"),
    ({"prior": "strong"}, "prior 'strong' is not one of weak, None"),
    ({"dtype": "int8"}, "dtype 'int8' is not one of float64, float32"),
    ({"scheduler": "nowhere"}, "scheduler 'nowhere' is not"),
    ({"workers": 0}, "workers is 0"),
    ({"random_state": "x"}, "cannot be used to seed"),
    ({"weights_init": [0.5]}, r"'weights' should have the shape of \(2,\)"),
    ({"weights_init": [0.5, 0.6]}, "normalized"),
    ({"weights_init": [-0.5, 1.5]}, r"range \[0, 1\]"),
    ({"means_init": [[0.0, 0.0]]}, "'means' should have the shape"),
    ({"means_init": [[0.0, 0.0, np.nan]] * 2}, "NaN"),
    ({"precisions_init": [np.eye(3)]}, "'full precision' should have the shape"),
    ({"precisions_init": [-np.eye(3)] * 2}, "symmetric, positive-definite"),
    ({"precisions_init": [np.eye(3) + np.eye(3, k=1)] * 2}, "symmetric, positive-definite"),
    (
        {"covariance_type": "diag", "precisions_init": np.zeros((2, 3))},
        "'diag precision' should be positive",
    ),
]


@pytest.mark.parametrize(("options", "message"), WRONG_PARAMETERS)
def test_wrong_parameters_are_named(options: dict[str, Any], message: str) -> None:
    X, _ = two_groups(100)
    with pytest.raises(ValueError, match=message):
        GaussianMixture(**{"n_components": 2, **options}).fit(X)


def test_wrong_rows_are_named() -> None:
    X, _ = two_groups(100)
    model = GaussianMixture(2, random_state=0).fit(X)
    with pytest.raises(ValueError, match="3 features"):
        model.predict(X[:, :2])
    spoilt = X.copy()
    spoilt[60, 1] = np.inf
    for ask in (model.fit, model.predict, model.score, model.partial_fit):
        with pytest.raises(DataError, match="X: row 60, column 'x1' is infinite"):
            ask(spoilt)
    with pytest.raises(DataError, match=r"row 7 has weight -1"):
        model.fit(X, sample_weight=np.where(np.arange(100) == 7, -1.0, 1.0))
    with pytest.raises(ValueError, match=r"sample_weight\.shape"):
        model.fit(X, sample_weight=np.ones(99))
    with pytest.raises(ValueError, match=r"weights name a column \('w'\), but an array has no"):
        model.fit(X, sample_weight="w")
    with pytest.raises(ValueError, match="zero weight"):
        model.fit(X, sample_weight=np.zeros(100))
    with pytest.raises(ValueError, match="no observed entry"):
        model.fit(np.full((10, 3), np.nan))
    with pytest.raises(ValueError, match="n_components = 2 and 1 rows"):
        model.fit(np.vstack([X[:1], np.full((10, 3), np.nan)]))


def test_a_refused_fit_leaves_the_columns_of_the_last_one() -> None:
    X, _ = two_groups(100)
    model = GaussianMixture(2, random_state=0).fit(pd.DataFrame(X, columns=["a", "b", "c"]))
    before = model.score_samples(pd.DataFrame(X, columns=["a", "b", "c"]))
    with pytest.raises(DataError, match="infinite"):
        model.fit(np.hstack([X, np.full((100, 1), np.inf)]))
    assert list(model.feature_names_in_) == ["a", "b", "c"]
    after = model.score_samples(pd.DataFrame(X, columns=["a", "b", "c"]))
    np.testing.assert_array_equal(before, after)
    new = GaussianMixture(2)
    with pytest.raises(DataError, match="infinite"):
        new.partial_fit(np.full((10, 2), np.inf))
    assert not hasattr(new, "n_features_in_")


@pytest.mark.parametrize("k", [1, 2])
def test_rows_beyond_the_sample_are_looked_at_without_a_step(k: int) -> None:
    X = np.random.default_rng(0).normal(size=(60_000, 2))
    model = GaussianMixture(k, max_iter=0, n_init=1, random_state=0)
    assert model.fit(X).n_iter_ == 0
    weight = np.ones(60_000)
    for row in (7, 59_999):
        spoilt, heavy = X.copy(), weight.copy()
        spoilt[row, 1] = heavy[row] = np.inf
        with pytest.raises(DataError, match=f"row {row}, column 'x1' is infinite"):
            model.fit(spoilt)
        with pytest.raises(DataError, match=f"row {row} has weight inf"):
            model.fit(X, sample_weight=heavy)


def test_names_of_columns_are_kept_and_compared() -> None:
    X, _ = two_groups(100)
    frame = pd.DataFrame(X, columns=["length", "width", "mass"])
    model = GaussianMixture(2, random_state=0).fit(frame)
    assert list(model.feature_names_in_) == ["length", "width", "mass"]
    assert model.story_.schema.names == ("length", "width", "mass")
    with pytest.raises(ValueError, match="feature names"):
        model.predict(frame[["width", "length", "mass"]])


# --- beyond memory -------------------------------------------------------------------------------

NAMES = ["length", "width", "mass"]


def out_of_core(kind: str, X: np.ndarray, folder: Path) -> Any:
    """The rows in a form that need not be in memory, in several chunks."""
    if kind == "dask":
        return da.from_array(X, chunks=(256, 2))
    if kind == "npy":
        np.save(folder / "rows.npy", X)
        return folder / "rows.npy"
    if kind == "xarray":
        labels = {"feature": NAMES, "row": np.arange(len(X)) * 10}
        return xarray.DataArray(X, dims=("row", "feature"), coords=labels).chunk(row=256)
    if kind == "parquet":
        table = pa.table({name: X[:, j] for j, name in enumerate(NAMES)})
        pq.write_table(table, folder / "rows.parquet", row_group_size=256)
        return str(folder / "rows.parquet")
    array = zarr.create_array(
        str(folder / "rows.zarr"), shape=X.shape, chunks=(256, 3), dtype=X.dtype
    )
    array[:] = X
    return array if kind == "zarr" else folder / "rows.zarr"


OUT_OF_CORE = ("dask", "npy", "xarray", "parquet", "zarr", "zarr path")


@pytest.mark.parametrize("kind", OUT_OF_CORE)
@pytest.mark.parametrize("few", [True, False])
def test_out_of_core_rows(
    kind: str, few: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not few:
        monkeypatch.setattr(face, "RESIDENT_NUMBERS", 0)
    X = with_gaps(two_groups(1000)[0], 0.05)
    lazy = out_of_core(kind, X, tmp_path)
    options: dict[str, Any] = {"n_components": 2, "random_state": 0, "tol": 1e-7, "n_init": 2}
    model, memory = GaussianMixture(**options).fit(lazy), GaussianMixture(**options).fit(X)
    np.testing.assert_allclose(aligned(model.means_), aligned(memory.means_), atol=1e-3)
    if few:
        assert same(model, memory)
    named = kind in ("xarray", "parquet")
    rows: Any = pd.DataFrame(X, columns=NAMES) if named else X
    assert hasattr(model, "feature_names_in_") == named
    if named:
        assert model.story_.schema.names == tuple(NAMES)
    for answer, expected in (
        (model.predict(lazy), model.predict(rows)),
        (model.predict_proba(lazy), model.predict_proba(rows)),
        (model.score_samples(lazy), model.score_samples(rows)),
        (clone(model).fit_predict(lazy), model.predict(rows)),
    ):
        inner = answer.data if kind == "xarray" else answer
        assert isinstance(inner, da.Array)
        assert inner.shape == expected.shape
        assert inner.dtype == expected.dtype
        assert inner.numblocks[0] == (1 if kind == "npy" else 4)
        np.testing.assert_allclose(np.asarray(answer), expected, rtol=1e-12)
    assert model.score(lazy) == pytest.approx(model.score(rows), rel=1e-12)
    assert model.bic(lazy) == pytest.approx(model.bic(rows), rel=1e-12)


def test_weights_beyond_memory() -> None:
    X, _ = two_groups(1000)
    weight = np.random.default_rng(2).integers(0, 3, size=1000).astype(float)
    model = GaussianMixture(2, random_state=0)
    expected = clone(model).fit(X, sample_weight=weight)
    rows = da.from_array(X, chunks=(300, 3))
    for given in (weight, da.from_array(weight, chunks=250)):
        assert same(model.fit(rows, sample_weight=given), expected)
        assert model.score(rows, sample_weight=given) == pytest.approx(
            expected.score(X, sample_weight=weight), rel=1e-12
        )


def test_xarray_answers_are_labelled() -> None:
    X, _ = two_groups(100)
    rows = xarray.DataArray(
        X,
        dims=("bird", "feature"),
        coords={"bird": [f"b{i}" for i in range(100)], "feature": NAMES},
    )
    model = GaussianMixture(2, random_state=0).fit(rows)
    for answer in (model.predict(rows), model.predict_proba(rows), model.score_samples(rows)):
        assert isinstance(answer, xarray.DataArray)
        assert isinstance(answer.data, np.ndarray)
        assert answer.dims[0] == "bird"
        assert list(answer["bird"].values[:2]) == ["b0", "b1"]
    assert model.predict_proba(rows).dims == ("bird", "component")
    np.testing.assert_array_equal(model.predict(rows), model.predict(rows.to_pandas()))


def test_answers_out_of_core_are_lazy(tmp_path: Path) -> None:
    X, _ = two_groups(1000)
    model = GaussianMixture(2, random_state=0).fit(X)
    read: list[int] = []

    def noted(block: np.ndarray) -> np.ndarray:
        read.append(len(block))
        return block

    rows = da.from_array(X, chunks=(250, 3)).map_blocks(noted, meta=np.empty((0, 0)))
    answer = model.predict_proba(rows)
    assert read == []
    np.testing.assert_array_equal(answer.blocks[2], model.predict_proba(X)[500:750])
    assert read == [250]
    frame = dd.from_pandas(pd.DataFrame(X, columns=NAMES), npartitions=3)
    np.testing.assert_array_equal(model.predict(frame), model.predict(X))


def test_answers_of_several_arrays_in_one_graph() -> None:
    X, _ = two_groups(200)
    model = GaussianMixture(2, random_state=0).fit(X)
    one, other = (xarray.DataArray(rows, dims=("row", "feature")) for rows in (X, X[::-1].copy()))
    answers = [model.predict(rows.chunk(row=100)).data for rows in (one, other)]
    expected = model.predict(X)
    np.testing.assert_array_equal(da.concatenate(answers), np.r_[expected, expected[::-1]])


def pa_file(folder: Path, columns: dict[str, Any]) -> str:
    pq.write_table(pa.table(columns), folder / "table.parquet", row_group_size=300)
    return str(folder / "table.parquet")


def test_columns_out_of_core_go_by_name(tmp_path: Path) -> None:
    X, _ = two_groups(1000)
    frame = pd.DataFrame(X, columns=NAMES)
    model = GaussianMixture(2, random_state=0).fit(frame)
    expected = model.predict(frame)
    turned = frame[NAMES[::-1]].assign(further=1.0)
    array = xarray.DataArray(
        turned.to_numpy(), dims=("row", "feature"), coords={"feature": list(turned.columns)}
    )
    for rows in (
        pa_file(tmp_path, {str(name): column.to_numpy() for name, column in turned.items()}),
        array,
        turned.rename_axis("row").to_xarray(),
        dd.from_pandas(turned, npartitions=2),
    ):
        np.testing.assert_array_equal(np.asarray(model.predict(rows)), expected)
    with pytest.raises(DataError, match="no column 'mass'"):
        model.predict(array.sel(feature=["length", "width"]))
    with pytest.raises(DataError, match="no column 'mass'"):
        model.predict(dd.from_pandas(turned[["length", "width"]], npartitions=2))


def test_wrong_rows_out_of_core_are_named(tmp_path: Path) -> None:
    X, _ = two_groups(1000)
    model = GaussianMixture(2, random_state=0)
    endless = np.where(np.arange(3000).reshape(1000, 3) == 1501, np.inf, X)
    for kind in ("dask", "zarr"):
        with pytest.raises(DataError, match=r"row 500, column 'x1' is infinite"):
            model.fit(out_of_core(kind, endless, tmp_path))
    model.fit(X)
    with pytest.raises(DataError, match=r"row 500, column 'x1' is infinite"):
        model.predict(out_of_core("dask", endless, tmp_path)).compute()
    with pytest.raises(ValueError, match="X has 2 features, but GaussianMixture is expecting 3"):
        model.predict(da.from_array(X[:, :2], chunks=100))
    with pytest.raises(ValueError, match="minimum of 2 is required"):
        model.fit(da.from_array(X[:1], chunks=100))
    with pytest.raises(ValueError, match="needs real columns"):
        model.fit(pa_file(tmp_path, {"length": X[:, 0], "carrier": ["AA", "UA"] * 500}))
    with pytest.raises(ValueError, match=r"are real, real, categorical; .* fitted with real"):
        GaussianMixture(2, random_state=0).fit(X).predict(
            pa_file(tmp_path, {"a": X[:, 0], "b": X[:, 1], "c": ["AA", "UA"] * 500})
        )
    with pytest.raises(GenstreamError, match="nowhere"):
        model.fit(tmp_path / "nowhere.npy")


# --- mixed columns -------------------------------------------------------------------------------

FLIGHT_COLUMNS = {
    "delay": "real",
    "late": "binary",
    "seats": "count",
    "carrier": "categorical",
    "month": "categorical",
    "size": "categorical",
}
CARRIERS = np.array(["AA", "UA", "DL"])


def flights(n_rows: int = 1500, seed: int = 0) -> tuple[pd.DataFrame, np.ndarray]:
    """Two groups of flights whose columns are of every kind, with gaps, and their groups."""
    rng = np.random.default_rng(seed)
    group = rng.integers(2, size=n_rows)
    chance = np.array([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]])
    carrier = (rng.random(n_rows)[:, None] > chance[group].cumsum(axis=1)).sum(axis=1)
    frame = pd.DataFrame(
        {
            "note": "not used",
            "delay": rng.normal(6.0 * group),
            "late": rng.random(n_rows) < 0.2 + 0.6 * group,
            "seats": rng.poisson(3 + 9 * group),
            "carrier": CARRIERS[carrier],
            "month": rng.integers(1, 13, size=n_rows),
            "size": pd.Categorical(np.array(["small", "large"])[group]),
        }
    )
    frame.loc[::7, "delay"] = np.nan
    frame.loc[3, "carrier"] = None
    return frame, group


def test_mixture_of_a_table() -> None:
    frame, group = flights()
    model = Mixture(2, columns=FLIGHT_COLUMNS, random_state=0).fit(frame)
    assert model.converged_
    assert (model.predict(frame) == group).mean() in (0.0, 1.0)
    assert model.schema_.kinds == tuple(FLIGHT_COLUMNS.values())
    assert set(model.schema_["carrier"].levels) == set(CARRIERS)
    assert list(model.feature_names_in_) == list(FLIGHT_COLUMNS)
    assert model.n_features_in_ == 6
    parameters = model.params_
    order = np.argsort(parameters["family.rate"].sel(count="seats").values)
    np.testing.assert_allclose(
        parameters["family.level_probability"].sel(level="carrier=DL").values[order],
        [0.1, 0.8],
        atol=0.05,
    )
    np.testing.assert_allclose(
        parameters["family.rate"].sel(count="seats").values[order], [3, 12], rtol=0.05
    )
    # A column's place in the table means nothing, its name does.
    turned = frame[frame.columns[::-1]]
    np.testing.assert_array_equal(model.predict_proba(turned), model.predict_proba(frame))
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(again.score_samples(frame), model.score_samples(frame))
    assert same_params(clone(model).fit(frame), model)


def same_params(one: Mixture, other: Mixture) -> bool:
    return bool(one.params_.identical(other.params_))


def test_a_table_of_any_make_gives_the_same_fit() -> None:
    frame, _ = flights()
    expected = Mixture(2, columns=FLIGHT_COLUMNS, random_state=0).fit(frame)
    schema = expected.schema_
    table = pa.Table.from_pandas(frame, preserve_index=False)
    batch = table.combine_chunks().to_batches()[0]
    assert same_params(clone(expected).fit(table), expected)
    assert same_params(clone(expected).fit(batch), expected)
    assert same_params(clone(expected).set_params(columns=schema).fit(table), expected)
    values = frame[list(FLIGHT_COLUMNS)].to_numpy(dtype=object)
    assert same_params(clone(expected).fit(values), expected)
    np.testing.assert_array_equal(expected.predict(values), expected.predict(frame))
    # Under a schema an array holds codes.
    codes = np.column_stack(
        [
            frame[c.name].map({label: i for i, label in enumerate(c.levels)})
            if c.name in ("carrier", "size")
            else frame[c.name].map({int(label): i for i, label in enumerate(c.levels)})
            if c.name == "month"
            else frame[c.name].astype(float)
            for c in schema.columns
        ]
    ).astype(float)
    coded = clone(expected).set_params(columns=schema).fit(codes)
    assert same_params(coded, expected)
    np.testing.assert_array_equal(coded.predict(frame), expected.predict(frame))
    assert coded.sample(3)[0].dtype == np.float64


def test_kinds_are_inferred_from_types() -> None:
    frame, _ = flights()
    model = Mixture(2, random_state=0).fit(frame.drop(columns="note"))
    kinds = dict(zip(model.schema_.names, model.schema_.kinds, strict=True))
    assert kinds == {**FLIGHT_COLUMNS, "seats": "real", "month": "real"}
    numbers = frame[["delay", "seats"]]
    model = Mixture(2, random_state=0).fit(numbers)
    assert model.schema_.kinds == ("real", "real")
    assert model.story_.family.params_type.__name__ == "FullParams"
    with pytest.raises(ValueError, match="feature names"):
        model.predict(numbers[["seats", "delay"]])


def test_row_labels_of_a_table_are_no_column() -> None:
    frame, _ = flights()
    named = frame.drop(columns="note")
    model = Mixture(2, random_state=0).fit(named.set_index(named.index[::-1] * 2))
    assert list(model.feature_names_in_) == list(FLIGHT_COLUMNS)


def test_rows_drawn_take_the_form_of_the_rows_fitted() -> None:
    frame, _ = flights()
    columns = list(FLIGHT_COLUMNS)
    model = Mixture(2, columns=FLIGHT_COLUMNS, random_state=0).fit(frame)
    drawn, component = model.sample(500)
    assert isinstance(drawn, pd.DataFrame)
    pd.testing.assert_series_equal(drawn.dtypes, frame[columns].dtypes)
    assert set(drawn["carrier"]) <= set(CARRIERS)
    assert set(drawn["month"]) <= set(range(1, 13))
    assert (model.predict(drawn) == component).mean() > 0.99
    table = pa.Table.from_pandas(frame[columns], preserve_index=False)
    drawn = clone(model).fit(table).sample(5)[0]
    assert isinstance(drawn, pa.Table)
    assert [field.type for field in drawn.schema][:5] == [field.type for field in table.schema][:5]
    kinds = {"delay": "real", "seats": "count", "month": "categorical"}
    array = frame[list(kinds)].to_numpy()
    drawn = Mixture(2, columns=kinds, random_state=0).fit(array).sample(50)[0]
    assert drawn.dtype == np.float64
    assert set(drawn[:, 2]) <= set(range(1, 13))


def test_weights_of_a_table() -> None:
    frame, _ = flights(400)
    weight = np.random.default_rng(0).integers(0, 3, size=400)
    model = Mixture(2, columns=FLIGHT_COLUMNS, random_state=0).fit(frame, sample_weight=weight)
    repeated = frame.loc[np.repeat(frame.index, weight)]
    assert model.score(frame, sample_weight=weight) == pytest.approx(model.score(repeated))
    assert model.bic(frame, sample_weight=weight) == pytest.approx(model.bic(repeated))


def test_wrong_tables_are_named() -> None:
    frame, _ = flights(200)
    model = Mixture(2, columns=FLIGHT_COLUMNS, random_state=0).fit(frame)
    unseen = frame.copy()
    unseen.loc[11, "carrier"] = "ZZ"
    with pytest.raises(DataError, match="row 11, column 'carrier': 'ZZ' is not one of its levels"):
        model.predict(unseen)
    negative = frame.assign(seats=-1)
    with pytest.raises(DataError, match="row 0, column 'seats': -1"):
        model.score(negative)
    with pytest.raises(DataError, match="no column 'seats'"):
        model.predict(frame.drop(columns="seats"))
    with pytest.raises(DataError, match=r"no column 'seat'.*did you mean 'seats'"):
        Mixture(2, columns={"seat": "count"}).fit(frame)
    with pytest.raises(ValueError, match="'whole' is not one of real, binary, count, categorical"):
        Mixture(2, columns={"seats": "whole"}).fit(frame)
    with pytest.raises(ValueError, match="'full' needs real columns"):
        Mixture(2, columns={"seats": "count"}, covariance="full").fit(frame)
    with pytest.raises(DataError, match=r"shape \(200, 3\), but 6 columns are described"):
        model.predict(np.zeros((200, 3)))
    with pytest.raises(DataError, match="2 columns, but 1 are described: seats"):
        Mixture(2, columns=Schema((Column("seats", "count"),))).fit(np.zeros((10, 2)))
    with pytest.raises(DataError, match="row 1, column 'seats': -2 is not possible"):
        Mixture(2, columns=Schema((Column("seats", "count"),))).fit([[1], [-2], [3]])
    with pytest.raises(DataError, match="minimum of 2"):
        Mixture(columns=FLIGHT_COLUMNS).fit(frame[:1])
    with pytest.raises(DataError, match=r"X: .*mixed"):
        Mixture().fit(frame.assign(mixed=[1, "a"] * 100))
    for columns in ("real", ["real", "real"], {}):
        with pytest.raises(ValueError, match="'columns' parameter of Mixture"):
            Mixture(columns=columns).fit(frame)
    with pytest.raises(DataError, match="column 'carrier' of the dask DataFrame holds"):
        Mixture().fit(dd.from_pandas(frame[["delay", "carrier"]], npartitions=2))
    with pytest.raises(NotFittedError):
        _ = Mixture().params_


def test_tables_beyond_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frame, group = flights()
    frame = frame.assign(share=np.random.default_rng(0).integers(0, 3, size=len(frame)) * 1.0)
    path = tmp_path / "flights.parquet"
    frame.to_parquet(path, row_group_size=400)
    in_memory = Mixture(2, columns=FLIGHT_COLUMNS, random_state=0).fit(frame)
    resident = clone(in_memory).fit(path)
    assert same_params(resident, in_memory)
    monkeypatch.setattr(face, "RESIDENT_NUMBERS", 0)
    model = clone(in_memory).fit(path)
    assert model.schema_ == in_memory.schema_
    labels = model.predict(path)
    assert isinstance(labels, da.Array)
    assert labels.numblocks == (4,)
    assert (np.asarray(labels) == group).mean() in (0.0, 1.0)
    np.testing.assert_allclose(np.asarray(model.score_samples(path)), model.score_samples(frame))
    assert model.score(path) == pytest.approx(model.score(frame), rel=1e-12)
    drawn = model.sample(20)[0]
    assert isinstance(drawn, pa.Table)
    assert set(drawn["carrier"].to_pylist()) <= set(CARRIERS)
    weighted = clone(model).fit(path, sample_weight="share")
    expected = clone(model).fit(frame, sample_weight="share")
    assert weighted.score(path) == pytest.approx(expected.score(frame), rel=1e-6)
    assert weighted.score(path, sample_weight="share") == pytest.approx(
        weighted.score(frame, sample_weight=frame["share"]), rel=1e-12
    )
    other = frame.assign(carrier="ZZ")
    other.to_parquet(tmp_path / "other.parquet")
    with pytest.raises(DataError, match=r"other\.parquet: row 0, column 'carrier': 'ZZ' is not"):
        model.predict(tmp_path / "other.parquet").compute()
    frame.to_csv(tmp_path / "flights.csv", index=False)
    with pytest.raises(DataError, match="cannot be fitted in place: ingest it"):
        model.fit(tmp_path / "flights.csv")


def test_a_dataset_of_variables() -> None:
    frame, _ = flights(400)
    columns = ["delay", "seats", "carrier"]
    rows = frame[columns].rename_axis("flight").to_xarray()
    kinds = {name: FLIGHT_COLUMNS[name] for name in columns}
    model = Mixture(2, columns=kinds, random_state=0).fit(rows)
    labels = model.predict(rows)
    assert isinstance(labels, xarray.DataArray)
    assert labels.dims == ("flight",)
    assert same_params(clone(model).fit(frame), model)
    drawn = model.sample(5)[0]
    assert isinstance(drawn, xarray.Dataset)
    assert list(drawn.data_vars) == columns
    np.testing.assert_array_equal(model.predict(drawn), model.sample(5)[1])


# --- rows that arrive ----------------------------------------------------------------------------


@pytest.mark.parametrize("covariance", COVARIANCES)
@pytest.mark.parametrize("gaps", [False, True])
def test_partial_fit_is_online_em_of_the_library(covariance: str, gaps: bool) -> None:
    X, _ = two_groups(900)
    X = with_gaps(X) if gaps else X
    weights = np.random.default_rng(3).choice([1.0, 2.0], len(X))
    model = GaussianMixture(2, covariance_type=covariance, random_state=0)
    model.partial_fit(X[:300], sample_weight=weights[:300])
    begun = GaussianMixture(2, covariance_type=covariance, random_state=0)
    source = NumpySource(X[:300], Schema.real(3), weights[:300])
    story, state = next(begun._starts(Passes(source), small=False))
    for n in range(0, 900, 300):
        if n:
            model.partial_fit(X[n : n + 300], sample_weight=weights[n : n + 300])
        rows = Rows.of(X[n : n + 300], weights[n : n + 300])
        state, _ = OnlineEM().learn(story, state, rows)
        assert model.state_.params.digest() == state.params.digest()
    assert model.n_iter_ == 3
    assert np.abs(aligned(model.means_) - MEANS).max() < 0.5
    assert np.isfinite(model.score(X))


def test_partial_fit_reads_lazy_data_to_the_same_bits() -> None:
    X, _ = two_groups(1_000)
    eager = GaussianMixture(2, random_state=0).partial_fit(X[:600]).partial_fit(X[600:])
    lazy = GaussianMixture(2, random_state=0).partial_fit(X[:600])
    lazy.partial_fit(da.from_array(X[600:], chunks=(37, -1)))
    assert same(eager, lazy)


def test_partial_fit_goes_on_from_a_fit_and_follows_new_rows() -> None:
    X, _ = two_groups(2_000)
    model = GaussianMixture(2, random_state=0).fit(X)
    before = model.score(X + 1.0)
    for _ in range(50):
        model.partial_fit(X + 1.0)
    assert model.score(X + 1.0) > before + 0.1
    assert model.n_iter_ > 50


def test_partial_fit_of_heavy_rows_moves_what_there_is() -> None:
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.standard_normal((1000, 2)), rng.standard_normal((1000, 2)) + 80])
    model = GaussianMixture(2, random_state=0).partial_fit(x, sample_weight=np.full(2000, 1e3))
    model.partial_fit(x[:1000], sample_weight=np.full(1000, 9e3))
    np.testing.assert_allclose(np.sort(model.means_[:, 0]), [0, 80], atol=0.1)
    assert 0.5 < model.weights_[model.means_[:, 0].argmin()] < 0.6


def test_partial_fit_of_mixed_columns() -> None:
    rng = np.random.default_rng(0)
    kind = rng.integers(2, size=400)
    table = pd.DataFrame(
        {"x": rng.normal(6.0 * kind), "c": np.where(kind == 1, "a", "b"), "n": rng.poisson(3, 400)}
    )
    model = Mixture(2, columns={"x": "real", "c": "categorical", "n": "count"}, random_state=0)
    model.partial_fit(table[:200])
    whole = model.score(table)
    for n in range(200, 400, 50):
        model.partial_fit(table[n : n + 50])
    assert model.state_.step == 5
    assert model.score(table) > whole - 0.2
    with pytest.raises(DataError, match="'z'"):
        model.partial_fit(table.assign(c="z"))
    assert model.state_.step == 5


def test_partial_fit_leaves_the_model_where_rows_cannot_be_learned() -> None:
    X = 1e-6 * two_groups(300)[0]
    model = GaussianMixture(2, random_state=0).partial_fit(X)
    digest = model.state_.params.digest()
    with pytest.raises(ValueError, match="expecting 3 features"):
        model.partial_fit(X[:, :2])
    with pytest.raises(DataError, match="no finite log-likelihood"):
        model.partial_fit(X * 1e155)
    assert model.state_.params.digest() == digest
    with pytest.raises(DataError, match="n_components = 9"):
        GaussianMixture(9).partial_fit(X[:4])


def test_partial_fit_goes_on_with_the_same_model_or_says_why_not() -> None:
    x = np.random.default_rng(0).standard_normal((300, 2))
    model = GaussianMixture(2, random_state=0).partial_fit(x)
    before = model.score(x)
    for change in ({"covariance_type": "diag"}, {"n_components": 3}):
        model.set_params(**change)
        with pytest.raises(ConfigError, match="partial_fit goes on with the same model"):
            model.partial_fit(x + 50)
        model.set_params(covariance_type="full", n_components=2)
    assert model.score(x) == before
    assert model.partial_fit(x).score(x) == pytest.approx(before, abs=0.5)
