"""First parameters: a row sample, seeding that minds gaps, and short fits; the best goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from genstream.errors import DataError
from genstream.families.blocks import Array, slices
from genstream.learn import BatchEM, FitState, Learner, Outcome, Relay, fit
from genstream.online import OnlineEM
from genstream.passes import Passes
from genstream.refine import Seeding, refine
from genstream.responsibility import MANY, Responsibility, by_size, climbs, soft
from genstream.rows import Rows
from genstream.stats import Placed
from genstream.story import Params, Story

# Memory the row sample may take, in bytes, whatever the number of columns.
SAMPLE_BYTES = 64 << 20
# Rows kept with the state, from which empty components are re-seeded.
RESCUE_ROWS = 2048
# Rows on which distances are computed for seeding: at most, at least, and for each component.
SEED_ROWS, FEWEST_SEED_ROWS, SEED_ROWS_OF_FEW = 20_000, 5000, 100
# Of many centres as many are drawn at a time as there are already, divided by this.
AT_A_TIME = 8
# Rows of the sample from which one component begins that needs one pass.
LONE_ROWS = 4096
# A start of many components takes fewer steps, in proportion to this many.
FULL_STEPS = 256
# Rows a centre on which many centres are seeded, and rows a component of a sample for many.
SEED_ROWS_EACH, SAMPLE_ROWS_EACH = 50, 100
# Steps of a short fit, at least.
LEAST_STEPS = 4
# Rows among which each of many centres is chosen, and exchanges tried for each.
CANDIDATES_EACH = 2
# Squared distances in units of a column's spread: none, and beyond all rows.
TINY, FAR = 1e-6, 1e15
# Distances computed at a time.
LANE = 1 << 21
# Components whose rows are summed at a time.
GROUP = 32
# Among the rows of one component, a spread below this share of all rows' own is no structure.
NARROW = 0.03
# Passes over the sample that moving components may take.
REFINE_PASSES = 50.0
# From this many mini-batches on, an online pass gains more than the batch pass it replaces.
ONLINE_BATCHES = 256
# Mini-batches that an online pass of the default learner takes at most: further M-steps cost time
# and teach little, so that very large data are taken in larger mini-batches.
MOST_BATCHES = 2048
# Rows a component of a mini-batch, at least: fewer are not worth an M-step of them all.
BATCH_ROWS_EACH = 16


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
    picked = passes.pick(chosen)
    sample = Rows(picked.values.astype(np.float64), picked.observed, picked.weights)
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


def seed_many(
    x: Array, observed: NDArray[np.bool_], weight: Array, n_centres: int, rng: np.random.Generator
) -> tuple[Array, NDArray[np.intp]]:
    """(K, e) centres among the rows, and (n,) the closest to each row, for many centres.

    More rows than centres are drawn by their distance from those before (`draw_many`). Weighed by
    the rows closest to each, they stand for all rows, and centres are exchanged among them
    (`exchange`): the draws alone leave out one heap of rows in ten, which EM does not mend.
    """
    drawn, label = draw_many(x, observed, weight, CANDIDATES_EACH * n_centres, rng)
    mass = np.bincount(label, weight, len(drawn))
    # Rows that are drawn again, where there are too few others, are the closest to none.
    some = np.concatenate([np.flatnonzero(mass > 0), np.flatnonzero(mass <= 0)])
    drawn, mass = drawn[some], mass[some]
    centres = drawn[exchange(drawn, mass, n_centres, rng)]
    return centres, _closest(x, observed, centres, np.zeros(len(x), dtype=np.intp))


def draw_many(
    x: Array, observed: NDArray[np.bool_], weight: Array, n_centres: int, rng: np.random.Generator
) -> tuple[Array, NDArray[np.intp]]:
    """(K, e) centres and (n,) the closest to each row, by k-means++ with several centres a draw.

    As k-means|| (Bahmani, Moseley, Vattani, Kumar & Vassilvitskii 2012) it draws many rows at once
    by their squared distance from the centres so far, without replacement; but never more than an
    eighth of those so far, so that nearly all is known that one at a time would know: it takes
    8 log K passes over the rows instead of K. Distances are those of `seed_centres`, in float32.
    Rows that are the same are drawn once while there are others.
    """
    x, seen = x.astype(np.float32), observed.astype(np.float32)
    whole = bool(observed.all())
    nearest = np.full(len(x), np.inf)
    label = np.zeros(len(x), dtype=np.intp)
    centres = np.empty((0, x.shape[1]), dtype=np.float32)
    while len(centres) < n_centres:
        n_drawn = min(max(1, len(centres) // AT_A_TIME), n_centres - len(centres))
        mass = weight * nearest if len(centres) else weight
        # What rounding leaves of the distance of a row from itself is none.
        mass = np.where(nearest > TINY, mass, 0.0)
        left = np.flatnonzero(mass)
        if len(left) > n_drawn:
            # The largest of u^(1/mass), one a row (Efraimidis & Spirakis 2006).
            late = rng.standard_exponential(len(left)) / mass[left]
            left = left[np.argpartition(late, n_drawn)[:n_drawn]]
        elif not len(left):
            left = rng.choice(len(x), n_drawn, p=weight / weight.sum())
        fresh = np.unique(x[left], axis=0)
        _update(x, seen, whole, fresh, len(centres), nearest, label)
        centres = np.concatenate([centres, fresh])
    return centres.astype(np.float64), label


def exchange(
    points: Array, weight: Array, n_centres: int, rng: np.random.Generator
) -> NDArray[np.intp]:
    """(K,) which of the points (m, e) are centres, by local search from the first ones.

    A point drawn by its weight times its squared distance from the closest centre takes the place
    of the centre that is needed least, where that lowers the weighted sum of these distances
    (Lattanzi & Sohler 2019, algorithm 2); `CANDIDATES_EACH` are drawn for each centre.
    """
    chosen = np.arange(min(n_centres, len(points)))
    if len(points) <= n_centres:
        return chosen
    square = (points**2).sum(axis=1)

    def two_closest(some: NDArray[np.intp]) -> tuple[NDArray[np.intp], Array]:
        """(2, n) the closest centre to each of some points and the next one, and how far."""
        which, far = np.empty((2, len(some)), dtype=np.intp), np.empty((2, len(some)))
        centres = points[chosen]
        for piece in slices(len(some), max(1, LANE // n_centres)):
            squared = square[chosen] - 2 * points[some[piece]] @ centres.T
            for place in range(2):
                which[place, piece] = best = squared.argmin(axis=1)
                rows = np.arange(len(best))
                far[place, piece] = squared[rows, best] + square[some[piece]]
                squared[rows, best] = np.inf
        return which, np.maximum(far, 0.0)

    which, far = two_closest(np.arange(len(points)))
    for _ in range(CANDIDATES_EACH * n_centres):
        mass = (weight * far[0]).cumsum()
        if not mass[-1] > 0:
            break
        drawn = np.searchsorted(mass, rng.random() * mass[-1], side="right")
        new = min(int(drawn), len(mass) - 1)
        reached = np.maximum(square + square[new] - 2 * points @ points[new], 0.0)
        # By how much the sum rises with each centre that goes once the new one has come.
        kept = np.minimum(far[0], reached)
        lost = weight * (np.minimum(far[1], reached) - kept)
        rise = np.bincount(which[0], lost, n_centres)
        old = int(rise.argmin())
        if not weight @ kept + rise[old] < mass[-1]:
            continue
        chosen[old] = new
        closer, next_ = reached < far[0], (far[0] <= reached) & (reached < far[1])
        astray = np.flatnonzero((which == old).any(axis=0))
        which[1, closer], far[1, closer] = which[0, closer], far[0, closer]
        which[0, closer], far[0, closer] = old, reached[closer]
        which[1, next_], far[1, next_] = old, reached[next_]
        which[:, astray], far[:, astray] = two_closest(astray)
    return chosen


def _closest(
    x: Array, observed: NDArray[np.bool_], centres: Array, label: NDArray[np.intp]
) -> NDArray[np.intp]:
    """(n,) the closest centre to each row; where all are beyond measure, that of `label`."""
    nearest, fresh = np.full(len(x), np.inf), label.copy()
    seen = observed.astype(np.float32)
    _update(
        x.astype(np.float32),
        seen,
        bool(observed.all()),
        centres.astype(np.float32),
        0,
        nearest,
        fresh,
    )
    return fresh


def _update(
    x: Array,
    seen: Array,
    whole: bool,
    centres: Array,
    first: int,
    nearest: Array,
    label: NDArray[np.intp],
) -> None:
    """Let rows (n,) know of further centres, which are numbered from `first` on."""
    square = centres**2
    for piece in slices(len(x), max(64, LANE // len(centres))):
        squared = x[piece] @ (-2 * centres.T)
        squared += square.sum(axis=1) if whole else seen[piece] @ square.T
        best = squared.argmin(axis=1)
        found = squared[np.arange(len(best)), best] + (x[piece] ** 2).sum(axis=1)
        if not whole:
            found /= np.maximum(seen[piece].mean(axis=1), 1e-9)
        better = found < nearest[piece]
        nearest[piece][better] = np.maximum(found[better], 0.0)
        label[piece][better] = best[better] + first


def cluster_many(
    x: Array, observed: NDArray[np.bool_], weight: Array, label: NDArray[np.intp], n_centres: int
) -> NDArray[np.intp]:
    """(n,) labels after one of Lloyd's steps from others. A centre without rows has none after."""
    masked = observed * weight[:, None]
    mass, sums = (
        np.stack([np.bincount(label, column, n_centres) for column in part.T], axis=1)
        for part in (masked, masked * x)
    )
    centres = np.where(mass > 0, sums / np.where(mass > 0, mass, 1.0), 0.0)
    # One that has no rows is nowhere.
    centres[mass.max(axis=1) <= 0] = FAR
    return _closest(x, observed, centres, label)


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
    if story.n_components == 1:
        return params_from_labels(story, sample, np.zeros(sample.n_rows, dtype=np.intp), rng)
    x, observed = story.family.embed(story.readable(sample))
    return _from_clusters(story, sample, x, observed, rng)


def seed_within(story: Story, sample: Rows, rng: np.random.Generator) -> Params:
    """As `seed_params`, but distances are measured by the deviations of these rows alone: those of
    one component, to be parted, among which a column may count that hardly varies over all.
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
    if story.n_components >= MANY:
        k = story.n_components
        if len(x) > SEED_ROWS_EACH * k:
            small = np.sort(rng.choice(len(x), SEED_ROWS_EACH * k, replace=False))
        _, labels = seed_many(x[small], observed[small], weight[small], k, rng)
        labels = cluster_many(x[small], observed[small], weight[small], labels, k)
        return params_from_labels(story, sample[small], labels, rng)
    n_small = min(SEED_ROWS, max(FEWEST_SEED_ROWS, SEED_ROWS_OF_FEW * story.n_components))
    if len(x) > n_small:
        small = np.sort(rng.choice(len(x), n_small, replace=False))
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
    if story.n_components >= MANY:
        return _from_many_labels(story, sample, labels, rng)
    responsibilities = np.zeros((sample.n_rows, story.n_components))
    responsibilities[np.arange(sample.n_rows), labels] = 1.0
    vague = story.vague()
    # A component that has all rows need not be told so.
    stats = story.e_step(vague, sample, soft if story.single_pass else responsibilities)
    params = story.m_step(stats, vague)
    begun = story.family.start(params.family, sample, responsibilities, rng)
    return replace(params, family=begun)


def _from_many_labels(
    story: Story, sample: Rows, labels: NDArray[np.intp], rng: np.random.Generator
) -> Params:
    """The same, where a matrix of rows by components would be too large: some components with
    their own rows at a time.
    """
    k = story.n_components
    order = np.argsort(labels, kind="stable")
    edges = np.searchsorted(labels[order], np.arange(k + 1))
    vague = story.vague()
    total = Placed(k)
    groups = []
    for piece in slices(k, GROUP):
        group = np.arange(piece.start, piece.stop)
        index = order[edges[piece.start] : edges[piece.stop]]
        shares = (labels[index, None] == group).astype(np.float64)
        some = replace(story, n_components=len(group), frozen=frozenset())
        few = vague.take(group.tolist())
        total.add(some.e_step(few, sample[index], shares), group)
        groups.append((group, index, shares))
    params = story.m_step(total.close(), vague)
    family: Any = params.family
    for group, index, shares in groups:
        few = family.take(group.tolist())
        begun = story.family.start(few, sample[index], shares, rng)
        if begun is not few:
            family = family.put(begun, group.tolist())
    return replace(params, family=family)


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
    With many components the sample has at least `SAMPLE_ROWS_EACH` rows of each where there are as
    many, and as a step takes longer there are fewer of them: all numbers of starts, steps and
    passes are as many times smaller as there are more than `FULL_STEPS` components, down to one
    start of a few steps.
    One component that a pass says everything of needs a sample of `LONE_ROWS` rows, for its pivot,
    and no fit to it where they have no gaps.
    `seeding` makes the parameters each short fit begins with. `given` parameters take the place of
    starts, and `responsibility` is the rule by which the sample is fitted. A `sample` that
    `draw_sample` drew with the same number and seed saves its pass.
    `on_start(i, mean objective)` is called after each of them.
    Everything follows from `seed`. Raises DataError where the data cannot start a fit.
    """
    if story.single_pass:
        n_init, sample_rows = 1, min(sample_rows, LONE_ROWS)
    if story.n_components >= MANY:
        fewer = story.n_components / FULL_STEPS
        sample_rows = max(sample_rows, SAMPLE_ROWS_EACH * story.n_components)
        n_init = max(1, int(n_init / fewer))
        short_steps = max(min(LEAST_STEPS, short_steps), int(short_steps * 2 / fewer))
        long_steps, refine_passes = int(long_steps / fewer), refine_passes / fewer
    if sample is None:
        sample = draw_sample(passes, sample_rows, seed)
    story = story.anchored(sample)
    kept = rescue_rows(sample, seed)
    if given is None and story.single_pass and sample.observed is None:
        # The first pass will tell all, whatever it begins with.
        given = seeding(story, sample, np.random.default_rng([seed, 2, 0]))
    if given is not None:
        key = (seed, 0, 0)
        stats = story.e_step(given, sample, responsibility, key)
        return story, FitState(given, seed=seed, stats=stats, sample=kept)
    local = passes.over(sample)
    best: FitState | None = None
    for i in range(max(1, n_init)):
        rng = np.random.default_rng([seed, 2, i])
        state = FitState(seeding(story, sample, rng), seed=seed, sample=kept)
        state = fit(story, BatchEM(short_steps, tolerance, responsibility), local, state)
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
        quick = climbs(responsibility)
        learner = BatchEM(long_steps, tolerance, responsibility, accelerate=quick)

        def go_on(state: FitState) -> FitState:
            if state.outcome is not Outcome.MAX_STEPS:
                return state
            return fit(story, learner, local, replace(state, outcome=Outcome.RUNNING))

        best, _ = refine(
            story,
            sample,
            go_on(best),
            seed_within,
            passes=refine_passes,
            through=local,
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
    n_components: int = 1,
) -> Learner:
    """The learner that goes on from a warm start: `online` once over the data, then batch EM.

    Where there are fewer than `ONLINE_BATCHES` mini-batches the sample knows nearly as much as a
    pass of online EM would learn, and accelerated batch EM begins at once. Where there would be
    more than `MOST_BATCHES`, mini-batches are larger, and so they are where each of many components
    would have fewer than `BATCH_ROWS_EACH` rows in one. `max_steps` and `tolerance`
    are those of batch EM, the rule for responsibilities that of `online`.
    """
    online = online or OnlineEM(responsibility=by_size(n_components))
    least = n_rows // MOST_BATCHES
    if n_components >= MANY:
        least = max(least, BATCH_ROWS_EACH * n_components)
    online = replace(online, batch_rows=max(online.batch_rows, least))
    rule = online.responsibility
    batch = BatchEM(max_steps, tolerance, rule, accelerate=climbs(rule))
    if n_rows < ONLINE_BATCHES * online.batch_rows:
        return batch
    return Relay((online, batch))
