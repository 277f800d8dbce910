"""Every story x learner x gaps x weights: draw, fit, climb, stop and resume, however it is cut."""

from __future__ import annotations

import gc
import weakref
from functools import cache
from typing import Any

import numpy as np
import oracles
import pytest
from stories_zoo import ZOO, drawn, passes_over

from genstream.incremental import IncrementalEM
from genstream.learn import ROUNDING, BatchEM, FitState, Learner, Outcome, Relay, fit, story_of
from genstream.online import OnlineEM
from genstream.passes import Passes
from genstream.responsibility import Sampled, Truncated, hard
from genstream.rows import Rows
from genstream.start import warm_start
from genstream.story import Story

ONLINE = OnlineEM(batch_rows=40, buffer_chunks=2)
LEARNERS: dict[str, Learner] = {
    "batch": BatchEM(6, 0.0),
    "accelerated": BatchEM(9, 0.0, accelerate=True),
    "hard": BatchEM(6, 0.0, responsibility=hard),
    "truncated": BatchEM(6, 0.0, responsibility=Truncated(2)),
    "sampled": BatchEM(8, 0.0, responsibility=Sampled(5)),
    "incremental": IncrementalEM(3, 0.0, tasks=3, group=1),
    "incremental, truncated": IncrementalEM(3, 0.0, 3, 1, responsibility=Truncated(2)),
    "incremental, sampled": IncrementalEM(3, 0.0, 3, 1, responsibility=Sampled(5)),
    "online": OnlineEM(batch_rows=40, buffer_chunks=2, max_passes=2),
    "online, hard": OnlineEM(batch_rows=40, buffer_chunks=2, responsibility=hard),
    "relay": Relay((ONLINE, BatchEM(2, 0.0), BatchEM(4, 0.0, responsibility=Sampled()))),
}
DRAWN = ("sampled", "incremental, sampled", "relay")
CLIMBING = tuple(name for name in LEARNERS if name not in DRAWN and "online" not in name)
# Mini-batches and tasks follow the chunks, and so do the streams of draws.
WHOLE = ("batch", "hard", "truncated")


# All four of gaps and weights for the plain stories; for those made of them, none and both.
CELLS = [
    (name, gaps, weighted)
    for name in ZOO
    for gaps in (0.0, 0.25)
    for weighted in (False, True)
    if name in oracles.STORIES or weighted == (gaps > 0)
]


@cache
def problem(
    name: str, gaps: float, weighted: bool, chunk: int = 40
) -> tuple[Story, FitState, Any, Any]:
    """A story of the zoo on rows drawn from it, and a state that is not yet fitted."""
    story, _, values, weights = drawn(name, 120, gaps=gaps, weighted=weighted)
    passes = passes_over(story, values, weights, chunk)
    story, state = warm_start(story, passes, n_init=1, short_steps=1, long_steps=1)
    return story, state, values, weights


@pytest.mark.parametrize("gaps", [0.0, 0.25])
@pytest.mark.parametrize("name", ZOO)
def test_a_kernel_ends_with_its_use(name: str, gaps: float) -> None:
    """Without the garbage collector, which comes seldom: thousands of components take much."""
    story, params, values, _ = drawn(name, 120, gaps=gaps)
    family, log_weights = story.family, np.log(params.weights)

    def used() -> list[weakref.ref[Any]]:
        kernel: Any = family.prepare(params.family, log_weights)
        kernels = [kernel]
        if hasattr(kernel, "take"):
            kernels.append(kernel.take(np.arange(1)))
        for each in kernels:
            walk = each.walk(Rows.of(values))
            for _ in walk.blocks():
                walk.gather(np.ones_like(walk.score()))
            walk.close()
        return [weakref.ref(each) for each in kernels]

    gc.collect()
    gc.disable()
    try:
        assert [alive() for alive in used() if alive() is not None] == []
    finally:
        gc.enable()


def traced(story: Story, learner: Learner, passes: Passes, state: FitState) -> list[FitState]:
    """The states of a fit, one a step."""
    states: list[FitState] = []
    fit(story, learner, passes, state, [lambda state, _: states.append(state)])
    return states


def same(left: FitState, right: FitState) -> None:
    assert oracles.identical(left.params, right.params)
    assert [i.loglik for i in left.trace] == [i.loglik for i in right.trace]
    assert left.outcome is right.outcome


@pytest.mark.parametrize("learner", LEARNERS)
@pytest.mark.parametrize(("name", "gaps", "weighted"), CELLS)
def test_cell(name: str, gaps: float, weighted: bool, learner: str) -> None:
    story, state, values, weights = problem(name, gaps, weighted)
    passes = passes_over(story, values, weights, 40)
    states = traced(story, LEARNERS[learner], passes, state)
    ended = states[-1]
    assert ended.outcome is Outcome.MAX_STEPS
    assert oracles.finite(ended.params)
    trace = np.array([info.mean_objective for info in ended.trace])
    slack = ROUNDING[story.dtype] * (1 + abs(trace[-1]))
    if learner in CLIMBING and not ended.events:
        assert np.diff(trace).min() >= -slack
        # Where components are far apart and M-steps closed, the start is the end.
        assert trace[-1] > trace[0] - (slack if name not in oracles.STORIES else 0.0)

    middle = states[len(states) // 2 - 1]
    stored = middle.to_dataset(story)
    again = FitState.from_dataset(stored)
    same(fit(story_of(stored), LEARNERS[learner], passes, again), ended)
    abreast = passes_over(story, values, weights, 40, workers=2, task_chunks=1)
    same(fit(story, LEARNERS[learner], abreast, state), ended)
    if learner in WHOLE:
        # 120 rows in one chunk, or in unequal ones.
        for chunk in (120, 37):
            cut = fit(story, LEARNERS[learner], passes_over(story, values, weights, chunk), state)
            last = cut.trace[-1].mean_objective
            assert last == pytest.approx(trace[-1], abs=1e-6), chunk
