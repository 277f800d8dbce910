"""Data drawn from a known story: repeatable, of the size asked for, and recovered by a fit."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest

from flows.config import Drawn
from flows.draw import draw_rows, known_story, n_rows, recovery
from genstream.learn import BatchEM, fit
from genstream.passes import Passes
from genstream.rows import Rows
from genstream.sources import NumpySource
from genstream.start import warm_start
from genstream.stats import Record
from genstream.stories import mixture
from genstream.story import Params

SMALL = Drawn(gigabytes=0.0005, n_components=3, n_features=4, separation=4.0, seed=3)


def test_rows_are_as_many_and_the_same_every_time() -> None:
    once = Rows.concatenate(draw_rows(SMALL, "float32", workers=1, chunk_rows=1000))
    again = Rows.concatenate(draw_rows(SMALL, "float32", workers=3, chunk_rows=1000))
    assert once.n_rows == n_rows(SMALL, "float32") == int(0.0005 * 2**30 / 16)
    assert once.values.dtype == np.float32
    np.testing.assert_array_equal(once.values, again.values)


def test_another_seed_draws_other_rows() -> None:
    first = next(iter(draw_rows(SMALL, "float64", chunk_rows=100)))
    other = next(iter(draw_rows(SMALL.model_copy(update={"seed": 4}), "float64", chunk_rows=100)))
    assert not np.allclose(first.values, other.values)


@pytest.mark.parametrize("covariance", ["full", "diag"])
def test_recovery_of_the_truth_itself_is_perfect(covariance: Literal["full", "diag"]) -> None:
    drawn = SMALL.model_copy(update={"covariance": covariance})
    _, truth = known_story(drawn)
    found = recovery(drawn, truth)
    assert found.matched == 3
    assert found.mean == found.covariance == found.weight == 0.0


def test_recovery_sees_what_is_off_and_not_the_order_of_components() -> None:
    _, truth = known_story(SMALL)
    turned = [2, 0, 1]
    mean, covariance = truth.family.mean[turned].copy(), truth.family.covariance[turned]  # type: ignore[attr-defined]
    mean[0] += 100.0 * np.sqrt(np.diagonal(covariance[0]))
    family: Record = type(truth.family)(mean, covariance * 1.5)
    found = recovery(SMALL, Params(truth.weights[turned] + [0.1, -0.1, 0.0], family))
    assert found.matched == 2
    assert found.mean > 50
    assert found.covariance == pytest.approx(0.5)
    assert found.weight == pytest.approx(0.1)


@pytest.mark.parametrize("covariance", ["full", "diag", "tied", "spherical"])
def test_a_fit_finds_the_components(covariance: str) -> None:
    rows = Rows.concatenate(draw_rows(SMALL, "float64"))
    passes = Passes(NumpySource(rows.values))
    story = mixture(passes.source.schema, 3, covariance=covariance)
    story, state = warm_start(story, passes, n_init=5, seed=1)
    found = recovery(SMALL, fit(story, BatchEM(50), passes, state).params)
    assert found.matched == 3
    assert found.weight < 0.02
    if covariance == "full":
        assert found.mean < 0.05
        assert found.covariance < 0.1
