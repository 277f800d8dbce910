"""Several fits in shared passes: the bits of each alone, and every chunk read once a step."""

from __future__ import annotations

import gc
import itertools
import threading
import traceback
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from genstream import sweeps
from genstream.errors import DataError
from genstream.incremental import IncrementalEM
from genstream.learn import (
    BatchEM,
    EStep,
    FitState,
    Learner,
    Outcome,
    Relay,
    Resident,
    StepInfo,
    fit,
)
from genstream.online import OnlineEM
from genstream.passes import Passes
from genstream.responsibility import Sampled, Truncated, hard
from genstream.rows import Rows
from genstream.schema import Schema
from genstream.sources import NumpySource, Source
from genstream.start import warm_start
from genstream.stories import factors, mixture
from genstream.story import Story
from genstream.sweeps import Candidate, fit_many

Array = NDArray[np.float64]
CHUNK = 50


@dataclass
class Counting:
    """A source that counts what is read of another one; not in memory as far as passes know."""

    source: NumpySource
    reads: Counter[int] = field(default_factory=Counter)
    lock: Any = field(default_factory=threading.Lock)
    broken: int | None = None

    schema = property(lambda self: self.source.schema)
    chunk_rows = property(lambda self: self.source.chunk_rows)
    chunk_nbytes = property(lambda self: self.source.chunk_nbytes)

    def read(self, i: int) -> Rows:
        with self.lock:
            self.reads[i] += 1
        if i == self.broken:
            raise DataError("chunk is broken")
        return self.source.read(i)

    def origin(self, i: int) -> Any:
        return self.source.origin(i)

    def identity(self) -> dict[str, Any]:
        return self.source.identity()


@dataclass
class Watched(Counting):
    """A source that knows how many of the chunks read are still in memory, and the most there were.

    Only with the garbage collector at rest does that say who holds them.
    """

    held: list[weakref.ref[Rows]] = field(default_factory=list)
    most: int = 0

    @property
    def alive(self) -> int:
        return sum(each() is not None for each in self.held)

    def read(self, i: int) -> Rows:
        rows = super().read(i)
        with self.lock:
            self.held.append(weakref.ref(rows))
            self.most = max(self.most, self.alive)
        return rows


@pytest.fixture
def no_collector() -> Iterator[None]:
    """What is let go of in here goes by its count of references alone."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def make_rows(n: int = 500, gaps: float = 0.0, weighted: bool = False) -> NumpySource:
    rng = np.random.default_rng(5)
    centre = rng.normal(0.0, 1.5, (4, 3))
    values = centre[rng.integers(0, 4, n)] + rng.normal(size=(n, 3))
    values[rng.random(values.shape) < gaps] = np.nan
    weights = rng.choice([0.5, 1.0, 2.0], n) if weighted else None
    return NumpySource(values, Schema.real(3), weights, CHUNK)


def candidate(source: Source, story: Story, learner: Learner, seed: int = 3) -> Candidate:
    story, state = warm_start(
        story, Passes(source, workers=1), n_init=1, short_steps=1, long_steps=1, seed=seed
    )
    return Candidate(story, learner, state)


def of_components(source: Source, learner: Learner, *numbers: int) -> list[Candidate]:
    return [candidate(source, mixture(source.schema, k), learner) for k in numbers]


def alone(each: Candidate, passes: Passes) -> FitState:
    return fit(each.story, each.learner, passes, each.state)


def bits(state: FitState | Exception) -> tuple[Any, ...]:
    """Everything that a fit came to but its seconds."""
    assert isinstance(state, FitState)
    trace = [replace(info, seconds=0.0) for info in state.trace]
    stats = state.stats.digest() if state.stats is not None else None
    return state.params.digest(), stats, trace, state.outcome, state.rescues, state.stage


STORIES: dict[str, Any] = {
    "full": lambda k: mixture(Schema.real(3), k, covariance="full"),
    "diag": lambda k: mixture(Schema.real(3), k, covariance="diag"),
    "tied, float32": lambda k: mixture(Schema.real(3), k, covariance="tied", dtype="float32"),
    "student": lambda k: mixture(Schema.real(3), k, tails="student"),
    "factors": lambda k: factors(Schema.real(3), 1, k),
}
LEARNERS: dict[str, Learner] = {
    "batch": BatchEM(8, 1e-2),
    "accelerated": BatchEM(15, 1e-3, accelerate=True),
    "hard": BatchEM(8, 0.0, responsibility=hard),
    "truncated": BatchEM(4, 0.0, responsibility=Truncated(2)),
    "sampled": BatchEM(6, 0.0, responsibility=Sampled(5)),
    "online": OnlineEM(batch_rows=40, buffer_chunks=2),
    "incremental": IncrementalEM(3, 0.0, tasks=3, group=1),
    "relay": Relay((OnlineEM(batch_rows=40), BatchEM(12, 1e-2, accelerate=True))),
}


@pytest.mark.parametrize(
    ("scheduler", "gaps", "weighted"), [("threads", 0.2, True), ("synchronous", 0.0, False)]
)
def test_together_as_alone(scheduler: str, gaps: float, weighted: bool) -> None:
    # Stories and learners of all kinds, which end at different steps, in one sweep on Dask's pool.
    source = Counting(make_rows(200, gaps, weighted))
    stories = list(STORIES.values())
    many = [
        candidate(source, stories[(n + j) % len(stories)](2 + n % 3), learner)
        for n, learner in enumerate(LEARNERS.values())
        for j in range(2)
    ]
    together = fit_many(many, Passes(source, scheduler=scheduler, workers=3), workers=2)
    expected = [alone(each, Passes(source.source, workers=1)) for each in many]
    assert len({state.step for state in expected}) > 4
    for each, state in zip(together, expected, strict=True):
        assert bits(each) == bits(state)


def test_every_chunk_is_read_once_a_step() -> None:
    source = Counting(make_rows())
    many = of_components(source, BatchEM(30, 2e-4, accelerate=True), 1, 2, 3, 4, 6)
    source.reads.clear()
    states = fit_many(many, Passes(source, workers=2))
    steps = [state.step for state in states if isinstance(state, FitState)]
    assert len(set(steps)) >= 4
    # Those that have converged drop out, and the others go on.
    assert set(source.reads.values()) == {max(steps)}
    assert sum(source.reads.values()) == max(steps) * 10 < sum(steps) * 10


def test_online_buffers_are_read_once() -> None:
    source = Counting(make_rows())
    learner = Relay((OnlineEM(batch_rows=40, buffer_chunks=2, max_passes=2), BatchEM(3, 0.0)))
    many = of_components(source, learner, 1, 2, 4)
    # One of them was interrupted earlier than the others, and catches up.
    begun = Passes(source)
    for i, n_steps in ((0, 3), (1, 5), (2, 3)):
        state = many[i].state
        for _ in range(n_steps):
            state, _ = learner.step(many[i].story, state, begun)
        many[i] = replace(many[i], state=state)
    source.reads.clear()
    whole = fit_many(many, Passes(source, workers=2), workers=2)
    # Seven buffers of two chunks in each of which all learn, and three passes of batch EM.
    assert sum(source.reads.values()) == 7 * 2 + 3 * 10
    for each, state in zip(whole, many, strict=True):
        assert bits(each) == bits(alone(state, Passes(source)))


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("workers", [1, 2])
def test_no_more_buffers_than_workers_are_in_memory(workers: int) -> None:
    source = Watched(make_rows(1500))
    learner = OnlineEM(batch_rows=40)
    many = [
        candidate(source, mixture(source.schema, 2), learner, seed) for seed in (1, 2, 3, 1, 4, 2)
    ]
    source.most = 0
    source.reads.clear()
    together = fit_many(many, Passes(source, workers=workers), workers=workers)
    assert source.most <= workers * learner.buffer_chunks
    # Those of one seed share what is read.
    assert sum(source.reads.values()) <= 4 * 30
    for each, state in zip(together, many, strict=True):
        assert bits(each) == bits(alone(state, Passes(source.source)))


def test_steps_are_told_in_order_and_resume_to_the_same_bits() -> None:
    source = make_rows()
    passes = Passes(source, workers=2)
    many = of_components(source, BatchEM(12, 1e-4, accelerate=True), 2, 3, 5)
    told: list[tuple[int, int]] = []
    newest = [each.state for each in many]

    def keep(i: int, state: FitState, info: StepInfo) -> None:
        told.append((info.step, i))
        newest[i] = state
        # In the midst of a round: the others have yet to tell their step.
        if (info.step, i) == (4, 1):
            raise KeyboardInterrupt

    whole = fit_many(many, passes)
    with pytest.raises(KeyboardInterrupt):
        fit_many(many, passes, [keep])
    assert told == [(step, i) for step in (1, 2, 3, 4) for i in range(3)][:-1]
    resumed = fit_many(
        [replace(each, state=state) for each, state in zip(many, newest, strict=True)], passes
    )
    assert [bits(state) for state in resumed] == [bits(state) for state in whole]


@dataclass(frozen=True)
class Faulty(BatchEM):
    """Fails at its third step: in the pass, or in the M-step."""

    where: str = "pass"

    def work(self, story: Story, state: FitState) -> EStep:
        if state.step == 2 and self.where == "pass":
            return Bad(story, state.params)
        return super().work(story, state)

    def advance(self, story: Story, state: FitState, stats: Any, seconds: float) -> Any:
        if state.step == 2 and self.where == "m-step":
            raise ArithmeticError("m-step")
        return super().advance(story, state, stats, seconds)


class Bad(EStep):
    def __call__(self, chunk: int, rows: Rows) -> Any:
        if chunk >= 6:
            raise ArithmeticError(f"chunk {chunk}")
        return super().__call__(chunk, rows)


def test_a_candidate_that_fails_stops_no_other() -> None:
    source = make_rows()
    many = of_components(source, BatchEM(6, 0.0), 2, 3, 4, 5)
    many[1] = replace(many[1], learner=Faulty(6, 0.0))
    many[2] = replace(many[2], learner=Faulty(6, 0.0, where="m-step"))
    states = fit_many(many, Passes(source, workers=2), workers=2)
    assert [str(state) for state in states[1:3]] == ["chunk 6", "m-step"]
    for i in (0, 3):
        assert bits(states[i]) == bits(alone(many[i], Passes(source)))


@pytest.mark.usefixtures("no_collector")
def test_a_candidate_that_fails_keeps_no_chunk() -> None:
    source = Watched(make_rows())
    many = of_components(source, BatchEM(4, 0.0), 2, 3)
    many[1] = replace(many[1], learner=Faulty(4, 0.0))
    source.most = 0
    first, second = fit_many(many, Passes(source, workers=1))
    assert isinstance(first, FitState)
    # One is worked on while the next is read.
    assert source.most <= 2
    assert source.alive == 0
    # Where it happened is said all the same.
    assert isinstance(second, ArithmeticError)
    assert second.__traceback__ is None
    told = "".join(traceback.format_exception(second))
    assert 'raise ArithmeticError(f"chunk {chunk}")' in told
    assert told.count("Traceback") == 1


@pytest.mark.usefixtures("no_collector")
def test_a_step_that_fails_keeps_no_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    source = Watched(make_rows())
    many = of_components(source, OnlineEM(batch_rows=40), 2, 3)

    def learn(*arguments: Any) -> Any:
        try:
            return {}["a"]
        except KeyError as error:
            raise DataError("these rows cannot be learned") from error

    monkeypatch.setattr(OnlineEM, "_learn", learn)
    states = fit_many(many, Passes(source, workers=2), workers=2)
    assert [str(state) for state in states] == ["these rows cannot be learned"] * 2
    assert source.alive == 0
    # What is meant for users says all in its message.
    assert not any(hasattr(state, "__notes__") for state in states)


@pytest.mark.parametrize("learner", [BatchEM(4, 0.0), OnlineEM(batch_rows=40)])
def test_data_that_cannot_be_read_end_all(learner: Learner) -> None:
    source = Counting(make_rows())
    many = of_components(source, learner, 2, 3)
    source.broken = 7
    with pytest.raises(DataError, match="chunk is broken"):
        fit_many(many, Passes(source, workers=2), workers=2)


def test_infinite_objectives_end_their_own_fit() -> None:
    source = make_rows()
    many = of_components(source, BatchEM(4, 0.0), 2, 3)
    bad = many[0].state
    family: Any = bad.params.family
    params = replace(bad.params, family=replace(family, mean=np.full_like(family.mean, np.nan)))
    many[0] = replace(many[0], state=replace(bad, params=params))
    first, second = fit_many(many, Passes(source))
    assert isinstance(first, FitState)
    assert isinstance(second, FitState)
    assert (first.outcome, second.outcome) == (Outcome.NONFINITE, Outcome.MAX_STEPS)


def test_seconds_are_shares_of_what_the_pass_took(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    clock = SimpleNamespace(perf_counter=lambda: float(next(ticks)))
    monkeypatch.setattr(sweeps, "time", clock)

    def slow(_chunk: int, _rows: Rows) -> Any:
        for _ in range(3):
            clock.perf_counter()
        return 1

    passes = Resident(Rows(np.zeros((1, 1))))
    found, seconds = sweeps.fold_each(passes, [lambda *_: 2, slow])
    assert found == [2, 1]
    # From tick 0 to tick 8, of which the works took 1 and 4.
    assert seconds == [8 * 1 / 5, 8 * 4 / 5]


def test_no_candidates_no_passes() -> None:
    source = Counting(make_rows())
    done = [
        replace(each, state=replace(each.state, outcome=Outcome.CONVERGED))
        for each in of_components(source, BatchEM(), 2)
    ]
    source.reads.clear()
    assert fit_many([], Passes(source)) == []
    assert fit_many(done, Passes(source)) == [done[0].state]
    assert not source.reads
