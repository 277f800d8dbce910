"""Builders: the classical models of the field as stories.

Each function says what `p(z|phi)` and `p(x|z,theta)` are, checks that they fit the columns, and
returns a `Story` that any learner can learn.
"""

from __future__ import annotations

from collections.abc import Iterable

from genstream.errors import ConfigError
from genstream.families.columns import IndependentColumns
from genstream.families.gamma_poisson import GammaPoisson
from genstream.families.gaussian import Gaussian
from genstream.families.logistic_factors import LogisticFactors
from genstream.schema import Schema
from genstream.story import Story

COVARIANCES = ("full", "tied", "diag", "spherical")
DTYPES = ("float64", "float32")
PRIORS = ("weak", None)


def mixture(
    schema: Schema,
    n_components: int,
    *,
    covariance: str | None = None,
    prior: str | None = "weak",
    reg_covar: float = 0.0,
    dtype: str = "float64",
) -> Story:
    """The story of a mixture over the columns of `schema`.

    Parameters
    ----------
    schema
        Real columns only, or columns of any kind.
    n_components
        K, at least 1.
    covariance
        `full`, `tied`, `diag` or `spherical`; `full` and `tied` need real columns throughout.
        None stands for `full` where all columns are real and for `diag` elsewhere.
    prior
        `weak` for MAP under weak conjugate priors, None for maximum likelihood.
    reg_covar
        Added to every variance after each M-step, in squared data units.
    dtype
        Arithmetic of the E-step: `float64` or `float32`.

    Raises
    ------
    ConfigError
        Where an argument is not one of those, or does not fit the columns.
    """
    real = all(kind == "real" for kind in schema.kinds)
    if covariance is None:
        covariance = "full" if real else "diag"
    if covariance not in COVARIANCES:
        raise ConfigError(f"covariance {covariance!r} is not one of {', '.join(COVARIANCES)}")
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    if prior not in PRIORS:
        raise ConfigError(f"prior {prior!r} is not one of weak, None")
    if n_components < 1:
        raise ConfigError(f"n_components is {n_components}: a mixture needs at least 1 component")
    if reg_covar < 0:
        raise ConfigError(f"reg_covar is {reg_covar:g}: it must not be negative")
    if not real and covariance != "diag":
        other = next(c for c in schema.columns if c.kind != "real")
        raise ConfigError(
            f"covariance {covariance!r} needs real columns throughout, but {other.name!r} is "
            f"{other.kind}: use 'diag', under which columns are independent given the component"
        )
    if covariance in ("full", "tied"):
        family: Gaussian | IndependentColumns = Gaussian(
            schema.n_features, covariance == "tied", reg_covar, dtype
        )
    else:
        family = IndependentColumns(schema, covariance == "spherical", reg_covar, dtype)
    return Story(schema, family, n_components, prior)


def latent_factors(
    schema: Schema,
    n_factors: int,
    n_components: int = 1,
    *,
    prior: str | None = "weak",
    dtype: str = "float64",
    frozen: Iterable[str] = (),
) -> Story:
    """The story of binary or count columns that depend on a few factors.

    Binary columns have Gaussian factors behind a sigmoid (`LogisticFactors`), count columns are
    sums of gamma factors (`GammaPoisson`). Log-probabilities of either are lower bounds;
    `evaluate.importance_log_prob` estimates them without bias.

    Parameters
    ----------
    schema
        Binary columns only, or count columns only.
    n_factors
        q, at least 1.
    n_components
        K, at least 1; each component has factors of its own.
    prior
        `weak` for MAP under weak priors, None for maximum likelihood.
    dtype
        Arithmetic of the E-step over rows and columns: `float64` or `float32`.
    frozen
        Parameters that learning leaves as they are: `weights`, and `bias`, `loadings` of binary
        columns or `loadings`, `shape` of counts.

    Raises
    ------
    ConfigError
        Where an argument is not one of those, or does not fit the columns.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    if prior not in PRIORS:
        raise ConfigError(f"prior {prior!r} is not one of weak, None")
    if n_components < 1:
        raise ConfigError(f"n_components is {n_components}: there must be at least 1 component")
    if n_factors < 1:
        raise ConfigError(f"n_factors is {n_factors}: there must be at least 1 factor")
    kinds = set(schema.kinds)
    if kinds == {"binary"}:
        family: LogisticFactors | GammaPoisson = LogisticFactors(schema, n_factors, dtype)
    elif kinds == {"count"}:
        family = GammaPoisson(schema, n_factors, dtype)
    else:
        one = schema.columns[0]
        other = next((c for c in schema.columns if c.kind not in ("binary", "count")), None)
        other = other or next(c for c in schema.columns if c.kind != one.kind)
        raise ConfigError(
            "latent factors need columns that are all binary or all counts, but "
            f"{other.name!r} is {other.kind}"
        )
    return Story(schema, family, n_components, prior, frozenset(frozen))
