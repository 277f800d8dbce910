"""Peak resident memory of a fit as the data grow, under one limit.

    python -m benchmarks.memory [--gigabytes 1 4 12]
    python -m benchmarks run memory [--whole]           up to 40 GiB

Each size is drawn once, onto the disk, from the story of `configs/bigger-than-memory.yaml`, and
fitted in a process of its own; the peak is that of the process, as the operating system counts it.
The rows are removed before the next size is drawn, so that the disk needs room for one. From
`LARGE` GiB on a fit is stopped after two batch passes, which is as much as memory needs to show.
"""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.kills import run
from benchmarks.measure import Bar, Benchmark, Options, Table, amount, parser, say, told

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "bigger-than-memory.yaml"
SIZES = (1.0, 4.0, 12.0)
LARGE = 20.0
WHOLE = (1.0, 4.0, 12.0, 40.0)
QUICK = (0.02, 0.05)


def fitted(gigabytes: float) -> dict[str, Any]:
    """Draw, fit and forget one size: a row of the table."""
    with tempfile.TemporaryDirectory() as folder:
        free = shutil.disk_usage(folder).free / 2**30
        if free < 1.1 * gigabytes + 1:
            return {"data": f"{gigabytes:g} GiB", "peak, MiB": f"no room: {free:.0f} GiB are free"}
        arguments = [str(CONFIG), f"data.source.gigabytes={gigabytes:g}"]
        if gigabytes >= LARGE:
            arguments.append("fit.max_steps=2")
        arguments.append("orchestrate=none")
        planned = run(Path(folder), "plan", *arguments)
        stages = run(Path(folder), "fit", *arguments)["stages"]
    fit, recovered = stages["fit"], stages["evaluate"]["recovery"]
    return {
        "data": f"{gigabytes:g} GiB",
        "limit, MiB": round(planned["memory_limit"] / 2**20),
        "planned, MiB": round(planned["memory"] / 2**20),
        "peak, MiB": round(fit["peak_rss"] / 2**20),
        "passes": round(fit["passes"], 1),
        "read, GiB": round(fit["bytes_read"] / 2**30, 1),
        "rows/s": round(fit["rows_per_s"]),
        "means off by at most, sd": float(recovered["mean"]),
    }


def wrong(error: SystemExit) -> str:
    """What an error says in a line: its first, or the one that a traceback ends in."""
    said = re.sub(r"Traceback \(most recent call last\):.*\n", "", str(error), flags=re.DOTALL)
    return said.splitlines()[0]


def measure(sizes: Sequence[float]) -> Table:
    """Fit every size and hold the peaks against the limit and one another. A size that fails has a
    row that says why, and counts against the sizes that were to be fitted.
    """
    rows: list[dict[str, Any]] = []
    measured: list[float] = []
    failed = 0
    for gigabytes in sizes:
        told(f"memory: {gigabytes:g} GiB")
        try:
            rows.append(fitted(gigabytes))
        except SystemExit as error:
            told(f"  {error}")
            rows.append({"data": f"{gigabytes:g} GiB", "peak, MiB": f"failed: {wrong(error)}"})
            failed += 1
        if isinstance(rows[-1]["peak, MiB"], int):
            measured.append(gigabytes)
    peaks = [row["peak, MiB"] for row in rows if isinstance(row["peak, MiB"], int)]
    bars = []
    if peaks:
        span = f"{measured[0]:g} to {measured[-1]:g} GiB of data"
        limit = max(row["limit, MiB"] for row in rows if "limit, MiB" in row)
        bars = [
            Bar(f"peak memory, {span}, MiB", limit, max(peaks), at_most=True),
            Bar(f"peak memory, {span}: largest over smallest", 1.25, max(peaks) / min(peaks), True),
        ]
    if failed:
        bars.append(Bar("peak memory: sizes that failed", 0, failed, at_most=True))
    return Table("memory", "Peak memory of a fit under a limit", rows, [], bars, bool(failed))


def _of(options: Options) -> Table:
    return measure(QUICK if options.quick else WHOLE if options.whole else SIZES)


BENCHMARKS = {"memory": Benchmark("peak memory of a fit as the data grow", _of)}


def main() -> None:
    """Fit the sizes asked for."""
    options = parser(__doc__)
    options.add_argument("--gigabytes", type=amount, nargs="+", default=list(SIZES))
    table = measure(options.parse_args().gigabytes)
    say(table)
    sys.exit(1 if table.failed else 0)


if __name__ == "__main__":
    main()
