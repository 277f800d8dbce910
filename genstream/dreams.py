"""Draws and answers larger than memory, made a chunk at a time.

What is random in a chunk follows from a seed and the number of the chunk alone, so that any part of
a draw can be made again, in any order and on any machine, to the bit.
"""

from __future__ import annotations

import json
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import numpy as np

from genstream.errors import ConfigError
from genstream.families.blocks import Array
from genstream.rows import Rows
from genstream.schema import Schema
from genstream.sources import CHUNK_ROWS, DaskSource, Source
from genstream.story import Draw, Params, Story
from genstream.threads import one_blas_thread

if TYPE_CHECKING:
    import dask.array as da
    import xarray

Seed = int | Sequence[int]
Work = Callable[[int, Rows], Array]


def generator_of_chunk(seed: Seed, chunk: int) -> np.random.Generator:
    """The generator of all that is random in one chunk."""
    parts = [seed] if isinstance(seed, int | np.integer) else list(seed)
    return np.random.default_rng([*parts, chunk])


@dataclass(frozen=True, eq=False)
class _Dream:
    """Rows drawn from a story in chunks, any of which can be made by itself."""

    story: Story
    params: Params
    n_rows: int
    seed: Seed
    chunk_rows: int

    def __post_init__(self) -> None:
        for name in ("n_rows", "chunk_rows"):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(f"{name} is {value}: draw at least one row")

    @property
    def sizes(self) -> tuple[int, ...]:
        """Rows of each chunk."""
        full, rest = divmod(self.n_rows, self.chunk_rows)
        return (self.chunk_rows,) * full + ((rest,) if rest else ())

    def chunk(self, i: int) -> Draw:
        """The rows of one chunk."""
        rows = min(self.chunk_rows, self.n_rows - i * self.chunk_rows)
        with one_blas_thread():
            return self.story.draw(self.params, rows, generator_of_chunk(self.seed, i))

    def of_block(self, block_id: tuple[int, ...]) -> Draw:
        """The rows of one chunk, for dask."""
        return self.chunk(block_id[0])


def draws(
    story: Story,
    params: Params,
    n_rows: int,
    seed: Seed = 0,
    chunk_rows: int = CHUNK_ROWS,
    *,
    workers: int = 1,
) -> Iterator[Draw]:
    """`n_rows` rows drawn from a story, a chunk after another.

    Parameters
    ----------
    story, params
        What is drawn from.
    n_rows, chunk_rows
        Rows in all, and of a chunk.
    seed
        Chunk `i` is drawn from NumPy's default generator with the seed `[*seed, i]`.
    workers
        Threads that draw, each of them one chunk ahead at most.

    Raises ConfigError where `n_rows` or `chunk_rows` is below 1.
    """
    dream = _Dream(story, params, n_rows, seed, chunk_rows)
    return _ahead(dream, workers)


def _ahead(dream: _Dream, workers: int) -> Iterator[Draw]:
    ahead: deque[Future[Draw]] = deque()
    with one_blas_thread(), ThreadPoolExecutor(workers) as pool:
        for i in range(len(dream.sizes)):
            ahead.append(pool.submit(dream.chunk, i))
            if len(ahead) > workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def draw_array(
    story: Story, params: Params, n_rows: int, seed: Seed = 0, chunk_rows: int = CHUNK_ROWS
) -> xarray.Dataset:
    """`n_rows` rows drawn from a story and their latents, lazily: of any size, to compute a part of
    or to write by `to_zarr`.

    The dataset holds dask arrays of one block a chunk: `values` (row, feature), categories as
    codes, `component` (row,) and, where the story has factors, `factors` (row, factor). Its
    attribute `schema` is that of the story, as JSON. A chunk is drawn once for all three, and is
    the same as that of `draws`. Parameters and errors as there.
    """
    import dask.array as da
    import xarray

    dream = _Dream(story, params, n_rows, seed, chunk_rows)
    sizes = dream.sizes
    token = uuid.uuid4().hex
    # Blocks that are whole draws, of which each array then takes its part.
    drawn = da.map_blocks(
        dream.of_block,
        chunks=((1,) * len(sizes),),
        meta=np.empty(0, object),
        dtype=object,
        name=f"draw-{token}",
    )

    def part(name: str, dtype: type, *width: int) -> Any:
        return drawn.map_blocks(
            attrgetter(name),
            chunks=(sizes, *((n,) for n in width)),
            new_axis=[1] if width else None,
            meta=np.empty((0,) * (1 + len(width)), dtype),
            name=f"draw-{name}-{token}",
        )

    variables = {
        "values": (("row", "feature"), part("values", np.float64, story.schema.n_features)),
        "component": (("row",), part("component", np.intp)),
    }
    if story.n_factors:
        factors = part("factors", np.float64, story.n_factors)
        variables["factors"] = (("row", "factor"), factors)
    return xarray.Dataset(
        variables,
        # Texts of variable length, which zarr has a stable form for.
        coords={"feature": np.array(story.schema.names, dtype=object)},
        attrs={"schema": json.dumps(story.schema.to_json())},
    )


@dataclass(frozen=True, eq=False)
class _Chunkwise:
    """Work on the rows of a chunk, in the forms in which dask calls it."""

    work: Work
    schema: Schema

    def of_chunk(self, source: Source, block_id: tuple[int, ...]) -> Array:
        """The work's answer for a chunk of a source."""
        with one_blas_thread():
            return np.asarray(self.work(block_id[0], source.read(block_id[0])))

    def of_block(self, block: Array, block_info: Any) -> Array:
        """The work's answer for a block of a dask array."""
        place = block_info[0]
        first_row = place["array-location"][0][0]
        rows = Rows.of(np.asarray(block), first_row=first_row, names=self.schema.names)
        rows.check(self.schema, first_row=first_row)
        with one_blas_thread():
            return np.asarray(self.work(place["chunk-location"][0], rows))


def lazily(
    work: Work, source: Source, trailing: tuple[int, ...], dtype: Any, *, label: str = "answer"
) -> da.Array:
    """A dask array of what `work(chunk, rows)` says of each row of a source, one block a chunk.

    `trailing` is the shape of an answer after its row axis. Blocks of a dask array are worked on
    where they are computed; of other sources each block reads its chunk itself.
    """
    import dask.array as da

    chunks = (tuple(source.chunk_rows), *((size,) for size in trailing))
    # A name of its own each time: what a path holds may have changed since it was last asked.
    options: dict[str, Any] = {
        "chunks": chunks,
        "meta": np.empty((0,) * len(chunks), dtype),
        "name": f"{label}-{uuid.uuid4().hex}",
    }
    chunkwise = _Chunkwise(work, source.schema)
    answers: da.Array
    if isinstance(source, DaskSource):
        if not trailing:
            options["drop_axis"] = 1
        answers = da.map_blocks(chunkwise.of_block, source.array, **options)
    else:
        answers = da.map_blocks(chunkwise.of_chunk, source, **options)
    return answers


@dataclass(frozen=True, eq=False)
class Imputed:
    """Work: (n, d) the rows with their gaps filled, see `Story.impute`.

    Without `seed` gaps hold their expectation, with it a draw keyed by seed and chunk.
    """

    story: Story
    params: Params
    seed: Seed | None = None

    def __call__(self, chunk: int, rows: Rows) -> Array:
        rng = None if self.seed is None else generator_of_chunk(self.seed, chunk)
        return self.story.impute(self.params, rows, rng)


def impute_source(
    story: Story, params: Params, source: Source, seed: Seed | None = None
) -> da.Array:
    """(n, d) the rows of a source with their gaps filled, lazily: see `Story.impute`.

    A dask array of one block a chunk, in memory a few chunks at a time however it is computed or
    written (`to_zarr`). Without `seed` a gap holds its expectation or likeliest value, with it a
    draw that follows from the seed and the number of the chunk.
    """
    width = (source.schema.n_features,)
    return lazily(Imputed(story, params, seed), source, width, np.float64, label="imputed")
