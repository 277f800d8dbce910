"""Factor models: columns that depend on a few hidden factors, and mixtures of such models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
from sklearn.base import ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils.validation import check_is_fitted

from genstream.errors import ConfigError, DataError
from genstream.estimators.face import Face, Mixed
from genstream.families.blocks import Array
from genstream.families.rotation import varimax
from genstream.learn import BatchEM, Learner
from genstream.priors import Prior
from genstream.schema import Schema
from genstream.stories import factors
from genstream.story import Params, Story

ROTATIONS = ("varimax", None)


class Factored(ClassNamePrefixFeaturesOutMixin, TransformerMixin, Face):  # type: ignore[misc]
    """A face of a model with factors `t`: rows are transformed into the posterior means of theirs.

    Loadings are known up to a rotation of the factors. What is shown, and asked of rows, is one
    view of them, which leaves the density as it is.
    """

    latents: ClassVar[tuple[str, ...]] = ("factors",)

    @property
    def _n_features_out(self) -> int:
        n: int = self.story_.n_factors
        return n

    def _labels(self, dim: str | None) -> Sequence[Any] | None:
        return self.get_feature_names_out() if dim == "factor" else super()._labels(dim)

    def _params(self) -> Params:
        params: Params = self._view
        return params

    def _set_attributes(self, params: Params) -> None:
        self._view = self._turned(params)

    def _turned(self, params: Params) -> Params:
        """The same density with the factors turned into those to show."""
        return params

    def _learner(self, max_steps: int) -> Learner:
        return BatchEM(max_steps, self.tol, self._rule, accelerate=True)

    def transform(self, X: Any) -> Any:
        """(n, q) `E[t | x]`, the posterior mean of the factors of each row: lazy where X is.

        A row is seen through its observed entries; one with none has factors 0. In a mixture the
        factors are those of the likeliest component.
        """
        return self._ask(X, "factors")

    def _inverse(self, T: Any, expected: Any) -> Any:
        """Expected rows in the form of the factors T (n, q): `expected` makes them of an array."""
        check_is_fitted(self)
        q, names = self._n_features_out, list(self._story().schema.names)
        labelled = hasattr(T, "dims")
        values = T.data if labelled else T if hasattr(T, "dask") else np.asarray(T)
        if values.ndim != 2 or values.shape[1] != q:
            raise DataError(f"T has shape {values.shape}, but the model has {q} factors")
        rows = expected(values)
        if not labelled:
            return rows
        import xarray

        coords = {name: x for name, x in T.coords.items() if x.dims == T.dims[:1]}
        return xarray.DataArray(
            rows, dims=(T.dims[0], "feature"), coords=coords | {"feature": names}
        )


class LinearFactors(Factored):
    """What faces of linear-Gaussian factors share.

    t ~ N(0, I_q),    x | k, t ~ N(mean_k + t components_k, noise_k)
    """

    n_components: int
    # What the noise of a component is: `isotropic` or `diagonal`.
    noise: ClassVar[str]

    @property
    def _q(self) -> int:
        return self.n_components

    @property
    def _shared_noise(self) -> bool:
        return False

    def _make_story(self, schema: Schema) -> Story:
        if not self._q < schema.n_features:
            raise ConfigError(
                f"{type(self).__name__} with {self._q} factors needs more columns than that, and "
                f"X has n_features = {schema.n_features}"
            )
        return factors(
            schema,
            self._q,
            self._k,
            noise=self.noise,
            shared_noise=self._shared_noise,
            prior=self.prior,
            dtype=self.dtype,
        )

    def _turned(self, params: Params) -> Params:
        family: Any = params.family
        wide = np.broadcast_to(_wide(family), family.mean.shape)
        loadings = [self._view_of(w, noise) for w, noise in zip(family.loadings, wide, strict=True)]
        return replace(params, family=replace(family, loadings=np.array(loadings)))

    def _view_of(self, loadings: Array, noise: Array) -> Array:
        """(d, q) turned so that `t` given a row has a diagonal covariance: factors come by falling
        share of what they explain, each with its largest loading positive.
        """
        right = np.linalg.svd(loadings / np.sqrt(noise)[:, None], full_matrices=False)[2]
        return upright(loadings @ right.T)

    def _covariances(self) -> Array:
        """(K, d, d)."""
        family: Any = self._params().family
        d = family.mean.shape[1]
        wide = np.broadcast_to(_wide(family), family.mean.shape)
        shared = family.loadings @ family.loadings.swapaxes(1, 2)
        return np.asarray(shared + wide[:, :, None] * np.eye(d))

    def _precisions(self) -> Array:
        """(K, d, d) by Woodbury's identity: only q x q matrices are inverted."""
        family: Any = self._params().family
        d, q = family.loadings.shape[1:]
        wide = np.broadcast_to(_wide(family), family.mean.shape)
        scaled = family.loadings / wide[:, :, None]
        inner = np.eye(q) + family.loadings.swapaxes(1, 2) @ scaled
        taken = scaled @ np.linalg.solve(inner, scaled.swapaxes(1, 2))
        return np.asarray(np.eye(d) / wide[:, :, None] - taken)


def upright(loadings: Array) -> Array:
    """Loadings (d, q) with the signs that make the largest of each factor positive."""
    largest = loadings[np.abs(loadings).argmax(axis=0), np.arange(loadings.shape[1])]
    return np.asarray(loadings * np.where(largest < 0, -1.0, 1.0))


def _wide(family: Any) -> Array:
    """Noise variances with axes component and feature, of length 1 where they are shared."""
    noise = np.asarray(family.noise)
    return noise[:, None] if noise.shape == family.mean.shape[:1] else np.atleast_2d(noise)


class _SingleFactors(LinearFactors):
    """Linear-Gaussian factors of one component."""

    def __init__(
        self,
        n_components: int = 1,
        *,
        prior: str | Prior | None = None,
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

    def _set_attributes(self, params: Params) -> None:
        super()._set_attributes(params)
        family: Any = self._view.family
        self.n_components_ = family.loadings.shape[2]
        self.components_ = family.loadings[0].T
        self.mean_ = family.mean[0]
        self.noise_variance_ = family.noise[0]

    def inverse_transform(self, T: Any) -> Any:
        """(n, d) the expected rows `mean_ + T components_` of factors T (n, q): lazy where T is."""
        return self._inverse(T, lambda t: t @ self.components_ + self.mean_)

    def get_covariance(self) -> Array:
        """(d, d) `components_' components_ + noise`, the model's covariance of the columns."""
        check_is_fitted(self)
        covariance: Array = self._covariances()[0]
        return covariance

    def get_precision(self) -> Array:
        """(d, d) inverse of the model's covariance."""
        check_is_fitted(self)
        precision: Array = self._precisions()[0]
        return precision


class PPCA(_SingleFactors):
    """Probabilistic principal component analysis (Tipping & Bishop 1999).

        t ~ N(0, I_q),    x | t ~ N(mean_ + t components_, noise_variance_ I)

    Its maximum is that of principal component analysis: the axes are those of
    `sklearn.decomposition.PCA`, and one pass over complete data of up to 256 columns finds it. With
    gaps it is the maximum over what was observed, whatever the pattern.

    Parameters
    ----------
    n_components
        q, the number of factors; less than there are columns.
    prior
        None for maximum likelihood, `weak` for MAP under weak priors of mean and noise.
    tol, max_iter, n_init
        EM, accelerated, stops when a step changes the mean objective (log-likelihood plus
        log-prior) by less than `tol` nats a row, or after `max_iter` steps. `n_init` starts
        compete.
    start, frozen
        Parameters to begin with, and the names of those that stay as the start has them (`mean`,
        `loadings`, `noise`); see `GaussianMixture`.
    random_state, warm_start, verbose, verbose_interval, dtype, chunk_rows, scheduler, workers
        As for `GaussianMixture`.

    Attributes
    ----------
    components_ : (q, d)
        Loadings along the principal axes, by falling length: the axes of unit length are
        `principal_axes_`.
    principal_axes_ : (q, d)
    explained_variance_, explained_variance_ratio_ : (q,)
        Variance along each axis, noise included, and its share of the whole.
    mean_ : (d,)
    noise_variance_ : float
        Variance in every direction besides the axes.
    n_components_ : int
    converged_, is_bound_, n_iter_, lower_bound_, lower_bounds_, n_features_in_, \
feature_names_in_, story_, state_, trace_, outcome_, warnings_
        As for `GaussianMixture`.
    """

    noise: ClassVar[str] = "isotropic"

    def _set_attributes(self, params: Params) -> None:
        super()._set_attributes(params)
        self.noise_variance_ = float(self.noise_variance_)
        length = np.linalg.norm(self.components_, axis=1)
        self.principal_axes_ = self.components_ / np.where(length > 0, length, 1.0)[:, None]
        self.explained_variance_ = length**2 + self.noise_variance_
        whole = (length**2).sum() + len(self.mean_) * self.noise_variance_
        self.explained_variance_ratio_ = self.explained_variance_ / whole


class FactorAnalysis(_SingleFactors):
    """Factor analysis, in place of `sklearn.decomposition.FactorAnalysis`.

        t ~ N(0, I_q),    x | t ~ N(mean_ + t components_, diag(noise_variance_))

    Attributes and methods of the same name are scikit-learn's. Gaps are integrated out whatever
    their pattern; one pass over complete data of up to 256 columns sums all that is needed.

    Parameters
    ----------
    n_components
        q, the number of factors; less than there are columns.
    rotation
        `varimax` shows the factors so that each bears on few columns (Kaiser 1958); None so that
        their posterior covariance is diagonal. It is a view: the fit, its density and the state
        that is stored are the same.
    prior
        None for maximum likelihood, under which a column's noise may sit on its floor (a Heywood
        case, told of in `warnings_`); `weak` for MAP under weak priors of mean and noise.
    tol, max_iter, n_init, start, frozen
        As for `PPCA`.
    random_state, warm_start, verbose, verbose_interval, dtype, chunk_rows, scheduler, workers
        As for `GaussianMixture`.

    Attributes
    ----------
    components_ : (q, d)
        Loadings, rotated as asked.
    mean_, noise_variance_ : (d,)
    n_components_ : int
    converged_, is_bound_, n_iter_, lower_bound_, lower_bounds_, n_features_in_, \
feature_names_in_, story_, state_, trace_, outcome_, warnings_
        As for `GaussianMixture`.
    """

    noise: ClassVar[str] = "diagonal"

    def __init__(
        self,
        n_components: int = 1,
        *,
        rotation: str | None = None,
        prior: str | Prior | None = None,
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
        super().__init__(
            n_components,
            prior=prior,
            tol=tol,
            max_iter=max_iter,
            n_init=n_init,
            start=start,
            frozen=frozen,
            random_state=random_state,
            warm_start=warm_start,
            verbose=verbose,
            verbose_interval=verbose_interval,
            dtype=dtype,
            chunk_rows=chunk_rows,
            scheduler=scheduler,
            workers=workers,
        )
        self.rotation = rotation

    def _check_parameters(self) -> None:
        super()._check_parameters()
        if self.rotation not in ROTATIONS:
            raise ConfigError(
                "The 'rotation' parameter of FactorAnalysis must be one of varimax, None. "
                f"Got {self.rotation!r} instead."
            )

    def _view_of(self, loadings: Array, noise: Array) -> Array:
        shown = super()._view_of(loadings, noise)
        return varimax(shown)[0] if self.rotation == "varimax" else shown


class _MixedFactors(Mixed, LinearFactors):
    """Linear-Gaussian factors of several components."""

    latents: ClassVar[tuple[str, ...]] = ("component", "factors")

    def __init__(
        self,
        n_components: int = 1,
        n_factors: int = 1,
        *,
        shared_noise: bool = False,
        prior: str | Prior | None = "weak",
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
        self.n_factors = n_factors
        self.shared_noise = shared_noise
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

    @property
    def _q(self) -> int:
        return self.n_factors

    @property
    def _shared_noise(self) -> bool:
        return self.shared_noise

    def _set_attributes(self, params: Params) -> None:
        super()._set_attributes(params)
        family: Any = self._view.family
        self.weights_ = params.weights
        self.components_ = family.loadings.swapaxes(1, 2)
        self.means_ = family.mean
        self.noise_variance_ = family.noise

    def inverse_transform(self, T: Any, component: Any = None) -> Any:
        """(n, d) the expected rows `means_[k] + T components_[k]` of factors T (n, q).

        `component` is k, for all rows or (n,) for each of them, as `predict` gives it. Lazy where T
        is and k is one number. Raises ConfigError where it is left out.
        """
        if component is None:
            raise ConfigError(
                "inverse_transform: factors mean something else in each component: give "
                "component=model.predict(X) as well"
            )
        k = np.asarray(component)
        if k.ndim == 0:
            return self._inverse(T, lambda t: t @ self.components_[k] + self.means_[k])
        return self._inverse(
            T,
            lambda t: np.einsum("nq,nqd->nd", np.asarray(t), self.components_[k]) + self.means_[k],
        )

    def get_covariance(self) -> Array:
        """(K, d, d) the model's covariance of the columns in each component."""
        check_is_fitted(self)
        return self._covariances()

    def get_precision(self) -> Array:
        """(K, d, d) inverses of the model's covariances."""
        check_is_fitted(self)
        return self._precisions()


class MixtureOfPPCA(_MixedFactors):
    """A mixture of probabilistic principal component analysers (Tipping & Bishop 1999b).

        k ~ Categorical(weights_),    t ~ N(0, I_q),
        x | k, t ~ N(means_[k] + t components_[k], noise_variance_[k] I)

    Parameters
    ----------
    n_components
        K.
    n_factors
        q, the factors of each component; less than there are columns.
    shared_noise
        Whether all components have the same noise.
    prior
        `weak` for MAP under weak priors, a `Prior` for stronger ones, None for maximum likelihood.
    tol, max_iter, n_init, start, frozen
        As for `PPCA`; `weights` can be frozen too.
    random_state, warm_start, verbose, verbose_interval, dtype, chunk_rows, scheduler, workers
        As for `GaussianMixture`.

    Attributes
    ----------
    weights_ : (K,)
    means_ : (K, d)
    components_ : (K, q, d)
        Loadings along the principal axes of each component, by falling length.
    noise_variance_ : (K,), or a number where it is shared
    converged_, is_bound_, n_iter_, lower_bound_, lower_bounds_, n_features_in_, \
feature_names_in_, story_, state_, trace_, outcome_, warnings_
        As for `GaussianMixture`.
    """

    noise: ClassVar[str] = "isotropic"


class MixtureOfFactorAnalyzers(_MixedFactors):
    """A mixture of factor analysers (Ghahramani & Hinton 1996).

        k ~ Categorical(weights_),    t ~ N(0, I_q),
        x | k, t ~ N(means_[k] + t components_[k], diag(noise_variance_[k]))

    A full covariance a component with d q numbers in place of d^2 / 2, also for thousands of
    columns. Parameters and attributes are those of `MixtureOfPPCA`, but `noise_variance_` is
    (K, d), or (d,) where it is shared, and factors are shown so that their posterior covariance is
    diagonal.
    """

    noise: ClassVar[str] = "diagonal"
