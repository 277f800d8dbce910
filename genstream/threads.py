"""One BLAS thread, so that results do not depend on how many cores a matrix product finds."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

from threadpoolctl import ThreadpoolController


@functools.cache
def _controller() -> ThreadpoolController:
    return ThreadpoolController()


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Within it every BLAS call of this process runs on the thread that made it.

    Chunks are worked on in parallel instead: many small products on one core each beat one small
    product spread over all, and sums come out in the same order on every machine size.
    """
    with _controller().limit(limits=1, user_api="blas"):
        yield
