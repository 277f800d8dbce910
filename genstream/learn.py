"""Learning as a fold: the E-step over chunks, then one M-step, again and again.

A learner has one method, `step`, that turns a state into the next; `fit` is the only loop. The
state holds all that a resume needs, so that a fit stopped anywhere goes on to the same bits.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from genstream.errors import CorruptError
from genstream.families.blocks import Array
from genstream.rows import Rows
from genstream.stats import Record, axes
from genstream.story import Params, Responsibility, Story, StoryStats, soft
from genstream.threads import one_blas_thread

if TYPE_CHECKING:
    import xarray

# A component that took less than this share of the rows' weight explains nothing.
EMPTY = 1e-7
# How often one component is re-seeded before it is left as it is.
MAX_RESCUES = 3
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
    worth, `n_averaged` how many iterates are in the state's `average`, and `share` (K,) the mixing
    weights that learning began with.
    """

    clock: float
    n_eff: float
    n_averaged: int
    share: Array = axes("component")


@dataclass(frozen=True, eq=False)
class FitState:
    """All that a fit carries from step to step.

    `sample` are the rows from which an empty component is re-seeded; `rescues` (K,) counts how
    often each one was. `cursor` counts the buffers of chunks that online learning has gone
    through, `memory` and `average` (of statistics) belong to it too.
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
        ):
            if item is not None:
                parts |= {f"{prefix}.{n}": v for n, v in item.to_dataset().data_vars.items()}
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
            )
        except (KeyError, ValueError, TypeError) as error:
            raise CorruptError(f"a stored state cannot be read: {error!r}") from error


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


@dataclass(frozen=True, eq=False)
class EStep:
    """The E-step as work for a pass; it travels to whichever process holds the chunk."""

    story: Story
    params: Params
    responsibility: Responsibility = soft

    def __call__(self, _chunk: int, rows: Rows) -> StoryStats:
        return self.story.e_step(self.params, rows, self.responsibility)


class Learner(Protocol):
    """A way of learning."""

    def step(self, story: Story, state: FitState, passes: Passes) -> tuple[FitState, StepInfo]:
        """The next state, and the line it adds to the trace."""


@dataclass(frozen=True)
class BatchEM:
    """EM on all rows: every step is one pass and one M-step (Dempster, Laird & Rubin 1977).

    Parameters
    ----------
    max_steps
        Steps after which the fit ends.
    tolerance
        The fit has converged when a step changes the mean objective (log-likelihood plus
        log-prior) by less than this many nats a row.
    responsibility
        `soft`, or `hard` for classification EM.
    """

    max_steps: int = 200
    tolerance: float = 1e-4
    responsibility: Responsibility = soft

    def step(self, story: Story, state: FitState, passes: Passes) -> tuple[FitState, StepInfo]:
        begin = time.perf_counter()
        stats: StoryStats = passes.fold(EStep(story, state.params, self.responsibility))
        log_prior = story.log_prior(state.params)
        info = StepInfo(
            state.step + 1,
            stats.objective,
            log_prior,
            stats.weight,
            stats.n_rows,
            stats.n_unobserved,
            0.0,
        )
        outcome = Outcome.RUNNING
        params, rescues = state.params, state.rescues
        events: tuple[str, ...] = ()
        if not (np.isfinite(info.mean_objective) and np.isfinite(stats.sum_r).all()):
            outcome = Outcome.NONFINITE
        else:
            last = state.trace[-1] if state.trace else None
            # A rescue moves a component away from its optimum: the next value starts anew.
            if last is not None and not last.events:
                gain = info.mean_objective - last.mean_objective
                slack = ROUNDING[story.dtype] * (1 + abs(info.mean_objective))
                fell = story.monotone and gain < -slack
                if fell and gain < -slack - 2 * story.rounding(state.params):
                    outcome = Outcome.DECREASED
                elif abs(gain) < self.tolerance:
                    outcome = Outcome.CONVERGED
            params, faulty = story.maximise(stats, state.params)
            params, rescues, events = rescue(story, state, stats, params, faulty)
            if events and outcome is Outcome.CONVERGED:
                outcome = Outcome.RUNNING
            if outcome is Outcome.RUNNING and info.step >= self.max_steps:
                outcome = Outcome.MAX_STEPS
        info = replace(info, seconds=time.perf_counter() - begin, events=events)
        state = replace(state, params=params, stats=stats, outcome=outcome, rescues=rescues)
        return state.after(info), info


def rescue(
    story: Story, state: FitState, stats: StoryStats, params: Params, faulty: Array
) -> tuple[Params, tuple[int, ...], tuple[str, ...]]:
    """Re-seed empty and singular components at badly explained rows of the sample.

    A row is drawn among the twentieth of the sample that the parameters explain worst. Each
    component is re-seeded at most `MAX_RESCUES` times; after that it stays as the M-step left it,
    which is finite. Where every component is at fault the data are, and none is moved. Returns
    parameters, counts and the events in words.
    """
    rescues = state.rescues or (0,) * story.n_components
    empty = stats.sum_r < EMPTY * max(stats.weight, 1e-300)
    fault = empty | faulty
    wanted = [int(k) for k in np.flatnonzero(fault) if rescues[int(k)] < MAX_RESCUES]
    if not wanted or state.sample is None or fault.all():
        return params, rescues, ()
    rng = np.random.default_rng([state.seed, state.step])
    log_prob = story.log_prob(state.params, state.sample)
    worst = np.argsort(log_prob, kind="stable")[: max(len(wanted), len(log_prob) // 20)]
    events = []
    counts = list(rescues)
    for k in wanted:
        row = int(rng.choice(worst))
        sample = state.sample
        params = story.place(params, k, sample.values[row], sample.is_observed[row])
        counts[k] += 1
        what = "empty" if empty[k] else "singular"
        events.append(f"component {k} was {what}: re-seeded at a badly explained row")
    return params, tuple(counts), tuple(events)


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
