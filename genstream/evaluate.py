"""How good a fitted story is: held-out fit, criteria, agreement and predictive checks.

Whatever needs all rows is a sum over chunks, so memory does not grow with the data. Whatever
compares drawn rows with real ones looks at a random sample of rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import logsumexp

from genstream.errors import ConfigError, DataError
from genstream.families.blocks import BoundWalk
from genstream.learn import Passes
from genstream.rows import Rows
from genstream.schema import Column
from genstream.sources import Source
from genstream.stats import Monoid, axes
from genstream.story import Params, Story
from genstream.sweeps import fold_each

Array = NDArray[np.float64]

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
# Numbers held at once in a sample of rows.
MAX_SAMPLE_NUMBERS = 1 << 23
MAX_BINS = 40
# Column pairs a predictive check lists: those whose correlation is furthest off.
MAX_PAIRS = 20
# Mean of the Kolmogorov distribution, sqrt(pi / 2) log 2.
MEAN_KOLMOGOROV = math.sqrt(math.pi / 2) * math.log(2)


def _plain(value: Any) -> Any:
    """The value as JSON can hold it: a number that is not finite becomes None."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


class Result:
    """A frozen dataclass of plain values that converts to JSON."""

    def to_json(self) -> dict[str, Any]:
        """A dictionary of numbers, strings, lists and None (for a number that is not finite)."""
        plain: dict[str, Any] = _plain(asdict(self))  # type: ignore[call-overload]
        return plain


# --- fit to rows ---------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ScoreSums(Monoid):
    """Sums over rows behind `HeldOut`.

    With row weights `w` and `l = log p(x)`, over rows with something observed: `sum_w`, `sum_wl`,
    `sum_ww`, `sum_wwl`, `sum_wwll` and `sum_wh`, where `h` is the entropy of the row's
    responsibilities. `sum_all` weighs all rows, `sum_missing` (d,) those in which a column is
    missing.
    """

    n_rows: int
    n_unobserved: int
    sum_all: float
    sum_w: float
    sum_wl: float
    sum_ww: float
    sum_wwl: float
    sum_wwll: float
    sum_wh: float
    sum_missing: Array = axes("feature")


@dataclass(frozen=True)
class HeldOut(Result):
    """How well a story explains rows, in nats and data units.

    `loglik` is `sum w log p(x)` and `mean_loglik` divides it by `weight`, the weight of the
    `n_rows - n_unobserved` rows with something observed. `standard_error` is that of the mean,
    `sqrt(sum w^2 (log p - mean)^2) / weight`. `entropy` is `-sum w sum_k r_k log r_k`: 0 where
    every row surely belongs to one component. `missing` maps each column to the weighted share of
    all rows in which it is missing.
    """

    n_rows: int
    n_unobserved: int
    weight: float
    loglik: float
    mean_loglik: float
    standard_error: float
    entropy: float
    missing: dict[str, float]


@dataclass(frozen=True)
class ScoreRows:
    """Scores one chunk of rows: the work of the pass in `held_out`. It can be pickled."""

    story: Story
    params: Params

    def __call__(self, _: int, rows: Rows) -> ScoreSums:
        """The sums of one chunk, whatever its number."""
        log_p, entropy = self.story.score(self.params, rows)
        weights = rows.row_weights
        missing = ~rows.is_observed
        seen = ~np.all(missing, axis=1)
        w = np.where(seen, weights, 0.0)
        # A row of weight 0 says nothing, even where its log-likelihood is not finite.
        log_p = np.where(w > 0, log_p, 0.0)
        return ScoreSums(
            n_rows=rows.n_rows,
            n_unobserved=int(rows.n_rows - seen.sum()),
            sum_all=float(weights.sum()),
            sum_w=float(w.sum()),
            sum_wl=float(w @ log_p),
            sum_ww=float(w @ w),
            sum_wwl=float((w * w) @ log_p),
            sum_wwll=float((w * w) @ (log_p * log_p)),
            sum_wh=float(w @ entropy),
            sum_missing=weights @ missing,
        )


def held_out(story: Story, params: Params, passes: Passes) -> HeldOut:
    """Log-likelihood of the rows of `passes` under fitted parameters, in one pass.

    The rows may be held out or those of the fit. Raises DataError where no row with a positive
    weight has anything observed.
    """
    return _of_sums(story, passes.fold(ScoreRows(story, params)))


def held_out_many(
    models: Sequence[tuple[Story, Params]], passes: Passes
) -> list[HeldOut | Exception]:
    """What `held_out` says of each of several models, all in one pass.

    In the place of a model that cannot score the rows is what it raised.
    """
    sums, _ = fold_each(passes, [ScoreRows(story, params) for story, params in models])
    found: list[HeldOut | Exception] = []
    for (story, _), each in zip(models, sums, strict=True):
        try:
            found.append(each if isinstance(each, Exception) else _of_sums(story, each))
        except DataError as error:
            found.append(error)
    return found


def _of_sums(story: Story, sums: ScoreSums) -> HeldOut:
    if not sums.sum_w > 0:
        raise DataError(
            f"none of the {sums.n_rows} rows to score has an observed entry and a positive weight"
        )
    mean = sums.sum_wl / sums.sum_w
    squares = sums.sum_wwll - 2 * mean * sums.sum_wwl + mean * mean * sums.sum_ww
    missing = sums.sum_missing / sums.sum_all
    return HeldOut(
        n_rows=sums.n_rows,
        n_unobserved=sums.n_unobserved,
        weight=sums.sum_w,
        loglik=sums.sum_wl,
        mean_loglik=mean,
        standard_error=math.sqrt(squares) / sums.sum_w if squares > 0 else 0.0,
        entropy=sums.sum_wh,
        missing=dict(zip(story.schema.names, missing.tolist(), strict=True)),
    )


@dataclass(frozen=True)
class Criteria(Result):
    """Information criteria of a fit, lower is better: see `bic`, `aic` and `icl`."""

    n_parameters: int
    bic: float
    aic: float
    icl: float


def bic(loglik: float, n_parameters: int, weight: float) -> float:
    """Bayesian information criterion `-2 loglik + n_parameters log weight` (Schwarz 1978).

    `weight` is the number of rows with something observed, or the sum of their weights.
    """
    return -2.0 * loglik + n_parameters * math.log(weight)


def aic(loglik: float, n_parameters: int) -> float:
    """Akaike's information criterion `-2 loglik + 2 n_parameters` (Akaike 1974)."""
    return -2.0 * loglik + 2.0 * n_parameters


def icl(loglik: float, entropy: float, n_parameters: int, weight: float) -> float:
    """Integrated completed likelihood `bic + 2 entropy` (Biernacki, Celeux & Govaert 2000).

    `entropy` is `-sum_n w_n sum_k r_nk log r_nk`, so that components which overlap are charged
    for it. With soft responsibilities this is the form of McLachlan & Peel (2000, section 6.10.3).
    """
    return bic(loglik, n_parameters, weight) + 2.0 * entropy


def criteria(story: Story, train: HeldOut) -> Criteria:
    """BIC, AIC and ICL of a story from its score on the rows it was fitted to."""
    p = story.n_parameters
    return Criteria(
        n_parameters=p,
        bic=bic(train.loglik, p, train.weight),
        aic=aic(train.loglik, p),
        icl=icl(train.loglik, train.entropy, p, train.weight),
    )


def agreement(labels: ArrayLike, others: ArrayLike) -> float:
    """Adjusted Rand index of two labellings of the same rows (Hubert & Arabie 1985).

    1 where the groups are the same whatever their names, 0 on average for labels at random. Both
    are (n,) of numbers or strings. Raises DataError where they are not equally long.
    """
    from sklearn.metrics import adjusted_rand_score

    a, b = np.asarray(labels), np.asarray(others)
    if a.ndim != 1 or a.shape != b.shape or not len(a):
        raise DataError(
            f"labels of shapes {a.shape} and {b.shape} cannot be compared: give two lists of "
            "labels of the same rows"
        )
    return float(adjusted_rand_score(a, b))


@dataclass(frozen=True, eq=False)
class Importance:
    """Log-probabilities estimated by importance sampling.

    `log_prob` (n,) are logs of unbiased estimates of `p(x)`, in nats, and so a little too low on
    average. `n_effective` (n,) is what the draws of a row are worth in independent draws from its
    posterior, `(sum w)^2 / sum w^2`: where it is a few only, the estimate is not to be trusted.
    """

    log_prob: Array
    n_effective: Array


def importance_log_prob(
    story: Story,
    params: Params,
    rows: Rows,
    n_samples: int = 1000,
    rng: np.random.Generator | None = None,
) -> Importance:
    """`log p(x)` of each row without the bound, for stories that only have one.

    `n_samples` factors a row and component are drawn about their posterior. Exact stories are
    scored exactly, and their draws count in full; a row with nothing observed has log-probability
    0. Raises ConfigError where there are fewer than 2 samples.
    """
    if n_samples < 2:
        raise ConfigError(f"n_samples is {n_samples}: importance sampling needs at least 2")
    effective = np.full(rows.n_rows, float(n_samples))
    if not story.bound:
        return Importance(story.log_prob(params, rows), effective)
    rng = rng or np.random.default_rng()
    log_prob = np.zeros(rows.n_rows)
    log_weights = np.log(np.maximum(params.weights, 1e-300))
    kernel = story.family.prepare(params.family, log_weights)
    walk = cast(BoundWalk, kernel.walk(story.readable(rows)))
    for index in walk.blocks():
        walk.score()
        first, second = walk.importance(n_samples, rng)
        log_prob[index] = logsumexp(first, axis=0)
        effective[index] = n_samples * np.exp(2 * log_prob[index] - logsumexp(second, axis=0))
    return Importance(log_prob, effective)


# --- drawn rows against real rows ----------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """Mean, standard deviation and `QUANTILES` of a column's observed entries."""

    mean: float
    sd: float
    quantiles: tuple[float, ...]


@dataclass(frozen=True)
class NumericCheck:
    """A real or count column, drawn against real.

    `distance` is the Kolmogorov-Smirnov distance between the two empirical distributions, and
    `expected_distance` its mean if the story were exact, from sampling alone. `real_shares` and
    `drawn_shares` are shares of entries in the bins between `edges`; the outer bins also take
    what lies beyond them.
    """

    name: str
    kind: str
    unit: str
    missing: float
    distance: float
    expected_distance: float
    real: Summary
    drawn: Summary
    edges: tuple[float, ...]
    real_shares: tuple[float, ...]
    drawn_shares: tuple[float, ...]


@dataclass(frozen=True)
class LevelCheck:
    """A binary or categorical column, drawn against real.

    `distance` is the total variation distance, half the sum of absolute differences between
    `real_shares` and `drawn_shares` of the levels; `expected_distance` is its mean if the story
    were exact, from sampling alone.
    """

    name: str
    kind: str
    unit: str
    missing: float
    distance: float
    expected_distance: float
    levels: tuple[str, ...]
    real_shares: tuple[float, ...]
    drawn_shares: tuple[float, ...]


ColumnCheck = NumericCheck | LevelCheck


@dataclass(frozen=True)
class PairCheck:
    """Correlation of two real columns in real rows (where both are observed) and drawn rows."""

    first: str
    second: str
    real: float
    drawn: float

    @property
    def difference(self) -> float:
        """Drawn minus real."""
        return self.drawn - self.real


@dataclass(frozen=True)
class PredictiveCheck(Result):
    """Rows a story draws against real rows, column by column.

    `pairs` lists the pairs of real columns whose correlations differ most, and
    `correlation_error` is the root mean square of the differences over all pairs (NaN where there
    is no pair).
    """

    n_real: int
    n_drawn: int
    columns: tuple[ColumnCheck, ...]
    pairs: tuple[PairCheck, ...]
    correlation_error: float


def sample_rows(
    source: Source, n_rows: int, rng: np.random.Generator, *, max_chunks: int = 64
) -> Rows:
    """Up to `n_rows` rows at random, without replacement, in the order of the data.

    Where the source has more than `max_chunks` chunks, the rows come from that many chunks drawn
    at random, so that a look at the data never reads all of it. Raises DataError where the source
    has no rows.
    """
    sizes = np.asarray(source.chunk_rows, dtype=np.int64)
    if not sizes.sum():
        raise DataError("there are no rows to draw a sample from")
    chunks = np.flatnonzero(sizes)
    if len(chunks) > max_chunks:
        chunks = np.sort(rng.choice(chunks, size=max_chunks, replace=False))
    ends = np.cumsum(sizes[chunks])
    total = int(ends[-1])
    chosen = np.sort(rng.choice(total, size=min(n_rows, total), replace=False, shuffle=False))
    bounds = np.searchsorted(chosen, ends)
    pieces = []
    first = 0
    for chunk, end, bound in zip(chunks, ends, bounds, strict=True):
        if bound > first:
            rows = source.read(int(chunk))
            pieces.append(rows[chosen[first:bound] - (end - sizes[chunk])])
        first = bound
    return Rows.concatenate(pieces)


def predictive_check(
    story: Story,
    params: Params,
    source: Source,
    rng: np.random.Generator,
    *,
    n_rows: int = 20_000,
) -> PredictiveCheck:
    """Posterior predictive check (Rubin 1984; Gelman, Meng & Stern 1996) of the columns.

    As many rows are drawn from the story as are sampled from `source`: `n_rows`, or fewer where
    the source is smaller or very wide. Gaps are left out of the real side, and row weights are
    heeded there; drawn rows have no gaps, so that a column whose gaps depend on its value may
    differ for that reason alone.
    """
    return check_rows(story, params, rows_to_check(source, rng, n_rows=n_rows), rng)


def rows_to_check(source: Source, rng: np.random.Generator, *, n_rows: int = 20_000) -> Rows:
    """The rows that `predictive_check` compares drawn ones with."""
    n_wanted = max(1_000, min(n_rows, MAX_SAMPLE_NUMBERS // source.schema.n_features))
    return sample_rows(source, n_wanted, rng)


def check_rows(
    story: Story, params: Params, rows: Rows, rng: np.random.Generator
) -> PredictiveCheck:
    """What `predictive_check` says, of rows that were sampled already."""
    drawn = story.draw(params, rows.n_rows, rng).values
    weights, observed = rows.row_weights, rows.is_observed
    if not weights.sum() > 0:
        raise DataError("all sampled rows weigh 0: there is nothing to compare drawn rows with")
    columns: list[ColumnCheck] = []
    for j, column in enumerate(story.schema.columns):
        here = observed[:, j] & (weights > 0)
        missing = 1.0 - float(weights[here].sum() / weights.sum())
        real = rows.values[here, j].astype(np.float64)
        check = _check_numbers if column.kind in ("real", "count") else _check_levels
        columns.append(check(column, missing, real, weights[here], drawn[:, j]))
    pairs, error = _check_pairs(story, rows, drawn)
    return PredictiveCheck(rows.n_rows, len(drawn), tuple(columns), pairs, error)


def _effective(weights: Array) -> float:
    """Number of equally weighted rows that say as much (Kish 1965)."""
    return float(weights.sum() ** 2 / (weights @ weights)) if len(weights) else 0.0


def _check_numbers(
    column: Column, missing: float, real: Array, weights: Array, drawn: Array
) -> NumericCheck:
    ones = np.ones(len(drawn))
    if len(real):
        distance = _kolmogorov_smirnov(real, weights, drawn, ones)
        noise = MEAN_KOLMOGOROV * math.sqrt(1 / _effective(weights) + 1 / len(drawn))
    else:
        distance = noise = math.nan
    edges = _edges(np.concatenate([real, drawn]), column.kind == "count")
    return NumericCheck(
        name=column.name,
        kind=column.kind,
        unit=column.unit,
        missing=missing,
        distance=distance,
        expected_distance=min(1.0, noise),
        real=_summary(real, weights),
        drawn=_summary(drawn, ones),
        edges=tuple(edges.tolist()),
        real_shares=_binned(real, weights, edges),
        drawn_shares=_binned(drawn, ones, edges),
    )


def _check_levels(
    column: Column, missing: float, real: Array, weights: Array, drawn: Array
) -> LevelCheck:
    levels = column.levels or ("0", "1")
    size = len(levels)
    a = np.bincount(real.astype(np.intp), weights, minlength=size)
    b = np.bincount(drawn.astype(np.intp), minlength=size) / len(drawn)
    distance = noise = math.nan
    if len(real):
        a = a / a.sum()
        distance = float(np.abs(a - b).sum() / 2)
        pooled = (a + b) / 2
        variance = pooled * (1 - pooled) * (1 / _effective(weights) + 1 / len(drawn))
        noise = float(np.sqrt(2 * variance / math.pi).sum() / 2)
    return LevelCheck(
        name=column.name,
        kind=column.kind,
        unit=column.unit,
        missing=missing,
        distance=distance,
        expected_distance=noise,
        levels=levels,
        real_shares=tuple(a.tolist()),
        drawn_shares=tuple(b.tolist()),
    )


def _kolmogorov_smirnov(x: Array, wx: Array, y: Array, wy: Array) -> float:
    grid = np.union1d(x, y)
    return float(np.abs(_distribution(x, wx, grid) - _distribution(y, wy, grid)).max())


def _distribution(x: Array, weights: Array, grid: Array) -> Array:
    """The weighted empirical distribution function of `x` on a grid."""
    order = np.argsort(x)
    total = np.concatenate([[0.0], np.cumsum(weights[order])])
    below: Array = total[np.searchsorted(x[order], grid, side="right")] / total[-1]
    return below


def _summary(x: Array, weights: Array) -> Summary:
    if not len(x):
        return Summary(math.nan, math.nan, (math.nan,) * len(QUANTILES))
    mean = float(np.average(x, weights=weights))
    sd = math.sqrt(float(np.average((x - mean) ** 2, weights=weights)))
    quantiles = np.quantile(x, QUANTILES, method="inverted_cdf", weights=weights)
    return Summary(mean, sd, tuple(quantiles.tolist()))


def _edges(x: Array, whole: bool) -> Array:
    """Bin edges over the bulk of the values; whole numbers sit in the middle of their bins."""
    low, high = np.quantile(x, (0.005, 0.995), method="inverted_cdf")
    if whole:
        width = max(1, math.ceil((high - low + 1) / MAX_BINS))
        n_bins = math.ceil((high - low + 1) / width)
        return np.asarray(low - 0.5 + width * np.arange(n_bins + 1), dtype=np.float64)
    if not high > low:
        reach = max(1.0, abs(float(low))) / 2
        low, high = low - reach, high + reach
    return np.linspace(low, high, MAX_BINS + 1)


def _binned(x: Array, weights: Array, edges: Array) -> tuple[float, ...]:
    if not len(x):
        return (0.0,) * (len(edges) - 1)
    inside = np.clip(x, edges[0], np.nextafter(edges[-1], -np.inf))
    counts, _ = np.histogram(inside, bins=edges, weights=weights)
    return tuple((counts / weights.sum()).tolist())


def _check_pairs(story: Story, rows: Rows, drawn: Array) -> tuple[tuple[PairCheck, ...], float]:
    columns = story.schema.of_kind("real")
    if len(columns) < 2:
        return (), math.nan
    index = list(columns)
    part = rows.select(index)
    real = _correlations(part.values.astype(np.float64), part.is_observed, part.row_weights)
    fake = _correlations(drawn[:, index], None, None)
    upper = np.triu_indices(len(index), 1)
    difference = fake[upper] - real[upper]
    known = np.flatnonzero(np.isfinite(difference))
    if not len(known):
        return (), math.nan
    worst = known[np.argsort(-np.abs(difference[known]), kind="stable")[:MAX_PAIRS]]
    names = story.schema.names
    pairs = tuple(
        PairCheck(
            names[index[upper[0][p]]],
            names[index[upper[1][p]]],
            float(real[upper][p]),
            float(fake[upper][p]),
        )
        for p in worst
    )
    return pairs, math.sqrt(float(np.mean(difference[known] ** 2)))


def _correlations(x: Array, observed: NDArray[np.bool_] | None, weights: Array | None) -> Array:
    """(d, d) correlations over the rows that observe both columns; NaN where one is constant."""
    mask = np.ones_like(x) if observed is None else observed.astype(np.float64)
    weighted = mask if weights is None else mask * weights[:, None]
    total = weighted.sum(axis=0)
    centre = (weighted * x).sum(axis=0) / np.where(total > 0, total, 1.0)
    y = (x - centre) * mask
    together = weighted.T @ mask
    safe = np.where(together > 0, together, 1.0)
    # Moments of the row index's column over the rows that both columns observe.
    mean = (weighted * y).T @ mask / safe
    square = (weighted * y * y).T @ mask / safe
    variance = square - mean**2
    covariance = (weighted * y).T @ y / safe - mean * mean.T
    scale = variance * variance.T
    small = scale <= (1e-12 * square * square.T)
    scale = np.where(small, np.nan, scale)
    result: Array = np.clip(covariance / np.sqrt(scale), -1.0, 1.0)
    return result
