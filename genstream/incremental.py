"""Incremental EM: the statistics of one part of the data are renewed at a time, and no bound falls.

With responsibilities `q` that may be of older parameters, EM climbs the bound

    F(q, theta) = E_q[log p(x, z | theta)] - E_q[log q(z)] + log p(theta)

in either argument, one part of the data after another (Neal & Hinton 1998). Each task of chunks
keeps its own statistics, a *memo*, with the inner nodes of the tree that merges them (Hughes &
Sudderth 2013 keep one a batch): a renewed task costs log2(tasks) merges, and nothing is ever
subtracted, so no rounding gathers however long a fit goes on.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np

from genstream.errors import ConfigError
from genstream.learn import (
    ROUNDING,
    EStep,
    FitState,
    Memo,
    Outcome,
    Passes,
    StepInfo,
    rescue,
)
from genstream.responsibility import Responsibility, Sampled, soft
from genstream.rows import Rows
from genstream.story import Params, Story, StoryStats

# Number of the random stream that the order of tasks follows from.
_ORDER = 13


@dataclass(frozen=True)
class IncrementalEM:
    """EM with an M-step after every few tasks of chunks (Neal & Hinton 1998).

    The first step is a pass over all tasks; each further one renews `group` of them, in an order
    that follows from (seed, pass). The step's objective is the bound `F`, which is the
    log-likelihood (plus log-prior) once nothing changes any more.

    Parameters
    ----------
    max_passes
        Passes over all tasks after which the fit ends, those counted that a rescue cut short. In
        the last one no component is rescued, as no pass would be left to fit it.
    tolerance
        The fit has converged when a pass changes the mean bound by less than this many nats a row.
    tasks
        At most so many tasks the chunks are divided into, each an aligned power of two of them.
    group
        Tasks renewed in a step, side by side where there are workers.
    memo_nbytes
        Bytes the memo may take in memory, and in a checkpoint; where the statistics are large
        there are fewer tasks.
    responsibility
        A rule of `genstream.responsibility`. With `Sampled` the bound is an estimate that neither
        climbs at every step nor comes to rest: the fit ends after `max_passes`.

    Raises
    ------
    ConfigError
        Where a number is out of its range, or not even one task's statistics fit `memo_nbytes`.
    """

    max_passes: int = 100
    tolerance: float = 1e-4
    tasks: int = 64
    group: int = 4
    memo_nbytes: int = 256 << 20
    responsibility: Responsibility = soft

    def __post_init__(self) -> None:
        ranges = [
            ("max_passes", self.max_passes >= 1, "at least 1"),
            ("tolerance", self.tolerance >= 0, "at least 0"),
            ("tasks", self.tasks >= 1, "at least 1"),
            ("group", self.group >= 1, "at least 1"),
        ]
        for name, right, allowed in ranges:
            if not right:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must be {allowed}")

    def ranges(self, story: Story, params: Params, n_chunks: int) -> list[tuple[int, int]]:
        """The chunks of each task, which follow from their number and the size of statistics."""
        nothing = story.e_step(params, Rows(np.empty((0, story.schema.n_features))))
        size = sum(np.asarray(value).nbytes for _, _, value in nothing.leaves())
        # The tree over n tasks has less than 2 n nodes.
        most = min(self.tasks, self.memo_nbytes // (2 * size))
        if most < 1:
            raise ConfigError(
                f"memo_nbytes is {self.memo_nbytes}: one task's statistics take {2 * size}"
            )
        width = 1
        while -(-n_chunks // width) > most:
            width *= 2
        return [(first, min(first + width, n_chunks)) for first in range(0, n_chunks, width)]

    def step(self, story: Story, state: FitState, passes: Passes) -> tuple[FitState, StepInfo]:
        """Renew the next tasks, then maximise."""
        begin = time.perf_counter()
        ranges = self.ranges(story, state.params, passes.n_chunks)
        memo = state.memo
        if memo is not None and memo.n_tasks != len(ranges):
            memo = None
        a_pass = -(-len(ranges) // self.group)
        if memo is None:
            chosen = list(range(len(ranges)))
        else:
            number, place = divmod(state.cursor, a_pass)
            order = np.random.default_rng([state.seed, _ORDER, number]).permutation(len(ranges))
            chosen = [int(i) for i in order[place * self.group : (place + 1) * self.group]]
        work = EStep(story, state.params, self.responsibility, state.seed, state.step)
        fresh = passes.fold_tasks(work, [ranges[i] for i in chosen])
        leaves = {
            i: _with_entropy(story, state.params, stats)
            for i, stats in zip(chosen, fresh, strict=True)
        }
        memo = Memo.of(list(leaves.values())) if memo is None else memo.renewed(leaves)
        bound = memo.total.objective + story.expected_log_joint(state.params, memo.total)
        total = replace(memo.total, objective=bound)
        info = StepInfo(
            state.step + 1,
            bound,
            story.log_prior(state.params),
            total.weight,
            sum(stats.n_rows for stats in fresh),
            sum(stats.n_unobserved for stats in fresh),
            0.0,
        )
        if not (np.isfinite(info.mean_objective) and np.isfinite(total.sum_r).all()):
            state = replace(state, outcome=Outcome.NONFINITE)
        else:
            earlier = [line for line in state.trace if line.step > state.origin]
            seen = sum(line.n_rows for line in earlier) + info.n_rows
            params, faulty = story.maximise(total, state.params)
            if seen + total.n_rows <= self.max_passes * total.n_rows:
                # A pass is left to fill the memo anew: what is moved is fitted, too.
                params, rescues, events = rescue(story, state, total, params, faulty)
                info = replace(info, events=events)
                state = replace(state, rescues=rescues)
            over = None
            if any(line.events for line in earlier):
                # A rescue begins the memo anew, but not the count of passes.
                over = seen >= self.max_passes * total.n_rows
            outcome = self._outcome(story, state, info, a_pass, over)
            state = replace(state, params=params, outcome=outcome, stats=total)
            # What the memo says of a component that was moved is of where it was.
            cursor = state.cursor + 1 if state.memo is not None else 0
            moved = bool(info.events)
            state = replace(state, memo=None if moved else memo, cursor=0 if moved else cursor)
        info = replace(info, seconds=time.perf_counter() - begin)
        return state.after(info), info

    def _outcome(
        self, story: Story, state: FitState, info: StepInfo, a_pass: int, over: bool | None
    ) -> Outcome:
        """How the fit stands; `state` is the one before the step, and `over` says whether all
        passes are done, where the cursor does not.
        """
        if info.events:
            return Outcome.RUNNING
        done = 0 if state.memo is None else state.cursor + 1
        if over is None:
            # The pass that fills the memo is the first one.
            over = done >= (self.max_passes - 1) * a_pass
        trace = state.trace[-a_pass:]
        drawn = isinstance(self.responsibility, Sampled)
        if state.memo is not None and not drawn:
            slack = ROUNDING[story.dtype] * (1 + abs(info.mean_objective))
            slack += getattr(self.responsibility, "slack", 0.0)
            gain = info.mean_objective - trace[-1].mean_objective
            if story.monotone and gain < -slack - 2 * story.rounding(state.params):
                return Outcome.DECREASED
        if done and done % a_pass == 0 and not drawn:
            gain = info.mean_objective - trace[0].mean_objective
            if abs(gain) < self.tolerance:
                return Outcome.CONVERGED
        return Outcome.MAX_STEPS if over else Outcome.RUNNING


def _with_entropy(story: Story, params: Params, stats: StoryStats) -> StoryStats:
    """Statistics whose objective is only what does not depend on parameters: `-E[log q]`."""
    entropy = stats.objective - story.expected_log_joint(params, stats)
    return replace(stats, objective=entropy)
