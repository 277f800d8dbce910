"""A story: how a row comes to be, and the two steps that learn it.

    k ~ Categorical(weights),    x | k ~ family(theta_k)

The E-step of any rows returns sufficient statistics, which add; the M-step sees statistics only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from genstream.errors import ConfigError, CorruptError, DataError
from genstream.families.blocks import Array, Index, Pivot, Walk
from genstream.families.columns import ColumnsPrior, IndependentColumns
from genstream.families.gaussian import Gaussian, NormalWishart
from genstream.responsibility import Key, Responsibility, rule_of, soft
from genstream.rows import Rows
from genstream.schema import Kind, Schema
from genstream.stats import Monoid, Record, axes

COVARIANCES = ("full", "tied", "diag", "spherical")
DTYPES = ("float64", "float32")
PRIORS = ("weak", None)
NUMERIC: tuple[Kind, ...] = ("real", "binary", "count")


@dataclass(frozen=True, eq=False)
class Params(Record):
    """Mixing weights (K,), which sum to 1, and the family's parameters in data units."""

    weights: Array = axes("component")
    family: Record | None = None


@dataclass(frozen=True, eq=False)
class StoryStats(Monoid):
    """What an M-step needs of the rows seen, and what a trace shows of them.

    `n_rows` rows were seen, of which `n_unobserved` had nothing observed: these have
    log-likelihood 0 and are in no other field. `weight` sums row weights, `objective` is
    `sum_n w_n sum_k r_nk (log joint_nk - log r_nk)`, for soft responsibilities the
    log-likelihood. `sum_r` (K,) is the weight each component took.
    """

    n_rows: int
    n_unobserved: int
    weight: float
    objective: float
    sum_r: Array = axes("component")
    family: Monoid | None = None


@dataclass(frozen=True)
class Posterior:
    """What the model says of each row.

    `responsibilities` (n, K) are `p(k | x)`; `log_prob` (n,) is `log p(x)` in nats. A row with
    nothing observed has the mixing weights and log-probability 0.
    """

    responsibilities: Array
    log_prob: NDArray[np.float64]

    @property
    def component(self) -> NDArray[np.intp]:
        """(n,) the likeliest component of each row."""
        best: NDArray[np.intp] = np.argmax(self.responsibilities, axis=1)
        return best


@dataclass(frozen=True)
class Draw:
    """Rows drawn from a story: their components (n,) and values (n, d), categories as codes."""

    component: NDArray[np.intp]
    values: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Story:
    """A mixture of `n_components` components of one family.

    Parameters
    ----------
    schema
        The columns.
    family
        `p(x | k, theta)`.
    n_components
        K.
    prior
        `weak`: weak conjugate priors, so that learning is MAP; None: maximum likelihood.
    """

    schema: Schema
    family: Gaussian | IndependentColumns
    n_components: int
    prior: str | None = "weak"
    weight_prior: float = field(init=False)

    def __post_init__(self) -> None:
        # One pseudo-row in all, spread evenly: a Dirichlet prior with exponents 1 + 1/K.
        share = 1.0 / self.n_components if self.prior == "weak" else 0.0
        object.__setattr__(self, "weight_prior", share)

    @property
    def anchor(self) -> Pivot | None:
        """Where statistics are summed, or None before `anchored`."""
        return self.family.pivot

    @property
    def monotone(self) -> bool:
        """Whether EM can never decrease the objective: true unless a ridge is added."""
        return self.family.ridge == 0.0

    @property
    def dtype(self) -> str:
        """Arithmetic of the E-step."""
        return self.family.dtype

    @property
    def n_parameters(self) -> int:
        """Free parameters, for information criteria."""
        return self.n_components - 1 + self.family.n_parameters(self.n_components)

    def anchored(self, sample: Rows) -> Story:
        """This story with pivot and prior fixed from a sample of rows."""
        self._check(sample)
        weak = self.prior == "weak"
        return replace(self, family=self.family.anchored(sample, self.n_components, weak))

    def vague(self) -> Params:
        """Equal components as wide as the sample, from which a start is made."""
        weights = np.full(self.n_components, 1.0 / self.n_components)
        return Params(weights, self.family.vague(self.n_components))

    def _check(self, rows: Rows) -> None:
        if rows.n_features != self.schema.n_features:
            raise DataError(
                f"X has {rows.n_features} features, but this model is expecting "
                f"{self.schema.n_features} features as input: {', '.join(self.schema.names[:8])}"
            )

    def _walk(self, params: Params, rows: Rows) -> Walk:
        self._check(rows)
        weights = np.maximum(params.weights, 1e-300)
        return self.family.prepare(params.family, np.log(weights)).walk(rows)

    # Values too extreme for the arithmetic show in the objective, not as warnings on the way.
    @np.errstate(over="ignore", invalid="ignore")
    def e_step(
        self,
        params: Params,
        rows: Rows,
        responsibility: Responsibility | Array = soft,
        key: Key | None = None,
    ) -> StoryStats:
        """Sufficient statistics of some rows.

        `responsibility` is a rule of `genstream.responsibility`, or an (n, K) array of
        responsibilities given from outside, which leaves the objective at 0. A rule that draws
        needs a `key` to draw by.
        """
        given = responsibility if isinstance(responsibility, np.ndarray) else None
        rule = soft if isinstance(responsibility, np.ndarray) else rule_of(responsibility, key)
        walk = self._walk(params, rows)
        sum_r = np.zeros(self.n_components)
        objective = weight = 0.0
        n_observed = 0
        for index in walk.blocks():
            log_joint = walk.score()
            if given is None:
                value = rule(log_joint)
                base = walk.base()
                if base is not None:
                    value = value + base
            else:
                log_joint[:] = given[index].T
                value = np.zeros(log_joint.shape[1])
            n_observed += len(value)
            if rows.weights is None:
                objective += float(value.sum())
                weight += len(value)
            else:
                block = rows.weights[index]
                # A row of weight 0 moves nothing, even where its log-likelihood is not finite.
                objective += float(block @ np.where(block > 0, value, 0.0))
                weight += float(block.sum())
                log_joint *= block.astype(log_joint.dtype)
            sum_r += log_joint.sum(axis=1, dtype=np.float64)
            walk.gather(log_joint)
        family = walk.close()
        stats = StoryStats(rows.n_rows, rows.n_rows - n_observed, weight, objective, sum_r, family)
        if self.dtype == "float32" and not all(np.isfinite(v).all() for _, _, v in stats.leaves()):
            # A row beyond float32's range: its chunk is done again, in float64.
            return self._in_float64().e_step(params, rows, responsibility, key)
        return stats

    def maximise(self, stats: StoryStats, previous: Params) -> tuple[Params, NDArray[np.bool_]]:
        """The M-step, and (K,) which components were empty or singular and need rescue."""
        family, faulty = self.family.maximise(stats.family, previous.family)
        weights = stats.sum_r + self.weight_prior
        total = weights.sum()
        even = np.full(self.n_components, 1 / self.n_components)
        return Params(weights / total if total > 0 else even, family), faulty

    def m_step(self, stats: StoryStats, previous: Params) -> Params:
        """Parameters that maximise the expected log-posterior of the rows behind `stats`.

        `weights_k = (sum_r_k + a) / sum (sum_r + a)` with `a = 1 / K` under the weak prior, else
        0; the family's parameters as its `maximise` says. Walks no data.
        """
        return self.maximise(stats, previous)[0]

    def possible(self, stats: StoryStats, known: StoryStats) -> StoryStats | None:
        """Extrapolated statistics, mended into some that rows could have; None where they cannot.

        `known` are statistics of rows nearby: no sum that cannot be negative falls below a tenth
        of theirs.
        """
        if not (stats.sum_r > 0.1 * known.sum_r).all():
            return None
        family = self.family.possible(stats.family, known.family)
        return None if family is None else replace(stats, family=family)

    def expected_log_joint(self, params: Params, stats: StoryStats) -> float:
        """`E[log p(x, z | params)]` in nats, over the rows and responsibilities behind `stats`.

        It leaves out what no parameter changes (`log x!` of counts).
        """
        weights = np.log(np.maximum(params.weights, 1e-300))
        return float(stats.sum_r @ weights) + self.family.expected_log_prob(
            params.family, stats.family
        )

    def log_prior(self, params: Params) -> float:
        """Log prior density of the parameters up to a constant; 0 without a prior."""
        weights = np.log(np.maximum(params.weights, 1e-300))
        return self.weight_prior * float(weights.sum()) + self.family.log_prior(params.family)

    def _posterior_blocks(self, params: Params, rows: Rows) -> Iterator[tuple[Index, Array, Array]]:
        walk = self._walk(params, rows)
        for index in walk.blocks():
            log_joint = walk.score()
            value = soft(log_joint)
            base = walk.base()
            yield index, log_joint, value if base is None else value + base

    def _in_float64(self) -> Story:
        return replace(self, family=replace(self.family, dtype="float64"))

    @np.errstate(over="ignore", invalid="ignore")
    def infer(self, params: Params, rows: Rows) -> Posterior:
        """The posterior of the latent of each row."""
        responsibilities = np.tile(params.weights, (rows.n_rows, 1))
        log_prob = np.zeros(rows.n_rows)
        for index, block, value in self._posterior_blocks(params, rows):
            responsibilities[index] = block.T
            log_prob[index] = value
        lost = ~np.isfinite(log_prob)
        if self.dtype == "float32" and lost.any():
            again = self._in_float64().infer(params, rows[lost])
            responsibilities[lost], log_prob[lost] = again.responsibilities, again.log_prob
        return Posterior(responsibilities, log_prob)

    @np.errstate(over="ignore", invalid="ignore")
    def score(self, params: Params, rows: Rows) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(n,) `log p(x)` and (n,) the entropy of `p(k | x)`, in nats, block by block.

        Nothing of size n x K is held. A row with nothing observed has `log p(x)` 0 and the entropy
        of the mixing weights.
        """
        log_prob = np.zeros(rows.n_rows)
        weights = params.weights[params.weights > 0]
        entropy = np.full(rows.n_rows, -float(weights @ np.log(weights)))
        for index, block, value in self._posterior_blocks(params, rows):
            log_prob[index] = value
            entropy[index] = -(block * np.log(block)).sum(axis=0, dtype=np.float64)
        return log_prob, entropy

    @np.errstate(over="ignore", invalid="ignore")
    def log_prob(self, params: Params, rows: Rows) -> NDArray[np.float64]:
        """(n,) `log p(x)` in nats, in data units; only the observed entries of a row count."""
        log_prob = np.zeros(rows.n_rows)
        for index, _, value in self._posterior_blocks(params, rows):
            log_prob[index] = value
        lost = ~np.isfinite(log_prob)
        if self.dtype == "float32" and lost.any():
            log_prob[lost] = self._in_float64().log_prob(params, rows[lost])
        return log_prob

    def rounding(self, params: Params) -> float:
        """Nats a row by which rounding may move the log-likelihood, beyond its last digits."""
        return float(params.weights @ self.family.rounding(params.family))

    def draw(self, params: Params, n_rows: int, rng: np.random.Generator) -> Draw:
        """`n_rows` rows dreamt up by the model."""
        component = rng.choice(self.n_components, size=n_rows, p=params.weights)
        return Draw(component, self.family.draw(params.family, component, rng))

    def place(self, params: Params, component: int, x: Array, observed: Array) -> Params:
        """The parameters with one component re-seeded at a row (d,), weighing an even share."""
        weights = params.weights.copy()
        weights[component] = 1.0 / self.n_components
        family = self.family.place(params.family, component, x, observed)
        return Params(weights / weights.sum(), family)

    def warnings(self, params: Params) -> list[str]:
        """What a user should know of fitted parameters: variances on their floor, in words."""
        at: dict[int, list[str]] = {}
        for k, j in self.family.floored(params.family):
            at.setdefault(k, []).append(self.schema.names[j])
        return [
            f"component {k} sits on the variance floor in {', '.join(names)}: "
            "tied, discrete or dependent values there; give the column another kind, or keep the "
            "weak prior"
            for k, names in at.items()
        ]

    def labels(self) -> dict[str, Sequence[str]]:
        """Labels of the axes of `Params`, for `Params.to_dataset`."""
        columns = self.schema.columns
        labels: dict[str, Sequence[str]] = {
            kind: [columns[j].name for j in self.schema.of_kind(kind)] for kind in NUMERIC
        }
        levels = [
            f"{columns[j].name}={level}"
            for j in self.schema.of_kind("categorical")
            for level in columns[j].levels
        ]
        return labels | {"feature": list(self.schema.names), "level": levels}

    def params_from(self, dataset: Any, prefix: str = "") -> Params:
        """Parameters from `Params.to_dataset`. Raises CorruptError where a variable is missing."""
        return Params.from_dataset(dataset, prefix, family=self.family.params_type)

    def stats_from(self, dataset: Any, prefix: str = "") -> StoryStats:
        """Statistics from `StoryStats.to_dataset`. Raises CorruptError as `params_from`."""
        return StoryStats.from_dataset(dataset, prefix, family=self.family.stats_type)

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary that `from_json` turns back into an equal story, to the bit."""
        family = self.family
        if isinstance(family, Gaussian):
            covariance = "tied" if family.tied else "full"
        else:
            covariance = "spherical" if family.spherical else "diag"
        return {
            "kind": "mixture",
            "schema": self.schema.to_json(),
            "n_components": self.n_components,
            "covariance": covariance,
            "prior": self.prior,
            "reg_covar": family.ridge,
            "dtype": family.dtype,
            "pivot": _record_to_json(family.pivot),
            "family_prior": _record_to_json(family.prior),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Story:
        """Inverse of `to_json`. Raises CorruptError where a key is missing or wrong."""
        try:
            story = mixture(
                Schema.from_json(data["schema"]),
                data["n_components"],
                covariance=data["covariance"],
                prior=data["prior"],
                reg_covar=data["reg_covar"],
                dtype=data["dtype"],
            )
            family = story.family
            kind = NormalWishart if isinstance(family, Gaussian) else ColumnsPrior
            pivot = _record_from_json(Pivot, data["pivot"])
            prior = _record_from_json(kind, data["family_prior"])
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptError(f"the stored story is not valid: {error!r}") from error
        return replace(story, family=replace(family, pivot=pivot, prior=prior))


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


def _record_to_json(item: Record | None) -> dict[str, Any] | None:
    if item is None:
        return None
    return {name: np.asarray(value).tolist() for name, _, value in item.leaves()}


def _record_from_json(kind: type[Any], data: Mapping[str, Any] | None) -> Any:
    if data is None:
        return None
    return kind(
        **{k: np.array(v, dtype=np.float64) if isinstance(v, list) else v for k, v in data.items()}
    )
