"""K-means and mixtures of t distributions: scikit-learn's centres, gaps, weights and outliers."""

from __future__ import annotations

import warnings
from typing import Any

import dask.array as da
import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from scipy.stats import multivariate_t
from sklearn.base import clone
from sklearn.cluster import KMeans as Reference
from sklearn.datasets import load_iris
from sklearn.exceptions import ConvergenceWarning

from genstream.errors import ConfigError, DataError
from genstream.estimators import GaussianMixture, KMeans, Mixture, StudentMixture, face
from genstream.schema import Column, Schema
from genstream.stories import Block


def iris() -> np.ndarray:
    return np.asarray(load_iris().data)


def with_gaps(X: np.ndarray, share: float = 0.2) -> np.ndarray:
    hidden = np.random.default_rng(1).random(X.shape) < share
    return np.where(hidden, np.nan, X)


# --- K-means -------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
def test_k_means_is_scikit_learns(weighted: bool) -> None:
    X = iris()
    weight = np.random.default_rng(0).random(len(X)) if weighted else None
    ours = KMeans(5, tol=0, random_state=3).fit(X, sample_weight=weight)
    theirs = Reference(5, tol=0, n_init=1, random_state=3).fit(X, sample_weight=weight)
    np.testing.assert_allclose(ours.cluster_centers_, theirs.cluster_centers_, rtol=1e-9)
    np.testing.assert_array_equal(ours.labels_, theirs.labels_)
    assert ours.inertia_ == pytest.approx(theirs.inertia_, rel=1e-10)
    assert ours.converged_
    np.testing.assert_array_equal(ours.predict(X), theirs.predict(X))
    np.testing.assert_allclose(ours.transform(X), theirs.transform(X), atol=1e-6)
    assert ours.score(X, sample_weight=weight) == pytest.approx(-ours.inertia_, rel=1e-12)
    centres = X[[0, 60, 120]]
    given = KMeans(3, init=centres, tol=0).fit(X)
    expected = Reference(3, init=centres, tol=0, n_init=1).fit(X)
    np.testing.assert_allclose(given.cluster_centers_, expected.cluster_centers_, rtol=1e-9)
    np.testing.assert_array_equal(clone(given).fit_predict(X), expected.labels_)


def test_the_best_of_several_starts_is_kept() -> None:
    X = iris()
    several = KMeans(6, init="random", n_init=8, random_state=0).fit(X)
    single = [KMeans(6, init="random", n_init=1, random_state=s).fit(X) for s in range(4)]
    assert several.inertia_ <= min(model.inertia_ for model in single) * 1.02
    assert KMeans(6, init="random")._n_starts == 10


def test_centres_of_gappy_rows_are_means_of_what_is_there() -> None:
    X = with_gaps(iris())
    X[7] = np.nan
    weight = np.random.default_rng(0).integers(1, 4, len(X)).astype(float)
    model = KMeans(3, n_init=4, tol=0, random_state=0).fit(X, sample_weight=weight)
    apart = np.nansum((X[:, None] - model.cluster_centers_) ** 2, axis=2)
    seen = ~np.isnan(X).all(axis=1)
    np.testing.assert_array_equal(model.labels_[seen], apart.argmin(axis=1)[seen])
    assert model.inertia_ == pytest.approx(weight @ apart.min(axis=1), rel=1e-10)
    for k in range(3):
        own = (model.labels_ == k) & seen
        there = ~np.isnan(X[own])
        mean = np.nansum(weight[own, None] * X[own], axis=0) / (weight[own] @ there)
        np.testing.assert_allclose(model.cluster_centers_[k], mean, rtol=1e-9)
    scaled = np.sqrt(apart[seen] * (4 / (~np.isnan(X[seen])).sum(axis=1))[:, None])
    np.testing.assert_allclose(model.transform(X)[seen], scaled, atol=1e-7)


@pytest.mark.parametrize("init", ["k-means++", "random"])
def test_fewer_kinds_of_rows_than_clusters_and_a_column_never_seen(init: str) -> None:
    three = np.repeat([[0.0, 1.0], [5.0, 5.0], [9.0, -3.0]], 10, axis=0)
    model = KMeans(5, init=init, random_state=0).fit(three)
    assert np.isfinite(model.cluster_centers_).all()
    assert model.inertia_ == pytest.approx(0.0, abs=1e-12) or init == "random"
    blank = np.column_stack([iris(), np.full(150, np.nan)])
    model = KMeans(3, init=init, random_state=0).fit(blank)
    expected = KMeans(3, init=model.cluster_centers_[:, :4]).fit(iris())
    assert model.inertia_ == pytest.approx(expected.inertia_, rel=1e-6)


def test_k_means_beyond_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(face, "RESIDENT_NUMBERS", 0)
    rng = np.random.default_rng(0)
    centres = np.array([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0]])
    component = rng.integers(3, size=3_000)
    X = centres[component] + rng.normal(size=(3_000, 2))
    rows = da.from_array(X, chunks=(700, 2))
    model = KMeans(3, n_init=3, random_state=0).fit(rows)
    assert isinstance(model.labels_, da.Array)
    np.testing.assert_array_equal(np.asarray(model.labels_), model.predict(X))
    order = np.argsort(model.cluster_centers_ @ [1.0, 2.0])
    np.testing.assert_allclose(model.cluster_centers_[order], centres, atol=0.2)
    assert model.inertia_ == pytest.approx(-model.score(X), rel=1e-10)
    assert isinstance(model.transform(rows), da.Array)
    online = KMeans(3, random_state=0).partial_fit(X[:1_000]).partial_fit(rows[1_000:])
    assert -online.score(X) < 1.02 * model.inertia_


def test_clusters_have_names_and_fill_gaps() -> None:
    frame = pd.DataFrame(with_gaps(iris(), 0.1), columns=list("abcd"))
    model = KMeans(3, random_state=0, n_init=5).set_output(transform="pandas").fit(frame)
    shown = model.transform(frame)
    assert list(shown.columns) == ["kmeans0", "kmeans1", "kmeans2"]
    filled = model.impute(frame)
    assert not filled.isna().any().any()
    assert np.sqrt(((filled - iris()) ** 2).to_numpy().sum() / frame.isna().sum().sum()) < 0.6
    drawn, component = model.sample(200)
    assert drawn.shape == (200, 4)
    assert (component == model.predict(pd.DataFrame(drawn, columns=list("abcd")))).mean() > 0.8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init": "magic"}, "'init' parameter of KMeans must be one of k-means"),
        ({"init": np.zeros((2, 4))}, r"'init' should have the shape of \(3, 4\)"),
        ({"n_init": "many"}, "'n_init'"),
        ({"n_clusters": 0}, "'n_clusters'"),
        ({"n_clusters": 151}, "n_samples = 150"),
    ],
)
def test_wrong_clusters_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KMeans(**{"n_clusters": 3, **options}).fit(iris())


# --- t distributions -----------------------------------------------------------------------------


def spoilt(n_rows: int = 1_000) -> tuple[np.ndarray, np.ndarray]:
    """Two groups, and one row in twenty that is anywhere."""
    rng = np.random.default_rng(0)
    component = rng.integers(2, size=n_rows)
    X = 8.0 * component[:, None] + rng.normal(size=(n_rows, 2))
    far = rng.random(n_rows) < 0.05
    X[far] = rng.uniform(-60, 60, size=(int(far.sum()), 2))
    return X, far


def test_outliers_pull_a_student_mixture_less() -> None:
    X, _ = spoilt()
    robust = StudentMixture(2, random_state=0, n_init=2).fit(X)
    plain = GaussianMixture(2, random_state=0, n_init=2).fit(X)
    means = np.array([[0.0, 0.0], [8.0, 8.0]])

    def error(found: np.ndarray) -> float:
        return float(np.abs(found[np.argsort(found[:, 0])] - means).max())

    assert error(robust.means_) < 0.25 < error(plain.means_)
    assert robust.dof_.min() < 5
    assert robust.score(X) > plain.score(X)
    log_joint = [
        np.log(w) + multivariate_t(m, s, df=v).logpdf(X)
        for w, m, s, v in zip(
            robust.weights_, robust.means_, robust.scales_, robust.dof_, strict=True
        )
    ]
    np.testing.assert_allclose(robust.score_samples(X), np.logaddexp(*log_joint), rtol=1e-9)


@pytest.mark.parametrize("covariance_type", ["full", "tied", "diag", "spherical"])
def test_a_student_mixture_conditions_and_keeps_its_tails(covariance_type: str) -> None:
    X, _ = spoilt(400)
    model = StudentMixture(2, covariance_type=covariance_type, dof=4, n_init=1, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.set_params(max_iter=30).fit(X)
    np.testing.assert_array_equal(model.dof_, [4.0, 4.0])
    shape = {"full": (2, 2, 2), "tied": (2, 2, 2), "diag": (2, 2), "spherical": (2,)}
    assert model.covariances_.shape == shape[covariance_type]
    scales = model.scales_[None] if covariance_type == "tied" else model.scales_
    np.testing.assert_allclose(
        model.covariances_, 2 * np.broadcast_to(scales, model.covariances_.shape)
    )
    rest = model.condition({1: 8.0})
    assert isinstance(rest, StudentMixture)
    # One column more is known of the scale.
    np.testing.assert_allclose(rest.dof_, [5.0, 5.0])
    total = rest.score_samples([[7.0]]) + model.marginal([1]).score_samples([[8.0]])
    np.testing.assert_allclose(total, model.score_samples([[7.0, 8.0]]), rtol=1e-9)
    assert not np.isnan(model.impute(with_gaps(X))).any()


def test_wrong_tails_are_named() -> None:
    X, _ = spoilt(50)
    with pytest.raises(ConfigError, match="'dof'"):
        StudentMixture(dof=0.5).fit(X)
    with pytest.raises(ConfigError, match="'covariance_type' parameter of StudentMixture"):
        StudentMixture(covariance_type="round").fit(X)


# --- blocks --------------------------------------------------------------------------------------


def test_blocks_counts_and_tails_of_a_mixture() -> None:
    rng = np.random.default_rng(0)
    group = rng.integers(2, size=600)
    a = rng.normal(5.0 * group)
    frame = pd.DataFrame(
        {
            "a": a,
            "b": a + 0.1 * rng.normal(size=600),
            "n": rng.negative_binomial(2, 0.2, size=600) * (1 + group),
            "c": np.where(rng.random(600) < 0.2 + 0.6 * group, "yes", "no"),
        }
    )
    columns = {"a": "real", "b": "real", "n": "count", "c": "categorical"}
    apart = Mixture(2, columns=columns, random_state=0, n_init=1).fit(frame)
    joint = clone(apart).set_params(covariance="full", counts={"n": "negative_binomial"}).fit(frame)
    assert joint.score(frame) > apart.score(frame) + 1
    block = (
        clone(apart)
        .set_params(blocks=[Block(["b", "a"], "student")], counts={"n": "negative_binomial"})
        .fit(frame)
    )
    assert block.score(frame) > apart.score(frame) + 1
    tails = clone(apart).set_params(tails="student").fit(frame)
    for model in (joint, block, tails):
        assert abs((model.predict(frame) == group).mean() - 0.5) > 0.2
        rest = model.condition({"c": "yes", "a": 5.0})
        assert type(rest) is Mixture
        assert rest.schema_.names == ("b", "n")
        assert rest.covariance == model.covariance
        row = frame[:1].assign(a=5.0, b=5.0, c="yes")
        total = rest.score_samples(row[["b", "n"]])
        total += model.marginal(["a", "c"]).score_samples(row[["a", "c"]])
        np.testing.assert_allclose(total, model.score_samples(row), rtol=1e-8)
        assert rest.counts == model.counts
    assert [list(b.columns) for b in block.condition({"a": 5.0}).blocks] == [["b"]]
    one = joint.marginal("a")
    np.testing.assert_array_equal(one.predict(frame[["a"]]), joint.marginal(["a"]).predict(frame))
    with pytest.raises(ConfigError, match="counts: 'n' is a real column: make its kind count"):
        Mixture(2, counts={"n": "poisson"}).fit(frame)


def test_sparse_rows_of_words() -> None:
    rng = np.random.default_rng(0)
    topic = rng.integers(2, size=300)
    rate = np.array([[0.6] * 10 + [0.05] * 10, [0.05] * 10 + [0.6] * 10])
    X = rng.poisson(rate[topic]).astype(float)
    schema = Schema(tuple(Column(f"word{j}", "count") for j in range(20)))
    model = Mixture(
        2, columns=schema, blocks=[Block(schema.names, "multinomial")], random_state=0, n_init=2
    )
    dense = clone(model).fit(X)
    for form in ("csr", "csc", "coo"):
        rows = sparse.csr_array(X).asformat(form)
        model.fit(rows)
        np.testing.assert_allclose(model.score_samples(rows), dense.score_samples(X), rtol=1e-9)
        found = model.predict(rows)
        assert abs((found == topic).mean() - 0.5) > 0.4
        assert (model.impute(rows) != rows).nnz == 0
    model.partial_fit(rows)
    with pytest.raises(TypeError, match="Sparse"):
        GaussianMixture(2).fit(rows)
    with pytest.raises(DataError, match="sparse rows need columns that are a Schema"):
        Mixture(2, columns=dict.fromkeys(schema.names, "count")).fit(rows)
