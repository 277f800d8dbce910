"""From few components to many: those of a fit are split in two until there are enough.

EM of thousands of components from thousands of seeds ends at a poor optimum late: a seed knows
nothing of the shape of its rows, and to move a component across the rows takes many passes. Split
components begin where the fit of half as many has brought them, each half with half the weight,

    mean +- apart sd v,   covariance - (apart sd)^2 v v',

with `v` and `sd` the main axis of the component, so that both together keep its mean and
covariance. Few components know enough from few rows, so that all but the last fits are on samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from genstream.errors import ConfigError, DataError
from genstream.families.blocks import Splittable
from genstream.growth import shared_weights
from genstream.incremental import IncrementalEM
from genstream.learn import FitState, Outcome, fit
from genstream.passes import Passes
from genstream.responsibility import Nearest, Responsibility, by_size
from genstream.rows import Rows
from genstream.start import draw_sample, rescue_rows, seed_params
from genstream.story import Params, Story

# How far halves are apart, in deviations of what is split along its main axis.
APART = 0.6
# Samples are as large as those of so many components, at least.
FEW = 100
# Rows of a chunk of the sample at most, where every row meets all components and where it does not.
CHUNK, CHUNK_NEAREST = 1 << 14, 1 << 17
# Parts of a sample whose statistics are renewed apart, and how many at a time.
TASKS, GROUP = 16, 4

# Number of the random stream that splits follow from.
_SPLIT = 21


def split(
    story: Story,
    params: Params,
    components: Sequence[int] | NDArray[Any],
    rng: np.random.Generator,
    apart: float = APART,
) -> tuple[Story, Params]:
    """The story and parameters with each of some components split in two.

    One half is in the place of the whole, the others follow after the last component, in the order
    of `components`. Each half has half the weight, but weights that are frozen and equal stay so.
    What the weak prior expects of a component is left as it was: anchor the story again for that of
    more components.

    Raises
    ------
    ConfigError
        Where the family has nothing along which to split a component: factors, or counts with a
        shape of their own.
    """
    chosen = np.asarray(components, dtype=np.intp)
    family = story.family
    if not isinstance(family, Splittable) or not family.splits:
        raise ConfigError(
            f"a component of a {family.name} story cannot be split: only Gaussian and independent "
            "columns can, and products that have some"
        )
    assert params.family is not None
    one, other = family.halves(params.family, chosen, apart, rng)
    weights = shared_weights(story, params.weights, chosen)
    k = story.n_components
    new = Params(weights[:k], params.family.put(one, chosen.tolist()))
    more = Params(weights[k:], other)
    return replace(story, n_components=k + len(chosen)), _joined(new, more)


def doubled(
    story: Story,
    params: Params,
    n_components: int,
    rng: np.random.Generator,
    apart: float = APART,
) -> tuple[Story, Params]:
    """The story and parameters with the heaviest components split, up to all of them, until there
    are `n_components`. Raises ConfigError as `split`.
    """
    more = min(story.n_components, n_components - story.n_components)
    heaviest = np.argsort(-params.weights, kind="stable")[: max(more, 0)]
    return split(story, params, np.sort(heaviest), rng, apart)


def grow(
    story: Story,
    passes: Passes,
    *,
    first: int = 128,
    rows_each: int = 400,
    n_passes: int = 6,
    seed: int = 42,
    apart: float = APART,
    responsibility: Responsibility | None = None,
    on_stage: Callable[[Story, FitState], None] | None = None,
) -> tuple[Story, FitState]:
    """An anchored story and a state from which full passes begin, grown by splitting.

    At most `first` components, `n_components` halved as often as it takes, are seeded and fitted
    to a sample of the rows by incremental EM; then the heaviest are split in two and all fitted
    again, until there are `n_components`. Beside `genstream.warm_start` there are no starts that
    compete: of many components none depends on its seed.

    Parameters
    ----------
    story
        Of as many components as there shall be; its family one that can be split.
    first
        Components to begin with at most, at least 1.
    rows_each
        Rows of the sample for each component, for `FEW` components at least; no more than the
        sample of a start may take (`genstream.start.draw_sample`).
    n_passes
        Passes over the sample between splits.
    seed
        Everything follows from it.
    apart
        How far halves are apart, in deviations along the axis they are split.
    responsibility
        The rule by which samples are fitted; None stands for what suits so many components
        (`genstream.responsibility.by_size`).
    on_stage
        Called with story and state of each number of components, once fitted.

    Raises
    ------
    ConfigError
        Where the family cannot be split, or a number is below 1.
    DataError
        Where the data cannot start a fit.
    """
    for name, number in (("first", first), ("rows_each", rows_each), ("n_passes", n_passes)):
        if number < 1:
            raise ConfigError(f"{name} is {number}: it must be at least 1")
    target = k = story.n_components
    while k > first:
        k = -(-k // 2)
    most = draw_sample(passes, rows_each * max(target, FEW), seed)
    kept = rescue_rows(most, seed)
    rng = np.random.default_rng([seed, _SPLIT])
    # The sample is in the order of the rows: each part of it shall be a sample, too.
    order = rng.permutation(most.n_rows)
    frame = most[order[: rows_each * max(k, FEW)]]
    now = replace(story, n_components=k).anchored(frame)
    params = seed_params(now, frame, rng)
    while True:
        sample = most[order[: rows_each * max(now.n_components, FEW)]]
        state = _fitted(now, params, sample, passes, n_passes, seed, kept, responsibility)
        if on_stage is not None:
            on_stage(now, state)
        if now.n_components >= target:
            return now, FitState(state.params, seed=seed, stats=state.stats, sample=kept)
        now, params = doubled(now, state.params, target, rng, apart)
        # Pivot and prior for so many components; the same rows, so that the pivot stays.
        now = now.anchored(frame)


def _fitted(
    story: Story,
    params: Params,
    sample: Rows,
    passes: Passes,
    n_passes: int,
    seed: int,
    kept: Rows,
    responsibility: Responsibility | None,
) -> FitState:
    """Some passes of incremental EM over a sample."""
    rule = responsibility or by_size(story.n_components)
    width = CHUNK_NEAREST if isinstance(rule, Nearest) else CHUNK
    chunk_rows = min(width, max(1, -(-sample.n_rows // TASKS)))
    learner = IncrementalEM(n_passes, 0.0, responsibility=rule, tasks=TASKS, group=GROUP)
    state = fit(
        story,
        learner,
        passes.over(sample.dense(), chunk_rows),
        FitState(params, seed=seed, sample=kept),
    )
    if state.outcome is Outcome.NONFINITE:
        raise DataError(
            "the sample's log-likelihood is not finite: look for extreme values, or keep the prior"
        )
    return state


def _joined(first: Params, second: Params) -> Params:
    """The components of both, one after the other."""
    n = len(first.weights)
    order = [*range(n), *([-1] * len(second.weights))]
    return first.take(order).put(second, list(range(n, len(order))))
