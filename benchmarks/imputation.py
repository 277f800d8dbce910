"""Entries put aside are filled in: genstream beside scikit-learn's imputers, in one run.

    python -m benchmarks.imputation [--rows N] [--test N] [--share S] [--components K]

Of the power benchmark (six real columns) and of the flights (four real ones with gaps of their own,
carrier, origin and month), `rows` rows teach and of `test` others a share of the entries is put
aside at random. Every method sees the same rows with the same gaps: a mixture, whose real columns
are jointly Gaussian given the component and whose categories are independent of them;
`SimpleImputer`, `KNNImputer` and `IterativeImputer`, which see categories as one-hot columns and
guess the level whose column they fill highest, the last one within the range of each column.
Errors are root mean squares in deviations of the column over real entries, and shares of categories
guessed right; seconds are of learning and filling together, one method after another.
scikit-learn's iterative imputer is still experimental in its own words. Of genstream the
log-likelihood of the entries put aside is shown as well, beside that of one component.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.experimental import enable_iterative_imputer  # noqa: F401
from sklearn.impute import IterativeImputer, KNNImputer, SimpleImputer

from benchmarks.data import POWER_COLUMNS, path
from benchmarks.flights import flights
from genstream.learn import BatchEM, fit
from genstream.passes import Passes
from genstream.rows import Rows
from genstream.schema import Schema
from genstream.sources import NumpySource
from genstream.start import warm_start
from genstream.stories import mixture
from genstream.story import Params, Story

Array = NDArray[Any]
# Fill a (n, d) array of test rows whose gaps are NaN.
Filler = Callable[[Array], Array]


def power() -> tuple[Array, Schema]:
    """The power benchmark's training part, standardised, in an order of no meaning."""
    return np.load(path("power/train.npy")), Schema.real(POWER_COLUMNS)


def flights_in_part() -> tuple[Array, Schema]:
    """The flights without their hour of departure, rows shuffled."""
    values, schema = flights()
    kept = [j for j, column in enumerate(schema.columns) if column.kind != "count"]
    values = np.random.default_rng(0).permutation(values)[:, kept]
    return values, Schema(tuple(schema.columns[j] for j in kept))


def learned(schema: Schema, train: Array, n_components: int) -> tuple[Story, Params]:
    """A mixture of the rows, by accelerated EM from the best of three starts."""
    passes = Passes(NumpySource(train, schema))
    story, state = warm_start(mixture(schema, n_components, covariance="full"), passes, n_init=3)
    state = fit(story, BatchEM(100, 1e-4, accelerate=True), passes, state)
    return story, state.params


class OneHot:
    """Rows as scikit-learn's imputers want them: real columns standardised, levels as columns."""

    def __init__(self, schema: Schema, train: Array) -> None:
        self.schema = schema
        self.mean, self.sd = np.nanmean(train, axis=0), np.nanstd(train, axis=0)

    def __call__(self, values: Array) -> Array:
        parts = []
        for j, column in enumerate(self.schema.columns):
            x = values[:, j]
            if column.kind == "real":
                parts.append(((x - self.mean[j]) / self.sd[j])[:, None])
            else:
                hit = (x[:, None] == np.arange(column.n_levels)).astype(float)
                parts.append(np.where(np.isnan(x)[:, None], np.nan, hit))
        return np.concatenate(parts, axis=1)

    def back(self, filled: Array) -> Array:
        """Rows from filled columns, the highest of a category's columns taken for its level."""
        parts, at = [], 0
        for j, column in enumerate(self.schema.columns):
            if column.kind == "real":
                parts.append(filled[:, at] * self.sd[j] + self.mean[j])
                at += 1
            else:
                parts.append(filled[:, at : at + column.n_levels].argmax(axis=1).astype(float))
                at += column.n_levels
        return np.column_stack(parts)


def compare(
    name: str, values: Array, schema: Schema, n_train: int, n_test: int, share: float, k: int
) -> None:
    """Print the table of one data set."""
    train, test = values[:n_train], values[n_train : n_train + n_test]
    rng = np.random.default_rng(1)
    hidden = (rng.random(test.shape) < share) & ~np.isnan(test)
    # A row of which everything is hidden says nothing about the methods.
    hidden[hidden.all(axis=1)] = False
    given = np.where(hidden, np.nan, test)
    code = OneHot(schema, train)
    real = np.array(schema.of_kind("real"))
    other = np.array(schema.of_kind("categorical"), dtype=int)

    def report(method: str, filled: Array, seconds: float, base: float) -> None:
        gap = ((filled - test) / code.sd)[:, real][hidden[:, real]]
        line = f"{name:<8} {method:<18} rmse {np.sqrt(np.mean(gap**2)):.4f}"
        if len(other):
            right = (filled == test)[:, other][hidden[:, other]]
            line += f"  right {right.mean():.4f}"
        print(f"{line}  {seconds:8.1f} s  {seconds / base:6.2f} x genstream", flush=True)

    begin = time.perf_counter()
    story, params = learned(schema, train, k)
    filled = story.impute(params, Rows.of(given))
    base = time.perf_counter() - begin
    report(f"mixture K={k}", filled, base, base)
    one, alone = learned(schema, train, 1)
    for label, (s, p) in {f"mixture K={k}": (story, params), "one component": (one, alone)}.items():
        complete, seen = s.log_prob(p, Rows.of(test)), s.log_prob(p, Rows.of(given))
        nats = (complete - seen).sum() / hidden.sum()
        print(f"{name:<8} {label:<18} {nats:.4f} nats an entry put aside", flush=True)
    # Regressions on one-hot columns, which determine one another, need bounds not to diverge.
    low, high = np.nanmin(code(train), axis=0), np.nanmax(code(train), axis=0)
    peers = {
        "SimpleImputer": SimpleImputer(strategy="mean"),
        "KNNImputer": KNNImputer(n_neighbors=5),
        "IterativeImputer": IterativeImputer(
            max_iter=10, min_value=low, max_value=high, random_state=0
        ),
    }
    for method, imputer in peers.items():
        begin = time.perf_counter()
        imputer.fit(code(train))
        filled = code.back(imputer.transform(code(given)))
        report(method, np.where(hidden, filled, test), time.perf_counter() - begin, base)


def main() -> None:
    """Run it on both data sets."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--test", type=int, default=5_000)
    parser.add_argument("--share", type=float, default=0.2)
    parser.add_argument("--components", type=int, default=40)
    options = parser.parse_args()
    sizes = options.rows, options.test, options.share, options.components
    compare("power", *power(), *sizes)
    compare("flights", *flights_in_part(), *sizes)


if __name__ == "__main__":
    main()
