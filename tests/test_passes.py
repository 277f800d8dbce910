"""Passes: the same bits wherever the chunks are folded, and errors that arrive whole."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dask.array as da
import distributed
import numpy as np
import oracles
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from genstream.errors import ComputeError, ConfigError, DataError
from genstream.estimators import GaussianMixture
from genstream.incremental import IncrementalEM
from genstream.learn import BatchEM, EStep, FitState, Learner, fit
from genstream.online import OnlineEM
from genstream.passes import Passes, fold_tree
from genstream.rows import Rows
from genstream.schema import Schema
from genstream.sources import DaskSource, NumpySource, Source, Split, ZarrSource
from genstream.start import seed_params
from genstream.story import Params, Story

# One cluster serves them all.
pytestmark = pytest.mark.xdist_group("cluster")

N_ROWS, CHUNK = 1100, 60


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of two worker processes on loopback."""
    with (
        distributed.LocalCluster(
            n_workers=2,
            threads_per_worker=1,
            processes=True,
            host="127.0.0.1",
            # Any port: the usual one may be taken, and None would still ask for it.
            dashboard_address="127.0.0.1:0",
        ) as made,
        distributed.Client(made),
    ):
        yield made.scheduler_address


@pytest.fixture(scope="module")
def problem() -> tuple[Story, Params, np.ndarray]:
    rng = np.random.default_rng(1)
    story = oracles.make_story("full", 3, 4)
    truth = oracles.random_params(story, rng)
    values = oracles.with_gaps(story.draw(truth, N_ROWS, rng).values, 0.15, rng)
    rows = Rows.of(values)
    story = story.anchored(rows)
    return story, seed_params(story, rows, rng), values


@pytest.fixture(scope="module")
def sources(
    problem: tuple[Story, Params, np.ndarray], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Source]:
    values = problem[2]
    path = tmp_path_factory.mktemp("passes") / "x.zarr"
    array = zarr.create_array(str(path), shape=values.shape, chunks=(CHUNK, 4), dtype="f8")
    array[:] = values
    found: dict[str, Source] = {
        "numpy": NumpySource(values, chunk_rows=CHUNK),
        "zarr": ZarrSource(path),
        "dask": DaskSource(da.from_array(values, chunks=(CHUNK, 4))),
    }
    return found | {f"{name} split": Split(s, "train", 0.2, 3) for name, s in found.items()}


NAMES = ("numpy", "zarr", "dask", "numpy split", "zarr split", "dask split")


def fitted(story: Story, params: Params, passes: Passes) -> FitState:
    return fit(story, BatchEM(3, 0.0), passes, FitState(params))


@pytest.mark.parametrize("name", NAMES)
def test_every_way_of_folding_gives_the_same_bits(
    name: str, problem: Any, sources: dict[str, Source], cluster: str
) -> None:
    story, params, _ = problem
    source = sources[name]
    reference = fitted(story, params, Passes(sources[name.replace("dask", "numpy")], workers=1))
    ways: list[dict[str, Any]] = [
        {"scheduler": "synchronous"},
        {"scheduler": "distributed"},
        {"scheduler": cluster, "task_chunks": 4},
    ]
    ways += [{"workers": w} for w in (1, 2, 3)]
    ways += [{"workers": 2, "task_chunks": t} for t in (1, 2, 8, 64)]
    ways += [{"scheduler": "synchronous", "task_chunks": 16}]
    for way in ways:
        state = fitted(story, params, Passes(source, **way))
        assert oracles.identical(state.params, reference.params), way
        assert state.stats is not None
        assert reference.stats is not None
        assert oracles.identical(state.stats, reference.stats), way


@dataclass(frozen=True)
class Word:
    """Merging writes down the tree."""

    text: str

    def merge(self, other: Word) -> Word:
        return Word(f"({self.text} {other.text})")


def tree(first: int, last: int) -> str:
    """The tree by definition: the left child is the largest power of two below the whole."""
    if last - first == 1:
        return str(first)
    half = 1 << ((last - first - 1).bit_length() - 1)
    return f"({tree(first, first + half)} {tree(first + half, last)})"


@given(st.integers(1, 200))
def test_the_tree_is_fixed(n: int) -> None:
    assert fold_tree(Word(str(i)) for i in range(n)).text == tree(0, n)


def name_chunk(chunk: int, rows: Rows) -> Word:
    return Word(str(chunk))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.sampled_from([1, 2, 4, 16, 64]), st.integers(1, 3), st.booleans())
def test_tasks_merge_along_the_same_tree(n: int, task: int, workers: int, lazy: bool) -> None:
    values = np.zeros((n, 1))
    source: Source = NumpySource(values, chunk_rows=1)
    if lazy:
        source = DaskSource(da.from_array(values, chunks=(1, 1)))
    passes = Passes(source, workers=workers, task_chunks=task)
    assert passes.fold(name_chunk).text == tree(0, n)


def test_a_cluster_merges_along_the_same_tree(cluster: str) -> None:
    for n, task in ((1, 1), (13, 1), (13, 4)):
        source = NumpySource(np.zeros((n, 1)), chunk_rows=1)
        passes = Passes(source, scheduler="distributed", task_chunks=task)
        assert passes.fold(name_chunk).text == tree(0, n)


@pytest.mark.parametrize("scheduler", ["threads", "synchronous", "distributed"])
def test_tasks_are_nodes_of_the_tree(scheduler: str, cluster: str) -> None:
    seen: list[tuple[int, int]] = []
    source = NumpySource(np.zeros((13, 1)), chunk_rows=1)
    passes = Passes(
        source, scheduler=scheduler, on_progress=lambda done, total: seen.append((done, total))
    )
    found = passes.fold_tasks(name_chunk, [(8, 12), (0, 4), (12, 13)])
    assert [word.text for word in found] == [tree(8, 12), tree(0, 4), tree(12, 13)]
    assert seen[-1] == (9, 9)


class OddError(Exception):
    """An error that no library raises."""


def fail_late(chunk: int, rows: Rows) -> Word:
    if chunk == 7:
        raise OddError("chunk 7 is bad")
    return Word("")


def refuse(chunk: int, rows: Rows) -> Word:
    raise DataError(f"chunk {chunk}: refused")


class TestErrors:
    @pytest.mark.parametrize("name", ["numpy", "zarr", "dask"])
    @pytest.mark.parametrize("scheduler", ["threads", "synchronous", "distributed"])
    def test_what_the_work_raises_arrives(
        self, name: str, scheduler: str, sources: dict[str, Source], cluster: str
    ) -> None:
        passes = Passes(sources[name], scheduler=scheduler)
        with pytest.raises(OddError, match="chunk 7 is bad"):
            passes.fold(fail_late)
        with pytest.raises(DataError, match="refused"):
            passes.fold(refuse)

    def test_map_too(self, sources: dict[str, Source]) -> None:
        results = Passes(sources["zarr"], workers=2).map(fail_late)
        assert [next(results).text for _ in range(7)] == [""] * 7
        with pytest.raises(OddError):
            next(results)

    def test_bad_values_name_their_row(self, tmp_path: Path) -> None:
        values = np.zeros((300, 2))
        values[123, 1] = np.inf
        for scheduler in ("threads", "synchronous"):
            passes = Passes(NumpySource(values, chunk_rows=50), scheduler=scheduler)
            with pytest.raises(DataError, match="row 123, column 'x1' is infinite"):
                passes.fold(name_chunk)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"scheduler": "processes"}, "'processes'"),
            ({"workers": 0}, "workers is 0: it must be an int of at least 1, or None"),
            ({"workers": "2"}, "workers is '2': it must be an int of at least 1, or None"),
            ({"workers": 2.0}, "workers is 2.0: it must be an int"),
            ({"workers": True}, "workers is True: it must be an int"),
            ({"task_chunks": 3}, "power of two"),
            ({"task_chunks": 0}, "power of two"),
        ],
    )
    def test_wrong_options_are_named(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            Passes(NumpySource(np.zeros((3, 1))), **options)

    def test_an_estimator_names_wrong_workers(self) -> None:
        with pytest.raises(ConfigError, match="workers is '2': it must be an int of at least 1"):
            GaussianMixture(workers="2").fit(np.zeros((3, 1)))
        assert Passes(NumpySource(np.zeros((3, 1))), workers=np.int64(2)).workers == 2

    @pytest.mark.parametrize("scheduler", ["threads", "synchronous"])
    def test_no_chunk_at_all(self, scheduler: str) -> None:
        with pytest.raises(ComputeError, match="source is empty"):
            Passes(Empty(), scheduler=scheduler).fold(name_chunk)
        with pytest.raises(ComputeError, match="source is empty"):
            Passes(Empty(), scheduler=scheduler).fold_tasks(name_chunk, [])
        assert list(Passes(Empty(), scheduler=scheduler).map(name_chunk)) == []

    @pytest.mark.parametrize("learner", [BatchEM(), IncrementalEM(), OnlineEM()])
    def test_no_chunk_to_learn_from(self, learner: Learner) -> None:
        story = oracles.make_story("full", 1, 2)
        with pytest.raises(ComputeError, match="source is empty"):
            fit(story, learner, Passes(Empty(), workers=1), FitState(story.vague()))

    def test_no_chunk_on_a_cluster(self, cluster: str) -> None:
        with pytest.raises(ComputeError, match="source is empty"):
            Passes(Empty(), scheduler="distributed").fold(name_chunk)

    def test_no_cluster_at_an_address(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def none(address: str | None) -> None:
            raise OSError("Timed out trying to connect")

        monkeypatch.setattr(distributed, "get_client", none)
        passes = Passes(NumpySource(np.zeros((3, 1))), scheduler="tcp://127.0.0.1:9")
        with pytest.raises(ComputeError, match=r"at tcp://127\.0\.0\.1:9: Timed out"):
            passes.fold(name_chunk)

    def test_no_client(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def none(address: str | None) -> None:
            raise ValueError("No global client found and no address provided")

        monkeypatch.setattr(distributed, "get_client", none)
        passes = Passes(NumpySource(np.zeros((3, 1))), scheduler="distributed")
        with pytest.raises(ComputeError, match="no Dask client"):
            passes.fold(name_chunk)


class Empty:
    """A source without chunks."""

    schema = Schema.real(1)
    chunk_rows: tuple[int, ...] = ()
    chunk_nbytes = 0

    def read(self, i: int) -> Rows:
        raise AssertionError("there is no chunk to read")

    def origin(self, i: int) -> tuple[tuple[int, int, int], ...]:
        return ()

    def identity(self) -> dict[str, Any]:
        return {}


class Slow(NumpySource):
    """Counts the chunks that were read and not yet taken by the consumer."""

    lock = threading.Lock()
    started = 0

    def read(self, i: int) -> Rows:
        with Slow.lock:
            Slow.started += 1
        return super().read(i)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_map_runs_a_few_chunks_ahead_and_no_more(workers: int) -> None:
    Slow.started = 0
    passes = Passes(Slow(np.zeros((40, 1)), chunk_rows=1), workers=workers)
    for i, chunk in enumerate(passes.map(lambda chunk, rows: chunk)):
        assert chunk == i
        time.sleep(0.002)
        assert Slow.started <= i + 2 * workers + 1


def test_an_abandoned_map_stops(sources: dict[str, Source]) -> None:
    Slow.started = 0
    results = Passes(Slow(np.zeros((500, 1)), chunk_rows=1), workers=2).map(name_chunk)
    next(results)
    results.close()  # type: ignore[attr-defined]
    assert Slow.started < 20


@pytest.mark.parametrize("name", ["numpy", "zarr", "dask"])
@pytest.mark.parametrize("scheduler", ["threads", "synchronous", "distributed"])
def test_progress_counts_every_row_once(
    name: str, scheduler: str, sources: dict[str, Source], cluster: str
) -> None:
    seen: list[tuple[int, int]] = []
    passes = Passes(
        sources[name],
        scheduler=scheduler,
        task_chunks=1,
        on_progress=lambda done, total: seen.append((done, total)),
    )
    for _ in range(2):
        seen.clear()
        passes.fold(name_chunk)
        assert {total for _, total in seen} == {N_ROWS}
        assert [done for done, _ in seen] == sorted({done for done, _ in seen})
        assert seen[-1][0] == N_ROWS
    seen.clear()
    list(passes.map(name_chunk))
    assert [done for done, _ in seen] == [*range(CHUNK, N_ROWS, CHUNK), N_ROWS]


def test_progress_of_some_chunks_reaches_its_total(sources: dict[str, Source]) -> None:
    seen: list[tuple[int, int]] = []
    passes = Passes(
        sources["zarr"], workers=2, on_progress=lambda done, total: seen.append((done, total))
    )
    # Of the first chunk, and of the last one, which is shorter.
    assert passes.pick(np.array([3, 5, N_ROWS - 1])).n_rows == 3
    last = N_ROWS % CHUNK
    assert seen == [(CHUNK, CHUNK + last), (CHUNK + last, CHUNK + last)]


def test_empty_chunks_are_neutral(problem: Any) -> None:
    """A hold-out may leave a chunk without rows."""
    story, params, values = problem
    source = Split(NumpySource(values, chunk_rows=3), "test", 0.1, 0)
    assert 0 in source.chunk_rows
    stats = Passes(source).fold(EStep(story, params))
    kept = Rows.concatenate(source.read(i) for i in range(len(source.chunk_rows)))
    assert oracles.distance(stats, story.e_step(params, kept)) < 1e-12


def test_rows_in_memory_are_gone_over_as_they_are() -> None:
    values = np.random.default_rng(0).normal(size=(50_000, 2))
    values[::7, 0] = np.nan
    rows = Rows.of(values, np.arange(50_000.0))
    passes = Passes(NumpySource(values), workers=2).over(rows)
    assert passes.n_rows == 50_000
    assert passes.n_chunks == 4
    read = Rows.concatenate([passes.read(i) for i in range(4)])
    np.testing.assert_array_equal(read.filled(), values)
    np.testing.assert_array_equal(read.row_weights, rows.weights)
    assert passes.source.chunk_nbytes * 4 == rows.nbytes
    assert Passes(NumpySource(values), scheduler="synchronous").over(rows, 7).workers == 1
