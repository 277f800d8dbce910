"""First parameters: a row sample, seeding that minds gaps, and short fits; the best goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from genstream.errors import DataError
from genstream.families.blocks import Array
from genstream.learn import BatchEM, FitState, Learner, Outcome, Relay, Resident, fit
from genstream.online import OnlineEM
from genstream.passes import Passes
from genstream.refine import Seeding, refine
from genstream.responsibility import Responsibility, soft
from genstream.rows import Rows
from genstream.story import Params, Story

# Memory the row sample may take, in bytes, whatever the number of columns.
SAMPLE_BYTES = 64 << 20
# Rows kept with the state, from which empty components are re-seeded.
RESCUE_ROWS = 2048
# Rows on which distances are computed for seeding.
SEED_ROWS = 20_000
# Among the rows of one component, a spread below this share of all rows' own is no structure.
NARROW = 0.03
# Passes over the sample that moving components may take.
REFINE_PASSES = 50.0
# From this many mini-batches on, an online pass gains more than the batch pass it replaces.
ONLINE_BATCHES = 256
# Mini-batches that an online pass of the default learner takes at most: further M-steps cost time
# and teach little, so that very large data are taken in larger mini-batches.
MOST_BATCHES = 2048


@dataclass(frozen=True, eq=False)
class Pick:
    """Work for a pass: the rows of each chunk that belong to the sample."""

    index: tuple[NDArray[np.int64], ...]

    def __call__(self, chunk: int, rows: Rows) -> Rows:
        picked = rows[self.index[chunk]]
        return Rows(picked.values.astype(np.float64), picked.observed, picked.weights)


def draw_sample(passes: Passes, n_rows: int | None, seed: int) -> Rows:
    """At most `n_rows` rows drawn without replacement over all chunks, in one pass.

    None stands for all rows; a number is lowered where so many would take too much memory. Rows
    with nothing observed or of weight 0 are left out. Raises DataError where none is left.
    """
    sizes = np.array(passes.source.chunk_rows)
    total = int(sizes.sum())
    if total == 0:
        raise DataError("the data have no rows")
    width = passes.source.schema.n_features
    limit = total if n_rows is None else min(n_rows, max(1000, SAMPLE_BYTES // (9 * width)))
    n_rows = min(total, limit)
    rng = np.random.default_rng([seed, 0])
    if n_rows == total:
        chosen = np.arange(total)
    else:
        chosen = np.sort(rng.choice(total, n_rows, replace=False))
    edges = np.concatenate([[0], np.cumsum(sizes)])
    cuts = np.searchsorted(chosen, edges)
    index = tuple(
        chosen[first:last] - edge
        for first, last, edge in zip(cuts[:-1], cuts[1:], edges[:-1], strict=True)
    )
    sample = Rows.concatenate(list(passes.map(Pick(index))))
    useful = sample.is_observed.any(axis=1) & (sample.row_weights > 0)
    if not useful.any():
        raise DataError(
            "nothing can be learned: every sampled row has no observed entry or zero weight"
        )
    return sample if useful.all() else sample[useful]


def rescue_rows(sample: Rows, seed: int) -> Rows:
    """At most `RESCUE_ROWS` rows of the sample, without weights, to keep with a state."""
    if sample.n_rows > RESCUE_ROWS:
        rng = np.random.default_rng([seed, 1])
        sample = sample[np.sort(rng.choice(sample.n_rows, RESCUE_ROWS, replace=False))]
    return Rows(sample.dense().values, sample.observed)


def seed_centres(
    x: Array, observed: NDArray[np.bool_], weight: Array, n_centres: int, rng: np.random.Generator
) -> Array:
    """(K, e) centres by k-means++ (Arthur & Vassilvitskii 2007, section 2.2) with gaps.

    Distances are squared distances over the entries that a row observed, scaled up to all `e`
    coordinates. A centre takes its missing coordinates from the column means, which are 0 here.
    Fewer distinct rows than centres give repeated centres.
    """
    n = len(x)
    nearest = np.full(n, np.inf)
    centres = np.empty((n_centres, x.shape[1]))
    # Greedy: of several candidates the one that leaves the least distance (section 5).
    n_trials = 2 + int(np.log(n_centres))
    for k in range(n_centres):
        mass = weight if k == 0 else weight * nearest
        total = mass.sum()
        chance = mass / total if total > 0 else weight / weight.sum()
        trials = rng.choice(n, size=1 if k == 0 else n_trials, p=chance)
        reached = np.minimum(nearest[:, None], distances(x, observed, x[trials]))
        best = int((weight @ reached).argmin())
        nearest = reached[:, best]
        centres[k] = x[trials[best]]
    return centres


def distances(x: Array, observed: NDArray[np.bool_], centres: Array) -> Array:
    """(n, K) squared distances over the observed coordinates, scaled up to all of them."""
    seen = observed.astype(np.float64)
    squared = (x**2).sum(axis=1)[:, None] - 2 * x @ centres.T + seen @ (centres**2).T
    share = seen.mean(axis=1)[:, None]
    return np.asarray(np.maximum(squared, 0.0) / np.where(share > 0, share, 1.0))


def cluster(
    x: Array,
    observed: NDArray[np.bool_],
    weight: Array,
    centres: Array,
    max_steps: int = 10,
) -> tuple[Array, NDArray[np.intp]]:
    """Lloyd's algorithm from given centres, over observed entries: centres and labels (n,)."""
    labels = np.full(len(x), -1)
    for _ in range(max_steps):
        fresh = distances(x, observed, centres).argmin(axis=1)
        if (fresh == labels).all():
            break
        labels = fresh
        member = np.zeros((len(centres), len(x)))
        member[labels, np.arange(len(x))] = weight
        mass = member @ observed
        centres = np.where(mass > 0, (member @ x) / np.where(mass > 0, mass, 1.0), centres)
    return centres, distances(x, observed, centres).argmin(axis=1)


def seed_params(story: Story, sample: Rows, rng: np.random.Generator) -> Params:
    """Parameters from clusters of the sample: seeding, a few Lloyd steps, and one M-step."""
    x, observed = story.family.embed(story.readable(sample))
    return _from_clusters(story, sample, x, observed, rng)


def seed_within(story: Story, sample: Rows, rng: np.random.Generator) -> Params:
    """As `seed_params`, but distances are measured by the deviations of these rows alone: those of
    one component, among which a column may count that hardly varies over all.
    """
    x, observed = story.family.embed(story.readable(sample))
    weight = observed * sample.row_weights[:, None]
    total = np.maximum(weight.sum(axis=0), 1e-300)
    mean = (weight * x).sum(axis=0) / total
    spread = np.sqrt((weight * (x - mean) ** 2).sum(axis=0) / total)
    x = np.where(observed, (x - mean) / np.maximum(spread, NARROW), 0.0)
    return _from_clusters(story, sample, x, observed, rng)


def _from_clusters(
    story: Story, sample: Rows, x: Array, observed: NDArray[np.bool_], rng: np.random.Generator
) -> Params:
    weight = sample.row_weights
    small = np.arange(len(x))
    if len(x) > SEED_ROWS:
        small = np.sort(rng.choice(len(x), SEED_ROWS, replace=False))
    centres = seed_centres(x[small], observed[small], weight[small], story.n_components, rng)
    centres, _ = cluster(x[small], observed[small], weight[small], centres)
    labels = distances(x, observed, centres).argmin(axis=1)
    return params_from_labels(story, sample, labels, rng)


def params_from_labels(
    story: Story, sample: Rows, labels: NDArray[np.intp], rng: np.random.Generator
) -> Params:
    """One M-step on a hard assignment (n,) of the sample to components, with what symmetry it
    leaves broken by the family.
    """
    responsibilities = np.zeros((sample.n_rows, story.n_components))
    responsibilities[np.arange(sample.n_rows), labels] = 1.0
    vague = story.vague()
    params = story.m_step(story.e_step(vague, sample, responsibilities), vague)
    begun = story.family.start(params.family, sample, responsibilities, rng)
    return replace(params, family=begun)


def warm_start(
    story: Story,
    passes: Passes,
    *,
    n_init: int = 5,
    seed: int = 42,
    sample_rows: int = 50_000,
    short_steps: int = 10,
    long_steps: int = 100,
    refine_passes: float = REFINE_PASSES,
    tolerance: float = 1e-4,
    seeding: Seeding = seed_params,
    given: Params | None = None,
    responsibility: Responsibility = soft,
    sample: Rows | None = None,
    on_start: Callable[[int, float], None] | None = None,
) -> tuple[Story, FitState]:
    """An anchored story and a state from which full passes begin.

    A sample over all chunks fixes pivot and prior. Of `n_init` seeded fits of `short_steps` EM
    steps on the sample the one with the best objective goes on, for at most `long_steps`, to
    `tolerance` (nats a row). Then components that are hardly needed are moved to where they
    explain more, for about `refine_passes` passes over the sample at most (`genstream.refine`);
    where `long_steps` are no more than the short ones, there is no more than the short fits. The
    state holds the sample's statistics, from which online EM begins.
    `seeding` makes the parameters each short fit begins with. `given` parameters take the place of
    starts, and `responsibility` is the rule by which the sample is fitted. A `sample` that
    `draw_sample` drew with the same number and seed saves its pass.
    `on_start(i, mean objective)` is called after each of them.
    Everything follows from `seed`. Raises DataError where the data cannot start a fit.
    """
    if sample is None:
        sample = draw_sample(passes, sample_rows, seed)
    story = story.anchored(sample)
    kept = rescue_rows(sample, seed)
    if given is not None:
        key = (seed, 0, 0)
        stats = story.e_step(given, sample, responsibility, key)
        return story, FitState(given, seed=seed, stats=stats, sample=kept)
    best: FitState | None = None
    for i in range(max(1, n_init)):
        rng = np.random.default_rng([seed, 2, i])
        state = FitState(seeding(story, sample, rng), seed=seed, sample=kept)
        state = fit(story, BatchEM(short_steps, tolerance, responsibility), Resident(sample), state)
        value = state.trace[-1].mean_objective
        if on_start is not None:
            on_start(i, value)
        if np.isfinite(value) and (best is None or value > best.trace[-1].mean_objective):
            best = state
    if best is None:
        raise DataError(
            "no start gave a finite log-likelihood on the row sample: "
            "look for extreme values, or keep the weak prior"
        )
    if long_steps > short_steps:
        quick = responsibility is soft
        learner = BatchEM(long_steps, tolerance, responsibility, accelerate=quick)

        def go_on(state: FitState) -> FitState:
            if state.outcome is not Outcome.MAX_STEPS:
                return state
            return fit(story, learner, Resident(sample), replace(state, outcome=Outcome.RUNNING))

        best, _ = refine(
            story,
            sample,
            go_on(best),
            seed_within,
            passes=refine_passes,
            tolerance=tolerance,
            responsibility=responsibility,
        )
        best = go_on(best)
    return story, FitState(best.params, seed=seed, stats=best.stats, sample=kept)


def default_learner(
    n_rows: int,
    *,
    max_steps: int = 200,
    tolerance: float = 1e-4,
    online: OnlineEM | None = None,
) -> Learner:
    """The learner that goes on from a warm start: `online` once over the data, then batch EM.

    Where there are fewer than `ONLINE_BATCHES` mini-batches the sample knows nearly as much as a
    pass of online EM would learn, and accelerated batch EM begins at once. Where there would be
    more than `MOST_BATCHES`, mini-batches are larger. `max_steps` and `tolerance` are those of
    batch EM.
    """
    online = online or OnlineEM()
    online = replace(online, batch_rows=max(online.batch_rows, n_rows // MOST_BATCHES))
    batch = BatchEM(max_steps, tolerance, accelerate=True)
    if n_rows < ONLINE_BATCHES * online.batch_rows:
        return batch
    return Relay((online, batch))
