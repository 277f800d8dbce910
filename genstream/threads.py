"""One BLAS thread, so that results do not depend on how many cores a matrix product finds."""

from __future__ import annotations

import functools
import importlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from threadpoolctl import ThreadpoolController

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
