"""K-means: hard EM on equal spherical Gaussians, with gaps, weights and data beyond memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike
from sklearn.base import ClassNamePrefixFeaturesOutMixin, ClusterMixin, TransformerMixin
from sklearn.cluster import kmeans_plusplus
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted

from genstream.errors import ConfigError
from genstream.estimators import face
from genstream.estimators.face import Face, Mixed, generator_of
from genstream.estimators.questions import Data
from genstream.estimators.starts import replaced
from genstream.families.blocks import Array
from genstream.learn import BatchEM, FitState, Learner, fit
from genstream.online import OnlineEM
from genstream.passes import Passes
from genstream.responsibility import hard
from genstream.rows import Rows
from genstream.schema import Schema
from genstream.start import draw_sample, rescue_rows, seed_centres
from genstream.stories import kmeans
from genstream.story import Params, Story

INITS = ("k-means++", "random")


@dataclass(frozen=True, eq=False)
class Inertia:
    """Work for a pass: the sum over a chunk's rows of their weight times the least squared
    distance from a centre (K, d), over the entries observed.
    """

    centres: Array

    def __call__(self, _chunk: int, rows: Rows) -> float:
        least = np.full(rows.n_rows, np.inf)
        seen = rows.is_observed
        for centre in self.centres:
            apart = np.where(seen, rows.values - centre, 0.0)
            np.minimum(least, np.einsum("nd,nd->n", apart, apart), out=least)
        return float(rows.row_weights @ least)


class KMeans(ClassNamePrefixFeaturesOutMixin, TransformerMixin, ClusterMixin, Mixed):  # type: ignore[misc]
    """K-means, in place of `sklearn.cluster.KMeans`.

    It is hard EM on the story

        k ~ Uniform(1..K),    x | k ~ N(cluster_centers_[k], variance I)

    whose steps are those of Lloyd's algorithm (Celeux & Govaert 1992). A row with gaps belongs to
    the centre that is nearest over its observed entries, and counts for those alone. On complete
    data in memory of at most 50,000 rows, starts are scikit-learn's own; on more rows, and out of
    core, `n_init` fits on a sample of 50,000 rows compete, and the best begins the full passes.

    Parameters
    ----------
    n_clusters
        K.
    init
        `k-means++`, `random` for rows drawn by their weights, or (K, d) centres.
    n_init
        Starts; `auto` is 10 for `random` and 1 elsewhere.
    max_iter, tol
        Steps at most, and the gain in nats a row below which a step is the last; 0 goes on until
        nothing moves.
    start, frozen
        As for `GaussianMixture`: centres are called `mean`. `weights` are frozen always.
    random_state, warm_start, verbose, verbose_interval, dtype, chunk_rows, scheduler, workers
        As for `GaussianMixture`.

    Attributes
    ----------
    cluster_centers_ : (K, d)
    labels_ : (n,)
        The cluster of each row of `fit`, as `predict` gives it: lazy where the rows are.
    inertia_ : float
        Sum of `weight |x - centre|^2` over the rows of `fit` and their observed entries.
    n_iter_ : int
        Steps of the best fit.
    converged_, is_bound_, lower_bound_, lower_bounds_, n_features_in_, feature_names_in_, story_, \
state_, trace_, outcome_, warnings_
        As for `GaussianMixture`.
    """

    automatic: ClassVar[tuple[str, ...]] = ("n_init",)

    def __init__(
        self,
        n_clusters: int = 8,
        *,
        init: str | ArrayLike = "k-means++",
        n_init: int | str = "auto",
        max_iter: int = 300,
        tol: float = 1e-4,
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
        self.n_clusters = n_clusters
        self.init = init
        self.n_init = n_init
        self.max_iter = max_iter
        self.tol = tol
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

    @property
    def _k(self) -> int:
        return self.n_clusters

    @property
    def _n_features_out(self) -> int:
        return len(self.cluster_centers_)

    @property
    def _n_starts(self) -> int:
        if self.n_init != "auto":
            return int(self.n_init)
        return 10 if isinstance(self.init, str) and self.init == "random" else 1

    def known_failures(self) -> dict[str, str]:
        # So says scikit-learn of its own KMeans, in its list of exceptions.
        reason = "sample_weight is not equivalent to removing/repeating samples"
        return {"check_sample_weight_equivalence_on_dense_data": reason}

    def _check_parameters(self) -> None:
        super()._check_parameters()
        if isinstance(self.init, str) and self.init not in INITS:
            raise ConfigError(
                f"The 'init' parameter of KMeans must be one of {', '.join(INITS)} or an array of "
                f"centres. Got {self.init!r} instead."
            )

    def _make_story(self, schema: Schema) -> Story:
        return kmeans(schema, self.n_clusters, dtype=self.dtype)

    def _learner(self, max_steps: int) -> Learner:
        # Where nothing moves any more, the gain is 0 to the bit.
        tolerance = max(self.tol, float(np.finfo(np.float64).tiny))
        return BatchEM(max_steps, tolerance, responsibility=hard)

    def _online(self) -> OnlineEM:
        return OnlineEM(responsibility=hard)

    def _set_attributes(self, params: Params) -> None:
        family: Any = params.family
        self.cluster_centers_ = family.mean

    # --- first centres ---------------------------------------------------------------------------

    @property
    def _gives(self) -> bool:
        return self.start is not None or not isinstance(self.init, str)

    def _given(self, story: Story) -> dict[str, Array]:
        found = {"weights": np.full(story.n_components, 1 / story.n_components)}
        if not isinstance(self.init, str):
            shape = (story.n_components, story.schema.n_features)
            found["family.mean"] = face.given_array("init", self.init, shape)
        return super()._given(story) | found

    def _whole_start(self, story: Story) -> Params | None:
        given = self._given(story)
        # No assignment depends on the variance.
        if "family.mean" not in given:
            return None
        return replaced(story.vague(), given)

    def _seed(self, story: Story, rows: Rows, random_state: np.random.RandomState) -> Params:
        if self._begins_with_another(story):
            return super()._seed(story, rows, random_state)
        k, seen = story.n_components, rows.is_observed
        # What a row does not tell of a centre is the column's mean; of a column never seen, 0.
        mean = (rows.values * seen).sum(axis=0) / np.maximum(seen.sum(axis=0), 1)
        x = np.where(seen, rows.values - mean, 0.0)
        if self.init == "random":
            share = None if rows.weights is None else rows.weights / rows.weights.sum()
            centres = mean + x[random_state.choice(rows.n_rows, size=k, replace=False, p=share)]
        elif rows.observed is None:
            centres = kmeans_plusplus(
                rows.values, k, sample_weight=rows.weights, random_state=random_state
            )[0]
        else:
            centres = mean + seed_centres(x, seen, rows.row_weights, k, generator_of(random_state))
        return replaced(story.vague(), {"family.mean": np.asarray(centres, np.float64)})

    def _starts(self, passes: Passes, small: bool) -> Iterator[tuple[Story, FitState]]:
        if small or self._gives or self._goes_on(self._new_story(passes.source.schema)):
            yield from super()._starts(passes, small)
            return
        random_state = check_random_state(self.random_state)
        seed = int(random_state.randint(2**31 - 1))
        sample = draw_sample(passes, face.START_ROWS, seed)
        story = self._new_story(passes.source.schema).anchored(sample)
        local, fits = passes.over(sample), []
        for _ in range(self._n_starts):
            begun = FitState(self._begin(story, sample, random_state), seed=seed)
            fits.append(fit(story, self._learner(self.max_iter), local, begun))
        best = max(fits, key=lambda state: state.trace[-1].mean_objective if state.trace else 0.0)
        yield story, FitState(best.params, seed=seed, sample=rescue_rows(sample, seed))

    # --- answers ---------------------------------------------------------------------------------

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> KMeans:  # noqa: ARG002
        """Find the centres; parameters as for `GaussianMixture.fit`."""
        data = self._fit(X, sample_weight)
        self.labels_ = self._told(data, "component")
        self.inertia_ = self._inertia(data)
        return self

    def fit_predict(self, X: Any, y: Any = None, sample_weight: Any = None) -> Any:  # noqa: ARG002
        """Fit, then (n,) the cluster of each row; parameters as for `fit`."""
        return self.fit(X, sample_weight=sample_weight).labels_

    def _inertia(self, data: Data) -> float:
        return sum(self._passes(data.source).map(Inertia(self.cluster_centers_)))

    def transform(self, X: Any) -> Any:
        """(n, K) distances from each centre, over the observed entries and scaled up to all of
        them: lazy where X is.
        """
        return self._ask(X, "distances")

    def score(self, X: Any, y: Any = None, sample_weight: Any = None) -> float:  # noqa: ARG002
        """What inertia would be on X, with the sign turned so that higher is better."""
        check_is_fitted(self)
        return -self._inertia(self._open(X, sample_weight))

    def condition(self, given: Mapping[str | int, Any]) -> Face:
        """The fitted mixture of spherical Gaussians of the other columns, given the values of
        some, as a `Mixture`: clusters are not equally likely any more. See
        `GaussianMixture.condition`.
        """
        return super().condition(given)

    def _describes(self, story: Story, params: Params) -> bool:
        return bool(np.ptp(params.weights) < 1e-12) and super()._describes(story, params)
