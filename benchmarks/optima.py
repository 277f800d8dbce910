"""Optima at equal passes: more restarts against moves of components; and plain EM against SQUAREM.

    python -m benchmarks.optima [--seeds 20] [--rows 4000] [--problems NAME ...]

The first table compares, over seeds, the final objective a row (log-likelihood plus log-prior,
after EM to 1e-6 nats) of the best of 5 short starts, of the same with moves of components
(`genstream.refine`), and of as many more short starts as take the passes of the moves. The second
one counts EM steps to a tolerance of 1e-6 nats a row from the same start, plain and accelerated,
and says which of the two ended higher.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from benchmarks.data import path
from benchmarks.flights import flights
from benchmarks.measure import parser
from genstream.learn import BatchEM, FitState, Outcome, Resident, fit
from genstream.refine import refine
from genstream.rows import Rows
from genstream.schema import Column, Schema
from genstream.start import REFINE_PASSES, seed_params, seed_within
from genstream.stories import mixture
from genstream.story import Story
from genstream.threads import one_blas_thread

Array = NDArray[Any]
TOLERANCE, SHORT, LONG, STARTS = 1e-4, 10, 100, 5


def drawn(k: int, d: int, covariance: str, apart: float, n: int) -> tuple[Story, Rows]:
    """Rows of K Gaussians about `apart` deviations from one another, and the story they fit."""
    rng = np.random.default_rng([k, d])
    factor = np.tril(rng.normal(0, 0.4, (k, d, d)), -1) * (covariance == "full")
    factor[:, np.arange(d), np.arange(d)] = rng.uniform(0.6, 1.5, (k, d))
    mean = apart * rng.normal(size=(k, d))
    label = rng.choice(k, n, p=rng.dirichlet(np.full(k, 8.0)))
    noise = np.einsum("nij,nj->ni", factor[label], rng.normal(size=(n, d)))
    return mixture(Schema.real(d), k, covariance=covariance), Rows.of(mean[label] + noise)


def drawn_mixed(k: int, n: int) -> tuple[Story, Rows]:
    """Rows of K components over columns of every kind, a tenth of the entries missing."""
    rng = np.random.default_rng(k)
    columns = [Column(f"x{j}", "real") for j in range(3)]
    columns += [Column("late", "binary"), Column("bags", "count")]
    columns.append(Column("carrier", "categorical", ("AA", "B6", "UA", "WN")))
    label = rng.integers(0, k, n)
    values = np.column_stack(
        [
            (rng.normal(0, 3, (k, 3))[label] + rng.normal(size=(n, 3))),
            rng.random(n) < rng.uniform(0.05, 0.95, k)[label],
            rng.poisson(rng.uniform(0.3, 9, k)[label]),
            (rng.random(n)[:, None] > rng.dirichlet(np.ones(4), k)[label].cumsum(1)).sum(1) % 4,
        ]
    )
    values[rng.random(values.shape) < 0.1] = np.nan
    return mixture(Schema(tuple(columns)), k), Rows.of(values)


def some_flights(n: int) -> tuple[Story, Rows]:
    """A sample of New York's departures of 2013."""
    values, schema = flights()
    chosen = np.random.default_rng(0).choice(len(values), n, replace=False)
    return mixture(schema, 8), Rows.of(values[np.sort(chosen)])


def some_power(n: int) -> tuple[Story, Rows]:
    """A sample of the household power benchmark."""
    return mixture(Schema.real(6), 20), Rows.of(np.load(path("power/train.npy"))[:n])


def faithful() -> tuple[Story, Rows]:
    """Old Faithful."""
    table = pd.read_csv(path("faithful.csv"))
    return mixture(Schema.real(2), 4), Rows.of(table.iloc[:, -2:].to_numpy(dtype=float))


PROBLEMS: dict[str, Callable[[int], tuple[Story, Rows]]] = {
    "drawn full K=10 d=2": lambda n: drawn(10, 2, "full", 4.0, n),
    "drawn full K=15 d=8": lambda n: drawn(15, 8, "full", 1.2, n),
    "drawn spherical K=20 d=2": lambda n: drawn(20, 2, "spherical", 7.0, n),
    "drawn diag K=30 d=5": lambda n: drawn(30, 5, "diag", 2.0, n),
    "drawn mixed K=12": lambda n: drawn_mixed(12, n),
    "flights K=8": some_flights,
    "power K=20": some_power,
    "Old Faithful K=4": lambda _: faithful(),
}


def restarts(story: Story, sample: Rows, n_init: int, seed: int) -> tuple[FitState, int]:
    """The best of some short starts, gone on with, and the passes all took."""
    best: FitState | None = None
    passes = 0
    for i in range(n_init):
        state = FitState(seed_params(story, sample, np.random.default_rng([seed, 2, i])), seed=seed)
        state = fit(story, BatchEM(SHORT, TOLERANCE), Resident(sample), state)
        passes += state.step
        if best is None or value(state) > value(best):
            best = state
    assert best is not None
    if best.outcome is Outcome.MAX_STEPS:
        passes -= best.step
        going = replace(best, outcome=Outcome.RUNNING)
        best = fit(story, BatchEM(LONG, TOLERANCE, accelerate=True), Resident(sample), going)
        passes += best.step
    return best, passes


def value(state: FitState) -> float:
    """The mean objective a state was last seen at."""
    return state.trace[-1].mean_objective


def polished(story: Story, sample: Rows, state: FitState) -> float:
    """Where EM ends from a state."""
    begun = FitState(state.params)
    return value(fit(story, BatchEM(300, 1e-6, accelerate=True), Resident(sample), begun))


def compare(name: str, story: Story, sample: Rows, seeds: int) -> None:
    """Print a line of the first table."""
    lines = []
    for seed in range(seeds):
        state, passes = restarts(story, sample, STARTS, seed)
        better, more = refine(
            story, sample, state, seed_within, passes=REFINE_PASSES, tolerance=TOLERANCE
        )
        n_init = STARTS + math.ceil(more / SHORT)
        other, in_all = restarts(story, sample, n_init, seed)
        ends = [polished(story, sample, each) for each in (state, better, other)]
        lines.append((*ends, passes + more, in_all))
    table = np.array(lines)
    middle = np.median(table, axis=0)
    won = (table[:, 1] > table[:, 2] + TOLERANCE).mean()
    lost = (table[:, 1] < table[:, 2] - TOLERANCE).mean()
    print(
        f"| {name} | {middle[0]:.4f} | {middle[2]:.4f} | {middle[1]:.4f} | {won:.0%} | {lost:.0%} "
        f"| {table[:, 2].max():.4f} | {table[:, 1].max():.4f} "
        f"| {middle[4]:.0f} | {middle[3]:.0f} |",
        flush=True,
    )


def accelerate(name: str, story: Story, sample: Rows, seeds: int) -> None:
    """Print a line of the second table."""
    lines = []
    for seed in range(seeds):
        begun = FitState(seed_params(story, sample, np.random.default_rng([seed, 3])))
        ends = [
            fit(story, BatchEM(1500, 1e-6, accelerate=quick), Resident(sample), begun)
            for quick in (False, True)
        ]
        lines.append([*(end.step for end in ends), value(ends[1]) - value(ends[0])])
    table = np.array(lines)
    middle = np.median(table, axis=0)
    print(
        f"| {name} | {middle[0]:.0f} | {middle[1]:.0f} "
        f"| {np.median(table[:, 0] / table[:, 1]):.1f} | {middle[2]:+.5f} |",
        flush=True,
    )


def main() -> None:
    """Print both tables."""
    options = parser(__doc__)
    options.add_argument("--seeds", type=int, default=20)
    options.add_argument("--rows", type=int, default=4000)
    options.add_argument("--problems", nargs="*", default=list(PROBLEMS), choices=list(PROBLEMS))
    chosen = options.parse_args()
    problems = {}
    for name in chosen.problems:
        story, sample = PROBLEMS[name](chosen.rows)
        problems[name] = story.anchored(sample), sample
    with one_blas_thread():
        print(
            "| problem | 5 starts, median | more starts | moves | moves won | lost "
            "| best of more starts | best of moves | passes of more starts | passes of moves |"
        )
        print("|" + "---|" * 10)
        for name, (story, sample) in problems.items():
            compare(name, story, sample, chosen.seeds)
        print("\n| problem | EM steps | accelerated | ratio | gain, nats a row |")
        print("|" + "---|" * 5)
        for name, (story, sample) in problems.items():
            accelerate(name, story, sample, max(1, chosen.seeds // 4))


if __name__ == "__main__":
    main()
