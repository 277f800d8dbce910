"""What a fit will take, before it begins: rows, chunks, passes, memory, disk."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from flows.config import Config
from flows.terminal import bytes_text
from genstream.errors import ConfigError

if TYPE_CHECKING:
    from genstream.sources import Source
    from genstream.story import Story

# Measured resident memory of a process that has imported what a fit imports, with slack for what
# the allocator of each thread keeps back.
BASE_NBYTES = 190 << 20
PREFECT_NBYTES = 80 << 20
REPORT_NBYTES = 60 << 20
WORKER_NBYTES = 32 << 20
# Decoded chunks a worker holds at once: as read, as checked, and a part of it on the way.
CHUNKS_HELD = 3


@dataclass(frozen=True)
class Plan:
    """The projected cost of a fit.

    `rows` and `disk` are estimates where the data are not ingested yet (`exact` is false).
    `least_memory` is what one worker needs. Sizes are in bytes; `passes` is the most there can be.
    """

    rows: int
    columns: int
    chunks: int
    chunk_nbytes: int
    passes: int
    pass_nbytes: int
    workers: int
    memory: int
    least_memory: int
    memory_limit: int | None
    disk: int
    disk_free: int
    exact: bool

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def to_text(self) -> str:
        """One line a quantity."""
        about = "" if self.exact else "about "
        limit = "no limit set" if self.memory_limit is None else bytes_text(self.memory_limit)
        lines = [
            ("rows", f"{about}{self.rows:,} x {self.columns} columns"),
            ("chunks", f"{about}{self.chunks:,} of at most {bytes_text(self.chunk_nbytes)}"),
            ("passes", f"at most {self.passes}, {bytes_text(self.pass_nbytes)} each"),
            ("memory", f"{bytes_text(self.memory)} at peak, {self.workers} workers ({limit})"),
            ("disk", f"{about}{bytes_text(self.disk)} ({bytes_text(self.disk_free)} free)"),
        ]
        return "\n".join(f"{name:<8} {value}" for name, value in lines)

    def refuse_if_too_small(self) -> None:
        """Raise ConfigError where the memory limit or the disk does not suffice."""
        if self.memory_limit is not None and self.memory > self.memory_limit:
            advice = f"at least compute.memory_limit={math.ceil(self.memory / 2**20)}MiB is needed"
            if self.least_memory < self.memory:
                advice += f", or {math.ceil(self.least_memory / 2**20)}MiB with compute.workers=1"
            raise ConfigError(
                f"compute.memory_limit of {bytes_text(self.memory_limit)} is too small for a fit "
                f"that takes {bytes_text(self.memory)}: {advice}"
            )
        if self.disk > self.disk_free:
            raise ConfigError(
                f"data.dataset needs about {bytes_text(self.disk)} of disk and there are "
                f"{bytes_text(self.disk_free)} free: make room, or name another place"
            )


def project_memory(
    config: Config, story: Story, chunk_nbytes: int, n_chunks: int, rows: int
) -> int:
    """Peak resident memory of the process that fits, in bytes.

    It is the sum of what is imported; for each worker the chunks in its hands, the
    responsibilities of an evaluation and its statistics; the row sample with its temporaries, in
    which the start is sought; and the merged statistics along the tree.
    """
    from genstream.evaluate import MAX_RESPONSIBILITIES
    from genstream.start import SAMPLE_BYTES

    workers = n_workers(config)
    k, d = story.n_components, story.schema.n_features
    chunk_rows = max(1, chunk_nbytes // (d * 4))
    params = 8 * (story.n_parameters + k * d)
    responsibilities = 8 * min(MAX_RESPONSIBILITIES, chunk_rows * k)
    a_worker = WORKER_NBYTES + CHUNKS_HELD * chunk_nbytes + 3 * responsibilities + 2 * params
    sample = min(rows, config.fit.sample_rows, max(1000, SAMPLE_BYTES // (9 * d)))
    start = sample * (3 * 9 * d + 4 * 8 * k)
    tree = params * (2 + max(n_chunks, 1).bit_length())
    total = BASE_NBYTES + workers * a_worker + start + tree
    if config.report:
        total += REPORT_NBYTES
    if config.orchestrate != "none":
        total += PREFECT_NBYTES
    return total


def n_workers(config: Config) -> int:
    """Threads of this process that hold chunks."""
    if config.compute.scheduler == "synchronous":
        return 1
    if config.compute.scheduler != "threads":
        return 1  # a cluster's workers have memory of their own
    return config.compute.workers or os.cpu_count() or 1
