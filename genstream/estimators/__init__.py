"""The scikit-learn faces: estimators with `fit` and `predict` that also take data beyond memory.

`GaussianMixture` takes the place of `sklearn.mixture.GaussianMixture`: the same parameters,
attributes and methods, and by default the same estimate. All estimators accept row weights and
gaps (NaN) everywhere, and besides arrays and tables in memory a dask array, an xarray object, a
zarr array or a path; the answers for those are dask arrays, computed chunk by chunk when asked for.
"""

from genstream.estimators.factors import (
    PPCA,
    FactorAnalysis,
    MixtureOfFactorAnalyzers,
    MixtureOfPPCA,
)
from genstream.estimators.kmeans import KMeans
from genstream.estimators.latent import LatentFactors
from genstream.estimators.mixtures import GaussianMixture, Mixture, StudentMixture

__all__ = [
    "PPCA",
    "FactorAnalysis",
    "GaussianMixture",
    "KMeans",
    "LatentFactors",
    "Mixture",
    "MixtureOfFactorAnalyzers",
    "MixtureOfPPCA",
    "StudentMixture",
]
