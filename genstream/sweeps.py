"""Several fits that share their passes: a chunk is read once a step, whatever the number of models.

Candidate models (other numbers of components, other families, other starts) learn side by side. As
long as a chunk is in memory all those that still run take their E-step on it, and each merges its
statistics along the same fixed tree as if it were alone, so that it comes to the same bits.
"""

from __future__ import annotations

import contextlib
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from genstream.errors import GenstreamError
from genstream.learn import (
    Abreast,
    FitState,
    Learner,
    Outcome,
    Passes,
    PassLearner,
    Relay,
    StepInfo,
    in_turn,
)
from genstream.online import OnlineEM
from genstream.rows import Rows
from genstream.story import Story
from genstream.threads import beside, one_blas_thread

Work = Callable[[int, Rows], Any]


@dataclass(frozen=True, eq=False)
class Candidate:
    """One of several fits: what is learned, how, and from where."""

    story: Story
    learner: Learner
    state: FitState


@dataclass(frozen=True, eq=False)
class Failure:
    """What stands for a value that could not be computed; it swallows whatever merges with it."""

    error: Exception

    def merge(self, _: Any) -> Failure:
        """The first failure of a tree is the one that is told."""
        return self


@dataclass(frozen=True, eq=False)
class Several:
    """What several works made of some chunks, and the seconds that each took of its thread.

    A part is what its work returned, merged, or a `Failure`.
    """

    parts: tuple[Any, ...]
    seconds: tuple[float, ...]

    def merge(self, other: Several) -> Several:
        """Each part merged with its own kind."""
        return Several(
            tuple(map(_merged, self.parts, other.parts)),
            tuple(map(float.__add__, self.seconds, other.seconds)),
        )


def _merged(left: Any, right: Any) -> Any:
    return (
        right
        if isinstance(right, Failure) and not isinstance(left, Failure)
        else (left.merge(right))
    )


@dataclass(frozen=True, eq=False)
class Each:
    """Several works as one: a chunk is in memory once, while all of them look at it in turn.

    What one of them raises is its own misfortune and stops no other.
    """

    works: tuple[Work, ...]

    def __call__(self, chunk: int, rows: Rows) -> Several:
        parts, seconds = [], []
        for work in self.works:
            begin = time.perf_counter()
            try:
                part = work(chunk, rows)
            except Exception as error:  # noqa: BLE001 - the others go on
                part = Failure(_without_frames(error))
            parts.append(part)
            seconds.append(time.perf_counter() - begin)
        return Several(tuple(parts), tuple(seconds))


def _without_frames(error: Exception) -> Exception:
    """An error to be kept, without the frames that it was raised in: these hold chunks of rows.

    Where it was raised, and what from, is a note of it, but where the message says all there is to
    say.
    """
    if not isinstance(error, GenstreamError):
        error.add_note("".join(traceback.format_exception(error)).rstrip())
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


def fold_each(passes: Passes, works: Sequence[Work]) -> tuple[list[Any], list[float]]:
    """The results of several works in one pass, and each one's share of the seconds it took.

    Where a work failed, its result is the error it raised. Raises what `passes` raises, which
    concerns all of them.
    """
    if not works:
        return [], []
    begin = time.perf_counter()
    found: Several = passes.fold(Each(tuple(works)))
    wall, spent = time.perf_counter() - begin, sum(found.seconds)
    shares = [wall * own / spent if spent > 0 else wall / len(works) for own in found.seconds]
    parts = [part.error if isinstance(part, Failure) else part for part in found.parts]
    return parts, shares


@dataclass(eq=False)
class _ReadOnce:
    """Passes whose chunks, read one at a time, are kept while several learners want the same.

    What reading raised is kept as well: it concerns all who would read on.
    """

    passes: Passes
    alone: bool

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: dict[int, Rows] = {}
        self.error: Exception | None = None

    @property
    def n_chunks(self) -> int:
        return self.passes.n_chunks

    def read(self, chunk: int) -> Rows:
        # Whoever comes second waits, and finds the chunk read.
        with self._lock:
            if chunk not in self._kept:
                try:
                    self._kept[chunk] = self.passes.read(chunk)
                except Exception as error:
                    self.error = error
                    raise
            return self._kept[chunk]

    def fold(self, work: Work) -> Any:
        return self.passes.fold(work)

    def fold_tasks(self, work: Work, ranges: Sequence[tuple[int, int]]) -> list[Any]:
        return self.passes.fold_tasks(work, ranges)

    def abreast(self) -> contextlib.AbstractContextManager[Abreast]:
        # Several fits are side by side already.
        return self.passes.abreast() if self.alone else contextlib.nullcontext(in_turn)


Taken = tuple[FitState, StepInfo]


def fit_many(
    candidates: Sequence[Candidate],
    passes: Passes,
    on_step: Iterable[Callable[[int, FitState, StepInfo], None]] = (),
    *,
    workers: int = 1,
) -> list[FitState | Exception]:
    """Fit several candidates in lock step: one pass a step for all that have not ended.

    Every candidate comes to the bits that `learn.fit` gives it alone; what differs is the
    `seconds` of its trace, which are its share of a pass by the time that its own E-steps took.

    Batch EM shares whole passes, accelerated or not, and whatever the responsibilities. Online EM
    shares its buffers of chunks between candidates of the same seed and number of buffered chunks,
    and candidates that have not got so far catch up first. A learner of another kind, such as
    incremental EM, takes its steps alone, and reads for itself.

    Parameters
    ----------
    candidates
        They may differ in everything but the data.
    passes
        Passes over these.
    on_step
        Called after every step with a candidate's position, its state and the line of its trace,
        candidate after candidate, in this thread. What they raise ends all fits.
    workers
        Threads for what candidates do beside one another: M-steps, and steps of online EM.

    Returns
    -------
    list
        The final state of each candidate, or the exception that ended it: a candidate that fails
        stops no other.
    """
    calls = tuple(on_step)
    states: list[FitState | Exception] = [candidate.state for candidate in candidates]
    with one_blas_thread(), ThreadPoolExecutor(workers) as pool:
        while running := _running(states):
            folding: list[int] = []
            walking: list[int] = []
            works: list[Work] = []
            for i, state in running.items():
                learner = candidates[i].learner
                work = None
                if isinstance(learner, PassLearner):
                    work = learner.work(candidates[i].story, state)
                if work is None:
                    walking.append(i)
                else:
                    folding.append(i)
                    works.append(work)
            if walking:
                # Those behind catch up, so that all come to the shared passes together.
                behind = min(running[i].step for i in walking)
                turn = [i for i in walking if running[i].step == behind]
                taken = _walk(candidates, running, turn, passes, pool, workers)
            else:
                turn = folding
                found, seconds = fold_each(passes, works)
                advances = [
                    _tried(_advance, candidates[i], running[i], stats, took)
                    for i, stats, took in zip(turn, found, seconds, strict=True)
                ]
                taken = list(beside(pool, workers, advances))
            for i, result in zip(turn, taken, strict=True):
                if isinstance(result, Exception):
                    states[i] = result
                    continue
                states[i] = result[0]
                for call in calls:
                    call(i, *result)
    return states


def _running(states: Sequence[FitState | Exception]) -> dict[int, FitState]:
    return {
        i: state
        for i, state in enumerate(states)
        if isinstance(state, FitState) and state.outcome is Outcome.RUNNING
    }


def _walk(
    candidates: Sequence[Candidate],
    states: dict[int, FitState],
    turn: Sequence[int],
    passes: Passes,
    pool: ThreadPoolExecutor,
    workers: int,
) -> list[Taken | Exception]:
    """A step each of candidates whose steps are no passes; those of online EM side by side.

    Those that want the same chunks have them read once, and no more buffers of chunks than there
    are workers are in memory at a time.
    """
    buffers: dict[tuple[int, int, int], list[int]] = {}
    for i in turn:
        learner = _at_work(candidates[i], states[i])
        if isinstance(learner, OnlineEM):
            wanted = (states[i].seed, states[i].cursor, learner.buffer_chunks)
            buffers.setdefault(wanted, []).append(i)
    taken: dict[int, Taken | Exception] = {}
    wanting = list(buffers.values())
    for first in range(0, len(wanting), workers):
        group = [i for same in wanting[first : first + workers] for i in same]
        shared = _ReadOnce(passes, alone=len(group) == 1)
        steps = [_tried(_step, candidates[i], states[i], shared) for i in group]
        taken.update(zip(group, beside(pool, workers, steps), strict=True))
        if shared.error is not None:
            raise shared.error
    # Other learners have threads of their own.
    for i in turn:
        if i not in taken:
            taken[i] = _tried(_step, candidates[i], states[i], passes)()
    return [taken[i] for i in turn]


def _at_work(candidate: Candidate, state: FitState) -> Learner:
    """The learner that takes a candidate's next step."""
    learner = candidate.learner
    return learner.learners[state.stage] if isinstance(learner, Relay) else learner


def _step(candidate: Candidate, state: FitState, passes: Passes) -> Taken:
    return candidate.learner.step(candidate.story, state, passes)


def _advance(
    candidate: Candidate, state: FitState, stats: Any, seconds: float
) -> Taken | Exception:
    if isinstance(stats, Exception):
        return stats
    assert isinstance(candidate.learner, PassLearner)
    return candidate.learner.advance(candidate.story, state, stats, seconds)


def _tried(
    step: Callable[..., Taken | Exception], *arguments: Any
) -> Callable[[], Taken | Exception]:
    """A step to be taken, or the exception that it raises."""

    def call() -> Taken | Exception:
        try:
            return step(*arguments)
        except Exception as error:  # noqa: BLE001 - the other candidates go on
            return _without_frames(error)

    return call
