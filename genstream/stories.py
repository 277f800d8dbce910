"""Builders: the classical models of the field as stories.

Each function says what `p(z|phi)` and `p(x|z,theta)` are, checks that they fit the columns, and
returns a `Story` that any learner can learn.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from genstream.errors import ConfigError
from genstream.families.blocks import Family
from genstream.families.columns import IndependentColumns
from genstream.families.factors import NOISES, STATISTICS, Factors
from genstream.families.gamma_poisson import GammaPoisson
from genstream.families.gaussian import Gaussian
from genstream.families.logistic_factors import LogisticFactors
from genstream.families.multinomial import Multinomial
from genstream.families.negative_binomial import NegativeBinomial
from genstream.families.product import Part, Product
from genstream.families.student import Student
from genstream.families.zero_inflated import ZeroInflated
from genstream.priors import Prior
from genstream.schema import Kind, Schema
from genstream.story import Story

COVARIANCES = ("full", "tied", "diag", "spherical")
DTYPES = ("float64", "float32")
# Moments of d columns are summed where those of all components fit a core's share of the cache,
# and where their features of a block do: beyond that a pass through the latent is shorter.
MOMENT_NUMBERS = 1 << 20
MOMENT_COLUMNS = 256
TAILS = ("gaussian", "student")
# Blocks whose columns depend on one another given the component.
DEPENDENT = ("full", "tied", "student")
# What a block's columns may be, and the kind of column each takes; None stands for all kinds.
BLOCKS: dict[str, Kind | None] = {
    "full": "real",
    "tied": "real",
    "diag": "real",
    "spherical": "real",
    "student": "real",
    "negative_binomial": "count",
    "zero_inflated": "count",
    "multinomial": "count",
    "independent": None,
}
COUNTS = ("poisson", "negative_binomial", "zero_inflated")


@dataclass(frozen=True)
class Block:
    """Columns that a family describes together, independent of all others given the component.

    Parameters
    ----------
    columns
        Their names, in any order.
    family
        `full`, `tied`, `diag` or `spherical` Gaussians, or `student` (multivariate t with full
        scale matrices), of real columns; `negative_binomial` or `zero_inflated` counts, or
        `multinomial` ones (a bag of words: given their total); or `independent` columns of any
        kind.
    """

    columns: Sequence[str]
    family: str = "full"


def mixture(
    schema: Schema,
    n_components: int,
    *,
    covariance: str | None = None,
    tails: str = "gaussian",
    counts: Mapping[str, str] | None = None,
    blocks: Sequence[Block] = (),
    prior: str | Prior | None = "weak",
    reg_covar: float = 0.0,
    dtype: str = "float64",
    frozen: Iterable[str] = (),
) -> Story:
    """The story of a mixture over the columns of `schema`.

    Given the component, real columns are jointly Gaussian as `covariance` says, and all others
    independent: binary ones Bernoulli, counts Poisson, categorical ones categorical, real ones that
    have detection limits censored Gaussian. `tails`, `counts` and `blocks` say otherwise. Where
    that takes more than one family, the story's is their product.

    Parameters
    ----------
    schema
        The columns, of any kind.
    n_components
        K, at least 1.
    covariance
        What the real columns have: a `full` covariance a component, one `tied` covariance, `diag`
        for a variance a column, `spherical` for a variance a component. None stands for `full`
        where all columns are real, without limits, and for `diag` elsewhere.
    tails
        `gaussian`; or `student` for real columns that are multivariate t, which outliers pull less,
        with scale matrices of the form of `covariance`.
    counts
        What count columns are, by name: `poisson` (where nothing is said), `negative_binomial`, or
        `zero_inflated`, a Poisson count or nought for another reason.
    blocks
        Columns that depend on one another, and how. Columns in no block go by their kind.
    prior
        `weak` for MAP under weak conjugate priors, a `Prior` for stronger ones, None for maximum
        likelihood.
    reg_covar
        Added to every variance after each M-step, in squared data units.
    dtype
        Arithmetic of the E-step: `float64` or `float32`.
    frozen
        Parameters that learning leaves as they are: `weights`, or names of the family's; in
        products also those of one block, such as `block0.mean`.

    Raises
    ------
    ConfigError
        Where an argument is not one of those, or does not fit the columns.
    """
    plain = [c.name for c in schema.columns if c.kind == "real" and not c.limited]
    if covariance is None:
        covariance = "full" if len(plain) == schema.n_features else "diag"
    if covariance not in COVARIANCES:
        raise ConfigError(f"covariance {covariance!r} is not one of {', '.join(COVARIANCES)}")
    if tails not in TAILS:
        raise ConfigError(f"tails {tails!r} is not one of {', '.join(TAILS)}")
    _check_choices(n_components, dtype, prior)
    if reg_covar < 0:
        raise ConfigError(f"reg_covar is {reg_covar:g}: it must not be negative")
    told = [*blocks, *_count_blocks(schema, counts or {})]
    held = _check_blocks(schema, told)
    rest = [c for c in schema.columns if c.name not in held]
    joint = [c.name for c in rest if c.name in plain]
    if (covariance != "diag" or tails == "student") and not joint and not blocks:
        asked = f"tails {tails!r}" if covariance == "diag" else f"covariance {covariance!r}"
        raise ConfigError(f"{asked} needs real columns, and there are none: leave it out")

    def part(names: Iterable[str], kind: str) -> Part:
        columns = tuple(sorted(schema.index(name) for name in names))
        return Part(columns, _family(kind, schema.at(columns), reg_covar, dtype))

    parts = [part(block.columns, block.family) for block in told]
    if joint and tails == "student":
        columns = tuple(schema.index(name) for name in joint)
        parts.append(Part(columns, Student(len(joint), covariance, reg_covar, dtype)))
    elif joint and covariance != "diag":
        parts.append(part(joint, covariance))
    else:
        joint = []
    others = [c.name for c in rest if c.name not in joint]
    if others:
        parts.append(part(others, "independent"))
    parts.sort(key=lambda one: one.columns)
    family: Family = parts[0].family if len(parts) == 1 else Product(schema, tuple(parts))
    return Story(schema, family, n_components, prior, frozenset(frozen))


def _count_blocks(schema: Schema, counts: Mapping[str, str]) -> list[Block]:
    """The blocks of count columns that are not Poisson, those of one family together.

    Raises ConfigError where a column is not there or is no count, or there is no such family.
    """
    if not isinstance(counts, Mapping):
        raise ConfigError(
            f"counts is {counts!r}: it must map names of columns to {', '.join(COUNTS)}"
        )
    told: dict[str, list[str]] = {}
    for name, family in counts.items():
        if family not in COUNTS:
            raise ConfigError(f"counts: {name!r}: {family!r} is not one of {', '.join(COUNTS)}")
        if name in schema.names and schema[name].kind != "count":
            kind = schema[name].kind
            raise ConfigError(f"counts: {name!r} is a {kind} column: make its kind count")
        if name not in schema.names:
            known = ", ".join(schema.columns[j].name for j in schema.of_kind("count")) or "none"
            raise ConfigError(f"counts: there is no count column {name!r}; there are {known}")
        told.setdefault(family, []).append(name)
    return [Block(names, family) for family, names in told.items() if family != "poisson"]


def _check_blocks(schema: Schema, blocks: Sequence[Block]) -> set[str]:
    """The names of all columns in blocks. Raises ConfigError where one does not fit."""
    held: set[str] = set()
    for block in blocks:
        if block.family not in BLOCKS:
            raise ConfigError(
                f"block ({', '.join(block.columns)}): family {block.family!r} is not one of "
                f"{', '.join(BLOCKS)}"
            )
        if not block.columns:
            raise ConfigError(f"a {block.family} block names no columns")
        for name in block.columns:
            if name not in schema.names:
                raise ConfigError(
                    f"block ({', '.join(block.columns)}): there is no column {name!r}; the columns "
                    f"are {', '.join(schema.names)}"
                )
            if name in held:
                raise ConfigError(f"column {name!r} is named twice in blocks and counts")
            held.add(name)
            kind = BLOCKS[block.family]
            if kind is not None and schema[name].kind != kind:
                raise ConfigError(
                    f"block ({', '.join(block.columns)}): {block.family} takes {kind} columns, and "
                    f"{name!r} is {schema[name].kind}"
                )
            if schema[name].limited and block.family in DEPENDENT:
                raise ConfigError(
                    f"block ({', '.join(block.columns)}): {name!r} has limits, which only "
                    "independent columns heed"
                )
    return held


def _family(kind: str, schema: Schema, reg_covar: float, dtype: str) -> Family:
    """The family of one block of columns."""
    if kind in ("full", "tied"):
        floor = tuple(column.least_variance for column in schema.columns)
        floor = floor if any(floor) else ()
        return Gaussian(schema.n_features, kind == "tied", reg_covar, dtype, floor=floor)
    if kind == "student":
        return Student(schema.n_features, "full", reg_covar, dtype)
    if kind == "negative_binomial":
        return NegativeBinomial(schema, dtype)
    if kind == "zero_inflated":
        return ZeroInflated(schema, dtype)
    if kind == "multinomial":
        return Multinomial(schema, dtype)
    return IndependentColumns(schema, kind == "spherical", reg_covar, dtype)


def factors(
    schema: Schema,
    n_factors: int,
    n_components: int = 1,
    *,
    noise: str = "diagonal",
    shared_noise: bool = False,
    prior: str | Prior | None = "weak",
    dtype: str = "float64",
    frozen: Iterable[str] = (),
    statistics: str = "auto",
) -> Story:
    """Factor analysis, probabilistic PCA, and mixtures of them, over real columns.

        t ~ N(0, I),    x | k, t ~ N(mean_k + W_k t, noise_k)

    Parameters
    ----------
    schema
        Real columns only.
    n_factors
        q, the number of factors, from 1 to one less than there are columns.
    n_components
        K; 1 is plain factor analysis.
    noise
        `diagonal`: a variance a column (factor analysis); `isotropic`: one for all (PPCA).
    shared_noise
        Whether all components have the same noise.
    prior
        `weak` for MAP under weak priors of mean and noise, a `Prior` for stronger ones, None for
        maximum likelihood, under which noise may sit on its floor.
    dtype
        Arithmetic of the E-step: `float64` or `float32`.
    frozen
        Parameters that learning leaves as they are: `weights`, `mean`, `loadings`, `noise`.
    statistics
        `moments`: sums of `x x'`, with which complete data of one component need a single pass;
        `latent`: sums through the factors, for many columns. `auto` takes moments of up to 256
        columns where those of all components make at most 2^20 numbers.

    Raises
    ------
    ConfigError
        Where an argument is not one of those, or does not fit the columns.
    """
    _check_real("factors need", schema)
    d = schema.n_features
    if not 1 <= n_factors < d:
        raise ConfigError(
            f"n_factors is {n_factors}: with {d} columns it must be at least 1 and less than {d}"
        )
    if noise not in NOISES:
        raise ConfigError(f"noise {noise!r} is not one of {', '.join(NOISES)}")
    if statistics not in ("auto", *STATISTICS):
        raise ConfigError(f"statistics {statistics!r} is not one of auto, {', '.join(STATISTICS)}")
    _check_choices(n_components, dtype, prior)
    if statistics == "auto":
        few = d <= MOMENT_COLUMNS and n_components * d**2 <= MOMENT_NUMBERS
        statistics = "moments" if few else "latent"
    family = Factors(d, n_factors, noise == "isotropic", shared_noise, statistics, dtype)
    return Story(schema, family, n_components, prior, frozenset(frozen))


def latent_factors(
    schema: Schema,
    n_factors: int,
    n_components: int = 1,
    *,
    prior: str | Prior | None = "weak",
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
        `weak` for MAP under weak priors, a `Prior` for stronger ones, None for maximum likelihood.
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
    _check_choices(n_components, dtype, prior)
    if n_factors < 1:
        raise ConfigError(f"n_factors is {n_factors}: there must be at least 1 factor")
    kinds = set(schema.kinds)
    if kinds == {"binary"}:
        family: Family = LogisticFactors(schema, dtype, n_factors=n_factors)
    elif kinds == {"count"}:
        family = GammaPoisson(schema, dtype, n_factors=n_factors)
    else:
        one = schema.columns[0]
        other = next((c for c in schema.columns if c.kind not in ("binary", "count")), None)
        other = other or next(c for c in schema.columns if c.kind != one.kind)
        raise ConfigError(
            "latent factors need columns that are all binary or all counts, but "
            f"{other.name!r} is {other.kind}"
        )
    return Story(schema, family, n_components, prior, frozenset(frozen))


def kmeans(schema: Schema, n_components: int, *, dtype: str = "float64") -> Story:
    """The story of which K-means is hard EM: spherical Gaussians, equally large and equally likely.

        k ~ Uniform(1..K),    x | k ~ N(mean_k, variance I)

    Parameters
    ----------
    schema
        Real columns only.
    n_components
        K, at least 1.
    dtype
        Arithmetic of the E-step: `float64` or `float32`.

    Raises
    ------
    ConfigError
        Where an argument is not one of those, or does not fit the columns.
    """
    _check_real("K-means needs", schema)
    _check_choices(n_components, dtype)
    family = IndependentColumns(schema, spherical=True, shared=True, dtype=dtype)
    return Story(schema, family, n_components, None, frozenset({"weights"}))


def _check_choices(n_components: int, dtype: str, prior: str | Prior | None = None) -> None:
    if n_components < 1:
        raise ConfigError(f"n_components is {n_components}: there must be at least 1 component")
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    Prior.of(prior)


def _check_real(who: str, schema: Schema) -> None:
    other = next((column for column in schema.columns if column.kind != "real"), None)
    if other is not None:
        raise ConfigError(f"{who} real columns throughout, but {other.name!r} is {other.kind}")
