"""Learning as a fold: the E-step over chunks, then one M-step, again and again.

A learner has one method, `step`, that turns a state into the next; `fit` is the only loop. The
state holds all that a resume needs, so that a fit stopped anywhere goes on to the same bits.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from genstream.errors import ConfigError, CorruptError
from genstream.families.blocks import Array
from genstream.responsibility import Responsibility, Sampled, soft
from genstream.rows import Rows
from genstream.stats import Record, axes
from genstream.story import Params, Story, StoryStats
from genstream.threads import one_blas_thread

if TYPE_CHECKING:
    import xarray

# A component that took less than this share of the rows' weight explains nothing.
EMPTY = 1e-7
# Rows of the sample by which components are told apart.
TWIN_ROWS = 64
# So many components re-seeded in a step are told one by one, more by their number.
MOST_TOLD, ALIKE = 5, "the same as"
# How often one component is re-seeded before it is left as it is.
MAX_RESCUES = 3
# How far accelerated EM may leap at first, in EM steps, and what its reach is changed by.
REACH = 4.0
STRETCH = 4.0
# The numbers of a trace, as they are stored.
TRACE = ("step", "loglik", "log_prior", "weight", "n_rows", "n_unobserved", "seconds")
# What the mean objective may fall by before it counts as a fall, relative to 1 + its size.
ROUNDING = {"float64": 1e-9, "float32": 2e-5}


class Outcome(Enum):
    """How a fit ended, or that it goes on."""

    RUNNING = "running"
    CONVERGED = "converged"
    MAX_STEPS = "max_steps"
    DECREASED = "decreased"
    NONFINITE = "nonfinite"

    @property
    def advice(self) -> str:
        """What a user may do about it; empty where there is nothing to do."""
        return {
            Outcome.RUNNING: "the fit has not ended: resume it",
            Outcome.CONVERGED: "",
            Outcome.MAX_STEPS: "the steps ran out before the tolerance was reached: "
            "raise max_steps, or loosen tolerance if the trace is flat enough",
            Outcome.DECREASED: "the objective fell by more than rounding explains: keep the weak "
            "prior, use dtype float64, or look for columns that determine one another",
            Outcome.NONFINITE: "the log-likelihood became infinite or NaN: keep the weak prior, "
            "and look for extreme values with `genstream show`",
        }[self]


@dataclass(frozen=True)
class StepInfo:
    """One line of the trace.

    `loglik` is the objective of the parameters the step began with (nats, summed over the rows
    with their weights), `log_prior` their log prior density up to a constant; `weight` the sum of
    weights, `n_rows` the rows seen, of which `n_unobserved` had nothing observed. `seconds` is the
    time the step took, `events` what happened to components.
    """

    step: int
    loglik: float
    log_prior: float
    weight: float
    n_rows: int
    n_unobserved: int
    seconds: float
    events: tuple[str, ...] = ()

    @property
    def mean_loglik(self) -> float:
        """Nats per unit of weight; 0 where there is none."""
        return self.loglik / self.weight if self.weight > 0 else 0.0

    @property
    def mean_objective(self) -> float:
        """What EM climbs: log-likelihood plus log-prior, per unit of weight."""
        return (self.loglik + self.log_prior) / self.weight if self.weight > 0 else 0.0


@dataclass(frozen=True, eq=False)
class Memory(Record):
    """How far online learning has come.

    `clock` counts the mini-batches absorbed, `n_eff` is the number of rows the statistics are
    worth, `n_averaged` how many iterates are in the state's `average`, `share` (K,) the mixing
    weights that learning began with, and `unit` what a row weighs on average; 0 where not known.
    """

    clock: float
    n_eff: float
    n_averaged: int
    share: Array = axes("component")
    unit: float = 0.0


@dataclass(frozen=True, eq=False)
class Stride(Record):
    """How accelerated EM leaps: `leapt` is 1 where the state's parameters are extrapolated, and
    `reach` is the longest step length it may try, in units of an EM step.
    """

    leapt: int
    reach: float


@dataclass(frozen=True, eq=False)
class Memo:
    """The statistics of each task of chunks, and the nodes of the fixed tree that merges them.

    `levels[0]` are the tasks in their order; each level above merges pairs of the one below, an odd
    one out going up as it is; the last one holds the total.
    """

    levels: tuple[tuple[StoryStats, ...], ...]

    @classmethod
    def of(cls, tasks: Sequence[StoryStats]) -> Memo:
        """The tree over some tasks."""
        levels = [tuple(tasks)]
        while len(levels[-1]) > 1:
            below = levels[-1]
            levels.append(tuple(_joined(below, i) for i in range(-(-len(below) // 2))))
        return cls(tuple(levels))

    @property
    def n_tasks(self) -> int:
        """How many tasks there are."""
        return len(self.levels[0])

    @property
    def total(self) -> StoryStats:
        """The statistics of all tasks together."""
        return self.levels[-1][0]

    def renewed(self, tasks: Mapping[int, StoryStats]) -> Memo:
        """The tree with some tasks replaced; only the nodes above them are merged again."""
        levels: list[tuple[StoryStats, ...]] = []
        changed: Mapping[int, StoryStats] = tasks
        for n, level in enumerate(self.levels):
            nodes = list(level)
            if n:
                changed = {i: _joined(levels[-1], i) for i in sorted({i // 2 for i in changed})}
            for i, stats in changed.items():
                nodes[i] = stats
            levels.append(tuple(nodes))
        return Memo(tuple(levels))


def _joined(below: Sequence[StoryStats], i: int) -> StoryStats:
    """Node i of the level above."""
    left, *right = below[2 * i : 2 * i + 2]
    return left.merge(right[0]) if right else left


@dataclass(frozen=True, eq=False)
class FitState:
    """All that a fit carries from step to step.

    `sample` are the rows from which an empty component is re-seeded; `rescues` (K,) counts how
    often each one was. `cursor` counts the buffers of chunks that online learning has gone
    through, the groups of tasks that incremental learning has, or the steps whose statistics
    sampled EM has averaged; `memory` belongs to the first, `memo` to the second, and `average` (of
    statistics) to the first and the last. `past` are the statistics
    before `stats` and `stride` the step lengths of accelerated EM. `stage` counts the learners of
    a `Relay` that are done, and `origin` the steps they took.
    """

    params: Params
    seed: int = 42
    step: int = 0
    stats: StoryStats | None = None
    trace: tuple[StepInfo, ...] = ()
    outcome: Outcome = Outcome.RUNNING
    sample: Rows | None = None
    rescues: tuple[int, ...] = ()
    cursor: int = 0
    memory: Memory | None = None
    average: StoryStats | None = None
    past: StoryStats | None = None
    stride: Stride | None = None
    memo: Memo | None = None
    stage: int = 0
    origin: int = 0

    def after(self, info: StepInfo) -> FitState:
        """The state with one more line in its trace."""
        return replace(self, step=info.step, trace=(*self.trace, info))

    @property
    def events(self) -> list[str]:
        """Everything that happened to components, in order."""
        return [f"step {info.step}: {event}" for info in self.trace for event in info.events]

    def to_dataset(self, story: Story) -> xarray.Dataset:
        """The state as a labelled dataset, parameters in data units under `params.`."""
        import xarray

        labels = {"component": [str(k) for k in range(story.n_components)], **story.labels()}
        parts = {f"params.{n}": v for n, v in self.params.to_dataset().data_vars.items()}
        for prefix, item in (
            ("stats", self.stats),
            ("average", self.average),
            ("memory", self.memory),
            ("past", self.past),
            ("stride", self.stride),
        ):
            if item is not None:
                parts |= {f"{prefix}.{n}": v for n, v in item.to_dataset().data_vars.items()}
        if self.memo is not None:
            tasks = xarray.concat(
                [task.to_dataset() for task in self.memo.levels[0]], dim="task", join="exact"
            )
            parts |= {f"memo.{n}": v for n, v in tasks.data_vars.items()}
        for name in TRACE:
            kind = np.int64 if name in ("step", "n_rows", "n_unobserved") else np.float64
            column = np.array([getattr(info, name) for info in self.trace], dtype=kind)
            parts[f"trace.{name}"] = xarray.DataArray(column, dims="trace")
        if self.sample is not None:
            parts["sample.values"] = xarray.DataArray(
                self.sample.filled().astype(np.float64), dims=("sample", "feature")
            )
        attributes = {
            "format": 1,
            "story": json.dumps(story.to_json()),
            "labels": json.dumps({axis: list(names) for axis, names in labels.items()}),
            "events": json.dumps([list(info.events) for info in self.trace]),
            "seed": self.seed,
            "step": self.step,
            "outcome": self.outcome.value,
            "rescues": list(self.rescues),
            "cursor": self.cursor,
            "stage": self.stage,
            "origin": self.origin,
        }
        return xarray.Dataset(parts, attrs=attributes)

    @classmethod
    def from_dataset(cls, dataset: xarray.Dataset, story: Story | None = None) -> FitState:
        """Inverse of `to_dataset`; `story` saves decoding it again.

        Raises CorruptError where something is missing or of a format not known here.
        """
        attributes = dataset.attrs
        if attributes.get("format") != 1:
            raise CorruptError(
                f"a stored state has format {attributes.get('format')!r}; this version reads 1"
            )
        story = story or story_of(dataset)
        try:
            columns = {name: dataset[f"trace.{name}"].values.tolist() for name in TRACE}
            events = json.loads(attributes["events"])
            trace = tuple(
                StepInfo(**dict(zip(columns, row, strict=True)), events=tuple(what))
                for *row, what in zip(*columns.values(), events, strict=True)
            )
            sample = None
            if "sample.values" in dataset:
                sample = Rows.of(np.ascontiguousarray(dataset["sample.values"].values))
            held = {str(name).partition(".")[0] for name in dataset.data_vars}
            return cls(
                params=story.params_from(dataset, "params."),
                seed=int(attributes["seed"]),
                step=int(attributes["step"]),
                stats=story.stats_from(dataset, "stats.") if "stats" in held else None,
                trace=trace,
                outcome=Outcome(attributes["outcome"]),
                sample=sample,
                rescues=tuple(int(n) for n in attributes["rescues"]),
                cursor=int(attributes["cursor"]),
                memory=Memory.from_dataset(dataset, "memory.") if "memory" in held else None,
                average=story.stats_from(dataset, "average.") if "average" in held else None,
                past=story.stats_from(dataset, "past.") if "past" in held else None,
                stride=Stride.from_dataset(dataset, "stride.") if "stride" in held else None,
                memo=_memo_from(dataset, story) if "memo" in held else None,
                # States of before there were relays have neither.
                stage=int(attributes.get("stage", 0)),
                origin=int(attributes.get("origin", 0)),
            )
        except (KeyError, ValueError, TypeError) as error:
            raise CorruptError(f"a stored state cannot be read: {error!r}") from error


def _memo_from(dataset: xarray.Dataset, story: Story) -> Memo:
    parts = dataset[[name for name in dataset.data_vars if str(name).startswith("memo.")]]
    return Memo.of(
        [story.stats_from(parts.isel(task=i), "memo.") for i in range(parts.sizes["task"])]
    )


def story_of(dataset: xarray.Dataset) -> Story:
    """The story stored with a state. Raises CorruptError where there is none."""
    try:
        return Story.from_json(json.loads(dataset.attrs["story"]))
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptError(f"the stored state has no readable story: {error!r}") from error


class Passes(Protocol):
    """One pass over all chunks, wherever they live."""

    @property
    def n_chunks(self) -> int:
        """How many chunks there are."""

    def read(self, chunk: int, /) -> Rows:
        """One chunk."""

    def fold(self, work: Callable[[int, Rows], Any]) -> Any:
        """`work(chunk, rows)` of every chunk, merged in a fixed tree."""

    def fold_tasks(
        self, work: Callable[[int, Rows], Any], ranges: Sequence[tuple[int, int]], /
    ) -> list[Any]:
        """`work(chunk, rows)` of the chunks of each range (first, last + 1), merged in the tree."""

    def abreast(self) -> AbstractContextManager[Abreast]:
        """Within it there is a function that does numbered pieces of work, side by side."""


# `abreast(work, n)` is `[work(i) for i in range(n)]`, in whatever order it is done.
Abreast = Callable[[Callable[[int], Any], int], list[Any]]


def in_turn(work: Callable[[int], Any], n: int) -> list[Any]:
    """Numbered pieces of work, one after another."""
    return [work(i) for i in range(n)]


@dataclass(frozen=True, eq=False)
class Resident:
    """A pass over rows that are in memory already, as one chunk."""

    rows: Rows
    n_chunks: int = 1

    def read(self, _chunk: int) -> Rows:
        """All rows, which are chunk 0."""
        return self.rows

    def fold(self, work: Callable[[int, Rows], Any]) -> Any:
        return work(0, self.rows)

    def fold_tasks(
        self, work: Callable[[int, Rows], Any], ranges: Sequence[tuple[int, int]]
    ) -> list[Any]:
        return [work(0, self.rows) for _ in ranges]

    def abreast(self) -> AbstractContextManager[Abreast]:
        return nullcontext(in_turn)


@dataclass(frozen=True, eq=False)
class EStep:
    """The E-step as work for a pass; it travels to whichever process holds the chunk.

    Where responsibilities are drawn, `seed` and `step` of the fit and the chunk say which ones.
    """

    story: Story
    params: Params
    responsibility: Responsibility = soft
    seed: int = 0
    step: int = 0

    def __call__(self, chunk: int, rows: Rows) -> StoryStats:
        key = (self.seed, self.step, chunk)
        return self.story.e_step(self.params, rows, self.responsibility, key)


class Learner(Protocol):
    """A way of learning."""

    def step(self, story: Story, state: FitState, passes: Passes) -> tuple[FitState, StepInfo]:
        """The next state, and the line it adds to the trace."""


@runtime_checkable
class PassLearner(Protocol):
    """A learner each of whose steps is one pass, which several fits may share."""

    def work(self, story: Story, state: FitState) -> EStep | None:
        """What the next step asks of every chunk; None where that step is no pass."""

    def advance(
        self, story: Story, state: FitState, stats: StoryStats, seconds: float
    ) -> tuple[FitState, StepInfo]:
        """The next state and its line of the trace, given what the pass of `work` came to.

        `seconds` are those that the pass took.
        """


@dataclass(frozen=True)
class BatchEM:
    """EM on all rows: every step is one pass and one M-step (Dempster, Laird & Rubin 1977).

    Accelerated, it is SQUAREM (Varadhan & Roland 2008, scheme 3) on statistics: of three that
    follow one another by EM, `s0`, `s1`, `s2`, with `r = s1 - s0` and `v = s2 - s1 - r`, the next
    parameters maximise

        s0 + 2 a r + a^2 v,   a = |r| / |v|,

    which is EM itself at `a = 1`. Statistics that no rows could have are seen before a pass is
    spent on them, and shorten `a`. A leap that lands below the objective it began from is taken
    back: its line of the trace repeats the value kept, so that the trace climbs all the same.

    Parameters
    ----------
    max_steps
        Steps after which the fit ends, of which each takes one pass.
    tolerance
        The fit has converged when an EM step changes the mean objective (log-likelihood plus
        log-prior) by less than this many nats a row; or, unless this is 0 or less, when the same
        statistics have given the same parameters to the bit.
    responsibility
        A rule of `genstream.responsibility`: `soft`, `hard` for classification EM, `Truncated(n)`,
        or `Sampled(seed)` for stochastic EM. The last one neither climbs at every step nor comes
        to rest, so that such a fit ends after `max_steps`, whatever the tolerance.
    accelerate
        Whether to extrapolate. It moves nearly all of many small steps, and finds the same kind of
        optimum, not always the same one. What is drawn cannot be extrapolated.
    average
        Of sampled EM: the share of the steps, at the end, over which statistics are averaged; the
        last M-step is of their mean (Celeux, Chauveau & Diebolt 1996). 0 for none.

    Raises
    ------
    ConfigError
        Where sampled EM is to be accelerated, or `average` is not in [0, 1).
    """

    max_steps: int = 200
    tolerance: float = 1e-4
    responsibility: Responsibility = soft
    accelerate: bool = False
    average: float = 0.5

    def __post_init__(self) -> None:
        if self.accelerate and self.drawn:
            raise ConfigError("sampled EM cannot be accelerated: a draw does not extrapolate")
        if not 0 <= self.average < 1:
            raise ConfigError(f"average is {self.average}: it must be at least 0 and below 1")

    @property
    def drawn(self) -> bool:
        """Whether responsibilities are drawn, so that no step can be judged by the one before."""
        return isinstance(self.responsibility, Sampled)

    def step(self, story: Story, state: FitState, passes: Passes) -> tuple[FitState, StepInfo]:
        begin = time.perf_counter()
        work = self.work(story, state)
        if work is None:
            assert state.stats is not None
            return self._taken(story, state, state.stats, 0, 0.0)
        stats: StoryStats = passes.fold(work)
        return self.advance(story, state, stats, time.perf_counter() - begin)

    def work(self, story: Story, state: FitState) -> EStep | None:
        """Nothing where the statistics of the step before are those of this one, too."""
        known = state.stats if state.step > state.origin and state.trace else None
        if known is not None and not state.trace[-1].events and story.settled(known):
            return None
        return EStep(story, state.params, self.responsibility, state.seed, state.step)

    def advance(
        self, story: Story, state: FitState, stats: StoryStats, seconds: float
    ) -> tuple[FitState, StepInfo]:
        return self._taken(story, state, stats, stats.n_rows, seconds)

    def _taken(
        self, story: Story, state: FitState, stats: StoryStats, n_rows: int, seconds: float
    ) -> tuple[FitState, StepInfo]:
        """The step of these statistics, for which `n_rows` rows were seen."""
        begin = time.perf_counter()
        log_prior = story.log_prior(state.params)
        info = StepInfo(
            state.step + 1,
            stats.objective,
            log_prior,
            stats.weight,
            n_rows,
            stats.n_unobserved,
            0.0,
        )
        # A rescue moves a component away from its optimum, and another learner's trace is of
        # other parameters: the next value starts anew.
        last = state.trace[-1] if state.trace and state.step > state.origin else None
        last = None if last is not None and last.events else last
        leapt = state.stride is not None and bool(state.stride.leapt)
        finite = bool(np.isfinite(info.mean_objective) and np.isfinite(stats.sum_r).all())
        slack = ROUNDING[story.dtype] * (1 + abs(info.mean_objective))
        slack += getattr(self.responsibility, "slack", 0.0)
        gain = np.inf if last is None else info.mean_objective - last.mean_objective
        if leapt and last is not None and not (finite and gain >= -slack):
            state, info = _landed_back(story, state, info, last)
        elif not finite:
            state = replace(state, outcome=Outcome.NONFINITE)
        else:
            outcome = Outcome.RUNNING
            if last is not None and not (leapt or self.drawn):
                fell = story.monotone and gain < -slack
                if fell and gain < -slack - 2 * story.rounding(state.params):
                    outcome = Outcome.DECREASED
                elif abs(gain) < self.tolerance:
                    outcome = Outcome.CONVERGED
            params, faulty = story.maximise(stats, state.params)
            params, rescues, events = rescue(story, state, stats, params, faulty)
            info = replace(info, events=events)
            if events and outcome is Outcome.CONVERGED:
                outcome = Outcome.RUNNING
            before = state if last is not None and not leapt and not events else None
            if story.settled(stats):
                still = params.digest() == state.params.digest()
                if still and not self.drawn and self.tolerance > 0:
                    # Under the same statistics the same parameters will come of every step.
                    outcome = Outcome.CONVERGED
                stats = story.restated(stats, state.params, params)
            state = replace(state, params=params, outcome=outcome, rescues=rescues)
            state = self._advance(story, state, before, stats)
            if self.drawn:
                state = self._averaged(state, info, stats)
        if state.outcome is Outcome.RUNNING and info.step - state.origin >= self.max_steps:
            # Nobody will see whether a leap was one too far.
            params = state.params
            if state.stride is not None and state.stride.leapt and state.stats is not None:
                params = story.m_step(state.stats, params)
            if state.average is not None and self.drawn:
                params = story.m_step(state.average, params)
                state = replace(state, stats=state.average)
            state = replace(state, params=params, outcome=Outcome.MAX_STEPS)
        if not self.drawn or state.outcome is not Outcome.RUNNING:
            state = replace(state, average=None)
        info = replace(info, seconds=seconds + time.perf_counter() - begin)
        # What an online learner remembers is of statistics that are no longer here.
        return replace(state, memory=None, memo=None).after(info), info

    def _averaged(self, state: FitState, info: StepInfo, stats: StoryStats) -> FitState:
        """The state with the mean statistics of the late steps so far, of which `cursor` counts."""
        early = info.step - state.origin <= (1 - self.average) * self.max_steps
        # A component that was moved is elsewhere in what was averaged before.
        if early or info.events or self.average == 0:
            return replace(state, average=None, cursor=0)
        if state.average is None or state.memory is not None:
            return replace(state, average=stats, cursor=1)
        n = state.cursor + 1
        mean = state.average.scale(1 - 1 / n).merge(stats.scale(1 / n))
        mean = replace(mean, n_rows=stats.n_rows, n_unobserved=stats.n_unobserved)
        return replace(state, average=mean, cursor=n)

    def _advance(
        self, story: Story, state: FitState, before: FitState | None, stats: StoryStats
    ) -> FitState:
        """The state with its new statistics, from which it leaps where there are three by EM."""
        if not self.accelerate:
            return replace(state, stats=stats, past=None, stride=None)
        reach = REACH if state.stride is None else state.stride.reach
        if before is None or before.stats is None or state.outcome is not Outcome.RUNNING:
            return replace(state, stats=stats, past=None, stride=Stride(0, reach))
        if before.past is None:
            return replace(state, stats=stats, past=before.stats, stride=Stride(0, reach))
        params, reach = leap(story, before.past, before.stats, stats, state.params, reach)
        leapt = int(params is not state.params)
        past = None if leapt else before.stats
        return replace(state, params=params, stats=stats, past=past, stride=Stride(leapt, reach))


def _landed_back(
    story: Story, state: FitState, info: StepInfo, last: StepInfo
) -> tuple[FitState, StepInfo]:
    """The state before a leap that fell, one EM step on; its line repeats the value kept."""
    assert state.stats is not None
    assert state.stride is not None
    params = story.m_step(state.stats, state.params)
    stride = Stride(0, max(1.0, state.stride.reach / STRETCH))
    kept = replace(info, loglik=last.loglik, log_prior=last.log_prior, weight=last.weight)
    return replace(state, params=params, past=None, stride=stride), kept


def leap(
    story: Story,
    first: StoryStats,
    second: StoryStats,
    third: StoryStats,
    params: Params,
    reach: float,
) -> tuple[Params, float]:
    """Parameters extrapolated from statistics that follow one another by EM, and the new reach.

    `params` are those of `third`, returned where no step longer than EM's own is possible.
    """
    r = _numbers(second) - _numbers(first)
    v = _numbers(third) - _numbers(second) - r
    bend = float(np.linalg.norm(v))
    if not bend > 0:
        return params, reach
    length = float(np.linalg.norm(r)) / bend
    if length >= reach:
        length, reach = reach, reach * STRETCH
    while length > 1.01:
        a = length
        far = (
            first.scale((1 - a) ** 2).merge(second.scale(2 * a * (1 - a))).merge(third.scale(a * a))
        )
        possible = story.possible(far, third)
        if possible is not None:
            found = story.m_step(possible, params)
            if all(np.isfinite(value).all() for _, _, value in found.leaves()):
                return found, reach
        length = 1 + (length - 1) / 2
    return params, reach


def _numbers(stats: StoryStats) -> Array:
    """All numbers of some statistics that parameters depend on, as one vector."""
    skipped = ("n_rows", "n_unobserved", "n_gaps", "weight", "objective")
    return np.concatenate(
        [np.ravel(value) for name, _, value in stats.leaves() if name not in skipped]
    )


@dataclass(frozen=True)
class Relay:
    """Learners one after another: each goes on from where the one before it ended.

    The next one takes over when a learner has converged or its steps ran out. The state says which
    learner is at work (`stage`) and after which step it began (`origin`), so that a fit resumes in
    any stage, and no objective is compared with that of another learner.
    """

    learners: tuple[Learner, ...]

    def __post_init__(self) -> None:
        if not self.learners:
            raise ConfigError("a relay needs at least one learner")

    def step(self, story: Story, state: FitState, passes: Passes) -> tuple[FitState, StepInfo]:
        state, info = self.learners[state.stage].step(story, state, passes)
        return self._handed_on(state), info

    def work(self, story: Story, state: FitState) -> EStep | None:
        learner = self.learners[state.stage]
        return learner.work(story, state) if isinstance(learner, PassLearner) else None

    def advance(
        self, story: Story, state: FitState, stats: StoryStats, seconds: float
    ) -> tuple[FitState, StepInfo]:
        learner = self.learners[state.stage]
        assert isinstance(learner, PassLearner)
        state, info = learner.advance(story, state, stats, seconds)
        return self._handed_on(state), info

    def _handed_on(self, state: FitState) -> FitState:
        """The state, in the next learner's hands where its own has ended."""
        ended = state.outcome in (Outcome.CONVERGED, Outcome.MAX_STEPS)
        if ended and state.stage + 1 < len(self.learners):
            state = replace(
                state,
                stage=state.stage + 1,
                origin=state.step,
                outcome=Outcome.RUNNING,
                cursor=0,
                memory=None,
                average=None,
                past=None,
                stride=None,
                memo=None,
            )
        return state


def rescue(
    story: Story, state: FitState, stats: StoryStats, params: Params, faulty: Array
) -> tuple[Params, tuple[int, ...], tuple[str, ...]]:
    """Re-seed empty, singular and duplicated components at badly explained rows of the sample.

    A row is drawn among the twentieth of the sample that the parameters explain worst. Each
    component is re-seeded at most `MAX_RESCUES` times; after that it stays as the M-step left it,
    which is finite. Of components that are the same the heaviest stays. Where every component is
    empty or singular the data are at fault, and none is moved. Returns parameters, counts and the
    events in words.
    """
    rescues = state.rescues or (0,) * story.n_components
    empty = stats.sum_r < EMPTY * max(stats.weight, 1e-300)
    fault = empty | faulty
    if state.sample is None or not state.sample.n_rows or fault.all():
        return params, rescues, ()
    sample = state.sample
    why = {int(k): "empty" if empty[k] else "singular" for k in np.flatnonzero(fault)}
    few = sample[np.linspace(0, sample.n_rows - 1, TWIN_ROWS).astype(np.intp)]
    for first, second in story.twins(params, few) if story.n_components > 1 else ():
        why.setdefault(second, f"{ALIKE} component {first}")
    wanted = [k for k in sorted(why) if rescues[k] < MAX_RESCUES]
    if not wanted:
        return params, rescues, ()
    rng = np.random.default_rng([state.seed, state.step])
    log_prob = story.log_prob(state.params, sample)
    worst = np.argsort(log_prob, kind="stable")[: max(len(wanted), len(log_prob) // 20)]
    done = []
    counts = list(rescues)
    for k in wanted:
        row = int(rng.choice(worst))
        moved = story.place(params, k, sample.values[row], sample.is_observed[row])
        assert moved.family is not None
        assert params.family is not None
        # With everything frozen there is nothing to move.
        if moved.family.digest() == params.family.digest():
            continue
        params = moved
        counts[k] += 1
        done.append(k)
    return params, tuple(counts), _rescued({k: why[k] for k in done})


def _rescued(why: Mapping[int, str]) -> tuple[str, ...]:
    """What was re-seeded and why, in words: one line a component, or one for all of many."""
    if len(why) <= MOST_TOLD:
        end = "re-seeded at a badly explained row"
        return tuple(f"component {k} was {reason}: {end}" for k, reason in why.items())
    kinds = Counter(ALIKE if reason.startswith(ALIKE) else reason for reason in why.values())
    what = ", ".join(
        f"{n} {kind} another" if kind == ALIKE else f"{n} {kind}" for kind, n in kinds.items()
    )
    some = ", ".join(map(str, [*why][:MOST_TOLD]))
    return (f"{len(why)} components were re-seeded at badly explained rows ({what}): {some}, ...",)


def fit(
    story: Story,
    learner: Learner,
    passes: Passes,
    state: FitState,
    on_step: Iterable[Callable[[FitState, StepInfo], None]] = (),
) -> FitState:
    """Step until the outcome says to stop.

    `on_step` are called after every step with the state and the step's line of the trace, to
    checkpoint, to show progress or to raise.
    """
    calls = tuple(on_step)
    with one_blas_thread():
        while state.outcome is Outcome.RUNNING:
            state, info = learner.step(story, state, passes)
            for call in calls:
                call(state, info)
    return state
