"""What gaps cost: one E-step pass over drawn rows, complete, in ten patterns and all at random.

    python -m benchmarks.gaps [--rows N] [--features D] [--components K] [--rounds R] [--workers W]

The cases take turns, so that a machine that slows down slows all of them. Prints a line a case:
the median seconds of a pass, rows a second, and the ratio to the complete pass in the same
arithmetic.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from genstream.families.gaussian import FullParams
from genstream.passes import Passes
from genstream.rows import Rows
from genstream.schema import Schema
from genstream.sources import NumpySource
from genstream.stories import mixture
from genstream.story import Params, Story

Array = NDArray[np.float64]

DTYPES = ("float64", "float32")
N_PATTERNS = 10
SHARE = 0.2


def drawn(n_rows: int, n_features: int, n_components: int, rng: np.random.Generator) -> Any:
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


def seconds(story: Story, params: Params, source: NumpySource, workers: int | None) -> float:
    """The time of one pass."""
    passes = Passes(source, workers=workers)
    begin = time.perf_counter()
    passes.fold(lambda _, rows: story.e_step(params, rows))
    return time.perf_counter() - begin


def compare(n_rows: int, d: int, k: int, rounds: int, workers: int | None) -> None:
    """Time a pass of every case in both arithmetics, `rounds` times in turn."""
    rng = np.random.default_rng(0)
    params, values = drawn(n_rows, d, k, rng)
    sources = {name: NumpySource(rows) for name, rows in cases(values, rng).items()}
    found: dict[tuple[str, str], list[float]] = {}
    for _ in range(rounds):
        for dtype in DTYPES:
            story = mixture(Schema.real(d), k, dtype=dtype).anchored(Rows.of(values[:50_000]))
            for name, source in sources.items():
                taken = seconds(story, params, source, workers)
                found.setdefault((dtype, name), []).append(taken)
    print(f"{n_rows} x {d} rows, K={k}, full covariance, {rounds} rounds")
    for (dtype, name), times in found.items():
        median = statistics.median(times)
        ratio = median / statistics.median(found[dtype, "complete"])
        print(
            f"{dtype}  {name:14} {median:8.3f} s a pass  {n_rows / median:12,.0f} rows/s  "
            f"{ratio:6.2f} x complete"
        )


def main() -> None:
    """Read the options and compare."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    options.add_argument("--rows", type=int, default=1_000_000)
    options.add_argument("--features", type=int, default=16)
    options.add_argument("--components", type=int, default=8)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--workers", type=int)
    chosen = options.parse_args()
    compare(chosen.rows, chosen.features, chosen.components, chosen.rounds, chosen.workers)


if __name__ == "__main__":
    main()
