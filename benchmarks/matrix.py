"""Every story against everything a story must be able to do: one cell each, green or not.

    python -m benchmarks.matrix [--only WORD] [--without-estimators]

What the columns of the table mean, and what makes a cell green:

- gaps: EM on rows of which three entries in ten are missing, and some rows whole, never falls;
- weights: sums of weighted rows are those of rows left out and repeated;
- MAP: under the weak prior log-likelihood and log-prior together never fall, and both moved;
- float32: log-probabilities are those of float64 to 1e-3 nats;
- Dask: parameters fitted through a dask array are those of an array in memory, to the bit;
- draw: rows drawn lazily are possible, repeat, and are as likely as their own model expects;
- impute: gaps are filled with possible values, what was observed stays, draws repeat;
- condition: `log p(x) = log p(given) + log p(rest | given)` over marginal and conditional (where
  the story has a bound, or is given the rows' totals, both sides are finite, and the marginal is
  that of rows with gaps);
- frozen: each parameter stays to the bit where it is frozen, and the rest still climbs;
- estimator: scikit-learn's own checks of the story's face, the count that passed.

The exit code is 1 where a cell is not green.
"""

from __future__ import annotations

import argparse
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import dask.array as da
import numpy as np
from numpy.typing import NDArray

from genstream import estimators, stories
from genstream.dreams import draw_array
from genstream.learn import BatchEM, FitState, Outcome, fit
from genstream.passes import Passes
from genstream.responsibility import Responsibility, hard, soft
from genstream.rows import Rows
from genstream.schema import Column, Kind, Schema
from genstream.sources import DaskSource, NumpySource
from genstream.start import seed_params
from genstream.story import Params, Story

Array = NDArray[Any]
N = 240


def schema_of(kinds: Sequence[Kind]) -> Schema:
    """Columns of these kinds, called by their positions."""
    levels = ("a", "b", "c")
    return Schema(
        tuple(
            Column(f"x{j}", kind, levels if kind == "categorical" else ())
            for j, kind in enumerate(kinds)
        )
    )


REAL = schema_of(["real"] * 4)
COUNT = schema_of(["count"] * 4)
BINARY = schema_of(["binary"] * 5)
MIXED = schema_of(["real", "real", "count", "binary", "categorical"])


@dataclass(frozen=True)
class Case:
    """A story: how it is built under a prior and an arithmetic, its rule, and its face."""

    make: Callable[..., Story]
    face: Callable[[], Any]
    rule: Responsibility = soft
    # A row of counts is explained given its total, so that no two parts of it make a whole.
    given_totals: bool = False


def mixture(schema: Schema, **options: Any) -> Callable[..., Story]:
    """A builder of mixtures of two components."""
    return lambda **more: stories.mixture(schema, 2, **options, **more)


def factors(**options: Any) -> Callable[..., Story]:
    """A builder of linear-Gaussian factors."""
    return lambda **more: stories.factors(REAL, 2, **options, **more)


def faced(name: str, *values: Any, **options: Any) -> Callable[[], Any]:
    """An estimator of few steps, which is what contracts are about."""
    return lambda: getattr(estimators, name)(*values, **options)


def kmeans(prior: str | None = None, **options: Any) -> Story:  # noqa: ARG001
    """K-means has no prior."""
    return stories.kmeans(REAL, 2, **options)


CASES: dict[str, Case] = {
    "Gaussian mixture, full": Case(mixture(REAL, covariance="full"), faced("GaussianMixture")),
    "Gaussian mixture, tied": Case(
        mixture(REAL, covariance="tied"), faced("GaussianMixture", covariance_type="tied")
    ),
    "Gaussian mixture, diag": Case(
        mixture(REAL, covariance="diag"), faced("GaussianMixture", covariance_type="diag")
    ),
    "Gaussian mixture, spherical": Case(
        mixture(REAL, covariance="spherical"),
        faced("GaussianMixture", covariance_type="spherical"),
    ),
    "Student mixture": Case(mixture(REAL, tails="student"), faced("StudentMixture")),
    "independent columns": Case(mixture(MIXED), faced("Mixture", covariance="diag")),
    "Poisson mixture": Case(mixture(COUNT), faced("Mixture")),
    "Bernoulli mixture": Case(mixture(BINARY), faced("Mixture")),
    "negative binomial mixture": Case(
        mixture(COUNT, counts={f"x{j}": "negative_binomial" for j in range(4)}), faced("Mixture")
    ),
    "zero-inflated mixture": Case(
        mixture(COUNT, counts={f"x{j}": "zero_inflated" for j in range(4)}), faced("Mixture")
    ),
    "multinomial mixture": Case(
        mixture(COUNT, blocks=[stories.Block(COUNT.names, "multinomial")]),
        faced("Mixture"),
        given_totals=True,
    ),
    "mixed blocks": Case(mixture(MIXED, covariance="full"), faced("Mixture", 2)),
    "probabilistic PCA": Case(factors(noise="isotropic"), faced("PPCA")),
    "factor analysis": Case(factors(), faced("FactorAnalysis")),
    "factor analysis, through the latent": Case(
        factors(statistics="latent"), faced("FactorAnalysis")
    ),
    "mixture of PPCA": Case(factors(n_components=2, noise="isotropic"), faced("MixtureOfPPCA")),
    "mixture of factor analysers": Case(factors(n_components=2), faced("MixtureOfFactorAnalyzers")),
    "the same, shared noise, latent": Case(
        factors(n_components=2, shared_noise=True, statistics="latent"),
        faced("MixtureOfFactorAnalyzers", shared_noise=True),
    ),
    "binary factors": Case(
        lambda **more: stories.latent_factors(BINARY, 2, **more),
        faced("LatentFactors", likelihood="binary", binarize=0.5),
    ),
    "count factors": Case(
        lambda **more: stories.latent_factors(COUNT, 2, **more),
        faced("LatentFactors", likelihood="count"),
    ),
    "k-means": Case(kmeans, faced("KMeans"), hard),
}


def example(schema: Schema, n: int = N) -> Array:
    """Rows of two kinds with a common cause, in the columns of a schema."""
    rng = np.random.default_rng(3)
    k, t = rng.integers(2, size=n), rng.normal(size=n)
    columns: list[Array] = []
    for j, column in enumerate(schema.columns):
        if column.kind == "real":
            columns.append(3.0 * k * (-1) ** j + (1 + j) * t + rng.normal(size=n))
        elif column.kind == "count":
            columns.append(rng.poisson(np.exp(0.5 + 0.8 * k + 0.5 * t)) * (rng.random(n) < 0.8))
        elif column.kind == "binary":
            columns.append(rng.random(n) < 1 / (1 + np.exp(-1.5 * t - k + 0.5)))
        else:
            columns.append((k + rng.integers(2, size=n)) % 3)
    return np.column_stack(columns).astype(float)


def with_gaps(values: Array, share: float = 0.3) -> Array:
    """The rows with entries taken out, and three whole rows."""
    rng = np.random.default_rng(4)
    gappy = np.where(rng.random(values.shape) < share, np.nan, values)
    gappy[[5, 77, 130]] = np.nan
    return gappy


def begun(story: Story, rows: Rows) -> tuple[Story, Params]:
    """The anchored story and parameters to begin with."""
    story = story.anchored(rows)
    return story, seed_params(story, rows, np.random.default_rng(0))


def climb(
    case: Case, story: Story, params: Params, source: Any, steps: int = 12
) -> tuple[FitState, list[float]]:
    """Plain EM steps, and the objective at each."""
    state = fit(story, BatchEM(steps, -1.0, case.rule), Passes(source, workers=1), FitState(params))
    assert state.outcome is Outcome.MAX_STEPS, state.outcome
    return state, [info.mean_objective for info in state.trace]


def rising(values: list[float]) -> None:
    """Raise where one value is below the one before by more than rounding."""
    falls = -np.diff(values)
    assert np.isfinite(values).all(), values
    assert (falls < 1e-8 * (1 + np.abs(values[1:]))).all(), f"fell by {falls.max():.2g}"


def gaps(case: Case) -> None:
    """EM with gaps climbs."""
    story = case.make(prior=None)
    rows = with_gaps(example(story.schema))
    story, params = begun(story, Rows.of(rows))
    rising(climb(case, story, params, NumpySource(rows, story.schema))[1])


def weights(case: Case) -> None:
    """A weight is a number of rows."""
    story = case.make(prior=None)
    values = with_gaps(example(story.schema))
    times = np.random.default_rng(5).integers(0, 3, N)
    story, params = begun(story, Rows.of(values))
    one = story.e_step(params, Rows.of(values, times.astype(float)), case.rule)
    other = story.e_step(params, Rows.of(np.repeat(values, times, axis=0)), case.rule)
    for (name, _, a), (_, _, b) in zip(one.leaves(), other.leaves(), strict=True):
        if name not in ("n_rows", "n_unobserved", "n_gaps", "weight"):
            np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-7, err_msg=name)


def map_(case: Case) -> None:
    """MAP climbs its own objective; k-means, which has no prior, its likelihood."""
    story = case.make(prior="weak")
    rows = example(story.schema)
    story, params = begun(story, Rows.of(rows))
    state, values = climb(case, story, params, NumpySource(rows, story.schema))
    rising(values)
    moved = {info.log_prior for info in state.trace}
    assert len(moved) > 1 or story.prior is None or len(values) < 3 or values[0] == values[-1]


def float32(case: Case) -> None:
    """Half the digits, the same log-probabilities."""
    story = case.make(prior=None)
    rows = Rows.of(with_gaps(example(story.schema)))
    story, params = begun(story, rows)
    half = replace(story, family=story.family.with_dtype("float32"))
    a, b = story.log_prob(params, rows), half.log_prob(params, rows)
    assert np.abs(a - b).max() < 1e-3 * (1 + np.abs(a).max() / 100), np.abs(a - b).max()


def dask_(case: Case) -> None:
    """The same chunks, the same bits, wherever they are."""
    story = case.make(prior=None)
    values = with_gaps(example(story.schema))
    story, params = begun(story, Rows.of(values))
    here = climb(case, story, params, NumpySource(values, story.schema, chunk_rows=50), 4)[0]
    lazy = da.from_array(values, chunks=(50, -1))
    there = climb(case, story, params, DaskSource(lazy, story.schema), 4)[0]
    assert here.params.digest() == there.params.digest()


def draw(case: Case) -> None:
    """Rows drawn lazily repeat, are possible, and are as likely as rows drawn at once."""
    story = case.make(prior="weak")
    story, params = begun(story, Rows.of(example(story.schema)))
    lazy = draw_array(story, params, 10**9, 7, 2000)["values"]
    assert lazy.shape == (10**9, story.schema.n_features)
    part = np.asarray(lazy[4000:6000])
    assert (np.asarray(lazy[4000:6000]) == part).all()
    drawn = Rows.of(part).check(story.schema)
    fresh = Rows.of(story.draw(params, 2000, np.random.default_rng(1)).values)
    a, b = story.log_prob(params, drawn), story.log_prob(params, fresh)
    error = np.hypot(a.std(), b.std()) / np.sqrt(2000)
    assert abs(a.mean() - b.mean()) < 5 * error, (a.mean(), b.mean(), error)


def impute(case: Case) -> None:
    """Gaps filled, the rest untouched."""
    story = case.make(prior="weak")
    values = with_gaps(example(story.schema))
    story, params = begun(story, Rows.of(values))
    rows = Rows.of(values)
    seen = rows.is_observed
    for seed in (None, 1):
        filled = [
            story.impute(params, rows, None if seed is None else np.random.default_rng(seed))
            for _ in range(2)
        ]
        assert (filled[0] == filled[1]).all()
        assert (filled[0][seen] == values[seen]).all()
        assert np.isfinite(filled[0]).all()
        if seed is not None:
            Rows.of(filled[0]).check(story.schema)


def condition(case: Case) -> None:
    """The chain rule over what is given and what is left."""
    story = case.make(prior="weak")
    values = example(story.schema)[:6]
    story, params = begun(story, Rows.of(example(story.schema)))
    names = story.schema.names
    known, left = names[:2], names[2:]
    marginal, theta = story.marginal(params, known)
    beside = values.copy()
    beside[:, 2:] = np.nan
    within = marginal.log_prob(theta, Rows.of(values[:, :2]))
    outside = story.log_prob(params, Rows.of(beside))
    np.testing.assert_allclose(within, outside, rtol=1e-7, atol=1e-7)
    for x, whole, part in zip(values, story.log_prob(params, Rows.of(values)), within, strict=True):
        rest, phi = story.condition(params, dict(zip(known, x[:2], strict=True)))
        assert rest.schema.names == left
        given = float(rest.log_prob(phi, Rows.of(x[None, 2:]))[0])
        assert np.isfinite(given)
        assert (
            story.bound or case.given_totals or abs(part + given - whole) < 1e-6 * (1 + abs(whole))
        ), (
            part,
            given,
            whole,
        )


def frozen(case: Case) -> None:
    """What is frozen stays, and the rest climbs."""
    story = case.make(prior=None)
    rows = example(story.schema)
    story, params = begun(story, Rows.of(rows))
    for name in ("weights", *story.family.param_names):
        kept = replace(story, frozen=story.frozen | {name})
        state, values = climb(case, kept, params, NumpySource(rows, story.schema), 5)
        rising(values)
        before = {n: v for n, _, v in params.leaves() if f".{n}".endswith(f".{name}")}
        after = {n: v for n, _, v in state.params.leaves() if n in before}
        assert before, name
        for n, value in before.items():
            np.testing.assert_array_equal(value, after[n], err_msg=n)


def estimator(case: Case) -> str:
    """scikit-learn's contract, but for checks that are known to fail for reasons in the open."""
    from sklearn.utils.estimator_checks import check_estimator

    face = case.face()
    known: dict[str, str] = getattr(face, "known_failures", dict)()
    found = check_estimator(face, expected_failed_checks=known, on_fail=None, on_skip=None)
    failed = [each for each in found if each["status"] == "failed"]
    assert not failed, [each["check_name"] for each in failed]
    return f"{sum(each['status'] == 'passed' for each in found)}"


CELLS: dict[str, Callable[[Case], Any]] = {
    "gaps": gaps,
    "weights": weights,
    "MAP": map_,
    "float32": float32,
    "Dask": dask_,
    "draw": draw,
    "impute": impute,
    "condition": condition,
    "frozen": frozen,
    "estimator": estimator,
}


def main() -> None:
    """Print the matrix, then what went wrong in cells that are not green."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="stories whose name has this word")
    parser.add_argument("--without-estimators", action="store_true")
    options = parser.parse_args()
    cells = {
        n: c for n, c in CELLS.items() if not (options.without_estimators and n == "estimator")
    }
    wrong: list[str] = []
    print(f"{'':<36}" + "".join(f"{name:>10}" for name in cells))
    for name, case in CASES.items():
        if options.only not in name:
            continue
        print(f"{name:<36}", end="", flush=True)
        for what, cell in cells.items():
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    told = cell(case) or "ok"
            except Exception:  # noqa: BLE001 - a cell that is not green, whatever the reason
                told = "FAILED"
                wrong.append(f"--- {name}: {what}\n{traceback.format_exc()}")
            print(f"{told:>10}", end="", flush=True)
        print()
    print(*wrong, sep="\n")
    print(f"{len(wrong)} cells are not green" if wrong else "every cell is green")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
