"""What all faces of scikit-learn's kind share: they fit, answer, fill gaps, and draw."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from sklearn.base import DensityMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_array, check_random_state
from sklearn.utils.validation import check_is_fitted

from genstream import evaluate
from genstream.dreams import draw_array
from genstream.errors import ConfigError, DataError
from genstream.estimators.opening import Opening
from genstream.estimators.questions import QUESTIONS, Ask, Data
from genstream.estimators.starts import given_leaves, replaced
from genstream.families.blocks import Array
from genstream.learn import BatchEM, FitState, Learner, Outcome, StepInfo, fit
from genstream.online import OnlineEM
from genstream.passes import Passes
from genstream.priors import Prior
from genstream.responsibility import Responsibility, by_size, named, soft
from genstream.rows import Rows
from genstream.schema import Schema
from genstream.sources import CHUNK_ROWS, NumpySource, Source
from genstream.start import REFINE_PASSES, draw_sample, rescue_rows, seed_params, warm_start
from genstream.story import Params, Story
from genstream.threads import one_blas_thread

if TYPE_CHECKING:
    import xarray

# Up to this many rows in memory every start is fitted on all rows, as scikit-learn does; beyond it,
# and out of core, starts compete on a row sample of this size.
START_ROWS = 50_000
# Out-of-core data of so few numbers are read into memory to be fitted.
RESIDENT_NUMBERS = 1 << 23
# The least value of each parameter that some face has, and whether it is a whole number.
LEAST = {
    "n_components": (True, 1),
    "n_clusters": (True, 1),
    "n_factors": (True, 1),
    "tol": (False, 0),
    "reg_covar": (False, 0),
    "max_iter": (True, 0),
    "n_init": (True, 1),
    "verbose": (True, 0),
    "verbose_interval": (True, 1),
    "chunk_rows": (True, 1),
}
# Parameters that say how work is done, not what is learned.
MANNERS = ("random_state", "dtype", "chunk_rows", "scheduler", "workers")


class Face(DensityMixin, Opening):  # type: ignore[misc]
    """What all estimators share: fitting, answering questions about rows, and drawing them."""

    # Declared by the constructors of the subclasses, which scikit-learn reads parameters from.
    tol: float
    max_iter: int
    n_init: int | str
    start: Any
    frozen: Sequence[str]
    random_state: int | np.random.RandomState | None
    warm_start: bool
    verbose: int
    verbose_interval: int
    prior: str | Prior | None
    dtype: str
    scheduler: str
    workers: int | None

    # Parts of a row's latent that `sample` gives besides the row.
    latents: ClassVar[tuple[str, ...]] = ("component",)
    # Parameters that may be `auto`.
    automatic: ClassVar[tuple[str, ...]] = ()

    def known_failures(self) -> dict[str, str]:
        """Checks of scikit-learn's contract that this estimator does not pass, and why not: the
        `expected_failed_checks` of its `check_estimator`.
        """
        return {}

    @property
    def _k(self) -> int:
        """K, the number of mixture components."""
        return 1

    def _make_story(self, schema: Schema) -> Story:
        """The story of these columns, before it saw any rows."""
        raise NotImplementedError

    def _new_story(self, schema: Schema) -> Story:
        other = next((c for c in schema.columns if c.kind != "real"), None)
        if other is not None and not self.takes_labels:
            raise ConfigError(
                f"{type(self).__name__} needs real columns throughout, but {other.name!r} is "
                f"{other.kind}: use Mixture, which takes columns of any kind"
            )
        story = self._make_story(schema)
        return replace(story, frozen=story.frozen.union(self.frozen))

    def _params(self) -> Params:
        """The parameters to answer with."""
        params: Params = self.state_.params
        return params

    def _given(self, story: Story) -> dict[str, Array]:
        """Parameters to begin with that the caller gave, by name."""
        start = self.start
        if self._begins_with_another(story):
            return {}
        return given_leaves(start._params() if isinstance(start, Face) else start, story)

    def _begins_with_another(self, story: Story) -> bool:
        """Whether a fitted model of another kind says how to begin."""
        if not isinstance(self.start, Face):
            return False
        check_is_fitted(self.start)
        return not _alike(self.start._story(), story)

    @property
    def _gives(self) -> bool:
        """Whether the caller gave any parameter to begin with."""
        return self.start is not None

    def _whole_start(self, story: Story) -> Params | None:
        """All parameters to begin with, where the caller gave them all."""
        given, vague = self._given(story), story.vague()
        whole = all(name in given for name, _, _ in vague.leaves())
        return replaced(vague, given) if whole else None

    def _seed(self, story: Story, rows: Rows, random_state: np.random.RandomState) -> Params:
        """Parameters to begin a fit with, from the rows of a sample."""
        rng = generator_of(random_state)
        if not self._begins_with_another(story):
            return seed_params(story, rows, rng)
        # A model of another kind says which rows belong together.
        other = self.start._story()
        same = other.n_components == story.n_components
        if not same or other.schema.kinds != story.schema.kinds:
            raise ConfigError(
                f"start: a model of {other.n_components} components and {other.schema.n_features} "
                f"columns, where {story.n_components} and {story.schema.n_features} are needed"
            )
        responsibilities = other.infer(self.start._params(), rows).responsibilities
        vague = story.vague()
        params = story.m_step(story.e_step(vague, rows, responsibilities), vague)
        family = story.family.start(params.family, rows, responsibilities, rng)
        return replace(params, family=family)

    def _set_attributes(self, params: Params) -> None:
        """Fitted attributes besides those that all estimators have."""

    # --- parameters ------------------------------------------------------------------------------

    def _check_parameters(self) -> None:
        for name, (whole, low) in LEAST.items():
            value = getattr(self, name, low)
            left_out = isinstance(value, str) and value == "auto" and name in self.automatic
            if left_out or (name == "chunk_rows" and value is None):
                continue
            kinds = (int, np.integer) if whole else (int, float, np.integer, np.floating)
            if not isinstance(value, kinds) or not value >= low:
                what = "an int" if whole else "a float"
                raise ConfigError(
                    f"The {name!r} parameter of {type(self).__name__} must be {what} of at least "
                    f"{low}. Got {value!r} instead."
                )
        if isinstance(self.frozen, str) or not all(isinstance(name, str) for name in self.frozen):
            raise ConfigError(
                f"The 'frozen' parameter of {type(self).__name__} must be a tuple of names of "
                f"parameters. Got {self.frozen!r} instead."
            )

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
        with self._columns_kept(), one_blas_thread():
            source = self._open(X, sample_weight, reset=first).source
            n_rows = sum(source.chunk_rows)
            if first:
                self._check_rows(n_rows)
                story, state = next(self._starts(self._passes(source), small=False))
            else:
                story, state = self.story_, self.state_
                self._check_same()
            pieces = (source.read(i) for i in range(len(source.chunk_rows)))
            state, info = self._online().learn(story, state, pieces, n_rows=n_rows)
            if not np.isfinite(info.mean_objective):
                raise DataError(
                    "the rows have no finite log-likelihood, and were not learned: look for "
                    "extreme values"
                )
        self._keep(story, replace(state, outcome=Outcome.RUNNING))
        return self

    def _check_same(self) -> None:
        """Raise ConfigError where parameters no longer describe what was learned so far."""
        now, before = self._settings(), self._asked
        for name in before:
            if now.get(name) != before[name]:
                raise ConfigError(
                    f"{name} is {now.get(name)!r}, and what was learned so far has "
                    f"{before[name]!r}: partial_fit goes on with the same model, fit begins anew"
                )

    def _settings(self) -> dict[str, Any]:
        """What a caller chose of a story, by name."""
        story = self._new_story(self.story_.schema)
        return {
            "n_components": story.n_components,
            "prior": story.prior,
            "frozen": sorted(story.frozen),
            "kind": story.family.name,
            **story.family.options(),
        }

    def _fit(self, X: Any, sample_weight: Any) -> Data:
        self._check_parameters()
        with self._columns_kept():
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
            with one_blas_thread():
                for i, (story, start) in enumerate(self._starts(passes, small)):
                    trace = Progress(i, self.verbose, self.verbose_interval)
                    state = self._climb(story, passes, start, trace)
                    trace.end(state)
                    if best is None or _value(state) > _value(best[1]):
                        best = story, state
            assert best is not None
            if best[1].outcome is Outcome.NONFINITE:
                raise DataError(f"Fitting failed at step {best[1].step}: {best[1].outcome.advice}")
        self._finish(*best)
        return data

    def _check_rows(self, n_rows: int) -> None:
        if n_rows < self._k:
            raise DataError(
                f"Expected n_samples >= n_components but got n_components = {self._k}, "
                f"n_samples = {n_rows}"
            )

    def _climb(self, story: Story, passes: Passes, state: FitState, trace: Progress) -> FitState:
        if self.max_iter == 0:
            if passes.n_rows > START_ROWS:
                # No step has looked for rows that cannot be used.
                for _ in passes.map(_as_read):
                    pass
            return state
        if self._goes_on(story):
            # The first step may show that there was nothing more to gain.
            bound = self.lower_bound_
            state = fit(story, self._learner(1), passes, state, [trace])
            if state.outcome is Outcome.MAX_STEPS and abs(_value(state) - bound) < self.tol:
                return replace(state, outcome=Outcome.CONVERGED)
            if state.outcome is Outcome.MAX_STEPS and self.max_iter > 1:
                state = replace(state, outcome=Outcome.RUNNING)
        return fit(story, self._learner(self.max_iter), passes, state, [trace])

    def _learner(self, max_steps: int) -> Learner:
        return BatchEM(max_steps, self.tol, self._rule)

    def _online(self) -> OnlineEM:
        return OnlineEM(responsibility=self._rule)

    @property
    def _rule(self) -> Responsibility:
        """How rows are shared among components."""
        return soft

    @property
    def _n_starts(self) -> int:
        return int(self.n_init)

    def _goes_on(self, story: Story) -> bool:
        """Whether a fit begins with the parameters of the last one."""
        return self.warm_start and hasattr(self, "state_") and _alike(self.story_, story)

    def _finish(self, story: Story, state: FitState) -> None:
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
        self.is_bound_ = story.bound
        self.trace_ = state.trace
        self.outcome_ = state.outcome
        self.converged_ = state.outcome is Outcome.CONVERGED
        self.n_iter_ = state.step
        self.lower_bounds_ = [info.mean_objective for info in state.trace]
        self.lower_bound_ = _value(state)
        self.warnings_ = [*state.events, *story.warnings(state.params)]
        self._asked = self._settings()
        self._set_attributes(state.params)

    def _starts(self, passes: Passes, small: bool) -> Iterator[tuple[Story, FitState]]:
        """The states from which fits begin; the best fit is kept."""
        story = self._new_story(passes.source.schema)
        random_state = check_random_state(self.random_state)
        again = self._goes_on(story)
        # Nothing is drawn where another model says how to begin.
        n_starts = 1 if self._begins_with_another(story) else self._n_starts
        seed = FitState.seed if small else int(random_state.randint(2**31 - 1))
        if small or again or self._gives:
            sample = draw_sample(passes, None if small else START_ROWS, seed)
            kept = rescue_rows(sample, seed)
            anchored = story.anchored(sample)
            params = self._params() if again else self._whole_start(anchored)
            if params is not None:
                yield anchored, FitState(params, seed=seed, sample=kept)
                return
            if small:
                for _ in range(n_starts):
                    begin = self._begin(anchored, sample, random_state)
                    yield anchored, FitState(begin, seed=seed, sample=kept)
                return
        yield warm_start(
            story,
            passes,
            n_init=n_starts,
            seed=seed,
            sample_rows=START_ROWS,
            # Components that the caller put somewhere are not moved away.
            refine_passes=0.0 if self._gives else REFINE_PASSES,
            tolerance=self.tol,
            responsibility=self._rule,
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
        # What is frozen is what a start makes of it, or what the caller gave.
        begun = self._seed(replace(story, frozen=frozenset()), rows, random_state)
        return replaced(begun, self._given(story))

    # --- answers ---------------------------------------------------------------------------------

    def _labels(self, dim: str | None) -> Sequence[Any] | None:
        """Labels along the axis of an answer after its row axis."""
        if dim == "component":
            return range(self._story().n_components)
        return self._story().schema.names if dim == "feature" else None

    def _answer(self, data: Data, what: str, seed: int | None = None) -> Any:
        """The answers for all rows, without form."""
        ask = Ask(self._story(), self._params(), what, seed)
        if data.lazy:
            return ask.lazily(data.source)
        passes = self._passes(data.source)
        answer = np.empty((passes.n_rows, *ask.trailing), ask.dtype)
        done = 0
        for piece in passes.map(ask):
            answer[done : done + len(piece)] = piece
            done += len(piece)
        return answer

    def _told(self, data: Data, what: str) -> Any:
        """The answers for all rows, in the form in which the rows were given."""
        dim = QUESTIONS[what].dim
        return data.wrap(self._answer(data, what), dim, self._labels(dim))

    def _ask(self, X: Any, what: str) -> Any:
        check_is_fitted(self)
        return self._told(self._open(X), what)

    def score_samples(self, X: Any) -> Any:
        """(n,) `log p(x)` of each row's observed entries in nats, 0 where there is none: lazy
        where X is. A lower bound of it where `is_bound_`.
        """
        return self._ask(X, "log_prob")

    def _held_out(self, X: Any, sample_weight: Any) -> evaluate.HeldOut:
        check_is_fitted(self)
        data = self._open(X, sample_weight)
        return evaluate.held_out(self._story(), self._params(), self._passes(data.source))

    def score(self, X: Any, y: Any = None, sample_weight: Any = None) -> float:  # noqa: ARG002
        """Mean of `log p(x)` over the rows that have an observed entry, in nats; of a lower bound
        of it where `is_bound_`.

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

    def impute(self, X: Any, random_state: int | np.random.RandomState | None = None) -> Any:
        """X with its gaps filled, in the form of X; what was observed stays as it was.

        Parameters
        ----------
        X
            Rows as for `fit`. Tables keep their types, labels and further columns; a labelled
            xarray object its coordinates. What need not be in memory is filled lazily: a dask
            array or DataFrame as such, arrays in files as dask arrays, and tables in files as dask
            DataFrames of the model's columns.
        random_state
            None fills a gap with its expectation given what the row shows, rounded where the
            column holds whole numbers, or with the likeliest label. A seed fills the gaps of a row
            with one draw from their joint distribution instead, for multiple imputation; it is
            keyed by the number of the row's chunk, so that data cut in other chunks are filled
            with other draws.
        """
        check_is_fitted(self)
        data = self._open(X)
        seed = None if random_state is None else _whole(random_state)
        return data.refill(self._answer(data, "filled", seed), self._story().schema)

    # --- draws -----------------------------------------------------------------------------------

    def sample(self, n_samples: int = 1) -> tuple[Any, ...]:
        """`n_samples` rows drawn from the model, in the form of those that were fitted, and their
        latents: the (n_samples,) component and the (n_samples, q) factors of each, where it has
        such.
        """
        check_is_fitted(self)
        if n_samples < 1:
            raise ConfigError(
                f"Invalid value for 'n_samples': {n_samples} . The sampling requires at least one "
                "sample."
            )
        rng = generator_of(check_random_state(self.random_state))
        drawn = self._story().draw(self._params(), n_samples, rng)
        rows = self._form.decode(self._story().schema, drawn.values)
        return (rows, *(getattr(drawn, name) for name in self.latents))

    def draw(
        self, n_samples: int, *, seed: int = 0, chunk_rows: int = CHUNK_ROWS
    ) -> xarray.Dataset:
        """Rows and latents drawn lazily, as many as you like: see `genstream.dreams.draw_array`."""
        check_is_fitted(self)
        return draw_array(self._story(), self._params(), n_samples, seed, chunk_rows)

    # --- models of some of the columns -----------------------------------------------------------

    def marginal(self, columns: Sequence[str | int]) -> Face:
        """The fitted model of some of the columns, in the order in which they were fitted.

        Columns go by name, or by position. It is of this class where that can describe it, else a
        `Mixture`. Raises DataError where a column is not there.
        """
        check_is_fitted(self)
        names = [self._name(one) for one in ([columns] if isinstance(columns, str) else columns)]
        return self._derived(*self._story().marginal(self._params(), names))

    def condition(self, given: Mapping[str | int, Any]) -> Face:
        """The fitted model of the other columns, given the values of some.

        `given` maps columns, by name or by position, to values: numbers or labels. The model is of
        this class where that can describe it, else a `Mixture`; it can be asked and drawn from as
        this one. Where `is_bound_` it is approximate. Raises DataError where a column is not there
        or cannot hold the value, ConfigError where none or every column is given.
        """
        check_is_fitted(self)
        values = {self._name(column): value for column, value in given.items()}
        return self._derived(*self._story().condition(self._params(), values))

    def _name(self, column: str | int) -> str:
        names = self._story().schema.names
        if isinstance(column, int | np.integer) and -len(names) <= column < len(names):
            return names[column]
        return str(column)

    def _derived(self, story: Story, params: Params) -> Face:
        """A fitted model of another story, which came of this one's."""
        model = self._blank(story, params)
        names = story.schema.names
        model._form = self._form.of(names)
        model._set_names(names, hasattr(self, "feature_names_in_"))
        seed = self.state_.seed if hasattr(self, "state_") else FitState.seed
        model._keep(story, FitState(params, seed=seed, outcome=Outcome.CONVERGED))
        return model

    def _blank(self, story: Story, params: Params) -> Face:
        """An estimator that is not fitted, for a story with fewer columns."""
        # The general face stands for all others, so that it can only be looked at from here.
        from genstream.estimators.mixtures import Mixture

        settings = self.get_params(deep=False)
        anew = {name: x for name, x in self._reset(story).items() if name in settings}
        own = type(self)(**settings | anew)
        if own._describes(story, params):
            return own
        manners = {name: settings[name] for name in MANNERS}
        return Mixture(story.n_components, columns=story.schema, prior=None, **manners)

    def _describes(self, story: Story, params: Params) -> bool:  # noqa: ARG002
        """Whether fits of this estimator could have this story."""
        try:
            return _kind(self._make_story(story.schema)) == _kind(story)
        except ConfigError:
            # Too few columns are left for a model of this class.
            return False

    def _reset(self, story: Story) -> dict[str, Any]:  # noqa: ARG002
        """Parameters that do not hold for a model that came of this one."""
        return {"start": None, "frozen": (), "prior": None}

    @property
    def params_(self) -> xarray.Dataset:
        """The parameters in data units as a labelled dataset."""
        check_is_fitted(self)
        story = self._story()
        labels: dict[str, Sequence[Any]] = {**story.labels()}
        for dim in ("component", "factor"):
            found = self._labels(dim)
            if found is not None:
                labels[dim] = found
        return self._params().to_dataset(labels)


class Mixed(Face):
    """A face of a mixture: every row belongs to a component."""

    n_components: int

    @property
    def _k(self) -> int:
        return self.n_components

    @property
    def _rule(self) -> Responsibility:
        name = getattr(self, "responsibility", "auto")
        return by_size(self._k) if name == "auto" else named(name)

    def known_failures(self) -> dict[str, str]:
        if self._k == 1:
            return {}
        reason = "a start draws rows, and so depends on how many there are"
        return {"check_sample_weight_equivalence_on_dense_data": reason}

    def fit_predict(self, X: Any, y: Any = None, sample_weight: Any = None) -> Any:  # noqa: ARG002
        """Fit, then (n,) the likeliest component of each row; parameters as for `fit`."""
        return self._told(self._fit(X, sample_weight), "component")

    def predict(self, X: Any) -> Any:
        """(n,) the likeliest component of each row: a dask array where X is out of core."""
        return self._ask(X, "component")

    def predict_proba(self, X: Any) -> Any:
        """(n, K) `p(k | x)` of each row, from its observed entries: lazy where X is."""
        return self._ask(X, "responsibilities")


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


def given_array(name: str, value: Any, shape: tuple[int, ...]) -> Array:
    """An array that the caller gave to begin with. Raises ConfigError where its shape is wrong."""
    array: Array = check_array(value, dtype=np.float64, ensure_2d=False, allow_nd=True)
    if array.shape != shape:
        raise ConfigError(
            f"The parameter '{name}' should have the shape of {shape}, but got {array.shape}"
        )
    return array


def generator_of(random_state: np.random.RandomState) -> np.random.Generator:
    """NumPy's generator, seeded by scikit-learn's kind of random state."""
    return np.random.default_rng(random_state.randint(2**31 - 1))


def _whole(random_state: int | np.random.RandomState) -> int:
    """A seed from scikit-learn's kind of random state: itself where it is one."""
    if isinstance(random_state, int | np.integer):
        return int(random_state)
    return int(check_random_state(random_state).randint(2**31 - 1))


def _kind(story: Story) -> tuple[Any, ...]:
    """What `p(x | z)` is, in a form to compare."""

    def asked(options: Any) -> Any:
        if isinstance(options, list):
            return [asked(each) for each in options]
        if not isinstance(options, dict):
            return options
        # These are what a sample of rows made of them.
        return {key: asked(x) for key, x in options.items() if key not in ("pivot", "total")}

    return story.n_components, story.family.name, asked(story.family.options())


def _alike(one: Story, other: Story) -> bool:
    """Whether parameters of one story are parameters of the other."""

    def form(story: Story) -> Any:
        columns = [(column.kind, column.levels) for column in story.schema.columns]
        return story.n_components, story.n_factors, columns, story.family.params_type

    return bool(form(one) == form(other))
