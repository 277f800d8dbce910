"""Time until held-out rows are explained as well as scikit-learn explains them when it stops.

    python -m benchmarks run goal [--whole]

Household power, full covariance, K = 50. scikit-learn fits with its defaults (k-means for a start,
until a step gains less than 1e-3 nats a row); the mean log-likelihood it reaches on the test rows
is the goal. genstream fits with its own defaults (starts on a sample, then its default learner),
and stops when a pass has reached the goal. Seconds are those of starting and learning, on the same
rows with the same number of threads; scoring the test rows is not part of either. By default both
learn from 200,000 rows; `--whole` takes all, for which scikit-learn needs half an hour or more.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.contestants import Task
from benchmarks.data import path
from benchmarks.measure import Bar, Benchmark, Options, Table, told
from benchmarks.passes import Course
from benchmarks.peers import Failed, Player, power_rows
from genstream.families.gaussian import FullParams
from genstream.learn import FitState, StepInfo, fit
from genstream.passes import Passes
from genstream.rows import Rows
from genstream.sources import NumpySource
from genstream.start import default_learner, warm_start
from genstream.stories import mixture
from genstream.story import Params

Array = NDArray[Any]

ROWS, WHOLE_ROWS = 200_000, 1_659_917
COMPONENTS = 50
# Rows of the sample that a start is made from, where there are as many.
SAMPLE_ROWS = 50_000
TITLE = "Time to scikit-learn's converged held-out log-likelihood, household power, full covariance"
# What is left out of a default start, by how the row of the table is called.
STARTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "one start, no moves": {"n_init": 1, "refine_passes": 0.0},
}


class Reached(Exception):  # noqa: N818
    """The goal is reached."""


def theirs(x: Array, test: Rows, k: int, options: Options) -> tuple[float, float, int]:
    """scikit-learn's seconds, what it reaches on test rows (nats a row), and its steps. Raises
    Failed where it does not end.
    """
    task = Task("gaussian", "full", k, threads=options.threads)
    with tempfile.TemporaryDirectory() as top:
        folder = Path(top)
        task.write(folder, x, {})
        patience = replace(options, patience=6 * 3600.0)
        with Player("scikit-learn", folder, patience) as player:
            seconds = player.round()
            found = player.found()
    story = mixture(NumpySource(x).schema, k, prior=None).anchored(Rows.of(x[:50_000]))
    params = Params(found["weights"], FullParams(found["mean"], found["covariance"]))
    value = float(story.log_prob(params, test).mean())
    return seconds, value, int(found["steps"])


def ours(
    x: Array, test: Rows, goal: float, dtype: str, k: int, threads: int, start: dict[str, Any]
) -> dict[str, Any]:
    """Seconds of starting and of learning until the goal, the passes that took, and the value."""
    source = NumpySource(x)
    passes = Passes(source, workers=threads)
    begin = time.perf_counter()
    story, state = warm_start(mixture(source.schema, k, dtype=dtype), passes, **start)
    started = time.perf_counter() - begin
    course = Course(story, test, passes.n_rows)
    value = float(story.log_prob(state.params, test).mean())

    def watch(state: FitState, info: StepInfo) -> None:
        course(state, info)
        if course.values and course.values[-1] >= goal:
            raise Reached

    if value < goal:
        with contextlib.suppress(Reached):
            fit(story, default_learner(passes.n_rows), passes, state, [watch])
        value = course.values[-1]
    return {
        "s": started + course.spent,
        "of which starting": started,
        "passes": round(course.passes[-1]) if course.passes else 0,
        "test, nats a row": value,
        "reached": value >= goal,
    }


def warm_up(x: Array, dtype: str, k: int, threads: int) -> None:
    """Compile what is compiled once after an installation, by a start and a pass over few rows."""
    source = NumpySource(x[: 4 * SAMPLE_ROWS])
    passes = Passes(source, workers=threads)
    story, state = warm_start(mixture(source.schema, k, dtype=dtype), passes, n_init=1)
    fit(story, default_learner(passes.n_rows, max_steps=2), passes, state)


def measure(options: Options) -> Table:
    """scikit-learn once, then ours in both arithmetics."""
    told("time to scikit-learn's held-out value")
    n_rows = options.rows(WHOLE_ROWS if options.whole else ROWS)
    k = 8 if options.quick else COMPONENTS
    x = power_rows(n_rows)
    test = Rows.of(np.load(path("power/test.npy")).astype(np.float64))
    what = f"time to scikit-learn's held-out value, power {n_rows:,} rows, K = {k}"
    try:
        seconds, goal, steps = theirs(x, test, k, options)
    except Failed as error:
        return Table("goal", TITLE, [{"contestant": "scikit-learn", "s": str(error)}])
    rows: list[dict[str, Any]] = [
        {
            "contestant": "scikit-learn, its defaults",
            "s": seconds,
            "passes": steps,
            "test, nats a row": goal,
        }
    ]
    bars = []
    for dtype in ("float64", "float32"):
        warm_up(x, dtype, k, options.threads)
        for name, start in STARTS.items():
            found = [
                ours(x, test, goal, dtype, k, options.threads, start)
                for _ in range(1 if options.quick else min(options.rounds, 3))
            ]
            middle = statistics.median(one["s"] for one in found)
            row: dict[str, Any] = {"contestant": f"genstream {dtype}, {name}"}
            row |= next(one for one in found if one["s"] >= middle)
            row["times as fast"] = seconds / row["s"] if row["reached"] else 0.0
            rows.append(row)
            if name == "defaults":
                bars.append(Bar(f"{what}: genstream {dtype}", 100.0, row["times as fast"]))
    notes = [f"{n_rows:,} x 6 rows to learn from, {test.n_rows:,} test rows."]
    return Table("goal", TITLE, rows, notes, bars)


BENCHMARKS = {"goal": Benchmark("time to scikit-learn's converged held-out value", measure)}
