"""Questions put to rows wherever they live, and answers in the form in which rows were given."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from genstream.dreams import generator_of_chunk, lazily
from genstream.families.blocks import Array
from genstream.rows import Rows
from genstream.schema import Schema
from genstream.sources import Source
from genstream.start import distances
from genstream.story import Params, Story
from genstream.threads import one_blas_thread

if TYPE_CHECKING:
    import xarray

# Packages whose objects hold data that need not be in memory.
LAZY_PACKAGES = ("dask", "xarray", "zarr")


@dataclass(frozen=True)
class Question:
    """What can be asked of each row: the axis of an answer after the row axis, its type, and how
    it is found from `(story, params, rows, generator)`.
    """

    dim: str | None
    dtype: type
    find: Callable[[Story, Params, Rows, np.random.Generator | None], Array]


QUESTIONS = {
    "component": Question(None, np.intp, lambda s, p, rows, _: s.infer(p, rows).component),
    "responsibilities": Question(
        "component", np.float64, lambda s, p, rows, _: s.infer(p, rows).responsibilities
    ),
    "log_prob": Question(None, np.float64, lambda s, p, rows, _: s.log_prob(p, rows)),
    "factors": Question("factor", np.float64, lambda s, p, rows, _: s.factors(p, rows).mean),
    "filled": Question("feature", np.float64, lambda s, p, rows, rng: s.impute(p, rows, rng)),
    "distances": Question("component", np.float64, lambda _s, p, rows, _: _distances(p, rows)),
}


def _distances(params: Params, rows: Rows) -> Array:
    """(n, K) Euclidean distances of rows from components' means over their observed entries,
    scaled up to all entries.
    """
    family: Any = params.family
    middle = family.mean.mean(axis=0)
    observed = rows.is_observed
    x = np.where(observed, rows.values - middle, 0.0)
    return np.sqrt(distances(x, observed, family.mean - middle))


@dataclass(frozen=True, eq=False)
class Ask:
    """One of `QUESTIONS`, put to the rows of a chunk.

    `seed` keys what is drawn for an answer, by the number of the chunk; None draws nothing.
    """

    story: Story
    params: Params
    what: str
    seed: int | None = None

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the answers."""
        return np.dtype(QUESTIONS[self.what].dtype)

    @property
    def dim(self) -> str | None:
        """Name of an answer's axis after its row axis."""
        return QUESTIONS[self.what].dim

    @property
    def trailing(self) -> tuple[int, ...]:
        """Shape of an answer after its row axis."""
        sizes = {
            "component": self.story.n_components,
            "factor": self.story.n_factors,
            "feature": self.story.schema.n_features,
        }
        return () if self.dim is None else (sizes[self.dim],)

    def __call__(self, chunk: int, rows: Rows) -> Array:
        """The answers for the rows of one chunk."""
        rng = None if self.seed is None else generator_of_chunk(self.seed, chunk)
        with one_blas_thread():
            return QUESTIONS[self.what].find(self.story, self.params, rows, rng)

    def lazily(self, source: Source) -> Any:
        """A dask array of the answers for all rows of a source, one block a chunk."""
        return lazily(self, source, self.trailing, self.dtype, label=self.what)


def unchanged(answer: Any, *_labels: Any) -> Any:
    """The answer as it is: arrays have no names for axes and entries."""
    return answer


@dataclass(frozen=True, eq=False)
class Labelled:
    """Gives answers the row labels of the xarray object that was asked about."""

    row: str
    coordinates: dict[Any, Any]

    @classmethod
    def like(cls, X: xarray.DataArray | xarray.Dataset) -> Labelled:
        row = X.dims[0] if isinstance(X.dims, tuple) else next(iter(X.sizes))
        labels = {name: x for name, x in X.coords.items() if x.dims == (row,)}
        return cls(str(row), labels)

    def __call__(
        self, answer: Any, dim: str | None = None, labels: Sequence[Any] | None = None
    ) -> xarray.DataArray:
        import xarray

        dims = (self.row,) if dim is None else (self.row, dim)
        named = {} if labels is None else {dim: list(labels)}
        return xarray.DataArray(answer, dims=dims, coords=self.coordinates | named)


@dataclass(frozen=True)
class Data:
    """Data given to a method: where to read the rows, and how to give answers about them.

    `lazy` data may exceed memory, so answers are dask arrays. `wrap(answer, dim, labels)` turns an
    answer with the rows along its first axis, and `dim` with its `labels` along the second, into
    the type the caller expects; `refill(filled, schema)` turns filled rows (n, d) into the type of
    the data themselves.
    """

    source: Source
    lazy: bool = False
    wrap: Callable[..., Any] = unchanged
    refill: Callable[[Any, Schema], Any] = unchanged


def is_lazy(X: Any) -> bool:
    """Whether the rows of X need not be in memory."""
    package = type(X).__module__.partition(".")[0]
    return package in LAZY_PACKAGES or isinstance(X, str | os.PathLike | Source)
