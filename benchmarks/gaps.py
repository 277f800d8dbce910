"""What gaps cost: one E-step pass over drawn rows, complete, in ten patterns and all at random.

    python -m benchmarks.gaps [--rows N] [--features D] [--components K] [--rounds R] [--workers W]

    python -m benchmarks run gaps

The cases take turns, so that a machine that slows down slows all of them. A row a case: the median
seconds of a pass, rows a second, and the ratio to the complete pass in the same arithmetic.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.measure import (
    Bar,
    Benchmark,
    Options,
    Table,
    parser,
    pass_row,
    ratio,
    say,
    told,
)
from benchmarks.out_of_core import one_pass, warmed
from genstream.families.gaussian import FullParams
from genstream.passes import Passes
from genstream.rows import Rows
from genstream.schema import Schema
from genstream.sources import NumpySource
from genstream.stories import mixture
from genstream.story import Params

Array = NDArray[np.float64]

DTYPES = ("float64", "float32")
N_PATTERNS = 10
SHARE = 0.2
N_ROWS, N_FEATURES, N_COMPONENTS = 1_000_000, 16, 8
# How many times as long as the complete pass each case may take.
LIMITS = {f"{N_PATTERNS} patterns": 2.0, f"{SHARE:.0%} at random": 8.0}


def drawn(
    n_rows: int, n_features: int, n_components: int, rng: np.random.Generator
) -> tuple[Params, Array]:
    """Parameters of a full-covariance mixture whose components overlap, and rows drawn from it."""
    d, k = n_features, n_components
    factor = np.tril(rng.normal(0, 0.4, (k, d, d)), -1) + np.eye(d)
    family = FullParams(rng.normal(0, 1.0, (k, d)), factor @ factor.swapaxes(1, 2))
    params = Params(np.full(k, 1 / k), family)
    return params, mixture(Schema.real(d), k).draw(params, n_rows, rng).values


def cases(values: Array, rng: np.random.Generator) -> dict[str, Array]:
    """The same rows complete, under `N_PATTERNS` patterns of gaps, and with gaps at random.

    Each pattern hides `SHARE` of the entries on average; the first of them hides nothing.
    """
    n, d = values.shape
    hidden = rng.random((N_PATTERNS, d)) < SHARE
    hidden[0] = False
    few = np.where(hidden[rng.integers(N_PATTERNS, size=n)], np.nan, values)
    return {
        "complete": values,
        f"{N_PATTERNS} patterns": few,
        f"{SHARE:.0%} at random": np.where(rng.random((n, d)) < SHARE, np.nan, values),
    }


def compare(n_rows: int, d: int, k: int, rounds: int, workers: int | None) -> Table:
    """Time a pass of every case in both arithmetics, `rounds` times in turn."""
    told("gaps")
    rng = np.random.default_rng(0)
    params, values = drawn(n_rows, d, k, rng)
    sources = {name: NumpySource(rows) for name, rows in cases(values, rng).items()}
    turns: dict[str, Callable[[], float]] = {}
    for dtype in DTYPES:
        story = mixture(Schema.real(d), k, dtype=dtype).anchored(Rows.of(values[:50_000]))
        for name, source in sources.items():
            passes = Passes(source, workers=workers)
            turns[f"{dtype}, {name}"] = functools.partial(one_pass, story, params, passes)
    taken = warmed(turns, rounds)
    found: list[dict[str, Any]] = []
    bars = []
    for dtype in DTYPES:
        complete = taken[f"{dtype}, complete"]
        for name in sources:
            seconds = taken[f"{dtype}, {name}"]
            times = ratio(seconds, complete)
            found.append(
                {
                    "arithmetic": dtype,
                    "rows": name,
                    **pass_row(n_rows, seconds),
                    "x complete": times,
                }
            )
            if name in LIMITS:
                what = f"gaps, {n_rows:,} rows, {dtype}, {name}: x complete"
                bars.append(Bar(what, LIMITS[name], times, at_most=True))
    notes = [f"{n_rows:,} x {d} rows, K = {k}, full covariance, {rounds} rounds."]
    return Table("gaps", "What gaps cost a pass", found, notes, bars)


def _of(options: Options) -> Table:
    n_rows = options.rows(N_ROWS)
    return compare(n_rows, N_FEATURES, N_COMPONENTS, options.rounds, options.threads)


BENCHMARKS = {"gaps": Benchmark("a pass over rows with gaps beside a complete one", _of)}


def main() -> None:
    """Read the options and compare."""
    options = parser(__doc__)
    options.add_argument("--rows", type=int, default=N_ROWS)
    options.add_argument("--features", type=int, default=N_FEATURES)
    options.add_argument("--components", type=int, default=N_COMPONENTS)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--workers", type=int)
    chosen = options.parse_args()
    say(compare(chosen.rows, chosen.features, chosen.components, chosen.rounds, chosen.workers))


if __name__ == "__main__":
    main()
