"""The scikit-learn face: its contract, gaps and weights, and data beyond memory."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

import genstream.estimators
from genstream.errors import DataError
from genstream.estimators import GaussianMixture
from genstream.learn import FitState, Outcome

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


@pytest.mark.parametrize(
    "model",
    [
        GaussianMixture(),
        GaussianMixture(prior="weak", covariance_type="diag"),
    ],
    ids=repr,
)
def test_scikit_learn_contract(model: Any) -> None:
    results = check_estimator(model, on_fail=None, on_skip=None)
    wrong = [(r["check_name"], r["exception"]) for r in results if r["status"] == "failed"]
    assert not wrong
    skipped = [r["check_name"] for r in results if r["status"] == "skipped"]
    assert set(skipped) <= {"check_array_api_input"}


def test_constructor_is_scikit_learns_and_more() -> None:
    from sklearn.mixture import GaussianMixture as Reference

    theirs = Reference().get_params()
    ours = GaussianMixture().get_params()
    assert {name: ours[name] for name in theirs} == theirs
    assert set(ours) - set(theirs) == {"prior", "dtype", "chunk_rows", "scheduler", "workers"}


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
    monkeypatch.setattr(genstream.estimators, "START_ROWS", 500)
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
    with pytest.raises(ValueError, match="infinity"):
        model.predict(np.where(X > 5, np.inf, X))
    with pytest.raises(DataError, match=r"row 7 has weight -1"):
        model.fit(X, sample_weight=np.where(np.arange(100) == 7, -1.0, 1.0))
    with pytest.raises(ValueError, match=r"sample_weight\.shape"):
        model.fit(X, sample_weight=np.ones(99))
    with pytest.raises(ValueError, match="zero weight"):
        model.fit(X, sample_weight=np.zeros(100))
    with pytest.raises(ValueError, match="no observed entry"):
        model.fit(np.full((10, 3), np.nan))
    with pytest.raises(ValueError, match="n_components = 2 and 1 rows"):
        model.fit(np.vstack([X[:1], np.full((10, 3), np.nan)]))


def test_names_of_columns_are_kept_and_compared() -> None:
    X, _ = two_groups(100)
    frame = pd.DataFrame(X, columns=["length", "width", "mass"])
    model = GaussianMixture(2, random_state=0).fit(frame)
    assert list(model.feature_names_in_) == ["length", "width", "mass"]
    assert model.story_.schema.names == ("length", "width", "mass")
    with pytest.raises(ValueError, match="feature names"):
        model.predict(frame[["width", "length", "mass"]])
