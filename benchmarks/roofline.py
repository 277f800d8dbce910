"""What this machine can do: matrix products, exponentials, memory and zarr.

    python -m benchmarks run roofline

Workers are threads with one BLAS thread each, as in a pass. The rates are the best of a few
repetitions, since a bound is what can be reached, not what is usual.
"""

from __future__ import annotations

import functools
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from benchmarks.measure import Benchmark, Options, Table, told

Array = NDArray[Any]
DTYPES = ("float64", "float32")
LARGE = 2000
# Rows of a block in products of the shapes of an E-step.
BLOCK = 1024
SHAPES = {
    "d = 6, K = 50": (50, 28),
    "d = 16, K = 16": (16, 153),
    "d = 64, K = 16": (16, 2145),
    "d = 64, K = 64": (64, 2145),
    "d = 32 diagonal, K = 64": (64, 65),
}
REPEATS = 5


@dataclass(frozen=True)
class Rates:
    """Operations a second of large products and exponentials a second, by type, and bytes a second
    of reading memory: all threads together.
    """

    gemm: dict[str, float]
    exp: dict[str, float]
    read: float


def once(work: Callable[[int], Any], threads: int) -> float:
    """Seconds in which every thread does `work(thread)`."""
    with threadpool_limits(1), ThreadPoolExecutor(threads) as pool:
        begin = time.perf_counter()
        list(pool.map(work, range(threads)))
        return time.perf_counter() - begin


def fastest(work: Callable[[int], Any], threads: int, repeats: int = REPEATS) -> float:
    """The least of such seconds, after a turn that does not count."""
    return min([once(work, threads) for _ in range(1 + repeats)][1:])


def forget(folder: Path) -> None:
    """Drop the pages of all files of a folder."""
    for each in folder.rglob("*"):
        if each.is_file():
            handle = os.open(each, os.O_RDONLY)
            try:
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(handle)


def gemm(m: int, inner: int, n: int, dtype: str, threads: int) -> float:
    """Operations a second of a product (m, inner) @ (inner, n) by each thread."""
    rng = np.random.default_rng(0)
    left = rng.normal(size=(m, inner)).astype(dtype)
    right = rng.normal(size=(inner, n)).astype(dtype)
    outs = [np.empty((m, n), dtype) for _ in range(threads)]
    times = max(1, int(2e8 / (2.0 * m * inner * n)))

    def work(thread: int) -> None:
        for _ in range(times):
            np.matmul(left, right, out=outs[thread])

    return 2.0 * m * inner * n * times * threads / fastest(work, threads)


def step_gemm(k: int, features: int, dtype: str, threads: int) -> float:
    """The same of the two products of an E-step: K x F by a block to score, and its transpose."""
    score = gemm(k, features, BLOCK, dtype, threads)
    gather = gemm(k, BLOCK, features, dtype, threads)
    return 2.0 / (1.0 / score + 1.0 / gather)


def exponentials(dtype: str, threads: int) -> float:
    """Exponentials a second of a block that is in the cache, by the faster of NumPy and the
    compiled softmax of the library.
    """
    from genstream.responsibility import soft

    logs = np.random.default_rng(0).normal(-5, 2, (50, 1024)).astype(dtype)
    copies = [logs.copy() for _ in range(threads)]
    outs = [logs.copy() for _ in range(threads)]

    def numpys(thread: int) -> None:
        for _ in range(10):
            np.exp(copies[thread], out=outs[thread])

    def ours(thread: int) -> None:
        for _ in range(10):
            soft(copies[thread].copy())

    least = min(fastest(numpys, threads), fastest(ours, threads))
    return 10 * logs.size * threads / least


def memory(threads: int, nbytes: int) -> tuple[float, float]:
    """Bytes a second of reading, and of copying (read and written), by all threads."""
    share = nbytes // threads // 8
    sources = [np.ones(share) for _ in range(threads)]
    targets = [np.empty(share) for _ in range(threads)]
    read = fastest(lambda i: sources[i] @ sources[i], threads, 3)
    copy = fastest(lambda i: np.copyto(targets[i], sources[i]), threads, 3)
    return share * 8 * threads / read, 2 * share * 8 * threads / copy


def write_dataset(folder: Path, x: Array, chunk_rows: int | None = None) -> Any:
    """A committed dataset of the rows, as ingest writes it, and its source."""
    from genstream.rows import Rows
    from genstream.schema import Schema
    from genstream.store import append_batch

    step = chunk_rows or 65_536
    pieces = (Rows.of(x[first : first + step]) for first in range(0, len(x), step))
    schema = Schema.real(x.shape[1])
    stored: Any = str(x.dtype)
    dataset, _ = append_batch(folder, "rows", pieces, lambda: schema, dtype=stored)
    return dataset.source()


def zarr_readers(
    folder: Path, source: Any, threads: int
) -> tuple[Callable[[int], None], Callable[[int], None]]:
    """What each of `threads` does to read a dataset together: by zarr-python, chunk by chunk, and
    by the library's own reader.
    """
    import zarr

    arrays: list[Any] = [
        zarr.open_array(str(place.parent), mode="r", zarr_format=3)
        for place in sorted(folder.glob("**/values/zarr.json"))
    ]
    spans = [
        (array, first, first + array.chunks[0])
        for array in arrays
        for first in range(0, array.shape[0], array.chunks[0])
    ]

    def plain(thread: int) -> None:
        for array, first, last in spans[thread::threads]:
            array[first:last]

    def ours(thread: int) -> None:
        for i in range(thread, len(source.chunk_rows), threads):
            source.read(i)

    return plain, ours


@functools.cache
def _rates(threads: int, large: int, nbytes: int) -> Rates:
    told("measuring the rates of this machine")
    return Rates(
        {dtype: gemm(large, large, large, dtype, threads) for dtype in DTYPES},
        {dtype: exponentials(dtype, threads) for dtype in DTYPES},
        memory(threads, nbytes)[0],
    )


def rates(options: Options) -> Rates:
    """The rates that bounds are made of, measured once a run."""
    return _rates(options.threads, 500 if options.quick else LARGE, 1 << 28)


def measure(options: Options) -> Table:
    """Every rate with one worker and with all of them."""
    told("roofline")
    large = 500 if options.quick else LARGE
    counts = sorted({1, options.threads})
    found: list[dict[str, Any]] = []

    def row(what: str, unit: str, rate: Callable[[int], float]) -> None:
        told(f"  {what}")
        cells = {f"{n} thread{'s' * (n > 1)}": rate(n) / 1e9 for n in counts}
        found.append({"what": what, **cells, "unit": unit})

    for dtype in DTYPES:
        cube = functools.partial(gemm, large, large, large, dtype)
        row(f"GEMM {large}^3 {dtype}", "GF/s", cube)
        for name, (k, features) in SHAPES.items():
            shaped = functools.partial(step_gemm, k, features, dtype)
            row(f"GEMM of an E-step, {name}, {dtype}", "GF/s", shaped)
        row(f"exp {dtype}", "G/s", functools.partial(exponentials, dtype))
    nbytes = 1 << (25 if options.quick else 29)
    row("memory, read", "GB/s", lambda n: memory(n, nbytes)[0])
    row("memory, copied (read and written)", "GB/s", lambda n: memory(n, nbytes)[1])
    with tempfile.TemporaryDirectory() as top:
        folder = Path(top) / "dataset"
        x = np.random.default_rng(0).normal(size=(nbytes // 128, 32)).astype(np.float32)
        source = write_dataset(folder, x)
        for number, who in enumerate(("zarr-python", "genstream")):

            def read(n: int, which: int = number) -> float:
                return x.nbytes / fastest(zarr_readers(folder, source, n)[which], n, 3)

            row(f"zarr, read by {who}", "GB/s", read)
    notes = [
        "A worker is a thread with one BLAS thread.",
        f"Products of an E-step have blocks of {BLOCK} rows.",
        "zarr: float32 chunks of about 8 MB with a checksum each, files in the page cache.",
    ]
    return Table("roofline", "What this machine can do", found, notes)


BENCHMARKS = {"roofline": Benchmark("rates of this machine: GEMM, exp, memory, zarr", measure)}
