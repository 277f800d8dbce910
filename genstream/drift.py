"""How a batch differs from the rows a model was fitted on, seen before it is learned.

A `Reference` is a small summary of rows and of how well a model explains them. A `Watch` runs over
the pieces of a batch and adds up counts and sums, so that the way the batch is cut changes nothing;
its `Drift` says how far the mean log-likelihood is from what is usual, how many rows surprise the
model, and which columns have shifted, are empty, constant or in another unit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from operator import add
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import chdtri, pdtrc

from genstream.errors import ConfigError, CorruptError, DataError
from genstream.rows import Rows
from genstream.schema import Column
from genstream.story import Params, Story

Array = NDArray[np.float64]

# Bins of a real or count column between the reference's quantiles.
N_BINS = 20
# Quantiles by which a column's scale is compared.
LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)
# Ratio of neighbouring bins of the sketch a batch's quantiles are read from, and its reach: sizes
# from 1e-9 to 1e9 times the reference's.
RATIO = 1.04
REACH = math.ceil(math.log(1e9) / math.log(RATIO))
# A row's log-likelihood is not counted as worse than this, so that sums stay finite.
WORST = 1e100
# Bins that expect fewer rows than this in a batch are counted as one.
FEWEST = 5.0


@dataclass(frozen=True)
class Thresholds:
    """When a difference is called drift.

    Parameters
    ----------
    moderate, strong
        Population stability index of a column, after its correction for chance.
    chance
        Probability that a batch of independent rows from the reference's own distribution has any
        column called moderate or strong, shared evenly among the columns; or that it is flagged
        for its surprising rows.
    z
        Half-width of the band of the mean log-likelihood, in standard deviations.
    min_history
        Earlier batches needed before the band is theirs rather than the reference's.
    between
        Deviation of the means of batches among themselves that is granted while there is too
        little history to measure it, as a share of a row's standard deviation.
    surprise
        Share of the reference's rows that count as surprising: 0.01 or 0.001.
    max_surprising
        Share of surprising rows above which a batch is flagged, unless it is so small that this
        comes about by `chance`.
    missing
        Rise of the share of missing values above which a column is flagged.

    Raises
    ------
    ConfigError
        Where a number is out of its range.
    """

    moderate: float = 0.1
    strong: float = 0.25
    chance: float = 0.001
    z: float = 4.0
    min_history: int = 8
    between: float = 0.2
    surprise: float = 0.01
    max_surprising: float = 0.05
    missing: float = 0.1

    def __post_init__(self) -> None:
        ranges = [
            ("moderate", self.moderate > 0, "above 0"),
            ("strong", self.strong >= self.moderate, "at least moderate"),
            ("chance", 0 < self.chance < 1, "in (0, 1)"),
            ("z", self.z > 0, "above 0"),
            ("min_history", self.min_history >= 2, "at least 2"),
            ("between", self.between >= 0, "at least 0"),
            ("surprise", self.surprise in (0.01, 0.001), "0.01 or 0.001"),
            ("max_surprising", 0 < self.max_surprising <= 1, "in (0, 1]"),
            ("missing", 0 < self.missing <= 1, "in (0, 1]"),
        ]
        for name, right, allowed in ranges:
            if not right:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must be {allowed}")


# --- what batches are compared with --------------------------------------------------------------


@dataclass(frozen=True)
class ColumnReference:
    """One column of the reference.

    `edges` cut a real or count column into bins `[edge_i, edge_i+1)` with open ends; a value that
    fills more than one step between quantiles has a bin of its own. A binary or categorical column
    has one bin a level and no edges. `shares` are the bins' shares of all rows, and last the share
    in which the column is missing. `quantiles` are those at `LEVELS` of the observed values, and
    `least` and `most` their range, in data units; empty and 0 where none was observed.
    """

    name: str
    kind: str
    edges: tuple[float, ...]
    shares: tuple[float, ...]
    quantiles: tuple[float, ...] = ()
    least: float = 0.0
    most: float = 0.0

    @property
    def numeric(self) -> bool:
        """Whether values have a size: real and count columns."""
        return self.kind in ("real", "count")

    @property
    def median(self) -> float | None:
        """Median of a real or count column; None elsewhere and where nothing was observed."""
        return self.quantiles[2] if self.quantiles else None

    @property
    def iqr(self) -> float | None:
        """Distance of the quartiles; None as `median`."""
        return self.quantiles[3] - self.quantiles[1] if self.quantiles else None

    @property
    def missing(self) -> float:
        """Share of the rows in which the column is missing."""
        return self.shares[-1]

    @property
    def unit(self) -> float:
        """A typical size of the values, above 0."""
        sizes = sorted(abs(q) for q in self.quantiles if q != 0)
        return sizes[len(sizes) // 2] if sizes else max(abs(self.least), abs(self.most)) or 1.0

    @classmethod
    def of(cls, column: Column, x: Array, seen: NDArray[np.bool_], w: Array) -> ColumnReference:
        """Summary of the values (n,) of a column where it is seen, with row weights."""
        some = seen & (w > 0)
        x, weight = x[some], w[some]
        empty = ColumnReference(column.name, column.kind, (), ())
        if column.kind in ("real", "count") and len(x):
            levels = np.arange(1, N_BINS) / N_BINS
            cuts = np.quantile(x, levels, method="inverted_cdf", weights=weight)
            marks = np.quantile(x, LEVELS, method="inverted_cdf", weights=weight)
            empty = replace(
                empty,
                edges=_edges(cuts, float(np.ptp(x))),
                quantiles=tuple(marks.tolist()),
                least=float(x.min()),
                most=float(x.max()),
            )
        n_bins = len(empty.edges) + 1 if empty.numeric else max(2, column.n_levels)
        counts = np.bincount(empty.bins(x), weight, minlength=n_bins)
        shares = np.append(counts, w[~seen].sum()) / w.sum()
        return replace(empty, shares=tuple(shares.tolist()))

    def bins(self, x: Array) -> NDArray[np.intp]:
        """The bin of each observed value (n,)."""
        if self.numeric:
            return np.searchsorted(np.array(self.edges), x, side="right")
        return x.astype(np.intp)


def _edges(cuts: Array, span: float) -> tuple[float, ...]:
    """Increasing edges from quantiles, some of which may be one value again and again."""
    values, times = np.unique(cuts, return_counts=True)
    edges: list[float] = []
    for value, n in zip(values.tolist(), times.tolist(), strict=True):
        if n == 1:
            edges.append(value)
            continue
        # Wide enough that the same value stored in float32 stays in its bin.
        around = 1e-6 * abs(value) or 1e-9 * (span or 1.0)
        edges += [value - around, value + around]
    return tuple(np.unique(edges).tolist())


@dataclass(frozen=True)
class Reference:
    """What batches are compared with: columns and log-likelihoods of a sample of rows.

    `n_rows` is the number of rows the sample is worth (Kish's effective size where rows have
    weights). `mean_loglik` and `sd_loglik` are mean and standard deviation over rows of
    `log p(x)`, in nats; `quantile_001` and `quantile_01` the values which 0.1% and 1% of the rows
    fall below.
    """

    n_rows: float
    mean_loglik: float
    sd_loglik: float
    quantile_001: float
    quantile_01: float
    columns: tuple[ColumnReference, ...]

    @classmethod
    def of(cls, story: Story, params: Params, rows: Rows) -> Reference:
        """The reference given by a sample of rows and the model that is to explain batches.

        Raises DataError where no row with a positive weight has anything observed, or rows are not
        possible under the story's schema.
        """
        rows.check(story.schema)
        w, seen = rows.row_weights, rows.is_observed
        useful = seen.any(axis=1) & (w > 0)
        if not useful.any():
            raise DataError("a reference needs rows with something observed: the sample has none")
        log_p = _finite(story.log_prob(params, rows))[useful]
        weight = w[useful]
        mean = float(weight @ log_p / weight.sum())
        sd = math.sqrt(float(weight @ (log_p - mean) ** 2 / weight.sum()))
        low = np.quantile(log_p, (0.001, 0.01), method="inverted_cdf", weights=weight)
        columns = tuple(
            ColumnReference.of(column, rows.values[:, j].astype(np.float64), seen[:, j], w)
            for j, column in enumerate(story.schema.columns)
        )
        n = float(w.sum() ** 2 / (w @ w))
        return cls(n, mean, sd, float(low[0]), float(low[1]), columns)

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary that `from_json` turns back into an equal reference, to the bit."""
        return _plain(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Reference:
        """Inverse of `to_json`. Raises CorruptError where a key is missing or wrong."""
        try:
            columns = tuple(ColumnReference(**_tuples(c)) for c in data["columns"])
            return cls(**{**data, "columns": columns})
        except (KeyError, TypeError, AttributeError) as error:
            raise CorruptError(f"the stored reference is not valid: {error!r}") from error


def _finite(log_p: Array) -> Array:
    return np.nan_to_num(log_p, nan=-WORST, neginf=-WORST, posinf=WORST).clip(-WORST, WORST)


def _tuples(data: Mapping[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}


def _plain(item: Any) -> dict[str, Any]:
    def listed(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: listed(v) for k, v in value.items()}
        return [listed(v) for v in value] if isinstance(value, (list, tuple)) else value

    plain: dict[str, Any] = listed(asdict(item))
    return plain


# --- what is seen of a batch ---------------------------------------------------------------------


@dataclass(frozen=True)
class ColumnDrift:
    """How one column of a batch differs from the reference.

    `psi` is the population stability index `sum (b - a) log(b / a)` over bins with shares `a` of
    the reference and `b` of the batch, missing values a bin of their own, less what chance alone
    makes of it, and not below 0; `level` is `none`, `moderate` or `strong`. `missing` is the share
    of rows in which the column is missing. `median` (good to 2%), `least` and `most` are in data
    units, and None where nothing was observed or values have no size.
    """

    name: str
    psi: float
    level: str
    missing: float
    median: float | None
    least: float | None
    most: float | None


@dataclass(frozen=True)
class Drift:
    """How a batch differs from the reference and from the batches before it.

    `mean_loglik` is the mean `log p(x)`, in nats a row, under a model that has not learned the
    batch, `standard_error` that of the mean; `band` is where it usually lies, and `outside` says
    that it does not. `surprising` is the share of rows below the reference's threshold, of which
    `expected_surprising` is usual. `flags` are lines for people.
    """

    name: str
    n_rows: int
    n_unobserved: int
    mean_loglik: float
    standard_error: float
    band: tuple[float, float]
    outside: bool
    surprising: float
    expected_surprising: float
    columns: tuple[ColumnDrift, ...]
    flags: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary of finite numbers, strings, lists and None."""
        return _plain(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Drift:
        """Inverse of `to_json`. Raises CorruptError where a key is missing or wrong."""
        try:
            columns = tuple(ColumnDrift(**c) for c in data["columns"])
            return cls(**{**_tuples(data), "columns": columns})
        except (KeyError, TypeError, AttributeError) as error:
            raise CorruptError(f"the stored drift is not valid: {error!r}") from error


@dataclass(frozen=True, eq=False)
class Counts:
    """What is summed over the rows of a batch; `merge` is associative and commutative.

    With row weights `w` and `l` the log-likelihood less the reference's mean, over rows with
    something observed: `sum_w`, `sum_wl`, `sum_ww`, `sum_wwl`, `sum_wwll`, and `surprising`, the
    weight of rows below the threshold. `weight` and `square` sum `w` and `w^2` over all rows.
    `bins` is the weight in every bin of every column, `sketch` (numeric columns, 4 REACH + 3) that
    in bins of the values' size, `beyond` (d,) that of values further outside the reference's range
    than its width; `least` and `most` (d,) are the range of the values.
    """

    n_rows: int
    n_unobserved: int
    weight: float
    square: float
    sum_w: float
    sum_wl: float
    sum_ww: float
    sum_wwl: float
    sum_wwll: float
    surprising: float
    bins: Array
    sketch: Array
    beyond: Array
    least: Array = field(metadata={"merge": np.minimum})
    most: Array = field(metadata={"merge": np.maximum})

    def merge(self, other: Counts) -> Counts:
        """The counts of both pieces together."""
        values = {
            f.name: f.metadata.get("merge", add)(getattr(self, f.name), getattr(other, f.name))
            for f in fields(self)
        }
        return Counts(**values)


class Watch:
    """Watches one batch, piece by piece, before it is learned.

    Parameters
    ----------
    reference
        What the batch is compared with.
    story, params
        The model, which must not have learned the batch.
    thresholds
        When a difference is called drift.

    Raises
    ------
    DataError
        Where reference and story have different columns.
    """

    def __init__(
        self,
        reference: Reference,
        story: Story,
        params: Params,
        thresholds: Thresholds | None = None,
    ) -> None:
        names = tuple(column.name for column in reference.columns)
        if names != story.schema.names:
            raise DataError(
                f"the reference has columns {', '.join(names)}, the model "
                f"{', '.join(story.schema.names)}: make the reference anew from the model's rows"
            )
        self.reference, self.story, self.params = reference, story, params
        self.thresholds = thresholds or Thresholds()
        columns = reference.columns
        sizes = [len(c.shares) for c in columns]
        # Levels that the model has learned since have bins too, at the end, before the missing.
        for j, column in enumerate(story.schema.columns):
            sizes[j] = max(sizes[j], column.n_levels + 1)
        self._edges = np.concatenate([[0], np.cumsum(sizes)]).astype(np.intp)
        self._numeric = [j for j, c in enumerate(columns) if c.numeric]
        low = self.thresholds.surprise == 0.001
        self._surprise = reference.quantile_001 if low else reference.quantile_01
        # No rows: the neutral element of `merge`.
        self.counts = self._count(Rows(np.zeros((0, len(columns)))))

    def add(self, rows: Rows) -> None:
        """Look at a piece of the batch. Raises DataError where its rows are not possible under
        the story's schema.
        """
        self.counts = self.counts.merge(self._count(rows.check(self.story.schema)))

    def merge(self, other: Watch) -> None:
        """Take over what another watch, of the same model and reference, has seen."""
        self.counts = self.counts.merge(other.counts)

    def _count(self, rows: Rows) -> Counts:
        w, seen = rows.row_weights, rows.is_observed
        log_p = _finite(self.story.log_prob(self.params, rows))
        observed = seen.any(axis=1)
        v = np.where(observed, w, 0.0)
        gap = log_p - self.reference.mean_loglik
        d = len(self.reference.columns)
        bins, beyond = np.zeros(self._edges[-1]), np.zeros(d)
        sketch = np.zeros((len(self._numeric), 4 * REACH + 3))
        least, most = np.full(d, np.inf), np.full(d, -np.inf)
        at = 0
        for j, column in enumerate(self.reference.columns):
            here = seen[:, j] & (w > 0)
            x, weight = rows.values[here, j].astype(np.float64), w[here]
            first, last = self._edges[j], self._edges[j + 1] - 1
            bins[first:last] = np.bincount(column.bins(x), weight, minlength=last - first)
            bins[last] = w[~seen[:, j]].sum()
            if len(x):
                least[j], most[j] = x.min(), x.max()
            if column.numeric:
                sketch[at] = np.bincount(_size(x, column.unit), weight, minlength=4 * REACH + 3)
                at += 1
                if column.quantiles:
                    far = (column.most - column.least) or column.unit
                    out = (x < column.least - far) | (x > column.most + far)
                    beyond[j] = weight[out].sum()
        return Counts(
            n_rows=rows.n_rows,
            n_unobserved=int(rows.n_rows - observed.sum()),
            weight=float(w.sum()),
            square=float(w @ w),
            sum_w=float(v.sum()),
            sum_wl=float(v @ gap),
            sum_ww=float(v @ v),
            sum_wwl=float((v * v) @ gap),
            sum_wwll=float((v * v) @ (gap * gap)),
            surprising=float(v[log_p < self._surprise].sum()),
            bins=bins,
            sketch=sketch,
            beyond=beyond,
            least=least,
            most=most,
        )

    def result(self, history: Sequence[tuple[float, int]] = (), name: str = "") -> Drift:
        """How the batch, as far as it was seen, differs.

        `history` are `(mean_loglik, n_rows)` of the batches before it, in nats a row: as many as
        shall count, the last 30 say.
        """
        c, limits = self.counts, self.thresholds
        share = c.surprising / c.sum_w if c.sum_w > 0 else 0.0
        shift = c.sum_wl / c.sum_w if c.sum_w > 0 else 0.0
        variance = c.sum_wwll - 2 * shift * c.sum_wwl + shift**2 * c.sum_ww
        error = math.sqrt(max(0.0, variance)) / c.sum_w if c.sum_w > 0 else 0.0
        mean = self.reference.mean_loglik + shift
        n = c.sum_w**2 / c.sum_ww if c.sum_ww > 0 else 0.0
        low, high = self._band(history, n)
        outside = n > 0 and not low <= mean <= high
        flags = []
        if outside:
            side, end = ("below", low) if mean < low else ("above", high)
            flags.append(
                f"the mean log-likelihood {mean:.3f} is {side} {end:.3f}, the end of its band"
            )
        # So many surprising rows, or more, by chance: a Poisson tail.
        chance = float(pdtrc(math.ceil(share * n) - 1, limits.surprise * n)) if share > 0 else 1.0
        if share > limits.max_surprising and chance < limits.chance:
            flags.append(
                f"{share:.1%} of the rows surprise the model; {limits.surprise:.1%} are expected"
            )
        columns = []
        for j in range(len(self.reference.columns)):
            drift, words = self._column(j)
            columns.append(drift)
            flags += words
        return Drift(
            name=name,
            n_rows=c.n_rows,
            n_unobserved=c.n_unobserved,
            mean_loglik=mean,
            standard_error=error,
            band=(low, high),
            outside=outside,
            surprising=share,
            expected_surprising=limits.surprise,
            columns=tuple(columns),
            flags=tuple(flags),
        )

    def _band(self, history: Sequence[tuple[float, int]], n: float) -> tuple[float, float]:
        """`centre -+ z sqrt(between^2 + sd^2 / n)`, with `sd` the reference's of a row.

        The centre is the median of the earlier means and `between` their scaled median absolute
        deviation, less the part that follows from the size of their batches; with too little
        history the reference's mean, which has its own error, and a granted `between`. The
        deviation within the batch itself does not count: a batch of nonsense has a large one.
        """
        past = [(mean, rows) for mean, rows in history if math.isfinite(mean) and rows > 0]
        sd = self.reference.sd_loglik
        within = sd**2 / max(n, 1.0)
        if len(past) < self.thresholds.min_history:
            centre = self.reference.mean_loglik
            between = (self.thresholds.between * sd) ** 2 + sd**2 / self.reference.n_rows
        else:
            means = np.array([mean for mean, _ in past])
            centre = float(np.median(means))
            spread = 1.4826 * float(np.median(np.abs(means - centre)))
            usual = float(np.median([sd**2 / rows for _, rows in past]))
            between = max(0.0, spread**2 - usual)
        half = self.thresholds.z * math.sqrt(between + within)
        return centre - half, centre + half

    def _column(self, j: int) -> tuple[ColumnDrift, list[str]]:
        """How one column differs, and what is to be said about it."""
        c, ref = self.counts, self.reference.columns[j]
        counts = c.bins[self._edges[j] : self._edges[j + 1]]
        n = c.weight**2 / c.square if c.square > 0 else 0.0
        if n == 0:
            return ColumnDrift(ref.name, 0.0, "none", 0.0, None, None, None), []
        shares = counts / c.weight
        missing = float(shares[-1])
        psi, level = self._shift(j, shares, n)
        observed = float(counts[:-1].sum())
        quantiles: tuple[float, ...] = ()
        if ref.numeric and observed > 0:
            quantiles = _quantiles(c.sketch[self._numeric.index(j)], ref.unit)
        drift = ColumnDrift(
            ref.name,
            psi,
            level,
            missing,
            quantiles[2] if quantiles else None,
            float(c.least[j]) if quantiles else None,
            float(c.most[j]) if quantiles else None,
        )
        if observed == 0:
            return drift, [f"{ref.name}: every value is missing"] if ref.missing < 1 else []
        if ref.missing == 1:
            return drift, [f"{ref.name}: has values; it had none in the reference"]
        words = []
        rise = missing - ref.missing
        noise = math.sqrt(max(ref.missing * (1 - ref.missing), 1 / n) / n)
        if rise > max(self.thresholds.missing, self.thresholds.z * noise):
            words.append(
                f"{ref.name}: missing in {missing:.1%} of the rows; {ref.missing:.1%} in the "
                "reference"
            )
        special = self._constant(j, shares, n) or self._unit(j, level, quantiles)
        special = special or self._range(j, observed)
        if special:
            words.append(f"{ref.name}: {special}")
        elif level == "strong" and not words:
            words.append(f"{ref.name}: its distribution shifted strongly (PSI {psi:.2f})")
        return drift, words

    def _shift(self, j: int, shares: Array, n: float) -> tuple[float, str]:
        """Corrected population stability index, and its level.

        Bins that expect fewer than `FEWEST` rows are counted as one. Without drift the index is
        about `(1 / n + 1 / m)` times chi-squared with `bins - 1` degrees of freedom, for n rows of
        the batch and m of the reference (Yurdakul 2018): its mean is taken off, and a level needs
        an index beyond the quantile that leaves `chance` over all columns.
        """
        limits, m = self.thresholds, self.reference.n_rows
        known = np.array(self.reference.columns[j].shares)
        before = np.zeros_like(shares)
        before[: len(known) - 1], before[-1] = known[:-1], known[-1]
        rare = before * min(n, m) < FEWEST
        rare[-1] = False
        a = np.append(before[~rare], before[rare].sum())
        b = np.append(shares[~rare], shares[rare].sum())
        # Half a row more in each bin, so that an empty one has a logarithm.
        a = (a * m + 0.5) / (m + 0.5 * len(a))
        b = (b * n + 0.5) / (n + 0.5 * len(b))
        raw = float((b - a) @ np.log(b / a))
        unit, freedom = 1 / n + 1 / m, len(a) - 1
        psi = max(0.0, raw - freedom * unit)
        beyond = chdtri(freedom, limits.chance / len(self.reference.columns)) * unit
        if raw <= beyond or psi < limits.moderate:
            return psi, "none"
        return psi, "strong" if psi >= limits.strong else "moderate"

    def _constant(self, j: int, shares: Array, n: float) -> str:
        """Words for a column that has become constant, where that is no chance."""
        c, ref = self.counts, self.reference.columns[j]
        if c.least[j] != c.most[j]:
            return ""
        value = c.least[j]
        known = np.array(ref.shares[:-1]) / (1 - ref.missing)
        hit = int(ref.bins(np.array([value]))[0])
        usual = float(known[hit]) if hit < len(known) else 0.0
        # So many rows of one bin's share are one value by chance with probability usual^n. A
        # reference that knows one value only cannot have varied.
        if known.max() > 1 - 1e-9 or usual ** (n * (1 - shares[-1])) > 1e-6:
            return ""
        column = self.story.schema.columns[j]
        shown = repr(column.levels[int(value)]) if column.levels else f"{value:g}"
        return f"every value is {shown}; it varied in the reference"

    def _unit(self, j: int, level: str, quantiles: tuple[float, ...]) -> str:
        """Words for a column whose values are all larger, or smaller, by about one factor."""
        ref = self.reference.columns[j]
        if level == "none" or not quantiles or not any(ref.quantiles):
            return ""
        pairs = [(a, b) for a, b in zip(ref.quantiles, quantiles, strict=True) if a and b]
        if len(pairs) < 3:
            return ""
        ratios = np.array([b / a for a, b in pairs])
        alike = ratios > 0
        if alike.sum() < 3:
            return ""
        factor = float(np.median(ratios[alike]))
        size = np.abs(ratios)
        # Far off, the quantiles need only agree roughly: batches differ in shape as well. Nearby,
        # a change of unit is told from a change of shape by how well they agree.
        far = (size > 5).all() if factor > 8 else factor < 1 / 8 and (size < 1 / 5).all()
        near = alike.all() and not 1 / 1.5 < factor < 1.5 and size.max() < 1.25 * size.min()
        if not (far or near):
            return ""
        times = f"{factor:.2g} times" if factor > 1 else f"1/{1 / factor:.2g} of"
        return f"values are about {times} the reference's: another unit?"

    def _range(self, j: int, observed: float) -> str:
        """Words for values far outside the range of the reference."""
        c, ref = self.counts, self.reference.columns[j]
        if not ref.quantiles:
            return ""
        span = (ref.most - ref.least) or ref.unit
        out = c.beyond[j] / observed
        excess = max(ref.least - c.least[j], c.most[j] - ref.most) / span
        if out <= 0.01 and excess <= 10:
            return ""
        return (
            f"values from {c.least[j]:.4g} to {c.most[j]:.4g}; the reference has "
            f"{ref.least:.4g} to {ref.most:.4g}"
        )


def _size(x: Array, unit: float) -> NDArray[np.intp]:
    """The sketch's bin of each value: sign and rounded logarithm of its size."""
    with np.errstate(divide="ignore"):
        code = np.round(np.log(np.abs(x) / unit) / math.log(RATIO))
    place = np.clip(code, -REACH - 1, REACH) + REACH + 1
    return (np.sign(x) * place).astype(np.intp) + 2 * REACH + 1


def _quantiles(counts: Array, unit: float) -> tuple[float, ...]:
    """Quantiles at `LEVELS` from the sketch."""
    total = np.cumsum(counts)
    place = np.searchsorted(total, np.array(LEVELS) * total[-1], side="left") - 2 * REACH - 1
    size = unit * RATIO ** (np.abs(place) - REACH - 1.0)
    return tuple((np.sign(place) * size).tolist())


def table(drifts: Sequence[Drift], top: int = 3) -> list[dict[str, Any]]:
    """Small rows for tables: one a batch, with the `top` columns by population stability index."""
    lines = []
    for drift in drifts:
        worst = sorted(drift.columns, key=lambda c: (-c.psi, c.name))[:top]
        lines.append(
            {
                "name": drift.name,
                "rows": drift.n_rows,
                "mean": round(drift.mean_loglik, 4),
                "band": f"{drift.band[0]:.3f} to {drift.band[1]:.3f}",
                "outside": drift.outside,
                "surprising": round(drift.surprising, 4),
                "columns": ", ".join(f"{c.name} {c.psi:.2f}" for c in worst if c.psi > 0),
                "flags": "; ".join(drift.flags),
            }
        )
    return lines
