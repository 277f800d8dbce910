"""What a fit will take, before it begins: rows, chunks, passes, memory, disk."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flows.config import MAX_CANDIDATES, Config, Drawn, in_place
from flows.data import at_hand, columns_of, expand, open_data
from flows.model import check_components, make_story
from flows.terminal import bytes_text
from genstream.errors import ConfigError, DataError, StorageError
from genstream.manifests import is_stored
from genstream.schema import Column, Schema

if TYPE_CHECKING:
    from genstream.story import Story

# Measured resident memory of a process that has imported what a fit imports, with slack for what
# the allocator of each thread keeps back; and what compiled loops take besides, the first time when
# they are compiled, what an orchestrated run does and a report.
BASE_NBYTES = 210 << 20
COMPILED_NBYTES = 200 << 20
PREFECT_NBYTES = 150 << 20
REPORT_NBYTES = 60 << 20
WORKER_NBYTES = 32 << 20
# Decoded chunks a worker holds at once: the one it works on, and the next one, read ahead where
# storage is slow: as read, as checked, and a part of it on the way.
CHUNKS_HELD = 4
# Chunks that online EM holds: a buffer as read, the same put together, and a chunk on the way.
BUFFER_CHUNKS = 2 * 4 + 1
# Statistics beside those of a pass: three that a leap needs, and what it makes of them.
STATS_HELD = 6
# As many times the statistics are parameters, what is prepared of them for a pass by each worker,
# lists of components, and what acceleration keeps, at the end of a start.
START_HELD = 50
# Statistics of all tasks that incremental EM keeps; less under a small memory limit.
MEMO_NBYTES = 256 << 20


@dataclass(frozen=True)
class Plan:
    """The projected cost of a fit.

    `rows` and `disk` are estimates where the data are not ingested yet (`exact` is false).
    `least_memory` is what one worker needs, `place` where most is written. Sizes are in bytes;
    `passes` is the most there can be. A sweep is of several `candidates`, and `groups` are those
    of them that share passes: as many together as fit the memory.
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
    place: str
    candidates: int = 1
    groups: tuple[int, ...] = (1,)

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
        if self.candidates > 1:
            together = " + ".join(map(str, self.groups))
            lines.insert(2, ("sweep", f"{self.candidates} candidates, {together} in shared passes"))
        return "\n".join(f"{name:<8} {value}" for name, value in lines)

    def refuse_if_too_small(self) -> None:
        """Raise ConfigError where the memory limit does not suffice, StorageError for the disk."""
        if self.memory_limit is not None and self.memory > self.memory_limit:
            advice = f"at least compute.memory_limit={math.ceil(self.memory / 2**20)}MiB is needed"
            if self.least_memory < self.memory:
                advice += f", or {math.ceil(self.least_memory / 2**20)}MiB with compute.workers=1"
            raise ConfigError(
                f"compute.memory_limit of {bytes_text(self.memory_limit)} is too small for a fit "
                f"that takes {bytes_text(self.memory)}: {advice}"
            )
        if self.disk > self.disk_free:
            raise StorageError(
                f"{self.place}: takes about {bytes_text(self.disk)} of disk, and there are "
                f"{bytes_text(self.disk_free)} free: make room, or name another place"
            )


@dataclass(frozen=True)
class Extent:
    """How much data there is; `to_store` are the bytes that an ingest will write."""

    schema: Schema
    rows: int
    chunks: int
    chunk_nbytes: int
    itemsize: int
    to_store: int
    exact: bool


def project_memory(config: Config, stories: Sequence[Story], extent: Extent) -> int:
    """Peak resident memory of the process that fits some stories in shared passes, in bytes.

    It is what is imported, and the larger of two: the passes, in which each worker has chunks and
    the statistics of all stories in its hands, beside those merged along the tree; and the start,
    which takes the row sample with its temporaries, of as many stories as start side by side.
    """
    from genstream.compiled import compiled_available
    from genstream.responsibility import MANY
    from genstream.start import LANE, SAMPLE_BYTES, SAMPLE_ROWS_EACH

    workers = n_workers(config)
    d = stories[0].schema.n_features
    params = sum(map(statistics_nbytes, stories))
    a_worker = WORKER_NBYTES + CHUNKS_HELD * extent.chunk_nbytes + 2 * params
    complete = config.data.missing == "forbid"
    a_worker += max(products_nbytes(story, complete=complete) for story in stories)
    side_by_side = min(workers, len(stories))

    def start_of(story: Story) -> int:
        """Of rows by components there are matrices only where components are few."""
        many = story.n_components >= MANY
        rows = max(config.fit.sample_rows, SAMPLE_ROWS_EACH * story.n_components * many)
        rows = min(extent.rows, rows, max(1000, SAMPLE_BYTES // (9 * d)))
        scores = 4 * LANE if many else 3 * rows * story.n_components
        return rows * 3 * 9 * d + 8 * scores + START_HELD * statistics_nbytes(story)

    start = sum(sorted(map(start_of, stories), reverse=True)[:side_by_side])
    tree = params * (2 + extent.chunks.bit_length() + STATS_HELD)
    if config.fit.method == "incremental":
        tree += len(stories) * memo_nbytes(config)
    fit = workers * a_worker + tree
    if n_online(config, stories, extent.rows):
        # The chunks of a buffer are read once, and put together by each story for itself.
        a_buffer = side_by_side * (WORKER_NBYTES + BUFFER_CHUNKS * extent.chunk_nbytes)
        fit = max(fit, a_buffer + tree)
    total = BASE_NBYTES + max(fit, start)
    if compiled_available():
        total += COMPILED_NBYTES
    if config.report:
        total += REPORT_NBYTES
    if config.orchestrate != "none":
        total += PREFECT_NBYTES
    return total


def grouped(
    candidates: Sequence[tuple[Config, Story]], extent: Extent, limit: int | None
) -> list[int]:
    """How many candidates of a sweep share passes, group after group in their order.

    A group is as large as the memory limit allows; a candidate that exceeds it by itself is a
    group of its own.
    """
    sizes: list[int] = []
    first = 0
    for i in range(len(candidates)):
        together = candidates[first : i + 1]
        if i > first and limit is not None and _memory_of(together, extent) > limit:
            sizes.append(i - first)
            first = i
    return [*sizes, len(candidates) - first]


def _memory_of(candidates: Sequence[tuple[Config, Story]], extent: Extent) -> int:
    """Projected memory of a group: that of its most demanding configuration, for all stories."""
    stories = [story for _, story in candidates]
    ways = {(c.fit.method, c.fit.sample_rows, c.fit.batch_rows): c for c, _ in candidates}
    return max(project_memory(config, stories, extent) for config in ways.values())


@functools.lru_cache(MAX_CANDIDATES)  # asked again and again while groups are made
def statistics_nbytes(story: Story) -> int:
    """Bytes of the statistics of one chunk, which parameters do not exceed."""
    return sum(np.asarray(value).nbytes for _, _, value in _of_nothing(story).leaves())


def _of_nothing(story: Story) -> Any:
    """The statistics of no rows."""
    from genstream.rows import Rows

    return story.e_step(story.vague(), Rows(np.empty((0, story.schema.n_features))))


@functools.lru_cache(MAX_CANDIDATES)
def products_nbytes(story: Story, *, complete: bool = False) -> int:
    """Bytes of the products of columns in a block of rows, where these are too many for the cache.

    A covariance matrix (d, d) has d (d + 1) / 2 of them a row, but under few components only these
    times d; components that need another arithmetic than float32 have them in float64 besides. Of
    `complete` rows one that all components share needs none.
    """
    from genstream.families.blocks import MIN_BLOCK
    from genstream.families.gaussian_walk import block_width

    numbers = 0
    for _, names, value in _of_nothing(story).leaves():
        tied = "component" not in names
        if names and names[-1].endswith("feature_other") and not (complete and tied):
            # Components that need float64 in a story of float32 may be all.
            width = block_width(story.n_components, value.shape[-1], tied, 8, complete)
            numbers = max(numbers, MIN_BLOCK * width)
    return numbers * (8 if story.dtype == "float64" else 4 + 8)


def n_online(config: Config, stories: Sequence[Story], rows: int) -> int:
    """Passes of online EM in fits of so many rows, by the one of some stories that takes most."""
    from genstream.start import ONLINE_BATCHES

    options = config.fit
    large = rows >= ONLINE_BATCHES * options.batch_rows
    by_itself = options.method == "auto" and large
    takes_part = options.method == "online" or (
        by_itself and not all(story.single_pass for story in stories)
    )
    return options.passes if takes_part else 0


def memo_nbytes(config: Config) -> int:
    """Bytes that the statistics of all tasks may take in incremental EM."""
    limit = config.compute.memory_limit
    return MEMO_NBYTES if limit is None else min(MEMO_NBYTES, limit // 4)


def n_workers(config: Config) -> int:
    """Threads of this process that hold chunks."""
    if config.compute.scheduler == "synchronous":
        return 1
    if config.compute.scheduler != "threads":
        return 1  # a cluster's workers have memory of their own
    return config.compute.workers or os.cpu_count() or 1


def make_plan(config: Config) -> Plan:
    """The plan of a configuration; reads headers and metadata only.

    Raises DataError where the data are not there or lack a column, ConfigError where they do not
    bear a model.
    """
    extent = _extent(config)
    # Of a dataset there may be other rows once it is brought up to date.
    rows = extent.rows if config.dataset is None else None
    candidates = planned_candidates(config, extent.schema, rows)
    sizes = grouped(candidates, extent, config.compute.memory_limit)
    ends = np.cumsum(sizes)
    groups = [candidates[end - size : end] for size, end in zip(sizes, ends, strict=True)]
    # With one worker, and each candidate in passes of its own.
    alone = [[(_with_one_worker(each), story)] for each, story in candidates]
    d = extent.schema.n_features
    states = sum(8 * (4 * story.n_parameters + 2048 * d) for _, story in candidates)
    kept = config.checkpoint.keep + (config.publish is not None)
    return Plan(
        rows=extent.rows,
        columns=d,
        chunks=extent.chunks,
        chunk_nbytes=extent.chunk_nbytes,
        passes=sum(
            max(_passes(each, story, extent.rows) for each, story in group) for group in groups
        ),
        pass_nbytes=extent.rows * d * extent.itemsize,
        workers=n_workers(config),
        memory=max(_memory_of(group, extent) for group in groups),
        least_memory=max(_memory_of(group, extent) for group in alone),
        memory_limit=config.compute.memory_limit,
        disk=extent.to_store + kept * states,
        disk_free=_disk_free(config),
        exact=extent.exact,
        place=config.dataset or "runs",
        candidates=len(candidates),
        groups=tuple(sizes),
    )


def planned_candidates(
    config: Config, schema: Schema, rows: int | None = None
) -> list[tuple[Config, Story]]:
    """What is fitted, with its story: the candidates of a sweep, or the one model there is.

    Raises ConfigError where the columns, or the rows if they are known, do not bear a story.
    """

    def story_of(candidate: Config) -> Story:
        if rows is not None:
            check_components(candidate, rows)
        return make_story(candidate, schema)

    if config.sweep is None:
        return [(config, story_of(config))]
    found = []
    for label, candidate in config.candidates().items():
        try:
            found.append((candidate, story_of(candidate)))
        except ConfigError as error:
            raise ConfigError(f"sweep: the candidate {label}: {error}") from None
    return found


def _passes(config: Config, story: Story, rows: int) -> int:
    """The most passes that a fit takes."""
    batch = 0 if config.fit.method == "online" else config.fit.max_steps
    # The sample takes one pass more, the scores of fitted and held-out rows another.
    return n_online(config, [story], rows) + batch + 2


def _with_one_worker(config: Config) -> Config:
    compute = config.compute.model_copy(update={"workers": 1})
    return config.model_copy(update={"compute": compute})


def _extent(config: Config) -> Extent:

    place = config.dataset
    if place is None or is_stored(place):
        data = open_data(config)
        sizes = [part for part in (data.train, data.held_out) if part is not None]
        itemsize = 4 if place is not None and config.data.dtype == "float32" else 8
        return Extent(
            data.train.schema,
            sum(data.train.chunk_rows),
            len(data.train.chunk_rows),
            max(part.chunk_nbytes for part in sizes),
            itemsize,
            0,
            exact=True,
        )
    itemsize = 4 if config.data.dtype == "float32" else 8
    source = config.data.source
    if isinstance(source, Drawn):
        from flows.draw import n_rows

        schema, rows, exact = (
            Schema.real(source.n_features),
            n_rows(source, config.data.dtype),
            True,
        )
    else:
        files = expand(config.paths)
        here = [path for path in files if "://" not in path]
        found = [rows_of(path) for path in here]
        if len(here) < len(files):
            # What lies elsewhere is taken to be like its first file.
            with at_hand(next(path for path in files if "://" in path)) as (path, _):
                found += [(rows_of(path)[0], False)] * (len(files) - len(here))
        rows, exact = sum(n for n, _ in found), all(known for _, known in found)
        schema = _assumed_schema(config)
    from genstream.segments import rows_of_chunk

    d = schema.n_features
    chunk_rows = min(rows, rows_of_chunk(d, itemsize))
    # A chunk is decoded whole before the rows held out are parted from it.
    copies = 2 if config.holdout else 1
    fitted = round(rows * (1 - (config.holdout or 0.0)))
    return Extent(
        schema,
        fitted,
        math.ceil(rows / max(chunk_rows, 1)),
        copies * chunk_rows * d * (itemsize + 1),
        itemsize,
        rows * d * itemsize,
        exact,
    )


ASSUMED_LEVELS = 20
"""Levels a categorical column is taken to have while they are not learned yet."""


def _assumed_schema(config: Config) -> Schema:
    from genstream.tables import Encoder, read_tables

    columns = columns_of(config)
    if columns is None:
        carried = [name for name in (config.data.id, config.data.weights) if name is not None]
        encoder = Encoder(null_values=config.data.null_values, carried=carried)
        with at_hand(expand(config.paths)[0]) as (path, _):
            encoder.encode(next(iter(read_tables(path, chunk_rows=1000))), place=path)
        return encoder.schema
    labels = tuple(str(n) for n in range(ASSUMED_LEVELS))
    return Schema(
        tuple(
            column if isinstance(column, Column) else Column(name, column, labels)
            for name, column in columns.items()
        )
    )


def rows_of(path: str) -> tuple[int, bool]:
    """Rows of a file and whether that is exact: text is measured by its first lines."""
    from genstream.formats import Chunked, open_table
    from genstream.tables import read_tables

    opened = open_table(path)
    if isinstance(opened, Chunked):
        return sum(opened.chunk_rows), True
    # Columns that cannot be asked for by name need not be of those that are fitted.
    names = list(opened.default)
    plain = [name for name in names if name and names.count(name) == 1]
    table = next(iter(read_tables(path, columns=plain or None, chunk_rows=10_000)))
    if table.num_rows < 10_000:
        return table.num_rows, True
    # Of text every entry has a mark behind it, and no offset.
    offsets = 0 if in_place(path) else (4 - 1) * table.num_rows
    per_row = sum(column.nbytes - offsets for column in table.itercolumns()) / table.num_rows
    return round(_text_nbytes(Path(path)) / max(per_row, 1.0)), False


def _text_nbytes(path: Path) -> float:
    """Bytes of a file once unpacked, as far as its archive tells."""
    import zipfile

    if path.suffix.lower() == ".zip":
        try:
            with zipfile.ZipFile(path) as archive:
                return sum(member.file_size for member in archive.infolist())
        except zipfile.BadZipFile as error:
            raise DataError(f"{path}: not a whole zip archive: {error}") from None
    packed = {".gz": 4.0, ".bz2": 6.0, ".xz": 7.0}
    return path.stat().st_size * packed.get(path.suffix.lower(), 1.0)


def _disk_free(config: Config) -> int:
    import shutil

    place = Path(config.dataset or "runs").absolute()
    while not place.exists():
        place = place.parent
    try:
        return shutil.disk_usage(place).free
    except OSError as error:
        raise StorageError(f"{place}: {error.strerror}") from None


def check_data(config: Config) -> dict[str, Any]:
    """Look whether the data have the columns named, and whether the first rows fit them.

    Raises DataError, naming file, row and column, where they do not.
    """
    if isinstance(config.data.source, Drawn):
        return {"n_columns": config.data.source.n_features, "n_files": 0}
    if config.dataset is None:
        data = open_data(config)
        data.train.read(0)
        return {"n_columns": data.train.schema.n_features, "n_files": len(config.paths)}
    from genstream.tables import Encoder, read_tables

    carried = [name for name in (config.data.id, config.data.weights) if name is not None]
    n_columns, files = 0, expand(config.paths)
    for path in files:
        encoder = Encoder(
            columns_of(config),
            null_values=config.data.null_values,
            missing=config.data.missing,
            carried=carried,
        )
        with at_hand(path) as (here, _):
            table = next(iter(read_tables(here, columns=encoder.wanted, chunk_rows=1000)))
        n_columns = encoder.encode(table, place=path).n_features
        if config.data.weights is not None:
            encoder.weights(table, config.data.weights, place=path)
        if config.data.id is not None:
            encoder.ids(table, config.data.id, place=path)
    return {"n_columns": n_columns, "n_files": len(files)}
