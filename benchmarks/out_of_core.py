"""Rows in a dataset on disk beside the same rows in memory, and one Dask worker beside two.

    python -m benchmarks run out_of_core

A pass is one E-step over all rows. Datasets are written as ingest writes them. Their files are kept
in memory by the operating system, so that what is measured is reading, checking and decoding, and
not the disk; where reading is to bound a pass they are also forgotten before every turn.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import roofline
from benchmarks.contestants import Task, clock
from benchmarks.measure import (
    Bar,
    Benchmark,
    Options,
    Table,
    alternate,
    median,
    pass_row,
    ratio,
    told,
)
from benchmarks.peers import overlapping
from flows.config import Compute
from flows.stages import cluster
from genstream.families.columns import ColumnsParams
from genstream.families.gaussian import FullParams
from genstream.learn import EStep
from genstream.passes import Passes
from genstream.rows import Rows
from genstream.schema import Schema
from genstream.sources import NumpySource
from genstream.stories import mixture
from genstream.story import Params, Story

Array = NDArray[Any]

COMPUTE = Task("gaussian", "full", 16)
COMPUTE_SHAPE = (1_000_000, 16)
# A pass of a cluster is to take longer than handing out its chunks does.
DASK = Task("gaussian", "full", 64)
DASK_SHAPE = (4_000_000, 16)
# Passes of a cluster that count, after one that does not.
DASK_PASSES = 3
READ = Task("gaussian", "diag", 2)
READ_SHAPE = (4_000_000, 32)
ZARR, PASS = "zarr-python, chunk by chunk", "a pass"
FORGOTTEN, KEPT = "on disk alone", "kept in memory by the operating system"


def model(
    task: Task, shape: tuple[int, int], dtype: str, options: Options
) -> tuple[Story, Params, Array]:
    """Story and parameters of a task, and the rows drawn for it, fewer where it is quick."""
    n_rows, d = shape
    x, start = overlapping(d, task.n_components)(task, options.rows(n_rows))
    schema = Schema.real(d)
    story = mixture(schema, task.n_components, covariance=task.covariance, dtype=dtype)
    none = np.zeros((task.n_components, 0))
    family: Any = (
        FullParams(start["mean"], start["covariance"])
        if task.covariance == "full"
        else ColumnsParams(start["mean"], start["covariance"], none, none, none)
    )
    params = Params(start["weights"], family)
    return story.anchored(Rows.of(x[:50_000])), params, x.astype(dtype)


def one_pass(story: Story, params: Params, passes: Passes) -> float:
    """Seconds of an E-step over all rows."""
    work = EStep(story, params)
    return clock(lambda: passes.fold(work))


def warmed(turns: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of some turns of each, after one that does not count: compilers have been at work."""
    for turn in turns.values():
        turn()
    return alternate(turns, rounds)


def against_memory(options: Options) -> Table:
    """A pass that computes more than it reads: from a dataset, and from an array."""
    told("out of core: compute-bound")
    story, params, x = model(COMPUTE, COMPUTE_SHAPE, "float64", options)
    n_rows = len(x)
    with tempfile.TemporaryDirectory() as top:
        stored = roofline.write_dataset(Path(top) / "dataset", x)
        turns: dict[str, Callable[[], float]] = {
            name: functools.partial(
                one_pass, story, params, Passes(source, workers=options.threads)
            )
            for name, source in (("in memory", NumpySource(x)), ("dataset on disk", stored))
        }
        taken = warmed(turns, 2 * options.rounds)
    slower = ratio(taken["dataset on disk"], taken["in memory"])
    rows = [{"rows are": name, **pass_row(n_rows, seconds)} for name, seconds in taken.items()]
    what = f"out of core against in memory, full d = 16 K = 16 float64, {n_rows:,} rows"
    return Table(
        "out-of-core",
        "Out of core against in memory, where computing bounds a pass",
        rows,
        [f"{n_rows:,} x 16 rows, K = 16, full covariance, float64."],
        [Bar(f"{what}: times as long", 1.2, slower, at_most=True)],
    )


def read_bound(options: Options) -> Table:
    """A pass that reads more than it computes, beside reading alone."""
    told("out of core: read-bound")
    story, params, x = model(READ, READ_SHAPE, "float32", options)
    n_rows, nbytes = x.shape[0], x.nbytes
    with tempfile.TemporaryDirectory() as top:
        folder = Path(top) / "dataset"
        stored = roofline.write_dataset(folder, x)
        passes = Passes(stored, workers=options.threads)
        ways = roofline.zarr_readers(folder, stored, options.threads)
        turns: dict[str, Callable[[], float]] = {
            ZARR: lambda: roofline.once(ways[0], options.threads),
            "genstream's reader": lambda: roofline.once(ways[1], options.threads),
            PASS: lambda: one_pass(story, params, passes),
        }

        def forgotten(turn: Callable[[], float]) -> float:
            roofline.forget(folder)
            return turn()

        cold = {name: functools.partial(forgotten, turn) for name, turn in turns.items()}
        taken = {}
        for files, each in ((FORGOTTEN, cold), (KEPT, turns)):
            taken[files] = warmed(each, 2 * options.rounds)
    rows = [
        {
            "what": name,
            "files are": files,
            "seconds": median(seconds),
            "GB/s": nbytes / median(seconds) / 1e9,
        }
        for files, found in taken.items()
        for name, seconds in found.items()
    ]
    what = f"read-bound, diagonal d = 32 K = 2 float32, {n_rows:,} rows"
    bars = [
        Bar(f"{what}, files {files}: share of the zarr rate", 0.7, ratio(found[ZARR], found[PASS]))
        for files, found in taken.items()
    ]
    return Table(
        "read-bound",
        "Out of core, where reading bounds a pass",
        rows,
        [
            f"{n_rows:,} x 32 rows, K = 2, diagonal covariance, float32.",
            "Data larger than memory are read from disk in every pass.",
        ],
        bars,
    )


def dask_workers(options: Options) -> Table:
    """A pass over a dataset by one Dask worker process and by two, one thread each.

    Each turn starts the cluster that a configuration of so many workers starts, and ends it: the
    processes of one that waits take time from those of another.
    """
    told("Dask workers")
    story, params, x = model(DASK, DASK_SHAPE, "float64", options)
    n_rows = len(x)
    taken: dict[str, list[float]] = {"1": [], "2": []}
    with tempfile.TemporaryDirectory() as top:
        stored = roofline.write_dataset(Path(top) / "dataset", x)
        del x
        # The same tasks for both.
        passes = Passes(stored, scheduler="distributed", workers=2)

        def turn(n: int) -> list[float]:
            with cluster(Compute(scheduler="distributed", workers=n)):
                return [one_pass(story, params, passes) for _ in range(1 + DASK_PASSES)][1:]

        for _ in range(options.rounds):
            for n, seconds in taken.items():
                seconds += turn(int(n))
    rows = [{"workers": int(n), **pass_row(n_rows, seconds)} for n, seconds in taken.items()]
    what = f"two Dask workers against one, full d = 16 K = 64 float64, {n_rows:,} rows"
    return Table(
        "dask-workers",
        "Dask workers, a process with one thread each",
        rows,
        [f"{n_rows:,} x 16 rows of a dataset on disk, K = 64, full covariance, float64."],
        [Bar(f"{what}: times as fast", 1.8, ratio(taken["1"], taken["2"]))],
    )


BENCHMARKS = {
    "out-of-core": Benchmark("a dataset on disk beside rows in memory", against_memory),
    "read-bound": Benchmark("a pass that hardly computes beside reading alone", read_bound),
    "dask-workers": Benchmark("one Dask worker beside two", dask_workers),
}
