"""A story: how a row comes to be, and the two steps that learn it.

    k ~ Categorical(weights),    t | k ~ the family's prior,    x | k, t ~ family(theta_k)

A row's latent is `z = (k, t)`: a component and, in families that have them, factors. `q = 0`
factors make a mixture, `K = 1` component factor analysis, both a mixture of factor analysers. The
E-step of any rows returns sufficient statistics, which add; the M-step sees statistics only.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from genstream import compiled, nearest
from genstream.errors import ConfigError, CorruptError, DataError
from genstream.families import FAMILIES
from genstream.families.blocks import (
    MAX_BLOCK,
    Array,
    FactorWalk,
    Family,
    Index,
    Kernel,
    Pivot,
    SweptWalk,
    Walk,
    slices,
)
from genstream.priors import Prior
from genstream.profile import mark
from genstream.responsibility import (
    Key,
    Nearest,
    Responsibility,
    Rule,
    hard,
    rule_of,
    soft,
    weighted_soft,
)
from genstream.rows import Rows
from genstream.schema import Schema
from genstream.stats import Monoid, Record, axes, record_from_json, record_to_json

# Kernels of parameters that somebody still holds, each with the family that prepared it and a copy
# of the numbers, lest somebody write to them. What takes more bytes than this is prepared for every
# chunk, beside whose work that is little.
MAX_PREPARED = 16 << 20
Prepared = tuple[Family, Kernel, list[Array]]
_prepared: weakref.WeakKeyDictionary[Params, Prepared] = weakref.WeakKeyDictionary()
_preparing = threading.RLock()

# More components on a floor than this are told of together.
MANY_TOLD = 8
# Where all weights are below this, those of responsibilities that count may be none in float32.
LIGHTEST = 1e-30
# Log-densities this close, relative to 1 + their size, tell no two components apart.
TWIN = 1e-9


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
    log-likelihood. `sum_r` (K,) is the weight each component took, `n_gaps` counts rows of which
    any entry was missing.
    """

    n_rows: int
    n_unobserved: int
    weight: float
    objective: float
    sum_r: Array = axes("component")
    family: Monoid | None = None
    n_gaps: int = 0


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
class FactorPosterior:
    """What the model says of each row's factors `t`, given the row and a component.

    `mean` (n, q) and `covariance` (n, q, q) are those of `p(t | x, k)`, exact where the story is
    and of its approximation where the story has a bound; `component` (n,) is the k asked for.
    """

    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]
    component: NDArray[np.intp]


@dataclass(frozen=True)
class Draw:
    """Rows drawn from a story: their components (n,), values (n, d) with categories as codes, and
    factors (n, q) where the story has any.
    """

    component: NDArray[np.intp]
    values: NDArray[np.float64]
    factors: NDArray[np.float64] | None = None


def _rows_with_gaps(rows: Rows) -> int:
    return 0 if rows.observed is None else int((~rows.observed.all(axis=1)).sum())


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
        `weak`: weak conjugate priors, so that learning is MAP; a `Prior` that says how strong they
        are; None: maximum likelihood.
    frozen
        Names of parameters that learning leaves as they are: `weights`, or what the family calls
        its own (`mean`, `covariance`, ...). Raises ConfigError where there is no such name.
    """

    schema: Schema
    family: Family
    n_components: int
    prior: str | Prior | None = "weak"
    frozen: frozenset[str] = frozenset()
    weight_prior: float = field(init=False)

    def __post_init__(self) -> None:
        names = ("weights", *self.family.param_names)
        unknown = sorted(self.frozen.difference(names))
        if unknown:
            raise ConfigError(
                f"frozen: there is no parameter {unknown[0]!r}; there are {', '.join(names)}"
            )
        # The weak one is worth one pseudo-row, spread evenly: Dirichlet with exponents 1 + 1/K.
        prior = Prior.of(self.prior)
        share = 0.0 if prior is None else prior.pseudo_rows(self.n_components)
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
    def bound(self) -> bool:
        """Whether log-probabilities and objectives are lower bounds, not exact."""
        return self.family.bound

    @property
    def n_factors(self) -> int:
        """q, the number of factors of a row; 0 for plain mixtures."""
        return self.family.n_factors

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
        prior = Prior.of(self.prior)
        rows, k = self.readable(sample), self.n_components
        family: Family = self.family.anchored(rows, k, prior is not None)
        if prior is not None:
            family = family.of(
                self.schema, family.options(), family.pivot, prior.applied(family.prior)
            )
        return replace(self, family=family)

    def with_prior(self, prior: Prior) -> Story:
        """This story, anchored as it is, under a prior of another strength.

        Raises ConfigError where it is one of maximum likelihood, which no sample gave a prior.
        """
        now = Prior.of(self.prior)
        if now is None or self.family.pivot is None:
            raise ConfigError("only a story that was anchored under a prior can have another one")
        family = self.family.of(
            self.schema,
            self.family.options(),
            self.family.pivot,
            prior.applied(self.family.prior, now),
        )
        return replace(self, family=family, prior=prior)

    def vague(self) -> Params:
        """Equal components as wide as the sample, from which a start is made."""
        weights = np.full(self.n_components, 1.0 / self.n_components)
        return Params(weights, self.family.vague(self.n_components))

    def readable(self, rows: Rows) -> Rows:
        """Rows as the family takes them: with sparse values only where it works on those."""
        return rows if getattr(self.family, "sparse", False) else rows.dense()

    def _check(self, rows: Rows) -> None:
        if rows.n_features != self.schema.n_features:
            raise DataError(
                f"X has {rows.n_features} features, but this model is expecting "
                f"{self.schema.n_features} features as input: {', '.join(self.schema.names[:8])}"
            )

    def _walk(self, params: Params, rows: Rows) -> Walk:
        self._check(rows)
        return self._kernel(params).walk(self.readable(rows))

    def _kernel(self, params: Params) -> Kernel:
        """The parameters, prepared once for all chunks of a pass on all threads."""
        numbers = [np.asarray(value) for _, _, value in params.leaves()]
        with _preparing:
            known = _prepared.get(params)
            if known is not None and known[0] is self.family:
                _, kernel, copies = known
                if all(map(np.array_equal, copies, numbers)):
                    return kernel
            weights = np.log(np.maximum(params.weights, 1e-300))
            kernel = self.family.prepare(params.family, weights)
            if sum(value.nbytes for value in numbers) <= MAX_PREPARED:
                _prepared[params] = self.family, kernel, [value.copy() for value in numbers]
            return kernel

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
        heaviest = 1.0 if rows.weights is None else rows.weights.max(initial=0.0)
        if self.dtype == "float32" and 0 < heaviest < LIGHTEST:
            return self._in_float64().e_step(params, rows, responsibility, key)
        if isinstance(responsibility, Nearest):
            return self._e_step_nearest(params, rows, responsibility, key)
        if rows.weights is not None and not rows.weights.all():
            return self._e_step_of_weighty(params, rows, responsibility, key)
        given = responsibility if isinstance(responsibility, np.ndarray) else None
        if given is not None and self.dtype == "float32":
            # Nothing is known yet of how small variances are, and so of how many digits it takes.
            return self._in_float64().e_step(params, rows, given)
        rule = soft if isinstance(responsibility, np.ndarray) else rule_of(responsibility, key)
        likeliest = rule is hard
        plain = given is None and (rule is soft or likeliest)
        stats = self._summed(params, rows) if plain and self.n_components == 1 else None
        if stats is None:
            walk = self._walk(params, rows)
            sum_r = np.zeros(self.n_components)
            mark("prepare")
            n_observed, weight, objective = 0, 0.0, 0.0
            swept = None
            if plain and isinstance(walk, SweptWalk):
                swept = walk.swept(sum_r, likeliest)
            if swept is not None:
                index, value = swept
                heavy = None if rows.weights is None else rows.weights[index]
                n_observed = len(value)
                weight = float(n_observed if heavy is None else heavy.sum())
                objective = float(value.sum() if heavy is None else heavy @ value)
            if n_observed < rows.n_rows:
                rest = self._e_step_by_block(walk, rows, given, rule, sum_r)
                n_observed, weight = n_observed + rest[0], weight + rest[1]
                objective += rest[2]
            stats = StoryStats(
                rows.n_rows,
                rows.n_rows - n_observed,
                weight,
                objective,
                sum_r,
                walk.close(),
                _rows_with_gaps(rows),
            )
        if self.dtype == "float32" and not all(np.isfinite(v).all() for _, _, v in stats.leaves()):
            # A row beyond float32's range: its chunk is done again, in float64.
            return self._in_float64().e_step(params, rows, responsibility, key)
        return stats

    def _summed(self, params: Params, rows: Rows) -> StoryStats | None:
        """Statistics of complete rows under one component, if its kernel needs no scores for them:
        their log-likelihood follows from the sums.
        """
        self._check(rows)
        summed = getattr(self._kernel(params), "summed", None)
        mark("prepare")
        found = None if summed is None else summed(self.readable(rows))
        if found is None:
            return None
        weight = float(rows.n_rows if rows.weights is None else rows.weights.sum())
        mark("gather")
        return StoryStats(rows.n_rows, 0, weight, found[1], np.array([weight]), found[0], 0)

    def _e_step_by_block(
        self, walk: Walk, rows: Rows, given: Array | None, rule: Rule, sum_r: Array
    ) -> tuple[int, float, float]:
        """Gather the statistics of all blocks, and add the responsibilities' sums to `sum_r` (K,).

        Returns how many rows have anything observed, their weight and their objective.
        """
        fast = compiled.pays_for(rows.values, self.n_components)
        objective = weight = 0.0
        n_observed = 0
        for index in walk.blocks():
            mark("features")
            log_joint = walk.score()
            mark("score")
            block = None if rows.weights is None else rows.weights[index]
            if given is None and rule is soft:
                value = weighted_soft(log_joint, block, sum_r, fast)
            else:
                if given is None:
                    value = rule(log_joint)
                else:
                    log_joint[:] = given[index].T
                    value = np.zeros(log_joint.shape[1])
                if block is not None:
                    log_joint *= block.astype(log_joint.dtype)
                sum_r += log_joint.sum(axis=1, dtype=np.float64)
            base = walk.base() if given is None else None
            if base is not None:
                value = value + base
            n_observed += len(value)
            objective += float(value.sum() if block is None else block @ value)
            weight += len(value) if block is None else float(block.sum())
            mark("softmax")
            walk.gather(log_joint)
            mark("gather")
        return n_observed, weight, objective

    def _e_step_of_weighty(
        self, params: Params, rows: Rows, responsibility: Responsibility | Array, key: Key | None
    ) -> StoryStats:
        """The statistics of rows of which some have weight 0: these are counted, and no more.

        Multiplied by 0 one of them would still spoil all sums if it is beyond the arithmetic.
        """
        assert rows.weights is not None
        heavy = np.flatnonzero(rows.weights)
        if isinstance(responsibility, np.ndarray):
            responsibility = responsibility[heavy]
        stats = self.e_step(params, rows[heavy], responsibility, key)
        unseen = 0
        if rows.observed is not None:
            unseen = int((~rows.observed[rows.weights == 0].any(axis=1)).sum())
        return replace(
            stats,
            n_rows=rows.n_rows,
            n_unobserved=stats.n_unobserved + unseen,
            n_gaps=_rows_with_gaps(rows),
        )

    def _e_step_nearest(
        self, params: Params, rows: Rows, rule: Nearest, key: Key | None
    ) -> StoryStats:
        """The statistics where each row meets the components near it alone."""
        self._check(rows)
        seed, _, chunk = key or (0, 0, 0)
        log_weights = np.log(np.maximum(params.weights, 1e-300))
        found = nearest.e_step(
            self.family,
            params.family,
            log_weights,
            self.readable(rows),
            rule,
            (seed, chunk),
            self._kernel(params),
        )
        stats = StoryStats(
            rows.n_rows,
            rows.n_rows - found.n_observed,
            found.weight,
            found.objective,
            found.sum_r,
            found.family,
            _rows_with_gaps(rows),
        )
        if self.dtype == "float32" and not all(np.isfinite(v).all() for _, _, v in stats.leaves()):
            return self._in_float64().e_step(params, rows, rule, key)
        return stats

    @property
    def single_pass(self) -> bool:
        """Whether what one pass sums over complete rows is all there is to learn: a single
        component, whose family sums the same under any parameters.
        """
        return self.n_components == 1 and bool(getattr(self.family, "settled", False))

    def settled(self, stats: StoryStats) -> bool:
        """Whether the rows behind `stats` would have given the same ones under any parameters."""
        return self.single_pass and not stats.n_gaps

    def restated(self, stats: StoryStats, params: Params, now: Params) -> StoryStats:
        """Settled statistics with the objective of the parameters `now` in place of `params`."""
        gain = self.expected_log_joint(now, stats) - self.expected_log_joint(params, stats)
        return replace(stats, objective=stats.objective + gain)

    def maximise(self, stats: StoryStats, previous: Params) -> tuple[Params, NDArray[np.bool_]]:
        """The M-step, and (K,) which components were empty or singular and need rescue."""
        kept = self.frozen - {"weights"}
        mark("other")
        family, faulty = self.family.maximise(stats.family, previous.family, kept)
        mark("m_step")
        if "weights" in self.frozen:
            return Params(previous.weights, family), faulty
        weights = stats.sum_r + self.weight_prior
        total = weights.sum()
        even = np.full(self.n_components, 1 / self.n_components)
        return Params(weights / total if total > 0 else even, family), faulty

    def m_step(self, stats: StoryStats, previous: Params) -> Params:
        """Parameters that maximise the expected log-posterior of the rows behind `stats`.

        `weights_k = (sum_r_k + a) / sum (sum_r + a)` with `a` the prior's pseudo-rows, `1 / K`
        under the weak one and 0 without; the family's parameters as its `maximise` says. Walks no
        data.
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
        fast = compiled.pays_for(rows.values, self.n_components)
        sum_r = np.zeros(self.n_components)
        for index in walk.blocks():
            log_joint = walk.score()
            value = weighted_soft(log_joint, None, sum_r, fast)
            base = walk.base()
            yield index, log_joint, value if base is None else value + base

    def _in_float64(self) -> Story:
        return replace(self, family=self.family.with_dtype("float64"))

    def _lost(self, log_prob: NDArray[np.float64]) -> NDArray[np.bool_]:
        """(n,) which rows are beyond float32's range: these are done again, in float64."""
        return ~np.isfinite(log_prob) & (self.dtype == "float32")

    @np.errstate(over="ignore", invalid="ignore")
    def infer(self, params: Params, rows: Rows) -> Posterior:
        """The posterior of the latent of each row."""
        responsibilities = np.tile(params.weights, (rows.n_rows, 1))
        log_prob = np.zeros(rows.n_rows)
        for index, block, value in self._posterior_blocks(params, rows):
            responsibilities[index] = block.T
            log_prob[index] = value
        lost = self._lost(log_prob)
        if lost.any():
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
            # What is next to nothing is exactly 0, and adds 0.
            spread = block * np.log(np.maximum(block, np.finfo(block.dtype).tiny))
            entropy[index] = -spread.sum(axis=0, dtype=np.float64)
        lost = self._lost(log_prob)
        if lost.any():
            log_prob[lost], entropy[lost] = self._in_float64().score(params, rows[lost])
        return log_prob, entropy

    @np.errstate(over="ignore", invalid="ignore")
    def log_prob(self, params: Params, rows: Rows) -> NDArray[np.float64]:
        """(n,) `log p(x)` in nats, in data units; only the observed entries of a row count."""
        log_prob = np.zeros(rows.n_rows)
        for index, _, value in self._posterior_blocks(params, rows):
            log_prob[index] = value
        lost = self._lost(log_prob)
        if lost.any():
            log_prob[lost] = self._in_float64().log_prob(params, rows[lost])
        return log_prob

    def rounding(self, params: Params) -> float:
        """Nats a row by which rounding may move the log-likelihood, beyond its last digits."""
        return float(params.weights @ self.family.rounding(params.family))

    def draw(self, params: Params, n_rows: int, rng: np.random.Generator) -> Draw:
        """`n_rows` rows dreamt up by the model."""
        component = rng.choice(self.n_components, size=n_rows, p=params.weights)
        values, factors = self.family.draw(params.family, component, rng)
        return Draw(component, values, factors)

    def factors(
        self, params: Params, rows: Rows, component: int | Array | None = None
    ) -> FactorPosterior:
        """The posterior of each row's factors, given its likeliest component.

        `component` names another one, for all rows or for each (n,). A row with nothing observed
        has the factors' prior. Raises ConfigError where the story has no factors.
        """
        if not self.n_factors:
            raise ConfigError(f"a {self.family.name} story has no factors: it is a mixture")
        chosen = np.zeros(rows.n_rows, dtype=np.intp)
        if component is not None:
            chosen[:] = component
        mean = np.zeros((rows.n_rows, self.n_factors))
        covariance = np.zeros((rows.n_rows, self.n_factors, self.n_factors))
        walk = cast(FactorWalk, self._walk(params, rows))

        def note(index: Index, log_joint: Array) -> None:
            if component is None:
                chosen[index] = log_joint.argmax(axis=0)
            mean[index], covariance[index] = walk.factors(chosen[index])

        for index in walk.blocks():
            note(index, walk.score())
        for piece in _unobserved(rows):
            walk.load(piece)
            note(piece, walk.score())
        return FactorPosterior(mean, covariance, chosen)

    def impute(
        self, params: Params, rows: Rows, rng: np.random.Generator | None = None
    ) -> NDArray[np.float64]:
        """(n, d) the rows with their gaps filled; what was observed stays to the bit.

        Without `rng` a gap holds `E[x | observed]` of a real or count column and the likeliest
        value of a binary or categorical one. With it the gaps of a row are one draw from
        `p(x_missing | x_observed)`, for multiple imputation (Rubin 1987). Computed in float64.
        """
        values = rows.dense().values.astype(np.float64)
        if rows.observed is None:
            return values
        story = self._in_float64()
        walk = story._walk(params, rows)
        for index in walk.blocks():
            responsibilities = walk.score()
            soft(responsibilities)
            if rng is not None:
                responsibilities = _drawn(responsibilities, rng)
            values[index] = walk.complete(responsibilities, rng)
        for piece in _unobserved(rows):
            responsibilities = np.repeat(params.weights[:, None], len(piece), axis=1)
            if rng is not None:
                responsibilities = _drawn(responsibilities, rng)
            values[piece] = story.family.fill(params.family, responsibilities, rng)
        return np.where(rows.observed, rows.values, values)

    def marginal(self, params: Params, names: Sequence[str]) -> tuple[Story, Params]:
        """The story of some of the columns, in the order of the schema, and its parameters.

        Raises DataError where a column is not there, ConfigError where none is named.
        """
        columns = np.unique([self.schema.index(name) for name in names]).astype(np.intp)
        if not len(columns):
            raise ConfigError("a marginal needs at least one column")
        family, theta = self.family.marginal(params.family, columns)
        schema = self.schema.at(columns)
        story = Story(schema, family, self.n_components, None)
        return story, Params(params.weights, theta)

    def condition(self, params: Params, given: Mapping[str, float | str]) -> tuple[Story, Params]:
        """The story of the columns that are not given, given the values of others.

        `weights_k` become `p(k | given)`, and each component becomes what the family makes of it.
        Levels may be named by their label. Approximate where the story has a bound. Raises
        DataError where a column is not there or cannot hold the value, ConfigError where no column
        or every column is given.
        """
        x = np.zeros(self.schema.n_features)
        known = np.zeros(self.schema.n_features, dtype=bool)
        for name, value in given.items():
            j = self.schema.index(name)
            x[j], known[j] = self.schema.columns[j].code(value), True
        if not known.any() or known.all():
            raise ConfigError("condition: give values of at least one column, and not of all")
        try:
            Rows(x[None], known[None]).check(self.schema)
        except DataError as error:
            # What is given is no row of the data.
            raise DataError(str(error).removeprefix("row 0, ")) from None
        family, theta, log_p = self.family.condition(params.family, x, known)
        log_joint = (log_p + np.log(np.maximum(params.weights, 1e-300)))[:, None]
        soft(log_joint)
        weights = log_joint[:, 0] / log_joint.sum()
        schema = self.schema.at(np.flatnonzero(~known))
        return Story(schema, family, self.n_components, None), Params(weights, theta)

    def place(self, params: Params, component: int, x: Array, observed: Array) -> Params:
        """The parameters with one component re-seeded at a row (d,), weighing an even share.

        What is frozen stays.
        """
        weights = params.weights.copy()
        weights[component] = 1.0 / self.n_components
        family = self.family.place(params.family, component, x, observed)
        return Params(weights / weights.sum(), family).graft(params, self.frozen)

    def twins(self, params: Params, rows: Rows) -> list[tuple[int, int]]:
        """Pairs of components to which all the rows are equally likely but for rounding.

        EM never parts them. Of several alike the second of each pair is another one, the first the
        heaviest of them.
        """
        story = self._in_float64() if self.dtype == "float32" else self
        walk = story._walk(params, rows)
        with np.errstate(over="ignore", invalid="ignore"):
            scores = [walk.score().copy() for _ in walk.blocks()]
            if not scores:
                return []
            log_p = (
                np.concatenate(scores, axis=1) - np.log(np.maximum(params.weights, 1e-300))[:, None]
            )
            groups = _alike(log_p)
        pairs = []
        for alike in groups:
            alike.sort()
            first = alike[params.weights[alike].argmax()]
            pairs += [(int(first), int(k)) for k in alike if k != first]
        return sorted(pairs)

    def warnings(self, params: Params) -> list[str]:
        """What a user should know of fitted parameters: variances on their floor, in words."""
        at: dict[int, list[str]] = {}
        for k, j in self.family.floored(params.family):
            at.setdefault(k, []).append(self.schema.names[j])
        if len(at) > MANY_TOLD:
            names = sorted({name for every in at.values() for name in every})
            told = f"{len(at)} of {self.n_components} components sit on the variance floor, in "
            told += f"{', '.join(names)}: tied, discrete or dependent values there; give the "
            return [told + "column another kind or its resolution, or keep the weak prior"]
        return [
            f"component {k} sits on the variance floor in {', '.join(names)}: "
            "tied, discrete or dependent values there; give the column another kind, or keep the "
            "weak prior"
            for k, names in at.items()
        ]

    def labels(self) -> dict[str, Sequence[str]]:
        """Labels of the axes of `Params`, for `Params.to_dataset`.

        A family whose axes are not those of the schema has `labels` of its own.
        """
        labels: dict[str, Sequence[str]] = {**self.schema.labels()}
        return labels | getattr(self.family, "labels", dict)()

    def params_from(self, dataset: Any, prefix: str = "") -> Params:
        """Parameters from `Params.to_dataset`. Raises CorruptError where a variable is missing."""
        return Params.from_dataset(dataset, prefix, family=self.family.params_type)

    def stats_from(self, dataset: Any, prefix: str = "") -> StoryStats:
        """Statistics from `StoryStats.to_dataset`. Raises CorruptError as `params_from`."""
        return StoryStats.from_dataset(dataset, prefix, family=self.family.stats_type)

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary that `from_json` turns back into an equal story, to the bit."""
        family = self.family
        return {
            "schema": self.schema.to_json(),
            "n_components": self.n_components,
            "prior": self.prior.to_json() if isinstance(self.prior, Prior) else self.prior,
            "frozen": sorted(self.frozen),
            "family": {
                "name": family.name,
                "options": family.options(),
                "pivot": record_to_json(family.pivot),
                "prior": record_to_json(family.prior),
            },
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Story:
        """Inverse of `to_json`. Raises CorruptError where a key is missing or wrong."""
        try:
            schema = Schema.from_json(data["schema"])
            told = data["family"] if "family" in data else _told_before(data)
            kind: Any = FAMILIES[told["name"]]
            pivot = record_from_json(Pivot, told["pivot"])
            family = kind.of(schema, told["options"], pivot, None)
            if told["prior"] is not None:
                prior = record_from_json(family.prior_type, told["prior"])
                family = kind.of(schema, told["options"], pivot, prior)
            frozen = frozenset(data.get("frozen", ()))
            told_prior = data["prior"]
            made = Prior.of(told_prior) if isinstance(told_prior, dict) else told_prior
            return cls(schema, family, data["n_components"], made, frozen)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CorruptError(f"the stored story is not valid: {error!r}") from error


def _told_before(data: Mapping[str, Any]) -> dict[str, Any]:
    """The family of a story stored when there were two, which went by their covariance."""
    names = ("covariance", "reg_covar", "dtype")
    return {
        "name": "gaussian" if data["covariance"] in ("full", "tied") else "columns",
        "options": {name: data[name] for name in names},
        "pivot": data["pivot"],
        "prior": data["family_prior"],
    }


def _unobserved(rows: Rows) -> Iterator[NDArray[np.intp]]:
    """Blocks of the rows with nothing observed."""
    if rows.observed is not None:
        index = np.flatnonzero(~rows.observed.any(axis=1))
        for piece in slices(len(index), MAX_BLOCK):
            yield index[piece]


def _alike(log_p: Array) -> list[NDArray[np.intp]]:
    """Groups of components whose log-densities (K, n) are the same but for rounding.

    Row by row a group parts where its sorted values leave a gap, until no row parts any: one that
    tells no two apart, or some from no others, so hides nothing, and nobody is compared with all.
    """
    kept = np.arange(len(log_p))
    group = np.zeros(len(log_p), dtype=np.intp)
    parted = True
    while parted:
        parted = False
        for column in log_p.T:
            order = np.lexsort((column[kept], group))
            kept, group, value = kept[order], group[order], column[kept[order]]
            same = np.diff(group) == 0
            near = np.abs(np.diff(value)) <= TWIN * (1 + np.abs(value[1:]))
            parted |= bool((same & ~near).any())
            group = np.cumsum(np.concatenate([[True], ~(same & near)])) - 1
            # Nobody is left to part from one that is alone.
            many = np.bincount(group)[group] > 1
            kept, group = kept[many], group[many]
            if not len(kept):
                return []
    return np.split(kept, np.flatnonzero(np.diff(group)) + 1)


def _drawn(responsibilities: Array, rng: np.random.Generator) -> Array:
    """(K, n) one component a row, drawn from its responsibilities, as ones among zeros."""
    below = np.cumsum(responsibilities, axis=0)
    chosen = (below < rng.random(below.shape[1]) * below[-1]).sum(axis=0)
    one_hot = np.zeros_like(responsibilities)
    one_hot[np.minimum(chosen, len(below) - 1), np.arange(below.shape[1])] = 1.0
    return one_hot
