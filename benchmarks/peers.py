"""genstream beside its peers: same rows, same start, same iterations, in turns, in one run.

    python -m benchmarks run peers            all cases
    python -m benchmarks run gmm-power        one of them

Each contestant is a process of its own (`benchmarks.contestants`) that waits for its turn. A peer
that is not installed has a row that says so: `make peers` installs them all in an environment of
their own.

The bound of a case is the time its arithmetic takes at the rates that `benchmarks.roofline`
measures in the same run: floating-point operations of the matrix products that score and gather
over the rate of a large product, plus an exponential a row and component; or the time to read the
rows once, where that is longer.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
from numpy.typing import NDArray

from benchmarks import roofline
from benchmarks.contestants import CONTESTANTS, Genstream, Task
from benchmarks.data import path
from benchmarks.measure import (
    ROOT,
    Bar,
    Benchmark,
    Options,
    Table,
    alternate,
    median,
    ratio,
    told,
)

Array = NDArray[Any]
Drawn = tuple[Array, dict[str, Array]]

OURS = ("genstream float64", "genstream float32")
ABSENT = "not installed: make peers"


class Failed(Exception):  # noqa: N818
    """A contestant could not go on; the message says why, for the table."""


class Player:
    """A contestant's process.

    Parameters
    ----------
    name
        One of `CONTESTANTS`.
    folder
        Holds the task.
    options
        Whose interpreter and how many threads.

    Raises
    ------
    Failed
        Where it is not installed, or does not get ready.
    """

    def __init__(self, name: str, folder: Path, options: Options) -> None:
        self.name, self.folder, self._patience = name, folder, options.patience
        kind, _ = CONTESTANTS[name]
        python = options.peers if kind.peer else Path(sys.executable)
        if not python.exists():
            raise Failed(ABSENT)
        threads = "1" if kind is Genstream else str(options.threads)
        names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
        self._log = (folder / f"{name}.log").open("w+")
        self._process = subprocess.Popen(
            [str(python), "-m", "benchmarks.contestants", name, str(folder), str(os.getpid())],
            cwd=ROOT,
            # What it leaves behind goes with the task.
            env=os.environ | dict.fromkeys(names, threads) | {"TMPDIR": str(folder)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            # A group of its own, so that what it has started ends with it.
            start_new_session=True,
        )
        try:
            absent = self._answer().get("absent")
            if absent:
                raise Failed(f"{absent} {ABSENT}")
        except BaseException:
            self.close()
            raise

    def _answer(self) -> dict[str, Any]:
        """The next line it says."""
        out: IO[str] | None = self._process.stdout
        assert out is not None
        line = out.readline() if select.select([out], [], [], self._patience)[0] else ""
        if not line:
            self._kill()
            self._log.seek(0)
            raised = re.findall(r"^\S*(?:Error|Exception): .*", self._log.read(), re.MULTILINE)
            raise Failed(f"failed: {raised[-1][:120] if raised else 'ended or took too long'}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _ask(self, what: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(what + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass
        return self._answer()

    def round(self) -> float:
        """The seconds of a round. Raises Failed where it ended instead."""
        return float(self._ask("round")["seconds"])

    def found(self) -> dict[str, Array]:
        """What the last round came to."""
        with np.load(self.folder / self._ask(f"found-{os.getpid()}")["found"]) as arrays:
            return {name: arrays[name] for name in arrays.files}

    def _kill(self) -> None:
        """Send SIGKILL to the process and to all that it has started, as Spark's virtual machine,
        whether or not it still runs itself; once, as its number may go to others thereafter.
        """
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def close(self) -> None:
        """End the process and what it has started."""
        self._kill()
        self._process.communicate()
        self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def features(task: Task, d: int) -> int:
    """What the products of an E-step over d columns have a component: d (d + 1) / 2 + d + 1 with
    full covariances (and with moments of factors), 2 d + 1 with diagonal, d + 2 with spherical and
    d + 1 with tied ones, as with binary or count columns.
    """
    return {
        "gaussian full": d * (d + 1) // 2 + d + 1,
        "mfa": d * (d + 1) // 2 + d + 1,
        "gaussian diag": 2 * d + 1,
        "gaussian spherical": d + 2,
    }.get(task.kind, d + 1)


@dataclass(frozen=True)
class Work:
    """What the arithmetic of an iteration asks of the machine at least."""

    flops: float
    exps: float
    values: float

    @classmethod
    def of(cls, task: Task, n: int, d: int) -> Work:
        """That of a task over (n, d) rows.

        Two products of K rows and F features (`features`) score and gather: `4 n K F` operations.
        Tied covariances add a quadratic form and a sum of squares a row. K-means scores and adds
        up; one component of factors sums its moments once.
        """
        k, triangle = task.n_components, d * (d + 1) // 2
        flops = 4.0 * n * k * features(task, d)
        if task.kind == "gaussian tied":
            flops += 4 * n * triangle
        if task.model == "kmeans":
            flops = 2.0 * n * k * d + n * d
        if task.model in ("ppca", "fa"):
            flops = 2 * n * (triangle + d)
        exps = n * k if task.model not in ("kmeans", "ppca", "fa") else 0
        return cls(flops, float(exps), float(n * d))

    def seconds(self, rates: roofline.Rates, dtype: str) -> float:
        """The time it takes at the machine's rates."""
        arithmetic = self.flops / rates.gemm[dtype] + self.exps / rates.exp[dtype]
        return max(arithmetic, self.values * np.dtype(dtype).itemsize / rates.read)


@dataclass(frozen=True)
class Case:
    """One comparison: what is learned, from which rows, by whom, and what must be shown."""

    title: str
    task: Task
    draw: Callable[[Task, int], Drawn]
    n_rows: int
    peers: tuple[str, ...]
    # By peer: times as fast in float64 and in float32 as it must be shown to be.
    bars: Mapping[str, tuple[float | None, float | None]] = field(default_factory=dict)
    # Least share of the rate of a large matrix product that float64 must reach.
    gemm_share: float | None = None
    note: str = ""


def begin(task: Task, x: Array, rng: np.random.Generator) -> dict[str, Array]:
    """A start: equal weights, rows for means, and the rows' own variances."""
    k, variance = task.n_components, x.var(axis=0)
    start = {"weights": np.full(k, 1 / k), "mean": x[rng.choice(len(x), k, replace=False)]}
    start["covariance"] = {
        "full": np.tile(np.diag(variance), (k, 1, 1)),
        "tied": np.diag(variance),
        "diag": np.tile(variance, (k, 1)),
        "spherical": np.full(k, variance.mean()),
    }.get(task.covariance, variance)
    return start


def power_rows(n_rows: int) -> Array:
    """The first rows of the household power benchmark's training part, as `make power` cut it."""
    parts = [np.load(path(f"power/{part}.npy")) for part in ("train", "validation")]
    return np.asarray(np.concatenate(parts)[:n_rows], dtype=np.float64)


def power(task: Task, n_rows: int) -> Drawn:
    """Household power, from rows of it."""
    x = power_rows(n_rows)
    return x, begin(task, x, np.random.default_rng(0))


def overlapping(d: int, n_sources: int) -> Callable[[Task, int], Drawn]:
    """Rows of a mixture whose components overlap, each with a few factors of its own."""

    def draw(task: Task, n_rows: int) -> Drawn:
        rng = np.random.default_rng(1)
        x = np.empty((n_rows, d))
        source = rng.integers(n_sources, size=n_rows)
        for k in range(n_sources):
            rows = np.flatnonzero(source == k)
            loadings = rng.normal(0, 0.6, (d // 4, d))
            x[rows] = rng.normal(0, 1, d) + rng.normal(size=(len(rows), d // 4)) @ loadings
        x += rng.normal(size=x.shape)
        return x, begin(task, x, rng)

    return draw


def linear(d: int, q: int) -> Callable[[Task, int], Drawn]:
    """Rows that q factors and noise of a column's own size make."""

    def draw(task: Task, n_rows: int) -> Drawn:
        rng = np.random.default_rng(2)
        loadings = rng.normal(size=(q, d)) * np.linspace(2, 1, q)[:, None]
        noise = 1.0 if task.model == "ppca" else rng.uniform(0.3, 2.0, d)
        x = rng.normal(size=(n_rows, q)) @ loadings + noise * rng.normal(size=(n_rows, d))
        return x, {"weights": np.ones(1)}

    return draw


def discrete(d: int) -> Callable[[Task, int], Drawn]:
    """Binary or count rows of as many sources as there are components."""

    def draw(task: Task, n_rows: int) -> Drawn:
        rng = np.random.default_rng(3)
        k = task.n_components
        source = rng.integers(k, size=n_rows)
        if task.model == "bernoulli":
            x = (rng.random((n_rows, d)) < rng.beta(0.7, 0.7, (k, d))[source]).astype(float)
            mean = 0.25 + 0.5 * x[rng.choice(n_rows, k, replace=False)]
        else:
            x = rng.poisson(rng.gamma(2.0, 2.0, (k, d))[source]).astype(float)
            mean = (x[rng.choice(n_rows, k, replace=False)] + x.mean(axis=0)) / 2
        return x, {"weights": np.full(k, 1 / k), "mean": mean}

    return draw


def gaussians(
    covariance: str,
    n_rows: int,
    d: int,
    k: int,
    iterations: int,
    peers: tuple[str, ...],
    bar: tuple[float, float] | None,
    gemm_share: float | None = None,
) -> Case:
    """A Gaussian mixture of K components and overlapping rows of a quarter more sources; `bar` is
    the one against scikit-learn, if there is any.
    """
    form = {"diag": "diagonal"}.get(covariance, covariance)
    return Case(
        f"Gaussian mixture, {form}, {n_rows:,} x {d}, K = {k}",
        Task("gaussian", covariance, k, iterations=iterations),
        overlapping(d, k + k // 4),
        n_rows,
        peers,
        {"scikit-learn": bar} if bar else {},
        gemm_share,
    )


GAUSSIAN = ("scikit-learn", "oneDAL (daal4py)", "oneDAL (daal4py) float32")
TORCH = ("pomegranate float32", "gmmx float32")
CASES: dict[str, Case] = {
    "gmm-power": Case(
        "Gaussian mixture, full, household power 1,659,917 x 6, K = 50",
        Task("gaussian", "full", 50, iterations=2),
        power,
        1_659_917,
        (*GAUSSIAN, "Spark", *TORCH),
        {
            "scikit-learn": (50, 100),
            "Spark": (None, 25),
            "pomegranate float32": (None, 150),
        },
    ),
    "gmm-16": gaussians(
        *("full", 300_000, 16, 16, 5),
        (*GAUSSIAN, "Spark", *TORCH),
        (12, 20),
    ),
    "gmm-64-16": gaussians(
        *("full", 100_000, 64, 16, 5),
        (*GAUSSIAN, "scikit-learn float32", *TORCH),
        (4, 7),
        gemm_share=0.25,
    ),
    "gmm-64-64": gaussians(
        *("full", 100_000, 64, 64, 3),
        (*GAUSSIAN, "scikit-learn float32", *TORCH),
        (6, 12),
        gemm_share=0.40,
    ),
    # Few components: summed without features.
    "gmm-128-4": gaussians("full", 50_000, 128, 4, 5, (*GAUSSIAN, "pomegranate float32"), None),
    "gmm-diag": gaussians("diag", 500_000, 32, 64, 3, (*GAUSSIAN, *TORCH), (6, 10)),
    "gmm-spherical": gaussians("spherical", 500_000, 32, 64, 3, ("scikit-learn",), (6, 10)),
    "gmm-tied": gaussians("tied", 500_000, 32, 64, 3, ("scikit-learn",), (25, 25)),
    "kmeans": Case(
        "K-means, 500,000 x 32, K = 64",
        Task("kmeans", "", 64, iterations=5),
        overlapping(32, 80),
        500_000,
        (
            *("scikit-learn", "scikit-learn float32", "scikit-learn-intelex"),
            *("scikit-learn-intelex float32", "Spark", "dask-ml", "pomegranate float32"),
        ),
    ),
    "ppca": Case(
        "Probabilistic PCA, whole fit, 500,000 x 64, q = 8",
        Task("ppca", n_factors=8),
        linear(64, 8),
        500_000,
        (
            *("scikit-learn", "scikit-learn float32", "scikit-learn IncrementalPCA"),
            *("scikit-learn-intelex", "scikit-learn-intelex float32", "Spark"),
            *("dask-ml", "dask-ml IncrementalPCA"),
        ),
        note="PCA has the axes of probabilistic PCA's maximum; peers' PCA is what is timed.",
    ),
    "fa": Case(
        "Factor analysis, whole fit, 50,000 x 64, q = 8",
        Task("fa", n_factors=8),
        linear(64, 8),
        50_000,
        ("scikit-learn",),
        note="Each with its own defaults and rule to stop; no other peer has factor analysis.",
    ),
    **{
        model: Case(
            f"{model.capitalize()} mixture, 200,000 x 64, K = 32",
            Task(model, "", 32, iterations=2),
            discrete(64),
            200_000,
            ("pomegranate float32",),
        )
        for model in ("bernoulli", "poisson")
    },
    "mfa": Case(
        "Mixture of factor analysers, 100,000 x 32, K = 16, q = 4",
        Task("mfa", "", 16, 4, iterations=5),
        overlapping(32, 20),
        100_000,
        (),
        note="No peer has it.",
    ),
}


def gap(scale: Array, found: Mapping[str, Array], ours: Mapping[str, Array]) -> float:
    """How far apart two outcomes are: the largest difference of means in standard deviations of
    the columns, or the sine of the largest angle between two sets of axes; not a number where
    there is nothing to compare.
    """
    if "mean" in found and "mean" in ours:
        return float(np.abs((found["mean"] - ours["mean"]) / scale).max())
    if "axes" in found and "axes" in ours:
        one, other = (np.linalg.qr(np.asarray(a["axes"], float))[0] for a in (found, ours))
        return float(np.linalg.norm(other - one @ (one.T @ other), 2))
    return float("nan")


def compare(name: str, case: Case, options: Options) -> Table:
    """All contestants of a case in turns, and the table of what came of it."""
    n_rows = options.rows(case.n_rows)
    task = replace(case.task, threads=options.threads)
    told(f"{name}: {case.title}")
    x, start = case.draw(task, n_rows)
    told_why: dict[str, str] = {}
    players: dict[str, Player] = {}
    outcomes: dict[str, dict[str, Array]] = {}

    def turn(each: str) -> float:
        if each in told_why:
            return float("nan")
        try:
            seconds = players[each].round()
        except Failed as error:
            told_why[each] = str(error)
            return float("nan")
        told(f"  {each}: {seconds:.4f} s")
        return seconds

    with contextlib.ExitStack() as taking_part:
        # A virtual machine may take a moment to notice that it is no longer wanted.
        place = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        folder = Path(taking_part.enter_context(place))
        task.write(folder, x, start)
        for each in (*OURS, *case.peers):
            try:
                players[each] = taking_part.enter_context(Player(each, folder, options))
            except Failed as error:
                told_why[each] = str(error)
        turns = {each: functools.partial(turn, each) for each in players}
        taken = alternate(turns, options.rounds, options.budget)
        for each, player in players.items():
            if each not in told_why:
                try:
                    outcomes[each] = player.found()
                except Failed as error:
                    told_why[each] = str(error)
    return _table(name, case, task, x, taken, outcomes, told_why, roofline.rates(options))


def _table(
    name: str,
    case: Case,
    task: Task,
    x: Array,
    taken: Mapping[str, list[float]],
    outcomes: Mapping[str, Mapping[str, Array]],
    told_why: Mapping[str, str],
    rates: roofline.Rates,
) -> Table:
    unit = "s an iteration" if task.iterations else "s a fit"
    work = Work.of(task, *x.shape)
    scale = x.std(axis=0) + 1e-300
    known = {each: seconds for each, seconds in taken.items() if each not in told_why}
    reference = outcomes.get(OURS[0], {})
    rows: list[dict[str, Any]] = []
    for each in (*OURS, *case.peers):
        row: dict[str, Any] = {"contestant": each}
        seconds = known.get(each, [])
        row[unit] = median(seconds) if seconds else told_why[each]
        row["rounds"] = len(seconds)
        for ours in OURS:
            short = ours.removeprefix("genstream ")
            row[f"{short} is times as fast"] = ratio(seconds, known.get(ours, []))
        row["differs by"] = gap(scale, outcomes.get(each, {}), reference)
        if "loglik" in reference:
            row["nats a row"] = float(outcomes.get(each, {}).get("loglik", np.asarray(np.nan)))
        if each in OURS and seconds:
            dtype = each.removeprefix("genstream ")
            row["of the bound"] = f"{work.seconds(rates, dtype) / median(seconds):.0%}"
            row["of GEMM alone"] = f"{work.flops / rates.gemm[dtype] / median(seconds):.0%}"
            if task.n_components > 1 and task.model != "kmeans":
                shape = task.n_components, features(task, x.shape[1])
                rate = roofline.step_gemm(*shape, dtype, task.threads)
                row["of GEMM at its shape"] = f"{work.flops / rate / median(seconds):.0%}"
        rows.append(row)
    length = f"{task.iterations} iterations a round" if task.iterations else "whole fits"
    notes = [f"{x.shape[0]:,} x {x.shape[1]} rows, {length}, {task.threads} threads each."]
    unlike = [p for p in case.peers if not CONTESTANTS[p][0].given_start and p in known]
    if unlike and task.iterations:
        notes.append(f"{', '.join(unlike)}: cannot be given a start, so begins at one of its own.")
    if case.note:
        notes.append(case.note)
    gemm_seconds = work.flops / rates.gemm["float64"]
    bars = _bars(f"{name}, {len(x):,} rows", case, known, gemm_seconds)
    return Table(name, case.title, rows, notes, bars)


def _bars(
    what: str, case: Case, known: Mapping[str, Sequence[float]], gemm_seconds: float
) -> list[Bar]:
    """What a case is held against: the seconds of each contestant that went on to the end, and
    those of its products at the rate of a large one.
    """
    bars = []
    for peer, limits in case.bars.items():
        for ours, limit in zip(OURS, limits, strict=True):
            if limit is not None:
                times = ratio(known.get(peer, []), known.get(ours, []))
                bars.append(Bar(f"{what}: {ours} against {peer}, times as fast", limit, times))
    if case.gemm_share is not None:
        share = gemm_seconds / median(known.get(OURS[0], []))
        bars.append(
            Bar(f"{what}: genstream float64, share of the GEMM rate", case.gemm_share, share)
        )
    if case.task.model in ("ppca", "fa", "bernoulli", "poisson") and case.peers:
        best, fastest = (
            min((known[each] for each in side if each in known), key=median, default=[])
            for side in (OURS, case.peers)
        )
        times = ratio(fastest, best)
        bars.append(Bar(f"{what}: the better of ours against the fastest peer", 1.0, times))
    return bars


BENCHMARKS: dict[str, Benchmark] = {
    name: Benchmark(case.title, functools.partial(compare, name, case))
    for name, case in CASES.items()
}
