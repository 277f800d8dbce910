"""How a living model grows and shrinks: new levels, components born and retired.

Every change goes from a story and its state to a story and a state from which learning goes on:
parameters, statistics, prior and memory change together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from genstream.errors import ConfigError, DataError
from genstream.families.blocks import Array, Levelled
from genstream.learn import FitState
from genstream.rows import Rows
from genstream.schema import Schema
from genstream.story import Params, Story, StoryStats

# Number of the random stream that follows from a seed.
_BIRTH = 21
# Steps of a newborn component among the others, and the change of its weight that ends them.
MAX_STEPS = 50
SETTLED = 1e-4
# Nats below the worst row of the sample at which a row is as badly explained as counts.
HOPELESS = 100.0


def with_levels(story: Story, state: FitState, schema: Schema) -> tuple[Story, FitState]:
    """The model over a schema whose categorical columns have further levels at the end.

    In every component a new level has probability `0.5 / (n + 0.5 L)`, half a row among the n rows
    of the state's sample that observed the column (Krichevsky & Trofimov 1981), and so has the
    prior; the other levels keep their ratios. Statistics hold no row of it. So responsibilities of
    rows without new levels stay as they are.

    Raises DataError where the schema differs in anything but levels added at the end.
    """
    if schema == story.schema:
        return story, state
    _check_levels(story.schema, schema)
    # Only families that take categorical columns come here.
    family = cast("Levelled", story.family)
    seen = _observed_weight(state, schema.n_features)
    wide, theta = family.with_levels(schema, state.params.family, seen)
    state = _with_stats(
        state, lambda s: replace(s, family=family.stats_with_levels(schema, s.family))
    )
    params = replace(state.params, family=theta)
    return replace(story, schema=schema, family=wide), replace(state, params=params)


def _check_levels(old: Schema, new: Schema) -> None:
    """Raises DataError where the schemas differ in anything but levels added at the end."""
    if old.names != new.names:
        raise DataError(
            f"the model has columns {', '.join(old.names)}, not {', '.join(new.names)}: levels can "
            "be added to a model, columns cannot"
        )
    for before, after in zip(old.columns, new.columns, strict=True):
        alike = (before.kind, before.unit) == (after.kind, after.unit)
        if not alike or (before.kind != "categorical" and before.levels != after.levels):
            raise DataError(
                f"column {before.name!r} is another one in the model: only levels of a categorical "
                "column can be added"
            )
        if after.levels[: len(before.levels)] != before.levels:
            raise DataError(
                f"column {before.name!r}: the levels {', '.join(after.levels[:8])} do not begin "
                f"with those of the model, {', '.join(before.levels[:8])}: add new ones at the end"
            )


def _observed_weight(state: FitState, n_features: int) -> Array:
    """(d,) rows that observed each column: of the sample, or all that the state is worth."""
    if state.sample is not None:
        return np.asarray(state.sample.row_weights @ state.sample.is_observed)
    return np.full(n_features, _worth(state))


def _with_stats(state: FitState, change: Callable[[StoryStats], StoryStats]) -> FitState:
    """The state with every statistic in it changed, and without what goes on from those of before:
    the memo of incremental EM, which begins anew, and the leaps of accelerated EM. Whatever fits it
    further is not to compare itself with what its trace says.
    """
    if state.memo is not None:
        # It counts the groups of tasks renewed.
        state = replace(state, memo=None, cursor=0)
    state = replace(state, past=None, stride=None, origin=state.step)
    held = {f.name: getattr(state, f.name) for f in fields(state)}
    changed: dict[str, Any] = {n: change(v) for n, v in held.items() if isinstance(v, StoryStats)}
    return replace(state, **changed)


def retire(
    story: Story, state: FitState, min_weight: float, *, min_rows: float = 0.0
) -> tuple[Story, FitState, tuple[str, ...]]:
    """The model without components that have become too small, and what happened in words.

    A component goes whose mixing weight is below `min_weight`, or that is worth fewer than
    `min_rows` effective rows; the largest always stays. The others keep their parameters and the
    rows they are worth, and their weights are scaled to sum to 1.

    Raises ConfigError where `min_weight` is not in [0, 1) or `min_rows` is negative.
    """
    if not 0 <= min_weight < 1:
        raise ConfigError(f"min_weight is {min_weight:g}: it must be at least 0 and below 1")
    if not min_rows >= 0:
        raise ConfigError(f"min_rows is {min_rows:g}: it must not be negative")
    weights = state.params.weights
    n_rows = _worth(state)
    stays = (weights >= min_weight) & (weights * n_rows >= min_rows)
    stays[int(weights.argmax())] = True
    if stays.all():
        return story, state, ()
    kept = [int(k) for k in np.flatnonzero(stays)]
    events = tuple(
        f"component {k} was retired: its weight had fallen to {weights[k]:.2g}"
        for k in np.flatnonzero(~stays)
    )
    normalised = state.memory is not None

    def left(stats: StoryStats) -> StoryStats:
        total = float(stats.sum_r.sum())
        share = float(stats.sum_r[kept].sum()) / total if total > 0 else 1.0
        fewer = replace(
            stats.take(kept),
            weight=stats.weight * share,
            objective=stats.objective * share,
            family=story.family.keep(stats.family, kept),
        )
        return fewer.scale(1 / share) if normalised and share > 0 else fewer

    params = state.params.take(kept)
    params = replace(params, weights=params.weights / params.weights.sum())
    memory = state.memory
    if memory is not None:
        share = memory.share[kept]
        memory = replace(
            memory,
            n_eff=memory.n_eff * float(weights[kept].sum()),
            share=share / share.sum() if share.sum() > 0 else params.weights,
        )
    state = _with_stats(state, left)
    rescues = tuple(state.rescues[k] for k in kept) if state.rescues else ()
    state = replace(state, params=params, memory=memory, rescues=rescues)
    return replace(story, n_components=len(kept)), state, events


def shared_weights(story: Story, weights: Array, parents: Sequence[int] | NDArray[Any]) -> Array:
    """(K + n,) mixing weights where a component comes beside each of n others: it has half of its
    parent's. Where they are frozen and equal, as of K-means, all are equal again.
    """
    if "weights" in story.frozen and (weights == weights[0]).all():
        n = len(weights) + len(parents)
        return np.full(n, 1 / n)
    shared = weights.copy()
    shared[parents] /= 2
    return np.append(shared, shared[parents])


def _worth(state: FitState) -> float:
    """Rows the state's parameters are worth: of its statistics, or else of its sample."""
    if state.memory is not None:
        return state.memory.n_eff
    if state.stats is not None and state.stats.weight > 0:
        return state.stats.weight
    return float(state.sample.n_rows) if state.sample is not None else 0.0


# Starts that lead beyond the arithmetic are seen by their parameters and gain, and left.
@np.errstate(over="ignore", invalid="ignore", divide="ignore")
def birth(
    story: Story,
    state: FitState,
    rows: Rows,
    *,
    out_of: float | None = None,
    min_rows: float = 50.0,
    n_starts: int = 5,
    seed: int | None = None,
) -> tuple[Story, FitState, tuple[str, ...]]:
    """The model with one more component, if rows that it explains badly make a good one.

    A component begins at all of `rows`, or at a seed row and those nearest to it, and moves by EM
    among the others, which stay what their statistics say. With `W` the weight of the rows it
    took, the statistics per unit of weight become `(1 - W / out_of) S + s / out_of`, as if these
    rows had come in their proportion; parameters follow by the M-step. Of several starts the best
    is taken, and it is kept only if the log-likelihood of the rows the model stands for,

        sum over rows of log p + (out_of - weight of rows) * mean over the sample of log p,

    rises by more than half the number of the new component's parameters times `log(out_of)`
    (Schwarz 1978). The sample is the state's own, so that rows which are merely the tail of what
    the model already is are no reason for a birth; and no row counts as worse than 100 nats below
    the sample's worst, so that one absurd value is none either. Frozen weights stay equal where
    they are; otherwise the newborn has half of the largest one.

    Parameters
    ----------
    rows
        Badly explained rows. They count as learned by this, as far as the component takes them.
    out_of
        Weight of the rows among which they were found, their own included. None stands for all
        that the state is worth (`n_eff` of online learning) and the rows themselves.
    min_rows
        Weight that the component must take.
    n_starts
        Starts tried.
    seed
        Everything follows from it; None stands for the state's own.

    Returns
    -------
    The story with K + 1 components, its state and the event in words; or those given and no event.

    Raises
    ------
    DataError
        Where the rows do not have the story's columns, or the state has no row sample.
    ConfigError
        Where `min_rows`, `n_starts` or `out_of` is too small.
    """
    if n_starts < 1 or not min_rows > 0:
        raise ConfigError(
            f"n_starts is {n_starts} and min_rows {min_rows:g}: at least one start, and some rows, "
            "are needed for a birth"
        )
    rows = rows.check(story.schema)
    useful = rows.is_observed.any(axis=1) & (rows.row_weights > 0)
    rows = rows[useful]
    weight = float(rows.row_weights.sum())
    if weight < min_rows:
        return story, state, ()
    if state.sample is None:
        raise DataError(
            "a component cannot be born: the state has no row sample to compare with; fit the "
            "model from a warm start"
        )
    total = _worth(state) + weight if out_of is None else out_of
    if total < weight:
        raise ConfigError(
            f"out_of is {total:g}, less than the weight {weight:g} of the rows found among them"
        )
    nursery = Nursery(story, state, rows, weight, total)
    rng = np.random.default_rng([state.seed if seed is None else seed, _BIRTH, state.step])
    best: Newborn | None = None
    for first in nursery.starts(n_starts, min_rows, rng):
        newborn = nursery.raise_from(first, min_rows)
        if newborn is not None and (best is None or newborn.gain > best.gain):
            best = newborn
    grown = nursery.grown
    price = 0.5 * (grown.n_parameters - story.n_parameters) * math.log(max(total, math.e))
    if best is None or not best.gain > price:
        return story, state, ()
    event = f"component {story.n_components} was born from {best.weight:.0f} badly explained rows"
    return grown, nursery.state_with(best), (event,)


@dataclass(frozen=True, eq=False)
class Newborn:
    """A component among the others: its statistics per unit of weight, the `weight` of the rows
    it took, the parameters of all, and by how much the log-likelihood rose.
    """

    stats: StoryStats
    weight: float
    params: Params
    gain: float


class Nursery:
    """Where a component grows among those of a state, from rows that they explain badly."""

    def __init__(
        self, story: Story, state: FitState, rows: Rows, weight: float, total: float
    ) -> None:
        self.story, self.state, self.rows = story, state, rows
        self.weight, self.total = weight, total
        self.grown = replace(story, n_components=story.n_components + 1)
        assert state.sample is not None
        self.sample = state.sample
        stats = state.stats
        if stats is None or not stats.weight > 0:
            stats = story.e_step(state.params, self.sample)
        self.base = stats
        self.worth = _worth(state)
        self.floor = float(story.log_prob(state.params, self.sample).min()) - HOPELESS
        self.before = self._value(story, state.params)

    def _value(self, story: Story, params: Params) -> float:
        """Log-likelihood of the rows the model stands for, `total` in all."""
        worst, weights = self.floor, self.sample.row_weights
        inside = self.rows.row_weights @ np.maximum(story.log_prob(params, self.rows), worst)
        outside = weights @ np.maximum(story.log_prob(params, self.sample), worst) / weights.sum()
        return float(inside + (self.total - self.weight) * outside)

    def starts(
        self, n_starts: int, min_rows: float, rng: np.random.Generator
    ) -> list[NDArray[np.bool_]]:
        """Sets of rows, (n,) masks, at which a component may begin: all, then a third of them, or
        what makes `min_rows`, nearest to a row.
        """
        n = self.rows.n_rows
        sets = [np.ones(n, dtype=bool)]
        x, seen = self.story.family.embed(self.rows)
        size = min(n, max(n // 3, math.ceil(min_rows * n / self.weight)))
        seeds = rng.choice(n, size=min(n, n_starts - 1), replace=False)
        for i in seeds:
            both = seen & seen[i]
            squared = ((x - x[i]) ** 2 * both).sum(axis=1)
            distance = squared / np.maximum(both.sum(axis=1), 1)
            distance[~both.any(axis=1)] = np.inf
            chosen = np.zeros(n, dtype=bool)
            chosen[np.argsort(distance, kind="stable")[:size]] = True
            sets.append(chosen)
        return sets

    def raise_from(self, first: NDArray[np.bool_], min_rows: float) -> Newborn | None:
        """EM of one component that begins at some rows; None where it comes to nothing."""
        story, k = self.grown, self.story.n_components
        # Where the rows say nothing of a column, it begins like the largest component.
        largest = int(self.state.params.weights.argmax())
        params = self.state.params.take([*range(k), largest])
        if "weights" in story.frozen:
            # No M-step will make room for one more.
            weights = shared_weights(story, self.state.params.weights, [largest])
            params = replace(params, weights=weights)
        w = self.rows.row_weights
        took = first.astype(np.float64)
        weight = -1.0
        for _ in range(MAX_STEPS):
            before, weight = weight, float(w @ took)
            if not weight >= min_rows:
                return None
            # Rows left out are left out of the sums: nought times a value beyond them is NaN.
            taken = took > 0
            given = np.zeros((int(taken.sum()), k + 1))
            given[:, k] = took[taken]
            stats = replace(story.e_step(params, self.rows[taken], given), weight=weight)
            stats = stats.scale(1 / weight)
            joined = self._join(self.base, stats, weight)
            params, faulty = story.maximise(joined.scale(self._n_eff(weight)), params)
            if faulty[k] or not all(np.isfinite(v).all() for _, _, v in params.leaves()):
                return None
            if abs(weight - before) <= SETTLED * weight:
                break
            posterior = story.infer(params, self.rows)
            # A row that nobody explains is nobody's: it would pull the component away from others.
            explained = posterior.log_prob >= self.floor
            took = np.where(explained, posterior.responsibilities[:, k], 0.0)
        gain = self._value(story, params) - self.before
        return Newborn(stats, weight, params, gain) if np.isfinite(gain) else None

    def _join(self, old: StoryStats, born: StoryStats, weight: float) -> StoryStats:
        """Statistics per unit of weight with the component in its proportion."""
        share = weight / self.total
        wide = old.take([*range(self.story.n_components), -1]).scale((1 - share) / old.weight)
        return wide.merge(born.scale(share))

    def _n_eff(self, weight: float) -> float:
        """Rows that the joined statistics are worth (Kish)."""
        share = weight / self.total
        return 1.0 / ((1 - share) ** 2 / max(self.worth, 1e-300) + share**2 / weight)

    def state_with(self, newborn: Newborn) -> FitState:
        """The state that has learned the component."""
        state, weight = self.state, newborn.weight
        n_eff, share = self._n_eff(weight), weight / self.total
        size = 1.0 if state.memory is not None else n_eff
        memory = state.memory
        if memory is not None:
            wide = np.append(memory.share * (1 - share), share)
            memory = replace(memory, n_eff=n_eff, share=wide)
        rescues: Sequence[int] = (*state.rescues, 0) if state.rescues else ()
        state = _with_stats(
            state, lambda stats: self._join(stats, newborn.stats, weight).scale(size)
        )
        return replace(state, params=newborn.params, memory=memory, rescues=tuple(rescues))
