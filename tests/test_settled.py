"""One component of which one pass says everything: no further pass is made, and none is missed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from genstream.learn import BatchEM, FitState, Outcome, fit
from genstream.passes import Passes
from genstream.rows import Rows
from genstream.schema import Column, Schema
from genstream.sources import NumpySource
from genstream.stories import factors, mixture
from genstream.story import Params, Story

RNG = np.random.default_rng(4)
X = RNG.normal(size=(700, 3)) @ RNG.normal(size=(3, 5)) + 0.5 * RNG.normal(size=(700, 5)) + 3.0
COUNTS = RNG.poisson(4.0, size=(700, 2)).astype(float)


class Counted(NumpySource):
    """A source that counts how often a chunk is read."""

    n_reads = 0

    def read(self, i: int) -> Rows:
        self.n_reads += 1
        return super().read(i)


def stories() -> dict[str, Story]:
    mixed = Schema((*Schema.real(5).columns, Column("a", "count"), Column("b", "count")))
    return {
        "full": mixture(Schema.real(5), 1, covariance="full"),
        "spherical": mixture(Schema.real(5), 1, covariance="spherical"),
        "mixed": mixture(mixed, 1, covariance="full"),
        "ppca": factors(Schema.real(5), 2, noise="isotropic"),
        "fa": factors(Schema.real(5), 2, prior=None),
    }


def rows_of(story: Story) -> np.ndarray:
    return X if story.schema.n_features == 5 else np.hstack([X, COUNTS])


def fitted(story: Story, x: np.ndarray, learner: BatchEM) -> tuple[Story, FitState, Counted]:
    source = Counted(x, story.schema, chunk_rows=256)
    anchored = story.anchored(Rows.of(x[:300]))
    sample = Rows.of(x[:300])
    vague = anchored.vague()
    resp = np.ones((300, 1))
    params = anchored.m_step(anchored.e_step(vague, sample, resp), vague)
    begun = anchored.family.start(params.family, sample, resp, np.random.default_rng(0))
    params = replace(params, family=begun)
    passes = Passes(source, scheduler="synchronous")
    return anchored, fit(anchored, learner, passes, FitState(params)), source


@pytest.mark.parametrize("accelerate", [False, True])
@pytest.mark.parametrize("name", list(stories()))
def test_one_pass_is_enough_and_tells_the_truth(name: str, accelerate: bool) -> None:
    story = stories()[name]
    x = rows_of(story)
    learner = BatchEM(500, 1e-9, accelerate=accelerate)
    anchored, state, source = fitted(story, x, learner)
    assert source.n_reads == 3
    assert state.outcome is Outcome.CONVERGED
    assert [info.n_rows for info in state.trace][:2] == [700, 0]
    # What the trace says without looking is what looking says.
    exact = anchored.log_prob(state.params, Rows.of(x)).sum()
    assert state.trace[-1].loglik == pytest.approx(exact, rel=1e-10)
    # And it is where EM with all its passes ends.
    params = state.params
    for _ in range(3):
        params = anchored.m_step(anchored.e_step(params, Rows.of(x)), params)
    again = anchored.log_prob(params, Rows.of(x)).sum()
    assert again == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("name", ["full", "ppca"])
def test_gaps_are_looked_at_again(name: str) -> None:
    story = stories()[name]
    x = rows_of(story).copy()
    x[5, 1] = np.nan
    _, state, source = fitted(story, x, BatchEM(6, -1.0))
    assert source.n_reads == 3 * 6
    assert all(info.n_rows == 700 for info in state.trace)


def test_several_components_are_looked_at_again() -> None:
    story = mixture(Schema.real(5), 2, covariance="diag").anchored(Rows.of(X))
    source = Counted(X, story.schema, chunk_rows=256)
    params = story.vague()
    family = replace(params.family, mean=X[[0, 9]])
    start = FitState(Params(params.weights, family))
    fit(story, BatchEM(4, -1.0), Passes(source, scheduler="synchronous"), start)
    assert source.n_reads == 3 * 4
