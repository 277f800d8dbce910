"""The scikit-learn face: mixtures with `fit` and `predict` that also take data beyond memory.

`GaussianMixture` takes the place of `sklearn.mixture.GaussianMixture`: the same parameters,
attributes and methods, and by default the same estimate. Both estimators accept row weights and
gaps (NaN) everywhere, and besides arrays and tables in memory a dask array, an xarray object, a
zarr array or a path; the answers for those are dask arrays, computed chunk by chunk when asked for.
"""

from __future__ import annotations

import os
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, DensityMixin
from sklearn.cluster import KMeans, kmeans_plusplus
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_array, check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from genstream import evaluate
from genstream.errors import ConfigError, DataError
from genstream.families.blocks import Array
from genstream.learn import BatchEM, FitState, Outcome, StepInfo, fit
from genstream.online import OnlineEM
from genstream.passes import Passes
from genstream.rows import Rows
from genstream.schema import Column, Kind, Schema
from genstream.sources import CHUNK_ROWS, DaskSource, NumpySource, Source
from genstream.start import cluster, draw_sample, rescue_rows, seed_centres, seed_params, warm_start
from genstream.stories import COVARIANCES, mixture
from genstream.story import Params, Story
from genstream.tables import Encoder, TableSource, open_source
from genstream.threads import one_blas_thread

if TYPE_CHECKING:
    import xarray

# Up to this many rows in memory every start is fitted on all rows, as scikit-learn does; beyond it,
# and out of core, starts compete on a row sample of this size.
START_ROWS = 50_000
# Out-of-core data of so few numbers are read into memory to be fitted.
RESIDENT_NUMBERS = 1 << 23
INIT_PARAMS = ("kmeans", "k-means++", "random", "random_from_data")
# Packages whose objects hold data that need not be in memory.
LAZY_PACKAGES = ("dask", "xarray", "zarr")


@dataclass(frozen=True)
class Data:
    """Data given to a method: where to read the rows, and how to give answers about them.

    `lazy` data may exceed memory, so answers are dask arrays; `wrap` turns an answer with the rows
    along its first axis into the type the caller expects.
    """

    source: Source
    lazy: bool = False
    wrap: Callable[[Any], Any] = lambda answer: answer


@dataclass(frozen=True, eq=False)
class Ask:
    """One question put to the rows of a chunk.

    `what` is `component` (n,), `responsibilities` (n, K) or `log_prob` (n,).
    """

    story: Story
    params: Params
    what: str

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the answers."""
        return np.dtype(np.intp if self.what == "component" else np.float64)

    @property
    def trailing(self) -> tuple[int, ...]:
        """Shape of an answer after its row axis."""
        return (self.story.n_components,) if self.what == "responsibilities" else ()

    def __call__(self, _chunk: int, rows: Rows) -> Array:
        """The answers for the rows of one chunk."""
        with one_blas_thread():
            if self.what == "log_prob":
                return self.story.log_prob(self.params, rows)
            answer: Array = getattr(self.story.infer(self.params, rows), self.what)
            return answer

    def of_chunk(self, source: Source, block_id: tuple[int, ...]) -> Array:
        """The answers for a chunk of a source, for dask."""
        return self(block_id[0], source.read(block_id[0]))

    def of_block(self, block: Array, block_info: Any) -> Array:
        """The answers for a block of a dask array, for dask."""
        first_row = block_info[0]["array-location"][0][0]
        schema = self.story.schema
        rows = Rows.of(np.asarray(block), first_row=first_row, names=schema.names)
        return self(0, rows.check(schema, first_row=first_row))

    def lazily(self, source: Source) -> Any:
        """A dask array of the answers for all rows of a source, one block a chunk."""
        import dask.array as da

        shape = self.trailing
        chunks = (tuple(source.chunk_rows), *((size,) for size in shape))
        # A name of its own each time: what a path holds may have changed since it was last asked.
        options: dict[str, Any] = {
            "chunks": chunks,
            "meta": np.empty((0,) * len(chunks), self.dtype),
            "name": f"{self.what}-{uuid.uuid4().hex}",
        }
        if not isinstance(source, DaskSource):
            return da.map_blocks(self.of_chunk, source, **options)
        # The blocks of the caller's own graph are answered where they are computed.
        if not shape:
            options["drop_axis"] = 1
        return da.map_blocks(self.of_block, source.array, **options)


class MixtureEstimator(DensityMixin, BaseEstimator):  # type: ignore[misc]
    """What the estimators share: opening data, fitting, and answering questions about rows."""

    # Declared by the constructors of the subclasses, which scikit-learn reads parameters from.
    n_components: int
    tol: float
    reg_covar: float
    max_iter: int
    n_init: int
    random_state: int | np.random.RandomState | None
    warm_start: bool
    verbose: int
    verbose_interval: int
    prior: str | None
    dtype: str
    chunk_rows: int
    scheduler: str
    workers: int | None

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        return tags

    @property
    def _covariance(self) -> str | None:
        """The form of covariance, which the faces name differently."""
        raise NotImplementedError

    def _make_story(self, schema: Schema) -> Story:
        return mixture(
            schema,
            self.n_components,
            covariance=self._covariance,
            prior=self.prior,
            reg_covar=self.reg_covar,
            dtype=self.dtype,
        )

    def _describe(self, found: Schema) -> Schema:
        """What the columns of an array are, of which only the names were found."""
        return found

    def _wanted_columns(self) -> Schema | Mapping[str, Kind | Column] | None:
        """What the caller said of the columns; None to find out."""
        return None

    def _params(self) -> Params:
        """The parameters to answer with."""
        params: Params = self.state_.params
        return params

    def _seed(self, story: Story, rows: Rows, random_state: np.random.RandomState) -> Params:
        """Parameters to begin a fit with, from the rows of a sample."""
        return seed_params(story, rows, _generator(random_state))

    def _given_start(self, story: Story) -> Params | None:  # noqa: ARG002
        """All parameters to begin with, where the caller gave them."""
        return None

    def _set_attributes(self, params: Params) -> None:
        """Fitted attributes besides those that all estimators have."""

    # --- parameters and data ---------------------------------------------------------------------

    def _check_parameters(self) -> None:
        for name, whole, low in (
            ("n_components", True, 1),
            ("tol", False, 0),
            ("reg_covar", False, 0),
            ("max_iter", True, 0),
            ("n_init", True, 1),
            ("verbose", True, 0),
            ("verbose_interval", True, 1),
            ("chunk_rows", True, 1),
        ):
            value = getattr(self, name)
            kinds = (int, np.integer) if whole else (int, float, np.integer, np.floating)
            if not isinstance(value, kinds) or not value >= low:
                what = "an int" if whole else "a float"
                raise ConfigError(
                    f"The {name!r} parameter of {type(self).__name__} must be {what} of at least "
                    f"{low}. Got {value!r} instead."
                )

    def _open(self, X: Any, sample_weight: Any = None, *, reset: bool = False) -> Data:
        """The data as a source; with `reset` their columns become those of the estimator."""
        if _is_lazy(X):
            return self._open_source(X, sample_weight, reset)
        if isinstance(X, np.ma.MaskedArray):
            X = np.ma.filled(X.astype(np.float64), np.nan)
        array = validate_data(
            self,
            X,
            reset=reset,
            dtype=[np.float64, np.float32],
            ensure_all_finite="allow-nan",
            ensure_min_samples=2 if reset else 1,
        )
        if reset:
            names = getattr(self, "feature_names_in_", None)
            schema = self._describe(Schema.real(array.shape[1] if names is None else names))
        else:
            schema = self._story().schema
        if sample_weight is not None and not isinstance(sample_weight, str):
            sample_weight = np.asarray(sample_weight, dtype=np.float64)
        return Data(NumpySource(array, schema, sample_weight, self.chunk_rows, name="X"))

    def _open_source(self, X: Any, sample_weight: Any, reset: bool) -> Data:
        labels = None if reset else getattr(self, "feature_names_in_", None)
        wanted: Any = self._wanted_columns() if reset else None
        if not reset and (labels is not None or set(self._story().schema.kinds) != {"real"}):
            wanted = self._story().schema
        if hasattr(X, "to_dask_array"):
            found = [str(name) for name in X.columns]
            if labels is not None:
                absent = [name for name in labels if name not in found]
                if absent:
                    raise DataError(
                        f"X: no column {absent[0]!r}: the columns are {', '.join(found)}"
                    )
                X, found = X[list(labels)], list(labels)
            for name, kind in X.dtypes.items():
                if getattr(kind, "kind", "O") not in "biuf":
                    raise DataError(
                        f"X: column {name!r} of the dask DataFrame holds {kind}, not numbers: "
                        "write it to parquet, and give that path to a Mixture"
                    )
            X = X.astype(np.float64).to_dask_array(lengths=True)
            wanted = wanted or found
        source = open_source(X, wanted, sample_weight)
        data = Data(source, lazy=True)
        if type(X).__module__.partition(".")[0] == "xarray":
            # Without chunks the caller is content to hold the answers in memory.
            data = Data(source, lazy=bool(X.chunks), wrap=Labelled.like(X))
        names, n_features = source.schema.names, source.schema.n_features
        if reset:
            if sum(source.chunk_rows) < 2:
                raise DataError("found array with 1 sample(s), while a minimum of 2 is required")
            self._set_names(names, names != Schema.real(n_features).names)
            return data
        expected = self._story().schema
        if n_features != expected.n_features:
            raise DataError(
                f"X has {n_features} features, but {type(self).__name__} is expecting "
                f"{expected.n_features} features as input"
            )
        if source.schema.kinds != expected.kinds:
            raise DataError(
                f"the columns of X are {', '.join(source.schema.kinds)}; {type(self).__name__} was "
                f"fitted with {', '.join(expected.kinds)}"
            )
        return data

    def _set_names(self, names: tuple[str, ...], named: bool) -> None:
        self.n_features_in_ = len(names)
        if named:
            self.feature_names_in_ = np.array(names, dtype=object)
        elif hasattr(self, "feature_names_in_"):
            del self.feature_names_in_

    def _story(self) -> Story:
        story: Story = self.story_
        return story

    def _passes(self, source: Source) -> Passes:
        return Passes(source, scheduler=self.scheduler, workers=self.workers)

    # --- learning --------------------------------------------------------------------------------

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> Self:  # noqa: ARG002
        """Estimate the parameters by EM.

        Parameters
        ----------
        X
            (n, d) rows: an array, a table (pandas, pyarrow), a dask array or DataFrame, a zarr
            array, an xarray object, or the path of an .npy, zarr, parquet, Arrow or NetCDF file.
            NaN is a missing entry.
        y
            Ignored.
        sample_weight
            (n,) row weights, not negative: a row of weight 2 counts as two rows. Where X is a path
            or the columns are encoded, also the name of their column.

        Returns
        -------
        self

        Raises
        ------
        ConfigError, DataError
            Both are ValueErrors: a parameter or the data cannot be used; says which and why.
        """
        self._fit(X, sample_weight)
        return self

    def partial_fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> Self:  # noqa: ARG002
        """Learn from rows that arrived, once, by online EM: see `genstream.online.OnlineEM`.

        The first call makes a start from its rows, as `fit` does from a sample, and then learns
        them as every later call does; after a `fit` it goes on from what was fitted. Parameters as
        for `fit`; the columns are those of the first call.

        Raises ConfigError or DataError as `fit` does; the model is then as it was.
        """
        self._check_parameters()
        first = not hasattr(self, "state_")
        source = self._open(X, sample_weight, reset=first).source
        n_rows = sum(source.chunk_rows)
        if first:
            self._check_rows(n_rows)
            story, state = next(self._starts(self._passes(source), small=False))
        else:
            story, state = self.story_, self.state_
            self._check_same(story)
        pieces = (source.read(i) for i in range(len(source.chunk_rows)))
        with one_blas_thread():
            state, info = OnlineEM().learn(story, state, pieces, n_rows=n_rows)
        if not np.isfinite(info.mean_objective):
            raise DataError(
                "the rows have no finite log-likelihood, and were not learned: look for extreme "
                "values"
            )
        self._keep(story, replace(state, outcome=Outcome.RUNNING))
        return self

    def _check_same(self, story: Story) -> None:
        """Raise ConfigError where parameters no longer describe what was learned so far."""
        now, before = _settings(self._make_story(story.schema)), _settings(story)
        for name in before:
            if now.get(name) != before[name]:
                raise ConfigError(
                    f"{name} is {now.get(name)!r}, and what was learned so far has "
                    f"{before[name]!r}: partial_fit goes on with the same model, fit begins anew"
                )

    def fit_predict(self, X: Any, y: Any = None, sample_weight: Any = None) -> Any:  # noqa: ARG002
        """Fit, then (n,) the likeliest component of each row; parameters as for `fit`."""
        return self._answer(self._fit(X, sample_weight), "component")

    def _fit(self, X: Any, sample_weight: Any) -> Data:
        self._check_parameters()
        data = self._open(X, sample_weight, reset=True)
        n_rows = sum(data.source.chunk_rows)
        self._check_rows(n_rows)
        passes = self._passes(data.source)
        small = n_rows <= START_ROWS
        if data.lazy and small and data.source.schema.n_features * n_rows <= RESIDENT_NUMBERS:
            # So little is read once, and fitted as if it had been in memory all along.
            rows = Rows.concatenate(list(passes.map(_as_read)))
            source = NumpySource(
                rows.filled(), data.source.schema, rows.weights, self.chunk_rows, name="X"
            )
            passes = self._passes(source)
        elif data.lazy:
            small = False
        best: tuple[Story, FitState] | None = None
        for i, (story, start) in enumerate(self._starts(passes, small)):
            trace = _Verbose(i, self.verbose, self.verbose_interval)
            state = self._climb(story, passes, start, trace)
            trace.end(state)
            if best is None or _value(state) > _value(best[1]):
                best = story, state
        assert best is not None
        self._finish(*best)
        return data

    def _check_rows(self, n_rows: int) -> None:
        if n_rows < self.n_components:
            raise DataError(
                f"Expected n_samples >= n_components but got n_components = {self.n_components}, "
                f"n_samples = {n_rows}"
            )

    def _climb(self, story: Story, passes: Passes, state: FitState, trace: _Verbose) -> FitState:
        if self.max_iter == 0:
            return state
        if self._goes_on(story):
            # The first step may show that there was nothing more to gain.
            bound = self.lower_bound_
            state = fit(story, BatchEM(1, self.tol), passes, state, [trace])
            if state.outcome is Outcome.MAX_STEPS and abs(_value(state) - bound) < self.tol:
                return replace(state, outcome=Outcome.CONVERGED)
            if state.outcome is Outcome.MAX_STEPS and self.max_iter > 1:
                state = replace(state, outcome=Outcome.RUNNING)
        return fit(story, BatchEM(self.max_iter, self.tol), passes, state, [trace])

    def _goes_on(self, story: Story) -> bool:
        """Whether a fit begins with the parameters of the last one."""
        return self.warm_start and hasattr(self, "state_") and _alike(self.story_, story)

    def _finish(self, story: Story, state: FitState) -> None:
        if state.outcome is Outcome.NONFINITE:
            raise DataError(
                f"Fitting the mixture model failed at step {state.step}: {state.outcome.advice}"
            )
        self._keep(story, state)
        # Without a step the caller wanted the start itself, so nothing failed to converge.
        if not self.converged_ and self.max_iter > 0:
            warnings.warn(
                "Best performing initialization did not converge. Try different init parameters, "
                "or increase max_iter, tol, or check for degenerate data: "
                + (state.outcome.advice or state.outcome.value),
                ConvergenceWarning,
                stacklevel=4,
            )

    def _keep(self, story: Story, state: FitState) -> None:
        """Set what a fit leaves behind."""
        self.story_ = story
        self.state_ = state
        self.trace_ = state.trace
        self.outcome_ = state.outcome
        self.converged_ = state.outcome is Outcome.CONVERGED
        self.n_iter_ = state.step
        self.lower_bounds_ = [info.mean_objective for info in state.trace]
        self.lower_bound_ = _value(state)
        self.warnings_ = [*state.events, *story.warnings(state.params)]
        self._set_attributes(state.params)

    def _starts(self, passes: Passes, small: bool) -> Iterator[tuple[Story, FitState]]:
        """The states from which fits begin; the best fit is kept."""
        story = self._make_story(passes.source.schema)
        random_state = check_random_state(self.random_state)
        again = self._goes_on(story)
        seed = FitState.seed
        if small or again or self._given_start(story) is not None:
            if not small:
                seed = int(random_state.randint(2**31 - 1))
            sample = draw_sample(passes, None if small else START_ROWS, seed)
            story = story.anchored(sample)
            params = self._params() if again else self._given_start(story)
            kept = rescue_rows(sample, seed)
            for _ in range(self.n_init if params is None else 1):
                begin = self._begin(story, sample, random_state) if params is None else params
                yield story, FitState(begin, seed=seed, sample=kept)
            return
        yield warm_start(
            story,
            passes,
            n_init=self.n_init,
            seed=int(random_state.randint(2**31 - 1)),
            sample_rows=START_ROWS,
            tolerance=self.tol,
            seeding=lambda story, rows, rng: self._begin(
                story, rows, np.random.RandomState(rng.integers(2**31 - 1))
            ),
        )

    def _begin(self, story: Story, rows: Rows, random_state: np.random.RandomState) -> Params:
        if rows.n_rows < story.n_components:
            raise DataError(
                f"Expected n_samples >= n_components but got n_components = {story.n_components} "
                f"and {rows.n_rows} rows that have an observed entry and a positive weight"
            )
        return self._seed(story, rows, random_state)

    # --- answers ---------------------------------------------------------------------------------

    def _answer(self, data: Data, what: str) -> Any:
        ask = Ask(self._story(), self._params(), what)
        if data.lazy:
            return data.wrap(ask.lazily(data.source))
        passes = self._passes(data.source)
        answer = np.empty((passes.n_rows, *ask.trailing), ask.dtype)
        done = 0
        for piece in passes.map(ask):
            answer[done : done + len(piece)] = piece
            done += len(piece)
        return data.wrap(answer)

    def _ask(self, X: Any, what: str) -> Any:
        check_is_fitted(self)
        return self._answer(self._open(X), what)

    def predict(self, X: Any) -> Any:
        """(n,) the likeliest component of each row: a dask array where X is out of core."""
        return self._ask(X, "component")

    def predict_proba(self, X: Any) -> Any:
        """(n, K) `p(k | x)` of each row, from its observed entries: lazy where X is."""
        return self._ask(X, "responsibilities")

    def score_samples(self, X: Any) -> Any:
        """(n,) `log p(x)` of each row's observed entries in nats, 0 where there is none: lazy
        where X is.
        """
        return self._ask(X, "log_prob")

    def _held_out(self, X: Any, sample_weight: Any) -> evaluate.HeldOut:
        check_is_fitted(self)
        data = self._open(X, sample_weight)
        return evaluate.held_out(self._story(), self._params(), self._passes(data.source))

    def score(self, X: Any, y: Any = None, sample_weight: Any = None) -> float:  # noqa: ARG002
        """Mean of `log p(x)` over the rows that have an observed entry, in nats.

        Parameters as for `fit`. Out-of-core data are read in one pass.
        """
        return self._held_out(X, sample_weight).mean_loglik

    def bic(self, X: Any, sample_weight: Any = None) -> float:
        """Bayesian information criterion on X, lower is better: see `genstream.evaluate.bic`."""
        found = self._held_out(X, sample_weight)
        return evaluate.bic(found.loglik, self._story().n_parameters, found.weight)

    def aic(self, X: Any, sample_weight: Any = None) -> float:
        """Akaike's information criterion on X, lower is better: see `genstream.evaluate.aic`."""
        found = self._held_out(X, sample_weight)
        return evaluate.aic(found.loglik, self._story().n_parameters)

    def sample(self, n_samples: int = 1) -> tuple[Any, NDArray[np.intp]]:
        """`n_samples` rows drawn from the model, and (n_samples,) the component of each."""
        check_is_fitted(self)
        if n_samples < 1:
            raise ConfigError(
                f"Invalid value for 'n_samples': {n_samples} . The sampling requires at least one "
                "sample."
            )
        rng = _generator(check_random_state(self.random_state))
        drawn = self._story().draw(self._params(), n_samples, rng)
        return self._rows_drawn(drawn.values), drawn.component

    def _rows_drawn(self, values: Array) -> Any:
        return values


class GaussianMixture(MixtureEstimator):
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
    random_state
        Seed or generator of all random choices.
    warm_start
        A further `fit` goes on from the parameters found last.
    verbose, verbose_interval
        1 prints that steps were done, 2 their time and gain as well, once every so many steps.
    prior
        None for maximum likelihood, `weak` for MAP under weak conjugate priors.
    dtype
        Arithmetic of the E-step, `float64` or `float32`; sums are float64 always.
    chunk_rows
        Rows in memory that a thread works on at a time. Part of what makes a fit repeat bit for
        bit, as the scheduler and the number of workers are not.
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
        random_state: int | np.random.RandomState | None = None,
        warm_start: bool = False,
        verbose: int = 0,
        verbose_interval: int = 10,
        prior: str | None = None,
        dtype: str = "float64",
        chunk_rows: int = CHUNK_ROWS,
        scheduler: str = "threads",
        workers: int | None = None,
    ) -> None:
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
        for name, allowed in (("covariance_type", COVARIANCES), ("init_params", INIT_PARAMS)):
            value = getattr(self, name)
            if value not in allowed:
                raise ConfigError(
                    f"The {name!r} parameter of {type(self).__name__} must be one of "
                    f"{', '.join(allowed)}. Got {value!r} instead."
                )

    @property
    def _covariance(self) -> str | None:
        return self.covariance_type

    def _story(self) -> Story:
        # Parameters set by hand make a model too, as they do in scikit-learn.
        found: Story | None = getattr(self, "story_", None)
        if found is None or found.n_components != len(self.weights_):
            story = self._make_story(Schema.real(np.shape(self.means_)[1]))
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
        return _replaced(story.vague(), self.weights_, self.means_, covariances)

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

    def _given(self, story: Story) -> tuple[Array | None, Array | None, Array | None]:
        """Weights, means and covariances to begin with, each where the caller gave it."""
        k, d = story.n_components, story.schema.n_features
        weights = _given_array("weights", self.weights_init, (k,))
        if weights is not None:
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
        means = _given_array("means", self.means_init, (k, d))
        kind = self.covariance_type
        shape = {"full": (k, d, d), "tied": (d, d), "diag": (k, d), "spherical": (k,)}[kind]
        precisions = _given_array(f"{kind} precision", self.precisions_init, shape)
        if precisions is None:
            return weights, means, None
        if kind in ("full", "tied"):
            symmetric = np.allclose(precisions, precisions.swapaxes(-1, -2))
            if not symmetric or not (np.linalg.eigvalsh(precisions) > 0).all():
                raise ConfigError(f"'{kind} precision' should be symmetric, positive-definite")
        elif not (precisions > 0).all():
            raise ConfigError(f"'{kind} precision' should be positive")
        return weights, means, _inverse(precisions, kind)

    def _given_start(self, story: Story) -> Params | None:
        given = self._given(story)
        return _replaced(story.vague(), *given) if all(x is not None for x in given) else None

    def _seed(self, story: Story, rows: Rows, random_state: np.random.RandomState) -> Params:
        if self.init_params == "kmeans" and rows.observed is not None:
            params = super()._seed(story, rows, random_state)
        else:
            responsibilities = self._first_responsibilities(story, rows, random_state)
            vague = story.vague()
            params = story.m_step(story.e_step(vague, rows, responsibilities), vague)
        return _replaced(params, *self._given(story))

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
                centres = seed_centres(x, observed, rows.row_weights, k, _generator(random_state))
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


@dataclass(frozen=True)
class Form:
    """The form in which rows were given to a fit, so that rows drawn can take it.

    `encoded` rows had labels or types that were turned into numbers. `package` is what their table
    came from, `types` the type of each column in Arrow's terms.
    """

    encoded: bool = False
    package: str = "numpy"
    types: Mapping[str, Any] = field(default_factory=dict)

    def decode(self, schema: Schema, values: Array) -> Any:
        """Rows of codes (n, d) in this form: a table, or an array."""
        if not self.encoded:
            return values
        arrays = [self._column(column, values[:, j]) for j, column in enumerate(schema.columns)]
        table = pa.Table.from_arrays(arrays, names=list(schema.names))
        if self.package == "pandas":
            return table.to_pandas()
        if self.package == "numpy":
            return np.column_stack([x.to_numpy(zero_copy_only=False) for x in arrays])
        if self.package == "xarray":
            import xarray

            return xarray.Dataset({name: ("row", table[name].to_numpy()) for name in schema.names})
        return table

    def _column(self, column: Column, x: Array) -> Any:
        kind = self.types.get(column.name)
        if column.kind == "real":
            known = kind is not None and pa.types.is_floating(kind)
            return pa.array(x).cast(kind, safe=False) if known else pa.array(x)
        found = pa.array(x.astype(np.int64))
        if column.levels:
            found = pa.array(column.levels, pa.string()).take(found)
        if kind is None:
            return found
        if pa.types.is_dictionary(kind):
            return found.cast(kind.value_type).dictionary_encode()
        return found.cast(kind)


class Mixture(MixtureEstimator):
    """A mixture over columns of any kind: real, binary, count and categorical.

        k ~ Categorical(weights_),    x | k ~ prod_j p_j(x_j | k)

    with a Gaussian, Bernoulli, Poisson or categorical distribution a column. Where all columns are
    real, a Gaussian with full covariance takes the place of the product by default.

    Parameters
    ----------
    n_components
        K.
    columns
        What the columns are: a `Schema`, or a mapping from name to kind (`real`, `binary`, `count`,
        `categorical`) or `Column`; in the order of an array's columns, whereas of a table only
        those named are used. None takes all columns of a table by their types (numbers are real,
        truth values binary, labels categorical) and all columns of an array as real.
    covariance
        `full`, `tied`, `diag` or `spherical`; None for `full` where all columns are real and
        `diag` elsewhere, the only one for mixed columns.
    prior
        `weak` for MAP under weak conjugate priors, None for maximum likelihood.
    reg_covar
        Added to every variance after each step, in squared data units.
    tol, max_iter, n_init
        EM stops when a step changes the mean objective (log-likelihood plus log-prior) by less than
        `tol` nats a row, or after `max_iter` steps. `n_init` starts compete on a row sample.
    random_state, warm_start, verbose, verbose_interval, dtype, chunk_rows, scheduler, workers
        As for `GaussianMixture`.

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
        prior: str | None = "weak",
        reg_covar: float = 0.0,
        tol: float = 1e-4,
        max_iter: int = 200,
        n_init: int = 5,
        random_state: int | np.random.RandomState | None = None,
        warm_start: bool = False,
        verbose: int = 0,
        verbose_interval: int = 10,
        dtype: str = "float64",
        chunk_rows: int = CHUNK_ROWS,
        scheduler: str = "threads",
        workers: int | None = None,
    ) -> None:
        self.n_components = n_components
        self.columns = columns
        self.covariance = covariance
        self.prior = prior
        self.reg_covar = reg_covar
        self.tol = tol
        self.max_iter = max_iter
        self.n_init = n_init
        self.random_state = random_state
        self.warm_start = warm_start
        self.verbose = verbose
        self.verbose_interval = verbose_interval
        self.dtype = dtype
        self.chunk_rows = chunk_rows
        self.scheduler = scheduler
        self.workers = workers

    @property
    def _covariance(self) -> str | None:
        return self.covariance

    def _check_parameters(self) -> None:
        super()._check_parameters()
        if self.columns is not None and not isinstance(self.columns, Schema | Mapping):
            raise ConfigError(
                "The 'columns' parameter of Mixture must be a Schema, a mapping from names to "
                f"kinds, or None. Got {self.columns!r} instead."
            )
        if isinstance(self.columns, Mapping) and not self.columns:
            raise ConfigError("The 'columns' parameter of Mixture names no column")

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

    def _open(self, X: Any, sample_weight: Any = None, *, reset: bool = False) -> Data:
        if _is_lazy(X):
            data = self._open_source(X, sample_weight, reset)
            if reset:
                package = type(X).__module__.partition(".")[0]
                self._form = Form(isinstance(data.source, TableSource), package)
            return data
        table = _as_table(X)
        columns = self.columns
        if reset:
            labelled = table is not None and not all(map(_is_numeric, table.schema.types))
            named = table is not None and columns is not None
            encoded = labelled or named or isinstance(columns, Mapping)
        else:
            columns = self._story().schema
            mixed = set(columns.kinds) != {"real"}
            encoded = self._form.encoded or (table is not None and mixed)
        if not encoded:
            if reset:
                self._form = Form()
            return super()._open(X, sample_weight, reset=reset)
        package = type(X).__module__.partition(".")[0] if table is not None else "numpy"
        if table is None:
            assert columns is not None
            names = columns.names if isinstance(columns, Schema) else tuple(columns)
            table = _columns_of(X, names)
        by_name = isinstance(sample_weight, str)
        encoder = Encoder(columns, carried=[sample_weight] if by_name else ())
        rows = encoder.encode(table, place="X")
        schema = encoder.schema
        weights = sample_weight
        if by_name:
            weights = encoder.weights(table, sample_weight, place="X")
        if reset:
            if rows.n_rows < 2:
                raise DataError("found array with 1 sample(s), while a minimum of 2 is required")
            self._set_names(schema.names, package != "numpy")
            self._form = Form(True, package, {n: table.schema.field(n).type for n in schema.names})
        if weights is not None:
            weights = np.asarray(weights, dtype=np.float64)
        return Data(NumpySource(rows.filled(), schema, weights, self.chunk_rows, name="X"))

    def _rows_drawn(self, values: Array) -> Any:
        """Rows in the form of those that were fitted, labels in place of codes."""
        return self._form.decode(self._story().schema, values)

    def _set_attributes(self, params: Params) -> None:
        self.schema_ = self.story_.schema
        self.weights_ = params.weights

    @property
    def params_(self) -> xarray.Dataset:
        """The parameters in data units as a labelled dataset."""
        check_is_fitted(self)
        params: Params = self.state_.params
        return params.to_dataset(self.story_.labels())


@dataclass(frozen=True, eq=False)
class Labelled:
    """Gives answers the row labels of the xarray object that was asked about."""

    row: str
    coordinates: dict[Any, Any]

    @classmethod
    def like(cls, X: xarray.DataArray | xarray.Dataset) -> Labelled:
        row = X.dims[0] if isinstance(X.dims, tuple) else next(iter(X.sizes))
        labels = {name: x for name, x in X.coords.items() if x.dims == (row,)}
        return cls(str(row), labels)

    def __call__(self, answer: Any) -> xarray.DataArray:
        import xarray

        dims = (self.row, "component")[: answer.ndim]
        return xarray.DataArray(answer, dims=dims, coords=self.coordinates)


class _Verbose:
    """Prints what scikit-learn prints while a mixture is fitted."""

    def __init__(self, start: int, verbose: int, interval: int) -> None:
        self.verbose, self.interval = verbose, interval
        self.begin = self.last = time.perf_counter()
        self.bound = -np.inf
        if verbose:
            print(f"Initialization {start}")

    def __call__(self, _state: FitState, info: StepInfo) -> None:
        change, self.bound = info.mean_objective - self.bound, info.mean_objective
        if not self.verbose or info.step % self.interval:
            return
        now = time.perf_counter()
        more = f"\t time lapse {now - self.last:.5f}s\t ll change {change:.5f}"
        self.last = now
        print(f"  Iteration {info.step}{more if self.verbose > 1 else ''}")

    def end(self, state: FitState) -> None:
        if not self.verbose or not state.trace:
            return
        how = "converged" if state.outcome is Outcome.CONVERGED else "did not converge"
        lapse = time.perf_counter() - self.begin
        more = f" time lapse {lapse:.5f}s\t lower bound {self.bound:.5f}."
        print(f"Initialization {how}.{more if self.verbose > 1 else ''}")


def _value(state: FitState) -> float:
    """What restarts are compared by; a fit that broke down is never the better one."""
    if not state.trace or state.outcome is Outcome.NONFINITE:
        return -np.inf
    return state.trace[-1].mean_objective


def _as_read(_chunk: int, rows: Rows) -> Rows:
    return rows


def _generator(random_state: np.random.RandomState) -> np.random.Generator:
    return np.random.default_rng(random_state.randint(2**31 - 1))


def _settings(story: Story) -> dict[str, Any]:
    """What a caller chose of a story, by name."""
    chosen = {"n_components": story.n_components, "prior": story.prior, "kind": story.family.name}
    return chosen | story.family.options()


def _alike(one: Story, other: Story) -> bool:
    """Whether parameters of one story are parameters of the other."""

    def form(story: Story) -> Any:
        columns = [(column.kind, column.levels) for column in story.schema.columns]
        return story.n_components, columns, story.family.params_type

    return bool(form(one) == form(other))


def _as_table(X: Any) -> Any:
    """A table in memory as Arrow's, or None for anything else."""
    try:
        if type(X).__module__.startswith("pandas.") and hasattr(X, "columns"):
            return pa.Table.from_pandas(X, preserve_index=False)
        if hasattr(X, "__arrow_c_stream__") and hasattr(X, "columns"):
            return pa.table(X)
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise DataError(f"X: {error}") from None
    return None


def _columns_of(X: Any, names: Sequence[str]) -> Any:
    """The columns of an array by the names given to them."""
    array = np.asarray(X)
    if array.ndim != 2 or array.shape[1] != len(names):
        raise DataError(
            f"X has shape {array.shape}, but {len(names)} columns are described: {', '.join(names)}"
        )
    try:
        columns = [pa.array(column, from_pandas=True) for column in array.T]
    except pa.ArrowException as error:
        raise DataError(f"X: {error}") from None
    return pa.Table.from_arrays(columns, names=list(names))


def _is_numeric(kind: Any) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def _is_lazy(X: Any) -> bool:
    package = type(X).__module__.partition(".")[0]
    return package in LAZY_PACKAGES or isinstance(X, str | os.PathLike | Source)


def _given_array(name: str, value: Any, shape: tuple[int, ...]) -> Array | None:
    if value is None:
        return None
    array: Array = check_array(value, dtype=np.float64, ensure_2d=False, allow_nd=True)
    if array.shape != shape:
        raise ConfigError(
            f"The parameter '{name}' should have the shape of {shape}, but got {array.shape}"
        )
    return array


def _inverse(matrices: Array, covariance_type: str) -> Array:
    if covariance_type in ("diag", "spherical"):
        return np.asarray(1.0 / matrices)
    inverse = np.linalg.inv(matrices)
    return np.asarray((inverse + inverse.swapaxes(-1, -2)) / 2)


def _replaced(
    params: Params, weights: Array | None, means: Array | None, covariances: Array | None
) -> Params:
    """The parameters with those replaced that are given."""
    family: Any = params.family
    fields: dict[str, Array] = {}
    if means is not None:
        fields["mean"] = np.asarray(means, dtype=np.float64)
    if covariances is not None:
        name = "covariance" if hasattr(family, "covariance") else "variance"
        fields[name] = np.asarray(covariances, dtype=np.float64)
    chosen = params.weights if weights is None else np.asarray(weights, dtype=np.float64)
    return Params(chosen, replace(family, **fields))
