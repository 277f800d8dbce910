"""Better optima: a component that is hardly needed is put where the fit is worst.

EM ends at an optimum near its start, often with two components on one heap of rows and one
component on two others. No small step leads away from there, but a large one does: one component is
taken out and another one split in two, as in split and merge EM (Ueda, Nakano, Ghahramani & Hinton
2000, section 3) with a deletion for the merge. What the deletion costs follows from the
responsibilities; what the split brings is found by EM of two halves among the rows of one
component. All candidates together cost about as much as two passes, so that EM on all rows is spent
on the best of them only, and a move is kept if the objective rises.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from genstream.families.blocks import Array, slices
from genstream.learn import BatchEM, FitState, Outcome, Passes, Resident, fit
from genstream.responsibility import Responsibility, Sampled, climbs, soft
from genstream.rows import Rows
from genstream.story import Params, Story

# A row that is a component's own with less than this probability says nothing of its halves.
NEGLIGIBLE = 0.01
# Rows each of two halves must explain; as many more as twice the columns where no prior helps.
MIN_ROWS = 10
# EM steps of two halves among their rows.
LOCAL_STEPS = 10
# EM steps on all rows after which a move must promise to pay, and after which it must have paid.
TRIAL_STEPS, FULL_STEPS = 5, 20
# A move that is still behind may count on so many more steps like its last one.
HOPE = 10
# Moves that may fail one after another.
MAX_FAILURES = 5
# Rows whose responsibilities are held at a time.
SLICE_ROWS = 4096
# Of what a component explains now or explained before a move, the share both have in common, from
# which on its halves are not found anew.
SAME = 0.8
# Splits tried in a round: of more components than this, some that are drawn.
MOST_SPLITS = 256
# With more components than this none is moved: a trial takes passes for one component of so many.
MOST_COMPONENTS = 512

Seeding = Callable[[Story, Rows, np.random.Generator], Params]

# Numbers of the random streams that splits follow from, and which ones are tried.
_SPLIT, _DRAWN = 4, 5


@dataclass(frozen=True, eq=False)
class Portrait:
    """What every component is to the rows.

    `cost` (K,) are the nats by which the log-likelihood falls where it is deleted and the weights
    of the others are scaled up; `rows` the rows it explains, and `shares` their responsibilities.
    """

    cost: Array
    rows: tuple[NDArray[np.intp], ...]
    shares: tuple[Array, ...]

    def kept(self, k: int, rows: NDArray[np.intp], shares: Array) -> bool:
        """Whether component k explains the rows it did before, by their `shares` then: the sum of
        the smaller of both is at least `SAME` of that of the larger.
        """
        _, now, then = np.intersect1d(self.rows[k], rows, assume_unique=True, return_indices=True)
        common = float(np.minimum(self.shares[k][now], shares[then]).sum())
        either = float(self.shares[k].sum() + shares.sum()) - common
        return common >= SAME * either


def portrait(story: Story, params: Params, sample: Rows) -> Portrait:
    """What every component is to some rows, in one pass.

    Without component k a row has `p(x) (1 - r_k) / (1 - weight_k)`.
    """
    n_components = story.n_components
    weight = sample.row_weights
    cost = weight.sum() * np.log(np.maximum(1.0 - params.weights, 1e-16))
    no_rows, no_share = np.empty(0, dtype=np.intp), np.empty(0)
    rows: list[list[Array]] = [[] for _ in range(n_components)]
    shares: list[list[Array]] = [[] for _ in range(n_components)]
    for piece in slices(sample.n_rows, SLICE_ROWS):
        resp = story.infer(params, sample[piece]).responsibilities
        cost -= weight[piece] @ np.log(np.maximum(1.0 - resp, 1e-16))
        component, mine = np.nonzero(resp.T > NEGLIGIBLE)
        share = resp[mine, component]
        present, first = np.unique(component, return_index=True)
        for k, own, part in zip(
            present, np.split(mine, first[1:]), np.split(share, first[1:]), strict=True
        ):
            rows[k].append(own + piece.start)
            shares[k].append(part)
    return Portrait(
        cost,
        tuple(np.concatenate([no_rows, *each]) for each in rows),
        tuple(np.concatenate([no_share, *each]) for each in shares),
    )


@dataclass(frozen=True, eq=False)
class Halves:
    """Two components in the place of one, and by how many nats they explain its rows better."""

    params: Params
    gain: float


def split(
    story: Story,
    params: Params,
    component: int,
    rows: Rows,
    shares: Array,
    seeding: Seeding,
    rng: np.random.Generator,
    responsibility: Responsibility = soft,
) -> Halves | None:
    """One component split in two by EM among its rows, of which it has the `shares` (n,).

    None where there are too few of them, or a half is empty, singular or not finite.
    """
    least = MIN_ROWS + (0 if story.prior else 2 * story.schema.n_features)
    n_rows = float(shares.sum())
    if n_rows < 2 * least:
        return None
    rows = Rows(rows.values, rows.observed, rows.row_weights * shares)
    one, two = replace(story, n_components=1), replace(story, n_components=2)
    whole = replace(params.take([component]), weights=np.ones(1))
    before = one.e_step(whole, rows, responsibility).objective + one.log_prior(whole)
    state = FitState(seeding(two, rows, rng))
    state = fit(two, BatchEM(LOCAL_STEPS, 1e-3, responsibility), Resident(rows), state)
    gain = state.trace[-1].loglik + state.trace[-1].log_prior - before
    if not np.isfinite(gain) or state.stats is None or state.params.weights.min() * n_rows < least:
        return None
    if two.maximise(state.stats, state.params)[1].any():
        return None
    return Halves(state.params, gain)


def moved(params: Params, halves: Params, component: int, deleted: int) -> Params:
    """The parameters with halves of a component in its own place and in that of a deleted one."""
    weights = params.weights.copy()
    share = weights[component]
    weights[[component, deleted]] = share * halves.weights
    pair = replace(halves, weights=weights[[component, deleted]])
    new = params.put(pair, [component, deleted])
    return replace(new, weights=new.weights / new.weights.sum())


def refine(
    story: Story,
    sample: Rows,
    state: FitState,
    seeding: Seeding,
    *,
    passes: float,
    through: Passes | None = None,
    tolerance: float = 1e-4,
    responsibility: Responsibility = soft,
) -> tuple[FitState, float]:
    """A state that no move of a component betters any more, and the passes over the sample spent.

    Moves are tried from the most promising one on. One that is kept begins a new round; after
    `MAX_FAILURES` in a row, or where about `passes` were spent, it ends. The mean objective never
    falls. With fewer than three components or more than `MOST_COMPONENTS`, with frozen parameters
    or where responsibilities are drawn, the state is returned as it is. Everything follows from the
    state's seed.

    Parameters
    ----------
    state
        Fitted to the sample, with a trace.
    seeding
        Makes two components from the rows of one.
    through
        Passes over the sample; as one chunk when left out.
    tolerance
        Nats a row that a move must gain, and that end the EM of a trial.
    responsibility
        The rule by which the state was fitted, and by which moves are.
    """
    spent = 0.0
    number = 0
    better: FitState | None = state
    idle = not 3 <= story.n_components <= MOST_COMPONENTS
    if idle or story.frozen or isinstance(responsibility, Sampled):
        return state, spent
    # Halves by component, and the rows and shares it had when they were found.
    halves: dict[int, tuple[Halves | None, NDArray[np.intp], Array]] = {}
    while better is not None and spent < passes:
        state = better
        seen = portrait(story, state.params, sample)
        spent += 1
        halves = {k: known for k, known in halves.items() if seen.kept(k, *known[1:])}
        for k in _tried(story.n_components, state.seed, number):
            if k in halves:
                continue
            mine = seen.rows[k]
            rng = np.random.default_rng([state.seed, _SPLIT, number, k])
            found = split(
                story, state.params, k, sample[mine], seen.shares[k], seeding, rng, responsibility
            )
            spent += (2 * LOCAL_STEPS + 3) * len(mine) / (story.n_components * sample.n_rows)
            halves[k] = found, mine, seen.shares[k]
        worth = {k: found for k, (found, *_) in halves.items() if found is not None}
        number += 1
        # More of either cannot be among the best moves.
        few = MAX_FAILURES + 1
        cheap = sorted(range(story.n_components), key=lambda i: (seen.cost[i], i))[:few]
        dear = sorted(worth, key=lambda k: (-worth[k].gain, k))[:few]
        moves = sorted((seen.cost[i] - worth[k].gain, k, i) for k in dear for i in cheap if i != k)
        better = None
        for _, k, i in moves[:MAX_FAILURES]:
            if better is not None or spent >= passes:
                break
            params = moved(state.params, worth[k].params, k, i)
            begun = replace(state, params=params)
            tried = _trial(story, through or Resident(sample), begun, tolerance, responsibility)
            spent += tried.step
            if tried.trace[-1].mean_objective > state.trace[-1].mean_objective + tolerance:
                better = tried
    return state if better is None else better, spent


def _tried(n_components: int, seed: int, number: int) -> list[int]:
    """The components that a round tries to split."""
    if n_components <= MOST_SPLITS:
        return list(range(n_components))
    rng = np.random.default_rng([seed, _DRAWN, number])
    return sorted(rng.choice(n_components, MOST_SPLITS, replace=False).tolist())


def _trial(
    story: Story, passes: Passes, state: FitState, tolerance: float, responsibility: Responsibility
) -> FitState:
    """EM from moved parameters, for as long as it may still reach the value in the trace."""
    value = state.trace[-1].mean_objective
    trial = FitState(state.params, seed=state.seed, sample=state.sample)
    trial = fit(story, BatchEM(TRIAL_STEPS, tolerance, responsibility), passes, trial)
    if trial.outcome is not Outcome.MAX_STEPS:
        return trial
    last, one = (info.mean_objective for info in trial.trace[-2:])
    if not one + HOPE * (one - last) > value:
        return trial
    going = replace(trial, outcome=Outcome.RUNNING)
    quick = climbs(responsibility)
    learner = BatchEM(FULL_STEPS, tolerance, responsibility, accelerate=quick)
    return fit(story, learner, passes, going)
