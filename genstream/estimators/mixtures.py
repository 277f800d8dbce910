"""Mixtures: of Gaussians, as in scikit-learn, of t distributions, and over columns of any kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from sklearn.cluster import KMeans, kmeans_plusplus

from genstream.errors import ConfigError, DataError
from genstream.estimators.face import Mixed, generator_of, given_array
from genstream.estimators.starts import replaced
from genstream.families.blocks import Array
from genstream.learn import BatchEM, Learner
from genstream.priors import Prior
from genstream.responsibility import MANY, RULES, climbs
from genstream.rows import Rows
from genstream.schema import Column, Kind, Schema
from genstream.start import cluster, seed_centres
from genstream.stories import COVARIANCES, Block, mixture
from genstream.story import Params, Story

INIT_PARAMS = ("kmeans", "k-means++", "random", "random_from_data")


class GaussianMixture(Mixed):
    """A mixture of Gaussians, in place of `sklearn.mixture.GaussianMixture`.

        k ~ Categorical(weights_),    x | k ~ N(means_[k], covariances_[k])

    Parameters of the same name mean what they mean in scikit-learn. On data in memory without gaps
    and of at most 50,000 rows, starts are scikit-learn's own, so that the same `random_state`
    leads to the same fit. On more rows, and out of core, `n_init` starts compete on a sample of
    50,000 rows drawn over all chunks, and the best begins the full passes.

    A component that is empty, or whose covariance is singular, is re-seeded and reported in
    `warnings_`, where scikit-learn gives up.

    Parameters
    ----------
    n_components
        K.
    covariance_type
        `full`, `tied`, `diag` or `spherical`.
    tol
        EM stops when a step changes the mean log-likelihood (with a prior, plus log-prior) by less
        than this many nats a row.
    reg_covar
        Added to every variance after each step, in squared data units.
    max_iter, n_init
        Steps at most, and starts.
    init_params
        `kmeans`, `k-means++`, `random` or `random_from_data`. With gaps the first two use distances
        over the entries that two rows both have.
    weights_init, means_init, precisions_init
        Parameters to begin with; those not given come from `init_params`.
    start
        More of them: `Params`, a dataset as `params_` gives it or some of its variables by name,
        or a fitted estimator; one of another kind says how likely each row belongs to each
        component.
    frozen
        Names of parameters that stay as the start has them: `weights`, `mean`, `covariance`
        (`variance` where it is `diag` or `spherical`).
    random_state
        Seed or generator of all random choices.
    warm_start
        A further `fit` goes on from the parameters found last.
    verbose, verbose_interval
        1 prints that steps were done, 2 their time and gain as well, once every so many steps.
    responsibility
        How a row is shared among components: `soft`, by probability; `nearest`, by probability
        among those near it, which alone are scored, so that many components cost little more than
        some; `hard`, `sampled` or `truncated` as in `genstream.responsibility`. `auto` is `nearest`
        from 512 components on, and `soft` below.
    prior
        None for maximum likelihood, `weak` for MAP under weak conjugate priors, a `Prior` for
        stronger ones.
    dtype
        Arithmetic of the E-step, `float64` or `float32`; sums are float64 always.
    chunk_rows
        Rows in memory that a thread works on at a time; when left out, by how many there are.
        Part of what makes a fit repeat bit for bit, as the scheduler and the number of workers are
        not.
    scheduler, workers
        See `genstream.passes.Passes`: `threads`, `synchronous`, `distributed` or an address.

    Attributes
    ----------
    weights_ : (K,)
    means_ : (K, d)
    covariances_ : (K, d, d) full, (d, d) tied, (K, d) diag, (K,) spherical
        These three are what answers are computed from.
    precisions_, precisions_cholesky_ : as `covariances_`
        Inverses of the covariances, and upper triangular U with `U U' = precision`.
    converged_ : bool
    is_bound_ : bool
        Whether log-probabilities are lower bounds; never of this model.
    n_iter_ : int
        Steps of the best fit.
    lower_bound_, lower_bounds_ : float, list
        Mean log-likelihood a row (with a prior, plus log-prior) at the last and at every step.
    n_features_in_, feature_names_in_ : int, (d,)
    story_, state_ : Story, FitState
        The model, and the state of the fit that can be stored and resumed.
    trace_ : tuple of StepInfo
    outcome_ : Outcome
    warnings_ : list of str
        Components that were re-seeded, or that sit on the variance floor.

    References
    ----------
    Dempster, Laird & Rubin (1977) for EM; Ghahramani & Jordan (1994) for gaps; Fraley & Raftery
    (2007) for the weak prior.
    """

    def __init__(
        self,
        n_components: int = 1,
        *,
        covariance_type: str = "full",
        tol: float = 1e-3,
        reg_covar: float = 1e-6,
        max_iter: int = 100,
        n_init: int = 1,
        init_params: str = "kmeans",
        weights_init: ArrayLike | None = None,
        means_init: ArrayLike | None = None,
        precisions_init: ArrayLike | None = None,
        start: Any = None,
        frozen: Sequence[str] = (),
        random_state: int | np.random.RandomState | None = None,
        warm_start: bool = False,
        verbose: int = 0,
        verbose_interval: int = 10,
        responsibility: str = "auto",
        prior: str | Prior | None = None,
        dtype: str = "float64",
        chunk_rows: int | None = None,
        scheduler: str = "threads",
        workers: int | None = None,
    ) -> None:
        self.responsibility = responsibility
        self.n_components = n_components
        self.covariance_type = covariance_type
        self.tol = tol
        self.reg_covar = reg_covar
        self.max_iter = max_iter
        self.n_init = n_init
        self.init_params = init_params
        self.weights_init = weights_init
        self.means_init = means_init
        self.precisions_init = precisions_init
        self.start = start
        self.frozen = frozen
        self.random_state = random_state
        self.warm_start = warm_start
        self.verbose = verbose
        self.verbose_interval = verbose_interval
        self.prior = prior
        self.dtype = dtype
        self.chunk_rows = chunk_rows
        self.scheduler = scheduler
        self.workers = workers

    def _check_parameters(self) -> None:
        super()._check_parameters()
        for name, allowed in (
            ("covariance_type", COVARIANCES),
            ("init_params", INIT_PARAMS),
            ("responsibility", ("auto", *RULES)),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise ConfigError(
                    f"The {name!r} parameter of {type(self).__name__} must be one of "
                    f"{', '.join(allowed)}. Got {value!r} instead."
                )

    def _make_story(self, schema: Schema) -> Story:
        return mixture(
            schema,
            self.n_components,
            covariance=self.covariance_type,
            prior=self.prior,
            reg_covar=self.reg_covar,
            dtype=self.dtype,
        )

    def _reset(self, story: Story) -> dict[str, Any]:
        inits = {"weights_init": None, "means_init": None, "precisions_init": None}
        return super()._reset(story) | inits

    def _story(self) -> Story:
        # Parameters set by hand make a model too, as they do in scikit-learn.
        found: Story | None = getattr(self, "story_", None)
        if found is None or found.n_components != len(self.weights_):
            story = self._new_story(Schema.real(np.shape(self.means_)[1]))
            found = replace(story, n_components=len(self.weights_))
        return found

    def _params(self) -> Params:
        story = self._story()
        covariances = getattr(self, "covariances_", None)
        if covariances is None:
            roots = np.asarray(self.precisions_cholesky_, dtype=np.float64)
            if self.covariance_type in ("full", "tied"):
                roots = roots @ roots.swapaxes(-1, -2)
            else:
                roots = roots**2
            covariances = _inverse(roots, self.covariance_type)
        by_hand = {"weights": self.weights_, "family.mean": self.means_}
        by_hand[self._covariance_name] = covariances
        found = {name: np.asarray(value, dtype=np.float64) for name, value in by_hand.items()}
        return replaced(story.vague(), found)

    def _set_attributes(self, params: Params) -> None:
        family: Any = params.family
        self.weights_ = params.weights
        self.means_ = family.mean
        if self.covariance_type in ("full", "tied"):
            self.covariances_ = family.covariance
            roots = np.linalg.inv(np.linalg.cholesky(family.covariance)).swapaxes(-1, -2)
            self.precisions_ = roots @ roots.swapaxes(-1, -2)
        else:
            self.covariances_ = family.variance
            roots = 1.0 / np.sqrt(family.variance)
            self.precisions_ = roots**2
        self.precisions_cholesky_ = roots

    # --- first parameters ------------------------------------------------------------------------

    @property
    def _gives(self) -> bool:
        inits = (self.start, self.weights_init, self.means_init, self.precisions_init)
        return any(given is not None for given in inits)

    def _given(self, story: Story) -> dict[str, Array]:
        found = super()._given(story)
        k, d = story.n_components, story.schema.n_features
        if self.weights_init is not None:
            weights = given_array("weights", self.weights_init, (k,))
            if weights.min() < 0 or weights.max() > 1:
                raise ConfigError(
                    "The parameter 'weights' should be in the range [0, 1], but got max value "
                    f"{weights.max():.5f}, min value {weights.min():.5f}"
                )
            if abs(1 - weights.sum()) > 1e-6:
                raise ConfigError(
                    "The parameter 'weights' should be normalized, but got sum(weights) = "
                    f"{weights.sum():.5f}"
                )
            found["weights"] = weights
        if self.means_init is not None:
            found["family.mean"] = given_array("means", self.means_init, (k, d))
        kind = self.covariance_type
        shape = {"full": (k, d, d), "tied": (d, d), "diag": (k, d), "spherical": (k,)}[kind]
        if self.precisions_init is None:
            return found
        precisions = given_array(f"{kind} precision", self.precisions_init, shape)
        if kind in ("full", "tied"):
            symmetric = np.allclose(precisions, precisions.swapaxes(-1, -2))
            if not symmetric or not (np.linalg.eigvalsh(precisions) > 0).all():
                raise ConfigError(f"'{kind} precision' should be symmetric, positive-definite")
        elif not (precisions > 0).all():
            raise ConfigError(f"'{kind} precision' should be positive")
        return found | {self._covariance_name: _inverse(precisions, kind)}

    @property
    def _covariance_name(self) -> str:
        matrix = self.covariance_type in ("full", "tied")
        return "family.covariance" if matrix else "family.variance"

    def _seed(self, story: Story, rows: Rows, random_state: np.random.RandomState) -> Params:
        many = story.n_components >= MANY
        own = self.init_params == "kmeans" and (many or rows.observed is not None)
        if own or self._begins_with_another(story):
            return super()._seed(story, rows, random_state)
        responsibilities = self._first_responsibilities(story, rows, random_state)
        vague = story.vague()
        return story.m_step(story.e_step(vague, rows, responsibilities), vague)

    def _first_responsibilities(
        self, story: Story, rows: Rows, random_state: np.random.RandomState
    ) -> Array:
        """(n, K) by `init_params`, drawing from `random_state` in scikit-learn's order."""
        n, k = rows.n_rows, story.n_components
        if self.init_params == "random":
            drawn = random_state.uniform(size=(n, k))
            return np.asarray(drawn / drawn.sum(axis=1, keepdims=True))
        responsibilities = np.zeros((n, k))
        if self.init_params == "kmeans":
            model = KMeans(n_clusters=k, n_init=1, random_state=random_state)
            labels = model.fit(rows.values, sample_weight=rows.weights).labels_
            responsibilities[np.arange(n), labels] = 1.0
        elif rows.observed is None:
            responsibilities[self._chosen(rows, k, random_state), np.arange(k)] = 1.0
        else:
            # A single row with gaps says little of a component: take the rows nearest to it.
            x, observed = story.family.embed(rows)
            if self.init_params == "k-means++":
                centres = seed_centres(x, observed, rows.row_weights, k, generator_of(random_state))
            else:
                centres = x[self._chosen(rows, k, random_state)]
            _, labels = cluster(x, observed, rows.row_weights, centres, max_steps=0)
            responsibilities[np.arange(n), labels] = 1.0
        return responsibilities

    def _chosen(self, rows: Rows, k: int, random_state: np.random.RandomState) -> Array:
        """(K,) the rows at which components begin."""
        weights = rows.weights
        if self.init_params == "k-means++":
            chosen = kmeans_plusplus(
                rows.values, k, sample_weight=weights, random_state=random_state
            )[1]
        else:
            chance = None if weights is None else weights / weights.sum()
            chosen = random_state.choice(rows.n_rows, size=k, replace=False, p=chance)
        return np.asarray(chosen)


class StudentMixture(Mixed):
    """A mixture of multivariate t distributions: Gaussians with tails, which outliers pull less.

        k ~ Categorical(weights_),    x | k ~ t(means_[k], scales_[k], dof_[k])

    that is, `x | k, u ~ N(means_[k], scales_[k] / u)` with `u ~ Gamma(dof / 2, dof / 2)`; a row far
    from all components has a small `u`, and counts for as little.

    Parameters
    ----------
    n_components
        K.
    covariance_type
        Form of the scale matrices: `full`, `tied`, `diag` or `spherical`.
    dof
        Degrees of freedom of all components; None learns those of each, from 1 to 1000.
    prior
        `weak` for MAP under weak conjugate priors, a `Prior` for stronger ones, None for maximum
        likelihood.
    reg_covar
        Added to the diagonal of every scale matrix after each step, in squared data units.
    tol, max_iter, n_init
        EM, accelerated, stops when a step changes the mean objective (log-likelihood plus
        log-prior) by less than `tol` nats a row, or after `max_iter` steps. `n_init` starts
        compete.
    start, frozen
        As for `GaussianMixture`; parameters are `weights`, `mean`, `scale` and `dof`.
    random_state, warm_start, verbose, verbose_interval, dtype, chunk_rows, scheduler, workers
        As for `GaussianMixture`.

    Attributes
    ----------
    weights_, dof_ : (K,)
    means_ : (K, d)
        Locations, which are the means where `dof_` is above 1.
    scales_ : (K, d, d) full, (d, d) tied, (K, d) diag, (K,) spherical
    covariances_ : as `scales_`, but one a component where they are tied
        `scales_ dof_ / (dof_ - 2)`, infinite where `dof_` is at most 2.
    converged_, is_bound_, n_iter_, lower_bound_, lower_bounds_, n_features_in_, \
feature_names_in_, story_, state_, trace_, outcome_, warnings_
        As for `GaussianMixture`.

    References
    ----------
    Peel & McLachlan (2000); Liu & Rubin (1995) for gaps and degrees of freedom.
    """

    def __init__(
        self,
        n_components: int = 1,
        *,
        covariance_type: str = "full",
        dof: float | None = None,
        prior: str | Prior | None = "weak",
        reg_covar: float = 0.0,
        tol: float = 1e-4,
        max_iter: int = 200,
        n_init: int = 5,
        start: Any = None,
        frozen: Sequence[str] = (),
        random_state: int | np.random.RandomState | None = None,
        warm_start: bool = False,
        verbose: int = 0,
        verbose_interval: int = 10,
        dtype: str = "float64",
        chunk_rows: int | None = None,
        scheduler: str = "threads",
        workers: int | None = None,
    ) -> None:
        self.n_components = n_components
        self.covariance_type = covariance_type
        self.dof = dof
        self.prior = prior
        self.reg_covar = reg_covar
        self.tol = tol
        self.max_iter = max_iter
        self.n_init = n_init
        self.start = start
        self.frozen = frozen
        self.random_state = random_state
        self.warm_start = warm_start
        self.verbose = verbose
        self.verbose_interval = verbose_interval
        self.dtype = dtype
        self.chunk_rows = chunk_rows
        self.scheduler = scheduler
        self.workers = workers

    def _check_parameters(self) -> None:
        super()._check_parameters()
        if self.covariance_type not in COVARIANCES:
            raise ConfigError(
                "The 'covariance_type' parameter of StudentMixture must be one of "
                f"{', '.join(COVARIANCES)}. Got {self.covariance_type!r} instead."
            )
        if self.dof is not None and not 1 <= self.dof <= 1000:
            raise ConfigError(
                "The 'dof' parameter of StudentMixture must be None or a number from 1 to 1000. "
                f"Got {self.dof!r} instead."
            )

    def _make_story(self, schema: Schema) -> Story:
        return mixture(
            schema,
            self.n_components,
            covariance=self.covariance_type,
            tails="student",
            prior=self.prior,
            reg_covar=self.reg_covar,
            dtype=self.dtype,
            frozen=() if self.dof is None else ("dof",),
        )

    def _given(self, story: Story) -> dict[str, Array]:
        found = super()._given(story)
        if self.dof is not None:
            found["family.dof"] = np.full(story.n_components, float(self.dof))
        return found

    @property
    def _gives(self) -> bool:
        return self.start is not None or self.dof is not None

    def _reset(self, story: Story) -> dict[str, Any]:
        # A conditional has other degrees of freedom, and scale matrices of each component's own.
        form = story.family.options().get("covariance", self.covariance_type)
        return super()._reset(story) | {"dof": None, "covariance_type": form}

    def _learner(self, max_steps: int) -> Learner:
        return BatchEM(max_steps, self.tol, self._rule, accelerate=climbs(self._rule))

    def _set_attributes(self, params: Params) -> None:
        family: Any = params.family
        self.weights_ = params.weights
        self.means_, self.scales_, self.dof_ = family.mean, family.scale, family.dof
        heavy = self.dof_ <= 2
        ratio = np.where(heavy, np.inf, self.dof_ / np.where(heavy, 1.0, self.dof_ - 2))
        scales = self.scales_[None] if self.covariance_type == "tied" else self.scales_
        with np.errstate(invalid="ignore"):
            wide = scales * ratio.reshape(-1, *[1] * (scales.ndim - 1))
        self.covariances_ = np.where(scales == 0, 0.0, wide)


class Mixture(Mixed):
    """A mixture over columns of any kind: real, binary, count and categorical.

        k ~ Categorical(weights_),    x | k ~ prod_b p_b(x_b | k)

    where blocks `b` of columns are independent given the component: by default all real columns
    make one Gaussian (where there are no others), and every other column is a block of its own,
    with a Gaussian, Bernoulli, Poisson or categorical distribution.

    Parameters
    ----------
    n_components
        K.
    columns
        What the columns are: a `Schema`, or a mapping from name to kind (`real`, `binary`, `count`,
        `categorical`) or `Column`; in the order of an array's columns, whereas of a table only
        those named are used. None takes all columns of a table by their types (numbers are real,
        truth values binary, labels categorical) and all columns of an array as real. A scipy array
        of sparse rows, such as counts of words, needs a `Schema`.
    covariance
        What the real columns have: `full`, `tied`, `diag` or `spherical`; None for `full` where all
        columns are real and `diag` elsewhere.
    tails
        `gaussian`, or `student` for real columns that are multivariate t, which outliers pull less.
    counts
        What count columns are, by name: `poisson` (where nothing is said), `negative_binomial` or
        `zero_inflated`.
    blocks
        Further columns that depend on one another given the component: `genstream.stories.Block`s.
    prior
        `weak` for MAP under weak conjugate priors, a `Prior` for stronger ones, None for maximum
        likelihood.
    reg_covar
        Added to every variance after each step, in squared data units.
    tol, max_iter, n_init
        EM stops when a step changes the mean objective (log-likelihood plus log-prior) by less than
        `tol` nats a row, or after `max_iter` steps. `n_init` starts compete on a row sample.
    start, frozen, random_state, warm_start, verbose, verbose_interval, dtype, chunk_rows, \
scheduler, workers
        As for `GaussianMixture`; what can be frozen depends on the columns.

    Attributes
    ----------
    schema_ : Schema
        The columns, with the levels that were learned.
    weights_ : (K,)
    converged_, n_iter_, lower_bound_, lower_bounds_, n_features_in_, feature_names_in_, story_, \
state_, trace_, outcome_, warnings_
        As for `GaussianMixture`.
    """

    def __init__(
        self,
        n_components: int = 1,
        *,
        columns: Schema | Mapping[str, Kind | Column] | None = None,
        covariance: str | None = None,
        tails: str = "gaussian",
        counts: Mapping[str, str] | None = None,
        blocks: Sequence[Block] = (),
        prior: str | Prior | None = "weak",
        reg_covar: float = 0.0,
        tol: float = 1e-4,
        max_iter: int = 200,
        n_init: int = 5,
        start: Any = None,
        frozen: Sequence[str] = (),
        random_state: int | np.random.RandomState | None = None,
        warm_start: bool = False,
        verbose: int = 0,
        verbose_interval: int = 10,
        dtype: str = "float64",
        chunk_rows: int | None = None,
        scheduler: str = "threads",
        workers: int | None = None,
    ) -> None:
        self.n_components = n_components
        self.columns = columns
        self.covariance = covariance
        self.tails = tails
        self.counts = counts
        self.blocks = blocks
        self.prior = prior
        self.reg_covar = reg_covar
        self.tol = tol
        self.max_iter = max_iter
        self.n_init = n_init
        self.start = start
        self.frozen = frozen
        self.random_state = random_state
        self.warm_start = warm_start
        self.verbose = verbose
        self.verbose_interval = verbose_interval
        self.dtype = dtype
        self.chunk_rows = chunk_rows
        self.scheduler = scheduler
        self.workers = workers

    takes_labels = True

    @property
    def _takes_sparse(self) -> bool:
        return isinstance(self.columns, Schema)

    def _make_story(self, schema: Schema) -> Story:
        return mixture(
            schema,
            self.n_components,
            covariance=self.covariance,
            tails=self.tails,
            counts=self.counts,
            blocks=self.blocks,
            prior=self.prior,
            reg_covar=self.reg_covar,
            dtype=self.dtype,
        )

    def _reset(self, story: Story) -> dict[str, Any]:
        left = story.schema.names
        counts = {name: kind for name, kind in (self.counts or {}).items() if name in left}
        shrunk = [Block([n for n in b.columns if n in left], b.family) for b in self.blocks]
        blocks = [block for block in shrunk if block.columns]
        return super()._reset(story) | {
            "columns": story.schema,
            "counts": counts or None,
            "blocks": blocks,
        }

    def _check_parameters(self) -> None:
        super()._check_parameters()
        if self.columns is not None and not isinstance(self.columns, Schema | Mapping):
            raise ConfigError(
                "The 'columns' parameter of Mixture must be a Schema, a mapping from names to "
                f"kinds, or None. Got {self.columns!r} instead."
            )
        if isinstance(self.columns, Mapping) and not self.columns:
            raise ConfigError("The 'columns' parameter of Mixture names no column")

    def _learner(self, max_steps: int) -> Learner:
        return BatchEM(max_steps, self.tol, self._rule, accelerate=climbs(self._rule))

    def _wanted_columns(self) -> Schema | Mapping[str, Kind | Column] | None:
        return self.columns

    def _describe(self, found: Schema) -> Schema:
        if not isinstance(self.columns, Schema):
            return found
        if self.columns.n_features != found.n_features:
            raise DataError(
                f"X has {found.n_features} columns, but {self.columns.n_features} are described: "
                f"{', '.join(self.columns.names)}"
            )
        return self.columns

    def _set_attributes(self, params: Params) -> None:
        self.schema_ = self.story_.schema
        self.weights_ = params.weights


def _inverse(matrices: Array, covariance_type: str) -> Array:
    if covariance_type in ("diag", "spherical"):
        return np.asarray(1.0 / matrices)
    inverse = np.linalg.inv(matrices)
    return np.asarray((inverse + inverse.swapaxes(-1, -2)) / 2)
