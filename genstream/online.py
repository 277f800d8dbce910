"""Online EM: learn from each mini-batch once, and forget at a chosen rate.

Statistics are kept per unit of weight and moved towards those of each mini-batch (Cappe & Moulines
2009, eq. 8), `S <- (1 - rho) S + rho s / n`, with an M-step on `n_eff S` after each. `n_eff` is the
number of rows that the weights in `S` are worth (Kish), so that a prior keeps its weight.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np

from genstream.errors import ConfigError
from genstream.families.blocks import Array, slices
from genstream.learn import FitState, Memory, Outcome, Passes, StepInfo
from genstream.rows import Rows
from genstream.story import Story, StoryStats

# Numbers of the random streams that follow from a seed.
_ORDER, _MIX = 11, 12


@dataclass(frozen=True)
class OnlineEM:
    """Stochastic-approximation EM (Cappe & Moulines 2009).

    Parameters
    ----------
    batch_rows
        Rows of a mini-batch. What arrives is cut into equal mini-batches of at most this many rows;
        a smaller one moves the statistics by as much less.
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
        per_pass = -(-n_chunks // self.buffer_chunks)
        number, place = divmod(state.cursor, per_pass)
        order = np.random.default_rng([state.seed, _ORDER, number]).permutation(n_chunks)
        chosen = order[place * self.buffer_chunks : (place + 1) * self.buffer_chunks]
        rows = Rows.concatenate([passes.read(int(i)) for i in chosen])
        mix = np.random.default_rng([state.seed, _MIX, state.cursor]).permutation(rows.n_rows)
        done = (state.cursor + 1) / (per_pass * self.max_passes)
        late = self.average > 0 and done > 1 - self.average
        state, stats = self._learn(story, state, rows[mix], late)
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

    def learn(self, story: Story, state: FitState, rows: Rows) -> tuple[FitState, StepInfo]:
        """Learn from rows that arrived together, in their order, once.

        Raises DataError where the rows do not have the story's columns.
        """
        begin = time.perf_counter()
        state, stats = self._learn(story, state, rows, late=False)
        info = _info(story, state, stats, time.perf_counter() - begin)
        return state.after(info), info

    def _learn(
        self, story: Story, state: FitState, rows: Rows, late: bool
    ) -> tuple[FitState, StoryStats]:
        """All mini-batches of some rows, and the sum of their statistics as they were scored."""
        total: StoryStats | None = None
        n_batches = max(1, -(-rows.n_rows // self.batch_rows))
        for piece in slices(rows.n_rows, max(1, -(-rows.n_rows // n_batches))):
            stats = story.e_step(state.params, rows[piece])
            total = stats if total is None else total.merge(stats)
            if stats.weight > 0 and np.isfinite(stats.objective):
                state = self._absorb(story, state, stats, late)
        if total is None:
            total = story.e_step(state.params, rows)
        return state, total

    def _absorb(self, story: Story, state: FitState, stats: StoryStats, late: bool) -> FitState:
        """Move the state's statistics towards a mini-batch's, and maximise."""
        batch = stats.scale(1.0 / stats.weight)
        memory, old = state.memory, state.stats
        if memory is None or old is None:
            # What there is so far, statistics or only parameters, stands for t0 mini-batches.
            old = batch if old is None else old.scale(1.0 / max(old.weight, 1e-300))
            memory = Memory(0.0, self.t0 * self.batch_rows, 0, state.params.weights)
        rho = self.rate(memory.clock, stats.weight)
        n_eff = 1.0 / ((1 - rho) ** 2 / memory.n_eff + rho**2 / stats.weight)
        new = self._moved(old, batch, rho, memory)
        average, n_averaged = state.average, memory.n_averaged
        if late:
            n_averaged += 1
            part = new.scale(1 / n_averaged)
            average = part if average is None else average.scale(1 - 1 / n_averaged).merge(part)
        memory = replace(
            memory,
            clock=memory.clock + stats.weight / self.batch_rows,
            n_eff=n_eff,
            n_averaged=n_averaged,
        )
        params = story.m_step(new.scale(n_eff), state.params)
        return replace(state, params=params, stats=new, memory=memory, average=average)

    def _moved(self, old: StoryStats, batch: StoryStats, rho: float, memory: Memory) -> StoryStats:
        """`(1 - rho) old + rho batch`, where each component forgets at the pace of its own rows.

        Mixing weights move at the common rate. What a component looks like moves by
        `rho_k = 1 - (1 - rho)^(a_k / share_k)`, with `a_k` the share of the mini-batch it took and
        `share_k` its share at the start: one that becomes rare keeps its looks until rows of its
        own replace them. Statistics that components share move at the common rate throughout.
        """
        new = old.scale(1 - rho).merge(batch.scale(rho))
        assert old.family is not None
        assert batch.family is not None
        if any("component" not in names for _, names, _ in old.family.leaves()):
            return new
        took = batch.sum_r
        own = -np.expm1(np.log1p(-rho) * took / np.maximum(memory.share, 1e-12))
        keep: Array = new.sum_r * (1 - own) / np.maximum(old.sum_r, 1e-300)
        gain: Array = np.where(took > 1e-300, new.sum_r * own / np.maximum(took, 1e-300), 0.0)
        return replace(new, family=old.family.scale(keep).merge(batch.family.scale(gain)))


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
