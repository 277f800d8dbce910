"""Threads that work beside one another, each with one BLAS thread, so that results do not depend on
how many cores a matrix product finds. All of them take part in the profile of the thread that they
work for, if there is one.
"""

from __future__ import annotations

import functools
import importlib
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

from threadpoolctl import ThreadpoolController

from genstream.profile import Profile, current

T = TypeVar("T")

_lock = threading.Lock()
# Who is within `one_blas_thread`, and the limits in force while there is anyone.
_inside: list[object] = []
_limits: list[Any] = []


@functools.cache
def _controller() -> ThreadpoolController:
    # SciPy may have a BLAS of its own, which compiled loops call.
    importlib.import_module("scipy.linalg.cython_blas")
    return ThreadpoolController()


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Within it every BLAS call of this process runs on the thread that made it.

    Chunks are worked on in parallel instead: many small products on one core each beat one small
    product spread over all, and sums come out in the same order on every machine size. Several
    threads may be within at once: the limit is the process's, and the last to leave lifts it.
    """
    mine = object()
    with _lock:
        if not _inside:
            _limits.append(_controller().limit(limits=1, user_api="blas"))
        _inside.append(mine)
    try:
        yield
    finally:
        with _lock:
            _inside.remove(mine)
            if not _inside:
                _limits.pop().restore_original_limits()


def beside(pool: ThreadPoolExecutor, workers: int, tasks: Iterable[Callable[[], T]]) -> Iterator[T]:
    """Results in order, with no more tasks begun than the workers and one each in waiting."""
    waiting: deque[Future[T]] = deque()
    profile = current()
    try:
        for task in tasks:
            waiting.append(pool.submit(_taking_part, profile, task))
            if len(waiting) >= 2 * workers:
                yield _awaited(profile, waiting.popleft(), workers)
        while waiting:
            yield _awaited(profile, waiting.popleft(), workers)
    finally:
        for future in waiting:
            future.cancel()


def abreast_in(
    pool: ThreadPoolExecutor, n_workers: int, work: Callable[[int], T], n: int
) -> list[T]:
    """`work(i)` of each i below n, by this thread and those of the pool."""
    values: dict[int, T] = {}
    numbers = iter(range(n))
    lock = threading.Lock()

    def some() -> None:
        while True:
            with lock:
                i = next(numbers, None)
            if i is None:
                return
            values[i] = work(i)

    profile = current()
    futures = [pool.submit(_taking_part, profile, some) for _ in range(min(n_workers, n) - 1)]
    some()
    for future in futures:
        _awaited(profile, future, n_workers)
    return [values[i] for i in range(n)]


def abreast(worker: Callable[[], None], n_workers: int, stop: threading.Event) -> None:
    """Run a worker in so many threads. Whatever is raised, here or there, stops all of them at
    their next chunk, and is raised when they have ended.
    """
    profile = current()

    def run() -> None:
        try:
            worker()
        except BaseException:
            stop.set()
            raise

    with ThreadPoolExecutor(n_workers) as pool:
        try:
            for future in [pool.submit(_taking_part, profile, run) for _ in range(n_workers)]:
                _awaited(profile, future, n_workers)
        finally:
            stop.set()


def _taking_part(profile: Profile | None, work: Callable[[], T]) -> T:
    """What `work` gives, on a thread that takes part in a profile if there is one."""
    if profile is None:
        return work()
    with profile.joined():
        return work()


def _awaited(profile: Profile | None, future: Future[T], workers: int) -> T:
    """The result of a future, while which this thread does nothing."""
    if profile is None:
        return future.result()
    with profile.handed_over(workers):
        return future.result()
