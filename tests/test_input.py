"""Input: chunks are read once, few are held, and what goes wrong while reading arrives whole."""

from __future__ import annotations

import signal
import threading
import time
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import oracles
import pytest

from genstream import passes as passes_module
from genstream.errors import CorruptError, DataError
from genstream.learn import BatchEM, EStep, FitState, fit
from genstream.online import MAX_PARTS, OnlineEM, _part_rows
from genstream.passes import Passes, fold_range
from genstream.responsibility import Sampled
from genstream.rows import LARGEST, Rows
from genstream.schema import Schema
from genstream.segments import rows_of_chunk
from genstream.sources import NumpySource
from genstream.start import seed_params
from genstream.store import append_batch
from genstream.stories import mixture
from genstream.story import Params, Story, _prepared

N_CHUNKS, CHUNK = 24, 64


class Slow(NumpySource):
    """Chunks that take a while to come, as from far away, and are counted while they live."""

    def __init__(self, values: np.ndarray, seconds: float, chunk_rows: int = CHUNK) -> None:
        super().__init__(values, chunk_rows=chunk_rows)
        self.seconds = seconds
        self.lock = threading.Lock()
        self.alive: list[weakref.ref[Any]] = []
        self.most, self.reads = 0, [0] * len(self.chunk_rows)
        self.threads: set[str] = set()

    def read(self, i: int) -> Rows:
        time.sleep(self.seconds)
        rows = super().read(i)
        rows = Rows(rows.values.copy(), rows.observed, rows.weights)
        with self.lock:
            self.threads.add(threading.current_thread().name)
            self.reads[i] += 1
            self.alive = [one for one in self.alive if one() is not None]
            self.alive.append(weakref.ref(rows.values))
            self.most = max(self.most, len(self.alive))
        return rows


@pytest.fixture(scope="module")
def problem() -> tuple[Story, Params, np.ndarray]:
    rng = np.random.default_rng(4)
    story = oracles.make_story("full", 3, 4)
    truth = oracles.random_params(story, rng)
    values = oracles.with_gaps(story.draw(truth, N_CHUNKS * CHUNK - 7, rng).values, 0.1, rng)
    rows = Rows.of(values)
    story = story.anchored(rows)
    return story, seed_params(story, rows, rng), values


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_slow_storage_is_read_ahead_by_one_chunk_a_worker(workers: int, problem: Any) -> None:
    story, params, values = problem
    source = Slow(values, 0.004)
    passes = Passes(source, workers=workers)
    stats = passes.fold(EStep(story, params))
    assert source.reads == [1] * N_CHUNKS
    assert any(name.startswith("read-ahead") for name in source.threads)
    # One worked on and one read ahead, for each worker, and one just made.
    assert source.most <= 2 * workers + 1
    plain = Passes(NumpySource(values, chunk_rows=CHUNK), scheduler="synchronous")
    assert oracles.identical(stats, plain.fold(EStep(story, params)))


def test_what_need_not_be_waited_for_is_not_read_ahead(
    problem: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two threads a worker take turns at the cores that there are: also after a pass from the disk,
    where the next one is from memory. Time passes as the source says.
    """
    story, params, values = problem
    clock = {"wall": 0.0, "busy": 0.0}

    class Source(Slow):
        waits = 0.0

        def read(self, i: int) -> Rows:
            # Decoding takes 2 ms, and a worker waits now and then for another thread.
            waited = max(self.waits, 0.001 * (i % 4 == 1))
            clock["busy"] += 0.002
            clock["wall"] += 0.002 + waited
            return super().read(i)

    told = {"perf_counter": lambda: clock["wall"], "thread_time": lambda: clock["busy"]}
    monkeypatch.setattr(passes_module, "time", SimpleNamespace(**told))
    source = Source(values, 0.0)
    passes = Passes(source, workers=1)
    for waits, ahead in ((0.0, False), (0.02, True), (0.02, True), (0.0, False), (0.0, False)):
        source.waits = waits
        source.threads.clear()
        passes.fold(EStep(story, params))
        assert any(name.startswith("read-ahead") for name in source.threads) == ahead
    assert source.reads == [5] * N_CHUNKS


def test_reading_and_computing_overlap() -> None:
    seconds = 0.01
    begun: list[int] = []
    early: list[bool] = []

    class Told(Slow):
        def read(self, i: int) -> Rows:
            begun.append(i)
            return super().read(i)

    class Nothing:
        def merge(self, other: Any) -> Any:
            return self

    def work(chunk: int, rows: Rows) -> Nothing:
        time.sleep(seconds)
        early.append(chunk + 1 in begun)
        return Nothing()

    fold_range(Told(np.zeros((20, 1)), seconds, chunk_rows=1), work, 0, 20)
    # While one chunk is worked on, the next is on its way, once it is known that reading waits.
    assert any(early[:-1])
    assert not early[-1]


def test_without_threads_nothing_is_read_ahead(problem: Any) -> None:
    story, params, values = problem
    source = Slow(values, 0.002)
    Passes(source, scheduler="synchronous").fold(EStep(story, params))
    assert source.threads == {threading.current_thread().name}


class TestErrors:
    @pytest.fixture(autouse=True)
    def others(self) -> set[int | None]:
        """Threads that were there before, such as those of clusters in other tests."""
        return {thread.ident for thread in threading.enumerate()}

    @pytest.mark.parametrize("workers", [1, 3])
    @pytest.mark.parametrize("seconds", [0.0, 0.003])
    def test_of_a_reader_arrive_unchanged(
        self, workers: int, seconds: float, problem: Any, others: Any
    ) -> None:
        story, params, values = problem
        values = values.copy()
        values[9 * CHUNK + 5, 2] = np.inf
        source = Slow(values, seconds)
        with pytest.raises(DataError, match=f"row {9 * CHUNK + 5}, column 'x2' is infinite"):
            Passes(source, workers=workers).fold(EStep(story, params))
        assert sum(source.reads) < N_CHUNKS or workers == 3
        assert not _left_over(others)

    def test_an_interrupt_ends_all_threads(self, problem: Any, others: Any) -> None:
        story, params, values = problem
        source = Slow(values, 0.05)
        here = threading.main_thread().ident
        # Whatever another test has left in its place.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            threading.Timer(0.15, signal.pthread_kill, [here, signal.SIGINT]).start()
            with pytest.raises(KeyboardInterrupt):
                Passes(source, workers=2).fold(EStep(story, params))
        finally:
            signal.signal(signal.SIGINT, before or signal.default_int_handler)
        assert sum(source.reads) < N_CHUNKS
        assert not _left_over(others)


def _left_over(others: set[int | None]) -> list[str]:
    """Threads of a pass that are still alive."""
    names = [thread.name for thread in threading.enumerate() if thread.ident not in others]
    return [name for name in names if name.startswith(("read-ahead", "ThreadPoolExecutor"))]


class TestStoredChunks:
    @pytest.fixture
    def stored(self, tmp_path: Path) -> Any:
        values = np.random.default_rng(0).standard_normal((300, 5)).astype(np.float32)
        values[7, 3] = np.nan
        schema = Schema.real(5)
        pieces = [Rows.of(values, np.arange(300) / 100)]
        dataset, _ = append_batch(
            tmp_path / "d", "b", pieces, lambda: schema, dtype="float32", weighted=True
        )
        return dataset, values

    def test_are_what_zarr_reads(self, stored: Any) -> None:
        import zarr

        dataset, values = stored
        rows = dataset.source().read(0)
        assert rows.values.dtype == np.float32
        np.testing.assert_array_equal(rows.filled(), values)
        np.testing.assert_array_equal(rows.weights, np.arange(300) / 100)
        place = next((Path(dataset.storage.name) / "segments").glob("*.zarr"))
        np.testing.assert_array_equal(zarr.open_array(place / "values", mode="r")[:], values)

    @pytest.mark.parametrize("at", [0, 1000, -5])
    def test_a_flipped_bit_is_found(self, stored: Any, at: int) -> None:
        dataset, _ = stored
        file = next(Path(dataset.storage.name).glob("segments/*.zarr/values/c.*"))
        data = bytearray(file.read_bytes())
        data[at] ^= 1
        file.write_bytes(data)
        with pytest.raises(CorruptError, match=r"values/c\.0\.0: is damaged"):
            dataset.source().read(0)


@pytest.mark.parametrize(
    ("n_features", "itemsize", "rows"),
    [(1, 8, 2**20), (6, 8, 174_762), (32, 4, 65_536), (1024, 8, 1024), (5000, 8, 1024)],
)
def test_chunks_are_8_mb_unless_that_is_few_rows(n_features: int, itemsize: int, rows: int) -> None:
    assert rows_of_chunk(n_features, itemsize) == rows
    # Never more than 64 MB, unless one row is.
    assert rows_of_chunk(10**6, 8) == 8
    assert rows_of_chunk(10**8, 8) == 1


class TestRows:
    @pytest.mark.parametrize("dtype", ["f4", "f8"])
    def test_complete_values_are_neither_copied_nor_masked(self, dtype: str) -> None:
        values = np.random.default_rng(0).standard_normal((50, 3)).astype(dtype)
        rows = Rows.of(values)
        assert rows.observed is None
        assert np.shares_memory(rows.values, values)

    @pytest.mark.parametrize("place", [0, 77, 149])
    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 2 * LARGEST, -2 * LARGEST])
    def test_any_odd_entry_is_noticed_wherever_it_is(self, place: int, value: float) -> None:
        values = np.ones((50, 3))
        values.flat[place] = value
        if np.isnan(value):
            found = Rows.of(values).observed
            assert found is not None
            assert np.flatnonzero(~found.ravel()).tolist() == [place]
            return
        with pytest.raises(DataError, match=f"row {place // 3}"):
            Rows.of(values)

    def test_some_rows_are_the_same_by_index_mask_and_slice(self) -> None:
        rng = np.random.default_rng(0)
        values = oracles.with_gaps(rng.standard_normal((40, 3)), 0.3, rng)
        rows = Rows.of(values, rng.random(40))
        for index in (np.array([3, 3, -1, 0]), rng.random(40) < 0.5, slice(4, 20)):
            part = rows[index]
            np.testing.assert_array_equal(part.filled(), values[index])
            np.testing.assert_array_equal(part.row_weights, rows.row_weights[index])


class TestOnline:
    @pytest.mark.parametrize("rule", [None, Sampled(3)])
    def test_bits_do_not_depend_on_workers(self, rule: Any, problem: Any) -> None:
        _, _, values = problem
        values = np.tile(values, (24, 1))
        story = mixture(Schema.real(4), 12).anchored(Rows.of(values[:2000]))
        params = seed_params(story, Rows.of(values[:2000]), np.random.default_rng(0))
        learner = OnlineEM(batch_rows=12_000, **({} if rule is None else {"responsibility": rule}))
        # Mini-batches of several parts, or nothing is shared among workers.
        assert _part_rows(story, 12_000) < 6_000
        found = [
            fit(
                story,
                learner,
                Passes(NumpySource(values, chunk_rows=9000), **way),
                FitState(params),
            )
            for way in ({"scheduler": "synchronous"}, {"workers": 2}, {"workers": 5})
        ]
        for state in found[1:]:
            assert oracles.identical(state.params, found[0].params)
            assert state.trace[-1].loglik == found[0].trace[-1].loglik

    def test_a_mini_batch_has_few_parts_whatever_its_size(self) -> None:
        for k in (1, 8, 5000):
            story = mixture(Schema.real(6), k, covariance="diag")
            for n in (1, 2048, 4096, 4097, 50_000, 10_000_000):
                assert -(-n // _part_rows(story, n)) <= MAX_PARTS


def test_parameters_are_prepared_once_for_all_chunks(
    problem: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    story, params, values = problem
    params = Params(params.weights.copy(), params.family)
    prepared = []
    original = type(story.family).prepare

    def counting(self: Any, *given: Any) -> Any:
        prepared.append(threading.current_thread())
        return original(self, *given)

    monkeypatch.setattr(type(story.family), "prepare", counting)
    passes = Passes(NumpySource(values, chunk_rows=CHUNK), workers=3)
    first = passes.fold(EStep(story, params))
    assert len(prepared) == 1
    # Another family is prepared anew, and nothing is kept for parameters that are gone.
    again = Story(story.schema, story.family.with_dtype("float64"), 3)
    assert oracles.identical(
        again.e_step(params, Rows.of(values)), story.e_step(params, Rows.of(values))
    )
    assert first.n_rows == len(values)
    assert params in _prepared
    n_held = len(_prepared)
    del params
    assert len(_prepared) == n_held - 1


def test_a_fit_on_slow_storage_is_the_fit_in_memory(problem: Any) -> None:
    story, params, values = problem
    ways = [Passes(Slow(values, 0.001), workers=2), Passes(NumpySource(values, chunk_rows=CHUNK))]
    first, second = (fit(story, BatchEM(3, 0.0), way, FitState(params)) for way in ways)
    assert oracles.identical(first.params, second.params)
