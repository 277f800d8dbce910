"""One pass over all chunks of a source, on threads, on Dask or on a Dask cluster.

Chunks are folded in a fixed binary tree: the node of 2^j chunks beginning at a multiple of 2^j
merges its two halves. A task folds one aligned range of chunks and tasks merge along the same tree,
so every scheduler, worker count and task size adds the same numbers in the same order, and gives
the same bits.
"""

from __future__ import annotations

import functools
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from genstream.errors import ComputeError, ConfigError, GenstreamError
from genstream.rows import Rows
from genstream.sources import NumpySource, Source, Split
from genstream.threads import one_blas_thread

T = TypeVar("T")
Work = Callable[[int, Rows], Any]
Progress = Callable[[int, int], None]

# A task of this many chunks costs the scheduler little; fewer where there are few chunks.
MAX_TASK_CHUNKS = 64
# Tasks a worker should have at least, so that none waits long for the others at the end.
TASKS_PER_WORKER = 4
EMPTY = "there is no chunk to fold: the source is empty"


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
        if workers is not None and workers < 1:
            raise ConfigError(f"workers is {workers}: at least 1 is needed")
        if task_chunks is not None and (task_chunks < 1 or task_chunks & (task_chunks - 1)):
            raise ConfigError(f"task_chunks is {task_chunks}: it must be a power of two")
        self.source = source
        self.scheduler = scheduler
        self.workers = 1 if scheduler == "synchronous" else workers or os.cpu_count() or 1
        self.task_chunks = task_chunks or _task_chunks(len(source.chunk_rows), self.workers)
        self.on_progress = on_progress
        self.n_rows = sum(source.chunk_rows)

    @property
    def n_chunks(self) -> int:
        """How many chunks there are."""
        return len(self.source.chunk_rows)

    def read(self, chunk: int) -> Rows:
        """One chunk, read in this thread."""
        return self.source.read(chunk)

    def fold(self, work: Work) -> Any:
        """`work(chunk, rows)` of every chunk, merged in the fixed tree.

        `work` returns something with `merge`; on a cluster it and its results are sent between
        processes. Raises what `work` raises, and ComputeError where a cluster lost the pass.
        """
        n_chunks = self.n_chunks
        if not n_chunks:
            raise ComputeError(EMPTY)
        ranges = [
            (first, min(first + self.task_chunks, n_chunks))
            for first in range(0, n_chunks, self.task_chunks)
        ]
        if self.scheduler == "distributed" or "://" in self.scheduler:
            value = self._on_cluster(self._graph(work, ranges, _fold_shared))
            if self.on_progress is not None:
                self.on_progress(self.n_rows, self.n_rows)
            return value
        report = self._reporter(ranges)
        if _in_memory(self.source):
            return self._fold_pool(work, ranges, report)
        return self._fold_dask(work, ranges, report)

    def fold_tasks(self, work: Work, ranges: Sequence[tuple[int, int]]) -> list[Any]:
        """`work(chunk, rows)` of the chunks of each range, folded apart from one another.

        A range (first, last + 1) begins at a multiple of a power of two and is at most that long,
        so that what comes of it is a node of the tree of `fold`. Raises as `fold` does.
        """
        spans = list(ranges)
        if self.scheduler == "distributed" or "://" in self.scheduler:
            from dask.delayed import delayed

            shared = delayed((self.source, work), traverse=False)
            task = delayed(_fold_shared, pure=False)
            found = self._on_cluster(delayed([task(shared, *span) for span in spans]))
            n_rows = sum(sum(self.source.chunk_rows[first:last]) for first, last in spans)
            if self.on_progress is not None:
                self.on_progress(n_rows, n_rows)
            return list(found)
        report = self._reporter(spans)
        with one_blas_thread(), ThreadPoolExecutor(self.workers) as pool:
            values = _windowed(pool, self.workers, self._tasks(work, spans))
            return list(_reported(values, spans, report))

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

    def _fold_pool(
        self, work: Work, ranges: list[tuple[int, int]], report: Callable[[tuple[int, int]], None]
    ) -> Any:
        """Rows in memory need no task graph: a thread a core, merged as they come in order."""
        with one_blas_thread(), ThreadPoolExecutor(self.workers) as pool:
            return fold_tree(
                _reported(_windowed(pool, self.workers, self._tasks(work, ranges)), ranges, report)
            )

    def _tasks(self, work: Work, ranges: list[tuple[int, int]]) -> Iterator[Callable[[], Any]]:
        for first, last in ranges:
            yield functools.partial(fold_range, self.source, work, first, last)

    def _graph(self, work: Work, ranges: list[tuple[int, int]], leaf: Callable[..., Any]) -> Any:
        """The pass as one delayed value: a task a range, merged in the fixed tree."""
        from dask.delayed import delayed

        # One node holds source and work, so that parameters are shipped once, not once a task.
        shared = delayed((self.source, work), traverse=False)
        task, merge = delayed(leaf, pure=False), delayed(_merge, pure=False)
        level = [task(shared, first, last) for first, last in ranges]
        while len(level) > 1:
            pairs = [level[i : i + 2] for i in range(0, len(level), 2)]
            level = [merge(*pair) if len(pair) == 2 else pair[0] for pair in pairs]
        return level[0]

    def _fold_dask(
        self, work: Work, ranges: list[tuple[int, int]], report: Callable[[tuple[int, int]], None]
    ) -> Any:
        def leaf(shared: tuple[Source, Work], first: int, last: int) -> Any:
            value = fold_range(*shared, first, last)
            report((first, last))
            return value

        graph = self._graph(work, ranges, leaf)
        with one_blas_thread():
            if self.scheduler == "synchronous":
                return graph.compute(scheduler="synchronous")
            with ThreadPoolExecutor(self.workers) as pool:
                return graph.compute(scheduler="threads", pool=pool)

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
        try:
            return client.compute(graph, optimize_graph=False).result()
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

    def map(self, work: Callable[[int, Rows], T]) -> Iterator[T]:
        """`work(chunk, rows)` of every chunk, in the order of chunks, a few of them ahead."""
        tasks = (
            lambda i=i: work(i, self.source.read(i)) for i in range(len(self.source.chunk_rows))
        )
        with one_blas_thread(), ThreadPoolExecutor(self.workers) as pool:
            done = 0
            for i, value in enumerate(_windowed(pool, self.workers, tasks)):
                yield value
                done += self.source.chunk_rows[i]
                if self.on_progress is not None:
                    self.on_progress(done, self.n_rows)


def _in_memory(source: Source) -> bool:
    inner = source.source if isinstance(source, Split) else source
    return isinstance(inner, NumpySource)


def _task_chunks(n_chunks: int, workers: int) -> int:
    """The largest power of two that leaves every worker some tasks."""
    share = max(1, n_chunks // (workers * TASKS_PER_WORKER))
    return min(MAX_TASK_CHUNKS, 1 << (share.bit_length() - 1))


def _windowed(
    pool: ThreadPoolExecutor, workers: int, tasks: Iterable[Callable[[], T]]
) -> Iterator[T]:
    """Results in order, with no more tasks begun than the workers and one each in waiting."""
    waiting: deque[Future[T]] = deque()
    try:
        for task in tasks:
            waiting.append(pool.submit(task))
            if len(waiting) >= 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def _reported(
    values: Iterator[T],
    ranges: list[tuple[int, int]],
    report: Callable[[tuple[int, int]], None],
) -> Iterator[T]:
    for value, span in zip(values, ranges, strict=True):
        report(span)
        yield value


def fold_tree(values: Iterable[Any]) -> Any:
    """Merge values in order along the fixed binary tree, holding log2(n) of them."""
    stack: list[tuple[int, Any]] = []
    for value in values:
        size = 1
        while stack and stack[-1][0] == size:
            value = stack.pop()[1].merge(value)
            size *= 2
        stack.append((size, value))
    if not stack:
        raise ComputeError(EMPTY)
    _, total = stack.pop()
    while stack:
        total = stack.pop()[1].merge(total)
    return total


def fold_range(source: Source, work: Work, first: int, last: int) -> Any:
    """Fold an aligned range of chunks in this process: one chunk in memory at a time."""
    return fold_tree(work(i, source.read(i)) for i in range(first, last))


def _fold_shared(shared: tuple[Source, Work], first: int, last: int) -> Any:
    with one_blas_thread():
        return fold_range(*shared, first, last)


def _merge(left: Any, right: Any) -> Any:
    return left.merge(right)
