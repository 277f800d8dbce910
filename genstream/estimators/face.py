"""What all faces of scikit-learn's kind share: they open data, fit, and answer questions."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, DensityMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from genstream import evaluate
from genstream.errors import ConfigError, DataError
from genstream.estimators.questions import (
    Ask,
    Data,
    Form,
    Labelled,
    as_table,
    columns_of,
    is_lazy,
    is_numeric,
)
from genstream.families.blocks import Array
from genstream.learn import BatchEM, FitState, Outcome, StepInfo, fit
from genstream.online import OnlineEM
from genstream.passes import Passes
from genstream.rows import Rows
from genstream.schema import Column, Kind, Schema
from genstream.sources import NumpySource, Source
from genstream.start import draw_sample, rescue_rows, seed_params, warm_start
from genstream.stories import mixture
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


class Face(DensityMixin, BaseEstimator):  # type: ignore[misc]
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

    # Whether columns may hold labels; without it all columns are numbers.
    takes_labels: ClassVar[bool] = False
    _form: Form = Form()

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
        return seed_params(story, rows, generator_of(random_state))

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
        if is_lazy(X):
            data = self._open_source(X, sample_weight, reset)
            if reset:
                package = type(X).__module__.partition(".")[0]
                self._form = Form(isinstance(data.source, TableSource), package)
            return data
        table = as_table(X) if self.takes_labels else None
        columns = self._wanted_columns() if reset else self._story().schema
        if not self.takes_labels:
            encoded = False
        elif reset:
            labelled = table is not None and not all(map(is_numeric, table.schema.types))
            named = table is not None and columns is not None
            encoded = labelled or named or isinstance(columns, Mapping)
        else:
            assert isinstance(columns, Schema)
            mixed = set(columns.kinds) != {"real"}
            encoded = self._form.encoded or (table is not None and mixed)
        if encoded:
            return self._open_table(X, table, columns, sample_weight, reset)
        if reset:
            self._form = Form()
        return self._open_array(X, sample_weight, reset)

    def _open_array(self, X: Any, sample_weight: Any, reset: bool) -> Data:
        """Rows of numbers in memory."""
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

    def _open_table(
        self, X: Any, table: Any, columns: Any, sample_weight: Any, reset: bool
    ) -> Data:
        """Rows in memory whose labels and types are turned into numbers: of a table, or of an
        array whose columns are described.
        """
        package = type(X).__module__.partition(".")[0] if table is not None else "numpy"
        if table is None:
            names = columns.names if isinstance(columns, Schema) else tuple(columns)
            table = columns_of(X, names)
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
            trace = Progress(i, self.verbose, self.verbose_interval)
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

    def _climb(self, story: Story, passes: Passes, state: FitState, trace: Progress) -> FitState:
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
        rng = generator_of(check_random_state(self.random_state))
        drawn = self._story().draw(self._params(), n_samples, rng)
        return self._rows_drawn(drawn.values), drawn.component

    def _rows_drawn(self, values: Array) -> Any:
        """Rows in the form of those that were fitted, labels in place of codes."""
        return self._form.decode(self._story().schema, values)

    @property
    def params_(self) -> xarray.Dataset:
        """The parameters in data units as a labelled dataset."""
        check_is_fitted(self)
        params: Params = self.state_.params
        return params.to_dataset(self.story_.labels())


class Progress:
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


def generator_of(random_state: np.random.RandomState) -> np.random.Generator:
    """NumPy's generator, seeded by scikit-learn's kind of random state."""
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
