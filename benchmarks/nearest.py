"""What a row costs as components become many, under all of them and under those near it alone.

    python -m benchmarks.nearest [--rows N] [--components K ...] [--steps S] [--rounds R]

Of the household power benchmark (six real columns) and of rows drawn from a known mixture over 16,
in float32 and full covariance: CPU microseconds a row of an E-step by either rule, the least of
several that take turns on one thread, and by how many nats the bound is below the log-likelihood.
Then both rules take the same steps of EM from the same seeded start, and the log-likelihoods of
where they end are compared, under all components. Ends with how much a row costs more at the
largest number of components than at the smallest.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.data import path
from genstream.learn import BatchEM, FitState, Resident, fit
from genstream.responsibility import Nearest, Responsibility, soft
from genstream.rows import Rows
from genstream.schema import Schema
from genstream.start import seed_params
from genstream.stories import mixture
from genstream.threads import one_blas_thread

Array = NDArray[Any]
RULES: dict[str, Responsibility] = {"exact": soft, "nearest": Nearest()}


def power(n: int) -> Array:
    """Rows of the household power benchmark, in an order of no meaning."""
    values: Array = np.load(path("power/train.npy"))[:n]
    return values.astype(np.float32)


def drawn(n: int) -> Array:
    """Rows of 1000 Gaussians over 16 columns, which overlap a little."""
    k, d = 1000, 16
    rng = np.random.default_rng(7)
    factor = np.tril(rng.normal(0, 0.4, (k, d, d)), -1)
    factor[:, np.arange(d), np.arange(d)] = rng.uniform(0.6, 1.5, (k, d))
    mean = 1.5 * rng.normal(size=(k, d))
    values = np.empty((n, d), dtype=np.float32)
    own = np.sort(rng.choice(k, n, p=rng.dirichlet(np.full(k, 8.0))))
    for i in range(k):
        mine = own == i
        values[mine] = mean[i] + rng.normal(size=(int(mine.sum()), d)) @ factor[i].T
    return values[rng.permutation(n)]


DATA: dict[str, Callable[[int], Array]] = {"power, d = 6": power, "drawn, d = 16": drawn}


def compare(values: Array, n_components: int, steps: int, rounds: int) -> dict[str, float]:
    """Print a line on some rows and so many components; microseconds a row by either rule."""
    rows = Rows.of(values)
    n = len(values)
    story = mixture(Schema.real(values.shape[1]), n_components, dtype="float32").anchored(rows)
    begin = time.process_time()
    params = seed_params(story, rows, np.random.default_rng(0))
    seeded = time.process_time() - begin
    ends = {}
    for name, rule in RULES.items():
        state = fit(story, BatchEM(steps, 0.0, rule), Resident(rows), FitState(params))
        ends[name] = state.params
    least = dict.fromkeys(RULES, np.inf)
    found = {}
    for _ in range(rounds):
        for name, rule in RULES.items():
            begin = time.process_time()
            found[name] = story.e_step(ends["nearest"], rows, rule).objective / n
            least[name] = min(least[name], (time.process_time() - begin) / n * 1e6)
    value = {
        "exact": float(story.log_prob(ends["exact"], rows).mean()),
        "nearest": found["exact"],
    }
    gap = found["exact"] - found["nearest"]
    print(
        f"  K = {n_components:5d}  exact {least['exact']:7.2f}  nearest {least['nearest']:6.2f}"
        f"  {least['exact'] / least['nearest']:5.1f} x  bound {gap:.5f} nats below"
        f"  after {steps} steps {value['exact']:.4f} and {value['nearest']:.4f}:"
        f" {value['nearest'] - value['exact']:+.4f} nats  seeded in {seeded:.1f} s",
        flush=True,
    )
    return least


def main() -> None:
    """Compare as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=300_000)
    parser.add_argument("--components", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=2)
    asked = parser.parse_args()
    with one_blas_thread():
        for name, make in DATA.items():
            print(f"{name}, {asked.rows} rows, float32, full covariance, microseconds of CPU a row")
            values = make(asked.rows)
            costs = [compare(values, k, asked.steps, asked.rounds) for k in asked.components]
            for rule in RULES:
                grown = costs[-1][rule] / costs[0][rule]
                few, many = asked.components[0], asked.components[-1]
                print(f"  {rule}: a row at K = {many} costs {grown:.1f} x one at K = {few}")


if __name__ == "__main__":
    main()
