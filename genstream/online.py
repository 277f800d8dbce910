"""Online EM: learn from each mini-batch once, and forget at a chosen rate.

Statistics are kept per unit of weight and moved towards those of each mini-batch (Cappe & Moulines
2009, eq. 8), `S <- (1 - rho) S + rho s / n`, with an M-step on `n_eff S` after each. `n_eff` is the
number of rows that the weights in `S` are worth (Kish), so that a prior keeps its weight.

Time is counted in rows, and rows weigh what they do beside others: `rho` is multiplied by the mean
weight of the mini-batch over that of all rows so far, so that the unit of weights does not show.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from genstream.errors import ComputeError, ConfigError, DataError
from genstream.families.blocks import Array, slices
from genstream.learn import Abreast, FitState, Memory, Outcome, Passes, StepInfo, in_turn
from genstream.profile import mark
from genstream.responsibility import Responsibility, soft
from genstream.rows import Rows
from genstream.stats import EMPTY, fold_tree
from genstream.story import Story, StoryStats

# Numbers of the random streams that follow from a seed.
_ORDER, _MIX = 11, 12
# Rows of a part of a mini-batch, or a multiple of it, and the most parts there are. A part of fewer
# numbers (rows times components and columns) would cost more to begin than to do.
PART_ROWS, MAX_PARTS, PART_NUMBERS = 2048, 8, 1 << 16
# The largest step, which leaves so little of what was known that nothing can be seen of it: of
# nothing at all there is no logarithm.
MOST_RATE = 1 - 1e-13
# Lines of the trace that a state keeps which learns from what arrives: it may live for years.
TRACE_LINES = 256


@dataclass(frozen=True)
class OnlineEM:
    """Stochastic-approximation EM (Cappe & Moulines 2009).

    Parameters
    ----------
    batch_rows
        Rows of a mini-batch. What arrives is cut into equal mini-batches of at most this many rows;
        a smaller one moves the statistics by as much less, and so does one of lighter rows than
        there were on average. Rows of weight 0 are not counted.
    kappa, t0
        Step sizes `rho_t = (t + t0)^-kappa`, where t counts mini-batches of `batch_rows` rows;
        `kappa` in (0.5, 1].
    forgetting
        A constant step size instead, in (0, 1): for streams that drift.
    max_passes
        Passes over the chunks, where there are chunks to go over.
    average
        Share of the mini-batches, at the end of the passes, over which statistics are averaged
        (Polyak & Juditsky 1992); 0 for none. From the first step on it would hurt.
    buffer_chunks
        Chunks read together, whose rows are mixed before they are cut into mini-batches: sorted
        data would otherwise be seen one kind at a time.
    responsibility
        A rule of `genstream.responsibility`; what `Sampled` draws follows from (seed, step,
        mini-batch).

    Raises
    ------
    ConfigError
        Where a number is out of its range.
    """

    batch_rows: int = 4096
    kappa: float = 0.6
    t0: float = 64.0
    forgetting: float | None = None
    max_passes: int = 1
    average: float = 0.5
    buffer_chunks: int = 4
    responsibility: Responsibility = soft

    def __post_init__(self) -> None:
        ranges = [
            ("batch_rows", self.batch_rows >= 1, "at least 1"),
            ("kappa", 0.5 < self.kappa <= 1.0, "above 0.5 and at most 1"),
            ("t0", self.t0 >= 1, "at least 1"),
            ("forgetting", self.forgetting is None or 0 < self.forgetting < 1, "in (0, 1)"),
            ("max_passes", self.max_passes >= 1, "at least 1"),
            ("average", 0 <= self.average < 1, "at least 0 and below 1"),
            ("buffer_chunks", self.buffer_chunks >= 1, "at least 1"),
        ]
        for name, right, allowed in ranges:
            if not right:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must be {allowed}")

    def rate(self, clock: float, rows: float) -> float:
        """Step size for some rows after `clock` mini-batches: `1 - (1 - rho)^(rows / batch_rows)`.

        So a mini-batch of half the rows moves as much as two of a quarter.
        """
        rho = self.forgetting if self.forgetting is not None else (clock + self.t0) ** -self.kappa
        return float(-np.expm1(np.log1p(-min(rho, 1 - 1e-12)) * rows / self.batch_rows))

    def step(self, story: Story, state: FitState, passes: Passes) -> tuple[FitState, StepInfo]:
        """Learn from the next buffer of chunks, in an order that follows from (seed, pass).

        The step's `loglik` is prequential: every mini-batch is scored before it is learned.
        """
        begin = time.perf_counter()
        n_chunks = passes.n_chunks
        if not n_chunks:
            raise ComputeError(EMPTY)
        per_pass = -(-n_chunks // self.buffer_chunks)
        number, place = divmod(state.cursor, per_pass)
        order = np.random.default_rng([state.seed, _ORDER, number]).permutation(n_chunks)
        chosen = order[place * self.buffer_chunks : (place + 1) * self.buffer_chunks]
        mixed = np.random.default_rng([state.seed, _MIX, state.cursor])
        done = (state.cursor + 1) / (per_pass * self.max_passes)
        late = self.average > 0 and done > 1 - self.average
        with passes.abreast() as abreast:
            rows = Rows.concatenate(abreast(lambda i: passes.read(int(chosen[i])), len(chosen)))
            mark("read")
            mix = mixed.permutation(rows.n_rows)
            # A part of a mini-batch at a time, so that mixing holds no second copy of the buffer.
            cuts = slices(rows.n_rows, self._batch_size(rows.n_rows))
            batches = ((len(mix[cut]), _picked(rows, mix[cut])) for cut in cuts)
            state, stats = self._learn(story, state, batches, late, abreast)
            del rows, batches
        last = done >= 1
        if last and state.average is not None and state.memory is not None:
            params = story.m_step(state.average.scale(state.memory.n_eff), state.params)
            state = replace(state, params=params, stats=state.average, average=None)
        info = _info(story, state, stats, time.perf_counter() - begin)
        outcome = Outcome.RUNNING
        if not np.isfinite(info.mean_objective):
            outcome = Outcome.NONFINITE
        elif last:
            outcome = Outcome.MAX_STEPS
        return replace(state.after(info), cursor=state.cursor + 1, outcome=outcome), info

    def learn(
        self,
        story: Story,
        state: FitState,
        rows: Rows | Iterable[Rows],
        *,
        n_rows: int | None = None,
    ) -> tuple[FitState, StepInfo]:
        """Learn from rows that arrived together, in their order, once.

        `rows` may also come in pieces, with `n_rows` in all of them: mini-batches are cut by
        `n_rows` and `batch_rows` alone, so that however the pieces are cut the same bits come of
        it, and no more than one piece and one mini-batch is held. The trace keeps its newest
        `TRACE_LINES` lines.

        Raises ConfigError where pieces come without `n_rows`, DataError where they hold another
        number of rows or lack columns of the story.
        """
        begin = time.perf_counter()
        if isinstance(rows, Rows):
            pieces, n_rows = iter([rows]), rows.n_rows if n_rows is None else n_rows
        elif n_rows is None:
            raise ConfigError("rows that come in pieces need n_rows, how many there are in all")
        else:
            pieces = iter(rows)
        batches = recut(pieces, n_rows, self._batch_size(n_rows))
        parts = ((batch.n_rows, batch.__getitem__) for batch in batches)
        state, stats = self._learn(story, state, parts, late=False)
        info = _info(story, state, stats, time.perf_counter() - begin)
        state = state.after(info)
        return replace(state, trace=state.trace[-TRACE_LINES:]), info

    def _batch_size(self, n_rows: int) -> int:
        """Rows of each of the equal mini-batches that some rows are cut into."""
        n_batches = max(1, -(-n_rows // self.batch_rows))
        return max(1, -(-n_rows // n_batches))

    def _learn(
        self,
        story: Story,
        state: FitState,
        batches: Iterable[tuple[int, Callable[[slice], Rows]]],
        late: bool,
        abreast: Abreast = in_turn,
    ) -> tuple[FitState, StoryStats]:
        """All mini-batches of some rows, and the sum of their statistics as they were scored.

        Of each comes how many rows it has and what gives some of them. A mini-batch is cut into
        parts by its size alone, which are scored side by side and merged in the fixed tree: so
        the bits do not depend on how many workers there are.
        """
        total: StoryStats | None = None
        for i, (n_rows, take) in enumerate(batches):
            cuts = list(slices(n_rows, _part_rows(story, n_rows)))
            work = functools.partial(self._part, story, state, i, cuts, take)
            parts = abreast(work, len(cuts))
            stats: StoryStats = fold_tree(part for part, _ in parts)
            mark("merge")
            total = stats if total is None else total.merge(stats)
            if stats.weight > 0 and np.isfinite(stats.objective):
                state = self._absorb(story, state, stats, sum(n for _, n in parts), late)
            mark("m_step")
        if total is None:
            total = story.e_step(state.params, Rows(np.empty((0, story.schema.n_features))))
        return state, total

    def _part(
        self,
        story: Story,
        state: FitState,
        batch: int,
        cuts: Sequence[slice],
        take: Callable[[slice], Rows],
        part: int,
    ) -> tuple[StoryStats, int]:
        """A part's statistics, and how many of its rows are in them with any weight."""
        rows = _plain(take(cuts[part]))
        mark("features")
        key = (state.seed, state.step, batch * (MAX_PARTS + 1) + part)
        stats = story.e_step(state.params, rows, self.responsibility, key)
        n_rows = stats.n_rows - stats.n_unobserved
        if rows.weights is not None:
            light = rows.weights == 0
            seen = light if rows.observed is None else rows.observed[light].any(axis=1)
            n_rows -= int(seen.sum())
        return stats, n_rows

    def _absorb(
        self, story: Story, state: FitState, stats: StoryStats, n_rows: int, late: bool
    ) -> FitState:
        """Move the state's statistics towards those of a mini-batch of `n_rows`, and maximise."""
        batch, mean = stats.scale(1.0 / stats.weight), stats.weight / n_rows
        memory, old = state.memory, state.stats
        if memory is None or old is None:
            # What there is so far, statistics or only parameters, stands for t0 mini-batches; a
            # prior is weighed against no more rows than were seen.
            old = stats if old is None else old
            n_eff = min(self.t0 * self.batch_rows, old.weight)
            old = old.scale(1.0 / old.weight)
            memory = Memory(0.0, n_eff, 0, state.params.weights, mean)
        rho = self.rate(memory.clock, n_rows)
        # Of all rows at first, lest a few odd ones be the measure of all that follow; later of
        # those that are remembered. States of before there was a unit have none.
        unit = memory.unit or mean
        unit += max(rho, n_rows / (memory.clock * self.batch_rows + n_rows)) * (mean - unit)
        rho = min(rho * (mean / unit), MOST_RATE)
        n_eff = 1.0 / ((1 - rho) ** 2 / memory.n_eff + rho**2 / stats.weight)
        new = self._moved(old, batch, rho, memory)
        average, n_averaged = state.average, memory.n_averaged
        if late:
            n_averaged += 1
            part = new.scale(1 / n_averaged)
            average = part if average is None else average.scale(1 - 1 / n_averaged).merge(part)
        memory = replace(
            memory,
            clock=memory.clock + n_rows / self.batch_rows,
            n_eff=n_eff,
            n_averaged=n_averaged,
            unit=unit,
        )
        params = story.m_step(new.scale(n_eff), state.params)
        return replace(state, params=params, stats=new, memory=memory, average=average)

    def _moved(self, old: StoryStats, batch: StoryStats, rho: float, memory: Memory) -> StoryStats:
        """`(1 - rho) old + rho batch`, where each component forgets at the pace of its own rows.

        Mixing weights move at the common rate. What a component looks like moves by
        `rho_k = 1 - (1 - rho)^(a_k / share_k)`, with `a_k` the share of the mini-batch it took and
        `share_k` its share at the start, or now where that is more: one that becomes rare keeps
        its looks until rows of its own replace them, and one that was rare and grows does not
        forget the sooner. Statistics that components share move at the common rate throughout.
        """
        new = old.scale(1 - rho).merge(batch.scale(rho))
        assert old.family is not None
        assert batch.family is not None
        if any("component" not in names for _, names, _ in old.family.leaves()):
            return new
        took = batch.sum_r
        share = np.maximum(np.maximum(memory.share, old.sum_r), 1e-12)
        own = -np.expm1(np.log1p(-rho) * took / share)
        keep: Array = new.sum_r * (1 - own) / np.maximum(old.sum_r, 1e-300)
        gain: Array = np.where(took > 1e-300, new.sum_r * own / np.maximum(took, 1e-300), 0.0)
        return replace(new, family=old.family.scale(keep).merge(batch.family.scale(gain)))


def recut(pieces: Iterable[Rows], n_rows: int, size: int) -> Iterator[Rows]:
    """Consecutive mini-batches of `size` rows, the last one with what is left of `n_rows`.

    How the pieces are cut does not show in them, not even in whether a mask or weights that say
    nothing are there. Raises DataError where the pieces do not hold `n_rows` rows.
    """
    held: list[Rows] = []
    n_held = found = 0
    for piece in pieces:
        found += piece.n_rows
        if found > n_rows:
            break
        at = 0
        while n_held + piece.n_rows - at >= size:
            stop = at + size - n_held
            yield _plain(Rows.concatenate([*held, piece[at:stop]]))
            held, n_held, at = [], 0, stop
        if at < piece.n_rows:
            # A copy: a view would keep the whole piece in memory while the next is read.
            held.append(piece[np.arange(at, piece.n_rows)])
            n_held += piece.n_rows - at
    if found != n_rows:
        more = "more" if found > n_rows else f"only {found}"
        raise DataError(f"the pieces were said to hold {n_rows} rows, and hold {more}")
    if held:
        yield _plain(Rows.concatenate(held))


def _part_rows(story: Story, n_rows: int) -> int:
    """Rows of each part that a mini-batch is cut into, of which there are at most `MAX_PARTS`."""
    width = story.n_components + story.schema.n_features
    least = PART_ROWS * max(1, -(-PART_NUMBERS // (width * PART_ROWS)))
    return least * max(1, -(-n_rows // (least * MAX_PARTS)))


def _picked(rows: Rows, index: Array) -> Callable[[slice], Rows]:
    """What gives a slice of the rows of an index."""
    return lambda part: rows[index[part]]


def _plain(rows: Rows) -> Rows:
    """The rows without a mask where all is observed, and without weights where all are 1."""
    observed, weights = rows.observed, rows.weights
    return Rows(
        rows.values,
        None if observed is None or observed.all() else observed,
        None if weights is None or (weights == 1).all() else weights,
    )


def _info(story: Story, state: FitState, stats: StoryStats, seconds: float) -> StepInfo:
    return StepInfo(
        state.step + 1,
        stats.objective,
        story.log_prior(state.params),
        stats.weight,
        stats.n_rows,
        stats.n_unobserved,
        seconds,
    )
