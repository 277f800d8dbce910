"""One pass over all chunks of a source, on threads or on a Dask cluster.

Chunks are folded in a fixed binary tree: the node of 2^j chunks beginning at a multiple of 2^j
merges its two halves. A task folds one aligned range of chunks and tasks merge along the same tree,
so every scheduler, worker count and task size adds the same numbers in the same order, and gives
the same bits.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from numbers import Integral
from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from genstream.errors import ComputeError, ConfigError, DataError, GenstreamError
from genstream.learn import Abreast, in_turn
from genstream.profile import Profile, current, mark
from genstream.rows import Rows
from genstream.sources import NumpySource, RowsSource, Source
from genstream.stats import EMPTY, Tree, fold_tree
from genstream.threads import abreast, abreast_in, beside, one_blas_thread

T = TypeVar("T")
Work = Callable[[int, Rows], Any]
Progress = Callable[[int, int], None]
Span = tuple[int, int]

# A task of this many chunks costs the scheduler little; fewer where there are few chunks.
MAX_TASK_CHUNKS = 64
# Tasks a worker should have at least, so that none waits long for the others at the end.
TASKS_PER_WORKER = 8
# Nodes of the tree that one task of a cluster merges, a power of two: to send what was summed from
# one worker to another takes longer than to merge it, and memory for so many.
MERGED = 4
# The share of its time that a worker may wait for storage before it has chunks read ahead, and the
# reads it takes to tell: a wait for another thread now and then is none for storage.
BLOCKED, SEVERAL = 0.25, 3
# The share of its time that a first read waits where storage still is slow.
STILL_BLOCKED = 0.3
# Seconds from which on it pays to hand reading over to another thread.
LONG_READ = 1e-3


class Passes:
    """Passes over one source.

    Parameters
    ----------
    source
        The chunks.
    scheduler
        `threads` (this process), `synchronous` (this thread), `distributed` (a client that is
        already connected), or the address of a Dask scheduler (`tcp://...`).
    workers
        Threads of this process; the number of cores by default. A cluster has its own.
    task_chunks
        Chunks a task folds, a power of two; chosen by default. It never changes a result.
    on_progress
        Called with (rows done, rows in all) as tasks of a pass end; on a cluster, when a pass
        ends. Calls never overlap, but come from whichever thread ended a task.
    """

    def __init__(
        self,
        source: Source,
        *,
        scheduler: str = "threads",
        workers: int | None = None,
        task_chunks: int | None = None,
        on_progress: Progress | None = None,
    ) -> None:
        local = scheduler in ("threads", "synchronous", "distributed")
        if not local and "://" not in scheduler:
            raise ConfigError(
                f"scheduler {scheduler!r} is not threads, synchronous, distributed or the address "
                "of a Dask scheduler such as tcp://127.0.0.1:8786"
            )
        asked: Any = workers
        whole = isinstance(asked, Integral) and not isinstance(asked, bool)
        if asked is not None and not (whole and asked >= 1):
            raise ConfigError(f"workers is {workers!r}: it must be an int of at least 1, or None")
        if task_chunks is not None and (task_chunks < 1 or task_chunks & (task_chunks - 1)):
            raise ConfigError(f"task_chunks is {task_chunks}: it must be a power of two")
        self.source = source
        self.scheduler = scheduler
        self.workers = 1 if scheduler == "synchronous" else workers or os.cpu_count() or 1
        self.task_chunks = task_chunks or _task_chunks(len(source.chunk_rows), self.workers)
        self.on_progress = on_progress
        self.n_rows = sum(source.chunk_rows)
        self._blocks = False

    @property
    def n_chunks(self) -> int:
        """How many chunks there are."""
        return len(self.source.chunk_rows)

    def read(self, chunk: int) -> Rows:
        """One chunk, read in this thread."""
        return self.source.read(chunk)

    def over(self, rows: Rows, chunk_rows: int | None = None) -> Passes:
        """Passes over rows in memory, in as many threads of this process; see `RowsSource`."""
        source = RowsSource(rows, self.source.schema, chunk_rows)
        alone = self.scheduler == "synchronous"
        return Passes(source, scheduler="synchronous" if alone else "threads", workers=self.workers)

    def among(self, n: int) -> Passes:
        """These passes for each of `n` who go over the chunks at the same time: with as many
        workers as are its share of all, and at least one.
        """
        return Passes(
            self.source,
            scheduler=self.scheduler,
            workers=max(1, self.workers // n),
            on_progress=self.on_progress,
        )

    def fold(self, work: Work) -> Any:
        """`work(chunk, rows)` of every chunk, merged in the fixed tree.

        `work` returns something with `merge`; on a cluster it and its results are sent between
        processes. Raises what `work` raises, and ComputeError where a cluster lost the pass.
        """
        n_chunks = self.n_chunks
        if not n_chunks:
            raise ComputeError(EMPTY)
        size = self.task_chunks
        spans = [(first, min(first + size, n_chunks)) for first in range(0, n_chunks, size)]
        if self._remote:
            value = self._on_cluster(self._graph(work, spans))
            if self.on_progress is not None:
                self.on_progress(self.n_rows, self.n_rows)
            return value
        tree = _SharedTree(len(spans))
        self._work(work, spans, tree.put)
        return tree.total

    def fold_tasks(self, work: Work, ranges: Sequence[tuple[int, int]]) -> list[Any]:
        """`work(chunk, rows)` of the chunks of each range, folded apart from one another.

        A range (first, last + 1) begins at a multiple of a power of two and is at most that long,
        so that what comes of it is a node of the tree of `fold`. Raises as `fold` does.
        """
        if not self.n_chunks:
            raise ComputeError(EMPTY)
        spans = list(ranges)
        if self._remote:
            from dask.delayed import delayed

            shared = delayed((self.source, work), traverse=False)
            task = delayed(_fold_shared, pure=False)
            found = self._on_cluster(delayed([task(shared, *span) for span in spans]))
            n_rows = sum(sum(self.source.chunk_rows[first:last]) for first, last in spans)
            if self.on_progress is not None:
                self.on_progress(n_rows, n_rows)
            return list(found)
        values: dict[int, Any] = {}
        self._work(work, spans, values.__setitem__)
        return [values[i] for i in range(len(spans))]

    @property
    def _remote(self) -> bool:
        return self.scheduler == "distributed" or "://" in self.scheduler

    def _work(self, work: Work, spans: list[Span], put: Callable[[int, Any], None]) -> None:
        """Fold each span in this process and `put` what comes of it, by the span's number.

        A worker takes the next span as soon as it is done with one: nothing is scheduled, and
        nobody waits for a slower one before the end.
        """
        report = self._reporter(spans)
        taken = iter(enumerate(spans))
        lock, stop = threading.Lock(), threading.Event()

        def numbers() -> Iterator[tuple[int, int]]:
            while not stop.is_set():
                with lock:
                    task = next(taken, None)
                if task is None:
                    return
                for i in range(*task[1]):
                    if stop.is_set():
                        return
                    yield task[0], i

        def worker() -> None:
            tree = Tree()
            with contextlib.closing(reading.chunks(self.source, numbers())) as chunks:
                for number, i, held in chunks:
                    tree.add(work(i, held.pop()))
                    mark("other")
                    if i == spans[number][1] - 1:
                        put(number, tree.total())
                        tree = Tree()
                        report(spans[number])
                    mark("merge")

        n_workers = min(self.workers, sum(last - first for first, last in spans))
        alone = self.scheduler == "synchronous"
        mark("other")
        with one_blas_thread(), _Reading(n_workers, blocks=self._blocks, alone=alone) as reading:
            if n_workers < 2:
                worker()
            else:
                abreast(worker, n_workers, stop)
        # The next pass finds the same storage, or what it read in the system's cache.
        self._blocks = reading.blocks

    def _reporter(self, spans: Sequence[tuple[int, int]]) -> Callable[[tuple[int, int]], None]:
        done = 0
        total = sum(sum(self.source.chunk_rows[first:last]) for first, last in spans)
        # Tasks end on several threads: rows are counted, and told, one at a time.
        lock = threading.Lock()

        def report(span: tuple[int, int]) -> None:
            nonlocal done
            with lock:
                done += sum(self.source.chunk_rows[span[0] : span[1]])
                if self.on_progress is not None:
                    self.on_progress(done, total)

        return report

    def _graph(self, work: Work, spans: list[Span]) -> Any:
        """The pass as one delayed value: a task a range, merged in the fixed tree."""
        from dask.delayed import delayed

        # One node holds source and work, so that parameters are shipped once, not once a task.
        shared = delayed((self.source, work), traverse=False)
        task, merge = delayed(_fold_shared, pure=False), delayed(fold_tree, pure=False)
        level = [task(shared, first, last) for first, last in spans]
        while len(level) > 1:
            groups = [level[i : i + MERGED] for i in range(0, len(level), MERGED)]
            level = [merge(group) if len(group) > 1 else group[0] for group in groups]
        return level[0]

    def _on_cluster(self, graph: Any) -> Any:
        """A delayed value, computed by the Dask cluster."""
        import distributed

        address = None if self.scheduler == "distributed" else self.scheduler
        try:
            client = distributed.get_client(address)
        except ValueError:
            raise ComputeError(
                "no Dask client is connected: make one, or give the scheduler's address"
            ) from None
        except OSError as error:
            raise ComputeError(f"no Dask cluster answers at {self.scheduler}: {error}") from error
        mark("other")
        try:
            found = client.compute(graph, optimize_graph=False).result()
            mark("cluster")
            return found
        except GenstreamError:
            raise
        except (
            distributed.scheduler.KilledWorker,
            distributed.client.FutureCancelledError,
            distributed.comm.core.CommClosedError,
            OSError,
            TimeoutError,
        ) as error:
            raise ComputeError(f"the Dask cluster lost a pass: {error}") from error

    @contextlib.contextmanager
    def abreast(self) -> Iterator[Abreast]:
        """Within it there is a function that does numbered pieces of work on all workers."""
        n_workers = 1 if self._remote else self.workers
        if n_workers == 1:
            yield in_turn
            return
        with one_blas_thread(), ThreadPoolExecutor(n_workers - 1) as pool:
            yield functools.partial(abreast_in, pool, n_workers)

    def map(self, work: Callable[[int, Rows], T]) -> Iterator[T]:
        """`work(chunk, rows)` of every chunk, in the order of chunks, a few of them ahead."""
        return self._in_order(lambda i: work(i, self.source.read(i)), range(self.n_chunks))

    def pick(self, rows: NDArray[np.intp]) -> Rows:
        """Some rows by their numbers among all, at least one, in rising order; chunks without any
        are not read, and of rows in memory no others are looked at. Raises as `Source.read` does.
        """
        if isinstance(self.source, NumpySource):
            # A row that cannot be used is named by the chunk that has it, which counts all rows.
            with contextlib.suppress(DataError):
                return self.source.pick(rows)
        edges = np.concatenate([[0], np.cumsum(self.source.chunk_rows)])
        cuts = np.searchsorted(rows, edges)
        wanted = np.flatnonzero(np.diff(cuts)).tolist()

        def picked(i: int) -> Rows:
            return self.source.read(i)[rows[cuts[i] : cuts[i + 1]] - edges[i]]

        return Rows.concatenate(list(self._in_order(picked, wanted)))

    def _in_order(self, work: Callable[[int], T], chunks: Sequence[int]) -> Iterator[T]:
        """`work(chunk)` of some chunks, on threads of this process."""
        tasks = (functools.partial(work, i) for i in chunks)
        with one_blas_thread(), ThreadPoolExecutor(self.workers) as pool:
            done, total = 0, sum(self.source.chunk_rows[i] for i in chunks)
            for i, value in zip(chunks, beside(pool, self.workers, tasks), strict=True):
                yield value
                done += self.source.chunk_rows[i]
                if self.on_progress is not None:
                    self.on_progress(done, total)


def _task_chunks(n_chunks: int, workers: int) -> int:
    """The largest power of two that leaves every worker some tasks."""
    share = max(1, n_chunks // (workers * TASKS_PER_WORKER))
    return min(MAX_TASK_CHUNKS, 1 << (share.bit_length() - 1))


class _SharedTree:
    """The fixed tree over `n` values that come in any order, from any thread.

    Whoever brings the second half of a node merges it, so that merges run beside one another.
    """

    def __init__(self, n: int) -> None:
        self.n = n
        self.total: Any = None
        self._lock = threading.Lock()
        # Nodes whose other half is still to come, by (level, place).
        self._halves: dict[tuple[int, int], Any] = {}

    def put(self, place: int, value: Any) -> None:
        """Value number `place`."""
        level = 0
        while 1 << level < self.n:
            other = place ^ 1
            # At the right edge a node may have no second half.
            if other << level < self.n:
                with self._lock:
                    half = self._halves.pop((level, other), None)
                    if half is None:
                        self._halves[level, place] = value
                        return
                value = half.merge(value) if other < place else value.merge(half)
            level, place = level + 1, place // 2
        self.total = value


class _Reading:
    """Reads chunks, the next one of a worker while it works on the last, where reading blocks.

    Reading that keeps a core busy, as from a file in the system's cache, loses by that: a worker
    reads for itself until it has spent more than `BLOCKED` of its time waiting for storage in
    several reads of some length.
    `blocks` says whether the pass before was like that, which a worker's first read of this one may
    show to be over; and `alone` that there are no threads to read.
    """

    def __init__(self, workers: int, *, blocks: bool = False, alone: bool = False) -> None:
        self.blocks, self._alone = blocks, alone
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="read-ahead")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def chunks(
        self, source: Source, numbers: Iterator[tuple[int, int]]
    ) -> Generator[tuple[int, int, list[Rows]], None, None]:
        """(task, chunk, [rows]) of each (task, chunk): to be popped, so that nothing else holds
        the rows.
        """
        profile = current()
        begin, waited, reads, long = time.perf_counter(), 0.0, 0, True
        at = next(numbers, None)
        pending: Future[Rows] | None = None
        while at is not None:
            if pending is None:
                wall, busy = time.perf_counter(), time.thread_time() if long else 0.0
                held = [source.read(at[1])]
                now = time.perf_counter()
                # A thread's own clock costs more than to read a chunk of a few rows.
                if long:
                    waited += now - wall - (time.thread_time() - busy)
                    reads += 1
                    if reads == 1:
                        self.blocks &= waited > STILL_BLOCKED * (now - wall)
                    elif reads >= SEVERAL:
                        self.blocks |= waited > BLOCKED * (now - begin)
                long = now - wall > LONG_READ
            else:
                held = [pending.result()]
            mark("read")
            following = pending = None
            ahead = self.blocks and not self._alone
            if ahead and (following := next(numbers, None)) is not None:
                pending = self._pool.submit(_read_for, profile, source, following[1])
            yield (*at, held)
            at = next(numbers, None) if pending is None else following


def _read_for(profile: Profile | None, source: Source, chunk: int) -> Rows:
    begin = time.perf_counter()
    rows = source.read(chunk)
    if profile is not None:
        profile.read_ahead(time.perf_counter() - begin)
    return rows


def fold_range(source: Source, work: Work, first: int, last: int) -> Any:
    """Fold an aligned range of chunks in this thread: one chunk worked on at a time."""
    numbers = ((0, i) for i in range(first, last))
    with _Reading(1) as reading:
        return fold_tree(work(i, held.pop()) for _, i, held in reading.chunks(source, numbers))


def _fold_shared(shared: tuple[Source, Work], first: int, last: int) -> Any:
    with one_blas_thread():
        return fold_range(*shared, first, last)
