"""The E-step of Gaussians: kernel, blocks and gaps.

Complete rows, and rows that share a frequent pattern of gaps, are scored and gathered by one matrix
product each. A pattern's sums are of its observed entries alone; they are completed once a chunk,
since the conditional moments of the missing entries are linear in the observed ones with
coefficients that only the pattern decides.

What bounds the E-step of complete rows, measured on one core of 44 (88) GF/s:
scores and sums are `4 p K` operations a row, for p features. At d = 6, K = 50 (p = 28) half of the
time is the way to responsibilities (2 ns a number, 1 in float32), the rest products too thin for
their full rate. At d = 16 and 64 with K = 16 the products run at half their rate, as packing 153 or
2145 features for 16 components costs as much as multiplying them. At d = 64, K = 64 they run at
their rate. Of many columns under few components (`_WhitenedBlock`) the whitened form is summed as
well, without features: on a core of 75 (150) GF/s that takes 0.8 of the time at d = 64, K = 16 in
float32, 0.6 (float32: 0.5) at d = 64, K = 8, and a tenth at d = 256, K = 2. With more components it
takes up to twice the operations, and K d numbers to square or to weigh against p, so it is used
only for its digits. Where rows of many columns are sure of their component, as they become near the
end of a fit, sums are gathered from each component's own rows: a pass then takes 0.65 to 0.8 of the
time in float64. In float32 components whose rounding needs float64 (`Linear`) cost a second set of
features, unless they are few: these are then worked on one by one, on the rows for which they
matter. Where most components need it, all are in float64.

Threads that walk block by block take turns at the interpreter's lock, and where a step of a block
is short they wait for it as long again. So complete rows are swept in one compiled call a chunk
(`genstream.compiled.swept`): with two threads that took 0.8 of the time at d = 6, K = 50 and 0.4 to
0.6 with two diagonal components. With wide features steps are long, and NumPy's products faster.

Rows of rare patterns are worked on side by side, in the lanes of `genstream.families.lanes`.

A mixture of scales (`genstream.families.student`) is Gaussian given the scale `u` of a row, whose
conditional covariance is `covariance / u`. It needs of every block of rows the log-density at
distance 0 (`constant`), from which a score gives the distance, the number of entries observed, and
`gather(resp, scaled)`: the moments weigh `scaled = r E[u]`, but the covariance of missing entries
`r E[u / u] = r`.
"""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Iterator
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from genstream import compiled
from genstream.families.blocks import (
    LOG_2PI,
    Array,
    Index,
    Linear,
    Pivot,
    block_rows,
    part,
    slices,
)
from genstream.families.lanes import LaneBlock, Lanes, lane_rows
from genstream.families.patterns import Patterns, numbered
from genstream.rows import Rows, pick
from genstream.stats import Monoid

# Patterns with fewer scores (rows times components) than this in a chunk are worked on in lanes:
# what a pattern costs once is then more than lanes cost beyond matrix products.
FREQUENT = 4096
# Components that need float64 are worked on apart where there is at most one to so many columns:
# features in float64 cost a row about as much as so many distances.
COLUMNS_APART = 8
# Nats below the likeliest component at which no responsibility is left, with some to spare.
NOTHING = 150.0
# Rows that are sure of their components are gathered by component, so many at a time. Of p features
# this takes `SURE_PAIR` times as long a row and component as the product of all, and a component
# `SURE_CALL / p` of that product. Fewer features are multiplied in no time.
SURE_ROWS, SURE_PAIR, SURE_CALL, SURE_WIDTH = 4096, 4.0, 300.0, 600
# Where products have more features than this, and there are so many columns or more a component (by
# bytes of a number), rows are worked on without features: see `_WhitenedBlock`. By then pairs of
# rows that are sure of their components take `WHITENED_PAIR` times as long as each of all pairs.
WHITENED_WIDTH, WHITENED_COLUMNS, WHITENED_PAIR = 600, {4: 4, 8: 5}, 2.0
# Rows of a triangular matrix that are multiplied at a time: what is 0 beyond them is left out.
STRIP = 32
# What a kernel keeps of patterns it has met, in bytes.
MARGINALS_NBYTES = 32 << 20


class GaussianKernel:
    """Gaussians prepared for a pass, in pivot coordinates.

    Takes means (K, d) and covariances (C, d, d), where C is K, or 1 if they are tied.
    """

    by_pattern = True

    def __init__(
        self,
        mean: Array,
        covariance: Array,
        log_weights: Array,
        pivot: Pivot,
        tied: bool,
        dtype: np.dtype[Any],
        stats_type: type[Any],
    ) -> None:
        self.mean, self.covariance = mean, covariance
        self.log_weights, self.pivot, self.tied, self.dtype = log_weights, pivot, tied, dtype
        self.stats_type = stats_type
        self.factor = factor = np.linalg.cholesky(covariance)
        self.whiten = np.linalg.inv(factor)
        self.precision = self.whiten.swapaxes(1, 2) @ self.whiten
        self.log_det = 2 * np.log(np.diagonal(factor, axis1=1, axis2=2)).sum(axis=1)
        self.log_scale = np.log(pivot.scale)
        self.n_components, self.n_features = mean.shape
        self.complete = Marginal(self, np.ones(self.n_features, dtype=bool))
        # Where most components need float64, a second pass of features in float32 is in vain.
        if not tied and 2 * self.complete.linear.fine.size > self.n_components:
            self.dtype = np.dtype(np.float64)
            self.complete = Marginal(self, np.ones(self.n_features, dtype=bool))
        self._marginals: dict[bytes, Marginal] = {}

    @property
    def moment_dtype(self) -> np.dtype[Any]:
        """The arithmetic in which products of rows keep digits enough for every component."""
        return self.dtype if not self.complete.linear.fine.size else np.dtype(np.float64)

    def marginal(self, pattern: NDArray[np.bool_]) -> Marginal:
        """The marginal of a pattern (d,), factored once for all chunks; of very many patterns, of
        the first ones that fit `MARGINALS_NBYTES`.
        """
        key = pattern.tobytes()
        found = self._marginals.get(key)
        if found is None:
            # Threads that come to a pattern at once each make what is the same to the bit.
            found = Marginal(self, pattern)
            k, d = self.mean.shape
            nbytes = 8 * (5 * self.covariance.size + k * (4 * d + d * (d + 3)))
            if len(self._marginals) * nbytes < MARGINALS_NBYTES:
                self._marginals[key] = found
        return found

    @cached_property
    def tied_linear(self) -> Linear:
        """Natural parameters of `[y, 1]` where all components share the quadratic term."""
        precision = self.precision[0]
        slope = self.mean @ precision
        quadratic = (slope * self.mean).sum(axis=1)
        constant = self.complete.constant(quadratic)
        rounding = 2 * (np.abs(slope) * _spread(self.mean, self.covariance)).sum(axis=1)
        return Linear(np.column_stack([slope, constant]), rounding, self.dtype)

    def take(self, components: Array) -> GaussianKernel:
        """The kernel of some of the components (C,), of which nothing is factored again."""
        some = copy.copy(self)
        some.n_components = len(components)
        some.mean, some.log_weights = self.mean[components], self.log_weights[components]
        if self.tied:
            some.__dict__.pop("tied_linear", None)
        else:
            for name in ("covariance", "factor", "whiten", "precision", "log_det"):
                setattr(some, name, getattr(self, name)[components])
        some._marginals = {}
        some.complete = Marginal(some, np.ones(self.n_features, dtype=bool))
        some.complete.linear = self.complete.linear.take(components)
        return some

    def walk(self, rows: Rows) -> GaussianWalk:
        return GaussianWalk(self, rows)

    def summed(self, rows: Rows) -> tuple[Monoid, float] | None:
        """As `Kernel` says."""
        if self.n_components > 1 or not (rows.observed is None or rows.observed.all()):
            return None
        fast = compiled.pays_for(rows.values, 1)
        n, s, q = second_moments(rows, self.pivot, self.moment_dtype, fast)
        # By way of the mean of the rows: see `Gaussian.scatter`.
        centre = s / max(n, 1e-300)
        gap = centre - self.mean[0]
        spread = q - np.outer(s, centre) + n * np.outer(gap, gap)
        square = float((self.precision[0] * spread).sum())
        stats = self.stats_type(np.array([n]), s[None], q if self.tied else q[None])
        return stats, n * float(self.complete.peak[0]) - 0.5 * square


class Strip(NamedTuple):
    """Rows `span` of lower triangular matrices W of the components (C,): all of `[-W mean, W]`
    that is not 0, as (C h, 1 + span.stop) for h rows.
    """

    components: Array
    span: slice
    matrix: Array


class Marginal:
    """The marginal of the columns that one pattern observes, and what completes it.

    `precision` (C, o, o) is that of the observed entries. A row is completed by
    `y = lift @ y_O + offset`, with lift (C, d, o) and offset (K, d), and `spare` (C, d, d) is the
    conditional covariance of its missing entries.
    """

    def __init__(self, kernel: GaussianKernel, pattern: NDArray[np.bool_]) -> None:
        # The kernel has its marginals: that it ends with its use, they do not hold it.
        self.kernel: Any = weakref.proxy(kernel)
        seen, missing = np.flatnonzero(pattern), np.flatnonzero(~pattern)
        self.seen, self.n_observed = seen, len(seen)
        self.log_scale = float(kernel.log_scale[seen].sum())
        self.mean = kernel.mean[:, seen]
        self.whiten, self.precision, self.log_det = kernel.whiten, kernel.precision, kernel.log_det
        if not len(missing):
            return
        # The precision's own missing block may be all but singular where columns nearly determine
        # one another, and its inverse would cost the digits of what is observed.
        factor = np.linalg.cholesky(kernel.covariance[:, seen[:, None], seen])
        self.whiten = whiten = np.linalg.inv(factor)
        self.precision = whiten.swapaxes(1, 2) @ whiten
        self.log_det = 2 * np.log(np.diagonal(factor, axis1=1, axis2=2)).sum(axis=1)
        explained = kernel.covariance[:, missing[:, None], seen] @ whiten.swapaxes(1, 2)
        gain = explained @ whiten
        hidden = kernel.covariance[:, missing[:, None], missing]
        spread = hidden - explained @ explained.swapaxes(1, 2)
        n_covariances, d = len(kernel.covariance), kernel.n_features
        self.lift = np.zeros((n_covariances, d, len(seen)))
        self.lift[:, seen, np.arange(len(seen))] = 1.0
        self.lift[:, missing] = gain
        self.offset = np.zeros((kernel.n_components, d))
        self.offset[:, missing] = kernel.mean[:, missing] - (gain @ self.mean[..., None])[..., 0]
        self.spare = np.zeros((n_covariances, d, d))
        self.spare[:, missing[:, None], missing] = spread

    def constant(self, quadratic: Array) -> Array:
        """(K,) log-density at `y = 0` plus log weight, from `mean' P mean` (K,)."""
        normaliser = quadratic + self.log_det + self.n_observed * LOG_2PI
        return np.asarray(-0.5 * normaliser - self.log_scale + self.kernel.log_weights)

    @cached_property
    def linear(self) -> Linear:
        """Natural parameters (K, o(o+1)/2 + o + 1) of the features of `fill_features`."""
        slope = (self.precision @ self.mean[..., None])[..., 0]
        quadratic = (slope * self.mean).sum(axis=1)
        row, column = np.triu_indices(self.n_observed)
        pairs = np.where(row == column, -0.5, -1.0) * self.precision[:, row, column]
        pairs = np.broadcast_to(pairs, (len(slope), pairs.shape[1]))
        eta = np.column_stack([pairs, slope, self.constant(quadratic)])
        covariance = self.kernel.covariance[:, self.seen[:, None], self.seen]
        rounding = quadratic_rounding(self.mean, covariance, self.precision)
        return Linear(eta, rounding, self.kernel.dtype)

    @cached_property
    def strips(self) -> list[Strip]:
        """The whitening of all components, in strips of a few rows."""
        fine, o = self.linear.fine, self.n_observed
        coarse = np.setdiff1d(np.arange(len(self.mean)), fine)
        found = []
        for components, dtype in ((coarse, self.linear.dtype), (fine, np.dtype(np.float64))):
            if not len(components):
                continue
            whiten = self.whiten[components]
            shift = -(whiten @ self.mean[components, :, None])
            for span in slices(o, STRIP):
                both = np.concatenate([shift[:, span], whiten[:, span, : span.stop]], axis=2)
                matrix = both.reshape(-1, 1 + span.stop).astype(dtype)
                found.append(Strip(components, span, matrix))
        return found

    @cached_property
    def peak(self) -> Array:
        """(K,) log-density at distance 0 plus log weight."""
        return self.constant(np.zeros(len(self.mean)))

    def completed(self, sums: Array, spared: Array | None = None) -> tuple[Array, Array, Array]:
        """Statistics (K,), (K, d), (K, d, d) over all columns from feature sums (K, p).

        With lift F, offset f and conditional covariance C, the moments `n`, `s`, `Q` of the
        observed entries complete to `n`, `F s + n f` and
        `F Q F' + F s f' + f s'F' + n f f' + m C`, where `m` is `spared` (K,), or `n`.
        """
        o = self.n_observed
        row, column = np.triu_indices(o)
        n, s = sums[:, -1], sums[:, -1 - o : -1]
        q = np.empty((len(sums), o, o))
        q[:, row, column] = sums[:, : len(row)]
        q[:, column, row] = sums[:, : len(row)]
        if o == self.kernel.n_features:
            return n, s, q
        f = self.offset
        lifted = (self.lift @ s[..., None])[..., 0]
        cross = lifted[:, :, None] * f[:, None, :]
        second = self.lift @ q @ self.lift.swapaxes(1, 2) + cross + cross.swapaxes(1, 2)
        second += n[:, None, None] * (f[:, :, None] * f[:, None, :])
        second += (n if spared is None else spared)[:, None, None] * self.spare
        return n, lifted + n[:, None] * f, second


def _spread(mean: Array, covariance: Array) -> Array:
    """(K, o) root mean square of the pivot coordinates of each component's rows."""
    return np.asarray(np.sqrt(np.diagonal(covariance, axis1=1, axis2=2) + mean**2))


# Rows whose products are summed in the arithmetic of the rows, and the least variance a column may
# have, in units of the pivot's, for sums about 0 to be as good as those about its mean.
RAW_ROWS, LEAST_VARIANCE = 1 << 15, 0.1


def quadratic_rounding(mean: Array, covariance: Array, precision: Array) -> Array:
    """(K,) how far rounding moves `y'P y - 2 m'P y + m'P m`, in units of the unit roundoff.

    The terms cancel where a mean is far out, and those of `y'P y` among themselves where columns
    nearly determine one another.
    """
    size = _spread(mean, covariance)
    pairs = (np.abs(precision) @ size[..., None])[..., 0] * size
    return np.asarray((pairs + (precision @ mean[..., None])[..., 0] * mean).sum(axis=1))


def fill_features(y: Array, out: Array) -> Array:
    """`[y_i y_j (i <= j), y, 1]` of a block (o, n), as (p, n) in `out`."""
    o, n = y.shape
    features = out[:, :n]
    start = 0
    for i in range(o):
        np.multiply(y[i], y[i:], out=features[start : start + o - i])
        start += o - i
    features[start : start + o] = y
    features[start + o] = 1.0
    return features


def second_moments(
    rows: Rows, pivot: Pivot, dtype: np.dtype[Any], fast: bool
) -> tuple[float, Array, Array]:
    """Sums of `w`, `w y` (d,) and `w y y'` (d, d) over complete rows of weight w, in pivot
    coordinates of some arithmetic: each block is multiplied with itself, and of a symmetric product
    only half is computed.
    """
    raw = _raw_moments(rows, pivot, dtype)
    if raw is not None:
        return raw
    n, d = rows.values.shape
    size = max(1, min(n, block_rows(d, dtype.itemsize, fast)))
    room, ones = np.empty((size, d), dtype), np.ones(size, dtype)
    sum_w, sum_wx, sum_wxx = 0.0, np.zeros(d), np.zeros((d, d))
    for index in slices(n, size):
        values = rows.values[index]
        y = room[: len(values)]
        if fast:
            compiled.centred(values, pivot, y)
        else:
            np.subtract(values, pivot.shift, out=y, casting="same_kind")
            y *= (1.0 / pivot.scale).astype(dtype)
        weight = ones[: len(y)]
        if rows.weights is not None:
            weight = rows.weights[index].astype(dtype)
        sum_w += float(weight.sum(dtype=np.float64))
        sum_wx += weight @ y
        if rows.weights is not None:
            y *= np.sqrt(weight)[:, None]
        sum_wxx += y.T @ y
    return sum_w, sum_wx, sum_wxx


def _raw_moments(
    rows: Rows, pivot: Pivot, dtype: np.dtype[Any]
) -> tuple[float, Array, Array] | None:
    """As `second_moments`, from sums of `x x'` itself, which saves a copy of the rows.

    None where rows are weighted or of another type, and where digits would be lost: where a mean is
    larger than the deviation, squares leave the range of numbers, or a column does not vary as the
    pivot says.
    """
    same = rows.weights is None and rows.values.dtype == dtype
    if not same or not (np.abs(pivot.shift) <= pivot.scale).all():
        return None
    numbers = np.finfo(dtype)
    square = np.square(pivot.scale)
    # Of `n` squares the sum is to be finite, and of the smallest the digits are to be kept.
    if (square > numbers.max * 1e-9).any() or (square * numbers.eps < numbers.tiny).any():
        return None
    n, d = rows.values.shape
    first, second = np.zeros(d), np.zeros((d, d))
    ones = np.ones(min(n, RAW_ROWS), dtype)
    for index in slices(n, RAW_ROWS):
        x = rows.values[index]
        first += ones[: len(x)] @ x
        second += x.T @ x
    cross = np.outer(first, pivot.shift)
    second += n * np.outer(pivot.shift, pivot.shift) - cross - cross.T
    second /= np.outer(pivot.scale, pivot.scale)
    varying = (np.diagonal(second) >= LEAST_VARIANCE * n).all()
    if not (varying and np.isfinite(second).all()):
        return None
    return float(n), (first - n * pivot.shift) / pivot.scale, second


def _n_features(n_observed: int) -> int:
    """How many features `fill_features` gives."""
    return n_observed * (n_observed + 1) // 2 + n_observed + 1


def _n_whitened(n_components: int, n_observed: int) -> int:
    """How many numbers a row a `_WhitenedBlock` has: `[1, y]`, and o of each component."""
    return (n_components + 1) * n_observed + 1


def _whitens(n_components: int, n_observed: int, tied: bool, itemsize: int) -> bool:
    """Whether rows with so many columns observed are a `_WhitenedBlock`."""
    few = n_components * WHITENED_COLUMNS[itemsize] <= n_observed
    return few and not tied and _n_features(n_observed) > WHITENED_WIDTH


def block_width(
    n_components: int, n_columns: int, tied: bool, itemsize: int, complete: bool
) -> int:
    """The most numbers a row in the buffer of features, or of what stands for them, of blocks of
    rows that observe all columns, or not all where they are not `complete`.
    """

    def width(n_observed: int) -> int:
        if _whitens(n_components, n_observed, tied, itemsize):
            return _n_whitened(n_components, n_observed)
        return _n_features(n_observed)

    return max(map(width, range(n_columns if complete else 0, n_columns + 1)))


class Block(Protocol):
    """Rows at hand, whatever their gaps."""

    constant: Array
    n_observed: int | Array

    def score(self) -> Array:
        """(K, n) of `log p(x | k) + log_weight_k`."""

    def gather(self, resp: Array, scaled: Array | None = None) -> None:
        """Add the moments under weights `scaled` (K, n), or `resp`, and the conditional covariance
        of missing entries under `resp`.
        """

    def filled(self, resp: Array, drawn: Array | None) -> Array:
        """(d, n) `sum_k r_k E[y | y_O, k]` in pivot coordinates, under weights (K, n), of rows that
        were scored; or `drawn + sum_k r_k E[y - drawn | y_O - drawn_O, k]`.
        """


class _Room:
    """Buffers for blocks of several patterns at a time, `size` rows in all."""

    def __init__(self, walk: GaussianWalk, size: int) -> None:
        self.size = size
        self.y = np.empty(walk.kernel.n_features * size)
        self.features = np.empty(walk.width * size, dtype=walk.kernel.dtype)
        self.clear()

    def clear(self) -> None:
        self.at = [0, 0]

    def take(self, n_observed: int, width: int, n: int) -> tuple[Array, Array]:
        """Room for (n_observed, n) coordinates and (width, n) features."""
        a, b = self.at
        self.at = [a + n_observed * n, b + width * n]
        y, features = self.y[a : self.at[0]], self.features[b : self.at[1]]
        return y.reshape(n_observed, n), features.reshape(width, n)


class GaussianWalk:
    """A walk over one chunk, pattern by pattern."""

    def __init__(self, kernel: GaussianKernel, rows: Rows) -> None:
        # A mask that says nothing does not show, not even in the last bit.
        if rows.observed is not None and rows.observed.all():
            rows = Rows(rows.values, None, rows.weights)
        self.kernel, self.rows = kernel, rows
        k, d = kernel.n_components, kernel.n_features
        # Complete rows under a tied covariance have no need of products of columns.
        alike = kernel.tied and rows.observed is None
        shape = k, d, kernel.tied, kernel.dtype.itemsize
        self.width = d + 2 if alike else block_width(*shape, rows.observed is None)
        self.fast = compiled.pays_for(rows.values, k)
        size = block_rows(self.width + k, kernel.dtype.itemsize, self.fast)
        self.size = min(size, max(1, rows.n_rows))
        self.sum_w = np.zeros(k)
        self.sum_wx = np.zeros((k, d))
        self.sum_wxx = np.zeros((d, d) if kernel.tied else (k, d, d))
        self.y = np.empty((d, self.size))
        self.features = np.empty((self.width, self.size), dtype=kernel.dtype)
        self.log_p = np.empty((k, self.size), dtype=kernel.dtype)
        self.block: Any = None
        self.index: Index = slice(0)
        self._works: dict[int, _FeaturesBlock | _WhitenedBlock | _TiedBlock] = {}
        self._room = _Room(self, 0)
        # What blocks refer back to: else a chunk would outlive its use until the garbage collector
        # comes round.
        self._weak: Any = weakref.proxy(self)

    def blocks(self) -> Iterator[Index]:
        if self.rows.observed is None:
            yield from self._dense(self.kernel.complete, None)
        else:
            yield from self._by_pattern()

    @cached_property
    def lanes(self) -> Lanes:
        """What all blocks of lanes share."""
        return Lanes(self.kernel, self.fast)

    @cached_property
    def patterns(self) -> Patterns:
        """The patterns of the chunk's rows."""
        return Patterns(self.rows.is_observed)

    @cached_property
    def frequent(self) -> NDArray[np.bool_]:
        """(p,) which patterns have enough rows for matrix products of their own."""
        return self.patterns.frequent(math.ceil(FREQUENT / self.kernel.n_components))

    @cached_property
    def frequent_left(self) -> list[int]:
        """The frequent patterns whose rows are still to be walked."""
        return np.flatnonzero(self.frequent).tolist()

    def _by_pattern(self) -> Iterator[Index]:
        """Blocks of one pattern after another, then those of all rare patterns."""
        found = self.patterns
        for p in self.frequent_left:
            yield from self._dense(self._marginal(p), found.rows(p))
        width = np.repeat(np.where(self.frequent, 0, found.width), found.counts)
        for chosen in self._lanes(found.order, width):
            self.lanes.clear()
            block = self._lane_block(found.of_row[chosen])
            block.load(self.rows.values, chosen)
            self.block, self.index = block, chosen
            yield chosen

    def _marginal(self, pattern: int) -> Marginal:
        found = self.patterns
        if found.width[pattern] == self.kernel.n_features:
            return self.kernel.complete
        return self.kernel.marginal(found.observed[pattern])

    def _work(self, marginal: Marginal) -> _FeaturesBlock | _WhitenedBlock | _TiedBlock:
        o, kernel = marginal.n_observed, self.kernel
        if o == kernel.n_features and kernel.tied:
            return _TiedBlock(self._weak)
        if _whitens(kernel.n_components, o, kernel.tied, kernel.dtype.itemsize):
            return _WhitenedBlock(self._weak, marginal)
        return _FeaturesBlock(self._weak, marginal)

    def _kept(
        self, pattern: int, marginal: Marginal
    ) -> _FeaturesBlock | _WhitenedBlock | _TiedBlock:
        """The work on rows of one pattern, which goes on from block to block."""
        work = self._works.get(pattern)
        if work is None:
            work = self._works[pattern] = self._work(marginal)
        return work

    def _dense(self, marginal: Marginal, index: Array | None) -> Iterator[Index]:
        """Blocks of rows that share one pattern: two matrix products each."""
        work = self._work(marginal)
        n = self.rows.n_rows if index is None else len(index)
        for piece in slices(n, self.size):
            chosen: Index = piece if index is None else index[piece]
            work.load(pick(self.rows.values, chosen), self.y, self.features)
            self.block, self.index = work, chosen
            yield chosen
        work.finish()

    def _lanes(self, order: Array, width: Array) -> Iterator[Array]:
        """Rows of each block of rare patterns; `width` counts what each of `order` observed, 0 for
        rows that are done or have nothing observed.
        """
        k, d = self.kernel.mean.shape
        # Integers of 16 bits are sorted digit by digit.
        index = order[np.argsort(width.astype(np.uint16), kind="stable")]
        edges = np.cumsum(np.bincount(width, minlength=d + 1))
        for o in range(1, d + 1):
            same = index[edges[o - 1] : edges[o]]
            for piece in slices(len(same), lane_rows(k, d, o)):
                yield same[piece]

    def _lane_block(self, of_row: Array) -> LaneBlock:
        """A block of rows whose patterns (n,) observe equally many columns."""
        present, own = numbered(of_row)
        return LaneBlock(self.lanes, self._weak, self.patterns.observed[present], own)

    def load(self, index: Index) -> None:
        values = pick(self.rows.values, index)
        n = len(values)
        if self.log_p.shape[1] < n:
            self.log_p = np.empty((len(self.log_p), n), dtype=self.kernel.dtype)
        self.block, self.index = _MixedBlock(self, n), index
        if self.rows.observed is None:
            if self.y.shape[1] < n:
                self.y = np.empty((len(self.y), n))
            if self.features.shape[1] < n:
                self.features = np.empty((self.width, n), dtype=self.kernel.dtype)
            work = self._kept(-1, self.kernel.complete)
            work.load(values, self.y, self.features)
            self.block.parts.append((slice(None), work))
            return
        if self._room.size < n:
            self._room = _Room(self, n)
        self._room.clear()
        found = self.patterns
        of_row = found.of_row[index]
        frequent = self.frequent[of_row]
        for p in np.unique(of_row[frequent]):
            chosen = np.flatnonzero(of_row == p)
            known = self._works.get(int(p))
            marginal = self._marginal(int(p)) if known is None else known.marginal
            self._load_frequent(int(p), marginal, chosen, pick(values, chosen))
        width = np.where(frequent, 0, found.width[of_row])
        self.lanes.clear()
        for chosen in self._lanes(np.arange(n), width):
            block = self._lane_block(of_row[chosen])
            block.load(values, chosen)
            self.block.parts.append((chosen, block))
        nothing = np.flatnonzero(found.width[of_row] == 0)
        if len(nothing):
            self.block.parts.append((nothing, _NoBlock(self.kernel, len(nothing))))

    def _load_frequent(
        self, pattern: int, marginal: Marginal, chosen: Index, values: Array
    ) -> None:
        """Add the rows `chosen` of the block at hand, which share a pattern."""
        work = self._kept(pattern, marginal)
        y, features = self._room.take(marginal.n_observed, work.width, len(values))
        work.load(values, y, features)
        self.block.parts.append((chosen, work))

    def swept(self, sum_r: Array, likeliest: bool) -> tuple[Index, Array] | None:
        """As `SweptWalk.swept`: complete rows, and those of each frequent pattern."""
        if not self.fast:
            return None
        if self.rows.observed is None:
            value = self._swept(self.kernel.complete, slice(None), sum_r, likeliest)
            return None if value is None else (slice(None), value)
        found: list[tuple[Array, Array]] = []
        for p in np.flatnonzero(self.frequent):
            index = self.patterns.rows(int(p))
            value = self._swept(self._marginal(int(p)), index, sum_r, likeliest)
            if value is not None:
                self.frequent_left.remove(int(p))
                found.append((index, value))
        if not found:
            return None
        index, value = map(np.concatenate, zip(*found, strict=True))
        return index, value

    def _swept(
        self, marginal: Marginal, index: Index, sum_r: Array, likeliest: bool
    ) -> Array | None:
        """Log-densities of rows of one pattern, whose statistics are gathered, or None."""
        work = self._work(marginal)
        if not isinstance(work, _FeaturesBlock):
            return None
        rows = self.rows
        values = pick(rows.values, index)
        value = compiled.swept(
            "quadratic",
            work.pivot,
            marginal.linear,
            values if work.whole else values[:, work.seen],
            None if rows.weights is None else rows.weights[index],
            (self.features, self.log_p),
            sum_r,
            work.sums,
            likeliest,
        )
        if value is not None:
            work.finish()
        return value

    def build_in(self, buffer: Array) -> None:
        self.features = buffer

    @property
    def linear_block(self) -> _FeaturesBlock | None:
        """The block at hand where it is of one pattern, and scored from its features."""
        block = self.block
        if isinstance(block, _MixedBlock) and len(block.parts) == 1:
            block = block.parts[0][1]
        return block if isinstance(block, _FeaturesBlock) else None

    def score(self) -> Array:
        log_p: Array = self.block.score()
        return log_p

    def base(self) -> Array | None:
        return None

    @property
    def constant(self) -> Array:
        """(K, 1) or (K, n) score of the block's rows were they at distance 0 from each mean."""
        constant: Array = self.block.constant
        return constant

    @property
    def n_observed(self) -> int | Array:
        """How many entries the block's rows have observed: one number, or (n,)."""
        n_observed: int | Array = self.block.n_observed
        return n_observed

    def gather(self, resp: Array, scaled: Array | None = None) -> None:
        """Add the block's statistics: moments under weights `scaled` (K, n), or `resp`, and the
        conditional covariance of missing entries under `resp`.
        """
        self.block.gather(resp, scaled)

    def complete(
        self, resp: Array, rng: np.random.Generator | None = None, spread: Array | None = None
    ) -> Array:
        """The block's rows (n, d) in data units with their gaps filled, once it is scored.

        A draw `y` of whole rows from the components, less what its own observed entries explain
        of its missing ones, deviates as the missing ones do from their conditional mean: so that
        `y + E[x_M - y_M | x_O - y_O, k]` is a draw from `p(x_M | x_O, k)` (Matheron's rule; Doucet
        2010), and nothing but conditional means is needed. `spread` (n,) multiplies deviations.
        """
        values = self.rows.values[self.index].astype(np.float64)
        if self.rows.observed is None:
            return values
        drawn = None
        if rng is not None:
            noise = rng.standard_normal(values.shape).T
            if spread is not None:
                noise *= spread
            drawn = self._deviation(resp, noise)
        pivot = self.kernel.pivot
        filled = pivot.shift + self.block.filled(resp, drawn).T * pivot.scale
        return np.where(self.rows.observed[self.index], values, filled)

    def _deviation(self, resp: Array, noise: Array) -> Array:
        """(d, n) standard normal noise with the covariance of the component that one-hot weights
        (K, n) say.
        """
        if self.kernel.tied:
            return np.asarray(self.kernel.factor[0] @ noise)
        drawn = np.empty_like(noise)
        for factor, r in zip(self.kernel.factor, resp, strict=True):
            hit = np.flatnonzero(r)
            drawn[:, hit] = factor @ noise[:, hit]
        return drawn

    def add(self, n: Array, s: Array, q: Array) -> None:
        """Add sums of `r`, `r y` and `r y y'` over some rows: (K,), (K, d) and (K, d, d)."""
        self.sum_w += n
        self.sum_wx += s
        self.sum_wxx += q.sum(axis=0) if self.kernel.tied else q

    def close(self) -> Monoid:
        for work in self._works.values():
            work.finish()
        self._works.clear()
        self.block = None
        stats: Monoid = self.kernel.stats_type(self.sum_w, self.sum_wx, self.sum_wxx)
        return stats


class _PatternBlock:
    """Blocks of rows of one pattern, however they are scored."""

    def __init__(self, walk: GaussianWalk, marginal: Marginal) -> None:
        self.walk, self.marginal, self.linear = walk, marginal, marginal.linear
        o = marginal.n_observed
        self.sums = np.zeros((walk.kernel.n_components, _n_features(o)))
        self.seen = marginal.seen
        self.pivot = Pivot(walk.kernel.pivot.shift[self.seen], walk.kernel.pivot.scale[self.seen])
        self.whole = o == walk.kernel.n_features
        self._roots: dict[int, Array] = {}
        self._y: Array | None = None
        # Of rows still to be gathered: values of blocks, and components, rows and weights of pairs.
        self._sure: list[tuple[Array, Array, Array, Array]] = []
        self._n_sure = 0
        self._upper = np.triu_indices(o)
        self.constant = marginal.peak[:, None]
        self.n_observed = o
        self.spared: Array | None = None

    def _take(self, values: Array, y: Array) -> None:
        """Take rows (n, d) at hand, and a buffer of at least (o, n) for `y`."""
        self.values = values if self.whole else values[:, self.seen]
        self._room, self._y = y[: len(self.seen)], None

    @property
    def y(self) -> Array:
        """(o, n) observed columns in pivot coordinates, in float64."""
        if self._y is None and self.walk.fast and self._room.flags.c_contiguous:
            self._y = compiled.pivoted(self.values, self.pivot, self._room)
        elif self._y is None:
            self._y = self.pivot.block(self.values, self._room)
        return self._y

    def _direct(self, k: int, rows: Index) -> Array:
        """Scores of some of the rows under one component, by the whitened distance: for a mean far
        out in pivot units, or a component that needs float64 where few do.
        """
        marginal = self.marginal
        if k not in self._roots:
            precision = marginal.precision[0 if self.walk.kernel.tied else k]
            self._roots[k] = np.linalg.cholesky(precision).T
        z = self._roots[k] @ (self.y[:, rows] - marginal.mean[k][:, None])
        return np.asarray(marginal.peak[k] - 0.5 * np.einsum("in,in->n", z, z))

    def _add_rows(self, k: int, y: Array, weights: Array) -> None:
        """Add sums of one component over rows, given as (o, n) columns, which are overwritten."""
        o = len(y)
        self.sums[k, -1] += weights.sum(dtype=np.float64)
        self.sums[k, -1 - o : -1] += y @ weights
        # Of a product with itself only half is computed.
        y *= np.sqrt(weights)
        self.sums[k, : -1 - o] += (y @ y.T)[self._upper]

    def add(self, sums: Array) -> None:
        """Add (K, p) sums of features to those of the pattern."""
        self.sums += sums

    def gather(self, resp: Array, scaled: Array | None = None) -> None:
        if scaled is not None and not self.whole:
            spared = resp.sum(axis=1, dtype=np.float64)
            self.spared = spared if self.spared is None else self.spared + spared
        weights = resp if scaled is None else scaled
        if weights.dtype != self.dtype:
            weights = weights.astype(self.dtype)
        sure = self._pairs(weights) if self.sums.shape[1] > SURE_WIDTH else None
        if sure is None:
            self._gather(weights)
            return
        component, row = np.nonzero(sure)
        self._sure.append((self.values, component, row + self._n_sure, weights[sure]))
        self._n_sure += weights.shape[1]
        if self._n_sure >= SURE_ROWS:
            self._gather_sure()

    @property
    def dtype(self) -> np.dtype[Any]:
        """The arithmetic of the rows at hand."""
        raise NotImplementedError

    @property
    def pair(self) -> float:
        """How many times as long a pair of `_pairs` takes as one of all rows and components."""
        return SURE_PAIR

    def _gather(self, weights: Array) -> None:
        """Add the sums of all rows at hand under weights (K, n)."""
        raise NotImplementedError

    def _pairs(self, weights: Array) -> NDArray[np.bool_] | None:
        """(K, n) where weights are more than a share of rounding of their row's; None where these
        are so many that one product of all takes less.
        """
        unit = float(np.finfo(weights.dtype).eps) / len(weights)
        pairs = weights > unit * weights.sum(axis=0)
        share = np.count_nonzero(pairs) / pairs.size
        return pairs if SURE_CALL / self.sums.shape[1] + self.pair * share < 1 else None

    def _gather_sure(self) -> None:
        """Add the sums of rows that are sure of their components, component by component."""
        if not self._sure:
            return
        values, component, row, weights = map(np.concatenate, zip(*self._sure, strict=True))
        self._sure, self._n_sure = [], 0
        order = np.argsort(component, kind="stable")
        row, weights = row[order], weights[order]
        edges = np.searchsorted(component[order], np.arange(len(self.sums) + 1))
        dtype = np.dtype(np.float64) if self.linear.fine.size else self.linear.dtype
        if self.walk.fast:
            compiled.gather_sure(values, self.pivot, edges, row, weights, dtype, self.sums)
            return
        y = ((values - self.pivot.shift) / self.pivot.scale).astype(dtype, copy=False)
        weights = weights.astype(dtype, copy=False)
        for k in np.flatnonzero(np.diff(edges)):
            pairs = slice(edges[k], edges[k + 1])
            self._add_rows(int(k), y.take(row[pairs], axis=0).T, weights[pairs])

    def filled(self, resp: Array, drawn: Array | None) -> Array:
        if self.whole:
            return self.y
        marginal = self.marginal
        y = self.y if drawn is None else self.y - drawn[self.seen]
        filled = marginal.offset.T @ resp
        for k, r in enumerate(resp):
            lift = marginal.lift[0 if self.walk.kernel.tied else k]
            filled += (lift @ y) * r
        return np.asarray(filled if drawn is None else filled + drawn)

    def finish(self) -> None:
        self._gather_sure()
        self.walk.add(*self.marginal.completed(self.sums, self.spared))


class _FeaturesBlock(_PatternBlock):
    """Blocks of one pattern: features of the observed columns, one GEMM each way."""

    def __init__(self, walk: GaussianWalk, marginal: Marginal) -> None:
        super().__init__(walk, marginal)
        self.width = self.sums.shape[1]
        fine = self.linear.fine
        # Components that are worked on apart from the others, and how their scores may round.
        self.apart: list[int] = []
        if 0 < fine.size * COLUMNS_APART <= marginal.n_observed:
            self.apart, self.blur = fine.tolist(), self._blur(fine)
        self._exact: Array | None = None
        self._exact_room = np.empty((self.width, 0))
        self._summed = np.empty(self.sums.shape, dtype=walk.kernel.dtype)

    def _blur(self, components: Array) -> Array:
        """(C, 3) what `_score_apart` bounds the rounding of a row's score by."""
        o = self.marginal.n_observed
        eta = np.abs(self.linear.whole[components])
        row, column = np.triu_indices(o)
        pairs = np.zeros((len(components), o, o))
        pairs[:, row, column] += eta[:, : len(row)]
        pairs[:, column, row] += eta[:, : len(row)]
        norm = pairs.sum(axis=2).max(axis=1, initial=0.0) / 2
        slope = np.sqrt((eta[:, len(row) : -1] ** 2).sum(axis=1))
        unit = float(np.finfo(self.linear.dtype).eps)
        return np.asarray(self.width * unit * np.column_stack([norm, slope, eta[:, -1]]))

    def load(self, values: Array, y: Array, features: Array) -> None:
        """Take rows (n, d) at hand, in buffers of at least (o, n) and (width, n)."""
        self._take(values, y)
        self._exact = None
        features = features[: self.width]
        if self.walk.fast and features.flags.c_contiguous:
            self.features = compiled.quadratic(self.values, self.pivot, features)
        else:
            y = self.y if features.dtype == np.float64 else self.y.astype(features.dtype)
            self.features = fill_features(y, features)

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.features.dtype

    def exact(self) -> Array:
        """Features in float64."""
        if self.features.dtype == np.float64:
            return self.features
        if self._exact is None:
            n = self.features.shape[1]
            if self._exact_room.shape[1] < n:
                self._exact_room = np.empty((self.width, n))
            if self.walk.fast:
                self._exact = compiled.quadratic(self.values, self.pivot, self._exact_room)
            else:
                self._exact = fill_features(self.y, self._exact_room)
        return self._exact

    def score(self) -> Array:
        if self.apart:
            return self._score_apart()
        log_p = self.linear.score(self.features, self.exact, self.walk.log_p)
        for k in self.linear.direct:
            log_p[k] = self._direct(int(k), slice(None))
        return log_p

    def _score_apart(self) -> Array:
        """Scores in float32, those of a component that needs float64 only where they matter.

        The score of a row is a sum of p terms, no larger in all than
        `|P|_inf |y|^2 / 2 + |slope| |y| + |constant|`, of which rounding takes a share of p unit
        roundoffs at most. Where by that it is too low for any responsibility it stays as it is.
        """
        log_p = self.linear.coarse(self.features, self.walk.log_p)
        y, apart = self.features[-1 - len(self.seen) : -1], np.zeros(len(log_p), dtype=bool)
        apart[self.apart] = True
        found = compiled.where_it_matters(log_p, y, apart, self.blur, NOTHING, self.walk.fast)
        for k, matters in zip(self.apart, found, strict=True):
            rows = np.flatnonzero(matters)
            if len(rows):
                log_p[k, rows] = self._direct(k, rows)
        return log_p

    def _gather_apart(self, k: int, weights: Array) -> None:
        """Add one component's sums from coordinates in float64, of rows that have any weight."""
        hit = np.flatnonzero(weights)
        if len(hit):
            self._add_rows(k, self.y[:, hit], weights[hit].astype(np.float64))

    def _gather(self, weights: Array) -> None:
        if not self.apart:
            self.linear.accumulate(self.features, self.exact, weights, self.sums, self._summed)
            return
        np.matmul(weights, self.features.T, out=self._summed)
        self._summed[self.apart] = 0.0
        self.sums += self._summed
        for k in self.apart:
            self._gather_apart(k, weights[k])


class _WhitenedBlock(_PatternBlock):
    """Blocks of one pattern of many columns under few components, without their features.

    Scores are squares of `W_k (y - mean_k)`, with the inverse W of a Cholesky factor, and moments
    are `sum r_k y [1, y]`, each of all components by one product a strip. That is one to two times
    the operations that features take; but with few components products of these run far below
    their rate, and here K o numbers a row are written and read, not o (o + 1) / 2.
    """

    def __init__(self, walk: GaussianWalk, marginal: Marginal) -> None:
        super().__init__(walk, marginal)
        self.width = _n_whitened(len(self.sums), marginal.n_observed)
        self._moments = [np.zeros(strip.matrix.shape) for strip in marginal.strips]
        self._wide_room = np.empty(0)

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.walk.kernel.dtype

    @property
    def pair(self) -> float:
        return WHITENED_PAIR

    def load(self, values: Array, y: Array, features: Array) -> None:
        """As `_FeaturesBlock.load`."""
        self._take(values, y)
        n, o = len(values), len(self.seen)
        room = features.reshape(-1)
        self._rows, self._products = room[: (o + 1) * n].reshape(o + 1, n), room[(o + 1) * n :]
        self._rows[0] = 1.0
        if self.walk.fast:
            compiled.pivoted(self.values, self.pivot, self._rows[1:])
        else:
            self._rows[1:] = self.y
        self._exact: Array | None = None

    def _at_hand(self, strip: Strip) -> tuple[Array, Array]:
        """`[1, y]` (1 + span.stop, n) in the strip's arithmetic, and room for (C, h, n)."""
        n = self._rows.shape[1]
        rows, room = self._rows, self._products
        if strip.matrix.dtype != rows.dtype:
            if self._exact is None:
                self._exact = np.vstack([np.ones((1, n)), self.y])
            if self._wide_room.size < len(strip.matrix) * n:
                self._wide_room = np.empty(len(strip.matrix) * n)
            rows, room = self._exact, self._wide_room
        shape = len(strip.components), -1, n
        return rows[: strip.matrix.shape[1]], room[: len(strip.matrix) * n].reshape(shape)

    def score(self) -> Array:
        n = self._rows.shape[1]
        square = np.zeros((len(self.sums), n))
        for strip in self.marginal.strips:
            rows, z = self._at_hand(strip)
            np.matmul(strip.matrix, rows, out=z.reshape(-1, n))
            square[strip.components] += compiled.half_square(z, self.walk.fast)
        square += self.constant
        log_p = part(self.walk.log_p, n)
        log_p[:] = square
        for k in self.linear.direct:
            log_p[k] = self._direct(int(k), slice(None))
        return log_p

    def _gather(self, weights: Array) -> None:
        self.sums[:, -1] += weights.sum(axis=1, dtype=np.float64)
        for strip, moments in zip(self.marginal.strips, self._moments, strict=True):
            rows, weighed = self._at_hand(strip)
            every = len(strip.components) == len(weights)
            some = weights if every else weights[strip.components]
            own = rows[1 + strip.span.start :]
            np.multiply(some[:, None], own, out=weighed)
            moments += weighed.reshape(len(moments), -1) @ rows.T

    def finish(self) -> None:
        o = len(self.seen)
        for strip, moments in zip(self.marginal.strips, self._moments, strict=True):
            of_each = moments.reshape(len(strip.components), -1, 1 + strip.span.stop)
            first = slice(-1 - o + strip.span.start, -1 - o + strip.span.stop)
            self.sums[strip.components, first] += of_each[:, :, 0]
            # Of a symmetric matrix the strips have the lower half, and features the upper one.
            column, row = self._upper
            mine = (row >= strip.span.start) & (row < strip.span.stop)
            pairs = of_each[:, row[mine] - strip.span.start, 1 + column[mine]]
            self.sums[np.ix_(strip.components, np.flatnonzero(mine))] += pairs
            moments[:] = 0.0
        super().finish()


class _TiedBlock:
    """Blocks of complete rows under a tied covariance.

    `y' P y` is the same for all components, so only `[y, 1]` meets the K components, and the
    second moment is summed once over all of them.
    """

    def __init__(self, walk: GaussianWalk) -> None:
        self.walk, self.kernel = walk, walk.kernel
        self.marginal = walk.kernel.complete
        self.linear = walk.kernel.tied_linear
        k, d = walk.kernel.n_components, walk.kernel.n_features
        # A precision that one component needs all must have: they share the quadratic term.
        self.exactly = bool(self.linear.fine.size)
        # One feature more, for what all components share of a score.
        eta = self.linear.whole if self.exactly else self.linear.eta
        self.eta = np.column_stack([eta, np.ones(k, eta.dtype)])
        self.width = d + 2
        self.sums = np.zeros((k, d + 1))
        self.second = np.zeros((d, d))
        self.constant = self.marginal.peak[:, None]
        self.n_observed = d

    def load(self, values: Array, y: Array, features: Array) -> None:
        """Take rows (n, d) at hand, in buffers of at least (d, n) and (d + 2, n)."""
        n, d = values.shape
        pivot = self.kernel.pivot
        if self.exactly:
            features = np.empty((d + 2, n))
        features = features[: d + 2]
        self.features = features[:, :n]
        if self.walk.fast and y.flags.c_contiguous and features.flags.c_contiguous:
            self.y = compiled.pivoted(values, pivot, features)
            if features.dtype != np.float64:
                self.y = compiled.pivoted(values, pivot, y)
        else:
            self.y = self.features[:d] = pivot.block(values, y)
        self.features[d] = 1.0
        self.z = self.kernel.whiten[0] @ self.y
        self.features[d + 1] = compiled.half_square(self.z[None], self.walk.fast)[0]

    def score(self) -> Array:
        log_p = part(self.walk.log_p, self.y.shape[1])
        if self.linear.direct.size:
            zero = self.marginal.peak
            for k, mean in enumerate(self.kernel.mean):
                gap = self.z - (self.kernel.whiten[0] @ mean)[:, None]
                log_p[k] = zero[k] - 0.5 * np.einsum("in,in->n", gap, gap)
            return log_p
        if self.exactly:
            log_p[:] = self.eta @ self.features
        else:
            np.matmul(self.eta, self.features, out=log_p)
        return log_p

    def gather(self, resp: Array, scaled: Array | None = None) -> None:
        resp = resp if scaled is None else scaled
        self.sums += resp.astype(self.features.dtype, copy=False) @ self.features[:-1].T
        weight = compiled.total(resp, self.walk.fast)
        self.second += (self.y * weight) @ self.y.T

    def filled(self, resp: Array, drawn: Array | None) -> Array:  # noqa: ARG002
        """Nothing is missing."""
        return self.y

    def finish(self) -> None:
        self.walk.sum_w += self.sums[:, -1]
        self.walk.sum_wx += self.sums[:, :-1]
        self.walk.sum_wxx += (self.second + self.second.T) / 2


class _NoBlock:
    """Rows with nothing observed: weights alone, and nothing to add."""

    n_observed = 0

    def __init__(self, kernel: GaussianKernel, n: int) -> None:
        self.mean = kernel.mean
        self.constant = kernel.log_weights[:, None]
        self.log_p = np.repeat(self.constant, n, axis=1)

    def score(self) -> Array:
        return self.log_p

    def gather(self, resp: Array, scaled: Array | None = None) -> None:
        """Nothing was observed, so there is nothing to sum."""

    def filled(self, resp: Array, drawn: Array | None) -> Array:
        filled = self.mean.T @ resp
        return np.asarray(filled if drawn is None else filled + drawn)


class _MixedBlock:
    """Rows of several patterns, each in a block of its own.

    `parts` are the positions of each block's rows among the n at hand, and the block.
    """

    def __init__(self, walk: GaussianWalk, n: int) -> None:
        self.shape = (walk.kernel.n_components, n)
        self.y_shape = (walk.kernel.n_features, n)
        self.dtype = walk.kernel.dtype
        self.parts: list[tuple[Index, Block]] = []

    def score(self) -> Array:
        if len(self.parts) == 1:
            return self.parts[0][1].score()
        log_p = np.empty(self.shape, dtype=self.dtype)
        for chosen, block in self.parts:
            log_p[:, chosen] = block.score()
        return log_p

    @property
    def constant(self) -> Array:
        if len(self.parts) == 1:
            return self.parts[0][1].constant
        constant = np.empty(self.shape)
        for chosen, block in self.parts:
            constant[:, chosen] = block.constant
        return constant

    @property
    def n_observed(self) -> int | Array:
        if len(self.parts) == 1:
            return self.parts[0][1].n_observed
        n_observed = np.empty(self.shape[1], dtype=np.intp)
        for chosen, block in self.parts:
            n_observed[chosen] = block.n_observed
        return n_observed

    def gather(self, resp: Array, scaled: Array | None = None) -> None:
        if len(self.parts) == 1:
            self.parts[0][1].gather(resp, scaled)
            return
        for chosen, block in self.parts:
            block.gather(resp[:, chosen], None if scaled is None else scaled[:, chosen])

    def filled(self, resp: Array, drawn: Array | None) -> Array:
        filled = np.empty(self.y_shape)
        for chosen, block in self.parts:
            part = None if drawn is None else drawn[:, chosen]
            filled[:, chosen] = block.filled(resp[:, chosen], part)
        return filled
