"""Every face against the contract that scikit-learn checks its own estimators by."""

from __future__ import annotations

from typing import Any

import pytest
from sklearn.utils.estimator_checks import check_estimator

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
)

# Few steps and one start: the contract is about forms, not about how good an estimate is.
FEW: dict[str, Any] = {"tol": 0.05, "n_init": 1}

FACES = [
    GaussianMixture(),
    GaussianMixture(prior="weak", covariance_type="diag"),
    StudentMixture(**FEW),
    Mixture(),
    Mixture(covariance="diag", prior=None, reg_covar=1e-6),
    KMeans(),
    PPCA(),
    FactorAnalysis(rotation="varimax"),
    LatentFactors(likelihood="count", **FEW),
    LatentFactors(likelihood="binary", binarize=0.5, **FEW),
    MixtureOfPPCA(**FEW),
    MixtureOfFactorAnalyzers(**FEW),
]


@pytest.mark.parametrize("model", FACES, ids=repr)
def test_scikit_learn_contract(model: Any) -> None:
    expected = model.known_failures()
    results = check_estimator(model, expected_failed_checks=expected, on_fail=None, on_skip=None)
    wrong = [(r["check_name"], r["exception"]) for r in results if r["status"] == "failed"]
    assert not wrong
    skipped = [r["check_name"] for r in results if r["status"] == "skipped"]
    assert set(skipped) <= {"check_array_api_input"}
    # What is expected to fail does, so that the list stays short.
    failed = [r["check_name"] for r in results if r["status"] == "xfail"]
    assert set(failed) == set(expected)


@pytest.mark.parametrize("model", FACES, ids=repr)
def test_faces_show_themselves(model: Any) -> None:
    assert repr(model).startswith(type(model).__name__ + "(")
    assert type(model).__name__ in model._repr_html_()
