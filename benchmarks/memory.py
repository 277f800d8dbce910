"""Peak resident memory of a fit as the data grow, under one limit.

    python -m benchmarks.memory [--gigabytes 1 4 12]

Each size is drawn from the story of `configs/bigger-than-memory.yaml` and fitted in a process of
its own; the peak is that of the process, as the operating system counts it.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from benchmarks.kills import run

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "bigger-than-memory.yaml"


def main() -> None:
    """Fit every size and print what it took."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    options.add_argument("--gigabytes", type=float, nargs="+", default=[1.0, 4.0, 12.0])
    chosen = options.parse_args()
    print("| data | limit | planned | peak | passes | read | rows/s | means off by at most |")
    print("|---|---|---|---|---|---|---|---|")
    for gigabytes in chosen.gigabytes:
        with tempfile.TemporaryDirectory() as folder:
            arguments = [str(CONFIG), f"data.source.gigabytes={gigabytes:g}"]
            planned = run(Path(folder), "plan", *arguments)
            stages = run(Path(folder), "fit", *arguments, "orchestrate=none")["stages"]
            fit, recovered = stages["fit"], stages["evaluate"]["recovery"]
            print(
                f"| {gigabytes:g} GiB | {planned['memory_limit'] / 2**20:.0f} MiB "
                f"| {planned['memory'] / 2**20:.0f} MiB "
                f"| {fit['peak_rss'] / 2**20:.0f} MiB | {fit['passes']:g} "
                f"| {fit['bytes_read'] / 2**30:.1f} GiB | {fit['rows_per_s']:,.0f} "
                f"| {recovered['mean']:.2g} sd |",
                flush=True,
            )


if __name__ == "__main__":
    main()
