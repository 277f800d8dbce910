"""What all families share: the protocol, the pivot, cache blocks and the linear form.

A family that is *linear in its features* `T(x)` has `log p(x | k) = eta_k . T(x) + log h(x)`, so a
block of rows is scored for all components by one matrix product, and its sufficient statistics
are gathered by a second one. Arrays are feature-major, `(features, rows)` and `(components, rows)`,
so that features are built and normalised along contiguous lanes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from genstream.rows import Rows
from genstream.schema import Schema
from genstream.stats import Monoid, Record, axes

Array = NDArray[Any]
Index = slice | NDArray[np.intp]

LOG_2PI = float(np.log(2 * np.pi))
# A component whose quadratic form may be off by more than this many nats is computed more exactly.
MAX_ROUNDING = 1e-3
# A component, or a column of it, that took no more than this share of all weight was never seen.
UNSEEN = 1e-16
# A column of less deviation counts as constant: its square would soon vanish in arithmetic.
NARROWEST = 1e-120
# Larger than one core's own cache: shorter blocks make threads wait for the interpreter's lock.
BLOCK_BYTES = 1 << 23
# Compiled loops do not hold it. Measured over shapes, shorter blocks win until what a call costs
# shows (below some 1000 rows of 30 features and 50 components), and 256 rows of 2000 features.
FAST_BLOCK_BYTES = 1 << 21
MIN_BLOCK, MAX_BLOCK = 256, 4096
# Fewer rows than a power of two: features that lie a power of two of bytes apart are kept in the
# same few places of the caches. Thin products of float64 took up to half as long again.
BLOCK_ODD = 16
# In float32, from so many features a component on, SciPy's BLAS multiplies features by
# responsibilities up to twice as fast as the other way round; NumPy's does not care.
TURNED = 2


class Walk(Protocol):
    """One walk over a chunk of rows: blocks are scored, then gathered, in turn."""

    def blocks(self) -> Iterator[Index]:
        """The rows of each block, as a slice or an index array. Rows with nothing observed are
        in no block.
        """

    def score(self) -> Array:
        """(K, n) of `log p(x | k) + log_weight_k` for the block at hand; a buffer to overwrite."""

    def base(self) -> Array | None:
        """(n,) of `log h(x)`, the part of the log-density that no component changes, or None."""

    def gather(self, resp: Array) -> None:
        """Add the block's statistics under weights (K, n), which are `r_k(x)` times row weight."""

    def close(self) -> Monoid:
        """The statistics gathered, in pivot coordinates."""

    def load(self, index: Index) -> None:
        """Make these rows of the chunk the block at hand, in this order and whatever their gaps.

        For products of families, where another family says which rows are a block. Rows with
        nothing observed in this family's columns may be among them: they score `log_weight_k`
        alone and add nothing to the statistics.
        """

    def complete(self, resp: Array, rng: np.random.Generator | None = None) -> Array:
        """(n, d) the block's rows with their gaps filled, in data units.

        Without `rng`: `sum_k r_k E[x_M | x_O, k]` under weights (K, n), the likeliest value of
        binary and categorical columns. With it `resp` is one-hot, and the gaps are a draw from
        `p(x_M | x_O, k)`. What was observed stays to the bit.
        """


@runtime_checkable
class SweptWalk(Walk, Protocol):
    """A walk that can do many blocks in one go, without the interpreter."""

    def swept(self, sum_r: Array, likeliest: bool) -> tuple[Index, Array] | None:
        """Which rows are done, and their log-densities: their statistics are gathered under soft
        responsibilities, whose sums are added to `sum_r` (K,), and they are in no block to come.
        With `likeliest` under all responsibility to the likeliest component, whose log-joints are
        given. None where there are none.
        """


class FactorWalk(Walk, Protocol):
    """A walk of a family that has factors."""

    def factors(self, component: Array) -> tuple[Array, Array]:
        """(n, q) mean and (n, q, q) covariance of `p(t | x, k)` with the components (n,) given."""


class BoundWalk(FactorWalk, Protocol):
    """A walk of a family whose score is a bound."""

    def importance(self, n_samples: int, rng: np.random.Generator) -> tuple[Array, Array]:
        """(K, n) logs of the mean importance weight and of the mean squared one, of `n_samples`
        draws of the factors a row and component, for the block at hand once it is scored.

        The mean weight is an unbiased estimate of `p(x | k) weight_k`, with all that `base` leaves
        out of a score.
        """


class LinearBlock(Protocol):
    """A block of rows, scored by `linear` from its features and gathered as sums of them."""

    @property
    def linear(self) -> Linear:
        """The natural parameters."""

    @property
    def features(self) -> Array:
        """(p, n) features of the block."""

    def exact(self) -> Array:
        """(p, n) features in float64."""

    def add(self, sums: Array) -> None:
        """Add (K, p) `resp @ T.T` to the statistics."""


@runtime_checkable
class Joinable(Walk, Protocol):
    """A walk that has such blocks, which a product of families scores and gathers together."""

    @property
    def width(self) -> int:
        """The most features a block has."""

    @property
    def linear_block(self) -> LinearBlock | None:
        """The block at hand, where it is linear."""

    def build_in(self, buffer: Array) -> None:
        """Build features of complete blocks, and of blocks of one pattern, in the first rows of a
        buffer (width, size).
        """


class Kernel(Protocol):
    """A family's parameters, prepared for a pass: for all its chunks, on several threads at once,
    so that nothing of it that shows changes once it is made.

    One whose walk sorts rows by what they observed has an attribute `by_pattern` that is true, and
    leads in products. One that costs much to prepare has a method `take(components)`, which gives
    the kernel of some of them (C,). One that can sum a single component without scores has a method
    `summed(rows)`, which gives the statistics of rows under their weights alone, and the sum of
    their weighted log-joints; or None where there are several components, or gaps.
    """

    def walk(self, rows: Rows) -> Walk:
        """Begin a walk over one chunk."""


class Family(Protocol):
    """A distribution of rows given the component, with stacked parameters of K components.

    `name` is its key among `families.FAMILIES`. Where `bound` is true, scores are lower bounds of
    `log p(x | k)`. `n_factors` is q, the length of `t`, and 0 where there are no factors.
    `param_names` are the parameters that may be frozen. `ridge` is what is added to variances after
    an M-step, 0 where that makes no sense. One that takes rows with sparse values (scipy CSR) as
    they are has an attribute `sparse` that is true; one whose statistics of complete rows depend on
    responsibilities alone, and not on parameters, has an attribute `settled` that is true.
    """

    @property
    def name(self) -> str: ...
    @property
    def bound(self) -> bool: ...
    @property
    def n_factors(self) -> int: ...
    @property
    def param_names(self) -> tuple[str, ...]: ...
    @property
    def params_type(self) -> type[Record]: ...
    @property
    def stats_type(self) -> type[Monoid]: ...
    @property
    def prior_type(self) -> type[Record]: ...
    @property
    def dtype(self) -> str: ...
    @property
    def ridge(self) -> float: ...
    @property
    def pivot(self) -> Pivot | None: ...
    @property
    def prior(self) -> Record | None: ...

    def options(self) -> dict[str, Any]:
        """What `of` needs besides schema, pivot and prior, as plain JSON."""

    @classmethod
    def of(
        cls, schema: Schema, options: Mapping[str, Any], pivot: Pivot | None, prior: Any
    ) -> Self:
        """The family with these options, equal to the bit to the one that gave them."""

    def with_dtype(self, dtype: str) -> Self:
        """The same family with another arithmetic."""

    def anchored(self, sample: Rows, n_components: int, weak_prior: bool) -> Self:
        """This family with its pivot, and a weak prior if asked, fixed from a sample of rows."""

    def vague(self, n_components: int) -> Record:
        """K equal components as wide as the sample: where a start begins."""

    def start(
        self, params: Any, sample: Rows, responsibilities: Array, rng: np.random.Generator
    ) -> Record:
        """Parameters that EM can begin with, from those of an M-step on a sample with (n, K)
        responsibilities: breaks what symmetry that left, such as loadings of zero.
        """

    def prepare(self, params: Any, log_weights: Array) -> Kernel:
        """Natural parameters for one pass; `log_weights` (K,) are added to every score."""

    def maximise(
        self, stats: Any, previous: Any, frozen: frozenset[str] = frozenset()
    ) -> tuple[Record, NDArray[np.bool_]]:
        """MAP parameters (maximum likelihood without a prior) given that those named `frozen` stay
        what they are in `previous`, and (K,) whether each component was singular or empty, and so
        could not be estimated from its statistics alone.
        """

    def keep(self, stats: Any, components: Sequence[int]) -> Monoid:
        """Statistics of some of the components, as if the rows of all others had not been."""

    def possible(self, stats: Any, known: Any) -> Monoid | None:
        """Extrapolated statistics, mended into some that rows could have; None where they cannot.

        `known` are statistics of rows nearby.
        """

    def expected_log_prob(self, params: Any, stats: Any) -> float:
        """`sum_k E[log p(x | k)]` in nats over what is behind `stats`, but for what no parameter
        changes.
        """

    def log_prior(self, params: Any) -> float:
        """Log prior density up to a constant; 0 without a prior."""

    def place(self, params: Any, component: int, x: Array, observed: Array) -> Record:
        """The parameters with one component moved to a row, as wide as the sample's share."""

    def draw(
        self, params: Any, component: Array, rng: np.random.Generator
    ) -> tuple[Array, Array | None]:
        """(n, d) rows drawn from the components (n,), and their (n, q) factors if there are any."""

    def fill(self, params: Any, resp: Array, rng: np.random.Generator | None = None) -> Array:
        """(n, d) rows of which nothing was observed: as `Walk.complete`, from the components."""

    def marginal(self, params: Any, columns: Array) -> tuple[Family, Record]:
        """The family of some columns, by sorted positions, and its parameters. It has no prior."""

    def condition(self, params: Any, x: Array, given: Array) -> tuple[Family, Record, Array]:
        """The family of the columns not `given` (d,), given the others' values `x` (d,), its
        parameters, and (K,) `log p(x_given | k)`. It has no prior. Approximate where `bound`.
        """

    def embed(self, rows: Rows) -> tuple[Array, Array]:
        """(n, e) standardised coordinates for distances between rows, zero where missing, and
        their (n, e) mask.
        """

    def rounding(self, params: Any) -> Array:
        """(K,) nats by which rounding may move a row's log-density, to first order."""

    def describe(self, params: Any) -> Description:
        """What the components are like in terms of columns, factors integrated out."""

    def n_parameters(self, n_components: int) -> int:
        """Free parameters of K components."""

    def floored(self, params: Any) -> list[tuple[int, int]]:
        """(component, column position) of every variance that sits on its floor."""


class Levelled(Family, Protocol):
    """A family that takes categorical columns, whose levels may become more."""

    def with_levels(self, schema: Schema, params: Any, seen: Array) -> tuple[Family, Record]:
        """Family and parameters over a schema with further levels at the end of its columns.

        A new level has probability `0.5 / (n + 0.5 L)` in every component and in the prior, with n
        the weight that observed the column, of `seen` (d,), and L its levels (Krichevsky &
        Trofimov 1981); the others keep their ratios.
        """

    def stats_with_levels(self, schema: Schema, stats: Any) -> Monoid:
        """Statistics over that schema, in which no row had a new level."""


@runtime_checkable
class Splittable(Family, Protocol):
    """A family whose components can be split in two."""

    @property
    def splits(self) -> bool:
        """Whether there is anything along which to split one."""

    def halves(
        self, params: Any, components: Array, apart: float, rng: np.random.Generator
    ) -> tuple[Record, Record]:
        """Two records of some components (m,), whose even mixture has the mean and the covariance
        of each of them, `apart` deviations from its mean along its main axis. What components
        share stays, so that such a mixture is wider.
        """


class Begun:
    """What families have in common that an M-step leaves with no symmetry to break."""

    def start(
        self,
        params: Any,
        sample: Rows,  # noqa: ARG002
        responsibilities: Array,  # noqa: ARG002
        rng: np.random.Generator,  # noqa: ARG002
    ) -> Record:
        started: Record = params
        return started


@dataclass(frozen=True, eq=False)
class Description:
    """What a family's components are like, column by column, in data units.

    `mean` and `sd` (K, d) are those of real and count columns, NaN elsewhere; `levels[j]` (K, L)
    are level probabilities of a binary or categorical column. `covariance(k)` is the (d, d)
    covariance within a component, None where columns are independent given the component.
    `loadings` (K, d, q) are what a factor's unit adds to a column, in the units of `mean` (logits
    of a binary column); None without factors.
    """

    mean: Array
    sd: Array
    levels: Mapping[int, Array] = field(default_factory=dict)
    covariance: Callable[[int], Array] | None = None
    loadings: Array | None = None


@dataclass(frozen=True, eq=False)
class Pivot(Record):
    """Where statistics are summed: `(x - shift) / scale`, one shift and scale a column.

    Sums about a point near the data keep the digits that raw sums lose: the variance of data with
    mean 1e6 and deviation 1 survives. Scales are powers of two, so scaling itself is exact.
    """

    shift: Array = axes("feature")
    scale: Array = axes("feature")

    @classmethod
    def of(cls, mean: Array, variance: Array, *, common: bool = False) -> Pivot:
        """A pivot at a sample's mean and deviation (d,); with `common`, one scale for all."""
        deviation = np.sqrt(np.where(variance > 0, variance, 1.0))
        if common and len(deviation):
            deviation = np.full_like(deviation, np.sqrt(np.mean(deviation**2)))
        return cls(np.asarray(mean, dtype=np.float64), np.exp2(np.round(np.log2(deviation))))

    @classmethod
    def none(cls, n_features: int) -> Pivot:
        """The pivot that changes nothing."""
        return cls(np.zeros(n_features), np.ones(n_features))

    def block(self, values: Array, out: Array) -> Array:
        """(n, d) rows as (d, n) pivot coordinates in `out`."""
        block = out[:, : len(values)]
        np.subtract(values.T, self.shift[:, None], out=block)
        block *= (1.0 / self.scale)[:, None]
        return block


def moments(rows: Rows) -> tuple[Array, Array, Array]:
    """Weighted mean, variance and observed weight (d,) of each column over its observed entries.

    A column that is never observed has mean 0 and variance 0.
    """
    values = rows.values.astype(np.float64)
    if rows.observed is None and rows.weights is None and len(values):
        mean = values.mean(axis=0)
        values -= mean
        rounded = values.mean(axis=0)
        mean += rounded
        variance = np.einsum("nd,nd->d", values, values) / len(values) - rounded**2
        return mean, _varying(mean, variance), np.full(len(mean), float(len(values)))
    weight = rows.is_observed * rows.row_weights[:, None]
    total = weight.sum(axis=0)
    safe = np.where(total > 0, total, 1.0)
    mean = (weight * values).sum(axis=0) / safe
    # The second sum takes back what the first one rounded.
    mean += (weight * (values - mean)).sum(axis=0) / safe
    variance = (weight * (values - mean) ** 2).sum(axis=0) / safe
    return mean, _varying(mean, variance), total


def _varying(mean: Array, variance: Array) -> Array:
    """Variances (d,), without what is left of a constant column: the rounding of its mean."""
    least = np.maximum(4 * np.finfo(np.float64).eps * np.abs(mean), NARROWEST)
    return np.where(variance <= least**2, 0.0, variance)


def block_rows(n_lanes: int, itemsize: int, fast: bool = False) -> int:
    """Rows in a block, so that `n_lanes` numbers a row stay within the last cache, or nearer where
    they are built by `fast`, compiled loops; of more numbers than that no fewer than `MIN_BLOCK`,
    for which a plan of memory has to allow.
    """
    rows = (FAST_BLOCK_BYTES if fast else BLOCK_BYTES) // max(1, n_lanes * itemsize)
    size = int(np.clip(1 << max(0, rows.bit_length() - 1), MIN_BLOCK, MAX_BLOCK))
    return size - BLOCK_ODD if size > MIN_BLOCK else size


def part(buffer: Array, n: int) -> Array:
    """The first numbers of a C-ordered buffer (m, size) as a C-ordered (m, n)."""
    return buffer.reshape(-1)[: len(buffer) * n].reshape(len(buffer), n)


def slices(n_rows: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most `size` rows."""
    for start in range(0, n_rows, size):
        yield slice(start, min(start + size, n_rows))


def by_component(component: Array) -> Iterator[tuple[int, NDArray[np.intp]]]:
    """Each component that is among those of some rows (n,), and which rows have it, in order."""
    if not len(component):
        return
    order = np.argsort(component, kind="stable")
    present, first = np.unique(component[order], return_index=True)
    for k, rows in zip(present, np.split(order, first[1:]), strict=True):
        yield int(k), rows


class Linear:
    """Natural parameters (K, p) at the precision each component needs.

    Parameters
    ----------
    eta
        (K, p) float64 natural parameters, the constant among them.
    rounding
        (K,) the error of `eta . T` in units of the unit roundoff, as estimated by the family.
    dtype
        The arithmetic asked for. In float32, components whose error would exceed `MAX_ROUNDING`
        nats are scored and gathered in float64 (`fine`); where even float64 exceeds it the
        family scores by its direct form (`direct`) and gathers in float64.
    """

    def __init__(self, eta: Array, rounding: Array, dtype: np.dtype[Any]) -> None:
        self.whole, self.rounding = eta, rounding
        self.eta = eta.astype(dtype)
        self.dtype = dtype
        unit = float(np.finfo(dtype).eps) / 2
        self.fine = np.flatnonzero(unit * rounding > MAX_ROUNDING)
        self.fine_eta = eta[self.fine]
        self.direct = np.flatnonzero(np.finfo(np.float64).eps / 2 * rounding > MAX_ROUNDING)
        if dtype == np.float64:
            self.fine = self.fine[:0]

    def take(self, components: Array) -> Linear:
        """Those of some of the components."""
        return Linear(self.whole[components], self.rounding[components], self.dtype)

    def coarse(self, features: Array, out: Array) -> Array:
        """(K, n) of `eta . T` in the arithmetic asked for."""
        log_p = part(out, features.shape[1])
        np.matmul(self.eta, features, out=log_p)
        return log_p

    def score(self, features: Array, exact: Callable[[], Array], out: Array) -> Array:
        """(K, n) of `eta . T`; `exact` gives the float64 features where they are needed."""
        log_p = self.coarse(features, out)
        if self.fine.size:
            log_p[self.fine] = self.fine_eta @ exact()
        return log_p

    def gather(self, features: Array, exact: Callable[[], Array], resp: Array) -> Array:
        """(K, p) float64 of `resp @ T.T`."""
        sums = (resp @ features.T).astype(np.float64, copy=False)
        if self.fine.size:
            sums[self.fine] = resp[self.fine].astype(np.float64) @ exact().T
        return sums

    def accumulate(
        self, features: Array, exact: Callable[[], Array], resp: Array, sums: Array, room: Array
    ) -> None:
        """Add `resp @ T.T` to (K, p) float64 sums, by way of `room` (K, p) in the arithmetic at
        hand: as `gather`, without arrays that are made anew for every block.
        """
        np.matmul(resp, features.T, out=room)
        if self.fine.size:
            room[self.fine] = 0.0
            sums[self.fine] += resp[self.fine].astype(np.float64) @ exact().T
        sums += room

    @property
    def turned(self) -> bool:
        """Whether `compiled.swept` multiplies features by responsibilities, which takes it less
        time than the other way round.
        """
        n_components, width = self.eta.shape
        return self.dtype == np.float32 and width >= TURNED * n_components
