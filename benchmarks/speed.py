"""Seconds per EM iteration beside scikit-learn: same data, same start, same steps, one run.

    python -m benchmarks.speed [--rows N] [--components K] [--steps S] [--rounds R]

The two take turns, so that a machine that slows down slows both. Prints one line a case with the
ratio of medians, and the largest difference of the parameters reached.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from typing import Any

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture

from benchmarks.data import path
from genstream.families.gaussian import FullParams
from genstream.learn import BatchEM, FitState, fit
from genstream.passes import Passes
from genstream.rows import Rows
from genstream.sources import NumpySource
from genstream.stories import mixture
from genstream.story import Params


def power_rows(n_rows: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The first rows of the household power benchmark's training part, as `make power` cut it."""
    parts = [np.load(path(f"power/{part}.npy")) for part in ("train", "validation")]
    return np.concatenate(parts)[:n_rows]


def compare(
    x: np.ndarray[Any, np.dtype[np.float64]], n_components: int, steps: int, rounds: int
) -> None:
    """Time `steps` steps of a full-covariance mixture on both sides, `rounds` times in turn."""
    rng = np.random.default_rng(0)
    d = x.shape[1]
    weights = np.full(n_components, 1 / n_components)
    means = x[rng.choice(len(x), n_components, replace=False)]
    covariances = np.tile(np.diag(x.var(axis=0)), (n_components, 1, 1))
    seconds: dict[str, list[float]] = {}
    found: dict[str, Any] = {}
    source = NumpySource(x)
    for _ in range(rounds):
        for dtype in ("float64", "float32"):
            story = mixture(
                source.schema, n_components, prior=None, reg_covar=1e-6, dtype=dtype
            ).anchored(Rows.of(x[:50_000]))
            family = FullParams(means, covariances)
            begin = time.perf_counter()
            state = fit(
                story, BatchEM(steps, -1.0), Passes(source), FitState(Params(weights, family))
            )
            seconds.setdefault(dtype, []).append((time.perf_counter() - begin) / steps)
            found[dtype] = state.params.family
        peer = GaussianMixture(
            n_components,
            weights_init=weights,
            means_init=means,
            precisions_init=np.linalg.inv(covariances),
            max_iter=steps,
            tol=0.0,
            init_params="random_from_data",
        )
        begin = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            peer.fit(x)
        # fit ends with one more E-step, for the labels.
        seconds.setdefault("scikit-learn", []).append((time.perf_counter() - begin) / (steps + 0.5))
        found["scikit-learn"] = peer
    theirs = statistics.median(seconds["scikit-learn"])
    print(f"{len(x)} x {d} rows, K={n_components}, full covariance, {steps} steps, {rounds} rounds")
    print(f"scikit-learn       {theirs:8.3f} s an iteration")
    for dtype in ("float64", "float32"):
        ours = statistics.median(seconds[dtype])
        gap = np.abs(found[dtype].mean - found["scikit-learn"].means_).max()
        print(
            f"genstream {dtype}  {ours:8.3f} s an iteration, {theirs / ours:6.1f} times as fast, "
            f"means differ by at most {gap:.1e}"
        )


def main() -> None:
    """Read the options and compare."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    options.add_argument("--rows", type=int, default=1_659_917)
    options.add_argument("--components", type=int, default=50)
    options.add_argument("--steps", type=int, default=3)
    options.add_argument("--rounds", type=int, default=3)
    chosen = options.parse_args()
    compare(power_rows(chosen.rows), chosen.components, chosen.steps, chosen.rounds)


if __name__ == "__main__":
    main()
