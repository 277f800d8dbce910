"""Generative models for data that do not fit in memory or do not stop arriving.

A model is a story of how a row comes to be, `z ~ p(z)` then `x ~ p(x|z)`; learning is a fold of
sufficient statistics over chunks. Names are imported when they are first used, so that the import
itself stays light.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "BatchEM": "learn",
    "IncrementalEM": "incremental",
    "Relay": "learn",
    "OnlineEM": "online",
    "Column": "schema",
    "Schema": "schema",
    "Rows": "rows",
    "Sampled": "responsibility",
    "Truncated": "responsibility",
    "hard": "responsibility",
    "soft": "responsibility",
    "Prior": "priors",
    "Story": "story",
    "mixture": "stories",
    "fit": "learn",
    "Passes": "passes",
    "Profile": "profile",
    "warm_start": "start",
    "default_learner": "start",
    "open_source": "tables",
    "draw_array": "dreams",
    "impute_source": "dreams",
    "FactorAnalysis": "estimators",
    "GaussianMixture": "estimators",
    "KMeans": "estimators",
    "LatentFactors": "estimators",
    "Mixture": "estimators",
    "MixtureOfFactorAnalyzers": "estimators",
    "MixtureOfPPCA": "estimators",
    "PPCA": "estimators",
    "StudentMixture": "estimators",
    "load": "models",
    "stream": "landing",
    "update": "updates",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'genstream' has no attribute {name!r}")
    return getattr(importlib.import_module(f"genstream.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
