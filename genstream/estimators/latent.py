"""Latent factors of binary and count columns, whose likelihoods have no closed form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
from scipy.sparse import issparse

from genstream.errors import ConfigError, DataError
from genstream.estimators.factors import Factored, upright
from genstream.priors import Prior
from genstream.schema import Column, Kind, Schema
from genstream.stories import latent_factors
from genstream.story import Params, Story

LIKELIHOODS = ("count", "binary")


class LatentFactors(Factored):
    """Binary or count columns that depend on a few factors.

        t ~ N(0, I_q),               x_j | t ~ Bernoulli(sigmoid(intercept_[j] + (t components_)_j))
        t_i ~ Gamma(shape_i, shape_i),  x_j | t ~ Poisson((t components_)_j)

    by `likelihood`: logistic factors of binary columns (Jaakkola & Jordan 2000), or gamma-Poisson
    factors of counts (Canny 2004), of mean 1. Neither has a likelihood in closed form:
    log-probabilities are lower bounds, the tightest of their kind for every row, and are called so
    (`is_bound_`). `genstream.evaluate.importance_log_prob` estimates the likelihood itself, with
    which models can be compared.

    Parameters
    ----------
    n_components
        q, the number of factors.
    likelihood
        `count` or `binary`: what all columns are.
    columns
        The columns as for `Mixture`, where they need to be told: labels of binary ones, or which
        columns of a table are meant. None takes all.
    binarize
        Of binary columns: entries above this number are 1, all others 0. None takes 0 and 1 only.
    prior
        `weak` for MAP under weak priors, a `Prior` for stronger ones, None for maximum likelihood.
    tol, max_iter, n_init, start, frozen
        As for `PPCA`; parameters are `bias` and `loadings`, or `loadings` and `shape`.
    random_state, warm_start, verbose, verbose_interval, dtype, chunk_rows, scheduler, workers
        As for `GaussianMixture`.

    Attributes
    ----------
    components_ : (q, d)
        Log-odds, or counts, that a unit of each factor adds to each column. Those of binary columns
        are shown so that they are orthogonal, by falling length.
    intercept_ : (d,)
        Log-odds where all factors are 0; of binary columns.
    shape_ : (q,)
        Of counts: a factor has variance `1 / shape_`.
    schema_ : Schema
    n_components_ : int
    converged_, is_bound_, n_iter_, lower_bound_, lower_bounds_, n_features_in_, \
feature_names_in_, story_, state_, trace_, outcome_, warnings_
        As for `GaussianMixture`.
    """

    takes_labels: ClassVar[bool] = True

    def __init__(
        self,
        n_components: int = 1,
        *,
        likelihood: str = "count",
        columns: Schema | Mapping[str, Kind | Column] | None = None,
        binarize: float | None = None,
        prior: str | Prior | None = "weak",
        tol: float = 1e-4,
        max_iter: int = 200,
        n_init: int = 1,
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
        self.likelihood = likelihood
        self.columns = columns
        self.binarize = binarize
        self.prior = prior
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

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        if self.binarize is None:
            # Whole numbers that are not negative.
            tags.input_tags.categorical = tags.input_tags.positive_only = True
        return tags

    def known_failures(self) -> dict[str, str]:
        reason = "the check gives fractions, whatever the tags say, and counts have none"
        if self.likelihood != "count":
            if self.n_components == 1:
                return {}
            reason = "a start draws rows, and so depends on how many there are"
        kinds = ("dense", "sparse") if self._takes_sparse else ("dense",)
        return {f"check_sample_weight_equivalence_on_{kind}_data": reason for kind in kinds}

    def _check_parameters(self) -> None:
        super()._check_parameters()
        if self.likelihood not in LIKELIHOODS:
            raise ConfigError(
                "The 'likelihood' parameter of LatentFactors must be one of count, binary. "
                f"Got {self.likelihood!r} instead."
            )
        if self.binarize is not None and self.likelihood != "binary":
            raise ConfigError("The 'binarize' parameter of LatentFactors is for binary columns")

    def _make_story(self, schema: Schema) -> Story:
        return latent_factors(schema, self.n_components, prior=self.prior, dtype=self.dtype)

    def _wanted_columns(self) -> Schema | Mapping[str, Kind | Column] | None:
        return self.columns

    @property
    def _takes_sparse(self) -> bool:
        return self.binarize is None

    @property
    def _kind(self) -> Kind | None:
        return "binary" if self.likelihood == "binary" else "count"

    def _describe(self, found: Schema) -> Schema:
        return self.columns if isinstance(self.columns, Schema) else super()._describe(found)

    def _numbers(self, array: Any) -> Any:
        if self.binarize is None:
            if issparse(array):
                # Its rows are checked as they are read.
                return array
            if isinstance(array, np.ndarray) and (array < 0).any():
                i, j = np.argwhere(array < 0)[0]
                raise DataError(
                    f"Negative values in data: row {i}, column {j} is {array[i, j]:g}, and "
                    f"LatentFactors takes {self.likelihood} columns"
                )
            return array
        if not hasattr(array, "ndim") or not hasattr(array, "astype"):
            raise ConfigError("The 'binarize' parameter of LatentFactors is for arrays only")
        above = array > self.binarize
        if issparse(array):
            stored: Any = array
            return above + 0.0 * stored
        # A missing entry stays so, and so does an infinity, which is refused as the row is read.
        if hasattr(array, "dims"):
            return array.where(~np.isfinite(array), above)
        return np.where(np.isfinite(array), above, array)

    def _reset(self, story: Story) -> dict[str, Any]:
        return super()._reset(story) | {"columns": story.schema}

    def _turned(self, params: Params) -> Params:
        if self.likelihood != "binary":
            return params
        family: Any = params.family
        shown = upright(family.loadings[0] @ np.linalg.svd(family.loadings[0])[2].T)
        return replace(params, family=replace(family, loadings=shown[None]))

    def _set_attributes(self, params: Params) -> None:
        super()._set_attributes(params)
        family: Any = self._view.family
        self.schema_ = self.story_.schema
        self.components_ = family.loadings[0].T
        self.n_components_ = len(self.components_)
        if self.likelihood == "binary":
            self.intercept_ = family.bias[0]
        else:
            self.shape_ = family.shape[0]

    def inverse_transform(self, T: Any) -> Any:
        """(n, d) the expected rows of factors T (n, q), or chances of a 1: lazy where T is."""
        if self.likelihood == "binary":
            return self._inverse(T, lambda t: _sigmoid(t @ self.components_ + self.intercept_))
        return self._inverse(T, lambda t: t @ self.components_)


def _sigmoid(log_odds: Any) -> Any:
    """Also of dask arrays."""
    return 0.5 + 0.5 * np.tanh(0.5 * log_odds)
