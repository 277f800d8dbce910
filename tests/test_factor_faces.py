"""The faces of factor models: scikit-learn's own estimates, views of loadings, gaps, mixtures."""

from __future__ import annotations

from typing import Any

import dask.array as da
import numpy as np
import pandas as pd
import pytest
import xarray
from scipy.stats import multivariate_normal
from sklearn.base import clone
from sklearn.datasets import load_wine
from sklearn.decomposition import PCA
from sklearn.decomposition import FactorAnalysis as Reference

from genstream.errors import ConfigError, DataError
from genstream.estimators import (
    PPCA,
    FactorAnalysis,
    MixtureOfFactorAnalyzers,
    MixtureOfPPCA,
)


def wine() -> np.ndarray:
    X = load_wine().data
    return np.asarray((X - X.mean(axis=0)) / X.std(axis=0))


def with_gaps(X: np.ndarray, share: float = 0.2) -> np.ndarray:
    hidden = np.random.default_rng(1).random(X.shape) < share
    return np.where(hidden, np.nan, X)


def up_to_sign(found: np.ndarray, expected: np.ndarray, atol: float) -> None:
    signs = np.sign((found * expected).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(found * signs, expected, atol=atol)


# --- scikit-learn's estimates --------------------------------------------------------------------


def test_ppca_is_principal_component_analysis() -> None:
    X = wine()
    n = len(X)
    ours, theirs = PPCA(4, tol=1e-10).fit(X), PCA(4).fit(X)
    up_to_sign(ours.principal_axes_, theirs.components_, atol=1e-6)
    # scikit-learn divides by n - 1.
    share = (n - 1) / n
    np.testing.assert_allclose(ours.explained_variance_, theirs.explained_variance_ * share)
    np.testing.assert_allclose(ours.explained_variance_ratio_, theirs.explained_variance_ratio_)
    assert ours.noise_variance_ == pytest.approx(theirs.noise_variance_ * share)
    np.testing.assert_allclose(ours.get_covariance(), theirs.get_covariance() * share, atol=1e-8)
    np.testing.assert_allclose(ours.mean_, theirs.mean_, atol=1e-10)
    expected = multivariate_normal(ours.mean_, theirs.get_covariance() * share).logpdf(X)
    np.testing.assert_allclose(ours.score_samples(X), expected, rtol=1e-8)
    assert ours.score(X) == pytest.approx(expected.mean(), rel=1e-9)
    assert ours.score(X) >= theirs.score(X)
    # Complete data need one pass, and another to see that nothing is left to gain.
    assert ours.n_iter_ <= 3
    np.testing.assert_allclose(ours.get_precision() @ ours.get_covariance(), np.eye(13), atol=1e-8)


def test_factor_analysis_is_scikit_learns() -> None:
    X = wine()
    ours = FactorAnalysis(3, tol=1e-10, max_iter=5000).fit(X)
    theirs = Reference(3, tol=1e-10, max_iter=20_000, svd_method="lapack").fit(X)
    assert ours.score(X) == pytest.approx(theirs.score(X), abs=1e-6)
    np.testing.assert_allclose(ours.noise_variance_, theirs.noise_variance_, atol=1e-3)
    np.testing.assert_allclose(ours.get_covariance(), theirs.get_covariance(), atol=1e-3)
    up_to_sign(ours.components_, theirs.components_, atol=1e-3)
    signs = np.sign((ours.components_ * theirs.components_).sum(axis=1))
    np.testing.assert_allclose(ours.transform(X) * signs, theirs.transform(X), atol=1e-2)


def test_varimax_is_a_view() -> None:
    X = wine()
    plain = FactorAnalysis(2).fit(X)
    turned = clone(plain).set_params(rotation="varimax").fit(X)
    assert turned.state_.params.digest() == plain.state_.params.digest()
    np.testing.assert_allclose(turned.score_samples(X), plain.score_samples(X), rtol=1e-9)
    np.testing.assert_allclose(turned.get_covariance(), plain.get_covariance(), rtol=1e-9)

    def simplicity(components: np.ndarray) -> float:
        # Kaiser's: columns count alike, however much of them the factors explain.
        scaled = components / np.linalg.norm(components, axis=0)
        return float((scaled**2).var(axis=1).sum())

    angles = np.linspace(0, np.pi / 2, 200)
    spun = [[[np.cos(a), np.sin(a)], [-np.sin(a), np.cos(a)]] @ plain.components_ for a in angles]
    assert simplicity(turned.components_) >= max(map(simplicity, spun)) - 1e-9
    assert simplicity(turned.components_) > simplicity(plain.components_) + 0.01
    T = turned.transform(X)
    rows = turned.inverse_transform(T)
    np.testing.assert_allclose(rows, plain.inverse_transform(plain.transform(X)), atol=1e-8)
    with pytest.raises(ConfigError, match="'rotation'"):
        FactorAnalysis(2, rotation="oblimin").fit(X)


# --- factors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("face", [PPCA, FactorAnalysis])
def test_factors_are_posterior_means(face: Any) -> None:
    X = wine()
    model = face(2, random_state=0).fit(X)
    W = model.components_.T
    precision = np.linalg.inv(model.get_covariance())
    expected = (X - model.mean_) @ precision @ W
    np.testing.assert_allclose(model.transform(X), expected, atol=1e-9)
    np.testing.assert_allclose(clone(model).fit_transform(X), expected, atol=1e-9)
    gappy = with_gaps(X)
    gappy[3] = np.nan
    found = model.transform(gappy)
    assert (found[3] == 0).all()
    seen = ~np.isnan(gappy[0])
    inner = model.get_covariance()[np.ix_(seen, seen)]
    pull = W[seen].T @ np.linalg.solve(inner, (X[0] - model.mean_)[seen])
    np.testing.assert_allclose(found[0], pull, atol=1e-9)
    rows = model.inverse_transform(found)
    np.testing.assert_allclose(rows, found @ W.T + model.mean_)
    np.testing.assert_allclose(rows[3], model.mean_)
    with pytest.raises(DataError, match="2 factors"):
        model.inverse_transform(found[:, :1])


def test_factors_have_names_and_take_the_form_asked_for() -> None:
    X = wine()
    frame = pd.DataFrame(X, columns=load_wine().feature_names)
    model = PPCA(2).fit(frame)
    assert list(model.get_feature_names_out()) == ["ppca0", "ppca1"]
    shown = clone(model).set_output(transform="pandas").fit(frame).transform(frame)
    assert list(shown.columns) == ["ppca0", "ppca1"]
    np.testing.assert_array_equal(shown.to_numpy(), model.transform(frame))
    loadings = model.params_["family.loadings"]
    assert loadings["factor"].values.tolist() == ["ppca0", "ppca1"]
    np.testing.assert_array_equal(loadings.sel(factor="ppca1", component=0), model.components_[1])
    rows = xarray.DataArray(
        X, dims=("bottle", "trait"), coords={"trait": list(frame.columns), "bottle": range(178)}
    )
    found = model.transform(rows.chunk(bottle=100))
    assert found.dims == ("bottle", "factor")
    assert found["factor"].values.tolist() == ["ppca0", "ppca1"]
    assert isinstance(found.data, da.Array)
    np.testing.assert_allclose(found.values, model.transform(frame), rtol=1e-9)
    back = model.inverse_transform(found)
    assert back.dims == ("bottle", "feature")
    assert isinstance(back.data, da.Array)
    np.testing.assert_array_equal(back["bottle"], rows["bottle"])
    np.testing.assert_allclose(
        back.sel(feature="ash").values, model.inverse_transform(model.transform(frame))[:, 2]
    )


@pytest.mark.parametrize("face", [PPCA, FactorAnalysis])
def test_rows_drawn_come_with_their_factors(face: Any) -> None:
    model = face(2, random_state=0).fit(wine())
    drawn, factors = model.sample(20_000)
    assert factors.shape == (20_000, 2)
    np.testing.assert_allclose(np.cov(factors.T), np.eye(2), atol=0.05)
    np.testing.assert_allclose(np.cov(drawn.T), model.get_covariance(), atol=0.08)
    # What the factors leave is noise.
    rest = drawn - model.inverse_transform(factors)
    np.testing.assert_allclose(rest.var(axis=0), model.noise_variance_, rtol=0.1)
    lazy = model.draw(10**9, seed=3, chunk_rows=1000)
    assert lazy["factors"].shape == (10**9, 2)
    np.testing.assert_array_equal(
        lazy["values"][5_000:5_002].compute(),
        model.draw(6_000, seed=3, chunk_rows=1000)["values"][5_000:5_002].compute(),
    )


# --- gaps, conditions, starts --------------------------------------------------------------------


@pytest.mark.parametrize("face", [PPCA, FactorAnalysis])
def test_gaps_are_filled_and_columns_conditioned(face: Any) -> None:
    X = wine()
    gappy = with_gaps(X, 0.1)
    model = face(3, tol=1e-6, max_iter=1000).fit(gappy)
    filled = model.impute(gappy)
    hidden = np.isnan(gappy)
    np.testing.assert_array_equal(filled[~hidden], X[~hidden])
    error = np.sqrt(((filled - X)[hidden] ** 2).mean())
    assert error < 0.85 * np.sqrt((X[hidden] ** 2).mean())
    x = X[0]
    rest = model.condition({0: x[0], 12: x[12]})
    assert isinstance(rest, face)
    known, left = [0, 12], list(range(1, 12))
    covariance, mean = model.get_covariance(), model.mean_
    inner = covariance[np.ix_(known, known)]
    pull = covariance[np.ix_(left, known)] @ np.linalg.inv(inner)
    np.testing.assert_allclose(rest.mean_, mean[left] + pull @ (x - mean)[known], atol=1e-9)
    expected = covariance[np.ix_(left, left)] - pull @ covariance[np.ix_(known, left)]
    np.testing.assert_allclose(rest.get_covariance(), expected, atol=1e-9)
    total = rest.score_samples(x[None, left]) + model.marginal(known).score_samples(x[None, known])
    np.testing.assert_allclose(total, model.score_samples(x[None]), rtol=1e-9)
    assert rest.sample(5)[1].shape == (5, 3)


def test_too_few_columns_for_the_factors_make_a_mixture() -> None:
    model = FactorAnalysis(3).fit(wine())
    two = model.marginal([0, 1])
    assert type(two).__name__ == "Mixture"
    covariance = model.get_covariance()[:2, :2]
    X = wine()[:, :2]
    expected = multivariate_normal(model.mean_[:2], covariance).logpdf(X)
    np.testing.assert_allclose(two.score_samples(X), expected, rtol=1e-9)
    with pytest.raises(ValueError, match="n_features = 3"):
        PPCA(3).fit(X[:, [0, 1, 0]])


def test_loadings_may_be_kept() -> None:
    X = wine()
    model = FactorAnalysis(2).fit(X)
    kept = FactorAnalysis(2, start=model, frozen=("loadings",), max_iter=2000).fit(X + 1.0)
    np.testing.assert_allclose(kept.mean_, model.mean_ + 1.0, atol=1e-6)
    ours, theirs = kept.components_, model.components_
    np.testing.assert_allclose(ours.T @ ours, theirs.T @ theirs, atol=1e-9)


# --- mixtures ------------------------------------------------------------------------------------


def groups(n_rows: int = 900) -> tuple[np.ndarray, np.ndarray]:
    """Two groups with a factor of their own each."""
    rng = np.random.default_rng(0)
    component = rng.integers(2, size=n_rows)
    directions = np.array([[2.0, 2.0, 0, 0, 0], [0, 0, 0, 2.0, -2.0]])
    t = rng.normal(size=n_rows)
    X = 6.0 * component[:, None] + t[:, None] * directions[component]
    return X + 0.5 * rng.normal(size=X.shape), component


@pytest.mark.parametrize("face", [MixtureOfPPCA, MixtureOfFactorAnalyzers])
@pytest.mark.parametrize("shared", [False, True])
def test_mixtures_predict_and_transform(face: Any, shared: bool) -> None:
    X, component = groups()
    gappy = with_gaps(X, 0.05)
    model = face(2, 1, shared_noise=shared, random_state=0, n_init=2).fit(gappy)
    found = model.predict(gappy)
    assert (found == component).mean() > 0.98 or (found == component).mean() < 0.02
    assert model.components_.shape == (2, 1, 5)
    order = np.argsort(model.means_[:, 0])
    np.testing.assert_allclose(np.abs(model.components_[order[0], 0, :2]), 2.0, atol=0.3)
    covariances = model.get_covariance()
    precisions = model.get_precision()
    for k in range(2):
        np.testing.assert_allclose(precisions[k] @ covariances[k], np.eye(5), atol=1e-9)
    log_joint = np.array(
        [
            np.log(w) + multivariate_normal(m, c).logpdf(X)
            for w, m, c in zip(model.weights_, model.means_, covariances, strict=True)
        ]
    )
    np.testing.assert_allclose(model.score_samples(X), np.logaddexp(*log_joint), rtol=1e-8)
    T, k = model.transform(X), model.predict(X)
    for i in (0, 1, 2):
        pull = model.components_[k[i]] @ precisions[k[i]] @ (X[i] - model.means_[k[i]])
        np.testing.assert_allclose(T[i], pull, atol=1e-9)
    rows = model.inverse_transform(T, k)
    assert np.sqrt(((rows - X) ** 2).mean()) < 0.7
    np.testing.assert_allclose(model.inverse_transform(T[:1], k[0]), rows[:1], rtol=1e-12)
    drawn, of, factors = model.sample(50)
    assert drawn.shape == (50, 5)
    assert factors.shape == (50, 1)
    assert (model.predict(drawn) == of).mean() > 0.9
    rest = model.condition({0: 0.0})
    assert isinstance(rest, face)
    assert rest.weights_[order[0]] > 0.99
    assert not np.isnan(model.impute(gappy)).any()


def test_one_component_is_factor_analysis() -> None:
    X = wine()
    one = MixtureOfFactorAnalyzers(1, 2, prior=None, tol=1e-10, n_init=1, max_iter=2000).fit(X)
    plain = FactorAnalysis(2, tol=1e-10, max_iter=2000).fit(X)
    np.testing.assert_allclose(one.get_covariance()[0], plain.get_covariance(), atol=1e-4)
    assert one.score(X) == pytest.approx(plain.score(X), abs=1e-7)


def test_factors_of_a_mixture_need_their_component() -> None:
    x = np.random.default_rng(0).normal(size=(60, 4))
    model = MixtureOfPPCA(2, 1, random_state=0).fit(x)
    factors = model.transform(x)
    with pytest.raises(ConfigError, match=r"component=model\.predict"):
        model.inverse_transform(factors)
    assert model.inverse_transform(factors, model.predict(x)).shape == x.shape
