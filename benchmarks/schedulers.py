"""The same fit on every scheduler: the digests of the parameters must be equal.

    python -m benchmarks.schedulers

Flights (mixed columns with gaps) and household power (full covariance), each from a zarr array cut
into many chunks, on the synchronous scheduler, on 1 and 2 threads, and on a Dask cluster of two
processes. Exits with 1 where a digest differs.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import distributed
import numpy as np
import zarr

from benchmarks.data import path
from benchmarks.flights import flights
from genstream.learn import BatchEM, fit
from genstream.passes import Passes
from genstream.schema import Schema
from genstream.sources import ZarrSource
from genstream.start import warm_start
from genstream.stories import mixture


def digest(array: Path, schema: Schema, n_components: int, **passes: Any) -> tuple[str, float]:
    """Digest of the parameters of a fit, and the seconds it took."""
    source = ZarrSource(str(array), schema)
    through = Passes(source, **passes)
    begin = time.perf_counter()
    story, state = warm_start(mixture(schema, n_components), through, n_init=2, sample_rows=20_000)
    state = fit(story, BatchEM(10, 0.0), through, state)
    return state.params.digest(), time.perf_counter() - begin


def main() -> None:
    """Fit both data sets on every scheduler and compare."""
    cases: dict[str, tuple[Any, Schema, int]] = {}
    values, schema = flights()
    cases["flights"] = (values, schema, 8)
    power = np.load(path("power/train.npy"))[:400_000]
    cases["power"] = (power, Schema.real(power.shape[1]), 20)
    equal = True
    ways: dict[str, dict[str, Any]] = {
        "synchronous": {"scheduler": "synchronous"},
        "threads, 1": {"workers": 1},
        "threads, 2": {"workers": 2},
        "cluster, 2 processes": {"scheduler": "distributed"},
    }
    with (
        tempfile.TemporaryDirectory() as folder,
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address="127.0.0.1:0", host="127.0.0.1"
        ) as cluster,
        distributed.Client(cluster),
    ):
        for name, (values, schema, n_components) in cases.items():
            array = Path(folder) / f"{name}.zarr"
            zarr.create_array(str(array), data=values, chunks=(5000, values.shape[1]))
            digests = set()
            for label, passes in ways.items():
                found, seconds = digest(array, schema, n_components, **passes)
                digests.add(found)
                print(f"{name:8} {label:22} {found[:32]} {seconds:6.1f} s")
            equal &= len(digests) == 1
    print("all digests are equal" if equal else "DIGESTS DIFFER")
    sys.exit(0 if equal else 1)


if __name__ == "__main__":
    main()
